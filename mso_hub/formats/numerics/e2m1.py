"""E2M1, the four-bit float of NVFP4 and MXFP4: round to it, pack it, measure it, unpack it.

    magnitude codes           0    1    2    3    4    5    6    7      bit 3 of a code is the sign
    values                    0   .5    1  1.5    2    3    4    6
    a code begins at             .25  .75 1.25 1.75  2.5  3.5    5      tie -> even code

Two codes share a byte, the even column in the low nibble. The kernels see rows as one list of runs of 16 numbers; each
run has a step, and w ~= value(code) * step. Each loop over a tile does one thing, which is what lets LLVM turn it into
vector code.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mso_hub.formats.numerics.floats import Array, narrow, storage, store_f32
from mso_hub.formats.numerics.kernel import kernel

RUN = 16
E2M1_MAX = 6.0
TILE = 2048  # elements: 8 KiB as float32

MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
SIGNED_ZERO = np.concatenate([MAGNITUDES, -MAGNITUDES])
"""float32 [16]: value of each code; code 8 is -0.0."""
PLAIN_ZERO = SIGNED_ZERO + np.float32(0)
"""The same, but code 8 is +0.0."""


def unpack(packed: npt.NDArray[np.uint8], steps: npt.NDArray[np.float32], values: Array, dtype: str) -> Array:
    """Numbers [rows, cols] of packed [rows, cols/2]: values[code] * step in float32, then `dtype`.

    steps   float32 [rows, cols/16]
    values  float32 [16], the value of each code
    """
    rows, half = packed.shape
    out = np.empty((rows, 2 * half), storage("F32" if dtype == "F16" else dtype))
    bits = out.reshape(-1).view(np.uint16 if dtype == "BF16" else np.uint32)
    _unpack(readonly(packed), steps.reshape(-1), values, bits)
    return narrow(out, dtype) if dtype == "F16" else out


def column_weights(importance: Array | None, columns: int, search: str) -> npt.NDArray[np.float64]:
    """Weights of columns as the searches take them, empty for None; ValueError for what cannot be weights.

    importance  [columns] finite numbers >= 0
    """
    if importance is None:
        return np.empty(0, np.float64)
    weights = np.ascontiguousarray(importance, np.float64)
    if search != "mse":
        raise ValueError(f"importance needs the search 'mse', got {search!r}")
    if weights.shape != (columns,) or not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError(
            f"importance must be {columns} finite numbers >= 0, one for each column, got {list(weights.shape)}"
        )
    return weights


def readonly(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Flat view that may not be written: one compiled kernel for every caller, see `floats.flat_bits`."""
    flat = np.ascontiguousarray(codes).reshape(-1)
    flat.flags.writeable = False
    return flat


@kernel
def magnitude_code(y: np.float32) -> np.uint8:
    """Code 0..7 of a number >= 0: how many of the seven thresholds it has passed."""
    # > keeps a tie at the lower code, >= lifts it: both land on even.
    return (
        np.uint8(y > 0.25)
        + np.uint8(y >= 0.75)
        + np.uint8(y > 1.25)
        + np.uint8(y >= 1.75)
        + np.uint8(y > 2.5)
        + np.uint8(y >= 3.5)
        + np.uint8(y > 5.0)
    )


@kernel
def nearest(y: np.float32) -> np.float32:
    """Value of `magnitude_code(y)`."""
    # The spacing of E2M1 is .5 below 2, 1 below 4, then 2. Adding 2**23 spacings rounds to a
    # multiple of the spacing, ties to even.
    big = np.float32(2.0**24)
    if y < np.float32(4.0):
        big = np.float32(2.0**23)
    if y < np.float32(2.0):
        big = np.float32(2.0**22)
    return min((y + big) - big, np.float32(E2M1_MAX))


@kernel
def pack(q: Array, packed: Array) -> None:
    """Put codes q [2 * n] (uint8) two to a byte: packed [n]."""
    pairs = q.view(np.uint16)
    for k in range(packed.size):
        packed[k] = (pairs[k] & np.uint16(0xF)) | (pairs[k] >> np.uint16(4))


@kernel
def to_lanes(x: Array, lanes: Array, size: int) -> None:
    """Magnitudes of x [size * n] float32, blocks of `size`: all first columns, then all second ones and so on."""
    blocks = x.size // size
    for b in range(blocks):
        for j in range(size):
            lanes[j * blocks + b] = abs(x[size * b + j])


@kernel
def squared_errors(lanes: Array, steps: Array, errors: Array) -> None:
    """Sum of squared errors of each block under steps [n] float32, into errors [n] float64.

    lanes comes from `to_lanes`: one vector instruction works on several blocks while each block
    still adds its squares in column order. The square of a float32 is exact in float64: only the
    order of the sum matters, not whether the multiplication and the addition are fused.
    """
    blocks = steps.size
    for b in range(blocks):
        errors[b] = 0.0
    for j in range(lanes.size // blocks):
        column = lanes[j * blocks : (j + 1) * blocks]
        for b in range(blocks):
            error = np.float64(column[b] - nearest(column[b] / steps[b]) * steps[b])
            errors[b] += error * error


@kernel
def column_lanes(importance: Array, start: int, lanes: Array, size: int) -> None:
    """Weights of the columns of some blocks, in the order of `to_lanes`.

    importance  float64 [cols], cols a multiple of `size`; the first block begins `start` numbers into a matrix
    lanes       float64 [size * n]
    """
    blocks = lanes.size // size
    for b in range(blocks):
        first = (start + size * b) % importance.size
        for j in range(size):
            lanes[j * blocks + b] = importance[first + j]


@kernel
def weighted_errors(lanes: Array, weights: Array, steps: Array, errors: Array) -> None:
    """As `squared_errors`, every square times the weight of its column; weights come from `column_lanes`."""
    blocks = steps.size
    for b in range(blocks):
        errors[b] = 0.0
    for j in range(lanes.size // blocks):
        column, weight = lanes[j * blocks : (j + 1) * blocks], weights[j * blocks : (j + 1) * blocks]
        for b in range(blocks):
            error = np.float64(column[b] - nearest(column[b] / steps[b]) * steps[b])
            errors[b] += error * error * weight[b]


@kernel
def _unpack(packed: Array, steps: Array, values: Array, out: Array) -> None:
    """Fill out [n] (uint16 BF16 or uint32 F32 bits) from packed [n/2] and steps [n/16] float32."""
    x = np.empty(TILE, np.float32)
    for start in range(0, packed.size, TILE // 2):
        stop = min(start + TILE // 2, packed.size)
        for b in range((stop - start) // 8):
            step = steps[start // 8 + b]
            for k in range(8):
                byte = packed[start + 8 * b + k]
                x[16 * b + 2 * k] = values[byte & 0xF] * step
                x[16 * b + 2 * k + 1] = values[byte >> 4] * step
        store_f32(x[: 2 * (stop - start)].view(np.uint32), out[2 * start : 2 * stop])
