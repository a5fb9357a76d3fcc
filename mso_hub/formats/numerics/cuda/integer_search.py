"""Which scale and zero point a group of integer codes gets, on CUDA: see `numerics.integer_search` for what is asked.

A program works on a tile of n groups: everything that belongs to a group is a vector [n], and x are pointers [n] to the
first of its `size` numbers, which are read in pieces of `tile` columns. Groups that are not asked for are masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mso_hub.formats.numerics.cuda.floats import load_f32, next_f32, round_f32


@triton.jit
def rint(value: tl.tensor) -> tl.tensor:
    """Integers next to float32 numbers below 2**22, ties to even, as float32."""
    return (value + 12582912.0) - 12582912.0  # 1.5 * 2**23


@triton.jit
def smallest(like: tl.tensor, precision: tl.constexpr) -> tl.tensor:
    """The smallest positive number of a dtype, 2**-149, 2**-133 or 2**-24, in the shape of `like`."""
    pattern: tl.constexpr = 0x33800000 if precision == 2 else 0x10000 if precision == 1 else 1
    return ((like * 0.0).to(tl.int32, bitcast=True) * 0 + pattern).to(tl.float32, bitcast=True)


@triton.jit
def is_positive(scale: tl.tensor) -> tl.tensor:
    """Where a number can be a scale: not 0, negative, infinite or NaN."""
    return (scale > 0.0) & (scale < float("inf"))


@triton.jit
def round_scale(
    value: tl.tensor,
    steps: tl.tensor,
    bits: tl.constexpr,
    precision: tl.constexpr,
    scale_precision: tl.constexpr,
) -> tl.tensor:
    """The scales nearest to positive numbers, or those `steps` (-1, 0, 1) places above."""
    if precision == 0 or precision == scale_precision:  # noqa: PLR1714 - the compiler knows no `in`
        return next_f32(round_f32(value, scale_precision), steps, scale_precision)
    else:  # noqa: RET505
        factor: tl.constexpr = 1.0 * (1 << (bits - 1))
        product = next_f32(round_f32(value * factor, precision), steps, precision)
        return round_f32(tl.div_rn(product, factor), scale_precision)


@triton.jit
def code_of(value: tl.tensor, scale: tl.tensor, zero_point: tl.tensor, bits: tl.constexpr) -> tl.tensor:
    """Codes of numbers, as float32."""
    lowest: tl.constexpr = -1.0 * (1 << (bits - 1))
    y = tl.div_rn(value, scale) + zero_point
    y = tl.minimum(tl.maximum(y, lowest), -lowest - 1.0)
    return rint(y)


@triton.jit
def decoded(code: tl.tensor, scale: tl.tensor, zero_point: tl.tensor, precision: tl.constexpr) -> tl.tensor:
    """What codes are decoded to."""
    return round_f32((code - zero_point) * scale, precision)


@triton.jit
def image(
    value: tl.tensor, scale: tl.tensor, zero_point: tl.tensor, bits: tl.constexpr, precision: tl.constexpr
) -> tl.tensor:
    """What becomes of numbers that are encoded and decoded again."""
    return decoded(code_of(value, scale, zero_point, bits), scale, zero_point, precision)


@triton.jit
def exact_code(
    value: tl.tensor, scale: tl.tensor, zero_point: tl.tensor, bits: tl.constexpr, precision: tl.constexpr
) -> tl.tensor:
    """Codes that are decoded to `value`: the nearest, else the one above or below; the nearest when there is none."""
    nearest = code_of(value, scale, zero_point, bits)
    code = nearest
    if precision == 1 and bits == 8:
        keeps = decoded(nearest, scale, zero_point, precision) == value
        above = (nearest + 1.0 <= 127.0) & (decoded(nearest + 1.0, scale, zero_point, precision) == value)
        below = (nearest - 1.0 >= -128.0) & (decoded(nearest - 1.0, scale, zero_point, precision) == value)
        code = tl.where(keeps, nearest, tl.where(above, nearest + 1.0, tl.where(below, nearest - 1.0, nearest)))
    return code


@triton.jit
def _multiple(value: tl.tensor, scale: tl.tensor, precision: tl.constexpr) -> tl.tensor:
    """The n for which n * scale, rounded, is `value`: the nearest, else the one above or below, or the nearest."""
    n = rint(tl.div_rn(value, scale))
    if precision == 1:
        keeps = round_f32(n * scale, precision) == value
        above = round_f32((n + 1.0) * scale, precision) == value
        below = round_f32((n - 1.0) * scale, precision) == value
        n = tl.where(keeps, n, tl.where(above, n + 1.0, tl.where(below, n - 1.0, n)))
    return n


@triton.jit
def _exact_zero_point(
    low: tl.tensor, high: tl.tensor, scale: tl.tensor, bits: tl.constexpr, precision: tl.constexpr
) -> tl.tensor:
    """Zero points that give the lowest code to `low`, if it and `high` are multiples and have codes; else NaN."""
    lowest: tl.constexpr = -1.0 * (1 << (bits - 1))
    down, up = _multiple(low, scale, precision), _multiple(high, scale, precision)
    multiples = (round_f32(down * scale, precision) == low) & (round_f32(up * scale, precision) == high)
    other = (up - down > -2.0 * lowest - 1.0) & (up < -down)
    zero_point = tl.where(other, -lowest - 1.0 - up, lowest - down)
    possible = multiples & (up - down <= -2.0 * lowest) & (zero_point >= lowest) & (zero_point <= -lowest - 1.0)
    return tl.where(possible, zero_point, float("nan"))


@triton.jit
def _may_be_multiple(ratio: tl.tensor, step: tl.tensor, code: tl.tensor, precision: tl.constexpr) -> tl.tensor:
    """False where a number is too far from an integer times any scale that makes the largest magnitude of this code."""
    rounding: tl.constexpr = 1.0499999523162842 * (
        0.0009765625 if precision == 2 else 0.0078125 if precision == 1 else 2.384185791015625e-07
    )
    y = ratio * code
    return tl.abs(y - rint(y)) <= y * (rounding + step) + step * code


@triton.jit
def _codes_of_most(
    low: tl.tensor, high: tl.tensor, bits: tl.constexpr, symmetric: tl.constexpr, precision: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """int32 first and last |code - zero_point| that the largest magnitude of an image may have had."""
    top: tl.constexpr = 1 << (bits - 1)
    most = tl.maximum(high, -low)
    coarse = most < 256.0 * top * smallest(most, precision)
    none = coarse.to(tl.int32) * 0
    if symmetric:
        fine: tl.constexpr = top // 2 if bits <= 4 else top - 1
        return none + top, tl.where(coarse, top // 2, fine)
    else:  # noqa: RET505
        codes: tl.constexpr = 2 * top - 1
        slack: tl.constexpr = 2 if bits > 4 and precision == 1 else 0
        y = most.to(tl.float64) * codes / (high.to(tl.float64) - low.to(tl.float64))
        y = tl.where(high > low, y, 0.0)
        guess = ((y + 4503599627370496.0) - 4503599627370496.0).to(tl.int32)  # 2**52
        last = tl.where(coarse, guess // 2, guess - 2 - slack)
        return tl.minimum(guess + slack, codes), tl.maximum(last, 1)


@triton.jit
def ends(
    x: tl.tensor,
    size: tl.tensor,
    guess: tl.tensor,
    guess_zero: tl.tensor,
    wanted: tl.tensor,
    has_guess: tl.constexpr,
    bits: tl.constexpr,
    precision: tl.constexpr,
    tile: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Smallest and largest number of each group, or 0 where that is beyond, and the smallest magnitude but 0.

    Of the images under a guess if there is one.
    """
    low = guess[:, None] * 0.0 + tl.arange(0, tile)[None, :] * 0.0
    high, least = low, (low * 0.0).to(tl.int32) + 0x7FFFFFFF
    for start in range(0, size, tile):
        k = start + tl.arange(0, tile)[None, :]
        inside = wanted[:, None] & (k < size)
        v = load_f32(x[:, None] + k, inside)
        if has_guess:
            v = image(v, guess[:, None], guess_zero[:, None], bits, precision)
            v = tl.where(inside, v, 0.0)
        low, high = tl.minimum(low, v), tl.maximum(high, v)
        bits_of = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        least = tl.minimum(least, tl.where(bits_of == 0, 0x7FFFFFFF, bits_of))
    smallest_bits = tl.min(least, axis=1)
    magnitude = tl.where(smallest_bits == 0x7FFFFFFF, 0, smallest_bits).to(tl.float32, bitcast=True)
    return tl.min(low, axis=1) + 0.0, tl.max(high, axis=1) + 0.0, magnitude  # -0.0 + 0.0 is 0.0


