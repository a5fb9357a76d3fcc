"""Announced reads: every byte arrives, memory stays under the limit, and no order of reads blocks the run."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mso_hub.errors import CheckpointError, HubError, TransientError
from mso_hub.source import Job, Range
from mso_hub.source.ahead import Advance, Piece, Schedule, main_file, schedule, segments
from mso_hub.source.fetch import Fetcher

SIZE = 4000


class MemoryTransport:
    """Files in memory, handed out in parts of any size; remembers what was asked for."""

    def __init__(self, files: Mapping[str, bytes], *, hashed: bool = False, part: int = 64, lie: bool = False) -> None:
        self._files, self._hashed, self._part, self._lie = files, hashed, part, lie
        self.asked: list[Range] = []
        self.broken: HubError | None = None
        self.gate: threading.Event | None = None

    def stream(self, file: str, begin: int, end: int) -> Iterator[memoryview]:
        self.asked.append((file, begin, end))
        buffer = bytearray(self._part)
        for at in range(begin, end, self._part):
            if self.gate is not None:
                self.gate.wait()
            if self.broken is not None:
                raise self.broken
            data = self._files[file][at : min(at + self._part, end)]
            buffer[: len(data)] = data
            yield memoryview(buffer)[: len(data)]
            buffer[:] = bytes(self._part)  # what was handed out is no longer valid

    def size(self, file: str) -> int:
        return len(self._files[file])

    def digest(self, file: str) -> str | None:
        if not self._hashed:
            return None
        return "0" * 64 if self._lie else hashlib.sha256(self._files[file]).hexdigest()

    def streamed(self, file: str) -> None:
        pass

    @property
    def nbytes(self) -> int:
        return sum(end - begin for _, begin, end in self.asked)


FILES = {name: random.Random(name).randbytes(SIZE) for name in ("a", "b")}

ranges = st.tuples(st.sampled_from("aab"), st.integers(0, SIZE), st.integers(0, SIZE)).map(
    lambda r: (r[0], min(r[1:]), max(r[1:]))
)
blocks = st.tuples(st.sampled_from("aab"), st.integers(0, 39), st.integers(1, 4)).map(
    lambda r: (r[0], r[1] * 100, min(SIZE, (r[1] + r[2]) * 100))
)
reads_of_a_job = st.lists(st.one_of(ranges, blocks), max_size=40)


def job(name: str, reads: Sequence[Range]) -> Job:
    return Job(name, lambda: reads)


def planned(reads: Sequence[Range], near: int = 300, slack: int = 600) -> Schedule:
    main = main_file(reads)
    return schedule(reads, () if main is None else (main,), near=near, slack=slack)


@given(reads_of_a_job, st.integers(0, 2000), st.integers(0, 3000))
def test_a_schedule_brings_every_cell_before_its_first_use(reads: list[Range], near: int, slack: int) -> None:
    plan = planned(reads, near, slack)
    assert sum(cell.uses for cell in plan.cells) == sum(begin < end for _, begin, end in reads)
    in_pieces = [cell for move in plan.moves if isinstance(move, Piece) for cell in move.cells]
    in_streams = [cell for cells in plan.streams.values() for cell in cells]
    assert sorted(map(id, in_pieces + in_streams)) == sorted(map(id, plan.cells))
    for move in plan.moves:
        if isinstance(move, Piece):
            assert all(move.begin <= cell.begin and cell.end <= move.end for cell in move.cells)
    for file, cells in plan.streams.items():
        ends = [move.end for move in plan.moves if isinstance(move, Advance) and move.file == file]
        assert ends == sorted(ends)
        assert max(ends) >= max(cell.end for cell in cells)


@given(reads_of_a_job, st.integers(0, 3000))
def test_what_an_order_forces_to_hold_stays_under_the_slack(reads: list[Range], slack: int) -> None:
    """Only what is needed right now, and pieces, which are small, come on top."""
    plan = planned(reads, near=0, slack=slack)
    for move in plan.moves:
        if isinstance(move, Advance):
            pieces = sum(cell.size for cell in plan.cells if cell.side)
            assert move.held <= slack + pieces + max(cell.size for cell in plan.cells)


def test_a_dense_file_is_one_stream() -> None:
    reads = [("a", at, at + 100) for at in range(0, SIZE, 100)]
    plan = planned(reads, slack=0)
    assert [(move.file, move.end) for move in plan.moves] == [("a", SIZE)]
    assert segments(plan.streams["a"], 1) == [(0, SIZE)]


@pytest.mark.parametrize("scales_first", [False, True])
def test_scales_far_from_their_weights_become_few_pieces(*, scales_first: bool) -> None:
    """Codes and scales of each weight lie in two regions; the stream follows the codes wherever these are."""
    codes, scales = (400, 0) if scales_first else (0, 3600)
    reads = []
    for at in range(36):
        reads += [("a", codes + at * 100, codes + (at + 1) * 100), ("a", scales + at * 10, scales + (at + 1) * 10)]
    plan = planned(reads, near=400, slack=100)
    assert sum(cell.size for cell in plan.streams["a"]) >= 3600
    assert sum(isinstance(move, Piece) for move in plan.moves) <= 1


def test_a_second_use_far_away_is_fetched_again_and_a_near_one_is_held() -> None:
    far = [("a", 0, 100), ("a", 100, 1000), ("a", 0, 100)]
    assert [cell.uses for cell in planned(far, near=300).cells] == [1, 1, 1]
    assert [cell.uses for cell in planned(far, near=900).cells] == [2, 1]


def test_segments_read_through_small_holes() -> None:
    reads = [("a", 0, 10), ("a", 15, 20), ("a", 100, 110)]
    assert segments(planned(reads).streams["a"], 10) == [(0, 20), (100, 110)]


def test_a_large_job_is_planned_quickly() -> None:
    """A mixture of experts has tens of thousands of tensors in a file."""
    reads = []
    for at in range(20_000):
        reads += [("a", at * 1000, (at + 1) * 1000), ("a", 10**9 + at * 60, 10**9 + (at + 1) * 60)]
    started = time.perf_counter()
    schedule(reads, ("a",), near=96 << 20, slack=1 << 20)
    assert time.perf_counter() - started < 5


def read_all(fetcher: Fetcher, reads: Sequence[Range], threads: int) -> None:
    """As an engine does: threads take the reads in order, and one may overtake another."""

    def one(place: Range) -> None:
        file, begin, end = place
        if begin < end:
            found = fetcher.take(place)
            assert found is not None
            assert found.flags.writeable
            assert found.tobytes() == FILES[file][begin:end]
            found[:] = 0

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, reads))


@settings(deadline=None, max_examples=60)
@given(
    jobs=st.lists(reads_of_a_job, max_size=4), threads=st.integers(1, 4), ahead=st.integers(1, 2000),
    slack=st.integers(0, 2000), hashed=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_every_read_gets_its_bytes_in_any_order(
    jobs: list[list[Range]], threads: int, ahead: int, slack: int, seed: int, *, hashed: bool
) -> None:
    """In order, nearly in order and shuffled: exact bytes, arrays of one's own, and an end."""
    transport = MemoryTransport(FILES, hashed=hashed, part=1 + seed * 33)
    with closing(Fetcher(transport, "hf://x/y", ahead=ahead, slack=slack)) as fetcher:
        fetcher.expect([job(str(at), reads) for at, reads in enumerate(jobs)])
        for at, reads in enumerate(jobs):
            mixed = list(reads)
            if seed % 3:
                random.Random(seed).shuffle(mixed)
            read_all(fetcher, mixed, threads)
            fetcher.settle(str(at))
        assert fetcher.window.held == 0


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 1000), st.integers(0, 1000), st.integers(1, 3))
def test_memory_is_bounded_when_reads_come_in_order(ahead: int, slack: int, threads: int) -> None:
    """A slow reader never makes the buffer grow: one block in a hurry for each thread may come on top."""
    reads = [(file, at, at + 100) for file in "ab" for at in range(0, SIZE, 100)]
    transport = MemoryTransport(FILES, part=50)
    with closing(Fetcher(transport, "hf://x/y", ahead=ahead, slack=slack)) as fetcher:
        fetcher.expect([job("a", reads[:40]), job("b", reads[40:])])
        read_all(fetcher, reads, threads)
        assert fetcher.window.most <= max(ahead, 50) + (threads + 1) * 100
    assert transport.nbytes == 2 * SIZE


