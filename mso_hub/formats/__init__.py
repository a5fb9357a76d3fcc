"""Tensors -> tensors: the only arithmetic of the package. FORMATS is what can be written, READABLE what can be read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from mso_hub.checkpoint import Array, TensorInfo
from mso_hub.formats.nvfp4 import Nvfp4


class Format(Protocol):
    """One scheme in one layout: states its outputs from shapes alone, makes them, writes their config."""

    @property
    def name(self) -> str:
        """Key in FORMATS."""

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be stored, or None."""

    def outputs(self, module: str, shape: tuple[int, ...], *, activations: bool) -> tuple[TensorInfo, ...]:
        """Tensors that replace a weight: those of `encode` in order, then those of `scalars`."""

    def encode(self, values: Array, dtype: str, amax: float) -> tuple[Array, ...]:
        """A block of rows -> the same rows of each row-wise output."""

    def decode(self, arrays: tuple[Array, ...], amax: float) -> Array:
        """What `encode` made of a block of rows, as F32 again."""

    def scalars(self, amax: float, input_scale: float | None) -> tuple[Array, ...]:
        """The outputs that do not go by rows."""

    def config(self, ignore: Iterable[str], *, activations: bool) -> dict[str, Any]:
        """`quantization_config` for config.json."""

    def extra_files(self, ignore: Iterable[str], *, activations: bool) -> dict[str, dict[str, Any]]:
        """Further JSON files, name -> content."""


FORMATS: dict[str, type[Nvfp4]] = {
    "nvfp4": Nvfp4,
}

DENSE = "bf16"
"""The scheme of `decompress`: packed weights become BF16, everything else stays."""

READABLE: dict[str, str] = {
    "dense": "BF16, FP16, FP32",
    "pack-quantized": "compressed-tensors INT2 to INT8: group or channel, symmetric or asymmetric, g_idx",
    "nvfp4-pack-quantized": "compressed-tensors NVFP4, W4A16 and W4A4",
    "modelopt NVFP4": "ModelOpt NVFP4, W4A16 and W4A4",
}
"""Formats of a source that can be decoded, for `mso-hub formats` and the README."""