@triton.jit
def _reproduces(
    x: tl.tensor,
    size: tl.tensor,
    guess: tl.tensor,
    guess_zero: tl.tensor,
    scale: tl.tensor,
    zero_point: tl.tensor,
    wanted: tl.tensor,
    has_guess: tl.constexpr,
    bits: tl.constexpr,
    precision: tl.constexpr,
    tile: tl.constexpr,
) -> tl.tensor:
    """Which of the wanted groups have only numbers, or images under the guess, that are their own images."""
    kept = wanted.to(tl.int32)
    start = 0
    while (start < size) & (tl.max(kept) == 1):
        k = start + tl.arange(0, tile)[None, :]
        v = load_f32(x[:, None] + k, wanted[:, None] & (k < size))
        if has_guess:
            v = image(v, guess[:, None], guess_zero[:, None], bits, precision)
        code = exact_code(v, scale[:, None], zero_point[:, None], bits, precision)
        same = decoded(code, scale[:, None], zero_point[:, None], precision) == v
        kept = kept & tl.min((same | (k >= size)).to(tl.int32), axis=1)
        start += tile
    return kept == 1


@triton.jit
def find(
    x: tl.tensor,
    size: tl.tensor,
    guess: tl.tensor,
    guess_zero: tl.tensor,
    wanted: tl.tensor,
    has_guess: tl.constexpr,
    bits: tl.constexpr,
    symmetric: tl.constexpr,
    precision: tl.constexpr,
    scale_precision: tl.constexpr,
    tile: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """First scale and zero point that reproduce each wanted group, or its image under the guess; 0 without any."""
    top: tl.constexpr = 1 << (bits - 1)
    certain: tl.constexpr = has_guess and (precision != 1 or bits < 8 or symmetric)
    low, high, least = ends(x, size, guess, guess_zero, wanted, has_guess, bits, precision, tile)
    most = tl.maximum(high, -low)
    ratio, step = tl.div_rn(least, most), tl.div_rn(smallest(most, precision), most)
    first, last = _codes_of_most(low, high, bits, symmetric, precision)
    wanted = wanted & (((ratio * first.to(tl.float32) < 0.4) & (step * first.to(tl.float32) < 0.3)) == 0)
    found, found_zero = low * 0.0, low * 0.0
    passed = 0
    while tl.max((wanted & (first - passed >= last)).to(tl.int32)) == 1:
        code = (first - passed).to(tl.float32)
        possible = wanted & (first - passed >= last) & _may_be_multiple(ratio, step, code, precision)
        if symmetric:
            possible = possible & ((first - passed < top) | (-low == most))
        if tl.max(possible.to(tl.int32)) == 1:
            for place in range(3):
                steps = first * 0 + (place * (5 - 3 * place)) // 2  # 0, 1, -1
                scale = round_scale(tl.div_rn(most, code), -steps, bits, precision, scale_precision)
                zero_point = scale * 0.0 if symmetric else _exact_zero_point(low, high, scale, bits, precision)
                test = possible & wanted & is_positive(scale) & (round_f32(code * scale, precision) == most)
                test = test & (zero_point == zero_point)  # noqa: PLR0124 - NaN
                hit = test & certain & (scale == guess) & (zero_point == guess_zero)
                test = test & (hit == 0)
                hit = hit | _reproduces(
                    x, size, guess, guess_zero, scale, zero_point, test, has_guess, bits, precision, tile
                )  # fmt: skip
                found, found_zero = tl.where(hit, scale, found), tl.where(hit, zero_point, found_zero)
                wanted = wanted & (hit == 0)
        passed += 1
    scale = smallest(most, precision)
    zero_point = scale * 0.0 if symmetric else _exact_zero_point(low, high, scale, bits, precision)
    test = wanted & (most <= 2.0 * top * scale) & (round_f32(scale, scale_precision) == scale)
    test = test & (zero_point == zero_point)  # noqa: PLR0124 - NaN
    hit = _reproduces(x, size, guess, guess_zero, scale, zero_point, test, has_guess, bits, precision, tile)
    return tl.where(hit, scale, found), tl.where(hit, zero_point, found_zero)


@triton.jit
def span(low: tl.tensor, high: tl.tensor, bits: tl.constexpr, symmetric: tl.constexpr) -> tl.tensor:
    """What one step of the codes covers: 2 * the largest magnitude over 2**bits - 1 of them, or high - low."""
    codes: tl.constexpr = 1.0 * ((1 << bits) - 1)
    if symmetric:
        return tl.div_rn(tl.maximum(high, -low), codes / 2.0)
    else:  # noqa: RET505
        width = high - low
        parts = tl.div_rn(high, codes) - tl.div_rn(low, codes)
        return tl.where(width < float("inf"), tl.div_rn(width, codes), parts)


@triton.jit
def _zero_point_of(low: tl.tensor, scale: tl.tensor, bits: tl.constexpr, symmetric: tl.constexpr) -> tl.tensor:
    """Zero points that give `low` the lowest code, as far as they have one themselves."""
    if symmetric:
        return low * 0.0
    else:  # noqa: RET505
        lowest: tl.constexpr = -1.0 * (1 << (bits - 1))
        return rint(tl.minimum(tl.maximum(lowest - tl.div_rn(low, scale), lowest), -lowest - 1.0))


@triton.jit
def scale_over(
    value: tl.tensor,
    low: tl.tensor,
    wanted: tl.tensor,
    bits: tl.constexpr,
    symmetric: tl.constexpr,
    precision: tl.constexpr,
    scale_precision: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """`value` rounded to a scale, less where a code would be decoded to infinity, and its zero point; 0 without any."""
    lowest: tl.constexpr = -1.0 * (1 << (bits - 1))
    largest: tl.constexpr = (
        65504.0 if precision == 2 else 3.3895313892515355e38 if precision == 1 else 3.4028234663852886e38
    ) / (1 << (bits - 1))
    value = tl.minimum(value, largest)
    none = (low * 0.0).to(tl.int32)
    scale, zero_point = low * 0.0, low * 0.0
    going = wanted.to(tl.int32)
    while tl.max(going) == 1:
        tried = round_scale(value, none, bits, precision, scale_precision)
        tried_zero = _zero_point_of(low, tl.where(is_positive(tried), tried, 1.0), bits, symmetric)
        down = decoded(none + lowest, tried, tried_zero, precision)
        up = decoded(none - lowest - 1.0, tried, tried_zero, precision)
        finite = (value < largest * 0.25) | ((down > -float("inf")) & (up < float("inf")))
        finite = finite & is_positive(tried)
        scale = tl.where(finite & (going == 1), tried, scale)
        zero_point = tl.where(finite & (going == 1), tried_zero, zero_point)
        going = going & is_positive(tried).to(tl.int32) & (finite == 0).to(tl.int32)
        value = value * (1.0 - 1.0 / (2 << bits))
    return scale, zero_point


@triton.jit
def _squared_error(
    x: tl.tensor, size: tl.tensor, scale: tl.tensor, zero_point: tl.tensor, wanted: tl.tensor, bits: tl.constexpr
) -> tl.tensor:
    """float64 [n]: number i of a group adds its squared error to lane i % 16, and then lane adds to lane."""
    lane = tl.arange(0, 16)[None, :]
    lanes = (scale[:, None] * 0.0 + lane * 0).to(tl.float64)
    for start in range(0, size, 16):
        v = load_f32(x[:, None] + (start + lane), wanted[:, None] & (start + lane < size))
        code = code_of(v, scale[:, None], zero_point[:, None], bits)
        error = (v - (code - zero_point[:, None]) * scale[:, None]).to(tl.float64)
        lanes += error * error
    total = (scale * 0.0).to(tl.float64)
    for j in range(16):
        total += tl.sum(tl.where(lane == j, lanes, 0.0), axis=1)  # one lane and zeros
    return total


@triton.jit
def best(
    x: tl.tensor,
    size: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    wanted: tl.tensor,
    grid: tl.tensor,
    grid_size: tl.tensor,
    bits: tl.constexpr,
    symmetric: tl.constexpr,
    precision: tl.constexpr,
    scale_precision: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Of the scales of a grid, and their zero points, those with the least sum of squared errors; first of equals."""
    top: tl.constexpr = 1.0 * (1 << (bits - 1))
    most = tl.maximum(high, -low)
    scale, zero_point = scale_over(
        span(low, high, bits, symmetric), low, wanted, bits, symmetric, precision, scale_precision
    )
    wanted = wanted & (scale > 0.0)
    least = _squared_error(x, size, tl.where(wanted, scale, 1.0), zero_point, wanted, bits)
    for k in range(grid_size):
        part = tl.load(grid + k)
        end = low if symmetric else low * part
        value = tl.div_rn(most, part) if symmetric else span(end, high * part, bits, symmetric)
        tried, tried_zero = scale_over(value, end, wanted, bits, symmetric, precision, scale_precision)
        possible = wanted & (tried >= smallest(most, precision))
        if symmetric:  # a scale that leaves the largest code unused would not be found again
            possible = possible & (rint(tl.div_rn(most, tl.where(possible, tried, 1.0))) >= top - 1.0)
        error = _squared_error(x, size, tl.where(possible, tried, 1.0), tried_zero, possible, bits)
        less = possible & (error < least)
        least = tl.where(less, error, least)
        scale, zero_point = tl.where(less, tried, scale), tl.where(less, tried_zero, zero_point)
    return scale, zero_point
