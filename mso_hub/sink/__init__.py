"""Shards and files -> output repo, visible all at once or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from mso_hub.checkpoint import Array
from mso_hub.errors import RecipeError
from mso_hub.events import Listener, ignore
from mso_hub.hub import Client, Origin, RemoteFile, is_address, parse_address
from mso_hub.sink.journal import Entry
from mso_hub.sink.local import LocalSink
from mso_hub.sink.memory import MemorySink
from mso_hub.sink.target import EMPTY, HubTarget, converted

__all__ = ["Entry", "HubTarget", "LocalSink", "MemorySink", "ShardWriter", "Sink", "converted", "open_sink"]


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
    def where(self) -> str:
        """Where the output is to be seen: the folder, or a URL once it is published."""

    @property
    def address(self) -> str:
        """What one types to read the output: the folder, or `hf://org/name@branch`; once it is committed."""

    @property
    def finished(self) -> bool:
        """Did begin() find a finished output of the same job?"""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Complete files, of this run and of an earlier one of the same job."""

    def guard(self, origin: Origin | None) -> None:
        """Refuse to write what came from there; called once, before begin, which may still refuse it.

        origin  None for a source that is on no Hub
        Raises RecipeError for the source itself, and where a private source would become public.
        """

    def require_free(self) -> None:
        """Refuse a place that `begin` would refuse whatever the job: for work of hours before it. Makes nothing."""

    def begin(self, job: str, sizes: Mapping[str, int]) -> None:
        """Check permission, space and what lies there, and find what an earlier run of this job completed.

        job    digest that names the work; another job's unfinished output raises ResumeError
        sizes  every file that will be written -> bytes
        """

    def open(self, file: str, nbytes: int) -> AbstractContextManager[ShardWriter]:
        """A file of known size, complete when the context ends without an error.

        It is in `entries` once it is stored: at once in a folder, some time later where it has to travel.
        """

    def copy(self, file: str, origin: Origin, remote: RemoteFile) -> bool:
        """Copy a file from a repo of the same Hub without moving its bytes; False where that is not possible."""

    def wait(self) -> None:
        """Until every file that was written is stored; raises what kept one from it."""

    @property
    def notes(self) -> Mapping[str, float]:
        """Numbers that an earlier run of this job wrote down."""

    def note(self, key: str, value: float) -> None:
        """Write a number down for the next run of this job."""

    def commit(self, manifest: bytes, closing: Mapping[str, bytes] = EMPTY) -> None:
        """Make everything visible in one step.

        manifest  mso_hub.json, which describes the output
        closing   small files that could not be announced: the model card knows the errors of all weights
        """

    def abort(self) -> None:
        """The run ends early: give up what is on its way to another machine, and stop looking through an earlier run's.

        Called from any thread, before close, and perhaps more than once.
        """

    def close(self) -> None:
        """Let go of the output; what is complete stays for the next run."""


def open_sink(
    where: str | Path, *, fresh: bool = False, target: HubTarget | None = None, client: Client | None = None,
    on_event: Listener = ignore,
) -> Sink:  # fmt: skip
    """A folder or `hf://org/name` to write to -> Sink.

    fresh     replace an earlier output of this tool, finished or not, and start over
    target    how to write to a repo: private, branch, pull request, ...
    client    connection for a Hub address; by default one with the user's own login
    on_event  hears about waiting for the Hub
    Raises RecipeError for a malformed address, and for `target` beside a folder.
    """
    if isinstance(where, str) and is_address(where):
        from mso_hub.sink.hub import HubSink

        wish = target or HubTarget()
        return HubSink(
            client or Client(on_event=on_event), parse_address(where), fresh=fresh, private=wish.private,
            branch=wish.branch, create_pr=wish.create_pr, journal_branch=wish.journal_branch,
            title=wish.title, description=wish.description,
        )  # fmt: skip
    if target is not None:
        raise RecipeError(f"{where}: private, branch, create_pr and journal_branch need a repo: write hf://org/name")
    return LocalSink(Path(where), fresh=fresh)
