"""An output held in memory: the second real backend, for tests and notebooks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mso_hub.checkpoint import Array
from mso_hub.errors import ResumeError, SinkError
from mso_hub.hub import Origin, RemoteFile
from mso_hub.sink.journal import Entry
from mso_hub.sink.target import EMPTY


class _Buffer:
    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes | Array) -> None:
        """Append bytes."""
        self.data += data if isinstance(data, bytes) else data.tobytes()


class MemorySink:
    """Files as bytes; `files` is empty until commit. The same object can be used again to resume."""

    def __init__(self, name: str = "memory") -> None:
        self._name = name
        self._job = ""
        self._finished = False
        self._staged: dict[str, bytes] = {}
        self._entries: dict[str, Entry] = {}
        self._notes: dict[str, float] = {}
        self.files: dict[str, bytes] = {}

    @property
    def name(self) -> str:
        """What messages call it."""
        return self._name

    @property
    def path(self) -> Path | None:
        """Always None."""
        return None

    @property
    def where(self) -> str:
        """Its name."""
        return self.name

    @property
    def address(self) -> str:
        """Its name."""
        return self.name

    @property
    def finished(self) -> bool:
        """Did begin() find the output of this job, complete?"""
        return self._finished

    @property
    def notes(self) -> Mapping[str, float]:
        """Numbers of an earlier run of this job."""
        return self._notes

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Complete files."""
        return self._entries

    def guard(self, origin: Origin | None) -> None:
        """Nobody else sees it."""

    def require_free(self) -> None:
        """Nothing: what lies there is this tool's."""

    def begin(self, job: str, sizes: Mapping[str, int]) -> None:
        """Refuse another job than the one that is here."""
        if self._job not in ("", job):
            raise ResumeError(f"{self._name}: holds the job {self._job[:12]}, asked for {job[:12]}; use a new one")
        self._job = job
        self._staged = {f: d for f, d in self._staged.items() if sizes.get(f) == len(d)}
        self._entries = {f: self._entries[f] for f in self._staged}
        self._finished = bool(self.files) and self._staged.keys() == sizes.keys()

    @contextmanager
    def open(self, file: str, nbytes: int) -> Iterator[_Buffer]:
        """A file of known size."""
        buffer = _Buffer()
        yield buffer
        if len(buffer.data) != nbytes:
            raise SinkError(f"{self._name}/{file}: announced {nbytes:,} bytes, got {len(buffer.data):,}")
        self._staged[file] = bytes(buffer.data)
        self._entries[file] = Entry(nbytes, hashlib.sha256(buffer.data).hexdigest())

    def copy(self, file: str, origin: Origin, remote: RemoteFile) -> bool:
        """Never."""
        return False

    def wait(self) -> None:
        """Nothing to wait for."""

    def note(self, key: str, value: float) -> None:
        """Remember a number."""
        self._notes[key] = value

    def commit(self, manifest: bytes, closing: Mapping[str, bytes] = EMPTY) -> None:
        """Show all files."""
        self.files = {**self._staged, **closing, "mso_hub.json": manifest}

    def abort(self) -> None:
        """Nothing is on its way."""

    def close(self) -> None:
        """Nothing to let go of."""
