"""How NVFP4 chooses the E4M3 scale of a block, and the codes under it.

    absmax         e4m3(amax / (6 * global)): the largest number becomes +-6; ModelOpt's bytes
    mse            the best of the codes -2 .. +6 around that one
    four_over_six  the better of e4m3(amax / (6 * global)) and e4m3(amax / (4 * global))
    power          a power of two where that loses nothing, otherwise as mse

All but absmax keep two rules, so that decoding to any dtype in which the numbers stay normal and encoding again gives
the same codes and scales (a negative zero counts as zero, which is what `decode` makes of it):

1. Only scales under which the largest number becomes 4 or 6 are tried (or 2**-9, where it is too small for that). The
   image of a block then lies within the codes that are tried for it. A scale that makes it 3 or less has no point that
   half of that scale lacks; only the odd multiples of 2**-9 below 2**-5 have no half.
2. Two such scales have the same image only as 4 * s = 6 * (s * 2/3), and only if all magnitudes are 0, 1, 2 or 4 under
   the larger. Then the smaller is written: `_settle`. Any two different images are 1/45 apart in some number, which
   neither the rounding of BF16 (1/512) nor a global scale from a rounded amax (1/512) can bridge.

A block whose numbers all become 0 gets the scale 1.0, as a block of zeros does. With mse a block that has the scale 448
keeps it: it carries the largest number of the tensor, from which the global scale is found again.

Why absmax cannot promise as much: amax / (6 * global) = 1.6 * 2**-9 rounds to 2 * 2**-9, under which amax becomes 4,
and the scale of 4 * 2 * 2**-9 is 2**-9. Only the smallest E4M3 numbers are that far apart.
"""

from __future__ import annotations

import math

import numpy as np

from mso_hub.formats.numerics.e2m1 import (
    E2M1_MAX,
    TILE,
    column_lanes,
    magnitude_code,
    nearest,
    pack,
    squared_errors,
    to_lanes,
    weighted_errors,
)
from mso_hub.formats.numerics.floats import E4M3, Array, e4m3_from_f32, load_f32
from mso_hub.formats.numerics.kernel import kernel

E4M3_MAX = 448.0

MSE, FOUR_OVER_SIX, POWER = range(3)

_OFFSETS = np.array([-1, 1, -2, 2, 3, 4, 5, 6], np.int64)
_ONE = 0x38  # E4M3 code of 1.0
_LARGEST = 126  # E4M3 code of 448


def _two_thirds() -> Array:
    """E4M3 code -> code of 2/3 of that number, 0 where there is none."""
    found = {float(value): code for code, value in enumerate(E4M3[:127])}
    codes = [found.get(2.0 * float(value) / 3.0, 0) for value in E4M3[:127]]
    return np.array([*codes, 0], np.uint8)


_TWO_THIRDS = _two_thirds()


@kernel
def exponent_of_sixth(value: float | np.float32) -> int:
    """ceil(log2(value / 6)) of a positive number, exactly: its fraction of [0.5, 1) is compared with 6/8."""
    fraction, exponent = math.frexp(value)
    return exponent - 3 if fraction <= 0.75 else exponent - 2


@kernel
def _absmax_codes(x: Array, global_scale: np.float32, codes: Array, scratch: Array) -> None:
    """E4M3 code of amax / (6 * global_scale) for each block of x [16 * n] (uint32 bits); amax stays in scratch."""
    largest = scratch.view(np.uint32)
    for b in range(codes.size):
        m = np.uint32(0)
        for j in range(16):
            m = max(m, x[16 * b + j] & np.uint32(0x7FFFFFFF))
        largest[b] = m
    six = np.float32(E2M1_MAX) * global_scale
    for b in range(codes.size):
        s = scratch[b] / six
        if s == np.float32(0.0):
            s = np.float32(1.0)
        codes[b] = e4m3_from_f32(min(max(s, np.float32(2.0**-9)), np.float32(E4M3_MAX)))


