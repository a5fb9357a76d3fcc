"""Where the CPU emulation enters vLLM: its public list of linear kernels, and private names where there is no list.

    register_linear_kernel             public: kernels for NVFP4, MXFP4, MXFP8 and packed integers
    _POSSIBLE_FP8_BLOCK_KERNELS        block FP8 has no name in the public hook
    MarlinNvFp4LinearKernel            vLLM takes this class for NVFP4 W4A16 without asking any list
    CPUInt8ScaledMMLinearKernel        gives away a weight that latent attention reads again
    scaled_fp8_quant                   its operator is an empty shell in the CPU build
    PerTensorTorchFP8ScaledMMLinearKernel.input_quant_key
                                       asks for an operator that the CPU build does not have
    select_*_moe_backend               experts have no list at all (a TODO in fused_moe/oracle/fp8.py)
    process_weights_after_loading      of the methods of experts, to put numbers under vLLM's own BF16 experts
    _get_scheme_from_parts, get_moe_method
                                       to keep what a recipe says about activations, which vLLM's MX classes forget

Every function here replaces a name once and for good: a process that emulates does nothing else.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from vllm_mso_hub.compat import MissingName, private

LINEAR = "vllm.model_executor.kernels.linear"
EXPERTS = "vllm.model_executor.layers.fused_moe"
_QUANTIZATION = "vllm.model_executor.layers.quantization"
_CT = f"{_QUANTIZATION}.compressed_tensors"
_CT_MOE = f"{_CT}.compressed_tensors_moe.compressed_tensors_moe"

# Class of a method of experts -> (its module, the functions there that choose a backend, how experts are stored)
METHODS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "CompressedTensorsW4A4Nvfp4MoEMethod": (f"{_CT_MOE}_w4a4_nvfp4", ("select_nvfp4_moe_backend",), "nvfp4_divided"),
    "CompressedTensorsW4A4Mxfp4MoEMethod": (f"{_CT_MOE}_w4a4_mxfp4", (), "mxfp4"),
    "CompressedTensorsW4A8Mxfp4MoEMethod": (f"{_CT_MOE}_w4a8_mxfp4", (), "mxfp4"),  # chooses in its base class
    "CompressedTensorsW8A8Mxfp8MoEMethod": (f"{_CT_MOE}_w8a8_mxfp8", ("select_mxfp8_moe_backend",), "mxfp8"),
    "CompressedTensorsW8A8Fp8MoEMethod": (f"{_CT_MOE}_w8a8_fp8", ("select_fp8_moe_backend",), "fp8"),
    "CompressedTensorsW8A8Int8MoEMethod": (f"{_CT_MOE}_w8a8_int8", ("select_int8_moe_backend",), "int8"),
    "CompressedTensorsWNA16MoEMethod": (f"{_CT_MOE}_wna16", ("select_wna16_moe_backend",), "integers"),
    "ModelOptNvFp4FusedMoE": (f"{_QUANTIZATION}.modelopt", ("select_nvfp4_moe_backend",), "nvfp4"),
    "ModelOptFp8MoEMethod": (f"{_QUANTIZATION}.modelopt", ("select_fp8_moe_backend",), "fp8"),
    "ModelOptMxFp8FusedMoE": (f"{_QUANTIZATION}.modelopt", ("select_mxfp8_moe_backend",), "mxfp8"),
    "Fp8MoEMethod": (f"{_QUANTIZATION}.fp8", ("select_fp8_moe_backend",), "fp8"),
}
# Function -> (its module under fused_moe/oracle, an enum there, a member that leaves parameters as they are stored)
BACKENDS: dict[str, tuple[str, str, str]] = {
    "select_fp8_moe_backend": ("fp8", "Fp8MoeBackend", "TRITON"),
    "select_int8_moe_backend": ("int8", "Int8MoeBackend", "TRITON"),
    "select_mxfp8_moe_backend": ("mxfp8", "Fp8MoeBackend", "EMULATION"),
    "select_nvfp4_moe_backend": ("nvfp4", "NvFp4MoeBackend", "EMULATION"),
    "select_deepseek_v4_mxfp4_moe_backend": ("mxfp4", "Mxfp4MoeBackend", "EMULATION"),
    "select_wna16_moe_backend": ("int_wna16", "WNA16MoEBackend", "MARLIN"),
}
NO_CPU = {"select_mxfp8_moe_backend"}  # knows no CPU, and imports Triton kernels that cannot be imported there
_INT8 = "CPUInt8ScaledMMLinearKernel"
_STATIC_FP8 = "PerTensorTorchFP8ScaledMMLinearKernel"
NO_BACKEND = "backend"  # "No WNA16 MoE backend supports ..", "No MXFP8 MoE backends available"


CHOICES: tuple[tuple[str, str], ...] = (
    *((module, choice) for module, choices, _ in METHODS.values() for choice in choices),
    (f"{_QUANTIZATION}.mxfp4", "select_deepseek_v4_mxfp4_moe_backend"),
)


def register_kernel(kernel: type, kind: str) -> None:
    """Append a kernel to those that vLLM tries on a CPU; `kind` as in vLLM's hook, and "fp8_block"."""
    cpu = private("vllm.platforms", "PlatformEnum").CPU
    if kind == "fp8_block":
        private(LINEAR, "_POSSIBLE_FP8_BLOCK_KERNELS").setdefault(cpu, []).append(kernel)
    else:
        private(LINEAR, "register_linear_kernel")(kernel, cpu, kind)


