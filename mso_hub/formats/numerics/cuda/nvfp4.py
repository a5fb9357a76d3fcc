"""NVFP4 on CUDA: see `numerics.nvfp4` for the format, whose bytes these kernels reproduce.

A matrix is a flat list of blocks of 16; one program of a kernel works on a tile of them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mso_hub.formats.numerics.cuda.floats import (
    e4m3_to_f32,
    launch,
    load_f32,
    loadable,
    require_device,
    scalar,
    store_f32,
)
from mso_hub.formats.numerics.cuda.nvfp4_search import (
    absmax_codes,
    best_of_nine,
    best_of_two,
    e2m1_codes,
    powers_or_best,
    settle,
)
from mso_hub.formats.numerics.nvfp4 import SEARCHES

GROUP_SIZE = 16

_TILE = 128  # blocks


def encode(values: Tensor, global_scale: float, *, search: str = "absmax") -> tuple[Tensor, Tensor]:
    """Codes and block scales of a matrix, byte for byte those of `numerics.nvfp4.encode`.

    values        BF16, F16 or F32 [rows, cols], contiguous, finite, cols % 16 == 0
    global_scale  positive float32 multiplier, see `numerics.nvfp4.global_scale`
    search        "absmax", "mse", "four_over_six" or "power"
    returns       packed U8 [rows, cols/2] (even column in the low nibble), scale U8 [rows, cols/16] (E4M3 bits)
    direction     both scales multiply: code = rne_e2m1(w / (weight_scale * global_scale))
    """
    if values.ndim != 2 or values.shape[1] % GROUP_SIZE:
        raise ValueError(f"nvfp4 needs a matrix whose columns are a multiple of {GROUP_SIZE}, got {list(values.shape)}")
    if search not in SEARCHES:
        raise ValueError(f"search must be one of {', '.join(SEARCHES)}, got {search!r}")
    if not (math.isfinite(global_scale) and global_scale > 0):
        raise ValueError(f"global_scale must be a positive number, got {global_scale}")
    if search == "power" and math.frexp(global_scale)[0] != 0.5:
        raise ValueError(f"search power needs a global_scale that is a power of two, got {global_scale}")
    rows, cols = values.shape
    packed = torch.empty((rows, cols // 2), dtype=torch.uint8, device=values.device)
    scale = torch.empty((rows, cols // GROUP_SIZE), dtype=torch.uint8, device=values.device)
    stored = loadable(values)
    if scale.numel():
        grid = (triton.cdiv(scale.numel(), _TILE),)
        arguments = (stored, scalar(global_scale, values), packed, scale, scale.numel())
        launch(_encode, grid, *arguments, search=SEARCHES.index(search), tile=_TILE)
    return packed, scale


def decode(packed: Tensor, scale: Tensor, multiplier: float, dtype: torch.dtype) -> Tensor:
    """Dequantize ModelOpt's layout: e2m1 * (weight_scale * multiplier) in float32, then `dtype`.

    packed      U8 [rows, cols/2], even column in the low nibble
    scale       U8 [rows, cols/16], E4M3 bits; multiplies
    multiplier  float32 weight_scale_2; multiplies
    returns     `dtype` [rows, cols]; code 8 gives +0.0
    """
    return _decode_as(packed, scale, multiplier, dtype, divided=False)


def decode_divided(packed: Tensor, scale: Tensor, divisor: float, dtype: torch.dtype) -> Tensor:
    """Dequantize compressed-tensors' layout: e2m1 * (weight_scale / divisor) in float32, then `dtype`.

    packed      U8 [rows, cols/2], even column in the low nibble
    scale       U8 [rows, cols/16], E4M3 bits; multiplies
    divisor     float32 weight_global_scale = 6 * 448 / amax; divides
    returns     `dtype` [rows, cols]; code 8 gives -0.0
    """
    return _decode_as(packed, scale, divisor, dtype, divided=True)


def _decode_as(packed: Tensor, scale: Tensor, factor: float, dtype: torch.dtype, *, divided: bool) -> Tensor:
    """Check the shapes, then run the kernel of both layouts."""
    expected = [packed.shape[0], packed.shape[1] * 2 // GROUP_SIZE] if packed.ndim == 2 else None
    if expected is None or packed.shape[1] * 2 % GROUP_SIZE or list(scale.shape) != expected:
        raise ValueError(
            f"packed must be [rows, 8 * n] and scale [rows, n], got {list(packed.shape)} and {list(scale.shape)}"
        )
    if packed.dtype != torch.uint8 or scale.dtype != torch.uint8:
        raise ValueError(f"packed codes and E4M3 scales are uint8 bits, got {packed.dtype} and {scale.dtype}")
    require_device(packed)
    out = torch.empty((packed.shape[0], 2 * packed.shape[1]), dtype=dtype, device=packed.device)
    if scale.numel():
        grid = (triton.cdiv(scale.numel(), _TILE),)
        codes, scales, target = packed.contiguous(), scale.contiguous(), loadable(out)
        factors = scalar(factor, packed)
        launch(_decode, grid, codes, scales, factors, target, scale.numel(), divided=divided, tile=_TILE)
    return out


@triton.jit
def _encode(
    x: tl.tensor,
    global_scale: tl.tensor,
    packed: tl.tensor,
    scale: tl.tensor,
    blocks: tl.tensor,
    search: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Fill packed [8 * blocks] and scale [blocks] from x [16 * blocks]; search is a number in SEARCHES."""
    block = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    live = block < blocks
    values = load_f32(x + block[:, None] * 16 + tl.arange(0, 16)[None, :], live[:, None])
    g = tl.load(global_scale)
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # ordered like the magnitudes
    largest = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
    codes = absmax_codes(largest, g)
    if search == 1:
        codes = best_of_nine(x + block * 16, live, largest, g, codes)
    if search == 2:
        codes = best_of_two(x + block * 16, live, largest, g, codes)
    if search == 3:
        codes = powers_or_best(x + block * 16, live, values, largest, g, codes)
    q = e2m1_codes(values, (e4m3_to_f32(codes) * g)[:, None])
    if search > 0:
        codes, q = settle(codes, q)
    tl.store(scale + block, codes.to(tl.uint8), mask=live)
    low, high = tl.split(tl.reshape(q, (tile, 8, 2)))
    byte = (low | (high << 4)).to(tl.uint8)
    tl.store(packed + block[:, None] * 8 + tl.arange(0, 8)[None, :], byte, mask=live[:, None])


