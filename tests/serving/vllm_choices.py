"""What vLLM's own selection takes for each format on each compute capability, as JSON; runs in vLLM's Python.

    VLLM_TARGET_DEVICE=cpu python tests/serving/vllm_choices.py 75 80 ...

vLLM is imported as for a CPU; then its platform says that it is CUDA with the capability in question and that
the libraries are there which vLLM's CUDA build depends on. Its selection runs as it is. What the compiled parts would
answer is in COMPILED.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import pkgutil
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

CAPABILITY = [0]
COMPILED: dict[str, Callable[[int], bool]] = {
    "cutlass_scaled_mm_supports_fp8": lambda c: c >= 89,
    "cutlass_scaled_mm_supports_block_fp8": lambda c: c >= 90,
    "cutlass_scaled_mm_supports_fp4": lambda c: 100 <= c < 130,
    "mxfp4_experts_quant_supported": lambda c: 100 <= c < 110,
}
"""Functions of vLLM's extension that say what it was built for."""
INSTALLED = ("has_humming", "has_deep_gemm", "has_triton_kernels")
ABSENT = ("has_fbgemm_gpu", "has_hpc")


def everywhere(name: str, value: object) -> None:
    """Rebind a name in every module of vLLM that has it."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm") and name in vars(module):
            setattr(module, name, value)


def pretend_cuda() -> list[Any]:
    """Make the platform a CUDA device; returns the functions whose caches go with the capability."""
    flashinfer = importlib.import_module("vllm.utils.flashinfer")
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability, PlatformEnum

    for package in ("oracle", "experts"):
        home = importlib.import_module(f"vllm.model_executor.layers.fused_moe.{package}")
        for module in pkgutil.iter_modules(home.__path__, f"{home.__name__}."):
            with contextlib.suppress(ImportError):  # for other platforms, or with libraries of the CUDA build alone
                importlib.import_module(module.name)
    platform: Any = type(current_platform)
    platform._enum = PlatformEnum.CUDA
    platform.device_name = "cuda"
    platform.get_device_capability = classmethod(lambda *_, **__: DeviceCapability(*divmod(CAPABILITY[0], 10)))
    platform.is_cuda = platform.is_cuda_alike = lambda _: True
    platform.is_cpu = lambda _: False
    platform.supports_fp8 = classmethod(lambda _: CAPABILITY[0] >= 89)
    platform.support_deep_gemm = classmethod(lambda _: CAPABILITY[0] == 90 or CAPABILITY[0] // 10 in (10, 12))
    for name in [*INSTALLED, *(name for name in vars(flashinfer) if name.startswith("has_flashinfer"))]:
        everywhere(name, lambda *_, **__: True)
    for name in ABSENT:
        everywhere(name, lambda *_, **__: False)
    for name, answer in COMPILED.items():
        everywhere(name, answer)
    everywhere("cutlass_group_gemm_supported", lambda *_: CAPABILITY[0] == 90 or 100 <= CAPABILITY[0] < 110)
    everywhere("is_deep_gemm_e8m0_used", lambda: CAPABILITY[0] // 10 == 10)
    names = [m for m in list(sys.modules.values()) if getattr(m, "__name__", "").startswith("vllm")]
    return [v for m in names for v in list(vars(m).values()) if isinstance(v, functools._lru_cache_wrapper)]


def linear_layers() -> dict[str, Callable[[], Any]]:
    """Format -> the selection of its kernel for a linear layer of 4096 x 4096."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.quantization.utils import quant_utils as keys
    from vllm.scalar_type import scalar_types

    shape, half = (4096, 4096), torch.bfloat16

    def fp8(weight: Any, activation: Any) -> Callable[[], Any]:
        return lambda: linear.init_fp8_linear_kernel(
            activation_quant_key=activation, weight_quant_key=weight, weight_shape=shape, input_dtype=half,
            out_dtype=half, module_name="",
        )  # fmt: skip

    def packed(kind: Any, group: int, act: Any = half, *, zero_points: bool = False) -> Callable[[], Any]:
        asked = linear.MPLinearLayerConfig(shape, shape, kind, act, group, zero_points, half)
        return lambda: linear.choose_mp_linear_kernel(asked)

    return {
        "nvfp4": linear.init_nvfp4_linear_kernel,
        "nvfp4a16": lambda: linear.init_nvfp4_linear_kernel(use_a16=True),
        "mxfp4": lambda: linear.init_mxfp4_linear_kernel(keys.kMxfp4Dynamic),
        "mxfp8": lambda: linear.init_mxfp8_linear_kernel(weight_shape=shape),
        "fp8": fp8(keys.kFp8StaticTensorSym, keys.kFp8StaticTensorSym),
        "fp8_dynamic": fp8(keys.kFp8StaticChannelSym, keys.kFp8DynamicTokenSym),
        "fp8_block": fp8(keys.kFp8Static128BlockSym, keys.kFp8Dynamic128Sym),
        "fp8a16": lambda: linear.init_wfp8_a16_linear_kernel(
            activation_quant_key=keys.kFp8DynamicTokenSym, weight_quant_key=keys.kFp8StaticChannelSym,
            weight_shape=shape, input_dtype=half, out_dtype=half,
        ),
        "int8": lambda: linear.init_int8_linear_kernel(
            is_channelwise=True, is_static_input_scheme=False, input_symmetric=True, module_name=""
        ),
        "w4a16 128": packed(scalar_types.uint4b8, 128),
        "w4a16 32": packed(scalar_types.uint4b8, 32),
        "w4a16 row": packed(scalar_types.uint4b8, -1),
        "w8a16 128": packed(scalar_types.uint8b128, 128),
        "w8a16 zero points": packed(scalar_types.uint8, 128, zero_points=True),
        "w4a8_fp8": packed(scalar_types.int4, 128, torch.float8_e4m3fn),
    }  # fmt: skip