def replace(module: str, name: str, make: Callable[[Any], Any]) -> None:
    """`module.name` (dotted names reach into classes) becomes `make` of what it was; MissingName when it is gone."""
    original = private(module, name)
    owner, _, attribute = name.rpartition(".")
    holder = private(module, owner) if owner else sys.modules[module]
    static = isinstance(vars(holder).get(attribute), staticmethod)
    replaced = make(original)
    if callable(replaced) and not isinstance(replaced, type):
        replaced = functools.wraps(original)(replaced)
    setattr(holder, attribute, staticmethod(replaced) if static else replaced)


def keep_divisors() -> None:
    """Leave compressed-tensors' global scale on the layer as it is stored: vLLM keeps its rounded reciprocal only."""

    def make(original: Any) -> Any:
        def process(self: Any, layer: Any) -> None:
            layer.mso_divisor = layer.weight_global_scale.max().float()  # vLLM's choice for the shards of a fused layer
            original(self, layer)

        return process

    module = f"{_CT}.schemes.compressed_tensors_w4a4_nvfp4"
    replace(module, "CompressedTensorsW4A4Fp4.process_weights_after_loading", make)


def keep_activations() -> None:
    """Leave `mso_activations`, a recipe's input_activations, on compressed-tensors' schemes and methods of experts."""

    def of_linear(original: Any) -> Any:
        def get_scheme(*args: Any, **kwargs: Any) -> Any:
            scheme = original(*args, **kwargs)
            scheme.mso_activations = kwargs["input_quant"] if "input_quant" in kwargs else args[2]
            return scheme

        return get_scheme

    def of_experts(original: Any) -> Any:
        def get_method(quant_config: Any, layer: Any, layer_name: str) -> Any:
            method = original(quant_config, layer, layer_name)
            scheme = quant_config.get_scheme_dict(layer, f"{layer_name}.0.{layer.ckpt_gate_proj_name}")
            method.mso_activations = (scheme or {}).get("input_activations")
            return method

        return get_method

    replace(f"{_CT}.compressed_tensors", "CompressedTensorsConfig._get_scheme_from_parts", of_linear)
    replace(_CT_MOE, "CompressedTensorsMoEMethod.get_moe_method", of_experts)


def fill_fp8_operator(quantize: Callable[[Any, Any], Any]) -> None:
    """`quantize(numbers, scale)` where vLLM calls its operator for FP8 under a given scale."""

    def make(original: Any) -> Any:
        def scaled_fp8_quant(numbers: Any, scale: Any = None, *args: Any, **kwargs: Any) -> Any:
            if scale is None or scale.numel() != 1:
                return original(numbers, scale, *args, **kwargs)
            codes = quantize(numbers, scale)
            if kwargs.get("output") is not None:
                codes = kwargs["output"].copy_(codes)
            return codes, scale

        return scaled_fp8_quant

    replace("vllm._custom_ops", "scaled_fp8_quant", make)


def quantize_in_the_kernel() -> None:
    """vLLM's kernel for static FP8 asks for inputs that a fused operator quantizes; the CPU build does not have it."""

    def make(_original: Any) -> Any:
        def input_quant_key(_self: Any) -> None:
            return None

        return input_quant_key

    replace(f"{LINEAR}.scaled_mm.pytorch", f"{_STATIC_FP8}.input_quant_key", make)


