"""`quantization_config` of several schemes: a loader finds each module in its own group, and in no other."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import is_match
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mso_hub.formats import FORMATS, Scheme
from mso_hub.pipeline import make_plan
from mso_hub.plan import Plan, Recipe, Rule
from mso_hub.plan.announce import group_targets
from mso_hub.plan.fusion import units
from mso_hub.source import MemorySource
from tests.helpers import checkpoint_files, random_tensor

KINDS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate", "mlp.gate_proj", "mlp.up_proj",
    "mlp.gate_up_proj", "mlp.shared_expert.up_proj", "mlp.experts.0.gate_proj", "mlp.experts.1.gate_proj",
    "mlp.experts.11.down_proj", "block_sparse_moe.experts.0.w1", "mixer.in_proj",
)  # fmt: skip
MODULES = [
    *(f"{place}.{layer}.{kind}"
      for place in ("model.layers", "mtp.layers", "vision.blocks") for layer in (0, 1, 2, 10, 11) for kind in KINDS),
    "lm_head", "model.lm_head", "model.embed_tokens", "layers", "eh_proj", "a.layers.x", "q_proj",
]  # fmt: skip
KEPT = -1


def hits(targets: Sequence[str], module: str) -> bool:
    """Does a loader find the module among the targets of a group?"""
    return any(re.match(t[3:], module) if t.startswith("re:") else t == module for t in targets)


def found(targets: Sequence[Sequence[str]], module: str) -> list[int]:
    """The groups that a loader finds for a module."""
    return [at for at, names in enumerate(targets) if hits(names, module)]


def split(group_of: dict[str, int]) -> tuple[list[list[str]], list[str]]:
    """Module -> group, KEPT for none -> modules of every group that has some, modules that stay."""
    numbers = sorted({at for at in group_of.values() if at != KEPT})
    groups = [[module for module, at in group_of.items() if at == number] for number in numbers]
    return groups, [module for module, at in group_of.items() if at == KEPT]


# --- patterns -------------------------------------------------------------------------------------


@given(group_of=st.dictionaries(st.sampled_from(MODULES), st.integers(KEPT, 2), min_size=2, max_size=40))
@example(group_of={"model.layers.1.mlp.up_proj": 0, "model.layers.11.mlp.up_proj": 1})
@example(group_of={"model.layers.0.mlp.up_proj": 0, "mtp.layers.0.mlp.up_proj": KEPT})
@example(group_of={"model.layers.0.mlp.up_proj": 0, "model.layers.1.mlp.gate_up_proj": 1})
@example(group_of={"model.layers.0.block_sparse_moe.experts.0.w1": 0, "model.layers.0.mlp.experts.0.gate_proj": KEPT})
@settings(max_examples=400, deadline=None)
def test_every_module_is_found_in_its_own_group_alone(group_of: dict[str, int]) -> None:
    """Whatever names there are and however they are grouped; what stays is found nowhere."""
    groups, kept = split(group_of)
    targets = group_targets(groups, kept)
    for at, modules in enumerate(groups):
        assert all(found(targets, module) == [at] for module in modules)
    assert not any(found(targets, module) for module in kept)
    assert all(len(names) == len(set(names)) for names in targets)


@given(
    group_of=st.dictionaries(st.sampled_from(MODULES), st.integers(KEPT, 2), min_size=2, max_size=40),
    prefix=st.sampled_from(["language_model.", "model.", "model.language_model.", "thinker.model."]),
)
@settings(max_examples=200, deadline=None)
def test_patterns_hold_under_every_prefix(group_of: dict[str, int], prefix: str) -> None:
    """Engines put `language_model.` before names, and cannot rewrite patterns."""
    groups, kept = split(group_of)
    patterns = [[t for t in names if t.startswith("re:")] for names in group_targets(groups, kept)]
    for module in group_of:
        assert found(patterns, prefix + module) == found(patterns, module)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_one_pattern_names_a_kind_of_module(data: st.DataObject) -> None:
    """Where a scheme goes by kind, or by kind and layer, no module has to be named: configs stay short."""
    layers = data.draw(st.sets(st.integers(0, 60), min_size=2, max_size=8))
    first = data.draw(st.sets(st.sampled_from(sorted(layers)), max_size=3))
    by_kind = data.draw(st.fixed_dictionaries({kind: st.integers(0, 2) for kind in KINDS if "experts" not in kind}))
    group_of = {
        f"model.layers.{layer}.{kind}": 3 if layer in first else at for kind, at in by_kind.items() for layer in layers
    }
    groups, kept = split(group_of)
    targets = group_targets(groups, kept)
    assert all(t.startswith("re:") for names in targets for t in names)
    assert all(found(targets, m) == [at] for at, modules in enumerate(groups) for m in modules)


def test_the_patterns_of_a_usual_mixture() -> None:
    """As they stand in a config."""
    model = "model.language_model.layers"
    attention = [f"{model}.{n}.self_attn.{p}_proj" for n in range(12) for p in "qkvo"]
    experts = [f"{model}.{n}.mlp.experts.{e}.{p}_proj" for n in range(1, 12) for e in range(3) for p in ("up", "down")]
    edge = [f"{model}.0.mlp.down_proj"]
    dense = [f"{model}.{n}.mlp.down_proj" for n in (4, 5)]
    assert group_targets([attention, experts, edge, dense], ["lm_head"]) == [
        [
            *(rf"re:(.*\.)?layers\.\d+\.self_attn\.{p}_proj$" for p in "qkvo"),
            r"re:(.*\.)?layers\.\d+\.self_attn\.qkv_proj$",
        ],
        [
            r"re:(.*\.)?layers\.\d+\.mlp\.experts\.\d+\.up_proj$",
            r"re:(.*\.)?layers\.\d+\.mlp\.experts\.\d+\.down_proj$",
            r"re:(.*\.)?layers\.\d+\.mlp\.experts\.\d+\.gate_up_proj$",
            r"re:(.*\.)?layers\.\d+\.mlp\.experts\.\d+\.gate_proj$",
        ],
        [r"re:(.*\.)?layers\.(0)\.mlp\.down_proj$"],
        [r"re:(.*\.)?layers\.(4|5)\.mlp\.down_proj$"],
    ]


@given(
    st.dictionaries(st.tuples(st.sampled_from(["self_attn", "mlp", "experts"]), st.integers(0, 3)), st.integers(0, 2))
)
@settings(deadline=None)
def test_the_fused_module_is_found_where_its_members_are(blocks: dict[tuple[str, int], int]) -> None:
    """vLLM asks for `qkv_proj` and `gate_up_proj`; an expert's projections it may call by Mixtral's names or others."""
    leaves = {
        "self_attn": ("q_proj", "k_proj", "v_proj"),
        "mlp": ("gate_proj", "up_proj"),
        "experts": ("0.w1", "0.w3", "0.w2"),
    }
    group_of = {
        f"model.layers.{layer}.{kind}.{leaf}": at for (kind, layer), at in blocks.items() for leaf in leaves[kind]
    }
    groups, _ = split(group_of)
    targets = group_targets(groups, [])
    for at, modules in enumerate(groups):
        for key in units(modules):
            assert found(targets, key) == [at]
        for module in (m for m in modules if m.endswith("w1")):
            asked = [f"{module.removesuffix('w1')}{p}_proj" for p in ("gate", "up", "down")]
            assert [found(targets, name) for name in asked] == [[at]] * 3


# --- whole configs --------------------------------------------------------------------------------

L = "model.layers"
CONFIG = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 2}


def matrices(*modules: str) -> dict[str, Tensor]:
    """Square matrices with room for every group size and block."""
    return {f"{module}.weight": random_tensor(128, 128, seed=at) for at, module in enumerate(modules)}


MODEL = matrices(
    *(f"{L}.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qkvo"),
    *(f"{L}.0.mlp.{p}_proj" for p in ("gate", "up", "down")),
    f"{L}.1.mlp.gate",
    *(f"{L}.1.mlp.experts.{e}.{p}_proj" for e in (0, 1) for p in ("gate", "up", "down")),
    "lm_head",
)

FP8 = Scheme("fp8", input_scale=1.0)
"""With static activation scales, which ModelOpt's layout cannot do without."""


