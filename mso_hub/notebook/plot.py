"""Errors and sizes as a picture. No pyplot: nothing stays open, and nothing is shown twice."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mso_hub.notebook.heat import Heat
from mso_hub.notebook.panes import cut
from mso_hub.plan.summary import size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#7a7a7a"
"""Text and lines: readable on white and on black, since the picture has no background."""
MARKERS = "osD^v<>P*Xph"
"""Formats of the same width lie close together."""
TICKS = 40
"""Layers that are named beside the grid at most."""
SPELLED = (12, 8)
"""Layers and projections of a grid whose cells say their numbers."""
NARROW, WHOLE = (1, 2, 5), (1,)
"""Ticks of a decade, for numbers that are near each other and for others."""
DPI = 160
"""Sharp on screens that have two pixels for one of the page."""
SMALL, LARGE = 9.0, 10.0
"""Points of ticks and titles: a picture 9 inches wide is about 860 pixels in a cell."""


def has_matplotlib() -> bool:
    """Is it installed?"""
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError:
        return False
    return True


def draw(heat: Heat, sizes: Sequence[tuple[str, int, int]], title: str) -> Figure:
    """A heat map of layers by projections, and bars of the sizes before and after."""
    figure, (left, right) = _figure(min(14.0, max(3.6, 1.9 + 0.2 * len(heat.layers))), (2.2, 1.0))
    _grid(figure, left, heat, "mean error, % of the squared weights", 100)
    _sizes(right, sizes)
    return _titled(figure, title)


def _figure(height: float, widths: tuple[float, float]) -> tuple[Figure, Any]:
    """Without background, with two axes beside each other; inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0.0)
    return figure, figure.subplots(1, 2, width_ratios=widths)


def _titled(figure: Figure, title: str) -> Figure:
    """Finished, and shown by Jupyter."""
    if title:
        figure.suptitle(_plain(cut(title, 80)), color=INK, fontsize=LARGE)
    shown: Any = figure
    shown._repr_png_ = lambda: png(figure)  # IPython asks the object for it
    return figure


