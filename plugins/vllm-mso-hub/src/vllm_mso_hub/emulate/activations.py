"""What the formats do to an activation: quantize it and give back the numbers that the multiplication sees.

    NVFP4        16 columns under an E4M3 scale, all under one global scale that the checkpoint holds
    MXFP4, MXFP8 32 columns under a power of two, made at run time and rounded up, so that nothing is cut off
    FP8          a scale that the checkpoint holds, or a scale a token, or a scale for 128 columns, made at run time
    INT8         a scale a token, made at run time

Steps and their order are those of vLLM's own emulation (`quantization/utils/nvfp4_emulation_utils.py`: ref_nvfp4_quant;
`mxfp8_utils.py`: _mxfp8_e4m3_quantize_torch; `input_quant_fp8.py`: QuantFP8.forward_native). MXFP4 has none that
runs without a package of AMD's: its scales are rounded like those of MXFP8, which is what FlashInfer's kernel does.
All functions take [..., K] in any float dtype and return the same shape and dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Quantizer = Callable[[Tensor], Tensor]

E2M1_MAX, E4M3_MAX, INT8_MAX = 6.0, 448.0, 127.0
_LEAST_SCALE = 1.0 / (E4M3_MAX * 512.0)  # vLLM's floor of a scale that is made at run time
_TINY = torch.finfo(torch.float32).tiny


def nvfp4(global_scale: Tensor) -> Quantizer:
    """E2M1 under E4M3 scales; `global_scale` F32 [] is 448 * 6 / amax of the calibration, which scales are times."""

    def quantize(x: Tensor) -> Tensor:
        blocks = _blocks(x, 16)
        scale = global_scale * (blocks.abs().amax(-1, keepdim=True) * (1 / E2M1_MAX))
        scale = scale.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
        factor = _reciprocal(scale * _reciprocal(global_scale))
        codes = _e2m1(blocks * factor)
        return (codes * (scale / global_scale)).flatten(-2).to(x.dtype)

    return quantize


def mxfp4(x: Tensor) -> Tensor:
    """E2M1 under powers of two."""
    blocks = _blocks(x, 32)
    power = _power_above(blocks, E2M1_MAX)
    return (_e2m1(blocks / power) * power).flatten(-2).to(x.dtype)


def mxfp8(x: Tensor) -> Tensor:
    """E4M3 under powers of two."""
    blocks = _blocks(x, 32)
    power = _power_above(blocks, E4M3_MAX)
    return (_e4m3(blocks / power) * power).flatten(-2).to(x.dtype)


def fp8_static(scale: Tensor) -> Quantizer:
    """E4M3 under the checkpoint's own scale, F32 []."""

    def quantize(x: Tensor) -> Tensor:
        return (_e4m3(x.float() * scale.float().reciprocal()) * scale.float()).to(x.dtype)

    return quantize


def fp8_token(x: Tensor) -> Tensor:
    """E4M3 under one scale a token."""
    return _fp8_rows(x)


def fp8_tensor(x: Tensor) -> Tensor:
    """E4M3 under one scale for all tokens of the step."""
    return _fp8_rows(x.reshape(1, -1)).reshape(x.shape)


def fp8_blocks(size: int) -> Quantizer:
    """E4M3 under one scale for `size` columns of a token; the last of a row may be narrower."""

    def quantize(x: Tensor) -> Tensor:
        missing = -x.shape[-1] % size
        padded = _blocks(torch.nn.functional.pad(x.float(), (0, missing)), size)
        return _fp8_rows(padded).flatten(-2)[..., : x.shape[-1]].to(x.dtype)

    return quantize


def int8_token(x: Tensor) -> Tensor:
    """INT8 under one scale a token."""
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) / INT8_MAX).clamp(min=_TINY)
    return ((wide / scale).round().clamp(-INT8_MAX - 1, INT8_MAX) * scale).to(x.dtype)


def _blocks(x: Tensor, size: int) -> Tensor:
    """F32 [..., K / size, size]."""
    return x.float().reshape(*x.shape[:-1], -1, size)


def _fp8_rows(x: Tensor) -> Tensor:
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(min=_LEAST_SCALE)
    return (_e4m3(wide * scale.reciprocal()) * scale).to(x.dtype)


def _reciprocal(x: Tensor) -> Tensor:
    """1 / x, and 0 for 0."""
    return torch.where(x == 0, 0.0, 1.0 / x)


def _e4m3(x: Tensor) -> Tensor:
    """F32 to the nearest E4M3 number, ties to even, saturating."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def _e2m1(x: Tensor) -> Tensor:
    """F32 to the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives, ties to the even code, saturating."""
    size = x.abs().clamp(max=E2M1_MAX)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.copysign((size / step).round() * step, x)


def _power_above(blocks: Tensor, largest: float) -> Tensor:
    """The least power of two, at least 2**-127, under which no number of a block [..., 32] exceeds `largest`."""
    half, exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True).clamp(min=_TINY) / largest)  # 0.5 <= half < 1
    exponent = torch.where(half == 0.5, exponent - 1, exponent).clamp(-127, 127)
    return torch.ldexp(torch.ones_like(half), exponent)
