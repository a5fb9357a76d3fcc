"""How long the command line takes before it does any work: `--help`, and `plan` for a trillion parameters.

    python -m tests.benchmarks.bench_startup

The two Kimi-K2.5 checkpoints are headers over holes: terabytes by their sizes, megabytes on the disk.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.benchmarks.runners import (
    GB,
    MB,
    ROOT,
    CommandFailed,
    machine,
    make_checkpoint,
    measure,
    median_run,
    mso_hub,
    table,
)

TITLES = ("command", "tensors", "source GB", "seconds", "peak RSS MB")
SHARDS = 64
CASES = {
    "kimi": "plan, Kimi-K2.5 shapes in BF16",
    "kimi-int4": "plan, Kimi-K2.5 shapes in INT4: the case of 140,000+ tensors",
}


def help_row(repeat: int) -> tuple[str, ...]:
    """Median of `mso-hub --help`."""
    run = median_run(measure([mso_hub(), "--help"]) for _ in range(repeat))
    return ("--help", "", "", f"{run.seconds:.3f}", f"{run.peak_rss / MB:.0f}")


def plan_row(workdir: Path, kind: str, repeat: int) -> tuple[str, ...]:
    """Median of planning one of the large checkpoints."""
    folder = workdir / kind
    counts = make_checkpoint(folder, kind, SHARDS)
    command = (mso_hub(), "plan", "--input_dir", folder, "--all_linear")
    run = median_run(measure(command) for _ in range(repeat))
    sizes = (f"{counts['tensors']:,}", f"{counts['bytes'] / GB:,.0f}")
    return (CASES[kind], *sizes, f"{run.seconds:.2f}", f"{run.peak_rss / MB:.0f}")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=ROOT / "bench-work")
    parser.add_argument("--repeat", type=int, default=10, help="runs of --help; plan takes a third of them")
    options = parser.parse_args()

    rows = [help_row(options.repeat)]
    rows += [plan_row(options.workdir.absolute(), kind, max(1, options.repeat // 3)) for kind in CASES]
    print(f"start-up of mso-hub, medians; {machine()}\n")
    print(table(TITLES, rows))


if __name__ == "__main__":
    try:
        main()
    except (CommandFailed, FileNotFoundError) as error:
        sys.exit(str(error))
