"""Progress while it goes on: widgets where a kernel can show them, else lines of text that may be kept in a log."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Sequence
from importlib import import_module
from types import TracebackType
from typing import Any, Protocol, TextIO

from mso_hub.errors import RecipeError
from mso_hub.notebook.panes import COLUMNS, clean, cut
from mso_hub.notebook.track import Progress, Snapshot, Tracking
from mso_hub.plan.summary import size

KINDS = ("auto", "widgets", "text", "none")
TICK = 0.05
LOOK = 0.25
"""Seconds between two looks at what goes on."""
EVERY = 5.0
"""Seconds between two lines of text: a log must stay readable."""
FIELDS = "88px"
"""Where bars begin, to the right of their names: where ipywidgets lets its fields begin."""
STYLES = {"done": "success", "paused": "warning", "stopped": "danger"}
"""How it ended -> the colour of its bars."""
MISSING = "needs ipywidgets: pip install 'mso-hub[notebook]'"


class View(Protocol):
    """Draws snapshots."""

    def draw(self, snapshot: Snapshot, *, last: bool = False) -> None:
        """Show it; `last` is how it ended."""


class Nothing:
    """Shows nothing."""

    def draw(self, snapshot: Snapshot, *, last: bool = False) -> None:
        """Nothing."""


class Text:
    """One line every few seconds, no carriage returns: the same in a cell, in papermill's log and in a file."""

    def __init__(self, stream: TextIO, every: float = EVERY) -> None:
        self._stream, self._every, self._next = stream, every, 0.0

    def draw(self, snapshot: Snapshot, *, last: bool = False) -> None:
        """A line, where it is time for one."""
        if not last and snapshot.seconds < self._next:
            return
        self._next = snapshot.seconds + self._every
        self._stream.write(line(snapshot) + "\n")
        self._stream.flush()


class Widgets:
    """Bars of ipywidgets, one below the other, and a line with rate, time and memory."""

    def __init__(self, box: Any = None) -> None:
        import ipywidgets

        self._widgets = ipywidgets
        self._rows: dict[str, tuple[Any, Any, Any]] = {}
        self._names: list[str] = []
        self._status = ipywidgets.HTML(layout={"margin": f"0 0 0 {FIELDS}"})
        self.box = box if box is not None else ipywidgets.VBox()
        self._above = tuple(self.box.children)
        self._shown = box is not None

    def draw(self, snapshot: Snapshot, *, last: bool = False) -> None:
        """Move the bars; the first call makes and shows them."""
        from html import escape

        if [bar.name for bar in snapshot.bars] != self._names:
            self._names = [bar.name for bar in snapshot.bars]
            self._arrange(snapshot.bars)
        for bar in snapshot.bars:
            _, widget, text = self._rows[bar.name]
            widget.value = 100 * bar.share
            widget.bar_style = STYLES.get(snapshot.state, "")
            text.value = escape(amounts(bar))
        self._status.value = escape(status(snapshot))
        if not self._shown:
            self._shown = True
            display_widget(self.box, "progress: a widget that this page cannot show; the line below tells the end")

    def _arrange(self, bars: Sequence[Progress]) -> None:
        """One row for each bar, in their order; a bar may come later than the one below it."""
        for bar in bars:
            if bar.name not in self._rows:
                self._rows[bar.name] = self._row(bar.name)
        rows = [self._rows[bar.name][0] for bar in bars]
        self.box.children = [*self._above, *rows, self._status]

    def _row(self, name: str) -> tuple[Any, Any, Any]:
        wide = {"flex": "0 1 20em", "width": "auto", "height": "1.6em", "margin": "0 .7em 0 0"}
        bar = self._widgets.FloatProgress(0.0, min=0.0, max=100.0, layout=wide)
        label = self._widgets.Label(name, layout={"width": FIELDS, "margin": "0"})
        text = self._widgets.HTML(layout={"margin": "0"})
        row = self._widgets.HBox([label, bar, text], layout={"align_items": "center", "overflow": "hidden"})
        return row, bar, text


