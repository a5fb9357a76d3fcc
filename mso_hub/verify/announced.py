"""What a quantization_config announces for a module, as vLLM's loaders understand it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from mso_hub.formats.detect import TEXT_CONFIGS
from mso_hub.formats.dialects import compressed_tensors, modelopt
from mso_hub.plan.recipe import DEFAULT_IGNORE

METHODS = ("compressed-tensors", "modelopt", "fp8")
"""Methods whose loaders are known here."""
LISTS = ("ignore", "exclude_modules", "modules_to_not_convert")
"""Names of the list of modules that stay: compressed-tensors and ModelOpt, older ModelOpt, fp8."""
ROUTER = re.compile(r"\.(gate|router|router\.layer|router\.classifier)$")
PLAIN_ROUTERS = frozenset(
    ["afmoe", "axk1", "bailing_moe", "bailing_moe_v2", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32",
     "ernie4_5_moe", "exaone_moe", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granitemoe",
     "granitemoehybrid", "jamba", "kimi_k2", "llama4", "llama4_text", "mimo_v2_flash", "minimax_m2", "mixtral",
     "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next", "step3p5"]
)  # fmt: skip
"""Model types whose routers vLLM 0.32 builds without a quantization config. Qwen3-MoE's is a quantized linear layer."""
ALWAYS_DENSE = re.compile(r"\.(shared_expert_gate|weights_proj|eh_proj)$")
"""Layers that vLLM builds without a quantization config in every model that has them."""
HEAD = re.compile(DEFAULT_IGNORE["output head"].pattern + r"|(^|\.)shared_head(\.|$)")


def entries(config: Mapping[str, Any]) -> list[str]:
    """Modules that a config says stay dense."""
    found: list[Any] = next((config[key] for key in LISTS if isinstance(config.get(key), list)), [])
    return [entry for entry in found if isinstance(entry, str)]


def covering(config: Mapping[str, Any], module: str) -> str | None:
    """The entry of the ignore list that covers a module; None where none does."""
    return next((e for e in entries(config) if ignored_by({**config, **_only(config, e)})(module)), None)


def _only(config: Mapping[str, Any], entry: str) -> dict[str, list[str]]:
    return {next(key for key in LISTS if isinstance(config.get(key), list)): [entry]}


def compiled(entry: str) -> re.Pattern[str] | None:
    """A `re:` entry, None when it is not a regular expression."""
    try:
        return re.compile(entry.removeprefix("re:"))
    except (re.error, OverflowError, RecursionError):
        return None


def ignored_by(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Does the ignore list of a quantization_config cover a module, as vLLM decides it?

    compressed-tensors entries match exactly or as `re:` patterns, those of fp8 exactly, ModelOpt's as globs and as
    substrings.
    """
    listed = entries(config)
    method = config.get("quant_method")
    if method == "modelopt":
        globs = [e for e in listed if any(c in e for c in "*?[")]
        return lambda module: any(e in module for e in listed) or any(fnmatchcase(module, e) for e in globs)
    names = set(listed)
    patterns = [p for p in map(compiled, (e for e in listed if e.startswith("re:"))) if p is not None]
    return lambda module: module in names or any(p.match(module) for p in patterns)


PLAIN_HEADS = frozenset({"fp8", "gptq", "awq", "auto-round", "mxfp4"})
"""Quantization methods that leave the output head alone unless their config has `lm_head: true`."""


def model_type(config: Mapping[str, Any]) -> str:
    """The text model's `model_type` in config.json, "" where there is none."""
    nested = (config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict))
    found = next((model_type(part) for part in nested), "") or config.get("model_type")
    return found if isinstance(found, str) else ""


def never_packed(config: Mapping[str, Any], module: str, model_type: str) -> bool:
    """Is a module dense whatever the config says, because engines never ask it about this one?

    model_type  of the text model; its router counts as one that is asked unless it is known not to be
    """
    if DEFAULT_IGNORE["embedding"].search(module) or ALWAYS_DENSE.search(module):
        return True
    if config.get("quant_method") in PLAIN_HEADS and HEAD.search(module) and not config.get("lm_head"):
        return True
    return ROUTER.search(module) is not None and model_type in PLAIN_ROUTERS


def expects_packed(config: Mapping[str, Any], module: str) -> bool:
    """Does a loader expect a linear module that is not ignored to be packed?"""
    if config.get("quant_method") == "compressed-tensors":
        return compressed_tensors.group_of(config, module) is not None
    if config.get("quant_method") == "modelopt":
        return modelopt.algorithm(config, module) is not None
    return True


def needs_input_scale(config: Mapping[str, Any], module: str) -> bool:
    """Does a loader read an activation scale for a module?"""
    if config.get("quant_method") == "compressed-tensors":
        group = compressed_tensors.group_of(config, module)
        inputs = group.get("input_activations") if group is not None else None
        return isinstance(inputs, dict) and inputs.get("dynamic") in (False, "local", None)
    if config.get("quant_method") == "modelopt":
        return modelopt.algorithm(config, module) in ("FP8", "NVFP4")
    return config.get("activation_scheme") == "static"


def activation_bits(config: Mapping[str, Any], module: str) -> int:
    """Bits of an activation that is multiplied with a module's weight; 16 stands for all that is not quantized."""
    if config.get("quant_method") == "compressed-tensors":
        group = compressed_tensors.group_of(config, module)
        inputs = group.get("input_activations") if group is not None else None
        bits = inputs.get("num_bits") if isinstance(inputs, dict) else None
        return bits if isinstance(bits, int) and 0 < bits < 16 else 16
    if config.get("quant_method") == "modelopt":
        algo = modelopt.algorithm(config, module) or ""
        return 4 if algo == "NVFP4" else 8 if algo.startswith(("FP8", "MXFP8")) else 16
    return 8 if config.get("quant_method") == "fp8" else 16


def announces_cache(config: Mapping[str, Any]) -> bool:
    """Does a config announce a quantized KV cache?"""
    return bool(config.get("kv_cache_scheme") or config.get("kv_cache_quant_algo"))
