"""Bytes that a rank needs: its part of the weights, its part of the cache, and an estimate of the rest.

Column-parallel weights are cut by rows, row-parallel ones by columns, the vocabulary by rows padded to 64; norms,
routers and everything whose rule is not known lie whole on every rank, so the figure errs upwards. Source: vLLM 0.32,
layers/linear.py, vocab_parallel_embedding.py, fused_moe/routed_experts.py; verify.parallel has the names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mso_hub.checkpoint import TensorInfo
from mso_hub.formats.detect import quantization_configs
from mso_hub.formats.weight import Weight
from mso_hub.plan.recipe import DEFAULT_IGNORE
from mso_hub.plan.select import DECODER_LAYER
from mso_hub.verify.parallel import COLUMN, KEYS_AND_VALUES, ROW, Heads, heads_of, setting, whole

UTILIZATION = 0.92
"""Share of a GPU that vLLM 0.32 and 0.33 take: `gpu_memory_utilization` of config/cache.py."""
PADDING = 64
"""Rows of embeddings are padded to a multiple: DEFAULT_VOCAB_PADDING_SIZE."""
RUNTIME = 1.5 * 2**30
"""Bytes for CUDA's context, NCCL and graphs: an estimate, as is everything in `overhead`."""
STEP_TOKENS = 8192
"""Tokens in one step, vLLM's default for a server on a GPU with 70 GB or more; it is 2048 below and 16384 above 160."""
STEP_SEQUENCES = 256
"""Sequences whose logits are computed at once, for the estimate."""
BANK = re.compile(r"(^|\.)experts\.(?P<leaf>gate_up_proj|down_proj|w13\w*|w2\w*)")


@dataclass(frozen=True, slots=True)
class Cache:
    """The KV cache of one token on one rank.

    nbytes  a token; None where config.json does not tell
    dtype   of its elements
    note    what the figure leaves out, "" when nothing
    """

    nbytes: int | None
    dtype: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Share:
    """Weights of one rank.

    nbytes   on the largest rank
    unknown  of these, bytes of tensors that lie whole on every rank because their rule is not known
    """

    nbytes: int
    unknown: int


def cut_by(name: str) -> str:
    """Which rule a tensor or module follows: row, column, vocabulary, whole, or unknown."""
    module = name.removesuffix(".weight")
    if DEFAULT_IGNORE["vision or audio tower"].search(module) or DEFAULT_IGNORE["multimodal projector"].search(module):
        return "unknown"
    if found := BANK.search(module):
        return "row" if found["leaf"].startswith(("down_proj", "w2")) else "column"
    parts = set(module.split(".")[-2:])
    if parts & ROW:
        return "row"
    if parts & COLUMN:
        return "column"
    if DEFAULT_IGNORE["embedding"].search(module) or DEFAULT_IGNORE["output head"].search(module):
        return "vocabulary"
    if any(DEFAULT_IGNORE[rule].search(module) for rule in ("norm", "router or gate")) or "q_a_proj" in parts:
        return "whole"
    return "whole" if "kv_a_proj_with_mqa" in parts else "unknown"


def loaded(name: str, config: Mapping[str, Any]) -> bool:
    """Does vLLM load this module? Not layers for multi-token prediction, nor a head that is tied to the embedding."""
    layers = whole(setting(config, "num_hidden_layers"))
    layer = DECODER_LAYER.search(name)
    if DEFAULT_IGNORE["MTP"].search(name) or (layers is not None and layer is not None and int(layer[1]) >= layers):
        return False
    return not (setting(config, "tie_word_embeddings") is True and name.removesuffix(".weight").endswith("lm_head"))


