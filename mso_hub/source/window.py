"""Announced bytes between the thread that fetches them and the threads that use them: bounded, never stuck.

The fetching side asks for room before it fills a cell. Room is limited, except while somebody waits for a cell that
is not under way yet: then everything up to that cell flows, whatever the limit says, so that no order of reads can
block the run.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from mso_hub.errors import HubError, MsoError
from mso_hub.source.ahead import Cell
from mso_hub.source.reads import Range

TICK = 0.5
"""Seconds of one wait: signals are handled between two of them."""
_NOTHING: NDArray[np.uint8] = np.empty(0, np.uint8)


class Slot:
    """A cell at run time.

    data      its bytes, allocated when the first ones come
    filled    bytes that came; `charged` bytes count as held
    open      uses that nobody has claimed yet; `pending` those that were not served yet
    waiting   threads that wait for it
    near      it is under way or here: who waits for it need not hurry the stream
    dropped   nobody will use it: what still comes for it is thrown away
    """

    __slots__ = ("cell", "charged", "data", "dropped", "filled", "near", "open", "pending", "waiting")

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.data = _NOTHING
        self.filled = self.charged = 0
        self.open = self.pending = cell.uses
        self.waiting = 0
        self.near = self.dropped = False

    @property
    def ready(self) -> bool:
        """Did all of its bytes come?"""
        return self.filled == self.cell.size


class Window:
    """The cells of all announced jobs that are not used up."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._slots: dict[Range, deque[Slot]] = {}
        self._urgent = 0
        self._error: MsoError | None = None
        self._closed = False
        self.held = self.most = 0

    def add(self, cells: Iterable[Cell]) -> dict[Cell, Slot]:
        """Cells of a job, in the order of their first use: from now on reads wait for them."""
        slots = {cell: Slot(cell) for cell in cells}
        with self._changed:
            for cell, slot in slots.items():
                self._slots.setdefault((cell.file, cell.begin, cell.end), deque()).append(slot)
            self._changed.notify_all()
        return slots

    def claim(self, place: Range) -> Slot | None:
        """One announced use of a range, None when there is none left."""
        with self._changed:
            for slot in self._slots.get(place, ()):
                if slot.open:
                    slot.open -= 1
                    return slot
        return None

    def take(self, slot: Slot) -> NDArray[np.uint8]:
        """The bytes of a claimed use, as soon as they are here; the last use gets the array itself."""
        with self._changed:
            slot.waiting += 1
            self._urgent += not slot.near
            try:
                self._changed.notify_all()
                while not slot.ready:
                    self._check()
                    if slot.dropped:
                        raise HubError(f"{self._name}/{slot.cell.file}: is read after its job was settled")
                    self._changed.wait(TICK)
            finally:
                slot.waiting -= 1
                self._urgent -= not slot.near
            shared = slot.pending > 1
        data = slot.data.copy() if shared else slot.data
        with self._changed:
            slot.pending -= 1
            if slot.pending == 0:
                self._forget(slot)
        return data

    def room(self, nbytes: int, limit: int) -> None:
        """Wait until `nbytes` more fit under the limit, or somebody is in a hurry."""
        with self._changed:
            while self.held + nbytes > limit and self.held and not self._urgent:
                self._check()
                self._changed.wait(TICK)
            self._check()

    def fill(self, slot: Slot, at: int, data: memoryview) -> None:
        """Bytes for a cell, `at` bytes after its begin; only one thread fills a cell."""
        target = slot.data if slot.filled else np.empty(slot.cell.size, np.uint8)
        slot.data = target
        target.data[at : at + len(data)] = data
        with self._changed:
            if slot.dropped:
                return
            slot.filled += len(data)
            self._charge(slot, slot.filled)
            if slot.ready:
                self._mark_near(slot)
                if slot.waiting:
                    self._changed.notify_all()

    def under_way(self, slots: Iterable[Slot]) -> None:
        """These are being fetched: they take their room, and waiting for them is no reason to hurry the stream."""
        with self._changed:
            for slot in slots:
                self._mark_near(slot)
                if not slot.dropped:
                    self._charge(slot, slot.cell.size)

    def drop(self, slots: Iterable[Slot]) -> None:
        """Nobody will use these any more."""
        with self._changed:
            for slot in slots:
                if slot.pending and not slot.waiting:
                    slot.open = slot.pending = 0
                    self._forget(slot)
            self._changed.notify_all()

    def hurry(self) -> None:
        """Lift the limit until `calm` is called."""
        with self._changed:
            self._urgent += 1
            self._changed.notify_all()

    def calm(self) -> None:
        """End of `hurry`."""
        with self._changed:
            self._urgent -= 1

    def wait(self, event: threading.Event) -> None:
        """Until an event of the fetching side happens; its error when it fails."""
        while not event.wait(TICK / 10):
            with self._changed:
                self._check()

    def fail(self, error: MsoError) -> None:
        """Nothing more will come: every thread that waits, or will wait, gets this error."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def close(self) -> None:
        """Let everybody go and everything fall."""
        with self._changed:
            self._closed = True
            self._slots.clear()
            self.held = 0
            self._changed.notify_all()

    def check(self) -> None:
        """The error of the fetching side, or that of a closed window."""
        with self._changed:
            self._check()

    def _check(self) -> None:
        if self._closed:
            raise HubError(f"{self._name}: was closed while it was read")
        if self._error is not None:
            # A new object for each thread: tracebacks must not pile up in one.
            raise type(self._error)(*self._error.args)

    def _charge(self, slot: Slot, nbytes: int) -> None:
        """A cell takes this much room from now on."""
        if nbytes > slot.charged:
            self.held += nbytes - slot.charged
            self.most = max(self.most, self.held)
            slot.charged = nbytes

    def _mark_near(self, slot: Slot) -> None:
        if not slot.near:
            slot.near = True
            self._urgent -= slot.waiting

    def _forget(self, slot: Slot) -> None:
        """A cell is used up."""
        place = (slot.cell.file, slot.cell.begin, slot.cell.end)
        slots = self._slots.get(place)
        if slots is not None and slot in slots:
            slots.remove(slot)
            if not slots:
                del self._slots[place]
            self.held -= slot.charged
        slot.dropped = True
        slot.data = _NOTHING
        self._changed.notify_all()
