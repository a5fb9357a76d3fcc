"""Stored floating-point numbers in a Triton kernel: load, store and E4M3, bit for bit as on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mso_hub.formats.numerics.floats import PRECISION

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
    raise ImportError(
        f"triton {triton.__version__} makes zero of subnormal quotients, so the bytes would not be those of a CPU; "
        "triton 3.6, which comes with torch 2.10, and later ones do not"
    )

EXACT = {"enable_fp_fusion": False}
"""Options of every launch: without fusion a * b + c is rounded twice, as on the CPU."""

_TAGS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.float16, torch.float32: torch.float32}


def amax(values: Tensor) -> float:
    """Largest |v|, exactly as stored; inf or NaN when any element is not finite; 0.0 when empty."""
    if not values.numel():
        return 0.0
    low, high = values.aminmax()
    return float(torch.maximum(-low, high))


def loadable(values: Tensor) -> Tensor:
    """View of BF16, F16 or F32 `values` that `load_f32` reads and `store_f32` fills.

    BF16 travels as int16 bits: no unit of the GPU, and no version of Triton, then rounds it for us.
    """
    if values.dtype not in _BITS or not values.is_contiguous():
        raise ValueError(
            f"values must be a contiguous tensor of {', '.join(map(str, _BITS))}, "
            f"got {values.dtype} with strides {values.stride()}"
        )
    require_device(values)
    return values.view(_BITS[values.dtype])


def require_device(values: Tensor) -> None:
    """Refuse a tensor that a kernel could not reach."""
    if not values.is_cuda and isinstance(load_f32, triton.JITFunction):
        raise ValueError(
            f"the kernels need tensors on a CUDA device, got {values.device}; move them, "
            "or set TRITON_INTERPRET=1 before triton is imported to run without a GPU"
        )


def precision(dtype: torch.dtype) -> int:
    """The number by which a kernel knows a dtype, see `numerics.floats.PRECISION`."""
    if dtype not in _TAGS:
        raise ValueError(f"dtype {dtype} holds no plain floats; known: {', '.join(map(str, _TAGS))}")
    return PRECISION[_TAGS[dtype]]


def scalar(value: float, like: Tensor) -> Tensor:
    """F32 [1] on the device of `like`. Kernels get float scalars in memory: as an argument a subnormal
    number has another type in Triton's interpreter than in its compiler.
    """
    return torch.full((1,), float(value), dtype=torch.float32, device=like.device)


def launch(
    kernel: Any, grid: tuple[int, ...], values: Tensor, /, *arguments: Tensor | int | None, **constants: float
) -> None:
    """Run a kernel on the device of its first argument, with `EXACT` arithmetic."""
    with torch.cuda.device(values.get_device()):  # -1, the CPU, changes nothing
        kernel[grid](values, *arguments, **constants, **EXACT)


@triton.jit
def load_f32(pointer: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Widen BF16 (int16 bits), F16 or F32 numbers to float32; 0 where the mask is not set."""
    stored = tl.load(pointer, mask=mask, other=0)
    if stored.dtype == tl.int16:
        return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:  # noqa: RET505 - the compiler needs both branches of a choice between types
        return stored.to(tl.float32)


@triton.jit
def store_f32(pointer: tl.tensor, value: tl.tensor, mask: tl.tensor) -> None:
    """Round float32 to what the pointer holds, nearest with ties to even: BF16 (int16 bits), F16 or F32."""
    if pointer.dtype.element_ty == tl.int16:
        tl.store(pointer, bf16_bits(value), mask=mask)
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def bf16_bits(value: tl.tensor) -> tl.tensor:
    """int16 bits of float32 numbers rounded to BF16, as `numerics.floats.store_f32` rounds them."""
    u = value.to(tl.int32, bitcast=True)
    rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    quiet = (u >> 16) | 0x40
    return tl.where((u & 0x7FFFFFFF) > 0x7F800000, quiet, rounded).to(tl.int16)


@triton.jit
def e4m3_from_f32(value: tl.tensor) -> tl.tensor:
    """int32 E4M3 codes of float32 numbers: nearest, ties to even, saturating at +-448; NaN is 0x7f.

    The integer arithmetic of `numerics.floats.e4m3_from_f32`, with both of its branches computed.
    """
    u = value.to(tl.int32, bitcast=True)
    m = tl.minimum(u & 0x7FFFFFFF, 0x43E00000)  # 448.0
    shifted = m.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000  # 2**14
    normal = ((m + 0x7FFFF + ((m >> 20) & 1)) >> 20) - 960
    code = tl.where(m < 0x3C800000, subnormal, normal) | ((u >> 24) & 0x80)  # 2**-6
    return tl.where((u & 0x7FFFFFFF) > 0x7F800000, 0x7F, code)


@triton.jit
def e4m3_to_f32(code: tl.tensor) -> tl.tensor:
    """float32 values of uint8 E4M3 codes; exact."""
    c = code.to(tl.int32)
    m = c & 0x7F
    normal = ((m << 20) + 0x3C000000).to(tl.float32, bitcast=True)  # the bias goes from 7 to 127
    subnormal = m.to(tl.float32) * 0.001953125  # 2**-9
    value = tl.where(m < 8, subnormal, normal).to(tl.int32, bitcast=True)
    value = tl.where(m == 0x7F, 0x7FC00000, value) | ((c & 0x80) << 24)
    return value.to(tl.float32, bitcast=True)


@triton.jit
def round_f32(value: tl.tensor, precision: tl.constexpr) -> tl.tensor:
    """Nearest numbers of a dtype (`numerics.floats.PRECISION`) as float32, ties to even; too large is infinite."""
    if precision == 1:
        return (bf16_bits(value).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif precision == 2:  # noqa: RET505
        return value.to(tl.float16).to(tl.float32)
    else:
        return value


@triton.jit
def next_f32(value: tl.tensor, steps: tl.tensor, precision: tl.constexpr) -> tl.tensor:
    """The numbers `steps` (-1, 0 or 1) places above positive numbers of a dtype, as `numerics.floats.next_f32`."""
    unit: tl.constexpr = 65536 if precision == 1 else 8192 if precision == 2 else 1
    moved = (value.to(tl.int32, bitcast=True) + steps * unit).to(tl.float32, bitcast=True)
    if precision == 2:  # below 2**-14 the step is 2**-24
        subnormal = (value < 6.103515625e-05) | ((steps < 0) & (value == 6.103515625e-05))
        moved = tl.where(subnormal, value + steps.to(tl.float32) * 5.9604644775390625e-08, moved)
        moved = tl.where((steps < 0) & (value == float("inf")), 65504.0, moved)
    return tl.where(steps == 0, value, moved)


@triton.jit
def e4m3_codes(value: tl.tensor, step: tl.tensor) -> tl.tensor:
    """int32 E4M3 codes of value / step for a positive step, as `numerics.floats.e4m3_codes`."""
    return e4m3_from_f32(tl.div_rn(value, step))
