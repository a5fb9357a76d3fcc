"""A file in memory: what must be known as a whole before it is sent, without a byte on a disk."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import IO

from mso_hub.errors import SinkError

BLOCK = 1 << 20
"""Bytes handed out at a time."""
SHARED = Path("/dev/shm")  # noqa: S108 - memory, and the file there has no name


class MemoryFile:
    """Anonymous memory with a file's interface; the kernel frees it with the process, however that ends."""

    def __init__(self, name: str, nbytes: int) -> None:
        self.nbytes = nbytes
        self._name = name
        self._file = self._opened()
        self._lock = threading.Lock()  # a descriptor closed under a read could be another file's by then

    def _opened(self) -> IO[bytes]:
        if hasattr(os, "memfd_create"):
            return FileIO(os.memfd_create("mso_hub", os.MFD_CLOEXEC), "r+")
        if SHARED.is_dir():
            return tempfile.TemporaryFile(dir=SHARED, buffering=0)
        raise SinkError(
            f"{self._name}: without Xet a file of {self.nbytes:,} bytes waits in anonymous memory, and this system "
            "has neither memfd_create nor /dev/shm; install hf_xet, or convert into a folder"
        )

    def write(self, data: bytes) -> None:
        """Append bytes."""
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise SinkError(
                f"{self._name}: needs {self.nbytes:,} bytes of memory until it is sent: {error.strerror}; use smaller "
                "shards, or Xet, which streams"
            ) from error

    def blocks(self, begin: int, end: int) -> Iterator[bytes]:
        """Bytes [begin, end), a block at a time; any thread, any number of times. SinkError after close()."""
        for at in range(begin, end, BLOCK):
            with self._lock:
                if self._file.closed:
                    raise SinkError(f"{self._name}: was given up before all of its {self.nbytes:,} bytes were sent")
                data = os.pread(self._file.fileno(), min(BLOCK, end - at), at)
            yield data

    def close(self) -> None:
        """Free the memory; from any thread, more than once."""
        with self._lock:
            self._file.close()
