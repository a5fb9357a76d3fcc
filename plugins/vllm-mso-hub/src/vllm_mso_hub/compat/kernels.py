"""Layers without kernels: `create_weights` asks for a kernel, and gets one that is never called.

vLLM picks kernels while it creates the parameters, for the platform it runs on; loading never uses them. On a CPU most
formats have none, so the choice itself is what fails. Here every choice is replaced wherever it was imported to, and
put back on the way out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm_mso_hub.compat import private

_LINEAR = "vllm.model_executor.kernels.linear"
_ORACLE = "vllm.model_executor.layers.fused_moe.oracle"

_LINEAR_CHOICES = (
    "init_fp8_linear_kernel",
    "init_int8_linear_kernel",
    "init_mxfp4_linear_kernel",
    "init_mxfp6_linear_kernel",
    "init_mxfp8_linear_kernel",
    "init_nvfp4_linear_kernel",
    "init_wfp8_a16_linear_kernel",
)
# choice -> (module, its enum of backends, members to prefer: ones that keep the parameters as they are stored)
_MOE_CHOICES = {
    "select_deepseek_v4_mxfp4_moe_backend": ("mxfp4", "Mxfp4MoeBackend", ("EMULATION", "MARLIN")),
    "select_fp8_moe_backend": ("fp8", "Fp8MoeBackend", ("TRITON",)),
    "select_int8_moe_backend": ("int8", "Int8MoeBackend", ("TRITON",)),
    "select_mxfp4_moe_backend": ("mxfp4", "Mxfp4MoeBackend", ("EMULATION", "MARLIN")),
    "select_mxfp8_moe_backend": ("mxfp8", "Fp8MoeBackend", ("EMULATION", "MARLIN", "TRITON")),
    "select_nvfp4_moe_backend": ("nvfp4", "NvFp4MoeBackend", ("EMULATION", "VLLM_CUTLASS")),
    "select_unquantized_moe_backend": ("unquantized", "UnquantizedMoeBackend", ("TRITON",)),
    "select_w4a8_moe_backend": ("w4a8", "W4A8MoeBackend", ("CUTLASS",)),
    "select_wna16_moe_backend": ("int_wna16", "WNA16MoEBackend", ("MARLIN", "TRITON")),
}


class NoKernel:
    """Stands where a kernel would: every attribute is None, every call an error."""

    config: Any = None

    def __init__(self, *args: Any, **_kwargs: Any) -> None:
        self.config = args[0] if args else None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def input_quant_key(self) -> None:
        """No quantized input."""

    def get_output_padding(self) -> None:
        """No padding."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing to lay out anew."""

    def apply_weights(self, *_args: Any, **_kwargs: Any) -> None:
        """A layer was run, although only its shapes are wanted."""
        raise RuntimeError("there is no kernel in a shape proof")


@contextmanager
def no_kernels() -> Iterator[None]:
    """Inside, layers are created without choosing kernels; afterwards everything is as it was."""
    stubs: dict[str, Callable[..., Any]] = dict.fromkeys(_LINEAR_CHOICES, _new_kernel)
    stubs["choose_mp_linear_kernel"] = _kernel_class
    originals = {name: private(_LINEAR, name) for name in stubs}
    for name, (module, enum, members) in _MOE_CHOICES.items():
        originals[name] = private(f"{_ORACLE}.{module}", name)
        stubs[name] = _always(_member(f"{_ORACLE}.{module}", enum, members))
    manager = private("vllm.model_executor.layers.fused_moe.expert_map_manager", "ExpertMapManager")
    registry: Any = sys.modules[private("vllm.model_executor.models.registry", "_run_in_subprocess").__module__]
    methods = {name: getattr(manager, name) for name in ("__init__", "update")}
    moe_config = private("vllm.model_executor.layers.fused_moe.config", "FusedMoEConfig")
    checked = moe_config.__post_init__
    platform = private("vllm.platforms.cpu", "CpuPlatform")
    attention = vars(platform)["get_attn_backend_cls"]
    in_subprocess = registry._run_in_subprocess  # noqa: SLF001 - fetched above
    _rebind(originals, stubs)
    for name, method in methods.items():
        setattr(manager, name, _on_cpu(method))
    moe_config.__post_init__ = _on_any_platform(checked)
    platform.get_attn_backend_cls = classmethod(_of_any_kind(attention.__func__))
    registry._run_in_subprocess = _in_this_process  # noqa: SLF001
    try:
        yield
    finally:
        moe_config.__post_init__ = checked
        platform.get_attn_backend_cls = attention
        registry._run_in_subprocess = in_subprocess  # noqa: SLF001
        for name, method in methods.items():
            setattr(manager, name, method)
        _rebind(stubs, originals)


def _rebind(old: dict[str, Callable[..., Any]], new: dict[str, Callable[..., Any]]) -> None:
    """Replace functions in every module of vLLM that holds them, under whatever they were imported from."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm."):
            names = vars(module)
            for name in old.keys() & names.keys():
                if names[name] is old[name]:
                    names[name] = new[name]


def _member(module: str, enum: str, names: tuple[str, ...]) -> Any:
    members = private(module, enum).__members__
    found = next((members[name] for name in names if name in members), None)
    return private(module, f"{enum}.{names[0]}") if found is None else found


def _new_kernel(*_args: Any, **_kwargs: Any) -> NoKernel:
    return NoKernel()


def _kernel_class(*_args: Any, **_kwargs: Any) -> type[NoKernel]:
    return NoKernel


def _always(backend: Any) -> Callable[..., Any]:
    def choose(*_args: Any, **_kwargs: Any) -> tuple[Any, None]:
        return backend, None

    return choose


def _on_cpu(method: Callable[..., Any]) -> Callable[..., Any]:
    """Index tensors are read while loading, so they must hold numbers even when parameters do not."""

    def call(*args: Any, **kwargs: Any) -> Any:
        import torch

        with torch.device("cpu"):
            return method(*args, **kwargs)

    return call


def _on_any_platform(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """The last check of an MoE configuration is for a platform whose kernels have experts without a gate."""

    def call(config: Any) -> None:
        try:
            check(config)
        except NotImplementedError as error:
            if "is_act_and_mul" not in str(error):
                raise

    return call


def _of_any_kind(choose: Callable[..., Any]) -> Callable[..., Any]:
    """A CPU has no FP8 cache for latent attention and no sparse one; which GPUs have is no question of what loads."""

    def call(cls: Any, selected: Any, attn_selector_config: Any, **kwargs: Any) -> Any:
        plain = attn_selector_config._replace(kv_cache_dtype=None, use_sparse=False)
        return choose(cls, selected, attn_selector_config=plain, **kwargs)

    return call


def _in_this_process(inspect: Callable[[], Any]) -> Any:
    """vLLM inspects a model class in a process of its own to keep CUDA out of this one; here there is no CUDA."""
    return inspect()
