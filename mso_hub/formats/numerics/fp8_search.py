"""Which scale a cell of an FP8 weight gets: the one that it was made with, or the best of a grid.

A cell is what shares one scale: a row, or a block of rows and columns. For the kernels it is a box of `height` x
`width` numbers in the flat bits of a matrix with `stride` columns, beginning at `first`.

    image      what a cell becomes when it is encoded with a scale s and decoded to its own dtype:
               y = round(e4m3(v / s) * s)
    exact      a scale under which the image is the cell itself. Nothing is lost, so it is taken before any search
    settled    two scales can give the same image. Everything that has this image gets the first of them in the order
               of `find`, so that encoding the image again gives the same scale and the same codes

The scales that could have made an image are few: a scale near amax / 448 makes the largest code one of the nine from
224 to 448 (below, twice the codes under half the scale are the same image), so the scale is its largest number over
one of these nine values, or one place above or below in the dtype of scales. On other numbers each trial ends after an
element or two.
"""

from __future__ import annotations

import numpy as np

from mso_hub.formats.numerics.floats import (
    E4M3,
    Array,
    e4m3_codes,
    e4m3_from_f32,
    load_e4m3,
    load_f16,
    load_f32,
    next_f32,
    round_all,
    round_f32,
)
from mso_hub.formats.numerics.kernel import kernel

E4M3_MAX = 448.0
TILE = 2048  # elements: 8 KiB as float32
_FIRST, _PART = 32, 256  # a cell is compared by one number at first, then by so many
LANES = 64
"""Sums of squared errors run in this many lanes: element i of a cell, row by row, adds to lane i % 64."""

STEPS = 24
GRID = np.exp2(np.arange(STEPS) / STEPS).astype(np.float32)
"""float32 [24]: 2**(k / 24), the multiples of amax / 448 that "mse" tries."""

_LARGEST = np.ascontiguousarray(E4M3[0x7E:0x75:-1])  # 448 416 384 352 320 288 256 240 224


