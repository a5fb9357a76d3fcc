"""`mso-hub smoke`, `plan --smoke` and `quantize --smoke` from end to end: the program, a process of this Python."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from models import TINY, TRAINED, converted, dense_headers, planned
from mso_hub import Recipe, compare_generation
from mso_hub.cli import main
from mso_hub.errors import MsoError
from mso_hub.formats import Scheme
from mso_hub.hub.devhub import DevHub
from mso_hub.plan import Rule
from mso_hub.source.scan import FIRST_READ
from vllm_mso_hub.job import Job
from vllm_mso_hub.shapes import prove

INDEX = "model.safetensors.index.json"
Wide = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSO_VLLM_PYTHON", sys.executable)


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of every shard."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})


# ------------------------------------------------------------------------------------------------------------ shapes


def test_a_good_folder_and_one_that_lacks_a_scale(tmp_path: Path) -> None:
    """A line for each size; the missing tensor, its parameter, its ranks and what was written of it."""
    out = converted(TRAINED, Recipe(mode="all-linear"), tmp_path / "out")
    good = invoke("smoke", out, "--tp", "1,2")
    assert good.exit_code == 0, good.output
    assert [line.split()[-1] for line in good.stdout.splitlines()[1:]] == ["ok", "ok"]
    assert good.stderr == ""
    lost = "model.layers.1.self_attn.k_proj.weight_scale"
    edit(out, lambda tensors: tensors.pop(lost, torch.empty(0)))
    index = json.loads((out / INDEX).read_text())
    del index["weight_map"][lost]
    (out / INDEX).write_text(json.dumps(index))
    bad = invoke("smoke", out, "--tp", "2", "--json")
    assert bad.exit_code == 2
    report = json.loads(bad.stdout)
    assert report["ok"] is False
    assert report["python"] == sys.executable
    (problem,) = report["worlds"][0]["problems"]
    assert (problem["tensor"], problem["ranks"]) == (lost, [0, 1])
    assert problem["parameter"].endswith("qkv_proj.weight_scale")
    assert problem["expected"] != problem["found"]


def test_a_repo_is_proven_without_being_downloaded(tmp_path: Path) -> None:
    """Over the wire go its headers and configs, though the process of vLLM itself is offline."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MSO_HUB"))}
    with DevHub(tmp_path / "hub", xet=False) as hub:
        clean |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token(), "HF_HOME": str(tmp_path / "home")}
        clean |= {"HF_HUB_DISABLE_XET": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}

        def run(*words: object) -> str:
            command = [sys.executable, "-m", "mso_hub.cli", *map(str, words)]
            return subprocess.run(command, env=clean, check=True, capture_output=True, text=True, timeout=300).stdout

        run("quantize", "--input_dir", TRAINED, "--output_dir", "hf://dev/model", "--format", "fp8_dynamic", "--quiet")
        hub.log(clear=True)
        said = run("smoke", "hf://dev/model", "--tp", "1")
        log = hub.log()
    assert said.startswith("hf://dev/model: Qwen3MoeForCausalLM, ")
    assert said.endswith(" ok\n")
    weights = [request for request in log if request.path.endswith(".safetensors") or request.origin == "storage"]
    assert weights
    assert all(request.range is not None for request in weights if request.status in (200, 206) and request.bytes_out)
    assert sum(request.bytes_out for request in weights) <= 6 * FIRST_READ


def test_a_plan_that_would_not_load_stops_quantize(tmp_path: Path) -> None:
    """352 columns are 22 groups of 16: on four ranks each has five and a half, which vLLM takes without a word."""
    source = dense_headers("llama", tmp_path / "in", replace(TINY, width=352))
    done = invoke("quantize", "--input_dir", source, "--output_dir", tmp_path / "out", "--smoke", "--tp", "2,4")
    assert done.exit_code == 2
    assert "nothing was written, vLLM" in done.stderr
    assert "tp 4: " in done.stderr
    assert "tp 2: " not in done.stderr
    assert "model.layers.0.mlp.down_proj.weight" in done.stderr
    assert not (tmp_path / "out").exists()
    planned_ = invoke("plan", source, "--smoke", "--tp", "2,4", "--json")
    assert planned_.exit_code == 2
    worlds = json.loads(planned_.stdout)["smoke"]["worlds"]
    assert [(world["tp"], bool(world["problems"])) for world in worlds] == [(2, False), (4, True)]


