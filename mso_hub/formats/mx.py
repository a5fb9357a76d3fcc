"""MXFP4 and MXFP8: 32 columns under one power of two, as the OCP Microscaling specification has it.

    w ~= e2m1(code) * 2**(scale - 127)         MXFP4
    w ~= e4m3(code) * 2**(scale - 127)         MXFP8

Every block stands for itself, so weights that an engine fuses need nothing in common. Activations, where they are
quantized, get their scales while the model runs. Numerics: `numerics/mx.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mso_hub.checkpoint import Array, TensorInfo
from mso_hub.formats.dialects.compressed_tensors import arguments
from mso_hub.formats.scheme import Choices, Format, Scheme

GROUP_SIZE = 32

MX_CHOICES = {
    "mxfp4": Choices(
        {"compressed-tensors": "vLLM"},
        {"compressed-tensors": (16, 8, 4)},
        ("mse", "absmax"),
        refusals={"modelopt": "no runtime loads MXFP4 in ModelOpt's layout"},
    ),
    "mxfp8": Choices(
        {"compressed-tensors": "vLLM", "modelopt": "vLLM"},
        {"compressed-tensors": (8, 16), "modelopt": (8,)},
        ("absmax",),
    ),
}


@dataclass(frozen=True, slots=True)
class Mx(Format):
    """Encoder of one layout: mxfp4 or mxfp8."""

    name: str
    layout: str
    search: str
    activations: int

    @classmethod
    def build(cls, scheme: Scheme, layout: str) -> Mx:
        """The encoder that a scheme asks for."""
        choices = MX_CHOICES[scheme.format]
        choices.check(scheme, layout)
        activations = scheme.activations or choices.activations[layout][0]
        return cls(scheme.format, layout, scheme.search or choices.searches[0], activations)

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 4 if self.name == "mxfp4" else 8

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be stored, or None."""
        if len(shape) != 2:
            return f"{self.name} needs a matrix, got shape {list(shape)}"
        if shape[1] % GROUP_SIZE or 0 in shape:
            return f"{self.name} needs a last dimension that is a multiple of {GROUP_SIZE}, got shape {list(shape)}"
        return None

    def outputs(self, module: str, shape: tuple[int, ...], dtype: str) -> tuple[TensorInfo, ...]:
        """Codes and scales."""
        rows, columns = shape
        scale = TensorInfo(f"{module}.weight_scale", "U8", (rows, columns // GROUP_SIZE))
        if self.name == "mxfp4":
            return TensorInfo(f"{module}.weight_packed", "U8", (rows, columns // 2)), scale
        return TensorInfo(f"{module}.weight", "F8_E4M3", shape), scale

    def encode(self, values: Array, dtype: str, dense: str, amax: float) -> tuple[Array, ...]:
        """Codes and E8M0 scales of some rows."""
        from mso_hub.formats.numerics import mx

        if self.name == "mxfp4":
            return mx.encode_mxfp4(values, dtype, search=self.search)
        return mx.encode_mxfp8(values, dtype)

    def encode_weighted(
        self, values: Array, dtype: str, dense: str, amax: float, importance: NDArray[np.float64]
    ) -> tuple[Array, ...]:
        """As `encode`, squared errors weighted by column; MXFP8 has only one good exponent."""
        from mso_hub.formats.numerics import mx

        if self.name != "mxfp4":
            return super().encode_weighted(values, dtype, dense, amax, importance)
        return mx.encode_mxfp4(values, dtype, search="mse", importance=importance)

    def decode(self, arrays: tuple[Array, ...], columns: int, dense: str, amax: float) -> Array:
        """F32 [r, K]."""
        from mso_hub.formats.numerics import mx

        return (mx.decode_mxfp4 if self.name == "mxfp4" else mx.decode_mxfp8)(arrays[0], arrays[1], "F32")

    @property
    def group(self) -> Mapping[str, Any]:
        """compressed-tensors: MXFP4, MXFP4A16, MXFP8 or MXFP8A16."""
        block = {"strategy": "group", "group_size": GROUP_SIZE, "scale_dtype": "torch.uint8"}
        inputs: dict[str, Any] | None = None
        if self.activations == 8 and self.name == "mxfp4":
            inputs = arguments(strategy="token", dynamic=True)
        elif self.activations < 16:
            inputs = arguments(**block, num_bits=self.activations, dynamic=True)
        layout = "mxfp4-pack-quantized" if self.name == "mxfp4" else "mxfp8-quantized"
        return {"format": layout, "weights": arguments(**block, num_bits=self.bits), "input_activations": inputs}

    @property
    def algo(self) -> str:
        """ModelOpt's name."""
        return "MXFP8"
