"""Stored tensors -> weights: finds what is packed, and how, from names, dtypes and the config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mso_hub.checkpoint import TensorInfo
from mso_hub.errors import CheckpointError, PlanError
from mso_hub.formats.dialects import compressed_tensors
from mso_hub.formats.nvfp4 import Nvfp4Decoder
from mso_hub.formats.packed_int import ReadShape, packed_int
from mso_hub.formats.weight import Weight

ROLES = {
    "weight_packed": "packed", "weight_scale": "scale", "weight_zero_point": "zero_point",
    "weight_g_idx": "g_idx", "weight_shape": "shape", "weight_global_scale": "global",
}  # fmt: skip
CONFIG_KEYS = ("quantization_config", "compression_config")
RUNTIME_SCALES = re.compile(
    r"\.(input_scale|input_global_scale|input_zero_point|[kvq]_scale|[kvq]_zero_point|output_scale)$"
)
"""Companions that only the quantized runtime reads; they go when their weight is decoded."""
PACKED_NAME = re.compile(
    r"\.(weight_packed|weight_scale(_inv|_2)?|weight_global_scale|weight_zero_point|weight_g_idx|qweight|qzeros)$"
)
"""Never part of a dense checkpoint."""
SUSPECT_NAME = re.compile(r"[._](scales?|g_idx|blocks|absmax|quant_map|quant_state\S*|SCB|pre_quant_scale|scale_inv)$")
"""Part of a packed weight where the config says that there are some; an ordinary name elsewhere."""
UNDECODED_DTYPES = frozenset(
    {"F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2"}
)


def quantization_configs(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every quantization_config of a config.json: at the top, and nested as in `text_config` of Kimi-K2.5."""
    found = [config[key] for key in CONFIG_KEYS if isinstance(config.get(key), dict)]
    for value in config.values():
        if isinstance(value, dict) and value not in found:
            found += [value[key] for key in CONFIG_KEYS if isinstance(value.get(key), dict)]
    return found


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without any quantization_config, nested ones too; nothing else is touched."""
    return {
        key: {k: v for k, v in value.items() if k not in CONFIG_KEYS} if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in CONFIG_KEYS
    }


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json whose `dtype` (older: `torch_dtype`) says what decoded weights are, wherever it was said before."""
    said = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    return {
        key: said[dtype] if key in ("dtype", "torch_dtype") and value in said.values()
        else with_dtype(value, dtype) if isinstance(value, dict) else value
        for key, value in config.items()
    }  # fmt: skip


def _packed(
    module: str,
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    read_shape: ReadShape,
    dtype: str,
) -> Weight:
    """A module that has weight_packed."""
    stored = {role: tensors[f"{module}.{s}"] for s, role in ROLES.items() if f"{module}.{s}" in tensors}
    if "scale" not in stored:
        raise CheckpointError(f"{module}: weight_packed is there, weight_scale is not; the checkpoint is incomplete")
    if "global" in stored:
        codes = stored["packed"]
        return _nvfp4(module, codes, stored["scale"], stored["global"], "compressed-tensors", dtype)
    configs = [c for c in quantization_configs(config) if c.get("quant_method") == "compressed-tensors"]
    if not configs:
        raise CheckpointError(
            f"{module}: stored packed, but config.json has no compressed-tensors quantization_config, at the top "
            "or nested; restore the config.json that belongs to these weights"
        )
    decoder, shape = packed_int(module, stored, compressed_tensors.weight_args(configs[0], module), read_shape)
    return Weight(f"{module}.weight", dtype, shape, stored, decoder)


def _nvfp4(module: str, codes: TensorInfo, scale: TensorInfo, scalar: TensorInfo, layout: str, dtype: str) -> Weight:
    """NVFP4 of either layout, its shapes checked."""
    good = (
        codes.dtype == "U8" and scale.dtype == "F8_E4M3" and scalar.dtype == "F32" and scalar.nbytes == 4
        and len(codes.shape) == 2 and scale.shape == (codes.shape[0], codes.shape[1] // 8) and codes.shape[1] % 8 == 0
    )  # fmt: skip
    if not good:
        found = ", ".join(f"{t.dtype} {list(t.shape)}" for t in (codes, scale, scalar))
        raise PlanError(
            f"{module}: NVFP4 needs codes U8 [N, K/2], scales F8_E4M3 [N, K/16] and one F32 global scale, got {found}; "
            "there is no decoder for that"
        )
    parts = {"codes": codes, "scale": scale, "global": scalar}
    return Weight(f"{module}.weight", dtype, (codes.shape[0], 2 * codes.shape[1]), parts, Nvfp4Decoder(layout))


def read_weights(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], read_shape: ReadShape, dtype: str
) -> tuple[list[Weight], list[str]]:
    """All weights of a group in stored order, and the names of runtime scales that go when they are decoded.

    dtype  what packed weights become when they are decoded

    Raises PlanError for a quantized tensor without a decoder: bytes that nobody understands are never copied on.
    """
    weights: list[Weight] = []
    dropped: list[str] = []
    consumed: set[str] = set()
    quantized = bool(quantization_configs(config))
    for name, info in tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "weight_packed":
            weights.append(_packed(module, tensors, config, read_shape, dtype))
        elif suffix == "weight" and f"{module}.weight_scale_2" in tensors and info.dtype == "U8":
            scale = tensors.get(f"{module}.weight_scale")
            if scale is None:
                raise CheckpointError(f"{module}: weight_scale_2 is there, weight_scale is not; incomplete")
            scalar = tensors[f"{module}.weight_scale_2"]
            weights.append(_nvfp4(module, info, scale, scalar, "modelopt", dtype))
        else:
            continue
        consumed |= {part.name for part in weights[-1].parts.values()}
    strange: list[str] = []
    for name, info in tensors.items():
        if name in consumed:
            continue
        if (consumed or quantized) and RUNTIME_SCALES.search(name):
            dropped.append(name)
        elif info.dtype in UNDECODED_DTYPES or PACKED_NAME.search(name) or (quantized and SUSPECT_NAME.search(name)):
            strange.append(f"{name} {info.dtype} {list(info.shape)}")
        else:
            weights.append(Weight(name, info.dtype, info.shape, {"weight": info}))
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise PlanError(
            "the source is already quantized in a format without a decoder: " + "; ".join(strange[:3]) + more
            + "; `mso-hub formats` lists what can be read"
        )  # fmt: skip
    return weights, dropped
