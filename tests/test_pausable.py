"""Work that Ctrl-C, another thread or SystemExit stops at its next event."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mso_hub.errors import SinkError
from mso_hub.events import CheckReady, Committing, Event, Hashed, Published, TensorDone, ignore
from mso_hub.pausable import Pausable, Pause
from mso_hub.sink import LocalSink
from mso_hub.verify import verify_checkpoint
from tests.helpers import tiny_moe
from tests.notebook.kernels import TRAINED

EVENT = TensorDone("a.weight", 1)


def test_what_it_makes_comes_out_and_events_are_heard() -> None:
    heard: list[Event] = []
    work: Pausable[int] = Pausable(heard.append)

    def do() -> int:
        work.listen(EVENT)
        return threading.get_ident()

    assert work.run(do) != threading.get_ident()
    assert heard == [EVENT]
    assert not work.alive


def test_what_it_raises_comes_out() -> None:
    work: Pausable[None] = Pausable(ignore)

    def do() -> None:
        raise SinkError("out: is full")

    with pytest.raises(SinkError, match="is full"):
        work.run(do)


def test_stop_strikes_the_thread_that_works_and_no_other() -> None:
    """A listener is called from threads of uploads too; an exception there would be lost, or end an upload."""
    work: Pausable[None] = Pausable(ignore)
    elsewhere: list[str] = []

    def other() -> None:
        work.listen(EVENT)
        elsewhere.append("went on")

    def do() -> None:
        work.stop()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        work.listen(EVENT)

    with pytest.raises(Pause):
        work.run(do)
    assert elsewhere == ["went on"]


@pytest.mark.parametrize("late", [Committing("out"), Published("out", 1)])
def test_a_commit_that_has_begun_is_not_stopped(late: Event) -> None:
    cut: list[str] = []
    work: Pausable[str] = Pausable(ignore, lambda: cut.append("cut"))

    def do() -> str:
        work.listen(late)
        work.stop()
        work.listen(EVENT)
        return "published"

    assert work.run(do) == "published"
    assert cut == []


def test_an_error_of_a_connection_that_was_cut_is_the_pause() -> None:
    cut = threading.Event()
    work: Pausable[None] = Pausable(ignore, cut.set)

    def do() -> None:
        threading.Thread(target=work.stop).start()
        assert cut.wait(10)
        raise SinkError("out: connection closed")

    with pytest.raises(Pause) as caught:
        work.run(do)
    assert isinstance(caught.value.__cause__, SinkError)


def test_system_exit_in_the_wait_stops_the_work_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a handler of SIGTERM raises it."""
    ended: list[str] = []
    work: Pausable[None] = Pausable(ignore)

    def do() -> None:
        try:
            while True:
                work.listen(EVENT)
                time.sleep(0.001)
        finally:
            ended.append("ended")

    def leave(*_: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGUSR1, leave)
    try:
        timer = threading.Timer(0.1, signal.raise_signal, [signal.SIGUSR1])
        timer.start()
        with pytest.raises(SystemExit):
            work.run(do)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert ended == ["ended"]


def test_a_folder_that_checks_an_earlier_run_can_be_stopped(tmp_path: Path) -> None:
    """An output of half a terabyte takes minutes to hash; no event comes meanwhile."""
    sink = LocalSink(tmp_path / "out")
    sink.begin("job", {"a": 3, "b": 1})
    with sink.open("a", 3) as file:
        file.write(b"abc")
    sink.close()
    again = LocalSink(tmp_path / "out")
    again.abort()
    with pytest.raises(SinkError, match="stopped"):
        again.begin("job", {"a": 3, "b": 1})
    third = LocalSink(tmp_path / "out")
    third.begin("job", {"a": 3, "b": 1})
    assert list(third.entries) == ["a"]
    third.close()


def test_a_verification_says_beforehand_what_it_will_read(tmp_path: Path) -> None:
    import mso_hub

    source = tiny_moe(tmp_path / "source")
    mso_hub.convert(source, tmp_path / "out", mso_hub.Recipe(mode="all-linear"))
    heard: list[Event] = []
    verify_checkpoint(tmp_path / "out", source=source, on_event=heard.append)
    ready = heard[0]
    assert isinstance(ready, CheckReady)
    assert ready.hashed == sum(event.nbytes for event in heard if isinstance(event, Hashed)) > 0
    assert ready.compared == sum(event.nbytes for event in heard if isinstance(event, TensorDone)) > 0


QUANTIZE = """
import sys
from mso_hub.cli import main
sys.argv = ["mso-hub", "quantize", "--input_dir", sys.argv[1], "--output_dir", sys.argv[2], "--all_linear",
            "--progress", "json", "--workers", "2"]
main()
"""


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.02, 0.04, 0.08])
def test_ctrl_c_ends_the_command_wherever_it_strikes(tmp_path: Path, delay: float) -> None:
    command = [sys.executable, "-c", QUANTIZE, str(TRAINED), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "PlanReady" in process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode in {0, 130}, said
    assert "Traceback" not in said
    if process.returncode == 130:
        assert "the same command goes on" in said
        assert not (tmp_path / "out").exists()
