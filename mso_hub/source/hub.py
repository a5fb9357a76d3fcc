"""A repo on the Hub as a source: ranges on demand, announced jobs ahead of time; no file is ever held or stored whole.

Every file is read at the commit that the revision named when the source was opened. The first bytes of a shard, read
for its header, are kept until the shard has been streamed: no byte is asked for twice.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from mso_hub.errors import CheckpointError, HubError, MsoError
from mso_hub.hub import Address, Client, Origin, RemoteFile, Snapshot, take_snapshot
from mso_hub.hub.download import Download
from mso_hub.source.fetch import Fetcher
from mso_hub.source.reads import Job
from mso_hub.source.scan import FIRST_READ

AHEAD = 96 << 20
"""Bytes fetched and not yet used, by default."""
SMALL = 1 << 20
"""Files in git up to this size are fetched whole and kept."""
HEADERS = 8
"""Headers that are fetched at once."""


class HubSource:
    """A repo at one commit. Safe to read from several threads.

    address  with a folder, only what lies below it is there, under paths relative to it
    ahead    bytes of announced jobs that may wait to be used
    """

    def __init__(self, client: Client, address: Address, *, ahead: int = AHEAD) -> None:
        self._client, self._address = client, address
        self._snapshot = take_snapshot(client, address)
        self._below = f"{address.folder}/" if address.folder else ""
        self._files = {
            path.removeprefix(self._below): file
            for path, file in self._snapshot.files.items()
            if path.startswith(self._below)
        }
        if not self._files:
            raise CheckpointError(f"{address}: holds no files at commit {self.commit}; check folder and revision")
        self._download = Download(client, self._snapshot)
        self._heads = _Heads(self._download, self._below)
        self._small: dict[str, bytes] = {}
        under_way = self._download.in_flight
        self._fetcher = Fetcher(self._heads, self.name, ahead=max(ahead - under_way, ahead // 2))
        self._closed = False

    @property
    def name(self) -> str:
        """The address as the user typed it."""
        return str(self._address)

    @property
    def path(self) -> Path | None:
        """None: it is far away."""
        return None

    @property
    def repo_id(self) -> str:
        """`org/name`."""
        return self._address.repo_id

    @property
    def commit(self) -> str:
        """40 hex digits: the state that is read, whatever happens to the branch."""
        return self._snapshot.commit

    @property
    def snapshot(self) -> Snapshot:
        """The repo as the API described it, whole."""
        return self._snapshot

    @property
    def distant(self) -> bool:
        """Yes: every byte has to travel."""
        return True

    @property
    def origin(self) -> Origin:
        """Hub, repo, commit and who may read it."""
        found = self._snapshot
        return Origin(
            self._client.endpoint, self.repo_id, self.commit, self._address.revision,
            private=found.private, gated=found.gated,
        )  # fmt: skip

    def remote(self, file: str) -> RemoteFile:
        """What the Hub knows about a file."""
        return self._file(file)

    def files(self) -> dict[str, int]:
        """Path -> bytes."""
        return {path: file.nbytes for path, file in self._files.items()}

    def stamp(self, file: str) -> str:
        """SHA-256 of the content, or its git object id."""
        found = self._file(file)
        return found.sha256 or found.blob_id

    def sha256(self, file: str) -> str | None:
        """As the Hub has it; None for small files in git."""
        return self._file(file).sha256

    def expect(self, jobs: Sequence[Job]) -> None:
        """Fetch these in the background, one after another."""
        self._fetcher.expect(jobs)

    def settle(self, job: str) -> None:
        """Wait until the job's files came to their end; CheckpointError when their SHA-256 is not the Hub's."""
        self._fetcher.settle(job)

    def close(self) -> None:
        """End all requests and threads; who waits in read() gets a HubError."""
        self._closed = True
        self._fetcher.stop()
        self._download.close()
        self._fetcher.close()

    def read(self, file: str, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) of a file: from memory where they were announced, else by a request of its own."""
        found = self._file(file)
        if end > found.nbytes:
            raise CheckpointError(
                f"{self.name}/{file}: wanted bytes [{begin:,}, {end:,}), the file has {found.nbytes:,}; "
                "its header or index does not fit it"
            )
        if self._closed:
            raise HubError(f"{self.name}/{file}: cannot be read, the source was closed")
        if begin >= end:
            return np.empty(0, np.uint8)
        announced = self._fetcher.take((file, begin, end))
        return announced if announced is not None else self.read_apart(file, begin, end)

    def read_apart(self, file: str, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) by a request of its own: what was announced stays for those who announced it."""
        found = self._file(file)
        if begin >= end:
            return np.empty(0, np.uint8)
        if found.sha256 is None and found.nbytes <= SMALL:
            return np.frombuffer(bytearray(self._whole(file)[begin:end]), np.uint8)
        if begin == 0 and file.endswith(".safetensors"):
            self._heads.fetch(self._neighbours(file))
        return self._heads.read(file, begin, end)

    def _file(self, file: str) -> RemoteFile:
        if file not in self._files:
            raise CheckpointError(f"{self.name}/{file}: cannot be read: no such file at commit {self.commit}")
        return self._files[file]

    def _neighbours(self, file: str) -> list[str]:
        """The shards of a file's folder: who reads one header reads them all."""
        folder = PurePosixPath(file).parent
        return [name for name in self._files if name.endswith(".safetensors") and PurePosixPath(name).parent == folder]

    def _whole(self, file: str) -> bytes:
        """A small file in git, checked against its object id."""
        if file not in self._small:
            info = self._files[file]
            data = self._download.read(info.path, 0, info.nbytes).tobytes()
            found = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
            if found != info.blob_id:
                raise CheckpointError(
                    f"{self.name}/{file}: its git object id must be {info.blob_id} as the Hub says, the bytes that "
                    f"came have {found}; run the same command again"
                )
            self._small[file] = data
        return self._small[file]


