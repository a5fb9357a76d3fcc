"""A repo some of whose tensors are others: everything downstream reads it as if it lay there.

A shard with a changed tensor gets a header of its own; its kept tensors are read from the base, the others come from
another source (packed weights in a work folder) or are computed while they are read (weights times a scale). Nothing
is written. Files without a change, and what a Hub knows of them, are the base's.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from mso_hub.checkpoint import Array, Checkpoint, TensorInfo, build_header
from mso_hub.errors import CheckpointError, MsoError
from mso_hub.hub import Origin, RemoteFile
from mso_hub.source.reads import Job, Range

if TYPE_CHECKING:
    from mso_hub.source import Source

Reader = Callable[[str, int, int], NDArray[np.uint8]]
"""(file, begin, end) -> bytes, as Source.read has it."""


class Part(Protocol):
    """A tensor of a changed shard."""

    @property
    def info(self) -> TensorInfo:
        """Name, dtype and shape that it shows."""

    def ranges(self, begin: int, end: int) -> list[Range]:
        """Reads of the base behind bytes [begin, end) of the tensor."""

    def read(self, base: Reader, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) of the tensor."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor as the base has it; `info` is placed there."""

    info: TensorInfo

    def ranges(self, begin: int, end: int) -> list[Range]:
        """The same bytes."""
        return [(self.info.file, self.info.begin + begin, self.info.begin + end)]

    def read(self, base: Reader, begin: int, end: int) -> NDArray[np.uint8]:
        """The same bytes."""
        return base(*self.ranges(begin, end)[0])


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A tensor in a file of another source.

    info   what it is called here
    place  where it lies there
    """

    info: TensorInfo
    place: TensorInfo
    source: Source

    def ranges(self, begin: int, end: int) -> list[Range]:
        """None of the base."""
        return []

    def read(self, base: Reader, begin: int, end: int) -> NDArray[np.uint8]:
        """From the other source."""
        return self.source.read(self.place.file, self.place.begin + begin, self.place.begin + end)


@dataclass(frozen=True, slots=True)
class Computed:
    """A tensor whose rows are computed from bytes of the base when they are read.

    needs  rows [start, stop) -> reads of the base
    rows   reader, start, stop -> those rows, an array with the bits of the dtype
    step   a block of rows starts at a multiple of this; 0 where rows cannot be split
    """

    info: TensorInfo
    needs: Callable[[int, int], list[Range]]
    rows: Callable[[Reader, int, int], Array]
    step: int = 1

    def _span(self, begin: int, end: int) -> tuple[int, int, int]:
        """First row, one past the last, and bytes of a row, around bytes [begin, end)."""
        count = self.info.shape[0] if self.info.shape else 1
        width = self.info.nbytes // max(1, count)
        step = self.step or count
        return begin // width // step * step, min(count, -(-end // (width * step)) * step), width

    def ranges(self, begin: int, end: int) -> list[Range]:
        """Whole rows."""
        return self.needs(*self._span(begin, end)[:2]) if end > begin else []

    def read(self, base: Reader, begin: int, end: int) -> NDArray[np.uint8]:
        """Computed anew at every read."""
        if end <= begin:
            return np.empty(0, np.uint8)
        start, stop, width = self._span(begin, end)
        raw = np.ascontiguousarray(self.rows(base, start, stop)).reshape(-1).view(np.uint8)
        if raw.nbytes != (stop - start) * width:
            raise MsoError(f"{self.info.name}: {raw.nbytes:,} bytes were computed; please report this")
        return raw[begin - start * width : end - start * width].copy()


@dataclass(frozen=True, slots=True)
class _File:
    """A changed shard: its header, and its parts with the offsets at which they begin."""

    header: bytes
    parts: tuple[Part, ...]
    begins: tuple[int, ...]
    nbytes: int

    @classmethod
    def build(cls, name: str, parts: Sequence[Part], metadata: Mapping[str, str]) -> _File:
        header, placed = build_header([part.info for part in parts], name, metadata)
        return cls(header, tuple(parts), tuple(i.begin for i in placed), len(header) + sum(i.nbytes for i in placed))

    def cut(self, begin: int, end: int) -> Iterator[tuple[Part | None, int, int]]:
        """Bytes [begin, end) part by part, each range relative to its part; None is the header."""
        if begin < len(self.header):
            yield None, begin, min(end, len(self.header))
        at = max(0, bisect.bisect_right(self.begins, begin) - 1)
        while at < len(self.parts) and self.begins[at] < end:
            part, first = self.parts[at], self.begins[at]
            low, high = max(begin, first) - first, min(end, first + part.info.nbytes) - first
            if high > low:
                yield part, low, high
            at += 1


class OverlaySource:
    """A source with other tensors in place of some of the base's; closing it closes the base.

    checkpoint  of the base
    replaced    stored tensor of the base -> what takes its place in the same shard; nothing to leave it out
    files       repo path -> content that stands in place of the base's file
    stamp       of everything that is not the base's
    Raises CheckpointError for a tensor that the base does not have.
    """

    def __init__(
        self, base: Source, checkpoint: Checkpoint, replaced: Mapping[str, Sequence[Part]], files: Mapping[str, bytes],
        stamp: str,
    ) -> None:  # fmt: skip
        known = {info.name for shard in checkpoint.shards.values() for info in shard.tensors}
        if lost := sorted(replaced.keys() - known):
            raise CheckpointError(f"{base.name}: has no tensor {lost[0]!r} that could be replaced; start again")
        self._base, self._stamp = base, stamp
        self._shards: dict[str, _File] = {}
        for name, shard in checkpoint.shards.items():
            if any(info.name in replaced for info in shard.tensors):
                parts = [p for info in shard.tensors for p in replaced.get(info.name, (Kept(info),))]
                self._shards[name] = _File.build(name, parts, shard.metadata)
        self._files = dict(files)
        for group in checkpoint.groups:
            if group.index is not None and any(name in replaced for name in group.indexed):
                raw = base.read(group.index, 0, base.files()[group.index]).tobytes()
                self._files[group.index] = _index(raw, replaced)

    @property
    def name(self) -> str:
        """The base's."""
        return self._base.name

    @property
    def path(self) -> Path | None:
        """The base's folder."""
        return self._base.path

    @property
    def distant(self) -> bool:
        """As the base."""
        return self._base.distant

    @property
    def origin(self) -> Origin | None:
        """As the base."""
        return self._base.origin

    def remote(self, file: str) -> RemoteFile | None:
        """What the Hub knows about a file that is the base's."""
        return None if file in self._shards or file in self._files else self._base.remote(file)

    def files(self) -> dict[str, int]:
        """Repo path -> bytes."""
        found = self._base.files() | {name: len(content) for name, content in self._files.items()}
        return found | {name: shard.nbytes for name, shard in self._shards.items()}

    def stamp(self, file: str) -> str:
        """The base's, with that of the overlay where the file is another."""
        if file in self._files:
            return hashlib.sha256(self._files[file]).hexdigest()
        if file not in self._shards:
            return self._base.stamp(file)
        return hashlib.sha256(f"{self._base.stamp(file)}\0{self._stamp}".encode()).hexdigest()

    def sha256(self, file: str) -> str | None:
        """What the repo vouches for; None for another file."""
        return None if file in self._shards or file in self._files else self._base.sha256(file)

    def expect(self, jobs: Sequence[Job]) -> None:
        """Announce the reads of the base behind these."""
        self._base.expect([Job(job.name, partial(self._behind, job)) for job in jobs])

    def _behind(self, job: Job) -> list[Range]:
        found: list[Range] = []
        for file, begin, end in job.reads():
            if file in self._shards:
                cut = self._shards[file].cut(begin, end)
                found += (r for part, low, high in cut if part is not None for r in part.ranges(low, high))
            elif file not in self._files:
                found.append((file, begin, end))
        return found

    def settle(self, job: str) -> None:
        """As the base."""
        self._base.settle(job)

    def close(self) -> None:
        """Close the base."""
        self._base.close()

    def read(self, file: str, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) of a file."""
        return self._read(self._base.read, file, begin, end)

    def read_apart(self, file: str, begin: int, end: int) -> NDArray[np.uint8]:
        """As `read`, beside the stream of the base."""
        return self._read(self._base.read_apart, file, begin, end)

    def _read(self, base: Reader, file: str, begin: int, end: int) -> NDArray[np.uint8]:
        if file not in self._shards and file not in self._files:
            return base(file, begin, end)
        size = len(self._files[file]) if file in self._files else self._shards[file].nbytes
        if end > size:
            raise CheckpointError(f"{self.name}/{file}: wanted bytes [{begin:,}, {end:,}), there are {size:,}")
        if file in self._files:
            return np.frombuffer(bytearray(self._files[file][begin:end]), np.uint8)
        shard = self._shards[file]
        found = [
            np.frombuffer(bytearray(shard.header[low:high]), np.uint8) if part is None else part.read(base, low, high)
            for part, low, high in shard.cut(begin, end)
        ]
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, np.uint8), *found])


def _index(raw: bytes, replaced: Mapping[str, Sequence[Part]]) -> bytes:
    """The base's index with other names in it; total_size is left out, nobody here reads it."""
    index = json.loads(raw)
    index["weight_map"] = {
        name: shard
        for old, shard in index["weight_map"].items()
        for name in ([part.info.name for part in replaced[old]] if old in replaced else [old])
    }
    if isinstance(index.get("metadata"), dict):
        index["metadata"].pop("total_size", None)
    return json.dumps(index).encode()
