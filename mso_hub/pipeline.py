"""START HERE: convert() = source -> plan -> engine -> sink.

read_checkpoint   every header, index and config of the source
make_plan         what will be written, byte for byte, and what cannot be
sink.begin        last cheap moment to fail; what an earlier run completed
engine.run        read, encode or decode, hand out pieces in file order
sink.commit       everything becomes visible at once
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mso_hub.card import CARD, repo_of, write_card
from mso_hub.checkpoint import Array
from mso_hub.engine import (
    SAMPLE,
    WHOLE,
    Piece,
    ThreadEngine,
    exactness,
    note_errors,
    noted_errors,
    noted_inexact,
    write_pieces,
)
from mso_hub.errors import CheckpointError, RecipeError
from mso_hub.events import (
    Committing,
    Listener,
    Moved,
    PlanReady,
    Published,
    ShardDone,
    ShardResumed,
    TensorDone,
    ignore,
)
from mso_hub.formats.decoders.base import shape_reader
from mso_hub.formats.weight import Reader
from mso_hub.hub import is_address, looks_like_repo
from mso_hub.losses import check_path, run_report, write_report
from mso_hub.plan import Plan, Recipe, plan_checkpoint
from mso_hub.plan.kt import KtRecipe, plan_kt
from mso_hub.sink import Entry, HubTarget, Sink, open_sink
from mso_hub.source import Job, Range, Source, open_source, read_checkpoint

COPY_BLOCK = 8 << 20
MOVED = 16 << 20
"""Bytes read or written between two Moved events."""


def convert(
    source: str | Path | Source,
    sink: str | Path | Sink,
    recipe: Recipe,
    *,
    engine: ThreadEngine | None = None,
    card: bool | None = None,
    base_model: str | None = None,
    report: Sequence[str | Path] = (),
    notes: Sequence[str] = (),
    check: Callable[[Plan, Source], None] | None = None,
    told: Plan | None = None,
    on_event: Listener = ignore,
) -> Plan:
    """Write the checkpoint at `source` to `sink` as the recipe says; continues an unfinished run of the same job.

    source, sink  folders, `hf://org/name@revision`, or objects that speak the protocols; a source object is left open
                  where this returns
    engine        threads and memory; by default all processors and 448 MiB of weights in flight
    card          write a model card in place of the source's README.md; None: where the output is a repo on the Hub
    base_model    repo id for the card, where the source does not tell
    report        files, .json or .md, for the error of every weight, measured on every number
    notes         sentences that the plan's notes begin with: how the recipe was chosen
    check         called with the plan and the opened source before anything is written; what it raises ends the run
    told          the plan of the checkpoint that the source shows in another form, as methods leave it: the card, and
                  what this returns, tell of that
    Raises MsoError (see errors.py); nothing is visible at the sink unless this returns.
    """
    if base_model is not None and not looks_like_repo(repo_of(base_model)):
        raise RecipeError(f"base_model: must be the id of a repo, org/name, got {base_model!r}")
    reports = [check_path(path) for path in report]
    given = source
    source, sink = _opened(source, sink, on_event)
    engine = engine or ThreadEngine()
    card = is_address(sink.name) if card is None else card
    try:
        stamps = {name: source.stamp(name) for name in source.files()}
        plan = _with_notes(make_plan(source, recipe), before=notes)
        if check is not None:
            check(plan, source)
        sizes = {n: size for n, size in plan.sizes(source.files()).items() if not (card and n == CARD)}
        sink.guard(source.origin)
        sink.begin(plan.job, sizes)
        progress = _Progress(plan, sink, on_event)
        work = _Work(plan, source, sink, sizes)
        for name in work.copied:
            progress.file(name)
        source.expect(work.jobs(engine))
        abort = partial(_abort, source, sink)
        pieces = engine.run(
            plan, work.shards, progress.counted(source.read), _Notes(sink), apart=source.read_apart,
            once=source.distant, measure=WHOLE if reports else SAMPLE if card or recipe.measures else 0, abort=abort,
        )  # fmt: skip
        noted = note_errors(pieces, sink.note, each=bool(reports))
        for piece in write_pieces(noted, sink, source.settle, abort):
            progress.piece(piece)
        for name in work.files:
            work.copy(name)
            progress.file(name)
        _require_unchanged(source, stamps)
        sink.wait()
        progress.stored()
        plan = _with_notes(plan, after=_measured(plan, sink.notes))
        errors = run_report(plan, sink.notes, sink.name) if reports else None
        whole = errors is not None and errors.complete
        shown = plan if told is None else replace(told, recipe=plan.recipe, job=plan.job, notes=(*notes, *told.notes))
        closing = {CARD: write_card(shown, source, sink, base_model, whole=whole)} if card else {}
        if not sink.finished:
            on_event(Committing(sink.name))
        sink.commit(_manifest(plan, source, {**sink.entries, **_digests(closing)}), closing)
    finally:
        if source is not given:
            source.close()
        sink.close()
    if errors is not None:
        for path in reports:
            write_report(errors, path)
    on_event(Published(sink.name, sum(sizes.values())))
    return shown


def make_plan(source: str | Path | Source, recipe: Recipe) -> Plan:
    """The plan for a source, from its headers (and weight_shape tensors where shapes leave K open)."""
    opened = open_source(source) if isinstance(source, str | Path) else source
    try:
        checkpoint, read_shape = read_checkpoint(opened), shape_reader(opened.read)
        if isinstance(recipe, KtRecipe):
            return plan_kt(checkpoint, recipe, read_shape)
        return plan_checkpoint(checkpoint, recipe, read_shape)
    finally:
        if opened is not source:
            opened.close()


def require_output(
    source: Source, where: str | Path, target: HubTarget | None = None, *, on_event: Listener = ignore
) -> None:
    """Refuse an output that `convert` would refuse whatever the recipe, before hours of other work; nothing is made.

    target  how a repo is written to, None for a folder; errors are those of `convert`
    """
    _, sink = _opened(source, open_sink(where, target=target, on_event=on_event), on_event)
    try:
        sink.guard(source.origin)
        sink.require_free()
    finally:
        sink.close()


def _with_notes(plan: Plan, *, before: Sequence[str] = (), after: Sequence[str] = ()) -> Plan:
    return replace(plan, notes=(*before, *plan.notes, *after))


def _measured(plan: Plan, notes: Mapping[str, float]) -> list[str]:
    """Sentences about what encoding did, where every user is told."""
    exact = exactness(noted_inexact(plan, notes))
    found = [f"MXFP4 to NVFP4: {exact}"] if exact else []
    errors = noted_errors(notes) if plan.recipe.measures else {}
    if errors:
        (kind, name), (_, mean, worst) = max(errors.items(), key=lambda entry: entry[1][1])
        found.append(
            f"{name}: measured on a sample, the weights of {kind} have a relative error of {mean**0.5:.1%}, the worst "
            f"of them {worst**0.5:.1%} (root mean square)"
        )
    return found


def _opened(source: str | Path | Source, sink: str | Path | Sink, on_event: Listener) -> tuple[Source, Sink]:
    """Backends for both ends; folders that contain one another are refused."""
    opened = open_source(source, on_event=on_event) if isinstance(source, str | Path) else source
    if isinstance(sink, str | Path):
        sink = open_sink(sink, on_event=on_event)
    if opened.path is not None and sink.path is not None:
        inside, outside = opened.path.resolve(), sink.path.resolve()
        if inside == outside or inside in outside.parents or outside in inside.parents:
            raise RecipeError(
                f"{sink.path}: input and output must be separate folders, the input is {opened.path}; "
                "choose an output beside it"
            )
    return opened, sink


def _abort(source: Source, sink: Sink) -> None:
    """End every wait for the network, so that threads can end: after Ctrl-C nobody wants to wait for a dead Hub."""
    source.close()
    sink.abort()


class _Work:
    """What is left to do after `sink.begin`: shards for the engine, files to copy.

    shards  plans of the shards that no earlier run completed
    copied  files that the Hub has copied by itself just now
    files   files to copy or to write, in this order
    """

    def __init__(self, plan: Plan, source: Source, sink: Sink, sizes: Mapping[str, int]) -> None:
        self._plan, self._source, self._sink, self._sizes = plan, source, sink, sizes
        done = set(sink.entries)
        self.shards = [s for s in plan.shards if s.original is None and not done.issuperset(s.files)]
        worked = {name for s in self.shards for name in s.files}
        left = [name for name in sizes if name not in done and name not in worked]
        self.copied = [name for name in left if self._copied_there(name)]
        self.files = [name for name in left if name not in set(self.copied)]

    def _copied_there(self, name: str) -> bool:
        """Did the Hub copy the file from repo to repo?"""
        remote = self._source.remote(name) if name not in self._plan.files else None
        origin = self._source.origin
        return remote is not None and origin is not None and self._sink.copy(name, origin, remote)

    def jobs(self, engine: ThreadEngine) -> list[Job]:
        """Every read to come."""
        once = self._source.distant
        shards = [Job(s.name, partial(engine.reads, s, once=once)) for s in self.shards]
        return shards + [Job(n, partial(self._blocks, n)) for n in self.files if n not in self._plan.files]

    def _blocks(self, name: str) -> list[Range]:
        size = self._sizes[name]
        return [(name, begin, min(begin + COPY_BLOCK, size)) for begin in range(0, size, COPY_BLOCK)]

    def copy(self, name: str) -> None:
        """Write a text file of the plan, or a file of the source block by block."""
        with self._sink.open(name, self._sizes[name]) as file:
            if name in self._plan.files:
                file.write(self._plan.files[name])
                return
            for block in self._blocks(name):
                file.write(self._source.read(*block))
            self._source.settle(name)


class _Progress:
    """Events of a run, from what was written and from what the sink says is stored."""

    def __init__(self, plan: Plan, sink: Sink, on_event: Listener) -> None:
        self._sink, self._on_event = sink, on_event
        self._shards = {shard.name: shard for shard in plan.shards}
        self._written: set[str] = set()
        self._read_bytes = self._written_bytes = self._told = 0
        self._counting = threading.Lock()
        on_event(PlanReady(plan.read_bytes, plan.write_bytes, len(plan.shards)))
        for name in (n for n, shard in self._shards.items() if sink.entries.keys() >= shard.files.keys()):
            on_event(ShardResumed(name, self._shards[name].read_bytes))

    def counted(self, read: Reader) -> Reader:
        """The same reader, whose bytes are counted; threads may use it."""

        def counting(file: str, begin: int, end: int) -> Array:
            """As `read`."""
            found = read(file, begin, end)
            with self._counting:
                self._read_bytes += found.nbytes
            return found

        return counting

    def piece(self, piece: Piece) -> None:
        """A piece is out."""
        self._written_bytes += piece.data.nbytes
        if self._read_bytes + self._written_bytes >= self._told + MOVED:
            self._told = self._read_bytes + self._written_bytes
            self._on_event(Moved(self._read_bytes, self._written_bytes))
        if piece.done:
            self._on_event(TensorDone(piece.step.weight.name, piece.step.weight.nbytes))
            if piece.step is piece.shard.steps[-1]:
                self._written.add(piece.shard.name)
        self.stored()

    def file(self, name: str) -> None:
        """A file was copied; where it is a shard, its tensors went with it."""
        if name in self._shards:
            for step in self._shards[name].steps:
                self._on_event(TensorDone(step.weight.name, step.weight.nbytes))
            self._written.add(name)
        self.stored()

    def stored(self) -> None:
        """Report shards whose tensors were reported and that the sink has by now."""
        for name in [n for n in self._written if n in self._sink.entries]:
            self._written.remove(name)
            entry = self._sink.entries[name]
            self._on_event(ShardDone(name, entry.nbytes, entry.sha256))


def _require_unchanged(source: Source, stamps: Mapping[str, str]) -> None:
    for name, stamp in stamps.items():
        if source.stamp(name) != stamp:
            raise CheckpointError(f"{source.name}/{name}: changed while it was read; run it again with --fresh")


def _digests(files: Mapping[str, bytes]) -> dict[str, Entry]:
    """Entries of files that are in memory."""
    return {name: Entry(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}


def _manifest(plan: Plan, source: Source, entries: Mapping[str, Entry]) -> bytes:
    """mso_hub.json: which job made the output, from which commit, how, and the SHA-256 of each file."""
    files = {n: {"nbytes": e.nbytes, "sha256": e.sha256} for n, e in sorted(entries.items())}
    apart = ("input_amax", "kv_scales", "calibration", "by_method")
    settings = {k: v for k, v in asdict(plan.recipe).items() if k not in apart}
    content: dict[str, Any] = {"job": plan.job, "version": version("mso-hub"), "recipe": settings}
    if plan.recipe.calibration is not None:
        content["calibration"] = plan.recipe.calibration.facts
    if plan.recipe.by_method is not None:
        content["method"] = asdict(plan.recipe.by_method)
    if source.origin is not None:
        content |= {"source": source.origin.repo_id, "commit": source.origin.commit}
    return (json.dumps({**content, "files": files}, indent=2) + "\n").encode()


class _Notes(MutableMapping[str, float]):
    """The sink's notes as a mapping, for the engine."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def __getitem__(self, key: str) -> float:
        return self._sink.notes[key]

    def __setitem__(self, key: str, value: float) -> None:
        self._sink.note(key, value)

    def __delitem__(self, key: str) -> None:
        raise RecipeError(f"{key}: notes of a run are never deleted")

    def __iter__(self) -> Iterator[str]:
        return iter(self._sink.notes)

    def __len__(self) -> int:
        return len(self._sink.notes)
