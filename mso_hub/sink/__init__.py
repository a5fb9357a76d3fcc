"""Shards and files -> output repo, visible all at once or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from mso_hub.checkpoint import Array
from mso_hub.sink.journal import Entry
from mso_hub.sink.local import LocalSink
from mso_hub.sink.memory import MemorySink

__all__ = ["Entry", "LocalSink", "MemorySink", "ShardWriter", "Sink", "open_sink"]


class ShardWriter(Protocol):
    """Receives one file from its first byte to its last."""

    def write(self, data: bytes | Array) -> None:
        """Append bytes."""


class Sink(Protocol):
    """An output repo."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def path(self) -> Path | None:
        """Folder on this machine, None for other backends."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Complete files, of this run and of an earlier one of the same job."""

    def begin(self, job: str, sizes: Mapping[str, int]) -> None:
        """Check permission, space and what lies there, and find what an earlier run of this job completed.

        job    digest that names the work; another job's unfinished output raises ResumeError
        sizes  every file that will be written -> bytes
        """

    def open(self, file: str, nbytes: int) -> AbstractContextManager[ShardWriter]:
        """A file of known size; it counts as done when the context ends without an error."""

    @property
    def notes(self) -> Mapping[str, float]:
        """Numbers that an earlier run of this job wrote down."""

    def note(self, key: str, value: float) -> None:
        """Write a number down for the next run of this job."""

    def commit(self, manifest: bytes) -> None:
        """Make everything visible in one step; `manifest` describes it."""

    def close(self) -> None:
        """Let go of the output; what is complete stays for the next run."""


def open_sink(where: str | Path, *, fresh: bool = False) -> Sink:
    """A folder to write to -> Sink.

    fresh  remove an earlier output of this tool, finished or not, and start over
    """
    return LocalSink(Path(where), fresh=fresh)
