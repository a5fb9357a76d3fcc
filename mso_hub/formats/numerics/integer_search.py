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

_FITS = 4
LANES = 16
"""Sums of squared errors run in this many lanes: element i of a group adds to lane i % 16."""
BIG = np.float32(1.5 * 2.0**23)
"""Added to a float32 below 2**22 it rounds to an integer, ties to even, and leaves it in the low bits."""

_LARGEST = np.array([np.finfo(np.float32).max, (2 - 2.0**-7) * 2.0**127, 65504.0], np.float32)
_SMALLEST = np.array([2.0**-149, 2.0**-133, 2.0**-24], np.float32)
_ROUNDING = np.array([2.0**-22, 2.0**-7, 2.0**-10], np.float32) * np.float32(1.05)
"""By `precision`: largest number, smallest positive number, twice the relative error of rounding and a little more."""

_KEPT = {2: (0.3, 24), 3: (0.4, 24), 4: (0.5, 24), 5: (0.65, 20), 6: (0.8, 16), 7: (0.9, 12), 8: (0.95, 10)}
"""Bits -> how much of the largest magnitude, or of both ends, "mse" keeps at the least, and in how many steps."""
_LONG = 512  # columns: among more there are larger outliers, so the grid goes to the square of that, in twice the steps


def grid(bits: int, size: int, *, symmetric: bool) -> Array:
    """What "mse" tries besides the scale of "absmax", float32 [c].

    bits       2 to 8
    size       columns in a group
    symmetric  what the largest magnitude is divided by: the two largest codes, and from just above the quotient at
               which the largest code would not be used to that over `_KEPT`
    else       how much of both ends is kept: from a step below 1 to `_KEPT`
    """
    kept, steps = _KEPT[bits]
    if size > _LONG:
        kept, steps = kept * kept, 2 * steps
    if not symmetric:
        return np.linspace(1.0, kept, steps + 1)[1:].astype(np.float32)
    top = 1 << (bits - 1)
    divisors = (top - 1) / np.linspace((top - 1) / (top - 1.5), kept, steps)
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
def rint(value: np.float32) -> np.float32:
    """Nearest integer of a float32 below 2**22, ties to even."""
    return np.float32(np.float32(value + BIG) - BIG)


@kernel
def code_of(value: np.float32, scale: np.float32, zero_point: np.float32, bits: int) -> np.float32:
    """Code of a number, as float32."""
    lowest = np.float32(-(1 << (bits - 1)))
    y = np.float32(np.float32(value / scale) + zero_point)
    return rint(min(max(y, lowest), np.float32(-lowest - np.float32(1))))


@kernel
def decoded(code: np.float32, scale: np.float32, zero_point: np.float32, precision: int) -> np.float32:
    """What a code is decoded to."""
    return round_f32(np.float32(np.float32(code - zero_point) * scale), precision)


@kernel
def is_certain(bits: int, symmetric: bool, precision: int) -> bool:
    """True when the image of a code has no other code nearest to it.

    |code - zero_point| up to 255 has more bits than a BF16 number, so there an image may lie next to another code.
    """
    return precision != 1 or bits < 8 or symmetric


@kernel
def exact_code(value: np.float32, scale: np.float32, zero_point: np.float32, bits: int, precision: int) -> np.float32:
    """Code that is decoded to `value`: the nearest, else the one above or below; the nearest when there is none."""
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
def _multiple(value: np.float32, scale: np.float32, precision: int) -> np.float32:
    """The n for which n * scale, rounded, is `value`: the nearest, else the one above or below."""
    n = rint(np.float32(value / scale))
    if precision == 1 and round_f32(np.float32(n * scale), precision) != value:
        for other in (np.float32(n + np.float32(1)), np.float32(n - np.float32(1))):
            if round_f32(np.float32(other * scale), precision) == value:
                return other
    return n


