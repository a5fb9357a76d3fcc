"""Which format each group gets: against every possible assignment, and in the words that a recipe has."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mso_hub.errors import PlanError
from mso_hub.formats import Scheme
from mso_hub.plan import Recipe, Rule
from mso_hub.plan.assign import Group, Option, exact_recipe, groups_of, spend, step_down
from mso_hub.plan.fusion import units
from mso_hub.plan.recipe import Patterns

FORMATS = ("nvfp4", "fp8", "mxfp8", "bf16")
SCHEMES = {name: Scheme(name) for name in FORMATS}

options = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 40)), min_size=1, max_size=4)
problems = st.lists(options, min_size=1, max_size=5)


def groups(costs: Sequence[Sequence[tuple[int, int]]], numbers: int = 10) -> list[Group]:
    """(Bits, error) of each option of each group -> groups."""
    return [
        Group(f"g{at}", (f"m{at}",), numbers, tuple(
            Option(SCHEMES[name], nbits, error, error / 40, f"m{at}.weight")
            for name, (nbits, error) in zip(FORMATS, found, strict=False)
        ))
        for at, found in enumerate(costs)
    ]  # fmt: skip


def every(found: Sequence[Group]) -> list[tuple[int, float]]:
    """(Bits, error) of every assignment."""
    picked = product(*(group.options for group in found))
    return [(sum(o.nbits for o in choice), math.fsum(o.error for o in choice)) for choice in picked]


# --- a budget of bits -------------------------------------------------------------------------------


@given(problems, st.floats(0.1, 8))
@settings(max_examples=400)
def test_spending_stays_within_the_budget_and_between_its_bound_and_one_step_above_the_best(
    costs: list[list[tuple[int, int]]], bits: float
) -> None:
    """Against all assignments: never better than the best, never worse than it by more than one option's gain."""
    found = groups(costs)
    budget = bits * sum(group.numbers for group in found)
    affordable = [error for nbits, error in every(found) if nbits <= budget]
    if not affordable:
        with pytest.raises(PlanError, match="the cheapest choice has"):
            spend(found, bits)
        return
    outcome = spend(found, bits)
    picked = [group.options[pick] for group, pick in zip(found, outcome.picks, strict=True)]
    assert sum(o.nbits for o in picked) == outcome.nbits <= budget
    assert math.fsum(o.error for o in picked) == outcome.error
    best = min(affordable)
    step = max(a.error - b.error for group in found for a, b in product(group.options, repeat=2))
    assert outcome.bound - 1e-9 <= best <= outcome.error <= best + step
    assert outcome.gap >= -1e-9


def test_spending_finds_the_best_assignment_nearly_always() -> None:
    """A thousand problems of five groups; the few others are within a few percent."""
    chance = random.Random(5)
    equal, gaps = 0, []
    for _ in range(1000):
        costs = [sorted((chance.randint(4, 60), chance.randint(1, 400)) for _ in range(3)) for _ in range(5)]
        found = groups(costs)
        assignments = every(found)
        budget = chance.randint(min(nbits for nbits, _ in assignments), max(nbits for nbits, _ in assignments))
        best = min(error for nbits, error in assignments if nbits <= budget)
        error = spend(found, budget / 50 + 1e-9).error
        equal += error == best
        gaps.append(error / best - 1)
    assert equal > 950
    assert max(gaps) < 0.25


@given(problems)
def test_an_unlimited_budget_buys_the_least_error(costs: list[list[tuple[int, int]]]) -> None:
    found = groups(costs)
    outcome = spend(found, 1e6)
    assert outcome.error == outcome.bound == sum(min(o.error for o in group.options) for group in found)


@given(problems, st.floats(1, 8), st.floats(1, 8))
def test_more_bits_never_raise_the_bound(costs: list[list[tuple[int, int]]], first: float, second: float) -> None:
    found = groups(costs)
    cheapest = sum(min(o.nbits for o in group.options) for group in found) / (10 * len(found))
    low, high = (cheapest + more for more in sorted((first, second)))
    assert spend(found, high).bound <= spend(found, low).bound + 1e-9


