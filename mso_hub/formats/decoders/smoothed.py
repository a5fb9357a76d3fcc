"""Weights behind a smoothing scale: ModelOpt's AWQ and SmoothQuant divide a weight's columns and multiply the input.

    y = quantized(w) @ (x * pre_quant_scale)          so the dense weight is quantized(w) * pre_quant_scale[column]

Source: ModelOpt 0.47, TensorQuantizer.forward. Where ModelOpt folded the scale into the layer before, none is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mso_hub.checkpoint import Array
from mso_hub.formats.decoders.base import Built, Stored, widen_scale
from mso_hub.formats.weight import FLOAT_DTYPES, Decoder

ROLE = "smooth"


@dataclass(frozen=True, slots=True)
class Smoothed:
    """A decoder whose columns are multiplied by the part `smooth`.

    inner  reads everything else
    dtype  of the stored smoothing scale
    """

    inner: Decoder
    dtype: str

    @property
    def name(self) -> str:
        """For reports."""
        return f"{self.inner.name}, smoothed"

    @property
    def scheme(self) -> str:
        """As without smoothing."""
        return self.inner.scheme

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.inner.bits

    @property
    def layout(self) -> str:
        """ModelOpt's."""
        return self.inner.layout

    @property
    def row_step(self) -> int:
        """As without smoothing."""
        return self.inner.row_step

    def part_rows(self, role: str, start: int, stop: int) -> tuple[int, int] | None:
        """The smoothing scale as a whole: it goes by columns."""
        return None if role == ROLE else self.inner.part_rows(role, start, stop)

    def decode(self, parts: Mapping[str, Array], start: int, stop: int, dtype: str) -> Array:
        """Rows in `dtype`: both products in fp32, rounded once."""
        from mso_hub.formats.numerics import floats

        values = self.inner.decode(parts, start, stop, "F32")
        with np.errstate(all="ignore"):  # what is not finite is refused later, by row and column
            values *= widen_scale(parts[ROLE], self.dtype).reshape(1, -1)
        return floats.narrow(values, dtype)


def smoothed(stored: Stored, built: Built) -> Built:
    """The decoder of a weight with its smoothing scale, where one is stored."""
    scale = stored.parts.get(ROLE)
    if scale is None:
        return built
    decoder, shape = built
    if scale.dtype not in FLOAT_DTYPES or math.prod(scale.shape) != shape[-1]:
        raise stored.refuse(f"pre_quant_scale needs one number for each of {shape[-1]} columns")
    return Smoothed(decoder, scale.dtype), shape
