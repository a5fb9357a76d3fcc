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
numbers around the first guess, so trying nine is exact where a search over real numbers is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1_MAX = 6.0
E4M3_MAX = 448.0
GROUP_SIZE = 16

_THRESHOLDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NEIGHBOURS = (-1, 1, -2, 2, 3, 4, 5, 6)  # the order in which ties are resolved


def global_scale(amax: Tensor) -> Tensor:
    """Global scale (`weight_scale_2`) that lets block scales use the whole E4M3 range.

    amax     F32 [], largest |w| over every tensor that shares the scale
    returns  F32 [], amax / (6 * 448), a multiplier; 1.0 when that is 0
    """
    scale = amax.float() / (E2M1_MAX * E4M3_MAX)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def encode(weight: Tensor, global_scale: Tensor, *, search: str = "absmax") -> tuple[Tensor, Tensor]:
    """Codes and block scales of a matrix.

    weight        BF16, F16 or F32 [rows, cols], finite, cols % 16 == 0
    global_scale  F32 [], a multiplier
    search        "absmax" or "mse"; on equal error mse prefers the absmax scale, then the
                  nearest code, then the lower one
    returns       packed U8 [rows, cols/2] (even column in the low nibble), F8_E4M3 [rows, cols/16]
    """
    if search not in ("absmax", "mse"):
        raise ValueError(f"search must be absmax or mse, got {search!r}")
    rows, cols = weight.shape
    blocks = weight.float().reshape(rows, cols // GROUP_SIZE, GROUP_SIZE)
    scale = _absmax_scale(blocks, global_scale)
    if search == "mse":
        scale = _best_scale(blocks, scale, global_scale)
    code = _e2m1_code(blocks, scale, global_scale).flatten(-2)
    return (code[:, 1::2] << 4) | code[:, 0::2], scale


def decode(packed: Tensor, scale: Tensor, multiplier: Tensor, dtype: torch.dtype) -> Tensor:
    """ModelOpt's layout: e2m1 * (weight_scale * multiplier) in F32, then `dtype`; code 8 is +0.0.

    packed U8 [rows, cols/2], scale F8_E4M3 [rows, cols/16], multiplier F32 []; returns [rows, cols]
    """
    step = scale.float() * multiplier
    return _times_step(_values(packed) + 0.0, step, dtype)  # -0.0 + 0.0 is 0.0


def decode_divided(packed: Tensor, scale: Tensor, divisor: Tensor, dtype: torch.dtype) -> Tensor:
    """compressed-tensors' layout: e2m1 * (weight_scale / divisor) in F32, then `dtype`; code 8 is -0.0.

    packed U8 [rows, cols/2], scale F8_E4M3 [rows, cols/16], divisor F32 []; returns [rows, cols]
    """
    step = scale.float() / divisor
    return _times_step(_values(packed), step, dtype)


def _absmax_scale(blocks: Tensor, global_scale: Tensor) -> Tensor:
    """F8_E4M3 [rows, n] = amax / (6 * global) of blocks F32 [rows, n, 16]; 1.0 for a zero block."""
    scale = blocks.abs().amax(-1) / (E2M1_MAX * global_scale)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale.clamp(2.0**-9, E4M3_MAX).to(torch.float8_e4m3fn)


def _e2m1_code(blocks: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    """U8 codes of blocks F32 [rows, n, 16]: how many thresholds |w| / step has passed, plus the sign.

    A tie goes to the even code: thresholds 0, 2, 4, 6 must be exceeded, 1, 3, 5 only reached.
    The sign is quotient < 0: -0.0 is code 0, and a number just below zero is code 8 (-0).
    """
    quotient = blocks / (scale.float() * global_scale).unsqueeze(-1)
    y = quotient.abs()
    code = torch.zeros_like(y, dtype=torch.uint8)
    for i, threshold in enumerate(_THRESHOLDS):
        code += (y > threshold) if i % 2 == 0 else (y >= threshold)
    return code | ((quotient < 0).to(torch.uint8) << 3)


def _best_scale(blocks: Tensor, first: Tensor, global_scale: Tensor) -> Tensor:
    """Of the E4M3 codes -2 .. +6 around `first`, the one with the least squared error per block."""
    center = first.view(torch.uint8).int()
    best = first
    least = _squared_error(blocks, best, global_scale)
    for offset in _NEIGHBOURS:
        # Code 0 is the scale 0 and 127 is NaN: neither may be chosen.
        code = (center + offset).clamp(1, 126).to(torch.uint8)
        error = _squared_error(blocks, code.view(torch.float8_e4m3fn), global_scale)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, code, best.view(torch.uint8)).view(torch.float8_e4m3fn)
    return best


def _squared_error(blocks: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    """F64 [rows, n]: sum over a block of (w - dequantized)**2, added in column order.

    The difference is rounded to F32, so its square is exact in F64: whether a machine fuses the
    multiplication with the addition cannot change the sum, only its order could.
    """
    magnitude = torch.tensor(_MAGNITUDES)
    code = _e2m1_code(blocks, scale, global_scale) & 7
    step = (scale.float() * global_scale).unsqueeze(-1)
    error = (blocks.abs() - magnitude[code.long()] * step).double()
    total = torch.zeros_like(error[..., 0])
    for column in range(GROUP_SIZE):
        total += error[..., column] * error[..., column]
    return total


def _values(packed: Tensor) -> Tensor:
    """F32 [rows, cols] E2M1 values of packed codes U8 [rows, cols/2]; code 8 is -0.0."""
    code = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()
    magnitude = torch.tensor(_MAGNITUDES)[code & 7]
    return torch.where(code >= 8, -magnitude, magnitude)


def _times_step(values: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """Each of values [rows, cols] times the step [rows, cols/16] of its block, rounded once to `dtype`."""
    return (values * step.repeat_interleave(GROUP_SIZE, dim=-1)).to(dtype)
