"""Ordered rules: the first that covers a module decides; what no rule can mean or no runtime loads is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mso_hub.checkpoint import TensorInfo
from mso_hub.errors import PlanError, RecipeError
from mso_hub.formats import ALIASES, DENSE, FORMATS, Scheme, build
from mso_hub.formats.weight import Weight
from mso_hub.pipeline import make_plan
from mso_hub.plan import Recipe, Rule
from mso_hub.plan.select import Selection, select
from mso_hub.source import MemorySource
from tests.helpers import checkpoint_files, random_tensor

L = "model.layers"
CONFIG = {"num_hidden_layers": 4, "hidden_size": 128, "moe_intermediate_size": 256}
FP8, FP4, INT4, STAY = Scheme("fp8_dynamic"), Scheme("nvfp4"), Scheme("w4a16"), Scheme(DENSE)


def dense(name: str, *shape: int) -> Weight:
    """A weight that lies in one tensor."""
    return Weight(name, "BF16", shape, {"weight": TensorInfo(name, "BF16", shape, "model.safetensors")})


def linear(*modules: str) -> list[Weight]:
    """Matrices with room for every format."""
    return [dense(f"{module}.weight", 128, 128) for module in modules]


def choose(weights: list[Weight], *rules: Rule, **settings_: Any) -> Selection:
    """What the rules make of weights."""
    return select(weights, Recipe(rules=rules, **settings_), CONFIG)


def formats(selection: Selection) -> dict[str, str]:
    """Module -> format's name."""
    return {module: form.name for module, form in selection.formats.items()}


MODULES = [f"{L}.{n}.{leaf}" for n in range(4) for leaf in ("self_attn.o_proj", "mlp.down_proj", "mixer.out_proj")]
PATTERNS: dict[str, Callable[[str], bool]] = {
    "*.o_proj": lambda module: module.endswith(".o_proj"),
    "re:.*down_proj$": lambda module: module.endswith("down_proj"),
    f"{L}.1": lambda module: module.startswith(f"{L}.1."),
    f"{L}.[02]": lambda module: module.startswith((f"{L}.0.", f"{L}.2.")),
    f"{L}.3.mlp.down_proj": lambda module: module == f"{L}.3.mlp.down_proj",
    "Linear": lambda module: True,
}
SCHEMES = ("nvfp4", "fp8_dynamic", "mxfp8", DENSE)


# --- order ----------------------------------------------------------------------------------------


@given(
    picks=st.lists(
        st.tuples(st.sampled_from(SCHEMES), st.sets(st.sampled_from(sorted(PATTERNS)), min_size=1, max_size=3)),
        min_size=1, max_size=5,
    )
)  # fmt: skip
@settings(deadline=None)
def test_the_first_rule_that_covers_a_module_decides(picks: list[tuple[str, set[str]]]) -> None:
    """For any rules in any order; and exactly the rules that decide nothing are called idle."""
    rules = [Rule(Scheme(scheme), tuple(sorted(patterns))) for scheme, patterns in picks]
    if not any(scheme != DENSE for scheme, _ in picks):
        with pytest.raises(RecipeError, match="rules must quantize something"):
            Recipe(rules=tuple(rules))
        return
    first = {
        module: next((at for at, (_, names) in enumerate(picks) if any(PATTERNS[n](module) for n in names)), None)
        for module in MODULES
    }
    found = choose(linear(*MODULES), *rules)
    assert found.problems == ()
    assert formats(found) == {m: picks[at][0] for m, at in first.items() if at is not None and picks[at][0] != DENSE}
    for module, at in first.items():
        if at is None:
            assert found.kept[module][1] == ("no target matches" if len(rules) == 1 else "no rule covers it")
        elif picks[at][0] == DENSE:
            assert found.kept[module][1] == f"rule {rules[at].label}"
    idle = {at for at in range(len(rules)) if at not in first.values()}
    assert len(found.idle) == len(idle)
    assert all(any(sentence.startswith(f"rule {at + 1} (") for sentence in found.idle) for at in idle)


