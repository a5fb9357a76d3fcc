"""Uploads that go on while the next file is produced: one after another, and few enough to bound the memory."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Protocol

from mso_hub.checkpoint import Array
from mso_hub.errors import SinkError
from mso_hub.hub.upload import Upload

STOPPING = 2.0
"""Seconds that an upload has to notice that it was aborted; the thread does not keep the process alive."""
LOOK = 0.1
"""Seconds after which who waits for an upload looks whether it was given up."""


class _Abortable(Protocol):
    def abort(self) -> None:
        """End at once, from any thread."""


class _Outcome:
    """How a job ended, for whoever asks its future: an error ends the job, not the thread."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            self._future.set_result(None)
        else:
            self._future.set_exception(error)
        return True


class Writer:
    """The bytes of a file, to the Hub."""

    def __init__(self, upload: Upload) -> None:
        self._upload = upload

    def write(self, data: bytes | Array) -> None:
        """Append bytes."""
        self._upload.write(data if isinstance(data, bytes) else data.reshape(-1).tobytes())


class Background:
    """Jobs on a thread of their own; what one raises comes out of the next call here."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = queue.SimpleQueue()
        self._pending: deque[tuple[_Abortable, Future[None]]] = deque()
        self._stopped = False
        # Not a pool: that would keep the process alive until a Hub that does not answer has used up its patience.
        self._thread = threading.Thread(target=self._run, name="mso-upload", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            future, job = item
            if future.set_running_or_notify_cancel():
                with _Outcome(future):
                    job()

    def add(self, upload: _Abortable, job: Callable[[], None]) -> None:
        """Run `job` after those before it; `upload` is what to abort when it is no longer wanted."""
        future: Future[None] = Future()
        self._pending.append((upload, future))
        self._jobs.put((future, job))

    def settle(self, most: int) -> None:
        """Wait until at most `most` jobs are left; raises what a finished one raised."""
        while self._pending and (len(self._pending) > most or self._pending[0][1].done()):
            future = self._pending[0][1]
            while not wait([future], LOOK).done:  # an interrupt here must not lose the job
                if self._stopped:
                    raise SinkError("the upload was given up; run the same command again to go on")
            self._pending.popleft()
            future.result()

    def stop(self) -> None:
        """Abort what is left; more than once is as good as once."""
        if self._stopped:
            return
        self._stopped = True
        for upload, future in list(self._pending):
            future.cancel()
            upload.abort()
        self._jobs.put(None)
        self._thread.join(STOPPING)
