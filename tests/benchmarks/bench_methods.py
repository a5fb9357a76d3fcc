"""What methods gain: the small trained model in four bits, with each method, on held-out text.

    python -m tests.benchmarks.bench_methods [--tokens 32768]

KL divergence of the next-token distributions, BF16 model against the dequantized one, per token, on both halves of the
text; how often the first choice is the same; processor time of the method. Calibrated on text of the training set.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from mso_hub.calibrate.methods import MethodSettings, run
from mso_hub.calibrate.walk import Walk
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from mso_hub.source import Source, open_source
from tests.benchmarks.runners import machine, table
from tests.calibrate.methods import REAL, batches, heldout, kl, predictions

RECIPES = {
    "INT4 g32": Recipe(scheme="w4a16", mode="all-linear", group_size=32),
    "INT4 g128": Recipe(scheme="w4a16", mode="all-linear", group_size=128),
    "INT8 rows": Recipe(scheme="w8a16", mode="all-linear", group_size=0),
    "NVFP4": Recipe(scheme="nvfp4", mode="all-linear"),
    "MXFP4": Recipe(scheme="mxfp4", mode="all-linear"),
}
RUNS: tuple[tuple[str, str, MethodSettings], ...] = (
    ("weighted search", "weighted", MethodSettings()),
    ("AWQ", "awq", MethodSettings()),
    ("GPTQ, as stored", "gptq", MethodSettings(actorder="none")),
    ("GPTQ, act-order", "gptq", MethodSettings()),
    ("GPTQ, act-order, weighted", "gptq", MethodSettings(weighted=True)),
)


def row(label: str, name: str, source: Path | Source, recipe: Recipe, original: Tensor, seconds: float) -> list[str]:
    """A line of the table."""
    with tempfile.TemporaryDirectory() as scratch:
        convert(source, Path(scratch, "packed"), recipe)
        convert(Path(scratch, "packed"), Path(scratch, "dense"), Recipe(scheme="bf16"))
        found = predictions(Path(scratch, "dense"), heldout())
    half = len(found) // 2
    parts = [slice(None), slice(half), slice(half, None)]
    same = (found.argmax(-1) == original.argmax(-1)).float().mean().item()
    numbers = [f"{kl(original[part], found[part]):.6f}" for part in parts]
    return [label, name, *numbers, f"{100 * same:.2f} %", f"{seconds:.1f} s" if seconds else ""]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    tokens = parser.parse_args().tokens
    torch.set_num_threads(1)
    original = predictions(REAL, heldout())
    rows = []
    for label, recipe in RECIPES.items():
        rows.append(row(label, "nearest", REAL, recipe, original, 0))
        for name, method, settings in RUNS:
            with tempfile.TemporaryDirectory() as scratch:
                began = time.process_time()
                made = run(
                    Walk(open_source(REAL)), batches(tokens), recipe, Path(scratch), method=method, settings=settings
                )
                spent = time.process_time() - began
                rows.append(row(label, name, made.source, recipe, original, spent))
            print("  ".join(rows[-1]), flush=True)
    print(f"\n{tokens:,} tokens of calibration, {len(original):,} held out, every linear layer; {machine()}\n")
    print(table(("format", "method", "KL", "first half", "second half", "same first choice", "processor time"), rows))


if __name__ == "__main__":
    main()
