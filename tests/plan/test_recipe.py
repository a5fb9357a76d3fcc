"""Settings: patterns over module names, and settings that make no sense."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mso_hub.errors import RecipeError
from mso_hub.formats import Scheme, build
from mso_hub.plan import Recipe
from mso_hub.plan.recipe import Patterns, default_reason, is_mlp

UP = "model.layers.1.mlp.up_proj"
COVERED = [
    (UP, UP),
    (UP, f"{UP}.weight"),
    (UP, "model.layers.1.mlp"),
    (UP, "model.layers.1"),
    (UP, "model"),
    (UP, "*.up_proj"),
    (UP, "*up_proj"),
    (UP, "*mlp*"),
    (UP, "model.layers.1*"),
    (UP, "model.layers.[12]"),
    (UP, "model.layers.?"),
    (UP, "model.*.mlp"),
    (UP, "re:.*up_proj"),
    (UP, "re:model\\.layers\\.1\\."),
    (UP, "re:.*\\.up_proj\\.weight$"),
    (UP, "re:^model"),
    ("lm_head", "lm_head"),
    ("lm_head", "lm_head*"),
    ("lm_head", "lm_head.weight"),
    ("language_model.lm_head", "*lm_head"),
]
NOT_COVERED = [
    ("model.layers.10.mlp.up_proj", "model.layers.1"),
    ("model.layers.19.mlp.up_proj", "model.layers.1.mlp"),
    ("model.layers.10.mlp.up_proj", "model.layers.?"),
    ("model.layers.3.mlp.up_proj", "model.layers.[12]"),
    ("model.layers.10.mlp.up_proj", "re:model\\.layers\\.1\\."),
    ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.gate"),
    ("model.layers.1.mlp.gate_proj", "*mlp.gate"),
    ("model.layers.1.mlp.gate_proj", "*.gate"),
    (UP, "up_proj"),
    (UP, "mlp"),
    (UP, "layers.1"),
    (UP, "mlp.*"),
    (UP, "re:layers"),
    (UP, "re:up_proj"),
    (UP, ""),
    (UP, "MODEL"),
    ("language_model.lm_head", "lm_head"),
]


@pytest.mark.parametrize(("module", "pattern"), COVERED)
def test_a_pattern_covers_a_module(module: str, pattern: str) -> None:
    """Globs cover whole names or whole leading components, `re:` matches from the start; the pattern is used."""
    patterns = Patterns([pattern])
    assert patterns.find(module) == pattern
    assert patterns.unused == []


@pytest.mark.parametrize(("module", "pattern"), NOT_COVERED)
def test_a_pattern_does_not_cover_its_neighbours(module: str, pattern: str) -> None:
    """Layer 1 is not layer 10, a router is not a projection; the pattern stays unused."""
    patterns = Patterns([pattern])
    assert patterns.find(module) is None
    assert patterns.unused == [pattern]


def test_every_pattern_that_covers_counts_as_used() -> None:
    """Two patterns for one module are both honest, a third is reported."""
    patterns = Patterns(["*.up_proj", "model.layers.1", "model.layers.7"])
    assert patterns.find(UP) in {"*.up_proj", "model.layers.1"}
    assert patterns.unused == ["model.layers.7"]


@pytest.mark.parametrize("pattern", ["re:(", "re:*", "re:[", "re:(?P<a>x)(?P<a>y)"])
def test_a_pattern_that_is_no_regular_expression_is_refused(pattern: str) -> None:
    """The error shows the pattern."""
    with pytest.raises(RecipeError, match="is not a regular expression") as caught:
        Patterns([pattern])
    assert repr(pattern) in str(caught.value)


components = st.text("ab1_-", min_size=1, max_size=4)
dotted = st.lists(components, min_size=1, max_size=5).map(".".join)


@given(module=dotted, pattern=dotted)
def test_plain_patterns_go_by_whole_components(module: str, pattern: str) -> None:
    """A plain pattern covers a module exactly when its components are the module's first ones."""
    expected = module.split(".")[: pattern.count(".") + 1] == pattern.split(".")
    assert (Patterns([pattern]).find(module) is not None) == expected


