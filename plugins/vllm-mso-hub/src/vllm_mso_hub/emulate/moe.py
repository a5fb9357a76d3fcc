"""Experts: dequantized once, then vLLM's own BF16 experts, or a loop over experts where activations are quantized.

vLLM's own changes to the numbers are made here, because it makes them in the preparation of weights that this replaces:

    gate's global scale for gate and up      NVFP4: compressed_tensors_moe_w4a4_nvfp4.py and modelopt.py
                                             (ModelOptNvFp4FusedMoE), both process_weights_after_loading
    one activation scale for all experts     NVFP4: fused_moe/oracle/nvfp4.py, convert_to_nvfp4_moe_kernel_format;
                                             FP8: utils/fp8_utils.py, process_fp8_input_tensor_strategy_moe
    gate and up requantized to the larger    FP8: utils/fp8_utils.py, process_fp8_weight_tensor_strategy_moe
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from vllm_mso_hub.compat import private
from vllm_mso_hub.compat.emulation import EXPERTS, use_bf16_experts
from vllm_mso_hub.emulate import activations, weights
from vllm_mso_hub.emulate.activations import Quantizer
from vllm_mso_hub.emulate.linear import of_recipe

_UTILS = "vllm.model_executor.layers.quantization.utils.fp8_utils"
_HALVES = ("w13", "w2")


@dataclass(frozen=True, slots=True)
class Numbers:
    """Experts as numbers.

    w13, w2    [experts, 2 * intermediate, hidden] (gate, then up) and [experts, hidden, intermediate]
    first      what becomes of the input of w13, None: nothing
    second     what becomes of the input of w2
    """

    w13: Tensor
    w2: Tensor
    first: Quantizer | None = None
    second: Quantizer | None = None


def install(method: Any, layer: Any, storage: str) -> None:
    """Replace what a layer of experts stores by numbers, and its method by one that multiplies them."""
    numbers = _READ[storage](method, layer)
    for name in [name for name, _ in layer.named_parameters(recurse=False) if name.startswith(_HALVES)]:
        if not name.endswith("_bias"):
            delattr(layer, name)
    layer.register_parameter("w13_weight", Parameter(numbers.w13, requires_grad=False))
    layer.register_parameter("w2_weight", Parameter(numbers.w2, requires_grad=False))
    quantized = numbers.first is not None or numbers.second is not None
    use_bf16_experts(method, layer, quantized_experts(numbers.first, numbers.second) if quantized else None)


def placeholder() -> type:
    """The class that stands for "emulated" until the weights are there."""
    return quantized_experts(None, None)


def quantized_experts(first: Quantizer | None, second: Quantizer | None) -> type:
    """A class of experts that vLLM's modular kernel runs: quantize, multiply, activate, quantize, multiply, add up."""
    base = private(f"{EXPERTS}.experts.cpu_moe", "CPUUnquantizedExperts")
    methods = {"first": staticmethod(first or _same), "second": staticmethod(second or _same)}
    return types.new_class("EmulatedExperts", (_Loop, base), exec_body=lambda names: names.update(methods))


class _Loop:
    """Expert by expert, in F32 where tokens are added up."""

    first: Quantizer
    second: Quantizer
    w1_bias: Tensor | None
    w2_bias: Tensor | None
    activation: Callable[..., None]

    @classmethod
    def _supports_grouped_gemm(cls, _moe_config: Any) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing to pack."""

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        *args: Any,
        apply_router_weight_on_input: bool = False,
        **kwargs: Any,
    ) -> None:
        """output [tokens, hidden] of hidden_states [tokens, hidden], topk_weights and topk_ids [tokens, k]."""
        x = self.first(hidden_states)
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in torch.unique(topk_ids).tolist():
            token, slot = (topk_ids == expert).nonzero(as_tuple=True)
            both = torch.nn.functional.linear(x[token], w1[expert], _row(self.w1_bias, expert))
            middle = both.new_empty(len(token), w2.shape[-1])
            self.activation(activation, middle, both)
            out = torch.nn.functional.linear(self.second(middle), w2[expert], _row(self.w2_bias, expert)).float()
            if not apply_router_weight_on_input:
                out *= topk_weights[token, slot].float().unsqueeze(-1)
            total.index_add_(0, token, out)
        output.copy_(total)


def _row(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]


def _same(x: Tensor) -> Tensor:
    return x


def _each(read: Callable[..., Tensor], *stored: Any) -> Tensor:
    """`read` of every expert's slice of what is stored; None stays None."""
    count = len(stored[0])
    return torch.stack([read(*(None if part is None else part[expert] for part in stored)) for expert in range(count)])


def _stored(layer: Any, half: str) -> Tensor:
    """Codes of w13 or w2: `.._weight_packed` in compressed-tensors' layouts, else `.._weight`."""
    packed = getattr(layer, f"{half}_weight_packed", None)
    return getattr(layer, f"{half}_weight") if packed is None else packed  # type: ignore[no-any-return]


def _nvfp4(method: Any, layer: Any) -> Numbers:
    """ModelOpt: multipliers, activation scales amax / (6 * 448)."""
    dtype = torch.get_default_dtype()
    w13, w2 = (
        _each(functools.partial(weights.nvfp4, dtype=dtype), _stored(layer, half), scale, number)
        for half, scale, number in (
            ("w13", layer.w13_weight_scale, layer.w13_weight_scale_2[:, 0]),
            ("w2", layer.w2_weight_scale, layer.w2_weight_scale_2),
        )
    )
    if method.use_a16:
        return Numbers(w13, w2)
    return Numbers(w13, w2, *_nvfp4_inputs(layer.w13_input_scale, layer.w2_input_scale))


