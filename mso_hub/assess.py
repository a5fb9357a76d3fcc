"""What several formats would do to a checkpoint, measured in one pass over its weights, and a recipe made from that.

measure_errors   error of every weight under every format -> ErrorTable
choose_formats   the table, a limit or a budget -> Choice: a recipe whose rules name every module
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from mso_hub.checkpoint import DTYPE_BITS, Array, Checkpoint
from mso_hub.engine import Piece, Probe, ThreadEngine
from mso_hub.errors import CheckpointError, PlanError, RecipeError
from mso_hub.events import Listener, PlanReady, TensorDone, ignore
from mso_hub.formats import ALIASES, DENSE, Format, Scheme, build
from mso_hub.formats.decoders.base import shape_reader
from mso_hub.formats.weight import Weight
from mso_hub.losses import ErrorTable, Loss, Measured, check_path, label_of, read_table, write_table
from mso_hub.plan import Plan, Recipe, ShardPlan, Step
from mso_hub.plan.assign import Group, Option, exact_recipe, groups_of, spent, stepped
from mso_hub.plan.planner import offered
from mso_hub.plan.select import Selection, loader_problem
from mso_hub.plan.shards import plan_shards
from mso_hub.plan.steps import is_packed, scale_dtype, settled, stays_packed
from mso_hub.source import Job, Source, open_source, read_checkpoint

TOO_SMALL = "one of its scales cannot be stored: its numbers are too small or too large"


@dataclass(frozen=True, slots=True)
class Choice:
    """A recipe and how it came about.

    recipe   rules that give every module its scheme, in the order of the given rules and the fallbacks
    table    the errors that it was chosen from
    notes    a sentence for each group that does not have the scheme of its rule
    summary  the outcome in a line or two
    """

    recipe: Recipe
    table: ErrorTable
    notes: tuple[str, ...]
    summary: str


def measure_errors(
    source: str | Path | Source,
    recipe: Recipe,
    formats: Sequence[str] = (),
    *,
    engine: ThreadEngine | None = None,
    on_event: Listener = ignore,
) -> ErrorTable:
    """Error, largest difference and size of every weight that a recipe offers, under several formats.

    formats  names from FORMATS, each with its defaults; by default the schemes of the recipe's rules
    Weights are read once. Raises MsoError as `convert` does, RecipeError for a format that the layout does not have.
    """
    schemes = [_scheme(name, recipe) for name in formats]
    if not any(scheme.format != DENSE for scheme in schemes) and formats:
        raise RecipeError(f"formats: {', '.join(formats)} keeps every number; name one that does not")
    opened = open_source(source, on_event=on_event) if isinstance(source, str | Path) else source
    try:
        return _Offer(opened, recipe, schemes, own=not formats).measure(engine or ThreadEngine(), on_event)
    finally:
        if opened is not source:
            opened.close()


def choose_formats(
    source: str | Path | Source,
    recipe: Recipe,
    *,
    fallback: Sequence[str] = (),
    max_nmse: float | None = None,
    target_bits: float | None = None,
    table: str | Path | None = None,
    engine: ThreadEngine | None = None,
    on_event: Listener = ignore,
) -> Choice:
    """The recipe in which every group of weights has one of several formats, chosen by what these do to it.

    fallback     names from FORMATS or "bf16", each with its defaults, that follow the scheme of every rule
    max_nmse     a group takes the first scheme under which none of its weights has a larger NMSE
    target_bits  the schemes with the least total squared error whose stored bits are on average at most this; weights
                 that no rule offers do not count
    table        JSON file of errors: read where it holds what is needed, else measured and written
    Give max_nmse or target_bits. Raises PlanError where nothing satisfies them, RecipeError for contradictions and for
    a table of another source, otherwise MsoError as `convert` does.
    """
    _check_wish(max_nmse, target_bits)
    schemes = [_scheme(name, recipe) for name in fallback]
    if table is not None and check_path(table).suffix != ".json":
        raise RecipeError(f"error_table: needs a name that ends in .json, got {table}")
    opened = open_source(source, on_event=on_event) if isinstance(source, str | Path) else source
    try:
        offer = _Offer(opened, recipe, schemes)
        errors = offer.stored(table) if table is not None else None
        if errors is None:
            errors = offer.measure(engine or ThreadEngine(), on_event)
            if table is not None:
                write_table(errors, table)
    finally:
        if opened is not source:
            opened.close()
    return _choose(offer, errors, max_nmse, target_bits)


def _check_wish(max_nmse: float | None, target_bits: float | None) -> None:
    if (max_nmse is None) == (target_bits is None):
        raise RecipeError(f"give max_nmse or target_bits, one of the two; got {max_nmse} and {target_bits}")
    for name, value in (("max_nmse", max_nmse), ("target_bits", target_bits)):
        if value is not None and not 0 < value < math.inf:
            raise RecipeError(f"{name} must be a number > 0, got {value}")


def _scheme(name: str, recipe: Recipe) -> Scheme:
    """A format with its defaults; RecipeError for one that the recipe's layout does not have."""
    scheme = ALIASES.get(name, Scheme(name))
    build(scheme, recipe.layout, unloadable=recipe.unloadable)
    return scheme


