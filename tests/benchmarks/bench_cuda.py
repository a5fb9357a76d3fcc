"""Speed of the CUDA kernels, beside a copy on the same device and ModelOpt's own classes.

    python -m tests.benchmarks.bench_cuda --rows 8192 --columns 8192

GB/s of BF16: bytes of the dense matrix over the median time. A kernel that only waits for memory reaches more than the
copy, since its other side is smaller than BF16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mso_hub.formats.numerics.cuda import floats, fp8, integer, integer_encode, nvfp4
from mso_hub.formats.numerics.nvfp4 import SEARCHES, global_scale
from tests.benchmarks.runners import GB, machine, table

WARM_UP, REPEAT = 3, 20
Calls = dict[str, Callable[[], object]]


def seconds(call: Callable[[], object]) -> float:
    """Median time of one call on the device; compilation and the first calls are left out."""
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(REPEAT):
        start, stop = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return statistics.median(times)


def our_calls(weight: Tensor) -> Calls:
    """Every function of the cuda package, by name; what decoders need is encoded first."""
    return {"amax": lambda: floats.amax(weight)} | nvfp4_calls(weight) | fp8_calls(weight) | integer_calls(weight)


def nvfp4_calls(weight: Tensor) -> Calls:
    """All searches and both layouts."""
    dtype, largest = weight.dtype, floats.amax(weight)
    calls: Calls = {}
    for search in SEARCHES:
        scale = float(global_scale(largest, search=search))
        calls[f"nvfp4 encode, {search}"] = partial(nvfp4.encode, weight, scale, search=search)
    packed, block = nvfp4.encode(weight, scale)
    calls["nvfp4 decode"] = partial(nvfp4.decode, packed, block, scale, dtype)
    calls["nvfp4 decode_divided"] = partial(nvfp4.decode_divided, packed, block, 1 / scale, dtype)
    return calls


def fp8_calls(weight: Tensor) -> Calls:
    """Rows, blocks and the whole tensor."""
    dtype, (rows, cols) = weight.dtype, weight.shape
    codes, scale = fp8.encode_rows(weight, dtype)
    tiled, tile_scale = fp8.encode_blocks(weight, dtype)
    return {
        "fp8 encode_rows, absmax": partial(fp8.encode_rows, weight, dtype),
        "fp8 encode_rows, mse": partial(fp8.encode_rows, weight, dtype, search="mse"),
        "fp8 encode_rows, exact": partial(fp8.encode_rows, fp8.decode(codes, scale, (1, cols), dtype), dtype),
        "fp8 encode_blocks, absmax": partial(fp8.encode_blocks, weight, dtype),
        "fp8 encode_blocks, mse": partial(fp8.encode_blocks, weight, dtype, search="mse"),
        "fp8 encode_tensor": partial(fp8.encode_tensor, weight, floats.amax(weight) / 448),
        "fp8 decode, tensor": partial(fp8.decode, codes, scale[:1], (rows, cols), dtype),
        "fp8 decode, rows": partial(fp8.decode, codes, scale, (1, cols), dtype),
        "fp8 decode, blocks": partial(fp8.decode, tiled, tile_scale, (128, 128), dtype),
    }


def integer_calls(weight: Tensor) -> Calls:
    """Groups of 128 and rows; symmetric, and with zero points."""
    dtype, cols = weight.dtype, weight.shape[1]
    calls: Calls = {}
    for bits, size in ((4, 128), (8, None)):
        name = f"int{bits}, {f'groups of {size}' if size else 'rows'}"
        for symmetric in (True, False):
            kind = name if symmetric else f"{name}, asymmetric"
            options: dict[str, Any] = {"bits": bits, "group_size": size, "symmetric": symmetric, "scale_dtype": dtype}
            calls[f"{kind}, encode absmax"] = partial(integer_encode.encode, weight, **options)
            calls[f"{kind}, encode mse"] = partial(integer_encode.encode, weight, **options, search="mse")
        codes, scale, zeros = integer_encode.encode(weight, **options)
        packed = integer_encode.pack(codes, bits)
        calls[f"{name}, pack"] = partial(integer_encode.pack, codes, bits)
        layout: dict[str, Any] = {"bits": bits, "group_size": size, "cols": cols, "dense": True, "dtype": dtype}
        calls[f"{name}, decode"] = partial(integer.decode, packed, scale, zeros, None, **layout)
    return calls


def modelopt_calls(weight: Tensor) -> Calls:
    """ModelOpt's classes for the same formats, under the names of ours; empty when it is not installed."""
    try:
        from modelopt.torch.quantization.qtensor import FP8QTensor, INT4QTensor, NVFP4QTensor
    except ImportError:
        return {}

    bf16, tiles = torch.bfloat16, {-1: 128, -2: 128}
    fp4, scale, scale_2 = NVFP4QTensor.quantize(weight, 16)
    fp8, fp8_scale = FP8QTensor.quantize(weight, axis=0)
    int4, int4_scale = INT4QTensor.quantize(weight, 128)
    return {
        "nvfp4 encode, absmax": lambda: NVFP4QTensor.quantize(weight, 16, weights_scaling_factor_2=scale_2),
        "nvfp4 decode": lambda: fp4.dequantize(bf16, scale=scale, double_scale=scale_2, block_sizes={-1: 16}),
        "fp8 encode_rows, absmax": lambda: FP8QTensor.quantize(weight, axis=0),
        "fp8 encode_blocks, absmax": lambda: FP8QTensor.quantize(weight, block_sizes=tiles),
        "fp8 decode, rows": lambda: fp8.dequantize(bf16, scale=fp8_scale),
        "int4, groups of 128, encode absmax": lambda: INT4QTensor.quantize(weight, 128),
        "int4, groups of 128, decode": lambda: int4.dequantize(bf16, scale=int4_scale, block_sizes={-1: 128}),
    }


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=8192)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: nothing was measured")

    weight = (torch.randn(options.rows, options.columns, device="cuda") * 0.02).bfloat16()
    speed = {name: weight.nbytes / GB / seconds(call) for name, call in our_calls(weight).items()}
    theirs = {name: weight.nbytes / GB / seconds(call) for name, call in modelopt_calls(weight).items()}
    copy = weight.nbytes / GB / seconds(weight.clone)
    rows = [
        (name, f"{ours:,.0f}", f"{ours / copy:.2f}", f"{theirs[name]:,.0f}" if name in theirs else "")
        for name, ours in speed.items()
    ]
    device = torch.cuda.get_device_properties(0)
    print(f"{options.rows} x {options.columns} BF16 on {device.name}, torch {torch.__version__}; {machine()}")
    print(f"copy: {copy:,.0f} GB/s of BF16 (as much is read as is written)\n")
    print(table(("", "GB/s", "of the copy", "ModelOpt GB/s"), rows))


if __name__ == "__main__":
    main()
