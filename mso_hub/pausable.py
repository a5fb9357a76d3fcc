"""Work on a thread of its own, so that Ctrl-C strikes who waits and never who works, and is a pause.

Python raises KeyboardInterrupt in the main thread between any two instructions, also inside a lock of the standard
library, which then stays locked: a pool that was interrupted so waits for its own thread for ever. Nor is a thread
joined here: before Python 3.13 an interrupted join() calls a thread ended that is not.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Generic, TypeVar

from mso_hub.errors import MsoError
from mso_hub.events import Committing, Event, Listener, Published

Result = TypeVar("Result")
LOOK = 0.02
"""Seconds between two looks whether it has ended."""
GRACE = 3.0
"""Seconds that work has to stop; a request of the Hub's own client that hangs, or waits for another try, is not waited
for any longer."""


class Pause(KeyboardInterrupt):
    """What stop() raises in the thread that works, in place of Ctrl-C."""


class _Apart(Generic[Result]):
    """A function that runs on a thread; what it raises comes out of `wait`."""

    def __init__(self, work: Callable[[], Result], name: str) -> None:
        self._work = work
        self._found: list[Result] = []
        self._error: BaseException | None = None
        self._over = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

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
    def ident(self) -> int | None:
        """Its thread."""
        return self._thread.ident

    @property
    def alive(self) -> bool:
        """Is it still at work?"""
        return not self._over

    def wait(self, seconds: float = math.inf) -> Result:
        """Until it has ended -> its result; an interrupt, or the end of time, ends the wait, not the work."""
        end = time.monotonic() + seconds
        while not self._over:
            if time.monotonic() > end:
                raise Pause
            time.sleep(LOOK)
        if self._error is not None:
            raise self._error
        return self._found[0]


class Pausable(Generic[Result]):
    """One piece of work that tells events through `listen` while it goes on.

    on_event  hears them
    cut       called by stop(), from its thread: ends waits for the network and other processes, so that the work
              gets to its next event, or fails; may be called more than once
    """

    def __init__(self, on_event: Listener, cut: Callable[[], None] = lambda: None) -> None:
        self._on_event, self._cut = on_event, cut
        self._stop = threading.Event()
        self._late = False
        self._work: _Apart[Result] | None = None

    def listen(self, event: Event) -> None:
        """Tell an event; Pause in the thread that works, and in no other, once somebody asked for it."""
        if isinstance(event, Committing | Published):
            self._late = True
        self._on_event(event)
        work = self._work
        if self.stopped and not self._late and work is not None and threading.get_ident() == work.ident:
            raise Pause

    @property
    def stopped(self) -> bool:
        """Did somebody ask it to stop?"""
        return self._stop.is_set()

    @property
    def alive(self) -> bool:
        """Is it still at work?"""
        return self._work is not None and self._work.alive

    def stop(self) -> None:
        """Make it end soon, from any thread; a commit that has begun is not stopped."""
        if not self._late:
            self._stop.set()
            self._cut()

    def run(self, do: Callable[[], Result]) -> Result:
        """Do it on a thread of its own -> its result.

        An interrupt asks it to stop and waits until it has: Pause, or its result where it was too late. After GRACE
        seconds, or a second interrupt, Pause comes while it is still `alive`. SystemExit in the wait stops it too.
        """
        self._work = work = _Apart(do, "mso-work")
        try:
            try:
                return work.wait()
            except KeyboardInterrupt:
                if not work.alive:
                    raise
                self.stop()
                return work.wait(math.inf if self._late else GRACE)
        except MsoError as error:
            if not self.stopped:
                raise
            raise Pause from error  # stop() cut the connections that it was waiting for
        except SystemExit:
            self.stop()
            with suppress(BaseException):
                work.wait(GRACE)
            raise
