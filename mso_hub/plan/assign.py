"""Which format each group of weights gets, from what every format would do to them. Pure choice: nothing is read here.

A group is what engines need alike: a fused unit, or a bank of experts with all its projections. `step_down` walks a
ladder of formats until the error is small enough, `spend` looks for the least error within a budget of bits, and
`exact_recipe` names the outcome module by module.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

from mso_hub.errors import PlanError
from mso_hub.formats import DENSE, IMPORTED, Scheme
from mso_hub.plan.recipe import Recipe, Rule
from mso_hub.plan.select import EXPERT
from mso_hub.plan.summary import percent

LEAST_GAIN = 1e-9
"""Share of the error that an exchange must save: less is rounding."""
EXCHANGES = 1000


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a group.

    nbits   stored bits of all its weights, scales included
    error   sum of squared differences over all its numbers
    worst   largest NMSE among its weights, which `where` has
    """

    scheme: Scheme
    nbits: int
    error: float
    worst: float = 0.0
    where: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Weights that must be stored alike.

    numbers  of all its weights
    options  ways to store it, the preferred one first; `barred` says of the others why they cannot
    """

    name: str
    modules: tuple[str, ...]
    numbers: int
    options: tuple[Option, ...]
    barred: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Spending:
    """A choice within a budget.

    picks  index of each group's option
    error  sum of squared differences of all groups; no choice within the budget has less than `bound`
    """

    picks: tuple[int, ...]
    nbits: int
    error: float
    bound: float

    @property
    def gap(self) -> float:
        """How much more the error may be than the least possible, as a share of it."""
        return self.error / self.bound - 1 if self.bound > 0 else 0.0


def groups_of(units: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Units (key -> modules that engines fuse) -> groups: units whose modules lie in one bank of experts are one.

    A group has the name of its bank, else of its unit, and the order of the units.
    """
    heads: dict[str, str] = {}

    def head(name: str) -> str:
        """The first name of the group that a name belongs to."""
        while heads.setdefault(name, name) != name:
            name = heads[name]
        return name

    for key, modules in units.items():
        banks = [match["bank"] for match in map(EXPERT.match, modules) if match]
        first = head((*banks, key)[0])
        for name in (*banks, key, *modules):
            heads[head(name)] = first
    found: dict[str, dict[str, None]] = {}
    for modules in units.values():
        for module in modules:
            found.setdefault(head(module), {})[module] = None
    return {name: tuple(members) for name, members in found.items()}


def step_down(groups: Sequence[Group], limit: float) -> tuple[int, ...]:
    """The first option of each group whose worst NMSE is at most `limit`; PlanError where a group has none."""
    picks = []
    for group in groups:
        _require_option(group)
        pick = next((at for at, option in enumerate(group.options) if option.worst <= limit), None)
        if pick is None:
            best = min(group.options, key=lambda option: option.worst)
            raise PlanError(
                f"{best.where or group.name}: its NMSE must be at most {limit:.6g}, the best format has "
                f"{best.worst:.6g} ({best.scheme.format}); add a finer format or {DENSE} to --fallback, raise "
                "--max_nmse, or ignore it"
            )
        picks.append(pick)
    return tuple(picks)


def _require_option(group: Group) -> None:
    if not group.options:
        reasons = "; ".join(f"{name}: {why}" for name, why in group.barred.items())
        raise PlanError(
            f"{group.name}: needs a format that can hold it, none of the given ones can ({reasons}); add {DENSE} to "
            "--fallback, or ignore it"
        )


def spend(groups: Sequence[Group], bits: float) -> Spending:
    """The choice with about the least error whose stored bits are on average at most `bits` a number.

    Each group's options that lie on the lower convex hull of (bits, error) are steps with falling gain per bit; the
    steps of all groups are taken in the order of their gain until the budget is spent. What the last one would give in
    part is the bound of the linear relaxation. Then exchanges, of one group's option or of two, use what is left.
    Raises PlanError for a budget below the cheapest choice.
    """
    for group in groups:
        _require_option(group)
    numbers = sum(group.numbers for group in groups)
    budget = math.floor(bits * numbers)
    hulls = [_hull(group.options) for group in groups]
    picks = [hull[0] for hull in hulls]
    least = sum(group.options[pick].nbits for group, pick in zip(groups, picks, strict=True))
    if least > budget:
        cheapest = dict.fromkeys(g.options[pick].scheme.format for g, pick in zip(groups, picks, strict=True))
        raise PlanError(
            f"target_bits {bits:g}: the cheapest choice has {math.ceil(1000 * least / numbers) / 1000:.3f} bits on "
            f"average ({', '.join(cheapest)}); raise it, or add a smaller format"
        )
    bound = _take_steps(groups, hulls, picks, budget - least)
    for _ in range(EXCHANGES):
        if not _exchange(groups, picks, budget):
            break
    error = _error(groups, picks)
    spent = sum(group.options[pick].nbits for group, pick in zip(groups, picks, strict=True))
    return Spending(tuple(picks), spent, error, min(bound, error))


def _error(groups: Sequence[Group], picks: Sequence[int]) -> float:
    return math.fsum(group.options[pick].error for group, pick in zip(groups, picks, strict=True))


def _hull(options: Sequence[Option]) -> list[int]:
    """Options on the lower convex hull of (bits, error), from the cheapest to the best."""
    hull: list[int] = []
    for at in sorted(range(len(options)), key=lambda at: (options[at].nbits, options[at].error, at)):
        if hull and options[at].error >= options[hull[-1]].error:
            continue
        while len(hull) > 1 and _gain(options, hull[-2], hull[-1]) <= _gain(options, hull[-1], at):
            hull.pop()
        hull.append(at)
    return hull


