"""Some rows of a weight as a weight of its own, whatever it is stored as: what one NUMA node gets of gate and up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mso_hub.checkpoint import Array, TensorInfo
from mso_hub.formats.weight import Decoder, Weight, row_range


@dataclass(frozen=True, slots=True)
class RowsOf:
    """A decoder whose first row is another decoder's row `first`.

    begins  role -> first-dimension index of the stored part at which the view's own part begins
    """

    whole: Decoder
    first: int
    begins: Mapping[str, int]

    @property
    def name(self) -> str:
        """The decoder's."""
        return self.whole.name

    @property
    def scheme(self) -> str:
        """The decoder's."""
        return self.whole.scheme

    @property
    def bits(self) -> int:
        """The decoder's."""
        return self.whole.bits

    @property
    def layout(self) -> str:
        """The decoder's."""
        return self.whole.layout

    @property
    def row_step(self) -> int:
        """Any row, by reading those before it that must come along; 0 when rows cannot be split."""
        return min(1, self.whole.row_step)

    def _start(self, start: int) -> int:
        """The row of the whole at which a block that holds row `start` of the view may begin."""
        step = max(1, self.whole.row_step)
        return (self.first + start) // step * step

    def part_rows(self, role: str, start: int, stop: int) -> tuple[int, int] | None:
        """The whole's rows, counted from where the view's part begins."""
        rows = self.whole.part_rows(role, self._start(start), self.first + stop)
        begin = self.begins.get(role, 0)
        return None if rows is None else (rows[0] - begin, rows[1] - begin)

    def decode(self, parts: Mapping[str, Array], start: int, stop: int, dtype: str) -> Array:
        """Rows [start, stop) of the view."""
        first = self._start(start)
        return self.whole.decode(parts, first, self.first + stop, dtype)[self.first + start - first :]


def rows_of(weight: Weight, first: int, last: int, name: str) -> Weight:
    """Rows [first, last) of a matrix under a name; no byte is read for it but those that it needs."""
    shape = (last - first, *weight.shape[1:])
    if weight.decoder is None:
        return Weight(name, weight.dtype, shape, {"weight": _cut(weight.home, (first, last))})
    step = max(1, weight.decoder.row_step)
    ranges = {role: weight.decoder.part_rows(role, first // step * step, last) for role in weight.parts}
    parts = {role: info if ranges[role] is None else _cut(info, ranges[role]) for role, info in weight.parts.items()}
    begins = {role: rows[0] for role, rows in ranges.items() if rows is not None}
    return replace(weight, name=name, shape=shape, parts=parts, decoder=RowsOf(weight.decoder, first, begins))


def _cut(info: TensorInfo, rows: tuple[int, int] | None) -> TensorInfo:
    """A first-dimension range of a stored tensor as a tensor."""
    if rows is None or not info.shape:
        return info
    length = max(0, min(rows[1], info.shape[0]) - rows[0])
    return replace(info, shape=(length, *info.shape[1:]), begin=row_range(info, rows)[0])
