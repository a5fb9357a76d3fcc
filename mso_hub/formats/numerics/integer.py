"""Packed integer weights: 2- to 8-bit codes in int32 words, one scale for a group of columns.

    w = (q - zero_point) * scale          q = code - 2**(bits - 1), in -2**(bits-1) .. 2**(bits-1) - 1

The same for zero points: they are stored with the offset 2**(bits - 1) too. Two packings exist
(words are little-endian, the first element sits in the lowest bits):

    dense   compressed-tensors 0.20: element i takes bits i*bits .. i*bits + bits - 1 of the
            row's bit stream, so 3-, 5-, 6- and 7-bit codes may straddle two words
    padded  its older releases: floor(32 / bits) elements per word, the bits above them are unused

For 2, 4 and 8 bits both are the same bytes. `words_per_row` tells which one a tensor uses.
`reference` is the same arithmetic in plain torch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mso_hub.formats.numerics.floats import Array, narrow, storage, store_f32
from mso_hub.formats.numerics.kernel import kernel


def words_per_row(cols: int, bits: int, *, dense: bool) -> int:
    """Number of int32 words that hold `cols` codes of `bits` bits (2..8)."""
    if not 2 <= bits <= 8:
        raise ValueError(f"packed integers have 2 to 8 bits, got {bits}")
    return -(-cols * bits // 32) if dense else -(-cols // (32 // bits))


def unpack(packed: npt.NDArray[np.int32], bits: int, cols: int, *, dense: bool) -> npt.NDArray[np.int8]:
    """Codes of a matrix packed along its columns.

    packed   int32 [rows, words], words = words_per_row(cols, bits, dense=dense)
    returns  int8 [rows, cols] in -2**(bits-1) .. 2**(bits-1) - 1
    source   compressed-tensors 0.20 unpack_from_int32 (dense); padded from its older releases
    """
    _check_packed(packed, bits, cols, dense)
    codes = np.empty((packed.shape[0], cols), np.int8)
    _unpack(_readonly(packed), bits, dense, codes)
    return codes


def unpack_zero_point(packed: npt.NDArray[np.int32], bits: int, rows: int, *, dense: bool) -> npt.NDArray[np.int8]:
    """Zero points of a matrix, which are packed along its rows.

    packed   int32 [words, groups], words = words_per_row(rows, bits, dense=dense)
    returns  int8 [rows, groups], offset removed like that of the codes
    source   compressed-tensors 0.20 PackedQuantizationCompressor (packed_dim=0)
    """
    along_columns = unpack(np.ascontiguousarray(packed.T), bits, rows, dense=dense)
    return np.ascontiguousarray(along_columns.T)


def decode(
    packed: npt.NDArray[np.int32],
    scale: npt.NDArray[np.float32],
    zero_point: npt.NDArray[np.int8] | None,
    g_idx: npt.NDArray[np.int32] | None,
    *,
    bits: int,
    group_size: int | None,
    cols: int,
    dense: bool,
    dtype: str,
) -> Array:
    """Dequantize: (q - zero_point) * scale in float32, rounded once to `dtype`.

    packed      int32 [rows, words], see `unpack`
    scale       float32 [rows, groups], widened exactly from what is stored; multiplies
    zero_point  int8 [rows, groups] from `unpack_zero_point`; None means 0
    g_idx       int32 [cols], group of each column; None means column k is in group k // group_size
    group_size  columns per group; None for one scale per row
    returns     [rows, cols] held as `floats.storage(dtype)`
    source      compressed-tensors 0.20 PackedQuantizationCompressor.decompress; its arithmetic is
                in the dtype of the scale, which rounds this same exact product once
    """
    codes = unpack(packed, bits, cols, dense=dense)
    size = cols if group_size is None else group_size
    if size < 1:
        raise ValueError(f"group_size must be at least 1, or None for one scale per row, got {group_size}")
    index = np.arange(cols, dtype=np.int32) // size if g_idx is None else g_idx.astype(np.int32)
    zeros = np.zeros(scale.shape, np.int8) if zero_point is None else zero_point
    _check_groups(codes.shape, -(-cols // size), scale, zeros, index)
    out = np.empty(codes.shape, storage("F32" if dtype == "F16" else dtype))
    bits_out = out.view(np.uint16 if dtype == "BF16" else np.uint32)
    _decode(_readonly(codes), _readonly(scale), _readonly(zeros), _readonly(index), bits_out)
    return narrow(out, dtype) if dtype == "F16" else out


def _check_packed(packed: npt.NDArray[np.int32], bits: int, cols: int, dense: bool) -> None:
    """Refuse a word count that does not belong to `cols` codes: reading on would leave the array."""
    words = words_per_row(cols, bits, dense=dense)
    if packed.dtype != np.int32 or packed.ndim != 2 or packed.shape[1] != words:
        raise ValueError(
            f"{cols} columns of {bits} bits ({'dense' if dense else 'padded'} packing) need int32 "
            f"[rows, {words}], got {packed.dtype} {list(packed.shape)}; try the other packing"
        )


def _check_groups(
    shape: tuple[int, ...],
    groups: int,
    scale: npt.NDArray[np.float32],
    zero_point: npt.NDArray[np.int8],
    index: npt.NDArray[np.int32],
) -> None:
    """Refuse scales, zero points or group numbers that do not cover the matrix."""
    rows, cols = shape
    if scale.dtype != np.float32 or scale.shape != (rows, groups):
        raise ValueError(
            f"a {rows} x {cols} matrix in {groups} groups needs a float32 scale {[rows, groups]}, "
            f"got {scale.dtype} {list(scale.shape)}"
        )
    if zero_point.dtype != np.int8 or zero_point.shape != scale.shape:
        raise ValueError(
            f"zero_point must be int8 {list(scale.shape)} like the scale, "
            f"got {zero_point.dtype} {list(zero_point.shape)}"
        )
    if index.shape != (cols,) or (cols and not 0 <= int(index.min()) <= int(index.max()) < groups):
        raise ValueError(f"g_idx must hold {cols} group numbers in 0..{groups - 1}, got {index}")


def _readonly(values: Array) -> Array:
    """View as C-contiguous and read-only, so that one compiled kernel serves every caller."""
    view = np.ascontiguousarray(values).view()
    view.flags.writeable = False
    return view


@kernel
def _unpack_row(words: Array, bits: int, dense: bool, codes: Array) -> None:
    """Fill codes [cols] int8 from the words [n] int32 of one row."""
    cols = codes.size
    if bits == 8:
        octets = words.view(np.uint8)
        for k in range(cols):
            codes[k] = octets[k] ^ np.uint8(0x80)  # flipping the top bit subtracts 128
        return
    if bits == 4:
        octets = words.view(np.uint8)
        for k in range(cols // 2):
            codes[2 * k] = np.int8(octets[k] & 0xF) - np.int8(8)
            codes[2 * k + 1] = np.int8(octets[k] >> 4) - np.int8(8)
        if cols % 2:
            codes[cols - 1] = np.int8(octets[cols // 2] & 0xF) - np.int8(8)
        return
    per_word = 32 // bits
    mask = (1 << bits) - 1
    for k in range(cols):
        bit = k * bits if dense else k // per_word * 32 + k % per_word * bits
        word, low = bit >> 5, bit & 31
        code = (np.int64(words[word]) & 0xFFFFFFFF) >> low
        if low + bits > 32:
            code |= (np.int64(words[word + 1]) & 0xFFFFFFFF) << (32 - low)
        codes[k] = (code & mask) - (1 << (bits - 1))


@kernel
def _unpack(packed: Array, bits: int, dense: bool, codes: Array) -> None:
    """Fill codes [rows, cols] int8 from packed [rows, words] int32."""
    for r in range(packed.shape[0]):
        _unpack_row(packed[r], bits, dense, codes[r])


@kernel
def _decode(codes: Array, scale: Array, zero_point: Array, index: Array, out: Array) -> None:
    """Fill out [rows, cols] (uint16 BF16 or uint32 F32 bits); column k is in group index[k].

    The float32 numbers of one row stay in the cache between the product and the rounding.
    """
    x = np.empty(out.shape[1], np.float32)
    for r in range(out.shape[0]):
        for k in range(x.size):
            g = index[k]
            x[k] = np.float32(np.int32(codes[r, k]) - np.int32(zero_point[r, g])) * scale[r, g]
        store_f32(x.view(np.uint32), out[r])
