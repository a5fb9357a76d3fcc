"""Every format of the table of formats generates on a CPU, and says what the decompressed BF16 checkpoint says.

All variants of Llama and Qwen3-MoE; of Mixtral, DeepSeek-V3 and the small trained model one for each format, layout
and width of activations, and for each layout one with a KV cache, one of several formats and one that leaves part of
the linear layers alone. Each is made by this project's own engine,
run by vLLM with this package's emulation, and compared with the BF16 checkpoint that the engine decompresses it to:
equal where only weights are quantized, within `matrix.GAPS` where activations are too.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from matrix import GAPS, MODELS, TOKENS, References, answers, gap, mean_difference
from models import WEIGHTS, converted
from mso_hub import Recipe
from variants import VARIANTS, Variant, first_of_each_family, refusal
from vllm_mso_hub.job import Job
from vllm_mso_hub.shapes import prove

Folders = Callable[[str], Path]

EVERY_VARIANT = ("llama", "qwen3_moe")
GRID = [
    (model, variant)
    for model in MODELS
    for variant in (VARIANTS if model in EVERY_VARIANT else first_of_each_family(model))
    if refusal(model, variant) is None
]
FREEZE = gc.freeze


@pytest.fixture(autouse=True)
def frozen_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is imported by now stays frozen. For every engine vLLM thaws it and collects garbage seven times, and
    searching a million objects of modules is five sixths of the time that a tiny model takes."""
    gc.collect()
    FREEZE()
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr(gc, "unfreeze", lambda: None)


@pytest.fixture(scope="module")
def references() -> References:
    return References()


@pytest.mark.parametrize(("model", "variant"), [pytest.param(m, v, id=f"{m}-{v.name}") for m, v in GRID])
def test_it_answers_like_the_decompressed_checkpoint(
    model: str, variant: Variant, tiny: Folders, references: References, tmp_path: Path
) -> None:
    packed = converted(tiny(model), variant.recipe, tmp_path / "packed")
    ours, kernels = answers(model, packed)
    theirs = references.answers(model, converted(packed, Recipe(scheme="bf16"), tmp_path / "dense"))
    assert all(len(output["tokens"]) == TOKENS for output in ours)
    assert all(math.isfinite(output["prompt_nll"]) for output in ours)
    if gap(variant) == 0:
        assert ours == theirs, kernels
    else:
        assert mean_difference(ours, theirs) <= gap(variant), kernels


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["nvfp4 compressed-tensors a16", "nvfp4 modelopt a16", "mxfp4 compressed-tensors a16"])
def test_four_bit_floats_without_quantized_activations_are_held_to_equality(model: str, name: str) -> None:
    variant = next(variant for of, variant in GRID if of == model and variant.name == name)
    assert gap(variant) == 0


def test_a_proof_of_shapes_leaves_nothing_that_a_model_with_data_gets(tiny: Folders) -> None:
    """vLLM shares rotary embeddings among the models of a process."""
    before, _ = answers("llama", tiny("llama"))
    hook = sys.excepthook
    assert prove(Job.of_folder(tiny("llama"), tp=(1, 2))).ok
    assert sys.excepthook is hook
    assert answers("llama", tiny("llama"))[0] == before


def test_scales_that_are_wrong_cost_more_than_any_format_may(
    tiny: Folders, references: References, tmp_path: Path
) -> None:
    """Else the limits would let anything pass."""
    packed = converted(tiny("llama"), Recipe(mode="all-linear", layout="modelopt"), tmp_path / "packed")
    theirs = references.answers("llama", converted(packed, Recipe(scheme="bf16"), tmp_path / "dense"))
    tensors = load_file(packed / WEIGHTS)
    wrong = {name: 2 * value if name.endswith("weight_scale_2") else value for name, value in tensors.items()}
    save_file(wrong, packed / WEIGHTS, {"format": "pt"})
    ours, _ = answers("llama", packed)
    assert mean_difference(ours, theirs) > max(GAPS.values())
