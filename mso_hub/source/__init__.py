"""Input repo -> headers and tensor bytes. `open_source` picks the backend, `read_checkpoint` reads all headers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mso_hub.errors import CheckpointError
from mso_hub.events import Listener, ignore
from mso_hub.hub import Client, Origin, RemoteFile, is_address, looks_like_repo, parse_address
from mso_hub.source.local import LocalSource
from mso_hub.source.memory import MemorySource
from mso_hub.source.reads import Job, Range
from mso_hub.source.scan import read_checkpoint

__all__ = ["Job", "LocalSource", "MemorySource", "Range", "Source", "open_source", "read_checkpoint"]


class Source(Protocol):
    """A repo that can be read by byte ranges."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def path(self) -> Path | None:
        """Folder on this machine, None for other backends."""

    @property
    def distant(self) -> bool:
        """Does reading a range a second time cost as much as the first time?"""

    @property
    def origin(self) -> Origin | None:
        """Repo and commit on a Hub, None for other backends."""

    def remote(self, file: str) -> RemoteFile | None:
        """What the Hub knows about a file, None for other backends."""

    def files(self) -> dict[str, int]:
        """Repo path -> bytes, for every file."""

    def read(self, file: str, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) of a file as a writable array of its own; CheckpointError when the file is shorter."""

    def read_apart(self, file: str, begin: int, end: int) -> NDArray[np.uint8]:
        """As `read`, for bytes that another job has announced and will read again: beside the stream, unchecked."""

    def stamp(self, file: str) -> str:
        """Changes when the file's content changes: a commit hash, an object id, or size and time of change."""

    def sha256(self, file: str) -> str | None:
        """SHA-256 in hex that the repo itself vouches for; None where only reading the file tells."""

    def expect(self, jobs: Sequence[Job]) -> None:
        """What will be read, so that a distant repo can be read ahead of time; other reads stay possible."""

    def settle(self, job: str) -> None:
        """All reads of an announced job were made: CheckpointError when any of them was not what the repo holds."""

    def close(self) -> None:
        """Stop reading ahead, let connections go; may be called at any time, and more than once."""


def open_source(where: str | Path, *, client: Client | None = None, on_event: Listener = ignore) -> Source:
    """A folder or `hf://org/name@revision` -> Source.

    client    connection for a Hub address; by default one with the user's own login
    on_event  hears about waiting for the Hub
    Raises CheckpointError for a folder that is not there, RecipeError for a malformed address, HubError for a repo
    that cannot be read.
    """
    if isinstance(where, str) and is_address(where):
        from mso_hub.source.hub import HubSource

        return HubSource(client or Client(on_event=on_event), parse_address(where))
    path = Path(where)
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        repo = where if looks_like_repo(where) else "org/name"
        raise CheckpointError(
            f"{where}: the input must be a folder with safetensors files, found {found} there; for a repo on the Hub "
            f"write hf://{repo}"
        )
    return LocalSource(path)