@kernel
def _exact_zero_point(low: np.float32, high: np.float32, scale: np.float32, bits: int, precision: int) -> np.float32:
    """Zero point that gives the lowest code to `low` (<= 0); NaN if there is none that reproduces it and `high` (>= 0).

    One code too many may be due to rounding, which moves the larger of the two: the other one gets the code at its end.
    """
    lowest = np.float32(-(1 << (bits - 1)))
    down, up = _multiple(low, scale, precision), _multiple(high, scale, precision)
    if round_f32(np.float32(down * scale), precision) != low or round_f32(np.float32(up * scale), precision) != high:
        return np.float32(np.nan)
    zero_point = np.float32(lowest - down)
    if up - down > (1 << bits) - 1 and up < -down:
        zero_point = np.float32(-lowest - np.float32(1) - up)
    if not (up - down <= (1 << bits) and zero_point >= lowest and zero_point <= -lowest - np.float32(1)):
        return np.float32(np.nan)
    return zero_point


@kernel
def _reproduces(
    x: Array, begin: int, end: int, bits: int, precision: int, scale: np.float32, zero_point: np.float32
) -> bool:
    """True when every number of the group x[begin:end] is its own image."""
    for i in range(begin, end):
        if decoded(exact_code(x[i], scale, zero_point, bits, precision), scale, zero_point, precision) != x[i]:
            return False
    return True


@kernel
def _may_be_multiple(ratio: np.float32, step: np.float32, code: int, precision: int) -> bool:
    """False when a number is too far from an integer times any scale that makes the largest magnitude of this code.

    ratio, step  the number, and the smallest number of the dtype, over the largest magnitude
    """
    y = np.float32(ratio * np.float32(code))
    slack = np.float32(y * np.float32(_ROUNDING[precision] + step)) + np.float32(step * np.float32(code))
    return bool(np.float32(abs(y - rint(y))) <= slack)


