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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from mso_hub.errors import ResumeError, SinkError
from mso_hub.formats.weight import Array
from mso_hub.sink.journal import Entry, Journal

MANIFEST = "mso_hub.json"
RESERVE = 1 << 20
"""Bytes that must stay free beyond the output: journal, directory entries."""


class _HashingFile:
    """Appends to a file and hashes what it appends."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self.sha = hashlib.sha256()
        self.nbytes = 0

    def write(self, data: bytes | Array) -> None:
        """Append bytes; a short write (full disk) raises."""
        view = memoryview(data if isinstance(data, bytes) else data.data).cast("B")
        self.sha.update(view)
        self.nbytes += len(view)
        while len(view):
            view = view[self._file.write(view) :]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LocalSink:
    """Output folder `path`; nothing is created before `begin`."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        # The link or the ".." in a path must not decide where the partial folder lies.
        self._target = path.parent.resolve() / path.name
        self.staging = self._target.parent / f".{path.name}.mso-partial"
        self.journal = self._target.parent / f".{path.name}.mso-journal"
        self._fresh = fresh
        self._journal: Journal | None = None
        self._entries: dict[str, Entry] = {}

    @property
    def name(self) -> str:
        """The folder as the user gave it."""
        return str(self.path)

    @property
    def notes(self) -> Mapping[str, float]:
        """Numbers of an earlier run of this job."""
        return self._open_journal.notes

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
            manifest = json.loads((self.path / MANIFEST).read_bytes())
        except (OSError, ValueError):
            return None
        return str(manifest.get("job")) if isinstance(manifest, dict) else None

    def begin(self, job: str, sizes: Mapping[str, int]) -> None:
        """Refuse what cannot work, then see what is done; a finished output of the same job is done in full."""
        finished = self.finished_job()
        if finished == job and not self._fresh:
            self.journal.unlink(missing_ok=True)
            self._entries = self._finished_entries(sizes)
            return
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
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
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._journal = Journal(self.journal, job, fresh=self._fresh)
            if self._fresh:
                for folder in (self.staging, self._target):
                    shutil.rmtree(folder, ignore_errors=not folder.exists())
            self.staging.mkdir(exist_ok=True)
        except ResumeError:
            raise
        except OSError as error:
            raise SinkError(
                f"{self._target.parent}: cannot be written: {error.strerror}; choose another folder"
            ) from error
        self._entries = self._verified(sizes)
        self._require_space(sum(sizes.values()) - sum(entry.nbytes for entry in self._entries.values()))

    def _finished_entries(self, sizes: Mapping[str, int]) -> dict[str, Entry]:
        manifest = json.loads((self.path / MANIFEST).read_bytes())
        entries = {name: Entry(e["nbytes"], e["sha256"]) for name, e in manifest["files"].items()}
        for name, entry in entries.items():
            path = self.path / name
            found = path.stat().st_size if path.is_file() else None
            if found != entry.nbytes or name not in sizes:
                raise SinkError(
                    f"{path}: the finished output had {entry.nbytes:,} bytes there, found {found}; "
                    "run `mso-hub verify` on it, or start over with --fresh"
                )
        return entries

    def _verified(self, sizes: Mapping[str, int]) -> dict[str, Entry]:
        """Journal entries whose file holds what the journal says: size first, then every byte."""
        done = {}
        for name, entry in self._open_journal.files.items():
            path = self.staging / name
            whole = name in sizes and path.is_file() and path.stat().st_size == entry.nbytes == sizes[name]
            if whole and _sha256(path) == entry.sha256:
                done[name] = entry
        return done

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
        path = self.staging / file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb", buffering=0) as raw:
                writer = _HashingFile(raw)
                yield writer
                os.fsync(raw.fileno())
        except OSError as error:
            if isinstance(error, SinkError) or error.errno is None:
                raise
            way_out = "free some space, then run the same command" if error.errno == errno.ENOSPC else "run it again"
            raise SinkError(f"{path}: {nbytes:,} bytes could not be written: {error.strerror}; {way_out}") from error
        if writer.nbytes != nbytes:
            raise SinkError(f"{path}: announced {nbytes:,} bytes, got {writer.nbytes:,}; please report this")
        self._entries[file] = Entry(nbytes, writer.sha.hexdigest())
        self._open_journal.done(file, self._entries[file])

    def note(self, key: str, value: float) -> None:
        """Remember a number in the journal."""
        self._open_journal.note(key, value)

    def commit(self, manifest: bytes) -> None:
        """Rename the finished folder into place; nothing to do where it already is."""
        if self._journal is None:
            return
        try:
            with (self.staging / MANIFEST).open("wb") as file:
                file.write(manifest)
                file.flush()
                os.fsync(file.fileno())
            for folder in {path.parent for path in self.staging.rglob("*")}:
                _sync_folder(folder)
            self.staging.rename(self._target)
            _sync_folder(self._target.parent)
            self.journal.unlink()
        except OSError as error:
            raise SinkError(
                f"{self.path}: the finished folder {self.staging} could not be renamed to it: {error.strerror}; "
                "a mount point cannot be the output, give a folder inside it"
            ) from error
        finally:
            self.close()

    def close(self) -> None:
        """Release the lock; what is journaled stays for the next run."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
