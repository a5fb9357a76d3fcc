"""Activation scales of another checkpoint: `NAME.input_scale` (multiplier) or `.input_global_scale` (divisor)."""

from __future__ import annotations

from collections.abc import Iterable

from mso_hub.checkpoint import TensorInfo
from mso_hub.errors import CheckpointError
from mso_hub.formats.weight import Reader, read_rows


def read_input_scales(tensors: Iterable[TensorInfo], read: Reader) -> dict[str, float]:
    """Module -> multiplier (amax / 2688), from every F32 activation scale among the tensors."""
    scales: dict[str, float] = {}
    for info in tensors:
        module, _, suffix = info.name.rpartition(".")
        if suffix not in ("input_scale", "input_global_scale"):
            continue
        if info.dtype != "F32" or info.nbytes != 4:
            raise CheckpointError(f"{info.name}: needs one F32 number, got {info.dtype} {list(info.shape)}")
        value = float(read_rows(read, info).reshape(-1)[0])
        if not 0 < value < float("inf"):
            raise CheckpointError(f"{info.name}: an activation scale must be finite and > 0, got {value}")
        scales[module] = value if suffix == "input_scale" else 1.0 / value
    return scales
