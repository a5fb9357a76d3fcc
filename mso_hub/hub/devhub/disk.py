"""Content on disk: small files by their git id, LFS objects by sha256, Xet files in the local CAS.

FOLDER/blobs/ab/SHA1    content of a small file
FOLDER/lfs/ab/SHA256    an LFS object, there only when it is complete and its digest was checked
FOLDER/cas/             written by Xet clients themselves; we only read it
FOLDER/views/N/         the CAS as the server reads it: links to its content and a copy of its database

Xet locks the database of a CAS for one process, so the server never opens the one that clients use, and two client
processes that transfer at the same moment stop each other.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHUNK = 1 << 20
"""Bytes that are read, sent or received at once."""

ATTEMPTS = 20
"""How often the server looks for a Xet file that a client says it has written, over a second."""

_FILE = struct.Struct("<4Q2I8x")
_SEGMENT = struct.Struct("<32x2I8x")
_DIGEST = struct.Struct("<4Q16x")
_WITH_VERIFICATION, _WITH_METADATA = 0x80000000, 0x40000000
_LAST = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a commit: its bytes, its git id, and the sha256 when it is an LFS or Xet file."""

    size: int
    oid: str
    sha256: str | None = None


def write_whole(path: Path, data: bytes) -> None:
    """A file appears with all its content, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    new.write_bytes(data)
    new.replace(path)


def write_json(path: Path, value: Any) -> None:
    """As `write_whole`, a JSON value."""
    write_whole(path, json.dumps(value, separators=(",", ":")).encode())


def git_oid(data: bytes) -> str:
    """The id that git gives a blob: 40 hex digits."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The text that git stores in place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def pointer_size(entry: Entry) -> int:
    """Bytes of the pointer of an LFS file."""
    return len(lfs_pointer(entry.sha256 or "", entry.size))


class XetIndex:
    """sha256 -> (Xet hash, bytes), read from the shards that Xet clients leave in a local CAS."""

    def __init__(self, cas: Path) -> None:
        self._shards = cas / "xet" / "xorbs" / "shards"
        self._seen: dict[tuple[str, int, int], None] = {}
        self._files: dict[str, tuple[str, int]] = {}

    def find(self, sha256: str) -> tuple[str, int] | None:
        """(Xet hash, bytes) of a file, or None where the CAS does not hold it."""
        if sha256 not in self._files:
            self._refresh()
        return self._files.get(sha256)

    def _refresh(self) -> None:
        if not self._shards.is_dir():
            return
        for path in self._shards.glob("*.mdb"):
            try:
                stat = path.stat()
                key = (path.name, stat.st_size, stat.st_mtime_ns)
                if key not in self._seen:
                    self._files.update(_files_of_shard(path.read_bytes()))
                    self._seen[key] = None
            except (FileNotFoundError, struct.error):  # replaced, or not complete yet: the next look finds it
                continue


def _files_of_shard(data: bytes) -> Iterator[tuple[str, tuple[str, int]]]:
    """(sha256, (Xet hash, bytes)) of the files in one shard; struct.error when it ends too early."""
    at = 48
    while True:
        *words, flags, count = _FILE.unpack_from(data, at)
        if all(word == _LAST for word in words):
            return
        at += 48
        size = sum(_SEGMENT.unpack_from(data, at + 48 * n)[1] for n in range(count))
        at += 48 * count * (2 if flags & _WITH_VERIFICATION else 1)
        if flags & _WITH_METADATA:
            yield _hex(_DIGEST.unpack_from(data, at)), (_hex(words), size)
            at += 48


class _View:
    """The CAS of clients, opened for reading while they may write."""

    def __init__(self, folder: Path) -> None:
        self._cas, self._views = folder / "cas", folder / "views"
        self._lock = threading.Lock()
        self._stamp: tuple[int, int] | None = None
        self._open: Any = None
        shutil.rmtree(self._views, ignore_errors=True)

    def group(self, *, fresh: bool) -> Any:
        """A download group that knows all files; `fresh` when the last one did not."""
        source = self._cas / "xet" / "xorbs" / "global_dedup_lookup.redb"
        with self._lock:
            stat = source.stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            if fresh or stamp != self._stamp:
                view = self._views / uuid.uuid4().hex[:8]
                inside = view / "xet" / "xorbs"
                inside.mkdir(parents=True)
                for part in ("xorbs", "shards"):
                    (inside / part).symlink_to(self._cas / "xet" / "xorbs" / part)
                shutil.copy(source, inside)
                self._open, self._stamp = _download_group(view), stamp
            return self._open


