"""ModelOpt's unified Hugging Face format: the two JSON files that loaders read.

Layouts (Linear [N, K]), every scale a multiplier:
    NVFP4, W4A16_NVFP4           weight U8 [N, K/2], weight_scale F8_E4M3 [N, K/16], weight_scale_2 F32 [];
                                 W4A4 adds input_scale F32 []
    FP8                          weight F8_E4M3 [N, K], weight_scale F32 [], input_scale F32 []
    FP8_PER_CHANNEL_PER_TOKEN    weight F8_E4M3 [N, K], weight_scale F32 [N]
    FP8_PB_WO                    weight F8_E4M3 [N, K], weight_scale F32 [N/128, 1, K/128, 1], rounded up
    MXFP8                        weight F8_E4M3 [N, K], weight_scale U8 [N, K/32]
Source: nvidia-modelopt 0.47, torch/export/unified_export_hf.py and convert_hf_config.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

QUANT_CONFIG_FILE = "hf_quant_config.json"
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""Loaders branch on the producer: this names the release whose format is written, not the program that wrote it."""
GROUP_SIZES = {"NVFP4": 16, "W4A16_NVFP4": 16, "MXFP8": 32}
"""Algorithms whose entries carry a group size."""
MIXED = "MIXED_PRECISION"


def _sizes(algo: str) -> dict[str, int]:
    return {"group_size": GROUP_SIZES[algo]} if algo in GROUP_SIZES else {}


def _group(algo: str, targets: Sequence[str]) -> dict[str, Any] | None:
    """A config group, for the algorithms that ModelOpt writes one for."""
    if algo not in ("FP8", "NVFP4", "W4A16_NVFP4"):
        return None
    numbers: dict[str, Any] = {"dynamic": False, "num_bits": 8 if algo == "FP8" else 4, "type": "float"}
    if algo != "FP8":
        numbers["group_size"] = 16
    inputs = {} if algo == "W4A16_NVFP4" else {"input_activations": dict(numbers)}
    return {**inputs, "weights": numbers, "targets": list(targets)}


def _quantized_layers(groups: Sequence[tuple[str, Sequence[str]]]) -> dict[str, dict[str, Any]]:
    layers = {module: {"quant_algo": algo, **_sizes(algo)} for algo, modules in groups for module in modules}
    return dict(sorted(layers.items()))


def config(groups: Sequence[tuple[str, Sequence[str]]], ignore: Iterable[str], *, kv_cache: bool) -> dict[str, Any]:
    """`quantization_config` of config.json.

    groups    quant_algo and the modules that have it; with one group the modules are not named
    kv_cache  announce an FP8 KV cache
    """
    mixed = len(groups) > 1
    listed = [_group(algo, modules if mixed else ["Linear"]) for algo, modules in groups]
    entries = {f"group_{at}": group for at, group in enumerate(g for g in listed if g is not None)}
    content: dict[str, Any] = {"config_groups": entries} if entries else {}
    if mixed:
        content["quantized_layers"] = _quantized_layers(groups)
    content |= {"ignore": list(ignore), "quant_algo": MIXED if mixed else groups[0][0]}
    if kv_cache:
        content["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return {**content, "producer": PRODUCER, "quant_method": "modelopt"}


def file(groups: Sequence[tuple[str, Sequence[str]]], ignore: Iterable[str], *, kv_cache: bool) -> dict[str, Any]:
    """hf_quant_config.json, which TensorRT-LLM reads; vLLM only without a quantization_config in config.json."""
    mixed = len(groups) > 1
    content: dict[str, Any] = {
        "quant_algo": MIXED if mixed else groups[0][0],
        "kv_cache_quant_algo": "FP8" if kv_cache else None,
    }
    content |= {"quantized_layers": _quantized_layers(groups)} if mixed else _sizes(groups[0][0])
    return {"producer": PRODUCER, "quantization": {**content, "exclude_modules": list(ignore)}}


def algorithm(config: Mapping[str, Any], module: str) -> str | None:
    """The quant_algo that a `quantization_config` gives a module, in upper case; None where it gives none."""
    layers = config.get("quantized_layers")
    if isinstance(layers, dict):
        entry = layers.get(module)
        said = entry.get("quant_algo") if isinstance(entry, dict) else None
    else:
        said = config.get("quant_algo")
    return said.upper() if isinstance(said, str) else None


def group_size(config: Mapping[str, Any], module: str) -> int | None:
    """Columns per scale that a `quantization_config` gives a module; None where it gives none."""
    layers, groups = config.get("quantized_layers"), config.get("config_groups")
    if isinstance(layers, dict):
        places = [layers.get(module)]
    else:
        listed = list(groups.values()) if isinstance(groups, dict) else []
        places = [config, *(group.get("weights") for group in listed if isinstance(group, dict) and len(listed) == 1)]
    sizes = [place.get("group_size") for place in places if isinstance(place, dict)]
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)
