"""What every format costs in accuracy, and what a search for better scales buys.

    python -m tests.benchmarks.bench_error

Squared error of the dequantized numbers over the sum of squares, in percent, for BF16 weights of several shapes of
distribution and for those of the small trained model in tests/models. `absmax` is the reference library's rule,
`four_over_six` the choice between the largest code 6 and 4 for each block (arXiv 2512.02010), `mse` the search for the
scale with the least squared error.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from mso_hub.formats import Format
from mso_hub.formats.numerics import floats
from tests.benchmarks.runners import machine, table
from tests.benchmarks.variants import variants

ROWS, COLUMNS = 512, 4096
TRAINED = Path(__file__).resolve().parent.parent / "models" / "tiny-qwen3-moe"


def samples() -> dict[str, list[floats.Array]]:
    """BF16 bits of weights with light and heavy tails, columns of different size, and of a trained model."""
    rng = np.random.default_rng(0)
    gaussian = rng.standard_normal((ROWS, COLUMNS))
    drawn = {
        "Gaussian": gaussian,
        "Laplace": rng.laplace(size=(ROWS, COLUMNS)),
        "Student t, 5 degrees": rng.standard_t(5, (ROWS, COLUMNS)),
        "lognormal columns": gaussian * rng.lognormal(0, 0.5, COLUMNS),
    }
    made = {name: [floats.narrow((values * 0.02).astype(np.float32), "BF16")] for name, values in drawn.items()}
    return {**made, "trained": trained()}


def trained() -> list[floats.Array]:
    """BF16 bits of every linear layer of the trained model."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(TRAINED.glob("*.safetensors")):
        tensors |= load_file(path)
    linear = [t for name, t in sorted(tensors.items()) if t.ndim == 2 and "_proj" in name]
    return [t.view(torch.int16).numpy().view(np.uint16) for t in linear]


def error(form: Format, weights: list[floats.Array]) -> float:
    """Sum of squared differences over sum of squares, over all weights."""
    total = energy = 0.0
    for bits in weights:
        amax = floats.amax(bits, "BF16")
        arrays = form.encode(bits, "BF16", "BF16", amax)
        exact = floats.widen(bits, "BF16").astype(np.float64)
        total += float(np.square(form.decode(arrays, bits.shape[1], "BF16", amax) - exact).sum())
        energy += float(np.square(exact).sum())
    return total / energy


def main() -> None:
    """Print the table."""
    weights = samples()
    plain: dict[tuple[str, str], float] = {}
    rows = []
    for label, search, form in variants():
        cells = []
        for name, matrices in weights.items():
            found = error(form, matrices)
            first = plain.setdefault((label, name), found)
            cells.append(f"{100 * found:.4f}" + ("" if found == first else f" ({100 * (found / first - 1):+.1f} %)"))
        rows.append((label, search, *cells))
    print(f"Relative squared error in %, {ROWS} x {COLUMNS} BF16 and the trained model; {machine()}\n")
    print(table(("format", "scales", *weights), rows))


if __name__ == "__main__":
    main()
