"""Tensors -> tensors: the only arithmetic of the package. FORMATS is what can be written, READABLE what can be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from mso_hub.errors import RecipeError
from mso_hub.formats.fp8 import FP8_CHOICES, Fp8
from mso_hub.formats.integer import INTEGER_CHOICES, Integer
from mso_hub.formats.mx import MX_CHOICES, Mx
from mso_hub.formats.nvfp4 import NVFP4_CHOICES, Nvfp4
from mso_hub.formats.scheme import IMPORTED, Choices, Format, Scheme

__all__ = ["ALIASES", "DENSE", "FORMATS", "IMPORTED", "READABLE", "Choices", "Entry", "Format", "Scheme", "build"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the table of formats.

    bits     width of a code
    summary  codes and scales in a few words
    choices  what it can be asked for
    build    scheme and layout -> encoder
    """

    bits: int
    summary: str
    choices: Choices
    build: Callable[[Scheme, str], Format]


FORMATS: dict[str, Entry] = {
    "nvfp4": Entry(4, "FP4, E4M3 scale per 16", NVFP4_CHOICES, Nvfp4.build),
    "mxfp4": Entry(4, "FP4, power of 2 per 32", MX_CHOICES["mxfp4"], Mx.build),
    "mxfp8": Entry(8, "FP8, power of 2 per 32", MX_CHOICES["mxfp8"], Mx.build),
    "fp8": Entry(8, "FP8, scale per tensor", FP8_CHOICES["fp8"], Fp8.build),
    "fp8_dynamic": Entry(8, "FP8, scale per row", FP8_CHOICES["fp8_dynamic"], Fp8.build),
    "fp8_block": Entry(8, "FP8, scale per 128x128", FP8_CHOICES["fp8_block"], Fp8.build),
    "w4a16": Entry(4, "INT4, packed", INTEGER_CHOICES["w4a16"], Integer.build),
    "w8a16": Entry(8, "INT8, packed", INTEGER_CHOICES["w8a16"], Integer.build),
    "int8": Entry(8, "INT8, scale per row", INTEGER_CHOICES["int8"], Integer.build),
}

ALIASES = {"int4_awq": Scheme("w4a16", group_size=128, search="mse")}
"""Historic names. The calibration that gave int4_awq its name is replaced by a search for the best scales."""

DENSE = "bf16"
"""The scheme of `decompress`: packed weights become BF16, everything else stays."""

READABLE: dict[str, str] = {
    "dense": "BF16, FP16, FP32",
    "FP8": "E4M3: scale per tensor, row, group or block, F32 to E8M0; every layout",
    "MXFP8": "compressed-tensors, ModelOpt",
    "MXFP4": "compressed-tensors, ModelOpt, DeepSeek-V4 experts, gpt-oss",
    "NVFP4": "compressed-tensors, ModelOpt (NVFP4_AWQ too), W4A16 and W4A4",
    "pack-quantized": "compressed-tensors INT2 to INT8: group or row, with or without zero points, g_idx",
    "int-quantized": "compressed-tensors INT8 (also naive-quantized): tensor, row or group, zero points",
    "ModelOpt INT": "W8A16, W8A8_SQ_PER_CHANNEL, W4A16_AWQ, smoothing scales included",
    "AWQ": "AutoAWQ GEMM, 4 bits, also as AutoRound writes it",
    "KTransformers": "experts in INT4 and INT8, merged or a tree of .kt files, any number of NUMA nodes",
    "GPTQ": "2, 3, 4 and 8 bits, v1 and v2, act-order, also as AutoRound writes it",
}
"""Formats of a source that can be decoded, for `mso-hub formats` and the README."""


def build(scheme: Scheme, layout: str, *, unloadable: bool = False) -> Format | None:
    """The encoder for a scheme, None for DENSE; RecipeError for what does not exist or what vLLM does not load.

    unloadable  build also what vLLM does not load
    """
    if scheme.format in ALIASES:
        said = {f.name: getattr(scheme, f.name) for f in fields(Scheme) if f.name != "format"}
        scheme = replace(ALIASES[scheme.format], **{key: value for key, value in said.items() if value is not None})
    if scheme.format == DENSE:
        return None
    if scheme.format not in FORMATS:
        raise RecipeError(f"format must be one of {', '.join([*FORMATS, *ALIASES, DENSE])}, got {scheme.format!r}")
    form = FORMATS[scheme.format].build(scheme, layout)
    if form.unloadable is not None and not unloadable:
        raise RecipeError(form.unloadable)
    return form
