"""FP8 weights: E4M3 codes under one scale a tensor, a row, a group of columns or a block.

    w = e4m3(code) * scale              the scale multiplies in every layout, also where it is called weight_scale_inv

The scale is `weight_scale` (compressed-tensors, ModelOpt), `weight_scale_inv` (DeepSeek-V3) or `scale` (DeepSeek-V4),
F32, BF16, F16, or an E8M0 exponent (DeepSeek-V3.1 and later).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mso_hub.checkpoint import Array
from mso_hub.formats.decoders.base import SCALE_DTYPES, Built, Stored, widen_scale


@dataclass(frozen=True, slots=True)
class Fp8Decoder:
    """Reads FP8 of any layout; the parts carry the roles `codes` and `scale`.

    shape        [N, K]
    grid         scales in each direction
    cell         rows and columns under one scale
    scale_dtype  dtype of the stored scale
    """

    layout: str
    shape: tuple[int, int]
    grid: tuple[int, int]
    cell: tuple[int, int]
    scale_dtype: str

    @property
    def name(self) -> str:
        """For reports."""
        if self.grid == (1, 1):
            return "FP8 per tensor"
        if self.cell == (1, self.shape[1]):
            return "FP8 per channel"
        return f"FP8 groups of {self.cell[1]}" if self.cell[0] == 1 else f"FP8 {self.cell[0]}x{self.cell[1]} blocks"

    @property
    def scheme(self) -> str:
        """E4M3."""
        return "fp8"

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 8

    @property
    def row_step(self) -> int:
        """Any row: a row that starts inside a block takes that block's scales along."""
        return 1

    def part_rows(self, role: str, start: int, stop: int) -> tuple[int, int] | None:
        """Codes by rows, scales by blocks of rows; a single scale as a whole."""
        if role == "codes":
            return start, stop
        return None if self.grid[0] == 1 else (start // self.cell[0], math.ceil(stop / self.cell[0]))

    def decode(self, parts: Mapping[str, Array], start: int, stop: int, dtype: str) -> Array:
        """Rows in `dtype`, e4m3 * scale in fp32, rounded once."""
        from mso_hub.formats.numerics import fp8

        scale = widen_scale(parts["scale"], self.scale_dtype).reshape(-1, self.grid[1])
        rows, columns = self.cell
        if self.grid[0] == 1:
            rows = stop - start
        elif start % rows:
            scale, rows = scale[np.arange(start, stop) // rows - start // rows], 1
        return fp8.decode(parts["codes"], scale, (max(1, rows), columns), dtype)


def fp8(stored: Stored) -> Built:
    """Decoder and shape of one FP8 weight; PlanError for scales that do not fit, CheckpointError against the config."""
    shape = stored.matrix()
    scale = stored.parts["scale"]
    if scale.dtype not in SCALE_DTYPES:
        raise stored.refuse(f"FP8 needs scales of {', '.join(SCALE_DTYPES)}")
    grid, cell = stored.scale_cell(shape)
    if not scale.name.endswith("weight_scale"):
        layout = "deepseek"
    else:
        layout = "modelopt" if stored.said.method == "modelopt" or len(scale.shape) == 4 else "compressed-tensors"
    return Fp8Decoder(layout, shape, grid, cell, scale.dtype), shape