def offer_backend(module: str, choice: str, experts: type) -> None:
    """`experts` where the function `choice`, as `module` imported it, finds no backend for experts."""
    oracle, enum, member = BACKENDS[choice]
    backend = private(f"{EXPERTS}.oracle.{oracle}", f"{enum}.{member}")

    def make(original: Any) -> Any:
        if getattr(original, "mso_offers", False):
            return original

        def select(*args: Any, **kwargs: Any) -> Any:
            if choice in NO_CPU:
                return backend, experts
            try:
                found = original(*args, **kwargs)
            except (NotImplementedError, ValueError) as error:
                if NO_BACKEND not in str(error):
                    raise
                return backend, experts
            return found if found[1] is not None else (backend, experts)

        select.mso_offers = True  # type: ignore[attr-defined]
        return select

    replace(module, choice, make)


def keep_latent_weights(kernel: type) -> None:
    """`kernel` for the INT8 layer of latent attention whose weight is read again: vLLM's own gives its weight away."""

    def of_process(original: Any) -> Any:
        def process(self: Any, layer: Any) -> None:
            if getattr(layer, "_cpu_skip_gemm_dispatch", False):
                layer.mso_kernel = kernel(self.config, self.layer_param_names)
                layer.mso_kernel.process_weights_after_loading(layer)
            else:
                original(self, layer)

        return process

    def of_apply(original: Any) -> Any:
        def apply(self: Any, layer: Any, x: Any, bias: Any = None) -> Any:
            own = getattr(layer, "mso_kernel", None)
            return original(self, layer, x, bias) if own is None else own.apply_weights(layer, x, bias)

        return apply

    replace(f"{LINEAR}.scaled_mm.cpu", f"{_INT8}.process_weights_after_loading", of_process)
    replace(f"{LINEAR}.scaled_mm.cpu", f"{_INT8}.apply_weights", of_apply)


def take_any_shape() -> None:
    """vLLM asks Marlin about the shape of packed experts; on a CPU Marlin is only a name for "as they are stored"."""

    def make(_original: Any) -> Any:
        def supports(*_args: Any, **_kwargs: Any) -> bool:
            return True

        return supports

    replace(f"{_CT_MOE}_wna16", "check_moe_marlin_supports_config", make)


def dequantize_experts(method: str, install: Callable[[Any, Any, str], None], experts: type) -> None:
    """`install(method, layer, storage)` instead of vLLM's own preparation of weights, where vLLM has no experts."""
    module, _, storage = METHODS[method]

    def make(original: Any) -> Any:
        def process(self: Any, layer: Any) -> None:
            chosen = getattr(self, "experts_cls", None)
            if chosen is not None and chosen is not experts and chosen._supports_current_device():  # noqa: SLF001
                original(self, layer)
            else:
                install(self, layer, storage)

        return process

    replace(module, f"{method}.process_weights_after_loading", make)


def use_bf16_experts(replaced: Any, layer: Any, experts: type | None) -> None:
    """Put vLLM's method of BF16 experts in place of `replaced`, with experts of another class where given."""
    method = private(f"{EXPERTS}.unquantized_fused_moe_method", "UnquantizedFusedMoEMethod")(layer.moe_config)
    method.mso_replaces = type(replaced).__name__
    if experts is not None:
        method.experts_cls = experts
    layer._replace_quant_method(method)  # noqa: SLF001 - named in check_names
    method.process_weights_after_loading(layer)


def check_names() -> None:
    """MissingName with all that is gone, before anything has been replaced."""
    wanted = [
        (LINEAR, "register_linear_kernel"),
        (LINEAR, "_POSSIBLE_FP8_BLOCK_KERNELS"),
        (LINEAR, "MarlinNvFp4LinearKernel"),
        (f"{LINEAR}.scaled_mm.pytorch", f"{_STATIC_FP8}.input_quant_key"),
        (f"{LINEAR}.scaled_mm.cpu", f"{_INT8}.process_weights_after_loading"),
        ("vllm._custom_ops", "scaled_fp8_quant"),
        (f"{_CT}.compressed_tensors", "CompressedTensorsConfig._get_scheme_from_parts"),
        (_CT_MOE, "CompressedTensorsMoEMethod.get_moe_method"),
        (f"{_CT_MOE}_wna16", "check_moe_marlin_supports_config"),
        (f"{EXPERTS}.routed_experts", "RoutedExperts._replace_quant_method"),
        (f"{EXPERTS}.experts.cpu_moe", "CPUUnquantizedExperts"),
        *((module, f"{name}.process_weights_after_loading") for name, (module, _, _) in METHODS.items()),
        *CHOICES,
    ]
    gone = []
    for module, name in wanted:
        try:
            private(module, name)
        except MissingName as error:
            gone.append(str(error))
    if gone:
        raise MissingName("the CPU emulation cannot be set up: " + "; ".join(gone))
