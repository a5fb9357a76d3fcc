"""`--load-format mso_checked`: healthy models load, partly written ones are errors that list everything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import converted
from mso_hub import Recipe
from vllm_mso_hub import LOAD_FORMAT, register
from vllm_mso_hub.generate import engine, outputs, set_environment

JOB = {"prompts": [[5, 17, 80]], "max_tokens": 2, "tp": 1, "emulate": True, "max_model_len": 64}
SCHEMES = ("bf16", "nvfp4", "fp8_dynamic", "w4a16")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def stored(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Model and scheme -> a checkpoint, made once."""
    root = tmp_path_factory.mktemp("stored")

    def folder(model: str, scheme: str) -> Path:
        if scheme == "bf16":
            return tiny(model)
        out = root / f"{model}-{scheme}"
        return out if out.exists() else converted(tiny(model), Recipe(scheme=scheme, mode="all-linear"), out)

    return folder


def _changed(source: Path, out: Path, change: Callable[[Tensors], None]) -> Path:
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors")
    return out


def _load(folder: Path, **options: Any) -> list[dict[str, Any]]:
    """Load and generate; returns the outputs."""
    job = {**JOB, "folder": str(folder)}
    set_environment(job)
    register()
    with engine(job, model_loader_extra_config=options) as llm:
        return outputs(llm, job)


@pytest.mark.parametrize("model", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_healthy_model_loads(model: str, scheme: str, stored: Callable[[str, str], Path], tmp_path: Path) -> None:
    assert len(_load(stored(model, scheme), report=str(tmp_path / "report"))[0]["tokens"]) == 2
    report = json.loads((tmp_path / "report.rank0.json").read_text())
    assert report == {"model": str(stored(model, scheme)), "rank": 0, "ranks": 1, "problems": []}


LAYER, EXPERT = "model.layers.1", "model.layers.1.mlp.experts.2"


def _drop(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(names)]:
            del tensors[name]

    return change


def _cast(name: str, dtype: torch.dtype) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].float().to(dtype)

    return change


BROKEN = {
    "half of a fused scale": (
        "llama", "nvfp4", _drop(f"{LAYER}.self_attn.k_proj.weight_scale"),
        [("partial", f"{LAYER}.self_attn.qkv_proj.weight_scale")],
    ),
    "a norm": (
        "llama", "fp8_dynamic", _drop(f"{LAYER}.input_layernorm"), [("missing", f"{LAYER}.input_layernorm.weight")],
    ),
    "an expert": (
        "qwen3_moe", "nvfp4", _drop(f"{EXPERT}.down_proj"),
        [
            ("partial", f"{LAYER}.mlp.experts.routed_experts.w2_weight_packed"),
            ("partial", f"{LAYER}.mlp.experts.routed_experts.w2_weight_scale"),
            ("partial", f"{LAYER}.mlp.experts.routed_experts.w2_weight_global_scale"),
        ],
    ),
    "a weight of another dtype": (
        "llama", "fp8_dynamic", _cast(f"{LAYER}.mlp.down_proj.weight", torch.bfloat16),
        [("cast", f"{LAYER}.mlp.down_proj.weight")],
    ),
    "scales of another dtype": (
        "llama", "nvfp4", _cast(f"{LAYER}.mlp.up_proj.weight_scale", torch.float32),
        [("cast", f"{LAYER}.mlp.gate_up_proj.weight_scale")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_partly_written_model_is_an_error_that_lists_everything(
    name: str, stored: Callable[[str, str], Path], tmp_path: Path
) -> None:
    model, scheme, change, expected = BROKEN[name]
    folder = _changed(stored(model, scheme), tmp_path / "broken", change)
    with pytest.raises(ValueError, match=f"mso_checked: rank 0 of 1: {len(expected)} problems in .*broken") as error:
        _load(folder, report=str(tmp_path / "report"))
    found = json.loads((tmp_path / "report.rank0.json").read_text())["problems"]
    assert sorted((problem["kind"], problem["parameter"]) for problem in found) == sorted(expected)
    assert all(problem["message"] in str(error.value) for problem in found)


def test_without_strict_the_problems_are_logged_and_the_model_is_served(
    stored: Callable[[str, str], Path], tmp_path: Path
) -> None:
    folder = _changed(stored("llama", "bf16"), tmp_path / "broken", _drop(f"{LAYER}.input_layernorm"))
    options = {"strict": False, "report": str(tmp_path / "report"), "enable_weights_track": False}
    assert len(_load(folder, **options)[0]["tokens"]) == 2
    assert len(json.loads((tmp_path / "report.rank0.json").read_text())["problems"]) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strict": "no"}, "strict: expected true or false, got 'no'"),
        ({"report": 3}, "report: expected a path"),
        ({"report": "/nowhere/at/all"}, "report: expected a path in a folder that exists"),
        ({"reports": "x"}, "Unexpected extra config keys"),
        ("strict", "model_loader_extra_config must be a dict"),
    ],
)
def test_options_that_make_no_sense_are_errors(options: Any, words: str) -> None:
    from vllm.config.load import LoadConfig

    from vllm_mso_hub.loader import CheckedLoader

    config = LoadConfig()
    config.model_loader_extra_config = options
    with pytest.raises(ValueError, match=words):
        CheckedLoader(config)


def test_a_drafter_is_not_held_to_it() -> None:
    """It takes weights from the model that it drafts for, after loading."""
    from vllm.config.load import LoadConfig

    from vllm_mso_hub.loader import CheckedLoader, Finding

    found = [Finding("missing", "lm_head.weight", "lm_head.weight: nothing written")]
    loader = CheckedLoader(LoadConfig())
    assert loader.load_config.load_format == "auto"
    assert LOAD_FORMAT == "mso_checked"
    loader.judge(found, SimpleNamespace(model="a drafter", runner_type="draft"), rank=0, ranks=1)
    with pytest.raises(ValueError, match="nothing written"):
        loader.judge(found, SimpleNamespace(model="a model", runner_type="generate"), rank=0, ranks=1)
