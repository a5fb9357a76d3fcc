"""A checkpoint with its weights found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mso_hub.checkpoint import Checkpoint
from mso_hub.events import Listener, ignore
from mso_hub.formats.decoders.base import shape_reader
from mso_hub.formats.detect import read_weights
from mso_hub.formats.weight import Weight
from mso_hub.source import Source, open_source, read_checkpoint


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint with its weights found."""

    source: Source
    checkpoint: Checkpoint
    weights: Mapping[str, Weight]
    runtime_scales: tuple[str, ...]


def open_weights(where: str | Path | Source) -> Opened:
    """Read all headers and find every weight; CheckpointError and PlanError as in planning."""
    source = open_source(where) if isinstance(where, str | Path) else where
    checkpoint = read_checkpoint(source)

    found: dict[str, Weight] = {}
    runtime: list[str] = []
    for group in checkpoint.groups:
        weights, dropped = read_weights(group.tensors, checkpoint.config, shape_reader(source.read), "BF16")
        # Two indices may hold the same names; each weight is then known with its index before its name.
        found.update((w.name if w.name not in found else f"{group.index}: {w.name}", w) for w in weights)
        runtime += dropped
    return Opened(source, checkpoint, found, tuple(runtime))


@contextmanager
def opening(where: str | Path | Source, on_event: Listener = ignore) -> Iterator[Opened]:
    """`open_weights` for the length of a block; a source of the caller's own stays open."""
    source = open_source(where, on_event=on_event) if isinstance(where, str | Path) else where
    try:
        yield open_weights(source)
    finally:
        if source is not where:
            source.close()
