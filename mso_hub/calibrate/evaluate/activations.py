"""What a runtime does to an activation before it multiplies: quantize it, and the numbers that come back.

Formulas, their order and their rounding are those of vLLM 0.33 (`vllm/model_executor/layers/quantization/`), all in
F32, every rounding to nearest with ties to even, codes clamped to the range first:

    NVFP4       16 columns; g = 448 * 6 / amax is stored, one for a fused layer
                scale = e4m3(clamp(g * (max |x| * (1 / 6)), -448, 448))
                x'    = e2m1(x * 1 / (scale * (1 / g))) * (scale / g); 0 where scale is 0
                (utils/nvfp4_emulation_utils.py: ref_nvfp4_quant)
    MXFP8       32 columns; p = 2**ceil(log2(max |x| / 448)), at least 2**-127, so that nothing is cut off
                x' = e4m3(x / p) * p                     (utils/mxfp8_utils.py: _mxfp8_e4m3_quantize_torch)
    MXFP4       32 columns; p as for MXFP8 with 6 in place of 448, x' = e2m1(x / p) * p (FlashInfer's kernel)
    FP8 static  s is stored, one for a fused layer or a bank of experts: x' = e4m3(clamp(x * (1 / s), -448, 448)) * s
    FP8 dynamic s = max(max |x| / 448, 1 / (448 * 512)), the maximum over a token, over all tokens of a step, or over
                128 columns of a token; then as static   (input_quant_fp8.py: QuantFP8.forward_native)
    INT8        s = max |x| / 127 of a token, or stored: x' = clamp(round(x / s), -128, 127) * s
                (csrc/quantization/w8a8/int8: dynamic and static scaled_int8_quant, symmetric)

Results are rounded to the dtype of x once. FP8 of a KV cache is `fp8_static` with k_scale or v_scale. vLLM's GPU
kernels may take another path with the same formula: a reciprocal in place of a division, powers of two for the FP8
scales of DeepGEMM.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Quantizer = Callable[[Tensor], Tensor]
"""[..., K] in any float dtype -> the same shape and dtype."""

E2M1_MAX, E4M3_MAX, INT8_MAX = 6.0, 448.0, 127.0
LEAST_SCALE = 1.0 / (E4M3_MAX * 512.0)
"""vLLM's least scale of FP8 that is made at run time."""
TINY = torch.finfo(torch.float32).tiny


def nvfp4(divisor: Tensor) -> Quantizer:
    """E2M1 in blocks of 16 under E4M3 scales; `divisor` F32 [] is 448 * 6 / amax, what compressed-tensors stores."""

    def quantize(x: Tensor) -> Tensor:
        blocks, g = _blocks(x, 16), divisor.to(x.device)
        scale = g * (blocks.abs().amax(-1, keepdim=True) * (1 / E2M1_MAX))
        scale = scale.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
        codes = _e2m1(blocks * _reciprocal(scale * _reciprocal(g)))
        return (codes * (scale / g)).flatten(-2).to(x.dtype)

    return quantize


def mxfp4(x: Tensor) -> Tensor:
    """E2M1 in blocks of 32 under powers of two."""
    blocks = _blocks(x, 32)
    power = _power_above(blocks, E2M1_MAX)
    return (_e2m1(blocks / power) * power).flatten(-2).to(x.dtype)


def mxfp8(x: Tensor) -> Tensor:
    """E4M3 in blocks of 32 under powers of two."""
    blocks = _blocks(x, 32)
    power = _power_above(blocks, E4M3_MAX)
    return (_e4m3(blocks / power) * power).flatten(-2).to(x.dtype)


def fp8_static(scale: Tensor) -> Quantizer:
    """E4M3 under a stored scale, a multiplier F32 []."""

    def quantize(x: Tensor) -> Tensor:
        s = scale.to(x.device)
        return (_e4m3(x.float() * s.reciprocal()) * s).to(x.dtype)

    return quantize


def fp8_token(x: Tensor) -> Tensor:
    """E4M3 under one scale a token."""
    return _fp8_rows(x.float()).to(x.dtype)


def fp8_tensor(x: Tensor) -> Tensor:
    """E4M3 under one scale for all tokens that are multiplied together."""
    return _fp8_rows(x.float().reshape(1, -1)).reshape(x.shape).to(x.dtype)


def fp8_columns(size: int) -> Quantizer:
    """E4M3 under one scale for `size` columns of a token; the last ones of a token may be fewer."""

    def quantize(x: Tensor) -> Tensor:
        missing = -x.shape[-1] % size
        padded = _blocks(torch.nn.functional.pad(x.float(), (0, missing)), size)
        return _fp8_rows(padded).flatten(-2)[..., : x.shape[-1]].to(x.dtype)

    return quantize


def int8_token(x: Tensor) -> Tensor:
    """INT8 under one scale a token."""
    wide = x.float()
    return _int8(wide, (wide.abs().amax(-1, keepdim=True) / INT8_MAX).clamp(min=TINY)).to(x.dtype)


def int8_static(scale: Tensor) -> Quantizer:
    """INT8 under a stored scale, a multiplier F32 []."""

    def quantize(x: Tensor) -> Tensor:
        return _int8(x.float(), scale.to(x.device)).to(x.dtype)

    return quantize


def _int8(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round().clamp(-INT8_MAX - 1, INT8_MAX) * scale


def _blocks(x: Tensor, size: int) -> Tensor:
    """F32 [..., K / size, size]."""
    return x.float().reshape(*x.shape[:-1], -1, size)


def _fp8_rows(x: Tensor) -> Tensor:
    """F32, one scale for each last dimension."""
    scale = (x.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(min=LEAST_SCALE)
    return _e4m3(x * scale.reciprocal()) * scale


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
    """The least power of two, at least 2**-127, under which no number of a block exceeds `largest`."""
    half, exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True).clamp(min=TINY) / largest)  # 0.5 <= half < 1
    exponent = torch.where(half == 0.5, exponent - 1, exponent).clamp(-127, 127)
    return torch.ldexp(torch.ones_like(half), exponent)
