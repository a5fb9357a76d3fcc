"""Packed weights that nobody understands because a tensor of theirs is not stored: which one it is."""

from __future__ import annotations

from collections.abc import Mapping

from mso_hub.checkpoint import TensorInfo
from mso_hub.formats.detect import UNREAD, quantization_configs
from mso_hub.formats.dialects import modelopt
from mso_hub.verify.opened import Opened

CODES = {"weight_packed": ("U8", "I32"), "weight": ("F8_E4M3", "U8", "I8")}
"""Name of the codes -> dtypes that only codes have."""
SCALES = ("weight_scale", "weight_scale_inv", "weight_global_scale", "weight_scale_2")


def refusals(mine: Opened) -> dict[str, str]:
    """Module -> why its packed weight is not understood; a tensor that is missing is named."""
    stored: dict[str, dict[str, TensorInfo]] = {}
    for shard in mine.checkpoint.shards.values():
        for info in shard.tensors:
            module, _, leaf = info.name.rpartition(".")
            if module in mine.refused:
                stored.setdefault(module, {})[leaf] = info
    return {
        module: _missing(mine, module, stored.get(module, {})) or reason if UNREAD in reason else reason
        for module, reason in mine.refused.items()
    }


def _missing(mine: Opened, module: str, stored: Mapping[str, TensorInfo]) -> str:
    """A sentence about the one tensor without which the others mean nothing; "" where it is not that."""
    config = next(iter(quantization_configs(mine.checkpoint.config)), {})
    codes = next((leaf for leaf, dtypes in CODES.items() if leaf in stored and stored[leaf].dtype in dtypes), None)
    scales = [leaf for leaf in SCALES if leaf in stored]
    lost = ""
    if codes is None and scales and "weight" not in stored:
        lost = "weight or weight_packed" if config.get("quant_method") == "compressed-tensors" else "weight"
    elif codes is not None and not scales:
        lost = "weight_scale_inv" if config.get("quant_method") == "fp8" else "weight_scale"
    elif codes is not None and scales == ["weight_scale"] and "NVFP4" in (modelopt.algorithm(config, module) or ""):
        lost = "weight_scale_2"
    there = ", ".join(f"{leaf} {stored[leaf].dtype} {list(stored[leaf].shape)}" for leaf in (codes, *scales) if leaf)
    return f"{module}: {there} is stored, {module}.{lost} is not; the checkpoint is incomplete" if lost else ""
