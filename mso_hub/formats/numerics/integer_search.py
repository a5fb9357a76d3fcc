"""Which scale and zero point a group of integer codes gets: those that it was made with, or the best of a grid.

A group is what shares one scale: some columns of a row, or the whole row. For the kernels it is x [n] float32, numbers
of a dtype that `precision` names (`floats.PRECISION`); `scale_precision` names the dtype of scales.

    image      what a number becomes when it is encoded and decoded to its own dtype:
               y = round((code - zero_point) * scale)          code = rne(clamp(v / scale + zero_point))
    exact      a scale and zero point under which every number of a group is its own image. Nothing is lost, so they
               are taken before any search
    settled    two scales can give the same image. Everything that has this image gets the first of them in the order
               of `find`, so that encoding the image again gives the same scale and the same codes

The scales that could have made an image are few. Its largest magnitude is |code - zero_point| * scale, rounded, for one
of the few largest codes, so the scale is that magnitude over such a code, or one place above or below. This needs
scales that are no finer than the numbers themselves: where the dtype of scales has more significant bits, a scale is
rounded so that scale * 2**(bits - 1) is a number of the dtype of the weights.
"""

from __future__ import annotations

import numpy as np

from mso_hub.formats.numerics.floats import Array, next_f32, round_f32
from mso_hub.formats.numerics.kernel import kernel

LANES = 16
"""Sums of squared errors run in this many lanes: element i of a group adds to lane i % 16."""
BIG = np.float32(1.5 * 2.0**23)
"""Added to a float32 below 2**22 it rounds to an integer, ties to even, and leaves it in the low bits."""

_LARGEST = np.array([np.finfo(np.float32).max, (2 - 2.0**-7) * 2.0**127, 65504.0], np.float32)
_SMALLEST = np.array([2.0**-149, 2.0**-133, 2.0**-24], np.float32)
_ROUNDING = np.array([2.0**-22, 2.0**-7, 2.0**-10], np.float32) * np.float32(1.05)
"""By `precision`: largest number, smallest positive number, twice the relative error of rounding and a little more."""

_KEPT = {2: 0.3, 3: 0.4, 4: 0.45, 5: 0.6, 6: 0.75, 7: 0.85, 8: 0.9}
"""How much of the largest magnitude, or of both ends, "mse" keeps at the least; more bits gain less from clipping."""
_STEPS = 32


def grid(bits: int, *, symmetric: bool) -> Array:
    """What "mse" tries besides the scale of "absmax".

    symmetric  what the largest magnitude is divided by: the two largest codes, then 32 numbers from just above the code
               that would leave the largest one unused to that over `_KEPT`
    else       how much of both ends is kept: 20 numbers, falling to `_KEPT`
    """
    kept = _KEPT[bits]
    if not symmetric:
        return np.linspace(1.0, kept, 21)[1:].astype(np.float32)
    top = 1 << (bits - 1)
    divisors = (top - 1) / np.linspace((top - 1) / (top - 1.5), kept, _STEPS)
    return np.concatenate([[top - 1, top], divisors]).astype(np.float32)


@kernel
def round_scale(value: np.float32, precision: int, scale_precision: int, bits: int, steps: int) -> np.float32:
    """The scale nearest to a positive number, or the one `steps` (-1, 0, 1) places above; see the top of this file."""
    if precision in (0, scale_precision):
        return next_f32(round_f32(value, scale_precision), scale_precision, steps)
    factor = np.float32(1 << (bits - 1))
    product = next_f32(round_f32(np.float32(value * factor), precision), precision, steps)
    return round_f32(np.float32(product / factor), scale_precision)


@kernel
def is_positive(scale: np.float32) -> bool:
    """True for what can be a scale: not 0, negative, infinite or NaN."""
    return bool(scale > 0 and scale < np.float32(np.inf))


