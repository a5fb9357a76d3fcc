"""A panel of widgets over a Job: what its buttons do, a line of code does too."""

from __future__ import annotations

import threading
from collections.abc import Callable
from html import escape
from typing import Any

from mso_hub.errors import MsoError, RecipeError
from mso_hub.formats import DENSE, FORMATS
from mso_hub.hub import Client, is_address
from mso_hub.hub.search import search_models
from mso_hub.notebook.job import PAUSED, Job
from mso_hub.notebook.panes import Heading, Line, Pane, clean
from mso_hub.notebook.views import FIELDS, MISSING, Widgets, display_widget, has_widgets, without_bars
from mso_hub.plan.recipe import LAYOUTS

WIDE = {"width": "auto", "flex": "1 1 auto"}
NARROW = {"width": "auto", "margin": "2px 1.5em 2px 2px"}
INDENT = {"margin": f"0 0 0 {FIELDS}"}
INSTEAD = (
    "job = mso_hub.Job('hf://org/model', 'hf://me/model-NVFP4', scheme='nvfp4')",
    "job            # the plan",
    "job.run()      # interrupt it to pause, run the cell again to go on",
    "job.report     # errors, sizes, the line that serves it",
)


def panel(src: str = "", dst: str = "", *, client: Client | None = None) -> Panel | Pane:
    """Widgets that make a Job, show its plan, run it, pause it and show its report.

    Without ipywidgets: the same as lines of code, to be copied.
    client  connection for the search and for Hub addresses; by default one with the user's own login
    """
    without_bars()
    if has_widgets():
        return Panel(src, dst, client)
    lines = [Line(line) for line in INSTEAD]
    return Pane([Heading(f"the panel {MISSING}"), Line("the same without it:"), *lines])


class Panel:
    """What `panel` shows; `job` is the one that its buttons work on, None before the first."""

    def __init__(self, src: str, dst: str, client: Client | None) -> None:
        import ipywidgets as w

        self.job: Job | None = None
        self._client = client
        self._made: tuple[Any, ...] = ()
        self._thread: threading.Thread | None = None
        self.query = w.Text(placeholder="words of a name on the Hub", description="Search", layout=WIDE)
        self.find = w.Button(description="Search", layout={"width": "8em"})
        self.found = w.Dropdown(options=[("", "")], description="Found", layout={**WIDE, "display": "none"})
        self.src = w.Text(src, placeholder="hf://org/name or a folder", description="Source", layout=WIDE)
        self.dst = w.Text(dst, placeholder="hf://me/name or a new folder", description="Output", layout=WIDE)
        self.scheme = w.Dropdown(options=[*FORMATS, DENSE], value="nvfp4", description="Scheme", layout=WIDE)
        self.layout = w.Dropdown(options=LAYOUTS, description="Layout", layout=WIDE)
        self.all_linear = w.Checkbox(description="attention too", indent=False, layout=NARROW)
        self.text_only = w.Checkbox(description="text only", indent=False, layout=NARROW)
        self.private = w.Checkbox(description="private repo", indent=False, layout=NARROW)
        self.plan = w.Button(description="Plan", tooltip="what a run will write; it writes nothing itself")
        self.run = w.Button(description="Run", button_style="primary", tooltip="convert, or go on after a pause")
        self.pause = w.Button(description="Pause", disabled=True, tooltip="stop; what is complete is kept")
        self.message = w.HTML(layout={"margin": f"2px 2px 2px calc({FIELDS} + 2px)"})
        self.progress = w.VBox(layout={"margin": "0 2px"})
        self.result = w.HTML()
        self.box = w.VBox([
            w.HBox([self.query, self.find]), self.found, self.src, self.dst,
            w.HBox([self.scheme, self.layout]), w.HBox([self.all_linear, self.text_only, self.private], layout=INDENT),
            w.HBox([self.plan, self.run, self.pause], layout=INDENT), self.message, self.progress, self.result,
        ], layout={"max_width": "62em"})  # fmt: skip
        self.find.on_click(lambda _: self._start("searching", self._search))
        self.found.observe(self._take, "value")
        self.plan.on_click(lambda _: self._start("planning", self._plan))
        self.run.on_click(lambda _: self._start("running", self._run))
        self.pause.on_click(lambda _: self._pause())

    def _ipython_display_(self) -> None:
        """Show the widgets; a page that cannot show any has a sentence."""
        display_widget(self.box, "a panel of widgets that this page cannot show; mso_hub.Job does the same in code")

    def wait(self, seconds: float | None = None) -> bool:
        """Until what a button started has ended; False where `seconds` were not enough."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)
        return thread is None or not thread.is_alive()

    # --- on the kernel's thread -----------------------------------------------------------------------

    def _start(self, doing: str, work: Callable[[], str]) -> None:
        """Work on a thread of its own: the kernel, and Pause, stay free."""
        if self._thread is not None and self._thread.is_alive():
            self._say("still at work; wait, or press Pause")
            return
        self._say(doing)
        for button in (self.find, self.plan, self.run):
            button.disabled = True
        self.pause.disabled = doing != "running"
        self._thread = threading.Thread(target=self._work, args=(work,), name="mso-panel", daemon=True)
        self._thread.start()

    def _take(self, change: Any) -> None:
        if change["new"]:
            self.src.value = change["new"]

    def _pause(self) -> None:
        if self.job is not None:
            self._say("pausing")
            self.job.pause()

    def _say(self, text: str) -> None:
        self.message.value = escape(clean(text))

    # --- on a thread ----------------------------------------------------------------------------------

    def _work(self, work: Callable[[], str]) -> None:
        try:
            self._say(work())
        except (MsoError, OSError) as error:
            self._say(str(error))
        except BaseException as error:
            self._say(f"{type(error).__name__}: {error}; please report this")
            raise
        finally:
            for button in (self.find, self.plan, self.run):
                button.disabled = False
            self.pause.disabled = True

    def _search(self) -> str:
        found = search_models(self._client or Client(), self.query.value.strip())
        self.found.options = [("", ""), *((clean(name), f"hf://{name}") for name in found)]
        self.found.layout.display = "" if found else "none"
        return f"{len(found)} repos found" if found else "no repo found; try fewer words"

    def _current(self) -> Job:
        """The Job of what the fields say; another one when they changed."""
        where = self.src.value.strip(), self.dst.value.strip()
        if not all(where):
            raise RecipeError(f"source and output must both be given, got {where[0]!r} and {where[1]!r}")
        words: dict[str, Any] = {}
        if self.scheme.value != DENSE:
            words = {"layout": self.layout.value, "mode": "all-linear" if self.all_linear.value else "mlp"}
        words |= {"text_only": self.text_only.value}
        if self.private.value and is_address(where[1]):
            words["private"] = True
        made = (*where, self.scheme.value, *sorted(words.items()))
        if self.job is None or made != self._made:
            self.job, self._made = Job(*where, scheme=self.scheme.value, client=self._client, **words), made
        return self.job

    def _plan(self) -> str:
        job = self._current()
        self.result.value = job._repr_mimebundle_()["text/html"]
        return "this is the plan; nothing was written"

    def _run(self) -> str:
        job = self._current()
        self.progress.children = ()
        job.run(Widgets(self.progress))
        if job.paused:
            return PAUSED.replace("run the cell again", "press Run")
        self._say("comparing every weight with the source")
        report = job.check(Widgets(self.progress))
        self.result.value = report._repr_mimebundle_()["text/html"]
        return f"done: {job.where}"