@kernel
def _codes_of_most(low: np.float32, high: np.float32, bits: int, symmetric: bool, precision: int) -> tuple[int, int]:
    """First and last |code - zero_point| that the largest magnitude of an image may have had, in falling order."""
    most, codes, top = max(high, np.float32(-low)), (1 << bits) - 1, 1 << (bits - 1)
    # Below 256 times the smallest number a scale is rounded so much that the largest codes may not be used.
    coarse = most < np.float32(256 * top) * _SMALLEST[precision]
    if symmetric:
        return top, top // 2 if coarse or bits <= 4 else top - 1
    guess = int(np.rint(codes * np.float64(most) / (np.float64(high) - np.float64(low))))
    slack = 2 if bits > 4 and precision == 1 else 0
    return min(guess + slack, codes), max(guess // 2 if coarse else guess - 2 - slack, 1)


@kernel
def find(
    x: Array,
    begin: int,
    end: int,
    ends: tuple[np.float32, np.float32, np.float32],
    bits: int,
    symmetric: bool,
    precision: int,
    scale_precision: int,
    guess: tuple[np.float32, np.float32],
) -> tuple[np.float32, np.float32]:
    """First scale and zero point that reproduce the group x[begin:end], not all zero; the scale is 0 without any.

    ends   of the group: smallest number or 0, largest number or 0, smallest magnitude but 0
    guess  scale and zero point of which the group is known to be an image, or zeros
    order  the largest magnitude over the codes of `_codes_of_most`, each rounded to a scale, then its lower and its
           upper neighbour; at last the smallest number of the dtype, of which all numbers are multiples
    """
    low, high, least = ends
    most = max(high, np.float32(-low))
    ratio, step = np.float32(least / most), np.float32(_SMALLEST[precision] / most)
    first, last = _codes_of_most(low, high, bits, symmetric, precision)
    if np.float32(ratio * np.float32(first)) < np.float32(0.4) and np.float32(step * np.float32(first)) < np.float32(
        0.3
    ):
        return np.float32(0.0), np.float32(0.0)  # the smallest number is too small for a code of 1
    for code in range(first, last - 1, -1):
        if symmetric and code == 1 << (bits - 1) and -low != most:
            continue
        if not _may_be_multiple(ratio, step, code, precision):
            continue
        center = np.float32(most / np.float32(code))
        for steps in (0, -1, 1):
            scale = round_scale(center, precision, scale_precision, bits, steps)
            if not is_positive(scale) or round_f32(np.float32(np.float32(code) * scale), precision) != most:
                continue
            zero_point = np.float32(0.0) if symmetric else _exact_zero_point(low, high, scale, bits, precision)
            if np.isnan(zero_point):
                continue
            if scale == guess[0] and zero_point == guess[1] and is_certain(bits, symmetric, precision):
                return scale, zero_point
            if _reproduces(x, begin, end, bits, precision, scale, zero_point):
                return scale, zero_point
    scale = _SMALLEST[precision]
    if most <= np.float32(1 << bits) * scale and round_f32(scale, scale_precision) == scale:
        zero_point = np.float32(0.0) if symmetric else _exact_zero_point(low, high, scale, bits, precision)
        if not np.isnan(zero_point) and _reproduces(x, begin, end, bits, precision, scale, zero_point):
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
    value: np.float32, low: np.float32, bits: int, symmetric: bool, precision: int, scale_precision: int
) -> tuple[np.float32, np.float32]:
    """`value` rounded to a scale, and the zero point that gives `low` the lowest code; the scale is 0 if it cannot be.

    A scale so large that a code would be decoded to infinity is made smaller.
    """
    lowest = np.float32(-(1 << (bits - 1)))
    limit = np.float32(_LARGEST[precision] / -lowest)
    value = min(value, limit)
    while True:
        scale = round_scale(value, precision, scale_precision, bits, 0)
        if not is_positive(scale):
            return np.float32(0.0), np.float32(0.0)
        zero_point = np.float32(0.0)
        if not symmetric:
            y = np.float32(lowest - np.float32(low / scale))
            zero_point = rint(min(max(y, lowest), np.float32(-lowest - np.float32(1))))
        if value < limit * np.float32(0.25) or _has_finite_ends(scale, zero_point, bits, precision):
            return scale, zero_point
        value = np.float32(value * np.float32(1.0 - 1.0 / (2 << bits)))


@kernel
def span(low: np.float32, high: np.float32, bits: int, symmetric: bool) -> np.float32:
    """What one step of the codes covers: 2 * the largest magnitude over their number less 1, or high - low over it."""
    codes = np.float32((1 << bits) - 1)
    if symmetric:
        return np.float32(max(high, np.float32(-low)) / np.float32(codes / np.float32(2)))
    width = np.float32(high - low)
    if width < np.float32(np.inf):
        return np.float32(width / codes)
    return np.float32(np.float32(high / codes) - np.float32(low / codes))


@kernel
def _squared_error(x: Array, scale: np.float32, zero_point: np.float32, bits: int, lanes: Array) -> float:
    """Sum of squared errors of x [n], n a multiple of 16, in lanes [16] float64.

    The square of a float32 is exact in float64, so only the order of the sum matters.
    """
    lowest = np.float32(-(1 << (bits - 1)))
    highest = np.float32(-lowest - np.float32(1))
    lanes[:] = 0.0
    for start in range(0, x.size, LANES):
        for j in range(LANES):
            v = x[start + j]
            y = np.float32(np.float32(v / scale) + zero_point)
            code = np.float32(np.float32(min(max(y, lowest), highest) + BIG) - BIG)
            error = np.float64(v - np.float32(np.float32(code - zero_point) * scale))
            lanes[j] += error * error
    total = 0.0
    for j in range(LANES):
        total += lanes[j]
    return total


