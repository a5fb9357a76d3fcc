"""AWQ and GPTQ weights on the CPU: integers in int32 words, stored [in, out].

    w[n, k] = (q[k, n] - zero[group of k, n]) * scale[group of k, n]

               AutoAWQ (GEMM), 4 bits                    GPTQ, 2, 3, 4 or 8 bits
    qweight    [K, N/8], a word holds 8 rows n           [K*bits/32, N], the codes of a column in one bit stream
    qzeros     [K/g, N/8], packed as qweight             [K/g, N*bits/32], one bit stream along N
    scales     [K/g, N]                                  [K/g, N]

Codes and zero points are unsigned. A word of AWQ holds row 8j + i not in its nibble i, but in nibble 0 4 1 5 2 6 3 7 of
i = 0 .. 7. GPTQ fills words from the lowest bit on, 3-bit codes straddle them; its first version stores zero points
minus one, gptq_v2 stores them as they are. Both functions turn the matrix into [N, K], as a linear layer has it.
`reference.integer` is the same arithmetic in plain torch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mso_hub.formats.numerics.floats import Array, widen
from mso_hub.formats.numerics.integer import decode_indexed, decode_int8, unpack
from mso_hub.formats.numerics.kernel import kernel

GPTQ_BITS = (2, 3, 4, 8)
_SCALES = {np.dtype(np.float16): "F16", np.dtype(np.uint16): "BF16", np.dtype(np.float32): "F32"}
_TILE = 64  # rows and columns of the square in which words are taken apart and turned


def decode_awq(
    qweight: npt.NDArray[np.int32], qzeros: npt.NDArray[np.int32], scales: Array, *, group_size: int, dtype: str
) -> Array:
    """Dequantize AutoAWQ's GEMM layout: (q - zero) * scale in float32, rounded once to `dtype`.

    qweight     int32 [K, N/8], eight 4-bit codes of neighbouring rows of the result in a word
    qzeros      int32 [ceil(K/group_size), N/8], packed in the same way
    scales      [ceil(K/group_size), N], float16, float32 or BF16 as uint16 bits; multiply
    returns     [N, K] held as `floats.storage(dtype)`
    source      AutoAWQ's WQLinear_GEMM, and compressed-tensors 0.20 AutoAWQConverter
    """
    rows, cols = scales.shape[-1], qweight.shape[0]
    _check("qweight", qweight, (cols, rows // 8), good=rows % 8 == 0)
    shape = _check_group_size(group_size, cols, rows)
    _check("qzeros", qzeros, (shape[0], rows // 8), good=True)
    codes, zeros = np.empty((rows, cols), np.int8), np.empty((rows, shape[0]), np.int8)
    _unpack_awq(_readonly(qweight), codes)
    _unpack_awq(_readonly(qzeros), zeros)
    return decode_int8(codes, _scale(scales, shape), zeros, group_size=group_size, dtype=dtype)


def decode_gptq(
    qweight: npt.NDArray[np.int32],
    qzeros: npt.NDArray[np.int32],
    scales: Array,
    g_idx: npt.NDArray[np.int32] | None,
    *,
    bits: int,
    group_size: int,
    zero_offset: int,
    dtype: str,
) -> Array:
    """Dequantize GPTQ's layout: (q - (zero + zero_offset)) * scale in float32, rounded once to `dtype`.

    qweight      int32 [K*bits/32, N], the codes of a column k, k+1, ... one after the other
    qzeros       int32 [ceil(K/group_size), N*bits/32], the zero points of a group one after the other
    scales       [ceil(K/group_size), N], float16, float32 or BF16 as uint16 bits; multiply
    g_idx        int32 [K], group of each column of the result; None means column k is in group k // group_size
    bits         2, 3, 4 or 8
    zero_offset  1 for checkpoint_format gptq, where zero points are stored minus one; 0 for gptq_v2
    returns      [N, K] held as `floats.storage(dtype)`
    source       AutoGPTQ's QuantLinear, and GPTQModel's conversion of gptq to gptq_v2
    """
    if bits not in GPTQ_BITS or zero_offset not in (0, 1):
        raise ValueError(f"GPTQ has 2, 3, 4 or 8 bits and a zero offset of 0 or 1, got {bits} and {zero_offset}")
    rows, cols = scales.shape[-1], qweight.shape[0] * 32 // bits
    _check("qweight", qweight, (cols * bits // 32, rows), good=qweight.shape[0] * 32 % bits == 0)
    shape = _check_group_size(group_size, cols, rows)
    _check("qzeros", qzeros, (shape[0], rows * bits // 32), good=rows * bits % 32 == 0)
    codes = np.empty((rows, cols), np.int8)
    _unpack_columns(_readonly(qweight), bits, codes)
    zeros = _gptq_zero_points(qzeros, bits, rows) if zero_offset else unpack(qzeros, bits, rows, dense=True).T
    zeros, scale = np.ascontiguousarray(zeros), _scale(scales, shape)
    if g_idx is None:
        return decode_int8(codes, scale, zeros, group_size=group_size, dtype=dtype)
    return decode_indexed(codes, scale, zeros, g_idx, group_size=group_size, dtype=dtype)


def _gptq_zero_points(qzeros: npt.NDArray[np.int32], bits: int, rows: int) -> npt.NDArray[np.int8]:
    """Zero points [N, groups], offset removed, of words that were made by subtracting one from each.

    One is added to the word as a whole, as GPTQModel does and undoes it: where a zero point was 0 it was stored as
    2**bits - 1 and borrowed from the next one. Codes of 3 bits do not fill words; there each one wraps.
    """
    if 32 % bits == 0:
        ones = np.uint32(sum(1 << low for low in range(0, 32, bits)))
        return unpack((qzeros.view(np.uint32) + ones).view(np.int32), bits, rows, dense=True).T
    half = 1 << (bits - 1)
    zeros = (unpack(qzeros, bits, rows, dense=True).astype(np.int16) + half + 1) % (2 * half) - half
    return zeros.astype(np.int8).T


def _check(name: str, packed: Array, expected: tuple[int, int], *, good: bool) -> None:
    """Refuse words that do not belong to the matrix: reading on would leave the array."""
    if not good or packed.dtype != np.int32 or packed.shape != expected:
        raise ValueError(
            f"{name} must be int32 {list(expected)} in whole words, got {packed.dtype} {list(packed.shape)}; "
            "the scales belong to another weight, or this is another layout"
        )


def _check_group_size(group_size: int, cols: int, rows: int) -> tuple[int, int]:
    """Shape of the scales, [groups, N]."""
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}; for one scale per row give {cols} columns")
    return -(-cols // group_size), rows


def _scale(scales: Array, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """float32 [N, groups] of stored scales [groups, N]."""
    if scales.dtype not in _SCALES or scales.shape != shape:
        raise ValueError(f"scales must be floats {list(shape)}, got {scales.dtype} {list(scales.shape)}")
    wide = widen(np.ascontiguousarray(scales), _SCALES[scales.dtype])
    return np.ascontiguousarray(wide.T)


def _readonly(values: Array) -> Array:
    """View as C-contiguous and read-only, so that one compiled kernel serves every caller."""
    view = np.ascontiguousarray(values).view()
    view.flags.writeable = False
    return view


@kernel
def _turn(tile: Array, n: int, m: int, codes: Array) -> None:
    """Write tile [m, n] into codes [n, m], row by row."""
    for row in range(n):
        to = codes[row]
        for k in range(m):
            to[k] = tile[k, row]


@kernel
def _unpack_awq(packed: Array, codes: Array) -> None:
    """Fill codes [N, K] int8 in -8..7 from packed [K, N/8] int32, a square that stays in the cache at a time."""
    tile = np.empty((_TILE, _TILE), np.int8)
    for left in range(0, packed.shape[0], _TILE):
        m = min(_TILE, packed.shape[0] - left)
        for top in range(0, codes.shape[0], _TILE):
            n = min(_TILE, codes.shape[0] - top)
            for k in range(m):
                words, row = packed[left + k, top // 8 : (top + n) // 8], tile[k]
                for j in range(words.size):
                    word = np.uint32(words[j])
                    for i in range(4):
                        row[8 * j + 2 * i] = np.int8((word >> np.uint32(4 * i)) & np.uint32(15)) - np.int8(8)
                        row[8 * j + 2 * i + 1] = np.int8((word >> np.uint32(4 * i + 16)) & np.uint32(15)) - np.int8(8)
            _turn(tile, n, m, codes[top : top + n, left : left + m])


@kernel
def _unpack_columns(packed: Array, bits: int, codes: Array) -> None:
    """Fill codes [n, m] int8, offset removed, from the bit streams of the columns of packed [m*bits/32, n] int32."""
    mask, offset = np.uint32((1 << bits) - 1), np.int32(1 << (bits - 1))
    tile = np.empty((_TILE, _TILE), np.int8)
    for left in range(0, codes.shape[1], _TILE):
        m = min(_TILE, codes.shape[1] - left)
        for top in range(0, codes.shape[0], _TILE):
            n = min(_TILE, codes.shape[0] - top)
            for k in range(m):
                bit, row = (left + k) * bits, tile[k]
                shift = np.uint32(bit & 31)
                words = packed[bit >> 5, top : top + n]
                if (bit & 31) + bits <= 32:
                    for i in range(n):
                        row[i] = np.int32((np.uint32(words[i]) >> shift) & mask) - offset
                    continue
                above, rest = packed[(bit >> 5) + 1, top : top + n], np.uint32(32) - shift
                for i in range(n):
                    code = (np.uint32(words[i]) >> shift) | (np.uint32(above[i]) << rest)
                    row[i] = np.int32(code & mask) - offset
            _turn(tile, n, m, codes[top : top + n, left : left + m])
