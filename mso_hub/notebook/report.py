"""A finished output as a cell shows it: errors by layer, sizes, fused units, link, the line that serves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from mso_hub.errors import RecipeError
from mso_hub.notebook.heat import Heat, banded, heat_of
from mso_hub.notebook.panes import COLUMNS, Bars, Command, Heading, Line, Link, Part, Picture, Table, bundle, pane_text
from mso_hub.plan import Plan
from mso_hub.plan.summary import changes, kind_of, percent, size
from mso_hub.verify import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 12
"""Problems and notes that are spelled out."""
WORST = 5
CELL = 8
"""Characters of a cell of the text grid: `12.345 `."""
MISSING = "a picture of the errors needs matplotlib: pip install 'mso-hub[notebook]'"


@dataclass(frozen=True, slots=True)
class ReportView(Report):
    """A Report that Jupyter shows by itself, `print` as text of 80 columns.

    sizes  what the output consists of -> bytes before and after
    fused  kind of unit -> how many
    link   page or folder of the output
    serve  the line that serves it
    """

    sizes: tuple[tuple[str, int, int], ...] = ()
    fused: tuple[tuple[str, int], ...] = ()
    link: str = ""
    serve: str = ""

    def plot(self) -> Figure:
        """Errors by layer and projection, and sizes, as a matplotlib Figure; RecipeError without matplotlib."""
        from mso_hub.notebook.plot import draw, has_matplotlib

        if not has_matplotlib():
            raise RecipeError(f"report of {self.where}: {MISSING}; print(job.report) has the same as text")
        return draw(heat_of(self.errors), self.sizes, self.where)

    def _parts(self) -> Iterator[Part]:
        verdict = "no problems found" if self.ok else f"{len(self.problems):,} problems"
        yield Heading(f"{self.where}: {verdict}")
        facts = f"{self.tensors:,} tensors, {self.packed:,} packed weights, {self.hashed:,} files as in mso_hub.json"
        yield Line(f"{facts}, {self.identical:,} weights byte for byte as in the source")
        yield from (Line(problem, "PROBLEM") for problem in self.problems[:SHOWN])
        if len(self.problems) > SHOWN:
            yield Line(f"and {len(self.problems) - SHOWN:,} more: job.report.problems")

    def _summary(self) -> Iterator[Part]:
        largest = max(1, *(before for _, before, _ in self.sizes), *(after for _, _, after in self.sizes), 1)
        rows = [(what, after / largest, f"{size(before)} -> {size(after)}") for what, before, after in self.sizes]
        yield Bars(rows)
        title = f"{sum(count for _, count in self.fused):,} fused units, one scale each"
        yield Table(("unit", "count"), [(kind, f"{n:,}") for kind, n in self.fused], title)
        yield from (Line(note, "note") for note in self.notes[:SHOWN])
        yield Link(self.link, "output")
        yield Command(self.serve)

    def text_parts(self) -> list[Part]:
        """Everything as text."""
        return [*self._parts(), *errors_parts(self), *self._summary()]

    def html_parts(self) -> list[Part]:
        """The same with a picture in front, where matplotlib is installed; the tables are folded away then."""
        from mso_hub.notebook.plot import draw, has_matplotlib, png

        tables = errors_parts(self)
        if not self.errors:
            return [*self._parts(), *self._summary()]
        if not has_matplotlib():
            return [*self._parts(), Line(MISSING, "note"), *tables, *self._summary()]
        alt = f"relative squared error of {len(self.errors):,} weights by layer and projection; the tables say the same"
        picture = draw(heat_of(self.errors), self.sizes, "")  # the first line says of what
        return [*self._parts(), Picture(png(picture), alt), *tables, *self._summary()]

    def __str__(self) -> str:
        return pane_text(self.text_parts())

    def __repr__(self) -> str:
        return f"ReportView({self.where!r}, ok={self.ok}, {len(self.errors):,} weights compared)"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/html": bundle(self.html_parts())["text/html"], "text/plain": str(self)}


def view_report(report: Report, plan: Plan, link: str, serve: str) -> ReportView:
    """The same report, to be shown."""
    known = {f.name: getattr(report, f.name) for f in fields(Report)}
    return ReportView(**known, sizes=breakdown(plan), fused=fused_units(plan), link=link, serve=serve)


def breakdown(plan: Plan) -> tuple[tuple[str, int, int], ...]:
    """What weights became -> bytes before and after; what stays; text files."""
    found: dict[str, list[int]] = {}
    for change in changes(plan):
        row = found.setdefault(change.becomes, [0, 0])
        row[0] += change.before
        row[1] += change.after
    kept = sum(s.weight.nbytes for shard in plan.shards for s in shard.steps if not s.changes)
    texts = sum(map(len, plan.files.values()))
    return (
        *((name, before, after) for name, (before, after) in found.items()),
        ("as it was", kept, kept),
        ("config and index", texts, texts),
    )


def fused_units(plan: Plan) -> tuple[tuple[str, int], ...]:
    """Kind of unit -> how many engines fuse and give one scale."""
    found: dict[str, int] = {}
    for key, members in plan.units.items():
        if len(members) > 1 and plan.formats[members[0].module].shares:
            found[kind_of(key)] = found.get(kind_of(key), 0) + 1
    return tuple(sorted(found.items()))


def errors_parts(report: Report) -> list[Part]:
    """Tables: by kind, by layer and projection, the worst weights."""
    if not report.errors:
        return [Line("no weight changed: there are no errors to show")]
    kinds: dict[tuple[str, str], list[float]] = {}
    for error in report.errors:
        kinds.setdefault((kind_of(error.name.removesuffix(".weight")), error.stored), []).append(error.nmse)
    rows = [
        (kind, stored, f"{len(v):,}", percent(sum(v) / len(v)), percent(max(v)))
        for (kind, stored), v in sorted(kinds.items())
    ]
    worst = sorted(report.errors, key=lambda e: -e.nmse)[:WORST]
    return [
        Line("error: sum of squared differences over sum of squares, dequantized against the source"),
        Table(("weights", "stored as", "count", "mean", "worst"), rows),
        *grid(banded(heat_of(report.errors))),
        Table(("weight", "stored as", "error", "largest"),
              [(e.name.removesuffix(".weight"), e.stored, percent(e.nmse), f"{e.max_abs:.4g}") for e in worst],
              "the largest errors"),
    ]  # fmt: skip


def _in_percent(error: float) -> str:
    return f"{100 * error:.4f}"


def grid(
    heat: Heat,
    title: str = "mean error in % by layer and projection",
    said: Callable[[float], str] = _in_percent,
    width: int = CELL,
) -> list[Part]:
    """Layers down, projections across; as many tables as 80 columns need."""
    first = max(map(len, heat.layers), default=1)
    across = max(1, (COLUMNS - max(first, len("layer"))) // (width + 2))
    tables: list[Part] = []
    for at in range(0, len(heat.kinds), across):
        some = heat.kinds[at : at + across]
        rows = [
            (layer, *(said(heat.cells[layer, kind]) if (layer, kind) in heat.cells else "" for kind in some))
            for layer in heat.layers
            if any((layer, kind) in heat.cells for kind in some)
        ]
        tables.append(Table(("layer", *some), rows, title))
    return tables
