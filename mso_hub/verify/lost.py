"""Scales of zero over codes that are not zero.

A block of zeros has a scale of zero, and so has one whose numbers are too small for any scale: encoders that divide by
that zero leave codes that are all as large as they can be. Other codes under a zero scale had another scale once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mso_hub.formats.decoders.fp8 import Fp8Decoder
from mso_hub.formats.decoders.smoothed import ROLE
from mso_hub.formats.weight import Reader, Weight

CHUNK = 8 << 20
ONE = {"F8_E4M3": 0x38, "BF16": 0x3F80, "F16": 1.0, "F32": 1.0}
"""Scale dtype -> what its array holds for 1.0."""
SATURATED = 0.85
"""Smallest over largest magnitude of codes that are all as large as they can be: INT4 has 7 and -8."""
LAYOUTS = ("compressed-tensors", "modelopt", "deepseek")
OTHERS = ("zero_point", "g_idx", ROLE)
"""Parts that make the decoded number more than code times scale, or mix the groups."""


def lost_scales(read: Reader, weight: Weight) -> int:
    """How many scales of a packed weight are zero over codes that say otherwise.

    read    reads stored bytes
    weight  [N, K]; 0 for layouts whose scales do not lie row by row, and with zero points or a smoothing scale
    """
    decoder, info = weight.decoder, weight.parts["scale"]
    if decoder is None or decoder.layout not in LAYOUTS or info.dtype not in ONE or set(OTHERS) & set(weight.parts):
        return 0
    lost = 0
    for start, stop in weight.blocks(CHUNK):
        loaded = weight.load(read, start, stop)
        zero: NDArray[np.bool_] = _is_zero(loaded["scale"], info.dtype)
        if zero.any():
            loaded["scale"] = np.where(zero, np.array(ONE[info.dtype], loaded["scale"].dtype), loaded["scale"])
            values = np.abs(decoder.decode(loaded, start, stop, "F32"))
            lost += _lost(values, zero.reshape(zero.shape[0] if zero.ndim else 1, -1), weight, start)
    return lost


def _is_zero(scale: NDArray[Any], dtype: str) -> NDArray[np.bool_]:
    if dtype in ("F8_E4M3", "BF16"):
        return np.asarray((scale << 1).astype(scale.dtype) == 0)  # without the sign bit
    return np.asarray(scale == 0)


def _lost(values: NDArray[np.float32], zero: NDArray[np.bool_], weight: Weight, start: int) -> int:
    """Zero scales of a block of rows whose codes are neither all zero nor all saturated.

    values  |w| [rows, K] as if those scales were 1
    zero    [scales of the rows, scales of the columns]
    """
    columns, decoder = weight.shape[1], weight.decoder
    high, wide = decoder.cell if isinstance(decoder, Fp8Decoder) else (1, math.ceil(columns / zero.shape[1]))
    if zero.shape == (len(values), columns // wide) and columns % wide == 0:
        return int(_contradicted(values.reshape(*zero.shape, wide)[zero]).sum())
    lost = 0
    for row, column in np.argwhere(zero):
        first = max(0, (start // high + row) * high - start) if zero.shape[0] > 1 else 0
        last = (start // high + row + 1) * high - start if zero.shape[0] > 1 else len(values)
        under = values[first:last, column * wide : (column + 1) * wide]
        lost += int(_contradicted(under.reshape(1, -1)).sum())
    return lost


def _contradicted(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """[groups, numbers in one] -> which groups hold magnitudes of several sizes; zeros do not count."""
    smallest = np.where(values > 0, values, np.inf).min(axis=1, initial=np.inf)
    largest = values.max(axis=1, initial=0)
    return np.asarray((largest > 0) & (smallest < SATURATED * largest))
