"""Events -> what is going on: how much was read, encoded, written; rate, time left, memory, what happens now.

A view draws a Snapshot now and then, on a thread of its own, so that time and memory move while the run waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from mso_hub.events import (
    BatchDone,
    Calibrated,
    Calibrating,
    CheckReady,
    Committing,
    Evaluated,
    Event,
    Hashed,
    LayerDone,
    MethodDone,
    Moved,
    PlanReady,
    Published,
    ShardDone,
    ShardResumed,
    TensorDone,
    Waiting,
)
from mso_hub.notebook.estimate import resident
from mso_hub.plan import Plan


@dataclass(frozen=True, slots=True)
class Progress:
    """One bar: bytes, files or tokens.

    said  how far it is, in words, where these are not bytes
    """

    name: str
    done: int
    total: int
    said: str = ""

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is going on now.

    state   in words: reading headers, encoding, finalizing, ...
    rate    source bytes a second of this run, or what `unit` says; 0 while there is none
    left    seconds; None while that is not known
    memory  resident bytes of this process; 0 where the system does not tell
    """

    bars: tuple[Progress, ...]
    state: str
    seconds: float
    rate: float
    left: float | None
    memory: int
    unit: str = ""


class Tracking(Protocol):
    """Something that goes on."""

    def snapshot(self) -> Snapshot:
        """How far it is."""


class Track:
    """Listener of a run of `plan`; snapshots may be taken from any thread.

    verb  what happens to the output: write or upload
    """

    def __init__(self, plan: Plan, verb: str = "write", clock: Callable[[], float] = time.monotonic) -> None:
        self._verb, self._clock = verb, clock
        steps = [(shard, step) for shard in plan.shards for step in shard.steps]
        self._made = {step.weight.name: sum(info.nbytes for info in step.outputs) for _, step in steps}
        self._of_shard: dict[str, int] = {}
        for shard, step in steps:
            self._of_shard[shard.name] = self._of_shard.get(shard.name, 0) + self._made[step.weight.name]
        self._shards, self._stored = len(plan.shards), 0
        self._read_total, self._write_total = plan.read_bytes, sum(self._of_shard.values())
        self._kept = self._kept_written = self._encoded = self._written = 0
        self._moved = Moved(0, 0)
        self._state, self._waiting_until = "reading headers", 0.0
        self._began, self._started, self.peak = clock(), 0.0, 0
        self._committed = 0
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
        with self._lock:
            self._note(event)

    def _note(self, event: Event) -> None:
        if isinstance(event, PlanReady):
            self._started, self._state = self._clock(), "encoding"
        elif isinstance(event, ShardResumed):
            self._kept += event.nbytes
            self._kept_written += self._of_shard.get(event.shard, 0)
            self._stored += 1
        elif isinstance(event, TensorDone):
            self._encoded += event.nbytes
            self._written += self._made.get(event.name, 0)
        elif isinstance(event, Moved):
            self._moved = event
        elif isinstance(event, ShardDone):
            self._stored += 1
        elif isinstance(event, Committing):
            self._state = "committing: making the output visible"
        elif isinstance(event, Published):
            self._state, self._committed = "done", 1
        elif isinstance(event, Waiting):
            self._waiting_until = self._clock() + event.seconds
            self._why = f"waiting for the Hub, {event.why}"
        if self._state == "encoding" and self._kept + self._encoded >= self._read_total:
            self._state = "finalizing: all is encoded, files are being completed"

    def end(self, state: str) -> None:
        """Say how it ended."""
        with self._lock:
            self._state, self._waiting_until = state, 0.0

    def snapshot(self) -> Snapshot:
        """How far it is."""
        memory = resident()
        with self._lock:
            self.peak = max(self.peak, memory)
            now = self._clock()
            encoded = self._kept + self._encoded
            spent = now - self._started if self._started else 0.0
            rate = self._encoded / spent if spent > 0 else 0.0
            left = (self._read_total - encoded) / rate if rate > 0 and self._state == "encoding" else None
            state = self._why if now < self._waiting_until else self._state
            bars = (
                Progress("read", self._kept + max(self._moved.read, self._encoded), self._read_total),
                Progress("encode", encoded, self._read_total),
                Progress(self._verb, self._kept_written + max(self._moved.written, self._written), self._write_total),
                Progress("commit", min(self._stored, self._shards) + self._committed, self._shards + 1),
            )
        return Snapshot(bars, state, now - self._began, rate, left, memory)