def test_a_rule_that_comes_too_late_is_a_problem_that_names_the_earlier_one() -> None:
    """Rules from the general to the special are the usual mistake."""
    rules = (Rule(FP4, mode="all-linear"), Rule(FP8, ("re:.*o_proj",)))
    (sentence,) = choose(linear(*MODULES), *rules).idle
    assert sentence == (
        "rule 2 (fp8_dynamic for re:.*o_proj) gets nothing, rule 1 (nvfp4 for all-linear) before it covers every "
        "module it names; put it first or leave it out"
    )
    assert choose(linear(*MODULES), *rules[::-1]).idle == ()


def test_a_rule_behind_several_others_names_them_all() -> None:
    """It is covered by them together."""
    rules = (Rule(FP8, ("*.o_proj",)), Rule(FP4, ("*.down_proj",)), Rule(INT4, ("*.o_proj", "*.down_proj")))
    (sentence,) = choose(linear(*MODULES), *rules).idle
    assert "rule 1 (fp8_dynamic for *.o_proj) and rule 2 (nvfp4 for *.down_proj) before it" in sentence


def test_a_partial_overlap_is_a_note() -> None:
    """Special rules before general ones overlap on purpose; the plan says how many weights the first took."""
    found = choose(linear(*MODULES), Rule(FP8, (f"{L}.0",)), Rule(FP4, ("*.down_proj",)))
    (sentence,) = found.overlaps
    assert sentence == (
        "1 weights are covered by rule 1 (fp8_dynamic for model.layers.0) and by rule 2 (nvfp4 for *.down_proj): the "
        "first decides"
    )
    assert (found.idle, found.problems) == ((), ())
    assert formats(found)[f"{L}.0.mlp.down_proj"] == "fp8_dynamic"
    files = checkpoint_files({"m.safetensors": {f"{m}.weight": random_tensor(128, 128) for m in MODULES}}, CONFIG)
    rules = (Rule(FP8, (f"{L}.0",)), Rule(FP4, ("*.down_proj",)))
    assert make_plan(MemorySource(files), Recipe(rules=rules)).notes == found.overlaps


def test_the_last_rule_may_be_a_mode() -> None:
    """Special modules first, then the rest of the feed-forward layers; attention stays."""
    found = choose(linear(*MODULES), Rule(FP8, (f"{L}.0.mlp", f"{L}.3.mlp")), Rule(FP4))
    assert formats(found) == {
        f"{L}.{n}.mlp.down_proj": "fp8_dynamic" if n in (0, 3) else "nvfp4" for n in range(4)
    }  # fmt: skip
    assert found.kept[f"{L}.0.self_attn.o_proj"][1] == "outside the MLP (--all_linear takes it)"


@pytest.mark.parametrize("pattern", ["*.typo", "re:nothing", f"{L}.7", "model.norm", "lm_head*"])
def test_a_pattern_without_a_match_is_named(pattern: str) -> None:
    """Also when its rule has others that match; what stays by default is no match either."""
    weights = [*linear(*MODULES, "lm_head"), dense("model.norm.weight", 128)]
    found = choose(weights, Rule(FP8, ("*.o_proj", pattern)), Rule(FP4))
    (sentence,) = found.idle
    assert sentence.startswith(f"targets {pattern!r} matches no weight that could be quantized")
    (sentence,) = choose(weights, Rule(FP8, (pattern,)), Rule(FP4)).idle
    assert sentence.startswith(f"targets {pattern!r} matches no weight")


def test_ignore_comes_before_every_rule() -> None:
    """One list for all of them."""
    found = choose(linear(*MODULES), Rule(FP8, ("*.o_proj",)), Rule(FP4), ignore=(f"{L}.2",))
    assert not any(module.startswith(f"{L}.2.") for module in found.formats)
    assert found.kept[f"{L}.2.mlp.down_proj"][1] == f"ignore {L}.2"


def test_a_dense_rule_keeps_modules_and_their_names_reach_the_ignore_list() -> None:
    """`bf16` as a scheme: everything but these."""
    rules = (Rule(STAY, (f"{L}.0", "*.o_proj")), Rule(FP4, mode="all-linear"))
    tensors = {f"{module}.weight": random_tensor(128, 128) for module in MODULES}
    plan = make_plan(MemorySource(checkpoint_files({"m.safetensors": tensors}, CONFIG)), Recipe(rules=rules))
    stays = {m for m in MODULES if m.startswith(f"{L}.0.") or m.endswith("o_proj")}
    assert set(plan.kept) == stays
    assert set(plan.kept.values()) == {f"rule bf16 for {L}.0, *.o_proj"}
    assert stays <= set(plan.config["quantization_config"]["ignore"])
    assert set(plan.formats) == set(MODULES) - stays


