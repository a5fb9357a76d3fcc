"""NVFP4 on the CPU: blocks of 16 four-bit floats under an E4M3 scale under one F32 scale.

    w ~= e2m1[code] * weight_scale * weight_scale_2

Byte layout, for w [rows, cols]: packed U8 [rows, cols/2], even column in the low nibble; weight_scale
E4M3 [rows, cols/16], linear (not swizzled); weight_scale_2 one F32, a multiplier. All arithmetic is
float32 with true divisions. With search "absmax" codes and scales equal those of NVIDIA ModelOpt 0.47
(NVFP4QTensor.quantize) byte for byte; `reference` is the same algorithm in plain torch.

Since cols is a multiple of 16 no block crosses a row, so the kernels see a flat list of blocks. The codes are
explained in `e2m1`, the choice of scales in `nvfp4_search`.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from mso_hub.formats.numerics.e2m1 import E2M1_MAX, PLAIN_ZERO, RUN, SIGNED_ZERO, column_weights, unpack
from mso_hub.formats.numerics.floats import E4M3, Array, flat_bits, widen
from mso_hub.formats.numerics.nvfp4_search import (
    E4M3_MAX,
    FOUR_OVER_SIX,
    MSE,
    POWER,
    encode_absmax,
    encode_searched,
    exponent_of_sixth,
)

GROUP_SIZE = RUN
FOUR_OVER_SIX_MAX = 256.0

_SEARCHED = {"mse": MSE, "four_over_six": FOUR_OVER_SIX, "power": POWER}
SEARCHES = ("absmax", *_SEARCHED)
"""How a block scale is chosen, see `encode`; "power" is for weights that were MXFP4."""


def global_scale(amax: float, *, search: str = "absmax") -> np.float32:
    """Global scale `weight_scale_2` for one way of choosing block scales.

    amax     largest |w| over every tensor that shares the scale (q, k and v give one amax)
    returns  float32 multiplier, w ~= e2m1 * weight_scale * weight_scale_2:
             amax / (6 * 448), with which block scales use the whole E4M3 range;
             "four_over_six": amax / (6 * 256), so that 1.5 times the largest block scale is still an E4M3 number;
             "power": `power_scale`
    zero     1.0 when the quotient is 0 (all-zero tensor, or underflow), so nothing divides by zero
    source   ModelOpt 0.47 NVFP4QTensor.get_weights_scaling_factor_2 and numeric_utils.fp8_max_for_normalization,
             which have no such guard; four over six: arXiv 2512.02010
    """
    _check_search(search)
    if not np.isfinite(amax) or amax < 0:
        raise ValueError(f"amax must be finite and >= 0, got {amax}; look for NaN or Inf in the tensor")
    if search == "power":
        return power_scale(amax)
    largest = FOUR_OVER_SIX_MAX if search == "four_over_six" else E4M3_MAX
    scale = np.float32(amax) / np.float32(E2M1_MAX * largest)
    return np.float32(1.0) if scale == 0 else np.float32(scale)


def power_scale(amax: float) -> np.float32:
    """Global scale for weights that were MXFP4: the power of two 2**(ceil(log2(amax / 6)) - 8).

    amax     largest |w| over every tensor that shares the scale, finite and >= 0
    returns  float32 multiplier; under it the E4M3 numbers 2**-9 .. 2**8 are the steps of MXFP4 blocks from the largest
             to 17 binades below it. Not below 2**-140, where the smallest step is float32's smallest number; 1.0 for 0
    source   ModelOpt 0.47 numeric_utils.mxfp4_to_nvfp4_global_amax, which takes the exponent of the scales instead
    """
    return np.float32(math.ldexp(1.0, max(exponent_of_sixth(float(amax)) - 8, -140)) if amax else 1.0)


def encode(
    values: Array,
    dtype: str,
    global_scale: np.float32,
    *,
    search: str = "absmax",
    importance: npt.NDArray[np.float64] | None = None,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Quantize a matrix: codes and block scales for one given global scale.

    values        [rows, cols] finite, cols % 16 == 0, held as `floats.storage(dtype)`
    global_scale  positive float32 multiplier, see `global_scale`
    search        "absmax": s = e4m3(clamp(amax_block / (6 * global_scale), 2**-9, 448)), a zero
                  block gets 1.0. "mse": of the E4M3 codes from two below to six above that one,
                  kept inside 1..126, the code whose sum over the block of (w - dequantized)**2 is
                  smallest; the differences are float32, the sum is float64 in column order. Ties
                  go to the absmax code, then to the nearest code, then to the lower one. A block
                  with code 126 keeps it. "four_over_six": that code, or that of amax_block / (4 *
                  global_scale) where its sum is smaller. "power": 2**ceil(log2(amax_block / 6)) where
                  that is a scale that loses nothing, otherwise as "mse".
    importance    [cols] numbers >= 0, only with "mse": the squares are multiplied by that of their column
    returns       packed uint8 [rows, cols/2], weight_scale uint8 [rows, cols/16] (E4M3 bits)
    direction     both scales multiply: code = rne_e2m1(w / (weight_scale * global_scale))
    stable        encoding what `decode` gives, in any dtype in which it is normal and with the global
                  scale of its own amax, gives the same bytes, but 0 for code 8; `nvfp4_search` says why.
                  Of "absmax" that is true above the third E4M3 number and where not all codes are 0, of
                  "power" where nothing was lost or the global scale is the same
    raises        ValueError for another shape, search or global scale; "power" needs a power of two
    source        absmax: ModelOpt 0.47; mse: its 126-code sweep, limited to the useful nine codes;
                  four_over_six: arXiv 2512.02010; power: ModelOpt 0.47 shard_cast_utils
    """
    if values.ndim != 2 or values.shape[1] % GROUP_SIZE:
        raise ValueError(f"nvfp4 needs a matrix whose columns are a multiple of {GROUP_SIZE}, got {list(values.shape)}")
    _check_search(search)
    if not (np.isfinite(global_scale) and global_scale > 0):
        raise ValueError(f"global_scale must be a positive number, got {global_scale}")
    if search == "power" and math.frexp(global_scale)[0] != 0.5:
        raise ValueError(f"search power needs a global_scale that is a power of two, got {global_scale}: `power_scale`")
    if dtype == "F16":
        values, dtype = widen(values, dtype), "F32"
    rows, cols = values.shape
    packed = np.empty((rows, cols // 2), np.uint8)
    scale = np.empty((rows, cols // GROUP_SIZE), np.uint8)
    bits, factor = flat_bits(values, dtype), np.float32(global_scale)
    if search == "absmax":
        column_weights(importance, cols, search)
        encode_absmax(bits, factor, packed.reshape(-1), scale.reshape(-1))
    else:
        weights = column_weights(importance, cols, search)
        encode_searched(bits, factor, _SEARCHED[search], weights, packed.reshape(-1), scale.reshape(-1))
    return packed, scale


def count_inexact(
    values: Array,
    dtype: str,
    packed: npt.NDArray[np.uint8],
    scale: npt.NDArray[np.uint8],
    global_scale: np.float32,
) -> int:
    """Number of blocks of 16 in which some number was changed by encoding.

    values  [rows, cols] as they were, held as `floats.storage(dtype)`; packed, scale and global_scale as in `decode`,
    which is compared in float32. Zeros of either sign are equal.
    """
    there = decode(packed, scale, global_scale, "F32")
    changed = widen(values, dtype) != there
    return int(changed.reshape(-1, GROUP_SIZE).any(axis=1).sum())


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
    return unpack(packed, steps, PLAIN_ZERO, dtype)


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
    return unpack(packed, steps, SIGNED_ZERO, dtype)


def _check_search(search: str) -> None:
    if search not in SEARCHES:
        raise ValueError(f"search must be one of {', '.join(SEARCHES)}, got {search!r}")


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
