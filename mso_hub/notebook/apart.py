"""Work on a thread of its own, so that an interrupt strikes who waits and never who works.

Python raises KeyboardInterrupt in the main thread between any two instructions, also inside a lock of the standard
library, which then stays locked: a pool that was interrupted so waits for its own thread for ever. Nor is a thread
joined here: before Python 3.13 an interrupted join() calls a thread ended that is not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

Result = TypeVar("Result")
LOOK = 0.02
"""Seconds between two looks whether it has ended."""


class Apart(Generic[Result]):
    """A function that runs on a thread; what it raises comes out of `wait`."""

    def __init__(self, work: Callable[[], Result], name: str) -> None:
        self._work = work
        self._found: list[Result] = []
        self._error: BaseException | None = None
        self._over = False
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        with self:
            self._found.append(self._work())

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._error, self._over = error, True
        return True

    @property
    def alive(self) -> bool:
        """Is it still at work?"""
        return not self._over

    def wait(self) -> Result:
        """Until it has ended -> its result; an interrupt ends the wait, not the work."""
        while not self._over:
            time.sleep(LOOK)
        if self._error is not None:
            raise self._error
        return self._found[0]