def experts() -> dict[str, Callable[[], Any]]:
    """Format -> the selection of its backend for 128 experts of 2048 x 768."""
    from compressed_tensors.quantization import QuantizationArgs
    from vllm.model_executor.layers.fused_moe import config as moe
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts import cutlass_moe
    from vllm.model_executor.layers.fused_moe.oracle import fp8, int8, int_wna16, mxfp4, mxfp8, nvfp4
    from vllm.model_executor.layers.quantization.utils import quant_utils as keys

    asked = moe.FusedMoEConfig(
        num_experts=128, experts_per_token=8, hidden_dim=2048, intermediate_size=768, num_local_experts=128,
        num_logical_experts=128, activation=MoEActivation.SILU, device="cpu",
        routing_method=moe.RoutingMethodType.Renormalize,
        moe_parallel_config=moe.FusedMoEParallelConfig.make_no_parallel(), in_dtype=torch.bfloat16,
        router_logits_dtype=torch.bfloat16, intermediate_size_per_partition=768,
    )  # fmt: skip

    def of_fp8(weight: Any, activation: Any) -> Callable[[], Any]:
        return lambda: fp8.select_fp8_moe_backend(asked, weight, activation, allow_vllm_cutlass=True)[0]

    def packed(bits: int, group: int, key: Any) -> Callable[[], Any]:
        args = QuantizationArgs(num_bits=bits, group_size=group, strategy="group", type="int", symmetric=True)
        return lambda: int_wna16.select_wna16_moe_backend(
            asked, key, args, may_have_zp=False, may_have_bias=False, allow_tile_padding=True
        )[0]

    def mxfp4_method() -> str:
        fits = cutlass_moe.CutlassExpertsMxfp4._supports_current_device()
        return "CutlassExpertsMxfp4" if fits else "MarlinExperts"

    return {
        "nvfp4": lambda: nvfp4.select_nvfp4_moe_backend(asked, keys.kNvfp4Static, keys.kNvfp4Dynamic)[0],
        "nvfp4a16": lambda: nvfp4.select_nvfp4_moe_backend(asked, keys.kNvfp4Static, None)[0],
        "mxfp4": mxfp4_method,
        "gpt_oss": lambda: mxfp4.select_mxfp4_moe_backend(asked)[0],
        "mxfp8": lambda: mxfp8.select_mxfp8_moe_backend(asked)[0],
        "fp8": of_fp8(keys.kFp8StaticTensorSym, keys.kFp8StaticTensorSym),
        "fp8_dynamic": of_fp8(keys.kFp8StaticChannelSym, keys.kFp8DynamicTokenSym),
        "fp8_block": of_fp8(keys.kFp8Static128BlockSym, keys.kFp8Dynamic128Sym),
        "int8": lambda: int8.select_int8_moe_backend(asked)[0],
        "w4a16 128": packed(4, 128, keys.kInt4Static),
        "w4a16 32": packed(4, 32, keys.kInt4Static32),
        "w8a16 128": packed(8, 128, keys.kInt8Static),
    }


def chosen(select: Callable[[], Any]) -> str:
    """Name of what a selection returns; `refused` where it finds nothing."""
    try:
        found = select()
    except ModuleNotFoundError as error:
        if error.name == "humming":  # chosen, and then imported: a dependency of the CUDA build alone
            return "Humming"
        raise
    except (ValueError, NotImplementedError):
        return "refused"
    if isinstance(found, str):
        return found
    return str(getattr(found, "name", None) or getattr(found, "__name__", None) or type(found).__name__)


def main(capabilities: list[int]) -> None:
    """Ask for every format and capability, and print the answers."""
    import vllm
    from vllm.config import VllmConfig, set_current_vllm_config

    config = VllmConfig()
    said = SimpleNamespace(model_type="llama")
    model = SimpleNamespace(hf_text_config=said, hf_config=said, quantization="mxfp4", dtype=torch.bfloat16)
    model.quantization_config = None
    object.__setattr__(config, "model_config", model)
    caches = pretend_cuda()
    cutlass = sys.modules["vllm.model_executor.kernels.linear.scaled_mm.cutlass"]
    answers: dict[str, Any] = {"vllm": vllm.__version__, "linear": {}, "experts": {}}
    with set_current_vllm_config(config):
        asked = {"linear": linear_layers(), "experts": experts()}
        for capability in capabilities:
            CAPABILITY[0] = capability
            vars(cutlass)["CUTLASS_BLOCK_FP8_SUPPORTED"] = COMPILED["cutlass_scaled_mm_supports_block_fp8"](capability)
            for part, selections in asked.items():
                for name, select in selections.items():
                    for cache in caches:
                        cache.cache_clear()
                    answers[part].setdefault(name, {})[capability] = chosen(select)
    sys.stdout.write(json.dumps(answers))


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