# --- what must be stored alike --------------------------------------------------------------------


def attention(layer: int = 0) -> list[Weight]:
    """The projections that engines fuse into one."""
    return linear(*(f"{L}.{layer}.self_attn.{p}_proj" for p in "qkv"))


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (FP4, f"{L}.0.self_attn.q_proj becomes fp8_dynamic, {L}.0.self_attn.k_proj nvfp4"),
        (STAY, f"{L}.0.self_attn.k_proj stays (rule bf16 for Linear), {L}.0.self_attn.q_proj does not"),
    ],
)
def test_a_fused_unit_may_not_be_split_over_two_rules(other: Scheme, found: str) -> None:
    """One parameter of the engine has one format."""
    (problem,) = choose(attention(), Rule(FP8, ("*.q_proj",)), Rule(other, ("Linear",))).problems
    assert problem == (
        f"{L}.0.self_attn.qkv_proj: engines fuse {L}.0.self_attn.q_proj, {L}.0.self_attn.k_proj, "
        f"{L}.0.self_attn.v_proj, so all must be stored alike; {found}: give all of them to one rule, or ignore all"
    )


@pytest.mark.parametrize("settings_", [{"activations": 4}, {"search": "absmax"}])
def test_one_format_with_other_settings_is_another_format(settings_: dict[str, Any]) -> None:
    """W4A16 beside W4A4 in one parameter cannot be loaded; two searches for one scale cannot be meant."""
    rules = (Rule(FP4, ("*.q_proj",)), Rule(Scheme("nvfp4", **settings_), ("Linear",)))
    (problem,) = choose(attention(), *rules).problems
    assert problem.startswith(f"{L}.0.self_attn.qkv_proj: engines fuse")


def test_two_rules_of_one_format_may_share_a_unit() -> None:
    """What matters is the result."""
    found = choose(attention(), Rule(FP8, ("*.q_proj",)), Rule(FP8, ("Linear",)))
    assert found.problems == ()
    assert {len(members) for members in found.units.values()} == {3}


BANK = f"{L}.0.mlp.experts"
SEPARATE = linear(*(f"{BANK}.{e}.{p}_proj" for e in range(3) for p in ("gate", "up", "down")))
FUSED = [dense(f"{BANK}.gate_up_proj", 3, 512, 128), dense(f"{BANK}.down_proj", 3, 128, 256)]


@pytest.mark.parametrize(
    ("weights", "target"),
    [(SEPARATE, "*.down_proj"), (SEPARATE, f"{BANK}.1"), (FUSED, "*.down_proj"), (FUSED, "*.gate_up_proj")],
    ids=["by projection", "by expert", "fused, down", "fused, gate and up"],
)
@pytest.mark.parametrize("other", [FP8, STAY], ids=["fp8", "dense"])
def test_a_bank_of_experts_may_not_be_split_over_two_rules(weights: list[Weight], target: str, other: Scheme) -> None:
    """Engines hold it as one module with one method, however the checkpoint stores it."""
    problems = choose(weights, Rule(other, (target,)), Rule(FP4)).problems
    assert len(problems) == 1
    assert problems[0].startswith(f"{BANK}: experts load as one tensor, so all must be stored alike; ")
    assert problems[0].endswith(": give all of them to one rule, or ignore all")


def test_banks_of_different_layers_may_differ() -> None:
    """Edge layers in FP8, the rest in FP4: each engine module has its own method."""
    weights = linear(*(f"{L}.{n}.mlp.experts.{e}.{p}_proj" for n in range(4) for e in (0, 1) for p in ("up", "down")))
    found = choose(weights, Rule(FP8, (f"{L}.0", f"{L}.3")), Rule(FP4))
    assert found.problems == ()
    assert {name for module, name in formats(found).items() if module.startswith(f"{L}.0.")} == {"fp8_dynamic"}


