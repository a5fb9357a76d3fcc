"""GPTQ against llm-compressor's: the same model, text and settings, compared by what the layers' outputs lose.

llm-compressor runs in an environment of its own (`make bench BENCH_PEERS=1` makes it).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import save_file

from mso_hub.calibrate.methods import run
from mso_hub.calibrate.methods.gptq import Hessian, output_error
from mso_hub.calibrate.walk import Walk
from mso_hub.calibrate.weights import Weights
from mso_hub.plan import Recipe
from mso_hub.source import Source, open_source, read_checkpoint
from tests.calibrate.methods import REAL, batches, calibration, real_inputs

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON = Path(os.environ.get("MSO_LLMCOMPRESSOR_PYTHON", ROOT / ".venv-llmcompressor" / "bin" / "python"))
PEER = ROOT / "tests" / "benchmarks" / "peer_gptq.py"
LIMIT = 1.02

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=f"llm-compressor is not installed: no {PYTHON}")


def lost(source: Source, original: Weights, hessians: dict[str, Hessian], modules: list[str]) -> dict[str, float]:
    """Mean squared change of each linear layer's output, on the inputs of the unquantized model."""
    found = Weights(source, read_checkpoint(source), "F32")
    return {
        module: output_error(original.get(f"{module}.weight"), found.get(f"{module}.weight"), hessians[module].mean)
        for module in modules
    }


@pytest.mark.parametrize(
    ("recipe", "weights"),
    [
        (
            Recipe(scheme="w4a16", mode="all-linear", group_size=32, scale_search="absmax"),
            {"num_bits": 4, "strategy": "group", "group_size": 32},
        ),
        (
            Recipe(scheme="w8a16", mode="all-linear", group_size=0, scale_search="absmax"),
            {"num_bits": 8, "strategy": "channel"},
        ),
    ],
    ids=["w4a16 g32", "w8a16 rows"],
)
def test_outputs_lose_at_most_as_much(recipe: Recipe, weights: dict[str, object], tmp_path: Path) -> None:
    """Within 2 % over all layers, with scales from the largest magnitudes as llm-compressor has them."""
    save_file({"ids": calibration()}, tmp_path / "ids.safetensors")
    scheme = json.dumps({"type": "int", "symmetric": True, "observer": "minmax", **weights})
    job = [PYTHON, PEER, REAL, tmp_path / "theirs", tmp_path / "ids.safetensors", scheme]
    done = subprocess.run([str(part) for part in job], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    walk = Walk(open_source(REAL))
    ours = run(walk, batches(), recipe, tmp_path / "work").source
    hessians = real_inputs(batches())
    modules = [name for name in hessians if ".layers." in name and not name.endswith("mlp.gate")]
    mine = lost(ours, walk.weights, hessians, modules)
    theirs = lost(open_source(tmp_path / "theirs"), walk.weights, hessians, modules)
    assert len(modules) == 112
    assert min(theirs.values()) > 0  # another form of the same numbers, not the numbers themselves
    ratio = sum(mine.values()) / sum(theirs.values())
    assert ratio < LIMIT
