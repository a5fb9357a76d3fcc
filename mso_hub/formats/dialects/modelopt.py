"""ModelOpt's unified Hugging Face format: names and the two JSON files that loaders read.

NVFP4 (Linear [N, K]): weight U8 [N, K/2], weight_scale F8_E4M3 [N, K/16], weight_scale_2 F32 [], a multiplier:
w = e2m1 * weight_scale * weight_scale_2; W4A4 adds input_scale F32 [], a multiplier too.
Source: nvidia-modelopt 0.47, torch/export/unified_export_hf.py and convert_hf_config.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

QUANT_CONFIG_FILE = "hf_quant_config.json"
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""Loaders branch on the producer: this names the release whose format is written, not the program that wrote it."""

NVFP4_SUFFIXES = {
    "codes": "weight",
    "scale": "weight_scale",
    "global": "weight_scale_2",
    "input": "input_scale",
}


def nvfp4_config(ignore: Iterable[str], *, activations: bool) -> dict[str, Any]:
    """`quantization_config` of config.json: `NVFP4` (W4A4), or `W4A16_NVFP4` without activations."""
    fp4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    group: dict[str, Any] = {"input_activations": fp4} if activations else {}
    return {
        "config_groups": {"group_0": {**group, "weights": fp4, "targets": ["Linear"]}},
        "ignore": list(ignore),
        "quant_algo": "NVFP4" if activations else "W4A16_NVFP4",
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }


def nvfp4_file(ignore: Iterable[str], *, activations: bool) -> dict[str, Any]:
    """hf_quant_config.json, which TensorRT-LLM reads; vLLM only without a quantization_config in config.json."""
    return {
        "producer": PRODUCER,
        "quantization": {
            "quant_algo": "NVFP4" if activations else "W4A16_NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": list(ignore),
        },
    }