@kernel
def _codes(x: Array, codes: Array, global_scale: np.float32, q: Array) -> None:
    """E2M1 codes q [16 * n] of x [16 * n] float32 under the block scales `codes` [n]."""
    for b in range(codes.size):
        step = E4M3[codes[b]] * global_scale
        for j in range(16):
            signed = x[16 * b + j] / step
            # Not the sign bit: a quotient of -0.0 becomes code 0, one just below zero becomes code 8.
            q[16 * b + j] = magnitude_code(abs(signed)) | (np.uint8(signed < 0.0) << 3)


@kernel
def _steps(codes: Array, global_scale: np.float32, steps: Array) -> None:
    """Step of each block: E4M3 scale times global scale."""
    for b in range(codes.size):
        steps[b] = E4M3[codes[b]] * global_scale


@kernel
def _lift_zeros(largest: Array, global_scale: np.float32, codes: Array) -> None:
    """Give the scale 1.0 to blocks whose numbers all become 0 under the smallest scale."""
    step = E4M3[1] * global_scale
    for b in range(codes.size):
        if codes[b] == 1 and largest[b] / step <= np.float32(0.25):
            codes[b] = _ONE


@kernel
def _errors(lanes: Array, weights: Array, steps: Array, errors: Array) -> None:
    """Squared errors of each block, weighted where there are weights."""
    if weights.size:
        weighted_errors(lanes, weights, steps, errors)
    else:
        squared_errors(lanes, steps, errors)


@kernel
def _best_of_nine(lanes: Array, weights: Array, largest: Array, global_scale: np.float32, codes: Array) -> None:
    """Replace each absmax code in codes [n] by the best of its neighbours."""
    _lift_zeros(largest, global_scale, codes)
    first = codes.copy()
    candidate = np.empty_like(codes)
    own = np.empty(codes.size, np.float32)
    steps = np.empty(codes.size, np.float32)
    best = np.empty(codes.size, np.float64)
    errors = np.empty(codes.size, np.float64)
    _steps(codes, global_scale, own)
    _errors(lanes, weights, own, best)
    for offset in _OFFSETS:
        for b in range(codes.size):
            code = min(max(np.int64(first[b]) + offset, 1), _LARGEST)
            candidate[b] = first[b] if first[b] == _LARGEST else code
        _steps(candidate, global_scale, steps)
        for b in range(codes.size):
            # Twice tried is not better: so the absmax code stands in for a code that is not allowed.
            if largest[b] / steps[b] < np.float32(3.5):
                candidate[b] = first[b]
                steps[b] = own[b]
        _errors(lanes, weights, steps, errors)
        for b in range(codes.size):
            if errors[b] < best[b]:
                best[b] = errors[b]
                codes[b] = candidate[b]


@kernel
def _best_of_two(lanes: Array, largest: Array, global_scale: np.float32, codes: Array) -> None:
    """Replace the absmax codes (amax becomes 6) by those for which amax becomes 4, where that has less error."""
    _lift_zeros(largest, global_scale, codes)
    four = np.float32(4.0) * global_scale
    other = np.empty_like(codes)
    steps = np.empty(codes.size, np.float32)
    best = np.empty(codes.size, np.float64)
    errors = np.empty(codes.size, np.float64)
    for b in range(codes.size):
        s = min(max(largest[b] / four, np.float32(2.0**-9)), np.float32(E4M3_MAX))
        other[b] = e4m3_from_f32(s)
        if largest[b] / (E4M3[other[b]] * global_scale) < np.float32(3.5):
            other[b] = codes[b]
    _steps(codes, global_scale, steps)
    squared_errors(lanes, steps, best)
    _steps(other, global_scale, steps)
    squared_errors(lanes, steps, errors)
    for b in range(codes.size):
        if errors[b] < best[b]:
            codes[b] = other[b]


@kernel
def _powers(lanes: Array, largest: Array, global_scale: np.float32, codes: Array, exact: Array) -> None:
    """E4M3 codes [n] of 2**ceil(log2(amax / 6)) / global_scale, and whether (1, 0) they lose nothing of a block.

    A quotient below 2**-9 becomes 2**-9: then amax / 6 is less than the scale, and it may still be exact.
    """
    unit = exponent_of_sixth(6.0 * global_scale)
    for b in range(codes.size):
        codes[b] = _ONE
        exact[b] = 1
        if largest[b] > np.float32(0.0):
            exponent = max(exponent_of_sixth(largest[b]) - unit, -9)
            if exponent > 8:
                exact[b] = 0
            elif exponent < -6:
                codes[b] = 1 << (exponent + 9)
            else:
                codes[b] = (exponent + 7) << 3
    steps = np.empty(codes.size, np.float32)
    _steps(codes, global_scale, steps)
    for j in range(16):
        column = lanes[j * codes.size : (j + 1) * codes.size]
        for b in range(codes.size):
            y = column[b] / steps[b]
            exact[b] &= np.uint8(nearest(y) == y)