class _Heads:
    """First bytes of shards, in front of the download: what was read for a header is not asked for again."""

    def __init__(self, download: Download, below: str) -> None:
        self._download, self._below = download, below
        self._lock = threading.Lock()
        self._kept: dict[str, Future[NDArray[np.uint8]]] = {}

    def size(self, file: str) -> int:
        """Bytes of a file."""
        return self._download.size(self._below + file)

    def digest(self, file: str) -> str | None:
        """What a stream of the whole file must have: SHA-256, or a git object id."""
        return self._download.digest(self._below + file)

    def streamed(self, file: str) -> None:
        """Its first bytes were used."""
        with self._lock:
            self._kept.pop(file, None)

    def stream(self, file: str, begin: int, end: int) -> Iterator[memoryview]:
        """Bytes [begin, end): first what is kept, then the rest."""
        head = self._head(file)
        if head is not None and begin < len(head):
            yield head.data[begin:end]
            begin = len(head)
        if begin < end:
            yield from self._download.stream(self._below + file, begin, end)

    def read(self, file: str, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) by at most one request; the rest of a long header is kept too."""
        head = self._head(file)
        if head is None or begin > len(head):
            return self._download.read(self._below + file, begin, end)
        if end > len(head):
            rest = self._download.read(self._below + file, len(head), end)
            whole = np.concatenate([head, rest])
            if end <= 8 + int.from_bytes(head[:8].tobytes(), "little"):
                self._keep(file, whole)
            head = whole
        return head[begin:end].copy()

    def fetch(self, files: Sequence[str]) -> None:
        """Make sure that the first bytes of these are kept; several requests at a time."""
        with self._lock:
            missing = {file: Future[NDArray[np.uint8]]() for file in files if file not in self._kept}
            self._kept.update(missing)
        waiting = list(missing.items())

        def work() -> None:
            """Body of the threads: file after file."""
            while waiting:
                try:
                    file, future = waiting.pop()
                except IndexError:
                    return
                self._fetch(file, future)

        threads = [threading.Thread(target=work, name="mso-head", daemon=True) for _ in waiting[1:HEADERS]]
        for thread in threads:
            thread.start()
        work()

    def _fetch(self, file: str, future: Future[NDArray[np.uint8]]) -> None:
        try:
            future.set_result(self._download.read(self._below + file, 0, min(self.size(file), FIRST_READ)))
        except BaseException as error:
            with self._lock:
                self._kept.pop(file, None)
            future.set_exception(error)
            if not isinstance(error, MsoError):
                raise

    def _keep(self, file: str, head: NDArray[np.uint8]) -> None:
        future = Future[NDArray[np.uint8]]()
        future.set_result(head)
        with self._lock:
            if file in self._kept:
                self._kept[file] = future

    def _head(self, file: str) -> NDArray[np.uint8] | None:
        """What is kept of a file; waits where it is on its way."""
        with self._lock:
            future = self._kept.get(file)
        return None if future is None else future.result()
