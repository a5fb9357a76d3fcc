"""Run a command as a child, measure it, and print what came out as Markdown."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GB = 1e9
MB = 1e6


class CommandFailed(RuntimeError):
    """A measured command returned an error; the message ends with what it printed."""


@dataclass(frozen=True, slots=True)
class Run:
    """One measured command."""

    seconds: float  # from start to exit, interpreter start-up included
    sync_seconds: float  # then, until its output was on the disk
    peak_rss: int  # bytes; of its largest process, where it had several
    output: str
    written: int = 0  # bytes that it sent to disks, as the kernel counts them (Linux)

    @property
    def total(self) -> float:
        """Seconds until the output was on the disk."""
        return self.seconds + self.sync_seconds


def measure(command: Sequence[str | Path], environment: Mapping[str, str] | None = None, *, sync: bool = False) -> Run:
    """Run `command` to its end. `sync` empties the write queue before, and waits for the disk after.

    The kernel counts the caller's own pages into the peak of a child that it starts: keep the caller small.
    """
    words = [str(word) for word in command]
    if sync:
        os.sync()
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            words, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}, cwd=ROOT
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        output = log.read().decode(errors="replace")
    if process.returncode:
        raise CommandFailed(f"{' '.join(words)}: exit status {process.returncode}\n{output[-3000:]}")
    start = time.perf_counter()
    if sync:
        os.sync()
    sync_seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(seconds, sync_seconds, usage.ru_maxrss * unit, output, usage.ru_oublock * 512)


def median_run(runs: Iterable[Run]) -> Run:
    """The medians of several runs of one command, number by number."""
    runs = list(runs)  # of bytes written, the most
    return Run(
        seconds=statistics.median(run.seconds for run in runs),
        sync_seconds=statistics.median(run.sync_seconds for run in runs),
        peak_rss=int(statistics.median(run.peak_rss for run in runs)),
        output=runs[-1].output,
        written=max(run.written for run in runs),
    )


def mso_hub() -> Path:
    """The console script beside the interpreter that runs the benchmark."""
    script = Path(sys.executable).with_name("mso-hub")
    if not script.exists():
        raise FileNotFoundError(f"{script} is missing; install the package here with `pip install -e .`")
    return script


def make_checkpoint(folder: Path, kind: str, shards: int, *options: str) -> dict[str, int]:
    """Have another process write a checkpoint: its memory is not ours. Returns `tensors` and `bytes`."""
    program = (sys.executable, "-m", "tests.benchmarks.checkpoints")
    run = measure((*program, folder, "--kind", kind, "--shards", str(shards), *options))
    counts: dict[str, int] = json.loads(run.output.splitlines()[-1])
    return counts


def warm_page_cache(folder: Path) -> int:
    """Read every shard once, so that no contender pays for a cold disk; returns the bytes of the shards."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while block := file.read(1 << 20):
                total += len(block)
    return total


def remove(folder: Path) -> None:
    """Delete a folder if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


def machine() -> str:
    """One line on the machine: figures without it mean nothing."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    return (
        f"{_processor()}, {os.cpu_count()} cores, {memory / GB:.0f} GB memory, {platform.system()}, "
        f"Python {platform.python_version()}, OMP_NUM_THREADS {threads}"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, numbers to the right."""
    rule = ["---"] + ["---:"] * (len(titles) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, rule, *rows))