def _nvfp4_divided(method: Any, layer: Any) -> Numbers:
    """compressed-tensors: divisors, activation scales 6 * 448 / amax."""
    dtype = torch.get_default_dtype()
    w13, w2 = (
        _each(functools.partial(weights.nvfp4_divided, dtype=dtype), _stored(layer, half), scale, number)
        for half, scale, number in (
            ("w13", layer.w13_weight_scale, layer.w13_weight_global_scale[:, 0]),
            ("w2", layer.w2_weight_scale, layer.w2_weight_global_scale),
        )
    )
    if method.use_a16:
        return Numbers(w13, w2)
    return Numbers(w13, w2, *_nvfp4_inputs(1 / layer.w13_input_global_scale, 1 / layer.w2_input_global_scale))


def _nvfp4_inputs(*scales: Tensor) -> tuple[Quantizer, ...]:
    return tuple(activations.nvfp4(1 / scale.max().float()) for scale in scales)


def _mx(method: Any, layer: Any, read: Callable[..., Tensor]) -> Numbers:
    dtype = torch.get_default_dtype()
    w13, w2 = (
        _each(functools.partial(read, dtype=dtype), _stored(layer, half), getattr(layer, f"{half}_weight_scale"))
        for half in _HALVES
    )
    # ModelOpt's methods carry no recipe: their MXFP8 is W8A8
    quantizer = of_recipe(method.mso_activations) if hasattr(method, "mso_activations") else activations.mxfp8
    return Numbers(w13, w2, quantizer, quantizer)


def _mxfp4(method: Any, layer: Any) -> Numbers:
    return _mx(method, layer, weights.mxfp4)


def _mxfp8(method: Any, layer: Any) -> Numbers:
    return _mx(method, layer, weights.mxfp8)


def _integers(method: Any, layer: Any) -> Numbers:
    dtype, bits = torch.get_default_dtype(), method.num_bits
    w13, w2 = (
        _each(
            lambda packed, scale, zero_point: weights.integers(packed, scale, zero_point, bits, dtype),
            _stored(layer, half),
            getattr(layer, f"{half}_weight_scale"),
            None if method.symmetric else getattr(layer, f"{half}_weight_zero_point"),
        )
        for half in _HALVES
    )
    return Numbers(w13, w2)


def _int8(_method: Any, layer: Any) -> Numbers:
    w13, w2 = (_rows(_stored(layer, half), getattr(layer, f"{half}_weight_scale")) for half in _HALVES)
    return Numbers(w13, w2, activations.int8_token, activations.int8_token)


def _rows(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes [experts, N, K] under a scale for each of the N rows."""
    dtype, columns = torch.get_default_dtype(), codes.shape[-1]
    return _each(lambda code, row: weights.cells(code, row.reshape(-1, 1), (1, columns), dtype), codes, scale)


def _fp8(method: Any, layer: Any) -> Numbers:
    """FP8 with a scale for each block, for each row, or for each of gate, up and down."""
    block = getattr(method, "weight_block_size", None)
    if block is not None:
        return _fp8_blocks(layer, tuple(block))
    if layer.w13_weight_scale.dim() == 3:
        w13, w2 = (_rows(_stored(layer, half), getattr(layer, f"{half}_weight_scale")) for half in _HALVES)
        return Numbers(w13, w2, activations.fp8_token, activations.fp8_token)
    codes, scale = private(_UTILS, "process_fp8_weight_tensor_strategy_moe")(
        layer.w13_weight,
        layer.w13_weight_scale,
        layer.intermediate_size_per_partition,
        num_experts=len(layer.w13_weight),
        is_act_and_mul=method.moe.is_act_and_mul,
    )
    w13, w2 = _tensors(codes, scale), _tensors(layer.w2_weight, layer.w2_weight_scale)
    if layer.w13_input_scale is None:
        return Numbers(w13, w2, activations.fp8_tensor, activations.fp8_tensor)
    inputs = (activations.fp8_static(scale.max()) for scale in (layer.w13_input_scale, layer.w2_input_scale))
    return Numbers(w13, w2, *inputs)


def _tensors(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes [experts, N, K] under one scale an expert."""
    dtype, size = torch.get_default_dtype(), (codes.shape[1], codes.shape[2])
    return _each(lambda code, number: weights.cells(code, number.reshape(1, 1), size, dtype), codes, scale)


def _fp8_blocks(layer: Any, size: tuple[int, int]) -> Numbers:
    dtype = torch.get_default_dtype()
    w13, w2 = (
        _each(
            lambda code, scale: weights.cells(code, scale, size, dtype),
            _stored(layer, half),
            getattr(layer, f"{half}_weight_scale_inv", None)
            if hasattr(layer, f"{half}_weight_scale_inv")
            else getattr(layer, f"{half}_weight_scale"),
        )
        for half in _HALVES
    )
    quantizer = activations.fp8_blocks(size[1])
    return Numbers(w13, w2, quantizer, quantizer)


_READ: dict[str, Callable[[Any, Any], Numbers]] = {
    "nvfp4": _nvfp4,
    "nvfp4_divided": _nvfp4_divided,
    "mxfp4": _mxfp4,
    "mxfp8": _mxfp8,
    "integers": _integers,
    "int8": _int8,
    "fp8": _fp8,
}
