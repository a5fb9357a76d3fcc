"""Layouts of compressed-tensors and ModelOpt, written by these libraries and read by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.utils import calculate_qparams
from modelopt.torch.export.quant_utils import to_quantized_weight
from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor, NVFP4QTensor
from modelopt.torch.quantization.qtensor.fp8_tensor import FP8QTensor
from torch import Tensor

from tests.formats.decoders.stored import COLUMNS, NAME, ROWS, Case, Tensors, matrix, named
from tests.helpers import random_tensor

# compressed-tensors


def compressed_config(form: str, **weights: Any) -> dict[str, Any]:
    """A quantization_config as compressed-tensors writes it; activations so that its compressors accept the scheme."""
    group = {"targets": ["Linear"], "weights": weights, "format": form}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


def compressed(
    form: str, shown: str, scheme: str, dtype: torch.dtype = torch.bfloat16, **weights: Any
) -> Callable[[], Case]:
    """A case that BaseCompressor of a format writes and reads."""

    def make() -> Case:
        config = compressed_config(form, **weights)
        args = QuantizationConfig.model_validate(config).config_groups["group_0"]
        compressor = BaseCompressor.get_value_from_registry(form)
        state: Tensors = {"weight": matrix(dtype)}
        low, high = extremes(state["weight"], weights)
        state["weight_scale"], zero_point = calculate_qparams(low, high, args.weights)
        if not weights.get("symmetric", True):
            state["weight_zero_point"] = zero_point
        stored = compressor.compress(state, args)

        def oracle(wanted: torch.dtype) -> Tensor:
            wide = dict(stored)
            if wide["weight_scale"].is_floating_point() and wide["weight_scale"].dtype != wanted:
                wide["weight_scale"] = wide["weight_scale"].float()
            return compressor.decompress(wide, args)["weight"].to(wanted)

        bits = int(weights["num_bits"])
        return Case(named(**stored), config, oracle, shown, scheme, "compressed-tensors", bits)

    return make


def extremes(weight: Tensor, weights: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Smallest and largest number under each scale."""
    strategy, rows, columns = weights["strategy"], *weight.shape
    if strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if strategy == "block":
        height, width = weights["block_structure"]
        padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
        cells = padded.unfold(0, height, height).unfold(1, width, width)
        return cells.amin((2, 3)), cells.amax((2, 3))
    groups = weight.reshape(rows, -1, weights.get("group_size") or columns)
    return groups.amin(2), groups.amax(2)


# ModelOpt


def modelopt(algo: str) -> dict[str, Any]:
    """A quantization_config of ModelOpt."""
    return {"quant_method": "modelopt", "quant_algo": algo, "ignore": []}


def modelopt_fp8() -> Case:
    """FP8: one scale and the activation's, both of shape []."""
    weight = matrix()
    scale = weight.abs().max() / 448
    codes = to_quantized_weight(weight, scale, "fp8")
    tensors = named(weight=codes, weight_scale=scale, input_scale=torch.tensor(0.25))
    quantized = FP8QTensor(weight.shape, weight.dtype, codes)
    return Case(
        tensors, modelopt("FP8"), lambda dtype: quantized.dequantize(torch.float32, scale=scale).to(dtype),
        "FP8 per tensor", "fp8", "modelopt", 8, dropped=(f"{NAME}.input_scale",),
    )  # fmt: skip


def modelopt_fp8_rows() -> Case:
    """FP8_PER_CHANNEL_PER_TOKEN: scales [N]."""
    weight = matrix()
    scale = (weight.abs().amax(1) / 448).clamp(min=1e-6)
    codes = to_quantized_weight(weight, scale, "fp8_pc_pt")
    return Case(
        named(weight=codes, weight_scale=scale), modelopt("FP8_PER_CHANNEL_PER_TOKEN"),
        (codes.float() * scale[:, None]).to, "FP8 per channel", "fp8", "modelopt", 8,
    )  # fmt: skip


