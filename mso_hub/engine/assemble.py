"""Pieces in step order -> files in byte order, on a thread of its own so that writing overlaps arithmetic."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

from mso_hub.checkpoint import Array
from mso_hub.engine.threads import Piece
from mso_hub.errors import MsoError
from mso_hub.plan import ShardPlan

QUEUED = 12
"""Pieces that wait for the disk before the engine has to."""


class _Output(Protocol):
    def write(self, data: bytes | Array) -> None:
        """Append bytes."""


class _Files(Protocol):
    def open(self, file: str, nbytes: int) -> AbstractContextManager[_Output]:
        """A file of known size."""


class _Assembler:
    """One shard at a time: appends what is next in the file, keeps what is not (scales behind their codes)."""

    def __init__(self, files: _Files, settle: Callable[[str], None]) -> None:
        self._files, self._settle = files, settle
        self._stack = ExitStack()
        self._shard: ShardPlan | None = None
        self._stash: dict[str, list[Array]] = {}
        self._names: deque[tuple[str, int]] = deque()
        self._written = 0
        self._failed = False

    def add(self, piece: Piece) -> None:
        """Take a piece; opens its shard when it is the first and closes it when it was the last.

        After an error it takes nothing more: what is behind a gap in the file is of no use.
        """
        if self._failed:
            return
        try:
            self._take(piece)
        except BaseException:
            self._failed = True
            raise

    def _take(self, piece: Piece) -> None:
        if self._shard is None:
            self._begin(piece.shard)
        self._stash.setdefault(piece.info.name, []).append(piece.data)
        self._drain()
        if piece.done and piece.step is piece.shard.steps[-1]:
            self._end()

    def _begin(self, shard: ShardPlan) -> None:
        self._shard = shard
        if shard.apart:
            return
        self._out = self._stack.enter_context(self._files.open(shard.name, shard.nbytes))
        self._out.write(shard.header)
        self._names.extend((info.name, info.nbytes) for info in shard.tensors)

    def _drain(self) -> None:
        while self._names:
            name, nbytes = self._names[0]
            for data in self._stash.pop(name, ()):
                self._out.write(data)
                self._written += data.nbytes
            if self._written < nbytes:
                return
            if self._written > nbytes:
                raise MsoError(f"{name}: planned {nbytes:,} bytes, {self._written:,} came; please report this")
            self._names.popleft()
            self._written = 0

    def _end(self) -> None:
        if self._shard is not None and self._shard.apart:
            self._write_apart(self._shard)
        if self._names:
            name, nbytes = self._names[0]
            raise MsoError(f"{name}: planned {nbytes:,} bytes, {self._written:,} came; please report this")
        if self._shard is not None:
            self._settle(self._shard.name)
        self._shard = None
        self._stack.close()

    def _write_apart(self, shard: ShardPlan) -> None:
        """Every tensor into a file of its own: they are in memory, one weight's at most."""
        self._settle(shard.name)
        self._shard = None
        for info in shard.tensors:
            with self._files.open(info.file, info.nbytes) as out:
                for data in self._stash.pop(info.name):
                    out.write(data)

    def abort(self) -> None:
        """Give the open file up."""
        self._stack.__exit__(*sys.exc_info())


def write_pieces(
    pieces: Iterable[Piece], files: _Files, settle: Callable[[str], None] = lambda _: None,
    abort: Callable[[], None] = lambda: None,
) -> Iterator[Piece]:  # fmt: skip
    """Write every piece and hand it on when its bytes are out (its shard closed, when it was the last).

    settle  called with a shard's name before the shard is closed; what it raises keeps the shard from counting
    abort   called when this ends early, before the writing thread is waited for: it may wait for the network
    Raises what the sink raises; then the shard in hand is given up and earlier ones stay complete. Either way, and
    when the caller closes this generator early, `pieces` is closed too.
    """
    assembler = _Assembler(files, settle)
    pending: deque[tuple[Piece, Future[None]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="mso-write") as thread:
        try:
            for piece in pieces:
                pending.append((piece, thread.submit(assembler.add, piece)))
                while pending and (len(pending) > QUEUED or pending[0][1].done()):
                    written, future = pending.popleft()
                    future.result()
                    yield written
            while pending:
                written, future = pending.popleft()
                future.result()
                yield written
        except BaseException:
            abort()
            thread.shutdown()  # what is queued may be the end of a shard
            assembler.abort()
            raise
        finally:
            if isinstance(pieces, Generator):
                pieces.close()  # its threads end here, not when the last traceback is forgotten