class Watch:
    """Draws what goes on until the block ends."""

    def __init__(self, tracked: Tracking, view: View) -> None:
        self._tracked, self._view = tracked, view
        self._over = False
        self._thread = threading.Thread(target=self._look, name="mso-progress", daemon=True)

    def _look(self) -> None:
        drawn = time.monotonic()
        while not self._over:  # no lock: an interrupt may strike the thread that ends it
            time.sleep(TICK)
            if time.monotonic() - drawn >= LOOK:
                drawn = time.monotonic()
                self._view.draw(self._tracked.snapshot())

    def __enter__(self) -> Watch:  # noqa: PYI034 - Self needs Python 3.11
        self._view.draw(self._tracked.snapshot())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self._thread.join()
        self._view.draw(self._tracked.snapshot(), last=True)


def open_view(kind: str) -> View:
    """`auto`, `widgets`, `text` or `none` -> View; RecipeError for `widgets` without ipywidgets."""
    if kind == "none":
        return Nothing()
    wanted = kind == "widgets" or (kind == "auto" and in_kernel())
    if wanted and has_widgets():
        return Widgets()
    if kind == "widgets":
        raise RecipeError(f"progress {kind!r}: {MISSING}; or take progress='text'")
    return Text(sys.stdout if in_kernel() else sys.stderr)


def check_kind(kind: str) -> str:
    """RecipeError for what is not one of KINDS."""
    if kind not in KINDS:
        raise RecipeError(f"progress must be one of {', '.join(KINDS)}, got {kind!r}")
    return kind


def in_kernel() -> bool:
    """Does a Jupyter kernel run this?"""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def without_bars() -> None:
    """Import tqdm as the Hub's client does: without ipywidgets it warns in a kernel that its bars will be text."""
    from tqdm import TqdmWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmWarning)
        import tqdm.auto  # noqa: F401


def has_widgets() -> bool:
    """Is ipywidgets installed?"""
    try:
        import ipywidgets  # noqa: F401
    except ImportError:
        return False
    return True


def display_widget(widget: Any, instead: str) -> None:
    """Show a widget; pages that cannot show one have a sentence instead of its Python name."""
    found = widget._repr_mimebundle_() or {}  # what display() itself calls
    ipython_display({**found, "text/plain": instead}, raw=True)


def ipython_display(shown: Any, **how: Any) -> None:
    """IPython's display(); where a kernel runs, IPython is there."""
    import_module("IPython.display").display(shown, **how)


def show(pane: Any) -> None:
    """Put a pane into the cell's output; on the terminal where there is no cell."""
    if in_kernel():
        ipython_display(pane)
    else:
        sys.stderr.write(f"{pane}\n")


def amounts(bar: Progress) -> str:
    """`1.2 GB of 2.9 GB`; of a commit the files that are stored, of a walk over text layers and tokens."""
    if bar.said:
        return bar.said
    if bar.name == "commit":
        return "done" if bar.share == 1.0 else f"{bar.done:,} of {bar.total - 1:,} shards stored"
    return f"{size(bar.done)} of {size(bar.total)}"


def status(snapshot: Snapshot) -> str:
    """`encoding, 210 MB/s, 0:08 left, 512 MB memory`."""
    parts = [snapshot.state]
    parts += [speed(snapshot)] if snapshot.rate else []
    spent = clock(snapshot.seconds)
    if snapshot.state in STYLES:
        parts += [f"after {spent}"]
    else:
        parts += [f"{clock(snapshot.left)} left"] if snapshot.left is not None else [f"{spent} so far"]
    parts += [f"{size(snapshot.memory)} memory"] if snapshot.memory else []
    return clean(", ".join(parts))


def line(snapshot: Snapshot) -> str:
    """One line of at most 80 columns: shares of all bars, then amounts and status as far as there is room."""
    shares = "  ".join(f"{bar.name} {100 * bar.share:3.0f}%" for bar in snapshot.bars)
    facts = [speed(snapshot)] if snapshot.rate else []
    facts += [f"{clock(snapshot.left)} left"] if snapshot.left is not None else []
    facts += [size(snapshot.memory)] if snapshot.memory else []
    text = "  ".join([*([shares] if shares else []), *facts])
    room = COLUMNS - len(text) - 2
    return f"{text}  {cut(snapshot.state.partition(':')[0], room)}" if room >= 8 else text[:COLUMNS]


def speed(snapshot: Snapshot) -> str:
    """`210 MB/s`, `3,100 tokens/s`."""
    return f"{snapshot.rate:,.0f} {snapshot.unit}/s" if snapshot.unit else f"{size(snapshot.rate)}/s"


def clock(seconds: float) -> str:
    """`0:08`, `1:02:03`."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
