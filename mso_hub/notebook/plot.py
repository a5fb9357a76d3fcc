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

INK = "#808080"
"""Text and lines: readable on white and on black, since the picture has no background."""
TICKS = 40
"""Layers that are named beside the grid at most."""


def has_matplotlib() -> bool:
    """Is it installed?"""
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError:
        return False
    return True


def draw(heat: Heat, sizes: Sequence[tuple[str, int, int]], title: str) -> Figure:
    """A heat map of layers by projections, and bars of the sizes before and after."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = min(14.0, max(3.2, 1.6 + 0.18 * len(heat.layers)))
    figure = Figure(figsize=(10.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0.0)
    left, right = figure.subplots(1, 2, width_ratios=(2.2, 1.0))
    _grid(figure, left, heat)
    _sizes(right, sizes)
    figure.suptitle(_plain(cut(title, 80)), color=INK, fontsize=10)
    shown: Any = figure
    shown._repr_png_ = lambda: png(figure)  # IPython asks the object for it
    return figure


def png(figure: Figure) -> bytes:
    """The picture's bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, transparent=True)
    return content.getvalue()


def _plain(text: str) -> str:
    """A name is no formula: matplotlib reads what stands between two dollars as one."""
    return text.replace("$", r"\$")


def _grid(figure: Figure, axes: Any, heat: Heat) -> None:
    rows = [[100 * heat.cells.get((layer, kind), math.nan) for kind in heat.kinds] for layer in heat.layers]
    finite = [[value if math.isfinite(value) else math.nan for value in row] for row in rows]
    image = axes.imshow(finite, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_xticks(range(len(heat.kinds)), [_plain(cut(kind, 28)) for kind in heat.kinds], rotation=35, ha="right")
    step = -(-len(heat.layers) // TICKS)
    shown = range(0, len(heat.layers), step or 1)
    axes.set_yticks(shown, [heat.layers[at] for at in shown])
    axes.set_ylabel("layer", color=INK, fontsize=8)
    axes.set_title("mean error, % of the squared weights", color=INK, fontsize=9)
    bar = figure.colorbar(image, ax=axes)
    for part in (axes, bar.ax):
        _ink(part)


def _sizes(axes: Any, sizes: Sequence[tuple[str, int, int]]) -> None:
    names = ["before", "after"]
    below = [0, 0]
    for name, *pair in sizes:
        axes.bar(names, pair, bottom=below, label=_plain(f"{cut(name, 24)}, {size(pair[1])}"))
        below = [a + b for a, b in zip(below, pair, strict=True)]
    axes.set_title(f"{size(below[0])} -> {size(below[1])}", color=INK, fontsize=9)
    axes.yaxis.set_major_formatter(lambda value, _: size(value))
    axes.patch.set_alpha(0.0)
    axes.legend(fontsize=7, frameon=False, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    _ink(axes)


def _ink(axes: Any) -> None:
    axes.tick_params(colors=INK, labelsize=7)
    for spine in axes.spines.values():
        spine.set_color(INK)