@kernel
def code_of(value: np.float32, scale: np.float32, zero_point: np.float32, bits: int) -> np.float32:
    """Code of a number, as float32."""
    lowest = np.float32(-(1 << (bits - 1)))
    y = np.float32(np.float32(value / scale) + zero_point)
    y = min(max(y, lowest), np.float32(-lowest - np.float32(1)))
    return np.float32(np.float32(y + BIG) - BIG)


@kernel
def decoded(code: np.float32, scale: np.float32, zero_point: np.float32, precision: int) -> np.float32:
    """What a code is decoded to."""
    return round_f32(np.float32(np.float32(code - zero_point) * scale), precision)


@kernel
def image(value: np.float32, scale: np.float32, zero_point: np.float32, bits: int, precision: int) -> np.float32:
    """What becomes of a number that is encoded and decoded again."""
    return decoded(code_of(value, scale, zero_point, bits), scale, zero_point, precision)


@kernel
def exact_code(value: np.float32, scale: np.float32, zero_point: np.float32, bits: int, precision: int) -> np.float32:
    """Code that is decoded to `value`: the nearest, else the one above or below; the nearest when there is none.

    |code - zero_point| up to 255 has more bits than a BF16 number, so an image may lie next to another code.
    """
    code = code_of(value, scale, zero_point, bits)
    if precision != 1 or bits < 8 or decoded(code, scale, zero_point, precision) == value:
        return code
    lowest = np.float32(-(1 << (bits - 1)))
    above, below = np.float32(code + np.float32(1)), np.float32(code - np.float32(1))
    if above <= -lowest - np.float32(1) and decoded(above, scale, zero_point, precision) == value:
        return above
    if below >= lowest and decoded(below, scale, zero_point, precision) == value:
        return below
    return code


@kernel
def exact_zero_point(low: np.float32, high: np.float32, scale: np.float32, bits: int) -> np.float32:
    """Zero point that gives the lowest code to `low` (<= 0), as long as `high` (>= 0) has one too; else NaN.

    One code too many may be due to rounding, which moves the larger of the two: the other one gets the code at its end.
    """
    lowest = np.float32(-(1 << (bits - 1)))
    down, up = np.rint(np.float32(low / scale)), np.rint(np.float32(high / scale))
    zero_point = np.float32(lowest - down)
    if up - down > (1 << bits) - 1 and up < -down:
        zero_point = np.float32(-lowest - np.float32(1) - up)
    if not (up - down <= (1 << bits) and zero_point >= lowest and zero_point <= -lowest - np.float32(1)):
        return np.float32(np.nan)
    return zero_point


@kernel
def _reproduces(
    x: Array,
    bits: int,
    precision: int,
    guess: tuple[np.float32, np.float32],
    scale: np.float32,
    zero_point: np.float32,
) -> bool:
    """True when every number of a group, or of its image under `guess` if that has a scale, is its own image."""
    for i in range(x.size):
        v = x[i]
        if guess[0] > 0:
            v = image(v, guess[0], guess[1], bits, precision)
        if decoded(exact_code(v, scale, zero_point, bits, precision), scale, zero_point, precision) != v:
            return False
    return True


@kernel
def _may_be_multiple(value: np.float32, most: np.float32, code: int, precision: int) -> bool:
    """False when value / scale is too far from an integer for any scale that makes `most` of this code."""
    y = np.float32(abs(value) / most) * np.float32(code)
    step = np.float32(_SMALLEST[precision] / most)
    slack = np.float32(y * np.float32(_ROUNDING[precision] + step)) + np.float32(step * np.float32(code))
    return bool(np.float32(abs(y - np.rint(y))) <= slack)


