"""MXFP4 and MXFP8 in five lines, in plain torch.

32 neighbours in a row share a scale that is a power of two, stored as its exponent in one byte (E8M0, bias 127).
Each is a 4-bit float (E2M1) or an 8-bit one (E4M3):

    exponent = the smallest under which the largest weight of the block still rounds to a code
    code     = e2m1(w / 2**exponent)  or  e4m3(w / 2**exponent)
    w       ~= value(code) * 2**exponent

"Still rounds to a code": E2M1 ends at 6 and would go on with 8, so numbers below 7 do (7 is a tie and would go to 8,
whose mantissa is even). E4M3 ends at 448 and would go on with 480, so numbers up to 464 do (a tie, and 448 is even). A
block that was decoded therefore finds its exponent again: its largest number is one of the upper codes under it.

Division by a power of two is exact, so there is one rounding from weight to code and none back. The price is that the
exponent can be off by half a binade, which is why the error is larger than that of NVFP4 with its E4M3 scales.

Why a search ("mse", for E2M1 only): with one exponent less the largest weights are cut off, the others get codes
twice as fine. E4M3 gets finer only among its subnormal codes, which never pays.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mso_hub.formats.numerics.reference.nvfp4 import magnitude_code, squared_error, unpack

GROUP_SIZE = 32

_POWERS = torch.tensor([2.0 ** (byte - 127) for byte in range(255)] + [float("nan")])


def encode_mxfp4(weight: Tensor, *, search: str = "absmax") -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix.

    weight   BF16, F16 or F32 [rows, cols], finite, cols % 32 == 0
    search   "absmax" or "mse": one exponent less where the squared error is smaller
    returns  packed U8 [rows, cols/2] (even column in the low nibble), U8 [rows, cols/32] (E8M0)
    """
    if search not in ("absmax", "mse"):
        raise ValueError(f"search must be absmax or mse, got {search!r}")
    blocks = weight.float().reshape(len(weight), -1, GROUP_SIZE)
    scale = _scale(blocks, lambda fraction: fraction >= 1.75, 2)
    if search == "mse":
        lower = (scale.int() - 1).clamp(min=0).to(torch.uint8)
        better = squared_error(blocks, _power(lower)) < squared_error(blocks, _power(scale))
        scale = torch.where(better, lower, scale)
    code = magnitude_code((blocks / _power(scale).unsqueeze(-1)).abs())
    code = (code | (torch.signbit(blocks).to(torch.uint8) << 3)).flatten(-2)
    return (code[:, 1::2] << 4) | code[:, 0::2], scale


def encode_mxfp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix.

    weight   BF16, F16 or F32 [rows, cols], finite, cols % 32 == 0
    returns  F8_E4M3 [rows, cols], U8 [rows, cols/32] (E8M0)
    """
    blocks = weight.float().reshape(len(weight), -1, GROUP_SIZE)
    scale = _scale(blocks, lambda fraction: fraction > 1.8125, 8)
    quotient = blocks / _power(scale).unsqueeze(-1)
    return quotient.clamp(-448, 448).to(torch.float8_e4m3fn).flatten(-2), scale


def decode_mxfp4(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers [rows, cols] of packed U8 [rows, cols/2] and scale U8 [rows, cols/32]; code 8 is -0.0."""
    return (unpack(packed) * _power(scale).repeat_interleave(GROUP_SIZE, dim=-1)).to(dtype)


def decode_mxfp8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers [rows, cols] of codes F8_E4M3 [rows, cols] and scale U8 [rows, cols/32]."""
    return (codes.float() * _power(scale).repeat_interleave(GROUP_SIZE, dim=-1)).to(dtype)


def decode_gpt_oss(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Experts [experts, K, N] of blocks U8 [experts, N, K/32, 16] and scales U8 [experts, N, K/32]."""
    experts = [decode_mxfp4(b.flatten(-2), s, dtype).T for b, s in zip(blocks, scales, strict=True)]
    return torch.stack(experts)


def _power(scale: Tensor) -> Tensor:
    """F32 2**(scale - 127) of E8M0 bytes; 255 is NaN."""
    return _POWERS[scale.long()]


def _scale(blocks: Tensor, goes_up: Callable[[Tensor], Tensor], offset: int) -> Tensor:
    """E8M0 byte of each block: the exponent of its amax, plus one where `goes_up(fraction)`, less the offset.

    blocks  F32 [rows, n, 32]; amax = fraction * 2**exponent with 1 <= fraction < 2
    offset  exponent of the largest code
    """
    amax = blocks.abs().amax(-1)
    half, above = torch.frexp(amax)  # 0.5 <= half < 1
    exponent = above - 1
    up = goes_up(2 * half) & (exponent < 127)
    byte = (exponent + up.int() - offset + 127).clamp(min=0)
    return torch.where(amax == 0, 0, byte).to(torch.uint8)
