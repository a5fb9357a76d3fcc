"""What an unfinished run has done: JSON lines, each synced before the next step counts on it."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from mso_hub.errors import ResumeError


@dataclass(frozen=True, slots=True)
class Entry:
    """A completed file: size in bytes and SHA-256 in hex."""

    nbytes: int
    sha256: str


class Journal:
    """Journal of one output folder; holds a lock while it is open, so two runs cannot share it."""

    def __init__(self, path: Path, job: str, *, fresh: bool = False) -> None:
        """Open or start the journal of `job`; ResumeError for another job's or another process's.

        fresh  forget what stands there, whichever job it was
        """
        self.files: dict[str, Entry] = {}
        self.notes: dict[str, float] = {}
        self._lock = threading.Lock()  # notes come from the engine's thread, files from the writer's
        self._file = path.open("a+b", buffering=0)
        try:
            self._claim(path)
            if fresh:
                self._file.truncate(0)
            self._load(path, job)
        except BaseException:
            self._file.close()
            raise

    def _claim(self, path: Path) -> None:
        """Lock the file; ResumeError when another process has it, or has just removed it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.path.samestat(os.fstat(self._file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            free = False
        if not free:
            raise ResumeError(f"{path}: another process is writing this output; wait for it to end")

    def _load(self, path: Path, job: str) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            # The machine died in the middle of a line: what it announced did not happen.
            self._file.truncate(len(whole))
        if not whole:
            self._append({"job": job})
            return
        try:
            self._replay(path, job, [json.loads(line) for line in whole.splitlines()])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ResumeError(f"{path}: not a journal of this tool ({error!r}); run with --fresh") from error

    def _replay(self, path: Path, job: str, lines: list[dict[str, object]]) -> None:
        if lines[0]["job"] != job:
            raise ResumeError(
                f"{path}: an unfinished run with another source or other settings lies there "
                f"(job {str(lines[0]['job'])[:12]}, this one is {job[:12]}); repeat its settings to finish it, or "
                "discard it with --fresh"
            )
        for line in lines[1:]:
            if "file" in line:
                self.files[str(line["file"])] = Entry(int(str(line["nbytes"])), str(line["sha256"]))
            else:
                self.notes[str(line["note"])] = float(str(line["value"]))

    def _append(self, line: dict[str, object], *, sync: bool = True) -> None:
        data = memoryview(json.dumps(line).encode() + b"\n")
        with self._lock:
            before = os.fstat(self._file.fileno()).st_size
            try:
                while data:
                    data = data[self._file.write(data) :]
                if sync:
                    os.fsync(self._file.fileno())
            except OSError:
                # Half a line in the middle would make the whole journal unreadable.
                self._file.truncate(before)
                raise

    def done(self, file: str, entry: Entry) -> None:
        """A file is complete and synced."""
        self._append({"file": file, "nbytes": entry.nbytes, "sha256": entry.sha256})
        self.files[file] = entry

    def note(self, key: str, value: float) -> None:
        """Remember a number; not synced, because it can be computed again."""
        self._append({"note": key, "value": value}, sync=False)
        self.notes[key] = value

    def close(self) -> None:
        """Release the lock."""
        self._file.close()
