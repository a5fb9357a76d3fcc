"""Events -> a tqdm bar on stderr, or JSON lines on stdout."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from mso_hub.events import (
    BatchDone,
    Calibrated,
    Calibrating,
    CheckReady,
    Committing,
    Event,
    Hashed,
    LayerDone,
    Listener,
    MethodDone,
    PlanReady,
    Published,
    ShardDone,
    ShardResumed,
    TensorDone,
    Waiting,
    ignore,
)

if TYPE_CHECKING:
    from tqdm import tqdm


LONG = 2
"""Seconds after which a verification shows a bar."""


class Bar:
    """One bar over the source's bytes, or over those that a verification reads: amount, rate, time left; shards.

    It appears with the plan, so that a refusal is a message and nothing else.
    """

    def __init__(self) -> None:
        self._bar: tqdm[NoReturn] | None = None
        self._shards = 0
        self._done = 0

    def __call__(self, event: Event) -> None:
        """Show an event."""
        if isinstance(event, PlanReady):
            self._bar = _bar(event.read_bytes)
            self._shards = event.shards
        elif isinstance(event, CheckReady):
            self._bar = _bar(event.hashed + event.compared, delay=LONG, leave=False)
        elif isinstance(event, Calibrating):
            self._calibrate(event)
        if isinstance(event, Waiting):
            waiting(event)
        if self._bar is None:
            return
        if isinstance(event, BatchDone | LayerDone):
            self._walk(self._bar, event)
        elif isinstance(event, TensorDone | Hashed):
            self._bar.update(event.nbytes)
        elif isinstance(event, ShardResumed | ShardDone):
            self._done += 1
            if isinstance(event, ShardResumed):
                # Bytes of an earlier run are not this run's speed.
                self._bar.initial += event.nbytes
                self._bar.update(event.nbytes)
            self._bar.set_postfix_str(f"shard {self._done}/{self._shards}", refresh=False)
        elif isinstance(event, Committing):
            # 100 % of the bytes is not the end
            self._bar.set_postfix_str(f"shard {self._done}/{self._shards}, making it visible")
        elif isinstance(event, Published | Calibrated | MethodDone):
            self.close()

    def _calibrate(self, event: Calibrating) -> None:
        """A bar over the tokens of a text: a layer is its share of each of them."""
        self._bar = _bar(event.tokens, unit="tok")
        self._shards = event.layers
        # Layers of an earlier run are not this run's speed.
        self._bar.initial = event.tokens * event.done / event.layers
        self._bar.update(self._bar.initial)
        self._bar.set_postfix_str(f"layer {event.done}/{event.layers}", refresh=False)

    def _walk(self, bar: tqdm[NoReturn], event: BatchDone | LayerDone) -> None:
        """Move on by a batch; a layer that ends says exactly how far it is."""
        if isinstance(event, BatchDone):
            bar.update(event.tokens / self._shards)
            return
        bar.update(event.tokens * (event.index + 1) / event.layers - bar.n)
        bar.set_postfix_str(f"layer {event.index + 1}/{event.layers}")

    def close(self) -> None:
        """End its line, so that what comes next starts on one of its own."""
        if self._bar is not None:
            self._bar.close()


def _bar(total: int, unit: str = "B", **how: Any) -> tqdm[NoReturn]:
    from tqdm import tqdm  # not needed by --help

    return tqdm(total=total, unit=unit, unit_scale=True, unit_divisor=1000, dynamic_ncols=True, **how)


def waiting(event: Event) -> None:
    """Say on stderr that the Hub lets us wait; other events are not for here."""
    if isinstance(event, Waiting):
        from tqdm import tqdm

        tqdm.write(f"{event.what}: {event.why}; trying again in {event.seconds:.0f} s", file=sys.stderr)


def json_line(event: Event) -> None:
    """Write an event as one JSON object on stdout."""
    sys.stdout.write(json.dumps({"event": type(event).__name__, **asdict(event)}) + "\n")
    sys.stdout.flush()


def listener(kind: str) -> Listener:
    """`bar`, `json` or `none` -> Listener."""
    if kind == "bar":
        return Bar()
    return json_line if kind == "json" else ignore
