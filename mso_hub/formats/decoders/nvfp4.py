"""NVFP4 weights of compressed-tensors and of ModelOpt, decode only; `formats/nvfp4.py` encodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mso_hub.checkpoint import Array
from mso_hub.errors import CheckpointError


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
