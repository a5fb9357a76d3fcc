"""Is every number stored as the code nearest to it?

Rounding to nearest holds in every format and under any scale, so this finds what the size of an error hides: the scale
of another row, a zero point that is off by one, a block that was written elsewhere. Changing the lowest bit of a code
gives the number beside it. Half of that distance is the largest error of rounding, except where numbers are clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mso_hub.checkpoint import Array
from mso_hub.formats.dialects.ktransformers import LAYOUT as KTRANSFORMERS
from mso_hub.formats.weight import Weight

INTEGERS, FLOATS = 0.6, 1.01
"""Of the distance between two numbers. It would be a half, but encoders take the first of all scales that give the same
numbers in the model's dtype. With that the codes are nearest to these numbers, and not to the source's: the scale of
integers may be 7/8 of the one that they were rounded under, and that of floats a half, which shows among the smallest.
"""
BF16 = 2.0**-8
"""Of the number itself: half a place in BF16, twice."""
TINY = {"F16": 2.0**-24}
"""Dtype of the source -> an error that the rounding of its smallest numbers explains; of others that of F32."""
NEAR = 2.0**-6
"""Of the number of codes: so near to their ends they count as the ends, for a number that was clipped there."""
WORD = 32


@dataclass(frozen=True, slots=True)
class _Masks:
    """How codes are changed, as bytes or words of the stored dtype.

    lowest    flips the lowest bit of every code
    inverse   flips all bits of an integer, all but the sign of a float: the largest floats become zero
    integers  how many codes there are, 0 for floats
    """

    lowest: int
    inverse: int
    integers: int = 0


def _masks(weight: Weight) -> _Masks | None:
    """None for dense weights, for codes that straddle words, and for kt-kernel's, which are rounded twice."""
    decoder, codes = weight.decoder, weight.parts.get("codes")
    if decoder is None or codes is None or decoder.layout == KTRANSFORMERS:
        return None
    if decoder.scheme in ("fp8", "mxfp8"):
        return _Masks(0x01, 0x7E)
    if decoder.scheme in ("nvfp4", "mxfp4"):
        return _Masks(0x11, 0x77)
    number = 1 << decoder.bits
    if codes.dtype == "U8":
        return _Masks(0x11, 0xFF, number)
    if codes.dtype == "I8":
        return _Masks(0x01, 0xFF, number)
    if codes.dtype == "I32" and WORD % decoder.bits == 0:
        return _Masks(sum(1 << at for at in range(0, WORD, decoder.bits)), (1 << WORD) - 1, number)
    return None


def can_count(weight: Weight) -> bool:
    """Are there masks for the codes of a weight?"""
    return _masks(weight) is not None


def count_strays(
    weight: Weight, loaded: Mapping[str, Array], rows: tuple[int, int], values: Array, error: Array, dtype: str
) -> int:
    """How many numbers of a block of rows are not stored as the code nearest to them.

    loaded  as Weight.load gives it for these rows
    values  what the codes stand for, float32
    error   |values - the numbers they were made from|
    dtype   of these numbers
    """
    masks = _masks(weight)
    if masks is None:
        return 0

    def changed(mask: int) -> Array:
        codes = loaded["codes"]
        bits = codes.view(f"u{codes.itemsize}") ^ np.array(mask, f"u{codes.itemsize}")
        return weight.values({**loaded, "codes": bits.view(codes.dtype)}, *rows)[0]

    gap = np.abs(changed(masks.lowest) - values)
    strays = error > (INTEGERS if masks.integers else FLOATS) * gap + BF16 * np.abs(values) + TINY.get(dtype, 2.0**-126)
    if not strays.any():
        return 0
    inverse = changed(masks.inverse)
    ends = masks.integers * (1 - NEAR) - 1.5
    clipped = np.abs(inverse - values) > ends * gap if masks.integers else inverse == 0
    return int(np.count_nonzero(strays & ~(clipped & (gap > 0))))
