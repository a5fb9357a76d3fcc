"""What encoding does to numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mso_hub.checkpoint import Array

SAMPLE = 1 << 18
"""Numbers of a weight that are decoded again to measure what encoding did to them, where a sample is enough."""
WHOLE = 1 << 62
"""The same where every number counts."""
NUMBERS = 1 << 15
"""Numbers that are compared at once: their float64 squares stay in the cache."""


@dataclass(frozen=True, slots=True)
class Distance:
    """What encoding did to some numbers.

    error, energy  sums of squared differences and of squares
    largest        largest difference
    inexact        blocks of 16 columns in which any number differs
    """

    error: float
    energy: float
    largest: float
    inexact: int = 0

    @property
    def nmse(self) -> float:
        """Squared error over squared numbers."""
        return self.error / self.energy if self.energy > 0 else 0.0

    def __add__(self, other: Distance) -> Distance:
        """Both taken together."""
        return Distance(
            self.error + other.error, self.energy + other.energy, max(self.largest, other.largest),
            self.inexact + other.inexact,
        )  # fmt: skip


def distance(values: Array, dtype: str, after: Array) -> Distance:
    """What encoding did to numbers [r, K] held as `dtype`; `after` is F32 of the same shape."""
    error = energy = largest = 0.0
    inexact = 0
    for rows, before in widened(values, dtype):
        difference = after[rows] - before
        error += float(np.square(difference, dtype=np.float64).sum())
        energy += float(np.square(before, dtype=np.float64).sum())
        largest = max(largest, float(np.abs(difference).max(initial=0)))
        if largest > 0:
            changed = np.add.reduceat(difference != 0, np.arange(0, difference.shape[1], 16), axis=1)
            inexact += int(np.count_nonzero(changed))
    return Distance(error, energy, largest, inexact)


def widened(values: Array, dtype: str) -> Iterator[tuple[slice, Array]]:
    """Numbers [r, K] as F32, a few rows at a time."""
    from mso_hub.formats.numerics.floats import widen

    height = max(1, NUMBERS // max(1, values.shape[1]))
    for start in range(0, len(values), height):
        rows = slice(start, start + height)
        yield rows, widen(values[rows], dtype)
