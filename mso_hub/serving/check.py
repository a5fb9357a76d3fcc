"""serve_check(): headers, config and the tables -> what runs how, what fits, and the command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mso_hub.checkpoint import Checkpoint, TensorInfo
from mso_hub.errors import RecipeError
from mso_hub.events import Listener, ignore
from mso_hub.formats.detect import quantization_configs
from mso_hub.formats.dialects.ktransformers import LAYOUT as KTRANSFORMERS
from mso_hub.formats.weight import Weight
from mso_hub.hub import Origin
from mso_hub.serving.formats import Found, formats_of
from mso_hub.serving.gpus import Gpu
from mso_hub.serving.kernels import REFUSED, Kernel, kernel_for
from mso_hub.serving.memory import UTILIZATION, cache_of, overhead, share_of, sizes_of
from mso_hub.source import Source
from mso_hub.verify.opened import opening
from mso_hub.verify.parallel import cuts_of, heads_of, misfits, setting, whole

UNKNOWN = "not in the table: its kernel on this capability was not looked up"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One format on the GPU.

    kernel  the row of the table, None where it has none
    """

    found: Found
    kernel: Kernel | None

    @property
    def refused(self) -> str:
        """Why vLLM does not serve it there, with the way out; "" when it does."""
        if self.found.refused:
            return self.found.refused
        return self.kernel.name if self.kernel is not None and self.kernel.how == REFUSED else ""


@dataclass(frozen=True, slots=True)
class Rank:
    """One tensor-parallel size.

    weights   bytes on the largest rank
    unknown   of these, bytes of tensors whose rule is not known, so that they count whole
    overhead  estimate of the rest
    token     bytes a token in the cache; None where config.json does not tell
    budget    bytes that vLLM takes of the GPU
    reasons   why the checkpoint cannot be cut that way
    """

    tp: int
    weights: int
    unknown: int
    overhead: int
    token: int | None
    budget: int
    reasons: tuple[str, ...]

    @property
    def tokens(self) -> int | None:
        """Tokens that the cache holds; None where that is not known, 0 where nothing is left."""
        left = self.budget - self.weights - self.overhead
        return None if self.token is None else max(0, left) // max(1, self.token)

    def fits(self, context: int | None) -> bool:
        """Does one sequence of `context` tokens fit, or, without a number, is there room at all?"""
        if self.reasons or self.weights + self.overhead > self.budget:
            return False
        return self.tokens is None or self.tokens >= (context or 1)


