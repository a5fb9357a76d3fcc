"""Packed 2- to 8-bit integers on CUDA: see `numerics.integer` for the layouts, whose bytes these kernels reproduce.

One program of a kernel works on a piece of one row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mso_hub.formats.numerics.cuda.floats import launch, loadable, require_device, store_f32
from mso_hub.formats.numerics.integer import words_per_row

_TILE = 1024  # columns
_UNPACKED = {"bits": 0, "per_word": 0}


def unpack(packed: Tensor, bits: int, cols: int, *, dense: bool) -> Tensor:
    """Codes of a matrix packed along its columns.

    packed   int32 [rows, words], words = words_per_row(cols, bits, dense=dense)
    returns  int8 [rows, cols] in -2**(bits-1) .. 2**(bits-1) - 1
    """
    words = _check_packed(packed, bits, cols, dense)
    codes = torch.empty((packed.shape[0], cols), dtype=torch.int8, device=packed.device)
    if codes.numel():
        per_word = 0 if dense else 32 // bits
        grid = (packed.shape[0], triton.cdiv(cols, _TILE))
        launch(_unpack, grid, packed.contiguous(), codes, cols, words, bits=bits, per_word=per_word, tile=_TILE)
    return codes


def unpack_zero_point(packed: Tensor, bits: int, rows: int, *, dense: bool) -> Tensor:
    """Zero points of a matrix, which are packed along its rows.

    packed   int32 [words, groups], words = words_per_row(rows, bits, dense=dense)
    returns  int8 [rows, groups], offset removed like that of the codes
    """
    return unpack(packed.T.contiguous(), bits, rows, dense=dense).T.contiguous()


def decode(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    g_idx: Tensor | None,
    *,
    bits: int,
    group_size: int | None,
    cols: int,
    dense: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Dequantize: (q - zero_point) * scale in float32, rounded once to `dtype`.

    packed      int32 [rows, words], see `unpack`
    scale       F32 [rows, groups], widened exactly from what is stored; multiplies
    zero_point  int8 [rows, groups] from `unpack_zero_point`; None means 0
    g_idx       int32 [cols], group of each column; None means column k is in group k // group_size
    group_size  columns per group; None for one scale per row
    returns     `dtype` [rows, cols]
    """
    _check_packed(packed, bits, cols, dense)
    layout = {"bits": bits, "per_word": 0 if dense else 32 // bits}
    return _decode_as(packed, scale, zero_point, g_idx, layout, cols, group_size, dtype)


def decode_int8(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, *, group_size: int | None, dtype: torch.dtype
) -> Tensor:
    """Dequantize unpacked integers: (q - zero_point) * scale in float32, rounded once to `dtype`.

    codes       int8 [rows, cols]
    scale       F32 [rows, groups]; multiplies
    zero_point  int8 [rows, groups]; None means 0
    group_size  columns per group; None for one scale per row
    returns     `dtype` [rows, cols]
    """
    _check_codes(codes)
    return _decode_as(codes, scale, zero_point, None, _UNPACKED, codes.shape[1], group_size, dtype)


def decode_indexed(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    g_idx: Tensor,
    *,
    group_size: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """As `decode_int8`, with the group of column k in g_idx[k] (int32 [cols])."""
    _check_codes(codes)
    return _decode_as(codes, scale, zero_point, g_idx, _UNPACKED, codes.shape[1], group_size, dtype)


def _check_codes(codes: Tensor) -> None:
    """Refuse anything but a matrix of int8."""
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise ValueError(f"codes must be an int8 matrix, got {codes.dtype} {list(codes.shape)}")


def _decode_as(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    index: Tensor | None,
    layout: dict[str, int],
    cols: int,
    group_size: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """Check the scales, then run the kernel of all layouts."""
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size must be at least 1, or None for one scale per row, got {group_size}")
    rows, groups = packed.shape[0], 1 if group_size is None else -(-cols // group_size)
    _check_groups(rows, cols, groups, scale, zero_point)
    if index is not None:
        _check_index(index, cols, groups)
        index = index.to(torch.int32).contiguous()
    require_device(packed)
    out = torch.empty((rows, cols), dtype=dtype, device=packed.device)
    target = loadable(out)
    if out.numel():
        zeros = None if zero_point is None else zero_point.contiguous()
        arguments = (packed.contiguous(), scale.contiguous(), zeros, index, target, cols, packed.shape[1], groups)
        grid = (rows, triton.cdiv(cols, _TILE))
        launch(_decode, grid, *arguments, group_size=group_size or 0, tile=_TILE, **layout)
    return out


def _check_packed(packed: Tensor, bits: int, cols: int, dense: bool) -> int:
    """Words per row; refuse a count that does not belong to `cols` codes: reading on would leave the tensor."""
    words = words_per_row(cols, bits, dense=dense)
    if packed.dtype != torch.int32 or packed.ndim != 2 or packed.shape[1] != words:
        raise ValueError(
            f"{cols} columns of {bits} bits ({'dense' if dense else 'padded'} packing) need int32 "
            f"[rows, {words}], got {packed.dtype} {list(packed.shape)}; try the other packing"
        )
    require_device(packed)
    return words


def _check_groups(rows: int, cols: int, groups: int, scale: Tensor, zero_point: Tensor | None) -> None:
    """Refuse scales or zero points that do not cover the matrix."""
    if scale.dtype != torch.float32 or scale.shape != (rows, groups):
        raise ValueError(
            f"a {rows} x {cols} matrix in {groups} groups needs a float32 scale {[rows, groups]}, "
            f"got {scale.dtype} {list(scale.shape)}"
        )
    if zero_point is not None and (zero_point.dtype != torch.int8 or zero_point.shape != scale.shape):
        raise ValueError(
            f"zero_point must be int8 {list(scale.shape)} like the scale, "
            f"got {zero_point.dtype} {list(zero_point.shape)}"
        )


def _check_index(g_idx: Tensor, cols: int, groups: int) -> None:
    """Refuse group numbers outside of the scales."""
    if g_idx.shape != (cols,) or (cols and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups):
        raise ValueError(f"g_idx must hold {cols} group numbers in 0..{groups - 1}, got {g_idx}")


@triton.jit
def _codes(words: tl.tensor, k: tl.tensor, live: tl.tensor, bits: tl.constexpr, per_word: tl.constexpr) -> tl.tensor:
    """int32 codes of the columns k of one row, without their offset; per_word is 0 for dense packing."""
    bit = k // per_word * 32 + k % per_word * bits if per_word else k * bits
    word, low = bit >> 5, bit & 31
    code = tl.load(words + word, mask=live, other=0)
    if per_word == 0 and 32 % bits:
        straddles = live & (low + bits > 32)
        high = tl.load(words + word + 1, mask=straddles, other=0).to(tl.int64)
        code = (((high << 32) | (code.to(tl.int64) & 0xFFFFFFFF)) >> low).to(tl.int32)
    else:
        code = code >> low
    return (code & ((1 << bits) - 1)) - (1 << (bits - 1))


@triton.jit
def _unpack(
    packed: tl.tensor,
    codes: tl.tensor,
    cols: tl.tensor,
    words: tl.tensor,
    bits: tl.constexpr,
    per_word: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Fill codes [rows, cols] int8 from packed [rows, words] int32."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * tile + tl.arange(0, tile)
    live = k < cols
    tl.store(codes + row * cols + k, _codes(packed + row * words, k, live, bits, per_word).to(tl.int8), mask=live)


@triton.jit
def _decode(
    packed: tl.tensor,
    scale: tl.tensor,
    zero_point: tl.tensor,
    index: tl.tensor,
    out: tl.tensor,
    cols: tl.tensor,
    words: tl.tensor,
    groups: tl.tensor,
    group_size: tl.constexpr,
    bits: tl.constexpr,
    per_word: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Fill out [rows, cols] from packed [rows, words].

    bits 0 means that packed holds one int8 per column, group_size 0 that a row has one scale.
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * tile + tl.arange(0, tile)
    live = k < cols
    if bits:
        code = _codes(packed + row * words, k, live, bits, per_word)
    else:
        code = tl.load(packed + row * words + k, mask=live, other=0).to(tl.int32)
    group = k // group_size if group_size else k * 0
    if index is not None:
        group = tl.load(index + k, mask=live, other=0)
    group += row * groups
    if zero_point is not None:
        code -= tl.load(zero_point + group, mask=live, other=0).to(tl.int32)
    value = code.to(tl.float32) * tl.load(scale + group, mask=live, other=0)
    store_f32(out + row * cols + k, value, live)