def plan_of(*rules: Rule, **settings_: Any) -> Plan:
    """The plan for MODEL."""
    files = checkpoint_files({"model.safetensors": MODEL}, CONFIG)
    return make_plan(MemorySource(files), Recipe(rules=rules, **settings_))


def loaded(plan: Plan) -> tuple[QuantizationConfig, dict[str, list[str]]]:
    """What compressed-tensors reads from the written config.json: itself, and the groups that it finds for a module."""
    said = json.loads(plan.files["config.json"])["quantization_config"]
    parsed = QuantizationConfig.model_validate(said)
    linear = torch.nn.Linear(1, 1)
    return parsed, {
        module: [
            name for name, group in parsed.config_groups.items()
            if is_match(module, linear, group.targets, parsed.ignore or ())
        ]
        for module in (name.removesuffix(".weight") for name in MODEL)
    }  # fmt: skip


MIXED = (
    Rule(Scheme("fp8_dynamic"), ("re:.*self_attn.*",)),
    Rule(Scheme("nvfp4"), ("*.experts",)),
    Rule(Scheme("w4a16", group_size=64, symmetric=False)),
)


def test_compressed_tensors_finds_every_module_of_a_mixture() -> None:
    """The library's own matching over the library's own parsing."""
    plan = plan_of(*MIXED)
    parsed, groups = loaded(plan)
    assert parsed.format == "mixed-precision"
    by_group: dict[tuple[str, ...], set[str]] = {}
    for module, names in groups.items():
        assert len(names) == (module in plan.formats)
        by_group.setdefault(tuple(names), set()).add(plan.formats[module].name if module in plan.formats else "dense")
    assert sorted(by_group.values(), key=str) == [{"dense"}, {"fp8_dynamic"}, {"nvfp4"}, {"w4a16"}]
    formats = {group.format for group in parsed.config_groups.values()}
    assert formats == {"float-quantized", "nvfp4-pack-quantized", "pack-quantized"}
    assert "Linear" not in json.dumps(plan.config["quantization_config"])


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name, entry in FORMATS.items() for layout in entry.choices.loaders]
)
def test_one_scheme_is_one_group_of_all_linear_layers(name: str, layout: str) -> None:
    """Also where two rules name it: with one group, no engine has to match patterns."""
    scheme = FP8 if name == "fp8" else Scheme(name)
    rules = (Rule(scheme, ("re:.*self_attn.*",)), Rule(scheme, mode="all-linear"))
    no_experts = (name, layout) in {("fp8_dynamic", "modelopt"), ("fp8_block", "modelopt")}
    plan = plan_of(*rules, layout=layout, ignore=("*.experts",) if no_experts else ())
    said = plan.config["quantization_config"]
    if layout == "compressed-tensors":
        parsed, groups = loaded(plan)
        ((_, group),) = parsed.config_groups.items()
        assert group.targets == ["Linear"]
        assert parsed.format == group.format != "mixed-precision"
        assert {module for module, names in groups.items() if names} == set(plan.formats)
    elif layout == "modelopt":
        assert "quantized_layers" not in said
        assert said["quant_algo"] == next(iter(plan.formats.values())).algo
    else:
        assert (said["quant_method"], said["weight_block_size"]) == ("fp8", [128, 128])
        assert set(said["modules_to_not_convert"]) == {"lm_head", f"{L}.1.mlp.gate"}