@kernel
def widen_bits(bits: np.uint32, precision: int) -> np.float32:
    """One stored finite number, from its bits, as float32; `precision` as in `floats.PRECISION`."""
    u = np.uint32(bits)
    if precision == 1:
        return np.uint32(u << np.uint32(16)).view(np.float32)
    if precision == 2:
        magnitude = np.uint32((u & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32) * np.float32(2.0**112)
        return np.float32(-magnitude) if u & np.uint32(0x8000) else np.float32(magnitude)
    return u.view(np.float32)


@kernel
def load(bits: Array, precision: int, x: Array) -> None:
    """Widen `bits` [n] of any dtype into x [n], the uint32 bits of float32."""
    if precision == 2:
        load_f16(bits, x)
    else:
        load_f32(bits, x)


@kernel
def code_of(value: np.float32, scale: np.float32) -> int:
    """E4M3 code of value / scale."""
    code: int = np.int64(e4m3_from_f32(np.float32(value / scale)))  # type: ignore[assignment]
    return code


@kernel
def image(value: np.float32, scale: np.float32, precision: int) -> np.float32:
    """What becomes of a number that is encoded with `scale` and decoded again."""
    return round_f32(np.float32(E4M3[code_of(value, scale)] * scale), precision)


@kernel
def image_part(x: Array, scale: np.float32, precision: int, codes: Array) -> None:
    """Replace x [n], the uint32 bits of float32, by its image; codes [n] is scratch that gets the codes."""
    values = x.view(np.float32)
    e4m3_codes(x, scale, codes)
    load_e4m3(codes, x)
    for i in range(x.size):
        values[i] *= scale
    round_all(x, precision)


@kernel
def _reproduces(
    bits: Array,
    first: int,
    height: int,
    width: int,
    stride: int,
    precision: int,
    guess: np.float32,
    scale: np.float32,
) -> bool:
    """True when encoding with `scale` keeps every number of a cell, or of its image under `guess` if that is not 0."""
    for i in range(first, first + min(width, _FIRST)):  # where nearly every trial ends
        v = widen_bits(bits[i], precision)
        if guess > 0:
            v = image(v, guess, precision)
        if image(v, scale, precision) != v:
            return False
    x, near = np.empty(_PART, np.uint32), np.empty(_PART, np.uint32)
    codes = np.empty(_PART, np.uint8)
    for row in range(height):
        for left in range(0, width, _PART):
            n = min(_PART, width - left)
            start = first + row * stride + left
            load(bits[start : start + n], precision, x[:n])
            if guess > 0:
                image_part(x[:n], guess, precision, codes[:n])
            near[:n] = x[:n]
            image_part(near[:n], scale, precision, codes[:n])
            different = np.uint32(0)
            for i in range(n):
                different |= near[i] ^ x[i]
            if different:
                return False
    return True


@kernel
def find(
    bits: Array,
    first: int,
    height: int,
    width: int,
    stride: int,
    largest: np.float32,
    precision: int,
    scale_precision: int,
    guess: np.float32,
) -> np.float32:
    """First scale that reproduces a cell, or its image under `guess` if that is not 0; 0.0 when there is none.

    largest  largest magnitude of what is to be reproduced
    order    largest / 448, / 416 ... / 224, each rounded to the dtype of scales, then its lower and upper neighbour
    """
    for k in range(_LARGEST.size):
        center = round_f32(np.float32(largest / _LARGEST[k]), scale_precision)
        for steps in (0, -1, 1):
            scale = next_f32(center, scale_precision, steps)
            if not (scale > 0 and scale < np.float32(np.inf)):
                continue
            if round_f32(np.float32(_LARGEST[k] * scale), precision) != largest:
                continue
            if scale == guess or _reproduces(bits, first, height, width, stride, precision, guess, scale):
                return scale
    return np.float32(0.0)


@kernel
def absmax(largest: np.float32, precision: int, scale_precision: int) -> np.float32:
    """largest / 448 in the dtype of scales; the number below where `largest` would be decoded to infinity."""
    scale = round_f32(np.float32(largest / np.float32(E4M3_MAX)), scale_precision)
    if scale < np.float32(np.inf) and image(largest, scale, precision) == np.float32(np.inf):
        return next_f32(scale, scale_precision, -1)
    return scale


@kernel
def _candidates(largest: np.float32, precision: int, scale_precision: int, grid: Array, scales: Array) -> None:
    """Fill scales [n] with the rounded grid * largest / 448; 0 for what `find` would not meet again.

    Found again are scales whose largest code is one of the nine and decoded to a finite number, and that are the
    rounded quotient of this number and that code, or next to it. Scales of a wider dtype than that of the weights are
    not, as a rule, so the quotient stands in for them. The first, grid[0] = 1, is the quotient or next to it.
    """
    base = np.float32(largest / np.float32(E4M3_MAX))
    scales[0] = absmax(largest, precision, scale_precision)
    for k in range(1, grid.size):
        scales[k] = 0
        scale = round_f32(np.float32(grid[k] * base), scale_precision)
        if not (scale > 0 and scale < np.float32(np.inf)):
            continue
        code = code_of(largest, scale)
        if code < 0x76:
            continue
        decoded = round_f32(np.float32(E4M3[code] * scale), precision)
        quotient = round_f32(np.float32(decoded / E4M3[code]), scale_precision)
        lower, upper = next_f32(quotient, scale_precision, -1), next_f32(quotient, scale_precision, 1)
        if scale not in (lower, quotient, upper):
            scale = quotient
        if decoded < np.float32(np.inf) and code_of(largest, scale) == code:
            scales[k] = scale


@kernel
def _add_errors(x: Array, scale: np.float32, errors: Array, lanes: Array) -> None:
    """Add the squared errors of x [n], float32 >= 0, under `scale` to lanes [64] float64; n is a multiple of 64.

    The square of a float32 is exact in float64, so only the order of the sum matters.
    """
    for i in range(x.size):
        y = min(np.float32(x[i] / scale), np.float32(E4M3_MAX))
        # Four significant bits, or multiples of 2**-9: adding 2**20 times the power of two below y rounds to them.
        power = np.uint32(np.float32(max(y, np.float32(2.0**-6))).view(np.uint32) & np.uint32(0x7F800000))
        big = np.uint32(power + np.uint32(20 << 23)).view(np.float32)
        near = np.float32(np.float32(y + big) - big)
        errors[i] = x[i] - np.float32(near * scale)
    for start in range(0, x.size, LANES):
        part = errors[start : start + LANES]
        for j in range(LANES):
            error = np.float64(part[j])
            lanes[j] += error * error


@kernel
def best(
    bits: Array,
    first: int,
    height: int,
    width: int,
    stride: int,
    largest: np.float32,
    precision: int,
    scale_precision: int,
    grid: Array,
) -> np.float32:
    """The scale of the grid with the least sum of squared errors; the first of equals, and that is the smallest."""
    scales = np.empty(grid.size, np.float32)
    lanes = np.zeros((grid.size, LANES), np.float64)
    x = np.empty(TILE, np.uint32)
    errors = np.empty(TILE, np.float32)
    _candidates(largest, precision, scale_precision, grid, scales)
    for start in range(0, height * width, TILE):
        stop = min(start + TILE, height * width)
        i = start
        while i < stop:
            row, column = i // width, i % width
            n = min(width - column, stop - i)
            begin = first + row * stride + column
            load(bits[begin : begin + n], precision, x[i - start : i - start + n])
            i += n
        padded = -(-(stop - start) // LANES) * LANES
        x[stop - start : padded] = 0
        for k in range(padded):
            x[k] &= np.uint32(0x7FFFFFFF)
        for k in range(grid.size):
            if scales[k] > 0:
                _add_errors(x[:padded].view(np.float32), scales[k], errors, lanes[k])
    chosen, least = 0, np.inf
    for k in range(grid.size):
        total = 0.0
        for j in range(LANES):
            total += lanes[k, j]
        if scales[k] > 0 and total < least:
            chosen, least = k, total
    return np.float32(scales[chosen])