def modelopt_fp8_blocks() -> Case:
    """FP8_PB_WO: scales [N/128, 1, K/128, 1], rounded up."""
    weight, sizes = matrix(), {-1: 128, -2: 128}
    quantized, scale = FP8QTensor.quantize(weight, block_sizes=sizes)
    return Case(
        named(weight=quantized._quantized_data, weight_scale=scale[:, None, :, None]), modelopt("FP8_PB_WO"),
        lambda dtype: quantized.dequantize(torch.float32, scale=scale, block_sizes=sizes).to(dtype),
        "FP8 128x128 blocks", "fp8", "modelopt", 8,
    )  # fmt: skip


def modelopt_mxfp8() -> Case:
    """MXFP8: U8 scales [N, K/32]."""
    quantized, scale = MXFP8QTensor.quantize(matrix())
    return Case(
        named(weight=quantized._quantized_data, weight_scale=scale), modelopt("MXFP8"),
        lambda dtype: quantized.dequantize(dtype, scale=scale), "MXFP8 (ModelOpt)", "mxfp8", "modelopt", 8,
    )  # fmt: skip


def modelopt_mxfp4() -> Case:
    """MXFP4: `weight` U8 [N, K/2], U8 scales [N, K/32]."""
    quantized, scale = MXFP4QTensor.quantize(matrix(), 32)
    scale = scale.reshape(ROWS, COLUMNS // 32)
    return Case(
        named(weight=quantized._quantized_data, weight_scale=scale), modelopt("MXFP4"),
        lambda dtype: quantized.dequantize(dtype, scale=scale, block_sizes={-1: 32}),
        "MXFP4 (ModelOpt)", "mxfp4", "modelopt", 4,
    )  # fmt: skip


def modelopt_nvfp4(smooth: Tensor | None = None) -> Case:
    """NVFP4, on request behind a smoothing scale (NVFP4_AWQ)."""
    quantized, scale, scale_2 = NVFP4QTensor.quantize(matrix(), 16)
    factor = torch.ones(COLUMNS) if smooth is None else smooth.float()

    def oracle(dtype: torch.dtype) -> Tensor:
        dense = quantized.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
        return (dense * factor).to(dtype)

    tensors = named(weight=quantized._quantized_data, weight_scale=scale, weight_scale_2=scale_2)
    if smooth is not None:
        tensors |= named(pre_quant_scale=smooth)
    shown = "modelopt NVFP4" if smooth is None else "modelopt NVFP4, smoothed"
    return Case(
        tensors, modelopt("NVFP4" if smooth is None else "NVFP4_AWQ"), oracle, shown, "nvfp4", "modelopt", 4,
        signed=False,
    )  # fmt: skip


def modelopt_int8(smooth: Tensor | None = None) -> Case:
    """W8A16, or W8A8_SQ_PER_CHANNEL behind a smoothing scale: y = W (x * pre_quant_scale)."""
    weight = matrix()
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-6)
    codes = to_quantized_weight(weight, scale, "int8_sq")
    factor = torch.ones(COLUMNS) if smooth is None else smooth.float()
    tensors = named(weight=codes, weight_scale=scale) | ({} if smooth is None else named(pre_quant_scale=smooth))
    return Case(
        tensors, modelopt("W8A16" if smooth is None else "W8A8_SQ_PER_CHANNEL"),
        (codes.float() * scale[:, None] * factor).to,
        "INT8 per channel" if smooth is None else "INT8 per channel, smoothed", "int8", "modelopt", 8,
    )  # fmt: skip


def modelopt_int4() -> Case:
    """W4A16_AWQ: two rows in a byte, groups of 128, behind a smoothing scale."""
    weight, smooth = matrix(), random_tensor(COLUMNS, seed=4).abs() + 0.5
    scale = (weight.reshape(ROWS, -1, 128).abs().amax(2) / 7).clamp(min=1e-6)
    pairs = to_quantized_weight(weight, scale, "int4_awq", block_size=128)
    wide = scale.repeat_interleave(128, 1)
    codes = (weight / wide).round().clamp(-8, 7)
    return Case(
        named(weight=pairs, weight_scale=scale, pre_quant_scale=smooth), modelopt("W4A16_AWQ"),
        (codes * wide * smooth.float()).to,
        "INT4 groups of 128, smoothed", "int4", "modelopt", 4, signed=False,
    )  # fmt: skip
