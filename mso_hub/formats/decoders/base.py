"""What every reader of a packed weight shares: the stored tensors of one module, and blocks that are rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mso_hub.checkpoint import Array, TensorInfo
from mso_hub.errors import CheckpointError, PlanError
from mso_hub.formats.decoders.announced import Announced
from mso_hub.formats.weight import FLOAT_DTYPES, Decoder, Reader, read_rows

ReadShape = Callable[[TensorInfo], tuple[int, int]]
"""Reads a weight_shape tensor: two integers."""
Built = tuple[Decoder, tuple[int, ...]]
"""A decoder and the logical shape of what it decodes."""
POWERS = ("U8", "F8_E8M0")
"""Dtypes of a scale that is an E8M0 exponent."""


def shape_reader(read: Reader) -> ReadShape:
    """Reads weight_shape tensors of either dtype, I32 or I64, through Source.read."""

    def read_shape(info: TensorInfo) -> tuple[int, int]:
        """[N, K] as stored."""
        rows, columns = read_rows(read, info).reshape(-1).tolist()
        return rows, columns

    return read_shape


@dataclass(frozen=True, slots=True)
class Stored:
    """Tensors of one packed module, by role, with what the config says of it."""

    module: str
    parts: Mapping[str, TensorInfo]
    said: Announced
    read_shape: ReadShape

    @property
    def found(self) -> str:
        """For messages: every tensor with its dtype and shape."""
        leaf = len(self.module.rpartition(".")[0])
        return ", ".join(f"{t.name[leaf:].lstrip('.')} {t.dtype} {list(t.shape)}" for t in self.parts.values())

    def refuse(self, needed: str) -> PlanError:
        """The error for tensors of a layout that have other shapes or dtypes than the layout."""
        return PlanError(f"{self.module}: {needed}, got {self.found}; there is no decoder for that")

    def contradiction(self, claim: str) -> CheckpointError:
        """The error for a config that says something else than the tensors."""
        return CheckpointError(
            f"{self.module}: config.json says {claim} ({self.said.text}), stored are {self.found}; restore the "
            "config.json that belongs to these weights"
        )

    def matrix(self, role: str = "codes") -> tuple[int, int]:
        """Rows and columns of a part; refused when it is no matrix or has no elements."""
        shape = self.parts[role].shape
        if len(shape) != 2 or 0 in shape:
            raise self.refuse("needs a matrix that is not empty")
        return shape[0], shape[1]

    def scale_cell(self, shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """How many scales there are in each direction, and how many rows and columns one of them covers.

        Known are one scale, one a row ([N] or [N, 1]), and a matrix of scales ([a, b] or ModelOpt's [a, 1, b, 1]).
        The config says how large a cell is; where it does not, the only size that makes this many cells.
        """
        rows, columns = shape
        stored = self.parts["scale"].shape
        if len(stored) == 4 and stored[1] == stored[3] == 1:
            stored = (stored[0], stored[2])
        if math.prod(stored) == 1:
            grid = (1, 1)
        elif stored in ((rows,), (rows, 1)):
            grid = (rows, 1)
        elif len(stored) == 2 and 0 < stored[0] <= rows and 0 < stored[1] <= columns:
            grid = (stored[0], stored[1])
        else:
            raise self.refuse(f"needs one scale, {rows} scales or a matrix of them for {rows} x {columns} codes")
        cell = self._said_cell(shape)
        if cell is None:
            return grid, (self._size(rows, grid[0]), self._size(columns, grid[1]))
        if grid != (math.ceil(rows / cell[0]), math.ceil(columns / cell[1])):
            raise self.contradiction(f"one scale for {cell[0]} x {cell[1]}")
        return grid, cell

    def _said_cell(self, shape: tuple[int, int]) -> tuple[int, int] | None:
        rows, columns = shape
        group = self.said.group_size
        if self.said.strategy == "group" and group is not None and group > 0:
            return 1, group
        cells = {"tensor": (rows, columns), "channel": (1, columns), "block": self.said.cell}
        return cells.get(self.said.strategy)

    def _size(self, length: int, count: int) -> int:
        """Length of a cell when `count` of them cover `length`: a power of two, or an exact part."""
        exact, rest = divmod(length, count)
        if count == 1 or (rest == 0 and exact.bit_count() == 1):
            return exact
        powers = [1 << at for at in range(length.bit_length() + 1)]
        fitting = {size for size in powers if math.ceil(length / size) == count} | ({exact} if rest == 0 else set())
        if not fitting:
            raise self.refuse(f"needs cells of one size, {count} scales cannot cover {length} in that way")
        if len(fitting) > 1:
            sizes = " and ".join(map(str, sorted(fitting)))
            raise self.refuse(
                f"needs a config.json that says how many of {length} each of {count} scales covers, {sizes} both fit"
            )
        return fitting.pop()


class ByRows:
    """A decoder whose parts are all cut where the rows are cut."""

    __slots__ = ()

    @property
    def row_step(self) -> int:
        """Any row may start a block."""
        return 1

    def part_rows(self, role: str, start: int, stop: int) -> tuple[int, int] | None:
        """The same rows of every part."""
        return start, stop


def widen_scale(scale: Array, dtype: str) -> NDArray[np.float32]:
    """Stored scales as float32, exactly: BF16, F16, F32, or E8M0 exponents."""
    from mso_hub.formats.numerics import floats

    if dtype in POWERS:
        return floats.e8m0_to_f32(scale)
    return floats.widen(np.ascontiguousarray(scale), dtype)


SCALE_DTYPES = (*FLOAT_DTYPES, "F8_E8M0")
