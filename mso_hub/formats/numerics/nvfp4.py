"""NVFP4 on the CPU: blocks of 16 four-bit floats under an E4M3 scale under one F32 scale.

    w ~= e2m1[code] * weight_scale * weight_scale_2

    E2M1 magnitude codes      0    1    2    3    4    5    6    7      bit 3 of a code is the sign
    values                    0   .5    1  1.5    2    3    4    6
    a code begins at             .25  .75 1.25 1.75  2.5  3.5    5      tie -> even code

Byte layout, for w [rows, cols]: packed U8 [rows, cols/2], even column in the low nibble; weight_scale
E4M3 [rows, cols/16], linear (not swizzled); weight_scale_2 one F32, a multiplier. All arithmetic is
float32 with true divisions. Codes and scales equal those of NVIDIA ModelOpt 0.47
(NVFP4QTensor.quantize) byte for byte; `reference` is the same algorithm in plain torch.

Since cols is a multiple of 16 no block crosses a row, so the kernels see a flat list of blocks.
They work on tiles that stay in the first-level cache: each loop over a tile does one thing, which
is what lets LLVM turn it into vector code.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mso_hub.formats.numerics.floats import (
    E4M3,
    Array,
    e4m3_from_f32,
    flat_bits,
    load_f32,
    narrow,
    storage,
    store_f32,
    widen,
)
from mso_hub.formats.numerics.kernel import kernel

GROUP_SIZE = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0

SEARCHES = ("absmax", "mse")
"""How a block scale is chosen: from its largest magnitude, or by trying nine neighbours."""

_TILE = 2048  # elements: 8 KiB as float32
_OFFSETS = np.array([-1, 1, -2, 2, 3, 4, 5, 6], np.int64)
_MODELOPT = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# compressed-tensors multiplies by the sign, so its code 8 is -0.0 where ModelOpt's table says 0.0.
_COMPRESSED_TENSORS = np.copysign(_MODELOPT, np.repeat(np.array([1, -1], np.float32), 8))


def global_scale(amax: float) -> np.float32:
    """Global scale `weight_scale_2` that lets block scales use the whole E4M3 range.

    amax     largest |w| over every tensor that shares the scale (q, k and v give one amax)
    returns  float32 amax / (6 * 448), a multiplier: w ~= e2m1 * weight_scale * weight_scale_2
    zero     1.0 when the quotient is 0 (all-zero tensor, or underflow), so nothing divides by zero
    source   ModelOpt 0.47 NVFP4QTensor.get_weights_scaling_factor_2, which has no such guard
    """
    if not np.isfinite(amax) or amax < 0:
        raise ValueError(f"amax must be finite and >= 0, got {amax}; look for NaN or Inf in the tensor")
    scale = np.float32(amax) / np.float32(E2M1_MAX * E4M3_MAX)
    return np.float32(1.0) if scale == 0 else np.float32(scale)


def encode(
    values: Array, dtype: str, global_scale: np.float32, *, search: str = "absmax"
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Quantize a matrix: codes and block scales for one given global scale.

    values        [rows, cols] finite, cols % 16 == 0, held as `floats.storage(dtype)`
    global_scale  positive float32 multiplier, see `global_scale`
    search        "absmax": s = e4m3(clamp(amax_block / (6 * global_scale), 2**-9, 448)), a zero
                  block gets 1.0. "mse": of the E4M3 codes from two below to six above that one,
                  kept inside 1..126, the code whose sum over the block of (w - dequantized)**2 is
                  smallest; the differences are float32, the sum is float64 in column order. Ties
                  go to the absmax code, then to the nearest code, then to the lower one.
    returns       packed uint8 [rows, cols/2], weight_scale uint8 [rows, cols/16] (E4M3 bits)
    direction     both scales multiply: code = rne_e2m1(w / (weight_scale * global_scale))
    source        absmax: ModelOpt 0.47; mse: its 126-code sweep, limited to the useful nine codes
    """
    if values.ndim != 2 or values.shape[1] % GROUP_SIZE:
        raise ValueError(f"nvfp4 needs a matrix whose columns are a multiple of {GROUP_SIZE}, got {list(values.shape)}")
    if search not in SEARCHES:
        raise ValueError(f"search must be one of {', '.join(SEARCHES)}, got {search!r}")
    if not (np.isfinite(global_scale) and global_scale > 0):
        raise ValueError(f"global_scale must be a positive number, got {global_scale}")
    if dtype == "F16":
        values, dtype = widen(values, dtype), "F32"
    rows, cols = values.shape
    packed = np.empty((rows, cols // 2), np.uint8)
    scale = np.empty((rows, cols // GROUP_SIZE), np.uint8)
    run = _encode_absmax if search == "absmax" else _encode_mse
    run(flat_bits(values, dtype), np.float32(global_scale), packed.reshape(-1), scale.reshape(-1))
    return packed, scale


def decode(packed: npt.NDArray[np.uint8], scale: npt.NDArray[np.uint8], multiplier: np.float32, dtype: str) -> Array:
    """Dequantize ModelOpt's layout: e2m1 * (weight_scale * multiplier) in float32, then `dtype`.

    packed      uint8 [rows, cols/2], even column in the low nibble
    scale       uint8 [rows, cols/16], E4M3 bits; multiplies
    multiplier  float32 weight_scale_2; multiplies
    returns     [rows, cols] held as `floats.storage(dtype)`; code 8 gives +0.0
    source      ModelOpt 0.47 NVFP4QTensor.dequantize
    """
    _check_scale(packed, scale)
    with np.errstate(all="ignore"):  # a step beyond float32 is infinite, as in torch
        steps = E4M3[scale] * np.float32(multiplier)
    return _decode_as(packed, steps, _MODELOPT, dtype)


def decode_divided(
    packed: npt.NDArray[np.uint8], scale: npt.NDArray[np.uint8], divisor: np.float32, dtype: str
) -> Array:
    """Dequantize compressed-tensors' layout: e2m1 * (weight_scale / divisor) in float32, then `dtype`.

    packed      uint8 [rows, cols/2], even column in the low nibble
    scale       uint8 [rows, cols/16], E4M3 bits; multiplies
    divisor     float32 weight_global_scale = 6 * 448 / amax; divides
    returns     [rows, cols] held as `floats.storage(dtype)`; code 8 gives -0.0
    source      compressed-tensors 0.20 NVFP4PackedCompressor.decompress
    """
    _check_scale(packed, scale)
    with np.errstate(all="ignore"):  # a step beyond float32 is infinite, as in torch
        steps = E4M3[scale] / np.float32(divisor)
    return _decode_as(packed, steps, _COMPRESSED_TENSORS, dtype)


def _check_scale(packed: npt.NDArray[np.uint8], scale: npt.NDArray[np.uint8]) -> None:
    """Refuse what the kernel, which reads without bounds checks, would read past."""
    expected = (*packed.shape[:1], packed.shape[-1] // 8)
    if packed.ndim != 2 or packed.shape[1] % 8 or scale.shape != expected:
        raise ValueError(
            f"nvfp4 needs one scale for {GROUP_SIZE} columns: packed is {list(packed.shape)}, "
            f"so scale must be {list(expected)}, got {list(scale.shape)}"
        )
    if packed.dtype != np.uint8 or scale.dtype != np.uint8:
        raise ValueError(f"nvfp4 codes and scales are uint8 bits, got {packed.dtype} and {scale.dtype}")


def _decode_as(packed: npt.NDArray[np.uint8], steps: npt.NDArray[np.float32], values: Array, dtype: str) -> Array:
    """Look up `values` [16] for each code, times the step of its block; F16 is rounded by numpy."""
    rows, half = packed.shape
    out = np.empty((rows, 2 * half), storage("F32" if dtype == "F16" else dtype))
    bits = out.reshape(-1).view(np.uint16 if dtype == "BF16" else np.uint32)
    codes = np.ascontiguousarray(packed).reshape(-1)
    codes.flags.writeable = False  # one compiled kernel for every caller, see `floats.flat_bits`
    _decode(codes, steps.reshape(-1), values, bits)
    return narrow(out, dtype) if dtype == "F16" else out


@kernel
def _absmax_codes(x: Array, global_scale: np.float32, codes: Array, scratch: Array) -> None:
    """E4M3 code of amax / (6 * global_scale) for each block of x [16 * n] (uint32 bits)."""
    largest = scratch.view(np.uint32)
    for b in range(codes.size):
        m = np.uint32(0)
        for j in range(16):
            m = max(m, x[16 * b + j] & np.uint32(0x7FFFFFFF))
        largest[b] = m
    six = np.float32(E2M1_MAX) * global_scale
    for b in range(codes.size):
        s = scratch[b] / six
        if s == np.float32(0.0):
            s = np.float32(1.0)
        codes[b] = e4m3_from_f32(min(max(s, np.float32(2.0**-9)), np.float32(E4M3_MAX)))


@kernel
def _pack_tile(x: Array, codes: Array, global_scale: np.float32, q: Array, packed: Array) -> None:
    """E2M1 codes of x [16 * n] float32 under the block scales `codes` [n], two to a byte.

    q is scratch of 16 * n bytes, one code each; packed [8 * n] is the result.
    """
    for b in range(codes.size):
        step = E4M3[codes[b]] * global_scale
        for j in range(16):
            signed = x[16 * b + j] / step
            y = abs(signed)
            # Seven thresholds; > keeps a tie at the lower code, >= lifts it: both land on even.
            code = (
                np.uint8(y > 0.25)
                + np.uint8(y >= 0.75)
                + np.uint8(y > 1.25)
                + np.uint8(y >= 1.75)
                + np.uint8(y > 2.5)
                + np.uint8(y >= 3.5)
                + np.uint8(y > 5.0)
            )
            # Not the sign bit: a quotient of -0.0 becomes code 0, one just below zero becomes code 8.
            q[16 * b + j] = code | (np.uint8(signed < 0.0) << 3)
    pairs = q.view(np.uint16)
    for k in range(packed.size):
        packed[k] = (pairs[k] & np.uint16(0xF)) | (pairs[k] >> np.uint16(4))


@kernel
def _encode_absmax(bits: Array, global_scale: np.float32, packed: Array, scale: Array) -> None:
    """Fill packed [n/2] and scale [n/16] from bits [n], block scales from the block maxima."""
    x = np.empty(_TILE, np.uint32)
    q = np.empty(_TILE, np.uint8)
    scratch = np.empty(_TILE // 16, np.float32)
    for start in range(0, bits.size, _TILE):
        stop = min(start + _TILE, bits.size)
        n = stop - start
        codes = scale[start // 16 : stop // 16]
        load_f32(bits[start:stop], x[:n])
        _absmax_codes(x[:n], global_scale, codes, scratch)
        _pack_tile(x[:n].view(np.float32), codes, global_scale, q[:n], packed[start // 2 : stop // 2])


@kernel
def _errors(lanes: Array, codes: Array, global_scale: np.float32, errors: Array) -> None:
    """Sum of squared errors of each block under the scales `codes` [n], into errors [n] float64.

    lanes [16 * n] float32 holds |x| of all first columns, then of all second columns and so on: one
    vector instruction works on several blocks while each block still adds its 16 squares in column
    order. The square of a float32 is exact in float64: only the order of the sum matters, not
    whether the multiplication and the addition are fused.
    """
    steps = np.empty(codes.size, np.float32)
    for b in range(codes.size):
        steps[b] = E4M3[codes[b]] * global_scale
        errors[b] = 0.0
    for j in range(16):
        column = lanes[j * codes.size : (j + 1) * codes.size]
        for b in range(codes.size):
            y = column[b] / steps[b]
            # The spacing of E2M1 is .5 below 2, 1 below 4, then 2. Adding 2**23 spacings rounds
            # to a multiple of the spacing, ties to even: the values of `_pack_tile`.
            big = np.float32(2.0**24)
            if y < np.float32(4.0):
                big = np.float32(2.0**23)
            if y < np.float32(2.0):
                big = np.float32(2.0**22)
            near = min((y + big) - big, np.float32(E2M1_MAX))
            error = np.float64(column[b] - near * steps[b])
            errors[b] += error * error


@kernel
def _search(lanes: Array, codes: Array, global_scale: np.float32) -> None:
    """Replace each absmax code in codes [n] by the best of its neighbours; see `encode`."""
    first = codes.copy()
    candidate = np.empty_like(codes)
    best = np.empty(codes.size, np.float64)
    errors = np.empty(codes.size, np.float64)
    _errors(lanes, codes, global_scale, best)
    for offset in _OFFSETS:
        for b in range(codes.size):
            candidate[b] = min(max(np.int64(first[b]) + offset, 1), 126)
        _errors(lanes, candidate, global_scale, errors)
        for b in range(codes.size):
            if errors[b] < best[b]:
                best[b] = errors[b]
                codes[b] = candidate[b]


@kernel
def _encode_mse(bits: Array, global_scale: np.float32, packed: Array, scale: Array) -> None:
    """Fill packed [n/2] and scale [n/16] from bits [n], block scales by the nine-code search."""
    x = np.empty(_TILE, np.uint32)
    q = np.empty(_TILE, np.uint8)
    scratch = np.empty(_TILE // 16, np.float32)
    lanes = np.empty(_TILE, np.float32)
    for start in range(0, bits.size, _TILE):
        stop = min(start + _TILE, bits.size)
        n = stop - start
        codes = scale[start // 16 : stop // 16]
        load_f32(bits[start:stop], x[:n])
        _absmax_codes(x[:n], global_scale, codes, scratch)
        values = x[:n].view(np.float32)
        for b in range(codes.size):
            for j in range(16):
                lanes[j * codes.size + b] = abs(values[16 * b + j])
        _search(lanes[:n], codes, global_scale)
        _pack_tile(values, codes, global_scale, q[:n], packed[start // 2 : stop // 2])


@kernel
def _decode(packed: Array, steps: Array, values: Array, out: Array) -> None:
    """Fill out [n] (uint16 BF16 or uint32 F32 bits) from packed [n/2] and steps [n/16] float32."""
    x = np.empty(_TILE, np.float32)
    for start in range(0, packed.size, _TILE // 2):
        stop = min(start + _TILE // 2, packed.size)
        for b in range((stop - start) // 8):
            step = steps[start // 8 + b]
            for k in range(8):
                byte = packed[start + 8 * b + k]
                x[16 * b + 2 * k] = values[byte & 0xF] * step
                x[16 * b + 2 * k + 1] = values[byte >> 4] * step
        store_f32(x[: 2 * (stop - start)].view(np.uint32), out[2 * start : 2 * stop])
