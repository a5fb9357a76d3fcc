"""Kernels of linear layers: the weight is dequantized once, the activation in every step where the format says so.

A layer that has been prepared here is a BF16 layer in all respects: vLLM's own method for unquantized layers packs its
weight and multiplies, so that a weight-only checkpoint gives the very numbers of its decompressed twin.

vLLM's own changes to the numbers stay, because its schemes make them before they call a kernel: one global scale, the
largest, for the parts of a fused NVFP4 layer (`schemes/compressed_tensors_w4a4_nvfp4.py`, `modelopt.py`: KNvfp4Static),
and the parts of a fused FP8 layer requantized to the largest scale (`utils/w8a8_utils.py`: requantize_with_max_scale).
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from vllm_mso_hub.compat import private
from vllm_mso_hub.compat.emulation import LINEAR
from vllm_mso_hub.emulate import activations, weights
from vllm_mso_hub.emulate.activations import Quantizer

WEIGHT_ONLY = "nvfp4_a16"
"""Kind of the kernel that vLLM asks for by name, not by list."""
LATENT = "int8_latent"
"""Kind of the kernel for the layer of latent attention that vLLM's INT8 kernel does not fit."""
_YES: tuple[bool, None] = (True, None)


class _Dense:
    """The part that all kernels share; a kernel says how its layer's weight is read and what an activation becomes.

    quantizer  what an activation becomes; None leaves it alone
    """

    config: Any
    quantizer: Quantizer | None = None

    @classmethod
    def is_supported(cls, _compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Yes: torch is all it takes."""
        return _YES

    @classmethod
    def can_implement(cls, _config: Any) -> tuple[bool, str | None]:
        """Yes to all shapes."""
        return _YES

    @classmethod
    def get_min_capability(cls) -> int:
        """That of a CPU."""
        return -1

    def input_quant_key(self) -> None:
        """Activations arrive as they are."""

    def get_output_padding(self) -> None:
        """No padding."""

    def dequantize(self, layer: Any) -> Tensor:
        """The layer's weight [N, K] in the default dtype, which is the model's while vLLM loads."""
        raise NotImplementedError

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace the stored weight by its numbers; scales stay where they are."""
        layer.weight = Parameter(self.dequantize(layer), requires_grad=False)
        self.dense = private("vllm.model_executor.layers.linear", "UnquantizedLinearMethod")()
        self.dense.process_weights_after_loading(layer)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
        """x [..., K] -> [..., N]."""
        if self.quantizer is not None:
            x = self.quantizer(x)
        if layer.weight.numel() and layer.weight.dtype != x.dtype:  # latent attention asks for F32 products
            return torch.nn.functional.linear(x, layer.weight.to(x.dtype), bias)
        return self.dense.apply(layer, x, bias)  # type: ignore[no-any-return]


class _Nvfp4(_Dense):
    """W4A16: codes and scales as vLLM's schemes leave them on the layer."""

    def dequantize(self, layer: Any) -> Tensor:
        divisor = getattr(layer, "mso_divisor", None)
        read = weights.nvfp4 if divisor is None else weights.nvfp4_divided
        number = layer.weight_global_scale if divisor is None else divisor
        return read(layer.weight, layer.weight_scale, number, torch.get_default_dtype())


class _Nvfp4Static(_Nvfp4):
    """W4A4: the global scale of the activation is in the checkpoint."""

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        self.quantizer = activations.nvfp4(layer.input_global_scale_inv.float())


class _Mxfp8(_Dense):
    """What becomes of an activation is in the recipe, which `compat.emulation` keeps."""

    def dequantize(self, layer: Any) -> Tensor:
        return weights.mxfp8(layer.weight, layer.weight_scale, torch.get_default_dtype())

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        scheme = getattr(layer, "scheme", None)  # ModelOpt's layers have none: their MXFP8 is W8A8
        self.quantizer = activations.mxfp8 if scheme is None else of_recipe(scheme.mso_activations)


class _Mxfp4(_Mxfp8):
    """Like MXFP8, with smaller codes."""

    def dequantize(self, layer: Any) -> Tensor:
        return weights.mxfp4(layer.weight, layer.weight_scale, torch.get_default_dtype())


class _Integers(_Dense):
    """Packed 4- and 8-bit integers of every group size, with or without zero points."""

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        """Yes to 2, 4 and 8 bits: other codes do not fill a 32-bit word."""
        bits = config.weight_type.size_bits
        return _YES if 32 % bits == 0 else (False, f"{bits}-bit integers are not emulated")

    def dequantize(self, layer: Any) -> Tensor:
        packed, scale, zero_point = self._get_weight_params(layer)  # type: ignore[attr-defined]  # of vLLM's class
        zero_point = zero_point if self.config.zero_points else None
        bits = self.config.weight_type.size_bits
        return weights.integers(packed, scale, zero_point, bits, torch.get_default_dtype())


class _Fp8Blocks(_Dense):
    """FP8 with a scale for each block, activations with a scale for as many columns of a token."""

    def dequantize(self, layer: Any) -> Tensor:
        scale = layer.weight_scale_inv if hasattr(layer, "weight_scale_inv") else layer.weight_scale
        block = self.config.weight_quant_key.scale.group_shape
        return weights.cells(layer.weight, scale, (block.row, block.col), torch.get_default_dtype())

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        self.quantizer = activations.fp8_blocks(self.config.activation_quant_key.scale.group_shape.col)

    def apply_block_scaled_mm(self, **_: Any) -> Tensor:
        """Never called: apply_weights multiplies."""
        raise NotImplementedError


class _Int8(_Dense):
    """INT8 with one scale a row or a part of a fused layer, activations with a scale a token."""

    def dequantize(self, layer: Any) -> Tensor:
        scale = layer.weight_scale.reshape(-1, 1)
        if len(scale) != len(layer.weight):  # a scale for each part
            scale = torch.cat([part.expand(rows, 1) for part, rows in zip(scale, layer.logical_widths, strict=True)])
        return weights.cells(layer.weight, scale, (1, layer.weight.shape[1]), torch.get_default_dtype())

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        self.quantizer = activations.int8_token


def of_recipe(inputs: Any) -> Quantizer | None:
    """What a recipe's input_activations (compressed-tensors' QuantizationArgs or None) do to an activation."""
    if inputs is None:
        return None
    if inputs.group_size is None:
        return activations.fp8_token
    return activations.mxfp4 if inputs.num_bits == 4 else activations.mxfp8


def kernels() -> dict[str, type]:
    """Kind, as `compat.emulation.register_kernel` has it -> a class to register, made from vLLM's abstract one."""

    def kernel(name: str, own: type[_Dense], base: str, module: str = LINEAR) -> type:
        return types.new_class(name, (own, private(module, base)))

    return {
        "nvfp4": kernel("EmulatedNvFp4Kernel", _Nvfp4Static, "NvFp4LinearKernel"),
        WEIGHT_ONLY: kernel("EmulatedNvFp4WeightOnlyKernel", _Nvfp4, "NvFp4LinearKernel"),
        "mxfp4": kernel("EmulatedMxFp4Kernel", _Mxfp4, "MxFp4LinearKernel"),
        "mxfp8": kernel("EmulatedMxFp8Kernel", _Mxfp8, "Mxfp8LinearKernel"),
        "mp": kernel("EmulatedIntegersKernel", _Integers, "MPLinearKernel"),
        LATENT: kernel("EmulatedInt8Kernel", _Int8, "Int8ScaledMMLinearKernel"),
        "fp8_block": kernel(
            "EmulatedFp8BlockKernel",
            _Fp8Blocks,
            "Fp8BlockScaledMMLinearKernel",
            f"{LINEAR}.scaled_mm.BlockScaledMMLinearKernel",
        ),
    }