@dataclass(frozen=True, slots=True)
class Served:
    """The whole answer.

    context  tokens of a sequence: asked for, or what config.json says; None where neither
    command  empty where no size fits or vLLM refuses
    """

    where: str
    gpu: Gpu
    verdicts: tuple[Verdict, ...]
    ranks: tuple[Rank, ...]
    cache_dtype: str
    context: int | None
    command: str
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Can it be served?"""
        return bool(self.command)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "source": self.where,
            "gpu": {**asdict(self.gpu), "capability": self.gpu.capability / 10},
            "formats": [
                {
                    **asdict(verdict.found), "refused": verdict.refused,
                    "how": "unknown" if verdict.kernel is None else verdict.kernel.how,
                    "kernel": None if verdict.kernel is None else verdict.kernel.name,
                    "kernel_source": None if verdict.kernel is None else verdict.kernel.source,
                }
                for verdict in self.verdicts
            ],
            "tensor_parallel": [
                {**asdict(rank), "tokens": rank.tokens, "fits": rank.fits(self.context)} for rank in self.ranks
            ],
            "kv_cache": self.cache_dtype,
            "context": self.context,
            "command": self.command,
            "notes": list(self.notes),
        }  # fmt: skip


def serve_check(
    where: str | Path | Source, gpu: Gpu, *, tp: Sequence[int] = (1, 2, 4, 8), context: int | None = None,
    on_event: Listener = ignore,
) -> Served:  # fmt: skip
    """What vLLM makes of a checkpoint on `gpu`.

    tp       tensor-parallel sizes
    context  tokens of a sequence (--max-model-len); config.json's otherwise
    Raises RecipeError for sizes that are none, CheckpointError and PlanError for headers that cannot be read.
    """
    if not tp or min(tp) < 1:
        raise RecipeError(f"tp: needs sizes of 1 or more, got {list(tp)}")
    with opening(where, on_event) as opened:
        checkpoint, weights = opened.checkpoint, tuple(opened.weights.values())
        origin, path = opened.source.origin, opened.source.path
        stored = {i.name: i for group in checkpoint.groups for i in group.tensors.values()}
    if any(w.decoder is not None and w.decoder.layout == KTRANSFORMERS for w in weights):
        raise RecipeError(
            f"{checkpoint.name}: its experts are stored for KTransformers, vLLM has no loader for them; "
            "docs/ktransformers.md has the command that serves it"
        )
    others = [stored[name] for name in opened.runtime_scales if name in stored]
    config = checkpoint.config
    verdicts = tuple(
        Verdict(found, kernel_for(found.form, found.layout, gpu.capability, experts=found.experts))
        for found in formats_of(weights, quantization_configs(config))
    )
    ranks = tuple(_rank(weights, others, config, gpu, size) for size in sizes_of(tp))
    longest = whole(setting(config, "max_position_embeddings"))
    if context and longest and context > longest:
        raise RecipeError(
            f"max_model_len: at most {longest:,}, max_position_embeddings of config.json, got {context:,}; vLLM "
            "refuses more unless rope scaling in config.json extends it"
        )
    asked = context or longest
    chosen = None if any(v.refused for v in verdicts) else _choose(ranks, gpu, asked, given=context is not None)
    name = str(path) if origin is None and path is not None else checkpoint.name
    line = "" if chosen is None else command(name, origin, checkpoint, chosen, asked, given=context is not None)
    cache = cache_of(config, 1)
    notes = tuple(_notes(checkpoint, verdicts, ranks, cache.note, gpu))
    return Served(checkpoint.name, gpu, verdicts, ranks, cache.dtype, asked, line, notes)


def _rank(
    weights: Sequence[Weight], others: Sequence[TensorInfo], config: Mapping[str, Any], gpu: Gpu, tp: int
) -> Rank:
    share = share_of(weights, others, config, tp)
    reasons = tuple(misfits(heads_of(config), cuts_of(config, weights), tp))
    budget = int(gpu.memory * 2**30 * UTILIZATION)
    return Rank(tp, share.nbytes, share.unknown, overhead(config, tp), cache_of(config, tp).nbytes, budget, reasons)


def _choose(ranks: Sequence[Rank], gpu: Gpu, asked: int | None, *, given: bool) -> Rank | None:
    """The smallest size that holds a sequence of `asked` tokens; without one the size whose cache holds most.

    given  the length was asked for, so that less is no answer
    """
    there = [rank for rank in ranks if not gpu.count or rank.tp <= gpu.count]
    fitting = [rank for rank in there if rank.fits(asked)]
    if fitting or given:
        return fitting[0] if fitting else None
    return max((rank for rank in there if rank.fits(None)), key=lambda rank: rank.tokens or 0, default=None)


def command(
    name: str, origin: Origin | None, checkpoint: Checkpoint, rank: Rank, context: int | None, *, given: bool
) -> str:
    """The line that serves it. `--quantization` is never needed: vLLM reads config.json.

    given  the context was asked for; otherwise it is written only where the cache cannot hold the model's own
    """
    words = ["vllm", "serve", *((origin.repo_id, "--revision", origin.commit) if origin is not None else (name,))]
    words += ["--tensor-parallel-size", str(rank.tp)]
    if any(c.get("kv_cache_scheme") or c.get("kv_cache_quant_algo") for c in quantization_configs(checkpoint.config)):
        words += ["--kv-cache-dtype", "fp8"]
    short = rank.tokens is not None and context is not None and rank.tokens < context
    if context is not None and (given or short):
        words += ["--max-model-len", str(rank.tokens if short else context)]
    if runs_code(checkpoint):
        words.append("--trust-remote-code")
    return shlex.join(words)


def runs_code(checkpoint: Checkpoint) -> bool:
    """Does the repo bring code of its own that its config points at?"""
    return bool(setting(checkpoint.config, "auto_map")) and any(name.endswith(".py") for name in checkpoint.files)


def _notes(
    checkpoint: Checkpoint, verdicts: Sequence[Verdict], ranks: Sequence[Rank], about_cache: str, gpu: Gpu
) -> list[str]:
    """What a reader should know beside the figures."""
    notes = [f"{v.found.form}: {UNKNOWN}" for v in verdicts if v.kernel is None and not v.refused]
    if about_cache:
        notes.append(f"cache: {about_cache}")
    if unknown := max(rank.unknown for rank in ranks):
        notes.append(f"{unknown / 1e9:.1f} GB have no known rule and count whole on every rank: an upper bound")
    if gpu.count and (more := [str(rank.tp) for rank in ranks if rank.tp > gpu.count]):
        notes.append(f"this machine has {gpu.count} of these GPUs, fewer than {', '.join(more)}")
    if runs_code(checkpoint):
        notes.append("--trust-remote-code runs the Python files of the repo; leave it out if vLLM knows the model")
    return notes
