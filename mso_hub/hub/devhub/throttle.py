"""A rate limit shared by many connections."""

from __future__ import annotations

import asyncio
import time

from mso_hub.hub.devhub.disk import CHUNK

CATCH_UP = 0.25
"""Seconds of lateness (a slow timer, a busy processor) that are made up for; whoever paused longer starts anew."""


class Throttle:
    """Lets `rate` bytes per second through; 0 for no limit. Each byte has a due time, so errors do not add up."""

    def __init__(self, rate: float = 0.0) -> None:
        self.rate = rate
        self._due = 0.0

    @property
    def step(self) -> int:
        """Bytes to ask for at once: small enough that the flow is even and connections take turns."""
        return min(CHUNK, max(4096, int(self.rate / 50))) if self.rate else CHUNK

    async def take(self, nbytes: int) -> None:
        """Wait until this many bytes are due."""
        if not self.rate:
            return
        moment = time.monotonic()
        if moment - self._due > CATCH_UP:
            self._due = moment
        self._due += nbytes / self.rate
        if self._due > moment:
            await asyncio.sleep(self._due - moment)
