"""Which scale a cell of an FP8 weight gets, on CUDA: see `numerics.fp8_search` for what is asked of it and why.

One program works on one cell, a box of `high` x `wide` numbers in a matrix of `stride` columns, in pieces of
tile_rows x tile_cols. Where the numba kernels stop at the first number that fails, these first try all scales on the
first numbers at once: on weights that nothing has rounded yet, none is left.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mso_hub.formats.numerics.cuda.floats import (
    e4m3_codes,
    e4m3_to_f32,
    load_f32,
    next_f32,
    round_f32,
)


@triton.jit
def image(value: tl.tensor, scale: tl.tensor, precision: tl.constexpr) -> tl.tensor:
    """What becomes of numbers that are encoded with `scale` and decoded again."""
    return round_f32(e4m3_to_f32(e4m3_codes(value, scale)) * scale, precision)


@triton.jit
def places(
    row: tl.tensor,
    column: tl.tensor,
    high: tl.tensor,
    wide: tl.tensor,
    stride: tl.tensor,
    tile_rows: tl.constexpr,
    tile_cols: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Offsets of a piece of a cell, and which of them are inside."""
    i = row + tl.arange(0, tile_rows)[:, None]
    k = column + tl.arange(0, tile_cols)[None, :]
    return i.to(tl.int64) * stride + k, (i < high) & (k < wide)


