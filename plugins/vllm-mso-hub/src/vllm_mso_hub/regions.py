"""Which bytes of one storage were touched: exact, whatever overlaps and however it is strided.

A view is a run of bytes repeated along outer strides. Runs alone are merged intervals. Strided views are boxes in a
mixed-radix system whose radices are the strides themselves (a column block of a matrix is rows x columns), and the
union of boxes is counted on the grid of their corners. Views whose strides do not divide one another are marked in a
mask of the storage instead. Memory grows with the number of different views, not with their elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise, product

import numpy as np

_Box = tuple[tuple[int, int], ...]  # [low, high) of each digit, lowest digit first
_Grid = tuple[int, int, tuple[tuple[int, int], ...]]  # byte offset, bytes of a run, ((stride, times), ...) ascending

_RUNS_BEFORE_MERGE = 64


class Regions:
    """The touched bytes of a storage of `size` bytes, relative to its own start."""

    __slots__ = ("_grids", "_limit", "_runs", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self._runs: list[tuple[int, int]] = []
        self._grids: set[_Grid] = set()
        self._limit = _RUNS_BEFORE_MERGE

    def add(self, offset: int, shape: Sequence[int], strides: Sequence[int], itemsize: int) -> None:
        """Mark a view: `offset` in bytes, `strides` in elements (as torch counts them)."""
        if 0 in shape:
            return
        run, outer = itemsize, list[tuple[int, int]]()
        for stride, times in sorted((s * itemsize, n) for n, s in zip(shape, strides, strict=True) if n > 1 and s):
            if not outer and stride == run:
                run *= times
            elif outer and stride == outer[-1][0] * outer[-1][1]:
                outer[-1] = (outer[-1][0], outer[-1][1] * times)
            else:
                outer.append((stride, times))
        if outer:
            self._grids.add((offset, run, tuple(outer)))
        else:
            self.add_run(offset, offset + run)

    def add_run(self, start: int, end: int) -> None:
        """Mark the bytes [start, end)."""
        if self._runs and self._runs[-1][0] <= start <= self._runs[-1][1]:
            self._runs[-1] = (self._runs[-1][0], max(end, self._runs[-1][1]))
            return
        self._runs.append((start, end))
        if len(self._runs) > self._limit:
            self._runs = _merged(self._runs)
            self._limit = max(_RUNS_BEFORE_MERGE, 2 * len(self._runs))

    def update(self, other: Regions) -> None:
        """Mark what another set marks in a storage of the same layout."""
        self._grids |= other._grids
        for start, end in other._runs:
            self.add_run(start, end)

    def count(self) -> int:
        """Bytes touched at least once."""
        self._runs = _merged(self._runs)
        if not self._grids:
            return sum(end - start for start, end in self._runs)
        if self._runs == [(0, self.size)]:
            return self.size
        radices = sorted({stride for _, _, outer in self._grids for stride, _ in outer})
        if all(large % small == 0 for small, large in pairwise(radices)):
            boxes = [box for start, end in self._runs for box in _interval_boxes(start, end, radices)]
            for grid in self._grids:
                found = _grid_boxes(grid, radices)
                if found is None:
                    return self._count_in_mask()
                boxes += found
            return _volume(boxes, radices)
        return self._count_in_mask()

    def _count_in_mask(self) -> int:
        unit = self.size
        for offset, run, outer in self._grids:
            unit = math.gcd(unit, offset, run, *(stride for stride, _ in outer))
        unit = math.gcd(unit, *(edge for edges in self._runs for edge in edges))
        mask = np.zeros(self.size // unit, np.bool_)
        for start, end in self._runs:
            mask[start // unit : end // unit] = True
        for offset, run, outer in self._grids:
            shape = (*(times for _, times in outer), run // unit)
            strides = (*(stride // unit for stride, _ in outer), 1)
            np.lib.stride_tricks.as_strided(mask[offset // unit :], shape, strides)[...] = True
        return int(mask.sum()) * unit


def _merged(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(runs):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _interval_boxes(start: int, end: int, radices: Sequence[int]) -> list[_Box]:
    """[start, end) of numbers whose digits have the weights 1, *radices, as at most 2 * len(radices) + 1 boxes."""
    if not radices:
        return [((start, end),)]
    *lower, top = radices
    first, low = divmod(start, top)
    last, high = divmod(end, top)
    if first == last:
        return [(*box, (first, first + 1)) for box in _interval_boxes(low, high, lower)]
    boxes: list[_Box] = []
    if low:
        boxes += [(*box, (first, first + 1)) for box in _interval_boxes(low, top, lower)]
        first += 1
    if first < last:
        full = tuple((0, large // small) for small, large in pairwise((1, *radices)))
        boxes.append((*full, (first, last)))
    if high:
        boxes += [(*box, (last, last + 1)) for box in _interval_boxes(0, high, lower)]
    return boxes


def _grid_boxes(grid: _Grid, radices: Sequence[int]) -> list[_Box] | None:
    """A strided view as boxes; None when it runs over the end of one of its own strides."""
    offset, run, outer = grid
    levels = [(1, run), *outer]
    parts: list[list[_Box]] = []
    for level, (weight, times) in enumerate(levels):
        above = levels[level + 1][0] if level + 1 < len(levels) else None
        start = (offset if above is None else offset % above) // weight
        if above is not None and start + times > above // weight:
            return None
        inside = [radix // weight for radix in radices if radix > weight and (above is None or radix < above)]
        parts.append(_interval_boxes(start, start + times, inside))
    return [tuple(digit for part in parts_of_box for digit in part) for parts_of_box in product(*parts)]


def _volume(boxes: Sequence[_Box], radices: Sequence[int]) -> int:
    """Number of points in the union of boxes: cells between neighbouring corners, marked once each."""
    edges = [sorted({edge for box in boxes for edge in box[digit]}) for digit in range(len(radices) + 1)]
    index = [{edge: place for place, edge in enumerate(of_digit)} for of_digit in edges]
    marked = np.zeros([len(of_digit) - 1 for of_digit in edges], np.bool_)
    for box in boxes:
        marked[tuple(slice(at[low], at[high]) for at, (low, high) in zip(index, box, strict=True))] = True
    cells: np.ndarray = marked.astype(np.int64)
    for of_digit in reversed(edges):
        cells = cells @ np.diff(np.array(of_digit, np.int64))
    return int(cells)
