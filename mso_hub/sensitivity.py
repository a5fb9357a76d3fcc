"""An error table whose errors are KL divergences: `choose_formats(target_bits=...)` goes by them where they are there.

The squared error of a weight does not know what the weight is for. Here each group of weights that is stored alike is
quantized alone, and what that does to the model's predictions counts. The ordinary errors are in the table too: they
tell what each format costs in bytes, and which weights it cannot hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mso_hub.assess import measure_errors
from mso_hub.engine import Probe, ThreadEngine
from mso_hub.errors import RecipeError
from mso_hub.events import Listener, ignore
from mso_hub.formats import ALIASES, DENSE, Format, Scheme, build
from mso_hub.formats.decoders.base import shape_reader
from mso_hub.formats.weight import Weight
from mso_hub.losses import Divergence, ErrorTable, label_of
from mso_hub.plan import Recipe
from mso_hub.plan.assign import groups_of
from mso_hub.plan.planner import offered
from mso_hub.source import Source, open_source, read_checkpoint

if TYPE_CHECKING:
    from mso_hub.calibrate.evaluate.run import Settings
    from mso_hub.calibrate.evaluate.sensitivity import Cost, Trial
    from mso_hub.calibrate.text import Rows

TOGETHER = ""
"""Name of all groups together, among trials."""


def measure_sensitivity(
    source: str | Path | Source,
    recipe: Recipe,
    rows: Rows,
    formats: Sequence[str] = (),
    *,
    settings: Settings | None = None,
    engine: ThreadEngine | None = None,
    on_cost: Callable[[Cost], None] = lambda _: None,
    on_event: Listener = ignore,
) -> ErrorTable:
    """What every format does to every group of weights that a recipe offers, as errors and as KL divergence.

    rows      the text, as `calibrate.text.read_text` gives it
    formats   names from FORMATS, each with its defaults; by default the schemes of the recipe's rules
    settings  how the model is run
    on_cost   hears what the trials will take, before the first of them
    Raises MsoError as `measure_errors` and `calibrate.evaluate.evaluate` do.
    """
    from mso_hub.calibrate.evaluate.sensitivity import Sensitivity

    with ExitStack() as stack:
        opened = source
        if isinstance(opened, str | Path):
            opened = stack.enter_context(closing(open_source(opened, on_event=on_event)))
        forms, groups = _offer(opened, recipe, formats)
        table = measure_errors(opened, recipe, formats, engine=engine)
        trials = list(_trials(table, forms, groups))
        work = Sensitivity(opened, rows, trials, settings=settings, on_event=on_event)
        on_cost(work.cost)
        found = work.run()
    kl = {group: {label: made.kl for label, made in found.get(group, {}).items()} for group in (*groups, TOGETHER)}
    together = kl.pop(TOGETHER)
    return replace(table, divergence=Divergence(rows.name, rows.tokens, rows.sha256, kl, together))


Groups = dict[str, tuple[tuple[Weight, ...], ...]]
"""Group -> units of its weights."""


def _offer(source: Source, recipe: Recipe, formats: Sequence[str]) -> tuple[dict[str, Format], Groups]:
    """Label -> encoder, and the groups that a recipe offers to them."""
    schemes = [ALIASES.get(name, Scheme(name)) for name in formats] or [rule.scheme for rule in recipe.all_rules]
    built = [build(scheme, recipe.layout, unloadable=recipe.unloadable) for scheme in schemes]
    forms = {label_of(form): form for form in built if form is not None}
    if not forms:
        raise RecipeError(f"formats: {', '.join(formats)} keeps every number; name one that does not")
    encoders = [
        None if r.scheme.format == DENSE else Probe(r.scheme, forms, name=r.scheme.format) for r in recipe.all_rules
    ]
    selections = offered(read_checkpoint(source), recipe, shape_reader(source.read), encoders)
    units = {key: members for selection in selections for key, members in selection.units.items()}
    named = groups_of({key: [w.module for w in members] for key, members in units.items()})
    unit_of = {w.module: key for key, members in units.items() for w in members}
    groups = {name: dict.fromkeys(unit_of[module] for module in modules) for name, modules in named.items()}
    return forms, {name: tuple(units[key] for key in keys) for name, keys in groups.items()}


def _trials(table: ErrorTable, forms: Mapping[str, Format], groups: Groups) -> Iterator[Trial]:
    """Every group under every format that can hold it, and all of these together."""
    from mso_hub.calibrate.evaluate.sensitivity import Trial

    barred = {name: weight.barred for name, weight in table.weights.items()}
    for label, form in forms.items():
        fitting = {
            name: units
            for name, units in groups.items()
            if not any(label in barred.get(w.name, {}) for members in units for w in members)
        }
        for name, units in fitting.items():
            yield Trial(name, label, units, form)
        if fitting:
            yield Trial(TOGETHER, label, tuple(unit for units in fitting.values() for unit in units), form)