def _download_group(cas: Path) -> Any:
    hf_xet = importlib.import_module("hf_xet")
    # Whoever reads slowly must not make the server prefetch gigabytes.
    limits = {
        "reconstruction.download_buffer_size": 64 << 20,
        "reconstruction.download_buffer_perfile_size": 32 << 20,
        "reconstruction.download_buffer_limit": 128 << 20,
    }
    session = hf_xet.XetSession(config=hf_xet.XetConfig().with_config(limits))
    return session.new_download_stream_group(endpoint=f"local://{cas}")


def _hex(words: Any) -> str:
    return "".join(f"{word:016x}" for word in words)


class Contents:
    """All content of a server."""

    def __init__(self, folder: Path, *, xet: bool) -> None:
        self.folder = folder
        self.cas = folder / "cas"
        self.parts = folder / "parts"
        self.xet = xet
        self._index = XetIndex(self.cas)
        self._view = _View(folder)
        self.parts.mkdir(parents=True, exist_ok=True)
        for name in ("xorbs", "shards"):
            (self.cas / "xet" / "xorbs" / name).mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes) -> Entry:
        """Store a small file."""
        oid = git_oid(data)
        path = self.blob_path(oid)
        if not path.exists():
            write_whole(path, data)
        return Entry(len(data), oid)

    def blob_path(self, oid: str) -> Path:
        """Where a small file lies."""
        return self.folder / "blobs" / oid[:2] / oid

    def lfs_path(self, sha256: str) -> Path:
        """Where an LFS object lies, once it is complete."""
        return self.folder / "lfs" / sha256[:2] / sha256

    def new_part(self) -> Path:
        """A place for an upload on its way."""
        return self.parts / uuid.uuid4().hex

    def accept(self, part: Path, sha256: str) -> None:
        """A finished upload becomes an LFS object."""
        path = self.lfs_path(sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        part.replace(path)

    def xet_hash(self, sha256: str | None) -> str | None:
        """Xet hash of a file, None when it is an LFS object or this server has no Xet."""
        found = self._index.find(sha256) if self.xet and sha256 else None
        return found[0] if found else None

    def size(self, sha256: str) -> int | None:
        """Bytes of an LFS or Xet file, None when there is no such file."""
        path = self.lfs_path(sha256)
        if path.exists():
            return path.stat().st_size
        found = self._index.find(sha256) if self.xet else None
        return found[1] if found else None

    def lfs_entry(self, sha256: str, size: int) -> Entry:
        """Entry of an LFS file; its git id is that of the pointer."""
        return Entry(size, git_oid(lfs_pointer(sha256, size)), sha256)

    def pieces(self, entry: Entry, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop) of a file in chunks; FileNotFoundError when the content is gone."""
        path = self.lfs_path(entry.sha256) if entry.sha256 else self.blob_path(entry.oid)
        if entry.sha256 and self.xet and not path.exists():
            yield from self._xet_pieces(entry, start, stop)
            return
        file = os.open(path, os.O_RDONLY)
        try:
            while start < stop and (data := os.pread(file, min(CHUNK, stop - start), start)):
                start += len(data)
                yield data
        finally:
            os.close(file)

    def _xet_pieces(self, entry: Entry, start: int, stop: int) -> Iterator[bytes]:
        found = self._index.find(entry.sha256 or "")
        if found is None:
            raise FileNotFoundError(f"{self.cas}: holds no file with sha256 {entry.sha256}")
        hf_xet = importlib.import_module("hf_xet")
        for attempt in range(ATTEMPTS):
            try:
                group = self._view.group(fresh=attempt > 0)
                stream = iter(group.download_stream(hf_xet.XetFileInfo(*found), start=start, end=stop))
                first = next(stream, b"")
            except RuntimeError:  # a copy of the database that a client was just changing
                first = b""
            if first or start >= stop:
                yield first
                yield from stream
                return
            time.sleep(0.05)
        raise FileNotFoundError(f"{self.cas}: Xet does not find {found[0]}")

    def read(self, entry: Entry, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of a file at once."""
        return b"".join(self.pieces(entry, start, entry.size if stop is None else min(stop, entry.size)))