@pytest.mark.parametrize("name", ["fp8_dynamic", "fp8_block"])
@pytest.mark.parametrize("weights", [SEPARATE, FUSED], ids=["separate", "fused"])
def test_experts_that_no_engine_loads_in_a_layout_are_refused(weights: list[Weight], name: str) -> None:
    """Linear layers load; the layout that takes the experts too is named."""
    rules = (Rule(Scheme(name), mode="all-linear"),)
    (problem,) = choose([*attention(), *weights], *rules, layout="modelopt").problems
    assert problem.startswith(
        f"{BANK}: no engine loads {name} experts in the layout modelopt; use the layout compressed-"
    )
    assert choose(attention(), *rules, layout="modelopt").problems == ()
    assert choose([*attention(), *weights], *rules).problems == ()


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt", "deepseek"])
def test_a_head_that_vllm_does_not_load_is_refused(layout: str) -> None:
    """Per block: the rows of its scales are no words of the vocabulary."""
    head = [dense("lm_head.weight", 256, 128)]
    rule = Rule(Scheme("fp8_block"), ("lm_head",), default_ignore=False)
    (problem,) = choose(head, rule, layout=layout).problems
    where = " in the layout compressed-tensors" if layout == "deepseek" else ""
    assert problem == (
        f"lm_head: vLLM loads no output head as fp8_block; use fp8_dynamic for it{where}; or add it to `ignore`"
    )
    assert choose(head, replace(rule, scheme=FP8)).problems == ()


UNLOADABLE: dict[str, tuple[Rule, str]] = {
    "experts": (Rule(Scheme("fp8_dynamic"), mode="all-linear"), f"{BANK}: no engine loads fp8_dynamic experts"),
    "no activation scales": (
        Rule(Scheme("fp8"), mode="all-linear"),
        "fp8 in the layout 'modelopt' needs an activation",
    ),
}


@pytest.mark.parametrize(("rule", "sentence"), UNLOADABLE.values(), ids=UNLOADABLE)
def test_what_vllm_does_not_load_is_a_sentence_where_it_is_wanted_all_the_same(rule: Rule, sentence: str) -> None:
    """Once for all modules that it is true of, and no problem."""
    found = choose([*attention(), *SEPARATE], rule, layout="modelopt", unloadable=True)
    assert found.problems == ()
    (said,) = found.barred
    assert said.startswith(sentence)
    assert choose([*attention(), *SEPARATE], rule).barred == ()


def test_blocks_of_128_rows_must_not_cross_a_border_inside_a_fused_parameter() -> None:
    """Engines concatenate the scales of q, k and v: a border inside a block would shift the rest."""
    weights = [
        dense(f"{L}.0.self_attn.{p}_proj.weight", rows, 128) for p, rows in zip("qkv", (256, 64, 64), strict=True)
    ]
    (problem,) = choose(weights, Rule(Scheme("fp8_block"), ("Linear",))).problems
    assert problem.startswith(
        f"{L}.0.self_attn.qkv_proj: engines fuse them, so all but the last need a multiple of 128"
    )
    assert "got [256, 64, 64]; use fp8_dynamic" in problem
    assert choose(weights[:2], Rule(Scheme("fp8_block"), ("Linear",))).problems == ()


@pytest.mark.parametrize("step", [1, -1])
def test_the_last_of_a_fused_parameter_is_the_engines_last_whatever_the_order_in_the_file(step: int) -> None:
    """DeepSeek-V3's 576 rows of kv_a_proj_with_mqa come behind q_a_proj, and files in alphabetical order say else."""
    rows = {"q_a_proj": 256, "kv_a_proj_with_mqa": 576}
    weights = [dense(f"{L}.0.self_attn.{name}.weight", count, 128) for name, count in rows.items()][::step]
    assert choose(weights, Rule(Scheme("fp8_block"), ("Linear",))).problems == ()


def test_every_rules_shapes_are_checked_by_its_own_format() -> None:
    """56 columns suit FP8 and no FP4."""
    weights = [dense(f"{L}.0.mlp.down_proj.weight", 128, 56), dense(f"{L}.1.mlp.down_proj.weight", 128, 56)]
    (problem,) = choose(weights, Rule(FP8, (f"{L}.0",)), Rule(FP4)).problems
    assert problem.startswith(f"{L}.1.mlp.down_proj.weight: nvfp4 needs a last dimension that is a multiple of 16")


# --- recipes that cannot be -----------------------------------------------------------------------


