"""Quantized activations are those of vLLM's own emulation, where it has one that runs on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_mso_hub.emulate import activations


def _activation(seed: int, spread: float = 1.0, columns: int = 256) -> Tensor:
    """BF16 [8, columns] with an outlier, a zero block and a zero row."""
    x = torch.randn(8, columns, generator=torch.Generator().manual_seed(seed)) * spread
    x[0, 3] *= 50
    x[1, :32] = 0
    x[2] = 0
    return x.bfloat16()


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), spread=st.floats(2.0**-12, 2.0**12), amax=st.floats(2.0**-8, 2.0**8, width=32))
def test_nvfp4_is_vllms(seed: int, spread: float, amax: float) -> None:
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import ref_nvfp4_quant_dequant

    x, scale = _activation(seed, spread), torch.tensor(448 * 6 / amax)
    assert torch.equal(activations.nvfp4(scale)(x), ref_nvfp4_quant_dequant(x, scale, 16))


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), spread=st.floats(2.0**-12, 2.0**12))
def test_mxfp8_is_vllms(seed: int, spread: float) -> None:
    from vllm.model_executor.layers.quantization.utils.mxfp8_utils import (
        _mxfp8_e4m3_quantize_torch,
        dequant_mxfp8_to_bf16,
    )

    x = _activation(seed, spread)
    codes, scale = _mxfp8_e4m3_quantize_torch(x)
    assert torch.equal(activations.mxfp8(x), dequant_mxfp8_to_bf16(codes, scale.view(len(x), -1)))


@pytest.mark.parametrize("kind", ["token", "tensor", "static", "blocks"])
def test_fp8_is_vllms(kind: str) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    x, scale = _activation(7), torch.tensor(0.0123)
    shape = {"token": GroupShape.PER_TOKEN, "blocks": GroupShape(1, 128)}.get(kind, GroupShape.PER_TENSOR)
    with set_current_vllm_config(VllmConfig()):
        quantize = QuantFP8(static=kind == "static", group_shape=shape)
        codes, scales = quantize.forward_native(x, scale if kind == "static" else None)
    ours: Callable[[Tensor], Tensor] = {
        "token": activations.fp8_token,
        "tensor": activations.fp8_tensor,
        "static": activations.fp8_static(scale),
        "blocks": activations.fp8_blocks(128),
    }[kind]
    wide = scales.repeat_interleave(128, -1) if kind == "blocks" else scales
    theirs = (codes.float() * wide).to(x.dtype)
    if kind == "blocks":  # vLLM divides by the scale here and multiplies by its reciprocal elsewhere
        assert ((ours(x) - theirs).float().abs() <= 2**-3 * theirs.float().abs()).all()
        assert (ours(x) == theirs).float().mean() > 0.99
    else:
        assert torch.equal(ours(x), theirs)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), spread=st.floats(2.0**-12, 2.0**12))
def test_mxfp4_cuts_nothing_off_and_keeps_its_own_numbers(seed: int, spread: float) -> None:
    x = _activation(seed, spread)
    blocks, once = x.float().reshape(8, -1, 32), activations.mxfp4(x)
    largest = blocks.abs().amax(-1, keepdim=True)
    power = torch.exp2(torch.ceil(torch.log2((largest / 6).clamp(min=1e-38))))
    error = (once.float().reshape(8, -1, 32) - blocks).abs()
    assert (error <= power).all()  # half of the widest step, which is two powers
    assert torch.equal(activations.mxfp4(once), once)


def test_int8_has_at_most_half_a_step_of_error() -> None:
    x = _activation(9)
    step = x.float().abs().amax(-1, keepdim=True) / 127
    error = (activations.int8_token(x).float() - x.float()).abs()
    assert (error <= 0.5 * step + 2**-8 * x.float().abs()).all()  # and the rounding to BF16


def test_blocks_need_not_divide_the_columns() -> None:
    x = _activation(11, columns=160)
    assert torch.equal(activations.fp8_blocks(128)(x)[:, :128], activations.fp8_blocks(128)(x[:, :128]))
    assert torch.equal(activations.fp8_blocks(128)(x)[:, 128:], activations.fp8_token(x[:, 128:]))
