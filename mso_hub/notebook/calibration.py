"""A model over text, from a cell: statistics of its activations, methods that need some, how well it predicts.

    statistics = calibrate(src, text="python-docs", rows=64)            # run the cell again to go on after a pause
    job = mso_hub.Job(src, dst, scheme="nvfp4", stats=statistics)
    found = evaluate(dst, against=src, text="python-docs", split="test")
    better = prepare(src, job.recipe, "gptq", text="python-docs")       # better.write(dst)

All of it needs the extra `calibrate`: transformers, and datasets for text that is no file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mso_hub.errors import RecipeError, SinkError
from mso_hub.events import Listener
from mso_hub.hub import Client
from mso_hub.notebook.job import PAUSED, one_sentence
from mso_hub.notebook.panes import Heading, Line, Pane, Part, clean
from mso_hub.notebook.plan import duration
from mso_hub.notebook.track import Walking
from mso_hub.notebook.views import Watch, check_kind, open_view, show, without_bars
from mso_hub.pausable import Pausable
from mso_hub.pipeline import convert
from mso_hub.plan import Plan, Recipe
from mso_hub.plan.evaluation import Evaluation
from mso_hub.plan.method import FOLDED, Method
from mso_hub.plan.summary import size
from mso_hub.sink.journal import cache_folder
from mso_hub.source import Source, open_source

if TYPE_CHECKING:
    from mso_hub.calibrate.evaluate import Settings
    from mso_hub.calibrate.methods import MethodSettings
    from mso_hub.calibrate.statistics import Statistics
    from mso_hub.calibrate.text import Rows, TextSettings
    from mso_hub.calibrate.walk import Walk

Result = TypeVar("Result")
STOPPED = "stopped: nothing is kept of a measurement; run the cell again to begin anew"
NEXT = "mso_hub.Job(src, dst, stats=...) takes them; mso_hub.notebook.view(...) shows them"

_works: list[Pausable[Any]] = []
"""The one at work, or the last."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a method made of a source; `source` stays open.

    source  shows the method's work in place of the weights
    recipe  to convert it with, which says what was done
    told    the plan of the source as it was
    method  what was done
    """

    source: Source
    recipe: Recipe
    told: Plan
    method: Method

    def write(self, dst: str | Path, **words: Any) -> Plan:
        """Convert it; `words` are those of mso_hub.convert."""
        with one_sentence():
            return convert(self.source, dst, self.recipe, told=self.told, **words)

    def __repr__(self) -> str:
        """One line: the last expression of a cell shows it."""
        return clean(f"Prepared({self.source.name}: {self.method.sentence})")


def calibrate(
    src: str | Path, output: str | Path | None = None, *, text: str | Path | TextSettings | None = None,
    split: str | None = None, rows: int | None = None, max_seq_len: int | None = None, settings: Settings | None = None,
    channels: bool = False, fresh: bool = False, client: Client | None = None, progress: str = "auto",
) -> Statistics:  # fmt: skip
    """Run a model over text, one decoder layer in memory, and keep what its activations are like.

    An interrupt is a pause: what is complete is kept, and the same call goes on after the last complete layer, also in
    another kernel. Where the statistics are complete they are taken as they are.
    src       folder, or hf://org/name@revision
    output    file to write; None: one in the cache, named after what was asked for
    text      python-docs (built in, no network), a file, a folder, org/name on the Hub, or TextSettings, which say
              everything; None: cnn_dailymail
    split     of the data set, `train` by default; `rows` (512) of `max_seq_len` (512) tokens
    settings  how the model is run: dtype, attention, experts, device, memory, trust_remote_code
    channels  keep magnitudes and second moments of each input column too
    fresh     begin anew, whatever is there
    client    connection for a Hub address; by default one with the user's own login
    progress  auto, widgets, text or none
    Raises what `collect_statistics` and `read_text` raise; RecipeError that names the extra without transformers.
    """
    with one_sentence():
        from mso_hub.calibrate.collect import collect_statistics
        from mso_hub.calibrate.evaluate import Settings

        wanted, how = _text(text, split, rows, max_seq_len), settings or Settings()
        path = Path(output) if output is not None else _place("statistics", src, wanted, how, channels, ".safetensors")
        kept: list[Rows] = []

        def read(source: Source, tell: Listener, walk: Walk) -> Rows:
            """Once it is known that the model can run."""
            kept.append(_read(source, wanted, how, tell, walk.vocab_size))
            return kept[0]

        def work(source: Source, tell: Listener) -> Statistics:
            """On the thread that works."""
            said = {f.name: getattr(how, f.name) for f in fields(how)}
            return collect_statistics(
                source, partial(read, source, tell), path, channels=channels, fresh=fresh, on_event=tell, **said
            )

        track = Walking()
        found = _run([src], lambda sources, tell: work(sources[0], tell), track, client, progress, PAUSED)
        if progress != "none":
            show(Pane(_outcome(found, track, kept[0].warnings)))
        return found


def evaluate(
    source: str | Path | Source | Prepared, *, against: str | Path | Source | None = None, recipe: Recipe | None = None,
    weights_only: bool = False, text: str | Path | TextSettings | None = None, split: str | None = None,
    rows: int | None = None, max_seq_len: int | None = None, settings: Settings | None = None,
    client: Client | None = None, progress: str = "auto",
) -> Evaluation:  # fmt: skip
    """How well a checkpoint predicts text, and how like those of another one its predictions are.

    source   folder, hf://org/name@revision, or what `prepare` returns
    against  the reference, most often what the source was made from
    recipe   quantize the source with it as it is read, without writing anything: `job.recipe` of a Job; what `prepare`
             returns has one
    weights_only  leave activations alone where a config announces that they are quantized
    The other words are those of `calibrate`. An interrupt stops it, and nothing is kept.
    Raises what the package's `evaluate` and `read_text` raise; RecipeError that names the extra without transformers.
    """
    with one_sentence():
        from mso_hub.calibrate.evaluate import Settings
        from mso_hub.calibrate.evaluate import evaluate as run

        wanted, how = _text(text, split, rows, max_seq_len), settings or Settings()
        warnings: list[str] = []

        def work(sources: list[Source], tell: Listener) -> Evaluation:
            """On the thread that works; the tokenizer is that of the reference, which always has one."""
            found = _read(sources[-1], wanted, how, tell, None)
            warnings.extend(found.warnings)
            return run(
                sources[0], found, against=sources[1] if len(sources) > 1 else None, recipe=tried,
                weights_only=weights_only, settings=how, on_event=tell,
            )  # fmt: skip

        tried = source.recipe if recipe is None and isinstance(source, Prepared) else recipe
        mine = source.source if isinstance(source, Prepared) else source
        places = [mine, *([against] if against is not None else [])]
        made = _run(places, work, Walking(), client, progress, STOPPED)
        if warnings and progress != "none":
            show(Pane([Line(warning, "warning") for warning in warnings]))
        return made


def prepare(
    src: str | Path, recipe: Recipe, method: str = "gptq", *, text: str | Path | TextSettings | None = None,
    split: str | None = None, rows: int | None = None, max_seq_len: int | None = None, settings: Settings | None = None,
    method_settings: MethodSettings | None = None, folder: str | Path | None = None, client: Client | None = None,
    progress: str = "auto",
) -> Prepared:  # fmt: skip
    """Let a method choose the weights that a recipe rounds: gptq, weighted, awq or smoothquant.

    An interrupt is a pause, as in `calibrate`, whose words these are.
    recipe  what the weights become: of a Job, `job.recipe`
    folder  where the work lies until the result is written; None: in the cache
    Raises what `methods.run` and `read_text` raise; RecipeError that names the extra without transformers, and for a
    method that changes activations whose scales were measured before it.
    """
    with one_sentence():
        from mso_hub.calibrate.evaluate import Settings
        from mso_hub.calibrate.evaluate.run import make_walk
        from mso_hub.calibrate.methods import MethodSettings
        from mso_hub.calibrate.methods.job import MethodJob, locked

        if method in FOLDED and recipe.input_amax:
            raise RecipeError(
                f"{method}: changes the activations that the scales of this recipe were measured on; take a recipe "
                "without them"
            )
        wanted, how = _text(text, split, rows, max_seq_len), settings or Settings()
        more = method_settings or MethodSettings()
        place = Path(folder) if folder is not None else _place(method, src, wanted, how, recipe, more)

        def work(sources: list[Source], tell: Listener) -> Prepared:
            """On the thread that works."""
            with locked(place):
                walk = make_walk(sources[0], how, tell)
                found = _read(sources[0], wanted, how, tell, walk.vocab_size)
                job = MethodJob.build(walk, found, recipe, method, more)
                source, made = job.run(place, on_event=tell)
                return Prepared(source, replace(recipe, by_method=made), job.plan, made)

        done = _run([src], work, Walking(), client, progress, PAUSED, keep=True)
        if progress != "none":
            show(Pane([Line(note, "note") for note in done.method.notes]))
        return done


def _run(
    places: Sequence[str | Path | Source], do: Callable[[list[Source], Listener], Result], track: Walking,
    client: Client | None, progress: str, said: str, *, keep: bool = False,
) -> Result:  # fmt: skip
    """Do something with sources on a thread of its own, and show how far it is.

    said  what an interrupt shows
    keep  leave sources open that were opened here, unless it fails
    """
    check_kind(progress)
    without_bars()
    if _works and _works[-1].alive:
        raise RecipeError("the work before this one has not come to its end yet; try again in a moment")
    mine: list[Source] = []

    def cut() -> None:
        """End waits for the network."""
        for source in mine:
            if source.distant:
                source.close()

    work: Pausable[Result] = Pausable(track, cut)
    _works[:] = [work]
    with ExitStack() as stack, _one_line(said):
        sources = []
        for place in places:
            if isinstance(place, str | Path):
                mine.append(open_source(place, client=client, on_event=work.listen))
                stack.callback(mine[-1].close)
            sources.append(mine[-1] if isinstance(place, str | Path) else place)
        with Watch(track, open_view(progress)):
            try:
                found = work.run(lambda: do(sources, work.listen))
            except BaseException as error:
                track.end("paused" if isinstance(error, KeyboardInterrupt) else "stopped")
                raise
            track.end("done")
        if keep:
            stack.pop_all()
    return found


@contextmanager
def _one_line(said: str) -> Iterator[None]:
    """An interrupt ends the cell, and those after it, with a sentence in place of a traceback."""
    try:
        yield
    except KeyboardInterrupt as error:
        error._render_traceback_ = lambda: [said]  # type: ignore[attr-defined]  # IPython asks the exception for it
        raise


def _text(text: str | Path | TextSettings | None, split: str | None, rows: int | None, length: int | None) -> Any:
    """What was said of the text -> TextSettings."""
    from mso_hub.calibrate.text import TextSettings, one_dataset

    if not isinstance(text, TextSettings):
        return one_dataset(None if text is None else str(text), split, max_samples=rows, max_seq_len=length)
    said = {"split": split, "rows": rows, "max_seq_len": length}
    twice = next((name for name, value in said.items() if value is not None), None)
    if twice is not None:
        raise RecipeError(f"{twice}: text is TextSettings, which say this themselves; change it there")
    return text


def _read(source: Source, wanted: TextSettings, how: Settings, tell: Listener, vocabulary: int | None) -> Rows:
    """The text as token ids of a checkpoint's own tokenizer."""
    from mso_hub.calibrate.text import open_tokenizer, read_text

    tokenizer = open_tokenizer(source, trust_remote_code=how.trust_remote_code)
    return read_text(wanted, tokenizer, vocab_size=vocabulary, on_event=tell)


