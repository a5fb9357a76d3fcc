"""Calibration layer by layer against the whole model in memory: anonymous memory and time.

    python -m tests.benchmarks.bench_calibrate

A mixture of experts of 1.2 GB with random weights is made once below bench-work/. Each way of running it is a process
of its own. Exits with an error when reading experts one at a time takes more than 0.35 of the memory of the whole
model, or more than 1.4 times its forward and one reading of the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks.runners import ROOT, machine, table

if TYPE_CHECKING:
    from torch import Tensor

MEMORY, TIME = 0.35, 1.4
"""Bounds, of the whole model's."""
BATCHES, ROWS, LENGTH = 2, 8, 512
PASSES = 2
"""The best counts: other work on the machine only ever adds."""
ROUNDS = 2
"""Further measurements of both sides of a broken bound, for the same reason."""
MB = 1 << 20
WAYS = ("whole", "read", "expert", "stack")


def make_model(folder: Path) -> None:
    """8 layers of 48 experts, 151 MB each."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=2048, moe_intermediate_size=512, num_experts=48,
        num_experts_per_tok=4, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    model.save_pretrained(folder, max_shard_size="400MB")


def one_way(way: str, folder: Path) -> dict[str, float]:
    """Seconds and peak of one way, in this process."""
    import torch
    import transformers
    from transformers.models.qwen3_moe import modeling_qwen3_moe  # noqa: F401

    from mso_hub.calibrate import walk  # noqa: F401 - its imports, and the model's, are not what is measured
    from tests.calibrate.anonymous import peak_memory

    transformers.utils.logging.disable_progress_bar()
    ids = torch.randint(0, 8192, (BATCHES, ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    with peak_memory() as peak:
        run = _prepared(way, folder, ids)
        run()
    times = []
    for _ in range(PASSES):  # not while memory is watched, which takes time of its own
        began, busy = time.perf_counter(), time.process_time()
        run()
        times.append((time.process_time() - busy, time.perf_counter() - began))
    used, seconds = min(times)
    return {"seconds": seconds, "used": used, "peak": peak.nbytes}


def _prepared(way: str, folder: Path, ids: Tensor) -> Callable[[], None]:
    """What is timed; the whole model is loaded before that."""
    import torch
    import transformers

    if way == "read":
        return partial(_read_all, folder)
    if way != "whole":
        return partial(_walk, folder, way, ids)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()

    def forward() -> None:
        with torch.no_grad():
            for batch in ids:
                model.model(batch, use_cache=False)

    return forward


def _read_all(folder: Path) -> None:
    from mso_hub.source import open_source, read_checkpoint

    source = open_source(folder)
    for group in read_checkpoint(source).groups:
        for info in group.tensors.values():
            source.read(info.file, info.begin, info.end)


def _walk(folder: Path, experts: str, ids: Tensor) -> None:
    from mso_hub.calibrate.walk import Observer, Walk
    from mso_hub.source import open_source

    class Largest(Observer):
        """What calibration for static scales does."""

        def __init__(self) -> None:
            self.amax: dict[str, Tensor] = {}

        def inputs(self, module: str, x: Tensor) -> Tensor:
            found = x.abs().amax()
            self.amax[module] = found if module not in self.amax else found.maximum(self.amax[module])
            return x

    Walk(open_source(folder), experts=experts).run(list(ids), Largest())


def measure(way: str, folder: Path) -> dict[str, float]:
    """The same in a fresh process."""
    words = [sys.executable, "-m", "tests.benchmarks.bench_calibrate", "--way", way, "--model", str(folder)]
    found = subprocess.run(
        words, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    result: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure, print the table, fail if a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=ROOT / "bench-work")
    parser.add_argument("--way", choices=WAYS, help="run one way here and print JSON")
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(one_way(options.way, options.model)))
        return

    folder = options.workdir.absolute() / "calibrate-moe"
    if not (folder / "model.safetensors.index.json").is_file():
        make_model(folder)
    found = {way: measure(way, folder) for way in WAYS}
    for _ in range(ROUNDS):
        if not broken(found):
            break
        for way in ("whole", "expert"):
            again = measure(way, folder)
            found[way] |= {key: min(found[way][key], again[key]) for key in ("used", "seconds")}
    show(found, folder)
    if broken(found):
        sys.exit("a bound is broken")


def broken(found: dict[str, dict[str, float]]) -> bool:
    """Is a bound broken?"""
    whole, expert = found["whole"], found["expert"]
    return expert["peak"] > MEMORY * whole["peak"] or expert["used"] > TIME * (whole["used"] + found["read"]["used"])


def show(found: dict[str, dict[str, float]], folder: Path) -> None:
    """The table."""
    whole = found["whole"]
    plain = whole["used"] + found["read"]["used"]
    rows = []
    for way in WAYS:
        one = found[way]
        share = f"{one['peak'] / whole['peak']:.2f}" if way != "read" else ""
        times = f"{one['used'] / plain:.2f}" if way in ("expert", "stack") else ""
        rows.append((way, f"{one['peak'] / MB:.0f}", share, f"{one['used']:.1f}", times, f"{one['seconds']:.1f}"))
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"{weights / MB:.0f} MiB of BF16, {BATCHES * ROWS * LENGTH} tokens in {BATCHES} batches; {machine()}\n")
    print(table(("way", "peak RssAnon MiB", "of whole", "processor s", "of whole + read", "wall s"), rows))
    print(f"\nbounds for `expert`: memory {MEMORY} of whole, processor time {TIME} of whole + read")


if __name__ == "__main__":
    main()