def test_an_exchange_pays_one_upgrade_with_another_groups_downgrade() -> None:
    """Steps along the hulls take b's small step first; a's large one then needs it back."""
    found = groups([[(10, 100), (30, 0)], [(10, 30), (14, 1)]])
    outcome = spend(found, 42 / 20)
    assert (outcome.picks, outcome.error) == ((1, 0), 30)


def test_what_costs_more_and_loses_more_is_never_taken() -> None:
    found = groups([[(10, 5), (20, 7), (30, 2)]])
    assert [spend(found, bits / 10).picks for bits in (10, 25, 30)] == [(0,), (0,), (2,)]


def test_a_budget_below_the_cheapest_says_what_that_gives() -> None:
    found = groups([[(45, 5), (80, 1)], [(45, 5), (80, 1)]])
    with pytest.raises(PlanError, match=r"target_bits 4: the cheapest choice has 4\.500 bits on average \(nvfp4\)"):
        spend(found, 4)
    assert spend(found, 4.5).picks == (0, 0)


def test_a_thousand_groups_are_no_burden() -> None:
    """A large model has a few hundred; the gap is that of one step among a thousand."""
    chance = random.Random(1)
    costs = [[(45, 900 + chance.randint(0, 99)), (80, 60 + chance.randint(0, 9)), (160, 0)] for _ in range(1000)]
    outcome = spend(groups(costs), 6)
    assert outcome.nbits <= 60_000
    assert outcome.gap < 0.002


# --- a ladder ---------------------------------------------------------------------------------------


@given(problems, st.integers(0, 40))
def test_stepping_down_takes_the_first_option_that_is_good_enough(
    costs: list[list[tuple[int, int]]], limit: int
) -> None:
    found = groups([[*group, (160, 0)] for group in (g[:3] for g in costs)])
    for group, pick in zip(found, step_down(found, limit / 40), strict=True):
        assert group.options[pick].worst <= limit / 40
        assert all(option.worst > limit / 40 for option in group.options[:pick])


def test_where_nothing_is_good_enough_the_weight_its_best_error_and_the_way_out_are_named() -> None:
    found = groups([[(10, 0)], [(10, 20), (20, 10)]])
    words = r"m1\.weight: its NMSE must be at most 0\.1, the best format has 0\.25 \(fp8\); add .* bf16 to --fallback"
    with pytest.raises(PlanError, match=words):
        step_down(found, 0.1)


def test_a_group_that_no_format_can_hold_says_why_of_each() -> None:
    group = Group("m.qkv_proj", ("m.q_proj",), 10, (), {"nvfp4": "needs 16", "mxfp4": "needs 32"})
    for choose in (lambda: step_down([group], 1), lambda: spend([group], 16)):
        with pytest.raises(PlanError, match=r"m\.qkv_proj: .*nvfp4: needs 16; mxfp4: needs 32.*add bf16"):
            choose()


# --- what belongs together --------------------------------------------------------------------------


def layer(number: int, experts: int = 0) -> list[str]:
    """Modules of a decoder layer."""
    prefix = f"model.layers.{number}"
    attention = [f"{prefix}.self_attn.{leaf}_proj" for leaf in "qkvo"]
    parents = [f"{prefix}.mlp.experts.{e}" for e in range(experts)] or [f"{prefix}.mlp"]
    return attention + [f"{parent}.{leaf}_proj" for parent in parents for leaf in ("gate", "up", "down")]


def alone_too(modules: Sequence[str]) -> dict[str, Sequence[str]]:
    """Units as a plan has them: fused ones, and every other module on its own."""
    shared = units(modules)
    together = {module for members in shared.values() for module in members}
    return {**shared, **{module: (module,) for module in modules if module not in together}}


