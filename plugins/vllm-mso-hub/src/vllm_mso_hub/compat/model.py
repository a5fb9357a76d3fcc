"""vLLM's configuration and model, as `vllm serve` would resolve and build them, on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from vllm_mso_hub.compat import private


def engine_config(folder: str, *, tp: int, pp: int, ep: bool, trust_remote_code: bool) -> Any:
    """The VllmConfig of `vllm serve folder -tp .. -pp ..`; raises what vLLM raises."""
    arguments = private("vllm.engine.arg_utils", "EngineArgs")(
        model=folder,
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        enable_expert_parallel=ep,
        trust_remote_code=trust_remote_code,
        enforce_eager=True,
        max_model_len=64,
        skip_tokenizer_init=True,
        distributed_executor_backend="external_launcher" if tp * pp > 1 else None,
    )
    return arguments.create_engine_config()


def meta_model(config: Any) -> Any:
    """vLLM's model of a VllmConfig with parameters on the meta device; raises what create_weights raises."""
    initialize = private("vllm.model_executor.model_loader.utils", "initialize_model")
    default_dtype = private("vllm.utils.torch_utils", "set_default_torch_dtype")
    # Keyed by the id of a model: one that is gone leaves the layers of its pipeline stage to whoever gets its address.
    private("vllm.model_executor.models.utils", "_model_to_pp_missing_layer_names").clear()
    config.device_config.device = torch.device("meta")  # where vLLM's wrapper of transformers models puts parameters
    try:
        with default_dtype(config.model_config.dtype), torch.device("meta"), _ZeroValues():
            return initialize(vllm_config=config)
    finally:  # vLLM shares these among models, and a model with data must not get one without
        private("vllm.model_executor.layers.rotary_embedding", "_ROPE_DICT").clear()


class _ZeroValues(TorchFunctionMode):
    """A constructor that reads values gets zeros: ALiBi slopes, for example, are computed and then listed."""

    _READERS = frozenset(
        (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__)
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._READERS and args[0].is_meta:
            args = (torch.zeros(args[0].shape, dtype=args[0].dtype, device="cpu"), *args[1:])
        return func(*args, **(kwargs or {}))


def optional_parameters(model: Any) -> set[str]:
    """Parameters that a checkpoint may leave out.

    KV-cache scales have defaults, some are filled from the configuration, and weight-only methods register input
    scales only to drop what older checkpoints hold.
    """
    quantization = "vllm.model_executor.layers.quantization"
    cache_method = private(f"{quantization}.kv_cache", "BaseKVCacheMethod")
    dropping = private(f"{quantization}.modelopt", "_DropInputScale")
    built = private("vllm.model_executor.model_loader.default_loader", "_CONFIG_BUILT_PARAMS")
    optional = set()
    for prefix, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        weight_only = getattr(method, "use_a16", False) or isinstance(getattr(method, "fmt", None), dropping)
        for name, _ in module.named_parameters(recurse=False):
            dropped = weight_only and name.endswith(("input_scale", "input_global_scale"))
            if isinstance(method, cache_method) or dropped or name in built:
                optional.add(f"{prefix}.{name}" if prefix else name)
    return optional
