"""How like the original every scheme predicts: the small trained model on text that it never saw.

    python -m tests.benchmarks.bench_evaluate [--tokens 19200]

Weights are quantized as they are read, activations as the runtime would; KL divergence and equal first choices are
against the BF16 model. Then, at several numbers of bits, what a choice of formats by KL divergence gives against one by
squared error. Times are processor times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mso_hub.assess import choose_formats
from mso_hub.calibrate.evaluate import Settings, evaluate
from mso_hub.calibrate.text import Rows
from mso_hub.calibrate.text.rows import digest
from mso_hub.losses import write_table
from mso_hub.plan import Recipe
from mso_hub.sensitivity import measure_sensitivity
from tests.benchmarks.runners import machine, table
from tests.calibrate.architectures import quiet_transformers
from tests.calibrate.heldout import REAL, heldout

WHOLE = Recipe(mode="all-linear")
F32 = Settings(dtype="F32")
TRIAL_ROWS = 16
"""Rows on which formats are chosen; the choice is evaluated on the others."""


def schemes() -> Iterator[tuple[str, Recipe]]:
    """In the order of what they should cost."""

    def whole(**said: Any) -> Recipe:
        """All linear layers."""
        return replace(WHOLE, **said)

    yield "INT8 W8A16 g128", whole(scheme="w8a16")
    yield "INT8 W8A8, scale per row", whole(scheme="int8")
    yield "FP8 blocks of 128x128, W8A8", whole(scheme="fp8_block")
    yield "FP8 per row, W8A8", whole(scheme="fp8_dynamic")
    yield "FP8 per tensor, W8A8 dynamic", whole(scheme="fp8")
    yield "MXFP8 W8A8", whole(scheme="mxfp8")
    yield "NVFP4 W4A16", WHOLE
    yield "NVFP4 W4A16, absmax", whole(scale_search="absmax")
    yield "INT4 W4A16 g32", whole(scheme="w4a16", group_size=32)
    yield "INT4 W4A16 g128", whole(scheme="w4a16", group_size=128)
    yield "MXFP4 W4A16", whole(scheme="mxfp4")
    yield "MXFP4 W4A8", whole(scheme="mxfp4", activations=8)
    yield "NVFP4 W4A4, constant scale 1", whole(activations=4)
    yield "MXFP4 W4A4", whole(scheme="mxfp4", activations=4)
    yield "NVFP4 W4A4, scales clip (amax 2)", whole(input_scale=2 / 2688)


def compare(rows: Rows) -> list[tuple[str, ...]]:
    """A line for every scheme."""
    found: list[tuple[str, ...]] = []
    for name, recipe in schemes():
        began = time.process_time()
        made = evaluate(REAL, rows, recipe=recipe)
        other = made.reference
        assert other is not None
        found.append(
            (name, f"{made.perplexity:.3f}", f"{100 * (made.perplexity / other.perplexity - 1):+.2f} %",
             f"{other.kl:.5f}", f"{other.kl_error or 0:.5f}", f"{100 * other.agreement:.2f} %",
             f"{time.process_time() - began:.1f} s")
        )  # fmt: skip
        print("  ".join(found[-1]), flush=True)
    return found


def choices(rows: Rows) -> list[tuple[str, ...]]:
    """KL divergence on unseen rows of a choice by squared error and of one by KL divergence."""
    first, rest = rows.sequences[:TRIAL_ROWS], rows.sequences[TRIAL_ROWS:]
    trial, unseen = (replace(rows, sequences=part, sha256=digest(part)) for part in (first, rest))
    began = time.process_time()
    measured = measure_sensitivity(REAL, WHOLE, trial, ["nvfp4", "fp8"], settings=F32, on_cost=print)
    print(f"{time.process_time() - began:.1f} s")
    found = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        write_table(measured, path)
        for bits in (5.0, 5.5, 6.0, 7.0):
            row = [f"{bits:g}"]
            for by in (None, path):
                choice = choose_formats(REAL, WHOLE, fallback=["fp8", "bf16"], target_bits=bits, table=by)
                other = evaluate(REAL, unseen, recipe=choice.recipe, settings=F32).reference
                assert other is not None
                row.append(f"{other.kl:.5f} +- {other.kl_error or 0:.5f}")
            found.append(tuple(row))
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=19200)
    rows = heldout(parser.parse_args().tokens)
    with quiet_transformers():
        lines = compare(rows)
        picks = choices(rows)
    print(f"\n{rows.tokens:,} tokens, every linear layer; {machine()}\n")
    print(table(("scheme", "perplexity", "", "KL", "+-", "same first choice", "time"), lines))
    print(f"\nchosen on {TRIAL_ROWS} rows, evaluated on the others, in F32\n")
    print(table(("bits", "by squared error", "by KL divergence"), picks))


if __name__ == "__main__":
    main()
