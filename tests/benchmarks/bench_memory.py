"""Peak memory must follow the largest tensor, not the size of a shard or of the checkpoint.

    python -m tests.benchmarks.bench_memory --size-gb 8

The same checkpoint is converted as one shard and as sixteen. Exits with an error if a bound is broken.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.benchmarks.checkpoints import llama_entries
from tests.benchmarks.runners import (
    GB,
    MB,
    ROOT,
    CommandFailed,
    machine,
    make_checkpoint,
    measure,
    mso_hub,
    remove,
    table,
)

FIXED = 700e6  # interpreter, PyTorch, compiled kernels
TENSORS = 2  # the largest tensor, twice: one being read while one is encoded


def peak_rss(workdir: Path, size_gb: float, shards: int, hidden: int) -> tuple[int, int]:
    """Bytes of the largest shard and the peak of converting such a checkpoint; both folders are deleted."""
    source, target = workdir / f"memory-{shards}", workdir / "memory-output"
    try:
        make_checkpoint(source, "llama", shards, "--size-gb", str(size_gb), "--hidden", str(hidden))
        remove(target)
        largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
        folders = ("--input_dir", source, "--output_dir", target)
        return largest, measure([mso_hub(), "quantize", *folders, "--all_linear"]).peak_rss
    finally:
        remove(source)
        remove(target)


def main() -> None:
    """Measure, print the table, fail if the bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=8.0)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--workdir", type=Path, default=ROOT / "bench-work")
    options = parser.parse_args()

    tensor = max(entry.nbytes for entry in llama_entries(options.hidden, 1))
    bound = FIXED + TENSORS * tensor
    rows, broken = [], False
    for shards in options.shards:
        largest, peak = peak_rss(options.workdir.absolute(), options.size_gb, shards, options.hidden)
        broken |= peak > bound
        verdict = "pass" if peak <= bound else "FAIL"
        rows.append((str(shards), f"{largest / GB:.2f}", f"{peak / MB:.0f}", f"{bound / MB:.0f}", verdict))
    print(f"{options.size_gb:g} GB of BF16, largest tensor {tensor / MB:.0f} MB; {machine()}")
    print(f"bound: {FIXED / MB:.0f} MB + {TENSORS} * largest tensor\n")
    print(table(("shards", "largest shard GB", "peak RSS MB", "bound MB", ""), rows))
    if broken:
        sys.exit("peak memory is over the bound")


if __name__ == "__main__":
    try:
        main()
    except (CommandFailed, FileNotFoundError) as error:
        sys.exit(str(error))
