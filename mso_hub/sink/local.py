"""A folder as a sink: everything is built in a hidden folder beside it and appears by one rename.

parent/.NAME.mso-partial/   shards and files as they are made
parent/.NAME.mso-journal    what of them is complete; its lock keeps a second run out
parent/NAME/                the finished checkpoint, from one moment to the next
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from mso_hub.checkpoint import Array
from mso_hub.errors import MsoError, SinkError
from mso_hub.hub import Origin, RemoteFile
from mso_hub.sink.journal import Entry, Journal
from mso_hub.sink.target import EMPTY

MANIFEST = "mso_hub.json"
BEHIND = 32 << 20
"""Bytes after which the kernel is told to write out what it has and to forget it: the disk works while the shard
grows, fsync has little left to do, and the output does not push its own source out of the cache."""
RESERVE = 1 << 20
"""Bytes that must stay free beyond the output: journal, directory entries."""


WAYS_OUT = {
    errno.ENOSPC: "free some space, then run the same command",
    errno.EDQUOT: "free some space, then run the same command",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) or choose another disk, then run the same command",
}


class _HashingFile:
    """Appends to a file and hashes what it appends."""

    def __init__(self, path: Path, nbytes: int, file: FileIO) -> None:
        self._path, self._file, self._planned = path, file, nbytes
        self.sha = hashlib.sha256()
        self.nbytes = 0

    def write(self, data: bytes | Array) -> None:
        """Append bytes; SinkError when the disk does not take them all."""
        # As one row of bytes, also where the array has no element or no dimension.
        view = memoryview(data if isinstance(data, bytes) else data.reshape(-1).view("u1").data)
        self.sha.update(view)
        before, self.nbytes = self.nbytes, self.nbytes + len(view)
        with _naming(self._path, self._planned):
            while view:
                view = view[self._file.write(view) :]
            if self.nbytes // BEHIND != before // BEHIND and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _naming(path: Path, nbytes: int) -> Iterator[None]:
    """OSError -> SinkError that names the file and the way out."""
    try:
        yield
    except OSError as error:
        if isinstance(error, SinkError):
            raise
        way_out = WAYS_OUT.get(error.errno or 0, "run the same command again")
        raise SinkError(f"{path}: {nbytes:,} bytes could not be written: {error.strerror}; {way_out}") from error


def sync_folder(path: Path) -> None:
    """The names in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LocalSink:
    """Output folder `path`; nothing is created before `begin`."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        # A link or a ".." in the path must not decide where the partial folder lies, nor stop the last rename.
        self._target = Path(os.path.realpath(path))
        self.staging = self._target.parent / f".{self._target.name}.mso-partial"
        self.journal = self._target.parent / f".{self._target.name}.mso-journal"
        self._retired = self._target.parent / f".{self._target.name}.mso-old"
        self._fresh = fresh
        self._journal: Journal | None = None
        self._entries: dict[str, Entry] = {}
        self._finished = False
        self._aborted = threading.Event()

    @property
    def name(self) -> str:
        """The folder as the user gave it."""
        return str(self.path)

    @property
    def where(self) -> str:
        """Its name."""
        return self.name

    @property
    def address(self) -> str:
        """Its name."""
        return self.name

    @property
    def finished(self) -> bool:
        """Did begin() find the output of this job, complete?"""
        return self._finished

    @property
    def notes(self) -> Mapping[str, float]:
        """Numbers of an earlier run of this job; none where the output is finished already."""
        return self._journal.notes if self._journal is not None else {}

    @property
    def _open_journal(self) -> Journal:
        if self._journal is None:
            raise SinkError(f"{self.path}: call begin() first, the sink is closed")
        return self._journal

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Complete files, each checked against the journal of an earlier run or written by this one."""
        return self._entries

    def finished_job(self) -> str | None:
        """Job that a finished output says it came from, or None when there is no output of this tool."""
        try:
            job = json.loads((self._target / MANIFEST).read_bytes())["job"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return job if isinstance(job, str) else None

    def require_free(self) -> None:
        """SinkError for a place that `begin` would refuse whatever the job; nothing is made there."""
        if self.finished_job() is None:
            self._require_replaceable(None, "")

    def guard(self, origin: Origin | None) -> None:
        """Nothing: it is not on a Hub, and seen by whom its folder lets."""

    def begin(self, job: str, sizes: Mapping[str, int]) -> None:
        """Refuse what cannot work, then see what is done; a finished output of the same job is done in full."""
        finished = self.finished_job()
        self._finished = False
        if finished == job and not self._fresh:
            self._entries = self._finished_entries(sizes)
            self._finished = True
            if self.journal.exists():  # the earlier run ended between its last rename and this line
                self.journal.unlink(missing_ok=True)
            return
        self._require_replaceable(finished, job)
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._journal = Journal(self.journal, job, fresh=self._fresh)
            if self._fresh and self.staging.exists():
                shutil.rmtree(self.staging)
            self.staging.mkdir(exist_ok=True)
            self._entries = self._verified(sizes)
            self._discard_leftovers()
            self._require_space(sum(sizes.values()) - sum(entry.nbytes for entry in self._entries.values()))
        except BaseException as error:
            self.close()
            if isinstance(error, MsoError) or not isinstance(error, OSError):
                raise
            raise SinkError(
                f"{self._target.parent}: cannot be written: {error.strerror}; choose another folder"
            ) from error

    def _require_replaceable(self, finished: str | None, job: str) -> None:
        """Refuse a place that the finished folder could not be renamed to."""
        if self.staging.is_symlink():
            raise SinkError(f"{self.staging}: must be a folder of this tool, found a link; remove it")
        if os.path.ismount(self._target):
            raise SinkError(
                f"{self.path}: is a mount point, the output must be a folder that a finished one can replace; "
                "give a folder inside it"
            )
        if not self._target.exists() or (self._target.is_dir() and not any(self._target.iterdir())):
            return
        if not self._target.is_dir():
            raise SinkError(f"{self.path}: is a file, the output must be a new or empty folder; choose another name")
        if finished is None:
            raise SinkError(
                f"{self.path}: the output must be a new or empty folder, found files that are not of this tool "
                f"(no {MANIFEST}); choose another folder"
            )
        if not self._fresh:
            raise SinkError(
                f"{self.path}: holds a finished run with another source or other settings (job {finished[:12]}, "
                f"this one is {job[:12]}); choose another folder, or replace it with --fresh"
            )
        listed = set(json.loads((self._target / MANIFEST).read_bytes()).get("files", ())) | {MANIFEST}
        found = {path.relative_to(self._target).as_posix() for path in self._target.rglob("*") if not path.is_dir()}
        if found - listed:
            raise SinkError(
                f"{self.path}: --fresh replaces what this tool wrote, and {min(found - listed)} is not of it; "
                "move it away"
            )

    def _finished_entries(self, sizes: Mapping[str, int]) -> dict[str, Entry]:
        """Files of a finished output by its manifest; SinkError when one is missing or has another size."""
        try:
            files = json.loads((self._target / MANIFEST).read_bytes())["files"]
            entries = {name: Entry(files[name]["nbytes"], files[name]["sha256"]) for name in sizes}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SinkError(
                f"{self.path / MANIFEST}: must list all {len(sizes)} files of the output, it does not ({error!r}); "
                "start over with --fresh"
            ) from error
        for name, entry in entries.items():
            path = self._target / name
            found = f"{path.stat().st_size:,}" if path.is_file() else "none"
            if found == f"{entry.nbytes:,}" and self._sha256(path) == entry.sha256:
                continue
            what = "others" if found == f"{entry.nbytes:,}" else found
            raise SinkError(
                f"{self.path / name}: the finished output had {entry.nbytes:,} bytes there, found {what}; "
                "restore it, or start over with --fresh"
            )
        return entries

    def _verified(self, sizes: Mapping[str, int]) -> dict[str, Entry]:
        """Journal entries whose file holds what the journal says: size first, then every byte."""
        done = {}
        for name, entry in self._open_journal.files.items():
            path = self.staging / name
            whole = name in sizes and path.is_file() and path.stat().st_size == entry.nbytes == sizes[name]
            if whole and self._sha256(path) == entry.sha256:
                done[name] = entry
        return done

    def _sha256(self, path: Path) -> str:
        """Of a file of an earlier run; a large output takes minutes, so abort() ends it."""
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                if self._aborted.is_set():
                    raise SinkError(f"{path}: stopped while the work of an earlier run was checked; run it again")
                digest.update(chunk)
        return digest.hexdigest()

    def _discard_leftovers(self) -> None:
        """What is not known to be complete must neither be published nor fill the disk."""
        for path in sorted(self.staging.rglob("*"), reverse=True):
            if not path.is_dir():
                if path.relative_to(self.staging).as_posix() not in self._entries:
                    path.unlink()
            elif not any(path.iterdir()):
                path.rmdir()

    def _require_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.staging).free
        if free < needed + RESERVE:
            raise SinkError(
                f"{self.path}: needs {needed:,} bytes of free space, the disk has {free:,}; free some or choose "
                "another disk"
            )

    @contextmanager
    def open(self, file: str, nbytes: int) -> Iterator[_HashingFile]:
        """A file of known size; synced, then journaled."""
        journal, path = self._open_journal, self.staging / file
        with _naming(path, nbytes):
            path.parent.mkdir(parents=True, exist_ok=True)
            raw = path.open("wb", buffering=0)
        with raw:
            writer = _HashingFile(path, nbytes, raw)
            yield writer
            if writer.nbytes != nbytes:
                raise SinkError(f"{path}: announced {nbytes:,} bytes, got {writer.nbytes:,}; please report this")
            with _naming(path, nbytes):
                os.fsync(raw.fileno())
        entry = Entry(nbytes, writer.sha.hexdigest())
        with _naming(self.journal, nbytes):
            journal.done(file, entry)
        self._entries[file] = entry

    def copy(self, file: str, origin: Origin, remote: RemoteFile) -> bool:
        """Never: a folder has to get the bytes."""
        return False

    def wait(self) -> None:
        """Nothing to wait for: a file is stored when its context ends."""

    def note(self, key: str, value: float) -> None:
        """Remember a number in the journal."""
        journal = self._open_journal
        with _naming(self.journal, len(key)):
            journal.note(key, value)

    def commit(self, manifest: bytes, closing: Mapping[str, bytes] = EMPTY) -> None:
        """Rename the finished folder into place; nothing to do where it already is."""
        if self._journal is None:
            return
        for name, entry in self._entries.items():
            path = self.staging / name
            if not path.is_file() or path.stat().st_size != entry.nbytes:
                raise SinkError(f"{path}: {entry.nbytes:,} bytes were written, they are gone; run it again")
        try:
            for name, data in {**closing, MANIFEST: manifest}.items():
                with (self.staging / name).open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            for folder in {path.parent for path in self.staging.rglob("*")}:
                sync_folder(folder)
            if self._fresh and self._target.exists():  # begin() made sure that it is ours or empty
                if self._retired.exists():  # a run that ended between its renames and its clearing up
                    shutil.rmtree(self._retired)
                self._target.rename(self._retired)
            self.staging.rename(self._target)
            sync_folder(self._target.parent)
            self.journal.unlink(missing_ok=True)
            if self._retired.exists():
                shutil.rmtree(self._retired)
        except OSError as error:
            raise SinkError(
                f"{self.path}: the finished folder {self.staging} could not be renamed to it: {error.strerror}; "
                "clear the way, then run the same command"
            ) from error
        finally:
            self.close()

    def abort(self) -> None:
        """Stop checking what an earlier run left; nothing is on its way to another machine."""
        self._aborted.set()

    def close(self) -> None:
        """Release the lock; what is journaled stays for the next run, a run that completed nothing leaves no trace."""
        journal, self._journal = self._journal, None
        if journal is None:
            return
        if not journal.files and not journal.notes:
            shutil.rmtree(self.staging, ignore_errors=True)
            self.journal.unlink(missing_ok=True)
        journal.close()