class Checking:
    """Listener of a verification: files hashed, weights compared with the source."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()
        self._ready = CheckReady(0, 0)
        self._hashed = self._compared = 0
        self._state = "reading headers"

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
        if isinstance(event, CheckReady):
            self._ready, self._state = event, "checking hashes"
        elif isinstance(event, Hashed):
            self._hashed += event.nbytes
        elif isinstance(event, TensorDone):
            self._compared += event.nbytes
            self._state = "comparing weights with the source"

    def end(self, state: str) -> None:
        """Say how it ended."""
        self._state = state

    def snapshot(self) -> Snapshot:
        """How far it is."""
        ready, spent = self._ready, self._clock() - self._began
        rate = (self._hashed + self._compared) / spent if spent > 0 else 0.0
        left = (ready.hashed + ready.compared - self._hashed - self._compared) / rate if rate > 0 else None
        bars = [Progress("hash", self._hashed, ready.hashed)] if ready.hashed else []
        bars.append(Progress("check", self._compared, ready.compared))
        return Snapshot(tuple(bars), self._state, spent, rate, left, resident())


class Walking:
    """Listener of models that run over text, one decoder layer after the other."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()
        self._started, self.peak = 0.0, 0
        self._layers = self._kept = self._done = self._tokens = self._seen = 0
        self._state, self._waiting_until, self._why = "reading headers and text", 0.0, ""
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
        with self._lock:
            self._note(event)

    def _note(self, event: Event) -> None:
        if isinstance(event, Calibrating):
            self._layers, self._tokens, self._kept, self._done = event.layers, event.tokens, event.done, event.done
            self._started, self._state = self._clock(), "running the model"
        elif isinstance(event, BatchDone):
            self._seen = min(self._seen + event.tokens, self._tokens)
        elif isinstance(event, LayerDone):
            if self._kept == self._done < event.index:  # the first of this run, an earlier one did those before it
                self._kept = event.index
            self._layers, self._tokens, self._done, self._seen = event.layers, event.tokens, event.index + 1, 0
        elif isinstance(event, Calibrated | Evaluated | MethodDone):
            self._layers = self._done = max(1, self._layers)
            self._seen = 0
        elif isinstance(event, Waiting):
            self._waiting_until = self._clock() + event.seconds
            self._why = f"waiting for the Hub, {event.why}"

    def end(self, state: str) -> None:
        """Say how it ended."""
        with self._lock:
            self._state, self._waiting_until = state, 0.0

    @property
    def seconds(self) -> float:
        """So far."""
        return self._clock() - self._began

    def snapshot(self) -> Snapshot:
        """How far it is; the rate is that of tokens through all layers."""
        memory = resident()
        with self._lock:
            self.peak = max(self.peak, memory)
            now, every = self._clock(), max(1, self._tokens)
            running = self._layers > self._done and self._state == "running the model"
            share = self._tokens / max(1, self._layers)
            passed = (self._done - self._kept + self._seen / every) * share
            rate = passed / (now - self._started) if self._started and now > self._started else 0.0
            left = (self._layers - self._done - self._seen / every) * share / rate if running and rate else None
            bars = [Progress("layers", self._done, self._layers, f"{self._done:,} of {self._layers:,}")]
            if running:
                bars.append(Progress("text", self._seen, every, f"{self._seen:,} of {every:,} tokens"))
            state = self._why if now < self._waiting_until else self._state
        return Snapshot(tuple(bars) if self._layers else (), state, now - self._began, rate, left, memory, "tokens")
