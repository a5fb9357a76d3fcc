"""Events: in which order they come, what they add up to, and how the command line shows them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mso_hub
from mso_hub.engine import ThreadEngine
from mso_hub.errors import MsoError
from mso_hub.events import Committing, Event, Moved, PlanReady, Published, ShardDone, ShardResumed, TensorDone
from mso_hub.plan import Plan, Recipe
from mso_hub.progress import Bar
from mso_hub.sink import LocalSink, MemorySink, Sink
from mso_hub.source import read_checkpoint
from mso_hub.source.local import LocalSource
from tests.helpers import random_tensor, tiny_llama, tiny_moe, write_checkpoint
from tests.running import command, convert, run

SHARDS = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MoE in three shards."""
    return tiny_moe(tmp_path_factory.mktemp("events") / "in", layers=3, experts=8, shards=SHARDS)


@pytest.fixture(params=["local", "memory"])
def sink(request: pytest.FixtureRequest, tmp_path: Path) -> Sink:
    """Both backends."""
    return LocalSink(tmp_path / "out") if request.param == "local" else MemorySink()


def converted(source: Path, sink: Sink, delay: float = 0.0) -> tuple[Plan, list[Event]]:
    """Convert -> plan and events; the listener takes its time."""
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        time.sleep(delay)

    plan: Plan = mso_hub.convert(source, sink, Recipe(), engine=ThreadEngine(2), on_event=listen)
    return plan, events


@pytest.mark.parametrize("delay", [0.0, 0.002], ids=["fast", "slow"])
def test_the_order_of_events(source: Path, sink: Sink, delay: float) -> None:
    """Plan first, publication last, and between them each shard's tensors and then the shard, exactly once.

    A slow listener lets the writer run ahead; nobody may see that.
    """
    plan, events = converted(source, sink, delay)
    wanted: list[tuple[type[Event], str]] = [(PlanReady, "")]
    for shard in plan.shards:
        wanted += [(TensorDone, step.weight.name) for step in shard.steps]
        wanted.append((ShardDone, shard.name))
    wanted += [(Committing, ""), (Published, "")]
    names = {TensorDone: "name", ShardDone: "shard"}
    found = [(type(e), getattr(e, names[type(e)]) if type(e) in names else "") for e in events]
    assert found == wanted


def test_sums(source: Path, sink: Sink) -> None:
    """The bytes of all tensors are the bytes that the plan announced, so that a bar ends at 100 %."""
    plan, events = converted(source, sink)
    ready = events[0]
    assert isinstance(ready, PlanReady)
    assert ready == PlanReady(plan.read_bytes, plan.write_bytes, SHARDS)
    assert sum(e.nbytes for e in events if isinstance(e, TensorDone)) == ready.read_bytes
    checkpoint = read_checkpoint(LocalSource(source))
    assert ready.read_bytes == sum(i.nbytes for shard in checkpoint.shards.values() for i in shard.tensors)


def test_events_say_what_lies_on_disk(source: Path, tmp_path: Path) -> None:
    """Sizes and digests of shards, and the size of the whole, are those of the files."""
    out = tmp_path / "out"
    _, events = converted(source, LocalSink(out))
    for event in events:
        if isinstance(event, ShardDone):
            data = (out / event.shard).read_bytes()
            assert (event.nbytes, event.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    ready, published = events[0], events[-1]
    assert isinstance(ready, PlanReady)
    assert isinstance(published, Published)
    sizes = {path.name: path.stat().st_size for path in out.iterdir() if path.name != "mso_hub.json"}
    assert published == Published(str(out), sum(sizes.values()))
    assert ready.write_bytes == sum(sizes.values())  # this source has no other files


def test_large_tensors_are_told_of_while_they_move(tmp_path: Path) -> None:
    """One weight of 40 MiB: what was read and written is told before it is done, grows, and ends at what moved."""
    tensors = {"model.layers.0.mlp.down_proj.weight": random_tensor(4096, 5120)}
    events: list[Event] = []
    where = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, {"model_type": "llama"})
    plan = mso_hub.convert(where, MemorySink(), Recipe(), on_event=events.append)
    told = [event for event in events if isinstance(event, Moved)]
    done = next(at for at, event in enumerate(events) if isinstance(event, TensorDone))
    assert any(isinstance(event, Moved) for event in events[:done])
    assert [e.read for e in told] == sorted(e.read for e in told)
    assert [e.written for e in told] == sorted(e.written for e in told)
    assert 0 < told[-1].read <= plan.read_bytes
    assert 0 < told[-1].written <= plan.write_bytes