def share_of(weights: Iterable[Weight], others: Iterable[TensorInfo], config: Mapping[str, Any], tp: int) -> Share:
    """Weights of the largest of `tp` ranks.

    others  stored tensors that belong to no weight: activation and cache scales
    """
    heads, total, unknown = heads_of(config), 0, 0
    for weight in weights:
        if not loaded(weight.name, config):
            continue
        rule = cut_by(weight.name)
        kept = sum(_part(info, rule, weight, heads, tp) for info in weight.parts.values())
        total += kept
        unknown += kept if rule == "unknown" and tp > 1 else 0
    return Share(total + sum(info.nbytes for info in others), unknown)


def _part(info: TensorInfo, rule: str, weight: Weight, heads: Heads, tp: int) -> int:
    """Bytes of one stored tensor on one rank. Dense F32 matrices become 16 bits: vLLM's `--dtype auto`."""
    nbytes = info.nbytes // 2 if weight.decoder is None and info.dtype == "F32" and len(info.shape) > 1 else info.nbytes
    if rule in ("whole", "unknown") or not info.shape or math.prod(info.shape) == 1:
        return nbytes
    if rule == "vocabulary":
        rows = math.ceil(info.shape[0] / PADDING) * PADDING
        return math.ceil(rows / tp) * nbytes // max(1, info.shape[0])
    leaf = weight.module.rpartition(".")[2]
    copied = heads.keys is not None and tp > heads.keys and leaf in KEYS_AND_VALUES
    parts = heads.keys if copied and heads.keys else tp
    by_column_scale = rule == "row" and len(info.shape) > 1 and info.shape[-1] == 1
    bias = rule == "row" and len(info.shape) == 1
    return nbytes if by_column_scale or bias else math.ceil(nbytes / parts)


def cache_of(config: Mapping[str, Any], tp: int) -> Cache:
    """Bytes a token of the KV cache, from config.json.

    layers * 2 * ceil(key heads / tp) * head size * bytes; with latent attention (MLA) layers * (latent + rope) * bytes,
    whole on every rank.
    """
    announced = any(c.get("kv_cache_scheme") or c.get("kv_cache_quant_algo") for c in quantization_configs(config))
    dtype, width = ("fp8", 1) if announced else ("16 bits", 2)
    layers = whole(setting(config, "num_hidden_layers"))
    kinds = setting(config, "layer_types")
    note = ""
    if isinstance(kinds, list) and kinds:
        plain = [kind for kind in kinds if isinstance(kind, str) and "linear" not in kind and "mamba" not in kind]
        if len(plain) < len(kinds):
            note = f"{len(kinds) - len(plain)} layers keep a state of fixed size, which is left out"
        elif any("sliding" in kind for kind in plain):
            note = "layers with a sliding window keep less: the figure is an upper bound"
        layers = len(plain)
    latent = whole(setting(config, "kv_lora_rank"))
    if layers is not None and latent is not None:
        return Cache(layers * (latent + (whole(setting(config, "qk_rope_head_dim")) or 0)) * width, dtype, note)
    heads, hidden = heads_of(config), whole(setting(config, "hidden_size"))
    size = whole(setting(config, "head_dim")) or (hidden // heads.queries if hidden and heads.queries else None)
    if layers is None or heads.keys is None or size is None:
        return Cache(None, dtype, "config.json does not say how many layers and key heads there are")
    return Cache(layers * 2 * math.ceil(heads.keys / tp) * size * width, dtype, note)


def overhead(config: Mapping[str, Any], tp: int) -> int:
    """Estimate of what else a rank needs: CUDA and NCCL, activations of one step, logits. Not measured."""
    hidden = whole(setting(config, "hidden_size")) or 0
    middle = whole(setting(config, "intermediate_size", "moe_intermediate_size")) or 0
    words = whole(setting(config, "vocab_size")) or 0
    return int(RUNTIME + STEP_TOKENS * (6 * hidden + 3 * middle // tp) * 2 + STEP_SEQUENCES * words * 4 * 2)


def sizes_of(given: Sequence[int]) -> tuple[int, ...]:
    """Tensor-parallel sizes in order, each once."""
    return tuple(sorted(set(given)))
