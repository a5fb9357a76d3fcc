"""A plan as a cell shows it: what becomes what, sizes, what stays and why, what a run will take."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import fields
from typing import Any

from mso_hub.formats import DENSE
from mso_hub.notebook.estimate import Estimate
from mso_hub.notebook.panes import Bars, Heading, Line, Part, Table, bundle, pane_text
from mso_hub.plan import Plan
from mso_hub.plan.summary import by_reason, changes, kind_of, size

NOTES = 6
"""Notes that are spelled out; `job.plan.notes` has them all."""
KINDS = 3
"""Kinds of modules named for each reason."""
SHOWN = 40
"""Rows of a table; `job.plan` has the rest."""


class PlanView(Plan):
    """A Plan that Jupyter shows by itself, `print` as text of 80 columns."""

    __slots__ = ()

    def __str__(self) -> str:
        return pane_text(plan_parts(self))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return bundle(plan_parts(self))


def view_of(plan: Plan) -> PlanView:
    """The same plan, to be shown."""
    return PlanView(**{f.name: getattr(plan, f.name) for f in fields(Plan)})


def duration(seconds: float) -> str:
    """`4 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 1:
        return "less than 1 s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def bits_per_weight(plan: Plan) -> tuple[float, float]:
    """(of the weights that get another form, of all weights), scales and the like included."""
    steps = [step for shard in plan.shards for step in shard.steps]
    return tuple(
        8 * sum(info.nbytes for s in some for info in s.outputs)
        / max(1, sum(math.prod(s.weight.shape) for s in some))
        for some in ([s for s in steps if s.changes], steps)
    )  # type: ignore[return-value]  # fmt: skip


def plan_parts(plan: Plan, estimate: Estimate | None = None, title: str = "") -> list[Part]:
    """Everything that is known before a run.

    estimate  what was measured; None leaves time and memory out
    title     first line in place of source and formats
    """
    rows = [
        (c.kind, c.becomes, f"{c.count:,}", size(c.before), size(c.after), f"{100 * c.after / max(1, c.before):.0f} %")
        for c in changes(plan)
    ]
    more = [(f"and {len(rows) - SHOWN:,} more kinds, see job.plan", "", "", "", "", "")] if len(rows) > SHOWN else []
    return [
        Heading(title or f"{plan.source} -> {plan.recipe.label or DENSE} ({plan.recipe.layout})"),
        Table(("weights", "become", "count", "before", "after", "left"), [*rows[:SHOWN], *more]),
        *_stays(plan),
        *_fused(plan),
        *_sizes(plan),
        *(expected(estimate) if estimate is not None else ()),
        *(Line(note, "note") for note in plan.notes[:NOTES]),
        *([Line(f"and {len(plan.notes) - NOTES:,} more notes: job.plan.notes")] if len(plan.notes) > NOTES else ()),
    ]


def _stays(plan: Plan) -> list[Part]:
    """Without those that are decoded: the table above has them."""
    changed = {step.weight.module for shard in plan.shards for step in shard.steps if step.changes}
    rows = []
    for entry in by_reason({module: why for module, why in plan.kept.items() if module not in changed}):
        kinds = ", ".join(entry.kinds[:KINDS]) + (", ..." if len(entry.kinds) > KINDS else "")
        rows.append((entry.reason, f"{entry.count:,}", kinds))
    return [Table(("stays, because", "count", "modules"), rows)] if rows else []


def _fused(plan: Plan) -> list[Part]:
    """Modules that engines fuse and that therefore share one scale."""
    found: Counter[tuple[str, str]] = Counter()
    for key, members in plan.units.items():
        if len(members) > 1 and plan.formats[members[0].module].shares:
            found[kind_of(key), ", ".join(sorted({w.module.rpartition(".")[2] for w in members}))] += 1
    rows = [(kind, members, f"{count:,}") for (kind, members), count in sorted(found.items())]
    return [Table(("unit", "members", "count"), rows, "one scale for all members of a fused unit")] if rows else []


def _sizes(plan: Plan) -> list[Part]:
    read, write = plan.read_bytes, plan.write_bytes
    changed, whole = bits_per_weight(plan)
    largest = max(1, read, write)
    return [
        Bars([("before", read / largest, size(read)),
              ("after", write / largest, f"{size(write)}, {100 * write / max(1, read):.0f} %")]),
        Line(f"{changed:.2f} for the weights above, {whole:.2f} for the whole model, scales included", "bits"),
        Line(f"{len(plan.shards):,} shards to write, {len(plan.carried):,} files to carry along", "files"),
    ]  # fmt: skip


def expected(estimate: Estimate) -> list[Part]:
    """Time and memory, and how they are known."""
    least = max(estimate.read, estimate.encode)
    time = (
        f"estimated {duration(least)}: reading {duration(estimate.read)}, encoding {duration(estimate.encode)} on "
        f"{estimate.threads} threads, both at once; from {size(estimate.sampled)} of this checkpoint, read and encoded "
        "just now. Writing was not tried: a disk or network slower than that takes longer"
    )
    now = f", on top of the {size(estimate.now)} that this Python holds now" if estimate.now else ""
    memory = f"up to {size(estimate.budget)} of weights at once{now}"
    return [Line(time, "time"), Line(memory, "memory")]
