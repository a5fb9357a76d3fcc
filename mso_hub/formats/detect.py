"""Stored tensors -> weights: finds what is packed, and how, from names, dtypes and the config."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from mso_hub.checkpoint import TensorInfo
from mso_hub.errors import CheckpointError, PlanError
from mso_hub.formats.decoders.base import ReadShape
from mso_hub.formats.decoders.kt import read_kt
from mso_hub.formats.decoders.table import find_packed
from mso_hub.formats.dialects.ktransformers import LAYOUT as KTRANSFORMERS
from mso_hub.formats.weight import FLOAT_DTYPES, Weight

TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Where multimodal configs keep the language model's part."""
CONFIG_KEYS = ("quantization_config", "compression_config")
RUNTIME_SCALES = re.compile(
    r"\.(input_scale|input_global_scale|input_zero_point|[kvq]_scale|[kvq]_zero_point|output_scale)$"
)
"""Companions that only the quantized runtime reads; they go when their weight is decoded."""
PACKED_NAME = re.compile(
    r"\.(weight_packed|weight_scale(_inv|_2)?|weight_global_scale|weight_zero_point|weight_g_idx|qweight|qzeros|"
    r"pre_quant_scale|svdquant_lora_[ab]|absmax|quant_map|SCB)$|\.quant_state\S*$"
)
"""Never part of a dense checkpoint."""
SUSPECT_NAME = re.compile(r"[._](scales?|g_idx|blocks|scale_inv)$")
"""Part of a packed weight where the config says that there are some; an ordinary name elsewhere."""
CODE_DTYPES = frozenset({"I8", "U8"})
"""Codes, where a `weight` of a quantized checkpoint has them."""
UNDECODED_DTYPES = frozenset(
    {"F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2"}
)

UNREAD = "part of a packed weight without a decoder; `mso-hub formats` lists what can be read"


def quantization_configs(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every quantization_config of a config.json, the outermost first: Kimi-K2.5 has it in `text_config`."""
    found = [config[key] for key in CONFIG_KEYS if isinstance(config.get(key), dict)]
    for key, value in config.items():
        if isinstance(value, dict) and key not in CONFIG_KEYS:
            found += quantization_configs(value)
    return found


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without any quantization_config, nested ones too; nothing else is touched."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in (*CONFIG_KEYS, KTRANSFORMERS)
    }


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json whose `dtype` (older: `torch_dtype`) says what decoded weights are, where the text model has it."""
    said = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    return {
        key: said[dtype] if key in ("dtype", "torch_dtype") and value in said.values()
        else with_dtype(value, dtype) if key in TEXT_CONFIGS and isinstance(value, dict) else value
        for key, value in config.items()
    }  # fmt: skip


def _is_runtime_scale(info: TensorInfo, packed: AbstractSet[str], config: Mapping[str, Any]) -> bool:
    """Does only the quantized runtime read this tensor? Its module must be packed, or it is a KV-cache scale.

    A model may call an ordinary parameter `output_scale` or `q_scale`: those stay.
    """
    if not RUNTIME_SCALES.search(info.name):
        return False
    module, _, suffix = info.name.rpartition(".")
    configs = quantization_configs(config)
    if module in packed or not (packed or configs):
        return module in packed
    if suffix[1:] not in ("_scale", "_zero_point"):
        return False
    announced = any(c.get("kv_cache_scheme") or c.get("kv_cache_quant_algo") for c in configs)
    return announced or (math.prod(info.shape) == 1 and module.endswith(("attn", "attention", "_proj")))


def _is_undecoded(info: TensorInfo, packed: AbstractSet[str], config: Mapping[str, Any]) -> bool:
    """Is this part of a packed weight that no decoder has taken?"""
    if info.dtype in UNDECODED_DTYPES or PACKED_NAME.search(info.name):
        return True
    if not (packed or quantization_configs(config)):
        return False
    if info.name.endswith(".weight") and info.dtype in CODE_DTYPES:
        return True
    suspect = SUSPECT_NAME.search(info.name)
    return bool(suspect) and (info.dtype not in FLOAT_DTYPES or info.name.rpartition(".")[0] in packed)


def _without_config(
    info: TensorInfo, tensors: Mapping[str, TensorInfo], read_shape: ReadShape, dtype: str
) -> Weight | None:
    """The packed weight that the tensors alone make; None where they leave open what it is."""
    try:
        return find_packed(info, tensors, (), read_shape, dtype)
    except (CheckpointError, PlanError):
        return None


def _missing_scale(
    names: Iterable[str], tensors: Mapping[str, TensorInfo], configs: Sequence[Mapping[str, Any]]
) -> str:
    """A hint where a scale seems to be lost: codes of a byte in a format that the config names."""
    known = any(c.get("quant_method") in ("compressed-tensors", "modelopt", "fp8") for c in configs)
    lone = [n for n in names if n.endswith(".weight") and tensors[n].dtype in ("F8_E4M3", "I8")]
    return f"; or the checkpoint is incomplete: {lone[0]}_scale is missing" if known and lone else ""


def module_of(name: str) -> str:
    """The module of a stored tensor, also of the blocks and scales of gpt-oss."""
    for ending in ("_blocks", "_scales"):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return name.rpartition(".")[0]


def read_weights(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    read_shape: ReadShape,
    dtype: str,
    refused: dict[str, str] | None = None,
) -> tuple[list[Weight], list[str]]:
    """All weights of a group in stored order, and the names of runtime scales that go when they are decoded.

    dtype    what packed weights become when they are decoded
    refused  takes module -> why, for packed weights that are incomplete or that the config contradicts; they are left
             out where their tensors alone do not say how they are decoded. None: the first of them is raised

    Raises PlanError for a quantized tensor without a decoder: bytes that nobody understands are never copied on.
    """
    tensors, weights = read_kt(tensors, config, dtype, refused)
    dropped: list[str] = []
    consumed: set[str] = set()
    lost: set[str] = set()
    configs = quantization_configs(config)
    for info in tensors.values():
        try:
            weight = find_packed(info, tensors, configs, read_shape, dtype)
        except (CheckpointError, PlanError) as error:
            if refused is None:
                raise
            refused[module_of(info.name)] = str(error)
            weight = _without_config(info, tensors, read_shape, dtype)
            if weight is None:
                lost.add(module_of(info.name))
        if weight is not None:
            weights.append(weight)
            consumed |= {part.name for part in weight.parts.values()}
    strange: dict[str, str] = {}
    packed = {weight.module for weight in weights}
    for name, info in tensors.items():
        if name in consumed:
            continue
        if _is_runtime_scale(info, packed, config):
            dropped.append(name)
        elif not _is_undecoded(info, packed | lost, config):
            weights.append(Weight(name, info.dtype, info.shape, {"weight": info}))
        elif module_of(name) not in lost:
            strange[name] = f"{name} {info.dtype} {list(info.shape)}"
    if refused is not None:
        refused |= {module_of(name): f"{what}: {UNREAD}" for name, what in strange.items()}
    elif strange:
        shown = list(strange.values())
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        raise PlanError(
            "the source is already quantized in a format without a decoder: " + "; ".join(shown[:3]) + more
            + "; `mso-hub formats` lists what can be read" + _missing_scale(strange, tensors, configs)
        )  # fmt: skip
    return weights, dropped
