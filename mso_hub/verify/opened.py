"""A checkpoint with its weights found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mso_hub.checkpoint import Checkpoint
from mso_hub.events import Listener, ignore
from mso_hub.formats.decoders.base import shape_reader
from mso_hub.formats.detect import read_weights
from mso_hub.formats.weight import Weight
from mso_hub.source import Source, open_source, read_checkpoint


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint with its weights found.

    runtime_scales  names of the scales of activations and KV caches
    refused         module -> why its packed weight is not understood, or not as the config says
    """

    source: Source
    checkpoint: Checkpoint
    weights: Mapping[str, Weight]
    runtime_scales: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)


def open_weights(where: str | Path | Source, *, damaged: bool = False) -> Opened:
    """Read all headers and find every weight; CheckpointError and PlanError as in planning.

    damaged  go on where a packed weight is incomplete or contradicts the config, and keep the reason in `refused`
    """
    source = open_source(where) if isinstance(where, str | Path) else where
    checkpoint = read_checkpoint(source)

    found: dict[str, Weight] = {}
    runtime: list[str] = []
    refused: dict[str, str] | None = {} if damaged else None
    for group in checkpoint.groups:
        weights, dropped = read_weights(group.tensors, checkpoint.config, shape_reader(source.read), "BF16", refused)
        # Two indices may hold the same names; each weight is then known with its index before its name.
        found.update((w.name if w.name not in found else f"{group.index}: {w.name}", w) for w in weights)
        runtime += dropped
    return Opened(source, checkpoint, found, tuple(runtime), refused or {})


@contextmanager
def opening(where: str | Path | Source, on_event: Listener = ignore, *, damaged: bool = False) -> Iterator[Opened]:
    """`open_weights` for the length of a block; a source of the caller's own stays open."""
    source = open_source(where, on_event=on_event) if isinstance(where, str | Path) else where
    try:
        yield open_weights(source, damaged=damaged)
    finally:
        if source is not where:
            source.close()