@triton.jit
def _trial(
    number: tl.tensor,
    largest: tl.tensor,
    precision: tl.constexpr,
    scale_precision: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Scale number 0..26 in the order of `find`, and whether it reproduces the largest number."""
    code = e4m3_to_f32(126 - number // 3)
    place = number % 3
    steps = tl.where(place == 2, 1, -place)
    scale = next_f32(round_f32(tl.div_rn(largest, code), scale_precision), steps, scale_precision)
    valid = (scale > 0.0) & (scale < float("inf"))
    return scale, valid & (round_f32(code * scale, precision) == largest)


@triton.jit
def _some_scale_may_reproduce(
    x: tl.tensor,
    wide: tl.tensor,
    largest: tl.tensor,
    precision: tl.constexpr,
    scale_precision: tl.constexpr,
) -> tl.tensor:
    """1 when one of the 27 scales reproduces the first 64 numbers of a cell's first row."""
    number, k = tl.arange(0, 32), tl.arange(0, 64)
    scale, possible = _trial(number, largest, precision, scale_precision)
    possible = possible & (number < 27)
    scale = tl.where(possible, scale, 1.0)
    v = load_f32(x + k, k < wide)[:, None]
    kept = (image(v, scale[None, :], precision) == v).to(tl.int32)
    return tl.max(tl.min(kept, axis=0) & possible.to(tl.int32))


@triton.jit
def _reproduces(
    x: tl.tensor,
    high: tl.tensor,
    wide: tl.tensor,
    stride: tl.tensor,
    guess: tl.tensor,
    scale: tl.tensor,
    has_guess: tl.constexpr,
    precision: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_cols: tl.constexpr,
) -> tl.tensor:
    """1 when encoding with `scale` keeps every number of a cell, or of its image under `guess`."""
    kept = 1
    row = 0
    while (row < high) & (kept == 1):
        column = 0
        while (column < wide) & (kept == 1):
            place, inside = places(row, column, high, wide, stride, tile_rows, tile_cols)
            v = load_f32(x + place, inside)  # 0 outside, which every scale keeps
            if has_guess:
                v = image(v, guess, precision)
            kept = tl.min((image(v, scale, precision) == v).to(tl.int32))
            column += tile_cols
        row += tile_rows
    return kept


@triton.jit
def find(
    x: tl.tensor,
    high: tl.tensor,
    wide: tl.tensor,
    stride: tl.tensor,
    largest: tl.tensor,
    guess: tl.tensor,
    has_guess: tl.constexpr,
    precision: tl.constexpr,
    scale_precision: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_cols: tl.constexpr,
) -> tl.tensor:
    """First scale that reproduces a cell, or its image under `guess`; 0.0 when there is none."""
    found = largest * 0.0
    trial = 0
    if not has_guess:
        trial = 27 - 27 * _some_scale_may_reproduce(x, wide, largest, precision, scale_precision)
    while (trial < 27) & (found == 0.0):
        scale, possible = _trial(trial, largest, precision, scale_precision)
        if possible:
            kept = 1
            if not has_guess or scale != guess:
                kept = _reproduces(
                    x, high, wide, stride, guess, scale, has_guess, precision, tile_rows, tile_cols
                )  # fmt: skip
            found = tl.where(kept == 1, scale, 0.0)
        trial += 1
    return found


@triton.jit
def absmax(
    largest: tl.tensor,
    precision: tl.constexpr,
    scale_precision: tl.constexpr,
) -> tl.tensor:
    """largest / 448 in the dtype of scales; the number below where `largest` would be decoded to infinity."""
    scale = round_f32(tl.div_rn(largest, 448.0), scale_precision)
    infinite = (scale < float("inf")) & (image(largest, scale, precision) == float("inf"))
    return next_f32(scale, -infinite.to(tl.int32), scale_precision)


@triton.jit
def _candidates(
    grid: tl.tensor,
    largest: tl.tensor,
    precision: tl.constexpr,
    scale_precision: tl.constexpr,
) -> tl.tensor:
    """Scales [32] of the multiples grid [32] of largest / 448, rounded; 0 for what `find` would not meet again."""
    base = tl.div_rn(largest, 448.0)
    scale = round_f32(grid * base, scale_precision)
    tried = (scale > 0.0) & (scale < float("inf")) & (grid > 1.0)
    scale = tl.where(tried, scale, 1.0)
    code = e4m3_codes(largest, scale)
    value = tl.where(code < 0x76, 1.0, e4m3_to_f32(code))
    decoded = round_f32(value * scale, precision)
    quotient = round_f32(tl.div_rn(decoded, value), scale_precision)
    minus, plus = tl.full((32,), -1, tl.int32), tl.full((32,), 1, tl.int32)
    near = (scale == quotient) | (scale == next_f32(quotient, minus, scale_precision))
    near = near | (scale == next_f32(quotient, plus, scale_precision))
    scale = tl.where(near, scale, quotient)
    kept = tried & (code >= 0x76) & (decoded < float("inf"))
    kept = kept & (e4m3_codes(largest, tl.where(scale > 0.0, scale, 1.0)) == code)
    return tl.where(grid == 1.0, absmax(largest, precision, scale_precision), tl.where(kept, scale, 0.0))


@triton.jit
def best(
    x: tl.tensor,
    high: tl.tensor,
    wide: tl.tensor,
    stride: tl.tensor,
    largest: tl.tensor,
    multiples: tl.tensor,
    precision: tl.constexpr,
    scale_precision: tl.constexpr,
) -> tl.tensor:
    """The scale of the grid `multiples` [32] with the least sum of squared errors; the first of equals.

    As on the CPU, number i of the cell, row by row, adds to lane i % 64, and then lane by lane.
    """
    number, lane = tl.arange(0, 32), tl.arange(0, 64)
    scales = _candidates(tl.load(multiples + number), largest, precision, scale_precision)
    step = tl.where(scales > 0.0, scales, 1.0)[None, :]
    sums = tl.zeros((64, 32), tl.float64)
    for start in range(0, high * wide, 64):
        i = start + lane
        place = (i // wide).to(tl.int64) * stride + i % wide
        v = tl.abs(load_f32(x + place, i < high * wide))[:, None]
        y = tl.minimum(tl.div_rn(v, step), 448.0)
        power = tl.maximum(y, 0.015625).to(tl.int32, bitcast=True) & 0x7F800000  # 2**-6
        big = (power + 0x0A000000).to(tl.float32, bitcast=True)  # 2**20 times the power of two below y
        error = (v - ((y + big) - big) * step).to(tl.float64)
        sums += error * error
    total = tl.zeros((32,), tl.float64)
    for j in range(64):
        total += tl.sum(tl.where(lane[:, None] == j, sums, 0.0), axis=0)  # one lane and zeros
    total = tl.where((scales > 0.0) & (total < float("inf")), total, float("inf"))
    first = tl.min(tl.where(total == tl.min(total), number, 32))
    return tl.sum(tl.where(number == first, scales, 0.0))