@kernel
def _weighted_error(x: Array, weights: Array, scale: np.float32, zero_point: np.float32, bits: int) -> float:
    """Sum of squared errors of x, each times its weight (float64), in column order."""
    lowest = np.float32(-(1 << (bits - 1)))
    highest = np.float32(-lowest - np.float32(1))
    total = 0.0
    for i in range(weights.size):
        y = np.float32(np.float32(x[i] / scale) + zero_point)
        code = np.float32(np.float32(min(max(y, lowest), highest) + BIG) - BIG)
        error = np.float64(x[i] - np.float32(np.float32(code - zero_point) * scale))
        total += error * error * weights[i]
    return total


@kernel
def _error(x: Array, weights: Array, scale: np.float32, zero_point: np.float32, bits: int, lanes: Array) -> float:
    """Sum of squared errors, weighted where there are weights."""
    if weights.size:
        return _weighted_error(x, weights, scale, zero_point, bits)
    return _squared_error(x, scale, zero_point, bits, lanes)


@kernel
def _fitted(
    x: Array, weights: Array, chosen: tuple[np.float32, np.float32], bits: int, precision: int, scale_precision: int
) -> tuple[np.float32, np.float32]:
    """The scale that suits the codes under `chosen` best, with the same zero point: sum(w x c) / sum(w c**2).

    c is code - zero_point. The scale is 0 where it cannot be stored or codes of 0 leave it open.
    """
    scale, zero_point = chosen
    above, below = 0.0, 0.0
    for i in range(weights.size):
        steps = np.float64(code_of(x[i], scale, zero_point, bits) - zero_point)
        above += weights[i] * np.float64(x[i]) * steps
        below += weights[i] * steps * steps
    if not (above > 0 and below > 0):
        return np.float32(0.0), zero_point
    fitted = round_scale(np.float32(above / below), precision, scale_precision, bits, 0)
    if not is_positive(fitted) or not _has_finite_ends(fitted, zero_point, bits, precision):
        return np.float32(0.0), zero_point
    return fitted, zero_point


@kernel
def best(
    x: Array,
    weights: Array,
    ends: tuple[np.float32, np.float32, np.float32],
    bits: int,
    symmetric: bool,
    precision: int,
    scale_precision: int,
    tried: Array,
    lanes: Array,
) -> tuple[np.float32, np.float32]:
    """Of the scales of a grid, and their zero points, those with the least sum of squared errors; first of equals.

    With weights, the scale is then fitted to its codes as long as that helps.

    x        the group, filled up with zeros to a multiple of 16, which have no error
    weights  float64, one for each of its numbers, empty for equal ones
    tried    see `grid`
    lanes    scratch, float64 [16]
    """
    low, high, _ = ends
    chosen = scale_over(span(low, high, bits, symmetric), low, bits, symmetric, precision, scale_precision)
    if chosen[0] == 0:
        return chosen
    most, used = max(high, np.float32(-low)), np.float32((1 << (bits - 1)) - 1)
    least, last = _error(x, weights, chosen[0], chosen[1], bits, lanes), chosen
    for k in range(tried.size):
        value, end = np.float32(most / tried[k]), low
        if not symmetric:
            end = np.float32(low * tried[k])
            value = span(end, np.float32(high * tried[k]), bits, symmetric)
        now = scale_over(value, end, bits, symmetric, precision, scale_precision)
        # A scale that leaves the largest code unused, or is below the numbers themselves, would not be found again.
        if now == last or now[0] < _SMALLEST[precision] or (symmetric and rint(np.float32(most / now[0])) < used):
            continue
        last = now
        error = _error(x, weights, now[0], now[1], bits, lanes)
        if error < least:
            least, chosen = error, now
    for _ in range(_FITS if weights.size else 0):
        now = _fitted(x, weights, chosen, bits, precision, scale_precision)
        if now[0] < _SMALLEST[precision] or (symmetric and rint(np.float32(most / now[0])) < used):
            break
        error = _error(x, weights, now[0], now[1], bits, lanes)
        if error >= least:
            break
        least, chosen = error, now
    return chosen
