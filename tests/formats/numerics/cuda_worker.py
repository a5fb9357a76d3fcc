"""Runs the CUDA kernels, in this process on a GPU or in a second one under Triton's interpreter, and compares bits.

The interpreter must be chosen before triton is imported, so it gets a process of its own: the tests
around it, and the libraries that they load, never see it.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from mso_hub.formats.numerics import floats
from tests.formats.numerics.strategies import TORCH, to_bits, to_torch

TAGS = {np.dtype(np.uint16): "BF16", np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}


def choose_interpreter() -> None:
    """First thing in the new process."""
    os.environ["TRITON_INTERPRET"] = "1"
    np.seterr(all="ignore")  # the interpreter computes with numpy


def call(device: str, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """`module.function` of the cuda package; numpy in, numpy out, BF16 as uint16, dtypes by their tag."""
    module, _, function = name.rpartition(".")
    run = getattr(import_module(f"mso_hub.formats.numerics.cuda.{module}"), function)
    result = run(*(enter(a, device) for a in args), **{key: enter(a, device) for key, a in options.items()})
    return tuple(map(leave, result)) if isinstance(result, tuple) else leave(result)


def enter(argument: Any, device: str) -> Any:
    """A numpy array as a tensor on the device, a dtype tag as a torch dtype; anything else as it is."""
    if isinstance(argument, str):
        return TORCH.get(argument, argument)
    if not isinstance(argument, np.ndarray):
        return argument
    tag = TAGS.get(argument.dtype)
    tensor = to_torch(argument, tag) if tag else torch.from_numpy(np.array(argument))
    return tensor.to(device)


def leave(result: Any) -> Any:
    """A tensor as numpy: uint16 for BF16, otherwise its own type."""
    if not isinstance(result, torch.Tensor):
        return result
    result = result.cpu()
    return to_bits(result) if result.dtype == torch.bfloat16 else result.numpy()


class Kernels:
    """kernels("nvfp4.encode", values, scale) -> what that function returns, on one device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), choose_interpreter) if device == "cpu" else None

    def __call__(self, name: str, *args: Any, **options: Any) -> Any:
        if self.pool is None:
            return call(self.device, name, args, options)
        return self.pool.submit(call, self.device, name, args, options).result()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal bits; a NaN may be any NaN."""
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (ours, theirs)), strict=True):
        if a is b is None:
            continue
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        np.testing.assert_array_equal(canonical(a), canonical(b))


def canonical(values: floats.Array) -> floats.Array:
    """Bits; floats (BF16 as uint16) with one pattern for all NaN."""
    tag = {"uint16": "BF16", "float16": "F16", "float32": "F32"}.get(values.dtype.name)
    if tag is None:
        return values
    wide = floats.widen(np.ascontiguousarray(values), tag)
    return np.where(np.isnan(wide), np.float32(np.nan), wide).view(np.uint32)
