"""compressed-tensors: names of packed tensors and `quantization_config`, in both directions.

Layouts (Linear [N, K]):
    nvfp4-pack-quantized  weight_packed U8 [N, K/2], weight_scale F8_E4M3 [N, K/16],
                          weight_global_scale F32 [1], a divisor: w = e2m1 * weight_scale / weight_global_scale;
                          W4A4 adds input_global_scale F32 [1], a divisor too
    pack-quantized        weight_packed I32 [N, ceil(K*b/32)], weight_scale [N, K/g], weight_shape [2],
                          asymmetric adds weight_zero_point I32 [ceil(N*b/32), K/g], act-order weight_g_idx I32 [K]
Source: compressed-tensors 0.19, compressors/ and quantization/quant_args.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mso_hub.errors import CheckpointError

VERSION = "0.19.0"
"""Release whose JSON this writes; vLLM parses it as far back as 0.17."""


def arguments(**fields: Any) -> dict[str, Any]:
    """QuantizationArgs as JSON, every field spelled out, as the library writes it."""
    defaults: dict[str, Any] = {
        "num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "strategy": None,
        "block_structure": None, "dynamic": False, "actorder": None, "scale_dtype": None, "zp_dtype": None,
        "observer": None, "observer_kwargs": {},
    }  # fmt: skip
    return defaults | fields


def config(
    groups: Sequence[tuple[Mapping[str, Any], Sequence[str]]], ignore: Iterable[str], *, kv_cache: bool
) -> dict[str, Any]:
    """`quantization_config` of a checkpoint.

    groups    what a format says of itself (`Format.group`) and which modules have it: names, patterns or "Linear"
    kv_cache  announce an FP8 KV cache
    """
    layouts = list(dict.fromkeys(group["format"] for group, _ in groups))
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "quantization_status": "compressed",
        "format": layouts[0] if len(layouts) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": arguments(strategy="tensor") if kv_cache else None,
        "transform_config": {},
        "config_groups": {
            f"group_{at}": {"targets": list(targets), **group, "output_activations": None}
            for at, (group, targets) in enumerate(groups)
        },
    }


def _matches(target: str, module: str) -> bool:
    try:
        return target.startswith("re:") and re.match(target[3:], module) is not None
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"config.json: the target {target!r} of quantization_config is not a regular expression: {error}; "
            "restore the config.json that belongs to these weights"
        ) from error


def group_of(config: Mapping[str, Any], module: str) -> Mapping[str, Any] | None:
    """The config group that covers a module: one that names it, else one that names a class; None where none does."""
    groups = config.get("config_groups")
    by_class: Mapping[str, Any] | None = None
    for group in groups.values() if isinstance(groups, dict) else ():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            continue
        targets = group.get("targets")
        for target in (t for t in targets if isinstance(t, str)) if isinstance(targets, list) else ():
            if target == module or _matches(target, module):
                return group
            if "." not in target and not target.startswith("re:"):
                by_class = by_class or group
    return by_class


def weight_args(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """`weights` of the config group that covers a module; CheckpointError where none does."""
    group = group_of(config, module)
    if group is None:
        groups = config.get("config_groups")
        raise CheckpointError(
            f"{module}: stored packed, but no config group of quantization_config covers it "
            f"(groups: {len(groups) if isinstance(groups, dict) else 0}); restore the config.json that belongs to "
            "these weights"
        )
    weights: Mapping[str, Any] = group["weights"]
    return weights
