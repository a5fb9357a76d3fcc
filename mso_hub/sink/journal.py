"""What an unfinished run has done: JSON lines, each synced before the next step counts on it."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit

from mso_hub.errors import ResumeError


@dataclass(frozen=True, slots=True)
class Entry:
    """A completed file: size in bytes and SHA-256 in hex."""

    nbytes: int
    sha256: str


@dataclass(slots=True)
class Progress:
    """What an unfinished run has done, as its journal says.

    facts   what the run says about itself in the first line, beside its job
    files   complete files
    extras  what else a sink wrote down about a file
    notes   numbers
    """

    job: str
    facts: dict[str, str] = field(default_factory=dict)
    files: dict[str, Entry] = field(default_factory=dict)
    extras: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)

    def load(self, name: str, text: bytes) -> None:
        """Replay the lines of a journal; ResumeError when it is another job's, or none."""
        try:
            self._replay(name, [json.loads(line) for line in text.splitlines()])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ResumeError(f"{name}: not a journal of this tool ({error!r}); run with --fresh") from error

    def _replay(self, name: str, lines: list[dict[str, object]]) -> None:
        if lines[0]["job"] != self.job:
            raise ResumeError(
                f"{name}: an unfinished run with another source or other settings lies there "
                f"(job {str(lines[0]['job'])[:12]}, this one is {self.job[:12]}); repeat its settings to finish it, or "
                "discard it with --fresh"
            )
        self.facts = {key: str(value) for key, value in lines[0].items() if key != "job"}
        for line in lines[1:]:
            if "file" in line:
                rest = {k: str(v) for k, v in line.items() if k not in {"file", "nbytes", "sha256"}}
                self.add(str(line["file"]), Entry(int(str(line["nbytes"])), str(line["sha256"])), rest)
            elif "gone" in line:
                self.drop(str(line["gone"]))
            else:
                self.notes[str(line["note"])] = float(str(line["value"]))

    def add(self, file: str, entry: Entry, extras: Mapping[str, str]) -> None:
        """A file is complete."""
        self.files[file] = entry
        self.extras[file] = dict(extras)

    def drop(self, file: str) -> None:
        """A file counts no longer."""
        self.files.pop(file, None)
        self.extras.pop(file, None)

    def lines(self) -> Iterator[dict[str, object]]:
        """The journal that says the same."""
        yield {"job": self.job, **self.facts}
        for file, entry in list(self.files.items()):
            yield file_line(file, entry, self.extras[file])
        for key, value in list(self.notes.items()):
            yield {"note": key, "value": value}


def file_line(file: str, entry: Entry, extras: Mapping[str, str]) -> dict[str, object]:
    """Line of a complete file."""
    return {"file": file, "nbytes": entry.nbytes, "sha256": entry.sha256, **extras}


def header_of(path: Path) -> dict[str, str]:
    """First line of the journal at `path`, {} when there is none that can be read."""
    try:
        with path.open("rb") as file:
            return parse_header(file.readline())
    except OSError:
        return {}


def parse_header(text: bytes) -> dict[str, str]:
    """First line of a journal, {} when it is none."""
    try:
        line = json.loads(text.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return {}
    return {key: str(value) for key, value in line.items()} if isinstance(line, dict) else {}


class Journal:
    """Journal of one output; holds a lock while it is open, so two runs cannot share it."""

    def __init__(self, path: Path, job: str, *, fresh: bool = False, facts: Mapping[str, str] | None = None) -> None:
        """Open or start the journal of `job`; ResumeError for another job's or another process's.

        fresh  forget what stands there, whichever job it was
        facts  for the first line of a new journal
        """
        self.progress = Progress(job, dict(facts or {}))
        self._lock = threading.Lock()  # notes come from the engine's thread, files from the writer's
        self._file = path.open("a+b", buffering=0)
        try:
            self._claim(path)
            if fresh:
                self._file.truncate(0)
            self._load(path)
        except BaseException:
            self._file.close()
            raise

    @property
    def files(self) -> dict[str, Entry]:
        """Complete files."""
        return self.progress.files

    @property
    def notes(self) -> dict[str, float]:
        """Numbers."""
        return self.progress.notes

    def _claim(self, path: Path) -> None:
        """Lock the file; ResumeError when another process has it, or has just removed it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.path.samestat(os.fstat(self._file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            free = False
        if not free:
            raise ResumeError(f"{path}: another process is writing this output; wait for it to end")

    def _load(self, path: Path) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            # The machine died in the middle of a line: what it announced did not happen.
            self._file.truncate(len(whole))
        if not whole:
            self._append(next(self.progress.lines()))
            return
        self.progress.load(str(path), whole)

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

    def done(self, file: str, entry: Entry, extras: Mapping[str, str] | None = None) -> None:
        """A file is complete and synced."""
        self._append(file_line(file, entry, extras or {}))
        self.progress.add(file, entry, extras or {})

    def undo(self, file: str) -> None:
        """A complete file got lost."""
        self._append({"gone": file})
        self.progress.drop(file)

    def note(self, key: str, value: float) -> None:
        """Remember a number; not synced, because it can be computed again."""
        self._append({"note": key, "value": value}, sync=False)
        self.notes[key] = value

    def close(self) -> None:
        """Release the lock."""
        self._file.close()


def cache_folder() -> Path:
    """MSO_HUB_CACHE, else mso_hub below XDG_CACHE_HOME or ~/.cache."""
    if os.environ.get("MSO_HUB_CACHE"):
        return Path(os.environ["MSO_HUB_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mso_hub"


def journal_path(cache: Path, endpoint: str, repo: str, place: str) -> Path:
    """Where the journal of an output lies.

    place  branch, or "pr" for a pull request
    """
    host = urlsplit(endpoint).netloc
    prefix = "" if host == "huggingface.co" else f"{quote(host, safe='')}--"
    return cache / "journals" / f"{prefix}{repo.replace('/', '--', 1)}--{quote(place, safe='')}.journal"
