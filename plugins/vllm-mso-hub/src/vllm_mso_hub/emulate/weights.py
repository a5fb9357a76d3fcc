"""Stored weights -> numbers, as `mso-hub decompress` computes them: in F32, rounded once to the model's dtype.

    NVFP4   e2m1(code) * (e4m3 scale / divisor)      compressed-tensors stores the divisor
            e2m1(code) * (e4m3 scale * multiplier)   ModelOpt stores its reciprocal
    MXFP4   e2m1(code) * 2**(scale - 127)
    MXFP8   e4m3(code) * 2**(scale - 127)
    FP8     e4m3(code) * scale of the cell           a cell is a tensor, a row or a block
    INT     (code - zero point) * scale of the group

Plain torch, on matrices; `tests/test_emulate_weights.py` compares every bit with the decoders of mso_hub.
"""

from __future__ import annotations

import torch
from torch import Tensor

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_PAIRS = torch.tensor([(_E2M1[byte & 15], _E2M1[byte >> 4]) for byte in range(256)])
_POWERS = torch.tensor([2.0 ** (byte - 127) for byte in range(255)] + [float("nan")])


def unpack_e2m1(packed: Tensor) -> Tensor:
    """F32 [N, K] of two codes a byte, U8 [N, K/2], the even column in the low four bits; code 8 is -0.0."""
    return _PAIRS[packed.view(torch.uint8).int()].flatten(-2)


def powers_of_two(scale: Tensor) -> Tensor:
    """F32 2**(scale - 127) of E8M0 bytes; 255 is NaN."""
    return _POWERS[scale.view(torch.uint8).int()]


def nvfp4(packed: Tensor, scale: Tensor, multiplier: Tensor, dtype: torch.dtype) -> Tensor:
    """ModelOpt's layout; code 8 is +0.0.

    packed U8 [N, K/2], scale F8_E4M3 [N, K/16], multiplier F32 []; returns [N, K]
    """
    return _grouped(unpack_e2m1(packed) + 0.0, scale.float() * multiplier.float(), dtype)


def nvfp4_divided(packed: Tensor, scale: Tensor, divisor: Tensor, dtype: torch.dtype) -> Tensor:
    """compressed-tensors' layout.

    packed U8 [N, K/2], scale F8_E4M3 [N, K/16], divisor F32 []; returns [N, K]
    """
    return _grouped(unpack_e2m1(packed), scale.float() / divisor.float(), dtype)


def mxfp4(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Packed U8 [N, K/2] and scale U8 [N, K/32] (E8M0) -> [N, K]."""
    return _grouped(unpack_e2m1(packed), powers_of_two(scale), dtype)


def mxfp8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes F8_E4M3 [N, K] and scale U8 [N, K/32] (E8M0) -> [N, K]."""
    return _grouped(codes.float(), powers_of_two(scale), dtype)


def cells(codes: Tensor, scale: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """FP8 or INT8 under one scale for each cell of `size` rows and columns.

    codes F8_E4M3 or I8 [N, K], scale [ceil(N / size[0]), ceil(K / size[1])]; returns [N, K]
    """
    rows, columns = codes.shape
    wide = scale.float().repeat_interleave(size[0], 0)[:rows].repeat_interleave(size[1], 1)[:, :columns]
    return (codes.float() * wide).to(dtype)


def unpack_integers(packed: Tensor, bits: int, dim: int) -> Tensor:
    """I32 codes 0 .. 2**bits - 1 of whole lanes in 32-bit words; `dim`, the packed dimension, grows 32 / bits times."""
    words = packed.movedim(dim, -1).unsqueeze(-1)
    lanes = (words >> torch.arange(0, 32, bits, dtype=torch.int32)) & ((1 << bits) - 1)
    return lanes.flatten(-2).movedim(-1, dim)


def integers(packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """compressed-tensors' pack-quantized layout.

    packed      I32 [N, K * bits / 32], codes with the offset 2**(bits - 1)
    scale       [N, groups]
    zero_point  I32 [N * bits / 32, groups], with the same offset; None means the offset itself
    returns     [N, K]
    """
    codes = unpack_integers(packed, bits, 1)
    size = codes.shape[1] // scale.shape[1]
    middle = 1 << (bits - 1)
    zero = middle if zero_point is None else unpack_integers(zero_point, bits, 0).repeat_interleave(size, 1)
    return _grouped((codes - zero).float(), scale.float(), dtype)


def _grouped(values: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """values F32 [N, K] times the step F32 [N, groups] of their group, rounded once; all groups of a row are alike."""
    grouped: Tensor = values.reshape(*step.shape, -1) * step.unsqueeze(-1)
    return grouped.flatten(-2).to(dtype)
