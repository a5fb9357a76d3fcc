"""FP8 (E4M3) on CUDA: see `numerics.fp8` for the format, whose bytes these kernels reproduce."""

from __future__ import annotations

import math

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from mso_hub.formats.numerics.cuda.floats import (
    e4m3_codes,
    e4m3_to_f32,
    launch,
    load_f32,
    loadable,
    precision,
    require_device,
    round_f32,
    scalar,
    store_f32,
)
from mso_hub.formats.numerics.cuda.fp8_search import absmax, best, find, image, places
from mso_hub.formats.numerics.fp8 import BLOCK, SEARCHES
from mso_hub.formats.numerics.fp8_search import GRID

_TILE = 1024  # columns
_TILES = {True: (1, 1024), False: (8, 128)}  # rows and columns of a piece of a cell of one row, of several


def encode_rows(values: Tensor, scale_dtype: torch.dtype, *, search: str = "absmax") -> tuple[Tensor, Tensor]:
    """Codes of a matrix with one scale a row, byte for byte those of `numerics.fp8.encode_rows`.

    values       BF16, F16 or F32 [rows, cols], contiguous, finite
    scale_dtype  bfloat16, float16 or float32, the dtype in which the scales will be stored
    search       "absmax" or "mse"
    returns      codes U8 [rows, cols] (E4M3 bits), scale F32 [rows, 1], rounded to scale_dtype
    direction    the scale multiplies: code = rne_e4m3(clamp(w / scale, -448, 448))
    raises       ValueError when amax / 448 rounds to 0 or to infinity in scale_dtype
    """
    return _encode_as(values, scale_dtype, (1, values.shape[-1]), search)


def encode_blocks(
    values: Tensor, scale_dtype: torch.dtype, *, size: tuple[int, int] = BLOCK, search: str = "absmax"
) -> tuple[Tensor, Tensor]:
    """Codes of a matrix with one scale a block; as `encode_rows`, but for the shape of the cells.

    values   [rows, cols], beginning at a multiple of size[0] rows
    size     rows and columns of a block; blocks at the lower and right edge may be smaller
    returns  codes U8 [rows, cols], scale F32 [ceil(rows / size[0]), ceil(cols / size[1])]
    """
    return _encode_as(values, scale_dtype, size, search)


def encode_tensor(values: Tensor, scale: float) -> Tensor:
    """Codes U8 (E4M3 bits) of numbers of any shape under one given scale, as `numerics.fp8.encode_tensor`.

    values   BF16, F16 or F32, contiguous, finite
    scale    positive float32 multiplier, see `numerics.fp8.tensor_scale`
    """
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number, got {scale}")
    stored = loadable(values)
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    if codes.numel():
        grid = (triton.cdiv(codes.numel(), _TILE),)
        arguments = (stored, scalar(scale, values), codes, codes.numel())
        launch(_encode_tensor, grid, *arguments, precision=precision(values.dtype), tile=_TILE)
    return codes


