"""Conversion for kt-kernel against kt-kernel's own quantizer: bytes of BF16 a second, and peak memory.

    MSO_KT_PYTHON=.venv-kt/bin/python python -m tests.benchmarks.bench_kt --size-gb 2

Experts have the sizes of DeepSeek-V3. Both write files; kt-kernel's time begins when the weights are in memory and ends
when its files are written, ours is the whole command without its start-up: reading, packing, hashing, writing. Speeds
are those of two processors that do nothing else: bytes over half the processor time. Exits with an error where we are
below 500 MB/s and below ten times its speed, or above 500 MB plus one expert.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from mso_hub.verify.kt_consumer import PROGRAM, VARIABLE
from tests.benchmarks.runners import (
    GB,
    MB,
    ROOT,
    CommandFailed,
    machine,
    measure,
    mso_hub,
    remove,
    table,
    warm_page_cache,
)

INNER, HIDDEN = 2048, 7168
EXPERT = 3 * 2 * INNER * HIDDEN
"""Bytes of an expert in BF16."""
LEAST, FACTOR = 500 * MB, 10
FIXED = 500 * MB
WORKERS = 2
THEIRS = 4
"""Experts that kt-kernel gets: it holds them all at once, and again as copies for its NUMA nodes."""
ORACLE = ROOT / "tests" / "kt" / "oracle_program.py"


def write_model(folder: Path, size_gb: float) -> int:
    """A model that is two layers of experts, one in each file; returns its bytes."""
    count = max(2, round(size_gb * GB / EXPERT / 2))
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for layer in range(2):
        tensors = {}
        for expert in range(count):
            for leaf in ("gate_proj", "up_proj", "down_proj"):
                shape = (HIDDEN, INNER) if leaf == "down_proj" else (INNER, HIDDEN)
                name = f"model.layers.{layer}.mlp.experts.{expert}.{leaf}.weight"
                tensors[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        file = f"model-0000{layer + 1}-of-00002.safetensors"
        weight_map |= dict.fromkeys(tensors, file)
        save_file(tensors, folder / file, {"format": "pt"})
    config = {
        "model_type": "deepseek_v3", "hidden_size": HIDDEN, "moe_intermediate_size": INNER, "num_hidden_layers": 2,
        "n_routed_experts": count,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return 2 * count * EXPERT


def kernel_speed(bits: int) -> float:
    """Bytes a second of the packing alone, two threads on numbers in memory."""
    from mso_hub.formats.numerics import kt

    numbers = np.random.default_rng(0).integers(0x3C00, 0x3D00, (INNER, HIDDEN)).astype(np.uint16)
    kt.encode(numbers[:128], "BF16", bits=bits)
    rounds = 24
    with ThreadPoolExecutor(WORKERS) as pool:
        start = process_time()
        list(pool.map(lambda _: kt.encode(numbers, "BF16", bits=bits), range(rounds)))
        return WORKERS * rounds * numbers.nbytes / (process_time() - start)


def measured(command: list[Any]) -> tuple[float, int, str]:
    """Processor seconds, peak and output of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = measure(command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, run.peak_rss, run.output


def ours(source: Path, target: Path, method: str, parts: int) -> tuple[float, int]:
    """Processor seconds and peak of a conversion, start-up included."""
    remove(target)
    words = ("--quant-method", method, "--threadpool-count", str(parts), "--workers", str(WORKERS), "--quiet")
    seconds, peak, _ = measured([mso_hub(), "kt", "convert", "--input-path", source, "--output", target, *words])
    return seconds, peak


def theirs(folder: Path, method: str, parts: int) -> float:
    """Bytes a second of kt-kernel's own classes."""
    remove(folder / "out")
    (folder / "out").mkdir(parents=True)
    job = {
        "program": str(PROGRAM.parent), "weights": str(folder / "weights.safetensors"), "layer": 0, "experts": THEIRS,
        "chosen": 1, "hidden": HIDDEN, "inner": INNER, "parts": parts, "method": f"AMX{method.upper()}",
        "folder": str(folder / "out"), "times": str(folder / "times.json"),
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    measure([os.environ[VARIABLE], ORACLE, folder / "job.json"])
    return float(THEIRS * EXPERT / json.loads((folder / "times.json").read_text())["work"] * WORKERS)


def write_theirs(folder: Path) -> None:
    """Experts for kt-kernel."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    shapes = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    stacked = {name: torch.randn(THEIRS, *shape, dtype=torch.bfloat16).mul_(0.02) for name, shape in shapes.items()}
    save_file(stacked, folder / "weights.safetensors")


def part(work: Path, name: str, size_gb: float) -> str:
    """Have another process do a part, so that its memory is not counted as ours -> what it says."""
    return measured([sys.executable, "-m", __spec__.name, "--part", name, "--size-gb", size_gb, "--workdir", work])[2]


def do_part(work: Path, name: str, size_gb: float) -> None:
    """What `part` asks for."""
    if name == "small":
        from tests.kt.helpers import Experts, moe_files

        (work / "small").mkdir()
        for file, data in moe_files(Experts()).items():
            (work / "small" / file).write_bytes(data)
    elif name == "model":
        print(write_model(work / "in", size_gb))
    elif name == "theirs":
        write_theirs(work / "theirs")
    else:
        print(kernel_speed(int(name)))


def start_up_of(work: Path) -> float:
    """Processor seconds of a conversion of next to nothing: interpreter, imports, compiled kernels."""
    folder = work / "small"
    part(work, "small", 0)
    ours(folder, work / "out", "int8", 1)
    return ours(folder, work / "out", "int8", 1)[0]


def main() -> None:
    """Measure, print the table, fail if a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=2.0)
    parser.add_argument("--workdir", type=Path, default=ROOT / "bench-work")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        do_part(options.workdir, options.part, options.size_gb)
        return
    work = options.workdir.absolute() / "kt"
    remove(work)
    rows, broken = [], []
    try:
        nbytes = int(part(work, "model", options.size_gb))
        part(work, "theirs", options.size_gb)
        start_up = start_up_of(work)
        for method, bits in (("int4", 4), ("int8", 8)):
            for parts in (1, 2):
                warm_page_cache(work / "in")
                seconds, peak = ours(work / "in", work / "out", method, parts)
                speed = nbytes / (seconds - start_up)
                other = theirs(work / "theirs", method, parts) if os.environ.get(VARIABLE) else 0.0
                broken += [f"{method}: {speed / MB:.0f} MB/s"] if speed < LEAST and speed < FACTOR * other else []
                broken += [f"{method}: peak {peak / MB:.0f} MB"] if peak > FIXED + EXPERT else []
                rows.append((
                    f"{method}, {parts} nodes", f"{float(part(work, str(bits), 0)) / MB:.0f}", f"{speed / MB:.0f}",
                    f"{other / MB:.0f}" if other else "not there", f"{peak / MB:.0f}",
                ))  # fmt: skip
    finally:
        remove(work)
    print(f"{nbytes / GB:.1f} GB of BF16 experts, {EXPERT / MB:.0f} MB each; {machine()}\n")
    print(table(("", "packing alone MB/s", "whole command MB/s", "kt-kernel MB/s", "our peak RSS MB"), rows))
    if broken:
        sys.exit("below the bound: " + ", ".join(broken))


if __name__ == "__main__":
    try:
        main()
    except (CommandFailed, FileNotFoundError) as error:
        sys.exit(str(error))
