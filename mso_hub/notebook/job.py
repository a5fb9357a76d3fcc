"""A conversion as one object: look at it, run it, stop it, run it again, look at what came out.

job = mso_hub.Job("hf://org/model", "hf://me/model-NVFP4", scheme="nvfp4")
job            # the plan: nothing is written
job.run()      # run the cell again to go on after a pause, also in a new kernel
job.report     # errors against the source, sizes, the line that serves it
"""

from __future__ import annotations

import shlex
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mso_hub.errors import MsoError, RecipeError, VerifyError
from mso_hub.events import Listener
from mso_hub.formats import DENSE
from mso_hub.formats.detect import quantization_configs
from mso_hub.hub import Client, is_address, parse_address
from mso_hub.notebook.estimate import Estimate, measure
from mso_hub.notebook.panes import COLUMNS, Command, Heading, Line, Link, Pane, Part, bundle, clean, pane_text, wrap
from mso_hub.notebook.plan import PlanView, duration, plan_parts, view_of
from mso_hub.notebook.report import ReportView, view_report
from mso_hub.notebook.settings import read_settings
from mso_hub.notebook.track import Checking, Track
from mso_hub.notebook.views import View, Watch, check_kind, open_view, show, without_bars
from mso_hub.pausable import Pausable
from mso_hub.pipeline import convert, make_plan
from mso_hub.plan import Plan, Recipe
from mso_hub.plan.summary import size
from mso_hub.sink import Sink, open_sink
from mso_hub.source import Source, open_source
from mso_hub.verify import read_manifest, verify_checkpoint

if TYPE_CHECKING:
    from mso_hub.serving import Served

PAUSED = "paused: what is complete is kept; run the cell again to go on"


