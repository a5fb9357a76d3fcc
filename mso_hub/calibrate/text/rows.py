"""Token rows: what calibration and evaluation feed to a model.

Packed (the default): the documents of a data set, joined by the end-of-text token, cut into rows of exactly max_seq_len
tokens, so that every row is full, rows go through the model together, and nothing is padded or masked. Unpacked: one
document a row, cut at max_seq_len; only rows of equal length go together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Share:
    """What one data set gave.

    name       for people
    documents  read and long enough
    dropped    read and left out: shorter than min_token_length, empty, or not of the kind that the formatter reads
    rows       used
    tokens     in these rows
    """

    name: str
    documents: int
    dropped: int
    rows: int
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Text as token ids.

    name        for people: the data sets
    sequences   I64 [length] each, in the order in which they are fed
    sha256      of the ids: for every row its length and its ids, as little-endian 64-bit integers
    shares      what each data set gave
    warnings    sentences that the user should read
    batch_size  rows that go through the model together, at most
    """

    name: str
    sequences: tuple[Ids, ...]
    sha256: str
    shares: tuple[Share, ...]
    warnings: tuple[str, ...]
    batch_size: int

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def ids(self) -> Ids:
        """I64 [rows, length]; ValueError where the rows have different lengths."""
        return np.stack(self.sequences)

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(len(sequence) for sequence in self.sequences)

    def batches(self, size: int | None = None) -> tuple[Ids, ...]:
        """I64 [rows <= size, length] each: rows of equal length together, in their order; batch_size by default.

        There is no padding, so an unpacked text gives many batches of one row.
        """
        at_once = size or self.batch_size
        by_length: dict[int, list[Ids]] = {}
        for sequence in self.sequences:
            by_length.setdefault(len(sequence), []).append(sequence)
        return tuple(
            np.stack(found[at : at + at_once]) for found in by_length.values() for at in range(0, len(found), at_once)
        )


def digest(sequences: Sequence[Ids]) -> str:
    """SHA-256 in hex, as Rows.sha256 says."""
    found = hashlib.sha256()
    for sequence in sequences:
        found.update(np.array([len(sequence)], "<i8").tobytes())
        found.update(sequence.astype("<i8").tobytes())
    return found.hexdigest()


def pack(documents: Sequence[Sequence[int]], length: int, start: Sequence[int], end: Sequence[int]) -> Iterator[Ids]:
    """Documents in their order -> full rows, I64 [length] each; what is left at the end is less than a row.

    start  ids at the beginning of every row, also of a row that begins within a document
    end    ids after every document
    """
    stream = np.array([token for ids in documents for token in (*ids, *end)], np.int64)
    take = length - len(start)
    head = np.array(start, np.int64)
    for at in range(0, len(stream) - take + 1, take):
        yield np.concatenate([head, stream[at : at + take]])
