"""A data set that was opened: its columns are known, its rows come in an order that the seed alone decides."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mso_hub.calibrate.text.settings import DataSet
from mso_hub.errors import RecipeError

Row = Mapping[str, Any]
SLICE = re.compile(r"(\w[\w.-]*)(?:\[((?:\d+%?)?):((?:\d+%?)?)\])?")


@dataclass(frozen=True, slots=True)
class Split:
    """`test[10%:200]`: base "test", first "10%", last "200"; "" for an end that is not given."""

    base: str
    first: str
    last: str

    def bounds(self, count: int) -> tuple[int, int]:
        """(first, end) among `count` rows."""

        def place(text: str, default: int) -> int:
            """One end."""
            if not text:
                return default
            return min(count, int(text[:-1]) * count // 100 if text.endswith("%") else int(text))

        first = place(self.first, 0)
        return first, max(first, place(self.last, count))


def parse_split(name: str, split: str) -> Split:
    """RecipeError for what is no name of a split with one slice at most."""
    found = SLICE.fullmatch(split)
    if found is None:
        raise RecipeError(
            f"{name}: split must be a name, with one slice at most, like train or train[:1000], got {split!r}"
        )
    return Split(found[1], found[2] or "", found[3] or "")


@dataclass(frozen=True, slots=True)
class Opened:
    """Rows of one data set.

    name     for people: what was read, with the commit or the hash where there is one
    columns  names of the columns, of the first row where rows differ
    rows     (seed, columns wanted, rows wanted) -> rows shuffled by the seed; more follow when more are taken
    notes    sentences that the user should read
    """

    name: str
    columns: tuple[str, ...]
    rows: Callable[[int, tuple[str, ...], int], Iterator[Row]]
    notes: tuple[str, ...] = ()


def label(dataset: DataSet) -> str:
    """What reports call a data set on this machine."""
    return (dataset.name or dataset.path) + ("" if dataset.split == "train" else f" ({dataset.split})")


def shuffled(count: int, seed: int) -> Iterator[int]:
    """0 ... count-1 in random order, a number at a time: taking few of many costs little (Fisher-Yates).

    Uses random.Random(seed).randrange only, whose numbers are the same in Python 3.10 to 3.13.
    """
    numbers = random.Random(seed)  # noqa: S311 - an order, no secret
    moved: dict[int, int] = {}
    for at in range(count):
        other = numbers.randrange(at, count)
        yield moved.get(other, other)
        moved[other] = moved.pop(at, at)


def in_window(rows: Iterable[Row], seed: int, window: int) -> Iterator[Row]:
    """A stream of rows, shuffled within a window: one of the `window` rows held is given for each that comes."""
    numbers = random.Random(seed)  # noqa: S311 - an order, no secret
    held: list[Row] = []
    for row in rows:
        if len(held) < window:
            held.append(row)
            continue
        at = numbers.randrange(window)
        yield held[at]
        held[at] = row
    for at in shuffled(len(held), seed):
        yield held[at]


def from_rows(name: str, columns: tuple[str, ...], rows: Sequence[Row], split: str = "train") -> Opened:
    """Rows that can be picked by number, and that have one split, train -> Opened; `split` may slice them."""
    part = parse_split(name, split)
    if part.base != "train":
        raise RecipeError(f"{name}: has one split, train, got {split!r}; slices are train[:1000] and train[10%:20%]")
    first, last = part.bounds(len(rows))

    def in_order(seed: int, _wanted: tuple[str, ...], _needed: int) -> Iterator[Row]:
        """Rows of the slice, shuffled."""
        return (rows[first + at] for at in shuffled(last - first, seed))

    return Opened(name, columns, in_order)
