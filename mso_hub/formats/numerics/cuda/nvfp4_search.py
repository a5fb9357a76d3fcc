"""How NVFP4 chooses the scale of a block on CUDA: see `numerics.nvfp4_search` for the rules and the reasons.

A program works on a tile of blocks: values [n, 16], one scale code for each row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mso_hub.formats.numerics.cuda.floats import e4m3_from_f32, e4m3_to_f32, load_f32

_ONE = tl.constexpr(0x38)  # E4M3 code of 1.0
_LARGEST = tl.constexpr(126)  # E4M3 code of 448


@triton.jit
def absmax_codes(largest: tl.tensor, global_scale: tl.tensor) -> tl.tensor:
    """int32 E4M3 codes [n] of largest / (6 * global_scale); a zero block gets 1.0."""
    s = tl.div_rn(largest, 6.0 * global_scale)
    return e4m3_from_f32(tl.minimum(tl.maximum(tl.where(s == 0.0, 1.0, s), 0.001953125), 448.0))  # 2**-9


@triton.jit
def e2m1_codes(values: tl.tensor, step: tl.tensor) -> tl.tensor:
    """int32 E2M1 codes of values / step: a tie goes to the even code, -0.0 is 0, just below zero is 8."""
    quotient = tl.div_rn(values, step)
    y = tl.abs(quotient)
    code = (y > 0.25).to(tl.int32) + (y >= 0.75).to(tl.int32) + (y > 1.25).to(tl.int32)
    code += (y >= 1.75).to(tl.int32) + (y > 2.5).to(tl.int32) + (y >= 3.5).to(tl.int32) + (y > 5.0).to(tl.int32)
    return code | ((quotient < 0.0).to(tl.int32) << 3)


@triton.jit
def _nearest(y: tl.tensor) -> tl.tensor:
    """E2M1 number next to y >= 0, ties to even; NaN stays NaN."""
    big = tl.where(y < 2.0, 4194304.0, tl.where(y < 4.0, 8388608.0, 16777216.0))  # 2**22, 2**23, 2**24
    rounded = (y + big) - big
    return tl.where(rounded > 6.0, 6.0, rounded)


@triton.jit
def _squared_errors(blocks: tl.tensor, live: tl.tensor, steps: tl.tensor) -> tl.tensor:
    """float64 [n, c]: sums of squared errors of n blocks under steps [n, c], added in column order.

    blocks  pointers [n] to the 16 numbers of each block
    """
    errors = steps.to(tl.float64) * 0.0
    for j in range(16):
        column = tl.abs(load_f32(blocks + j, live))[:, None]
        error = (column - _nearest(tl.div_rn(column, steps)) * steps).to(tl.float64)
        errors += error * error
    return errors


@triton.jit
def _leaves_four(largest: tl.tensor, step: tl.tensor) -> tl.tensor:
    """Whether the largest number of a block becomes neither 4 nor 6 under a step."""
    return tl.div_rn(largest, step) < 3.5


@triton.jit
def _lift_zeros(largest: tl.tensor, global_scale: tl.tensor, codes: tl.tensor) -> tl.tensor:
    """The absmax codes, but 1.0 for blocks that become 0."""
    nothing = (codes == 1) & (tl.div_rn(largest, 0.001953125 * global_scale) <= 0.25)  # 2**-9
    return tl.where(nothing, _ONE, codes)


@triton.jit
def best_of_nine(
    blocks: tl.tensor, live: tl.tensor, largest: tl.tensor, global_scale: tl.tensor, codes: tl.tensor
) -> tl.tensor:
    """The best of the neighbours -2 .. +6 of each absmax code; of equals the first, nearest first."""
    codes = _lift_zeros(largest, global_scale, codes)
    i = tl.arange(0, 8)[None, :]
    offset = tl.where(i < 4, (i // 2 + 1) * (2 * (i % 2) - 1), i - 1)  # -1 1 -2 2 3 4 5 6
    own = codes[:, None] + i * 0
    candidate = tl.where(own == _LARGEST, own, tl.minimum(tl.maximum(own + offset, 1), _LARGEST))
    candidate = tl.where(_leaves_four(largest[:, None], e4m3_to_f32(candidate) * global_scale), own, candidate)
    first = _squared_errors(blocks, live, (e4m3_to_f32(codes) * global_scale)[:, None])
    errors = _squared_errors(blocks, live, e4m3_to_f32(candidate) * global_scale)
    errors = tl.where(errors < first, errors, float("inf"))
    least = tl.min(errors, axis=1)
    chosen = tl.min(tl.where(errors == least[:, None], i, 8), axis=1)
    better = tl.sum(tl.where(i == chosen[:, None], candidate, 0), axis=1)
    return tl.where(least < float("inf"), better, codes)


@triton.jit
def best_of_two(
    blocks: tl.tensor, live: tl.tensor, largest: tl.tensor, global_scale: tl.tensor, codes: tl.tensor
) -> tl.tensor:
    """The absmax codes (amax becomes 6), or those for which amax becomes 4, where that has less error."""
    codes = _lift_zeros(largest, global_scale, codes)
    s = tl.div_rn(largest, 4.0 * global_scale)
    other = e4m3_from_f32(tl.minimum(tl.maximum(s, 0.001953125), 448.0))
    other = tl.where(_leaves_four(largest, e4m3_to_f32(other) * global_scale), codes, other)
    first = _squared_errors(blocks, live, (e4m3_to_f32(codes) * global_scale)[:, None])
    errors = _squared_errors(blocks, live, (e4m3_to_f32(other) * global_scale)[:, None])
    less = tl.max((errors < first).to(tl.int32), axis=1) == 1
    return tl.where(less, other, codes)


@triton.jit
def _floor_log2(value: tl.tensor) -> tl.tensor:
    """int32 exponents of positive float32 numbers, subnormal ones too."""
    small = value < 1.1754943508222875e-38  # 2**-126
    normal = tl.where(small, value * 16777216.0, value)
    return (normal.to(tl.int32, bitcast=True) >> 23) - tl.where(small, 151, 127)


@triton.jit
def _exponent_of_sixth(value: tl.tensor) -> tl.tensor:
    """ceil(log2(value / 6)) of positive numbers, exactly: their fraction of [1, 2) is compared with 6/4."""
    scaled = tl.where(value < 1.1754943508222875e-38, value * 16777216.0, value)
    over = (scaled.to(tl.int32, bitcast=True) & 0x7FFFFF) > 0x400000
    return _floor_log2(value) - 2 + over.to(tl.int32)


@triton.jit
def powers_or_best(
    blocks: tl.tensor,
    live: tl.tensor,
    values: tl.tensor,
    largest: tl.tensor,
    global_scale: tl.tensor,
    codes: tl.tensor,
) -> tl.tensor:
    """Codes of 2**ceil(log2(amax / 6)) / global_scale where they lose nothing, else the best of nine."""
    exponent = tl.maximum(_exponent_of_sixth(largest) - _floor_log2(global_scale), -9)
    power = tl.where(exponent < -6, 1 << tl.minimum(exponent + 9, 8), (exponent + 7) << 3)
    power = tl.where((largest > 0.0) & (exponent <= 8), power, _ONE)
    y = tl.div_rn(tl.abs(values), (e4m3_to_f32(power) * global_scale)[:, None])
    exact = (tl.min((_nearest(y) == y).to(tl.int32), axis=1) == 1) & ((largest == 0.0) | (exponent <= 8))
    if tl.min(exact.to(tl.int32)) == 0:
        codes = best_of_nine(blocks, live, largest, global_scale, codes)
    return tl.where(exact, power, codes)


@triton.jit
def settle(codes: tl.tensor, q: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Of two scales with the same image take the smaller: s * 2/3 with 1.5 times the E2M1 codes q [n, 16]."""
    twice = 2.0 * e4m3_to_f32(codes)
    smaller = e4m3_from_f32(tl.div_rn(twice, 3.0))
    possible = (e4m3_to_f32(smaller) * 3.0 == twice) & (tl.max(q & 1, axis=1) == 0)
    q += (possible[:, None] & ((q & 7) > 0)).to(tl.int32)
    return tl.where(possible, smaller, codes), q