@triton.jit
def _e2m1_values(code: tl.tensor, negative_zero: tl.constexpr) -> tl.tensor:
    """float32 values of int32 E2M1 codes; code 8 is -0.0 or +0.0."""
    m = code & 7
    bits = tl.where(m < 2, m * 0x3F000000, ((m >> 1) + 126 << 23) | ((m & 1) << 22))
    sign = (code & 8) << 28
    if not negative_zero:
        sign = tl.where(m == 0, 0, sign)
    return (bits | sign).to(tl.float32, bitcast=True)


@triton.jit
def _decode(
    packed: tl.tensor,
    scale: tl.tensor,
    factor: tl.tensor,
    out: tl.tensor,
    blocks: tl.tensor,
    divided: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Fill out [16 * blocks] from packed [8 * blocks] and scale [blocks]."""
    block = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    live = block < blocks
    step = e4m3_to_f32(tl.load(scale + block, mask=live, other=0))
    step = tl.div_rn(step, tl.load(factor)) if divided else step * tl.load(factor)
    byte = tl.load(packed + block[:, None] * 8 + tl.arange(0, 8)[None, :], mask=live[:, None], other=0).to(tl.int32)
    code = tl.reshape(tl.join(byte & 15, byte >> 4), (tile, 16))
    value = _e2m1_values(code, divided) * step[:, None]
    store_f32(out + block[:, None] * 16 + tl.arange(0, 16)[None, :], value, live[:, None])
