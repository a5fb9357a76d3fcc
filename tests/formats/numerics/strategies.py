"""Numbers for the numerics tests: every bit pattern is fair, as long as it is finite."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from mso_hub.formats.numerics.floats import Array, storage

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
DTYPES = tuple(TORCH)

EXPONENT = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
LOWEST_EXPONENT_BIT = {"BF16": 0x80, "F16": 0x400, "F32": 0x800000}


def bits_type(dtype: str) -> type[np.unsignedinteger]:
    """Unsigned integer as wide as `dtype`."""
    return np.uint32 if dtype == "F32" else np.uint16


def finite(bits: Array, dtype: str) -> Array:
    """Turn raw bits into stored numbers; NaN and Inf become large finite numbers."""
    special = (bits & EXPONENT[dtype]) == EXPONENT[dtype]
    clean = np.where(special, bits & ~np.array(LOWEST_EXPONENT_BIT[dtype], bits.dtype), bits)
    return clean.astype(bits.dtype).view(storage(dtype))


def all_patterns(dtype: str) -> Array:
    """All 65536 patterns of a 16-bit dtype, stored."""
    return np.arange(1 << 16, dtype=np.uint16).view(storage(dtype))


def all_finite(dtype: str) -> Array:
    """All finite numbers of a 16-bit dtype, in the order of their bits, in rows of 256."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    return bits[(bits & EXPONENT[dtype]) != EXPONENT[dtype]].view(storage(dtype)).reshape(-1, 256)


def to_torch(values: Array, dtype: str) -> torch.Tensor:
    """Same bits as a torch tensor that owns its memory."""
    signed = np.int32 if dtype == "F32" else np.int16
    return torch.from_numpy(np.array(values).view(signed)).view(TORCH[dtype])


def to_bits(tensor: torch.Tensor) -> Array:
    """Bits of a torch tensor as unsigned integers, to compare -0.0 and NaN too."""
    wide = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    array: Array = tensor.contiguous().view(wide).numpy()
    return array.view(f"u{array.itemsize}")


def gaussian(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Array:
    """Numbers like those of a weight matrix, rounded by torch, not by the code under test."""
    values = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(0.02)
    return to_bits(torch.from_numpy(values).to(TORCH[dtype])).view(storage(dtype))


@st.composite
def matrices(draw: st.DrawFn, dtype: str, *, multiple: int = 16) -> Array:
    """Finite matrix [rows, n * multiple]: raw bit patterns, or all within a few powers of two."""
    rows, cols = draw(st.integers(1, 4)), draw(st.integers(1, 5)) * multiple
    bits_of = np.dtype(bits_type(dtype))
    size = rows * cols * bits_of.itemsize
    bits = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), bits_of).reshape(rows, cols)
    if draw(st.booleans()):
        # Raw exponents differ so much that most of a block rounds to zero; keep three bits of them.
        keep = ~(EXPONENT[dtype] & ~(7 * LOWEST_EXPONENT_BIT[dtype])) & ((1 << 8 * bits_of.itemsize) - 1)
        base = draw(st.integers(0, EXPONENT[dtype] // LOWEST_EXPONENT_BIT[dtype] - 8))
        bits = (bits & bits_of.type(keep)) + bits_of.type(base * LOWEST_EXPONENT_BIT[dtype])
    return finite(np.array(bits), dtype)
