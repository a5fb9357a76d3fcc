"""One job for the plugin, in a process of vLLM's Python: JSON in, JSON out, and an end that is never silent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mso_hub.errors import SmokeError
from mso_hub.smoke.place import PACKAGE
from mso_hub.smoke.python import environment, require_vllm

SHOWN = 20
"""Lines of a crashed process that are shown."""
NO_MEMORY = ("MemoryError", "can't allocate memory", "OutOfMemoryError", "std::bad_alloc", "Cannot allocate memory")
"""What programs say that ran out of memory."""
_GRACE = 5
"""Seconds between asking a process to end and ending it."""
_LEFT = 2
"""Seconds that its own children have after it: Python's resource tracker unlinks shared memory then."""

_RUNNING: set[subprocess.Popen[bytes]] = set()


def end_processes() -> None:
    """Ask every process that run_job waits for to end, from any thread; those calls raise SmokeError then."""
    for process in tuple(_RUNNING):
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)


def run_job(python: Path, verb: str, job: Mapping[str, Any], folder: Path) -> bytes:
    """Run `python -m vllm_mso_hub VERB` on a job -> its report.

    folder  an empty one for the job, the report and what the process says; its working directory
    There is no time limit. Ctrl-C ends the process and all that it started. Raises SmokeError with the last lines of
    what the process said where it does not end with a report.
    """
    env = {**environment(), "HF_MODULES_CACHE": str(folder / "modules")}
    require_vllm(python, folder, env)
    wanted, report, said = folder / "job.json", folder / "report.json", folder / "said.txt"
    wanted.write_text(json.dumps(job), encoding="utf-8")
    command = [str(python), "-m", PACKAGE, verb, str(wanted), str(report)]
    with said.open("wb") as out, ended_by_signals():
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=folder, env=env,
            start_new_session=True,
        )  # fmt: skip
        _RUNNING.add(process)
        try:
            code = process.wait()
        finally:
            _end(process)
            _RUNNING.discard(process)
    if code != 0 or not report.is_file():
        raise SmokeError(_refusal(code, said) or _crash(python, verb, code, said))
    return report.read_bytes()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP become SystemExit, so that processes and folders of ours go too; only on the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, and whatever it left behind."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
    end = time.monotonic() + _LEFT
    with suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < end:  # what it started may still be putting its things away
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)


def _refusal(code: int, said: Path) -> str:
    """What the plugin says of a job that it does not take; "" where that was not the end."""
    last = _last_lines(said)[-1:]
    return last[0].removeprefix(f"{PACKAGE}: ") if code == 2 and last and last[0].startswith(f"{PACKAGE}: ") else ""


def _last_lines(said: Path) -> list[str]:
    with said.open(encoding="utf-8", errors="replace") as lines:
        return [line.rstrip() for line in deque((line for line in lines if line.strip()), SHOWN)]


def _crash(python: Path, verb: str, code: int, said: Path) -> str:
    """How a process ended, and its last words."""
    last = _last_lines(said)
    number = -code if code < 0 else code - 128 if code > 128 else 0
    if number == signal.SIGKILL:
        how = "was killed, most likely because the machine ran out of memory"
    elif any(word in line for line in last for word in NO_MEMORY):
        how = "ran out of memory"
    elif number in {each.value for each in signal.Signals}:
        how = f"died of {signal.Signals(number).name}"
    else:
        how = f"ended with exit code {code}" if code else "wrote no report"
    words = "its last lines:\n  " + "\n  ".join(last) if last else "it said nothing"
    return f"{python} -m {PACKAGE} {verb} {how}; {words}"