def test_a_plan_that_loads_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = invoke("quantize", "--input_dir", TRAINED, "--output_dir", out, "--smoke", "--tp", "1", "--quiet")
    assert done.exit_code == 0, done.output
    assert (out / "config.json").is_file()


def test_an_architecture_that_vllm_does_not_know(tmp_path: Path) -> None:
    """The message names it; the exit code is 2, and with --json too."""
    source = dense_headers("llama", tmp_path / "in", TINY)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["NobodyForCausalLM"]}))
    done = invoke("smoke", source, "--tp", "1")
    assert done.exit_code == 2
    assert "NobodyForCausalLM" in done.stdout


# ----------------------------------------------------------------------------------------- what is refused, and why


ALL = "all-linear"
HEAD = (Rule(Scheme("fp8_block"), ("lm_head",), default_ignore=False), Rule(Scheme("fp8_block"), ("Linear",)))
OTHER_HEAD = (Rule(Scheme("fp8_dynamic"), ("lm_head",), default_ignore=False), Rule(Scheme("fp8_block"), ("Linear",)))
MOE = ("qwen3_moe", "mixtral", "deepseek_v3")
REFUSED: dict[str, tuple[tuple[str, ...], Recipe, Recipe, str]] = {
    "FP8 per tensor without scales for ModelOpt": (
        ("llama", *MOE),
        Recipe(scheme="fp8", layout="modelopt", mode=ALL, unloadable=True),
        Recipe(scheme="fp8", layout="modelopt", mode=ALL, input_scale=1.0),
        "missing",
    ),
    "FP8 per row experts for ModelOpt": (
        MOE,
        Recipe(scheme="fp8_dynamic", layout="modelopt", mode=ALL, unloadable=True),
        Recipe(scheme="fp8_dynamic", mode=ALL),
        "load",
    ),
    "FP8 per block experts for ModelOpt": (
        MOE,
        Recipe(scheme="fp8_block", layout="modelopt", mode=ALL, unloadable=True),
        Recipe(scheme="fp8_block", mode=ALL),
        "load",
    ),
    "FP8 per block experts beside others for ModelOpt": (
        MOE[:1],
        Recipe(
            layout="modelopt", rules=(Rule(Scheme("fp8_block"), ("*.experts",)), Rule(Scheme("nvfp4"), ("Linear",))),
            unloadable=True,
        ),
        Recipe(rules=(Rule(Scheme("fp8_block"), ("*.experts",)), Rule(Scheme("nvfp4"), ("Linear",)))),
        "load",
    ),
    "FP8 per block head": (("llama",), Recipe(rules=HEAD, unloadable=True), Recipe(rules=OTHER_HEAD), "load"),
    "FP8 per block head for ModelOpt": (
        ("llama",),
        Recipe(rules=HEAD, layout="modelopt", unloadable=True),
        Recipe(rules=OTHER_HEAD, layout="modelopt"),
        "load",
    ),
    "FP8 per block head for DeepSeek": (
        ("llama",),
        Recipe(rules=HEAD, layout="deepseek", unloadable=True),
        Recipe(scheme="fp8_block", layout="deepseek", mode=ALL),
        "cast",
    ),
}  # fmt: skip
"""Architectures; a recipe that is refused without `unloadable`; one that its refusal names; the kind of problem."""
CASES = [(name, architecture) for name, (architectures, *_) in REFUSED.items() for architecture in architectures]


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_what_is_refused_does_not_load_and_its_alternative_does(
    name: str, architecture: str, wide: Wide, tmp_path: Path
) -> None:
    """Refused before anything is read; written when told, with a note; and vLLM does not load it."""
    _, recipe, alternative, kind = REFUSED[name]
    source = wide(architecture)
    with pytest.raises(MsoError, match=r"use |take |add "):
        planned(source, replace(recipe, unloadable=False), tmp_path / "refused")
    bad = prove(Job.of_folder(planned(source, recipe, tmp_path / "bad"), tp=(1, 2)))
    assert kind in {problem.kind for problem in bad.problems}
    good = prove(Job.of_folder(planned(source, alternative, tmp_path / "good"), tp=(1, 2)))
    assert good.ok, good.problems[:3]


