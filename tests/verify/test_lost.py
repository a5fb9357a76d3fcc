"""Scales of zero: legal over zeros and over numbers too small for a scale, damage over anything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from mso_hub.sink import MemorySink
from mso_hub.source import MemorySource
from mso_hub.verify import verify_checkpoint
from tests.helpers import checkpoint_files, random_tensor, tensors_in

MODULE = "model.layers.0.mlp.down_proj"
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "NVFP4": ({"scheme": "nvfp4"}, "weight_packed"),
    "NVFP4 modelopt": ({"scheme": "nvfp4", "layout": "modelopt"}, "weight"),
    "FP8 rows": ({"scheme": "fp8_dynamic"}, "weight"),
    "FP8 tensor": ({"scheme": "fp8"}, "weight"),
    "FP8 blocks": ({"scheme": "fp8_block"}, "weight"),
    "FP8 blocks modelopt": ({"scheme": "fp8_block", "layout": "modelopt"}, "weight"),
    "FP8 blocks deepseek": ({"scheme": "fp8_block", "layout": "deepseek"}, "weight"),
    "INT4 groups": ({"scheme": "w4a16", "group_size": 32}, "weight_packed"),
    "INT8 rows": ({"scheme": "int8"}, "weight"),
}


def problems(kind: str, rows: int | None, codes: str) -> list[str]:
    """verify of one weight whose scales are zero from row `rows` on, over its codes, over zeros or over saturated."""
    settings, leaf = KINDS[kind]
    files = checkpoint_files({"model.safetensors": {f"{MODULE}.weight": random_tensor(256, 256)}}, {"model_type": "x"})
    sink = MemorySink()
    convert(MemorySource(files), sink, Recipe(mode="all-linear", **settings))
    tensors = tensors_in(sink.files)
    name = next(n for n in tensors if n.endswith(("weight_scale", "weight_scale_inv")))
    whole = tensors[name].dim() < 2 or tensors[name].shape[0] == 1
    scale = tensors[name].clone().view(torch.uint8) if tensors[name].element_size() == 1 else tensors[name].clone()
    first = 0 if whole or rows is None else rows * len(scale) // 256
    if rows is not None:
        scale[first:] = 0 if scale.dim() else scale.zero_()
    tensors[name] = scale.view(tensors[name].dtype)
    if codes != "its own":
        tensors[f"{MODULE}.{leaf}"] = _codes(kind, tensors[f"{MODULE}.{leaf}"], 0 if whole else rows or 0, codes)
    made = {**sink.files, **checkpoint_files({"model.safetensors": tensors})}
    del made["mso_hub.json"]
    return list(verify_checkpoint(MemorySource(made)).problems)


def _codes(kind: str, stored: Tensor, first: int, what: str) -> Tensor:
    """The codes with zeros, or with the largest magnitude, from a row on."""
    raw = stored.clone().view(torch.uint8)
    largest = {"NVFP4": 0x7F, "FP8": 0x7E, "INT4": 0xFF, "INT8": 0x7F}[kind.split(maxsplit=1)[0]]
    zero = 0x88 if kind.startswith("INT4") else 0
    raw[first:] = zero if what == "zeros" else largest
    return raw.view(stored.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_of_zero_over_numbers_is_damage(kind: str) -> None:
    """Of half the rows; the module and how many."""
    (problem,) = problems(kind, 128, "its own")
    assert problem.startswith(f"{MODULE}: ")
    assert "scales are zero over codes that are not" in problem


@pytest.mark.parametrize("codes", ["zeros", "saturated"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_of_zero_over_zeros_is_none(kind: str, codes: str) -> None:
    """Nor over codes that are all as large as they can be, which is what a division by zero leaves."""
    assert problems(kind, 128, codes) == []


def test_each_scale_is_counted() -> None:
    """128 rows of 16 groups."""
    assert f"{MODULE}: 2,048 scales are zero over codes that are not" in problems("NVFP4", 128, "its own")[0]
