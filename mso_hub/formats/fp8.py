"""FP8: E4M3 codes under one scale a tensor, one a row, or one a block of 128 x 128.

    w ~= e4m3(code) * scale             scale = amax / 448, a multiplier in every layout, whatever its tensor is called

Per tensor, the weights that an engine fuses share the scale: engines keep the largest of them and round all codes a
second time where they differ. Activations are FP8 too: scaled per token or per group of 128 while the model runs, or
by a static scale beside each weight. Numerics: `numerics/fp8.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mso_hub.checkpoint import Array, TensorInfo
from mso_hub.formats.dialects.compressed_tensors import arguments
from mso_hub.formats.scheme import Choices, Format, Scheme

BLOCK = 128
TENSOR, CHANNEL, TILE = "fp8", "fp8_dynamic", "fp8_block"
ALGOS = {TENSOR: "FP8", CHANNEL: "FP8_PER_CHANNEL_PER_TOKEN", TILE: "FP8_PB_WO"}
_BOTH = {"compressed-tensors": "vLLM", "modelopt": "vLLM, TensorRT-LLM"}
_VLLM = {"compressed-tensors": "vLLM", "modelopt": "vLLM"}
_EIGHT = {"compressed-tensors": (8,), "modelopt": (8,), "deepseek": (8,)}

FP8_CHOICES = {
    TENSOR: Choices(_BOTH, _EIGHT, ("absmax",)),
    CHANNEL: Choices(_VLLM, _EIGHT, ("absmax", "mse")),
    TILE: Choices({**_VLLM, "deepseek": "vLLM, SGLang"}, _EIGHT, ("absmax", "mse")),
}


@dataclass(frozen=True, slots=True)
class Fp8(Format):
    """Encoder of one layout.

    name    fp8 (one scale a tensor), fp8_dynamic (one a row) or fp8_block (one for 128 x 128)
    static  activations have a scale in the checkpoint; only for `fp8`
    """

    name: str
    layout: str
    search: str
    static: bool = False

    @classmethod
    def build(cls, scheme: Scheme, layout: str) -> Fp8:
        """The encoder that a scheme asks for."""
        FP8_CHOICES[scheme.format].check(scheme, layout)
        static = scheme.format == TENSOR and scheme.input_scale is not None
        return cls(scheme.format, layout, scheme.search or FP8_CHOICES[scheme.format].searches[0], static)

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 8

    @property
    def activations(self) -> int:
        """Bits of an activation."""
        return 8

    @property
    def shares(self) -> bool:
        """One scale for a fused unit: per tensor only."""
        return self.name == TENSOR

    @property
    def wide_scales(self) -> bool:
        """Loaders have F32 scales."""
        return True

    @property
    def row_step(self) -> int:
        """A block of scales covers 128 rows."""
        return BLOCK if self.name == TILE else 1

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be stored, or None."""
        if len(shape) != 2 or 0 in shape:
            return f"{self.name} needs a matrix, got shape {list(shape)}"
        return None

    def fused_problem(self, shapes: Sequence[tuple[int, ...]]) -> str | None:
        """Why engines cannot fuse weights of these shapes in this order: only the last may end inside a block."""
        rows = [shape[0] for shape in shapes]
        if self.name == TILE and any(n % BLOCK for n in rows[:-1]):
            return (
                f"engines fuse them, so all but the last need a multiple of {BLOCK} rows, got {rows}; use fp8_dynamic"
            )
        return None

    @property
    def unloadable(self) -> str | None:
        """vLLM's ModelOpt loader has a static activation scale for every weight with one scale a tensor."""
        if self.layout != "modelopt" or self.name != TENSOR or self.static:
            return None
        return (
            f"{self.name} in the layout {self.layout!r} needs an activation scale beside each weight, none was given: "
            "add --input_scale, or take fp8_dynamic, which needs none"
        )

    @property
    def expert_problem(self) -> str | None:
        """vLLM's ModelOpt loader has experts with one scale a tensor only."""
        if self.layout != "modelopt" or self.name == TENSOR:
            return None
        other = "compressed-tensors" if self.name == CHANNEL else "compressed-tensors or deepseek"
        return f"no engine loads {self.name} experts in the layout modelopt; use the layout {other}, or another format"

    @property
    def head_problem(self) -> str | None:
        """vLLM takes the rows of a head's scales for words of the vocabulary."""
        if self.name != TILE:
            return None
        where = " in the layout compressed-tensors" if self.layout == "deepseek" else ""
        return f"vLLM loads no output head as {self.name}; use fp8_dynamic for it{where}"

    def outputs(self, module: str, shape: tuple[int, ...], dtype: str) -> tuple[TensorInfo, ...]:
        """`weight` and its scale."""
        codes = TensorInfo(f"{module}.weight", "F8_E4M3", shape)
        name = f"{module}.weight_scale_inv" if self.layout == "deepseek" else f"{module}.weight_scale"
        stored = dtype if self.layout == "compressed-tensors" and self.name != TENSOR else "F32"
        return codes, TensorInfo(name, stored, self._scale_shape(shape))

    def _scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        modelopt = self.layout == "modelopt"
        if self.name == TENSOR:
            return () if modelopt else (1,)
        if self.name == CHANNEL:
            return shape[:1] if modelopt else (shape[0], 1)
        rows, columns = (math.ceil(size / BLOCK) for size in shape)
        return (rows, 1, columns, 1) if modelopt else (rows, columns)

    def encode(self, values: Array, dtype: str, dense: str, amax: float) -> tuple[Array, ...]:
        """Codes [r, K] and, but for one scale a tensor, scales."""
        from mso_hub.formats.numerics import floats, fp8

        if self.name == TENSOR:
            return (fp8.encode_tensor(values, dtype, fp8.tensor_scale(amax)),)
        encode = fp8.encode_rows if self.name == CHANNEL else fp8.encode_blocks
        codes, scale = encode(values, dtype, dense, search=self.search)
        return codes, floats.narrow(scale, dense) if self.layout == "compressed-tensors" else scale

    def decode(self, arrays: tuple[Array, ...], columns: int, dense: str, amax: float) -> Array:
        """F32 [r, K]."""
        from mso_hub.formats.numerics import floats, fp8

        if self.name == TENSOR:
            scale = np.full((1, 1), fp8.tensor_scale(amax), np.float32)
            return fp8.decode(arrays[0], scale, (len(arrays[0]), columns), "F32")
        stored = dense if self.layout == "compressed-tensors" else "F32"
        scale = floats.widen(arrays[1], stored)
        size = (1, columns) if self.name == CHANNEL else (BLOCK, BLOCK)
        return fp8.decode(arrays[0], scale, size, "F32")

    def scalars(self, shape: tuple[int, ...], amax: float) -> tuple[Array, ...]:
        """The tensor's scale."""
        from mso_hub.formats.numerics import fp8

        return (np.array([fp8.tensor_scale(amax)], np.float32),) if self.name == TENSOR else ()

    def input_output(self, module: str, scale: float) -> tuple[TensorInfo, float]:
        """`input_scale`, a multiplier in both layouts."""
        return TensorInfo(f"{module}.input_scale", "F32", () if self.layout == "modelopt" else (1,)), scale

    def input_scale(self, amax: float) -> float:
        """amax / 448."""
        return amax / 448

    @property
    def group(self) -> Mapping[str, Any]:
        """compressed-tensors: FP8, FP8_DYNAMIC or FP8_BLOCK."""
        if self.name == TENSOR:
            weights = arguments(strategy="tensor")
            inputs = arguments(strategy="tensor", observer="static_minmax") if self.static else _DYNAMIC_TENSOR
        elif self.name == CHANNEL:
            weights, inputs = arguments(strategy="channel"), arguments(strategy="token", dynamic=True)
        else:
            weights = arguments(strategy="block", block_structure=[BLOCK, BLOCK])
            inputs = arguments(strategy="group", group_size=BLOCK, dynamic=True)
        return {"format": "float-quantized", "weights": weights, "input_activations": inputs}

    @property
    def algo(self) -> str:
        """ModelOpt's name."""
        return ALGOS[self.name]


_DYNAMIC_TENSOR = arguments(strategy="tensor", dynamic=True)
"""Without a static scale the engine makes one; its experts want the strategy of weights and activations alike."""
