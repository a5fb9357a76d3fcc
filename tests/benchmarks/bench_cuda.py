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

import torch
from torch import Tensor

from tests.benchmarks.runners import GB, machine, table

WARM_UP, REPEAT = 3, 20
Calls = dict[str, Callable[[], object]]


def seconds(call: Callable[[], object]) -> float:
    """Median time of one call on the device; compilation and the first calls are left out."""
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(REPEAT):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return statistics.median(times)


def our_calls(weight: Tensor) -> Calls:
    """Every function of the cuda package, by name; what decoders need is encoded first."""
    from mso_hub.formats.numerics import nvfp4 as host
    from mso_hub.formats.numerics.cuda import floats, nvfp4

    bf16, cols = torch.bfloat16, weight.shape[1]
    g = float(host.global_scale(floats.amax(weight)))
    packed, block = nvfp4.encode(weight, g)
    return {
        "nvfp4 encode, absmax": lambda: nvfp4.encode(weight, g),
        "nvfp4 decode": lambda: nvfp4.decode(packed, block, g, bf16),
        "nvfp4 decode_divided": lambda: nvfp4.decode_divided(packed, block, 1 / g, bf16),
    }


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
        "int4 encode, groups of 128": lambda: INT4QTensor.quantize(weight, 128),
        "int4 decode, groups of 128": lambda: int4.dequantize(bf16, scale=int4_scale, block_sizes={-1: 128}),
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
