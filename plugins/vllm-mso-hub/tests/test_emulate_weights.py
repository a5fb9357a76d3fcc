"""Emulated weights, bit for bit what the decoders of mso_hub give; this file starts no vLLM."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mso_hub.formats.numerics.reference import fp8, integer, mx, nvfp4
from vllm_mso_hub.emulate import weights

ROWS, COLUMNS = 64, 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _bytes(seed: int, *shape: int, high: int = 256) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Equal bits: also the sign of zero."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[ours.itemsize]
    return ours.dtype == theirs.dtype and torch.equal(ours.view(bits), theirs.view(bits))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), number=st.floats(2.0**-40, 2.0**20, width=32))
def test_nvfp4_in_both_layouts(dtype: torch.dtype, seed: int, number: float) -> None:
    packed, scale = _bytes(seed, ROWS, COLUMNS // 2), _bytes(seed + 1, ROWS, COLUMNS // 16, high=127)
    scale, whole = scale.view(torch.float8_e4m3fn), torch.tensor(number)
    assert _same(weights.nvfp4(packed, scale, whole, dtype), nvfp4.decode(packed, scale, whole, dtype))
    assert _same(weights.nvfp4_divided(packed, scale, whole, dtype), nvfp4.decode_divided(packed, scale, whole, dtype))


def test_a_divisor_is_not_its_rounded_reciprocal() -> None:
    """Why the emulation keeps compressed-tensors' divisor: vLLM's reciprocal of it gives other numbers."""
    divisors, scales = torch.linspace(1024, 2048, 100_000), torch.arange(8.0, 16.0)
    exact, rounded = scales / divisors.unsqueeze(1), scales * (1 / divisors).unsqueeze(1)
    which, column = (exact.bfloat16() != rounded.bfloat16()).nonzero()[0].tolist()
    packed = torch.full((1, 8), 0x22, dtype=torch.uint8)  # sixteen ones
    scale, divisor = scales[column].to(torch.float8_e4m3fn).reshape(1, 1), divisors[which]
    ours = weights.nvfp4_divided(packed, scale, divisor, torch.bfloat16)
    assert not torch.equal(ours, weights.nvfp4(packed, scale, 1 / divisor, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mx_formats(dtype: torch.dtype) -> None:
    scale = torch.arange(255, dtype=torch.uint8).repeat_interleave(4).reshape(-1, 4)  # every exponent
    packed = _bytes(2, len(scale), 64)
    assert _same(weights.mxfp4(packed, scale, dtype), mx.decode_mxfp4(packed, scale, dtype))
    codes = _bytes(3, len(scale), 128, high=127).view(torch.float8_e4m3fn)
    assert _same(weights.mxfp8(codes, scale, dtype), mx.decode_mxfp8(codes, scale, dtype))


@pytest.mark.parametrize("size", [(ROWS, COLUMNS), (1, COLUMNS), (16, 64), (48, 96)])
def test_fp8_by_tensor_row_and_block(size: tuple[int, int]) -> None:
    codes = _bytes(4, ROWS, COLUMNS, high=127)
    scale = torch.rand(-(-ROWS // size[0]), -(-COLUMNS // size[1]), generator=torch.Generator().manual_seed(5))
    ours = weights.cells(codes.view(torch.float8_e4m3fn), scale, size, torch.bfloat16)
    assert _same(ours, fp8.decode(codes, scale, size, torch.bfloat16))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128, COLUMNS])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_packed_integers(bits: int, group: int, asymmetric: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    words = (-(2**31), 2**31)
    packed = torch.randint(*words, (ROWS, COLUMNS * bits // 32), generator=generator).int()
    scale = torch.rand(ROWS, COLUMNS // group, generator=generator).bfloat16()
    zeros = torch.randint(*words, (ROWS * bits // 32, COLUMNS // group), generator=generator).int()
    code = integer.unpack(packed, bits, COLUMNS, dense=False)
    zero_point = integer.unpack(zeros.T, bits, ROWS, dense=False).T if asymmetric else None
    theirs = integer.decode(code, scale.float(), zero_point, torch.arange(COLUMNS) // group, torch.bfloat16)
    assert _same(weights.integers(packed, scale, zeros if asymmetric else None, bits, torch.bfloat16), theirs)