@pytest.mark.parametrize(("first", "second"), list(permutations(FORMATS, 2)))
def test_every_pair_of_schemes_in_compressed_tensors_layout(first: str, second: str) -> None:
    """Two groups, each with its own arguments as the library's preset has them."""
    plan = plan_of(Rule(Scheme(first), ("*.experts",)), Rule(Scheme(second)))
    parsed, groups = loaded(plan)
    assert len(parsed.config_groups) == 2
    for module, form in plan.formats.items():
        (name,) = groups[module]
        group = parsed.config_groups[name]
        assert group.weights is not None
        assert group.weights.num_bits == form.bits
        assert (group.input_activations.num_bits if group.input_activations else 16) == form.activations
        assert group.format == form.group["format"]


def test_modelopt_names_every_layer_of_a_mixture() -> None:
    """And the container of experts, under which vLLM asks; both files say the same."""
    plan = plan_of(Rule(FP8, ("re:.*self_attn.*",)), Rule(Scheme("nvfp4"), ("*.experts",)), layout="modelopt")
    said = json.loads(plan.files["config.json"])["quantization_config"]
    file = json.loads(plan.files["hf_quant_config.json"])["quantization"]
    assert said["quant_algo"] == file["quant_algo"] == "MIXED_PRECISION"
    algos = {module: entry["quant_algo"] for module, entry in said["quantized_layers"].items()}
    bank = f"{L}.1.mlp.experts"
    assert algos == {m: form.algo for m, form in plan.formats.items()} | {bank: "W4A16_NVFP4"}
    assert said["quantized_layers"][bank] == {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    assert said["quantized_layers"] == file["quantized_layers"]
    assert said["ignore"] == file["exclude_modules"]
    assert not set(said["ignore"]) & set(algos)
    for group in said["config_groups"].values():
        assert {algos[target] for target in group["targets"]} == {"FP8" if group["weights"]["num_bits"] == 8
                                                                 else "W4A16_NVFP4"}  # fmt: skip


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("kv_cache", [False, True])
def test_a_cache_is_announced_when_it_is_asked_for(layout: str, kv_cache: bool) -> None:
    """FP8, one static scale a tensor, in every file that engines read."""
    plan = plan_of(Rule(FP8), layout=layout, kv_cache=kv_cache)
    said = json.loads(plan.files["config.json"])["quantization_config"]
    scheme = said.get("kv_cache_scheme")
    assert (scheme is not None) == kv_cache
    if kv_cache:
        assert (scheme["num_bits"], scheme["type"], scheme["dynamic"]) == (8, "float", False)
    if layout == "compressed-tensors":
        parsed = QuantizationConfig.model_validate(said)
        assert (parsed.kv_cache_scheme is not None) == kv_cache
    else:
        file = json.loads(plan.files["hf_quant_config.json"])["quantization"]
        assert file["kv_cache_quant_algo"] == ("FP8" if kv_cache else None)


@pytest.mark.parametrize("others", [(), (Rule(Scheme("nvfp4"), ("Linear",)),)], ids=["alone", "as the rest"])
def test_a_quantized_output_head_is_named(others: tuple[Rule, ...]) -> None:
    """vLLM's head is of a class of its own: `Linear` does not mean it, a pattern with any prefix does."""
    plan = plan_of(Rule(Scheme("nvfp4"), ("lm_head",), default_ignore=False), *others)
    said = json.loads(plan.files["config.json"])["quantization_config"]
    (group,) = said["config_groups"].values()
    assert group["targets"] == ["Linear", r"re:(.*\.)?lm_head$"]
    assert "lm_head" not in said["ignore"]
    assert is_match("language_model.lm_head", torch.nn.Embedding(1, 1), group["targets"])