def test_an_unknown_format_names_those_there_are() -> None:
    """In a rule and in the flat settings; historic names count where they are taken."""
    with pytest.raises(RecipeError) as caught:
        Recipe(scheme="int3")
    assert all(name in str(caught.value) for name in (*FORMATS, *ALIASES, DENSE, "got 'int3'"))
    with pytest.raises(RecipeError) as caught:
        Recipe(rules=(Rule(Scheme("int3")),))
    assert all(name in str(caught.value) for name in (*FORMATS, DENSE, "got 'int3'"))


def test_rules_and_flat_settings_contradict_each_other() -> None:
    """All flat settings that say something are named."""
    with pytest.raises(RecipeError, match=r"^scheme, targets, group_size: a recipe with rules has it in each rule"):
        Recipe(scheme="w4a16", targets=("a",), group_size=32, rules=(Rule(FP8),))


def test_a_mode_and_targets_contradict_each_other() -> None:
    """A rule means one of both."""
    with pytest.raises(RecipeError, match=r"targets \['a'\] and mode 'all-linear' contradict each other; keep one"):
        Rule(FP8, ("a",), "all-linear")


def test_rules_that_keep_everything_are_refused() -> None:
    """That is no quantization; decompress is another command."""
    with pytest.raises(RecipeError, match=r"rules must quantize something, got 'bf16' only; use decompress"):
        Recipe(rules=(Rule(STAY, ("a",)), Rule(STAY)))


IDLE: dict[str, tuple[Scheme, str, str]] = {
    "group size of NVFP4": (Scheme("nvfp4", group_size=32), "", "group_size: nvfp4 has no choice of it, got 32"),
    "group size of FP8": (Scheme("fp8_block", group_size=64), "", "group_size: fp8_block has no choice of it, got 64"),
    "an odd group": (Scheme("w4a16", group_size=48), "", "group_size of w4a16 (compressed-tensors) must be 128 or"),
    "a group of 0 for MXFP4": (Scheme("mxfp4", group_size=0), "", "group_size: mxfp4 has no choice of it, got 0"),
    "asymmetric FP4": (Scheme("nvfp4", symmetric=False), "", "nvfp4 is always symmetric; leave --asymmetric out"),
    "asymmetric INT8": (Scheme("int8", symmetric=False), "", "int8 is always symmetric; leave --asymmetric out"),
    "symmetric FP8": (Scheme("fp8", symmetric=True), "", "fp8 is always symmetric; leave --symmetric out"),
    "a search for FP8 per tensor": (Scheme("fp8", search="mse"), "", "scale_search of fp8 (compressed-tensors)"),
    "a search of NVFP4": (Scheme("fp8_dynamic", search="four_over_six"), "", "absmax or mse, got 'four_over_six'"),
    "W4A8 NVFP4": (Scheme("nvfp4", activations=8), "", "no runtime loads NVFP4 weights with FP8 activations;"),
    "W8A16 FP8": (Scheme("fp8_dynamic", activations=16), "", "activations of fp8_dynamic (compressed-tensors) must"),
    "W4A4 INT4": (Scheme("w4a16", activations=4), "", "activations of w4a16 (compressed-tensors) must be 16, got 4"),
    "W8A4 MXFP8": (Scheme("mxfp8", activations=4), "", "activations of mxfp8 (compressed-tensors) must be"),
    "a static scale for MXFP8": (Scheme("mxfp8", input_scale=1.0), "", "mxfp8 for mlp has no static activation"),
    "a static scale for INT4": (Scheme("w4a16", input_scale=1.0), "", "w4a16 for mlp has no static activation"),
    "a static scale for rows": (Scheme("fp8_dynamic", input_scale=1.0), "", "fp8_dynamic for mlp has no static"),
    "a static scale that is off": (Scheme("nvfp4", activations=16, input_scale=1.0), "", "nvfp4 for mlp has no static"),
    "a static scale for bf16": (Scheme("bf16", input_scale=1.0), "", "bf16 for mlp has no static activation"),
    "MXFP4 in ModelOpt's layout": (
        Scheme("mxfp4"), "modelopt", "no runtime loads MXFP4 in ModelOpt's layout; use the layout compressed-tensors"),
    "INT4 in ModelOpt's layout": (
        Scheme("w4a16"), "modelopt", "no runtime loads integer weights in ModelOpt's layout; use the layout"),
    "INT8 in ModelOpt's layout": (
        Scheme("int8"), "modelopt", "no runtime loads integer weights in ModelOpt's layout; use the layout"),
    "W8A16 MXFP8 in ModelOpt's layout": (Scheme("mxfp8", activations=16), "modelopt", "mxfp8 (modelopt) must be 8"),
    "FP8 per tensor without a scale": (Scheme("fp8"), "modelopt", "needs an activation scale beside each weight"),
    "NVFP4 in DeepSeek's layout": (
        Scheme("nvfp4"), "deepseek", "nvfp4 in the layout 'deepseek': there is no such layout of this format; use the"),
    "FP8 rows in DeepSeek's layout": (
        Scheme("fp8_dynamic"), "deepseek", "use the layout compressed-tensors or modelopt"),
}  # fmt: skip
"""A scheme, a layout, and what the refusal says."""


