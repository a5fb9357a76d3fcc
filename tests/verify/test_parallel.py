"""Tensor-parallel sizes: which fit, and what stands in the way of the others, without any engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from mso_hub.display import report_text
from mso_hub.errors import VerifyError
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from mso_hub.sink import MemorySink
from mso_hub.source import MemorySource
from mso_hub.verify import Report, verify_checkpoint
from tests.helpers import checkpoint_files, random_tensor

LAYER = "model.layers.0"
DOWN = f"{LAYER}.mlp.down_proj"


def model(*, heads: int = 8, keys: int = 8, width: int = 256, experts: int = 0, hidden: int = 256) -> dict[str, bytes]:
    """One layer of 8 heads of 32, and an MLP or experts of `width`."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{LAYER}.self_attn.q_proj": (heads * 32, hidden),
        f"{LAYER}.self_attn.k_proj": (keys * 32, hidden),
        f"{LAYER}.self_attn.v_proj": (keys * 32, hidden),
        f"{LAYER}.self_attn.o_proj": (hidden, heads * 32),
    }
    for mlp in [f"{LAYER}.mlp.experts.{expert}" for expert in range(experts)] or [f"{LAYER}.mlp"]:
        shapes |= {f"{mlp}.{leaf}_proj": (width, hidden) for leaf in ("gate", "up")}
        shapes[f"{mlp}.down_proj"] = (hidden, width)
    config = {"model_type": "llama", "num_attention_heads": heads, "num_key_value_heads": keys}
    tensors = {f"{name}.weight": random_tensor(*shape, seed=at) for at, (name, shape) in enumerate(shapes.items())}
    return checkpoint_files({"model.safetensors": tensors}, config | ({"num_experts": experts} if experts else {}))


def checked(files: Mapping[str, bytes], scheme: str, *tp: int, ep: bool = False, **settings: Any) -> Report:
    """The model in a format, verified for some sizes."""
    sink = MemorySink()
    convert(MemorySource(files), sink, Recipe(scheme=scheme, mode="all-linear", **settings))
    return verify_checkpoint(MemorySource(sink.files), tp=tp, ep=ep)


CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any], dict[int, str]]] = {
    "NVFP4 groups": (
        {"width": 352}, "nvfp4", {},
        {4: f"{DOWN}.weight_packed: 352 columns cut into 4 are 88 each, not a multiple of the 16 that share a scale",
         8: "352 columns cut into 8 are 44 each"}),
    "MXFP8 groups": (
        {"width": 352}, "mxfp8", {"layout": "modelopt"},
        {2: "are 176 each, not a multiple of the 32", 4: "88 each", 8: "44 each"}),
    "INT4 groups": ({}, "w4a16", {"group_size": 128}, {4: "are 64 each, not a multiple of the 128", 8: "32 each"}),
    "INT4 rows": ({"width": 352}, "w4a16", {"group_size": 0}, {8: "are 44 each, not a multiple of the 8"}),
    "INT8 rows": ({"width": 352}, "int8", {}, {}),
    "FP8 rows": ({"width": 352}, "fp8_dynamic", {}, {}),
    "FP8 tensors": ({"width": 352}, "fp8", {}, {}),
    "FP8 blocks": (
        {}, "fp8_block", {},
        {4: "are 64 each, not a multiple of", 8: "are 32 each, not a multiple of"}),
    "FP8 blocks, keys that are copied": (
        {"heads": 16, "keys": 4, "hidden": 512, "width": 512}, "fp8_block", {},
        {2: "k_proj.weight: 128 rows cut into 2 are 64 each", 4: "are 32 each", 8: "are 64 each"}),
    "heads": ({"heads": 6, "keys": 3, "width": 192, "hidden": 192}, "fp8_dynamic", {},
              {2: "3 key-value heads can neither be shared out nor copied", 4: "6 attention heads cannot be shared out",
               8: "6 attention heads"}),
    "columns": ({"width": 260}, "fp8_dynamic", {}, {8: "260 columns cannot be cut into 8 equal parts"}),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_sizes_that_do_not_fit_are_problems_with_those_that_would(what: str) -> None:
    """Each with a weight, the rule and what was found; the others are none."""
    sizes, scheme, settings, expected = CASES[what]
    files = model(**sizes)
    fitting = [size for size in (1, 2, 4, 8) if size not in expected]
    assert checked(files, scheme, *fitting, **settings).problems == ()
    for size, sentence in expected.items():
        problems = checked(files, scheme, size, **settings).problems
        assert any(sentence in problem for problem in problems), problems
        assert all(problem.startswith(f"tensor-parallel size {size}: ") for problem in problems)
        assert all(f"; sizes that fit: {', '.join(map(str, fitting))}" in problem for problem in problems)


def test_keys_are_copied_to_several_ranks() -> None:
    """Two heads of keys on eight ranks: four ranks have the same one, so nothing of 32 rows is cut."""
    assert checked(model(keys=2, width=512), "nvfp4", 2, 4, 8).problems == ()


def test_experts_lie_whole_on_the_ranks_under_expert_parallelism() -> None:
    """Their limit goes, and the problem without it says so; attention stays cut."""
    (problem,) = checked(model(experts=4, width=96), "nvfp4", 4).problems
    assert "96 columns cut into 4 are 24 each" in problem
    assert problem.endswith("(and 3 more weights like it); sizes that fit: 1, 2; with expert parallelism 4 fits too")
    assert checked(model(experts=4, width=96), "nvfp4", 4, ep=True).problems == ()


def test_there_must_be_an_expert_for_every_rank() -> None:
    """Under expert parallelism."""
    (problem,) = checked(model(experts=2), "nvfp4", 4, ep=True).problems
    assert problem == "tensor-parallel size 4: config.json: 2 experts are fewer than ranks; sizes that fit: 1, 2"


def test_without_a_size_a_note_says_which_fit() -> None:
    """One line of the report, no problem."""
    report = checked(model(width=352), "nvfp4")
    assert report.problems == ()
    (note,) = report.notes
    assert note.startswith(f"fits tensor-parallel sizes 1, 2; not 4: {DOWN}.weight_packed: 352 columns")
    assert f"note    {note}" in report_text(report)
    assert checked(model(width=256), "nvfp4").notes == ("fits tensor-parallel sizes 1, 2, 4, 8",)


def test_dense_checkpoints_have_no_such_note() -> None:
    """Engines cut BF16 wherever the heads allow it."""
    assert verify_checkpoint(MemorySource(model())).notes == ()


@pytest.mark.parametrize("size", [0, -2])
def test_a_size_below_one_is_refused(size: int) -> None:
    """Before anything is read."""
    with pytest.raises(VerifyError, match=rf"tp: a tensor-parallel size is 1 or more, got {size}"):
        checked(model(), "nvfp4", size)
