"""Pieces in step order become files in byte order, and an error ends everything that was under way."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from mso_hub.checkpoint import Array, TensorInfo, build_header
from mso_hub.engine.assemble import write_pieces
from mso_hub.engine.threads import Piece
from mso_hub.errors import MsoError, SinkError
from mso_hub.formats.weight import Weight
from mso_hub.plan import ShardPlan, Step
from mso_hub.sink import MemorySink


def info(name: str, *shape: int) -> TensorInfo:
    """A tensor of bytes."""
    return TensorInfo(name, "U8", shape)


def step(*outputs: TensorInfo) -> Step:
    """A step with these outputs; where it reads from does not matter here."""
    source = outputs[0]
    return Step(Weight(source.name, "U8", source.shape, {"weight": source}), outputs)


def shard(name: str, steps: Sequence[Step], order: Sequence[TensorInfo]) -> ShardPlan:
    """A shard whose file has the tensors in `order`."""
    header, placed = build_header(order, name, {})
    return ShardPlan(name, header, placed, tuple(steps))


def pieces_of(plan: ShardPlan, parts: int = 2) -> list[Piece]:
    """Every output in some pieces, row blocks of a step alternating between its outputs as the engine gives them."""
    found = []
    for one in plan.steps:
        arrays = {out.name: np.full(out.shape, ord(out.name[0]), np.uint8) for out in one.outputs}
        for part in range(parts):
            for at, out in enumerate(one.outputs):
                data = np.array_split(arrays[out.name], parts)[part]
                last = part + 1 == parts and at + 1 == len(one.outputs)
                found.append(Piece(plan, one, out, data, last))
    return found


def begun(*plans: ShardPlan) -> MemorySink:
    """A sink that expects these shards."""
    sink = MemorySink()
    sink.begin("job", {plan.name: plan.nbytes for plan in plans})
    return sink


CODES, SCALES, NORM, NOTHING = info("codes", 4, 8), info("scales", 4, 2), info("norm", 16), info("zero", 0, 16)


def test_what_comes_early_waits_for_its_place_in_the_file() -> None:
    """Codes and scales come block by block in turns; in the file all codes stand before all scales."""
    plan = shard("a", [step(CODES, SCALES), step(NORM)], [CODES, SCALES, NORM])
    sink = begun(plan)
    given = pieces_of(plan)
    assert list(write_pieces(iter(given), sink)) == given
    sink.commit(b"")
    assert sink.files["a"] == plan.header + b"c" * 32 + b"s" * 8 + b"n" * 16


def test_every_piece_is_handed_on_once_its_bytes_are_out() -> None:
    """Whoever counts progress counts what is written; a shard is complete with its last piece, not before."""
    plans = [shard(name, [step(CODES), step(NORM)], [CODES, NORM]) for name in ("a", "b")]
    sink = begun(*plans)
    given = [piece for plan in plans for piece in pieces_of(plan)]
    seen = [piece for piece in write_pieces(iter(given), sink) if piece.step is piece.shard.steps[-1] and piece.done]
    assert [piece.shard.name for piece in seen] == ["a", "b"]
    assert list(sink.entries) == ["a", "b"]


@pytest.mark.parametrize("order", [[NOTHING, NORM], [NORM, NOTHING], [NOTHING]], ids=["first", "last", "alone"])
def test_a_tensor_without_elements_takes_no_bytes_and_ends_no_file(order: list[TensorInfo]) -> None:
    """A shape with a zero in it is legal; its piece may come when the file has all its bytes already."""
    plan = shard("a", [step(one) for one in order], order)
    sink = begun(plan)
    list(write_pieces(iter(pieces_of(plan)), sink))
    sink.commit(b"")
    assert sink.files["a"] == plan.header + (b"n" * 16 if NORM in order else b"")


@pytest.mark.parametrize(("size", "came"), [(15, 15), (17, 17)])
def test_a_tensor_of_another_size_than_planned_is_an_error(size: int, came: int) -> None:
    """The header is written first, so a wrong size would shift every tensor behind it."""
    one = step(NORM)
    plan = shard("a", [one], [NORM])
    sink = begun(plan)
    wrong = Piece(plan, one, NORM, np.zeros(size, np.uint8), done=True)
    with pytest.raises(MsoError, match=f"norm: planned 16 bytes, {came} came"):
        list(write_pieces(iter([wrong]), sink))
    assert dict(sink.entries) == {}


class Source:
    """Pieces without end; knows how many were asked for and whether it was closed."""

    def __init__(self, plan: ShardPlan) -> None:
        self.plan, self.given, self.closed = plan, 0, False

    def pieces(self) -> Iterator[Piece]:
        """First pieces of a step that never ends."""
        try:
            while True:
                self.given += 1
                yield Piece(self.plan, self.plan.steps[0], CODES, np.zeros(1, np.uint8))
        finally:
            self.closed = True


class Full(MemorySink):
    """A slow disk that is full after some bytes; knows how files were left and what was tried after the error."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.tried_in_vain = 0
        self.left_with: list[type[BaseException]] = []

    @contextmanager
    def open(self, file: str, nbytes: int) -> Iterator[Any]:
        """The disk itself takes the bytes."""
        try:
            yield self
        except BaseException as error:
            self.left_with.append(type(error))
            raise

    def write(self, data: bytes | Array) -> None:
        """Count; the error when there is no room."""
        time.sleep(0.005)
        self.room -= len(data)
        if self.room < 0:
            self.tried_in_vain += 1
            raise SinkError("disk: full")


def test_an_error_of_the_sink_stops_the_source_at_once() -> None:
    """At most a queue's worth of pieces is made for a disk that takes none, and the engine is told to stop."""
    plan = shard("a", [step(CODES)], [CODES])
    source = Source(plan)
    disk = Full(len(plan.header) + 10)
    with pytest.raises(SinkError, match="disk: full"):
        list(write_pieces(source.pieces(), disk))
    assert source.closed
    assert source.given < 40
    assert disk.tried_in_vain == 1
    assert disk.left_with == [SinkError]
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("mso")]


def test_closing_early_gives_the_file_up_and_stops_the_source() -> None:
    """A listener that raises ends the loop: no thread, no half file and no engine stay behind."""
    plan = shard("a", [step(CODES), step(NORM)], [CODES, NORM])
    sink = begun(plan)
    source = Source(plan)
    running = write_pieces(source.pieces(), sink)
    next(running)
    running.close()  # type: ignore[attr-defined]
    assert source.closed
    assert dict(sink.entries) == {}
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("mso")]


def test_an_error_of_the_source_comes_through_and_earlier_shards_stay() -> None:
    """The first shard is complete, the one in hand is given up."""
    plans = [shard(name, [step(NORM)], [NORM]) for name in ("a", "b")]
    sink = begun(*plans)

    def failing() -> Iterator[Piece]:
        yield from pieces_of(plans[0])
        yield pieces_of(plans[1])[0]
        raise ZeroDivisionError("kernel")

    with pytest.raises(ZeroDivisionError, match="kernel"):
        list(write_pieces(failing(), sink))
    assert list(sink.entries) == ["a"]
