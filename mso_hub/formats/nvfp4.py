"""NVFP4: E2M1 codes, one E4M3 scale per 16 columns, one F32 scale per tensor or fused unit.

    w ~= e2m1(code) * block_scale * global_scale        global_scale = amax / (6 * 448)

Weight-only (W4A16) stores codes and scales; W4A4 adds the activation's global scale, while its block scales are
made at run time. Numerics, ties and guards: `numerics/nvfp4.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mso_hub.checkpoint import Array, TensorInfo
from mso_hub.errors import CheckpointError
from mso_hub.formats.dialects import compressed_tensors, modelopt

GROUP_SIZE = 16


@dataclass(frozen=True, slots=True)
class Nvfp4:
    """Encoder of one layout. One object states the output tensors, makes them and writes their config.

    layout   compressed-tensors or modelopt
    search   absmax (ModelOpt's choice, byte for byte) or mse (exact E4M3 search)
    """

    layout: str = "compressed-tensors"
    search: str = "absmax"

    @property
    def name(self) -> str:
        """Key in FORMATS."""
        return "nvfp4"

    @property
    def _suffixes(self) -> Mapping[str, str]:
        return modelopt.NVFP4_SUFFIXES if self.layout == "modelopt" else compressed_tensors.NVFP4_SUFFIXES

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be NVFP4, or None."""
        if len(shape) != 2:
            return f"nvfp4 needs a matrix, got shape {list(shape)}"
        if shape[1] % GROUP_SIZE or 0 in shape:
            return f"nvfp4 needs a last dimension that is a multiple of {GROUP_SIZE}, got shape {list(shape)}"
        return None

    def outputs(self, module: str, shape: tuple[int, ...], *, activations: bool) -> tuple[TensorInfo, ...]:
        """Tensors that replace a weight: row-wise ones in the order of `encode`, then those of `scalars`."""
        rows, columns = shape
        suffix = self._suffixes
        scalar = () if self.layout == "modelopt" else (1,)
        infos = [
            TensorInfo(f"{module}.{suffix['codes']}", "U8", (rows, columns // 2)),
            TensorInfo(f"{module}.{suffix['scale']}", "F8_E4M3", (rows, columns // GROUP_SIZE)),
            TensorInfo(f"{module}.{suffix['global']}", "F32", scalar),
        ]
        if activations:
            infos.append(TensorInfo(f"{module}.{suffix['input']}", "F32", scalar))
        return tuple(infos)

    def encode(self, values: Array, dtype: str, amax: float) -> tuple[Array, ...]:
        """Rows [r, K] -> codes U8 [r, K/2] (even column in the low nibble) and scales E4M3 bits [r, K/16].

        values  BF16 bits, F16 or F32 as `dtype` says
        amax    largest |w| over every tensor of the unit
        """
        from mso_hub.formats.numerics import nvfp4

        return nvfp4.encode(values, dtype, self._global_scale(amax), search=self.search)

    def decode(self, arrays: tuple[Array, ...], amax: float) -> Array:
        """What `encode` made of some rows, as F32 [r, K] again."""
        parts = {"codes": arrays[0], "scale": arrays[1], "global": self.scalars(amax, None)[0]}
        return Nvfp4Decoder(self.layout, "").decode(parts, 0, len(arrays[0]), "F32")

    def _global_scale(self, amax: float) -> np.float32:
        """The unit's multiplier; 1.0 where its reciprocal, which compressed-tensors stores, would be infinite.

        That happens below amax 8e-36: the codes are all zero then.
        """
        from mso_hub.formats.numerics import nvfp4

        scale = nvfp4.global_scale(amax)
        tiny = self.layout == "compressed-tensors" and scale < 1 / np.finfo(np.float32).max
        return np.float32(1) if tiny else scale

    def scalars(self, amax: float, input_scale: float | None) -> tuple[Array, ...]:
        """Global scale and, for W4A4, activation scale as this layout stores them: F32, one element each.

        ModelOpt stores multipliers, compressed-tensors their reciprocals.
        """
        multipliers = [self._global_scale(amax)]
        if input_scale is not None:
            multipliers.append(np.float32(input_scale))
        if self.layout == "compressed-tensors":
            multipliers = [np.float32(1) / m for m in multipliers]
        return tuple(np.array([m], np.float32) for m in multipliers)

    def config(self, ignore: Iterable[str], *, activations: bool) -> dict[str, Any]:
        """`quantization_config` for config.json."""
        if self.layout == "modelopt":
            return modelopt.nvfp4_config(ignore, activations=activations)
        return compressed_tensors.nvfp4_config(ignore, activations=activations)

    def extra_files(self, ignore: Iterable[str], *, activations: bool) -> dict[str, dict[str, Any]]:
        """JSON files beside config.json that this layout needs."""
        if self.layout != "modelopt":
            return {}
        return {modelopt.QUANT_CONFIG_FILE: modelopt.nvfp4_file(ignore, activations=activations)}


@dataclass(frozen=True, slots=True)
class Nvfp4Decoder:
    """Reads NVFP4 of either layout; the parts carry the roles `codes`, `scale` and `global`.

    module  for messages
    """

    layout: str
    module: str

    @property
    def name(self) -> str:
        """For reports."""
        return "nvfp4-pack-quantized" if self.layout == "compressed-tensors" else "modelopt NVFP4"

    @property
    def row_step(self) -> int:
        """Any row may start a block."""
        return 1

    def part_rows(self, role: str, start: int, stop: int) -> tuple[int, int] | None:
        """Codes and scales go by rows, the global scale as a whole."""
        return None if role == "global" else (start, stop)

    def decode(self, parts: Mapping[str, Array], start: int, stop: int, dtype: str) -> Array:
        """Rows in `dtype`: e2m1 * (scale * global) for ModelOpt, e2m1 * (scale / global) for compressed-tensors."""
        from mso_hub.formats.numerics import nvfp4

        scale = np.float32(parts["global"].reshape(-1)[0])
        if not 0 < scale < np.inf:
            raise CheckpointError(
                f"{self.module}: the global scale must be finite and > 0, found {scale}; the checkpoint is damaged"
            )
        decode = nvfp4.decode if self.layout == "modelopt" else nvfp4.decode_divided
        return decode(parts["codes"], parts["scale"], scale, dtype)