class _Offer:
    """What a recipe offers to several formats.

    order   every scheme, those of the rules first
    units   unit key -> weights, `wanted` what the rule of each module says, `kept` what no rule takes
    """

    def __init__(self, source: Source, recipe: Recipe, more: Sequence[Scheme], *, own: bool = True) -> None:
        if recipe.decodes:
            raise RecipeError(f"scheme {recipe.scheme!r} quantizes nothing, so there are no errors to measure")
        self.source, self.recipe, self._more = source, recipe, more
        self._checkpoint: Checkpoint = read_checkpoint(source)
        rules = [rule.scheme for rule in recipe.all_rules]
        self.order = tuple(dict.fromkeys([*rules, *more] if own else more))
        built = {s: build(s, recipe.layout, unloadable=recipe.unloadable) for s in self.order}
        self._forms = {scheme: form for scheme, form in built.items() if form is not None}
        self._named = {label_of(form): form for form in self._forms.values()}
        encoders = [None if s.format == DENSE else Probe(s, self._named, name=s.format) for s in rules]
        self._selections = offered(self._checkpoint, recipe, shape_reader(source.read), encoders)
        self.units = {key: members for s in self._selections for key, members in s.units.items()}
        self.wanted = {m: form.scheme for m, form in self._chosen() if isinstance(form, Probe)}
        self.kept = [module for selection in self._selections for module in selection.kept]
        self._names = dict(self._unique_names())

    def _chosen(self) -> Iterator[tuple[str, Format]]:
        return ((m, form) for selection in self._selections for m, form in selection.formats.items())

    def _unique_names(self) -> Iterator[tuple[tuple[str, str], str]]:
        """(File, name) of each weight -> what the table calls it: two folders of a repo may hold the same names."""
        seen: set[str] = set()
        for weight in (weight for members in self.units.values() for weight in members):
            place = (weight.home.file, weight.name)
            yield place, weight.name if weight.name not in seen else ": ".join(place)
            seen.add(weight.name)

    def ladder(self, module: str) -> tuple[Scheme, ...]:
        """Schemes of a module, its rule's first."""
        return tuple(dict.fromkeys([self.wanted[module], *self._more]))

    def label(self, scheme: Scheme) -> str:
        """What the table calls a scheme."""
        return label_of(self._forms[scheme]) if scheme in self._forms else DENSE

    def name(self, weight: Weight) -> str:
        """What the table calls a weight."""
        return self._names[weight.home.file, weight.name]

    def stored(self, path: str | Path) -> ErrorTable | None:
        """The table of an earlier run, None where it lacks something; RecipeError for another source."""
        found = read_table(path) if Path(path).is_file() else None
        if found is None:
            return None
        if found.identity != self._checkpoint.identity:
            raise RecipeError(
                f"{path}: holds errors of {found.source} ({found.identity[:12]}), the source is {self.source.name} "
                f"({self._checkpoint.identity[:12]}); give another name, or delete it"
            )
        enough = found.layout == self.recipe.layout and all(
            name in found.weights and self._named.keys() <= {*found.weights[name].losses, *found.weights[name].barred}
            for name in self._names.values()
        )
        if not enough and found.divergence is not None:
            raise _lacking(str(path))
        return found if enough else None

    def measure(self, engine: ThreadEngine, on_event: Listener) -> ErrorTable:
        """Read every weight once and encode it under every format that can hold it."""
        weights: dict[str, Measured] = {}
        shards: list[ShardPlan] = []
        for selection in self._selections:
            fitting = {label: settled(_under(selection, form)).formats for label, form in self._named.items()}
            steps: list[Step] = []
            for key, members in selection.units.items():
                known, forms = self._known(members, {label: f[members[0].module] for label, f in fitting.items()})
                weights |= {self.name(w): measured for w, measured in zip(members, known, strict=True)}
                if forms:
                    steps += (_step(weight, key, forms) for weight in members)
            steps.sort(key=lambda step: (step.weight.home.file, step.weight.home.begin, step.weight.name))
            shards += plan_shards(steps, self._checkpoint)
        for name, measured in self._run(sorted(shards, key=lambda shard: shard.name), engine, on_event):
            weights[name] = _joined(weights[name], measured)
        return ErrorTable(self._checkpoint.name, self._checkpoint.identity, self.recipe.layout, weights)

    def _known(
        self, members: Sequence[Weight], forms: Mapping[str, Format]
    ) -> tuple[list[Measured], dict[str, Format]]:
        """What is known of a unit without reading it, and the formats that are left to be measured."""
        barred: dict[str, str] = {}
        copied: dict[str, Format] = {}
        for label, form in forms.items():
            problem = next(filter(None, (form.problem(weight.shape) for weight in members)), None)
            if problem is None and not self.recipe.unloadable:
                problem = next(filter(None, (loader_problem(weight.module, form) for weight in members)), None)
            if problem is None and len(members) > 1:
                problem = form.fused_problem([weight.shape for weight in members])
            if problem is not None:
                barred[label] = problem
            elif all(stays_packed(weight, form) for weight in members):
                copied[label] = form
        known = [
            Measured(
                math.prod(w.shape), 0.0, math.prod(w.shape) * DTYPE_BITS[w.dtype] // 8,
                {label: Loss(0.0, 0.0, w.nbytes) for label in copied}, barred,
            )
            for w in members
        ]  # fmt: skip
        return known, {label: form for label, form in forms.items() if label not in {*barred, *copied}}

    def _run(
        self, shards: Sequence[ShardPlan], engine: ThreadEngine, on_event: Listener
    ) -> Iterator[tuple[str, Measured]]:
        """What the engine finds, weight by weight."""
        source = self.source
        plan = Plan(source.name, "", self.recipe, tuple(shards), self.units, {}, {}, (), {}, {}, (), (), ())
        stamps = {name: source.stamp(name) for name in source.files()}
        on_event(PlanReady(plan.read_bytes, 0, len(shards)))
        source.expect([Job(s.name, partial(engine.reads, s, once=source.distant)) for s in shards])
        held: dict[str, list[Array]] = {}
        pieces = engine.run(
            plan, shards, source.read, {}, apart=source.read_apart, once=source.distant, abort=source.close
        )
        with closing(pieces):
            for piece in pieces:
                held.setdefault(piece.info.name, []).append(piece.data)
                if not piece.done:
                    continue
                weight = piece.step.weight
                yield self.name(weight), _summed(piece, held)
                on_event(TensorDone(weight.name, weight.nbytes))
                if piece.step is piece.shard.steps[-1]:
                    source.settle(piece.shard.name)
        changed = next((name for name, stamp in stamps.items() if source.stamp(name) != stamp), None)
        if changed is not None:
            raise CheckpointError(f"{source.name}/{changed}: changed while it was read; run it again")


