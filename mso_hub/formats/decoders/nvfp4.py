"""NVFP4 weights of compressed-tensors and of ModelOpt, decode only; `formats/nvfp4.py` encodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mso_hub.checkpoint import Array
from mso_hub.errors import CheckpointError
from mso_hub.formats.decoders.base import Built, Stored


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
    def scheme(self) -> str:
        """E2M1 under E4M3 under F32."""
        return "nvfp4"

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 4

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


def nvfp4(stored: Stored) -> Built:
    """Decoder and shape of one NVFP4 weight, of the layout that its codes have by name."""
    codes, scale, scalar = (stored.parts[role] for role in ("codes", "scale", "global"))
    good = (
        scale.dtype == "F8_E4M3" and scalar.dtype == "F32" and scalar.nbytes == 4 and 0 not in codes.shape
        and len(codes.shape) == 2 and scale.shape == (codes.shape[0], codes.shape[1] // 8) and codes.shape[1] % 8 == 0
    )  # fmt: skip
    if not good:
        raise stored.refuse("NVFP4 needs codes U8 [N, K/2], scales F8_E4M3 [N, K/16] and one F32 global scale")
    layout = "compressed-tensors" if codes.name.endswith("weight_packed") else "modelopt"
    return Nvfp4Decoder(layout, stored.module), (codes.shape[0], 2 * codes.shape[1])
