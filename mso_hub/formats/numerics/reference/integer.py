"""Packed integers in plain torch.

w = (q - zero_point) * scale, with the codes stored plus 2**(bits - 1) so that they are not negative, in a stream of
bits that is cut into int32 words.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unpack(packed: Tensor, bits: int, cols: int, *, dense: bool) -> Tensor:
    """Codes of a matrix packed along its columns, offset removed.

    packed   I32 [rows, words]; dense: one bit stream for the row, else floor(32 / bits) codes a word
    returns  I32 [rows, cols] in -2**(bits-1) .. 2**(bits-1) - 1
    """
    stream = (packed.unsqueeze(-1) >> torch.arange(32)) & 1  # [rows, words, 32], lowest bit first
    if not dense:
        stream = stream[..., : 32 // bits * bits]  # the bits above the last whole code are unused
    code_bits = stream.flatten(1)[:, : cols * bits].reshape(packed.shape[0], cols, bits)
    code = (code_bits << torch.arange(bits)).sum(-1)
    return code.int() - (1 << (bits - 1))


def decode(
    code: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """(code - zero_point) * scale in F32, rounded once to `dtype`.

    code        I32 [rows, cols]
    scale       F32 [rows, groups], multiplies
    zero_point  I32 or I8 [rows, groups], None means 0
    group       I64 [cols], group of each column: arange(cols) // group_size, or g_idx
    returns     [rows, cols]
    """
    distance = code if zero_point is None else code - zero_point.int()[:, group]
    return (distance.float() * scale[:, group]).to(dtype)
