"""What NVFP4 costs in accuracy, and what the exact scale search buys.

    python -m tests.benchmarks.bench_error

Relative squared error of the dequantized numbers, for weights of three shapes of distribution, and kernel speed.
"""

from __future__ import annotations

import time

import numpy as np

from mso_hub.formats.numerics import floats, nvfp4
from tests.benchmarks.runners import MB, machine, table

ROWS, COLUMNS = 1024, 4096
REPEAT = 5


def samples() -> dict[str, floats.Array]:
    """BF16 bits of weights with light and heavy tails."""
    rng = np.random.default_rng(0)
    drawn = {
        "Gaussian": rng.standard_normal((ROWS, COLUMNS)),
        "Laplace": rng.laplace(size=(ROWS, COLUMNS)),
        "Student t, 5 degrees": rng.standard_t(5, (ROWS, COLUMNS)),
    }
    return {name: floats.narrow((values * 0.02).astype(np.float32), "BF16") for name, values in drawn.items()}


def error_and_speed(bits: floats.Array, search: str) -> tuple[float, float]:
    """(sum of squared differences / sum of squares, MB of BF16 per second on one thread, best of a few)."""
    scale = nvfp4.global_scale(floats.amax(bits, "BF16"))
    seconds = []
    for _ in range(REPEAT):
        start = time.perf_counter()
        packed, block = nvfp4.encode(bits, "BF16", scale, search=search)
        seconds.append(time.perf_counter() - start)
    exact = floats.widen(bits, "BF16").astype(np.float64)
    difference = nvfp4.decode(packed, block, scale, "F32") - exact
    return float(np.square(difference).sum() / np.square(exact).sum()), bits.nbytes / MB / min(seconds)


def main() -> None:
    """Print the table."""
    rows = []
    for name, bits in samples().items():
        (plain, fast), (searched, slow) = (error_and_speed(bits, search) for search in nvfp4.SEARCHES)
        gain = f"{100 * (searched / plain - 1):.1f} %"
        rows.append((name, f"{100 * plain:.3f} %", f"{100 * searched:.3f} %", gain, f"{fast:,.0f}", f"{slow:,.0f}"))
    print(f"NVFP4, {ROWS} x {COLUMNS} BF16, one thread; {machine()}\n")
    print(table(("weights", "absmax", "mse", "difference", "absmax MB/s", "mse MB/s"), rows))


if __name__ == "__main__":
    main()
