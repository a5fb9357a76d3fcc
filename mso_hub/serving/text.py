"""What `mso-hub serve-check` prints. Strings in, strings out."""

from __future__ import annotations

import textwrap

from mso_hub.display import table
from mso_hub.plan.summary import size
from mso_hub.serving.check import Rank, Served, Verdict
from mso_hub.serving.kernels import NARROWER, NATIVE, WEIGHT_ONLY
from mso_hub.serving.memory import UTILIZATION

COLUMNS = 100
WORDS = {
    NATIVE: "the kernel multiplies as the checkpoint asks",
    WEIGHT_ONLY: "the kernel decodes weights to 16 bits: memory is saved, arithmetic is not",
    NARROWER: "the kernel rounds activations too, though the checkpoint asks for 16 bits: expect other output",
}
GIB = 2**30


def served_text(served: Served) -> str:
    """Formats, memory, the command, and what to know."""
    gpu = served.gpu
    how_many = f", {gpu.count} here" if gpu.count else ""
    blocks = [f"{served.where} on {gpu.name} ({gpu.sm}, {gpu.memory:g} GiB{how_many})", _formats(served)]
    used = {v.kernel.how for v in served.verdicts if v.kernel is not None and not v.refused}
    blocks.append("\n".join(f"{how}: {words}" for how, words in WORDS.items() if how in used))
    blocks.append(_memory(served))
    blocks += [_wrapped(f"{v.found.form}: {v.refused}", "refused ") for v in served.verdicts if v.refused]
    blocks += [_wrapped(f"TP {rank.tp}: {reason}", "cut     ") for rank in served.ranks for reason in rank.reasons[:3]]
    blocks += [_wrapped(note, "note    ") for note in served.notes]
    if served.command:
        blocks.append(served.command)
        blocks.append("with the plugin vllm-mso-hub, --load-format mso_checked refuses a model that loads partly")
    else:
        blocks.append("none of these sizes can be served on this GPU")
    return "\n\n".join(block for block in blocks if block)


def _wrapped(text: str, label: str) -> str:
    return textwrap.fill(text, COLUMNS, initial_indent=label, subsequent_indent=" " * len(label))


def _formats(served: Served) -> str:
    rows = [
        (v.found.form, v.found.layout, "experts" if v.found.experts else "linear layers", v.found.count,
         size(v.found.nbytes), _how(v))
        for v in served.verdicts
    ]  # fmt: skip
    if not rows:
        return "every weight is dense: 16 bits run on every GPU"
    return table(rows, ("format", "layout", "used for", "count", "size", "on this GPU"))


def _how(verdict: Verdict) -> str:
    if verdict.refused:
        return "refused"
    return "unknown" if verdict.kernel is None else f"{verdict.kernel.how}: {verdict.kernel.name}"


def _memory(served: Served) -> str:
    rows = [
        (rank.tp, f"{rank.weights / GIB:.1f}", f"{rank.overhead / GIB:.1f}",
         "?" if rank.token is None else f"{rank.token * 1024 / 2**20:.1f}",
         "?" if rank.tokens is None else f"{rank.tokens:,}", _fits(rank, served.context))
        for rank in served.ranks
    ]  # fmt: skip
    heads = ("TP", "weights GiB", "other GiB", "cache MiB per 1024 tokens", "tokens in cache", "")
    budget = served.ranks[0].budget / GIB
    legend = (
        f"for each GPU, of which vLLM takes {UTILIZATION:.0%}: {budget:.1f} GiB; cache in {served.cache_dtype}; "
        "`other` (CUDA, NCCL, activations) is an estimate, not measured"
    )
    return f"{table(rows, heads)}\n{textwrap.fill(legend, COLUMNS)}"


def _fits(rank: Rank, context: int | None) -> str:
    if rank.reasons:
        return "cannot be cut"
    if not rank.fits(None):
        return "does not fit"
    return "fits" if rank.fits(context) else "fits with a shorter --max-model-len"