def _place(kind: str, src: str | Path, *said: object) -> Path:
    """Where something lies that nobody named: in the cache, under a name of what was asked for."""
    where = str(src) if str(src).startswith("hf://") else str(Path(src).resolve())
    ending = said[-1] if isinstance(said[-1], str) else ""
    digest = hashlib.sha256(repr((where, *said)).encode()).hexdigest()[:12]
    folder = cache_folder() / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SinkError(f"{folder}: cannot be made: {error.strerror}; say where to write") from error
    return folder / f"{where.rstrip('/').rpartition('/')[2]}-{digest}{ending}"


def _outcome(found: Statistics, track: Walking, warnings: tuple[str, ...]) -> list[Part]:
    """What a cell shows when statistics are complete."""
    from mso_hub.calibrate.scales import by_module, shared_amax

    made = found.provenance
    peak = f", at most {size(track.peak)} of memory" if track.peak else ""
    seen = f"{made.tokens:,} tokens in {made.rows:,} rows of {made.text}"
    _, calibration = shared_amax(found)
    return [
        Heading(f"done: {len(found.amax):,} modules over {seen}, in {duration(track.seconds)}{peak}"),
        Line(str(found.path), "file"),
        *(Line(warning, "warning") for warning in warnings),
        *(Line(note, "note") for note in calibration.notes(by_module(found)[0])),
        Line(NEXT, "next"),
    ]
