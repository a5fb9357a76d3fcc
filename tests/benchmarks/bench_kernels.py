"""How fast every format is encoded and decoded, beside its reference library in the same run.

    python -m tests.benchmarks.bench_kernels [--threads 2] [--no-peers]

MB of BF16 per second of processor time, so per core, whatever else runs on the machine: of the numbers that are
encoded, or that decoding yields. One 4096 x 4096 matrix of Gaussian numbers, cut into row blocks of 8 MB that go to the
threads as the engine does it; medians. The blocks are independent: n cores do n times as much. The references are
ModelOpt's NVFP4QTensor and compressed-tensors' quantize and dequantize, with as many torch threads.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from mso_hub.formats import Format
from mso_hub.formats.numerics import floats
from tests.benchmarks.runners import MB, machine, table
from tests.benchmarks.variants import SCHEMES, variants

ROWS = COLUMNS = 4096
REPEAT = 7
BLOCK_ROWS = (8 << 20) // (2 * COLUMNS)


def seconds(work: Callable[[], object], repeat: int = REPEAT) -> float:
    """Median processor time of a call, the first one not counted."""
    work()
    taken = []
    for _ in range(repeat):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def ours(form: Format, bits: floats.Array, pool: ThreadPoolExecutor) -> tuple[float, float]:
    """(encode, decode) seconds."""
    amax = floats.amax(bits, "BF16")
    blocks = [bits[at : at + BLOCK_ROWS] for at in range(0, ROWS, BLOCK_ROWS)]
    encoded = [form.encode(block, "BF16", "BF16", amax) for block in blocks]

    def encode() -> None:
        list(pool.map(lambda block: form.encode(block, "BF16", "BF16", amax), blocks))

    def decode() -> None:
        list(pool.map(lambda arrays: form.decode(arrays, COLUMNS, "BF16", amax), encoded))

    return seconds(encode), seconds(decode)


def theirs(label: str, form: Format, bits: floats.Array) -> tuple[str, float, float] | None:
    """(library, encode, decode seconds) of the reference library."""
    weight = torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16)
    if form.name == "nvfp4":
        return "ModelOpt", *modelopt(weight)
    return "compressed-tensors", *compressed_tensors(form, weight)


def modelopt(weight: torch.Tensor) -> tuple[float, float]:
    """NVFP4QTensor."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    packed, scale, scale_2 = NVFP4QTensor.quantize(weight, 16)
    sizes = {-1: 16}
    return (
        seconds(lambda: NVFP4QTensor.quantize(weight, 16), 3),
        seconds(lambda: packed.dequantize(torch.bfloat16, scale=scale, double_scale=scale_2, block_sizes=sizes), 3),
    )


def compressed_tensors(form: Format, weight: torch.Tensor) -> tuple[float, float]:
    """Scales by calculate_qparams, then quantize and dequantize; packing is not counted."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs.model_validate(form.group["weights"])

    def scales() -> tuple[torch.Tensor, torch.Tensor]:
        low, high = extremes(weight, args)
        return calculate_qparams(low, high, args)

    def encode() -> torch.Tensor:
        scale, zero = scales()
        return quantize(weight, scale, zero, args, dtype=None)

    scale, zero = scales()
    codes = encode()
    return seconds(encode, 3), seconds(lambda: dequantize(codes, scale, zero, args), 3)


def extremes(weight: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and largest number of every group of columns, row, block or tensor."""
    strategy, group = str(args.strategy), int(args.group_size or 0)
    rows, columns = weight.shape
    if strategy == "group":
        cells: torch.Tensor = weight.view(rows, columns // group, group)
        return cells.amin(-1), cells.amax(-1)
    if strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if strategy == "block":
        cells = weight.view(rows // 128, 128, columns // 128, 128)
        return cells.amin((1, 3)), cells.amax((1, 3))
    return weight.amin().reshape(1), weight.amax().reshape(1)


def rate(nbytes: int, taken: float) -> str:
    """MB/s."""
    return f"{nbytes / MB / taken:,.0f}"


def rows(threads: int, *, peers: bool) -> Sequence[Sequence[str]]:
    """The table's rows."""
    values = (np.random.default_rng(0).standard_normal((ROWS, COLUMNS)) * 0.02).astype(np.float32)
    bits = floats.narrow(values, "BF16")
    torch.set_num_threads(threads)
    found = []
    done: set[str] = set()
    with ThreadPoolExecutor(threads) as pool:
        for label, search, form in variants():
            encode, decode = ours(form, bits, pool)
            cells = [label, search, rate(bits.nbytes, encode), rate(bits.nbytes, decode)]
            if peers and label not in done and (peer := theirs(label, form, bits)) is not None:
                name, other, back = peer
                cells += [name, f"{rate(bits.nbytes, other)} ({other / encode:.1f} x)"]
                cells += [f"{rate(bits.nbytes, back)} ({back / decode:.1f} x)"]
            done.add(label)
            found.append([*cells, *([""] * (7 - len(cells)))])
            print("  ".join(found[-1]), flush=True)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    lines = rows(options.threads, peers=not options.no_peers)
    print(
        f"\nMB of BF16 per second, {ROWS} x {COLUMNS}, {options.threads} threads, {len(SCHEMES)} schemes; {machine()}\n"
    )
    titles = ("format", "scales", "encode", "decode", "reference", "its encode (ours faster)", "its decode")
    print(table(titles, lines))


if __name__ == "__main__":
    main()
