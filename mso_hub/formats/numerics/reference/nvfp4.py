"""NVFP4 in five lines, in plain torch.

A weight is stored as a 4-bit float (E2M1: 0 .5 1 1.5 2 3 4 6 and a sign), and
16 neighbours in a row share an 8-bit float scale (E4M3), and all of them share one float32:

    global = amax(tensor) / (6 * 448)        6 is E2M1's largest value, 448 is E4M3's: the block
                                             with the largest weight gets the scale 448
    scale  = e4m3(amax(block) / (6 * global))
    code   = e2m1(w / (scale * global))      w ~= value(code) * scale * global

The order matters: the code divides by the scale that was *rounded* to E4M3, so its rounding error is
compensated. Every rounding is to nearest, ties to the even mantissa. Everything is float32; a BF16
input is widened first, which is exact. Divisions are true divisions: w * (1 / step) differs from
w / step in the last bit often enough to move a code across a threshold.

Why the clamp of scale to [2**-9, 448]: 2**-9 is the smallest E4M3 number, and a block far below the
rest of its tensor would otherwise get the scale 0 and its codes w / 0.

Why a search ("mse"): amax / 6 is the smallest scale that clips nothing, not the one with the least
error. A larger scale may put the other 15 numbers of the block closer to E2M1's coarse upper
values (4, 6), a smaller one clips the largest for the benefit of the rest. There are few E4M3
numbers around the first guess, so trying nine is exact where a search over real numbers is not. "four_over_six" tries
two: the scale that makes the largest number 6 and the one that makes it 4, between which and 6 the codes are sparse.
"power" is for weights that were MXFP4: powers of two for every scale lose nothing of them.

Decoding what a search has written and encoding it again must find the same scales. So a search never takes a scale
under which the largest number becomes 3 or less, and of the two scales that can have the same image, s and 1.5 * s, it
writes the smaller; `numerics/nvfp4_search.py` proves that this is enough.
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1_MAX = 6.0
E4M3_MAX = 448.0
FOUR_OVER_SIX_MAX = 256.0
GROUP_SIZE = 16

_THRESHOLDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NEIGHBOURS = (-1, 1, -2, 2, 3, 4, 5, 6)  # the order in which ties are resolved


def global_scale(amax: Tensor, *, search: str = "absmax") -> Tensor:
    """Global scale (`weight_scale_2`) that lets block scales use the whole E4M3 range.

    amax     F32 [], largest |w| over every tensor that shares the scale
    search   "four_over_six" leaves room for block scales 1.5 times as large; "power" takes a power of two
    returns  F32 [], amax / (6 * 448), a multiplier; 1.0 when that is 0
    """
    if search == "power":
        power = torch.ldexp(torch.tensor(1.0), (_exponent_of_sixth(amax.float()) - 8).clamp(min=-140))
        return torch.where(amax == 0, 1.0, power)
    scale = amax.float() / (E2M1_MAX * (FOUR_OVER_SIX_MAX if search == "four_over_six" else E4M3_MAX))
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def encode(weight: Tensor, global_scale: Tensor, *, search: str = "absmax") -> tuple[Tensor, Tensor]:
    """Codes and block scales of a matrix.

    weight        BF16, F16 or F32 [rows, cols], finite, cols % 16 == 0
    global_scale  F32 [], a multiplier
    search        "absmax", "mse", "four_over_six" or "power"; on equal error mse prefers the absmax scale,
                  then the nearest code, then the lower one, and four_over_six prefers 6
    returns       packed U8 [rows, cols/2] (even column in the low nibble), F8_E4M3 [rows, cols/16]
    """
    if search not in ("absmax", "mse", "four_over_six", "power"):
        raise ValueError(f"search must be absmax, mse, four_over_six or power, got {search!r}")
    rows, cols = weight.shape
    blocks = weight.float().reshape(rows, cols // GROUP_SIZE, GROUP_SIZE)
    scale = _absmax_scale(blocks, E2M1_MAX, global_scale)
    if search == "absmax":
        code = _e2m1_code(blocks, scale, global_scale)
    else:
        choose = {"mse": _best_of_nine, "four_over_six": _best_of_two, "power": _power_or_best}[search]
        scale = choose(blocks, _lift_zeros(blocks, scale, global_scale), global_scale)
        scale, code = _settle(scale, _e2m1_code(blocks, scale, global_scale))
    code = code.flatten(-2)
    return (code[:, 1::2] << 4) | code[:, 0::2], scale


def decode(packed: Tensor, scale: Tensor, multiplier: Tensor, dtype: torch.dtype) -> Tensor:
    """ModelOpt's layout: e2m1 * (weight_scale * multiplier) in F32, then `dtype`; code 8 is +0.0.

    packed U8 [rows, cols/2], scale F8_E4M3 [rows, cols/16], multiplier F32 []; returns [rows, cols]
    """
    step = scale.float() * multiplier
    return _times_step(unpack(packed) + 0.0, step, dtype)  # -0.0 + 0.0 is 0.0


def decode_divided(packed: Tensor, scale: Tensor, divisor: Tensor, dtype: torch.dtype) -> Tensor:
    """compressed-tensors' layout: e2m1 * (weight_scale / divisor) in F32, then `dtype`; code 8 is -0.0.

    packed U8 [rows, cols/2], scale F8_E4M3 [rows, cols/16], divisor F32 []; returns [rows, cols]
    """
    step = scale.float() / divisor
    return _times_step(unpack(packed), step, dtype)


def _absmax_scale(blocks: Tensor, largest: float, global_scale: Tensor) -> Tensor:
    """F8_E4M3 [rows, n]: amax / (largest * global) of blocks F32 [rows, n, 16]; 1.0 for a zero block."""
    scale = blocks.abs().amax(-1) / (largest * global_scale)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale.clamp(2.0**-9, E4M3_MAX).to(torch.float8_e4m3fn)


def magnitude_code(y: Tensor) -> Tensor:
    """U8 codes of magnitudes F32: how many thresholds each has passed.

    A tie goes to the even code: thresholds 0, 2, 4, 6 must be exceeded, 1, 3, 5 only reached.
    """
    code = torch.zeros_like(y, dtype=torch.uint8)
    for i, threshold in enumerate(_THRESHOLDS):
        code += (y > threshold) if i % 2 == 0 else (y >= threshold)
    return code


def _e2m1_code(blocks: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    """U8 codes of blocks F32 [rows, n, 16] under a scale [rows, n].

    The sign is quotient < 0: -0.0 is code 0, and a number just below zero is code 8 (-0).
    """
    quotient = blocks / (scale.float() * global_scale).unsqueeze(-1)
    return magnitude_code(quotient.abs()) | ((quotient < 0).to(torch.uint8) << 3)


def _lift_zeros(blocks: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    """1.0 for a block whose numbers all become 0 under the smallest scale, as for a block of zeros."""
    lost = (blocks.abs().amax(-1) / (2.0**-9 * global_scale) <= 0.25) & (scale.view(torch.uint8) == 1)
    return _where(lost, torch.ones_like(scale.float()).to(scale.dtype), scale)


def _reaches_four(blocks: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    """Whether the largest number of each block becomes 4 or 6."""
    return blocks.abs().amax(-1) / (scale.float() * global_scale) >= 3.5


def _best_of_nine(blocks: Tensor, first: Tensor, global_scale: Tensor) -> Tensor:
    """Of the E4M3 codes -2 .. +6 around `first`, the one with the least squared error per block; 448 stays."""
    center = first.view(torch.uint8).int()
    best = first
    least = squared_error(blocks, best.float() * global_scale)
    for offset in _NEIGHBOURS:
        # Code 0 is the scale 0 and 127 is NaN: neither may be chosen.
        code = (center + offset).clamp(1, 126).to(torch.uint8).view(torch.float8_e4m3fn)
        error = squared_error(blocks, code.float() * global_scale)
        better = (error < least) & (center < 126) & _reaches_four(blocks, code, global_scale)
        least = torch.where(better, error, least)
        best = _where(better, code, best)
    return best


def _best_of_two(blocks: Tensor, six: Tensor, global_scale: Tensor) -> Tensor:
    """The scale under which amax becomes 4 where that has less error than `six`."""
    four = _absmax_scale(blocks, 4.0, global_scale)
    error = squared_error(blocks, four.float() * global_scale)
    better = (error < squared_error(blocks, six.float() * global_scale)) & _reaches_four(blocks, four, global_scale)
    return _where(better, four, six)


def _power_or_best(blocks: Tensor, first: Tensor, global_scale: Tensor) -> Tensor:
    """2**ceil(log2(amax / 6)) / global where that is an E4M3 number and loses nothing, otherwise the best of nine."""
    amax = blocks.abs().amax(-1)
    exponent = (_exponent_of_sixth(amax) - torch.frexp(global_scale)[1] + 1).clamp(min=-9)
    scale = torch.ldexp(torch.ones_like(amax), torch.where(amax == 0, 0, exponent))
    step = (scale * global_scale).unsqueeze(-1)
    quotient = blocks.abs() / step
    exact = (torch.tensor(_MAGNITUDES)[magnitude_code(quotient).long()] == quotient).all(-1) & (exponent <= 8)
    power = scale.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    return _where(exact | (amax == 0), power, _best_of_nine(blocks, first, global_scale))


def _exponent_of_sixth(value: Tensor) -> Tensor:
    """ceil(log2(value / 6)), exactly."""
    fraction, exponent = torch.frexp(value)  # 0.5 <= fraction < 1, and 6 is 0.75 * 2**3
    return torch.where(fraction <= 0.75, exponent - 3, exponent - 2)


def _settle(scale: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """2/3 of a scale where that is an E4M3 number and all magnitudes are 0, 1, 2 or 4, which become 0, 1.5, 3 and 6."""
    other = (scale.float() * 2 / 3).to(torch.float8_e4m3fn)
    same = (other.float() * 3 == scale.float() * 2) & ((code & 1) == 0).all(-1)
    code = torch.where(same.unsqueeze(-1) & ((code & 7) > 0), code + 1, code)
    return _where(same, other, scale), code


def _where(condition: Tensor, this: Tensor, that: Tensor) -> Tensor:
    """torch.where for F8_E4M3."""
    return torch.where(condition, this.view(torch.uint8), that.view(torch.uint8)).view(torch.float8_e4m3fn)


def squared_error(blocks: Tensor, step: Tensor) -> Tensor:
    """F64 [rows, n]: sum over a block F32 [rows, n, size] of (w - dequantized)**2, added in column order.

    The difference is rounded to F32, so its square is exact in F64: whether a machine fuses the
    multiplication with the addition cannot change the sum, only its order could.
    """
    magnitude = torch.tensor(_MAGNITUDES)
    step = step.unsqueeze(-1)
    code = magnitude_code((blocks / step).abs())
    error = (blocks.abs() - magnitude[code.long()] * step).double()
    total = torch.zeros_like(error[..., 0])
    for column in range(blocks.shape[-1]):
        total += error[..., column] * error[..., column]
    return total


def unpack(packed: Tensor) -> Tensor:
    """F32 [rows, cols] E2M1 values of packed codes U8 [rows, cols/2]; code 8 is -0.0."""
    code = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()
    magnitude = torch.tensor(_MAGNITUDES)[code & 7]
    return torch.where(code >= 8, -magnitude, magnitude)


def _times_step(values: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """Each of values [rows, cols] times the step [rows, cols/16] of its block, rounded once to `dtype`."""
    return (values * step.repeat_interleave(GROUP_SIZE, dim=-1)).to(dtype)
