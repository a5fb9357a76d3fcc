"""Runs in a Python that has kt-kernel: its own quantizer, on the experts of one layer, `python oracle_program.py JOB`.

Writes the tree of .kt files that kt-kernel writes, and prints the seconds of processor and wall time it took.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file


def main() -> None:
    """Quantize and save."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.path.insert(0, job["program"])
    from kt_program import layer_of

    weights = load_file(job["weights"])
    layer = layer_of(job, cpu_save=True)
    wall, work = time.perf_counter(), time.process_time()
    layer.load_weights_from_tensors(weights["gate"], weights["up"], weights["down"], torch.arange(job["experts"]))
    times = {"wall": time.perf_counter() - wall, "work": time.process_time() - work}
    Path(job["times"]).write_text(json.dumps(times), encoding="utf-8")


if __name__ == "__main__":
    main()
