"""START HERE: convert() = source -> plan -> engine -> sink.

read_checkpoint   every header, index and config of the source
make_plan         what will be written, byte for byte, and what cannot be
sink.begin        last cheap moment to fail; what an earlier run completed
engine.run        read, encode or decode, hand out pieces in file order
sink.commit       everything becomes visible at once
"""

from __future__ import annotations

import json
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from mso_hub.engine import ThreadEngine, write_pieces
from mso_hub.errors import CheckpointError, RecipeError
from mso_hub.events import Listener, PlanReady, Published, ShardDone, ShardResumed, TensorDone, ignore
from mso_hub.formats.packed_int import shape_reader
from mso_hub.plan import Plan, Recipe, plan_checkpoint
from mso_hub.sink import Sink, open_sink
from mso_hub.source import Source, open_source, read_checkpoint

COPY_BLOCK = 8 << 20


def convert(
    source: str | Path | Source,
    sink: str | Path | Sink,
    recipe: Recipe,
    *,
    engine: ThreadEngine | None = None,
    on_event: Listener = ignore,
) -> Plan:
    """Write the checkpoint at `source` to `sink` as the recipe says; continues an unfinished run of the same job.

    source, sink  folders, or objects that speak the protocols
    engine        threads and memory; by default all processors and 448 MiB of weights in flight
    Raises MsoError (see errors.py); nothing is visible at the sink unless this returns.
    """
    source, sink = _opened(source, sink)
    stamps = {name: source.stamp(name) for name in source.files()}
    plan = make_plan(source, recipe)
    sizes = plan.sizes(source.files())
    sink.begin(plan.job, sizes)
    try:
        on_event(PlanReady(plan.read_bytes, plan.write_bytes, len(plan.shards)))
        done = set(sink.entries)
        for shard in (s for s in plan.shards if s.name in done):
            on_event(ShardResumed(shard.name, shard.read_bytes))
        pieces = (engine or ThreadEngine()).run(
            plan, (s for s in plan.shards if s.name not in done), source.read, _Notes(sink)
        )
        for piece in write_pieces(pieces, sink):
            if piece.done:
                on_event(TensorDone(piece.step.weight.name, piece.step.weight.nbytes))
            if piece.done and piece.step is piece.shard.steps[-1]:
                entry = sink.entries[piece.shard.name]
                on_event(ShardDone(piece.shard.name, entry.nbytes, entry.sha256))
        for name in (n for n in sizes if n not in sink.entries):
            with sink.open(name, sizes[name]) as file:
                for data in _content(plan, source, name, sizes[name]):
                    file.write(data)
        for name, stamp in stamps.items():
            if source.stamp(name) != stamp:
                raise CheckpointError(f"{source.name}/{name}: changed while it was read; run it again with --fresh")
        sink.commit(_manifest(plan, sink))
    finally:
        sink.close()
    on_event(Published(sink.name, sum(sizes.values())))
    return plan


def make_plan(source: str | Path | Source, recipe: Recipe) -> Plan:
    """The plan for a source, from its headers (and weight_shape tensors where shapes leave K open)."""
    opened = open_source(source) if isinstance(source, str | Path) else source

    return plan_checkpoint(read_checkpoint(opened), recipe, shape_reader(opened.read))


def _opened(source: str | Path | Source, sink: str | Path | Sink) -> tuple[Source, Sink]:
    """Backends for both ends; folders that contain one another are refused."""
    opened = open_source(source) if isinstance(source, str | Path) else source
    if isinstance(sink, str | Path):
        sink = open_sink(sink)
    if opened.path is not None and sink.path is not None:
        inside, outside = opened.path.resolve(), sink.path.resolve()
        if inside == outside or inside in outside.parents or outside in inside.parents:
            raise RecipeError(
                f"{sink.path}: input and output must be separate folders, the input is {opened.path}; "
                "choose an output beside it"
            )
    return opened, sink


def _content(plan: Plan, source: Source, name: str, nbytes: int) -> Iterator[bytes]:
    """A text file of the plan, or a carried file block by block."""
    if name in plan.files:
        yield plan.files[name]
        return
    for begin in range(0, nbytes, COPY_BLOCK):
        yield source.read(name, begin, min(begin + COPY_BLOCK, nbytes)).tobytes()


def _manifest(plan: Plan, sink: Sink) -> bytes:
    """mso_hub.json: which job made the output, and the SHA-256 of each file."""
    files = {n: {"nbytes": e.nbytes, "sha256": e.sha256} for n, e in sorted(sink.entries.items())}
    recipe = plan.recipe
    content = {"job": plan.job, "scheme": recipe.scheme, "layout": recipe.layout, "files": files}
    return (json.dumps(content, indent=2) + "\n").encode()


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
