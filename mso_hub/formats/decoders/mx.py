"""Microscaling weights: 32 columns under an E8M0 exponent.

    w = code * 2**(scale - 127)         code E2M1, two to a byte, even column in the low nibble (MXFP4), or E4M3 (MXFP8)

gpt-oss keeps all experts of a layer in one tensor and computes `x @ w`, so its dense weight is [E, K, N] where
[E, N, K] is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mso_hub.checkpoint import Array
from mso_hub.formats.decoders.base import Built, ByRows, Stored

GROUP_SIZE = 32
TITLES = {"compressed-tensors": "compressed-tensors", "modelopt": "ModelOpt", "deepseek": "DeepSeek"}


@dataclass(frozen=True, slots=True)
class MxDecoder(ByRows):
    """Reads a matrix; the parts carry the roles `codes` and `scale`.

    scheme  mxfp4 or mxfp8
    """

    scheme: str
    layout: str

    @property
    def name(self) -> str:
        """For reports."""
        return f"{self.scheme.upper()} ({TITLES[self.layout]})"

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 4 if self.scheme == "mxfp4" else 8

    def decode(self, parts: Mapping[str, Array], start: int, stop: int, dtype: str) -> Array:
        """Rows in `dtype`, in fp32, rounded once."""
        from mso_hub.formats.numerics import mx

        codes = parts["codes"].view("uint8")
        decode = mx.decode_mxfp4 if self.scheme == "mxfp4" else mx.decode_mxfp8
        return decode(codes, parts["scale"], dtype)


@dataclass(frozen=True, slots=True)
class GptOssDecoder(ByRows):
    """Reads the experts of a layer; a row is an expert, [K, N] as `x @ w` wants it."""

    @property
    def name(self) -> str:
        """For reports."""
        return "gpt-oss MXFP4"

    @property
    def scheme(self) -> str:
        """E2M1 under E8M0."""
        return "mxfp4"

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 4

    @property
    def layout(self) -> str:
        """OpenAI's."""
        return "gpt-oss"

    def decode(self, parts: Mapping[str, Array], start: int, stop: int, dtype: str) -> Array:
        """Experts in `dtype`, in fp32, rounded once, turned."""
        from mso_hub.formats.numerics import mx

        return mx.decode_gpt_oss(parts["codes"], parts["scale"], dtype)


def _matrix(stored: Stored, scheme: str, layout: str) -> Built:
    rows, width = stored.matrix()
    columns = 2 * width if scheme == "mxfp4" else width
    if columns % GROUP_SIZE or stored.parts["scale"].shape != (rows, columns // GROUP_SIZE):
        codes = "[N, K/2]" if scheme == "mxfp4" else "[N, K]"
        raise stored.refuse(f"{scheme.upper()} needs codes {codes} and E8M0 scales [N, K/32] in U8 or F8_E8M0")
    return MxDecoder(scheme, layout), (rows, columns)


def mxfp4_packed(stored: Stored) -> Built:
    """compressed-tensors' mxfp4-pack-quantized."""
    if stored.parts["scale"].dtype not in ("U8", "F8_E8M0"):
        raise stored.refuse(
            "packed FP4 needs E8M0 scales in U8 or F8_E8M0 (MXFP4), or a weight_global_scale beside E4M3 ones (NVFP4)"
        )
    return _matrix(stored, "mxfp4", "compressed-tensors")


def mxfp4(stored: Stored) -> Built:
    """ModelOpt's MXFP4 and Quark's (`weight`, `weight_scale`), DeepSeek-V4's experts (`weight`, `scale`)."""
    deepseek = stored.parts["codes"].dtype == "I8" or not stored.parts["scale"].name.endswith("weight_scale")
    return _matrix(stored, "mxfp4", "deepseek" if deepseek else "modelopt")


def mxfp8(stored: Stored) -> Built:
    """`weight` F8_E4M3 with a scale for 32 columns."""
    scale = stored.parts["scale"]
    if not scale.name.endswith("weight_scale"):
        return _matrix(stored, "mxfp8", "deepseek")
    return _matrix(stored, "mxfp8", "modelopt" if stored.said.method == "modelopt" else "compressed-tensors")


def has_mx_scale(stored: Stored) -> bool:
    """Is there one exponent for 32 columns of each row? E8M0 is also what DeepSeek has for blocks."""
    codes, scale = stored.parts["codes"].shape, stored.parts["scale"]
    one = scale.shape == (1, 1) and scale.dtype != "U8"
    return len(codes) == 2 and scale.shape == (codes[0], -(-codes[1] // GROUP_SIZE)) and not one


def gpt_oss(stored: Stored) -> Built:
    """A bank of experts: `NAME_blocks` [E, N, K/32, 16] and `NAME_scales` [E, N, K/32] -> NAME [E, K, N]."""
    codes, scale = stored.parts["codes"].shape, stored.parts["scale"].shape
    if len(codes) != 4 or codes[3] != GROUP_SIZE // 2 or scale != codes[:3] or 0 in codes:
        raise stored.refuse("gpt-oss MXFP4 needs blocks U8 [E, N, K/32, 16] and scales U8 [E, N, K/32]")
    return GptOssDecoder(), (codes[0], GROUP_SIZE * codes[2], codes[1])
