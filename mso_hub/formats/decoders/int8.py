"""Integer weights that are not packed into words: one code a byte, or ModelOpt's two rows in a byte.

    w = (code - zero_point) * scale     one scale a tensor, a row or a group of columns

compressed-tensors calls them int-quantized or naive-quantized, ModelOpt W8A16, W8A8_SQ_PER_CHANNEL and W4A16_AWQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mso_hub.checkpoint import Array
from mso_hub.formats.decoders.base import Built, Stored, widen_scale
from mso_hub.formats.weight import FLOAT_DTYPES


@dataclass(frozen=True, slots=True)
class IntegerDecoder:
    """Reads codes of a byte; the parts carry the roles `codes`, `scale` and perhaps `zero_point`.

    bits         width of a code; 4-bit codes of compressed-tensors take a byte too
    grid         scales in each direction
    group_size   columns per scale, None for all
    paired       a byte holds the codes of two rows, the even one in the low nibble
    scale_dtype  dtype of the stored scale
    """

    layout: str
    bits: int
    grid: tuple[int, int]
    group_size: int | None
    paired: bool
    scale_dtype: str

    @property
    def name(self) -> str:
        """For reports."""
        kind = "per tensor" if self.grid == (1, 1) else "per channel"
        return f"INT{self.bits} {kind if self.group_size is None else f'groups of {self.group_size}'}"

    @property
    def scheme(self) -> str:
        """int4, int8."""
        return f"int{self.bits}"

    @property
    def row_step(self) -> int:
        """Two rows share a byte, or none."""
        return 2 if self.paired else 1

    def part_rows(self, role: str, start: int, stop: int) -> tuple[int, int] | None:
        """Everything by rows; a single scale as a whole."""
        if role == "codes" and self.paired:
            return start // 2, -(-stop // 2)
        return None if role != "codes" and self.grid[0] == 1 else (start, stop)

    def decode(self, parts: Mapping[str, Array], start: int, stop: int, dtype: str) -> Array:
        """Rows in `dtype`, (code - zero_point) * scale in fp32, rounded once."""
        from mso_hub.formats.numerics import integer

        codes = unpair(parts["codes"]) if self.paired else parts["codes"]
        shape = (len(codes), self.grid[1])
        scale = np.ascontiguousarray(
            np.broadcast_to(widen_scale(parts["scale"], self.scale_dtype).reshape(-1, self.grid[1]), shape)
        )
        zero_point = parts.get("zero_point")
        if zero_point is not None:
            zero_point = np.ascontiguousarray(np.broadcast_to(zero_point.reshape(-1, self.grid[1]), shape))
        return integer.decode_int8(codes, scale, zero_point, group_size=self.group_size, dtype=dtype)


def unpair(pairs: Array) -> Array:
    """uint8 [N/2, K], two rows in a byte -> int8 [N, K], two's complement.

    Source: ModelOpt 0.47 pack_int4_in_uint8.
    """
    codes = np.empty((2 * pairs.shape[0], pairs.shape[1]), np.int8)
    np.right_shift(np.left_shift(pairs, 4).view(np.int8), 4, out=codes[0::2])
    np.right_shift(pairs.view(np.int8), 4, out=codes[1::2])
    return codes


def _integer(stored: Stored, shape: tuple[int, int], bits: int, *, paired: bool) -> Built:
    scale, zero = stored.parts["scale"], stored.parts.get("zero_point")
    if scale.dtype not in FLOAT_DTYPES:
        raise stored.refuse(f"integers need scales of {', '.join(FLOAT_DTYPES)}")
    grid, cell = stored.scale_cell(shape)
    if grid != (1, 1) and grid[0] != shape[0]:
        raise stored.refuse("needs one scale a tensor, a row or a group of columns of a row")
    if zero is not None and (zero.dtype != "I8" or zero.shape != scale.shape):
        raise stored.refuse("needs zero points I8, as many as scales")
    if zero is None and stored.said.symmetric is False:
        raise stored.contradiction("asymmetric, weight_zero_point is missing")
    group = cell[1] if grid[1] > 1 else None
    layout = "modelopt" if stored.said.method == "modelopt" or paired else "compressed-tensors"
    return IntegerDecoder(layout, bits, grid, group, paired, scale.dtype), shape


def int8(stored: Stored) -> Built:
    """`weight` I8 with `weight_scale`, perhaps `weight_zero_point`."""
    said = stored.said.bits
    return _integer(stored, stored.matrix(), said if said is not None and 2 <= said < 8 else 8, paired=False)


def int4_pairs(stored: Stored) -> Built:
    """ModelOpt's INT4: `weight` U8 [N/2, K], `weight_scale` [N, K/g]."""
    half, columns = stored.matrix()
    scale = stored.parts["scale"].shape
    if scale[:1] != (2 * half,):
        raise stored.refuse("ModelOpt INT4 needs codes U8 [N/2, K] and scales [N, K/g]")
    return _integer(stored, (2 * half, columns), 4, paired=True)
