"""A folder as a source: ranges by `pread`, nothing mapped, so that memory stays countable."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mso_hub.errors import CheckpointError
from mso_hub.source.reads import Job

SKIPPED_FOLDERS = frozenset({".git", ".cache", "__pycache__", ".ipynb_checkpoints"})

ALIGNED = 64
"""Bytes at a multiple of which what was read begins: arithmetic libraries need not copy it."""


def _is_text(name: str) -> bool:
    """Is a file name real text? Python spells bytes that are not UTF-8 as lone surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


class LocalSource:
    """Files below one folder. Safe to read from several threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def name(self) -> str:
        """The folder as the user gave it."""
        return str(self._folder)

    @property
    def path(self) -> Path | None:
        """The folder."""
        return self._folder

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
        """Every regular file below the folder (links followed), without version control and caches.

        Raises CheckpointError for a link to nothing and for a name that is not UTF-8: no repo can hold it.
        """

        def refuse(error: OSError) -> None:
            """A folder that cannot be listed would be missing from the output."""
            raise CheckpointError(f"{error.filename}: cannot be listed: {error.strerror}") from error

        found: dict[str, int] = {}
        for root, folders, names in os.walk(self._folder, onerror=refuse, followlinks=True):
            folders[:] = sorted(f for f in folders if f not in SKIPPED_FOLDERS)
            here = Path(root).resolve()
            for folder in (Path(root, f) for f in folders):
                if folder.is_symlink() and (folder.resolve() == here or folder.resolve() in here.parents):
                    raise CheckpointError(f"{folder}: the link leads back to {str(folder.readlink())!r}; remove it")
            for name in sorted(names):
                path = Path(root, name)
                if not _is_text(name):
                    raise CheckpointError(f"{str(path)!r}: file names must be UTF-8; rename or remove this one")
                if path.is_file():
                    found[path.relative_to(self._folder).as_posix()] = path.stat().st_size
                elif path.is_symlink():
                    raise CheckpointError(f"{path}: the link points at {str(path.readlink())!r}, which does not exist")
        return found

    def stamp(self, file: str) -> str:
        """Size and time of change."""
        status = (self._folder / file).stat()
        return f"{status.st_size}:{status.st_mtime_ns}"

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
        room = np.empty(end - begin + ALIGNED, np.uint8)
        out = room[-room.ctypes.data % ALIGNED :][: end - begin]
        view = out.data
        done = 0
        try:
            # Opened for each range: nothing to keep track of, and threads never share a descriptor.
            with (self._folder / file).open("rb", buffering=0) as opened:
                while done < len(view):
                    got = os.preadv(opened.fileno(), [view[done:]], begin + done)
                    if got == 0:
                        raise CheckpointError(
                            f"{self._folder / file}: wanted bytes [{begin:,}, {end:,}), the file ends at "
                            f"{begin + done:,}; it changed while it was read: start again"
                        )
                    done += got
        except OSError as error:
            raise CheckpointError(f"{self._folder / file}: cannot be read: {error.strerror}") from error
        return out