def test_the_next_job_flows_before_the_last_one_is_settled() -> None:
    transport = MemoryTransport(FILES)
    with closing(Fetcher(transport, "hf://x/y", ahead=3 * SIZE)) as fetcher:
        fetcher.expect([job("1", [("a", 0, SIZE)]), job("2", [("b", 0, SIZE)])])
        wait_for(lambda: fetcher.window.held == 2 * SIZE)


def test_a_whole_file_is_hashed_and_a_wrong_hash_ends_the_job() -> None:
    """Settling the job tells, and so does every later read."""
    transport = MemoryTransport(FILES, hashed=True, lie=True)
    with closing(Fetcher(transport, "hf://x/y", ahead=SIZE)) as fetcher:
        fetcher.expect([job("1", [("a", 0, 100)]), job("2", [("b", 0, 100)])])
        assert fetcher.take(("a", 0, 100)) is not None
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"hf://x/y/a: its SHA-256 must be 0000"):
                fetcher.settle("1")
        with pytest.raises(CheckpointError, match="SHA-256"):
            fetcher.take(("b", 0, 100))


def test_a_file_is_streamed_whole_once_and_later_jobs_read_ranges_of_it() -> None:
    transport = MemoryTransport(FILES, hashed=True)
    with closing(Fetcher(transport, "hf://x/y", ahead=SIZE)) as fetcher:
        fetcher.expect([job("1", [("a", 0, 100)]), job("2", [("a", 500, 600)])])
        read_all(fetcher, [("a", 0, 100), ("a", 500, 600)], 1)
        fetcher.settle("1")
        fetcher.settle("2")
    assert transport.asked == [("a", 0, SIZE), ("a", 500, 600)]