def png(figure: Figure) -> bytes:
    """The picture's bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, transparent=True)
    return content.getvalue()


def _plain(text: str) -> str:
    """A name is no formula: matplotlib reads what stands between two dollars as one."""
    return text.replace("$", r"\$")


def _grid(figure: Figure, axes: Any, heat: Heat, title: str, factor: float = 1, *, log: bool = False) -> None:
    """Layers down, projections across; `log`: colours by the logarithm, of what is above 0."""
    rows = [[factor * heat.cells.get((layer, kind), math.nan) for kind in heat.kinds] for layer in heat.layers]
    finite = [[value if math.isfinite(value) and (value > 0 or not log) else math.nan for value in row] for row in rows]
    norm = "log" if log else "linear"
    image = axes.imshow(finite, aspect="auto", cmap="viridis", interpolation="nearest", norm=norm)
    axes.set_xticks(range(len(heat.kinds)), [_plain(cut(kind, 28)) for kind in heat.kinds], rotation=35, ha="right")
    step = -(-len(heat.layers) // TICKS)
    shown = range(0, len(heat.layers), step or 1)
    axes.set_yticks(shown, [heat.layers[at] for at in shown])
    axes.set_ylabel("layer", color=INK, fontsize=SMALL)
    axes.set_title(title, color=INK, fontsize=LARGE)
    if len(heat.layers) <= SPELLED[0] and len(heat.kinds) <= SPELLED[1]:
        _spell(axes, finite, log=log)
    bar = figure.colorbar(image, ax=axes)
    if log:
        _said(bar.ax.yaxis, NARROW)
    for part in (axes, bar.ax):
        _ink(part)


def _spell(axes: Any, rows: Sequence[Sequence[float]], *, log: bool = False) -> None:
    """The number of each cell, with three digits in the largest, dark on the bright half of the colours."""
    known = [value for row in rows for value in row if math.isfinite(value)] or [0.0]
    middle = math.sqrt(min(known) * max(known)) if log else (min(known) + max(known)) / 2
    digits = max(0, 2 - math.floor(math.log10(max(known)))) if max(known) > 0 else 0
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            if math.isfinite(value):
                ink = "black" if value > middle else "white"
                axes.text(x, y, f"{value:.{digits}f}", ha="center", va="center", color=ink, fontsize=SMALL)


def _sizes(axes: Any, sizes: Sequence[tuple[str, int, int]]) -> None:
    names = ["before", "after"]
    below = [0, 0]
    for name, *pair in sizes:
        axes.bar(names, pair, bottom=below, label=_plain(f"{cut(name, 24)}, {size(pair[1])}"))
        below = [a + b for a, b in zip(below, pair, strict=True)]
    axes.set_title(f"{size(below[0])} -> {size(below[1])}", color=INK, fontsize=LARGE)
    axes.yaxis.set_major_formatter(lambda value, _: size(value))
    axes.patch.set_alpha(0.0)
    axes.legend(fontsize=SMALL, frameon=False, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    _ink(axes)


def _ink(axes: Any) -> None:
    axes.tick_params(which="both", colors=INK, labelsize=SMALL)
    for spine in axes.spines.values():
        spine.set_color(INK)


def draw_formats(rows: Sequence[tuple[str, float, float, int]], title: str) -> Figure:
    """Label, bits a number, error and bytes of each format -> bits against error, and bars of the sizes."""
    figure, (left, right) = _figure(4.0, (1.5, 1.0))
    for at, (label, bits, error, _) in enumerate(rows):
        left.plot([bits], [100 * error], MARKERS[at % len(MARKERS)], label=_plain(label), markersize=8)
    left.legend(fontsize=7, frameon=False, labelcolor=INK)
    left.set_yscale("log" if all(error > 0 for _, _, error, _ in rows) else "linear")
    left.margins(x=0.15)
    left.set_xlabel("bits a number, scales included", color=INK, fontsize=SMALL)
    left.set_title("error, % of the squared weights", color=INK, fontsize=LARGE)
    colours = [f"C{at % 10}" for at in range(len(rows))]
    right.barh([_plain(label) for label, *_ in rows], [nbytes for *_, nbytes in rows], color=colours)
    right.invert_yaxis()
    right.xaxis.set_major_formatter(lambda value, _: size(value))
    right.set_title("size", color=INK, fontsize=LARGE)
    for axes in (left, right):
        axes.patch.set_alpha(0.0)
        _ink(axes)
    return _titled(figure, title)


def draw_ranges(heat: Heat, title: str) -> Figure:
    """A heat map of the largest |x| by layers and projections, and how far each projection's layers lie apart."""
    height = min(14.0, max(3.6, 1.9 + 0.2 * len(heat.layers)))
    figure, (left, right) = _figure(height, (1.6, 1.0))
    _grid(figure, left, heat, "largest |x| that entered", log=True)
    for at, kind in enumerate(heat.kinds):
        values = [heat.cells[layer, kind] for layer in heat.layers if heat.cells.get((layer, kind), 0.0) > 0]
        if values:
            right.plot([min(values), max(values)], [at, at], color=f"C{at % 10}", linewidth=2)
            right.plot(values, [at] * len(values), "o", color=f"C{at % 10}", markersize=5)
    right.set_yticks(range(len(heat.kinds)), [_plain(cut(kind, 28)) for kind in heat.kinds])
    right.invert_yaxis()
    _amounts(right, "from layer to layer", NARROW)
    return _titled(figure, title)


def draw_evaluations(rows: Sequence[tuple[str, float, float | None, float]], title: str) -> Figure:
    """Label, KL divergence with its standard error, and share of equal first choices of each -> two bar charts."""
    figure, (left, right) = _figure(max(2.4, 1.2 + 0.35 * len(rows)), (1.2, 1.0))
    names = [_plain(cut(label, 32)) for label, *_ in rows]
    colours = [f"C{at % 10}" for at in range(len(rows))]
    spread = [error or 0.0 for _, _, error, _ in rows]
    left.barh(names, [kl for _, kl, _, _ in rows], xerr=spread, color=colours, ecolor=INK)
    left.invert_yaxis()
    _amounts(left, "KL divergence, nats a token", WHOLE if all(kl > 0 for _, kl, _, _ in rows) else ())
    right.barh(names, [100 * share for *_, share in rows], color=colours)
    right.invert_yaxis()
    right.set_yticks([])
    right.set_xlim(0, 100)
    _amounts(right, "same first choice, %", ())
    return _titled(figure, title)


def _amounts(axes: Any, title: str, steps: Sequence[int]) -> None:
    """The axis of numbers: logarithmic where there are `steps` of a decade."""
    if steps:
        axes.set_xscale("log")
        _said(axes.xaxis, steps)
    axes.set_title(title, color=INK, fontsize=LARGE)
    axes.patch.set_alpha(0.0)
    _ink(axes)


def _said(axis: Any, steps: Sequence[int]) -> None:
    """Ticks of a logarithmic axis as numbers, not as powers of ten."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter("")