def _gain(options: Sequence[Option], here: int, there: int) -> float:
    """Error saved per bit."""
    return (options[here].error - options[there].error) / (options[there].nbits - options[here].nbits)


def _take_steps(groups: Sequence[Group], hulls: Sequence[Sequence[int]], picks: list[int], left: int) -> float:
    """Take steps along the hulls while they fit -> error of the linear relaxation."""
    steps = [
        (-_gain(group.options, here, there), at, here, there)
        for at, (group, hull) in enumerate(zip(groups, hulls, strict=True))
        for here, there in pairwise(hull)
    ]
    bound = None
    for slope, at, here, there in sorted(steps):
        cost = groups[at].options[there].nbits - groups[at].options[here].nbits
        if cost > left and bound is None:
            bound = _error(groups, picks) + slope * left
        if cost <= left and picks[at] == here:
            picks[at] = there
            left -= cost
    return _error(groups, picks) if bound is None else bound


@dataclass(frozen=True, slots=True)
class _Move:
    group: int
    pick: int
    cost: int
    error: float


def _exchange(groups: Sequence[Group], picks: list[int], budget: int) -> bool:
    """Make the best change of one pick, or of two where one pays for the other; False where none saves error."""
    now = [group.options[pick] for group, pick in zip(groups, picks, strict=True)]
    moves = [
        _Move(at, pick, option.nbits - now[at].nbits, option.error - now[at].error)
        for at, group in enumerate(groups)
        for pick, option in enumerate(group.options)
        if pick != picks[at]
    ]
    slack = budget - sum(option.nbits for option in now)
    gains = [move for move in moves if move.error < 0]
    savings = sorted((m for m in moves if m.cost < 0), key=lambda m: (m.cost, m.group, m.pick))
    best: tuple[_Move, ...] = ()
    saved = -LEAST_GAIN * math.fsum(option.error for option in now)
    nothing: tuple[_Move, ...] = ()
    cheapest = list(accumulate(savings, _two_cheapest, initial=nothing))
    costs = [move.cost for move in savings]
    for move in gains:
        found: tuple[_Move, ...] = (move,)
        if move.cost > slack:
            enough = cheapest[bisect_left(costs, slack - move.cost + 1)]
            payer = next((other for other in enough if other.group != move.group), None)
            if payer is None:
                continue
            found = (move, payer)
        total = math.fsum(m.error for m in found)
        if total < saved:
            best, saved = found, total
    for move in best:
        picks[move.group] = move.pick
    return bool(best)


def _two_cheapest(kept: tuple[_Move, ...], move: _Move) -> tuple[_Move, ...]:
    """Of what was kept and one more, the moves of two groups that add the least error."""
    found: dict[int, _Move] = {}
    for each in sorted((*kept, move), key=lambda m: (m.error, m.group, m.pick)):
        found.setdefault(each.group, each)
    return tuple(found.values())[:2]


def spent(groups: Sequence[Group], target_bits: float, energy: float | None) -> tuple[tuple[int, ...], str]:
    """Choice within a budget, and what it comes to; errors are KL divergences without an `energy`."""
    spending = spend(groups, target_bits)
    average = spending.nbits / sum(group.numbers for group in groups)
    what, share = "sum of KL divergences", ""
    if energy is not None:
        what, share = "squared error", f" ({percent(spending.error / energy if energy > 0 else 0.0)})"
    return spending.picks, (
        f"{average:.4g} bits on average, at most {target_bits:g} asked for; {what} {spending.error:.6g}{share}, at "
        f"best {spending.bound:.6g}: gap {100 * spending.gap:.2f} %"
    )


def stepped(groups: Sequence[Group], limit: float) -> tuple[tuple[int, ...], str]:
    """Choice under a limit of the NMSE, and what it comes to."""
    picks = step_down(groups, limit)
    worst = max(group.options[pick].worst for group, pick in zip(groups, picks, strict=True))
    return picks, f"worst NMSE {percent(worst)}, at most {percent(limit)} asked for"


def exact_recipe(recipe: Recipe, chosen: Mapping[Scheme, Sequence[str]], modules: Iterable[str]) -> Recipe:
    """The recipe with rules that give each module its scheme and touch nothing else.

    chosen   scheme -> modules, in the order that the rules are to have
    modules  everything that a rule could cover, the chosen ones and those that stay
    """
    everything = sorted({*modules, *(m for members in chosen.values() for m in members)})
    default = all(rule.default_ignore for rule in recipe.all_rules)
    rules = tuple(
        Rule(scheme, tuple(dict.fromkeys(_targets(members, everything))), default_ignore=default)
        for scheme, members in chosen.items()
        if members
    )
    takers = any(rule.scheme.input_scale == IMPORTED for rule in rules)
    plain = Recipe()
    return replace(
        recipe, rules=rules, input_amax=recipe.input_amax if takers else {}, scheme=plain.scheme, mode=plain.mode,
        targets=(), activations=None, group_size=None, symmetric=None, scale_search=None, input_scale=None,
    )  # fmt: skip


def _targets(members: Sequence[str], everything: Sequence[str]) -> Iterator[str]:
    """Names that cover these modules alone: the container of a bank of experts where that is enough."""
    inside = set(members)

    def alone(name: str) -> bool:
        """Does everything below a name belong to the members?"""
        below = everything[bisect_left(everything, f"{name}.") : bisect_left(everything, f"{name}/")]
        return all(module in inside for module in below)

    banks: dict[str, bool] = {}
    for module in members:
        match = EXPERT.match(module)
        if match and banks.setdefault(match["bank"], alone(match["bank"])):
            yield match["bank"]
        elif any(c in module for c in "*?[") or not alone(module):
            yield f"re:{re.escape(module)}$"
        else:
            yield module