HEADS = {
    "NVFP4": Scheme("nvfp4"), "NVFP4 W4A4": Scheme("nvfp4", activations=4), "MXFP4": Scheme("mxfp4"),
    "MXFP8": Scheme("mxfp8"), "FP8": Scheme("fp8", input_scale=1.0), "FP8 rows": Scheme("fp8_dynamic"),
    "INT4": Scheme("w4a16"), "INT8": Scheme("int8"),
}  # fmt: skip


@pytest.mark.parametrize("scheme", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(
    "rest", [None, Scheme("fp8_dynamic"), Scheme("nvfp4")], ids=["alone", "beside FP8", "beside FP4"]
)
def test_a_quantized_output_head_loads(scheme: Scheme, rest: Scheme | None, wide: Wide, tmp_path: Path) -> None:
    """vLLM's head is no `Linear`: compressed-tensors' config has to name it."""
    rules = (Rule(scheme, ("lm_head",), default_ignore=False), *([Rule(rest, ("Linear",))] if rest else []))
    found = prove(Job.of_folder(planned(wide("llama"), Recipe(rules=rules), tmp_path / "out"), tp=(1, 2)))
    assert found.ok, found.problems[:3]


# -------------------------------------------------------------------------------------------------------- generation


def test_weights_alone_generate_what_they_do_in_bf16(tmp_path: Path) -> None:
    """The same tokens and the same likelihood; the report says so in both forms."""
    out = converted(TRAINED, Recipe(mode=ALL), tmp_path / "out")
    done = invoke("smoke", out, "--generate", "--max_tokens", "4", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["weight_only"]
    assert not report["dense"]
    assert report["emulated"] == (report["device"] == "cpu")
    for pair in report["pairs"]:
        assert len(pair["output"]["tokens"]) == 4
        assert pair["output"]["tokens"] == pair["reference"]["tokens"]
        assert abs(pair["output"]["nll"] - pair["reference"]["nll"]) < 1e-3


def test_a_dense_checkpoint_is_its_own_reference_and_nan_is_a_problem(tmp_path: Path) -> None:
    """A weight that is NaN makes every likelihood NaN, which JSON has as null."""
    folder = shutil.copytree(TRAINED, tmp_path / "in")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: value * float("nan") for name, value in tensors.items() if name == "model.norm.weight"})

    edit(folder, spoil)
    report = compare_generation(folder, max_tokens=2)
    assert report.dense
    assert len(report.problems) == len(report.pairs) == 2
    assert report.problems[0].startswith("prompt 1: the likelihood of the checkpoint is nan; a scale or a weight is")
    assert report.as_dict()["pairs"][0]["output"]["nll"] is None


def test_scales_that_vllm_merges_wrongly_cost_likelihood(tmp_path: Path) -> None:
    """Up has a global scale of its own here: its numbers are as before, but vLLM takes one for gate and up."""
    out = converted(TRAINED, Recipe(mode=ALL, activations=4), tmp_path / "out")

    def rescale(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("up_proj.weight_global_scale")]:
            block = name.replace("global_scale", "scale")
            tensors[name] = tensors[name] / 8  # a divisor
            tensors[block] = (tensors[block].float() / 8).to(torch.float8_e4m3fn)

    edit(out, rescale)
    report = compare_generation(out, max_tokens=2)
    assert not report.weight_only
    assert [pair.gap > 0.2 for pair in report.pairs] == [True] * len(report.pairs), report.pairs
    assert "(--max_nll_gap)" in report.problems[0]
