"""DeepSeek's FP8: `weight` F8_E4M3 and `weight_scale_inv` F32 [N/128, K/128], a multiplier despite its name.

Source: config.json and the inference code of DeepSeek-V3; vLLM and SGLang load it as quant_method `fp8`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def config(ignore: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": list(ignore),
    }