def test_a_failure_reaches_everyone_who_waits_and_keeps_what_is_complete() -> None:
    transport = MemoryTransport(FILES, part=100)
    transport.gate = threading.Event()
    with closing(Fetcher(transport, "hf://x/y", ahead=SIZE)) as fetcher:
        fetcher.expect([job("1", [("a", 0, 100)]), job("2", [("b", 0, 100), ("b", 100, 200)])])
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(fetcher.take, ("b", at, at + 100)) for at in (0, 100)]
            transport.broken = TransientError("the network is gone")
            transport.gate.set()
            for future in waiting:
                with pytest.raises(TransientError, match="network is gone"):
                    future.result(5)
        with pytest.raises(TransientError):
            fetcher.settle("1")


def test_reads_that_were_not_announced_are_left_to_the_caller() -> None:
    with closing(Fetcher(MemoryTransport(FILES), "hf://x/y", ahead=SIZE)) as fetcher:
        fetcher.expect([job("1", [("a", 0, 100)])])
        assert fetcher.take(("a", 0, 99)) is None
        assert fetcher.take(("a", 0, 100)) is not None
        assert fetcher.take(("a", 0, 100)) is None
        fetcher.settle("1")
        fetcher.settle("never announced")


def test_closing_frees_a_reader_and_ends_the_threads() -> None:
    transport = MemoryTransport(FILES)
    transport.gate = threading.Event()
    fetcher = Fetcher(transport, "hf://x/y", ahead=SIZE)
    fetcher.expect([job("1", [("a", 0, 100)])])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fetcher.take, ("a", 0, 100))
        time.sleep(0.05)
        fetcher.stop()
        with pytest.raises(HubError, match="closed"):
            waiting.result(5)
    transport.gate.set()
    fetcher.close()
    fetcher.close()
    assert not any(thread.name.startswith("mso-ahead") for thread in threading.enumerate())


def wait_for(condition: object) -> None:
    """Until something becomes true; half a minute on a busy machine."""
    assert callable(condition)
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it never happened")
