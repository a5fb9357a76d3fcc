"""INT4 and INT8 weights: packed for weight-only inference, or as they are for INT8 activations.

    w ~= (code - zero_point) * scale[row, group]

w4a16 and w8a16 are compressed-tensors' pack-quantized (4 or 8 bits in I32 words, one scale for a group of columns or
for a row, symmetric or with a zero point), int8 is its int-quantized (I8 codes, one scale a row, activations INT8 per
token). Scales have the dtype of the model's dense weights. Numerics: `numerics/integer*.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mso_hub.checkpoint import Array, TensorInfo
from mso_hub.formats.dialects.compressed_tensors import arguments
from mso_hub.formats.scheme import Choices, Format, Scheme

CHANNEL = 0
"""The group size that means one scale for a whole row."""
_LOADERS = {"compressed-tensors": "vLLM"}
_REFUSALS = {"modelopt": "no runtime loads integer weights in ModelOpt's layout"}

_SIZES = (128, 64, 32, CHANNEL)
_WEIGHT_ONLY = {"compressed-tensors": (16,)}
INTEGER_CHOICES = {
    "w4a16": Choices(_LOADERS, _WEIGHT_ONLY, ("mse", "absmax"), _SIZES, asymmetric=True, refusals=_REFUSALS),
    "w8a16": Choices(_LOADERS, _WEIGHT_ONLY, ("absmax", "mse"), _SIZES, asymmetric=True, refusals=_REFUSALS),
    "int8": Choices(_LOADERS, {"compressed-tensors": (8,)}, ("absmax", "mse"), refusals=_REFUSALS),
}


@dataclass(frozen=True, slots=True)
class Integer(Format):
    """Encoder of compressed-tensors' integer formats.

    name        w4a16, w8a16 or int8
    group_size  columns per scale, 0 for one scale a row
    symmetric   without zero points
    """

    name: str
    group_size: int
    symmetric: bool
    search: str
    layout: str = "compressed-tensors"

    @classmethod
    def build(cls, scheme: Scheme, layout: str) -> Integer:
        """The encoder that a scheme asks for."""
        choices = INTEGER_CHOICES[scheme.format]
        choices.check(scheme, layout)
        group = scheme.group_size
        if group is None:
            group = choices.group_sizes[0] if choices.group_sizes else CHANNEL
        return cls(scheme.format, group, scheme.symmetric is not False, scheme.search or choices.searches[0])

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 4 if self.name == "w4a16" else 8

    @property
    def activations(self) -> int:
        """Bits of an activation."""
        return 8 if self.name == "int8" else 16

    @property
    def wide_scales(self) -> bool:
        """INT8 loaders have F32 scales, those of packed weights have the model's dtype."""
        return self.name == "int8"

    @property
    def row_step(self) -> int:
        """Zero points of several rows share a word."""
        return 1 if self.symmetric else 32 // self.bits

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be stored, or None."""
        if len(shape) != 2 or 0 in shape:
            return f"{self.name} needs a matrix, got shape {list(shape)}"
        if self.group_size and shape[1] % self.group_size:
            return (
                f"{self.name} in groups of {self.group_size} needs a last dimension that is a multiple of it, got "
                f"shape {list(shape)}; choose another --group_size (0: one scale a row)"
            )
        return None

    def outputs(self, module: str, shape: tuple[int, ...], dtype: str) -> tuple[TensorInfo, ...]:
        """Codes, scales, zero points, logical shape."""
        rows, columns = shape
        groups = columns // self.group_size if self.group_size else 1
        scale = TensorInfo(f"{module}.weight_scale", dtype, (rows, groups))
        if self.name == "int8":
            return TensorInfo(f"{module}.weight", "I8", shape), scale
        packed = TensorInfo(f"{module}.weight_packed", "I32", (rows, math.ceil(columns * self.bits / 32)))
        zero = TensorInfo(f"{module}.weight_zero_point", "I32", (math.ceil(rows * self.bits / 32), groups))
        said = TensorInfo(f"{module}.weight_shape", "I64", (2,))
        return (packed, scale, said) if self.symmetric else (packed, scale, zero, said)

    def encode(self, values: Array, dtype: str, dense: str, amax: float) -> tuple[Array, ...]:
        """Codes, scales and zero points of some rows."""
        return self._encode(values, dtype, dense, self.search, None)

    def encode_weighted(
        self, values: Array, dtype: str, dense: str, amax: float, importance: NDArray[np.float64]
    ) -> tuple[Array, ...]:
        """As `encode`, squared errors weighted by column."""
        return self._encode(values, dtype, dense, "mse", importance)

    def _encode(
        self, values: Array, dtype: str, dense: str, search: str, importance: NDArray[np.float64] | None
    ) -> tuple[Array, ...]:
        from mso_hub.formats.numerics import floats, integer_encode

        codes, scale, zero = integer_encode.encode(
            values, dtype, bits=self.bits, group_size=self.group_size or None, symmetric=self.symmetric,
            scale_dtype=dense, search=search, importance=importance,
        )  # fmt: skip
        return self.assemble(codes, floats.narrow(scale, dense), zero)

    def assemble(self, codes: Array, scale: Array, zero: Array | None) -> tuple[Array, ...]:
        """What `encode` gives for codes I8 [r, K], scales as stored and zero points I8 [r, K/group] or None."""
        from mso_hub.formats.numerics import integer_encode

        if self.name == "int8":
            return codes, scale
        packed = integer_encode.pack(codes, self.bits)
        return (packed, scale) if zero is None else (packed, scale, integer_encode.pack_zero_point(zero, self.bits))

    def decode(self, arrays: tuple[Array, ...], columns: int, dense: str, amax: float) -> Array:
        """F32 [r, K]."""
        from mso_hub.formats.numerics import floats, integer

        scale = floats.widen(arrays[1], dense)
        group = self.group_size or None
        if self.name == "int8":
            return integer.decode_int8(arrays[0], scale, None, group_size=None, dtype="F32")
        zero = None
        if not self.symmetric:
            zero = integer.unpack_zero_point(arrays[2], self.bits, len(arrays[0]), dense=True)
        return integer.decode(
            arrays[0], scale, zero, None, bits=self.bits, group_size=group, cols=columns, dense=True, dtype="F32"
        )

    def scalars(self, shape: tuple[int, ...], amax: float) -> tuple[Array, ...]:
        """`weight_shape`."""
        return () if self.name == "int8" else (np.array(shape, np.int64),)

    @property
    def group(self) -> Mapping[str, Any]:
        """compressed-tensors: W4A16, W4A16_ASYM, W8A16 or W8A8."""
        if self.name == "int8":
            weights = arguments(type="int", strategy="channel")
            inputs = arguments(type="int", strategy="token", dynamic=True)
            return {"format": "int-quantized", "weights": weights, "input_activations": inputs}
        weights = arguments(
            type="int", num_bits=self.bits, symmetric=self.symmetric,
            strategy="group" if self.group_size else "channel", group_size=self.group_size or None,
            zp_dtype=None if self.symmetric else "torch.int8",
        )  # fmt: skip
        return {"format": "pack-quantized", "weights": weights, "input_activations": None}
