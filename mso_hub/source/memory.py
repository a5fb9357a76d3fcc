"""A repo held in memory: the second real backend, for tests and notebooks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mso_hub.errors import CheckpointError
from mso_hub.source.reads import Job


class MemorySource:
    """Files as bytes. `reads` records every range asked for, so that a test can count passes over a tensor."""

    def __init__(self, files: Mapping[str, bytes], name: str = "memory") -> None:
        self._files = dict(files)
        self._name = name
        self.reads: list[tuple[str, int, int]] = []

    @property
    def name(self) -> str:
        """What messages call it."""
        return self._name

    @property
    def path(self) -> Path | None:
        """Always None: nothing lies in a folder."""
        return None

    @property
    def distant(self) -> bool:
        """No: the second read is as cheap as any."""
        return False

    @property
    def origin(self) -> None:
        """Not a Hub."""

    def remote(self, file: str) -> None:
        """Not a Hub."""

    def files(self) -> dict[str, int]:
        """Repo path -> bytes."""
        return {name: len(data) for name, data in sorted(self._files.items())}

    def stamp(self, file: str) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(self._files[file]).hexdigest()

    def sha256(self, file: str) -> str | None:
        """None: only reading tells."""

    def expect(self, jobs: Sequence[Job]) -> None:
        """Nothing to prepare: a read costs no round trip."""

    def settle(self, job: str) -> None:
        """Nothing to check: what was read is what is there."""

    def close(self) -> None:
        """Nothing to let go of."""

    def read_apart(self, file: str, begin: int, end: int) -> NDArray[np.uint8]:
        """The same as `read`."""
        return self.read(file, begin, end)

    def read(self, file: str, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) of `file`."""
        self.reads.append((file, begin, end))
        if file not in self._files:
            raise CheckpointError(f"{self._name}/{file}: cannot be read: there is no such file")
        data = self._files[file][begin:end]
        if len(data) != end - begin:
            raise CheckpointError(f"{self._name}/{file}: wanted bytes [{begin:,}, {end:,}), got {len(data):,}")
        return np.frombuffer(data, np.uint8).copy()