def test_units_stay_together_and_a_bank_of_experts_is_one_group() -> None:
    found = groups_of(alone_too([*layer(0), *layer(1, experts=2)]))
    assert {name: len(members) for name, members in found.items()} == {
        "model.layers.0.self_attn.qkv_proj": 3,
        "model.layers.0.self_attn.o_proj": 1,
        "model.layers.0.mlp.gate_up_proj": 2,
        "model.layers.0.mlp.down_proj": 1,
        "model.layers.1.self_attn.qkv_proj": 3,
        "model.layers.1.self_attn.o_proj": 1,
        "model.layers.1.mlp.experts": 6,
    }


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=4), st.randoms())
def test_groups_hold_every_module_once_whatever_the_order(layers: list[tuple[int, int]], chance: random.Random) -> None:
    modules = list(dict.fromkeys(m for number, experts in layers for m in layer(number, experts)))
    found = alone_too(modules)
    keys = list(found)
    chance.shuffle(keys)
    shuffled = groups_of({key: found[key] for key in keys})
    assert sorted(m for members in shuffled.values() for m in members) == sorted(modules)
    assert {frozenset(m) for m in shuffled.values()} == {frozenset(m) for m in groups_of(found).values()}


# --- a recipe that names them -----------------------------------------------------------------------


def covered(rule: Rule, modules: Sequence[str]) -> list[str]:
    """Modules that a rule's targets cover."""
    patterns = Patterns(rule.targets)
    return [module for module in modules if patterns.find(module) is not None]


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), min_size=1, max_size=5), st.randoms())
def test_rules_cover_their_own_modules_and_no_other(layers: list[tuple[int, int]], chance: random.Random) -> None:
    """Whole groups are dealt out at random, some stay."""
    modules = list(dict.fromkeys(m for number, experts in layers for m in layer(number, experts)))
    dealt: dict[Scheme | None, list[str]] = {scheme: [] for scheme in (*SCHEMES.values(), None)}
    for members in groups_of(alone_too(modules)).values():
        dealt[chance.choice(list(dealt))] += members
    chosen = {scheme: members for scheme, members in dealt.items() if scheme is not None}
    if not any(chosen[scheme] for scheme in chosen if scheme.format != "bf16"):
        return
    made = exact_recipe(Recipe(mode="all-linear", ignore=("x",)), chosen, modules)
    assert [rule.scheme for rule in made.rules] == [scheme for scheme, members in chosen.items() if members]
    assert (made.mode, made.ignore) == ("mlp", ("x",))
    for rule in made.rules:
        assert sorted(covered(rule, modules)) == sorted(chosen[rule.scheme])


def named(chosen: Mapping[str, Sequence[str]], modules: Sequence[str]) -> list[tuple[str, ...]]:
    """Targets of each rule."""
    made = exact_recipe(Recipe(), {SCHEMES[name]: members for name, members in chosen.items()}, modules)
    return [rule.targets for rule in made.rules]


def test_a_bank_is_named_by_its_container_where_that_holds_nothing_else() -> None:
    bank = [m for m in layer(1, experts=2) if "experts" in m]
    assert named({"fp8": bank}, bank) == [("model.layers.1.mlp.experts",)]
    assert named({"fp8": bank}, [*bank, "model.layers.1.mlp.experts.shared.up"]) == [tuple(bank)]
    assert named({"fp8": bank}, [*bank, "model.layers.1.mlp.experts_norm"]) == [("model.layers.1.mlp.experts",)]


def test_a_module_that_holds_another_one_or_looks_like_a_pattern_is_named_exactly() -> None:
    odd = ["m.up", "m.up.extra", "m.x[0]"]
    (targets,) = named({"fp8": ["m.up", "m.x[0]"]}, odd)
    assert targets == (r"re:m\.up$", r"re:m\.x\[0\]$")
    assert covered(Rule(SCHEMES["fp8"], targets), odd) == ["m.up", "m.x[0]"]


def test_imported_scales_go_when_nothing_takes_them_any_more() -> None:
    """A recipe refuses scales without a taker."""
    four = Scheme("nvfp4", input_scale="imported")
    recipe = Recipe(input_scale="imported", input_amax={"m.up": 2.0})
    assert exact_recipe(recipe, {four: ["m.up"], SCHEMES["fp8"]: ["m.down"]}, []).input_amax == {"m.up": 2.0}
    assert exact_recipe(recipe, {four: [], SCHEMES["fp8"]: ["m.up"]}, []).input_amax == {}
