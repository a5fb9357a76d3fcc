"""FP8 (E4M3) on CUDA: see `numerics.fp8` for the format, whose bytes these kernels reproduce."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mso_hub.formats.numerics.cuda.floats import EXACT, e4m3_to_f32, loadable, require_device, store_f32

_TILE = 1024  # columns


def decode(codes: Tensor, scale: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Dequantize: e4m3(code) * scale in float32, rounded once to `dtype`.

    codes    U8 [rows, cols], E4M3 bits; a NaN code gives NaN
    scale    F32 [ceil(rows/size[0]), ceil(cols/size[1])]; multiplies
    size     rows and columns under one scale: (rows, cols) for one scale per tensor, (1, cols) for one per row
    returns  `dtype` [rows, cols]
    """
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise ValueError(f"codes must be a matrix of uint8 bits, got {codes.dtype} {list(codes.shape)}")
    rows, cols = codes.shape
    expected = [-(-rows // size[0]), -(-cols // size[1])]
    if scale.dtype != torch.float32 or list(scale.shape) != expected:
        raise ValueError(f"scale must be float32 {expected}, got {scale.dtype} {list(scale.shape)}")
    require_device(codes)
    out = torch.empty((rows, cols), dtype=dtype, device=codes.device)
    target = loadable(out)
    if out.numel():
        grid = (rows, triton.cdiv(cols, _TILE))
        arguments = (codes.contiguous(), scale.contiguous(), target, cols, expected[1], size[0])
        _decode[grid](*arguments, SIZE_COLS=min(size[1], cols) % cols, TILE=_TILE, **EXACT)
    return out


@triton.jit
def _decode(
    codes: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    cols: tl.tensor,
    scale_cols: tl.tensor,
    size_rows: tl.tensor,
    SIZE_COLS: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
) -> None:
    """Fill out [rows, cols] from codes [rows, cols] and scale [.., scale_cols]; SIZE_COLS 0 means whole rows."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    live = k < cols
    code = tl.load(codes + row * cols + k, mask=live, other=0)
    cell = k // SIZE_COLS if SIZE_COLS else k * 0
    step = tl.load(scale + row // size_rows * scale_cols + cell, mask=live, other=0)
    store_f32(out + row * cols + k, e4m3_to_f32(code) * step, live)
