"""NVFP4: E2M1 codes, one E4M3 scale per 16 columns, one F32 scale per tensor or fused unit.

    w ~= e2m1(code) * block_scale * global_scale        global_scale = amax / (6 * 448)

Weight-only (W4A16) stores codes and scales; W4A4 adds the activation's global scale, while its block scales are
made at run time. Numerics, ties and guards: `numerics/nvfp4.py`.
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

GROUP_SIZE = 16
SUFFIXES = {
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
    "modelopt": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
}
"""Layout -> names of codes, block scales, global scale and activation scale."""
POWER = "power"
"""The search that takes a power of two for every scale where that is exact: for weights that were MXFP4."""
HEADROOM = 2.0
"""On a small trained model, W4A4: after 33 tokens of calibration a KL divergence of 0.0096 at a factor of 1, 0.0091 at
2 and 0.0090 at 8 or 64; after 8,192 tokens 0.0088 at each of them. A factor of 1/8 costs 30 % of perplexity."""
_NO_FP8 = "no runtime loads NVFP4 weights with FP8 activations; mxfp4 with --activations 8 is W4A8"

NVFP4_CHOICES = Choices(
    {"compressed-tensors": "vLLM", "modelopt": "vLLM, TensorRT-LLM"},
    {"compressed-tensors": (16, 4), "modelopt": (16, 4)},
    ("mse", "absmax", "four_over_six"),
    refusals={"activations 8": _NO_FP8},
)


@dataclass(frozen=True, slots=True)
class Nvfp4(Format):
    """Encoder of one layout.

    layout  compressed-tensors or modelopt; the first stores reciprocals of the global scales
    search  absmax (ModelOpt's choice, byte for byte), mse (exact E4M3 search), four_over_six, or POWER
    static  W4A4: every weight carries an activation scale
    """

    layout: str = "compressed-tensors"
    search: str = "absmax"
    static: bool = False
    name: str = "nvfp4"

    @classmethod
    def build(cls, scheme: Scheme, layout: str) -> Nvfp4:
        """The encoder that a scheme asks for; an activation scale means W4A4."""
        NVFP4_CHOICES.check(scheme, layout)
        static = scheme.activations == 4 or (scheme.activations is None and scheme.input_scale is not None)
        return cls(layout, scheme.search or NVFP4_CHOICES.searches[0], static)

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 4

    @property
    def activations(self) -> int:
        """Bits of an activation."""
        return 4 if self.static else 16

    @property
    def shares(self) -> bool:
        """Engines keep one global scale for a fused unit."""
        return True

    @property
    def headroom(self) -> float:
        """Block scales are made at run time and saturate above the static one: too small clips, too large is free."""
        return HEADROOM

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be NVFP4, or None."""
        if len(shape) != 2:
            return f"nvfp4 needs a matrix, got shape {list(shape)}"
        if shape[1] % GROUP_SIZE or 0 in shape:
            return f"nvfp4 needs a last dimension that is a multiple of {GROUP_SIZE}, got shape {list(shape)}"
        return None

    def outputs(self, module: str, shape: tuple[int, ...], dtype: str) -> tuple[TensorInfo, ...]:
        """Codes U8 [N, K/2], scales F8_E4M3 [N, K/16], global scale F32."""
        rows, columns = shape
        codes, scale, scalar, _ = SUFFIXES[self.layout]
        return (
            TensorInfo(f"{module}.{codes}", "U8", (rows, columns // 2)),
            TensorInfo(f"{module}.{scale}", "F8_E4M3", (rows, columns // GROUP_SIZE)),
            TensorInfo(f"{module}.{scalar}", "F32", self._scalar),
        )

    @property
    def _scalar(self) -> tuple[int, ...]:
        return () if self.layout == "modelopt" else (1,)

    def encode(self, values: Array, dtype: str, dense: str, amax: float) -> tuple[Array, ...]:
        """Rows [r, K] -> codes U8 [r, K/2] (even column in the low nibble) and scales E4M3 bits [r, K/16]."""
        from mso_hub.formats.numerics import nvfp4

        return nvfp4.encode(values, dtype, self.global_scale(amax), search=self.search)

    def encode_weighted(
        self, values: Array, dtype: str, dense: str, amax: float, importance: NDArray[np.float64]
    ) -> tuple[Array, ...]:
        """As `encode`, squared errors weighted by column."""
        from mso_hub.formats.numerics import nvfp4

        return nvfp4.encode(values, dtype, self.global_scale(amax), search="mse", importance=importance)

    def decode(self, arrays: tuple[Array, ...], columns: int, dense: str, amax: float) -> Array:
        """F32 [r, K]."""
        from mso_hub.formats.numerics import nvfp4

        decode = nvfp4.decode if self.layout == "modelopt" else nvfp4.decode_divided
        return decode(arrays[0], arrays[1], self.scalars((), amax)[0][0], "F32")

    def global_scale(self, amax: float) -> np.float32:
        """The unit's multiplier; 1.0 where its reciprocal, which compressed-tensors stores, would be infinite.

        That happens below amax 8e-36: the codes are all zero then.
        """
        from mso_hub.formats.numerics import nvfp4

        scale = nvfp4.global_scale(amax, search=self.search)
        tiny = self.layout == "compressed-tensors" and scale < 1 / np.finfo(np.float32).max
        return np.float32(1) if tiny else scale

    def _stored(self, multiplier: float) -> np.float32:
        """A scale in the direction of the layout."""
        scale = np.float32(multiplier)
        return np.float32(1) / scale if self.layout == "compressed-tensors" else scale

    def scalars(self, shape: tuple[int, ...], amax: float) -> tuple[Array, ...]:
        """The global scale."""
        return (np.array([self._stored(float(self.global_scale(amax)))], np.float32),)

    def input_output(self, module: str, scale: float) -> tuple[TensorInfo, float]:
        """input_scale, or input_global_scale with its reciprocal."""
        return TensorInfo(f"{module}.{SUFFIXES[self.layout][3]}", "F32", self._scalar), float(self._stored(scale))

    def input_scale(self, amax: float) -> float:
        """amax / (6 * 448)."""
        return amax / 2688

    @property
    def group(self) -> Mapping[str, Any]:
        """compressed-tensors: NVFP4A16 or NVFP4."""
        fp4 = {
            "num_bits": 4, "group_size": GROUP_SIZE, "strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn",
        }  # fmt: skip
        inputs = arguments(**fp4, dynamic="local", observer="static_minmax") if self.static else None
        return {"format": "nvfp4-pack-quantized", "weights": arguments(**fp4), "input_activations": inputs}

    @property
    def algo(self) -> str:
        """ModelOpt's name."""
        return "NVFP4" if self.static else "W4A16_NVFP4"
