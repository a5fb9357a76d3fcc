"""Activation scales of another checkpoint: `NAME.input_scale` (multiplier) or `.input_global_scale` (divisor)."""

from __future__ import annotations

import math
from collections.abc import Iterable

from mso_hub.checkpoint import TensorInfo
from mso_hub.errors import CheckpointError
from mso_hub.formats.weight import FLOAT_DTYPES, Reader, read_rows

LARGEST = {"F8_E4M3": 448.0, "I8": 127.0}
"""Dtype of a weight -> the activation that a scale of 1 stands for; NVFP4 otherwise: 6 * 448."""
NVFP4_LARGEST = 2688.0


def _number(info: TensorInfo, read: Reader) -> float:
    """The one finite, positive number of a scale."""
    from mso_hub.formats.numerics.floats import widen

    if info.dtype not in FLOAT_DTYPES or math.prod(info.shape) != 1:
        raise CheckpointError(f"{info.name}: needs one floating-point number, got {info.dtype} {list(info.shape)}")
    value = float(widen(read_rows(read, info), info.dtype).reshape(-1)[0])
    if not 0 < value < float("inf"):
        raise CheckpointError(f"{info.name}: an activation scale must be finite and > 0, got {value}")
    return value


def read_input_scales(tensors: Iterable[TensorInfo], read: Reader) -> dict[str, float]:
    """Module -> multiplier, from every F32 activation scale among the tensors."""
    scales: dict[str, float] = {}
    for info in tensors:
        module, _, suffix = info.name.rpartition(".")
        if suffix in ("input_scale", "input_global_scale"):
            value = _number(info, read)
            scales[module] = value if suffix == "input_scale" else 1.0 / value
    return scales


def read_input_amax(tensors: Iterable[TensorInfo], read: Reader) -> dict[str, float]:
    """Module -> largest magnitude of its activations, as its scale and the dtype of its weight tell.

    A multiplier of an NVFP4 weight is amax / 2688, of an FP8 weight amax / 448, of an INT8 weight amax / 127.
    """
    tensors = list(tensors)
    dtypes = {info.name: info.dtype for info in tensors}
    scales = read_input_scales(tensors, read)
    return {m: value * LARGEST.get(dtypes.get(f"{m}.weight", ""), NVFP4_LARGEST) for m, value in scales.items()}


def read_kv_scales(tensors: Iterable[TensorInfo], read: Reader) -> dict[str, tuple[float, float]]:
    """Attention module -> (k, v) scale (multipliers, amax / 448), from `NAME.k_scale` or `NAME.k_proj.k_scale`.

    CheckpointError where one of the two is missing.
    """
    found: dict[str, dict[str, float]] = {}
    for info in tensors:
        module, _, leaf = info.name.rpartition(".")
        if leaf in ("k_scale", "v_scale"):
            attention = module.removesuffix(f".{leaf[0]}_proj")
            found.setdefault(attention, {})[leaf] = _number(info, read)
    for attention, pair in found.items():
        if len(pair) < 2:
            raise CheckpointError(f"{attention}: has {next(iter(pair))} alone, k_scale and v_scale belong together")
    return {attention: (pair["k_scale"], pair["v_scale"]) for attention, pair in found.items()}