@given(module=dotted, glob=st.text("ab1.*?[]!-", max_size=8))
def test_any_text_is_a_pattern(module: str, glob: str) -> None:
    """A glob never fails, whatever brackets it has, and finding is the same every time."""
    first = Patterns([glob]).find(module)
    assert first in {None, glob}
    assert Patterns([glob]).find(module) == first


@pytest.mark.parametrize(
    "setting",
    [
        {"layout": "awq"},
        {"mode": "everything"},
        {"scale_search": "mean"},
        {"dtype": "BF15"},
        {"dtype": "I8"},
        {"input_scale": 0.0},
        {"input_scale": -1.0},
        {"input_scale": math.inf},
        {"input_scale": math.nan},
        {"input_scale": "calibrated"},
        {"activations": 8},
        {"group_size": 64},
    ],
)
def test_a_setting_that_cannot_be_is_refused(setting: dict[str, Any]) -> None:
    """The error names the setting, what it may be, and what it was."""
    with pytest.raises(RecipeError) as caught:
        Recipe(**setting)
    ((name, value),) = setting.items()
    assert str(caught.value).startswith(name)
    assert str(value) in str(caught.value)


def test_the_default_recipe_is_the_documented_one() -> None:
    """NVFP4 in compressed-tensors' layout, feed-forward layers, weight-only, searched scales."""
    recipe = Recipe()
    assert (recipe.scheme, recipe.layout, recipe.mode) == ("nvfp4", "compressed-tensors", "mlp")
    (rule,) = recipe.all_rules
    assert (rule.scheme, recipe.default_ignore) == (Scheme("nvfp4"), True)
    form = build(rule.scheme, recipe.layout)
    assert form is not None
    assert (form.search, form.activations, form.static) == ("mse", 16, False)


@pytest.mark.parametrize(
    "module",
    [
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.linear_attn.in_proj_qkv",
        "model.layers.0.linear_attn.out_proj",
        "model.layers.0.block_sparse_moe.experts.0.w1",
        "model.layers.0.feed_forward.shared_expert.down_proj",
        "model.layers.0.mixer.in_proj",
    ],
)
def test_layers_that_hold_most_of_the_model_are_not_ignored(module: str) -> None:
    """No default pattern may take a projection for a router, a gate or an output head."""
    assert default_reason(module) is None


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("transformer.h.0.mlp.c_fc", False),
        ("transformer.h.0.mlp.dense_h_to_4h", True),
        ("model.decoder.layers.0.fc1", False),
        ("mlp.up_proj", True),
        ("up_proj", False),
        ("model.layers.0.self_attn.up_proj", False),
        ("model.layers.0.mlp.gate", False),
    ],
)
def test_is_mlp_needs_a_known_leaf_under_a_known_parent(module: str, expected: bool) -> None:
    """Neither the last component nor the path alone makes a feed-forward layer."""
    assert is_mlp(module) is expected


@pytest.mark.parametrize(
    "settings",
    [{"targets": ("a",)}, {"ignore": ("a",)}, {"layout": "modelopt"}, {"mode": "all-linear"}, {"input_scale": 1.0}],
)
def test_decoding_takes_no_encoder_settings(settings: dict[str, Any]) -> None:
    """A setting that could have no effect is a mistake, not decoration."""
    with pytest.raises(RecipeError, match=rf"^{next(iter(settings))}: .* takes no such setting; leave it out"):
        Recipe(scheme="bf16", **settings)


def test_targets_and_a_mode_contradict_each_other() -> None:
    """`--all_linear --targets X` would ignore one of the two."""
    with pytest.raises(RecipeError, match="contradict each other"):
        Recipe(mode="all-linear", targets=("*.down_proj",))