def _lacking(what: str) -> RecipeError:
    return RecipeError(
        f"{what}: the KL divergences do not cover it; measure them for the same recipe and formats with "
        "`mso-hub evaluate SOURCE --sensitivity FILE.json`"
    )


def _under(selection: Selection, form: Format) -> Selection:
    """The selection with one encoder for all."""
    return replace(selection, formats=dict.fromkeys(selection.formats, form))


def _step(weight: Weight, unit: str, forms: Mapping[str, Format]) -> Step:
    probe = Probe(Scheme(DENSE), forms, packed=is_packed(weight))
    outputs = probe.outputs(weight.module, weight.shape, weight.dtype)
    return Step(weight, outputs, probe, unit if probe.shares else None)


def _summed(piece: Piece, held: dict[str, list[Array]]) -> Measured:
    """Rows of one weight -> its sums; each is taken over all rows at once, so that blocks do not show in it."""
    step, probe = piece.step, piece.step.format
    weight = step.weight
    rows, *found = (np.concatenate(held.pop(info.name)) for info in step.outputs)
    losses: dict[str, Loss] = {}
    barred: dict[str, str] = {}
    for (label, form), sums in zip(probe.candidates.items() if isinstance(probe, Probe) else (), found, strict=True):
        error = float(np.ascontiguousarray(sums[:, 0]).sum())
        if math.isfinite(error):
            infos = form.outputs(weight.module, weight.shape, scale_dtype(weight, form))
            losses[label] = Loss(error, float(sums[:, 1].max()), sum(info.nbytes for info in infos))
        else:
            barred[label] = TOO_SMALL
    return Measured(0, float(rows.sum()), 0, losses, barred)