def test_a_shard_done_is_complete_and_one_published_is_visible(source: Path, tmp_path: Path) -> None:
    """Events tell what has happened, not what is about to happen."""
    out = tmp_path / "out"
    sink = LocalSink(out)
    checked: list[str] = []

    def look(event: Event) -> None:
        if isinstance(event, ShardDone):
            data = (sink.staging / event.shard).read_bytes()
            assert hashlib.sha256(data).hexdigest() == event.sha256
            assert event.shard in sink.journal.read_text()
        assert out.exists() == isinstance(event, Published)
        checked.append(type(event).__name__)

    mso_hub.convert(source, sink, Recipe(), on_event=look)
    assert {"ShardDone", "Published"} <= set(checked)


def test_a_resumed_shard_counts_with_its_source_bytes(source: Path, tmp_path: Path) -> None:
    """Kept shards are told first; with the tensors that follow they add up to the whole."""
    out = tmp_path / "out"

    def stop(event: Event) -> None:
        if isinstance(event, ShardDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mso_hub.convert(source, out, Recipe(), on_event=stop)
    plan, events = converted(source, LocalSink(out))
    kept = [e for e in events if isinstance(e, ShardResumed)]
    assert kept
    assert events[1 : 1 + len(kept)] == kept
    assert [(e.shard, e.nbytes) for e in kept] == [(s.name, s.read_bytes) for s in plan.shards[: len(kept)]]
    tensors = sum(e.nbytes for e in events if isinstance(e, TensorDone))
    assert sum(e.nbytes for e in kept) + tensors == plan.read_bytes
    done = [e.shard for e in events if isinstance(e, ShardDone)]
    assert done == [s.name for s in plan.shards[len(kept) :]]


def test_nothing_is_announced_as_published_when_it_is_not(tmp_path: Path) -> None:
    """The last event of a failed run is not the good one."""
    source = tiny_llama(tmp_path / "in")
    (tmp_path / "out").mkdir()
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, PlanReady):
            (tmp_path / "out" / "theirs").write_text("x")

    with pytest.raises(MsoError):
        mso_hub.convert(source, tmp_path / "out", Recipe(), on_event=listen)
    assert isinstance(events[0], PlanReady)
    assert sum(isinstance(event, ShardDone) for event in events) == 2
    assert not any(isinstance(event, Published) for event in events)


# --- as the command line shows them -----------------------------------------------------------------


def test_json_lines_are_the_events(source: Path, tmp_path: Path) -> None:
    """Each line is one object with the event's name and fields; nothing else is on stdout."""
    _, events = converted(source, LocalSink(tmp_path / "direct"))
    lines = convert(source, tmp_path / "out")
    assert {line["event"] for line in lines} == {"PlanReady", "TensorDone", "ShardDone", "Committing", "Published"}
    assert [line["event"] for line in lines] == [type(event).__name__ for event in events]
    for line, event in zip(lines, events, strict=True):
        fields = {name: getattr(event, name) for name in line if name != "event"}
        moved = isinstance(event, Committing | Published)
        expected = {**fields, "where": str(tmp_path / "out")} if moved else fields
        assert {name: value for name, value in line.items() if name != "event"} == expected


def test_json_lines_appear_one_by_one(source: Path, tmp_path: Path) -> None:
    """A program that follows along sees a line when it happens, not when the buffer is full."""
    program = command("quantize", source, tmp_path / "out", "--progress", "json")
    with subprocess.Popen(program, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        assert first["event"] == "PlanReady"
        assert process.poll() is None
        process.communicate()
    assert process.returncode == 0


def test_the_bar_ends_full_and_stays_off_stdout(source: Path, tmp_path: Path) -> None:
    """Bytes, rate and shards on stderr; two closing lines on stdout say what happened and what to do next."""
    done = run(command("quantize", source, tmp_path / "out"))
    assert done.returncode == 0
    assert "100%" in done.stderr
    assert f"shard {SHARDS}/{SHARDS}" in done.stderr
    happened, following = done.stdout.splitlines()
    assert str(tmp_path / "out") in happened
    assert following == f"check it: mso-hub verify {tmp_path / 'out'} --source {source}"


@pytest.mark.parametrize("quiet", [["--quiet"], ["--progress", "none"]])
def test_quiet_is_quiet(source: Path, tmp_path: Path, quiet: list[str]) -> None:
    """Nothing at all where nothing is wrong."""
    done = run(command("quantize", source, tmp_path / "out", *quiet))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_bar_counts_resumed_shards(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bar over a resumed run ends at 100 % too, with all shards counted once."""
    sink = MemorySink()

    def stop(event: Event) -> None:
        if isinstance(event, ShardDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mso_hub.convert(source, sink, Recipe(), on_event=stop)
    mso_hub.convert(source, sink, Recipe(), on_event=Bar())
    shown = capsys.readouterr().err
    assert "100%" in shown
    assert f"shard {SHARDS}/{SHARDS}" in shown


def test_the_library_is_silent(source: Path, tmp_path: Path) -> None:
    """Without a listener a conversion writes nothing to either stream."""
    code = f"import mso_hub; mso_hub.convert({str(source)!r}, {str(tmp_path / 'out')!r}, mso_hub.Recipe())"
    done = run([sys.executable, "-c", code])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
