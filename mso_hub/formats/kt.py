"""kt-int4 and kt-int8: routed experts for the processors of a KTransformers server.

    w ~= code * scale[row]          one scale a row; with several NUMA nodes one a row and node

Codes are I8 or pairs of 4 bits, in the tiles that kt-kernel's AMX and AVX512 kernels read; activations become INT8
while they are multiplied. Names: `dialects/ktransformers.py`. Numerics and tiles: `numerics/kt.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mso_hub.checkpoint import Array, TensorInfo
from mso_hub.errors import RecipeError
from mso_hub.formats.dialects.ktransformers import LAYOUT
from mso_hub.formats.scheme import Format

KT_FORMATS = {"kt-int4": "INT4", "kt-int8": "INT8"}
"""Name of a format -> what kt-kernel calls it."""
ROWS = {8: 64, 4: 128}
"""Bits -> rows of a block of tiles, as `numerics/kt.py` has them."""
COLUMNS = {8: 64, 4: 128}
"""Bits -> columns of a part must be a multiple."""
STEP = 32
"""Rows of a part must be a multiple."""


@dataclass(frozen=True, slots=True)
class Kt(Format):
    """Encoder of one matrix, or of those of its rows that belong to one NUMA node.

    name   kt-int4 or kt-int8
    parts  stretches of columns that are written one by one: NUMA nodes of a down projection, 1 for the others
    first  number of the first part
    """

    name: str
    parts: int = 1
    first: int = 0
    layout: str = LAYOUT
    search: str = "absmax"

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 4 if self.name == "kt-int4" else 8

    @property
    def activations(self) -> int:
        """kt-kernel rounds them to INT8, row by row."""
        return 8

    @property
    def row_step(self) -> int:
        """Rows of a block of tiles."""
        return ROWS[self.bits]

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be stored, or None."""
        if len(shape) != 2 or 0 in shape:
            return f"{self.name} needs a matrix, got shape {list(shape)}"
        rows, columns = shape
        multiple = COLUMNS[self.bits]
        if rows % STEP or columns % (self.parts * multiple):
            return (
                f"{self.name} needs rows that are a multiple of {STEP} and columns that are one of "
                f"{self.parts * multiple}, got shape {list(shape)}"
            )
        return None

    def outputs(self, module: str, shape: tuple[int, ...], dtype: str) -> tuple[TensorInfo, ...]:
        """Codes I8 and scales F32 of each part, both in one dimension."""
        rows, columns = shape
        nbytes = rows * columns // self.parts * self.bits // 8
        found: list[TensorInfo] = []
        for part in range(self.first, self.first + self.parts):
            found.append(TensorInfo(f"{module}.numa.{part}.weight", "I8", (nbytes,)))
            found.append(TensorInfo(f"{module}.numa.{part}.scale", "F32", (rows,)))
        return tuple(found)

    def encode(self, values: Array, dtype: str, dense: str, amax: float) -> tuple[Array, ...]:
        """Codes and scales of some rows, part by part."""
        from mso_hub.formats.numerics import kt

        return kt.encode(values, dtype, bits=self.bits, parts=self.parts)

    def decode(self, arrays: tuple[Array, ...], columns: int, dense: str, amax: float) -> Array:
        """F32 [r, K]."""
        import numpy as np

        from mso_hub.formats.numerics import kt

        pairs = zip(arrays[::2], arrays[1::2], strict=True)
        width = columns // self.parts
        return np.concatenate([kt.decode(codes, scale, width, bits=self.bits) for codes, scale in pairs], axis=1)

    @property
    def group(self) -> Mapping[str, Any]:
        """compressed-tensors has no name for it."""
        raise RecipeError(f"{self.name} has no name in compressed-tensors, got {self.layout!r}")
