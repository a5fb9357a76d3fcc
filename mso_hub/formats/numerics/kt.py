"""kt-kernel's INT4 and INT8: one scale a row, codes in tiles for the dot products of AMX and AVX512.

Numbers are rounded to BF16 first. With amax the largest magnitude of a row, `rne` rounding to nearest, ties to even:

    INT8   d = f32(amax * f32(1/127))           q = rne(w * f32(1/d))                      w ~= q * d
    INT4   d = f32(f64(amax) / 112)             e = rne(w * f32(1/d)), -112..112           w ~= 16 * q * d
                                                q = sign(e) * ((|e| + 8) >> 4), -7..7

kt-kernel is compiled with fast-math, which made the division by 127 a product and takes numbers below 2**-126 for 0;
that is part of the format. So a row whose scale would be one of these has the scale 0 and codes 0. INT4 rounds twice,
so that the codes are not always the nearest. Source: kt-kernel 0.7.2,
operators/amx/la/amx_kernels.hpp and amx_buffers.hpp.

Codes lie in blocks of N rows (64 for INT8, 128 for INT4; the last one may have fewer, a multiple of 32), so that rows
can be streamed. In a block: stretches of 3584 columns, in these steps of 32 rows, in these tiles of 64 bytes of a row.
A tile of 32 rows is two halves of [16 words][16 rows][4 bytes]. The 64 bytes are 64 columns, or 128 columns of INT4:
byte b holds column b in its low and column 64 + b in its high bits, both in two's complement.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mso_hub.formats.numerics import floats
from mso_hub.formats.numerics.floats import Array
from mso_hub.formats.numerics.kernel import kernel

ROWS = {8: 64, 4: 128}
"""Bits -> rows of a block."""
TILE = {8: 64, 4: 128}
"""Bits -> columns that fill 64 bytes; the columns of a part must be a multiple."""
STEP = 32
"""The rows of a matrix must be a multiple."""
_STRETCH = 3584
_MAGIC = np.float32(1.5 * 2.0**23)
_MAGIC_BITS = np.int32(0x4B400000)
"""Adding 1.5 * 2**23 rounds |x| < 2**22 to an integer, ties to even, and leaves it in the low bits."""


def encode(values: Array, dtype: str, *, bits: int, parts: int = 1) -> tuple[Array, ...]:
    """Rows [r, K] held as `dtype` -> for each part: codes int8 [r, K/parts * bits/8] in tiles, scales float32 [r].

    parts  stretches of columns with scales of their own
    Raises ValueError for a number that BF16 cannot hold; r must be a multiple of 32, K/parts one of TILE.
    """
    if dtype != "BF16":
        finite = floats.amax(values, dtype) < float("inf")
        values = floats.narrow(floats.widen(values, dtype), "BF16")
        if finite and not floats.amax(values, "BF16") < float("inf"):
            raise ValueError("kt-kernel takes BF16, which ends at 3.39e38")
    rows, columns = values.shape
    width = columns // parts
    numbers = floats.flat_bits(values, "BF16").reshape(rows, columns)
    found: list[Array] = []
    for part in range(parts):
        codes = np.empty((rows, width * bits // 8), np.int8)
        scale = np.empty(rows, np.float32)
        _encode(numbers, part * width, width, bits, codes.reshape(-1).view(np.uint32), scale)
        found += [codes, scale]
    return tuple(found)


def decode(codes: Array, scale: npt.NDArray[np.float32], columns: int, *, bits: int) -> npt.NDArray[np.float32]:
    """Codes int8 [r * columns * bits/8] of any shape, scales [r] -> numbers float32 [r, columns].

    The codes must begin with a block of rows; only the last block of a matrix may be shorter than the others.
    """
    out = np.empty((len(scale), columns), np.float32)
    words = np.ascontiguousarray(codes).reshape(-1).view(np.uint32)
    words.flags.writeable = False
    factors = np.ascontiguousarray(scale, np.float32)
    factors.flags.writeable = False
    _decode(words, factors, columns, bits, out)
    return out


@kernel
def _row_scale(row: Array, bits: int) -> np.float32:
    """The scale of a row of BF16 bits."""
    largest = np.uint16(0)
    for i in range(row.size):
        largest = max(largest, np.uint16(row[i] & np.uint16(0x7FFF)))
    amax = np.uint32(np.uint32(largest) << np.uint32(16)).view(np.float32)
    scale = np.float32(amax * np.float32(1.0 / 127.0))
    if bits == 4:
        scale = np.float32(np.float64(amax) / 112.0)
    return scale if scale >= np.float32(2.0**-126) else np.float32(0.0)


@kernel
def _round_row(row: Array, inverse: np.float32, x: Array, codes: Array) -> None:
    """INT8 codes [k] of a row of BF16 bits; x [k] uint32 is room for the numbers."""
    values, whole = x.view(np.float32), x.view(np.int32)
    for i in range(row.size):
        x[i] = np.uint32(row[i]) << np.uint32(16)
    if inverse > np.float32(2.0**125):  # only here such a number would not be rounded to 0 anyway
        for i in range(row.size):
            x[i] = x[i] if row[i] & np.uint16(0x7F80) else np.uint32(0)
    for i in range(row.size):
        values[i] = np.float32(values[i] * inverse) + _MAGIC
    for i in range(row.size):
        codes[i] = np.int8(whole[i] - _MAGIC_BITS)


@kernel
def _to_nibbles(codes: Array, pairs: Array) -> None:
    """INT8 codes [k] -> INT4 codes of tiles [k/2]: columns c and c + 64 in one byte."""
    for tile in range(codes.size // 128):
        for b in range(64):
            low, high = np.int32(codes[tile * 128 + b]), np.int32(codes[tile * 128 + 64 + b])
            one, two = (abs(low) + 8) >> 4, (abs(high) + 8) >> 4
            one, two = -one if low < 0 else one, -two if high < 0 else two
            pairs[tile * 64 + b] = np.int8((one & 15) | ((two & 15) << 4))


@kernel
def _encode(numbers: Array, first: int, width: int, bits: int, words: Array, scale: Array) -> None:
    """Columns [first, first + width) of BF16 bits [r, K] -> tiles as uint32 words, scales [r]."""
    height, tile = (64, 64) if bits == 8 else (128, 128)
    row_bytes = width * bits // 8
    x, wide = np.empty(width, np.uint32), np.empty(width, np.int8)
    flat = np.empty((min(height, len(numbers)), row_bytes), np.int8)
    source = flat.view(np.uint32)
    out = 0
    for block in range(0, len(numbers), height):
        count = min(height, len(numbers) - block)
        for r in range(count):
            row = numbers[block + r, first : first + width]
            d = _row_scale(row, bits)
            scale[block + r] = d
            inverse = np.float32(np.float32(1.0) / d) if d > np.float32(0.0) else np.float32(0.0)
            if bits == 8:
                _round_row(row, inverse, x, flat[r])
            else:
                _round_row(row, inverse, x, wide)
                _to_nibbles(wide, flat[r])
        tiles, stretch = width // tile, _STRETCH // tile
        for begin in range(0, tiles, stretch):
            for step in range(0, count, 32):
                for t in range(begin, min(begin + stretch, tiles)):
                    for half in range(step, step + 32, 16):
                        for r in range(16):
                            for word in range(16):
                                words[out + word * 16 + r] = source[half + r, t * 16 + word]
                        out += 256


@kernel
def _decode(words: Array, scale: Array, columns: int, bits: int, numbers: Array) -> None:
    """The inverse of `_encode` for one part: float32 [r, columns]."""
    height, tile = (64, 64) if bits == 8 else (128, 128)
    flat = np.empty((min(height, scale.size), columns * bits // 8), np.int8)
    target = flat.view(np.uint32)
    at = 0
    for block in range(0, scale.size, height):
        count = min(height, scale.size - block)
        tiles, stretch = columns // tile, _STRETCH // tile
        for begin in range(0, tiles, stretch):
            for step in range(0, count, 32):
                for t in range(begin, min(begin + stretch, tiles)):
                    for half in range(step, step + 32, 16):
                        for r in range(16):
                            for word in range(16):
                                target[half + r, t * 16 + word] = words[at + word * 16 + r]
                        at += 256
        for r in range(count):
            d = scale[block + r]
            if bits == 8:
                for i in range(columns):
                    numbers[block + r, i] = np.float32(flat[r, i]) * d
                continue
            for t in range(tiles):
                for b in range(64):
                    pair = np.int32(flat[r, t * 64 + b])
                    low, high = ((pair & 15) ^ 8) - 8, pair >> 4
                    numbers[block + r, t * 128 + b] = np.float32(16 * low) * d
                    numbers[block + r, t * 128 + 64 + b] = np.float32(16 * high) * d