def decode(codes: Tensor, scale: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Dequantize: e4m3(code) * scale in float32, rounded once to `dtype`.

    codes    U8 [rows, cols], E4M3 bits; a NaN code gives NaN
    scale    F32 [ceil(rows / size[0]), ceil(cols / size[1])]; multiplies
    size     rows and columns that share a scale: (rows, cols) for a tensor, (1, cols) for rows, (128, 128) for blocks
    returns  `dtype` [rows, cols]
    """
    _check_matrix(codes, size)
    rows, cols = codes.shape
    expected = (-(-rows // size[0]), -(-cols // size[1]))
    if codes.dtype != torch.uint8 or scale.dtype != torch.float32:
        raise ValueError(f"fp8 codes are uint8 bits and scales float32, got {codes.dtype} and {scale.dtype}")
    if scale.shape != expected:
        raise ValueError(
            f"fp8 needs one scale for {size[0]} rows and {size[1]} columns: codes are {list(codes.shape)}, "
            f"so scale must be {list(expected)}, got {list(scale.shape)}"
        )
    require_device(codes)
    out = torch.empty((rows, cols), dtype=dtype, device=codes.device)
    arguments = (codes.contiguous(), scale.contiguous(), loadable(out), cols, expected[1], size[0])
    width = 0 if size[1] >= cols else size[1]
    launch(_decode, (rows, triton.cdiv(cols, _TILE)), *arguments, width=width, tile=_TILE)
    return out


def _encode_as(values: Tensor, scale_dtype: torch.dtype, size: tuple[int, int], search: str) -> tuple[Tensor, Tensor]:
    """Check, run the kernel, and name the cell whose scale cannot be stored."""
    _check_matrix(values, size)
    if search not in SEARCHES:
        raise ValueError(f"search must be one of {', '.join(SEARCHES)}, got {search!r}")
    rows, cols = values.shape
    height, width = min(size[0], rows), min(size[1], cols)
    stored, grid = loadable(values), (triton.cdiv(rows, height), triton.cdiv(cols, width))
    codes = torch.empty((rows, cols), dtype=torch.uint8, device=values.device)
    scale = torch.empty(grid, dtype=torch.float32, device=values.device)
    multiples = torch.from_numpy(np.pad(GRID, (0, 32 - GRID.size))).to(values.device)
    tile_rows, tile_cols = _TILES[height == 1]
    launch(
        _encode_cells, grid, stored, codes, scale, multiples, rows, cols, height, width, grid[1],
        mse=search == "mse", precision=precision(values.dtype), scale_precision=precision(scale_dtype),
        tile_rows=tile_rows, tile_cols=tile_cols,
    )  # fmt: skip
    if not bool(scale.all()):
        bad = int((scale == 0).flatten().nonzero()[0])
        top, left = bad // grid[1] * height, bad % grid[1] * width
        largest = float(values[top : top + height, left : left + width].abs().max())
        raise ValueError(
            f"the scale of row {top}, column {left} is amax / 448 = {largest:.6g} / 448, which {scale_dtype} can only "
            f"store as 0 or infinity"
        )
    return codes, scale


def _check_matrix(values: Tensor, size: tuple[int, int]) -> None:
    """Refuse what has no cells."""
    if values.ndim != 2 or 0 in values.shape or min(size) < 1:
        raise ValueError(f"fp8 needs a matrix and cells with rows and columns, got {list(values.shape)} and {size}")


@triton.jit
def _largest(
    x: tl.tensor,
    high: tl.tensor,
    wide: tl.tensor,
    stride: tl.tensor,
    tile_rows: tl.constexpr,
    tile_cols: tl.constexpr,
) -> tl.tensor:
    """Largest magnitude of a cell."""
    bits = tl.zeros((tile_rows, tile_cols), tl.int32)
    for row in range(0, high, tile_rows):
        for column in range(0, wide, tile_cols):
            place, inside = places(row, column, high, wide, stride, tile_rows, tile_cols)
            bits = tl.maximum(bits, load_f32(x + place, inside).to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return tl.max(bits).to(tl.float32, bitcast=True)


@triton.jit
def _encode_cells(
    x: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    multiples: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    across: tl.tensor,
    mse: tl.constexpr,
    precision: tl.constexpr,
    scale_precision: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_cols: tl.constexpr,
) -> None:
    """Fill codes [rows, cols] and scale [.., across] of the cell of this program; scale 0 where none can be stored."""
    top, left = tl.program_id(0) * height, tl.program_id(1) * width
    high, wide = tl.minimum(height, rows - top), tl.minimum(width, cols - left)
    corner = top.to(tl.int64) * cols + left
    x += corner
    largest = _largest(x, high, wide, cols, tile_rows, tile_cols)
    guess = largest * 0.0 + 1.0
    stored = guess
    if (largest > 0.0) & (largest < float("inf")):
        cell = (x, high, wide, cols)
        exact = find(*cell, largest, guess, False, precision, scale_precision, tile_rows, tile_cols)  # noqa: FBT003
        if exact > 0.0:
            guess = exact
            stored = exact
        else:
            guess = absmax(largest, precision, scale_precision)
            if (guess > 0.0) & (guess < float("inf")):
                if mse:
                    guess = best(x, high, wide, cols, largest, multiples, precision, scale_precision)
                reached = image(largest, guess, precision)
                settled = find(*cell, reached, guess, True, precision, scale_precision, tile_rows, tile_cols)  # noqa: FBT003
                stored = tl.where(settled > 0.0, settled, guess)
            else:
                stored = guess * 0.0
                guess = stored + 1.0
    tl.store(scale + tl.program_id(0).to(tl.int64) * across + tl.program_id(1), tl.where(stored > 0.0, stored, 0.0))
    _store_codes(x, codes + corner, high, wide, cols, guess, stored, precision, tile_rows, tile_cols)


@triton.jit
def _image_codes(v: tl.tensor, guess: tl.tensor, stored: tl.tensor, precision: tl.constexpr) -> tl.tensor:
    """int32 codes under `stored` of the images of v under `guess`."""
    tiny: tl.constexpr = 6.103515625e-05 if precision == 2 else 1.1754943508222875e-38  # 2**-14, 2**-126
    code = e4m3_codes(v, guess)
    if (guess != stored) | (guess * 0.001953125 < tiny):  # else images have the codes of their numbers
        decoded = round_f32(e4m3_to_f32(code & 0x7F) * guess, precision)
        code = e4m3_codes(decoded, stored) | (code & 0x80)
    return code


@triton.jit
def _store_codes(
    x: tl.tensor,
    codes: tl.tensor,
    high: tl.tensor,
    wide: tl.tensor,
    stride: tl.tensor,
    guess: tl.tensor,
    stored: tl.tensor,
    precision: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_cols: tl.constexpr,
) -> None:
    """Fill codes from the numbers of a cell: codes under `stored` of their images under `guess`."""
    for row in range(0, high, tile_rows):
        for column in range(0, wide, tile_cols):
            place, inside = places(row, column, high, wide, stride, tile_rows, tile_cols)
            code = _image_codes(load_f32(x + place, inside), guess, stored, precision)
            tl.store(codes + place, code.to(tl.uint8), mask=inside)


@triton.jit
def _encode_tensor(
    x: tl.tensor,
    scale: tl.tensor,
    codes: tl.tensor,
    size: tl.tensor,
    precision: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Fill codes [size] from x [size] under one scale."""
    i = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    step = tl.load(scale)
    code = _image_codes(load_f32(x + i, i < size), step, step, precision)
    tl.store(codes + i, code.to(tl.uint8), mask=i < size)


@triton.jit
def _decode(
    codes: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    cols: tl.tensor,
    across: tl.tensor,
    height: tl.tensor,
    width: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Fill out [rows, cols] from codes [rows, cols] and scale [.., across]; `width` 0 means whole rows."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * tile + tl.arange(0, tile)
    live = k < cols
    code = tl.load(codes + row * cols + k, mask=live, other=0)
    cell = k // width if width else k * 0
    step = tl.load(scale + row // height * across + cell, mask=live, other=0)
    store_f32(out + row * cols + k, e4m3_to_f32(code) * step, live)
