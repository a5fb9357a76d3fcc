"""Progress: what events add up to, lines that fit a log, and when they are written."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest

import mso_hub
from mso_hub.engine import ThreadEngine
from mso_hub.errors import RecipeError
from mso_hub.events import Event, Moved, PlanReady, ShardResumed, TensorDone, Waiting
from mso_hub.notebook.track import Checking, Progress, Snapshot, Track
from mso_hub.notebook.views import EVERY, Nothing, Text, Watch, amounts, check_kind, clock, line, open_view, status
from mso_hub.plan import Plan, Recipe
from mso_hub.sink import MemorySink
from tests.helpers import tiny_moe


class Clock:
    """Time that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("views") / "in", layers=3, experts=4, shards=3)


@pytest.fixture(scope="module")
def plan(source: Path) -> Plan:
    return mso_hub.make_plan(source, Recipe())


def shares(snapshot: Snapshot) -> dict[str, float]:
    return {bar.name: bar.share for bar in snapshot.bars}


def test_bars_begin_at_nothing_grow_and_end_full(source: Path, plan: Plan) -> None:
    """The events of a real run."""
    track = Track(plan, "upload")
    seen: list[Snapshot] = [track.snapshot()]

    def listen(event: Event) -> None:
        track(event)
        seen.append(track.snapshot())

    mso_hub.convert(source, MemorySink(), Recipe(), engine=ThreadEngine(2), on_event=listen)
    assert shares(seen[0]) == {"read": 0.0, "encode": 0.0, "upload": 0.0, "commit": 0.0}
    assert shares(seen[-1]) == {"read": 1.0, "encode": 1.0, "upload": 1.0, "commit": 1.0}
    for name in shares(seen[0]):
        values = [shares(snapshot)[name] for snapshot in seen]
        assert values == sorted(values)
    states = list(dict.fromkeys(snapshot.state.partition(":")[0] for snapshot in seen))
    assert states == ["reading headers", "encoding", "finalizing", "committing", "done"]
    assert seen[-1].bars[0].total == plan.read_bytes
    assert seen[-1].bars[2].total == sum(i.nbytes for s in plan.shards for step in s.steps for i in step.outputs)


def test_kept_shards_count_but_not_as_speed(plan: Plan) -> None:
    """Bytes of an earlier run fill the bars; rate and time left are this run's."""
    now = Clock()
    track = Track(plan, clock=now)
    first, second, *_ = plan.shards
    track(PlanReady(plan.read_bytes, plan.write_bytes, len(plan.shards)))
    track(ShardResumed(first.name, first.read_bytes))
    assert track.snapshot().rate == 0
    assert track.snapshot().left is None
    now.now += 2
    for step in second.steps:
        track(TensorDone(step.weight.name, step.weight.nbytes))
    found = track.snapshot()
    assert found.bars[1].done == first.read_bytes + second.read_bytes
    assert found.rate == second.read_bytes / 2
    rest = plan.read_bytes - first.read_bytes - second.read_bytes
    assert found.left == pytest.approx(rest / found.rate)


def test_what_was_read_ahead_and_written_shows(plan: Plan) -> None:
    """A large tensor moves the outer bars before it is done."""
    track = Track(plan)
    track(PlanReady(plan.read_bytes, plan.write_bytes, len(plan.shards)))
    track(Moved(plan.read_bytes // 2, 1000))
    read, encode, write, _ = track.snapshot().bars
    assert (read.done, encode.done, write.done) == (plan.read_bytes // 2, 0, 1000)


def test_waiting_is_said_for_as_long_as_it_lasts(plan: Plan) -> None:
    now = Clock()
    track = Track(plan, clock=now)
    track(PlanReady(plan.read_bytes, plan.write_bytes, len(plan.shards)))
    track(Waiting("hf://a/b", 5.0, "status 429"))
    assert track.snapshot().state == "waiting for the Hub, status 429"
    now.now += 6
    assert track.snapshot().state == "encoding"


def snapshot(seconds: float = 0.0, state: str = "encoding", share: float = 0.5) -> Snapshot:
    big = 10**13
    bars = tuple(Progress(name, int(big * share), big) for name in ("read", "encode", "upload"))
    return Snapshot((*bars, Progress("commit", 3, 1001)), state, seconds, 1.5e9, 90061.0, 999 * 10**9)


@pytest.mark.parametrize("state", ["encoding", "committing: making the output visible", "x" * 200, "\x1b[2J\r"])
def test_a_line_fits(state: str) -> None:
    found = line(snapshot(state=state))
    assert len(found) <= 80
    assert found.isprintable()
    assert found.startswith("read  50%  encode  50%  upload  50%  commit   0%")


def test_a_line_is_written_now_and_then() -> None:
    """Not more often than every few seconds, except for the last one."""
    stream = io.StringIO()
    view = Text(stream)
    for at in range(100):
        view.draw(snapshot(at * EVERY / 10))
    assert len(stream.getvalue().splitlines()) == 10
    view.draw(snapshot(99.1 * EVERY / 10, share=1.0), last=True)
    assert stream.getvalue().splitlines()[-1].startswith("read 100%")
    assert "\r" not in stream.getvalue()


def test_a_view_is_drawn_while_nothing_happens() -> None:
    """Memory and time move although no event comes; the last drawing is the end."""

    class Counting:
        def __init__(self) -> None:
            self.drawn: list[bool] = []

        def draw(self, snapshot: Snapshot, *, last: bool = False) -> None:
            self.drawn.append(last)

    view = Counting()
    with Watch(Checking(), view):
        time.sleep(0.7)
    assert len(view.drawn) >= 3
    assert view.drawn.index(True) == len(view.drawn) - 1


def test_words() -> None:
    assert [clock(s) for s in (0, 8.4, 62, 3723)] == ["0:00", "0:08", "1:02", "1:02:03"]
    assert amounts(Progress("commit", 3, 8)) == "3 of 7 shards stored"
    assert amounts(Progress("commit", 8, 8)) == "done"
    assert amounts(Progress("read", 10**6, 10**9)) == "1.0 MB of 1.0 GB"
    assert status(snapshot()) == "encoding, 1.5 GB/s, 25:01:01 left, 999.0 GB memory"


def test_kinds_of_views(capsys: pytest.CaptureFixture[str]) -> None:
    """Outside of a kernel progress is text on stderr, and stdout stays free."""
    assert isinstance(open_view("none"), Nothing)
    open_view("auto").draw(snapshot(), last=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == line(snapshot()) + "\n"
    with pytest.raises(RecipeError, match="must be one of auto, widgets, text, none, got 'bar'"):
        check_kind("bar")
