"""FP8 in three lines, in plain torch.

A weight is stored as an 8-bit float (E4M3: 4 exponent bits, 3 mantissa bits, largest number 448, no infinity), and a
row, a block of 128 x 128 or the whole tensor shares one scale:

    scale = amax / 448                       rounded to the dtype in which scales are stored
    code  = e4m3(clamp(w / scale, +-448))    w ~= value(code) * scale

The code divides by the *rounded* scale, so its rounding error is compensated; since that scale may be a little too
small, the largest quotient may exceed 448, hence the clamp. Every rounding is to nearest, ties to the even mantissa.
Everything is float32; BF16 and F16 weights are widened first, which is exact.

Why a search ("mse"): E4M3 has a relative precision, so a scale has little to gain or lose but where the weights fall
between two powers of two. Doubling the scale gives the same again, so one doubling in 24 steps is all there is to try.

Why another scale first: decoded FP8 weights, encoded again, should give the file they came from. amax / 448 finds the
scale again only if the largest code was 448 and the rounding of scale * 448 to the dtype of the weights was kind. So
the few scales that could have made the cell are tried; one that reproduces every number is taken, codes and all, and
nothing is lost. Sometimes two scales make the same cell. Then the first of them is taken, also where the cell is a new
one: not the chosen scale is stored but the first that gives the same decoded numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0

_INTEGER = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_LARGEST = (448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0, 224.0)
_LANES = 64


class ScaleOutOfRange(ValueError):
    """amax / 448 is 0 or infinite in the dtype of scales."""


def encode(weight: Tensor, scale_dtype: torch.dtype, size: tuple[int, int], *, search: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix.

    weight       BF16, F16 or F32 [rows, cols], finite
    scale_dtype  BF16, F16 or F32
    size         rows and columns of a cell: (1, cols) for rows, (128, 128) for blocks
    search       "absmax" or "mse"
    returns      U8 [rows, cols], F32 [ceil(rows / size[0]), ceil(cols / size[1])] that `scale_dtype` can hold
    """
    rows, cols = weight.shape
    codes = torch.empty((rows, cols), dtype=torch.uint8)
    scale = torch.empty((-(-rows // size[0]), -(-cols // size[1])))
    for i, top in enumerate(range(0, rows, size[0])):
        for j, left in enumerate(range(0, cols, size[1])):
            cell = (slice(top, top + size[0]), slice(left, left + size[1]))
            codes[cell], scale[i, j] = _encode_cell(weight[cell], scale_dtype, search)
    return codes, scale


def encode_tensor(weight: Tensor, scale: Tensor) -> Tensor:
    """U8 codes of a tensor of any shape under one scale, F32 [].

    Of the image, not of the weight: small F16 numbers have steps as wide as those of the codes, and then it is the
    decoded number that tells which code it will get the next time.
    """
    return _codes(_image(weight, scale), scale)


def decode(codes: Tensor, scale: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """value(code) * scale in F32, rounded once to `dtype`.

    codes U8 [rows, cols], scale F32 [ceil(rows / size[0]), ceil(cols / size[1])]; returns [rows, cols]
    """
    rows, cols = codes.shape
    wide = scale.repeat_interleave(size[0], 0)[:rows].repeat_interleave(size[1], 1)[:, :cols]
    return (codes.view(torch.float8_e4m3fn).float() * wide).to(dtype)


def _encode_cell(cell: Tensor, scale_dtype: torch.dtype, search: str) -> tuple[Tensor, Tensor]:
    """U8 codes and the F32 [] scale of the numbers that share it."""
    if not cell.any():
        return _codes(cell, torch.ones(())), torch.ones(())
    scale = _find(cell, scale_dtype)
    if scale is not None:
        return _codes(cell, scale), scale
    scale = _absmax_scale(cell, scale_dtype)
    if scale == 0 or scale.isinf():
        raise ScaleOutOfRange
    if search == "mse":
        scale = _best_scale(cell, scale_dtype)
    image = _image(cell, scale)
    settled = _find(image, scale_dtype)
    if settled is None:
        raise AssertionError("the scale that made an image reproduces it")
    return _codes(image, settled), settled


def _e4m3(quotient: Tensor) -> Tensor:
    """F8_E4M3 of F32: nearest, ties to even, saturating at +-448."""
    return quotient.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _codes(cell: Tensor, scale: Tensor) -> Tensor:
    """U8 codes of numbers under one scale F32 []."""
    return _e4m3(cell.float() / scale).view(torch.uint8)


def _image(cell: Tensor, scale: Tensor) -> Tensor:
    """What a cell becomes when it is encoded with `scale` and decoded to its dtype."""
    return (_e4m3(cell.float() / scale).float() * scale).to(cell.dtype)


def _find(cell: Tensor, scale_dtype: torch.dtype) -> Tensor | None:
    """F32 []: the first scale under which the image of a cell is the cell itself; None when there is none.

    The largest code is one of nine: with a smaller one, twice the codes under half the scale are the same numbers. So
    the scale is amax over that code's value, or a neighbour of this in `scale_dtype`.
    """
    amax = cell.float().abs().max()
    for largest in _LARGEST:
        center = (amax / largest).to(scale_dtype)
        for steps in (0, -1, 1):
            scale = (center.view(_INTEGER[scale_dtype]) + steps).view(scale_dtype).float()
            possible = 0 < scale < torch.inf and (largest * scale).to(cell.dtype).float() == amax
            if possible and torch.equal(_image(cell, scale), cell):
                return scale
    return None


def _absmax_scale(cell: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """F32 []: amax / 448, one place lower where amax would become infinite in the dtype of the cell."""
    amax = cell.float().abs().max()
    scale = (amax / E4M3_MAX).to(scale_dtype)
    if scale.isfinite() and _image(amax.to(cell.dtype), scale.float()).isinf():
        scale = (scale.view(_INTEGER[scale_dtype]) - 1).view(scale_dtype)
    return scale.float()


def _best_scale(cell: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """F32 []: the scale with the least squared error; the first, that is the smallest, of equals."""
    amax = cell.float().abs().max()
    factors = torch.exp2(torch.arange(24, dtype=torch.float64) / 24).float()
    best, least = torch.zeros(()), torch.inf
    for i, factor in enumerate(factors):
        scale = (factor * (amax / E4M3_MAX)).to(scale_dtype).float()
        first = i == 0
        scale = _absmax_scale(cell, scale_dtype) if first else _findable(scale, amax, scale_dtype, cell.dtype)
        if scale > 0 and (error := _squared_error(cell, scale)) < least:
            best, least = scale, error
    return best


def _findable(scale: Tensor, amax: Tensor, scale_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
    """F32 []: `scale`, or one close by that `_find` will meet when it sees the image; 0 when there is none."""
    if not 0 < scale < torch.inf:
        return torch.zeros(())
    largest = _e4m3(amax / scale).float()
    if largest < min(_LARGEST):
        return torch.zeros(())
    decoded = (largest * scale).to(dtype).float()
    quotient = (decoded / largest).to(scale_dtype)
    neighbours = [(quotient.view(_INTEGER[scale_dtype]) + steps).view(scale_dtype).float() for steps in (0, -1, 1)]
    if scale not in neighbours:
        scale = quotient.float()
    return scale if decoded.isfinite() and _e4m3(amax / scale).float() == largest else torch.zeros(())


def _squared_error(cell: Tensor, scale: Tensor) -> float:
    """Sum over a cell of (w - dequantized)**2: differences in F32, squares and sums in F64.

    The square of an F32 is exact in F64, so only the order of the sum matters: element i, row by row, belongs to lane
    i % 64, the lanes add up separately, and then one after the other.
    """
    magnitudes = cell.float().abs().flatten()
    errors = (magnitudes - _e4m3(magnitudes / scale).float() * scale).double()
    padded = torch.nn.functional.pad(errors, (0, -errors.numel() % _LANES)).reshape(-1, _LANES)
    lanes = torch.zeros(_LANES, dtype=torch.float64)
    for row in padded:
        lanes += row * row
    total = 0.0
    for lane in lanes.tolist():
        total += lane
    return total
