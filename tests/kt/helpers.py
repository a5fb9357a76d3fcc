"""Small checkpoints with routed experts, and kt-kernel in a Python of its own as the judge."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mso_hub.engine import ThreadEngine
from mso_hub.pipeline import convert
from mso_hub.plan import Plan, Recipe
from mso_hub.sink import MemorySink
from mso_hub.source import MemorySource
from mso_hub.verify.kt_consumer import PROGRAM, VARIABLE, missing_flags
from tests.helpers import checkpoint_files, random_tensor, tensors_in

LEAVES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
TRAINED = Path(__file__).parents[1] / "models" / "tiny-qwen3-moe"
METHODS = {"kt-int4": "INT4", "kt-int8": "INT8"}


def require_kt() -> str:
    """The Python that has kt-kernel; skips where there is none, or where this processor cannot run it."""
    if missing := missing_flags():
        pytest.skip(f"kt-kernel needs {' and '.join(missing)}, which this processor lacks")
    if not os.environ.get(VARIABLE):
        pytest.skip(f"{VARIABLE} names no Python with kt-kernel; `make kt` makes one")
    return os.environ[VARIABLE]


@dataclass(frozen=True, slots=True)
class Experts:
    """Sizes of the routed experts of a model with one layer or more."""

    inner: int = 256
    hidden: int = 128
    count: int = 2
    layers: int = 1

    def config(self, **more: Any) -> dict[str, Any]:
        """config.json of a Qwen3-MoE."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu",
            "hidden_size": self.hidden, "moe_intermediate_size": self.inner, "num_hidden_layers": self.layers,
            "num_experts": self.count, **more,
        }  # fmt: skip

    def matrices(
        self, seed: int = 0, dtype: torch.dtype = torch.bfloat16, *, extreme: bool = False
    ) -> dict[tuple[int, int, str], Tensor]:
        """(Layer, expert, projection) -> numbers, with outliers and zeros; `extreme`: and rows at the ends of BF16."""
        found = {}
        for layer in range(self.layers):
            for expert in range(self.count):
                for at, projection in enumerate(LEAVES):
                    shape = (self.hidden, self.inner) if projection == "down" else (self.inner, self.hidden)
                    w = random_tensor(*shape, dtype=torch.float32, seed=seed + 100 * layer + 10 * expert + at)
                    w[3] = 0
                    w[5, 7], w[6, :2] = 3.0, torch.tensor([-0.0, 1e-9])
                    for row, largest in ((8, 2e-36), (9, 1e-36), (10, 1e-39), (11, 3e38)) if extreme else ():
                        w[row] = w[row] / w[row].abs().max() * largest
                    found[layer, expert, projection] = w.to(dtype)
        return found


def moe_files(
    experts: Experts, matrices: Mapping[tuple[int, int, str], Tensor] | None = None, **config: Any
) -> dict[str, bytes]:
    """A checkpoint in memory: experts under Qwen's names, and something of the rest."""
    matrices = experts.matrices() if matrices is None else matrices
    tensors = {
        f"model.layers.{layer}.mlp.experts.{expert}.{LEAVES[projection]}.weight": w
        for (layer, expert, projection), w in matrices.items()
    }
    return checkpoint_files({"model.safetensors": tensors | rest(experts)}, experts.config(**config))


def rest(experts: Experts) -> dict[str, Tensor]:
    """Tensors outside the routed experts, one with an odd number of bytes."""
    found = {"model.embed_tokens.weight": random_tensor(11, experts.hidden, seed=1)}
    for layer in range(experts.layers):
        prefix = f"model.layers.{layer}"
        found[f"{prefix}.mlp.gate.weight"] = random_tensor(experts.count, experts.hidden, seed=2)
        found[f"{prefix}.self_attn.q_proj.weight"] = random_tensor(experts.hidden, experts.hidden, seed=3)
        found[f"{prefix}.mlp.gate.e_score_correction_bias"] = random_tensor(experts.count, dtype=torch.float32)
    found |= {"model.norm.weight": torch.ones(3, dtype=torch.bfloat16), "lm_head.weight": random_tensor(11, 3)}
    return found


def converted(
    files: Mapping[str, bytes], recipe: Recipe, engine: ThreadEngine | None = None
) -> tuple[Plan, dict[str, bytes]]:
    """Plan and files of a conversion in memory."""
    sink = MemorySink()
    plan = convert(MemorySource(files), sink, recipe, engine=engine or ThreadEngine(1))
    return plan, sink.files


def decoded(files: Mapping[str, bytes], dtype: str = "BF16") -> dict[str, Tensor]:
    """Tensors of what `decompress` makes."""
    return tensors_in(converted(files, Recipe(scheme="bf16", dtype=dtype))[1])


def of_kt_kernel(
    folder: Path, matrices: Mapping[tuple[int, int, str], Tensor], method: str, parts: int, layer: int = 0
) -> dict[str, bytes]:
    """Files that kt-kernel's own quantizer writes for one layer, path -> content; a fresh process each time."""
    experts = 1 + max(expert for _, expert, _ in matrices)
    stacked = {p: torch.stack([matrices[layer, e, p] for e in range(experts)]).to(torch.bfloat16) for p in LEAVES}
    save_file(stacked, folder / "weights.safetensors")
    inner, hidden = stacked["gate"].shape[1:]
    (folder / "theirs").mkdir()
    job = {
        "program": str(PROGRAM.parent), "weights": str(folder / "weights.safetensors"), "layer": layer,
        "experts": experts, "chosen": 1, "hidden": hidden, "inner": inner, "parts": parts, "method": f"AMX{method}",
        "folder": str(folder / "theirs"), "times": str(folder / "times.json"),
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    command = [require_kt(), str(Path(__file__).with_name("oracle_program.py")), str(folder / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {str(p.relative_to(folder / "theirs")): p.read_bytes() for p in (folder / "theirs").rglob("*.kt")}
