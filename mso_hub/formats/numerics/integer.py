"""Packed integer weights: 2- to 8-bit codes in int32 words, one scale for a group of columns.

    w = (q - zero_point) * scale          q = code - 2**(bits - 1), in -2**(bits-1) .. 2**(bits-1) - 1

The same for zero points: they are stored with the offset 2**(bits - 1) too. Two packings exist
(words are little-endian, the first element sits in the lowest bits):

    dense   compressed-tensors 0.20: element i takes bits i*bits .. i*bits + bits - 1 of the
            row's bit stream, so 3-, 5-, 6- and 7-bit codes may straddle two words
    padded  its older releases: floor(32 / bits) elements per word, the bits above them are unused

For 2, 4 and 8 bits both are the same bytes. `words_per_row` tells which one a tensor uses.
`integer_encode` makes codes, `reference` is the same arithmetic in plain torch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mso_hub.formats.numerics.floats import Array, narrow, storage, store_f32
from mso_hub.formats.numerics.kernel import kernel

_TILE = 2048  # columns: 8 KiB as float32


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
    if g_idx is not None:
        codes = unpack(packed, bits, cols, dense=dense)
        return decode_indexed(codes, scale, zero_point, g_idx, group_size=group_size, dtype=dtype)
    _check_packed(packed, bits, cols, dense)
    shape = (packed.shape[0], cols)
    size, zeros = _check_groups(shape, group_size, scale, zero_point)
    out, bits_out = _output(shape, dtype)
    _decode_packed(_readonly(packed), bits, dense, _readonly(scale), zeros, size, bits_out)
    return narrow(out, dtype) if dtype == "F16" else out


def decode_int8(
    codes: npt.NDArray[np.int8],
    scale: npt.NDArray[np.float32],
    zero_point: npt.NDArray[np.int8] | None,
    *,
    group_size: int | None,
    dtype: str,
) -> Array:
    """Dequantize codes that are not packed: (q - zero_point) * scale in float32, rounded once to `dtype`.

    codes       int8 [rows, cols]
    scale       float32 [rows, groups], widened exactly from what is stored; multiplies
    zero_point  int8 [rows, groups]; None means 0
    group_size  columns per group; None for one scale per row
    returns     [rows, cols] held as `floats.storage(dtype)`
    source      compressed-tensors 0.20 IntQuantizationCompressor.decompress
    """
    _check_codes(codes)
    size, zeros = _check_groups(codes.shape, group_size, scale, zero_point)
    out, bits_out = _output(codes.shape, dtype)
    _decode_codes(_readonly(codes), _readonly(scale), zeros, size, bits_out)
    return narrow(out, dtype) if dtype == "F16" else out


def decode_indexed(
    codes: npt.NDArray[np.int8],
    scale: npt.NDArray[np.float32],
    zero_point: npt.NDArray[np.int8] | None,
    g_idx: npt.NDArray[np.int32],
    *,
    group_size: int | None,
    dtype: str,
) -> Array:
    """As `decode_int8`, with the group of column k in g_idx[k] (int32 [cols])."""
    _check_codes(codes)
    _, zeros = _check_groups(codes.shape, group_size, scale, zero_point)
    index = g_idx.astype(np.int32)
    cols, groups = codes.shape[1], scale.shape[1]
    if index.shape != (cols,) or (cols and not 0 <= int(index.min()) <= int(index.max()) < groups):
        raise ValueError(f"g_idx must hold {cols} group numbers in 0..{groups - 1}, got {index}")
    out, bits_out = _output(codes.shape, dtype)
    _decode_indexed(_readonly(codes), _readonly(scale), zeros, _readonly(index), bits_out)
    return narrow(out, dtype) if dtype == "F16" else out


def _output(shape: tuple[int, ...], dtype: str) -> tuple[Array, Array]:
    """Room for the numbers, and its bits, which the kernels write; F16 is rounded by numpy from F32."""
    out = np.empty(shape, storage("F32" if dtype == "F16" else dtype))
    return out, out.view(np.uint16 if dtype == "BF16" else np.uint32)


def _check_packed(packed: npt.NDArray[np.int32], bits: int, cols: int, dense: bool) -> None:
    """Refuse a word count that does not belong to `cols` codes: reading on would leave the array."""
    words = words_per_row(cols, bits, dense=dense)
    if packed.dtype != np.int32 or packed.ndim != 2 or packed.shape[1] != words:
        raise ValueError(
            f"{cols} columns of {bits} bits ({'dense' if dense else 'padded'} packing) need int32 "
            f"[rows, {words}], got {packed.dtype} {list(packed.shape)}; try the other packing"
        )


def _check_codes(codes: npt.NDArray[np.int8]) -> None:
    """Refuse anything but a matrix of int8."""
    if codes.dtype != np.int8 or codes.ndim != 2:
        raise ValueError(f"codes must be an int8 matrix, got {codes.dtype} {list(codes.shape)}")


def _check_groups(
    shape: tuple[int, ...],
    group_size: int | None,
    scale: npt.NDArray[np.float32],
    zero_point: npt.NDArray[np.int8] | None,
) -> tuple[int, npt.NDArray[np.int8]]:
    """Columns per group, zero points for the kernels; refuse what does not cover the matrix."""
    rows, cols = shape
    size = cols if group_size is None else group_size
    if size < 1:
        raise ValueError(f"group_size must be at least 1, or None for one scale per row, got {group_size}")
    groups = -(-cols // size)
    if scale.dtype != np.float32 or scale.shape != (rows, groups):
        raise ValueError(
            f"a {rows} x {cols} matrix in {groups} groups needs a float32 scale {[rows, groups]}, "
            f"got {scale.dtype} {list(scale.shape)}"
        )
    if zero_point is None:
        return size, _readonly(np.zeros(scale.shape, np.int8))
    if zero_point.dtype != np.int8 or zero_point.shape != scale.shape:
        raise ValueError(
            f"zero_point must be int8 {list(scale.shape)} like the scale, "
            f"got {zero_point.dtype} {list(zero_point.shape)}"
        )
    return size, _readonly(zero_point)


def _readonly(values: Array) -> Array:
    """View as C-contiguous and read-only, so that one compiled kernel serves every caller."""
    view = np.ascontiguousarray(values).view()
    view.flags.writeable = False
    return view


@kernel
def _unpack_part(words: Array, bits: int, dense: bool, first: int, codes: Array) -> None:
    """Fill codes [n] int8 with the columns from `first` on of a row in words [m] int32.

    `first` is a multiple of 2, so that 4-bit codes begin with a byte.
    """
    n = codes.size
    if bits == 8:
        octets = words.view(np.uint8)[first : first + n]
        for k in range(n):
            codes[k] = octets[k] ^ np.uint8(0x80)  # flipping the top bit subtracts 128
        return
    if bits == 4:
        octets = words.view(np.uint8)[first // 2 :]
        for k in range(n // 2):
            codes[2 * k] = np.int8(octets[k] & 0xF) - np.int8(8)
            codes[2 * k + 1] = np.int8(octets[k] >> 4) - np.int8(8)
        if n % 2:
            codes[n - 1] = np.int8(octets[n // 2] & 0xF) - np.int8(8)
        return
    per_word = 32 // bits
    mask = (1 << bits) - 1
    for i in range(n):
        k = first + i
        bit = k * bits if dense else k // per_word * 32 + k % per_word * bits
        word, low = bit >> 5, bit & 31
        code = (np.int64(words[word]) & 0xFFFFFFFF) >> low
        if low + bits > 32:
            code |= (np.int64(words[word + 1]) & 0xFFFFFFFF) << (32 - low)
        codes[i] = (code & mask) - (1 << (bits - 1))


@kernel
def _unpack(packed: Array, bits: int, dense: bool, codes: Array) -> None:
    """Fill codes [rows, cols] int8 from packed [rows, words] int32."""
    for r in range(packed.shape[0]):
        _unpack_part(packed[r], bits, dense, 0, codes[r])


@kernel
def _multiply(codes: Array, first: int, scale: Array, zero_point: Array, size: int, x: Array) -> None:
    """Fill x [n] float32 with (q - zero_point) * scale for the columns from `first` on of one row."""
    done = 0
    while done < codes.size:
        g = (first + done) // size
        stop = min((g + 1) * size - first, codes.size)
        z, s = np.int32(zero_point[g]), scale[g]
        part, to = codes[done:stop], x[done:stop]
        for k in range(part.size):
            to[k] = np.float32(np.int32(part[k]) - z) * s
        done = stop


@kernel
def _decode_packed(
    packed: Array, bits: int, dense: bool, scale: Array, zero_point: Array, size: int, out: Array
) -> None:
    """Fill out [rows, cols] (uint16 BF16 or uint32 F32 bits) from packed [rows, words], groups of `size` columns.

    Tile by tile: codes, products and rounded numbers of a tile stay in the cache.
    """
    codes, x = np.empty(_TILE, np.int8), np.empty(_TILE, np.float32)
    for r in range(out.shape[0]):
        for start in range(0, out.shape[1], _TILE):
            n = min(_TILE, out.shape[1] - start)
            _unpack_part(packed[r], bits, dense, start, codes[:n])
            _multiply(codes[:n], start, scale[r], zero_point[r], size, x[:n])
            store_f32(x[:n].view(np.uint32), out[r, start : start + n])


@kernel
def _decode_codes(codes: Array, scale: Array, zero_point: Array, size: int, out: Array) -> None:
    """As `_decode_packed`, from codes [rows, cols] int8."""
    x = np.empty(_TILE, np.float32)
    for r in range(out.shape[0]):
        for start in range(0, out.shape[1], _TILE):
            n = min(_TILE, out.shape[1] - start)
            _multiply(codes[r, start : start + n], start, scale[r], zero_point[r], size, x[:n])
            store_f32(x[:n].view(np.uint32), out[r, start : start + n])


@kernel
def _decode_indexed(codes: Array, scale: Array, zero_point: Array, index: Array, out: Array) -> None:
    """As `_decode_codes`; column k is in group index[k]."""
    x = np.empty(out.shape[1], np.float32)
    for r in range(out.shape[0]):
        for k in range(x.size):
            g = index[k]
            x[k] = np.float32(np.int32(codes[r, k]) - np.int32(zero_point[r, g])) * scale[r, g]
        store_f32(x.view(np.uint32), out[r])
