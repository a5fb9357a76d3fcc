"""Files of a snapshot as streams and ranges, from Xet storage or over plain HTTP.

Xet is used for files of which the API tells a Xet hash, when hf_xet is installed and HF_HUB_DISABLE_XET is not set: it
fetches with connections of its own. Otherwise a file is read in ranges of 8 MiB, several at a time. Neither checks
what comes (hf_xet 1.8 hands out changed bytes of a damaged store): who streams all of a file compares its SHA-256.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Generator

import numpy as np
from numpy.typing import NDArray

from mso_hub.errors import CheckpointError, HubError, MsoError
from mso_hub.hub.client import Client
from mso_hub.hub.ranges import Ranges
from mso_hub.hub.repository import RemoteFile, Snapshot
from mso_hub.hub.wire import Wire
from mso_hub.hub.xet import xet_enabled
from mso_hub.hub.xet_read import XetReader

PART = 8 << 20
"""Bytes of one ranged request of a stream."""
DEPTH = 4
"""Ranged requests of a stream under way at once."""
TICK = 0.5
"""Seconds of one wait: signals are handled between two of them."""


class Download:
    """Reads the files of one snapshot. Safe to use from several threads.

    depth  ranged requests of a stream at once; Xet decides for itself
    """

    def __init__(self, client: Client, snapshot: Snapshot, *, depth: int = DEPTH, part: int = PART) -> None:
        self._snapshot, self._depth, self._part = snapshot, depth, part
        self._wire = Wire(client, str(snapshot.address))
        self._ranges = Ranges(client, snapshot, self._wire)
        self._xet = XetReader(client, snapshot, self._wire) if xet_enabled() else None
        self._parts: queue.SimpleQueue[_Part | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._starting = threading.Lock()

    @property
    def in_flight(self) -> int:
        """Bytes that a stream may hold besides what it has handed out."""
        return self._depth * self._part

    def size(self, path: str) -> int:
        """Bytes of a file."""
        return self._file(path).nbytes

    def digest(self, path: str) -> str | None:
        """What a stream of the whole file must have: SHA-256, or the git object id of files in git (40 digits)."""
        return self._file(path).sha256 or self._file(path).blob_id

    def read(self, path: str, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) by one request, in the thread of the caller."""
        file = self._file(path)
        found = np.empty(end - begin, np.uint8)
        target, done = found.data, 0
        if not self._by_xet(file):
            self._ranges.read(file, begin, target)
            return found
        for data in self.stream(path, begin, end):
            target[done : done + len(data)] = data
            done += len(data)
        return found

    def stream(self, path: str, begin: int, end: int) -> Generator[memoryview, None, None]:
        """Bytes [begin, end) in order; each part is valid until the next one is asked for."""
        file = self._file(path)
        if self._xet is not None and file.xet_hash is not None:
            yield from self._xet.stream(file, begin, end)
        elif end - begin <= self._part:
            target = np.empty(end - begin, np.uint8).data
            self._ranges.read(file, begin, target)
            yield target
        else:
            yield from self._in_parts(file, begin, end)

    def _file(self, path: str) -> RemoteFile:
        if path not in self._snapshot.files:
            raise CheckpointError(f"{self._snapshot.address}/{path}: cannot be read: no such file at this commit")
        return self._snapshot.files[path]

    def _by_xet(self, file: RemoteFile) -> bool:
        return self._xet is not None and file.xet_hash is not None

    def _in_parts(self, file: RemoteFile, begin: int, end: int) -> Generator[memoryview, None, None]:
        """Several requests at a time; their buffers are used over and over."""
        self._start()
        pending: deque[_Part] = deque()
        spare: list[memoryview] = []
        at = begin
        try:
            while at < end or pending:
                while at < end and len(pending) < self._depth:
                    buffer = spare.pop() if spare else np.empty(self._part, np.uint8).data
                    part = _Part(file, at, buffer, min(self._part, end - at))
                    self._parts.put(part)
                    pending.append(part)
                    at += part.size
                part = pending.popleft()
                while not part.done.wait(TICK):
                    self._wire.check()
                if part.error is not None:
                    raise part.error
                yield part.buffer[: part.size]
                spare.append(part.buffer)
        finally:
            for part in pending:
                part.cancelled = True

    def _start(self) -> None:
        """The threads that fetch parts, on first use."""
        with self._starting:
            self._wire.check()
            for _ in range(self._depth - len(self._threads)):
                self._threads.append(threading.Thread(target=self._work, name="mso-part", daemon=True))
                self._threads[-1].start()

    def _work(self) -> None:
        """Body of those threads."""
        while (part := self._parts.get()) is not None:
            if part.cancelled:
                continue
            try:
                self._ranges.read(part.file, part.begin, part.buffer[: part.size])
            except MsoError as error:
                part.error = error
            except BaseException as error:
                part.error = HubError(f"{part.file.path}: reading broke: {type(error).__name__}: {error}")
                raise
            finally:
                part.done.set()

    def close(self) -> None:
        """End all requests; threads that hang in one are not waited for longer than a second."""
        self._wire.stop()
        if self._xet is not None:
            self._xet.close()
        for _ in self._threads:
            self._parts.put(None)
        for thread in self._threads:
            if thread.is_alive():  # an interrupt may have come before its start
                thread.join(1.0)
        self._wire.close()


class _Part:
    """A range on its way into a buffer."""

    def __init__(self, file: RemoteFile, begin: int, buffer: memoryview, size: int) -> None:
        self.file, self.begin, self.buffer, self.size = file, begin, buffer, size
        self.done = threading.Event()
        self.error: MsoError | None = None
        self.cancelled = False
