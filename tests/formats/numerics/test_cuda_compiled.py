"""What the Triton compiler makes of the kernels, without a GPU: the arithmetic that their bytes depend on.

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

from mso_hub.formats.numerics.cuda import floats, fp8, integer, integer_encode, nvfp4

if "nvidia" not in backends:
    pytest.skip("this triton has no CUDA compiler", allow_module_level=True)

POINTERS = {
    "codes": "*u8",
    "factor": "*fp32",
    "global_scale": "*fp32",
    "index": "*i32",
    "multiples": "*fp32",
    "out": "*i16",
    "packed": "*u8",
    "scale": "*fp32",
    "tried": "*fp32",
    "x": "*i16",
    "zero_point": "*i8",
}
"""Types of the arguments by name; whatever is not here is an int32 number. int16 are the bits of BF16."""

F16, F32 = {"x": "*fp16", "out": "*fp16"}, {"x": "*fp32", "out": "*fp32"}
NVFP4, INTEGER = {"scale": "*u8"}, {"packed": "*i32", "codes": "*i8"}
CELLS = {"precision": 1, "scale_precision": 1, "tile_rows": 1, "tile_cols": 1024}
GROUPS = {"eps": 2.0**-7, "bits": 4, "symmetric": True, "precision": 1, "scale_precision": 1}
GROUPS |= {"mse": False, "tile_groups": 32, "tile": 32}

KERNELS: dict[str, tuple[Any, Mapping[str, str], Mapping[str, Any]]] = {
    "nvfp4 encode absmax": (nvfp4._encode, NVFP4, {"search": 0, "tile": 128}),
    "nvfp4 encode mse": (nvfp4._encode, NVFP4, {"search": 1, "tile": 128}),
    "nvfp4 encode four_over_six": (nvfp4._encode, NVFP4 | F16, {"search": 2, "tile": 128}),
    "nvfp4 encode power": (nvfp4._encode, NVFP4 | F32, {"search": 3, "tile": 128}),
    "nvfp4 decode": (nvfp4._decode, NVFP4, {"divided": False, "tile": 128}),
    "nvfp4 decode_divided": (nvfp4._decode, NVFP4 | F16, {"divided": True, "tile": 128}),
    "fp8 encode absmax": (fp8._encode_cells, {}, CELLS | {"mse": False}),
    "fp8 encode mse": (fp8._encode_cells, F16, CELLS | {"mse": True, "precision": 2, "tile_rows": 8, "tile_cols": 128}),
    "fp8 encode_tensor": (fp8._encode_tensor, F32, {"precision": 0, "tile": 1024}),
    "fp8 decode": (fp8._decode, {}, {"width": 128, "tile": 1024}),
    "integer encode": (integer_encode._encode, INTEGER, GROUPS),
    "integer encode mse": (integer_encode._encode, INTEGER | F32, GROUPS | {"mse": True, "precision": 0}),
    "integer encode asymmetric": (
        integer_encode._encode,
        INTEGER | F16,
        GROUPS | {"symmetric": False, "precision": 2, "scale_precision": 0},
    ),
    "integer pack": (integer_encode._pack, INTEGER, {"bits": 3, "tile": 1024}),
    "integer unpack": (integer._unpack, INTEGER, {"bits": 3, "per_word": 0, "tile": 1024}),
    "integer decode": (
        integer._decode,
        INTEGER,
        {"group_size": 0, "bits": 4, "per_word": 0, "tile": 1024, "index": None},
    ),
    "integer decode F32": (
        integer._decode,
        INTEGER | F32,
        {"group_size": 128, "bits": 0, "per_word": 0, "tile": 1024, "zero_point": None},
    ),
}
DIVIDES = {name for name in KERNELS if "encode" in name} | {"nvfp4 decode_divided"}


def ptx(name: str) -> str:
    """Assembly of one kernel for an H100, which the assembler has accepted."""
    kernel, types, constants = KERNELS[name]
    signature = {a: "constexpr" if a in constants else types.get(a, POINTERS.get(a, "i32")) for a in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants))
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(floats.EXACT))
    assert compiled.asm["cubin"]
    return str(compiled.asm["ptx"])


@pytest.mark.parametrize("name", KERNELS)
def test_arithmetic_is_exact(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every operation on floats says that it rounds to nearest, and none is fused, approximate or flushes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    text = ptx(name)
    floating = re.findall(r"\b(?:add|sub|mul|div|fma|mad)(?:\.\w+)*\.f(?:32|64)\b", text)
    assert set(floating) <= {f"{op}.rn.f{n}" for op in ("add", "sub", "mul", "div") for n in (32, 64)}
    assert ("div.rn.f32" in floating) == (name in DIVIDES)
    assert ".ftz" not in text
    assert ".approx" not in text
