"""A command that works for long: Ctrl-C stops it at its next event, wherever it strikes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from mso_hub.events import Listener

Result = TypeVar("Result")
PAUSED = "paused; what is complete is kept, the same command goes on"


def pausable(
    do: Callable[[Listener], Result], show: Listener, cut: Callable[[], None] = lambda: None, *, lost: str = ""
) -> Result:
    """Do something on a thread of its own -> its result. `show` hears its events, and is closed where it is a bar.

    Ctrl-C asks it to stop, and waits until it has: KeyboardInterrupt. Where it does not stop within seconds, and after
    a second Ctrl-C, the process ends there and then.
    cut   called by Ctrl-C: ends what it may be waiting for
    lost  what it is of which nothing is kept: the process ends with a sentence about that, and exit code 130
    """
    from mso_hub.pausable import Pausable
    from mso_hub.progress import Bar

    work: Pausable[Result] = Pausable(show, cut)
    try:
        return work.run(lambda: do(work.listen))
    except KeyboardInterrupt:
        said = f"stopped; nothing is kept of a {lost}" if lost else PAUSED
        if work.alive:  # it hangs, and Python would wait for its threads; what is complete is on the disk
            sys.stderr.write(f"mso-hub: {said}\n")
            sys.stderr.flush()
            os._exit(130)
        if not lost:
            raise
        sys.stderr.write(f"mso-hub: {said}\n")
        sys.exit(130)
    finally:
        if isinstance(show, Bar):
            show.close()