class Job:
    """One conversion. Nothing is read before something is asked for, nothing is written before `run`.

    src, dst  folders, or hf://org/name@revision
    scheme    what weights become: a key of FORMATS, "nvfp4" by default; `bf16` decompresses
    recipe    in its place: a Recipe, a recipe file, the name of a preset, or an output to do again
    client    connection for Hub addresses; by default one with the user's own login
    progress  auto, widgets, text or none
    words     fields of Recipe (layout, mode, targets, ignore, text_only, ...); fresh, private, branch, create_pr,
              journal_branch and base_model for the output; workers, memory (bytes) and device for the engine;
              stats: activation scales from statistics of this source (a file, or what `calibrate` returns: nvfp4 is
              W4A4 then), headroom: a factor on them
    paused    was the last run stopped before its end?
    where     page or folder of the output, once a run ended well
    Raises RecipeError for words that mean nothing or contradict each other.
    """

    def __init__(
        self, src: str | Path, dst: str | Path, scheme: str | None = None, *,
        recipe: Recipe | str | Path | None = None, client: Client | None = None, progress: str = "auto", **words: Any,
    ) -> None:  # fmt: skip
        with one_sentence():
            without_bars()
            self._settings = read_settings(scheme, recipe, words)
            self._settings.require_place(str(dst))
            self.progress = check_kind(progress)
        self.src, self.dst = str(src), str(dst)
        self.paused, self.where = False, ""
        self._client = client
        self._recipe: Recipe | None = None
        self._plan: PlanView | None = None
        self._estimate: Estimate | None = None
        self._report: ReportView | None = None
        self._address = ""
        self._turn = threading.Lock()
        self._ends: tuple[Source, Sink] | None = None
        self._work: Pausable[Plan] | None = None

    # --- what it will do ------------------------------------------------------------------------------

    @property
    def recipe(self) -> Recipe:
        """What was asked for, as a Recipe; a recipe file and statistics are read once."""
        with one_sentence():
            if self._recipe is None:
                recipe = self._settings.build()
                if self._settings.stats is not None:
                    with closing(self._source()) as source:
                        recipe = self._settings.measured(recipe, source)
                self._recipe = recipe
            return self._recipe

    @property
    def plan(self) -> PlanView:
        """What will be written, from headers; made once."""
        with one_sentence():
            if self._plan is None:
                with closing(self._source()) as source:
                    self._plan = view_of(make_plan(source, self.recipe))
            return self._plan

    @property
    def estimate(self) -> Estimate:
        """Time and memory of a run, measured once on a few MB of the source."""
        with one_sentence():
            if self._estimate is None:
                plan = self.plan
                with closing(self._source()) as source:
                    self._estimate = measure(plan, source, self._settings.engine())
            return self._estimate

    def _source(self, on_event: Listener | None = None) -> Source:
        return open_source(self.src, client=self._client, **({"on_event": on_event} if on_event else {}))

    @property
    def serve(self) -> str:
        """The line that serves the output with vLLM on one GPU; `serve_on` knows more."""
        words = ["vllm", "serve"]
        if is_address(self.dst):
            address = parse_address(self._address or self.dst)
            revision = address.revision or self._settings.branch
            words += [address.repo_id, *(("--revision", revision) if revision else ())]
        else:
            words.append(self.dst)
        configs = quantization_configs(self.plan.config)
        if any(c.get("kv_cache_scheme") or c.get("kv_cache_quant_algo") for c in configs):
            words += ["--kv-cache-dtype", "fp8"]
        return shlex.join(words)

    def serve_on(self, gpu: str) -> Served:
        """Kernels, memory and the line for a GPU by its name, of the finished output."""
        from mso_hub.serving import find_gpu, serve_check

        with one_sentence(), closing(self._output()) as output:
            return serve_check(output, find_gpu(gpu))

    # --- doing it -------------------------------------------------------------------------------------

    def run(self, view: View | None = None) -> None:
        """Convert; go on where an earlier run stopped; do nothing where the output is complete.

        An interrupt is a pause: what is complete is kept, `paused` is set, and nothing is raised. A second interrupt
        does not wait for the pause.
        view  where progress is shown, in place of the cell
        """
        with one_sentence():
            if not self._turn.acquire(blocking=False):
                raise RecipeError(f"{self.dst}: this job is running already; wait for it, or pause it")
            try:
                if self._work is not None and self._work.alive:
                    raise RecipeError(f"{self.dst}: the pause has not come to its end yet; try again in a moment")
                self.paused = False
                self._run(view)
            except KeyboardInterrupt:
                self.paused = True
                self.pause()
            finally:
                self._turn.release()
        if self.paused and view is None:
            show(Pane([Line(PAUSED)]))

    def pause(self) -> None:
        """Stop a run, from any thread; a commit that has begun is not stopped."""
        if self._work is not None:
            self._work.stop()

    def _cut(self) -> None:
        """End every wait for the network."""
        ends = self._ends
        if ends is not None:
            source, sink = ends
            if source.distant:
                source.close()
            sink.abort()

    def _run(self, view: View | None) -> None:
        plan, settings = self.plan, self._settings
        track = Track(plan, "upload" if is_address(self.dst) else "write")
        work: Pausable[Plan] = Pausable(track, self._cut)
        self._work = work
        sink = open_sink(
            self.dst, fresh=settings.fresh, target=settings.target(self.src, self.dst, self.recipe),
            client=self._client, on_event=work.listen,
        )  # fmt: skip
        with Watch(track, view or open_view(self.progress)):
            try:
                done = work.run(partial(self._convert, plan, sink, work.listen))
            except BaseException as error:
                track.end("paused" if isinstance(error, KeyboardInterrupt) else "stopped")
                raise
        self._plan, self._report = view_of(done), None
        self.where, self._address = sink.where, sink.address
        if view is None:
            show(Pane(self._outcome(track, written=not sink.finished)))

    def _convert(self, plan: Plan, sink: Sink, listen: Listener) -> Plan:
        """On the thread that does the work."""
        with self._heard(listen), closing(self._source(listen)) as source:
            self._ends = source, sink
            try:
                return convert(
                    source, sink, self.recipe, engine=self._settings.engine(), base_model=self._settings.base_model,
                    check=partial(self._require_same, plan), on_event=listen,
                )  # fmt: skip
            finally:
                self._ends = None

    @contextmanager
    def _heard(self, listen: Listener) -> Iterator[None]:
        """A client that was given tells this run when it waits."""
        if self._client is None:
            yield
            return
        before, self._client.on_event = self._client.on_event, listen
        try:
            yield
        finally:
            self._client.on_event = before

    def _require_same(self, shown: Plan, plan: Plan, source: Source) -> None:
        """RecipeError when the source is no longer what the plan was made from."""
        if plan.job != shown.job:
            raise RecipeError(
                f"{source.name}: changed since the plan was made (job {shown.job[:12]}, now {plan.job[:12]}); make the "
                "Job again, and look at its plan"
            )

    # --- what came out --------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """What one types to read the output; of a pull request it is known once it was committed."""
        if self._address or not is_address(self.dst):
            return self._address or self.dst
        address = parse_address(self.dst)
        return f"hf://{address.repo_id}@{self._settings.branch}" if self._settings.branch else str(address)

    def _output(self) -> Source:
        """The finished output; VerifyError where there is none, or another job's."""
        if not is_address(self.dst) and not Path(self.dst).is_dir():
            raise VerifyError(f"{self.dst}: there is no output yet; call job.run() first")
        output = open_source(self.address, client=self._client)
        try:
            found = read_manifest(output).get("job")
        except BaseException:
            output.close()
            raise
        if found == self.plan.job:
            return output
        output.close()
        holds = f"the output of job {str(found)[:12]}" if found else "no output of this tool"
        raise VerifyError(f"{self.address}: holds {holds}, this one is {self.plan.job[:12]}; call job.run() first")

    @property
    def report(self) -> ReportView:
        """The finished output, checked against the source with the error of every weight; made once."""
        return self.check()

    def check(self, view: View | None = None) -> ReportView:
        """As `report`; `view` is where progress is shown."""
        with one_sentence():
            if self._report is None:
                checking = Checking()
                with closing(self._output()) as output, closing(self._source()) as source:
                    with Watch(checking, view or open_view(self.progress)):
                        found = verify_checkpoint(output, source=source, on_event=checking)
                        checking.end("done")
                    link = self.where or (self._page() if is_address(self.dst) else self.dst)
                self._report = view_report(found, self.plan, link, self.serve)
            return self._report

    def _page(self) -> str:
        client = self._client or Client()
        address = parse_address(self.address)
        page = f"{client.endpoint}/{address.repo_id}"
        return f"{page}/tree/{address.revision}" if address.revision else page

    # --- how it looks ---------------------------------------------------------------------------------

    def _outcome(self, track: Track, *, written: bool) -> list[Part]:
        plan = self.plan
        changed = sum(step.changes for shard in plan.shards for step in shard.steps)
        sizes = f"{changed:,} weights, {size(plan.read_bytes)} -> {size(plan.write_bytes)}"
        seconds = duration(track.snapshot().seconds)
        peak = f", at most {size(track.peak)} of memory" if track.peak else ""
        took = f"in {seconds}{peak}" if written else "was complete already, nothing was written"
        return [
            Heading(f"done: {sizes}, {took}"),
            Link(self.where, "output"),
            *(Line(note, "note") for note in plan.notes[:3]),
            Line("job.report compares every weight with the source", "next"),
        ]

    def parts(self) -> list[Part]:
        """What a cell shows of it."""
        recipe = self.recipe
        title = f"{self.src} -> {self.dst}: {recipe.label or DENSE} ({recipe.layout})"
        after = "paused; job.run() goes on" if self.paused else "job.run() starts, and goes on after a pause"
        return [*plan_parts(self.plan, self.estimate, title), Line(after, "next"), Command(self.serve)]

    def __repr__(self) -> str:
        return clean(f"Job({self.src!r} -> {self.dst!r})")

    def __str__(self) -> str:
        return pane_text(self.parts())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return bundle(self.parts())


@contextmanager
def one_sentence() -> Iterator[None]:
    """What this package refuses is one sentence in a cell, not a page of traceback; other errors keep theirs."""
    try:
        yield
    except MsoError as error:
        render: Callable[[], list[str]] = partial(_sentence, error)
        error._render_traceback_ = render  # type: ignore[attr-defined]  # IPython asks the exception for it
        raise


def _sentence(error: MsoError) -> list[str]:
    return [line for text in f"{type(error).__name__}: {error}".split("\n") for line in wrap(text, COLUMNS)]