def _joined(known: Measured, found: Measured) -> Measured:
    """Both as one, formats in their first order."""
    return replace(
        known, energy=found.energy, losses={**known.losses, **found.losses}, barred={**known.barred, **found.barred}
    )


def _choose(offer: _Offer, errors: ErrorTable, max_nmse: float | None, target_bits: float | None) -> Choice:
    weights: dict[str, list[Weight]] = {}
    for weight in (weight for members in offer.units.values() for weight in members):
        weights.setdefault(weight.module, []).append(weight)
    named = groups_of({key: [w.module for w in members] for key, members in offer.units.items()})
    groups = [
        _group(name, modules, [w for m in modules for w in weights[m]], offer, errors)
        for name, modules in named.items()
    ]
    if target_bits is not None:
        energy = math.fsum(errors.weights[offer.name(w)].energy for members in weights.values() for w in members)
        picks, outcome = spent(groups, target_bits, energy if errors.divergence is None else None)
    else:
        picks, outcome = stepped(groups, max_nmse or 0.0)
    options = [group.options[pick] for group, pick in zip(groups, picks, strict=True)]
    chosen: dict[Scheme, list[str]] = {scheme: [] for scheme in offer.order}
    for group, option in zip(groups, options, strict=True):
        chosen[option.scheme] += group.modules
    if not any(members for scheme, members in chosen.items() if scheme.format != DENSE):
        raise PlanError(
            f"{offer.source.name}: every weight would stay {DENSE}, {outcome}; allow more error or fewer bits"
        )
    counts = ", ".join(f"{offer.label(s)} {len(members):,}" for s, members in chosen.items() if members)
    return Choice(
        exact_recipe(offer.recipe, chosen, [*offer.kept, *offer.wanted]),
        errors,
        tuple(_moves(offer, groups, options, max_nmse)),
        f"{outcome}\nweights: {counts}",
    )


def _group(name: str, modules: Sequence[str], members: Sequence[Weight], offer: _Offer, errors: ErrorTable) -> Group:
    """The options of some weights that must be stored alike, as their rule and the fallbacks order them."""
    wanted = {offer.wanted[module] for module in modules}
    if len(wanted) > 1:
        raise PlanError(
            f"{name}: engines load it as one, so one rule must cover it; found {' and '.join(s.format for s in wanted)}"
        )
    measured = {offer.name(weight): errors.weights[offer.name(weight)] for weight in members}
    known = None if errors.divergence is None else errors.divergence.groups.get(name)
    if errors.divergence is not None and known is None:
        raise _lacking(name)
    options: list[Option] = []
    barred: dict[str, str] = {}
    for scheme in offer.ladder(modules[0]):
        label = offer.label(scheme)
        why = next((entry.barred[label] for entry in measured.values() if label in entry.barred), None)
        if why is not None:
            barred[label] = why
        else:
            options.append(_option(scheme, label, measured, known))
    return Group(name, tuple(modules), sum(entry.numbers for entry in measured.values()), tuple(options), barred)


def _option(
    scheme: Scheme, label: str, measured: Mapping[str, Measured], divergences: Mapping[str, float] | None
) -> Option:
    """What a scheme costs a group; a group that text does not reach has no divergences, and the error 0."""
    if scheme.format == DENSE:
        return Option(scheme, 8 * sum(entry.dense for entry in measured.values()), 0.0)
    losses = [entry.losses[label] for entry in measured.values()]
    worst, where = max(((entry.nmse(label), name) for name, entry in measured.items()), key=lambda pair: pair[0])
    if divergences and label not in divergences:
        raise _lacking(f"{where} as {label}")
    error = math.fsum(loss.error for loss in losses) if divergences is None else divergences.get(label, 0.0)
    return Option(scheme, 8 * sum(loss.nbytes for loss in losses), error, worst, where)


def _moves(offer: _Offer, groups: Iterable[Group], options: Iterable[Option], max_nmse: float | None) -> Iterator[str]:
    """A sentence for each group that does not get what its rule says."""
    for group, option in zip(groups, options, strict=True):
        first = offer.wanted[group.modules[0]]
        if option.scheme == first:
            continue
        before = next((other for other in group.options if other.scheme == first), None)
        if before is None:
            why = f": {group.barred[offer.label(first)]}"
        elif max_nmse is not None:
            why = f": {before.where} has NMSE {before.worst:.4g}"
        else:
            why = f": NMSE {before.worst:.4g} -> {option.worst:.4g}"
        count = f" ({len(group.modules):,} weights)" if len(group.modules) > 1 else ""
        yield f"{group.name}{count}: {offer.label(first)} -> {offer.label(option.scheme)}{why}"
