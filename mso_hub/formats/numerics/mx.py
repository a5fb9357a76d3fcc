"""MXFP4 and MXFP8 on the CPU: 32 columns under one power of two (OCP Microscaling).

    w ~= e2m1[code] * 2**(scale - 127)          MXFP4
    w ~= e4m3[code] * 2**(scale - 127)          MXFP8

Byte layout, for w [rows, cols]: MXFP4 codes U8 [rows, cols/2], even column in the low nibble; MXFP8 codes U8 [rows,
cols] (E4M3 bits); scale U8 [rows, cols/32], E8M0: the byte is an exponent with bias 127, 255 is NaN.

Both formats choose the smallest exponent under which the largest magnitude, rounded to the format's bits as if there
were no largest code, is still a code. Let amax = f * 2**k with 1 <= f < 2:

    MXFP4    the largest code is 6 = 1.5 * 2**2        exponent k - 2 for f <  1.75,    otherwise k - 1
    MXFP8    the largest code is 448 = 1.75 * 2**8     exponent k - 8 for f <= 1.8125,  otherwise k - 7

At 1.75 * 2**2 = 7, half way to the next code, a tie goes up (8 is even); at 1.8125 * 2**8 = 464 it goes down. Exponents
below -127, the scale byte 0, become -127; a block of zeros has the byte 0. The largest exponent is that of k = 127 and
never rounds up, so no number decodes to infinity in float32.

MXFP4 is compressed-tensors' rule. In MXFP8 that library goes up from f = 1.75 on, and ModelOpt, whose rule is
ceil(log2(amax / 448)), above it. Between there and 1.8125 the largest number becomes 448 * 2**(k - 8) under either
exponent. The smaller one has finer subnormal codes, and only with it is an encoded tensor encoded to itself: a largest
code of 448 says nothing about the number that it was.

Encoding what was decoded, into any dtype that can hold it, gives the same bytes: powers of two make everything exact,
and -0.0 keeps its sign. The dtype of the values can, but for F16 blocks with an amax of 57344 or more, which may become
65536.
`reference` is the same algorithm in plain torch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mso_hub.formats.numerics.e2m1 import (
    RUN,
    SIGNED_ZERO,
    TILE,
    column_lanes,
    column_weights,
    magnitude_code,
    pack,
    readonly,
    squared_errors,
    to_lanes,
    unpack,
    weighted_errors,
)
from mso_hub.formats.numerics.floats import (
    E8M0,
    Array,
    e4m3_codes,
    flat_bits,
    load_e4m3,
    load_f32,
    narrow,
    storage,
    store_f32,
    widen,
)
from mso_hub.formats.numerics.kernel import kernel

GROUP_SIZE = 32

SEARCHES = ("absmax", "mse")
"""How an exponent is chosen: from the largest magnitude, or by comparing errors."""

_ONE = np.float32(1)


def encode_mxfp4(
    values: Array, dtype: str, *, search: str = "absmax", importance: npt.NDArray[np.float64] | None = None
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Quantize a matrix to MXFP4.

    values     [rows, cols] finite, cols % 32 == 0, held as `floats.storage(dtype)`
    search     "absmax": the exponent of the table above. "mse": that one or the one below, where the sum of
               (w - dequantized)**2 is smaller; the differences are float32, the sum is float64 in column order. No
               other can win: a larger exponent has no code that this one lacks, two below cut off more than
               all other numbers of the block can gain
    importance [cols] numbers >= 0, only with "mse": the squares are multiplied by that of their column, and the
               exponent two below is tried too
    returns    packed uint8 [rows, cols/2], scale uint8 [rows, cols/32] (E8M0)
    direction  the scale multiplies: code = rne_e2m1(w / 2**(scale - 127)), 7 or 15 beyond +-5
    source     absmax: compressed-tensors 0.20 generate_mx_scales and quantize_and_pack_fp4, but for the code of -0.0
               (8 here, 0 there) and for amax >= 1.75 * 2**127 (an infinite scale there)
    """
    values, dtype = _checked(values, dtype, search)
    rows, cols = values.shape
    packed = np.empty((rows, cols // 2), np.uint8)
    scale = np.empty((rows, cols // GROUP_SIZE), np.uint8)
    weights = column_weights(importance, cols, search)
    _encode_mxfp4(flat_bits(values, dtype), search == "mse", weights, packed.reshape(-1), scale.reshape(-1))
    return packed, scale


def encode_mxfp8(values: Array, dtype: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Quantize a matrix to MXFP8.

    values     [rows, cols] finite, cols % 32 == 0, held as `floats.storage(dtype)`
    returns    codes uint8 [rows, cols] (E4M3 bits), scale uint8 [rows, cols/32] (E8M0)
    direction  the scale multiplies: code = rne_e4m3(clamp(w / 2**(scale - 127), -448, 448))
    source     compressed-tensors 0.20 generate_mx_scales and ModelOpt 0.47 MXFP8QTensor. They differ only where the
               largest number becomes 448, and there both give way to the exponent that is stable (see the top of this
               file). No search can do better: one exponent more has no code that is missing here, one less gains at
               most 31 * 2**-20 on the smallest numbers and loses at least 32 * 2**-16 on the largest (in squares of
               2**exponent)
    """
    values, dtype = _checked(values, dtype, "absmax")
    rows, cols = values.shape
    codes = np.empty((rows, cols), np.uint8)
    scale = np.empty((rows, cols // GROUP_SIZE), np.uint8)
    _encode_mxfp8(flat_bits(values, dtype), codes.reshape(-1), scale.reshape(-1))
    return codes, scale


def decode_mxfp4(packed: npt.NDArray[np.uint8], scale: npt.NDArray[np.uint8], dtype: str) -> Array:
    """Dequantize MXFP4: e2m1 * 2**(scale - 127) in float32, then `dtype`.

    packed   uint8 [rows, cols/2], even column in the low nibble
    scale    uint8 [rows, cols/32] (E8M0); multiplies; 255 makes the block NaN
    returns  [rows, cols] held as `floats.storage(dtype)`; code 8 gives -0.0
    source   compressed-tensors 0.20 MXFP4PackedCompressor.decompress, ModelOpt 0.47 MXFP4QTensor.dequantize
    """
    _check_scale(packed, scale, GROUP_SIZE // 2)
    return unpack(packed, E8M0[np.repeat(scale, GROUP_SIZE // RUN, axis=1)], SIGNED_ZERO, dtype)


def decode_mxfp8(codes: npt.NDArray[np.uint8], scale: npt.NDArray[np.uint8], dtype: str) -> Array:
    """Dequantize MXFP8: e4m3 * 2**(scale - 127) in float32, then `dtype`.

    codes    uint8 [rows, cols] (E4M3 bits)
    scale    uint8 [rows, cols/32] (E8M0); multiplies; 255 makes the block NaN
    returns  [rows, cols] held as `floats.storage(dtype)`; a NaN code gives NaN
    source   compressed-tensors 0.20 MXFP8QuantizationCompressor.decompress, ModelOpt 0.47 MXFP8QTensor.dequantize
    """
    _check_scale(codes, scale, GROUP_SIZE)
    out, bits = _output(codes.shape, dtype)
    _decode_mxfp8(readonly(codes), E8M0[scale].reshape(-1), bits)
    return narrow(out, dtype) if dtype == "F16" else out


def decode_gpt_oss(blocks: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8], dtype: str) -> Array:
    """Dequantize experts as gpt-oss stores them, [N, K] each, into what it multiplies with, [K, N].

    blocks   uint8 [experts, N, K/32, 16], two codes to a byte, the lower column in the low nibble
    scales   uint8 [experts, N, K/32] (E8M0); multiplies; 255 makes the block NaN
    returns  [experts, K, N] held as `floats.storage(dtype)`; code 8 gives -0.0
    source   transformers 5 convert_moe_packed_tensors
    """
    if blocks.ndim != 4 or blocks.shape[3] != GROUP_SIZE // 2 or scales.shape != blocks.shape[:3]:
        raise ValueError(
            "gpt-oss needs blocks [experts, N, K/32, 16] and scales [experts, N, K/32], "
            f"got {list(blocks.shape)} and {list(scales.shape)}"
        )
    _check_bytes(blocks, scales)
    experts, rows, groups, _ = blocks.shape
    out, bits = _output((experts, groups * GROUP_SIZE, rows), dtype)
    for e in range(experts):
        expert = bits.reshape(experts, -1)[e]
        _decode_turned(readonly(blocks[e]), E8M0[scales[e]].reshape(-1), SIGNED_ZERO, rows, expert)
    return narrow(out, dtype) if dtype == "F16" else out


def _output(shape: tuple[int, ...], dtype: str) -> tuple[Array, Array]:
    """Array for the numbers (F32 where F16 is wanted: numpy rounds those) and its flat bits."""
    out = np.empty(shape, storage("F32" if dtype == "F16" else dtype))
    return out, out.reshape(-1).view(np.uint16 if dtype == "BF16" else np.uint32)


def _checked(values: Array, dtype: str, search: str) -> tuple[Array, str]:
    """The same numbers as BF16 or F32, whole blocks of 32."""
    if values.ndim != 2 or values.shape[1] % GROUP_SIZE:
        raise ValueError(f"mx needs a matrix whose columns are a multiple of {GROUP_SIZE}, got {list(values.shape)}")
    if search not in SEARCHES:
        raise ValueError(f"search must be one of {', '.join(SEARCHES)}, got {search!r}")
    return (widen(values, dtype), "F32") if dtype == "F16" else (values, dtype)


def _check_scale(codes: npt.NDArray[np.uint8], scale: npt.NDArray[np.uint8], width: int) -> None:
    """Refuse what the kernels, which read without bounds checks, would read past; width is a block in bytes."""
    expected = (*codes.shape[:1], codes.shape[-1] // width)
    if codes.ndim != 2 or codes.shape[1] % width or scale.shape != expected:
        raise ValueError(
            f"mx needs one scale for {GROUP_SIZE} columns: codes are {list(codes.shape)}, "
            f"so scale must be {list(expected)}, got {list(scale.shape)}"
        )
    _check_bytes(codes, scale)


def _check_bytes(codes: Array, scale: Array) -> None:
    if codes.dtype != np.uint8 or scale.dtype != np.uint8:
        raise ValueError(f"mx codes and scales are uint8 bits, got {codes.dtype} and {scale.dtype}")


@kernel
def _scales(x: Array, lift: np.uint32, offset: int, scale: Array) -> None:
    """E8M0 byte of each block of x [32 * n] (uint32 bits of float32).

    lift carries the exponent of amax up by one where its fraction is large enough; offset is that of
    the largest code.
    """
    for b in range(scale.size):
        m = np.uint32(0)
        for j in range(32):
            m = max(m, x[32 * b + j] & np.uint32(0x7FFFFFFF))
        exponent = np.int64(min(np.uint32(m + lift) >> np.uint32(23), np.uint32(254)))
        scale[b] = max(exponent - offset, 0)


@kernel
def _divide(x: Array, scale: Array) -> None:
    """Divide x [32 * n] float32 by the power of two of its block: multiply by 2**(127 - byte), which is as exact."""
    for b in range(scale.size):
        factor = np.uint32(np.uint32(254 - np.uint32(scale[b])) << np.uint32(23)).view(np.float32)
        for j in range(32):
            x[32 * b + j] *= factor


@kernel
def _lower(lanes: Array, scale: Array) -> None:
    """Lower the exponent of each block by one where that makes the squared error smaller."""
    steps = np.empty(scale.size, np.float32)
    own = np.empty(scale.size, np.float64)
    other = np.empty(scale.size, np.float64)
    for b in range(scale.size):
        steps[b] = E8M0[scale[b]]
    squared_errors(lanes, steps, own)
    for b in range(scale.size):
        steps[b] = E8M0[max(int(scale[b]) - 1, 0)]
    squared_errors(lanes, steps, other)
    for b in range(scale.size):
        if other[b] < own[b]:
            scale[b] -= 1


@kernel
def _lower_weighted(lanes: Array, weights: Array, scale: Array) -> None:
    """Lower the exponent of each block by one or two where that makes the weighted squared error smaller."""
    steps = np.empty(scale.size, np.float32)
    best = np.empty(scale.size, np.float64)
    errors = np.empty(scale.size, np.float64)
    first = scale.copy()
    for down in range(3):
        for b in range(scale.size):
            steps[b] = E8M0[max(int(first[b]) - down, 0)]
        weighted_errors(lanes, weights, steps, errors)
        for b in range(scale.size):
            if down == 0 or errors[b] < best[b]:
                best[b] = errors[b]
                scale[b] = max(int(first[b]) - down, 0)


@kernel
def _encode_mxfp4(bits: Array, search: bool, importance: Array, packed: Array, scale: Array) -> None:
    """Fill packed [n/2] and scale [n/32] from bits [n]; importance float64 [cols], empty for equal weights."""
    x = np.empty(TILE, np.uint32)
    q = np.empty(TILE, np.uint8)
    lanes = np.empty(TILE, np.float32)
    wide = np.empty(TILE if importance.size else 0, np.float64)
    for start in range(0, bits.size, TILE):
        stop = min(start + TILE, bits.size)
        n = stop - start
        exponents = scale[start // 32 : stop // 32]
        values = x[:n].view(np.float32)
        load_f32(bits[start:stop], x[:n])
        _scales(x[:n], np.uint32(0x200000), 2, exponents)  # f >= 1.75
        if search:
            to_lanes(values, lanes[:n], 32)
            if importance.size:
                column_lanes(importance, start, wide[:n], 32)
                _lower_weighted(lanes[:n], wide[:n], exponents)
            else:
                _lower(lanes[:n], exponents)
        _divide(values, exponents)
        for i in range(n):
            q[i] = magnitude_code(abs(values[i])) | (np.uint8(x[i] >> np.uint32(28)) & np.uint8(8))
        pack(q[:n], packed[start // 2 : stop // 2])


@kernel
def _encode_mxfp8(bits: Array, codes: Array, scale: Array) -> None:
    """Fill codes [n] and scale [n/32] from bits [n]."""
    x = np.empty(TILE, np.uint32)
    for start in range(0, bits.size, TILE):
        stop = min(start + TILE, bits.size)
        n = stop - start
        exponents = scale[start // 32 : stop // 32]
        load_f32(bits[start:stop], x[:n])
        _scales(x[:n], np.uint32(0x17FFFF), 8, exponents)  # f > 1.8125
        _divide(x[:n].view(np.float32), exponents)
        e4m3_codes(x[:n], _ONE, codes[start:stop])


@kernel
def _decode_mxfp8(codes: Array, steps: Array, out: Array) -> None:
    """Fill out [n] (uint16 BF16 or uint32 F32 bits) from codes [n] and steps [n/32] float32."""
    x = np.empty(TILE, np.uint32)
    for start in range(0, codes.size, TILE):
        stop = min(start + TILE, codes.size)
        n = stop - start
        values = x[:n].view(np.float32)
        load_e4m3(codes[start:stop], x[:n])
        for b in range(n // 32):
            step = steps[start // 32 + b]
            for j in range(32):
                values[32 * b + j] *= step
        store_f32(x[:n], out[start:stop])


@kernel
def _decode_turned(packed: Array, steps: Array, values: Array, rows: int, out: Array) -> None:
    """Fill out [cols * rows] from packed [rows * cols/2] and steps [rows * cols/32], in tiles of 32 by 64."""
    groups = steps.size // rows
    x = np.empty((32, 64), np.float32)
    for top in range(0, rows, 64):
        height = min(64, rows - top)
        for g in range(groups):
            for r in range(height):
                block = (top + r) * groups + g
                for k in range(16):
                    byte = packed[16 * block + k]
                    x[2 * k, r] = values[byte & 0xF] * steps[block]
                    x[2 * k + 1, r] = values[byte >> 4] * steps[block]
            for j in range(32):
                at = (32 * g + j) * rows + top
                store_f32(x[j, :height].view(np.uint32), out[at : at + height])
