"""The program as a person runs it: real processes, paused or killed on the way, and disks that are too small."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

TIMEOUT = 60
SMALLEST_PIPE = 4096
"""Bytes; after about 40 events that nobody reads the program waits."""


def command(verb: str, source: Path, target: Path, *more: str) -> list[str]:
    """Arguments of one conversion; `more` overrides."""
    program = [sys.executable, "-m", "mso_hub.cli", verb]
    return [*program, "--input_dir", str(source), "--output_dir", str(target), *more]


def run(arguments: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run to the end and keep what it says."""
    return subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT, check=False, **settings)


def convert(source: Path, target: Path, *more: str) -> list[dict[str, Any]]:
    """Run `quantize` to its good end -> its events."""
    done = run(command("quantize", source, target, "--progress", "json", *more))
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


@contextmanager
def paused(arguments: list[str], event: str = "ShardDone", **settings: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A running conversion, stopped at the first event of a kind; killed when the block ends."""
    process = subprocess.Popen(
        [*arguments, "--progress", "json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, **settings
    )
    try:
        assert process.stdout is not None
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, SMALLEST_PIPE)
        while json.loads(process.stdout.readline())["event"] != event:
            pass
        os.kill(process.pid, signal.SIGSTOP)
        yield process
    finally:
        process.kill()
        process.communicate()


def proceed(process: subprocess.Popen[bytes]) -> tuple[int, list[dict[str, Any]], str]:
    """Let a stopped conversion go on to its end -> exit code, the rest of its events, its messages."""
    os.kill(process.pid, signal.SIGCONT)
    out, err = process.communicate(timeout=TIMEOUT)
    return process.returncode, [json.loads(line) for line in out.splitlines()], err.decode()


def listing(folder: Path) -> list[str]:
    """Names in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, with the folders and links themselves; {} when there is none."""
    return {path.relative_to(folder).as_posix(): digest(path) for path in sorted(folder.rglob("*"))}


def digest(path: Path) -> str:
    """What a path holds, in a word."""
    if path.is_symlink():
        return f"link to {path.readlink()}"
    return "folder" if path.is_dir() else sha256(path.read_bytes())


def sha256(data: bytes) -> str:
    """Digest in hex."""
    return hashlib.sha256(data).hexdigest()


def staging(target: Path) -> Path:
    """Where an unfinished output is built."""
    return target.parent / f".{target.name}.mso-partial"


def journal(target: Path) -> Path:
    """Where an unfinished output is accounted for."""
    return target.parent / f".{target.name}.mso-journal"


def journal_text(job: str, files: Mapping[str, Mapping[str, Any]]) -> str:
    """A journal that says that these files of a manifest are complete."""
    lines: list[dict[str, Any]] = [{"job": job}, *({"file": name, **entry} for name, entry in files.items())]
    return "".join(json.dumps(line) + "\n" for line in lines)


@contextmanager
def small_disk(folder: Path, nbytes: int, *options: str) -> Iterator[Path]:
    """A real file system of `nbytes` at `folder`; skips the test where this user must not mount one."""
    folder.mkdir()
    settings = ",".join([f"size={nbytes}", *options])
    mounted = run(["mount", "-t", "tmpfs", "-o", settings, "tmpfs", str(folder)])
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Write until the disk is full -> the file that takes the space."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            return path