@kernel
def _codes_of_most(low: np.float32, high: np.float32, bits: int, symmetric: bool, precision: int) -> tuple[int, int]:
    """First and last |code - zero_point| that the largest magnitude of an image may have had, in falling order."""
    most, codes, top = max(high, np.float32(-low)), (1 << bits) - 1, 1 << (bits - 1)
    # Below 256 times the smallest number a scale is rounded so much that the largest codes may not be used.
    coarse = most < np.float32(256 * top) * _SMALLEST[precision]
    if symmetric:
        return top, top // 2 if coarse else top - min(top // 2, 4)
    guess = int(np.rint(codes * np.float64(most) / (np.float64(high) - np.float64(low))))
    slack = 2 if bits > 4 and precision == 1 else 0
    return min(guess + slack, codes), max(guess // 2 if coarse else guess - 2 - slack, 1)


@kernel
def find(
    x: Array,
    low: np.float32,
    high: np.float32,
    bits: int,
    symmetric: bool,
    precision: int,
    scale_precision: int,
    guess: tuple[np.float32, np.float32],
) -> tuple[np.float32, np.float32]:
    """First scale and zero point that reproduce a group, or its image under `guess`; the scale is 0 without any.

    low, high  smallest and largest number of what is to be reproduced, or 0; they are not both 0
    guess      scale and zero point; a scale of 0 means that the group itself is meant
    order      the largest magnitude over the codes of `_codes_of_most`, each rounded to a scale, then its lower and its
               upper neighbour; at last the smallest number of the dtype, of which all numbers are multiples
    """
    most = max(high, np.float32(-low))
    one, other = x[0], x[x.size // 2]
    if guess[0] > 0:
        one, other = image(one, guess[0], guess[1], bits, precision), image(other, guess[0], guess[1], bits, precision)
    certain = precision != 1 or bits < 8 or symmetric
    first, last = _codes_of_most(low, high, bits, symmetric, precision)
    for code in range(first, last - 1, -1):
        if symmetric and code == 1 << (bits - 1) and -low != most:
            continue
        if not (_may_be_multiple(one, most, code, precision) and _may_be_multiple(other, most, code, precision)):
            continue
        for steps in (0, -1, 1):
            center = np.float32(most / np.float32(code))
            scale = round_scale(center, precision, scale_precision, bits, steps)
            if not is_positive(scale) or round_f32(np.float32(np.float32(code) * scale), precision) != most:
                continue
            zero_point = np.float32(0.0) if symmetric else exact_zero_point(low, high, scale, bits)
            if np.isnan(zero_point):
                continue
            if certain and scale == guess[0] and zero_point == guess[1]:
                return scale, zero_point
            if _reproduces(x, bits, precision, guess, scale, zero_point):
                return scale, zero_point
    scale = _SMALLEST[precision]
    if most <= np.float32(1 << bits) * scale and round_f32(scale, scale_precision) == scale:
        zero_point = np.float32(0.0) if symmetric else exact_zero_point(low, high, scale, bits)
        if not np.isnan(zero_point) and _reproduces(x, bits, precision, guess, scale, zero_point):
            return scale, zero_point
    return np.float32(0.0), np.float32(0.0)


@kernel
def _has_finite_ends(scale: np.float32, zero_point: np.float32, bits: int, precision: int) -> bool:
    """True when the lowest and the highest code are decoded to finite numbers."""
    lowest = np.float32(-(1 << (bits - 1)))
    down = decoded(lowest, scale, zero_point, precision)
    up = decoded(np.float32(-lowest - np.float32(1)), scale, zero_point, precision)
    return bool(down > np.float32(-np.inf) and up < np.float32(np.inf))


@kernel
def scale_over(
    value: np.float32,
    low: np.float32,
    bits: int,
    symmetric: bool,
    precision: int,
    scale_precision: int,
) -> tuple[np.float32, np.float32]:
    """`value` rounded to a scale, and the zero point that gives `low` the lowest code; the scale is 0 if it cannot be.

    A scale so large that a code would be decoded to infinity is made smaller.
    """
    lowest = np.float32(-(1 << (bits - 1)))
    value = min(value, np.float32(_LARGEST[precision] / -lowest))
    while True:
        scale = round_scale(value, precision, scale_precision, bits, 0)
        if not is_positive(scale):
            return np.float32(0.0), np.float32(0.0)
        zero_point = np.float32(0.0)
        if not symmetric:
            y = np.float32(lowest - np.float32(low / scale))
            zero_point = np.float32(np.rint(min(max(y, lowest), np.float32(-lowest - np.float32(1)))))
        if _has_finite_ends(scale, zero_point, bits, precision):
            return scale, zero_point
        value = np.float32(value * np.float32(0.96875))


@kernel
def span(low: np.float32, high: np.float32, codes: np.float32, symmetric: bool) -> np.float32:
    """What one of `codes` steps covers: 2 * the largest magnitude over them, or high - low over them."""
    if symmetric:
        return np.float32(max(high, np.float32(-low)) / np.float32(codes / np.float32(2)))
    width = np.float32(high - low)
    if width < np.float32(np.inf):
        return np.float32(width / codes)
    return np.float32(np.float32(high / codes) - np.float32(low / codes))


@kernel
def _add_errors(x: Array, scale: np.float32, zero_point: np.float32, bits: int, errors: Array, lanes: Array) -> None:
    """Add the squared errors of x [n] to lanes [16] float64; n is a multiple of 16, errors [n] float32 is scratch.

    The square of a float32 is exact in float64, so only the order of the sum matters.
    """
    lowest = np.float32(-(1 << (bits - 1)))
    highest = np.float32(-lowest - np.float32(1))
    for i in range(x.size):
        y = np.float32(np.float32(x[i] / scale) + zero_point)
        y = min(max(y, lowest), highest)
        code = np.float32(np.float32(y + BIG) - BIG)
        errors[i] = x[i] - np.float32(np.float32(code - zero_point) * scale)
    for start in range(0, x.size, LANES):
        part = errors[start : start + LANES]
        for j in range(LANES):
            error = np.float64(part[j])
            lanes[j] += error * error


@kernel
def squared_error(x: Array, scale: np.float32, zero_point: np.float32, bits: int, errors: Array, lanes: Array) -> float:
    """Sum of squared errors of x [n], n a multiple of 16; errors (at least 16 numbers) and lanes [16] are scratch."""
    lanes[:] = 0.0
    for start in range(0, x.size, errors.size):
        stop = min(start + errors.size, x.size)
        _add_errors(x[start:stop], scale, zero_point, bits, errors[: stop - start], lanes)
    total = 0.0
    for j in range(LANES):
        total += lanes[j]
    return total


@kernel
def best(
    x: Array,
    low: np.float32,
    high: np.float32,
    bits: int,
    symmetric: bool,
    precision: int,
    scale_precision: int,
    grid: Array,
    errors: Array,
    lanes: Array,
) -> tuple[np.float32, np.float32]:
    """Of the scales of a grid, and their zero points, those with the least sum of squared errors; first of equals.

    x     the group, filled up with zeros to a multiple of 16, which have no error
    grid  float32 [c]: symmetric, what the largest magnitude is divided by; else how much of both ends is kept
    """
    chosen = scale_over(
        span(low, high, np.float32((1 << bits) - 1), symmetric), low, bits, symmetric, precision, scale_precision
    )
    if chosen[0] == 0:
        return chosen
    most, top = max(high, np.float32(-low)), np.float32(1 << (bits - 1))
    least = squared_error(x, chosen[0], chosen[1], bits, errors, lanes)
    last = chosen
    for k in range(grid.size):
        if symmetric:
            value, end = np.float32(most / grid[k]), low
        else:
            end = np.float32(low * grid[k])
            value = span(end, np.float32(high * grid[k]), np.float32((1 << bits) - 1), symmetric)
        tried = scale_over(value, end, bits, symmetric, precision, scale_precision)
        if tried == last or tried[0] < _SMALLEST[precision]:
            continue
        last = tried
        # A scale that leaves the largest code unused would not be found again.
        if symmetric and np.rint(np.float32(most / tried[0])) < top - np.float32(1):
            continue
        error = squared_error(x, tried[0], tried[1], bits, errors, lanes)
        if error < least:
            least, chosen = error, tried
    return chosen
