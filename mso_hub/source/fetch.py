"""Threads that fetch announced jobs, one after another, into a window.

One thread walks the moves of each job: it carries the streams forward and hands pieces to a few helpers. It asks the
window for room first, job after job, so that the next shard's bytes flow while the last one is still worked on.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mso_hub.errors import CheckpointError, HubError, MsoError
from mso_hub.source.ahead import SLACK, Advance, Cell, Piece, Schedule, main_file, schedule, segments
from mso_hub.source.reads import Job, Range
from mso_hub.source.window import Slot, Window

GAP = 1 << 20
"""Unneeded bytes that a stream reads through instead of starting anew behind them."""
STEP = 4 << 20
"""Bytes that are handed on at once at most: the grain of the limit."""
HELPERS = 2
"""Threads that fetch pieces."""
GIT_DIGITS = 40
UNTOUCHED = 4
"""Jobs that are planned before one of their reads was made, at most."""


class Transport(Protocol):
    """Where the bytes come from. Used by several threads."""

    def stream(self, file: str, begin: int, end: int) -> Iterator[memoryview]:
        """Bytes [begin, end) in order; each part is valid until the next one is asked for. Raises MsoError."""

    def size(self, file: str) -> int:
        """Bytes of a file."""

    def digest(self, file: str) -> str | None:
        """SHA-256 or, in 40 digits, git object id that a stream of the whole file must have; None: nobody knows it."""

    def streamed(self, file: str) -> None:
        """The stream of a file is complete: its first bytes need not be remembered any longer."""


class _JobState:
    """A job that was planned."""

    def __init__(self, name: str, plan: Schedule, slots: dict[Cell, Slot]) -> None:
        self.name, self.plan, self.slots = name, plan, slots
        self.touched = not slots
        self.done = threading.Event()
        self._left = 1 + sum(isinstance(move, Piece) for move in plan.moves)
        self._lock = threading.Lock()

    def finish_part(self) -> None:
        """All streams, or one piece, are complete."""
        with self._lock:
            self._left -= 1
            if not self._left:
                self.done.set()


class Fetcher:
    """Reads announced jobs ahead of their use.

    The first job that mainly reads a file streams all of it, so that its SHA-256 can be compared; a later job fetches
    only the ranges that it needs of it, and files that are not a job's main one are read in pieces, unchecked: who
    decides by their bytes has to compare, as the engine does with the amax of partners in other shards.

    name   of the source, for messages
    ahead  bytes that may wait to be used, on top of what a job's order of reads forces it to hold
    slack  bytes that order may force it to hold; see schedule()
    """

    def __init__(self, transport: Transport, name: str, *, ahead: int, slack: int = SLACK) -> None:
        self._transport, self._name, self._ahead, self._slack = transport, name, ahead, slack
        self.window = Window(name)
        self._planning = threading.RLock()
        self._unplanned: deque[Job] = deque()
        self._planned: queue.SimpleQueue[_JobState | None] = queue.SimpleQueue()
        self._states: dict[str, _JobState] = {}
        self._owner: dict[Slot, _JobState] = {}
        self._hashed: set[str] = set()
        self._pieces: queue.SimpleQueue[tuple[_JobState, Piece] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def expect(self, jobs: Sequence[Job]) -> None:
        """More jobs, to be fetched after those announced before."""
        with self._planning:
            self._unplanned.extend(jobs)
            if not jobs or self._closed:
                return
            self._plan_next()
            if not self._threads:
                for body in (self._walk, *[self._help] * HELPERS):
                    self._threads.append(threading.Thread(target=body, name="mso-ahead", daemon=True))
                    self._threads[-1].start()

    def take(self, place: Range) -> NDArray[np.uint8] | None:
        """Bytes of an announced range, None when no use of it is left."""
        slot = self._claim(place)
        if slot is None:
            return None
        return self.window.take(slot)

    def settle(self, name: str) -> None:
        """Wait until everything of a job came and was checked; its remaining uses are void."""
        while name not in self._states and any(job.name == name for job in self._unplanned):
            self._plan_next()
        state = self._states.get(name)
        if state is None:
            return
        self.window.drop(state.slots.values())
        self.window.hurry()
        try:
            self.window.wait(state.done)
        finally:
            self.window.calm()
        with self._planning:
            for slot in state.slots.values():
                self._owner.pop(slot, None)
            self._states.pop(name, None)

    def stop(self) -> None:
        """Nothing more will be fetched; who waits gets a HubError."""
        with self._planning:
            self._closed = True
            self._unplanned.clear()
        self.window.close()
        self._planned.put(None)
        for _ in range(HELPERS):
            self._pieces.put(None)

    def close(self, wait: float = 1.0) -> None:
        """Stop, and let the threads end; those that hang in a request are given `wait` seconds."""
        self.stop()
        for thread in self._threads:
            if thread.is_alive():  # an interrupt may have come before its start
                thread.join(wait)

    def _claim(self, place: Range) -> Slot | None:
        """A use of a range; jobs that are next in line are planned when it may be one of theirs."""
        slot = self.window.claim(place)
        if slot is None:
            with self._planning:  # whoever else planned is done now
                slot = self.window.claim(place)
                while slot is None and self._untouched() < UNTOUCHED and self._plan_next():
                    slot = self.window.claim(place)
        if slot is not None:
            state = self._owner.get(slot)
            if state is not None and not state.touched:
                state.touched = True
                if not self._untouched():
                    self._plan_next()
        return slot

    def _untouched(self) -> int:
        with self._planning:
            return sum(not state.touched for state in self._states.values())

    def _plan_next(self) -> bool:
        """Plan the next job in line; False when there is none."""
        with self._planning:
            if not self._unplanned:
                return False
            job = self._unplanned.popleft()
            reads = job.reads()
            main = main_file(reads)
            plan = schedule(reads, () if main is None else (main,), near=self._ahead, slack=self._slack)
            slots = self.window.add(plan.cells)
            state = _JobState(job.name, plan, slots)
            self._owner.update(dict.fromkeys(slots.values(), state))
            self._states[job.name] = state
            self._planned.put(state)
            return True

    def _walk(self) -> None:
        """Body of the thread that walks the jobs."""
        with self._reporting():
            while (state := self._planned.get()) is not None:
                if self._planned.empty():
                    self._plan_next()
                self._fetch(state)
                state.finish_part()

    def _help(self) -> None:
        """Body of the threads that fetch pieces."""
        with self._reporting():
            while (task := self._pieces.get()) is not None:
                state, piece = task
                slots = [state.slots[cell] for cell in sorted(piece.cells, key=lambda cell: cell.begin)]
                parts = [(piece.begin, piece.end)]
                with closing(_Stream(self._transport, self.window, slots, parts, piece.file)) as stream:
                    stream.advance(piece.end, None)
                state.finish_part()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Whatever ends a thread reaches those who wait for its bytes."""
        try:
            yield
        except MsoError as error:
            self.window.fail(error)
        except BaseException as error:
            self.window.fail(HubError(f"{self._name}: reading ahead broke: {type(error).__name__}: {error}"))
            raise

    def _fetch(self, state: _JobState) -> None:
        """All moves of one job."""
        with ExitStack() as stack:
            streams = {file: stack.enter_context(closing(self._open(file, state))) for file in state.plan.streams}
            for move in state.plan.moves:
                limit = move.held + self._ahead
                if isinstance(move, Advance):
                    streams[move.file].advance(move.end, limit)
                    continue
                self.window.room(sum(cell.size for cell in move.cells), limit)
                self.window.under_way(state.slots[cell] for cell in move.cells)
                self._pieces.put((state, move))
            for file, stream in streams.items():
                self._finish(file, stream)

    def _open(self, file: str, state: _JobState) -> _Stream:
        """The stream of a job's main file: all of it where that is the only way to check it, once."""
        cells = state.plan.streams[file]
        digest = None if file in self._hashed else self._transport.digest(file)
        parts = segments(cells, GAP) if digest is None else [(0, self._transport.size(file))]
        return _Stream(self._transport, self.window, [state.slots[cell] for cell in cells], parts, file, digest)

    def _finish(self, file: str, stream: _Stream) -> None:
        """The rest of a stream, and what its bytes tell."""
        stream.advance(self._transport.size(file), None)
        self._transport.streamed(file)
        if stream.digest is None:
            return
        self._hashed.add(file)
        if stream.found() != stream.digest:
            raise CheckpointError(
                f"{self._name}/{file}: its {stream.kind} must be {stream.digest} as the Hub says, the bytes that came "
                f"have {stream.found()}; they were changed on their way or in storage: run the same command again"
            )