@kernel
def _powers_or_best(lanes: Array, largest: Array, global_scale: np.float32, codes: Array) -> None:
    """Replace each absmax code by a power of two that loses nothing of its block, or by the best of nine."""
    power = np.empty_like(codes)
    exact = np.empty(codes.size, np.uint8)
    _powers(lanes, largest, global_scale, power, exact)
    if not exact.all():
        _best_of_nine(lanes, np.empty(0, np.float64), largest, global_scale, codes)
    for b in range(codes.size):
        if exact[b]:
            codes[b] = power[b]


@kernel
def _settle(codes: Array, q: Array) -> None:
    """Of two scales with the same image take the smaller: s * 2/3 with 1.5 times the codes (see the top, rule 2)."""
    eights = q.view(np.uint64)
    for b in range(codes.size):
        odd = (eights[2 * b] | eights[2 * b + 1]) & np.uint64(0x0101010101010101)
        smaller = _TWO_THIRDS[codes[b]]
        if odd == 0 and smaller != 0:  # magnitude codes 0, 2, 4, 6: the values 0, 1, 2, 4 become 0, 1.5, 3, 6
            codes[b] = smaller
            for j in range(16):
                q[16 * b + j] += np.uint8((q[16 * b + j] & np.uint8(7)) > 0)


@kernel
def encode_absmax(bits: Array, global_scale: np.float32, packed: Array, scale: Array) -> None:
    """Fill packed [n/2] and scale [n/16] from bits [n], block scales from the block maxima."""
    x = np.empty(TILE, np.uint32)
    q = np.empty(TILE, np.uint8)
    scratch = np.empty(TILE // 16, np.float32)
    for start in range(0, bits.size, TILE):
        stop = min(start + TILE, bits.size)
        n = stop - start
        codes = scale[start // 16 : stop // 16]
        load_f32(bits[start:stop], x[:n])
        _absmax_codes(x[:n], global_scale, codes, scratch)
        _codes(x[:n].view(np.float32), codes, global_scale, q[:n])
        pack(q[:n], packed[start // 2 : stop // 2])


@kernel
def encode_searched(
    bits: Array, global_scale: np.float32, search: int, importance: Array, packed: Array, scale: Array
) -> None:
    """The same with MSE, FOUR_OVER_SIX or POWER.

    importance  float64, a weight for the squared errors of each column of the matrix; empty for equal ones, else MSE
    """
    x = np.empty(TILE, np.uint32)
    q = np.empty(TILE, np.uint8)
    scratch = np.empty(TILE // 16, np.float32)
    space = np.empty(TILE, np.float32)
    wide = np.empty(TILE if importance.size else 0, np.float64)
    for start in range(0, bits.size, TILE):
        stop = min(start + TILE, bits.size)
        n = stop - start
        codes = scale[start // 16 : stop // 16]
        largest, lanes = scratch[: codes.size], space[:n]
        load_f32(bits[start:stop], x[:n])
        _absmax_codes(x[:n], global_scale, codes, scratch)
        values = x[:n].view(np.float32)
        to_lanes(values, lanes, 16)
        if search == MSE:
            weights = wide[:n]
            if importance.size:
                column_lanes(importance, start, weights, 16)
            _best_of_nine(lanes, weights, largest, global_scale, codes)
        elif search == FOUR_OVER_SIX:
            _best_of_two(lanes, largest, global_scale, codes)
        else:
            _powers_or_best(lanes, largest, global_scale, codes)
        _codes(values, codes, global_scale, q[:n])
        _settle(codes, q[:n])
        pack(q[:n], packed[start // 2 : stop // 2])