@pytest.mark.parametrize("case", IDLE)
def test_what_a_format_cannot_be_asked_for_is_refused(case: str) -> None:
    """Before a header is read: the option, what it may be, and which layout or format to take instead."""
    scheme, layout, message = IDLE[case]
    with pytest.raises(RecipeError) as caught:
        Recipe(rules=(Rule(scheme), Rule(FP8 if layout != "deepseek" else Scheme("fp8_block"), ("Linear",))),
               layout=layout or "compressed-tensors")  # fmt: skip
    assert message in str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
def test_everything_that_is_offered_can_be_built(name: str) -> None:
    """Every choice in the table of formats, alone and with the defaults; and the defaults are the first entries."""
    choices = FORMATS[name].choices
    for layout in choices.loaders:
        static = 1.0 if name == "fp8" else None
        form = build(Scheme(name, input_scale=static), layout)
        assert form is not None
        assert (form.name, form.layout, form.search) == (name, layout, choices.searches[0])
        assert form.activations == choices.activations[layout][0]
        offered: list[dict[str, Any]] = [
            *({"activations": bits} for bits in choices.activations[layout]),
            *({"search": search} for search in choices.searches),
            *({"group_size": size, "symmetric": symmetric} for size in choices.group_sizes
              for symmetric in ((True, False) if choices.asymmetric else (True,))),
        ]  # fmt: skip
        for said in offered:
            built = build(Scheme(name, input_scale=static, **said), layout)
            assert built is not None
            for key, value in said.items():
                assert getattr(built, key) == value


# --- historic names -------------------------------------------------------------------------------


def test_int4_awq_is_packed_int4_with_searched_scales() -> None:
    """The prototype's second name; what is said besides still counts."""
    (rule,) = Recipe(scheme="int4_awq").all_rules
    assert rule.scheme == Scheme("w4a16", group_size=128, search="mse")
    (rule,) = Recipe(scheme="int4_awq", group_size=32, symmetric=False).all_rules
    assert rule.scheme == Scheme("w4a16", group_size=32, search="mse", symmetric=False)
    assert Recipe(scheme="int4_awq").label == "w4a16"


def test_fp8_is_one_scale_a_tensor() -> None:
    """The prototype's third name."""
    weights = linear(f"{L}.0.mlp.gate_proj", f"{L}.0.mlp.up_proj")
    found = select(weights, Recipe(scheme="fp8"), CONFIG)
    (form,) = set(found.formats.values())
    assert (form.name, form.bits, form.activations, form.shares) == ("fp8", 8, 8, True)


def test_all_problems_of_a_mixture_come_in_one_message() -> None:
    """A unit, a bank and a shape at once, with the pattern that matches nothing."""
    weights = {f"{w.module}.weight": random_tensor(*w.shape) for w in (*attention(), *SEPARATE)}
    weights[f"{L}.2.mlp.down_proj.weight"] = random_tensor(128, 24)
    rules = (Rule(FP8, ("*.q_proj", f"{BANK}.1", "*.typo")), Rule(FP4, mode="all-linear"))
    files = checkpoint_files({"m.safetensors": weights}, CONFIG)
    with pytest.raises(PlanError) as caught:
        make_plan(MemorySource(files), Recipe(rules=rules))
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 4
    for part in (
        "qkv_proj: engines fuse",
        "experts load as one tensor",
        "2.mlp.down_proj.weight: nvfp4 needs",
        "'*.typo'",
    ):
        assert any(part in line for line in lines), part