class _Stream:
    """Ranges of one file on their way into the cells that need them.

    slots   of the cells, sorted by their begin; they may overlap
    parts   ranges to fetch, in order
    digest  SHA-256 or git object id that all the bytes must have together; None: nothing is compared
    """

    def __init__(
        self, transport: Transport, window: Window, slots: Sequence[Slot], parts: Sequence[tuple[int, int]],
        file: str, digest: str | None = None,
    ) -> None:  # fmt: skip
        self._window, self._slots, self._next = window, slots, 0
        self._active: list[Slot] = []
        self._source = self._flow(transport, file, parts)
        self._at, self._rest = 0, memoryview(b"")
        self.digest = digest
        self._hash = hashlib.sha256()
        if self.kind != "SHA-256":
            self._hash = hashlib.sha1(b"blob %d\0" % transport.size(file), usedforsecurity=False)

    @staticmethod
    def _flow(
        transport: Transport, file: str, parts: Iterable[tuple[int, int]]
    ) -> Generator[tuple[int, memoryview], None, None]:
        """(offset, bytes) of all parts."""
        for begin, end in parts:
            at = begin
            for data in transport.stream(file, begin, end):
                yield at, data
                at += len(data)

    def advance(self, end: int, limit: int | None) -> None:
        """Fetch up to `end`, under a limit on the bytes that wait to be used."""
        while self._at < end:
            if not self._rest:
                found = next(self._source, None)
                if found is None:
                    return
                self._at, self._rest = found
                if self.digest is not None:
                    self._hash.update(self._rest)
                continue
            size = min(len(self._rest), STEP, end - self._at)
            self._deliver(self._rest[:size], limit)
            self._at, self._rest = self._at + size, self._rest[size:]

    def _deliver(self, data: memoryview, limit: int | None) -> None:
        stop = self._at + len(data)
        while self._next < len(self._slots) and self._slots[self._next].cell.begin < stop:
            self._active.append(self._slots[self._next])
            self._next += 1
        wanted = [(s, max(s.cell.begin, self._at), min(s.cell.end, stop)) for s in self._active]
        wanted = [(slot, low, high) for slot, low, high in wanted if low < high and not slot.dropped]
        if limit is None:
            self._window.check()
        else:
            self._window.room(sum(high - low for _, low, high in wanted), limit)
        for slot, low, high in wanted:
            self._window.fill(slot, low - slot.cell.begin, data[low - self._at : high - self._at])
        self._active = [slot for slot in self._active if slot.cell.end > stop]

    @property
    def kind(self) -> str:
        """What `digest` is: by its length."""
        return "git object id" if self.digest is not None and len(self.digest) == GIT_DIGITS else "SHA-256"

    def found(self) -> str:
        """The same of everything that came."""
        return self._hash.hexdigest()

    def close(self) -> None:
        """Let the connection go."""
        self._rest = memoryview(b"")
        self._source.close()
