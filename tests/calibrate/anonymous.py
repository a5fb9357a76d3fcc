"""Anonymous memory of this process: what no file stands behind. Pages of mapped files are not in it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STEP = 0.004
"""Seconds between two looks."""


def anonymous_bytes() -> int:
    """RssAnon now."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("this kernel does not count anonymous memory")


class Peak:
    """The largest value seen so far."""

    def __init__(self) -> None:
        self.nbytes = anonymous_bytes()

    def look(self) -> None:
        """Once more."""
        self.nbytes = max(self.nbytes, anonymous_bytes())


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Within the block a thread looks often."""
    peak, end = Peak(), threading.Event()

    def watch() -> None:
        while not end.is_set():
            peak.look()
            time.sleep(STEP)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        end.set()
        thread.join()
        peak.look()
