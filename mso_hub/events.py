"""What happened, for whoever listens. The library never prints: the CLI and notebooks render these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True, slots=True)
class PlanReady(Event):
    """The plan stands; `read_bytes` will be read for `write_bytes` of output in `shards` shards."""

    read_bytes: int
    write_bytes: int
    shards: int


@dataclass(frozen=True, slots=True)
class ShardResumed(Event):
    """A shard of an earlier run matches its journal entry and is kept; `nbytes` is its source share."""

    shard: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorDone(Event):
    """One source tensor went through; `nbytes` is its size in the source."""

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class ShardDone(Event):
    """A shard lies complete and synced under its temporary name."""

    shard: str
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Moved(Event):
    """So far this run has taken `read` bytes from the source and handed `written` bytes to the output.

    Told now and then, for large tensors: a run that moves less than 16 MiB does not tell it.
    """

    read: int
    written: int


@dataclass(frozen=True, slots=True)
class Committing(Event):
    """Every file is stored; one last step will make `where` visible."""

    where: str


@dataclass(frozen=True, slots=True)
class Published(Event):
    """The whole checkpoint became visible in one step."""

    where: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class CheckReady(Event):
    """A verification begins: files of `hashed` bytes are hashed, then weights of `compared` bytes met with the source.

    The TensorDone of a weight that was met tells its bytes in the source.
    """

    hashed: int
    compared: int


@dataclass(frozen=True, slots=True)
class Hashed(Event):
    """So many more bytes of a file were hashed."""

    file: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Calibrating(Event):
    """All `layers` decoder layers will see `tokens` of `text`; an earlier run has done the first `done` of them."""

    text: str
    tokens: int
    layers: int
    done: int


@dataclass(frozen=True, slots=True)
class BatchDone(Event):
    """So many more tokens went through the decoder layer that runs."""

    tokens: int


@dataclass(frozen=True, slots=True)
class Calibrated(Event):
    """Statistics of `modules` modules lie at `where`."""

    where: str
    modules: int


@dataclass(frozen=True, slots=True)
class MethodDone(Event):
    """A method has worked on every layer; its work lies in the folder `where` until the output is there."""

    method: str
    where: str


@dataclass(frozen=True, slots=True)
class Evaluated(Event):
    """How a model predicts a text; `kl` (nats per token) and `agreement` where it was compared with another one."""

    perplexity: float
    kl: float | None
    agreement: float | None


@dataclass(frozen=True, slots=True)
class LayerDone(Event):
    """Decoder layer `index` (from 0) of `layers` has seen all `tokens` of the text, in `seconds`."""

    index: int
    layers: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Waiting(Event):
    """The Hub is busy or gone: another try at `what` after `seconds`, because of `why`."""

    what: str
    seconds: float
    why: str


Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Listener for callers who do not want to know."""
