"""Time and memory of one BF16 -> NVFP4 conversion on the CPU, beside `cp` and the other tools.

    python -m tests.benchmarks.bench_convert --size-gb 2 --shards 4

Every contender is a process of its own, measured from start to exit, plus the `sync` that brings its output
to the disk. The input is in the page cache. Contenders take turns, so that a slow minute hits all of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.runners import (
    GB,
    MB,
    ROOT,
    CommandFailed,
    Run,
    machine,
    make_checkpoint,
    measure,
    median_run,
    mso_hub,
    remove,
    table,
    warm_page_cache,
)

OURS = "mso-hub quantize"
TITLES = ("what", "runs", "seconds", "of them sync", "input GB/s", "peak RSS MB", "time / ours")


@dataclass(frozen=True, slots=True)
class Contender:
    """A command that reads `source` and writes `target`."""

    label: str
    command: tuple[str | Path, ...]
    repeat: int


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured: the input, its bytes, and where the outputs go."""

    source: Path
    nbytes: int
    target: Path
    kernels: Path  # numba's cache of compiled kernels

    def run(self, contender: Contender) -> Run:
        """Measure one run and delete its output."""
        remove(self.target)
        warm_page_cache(self.source)
        try:
            return measure(contender.command, {"NUMBA_CACHE_DIR": str(self.kernels)}, sync=True)
        finally:
            remove(self.target)


def ours(bench: Bench, repeat: int) -> Contender:
    """The whole program, start-up included."""
    folders = ("--input_dir", bench.source, "--output_dir", bench.target)
    words = ("--all_linear", "--scale_search", "absmax")  # what the others do
    return Contender(OURS, (mso_hub(), "quantize", *folders, *words), repeat)


def copy(bench: Bench, repeat: int) -> Contender:
    """The least work that reads and writes a checkpoint."""
    return Contender("cp -r", ("cp", "-r", bench.source, bench.target), repeat)


def llm_compressor(bench: Bench, interpreter: Path) -> Contender | None:
    """Its model-free path, once: it is slow. None, with the reason printed, where it is not installed."""
    if not interpreter.exists():
        print(f"llm-compressor: skipped, no {interpreter}; `make bench BENCH_PEERS=1` installs it\n")
        return None
    script = Path(__file__).with_name("peer_llmcompressor.py")
    return Contender("llm-compressor model_free_ptq", (interpreter, script, bench.source, bench.target), 1)


def take_turns(bench: Bench, contenders: Iterable[Contender]) -> dict[str, list[Run]]:
    """Run every contender as often as it asks for, one round after the other."""
    contenders = list(contenders)
    runs: dict[str, list[Run]] = {contender.label: [] for contender in contenders}
    for turn in range(max(contender.repeat for contender in contenders)):
        for contender in contenders:
            if turn < contender.repeat:
                runs[contender.label].append(bench.run(contender))
                print(f"{contender.label}: {runs[contender.label][-1].total:.2f} s", file=sys.stderr, flush=True)
    return runs


def row(bench: Bench, label: str, count: int, run: Run, reference: float) -> tuple[str, ...]:
    """One line of the table; `reference` is our own total in seconds."""
    return (
        label,
        str(count),
        f"{run.total:.2f}",
        f"{run.sync_seconds:.2f}",
        f"{bench.nbytes / run.total / GB:.3f}",
        f"{run.peak_rss / MB:.0f}",
        f"{run.total / reference:.2f}",
    )


def modelopt_row(bench: Bench, seconds: float, reference: float) -> tuple[str, ...] | None:
    """ModelOpt's class on as many matrices as fit into `seconds`, scaled up to all of them, and saying so."""
    if importlib.util.find_spec("modelopt") is None:
        print("ModelOpt: skipped, not installed here; `pip install 'mso-hub[modelopt]'` brings it\n")
        return None
    program = (sys.executable, "-m", "tests.benchmarks.peer_modelopt")
    run = measure((*program, bench.source, "--seconds", str(seconds)))
    result = json.loads(run.output.splitlines()[-1])
    whole = result["seconds"] * result["matrices"] / result["bytes"]
    share = f"{result['bytes'] / GB:.2f} of {result['matrices'] / GB:.2f} GB of matrices"
    return (
        f"ModelOpt NVFP4QTensor.quantize alone (not reading, not writing), extrapolated from {share}",
        "1",
        f"{whole:.2f}",
        "",
        f"{bench.nbytes / whole / GB:.3f}",
        f"{run.peak_rss / MB:.0f}",
        f"{whole / reference:.2f}",
    )


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=2.0, help="bytes of the checkpoint / 10^9, by whole layers")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096, help="4096 is Llama 8B; less for a small checkpoint")
    parser.add_argument("--workdir", type=Path, default=ROOT / "bench-work", help="the input stays there for reuse")
    parser.add_argument("--repeat", type=int, default=3, help="runs of mso-hub and of cp; the others run once")
    parser.add_argument(
        "--llm-compressor",
        type=Path,
        metavar="PYTHON",
        default=ROOT / ".venv-llmcompressor" / "bin" / "python",
        help="an interpreter that has llm-compressor",
    )
    parser.add_argument("--modelopt", action="store_true", help="also measure ModelOpt, if installed here")
    parser.add_argument("--modelopt-seconds", type=float, default=60.0, help="how long ModelOpt may calculate")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS for every contender; left alone by default")
    return parser.parse_args()


def main() -> None:
    """Make the input, run the contenders, print the table."""
    options = parse_options()
    if options.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    workdir = options.workdir.absolute()
    source = workdir / f"llama-{options.hidden}-{options.size_gb:g}gb-{options.shards}"
    size = ("--size-gb", str(options.size_gb), "--hidden", str(options.hidden))
    make_checkpoint(source, "llama", options.shards, *size)
    bench = Bench(source, warm_page_cache(source), workdir / "output", workdir / "kernels")

    remove(bench.kernels)
    contender = ours(bench, options.repeat)
    first = bench.run(contender)
    peer = llm_compressor(bench, options.llm_compressor.absolute())
    runs = take_turns(bench, [copy(bench, options.repeat), contender, *([peer] if peer else [])])
    reference = median_run(runs[OURS]).total

    rows = [row(bench, label, len(several), median_run(several), reference) for label, several in runs.items()]
    rows.insert(2, row(bench, f"{OURS}, the first time (kernels are compiled)", 1, first, reference))
    if options.modelopt and (extra := modelopt_row(bench, options.modelopt_seconds, reference)):
        rows.append(extra)
    shards = len(list(source.glob("*.safetensors")))
    print(f"{bench.nbytes / GB:.2f} GB of BF16 in {shards} shards; {machine()}\n")
    print(table(TITLES, rows))


if __name__ == "__main__":
    try:
        main()
    except (CommandFailed, FileNotFoundError) as error:
        sys.exit(str(error))
