"""What the Triton compiler makes of the kernels, without a GPU: the arithmetic that the bytes depend on is there as such.

Under Triton's interpreter a division is numpy's, so `test_cuda.py` alone would not see a compiler that
approximates it, that contracts a product and a sum to one rounding, or that flushes subnormal numbers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs triton's compiler", allow_module_level=True)

import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mso_hub.formats.numerics.cuda import floats, fp8, integer, nvfp4

if "nvidia" not in backends:
    pytest.skip("this triton has no CUDA compiler", allow_module_level=True)

POINTERS = {
    "codes": "*u8",
    "factor": "*fp32",
    "global_scale": "*fp32",
    "index": "*i32",
    "out": "*i16",
    "packed": "*u8",
    "scale": "*fp32",
    "x": "*i16",
    "zero_point": "*i8",
}
"""Types of the arguments by name; whatever is not here is an int32 number. int16 are the bits of BF16."""

INTEGER = {"packed": "*i32", "codes": "*i8"}
NVFP4 = {"scale": "*u8"}
KERNELS: dict[str, tuple[Any, Mapping[str, str], Mapping[str, Any]]] = {
    "nvfp4 encode": (nvfp4._encode, NVFP4, {"TILE": 128}),
    "nvfp4 encode F16": (nvfp4._encode, NVFP4 | {"x": "*fp16"}, {"TILE": 128}),
    "nvfp4 encode F32": (nvfp4._encode, NVFP4 | {"x": "*fp32"}, {"TILE": 128}),
    "nvfp4 decode": (nvfp4._decode, NVFP4, {"DIVIDED": False, "TILE": 128}),
    "nvfp4 decode_divided F16": (nvfp4._decode, NVFP4 | {"out": "*fp16"}, {"DIVIDED": True, "TILE": 128}),
    "fp8 decode": (fp8._decode, {}, {"SIZE_COLS": 128, "TILE": 1024}),
    "integer unpack": (integer._unpack, INTEGER, {"BITS": 3, "PER_WORD": 0, "TILE": 1024}),
    "integer decode": (integer._decode, INTEGER, {"GROUP": 0, "BITS": 4, "PER_WORD": 0, "TILE": 1024, "index": None}),
    "integer decode F32": (
        integer._decode,
        INTEGER | {"out": "*fp32"},
        {"GROUP": 128, "BITS": 0, "PER_WORD": 0, "TILE": 1024, "zero_point": None},
    ),
}
DIVIDES = {"nvfp4 encode", "nvfp4 encode F16", "nvfp4 encode F32", "nvfp4 decode_divided F16"}


def ptx(name: str, capability: int) -> str:
    """Assembly of one kernel for one generation of GPUs, which the assembler has accepted."""
    kernel, types, constants = KERNELS[name]
    signature = {a: "constexpr" if a in constants else types.get(a, POINTERS.get(a, "i32")) for a in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants))
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(floats.EXACT))
    assert compiled.asm["cubin"]
    return str(compiled.asm["ptx"])


@pytest.mark.parametrize("name", KERNELS)
def test_arithmetic_is_exact(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every operation on floats says that it rounds to nearest, and none is fused, approximate or flushes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for capability in (80, 90):
        text = ptx(name, capability)
        floating = re.findall(r"\b(?:add|sub|mul|div|fma|mad)(?:\.\w+)*\.f(?:32|64)\b", text)
        assert set(floating) <= {f"{op}.rn.f{n}" for op in ("add", "sub", "mul", "div") for n in (32, 64)}
        assert ("div.rn.f32" in floating) == (name in DIVIDES)
        assert ".ftz" not in text
        assert ".approx" not in text
