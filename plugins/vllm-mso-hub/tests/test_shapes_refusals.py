"""What cannot be checked is one clear sentence; a crash in one world does not stop the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import vllm

from models import WIDE, dense_headers, planned
from mso_hub import Recipe
from vllm_mso_hub.job import Header, Job, Report
from vllm_mso_hub.shapes import prove

SOURCES = os.environ.get("MSO_VLLM_SOURCES", "")
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("refusals")
    source = dense_headers("llama", root / "bf16", WIDE)
    return planned(source, Recipe(mode="all-linear", activations=4, input_scale=1.0), root / "nvfp4")


def changed(folder: Path, into: Path, **more: Any) -> Job:
    """The job of a checkpoint with other values in config.json."""
    config = {**json.loads((folder / "config.json").read_text()), **more}
    (into / "config.json").write_text(json.dumps(config))
    return replace(Job.of_folder(folder, tp=(1,)), name="org/model", folder=str(into))


def refused(job: Job) -> tuple[str, str]:
    report = prove(job)
    assert (report.worlds, report.ok) == ((), False)
    assert report.refused is not None
    return report.refused.kind, report.refused.message


def test_an_architecture_that_vllm_does_not_know(folder: Path, tmp_path: Path) -> None:
    kind, message = refused(changed(folder, tmp_path, architectures=["StrangeForCausalLM"]))
    wanted = "has no model for org/model: Model architectures ['StrangeForCausalLM'] are not supported for now."
    assert (kind, message) == ("architecture", f"vLLM {vllm.__version__} {wanted}")


def test_a_model_type_that_transformers_does_not_know(folder: Path, tmp_path: Path) -> None:
    kind, message = refused(changed(folder, tmp_path, model_type="strange", architectures=["StrangeForCausalLM"]))
    assert kind == "architecture"
    assert message.endswith("model type `strange` but Transformers does not recognize this architecture.")


def test_a_model_that_brings_its_own_code(folder: Path, tmp_path: Path) -> None:
    code = {"AutoConfig": "configuration_strange.StrangeConfig"}
    (tmp_path / "configuration_strange.py").write_text("raise SystemExit('this ran')\n")
    kind, message = refused(changed(folder, tmp_path, model_type="strange", auto_map=code))
    assert kind == "remote_code"
    assert message == (
        "org/model needs Python of its own (auto_map in config.json) and none of it was run; "
        "look at it and pass --trust_remote_code"
    )


def test_code_that_vllm_does_not_need_is_no_reason_to_refuse(folder: Path, tmp_path: Path) -> None:
    job = changed(folder, tmp_path, auto_map={"AutoModelForCausalLM": "modeling_llama.Llama"})
    assert prove(job).ok


def test_a_quantization_method_that_vllm_does_not_have(folder: Path, tmp_path: Path) -> None:
    kind, message = refused(changed(folder, tmp_path, quantization_config={"quant_method": "strange"}))
    assert kind == "config"
    assert "refuses the configuration of org/model: Unknown quantization method: strange. Must be one of" in message


def test_a_folder_without_a_configuration(folder: Path, tmp_path: Path) -> None:
    job = replace(Job.of_folder(folder), folder=str(tmp_path))
    kind, message = refused(job)
    assert (kind, message.endswith(f"{tmp_path} holds no config.json, which says what vLLM should build")) == (
        "config",
        True,
    )


def test_more_layers_than_there_are(folder: Path) -> None:
    kind, message = refused(Job.of_folder(folder, layers=3))
    assert (kind, message) == ("config", f"{folder}: layers: the model has 2 decoder layers, 3 were asked for")


def test_a_dtype_that_torch_does_not_have(folder: Path) -> None:
    job = Job.of_folder(folder)
    kind, message = refused(replace(job, tensors=(*job.tensors, Header("strange", "F6_E2M3", (4,), "x.safetensors"))))
    assert (kind, "strange: dtype F6_E2M3 is none that vLLM reads" in message) == ("config", True)


def test_another_version_of_vllm_is_refused_before_anything_is_done(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.31.2")
    kind, message = refused(Job.of_folder(folder))
    assert kind == "version"
    assert message.startswith("vLLM 0.31.2 is older than what vllm_mso_hub is tested on (0.32 and 0.33)")


def test_sizes_that_the_heads_do_not_divide_are_problems_of_their_worlds(folder: Path) -> None:
    report = prove(Job.of_folder(folder, tp=(3, 2, 32)))
    assert report.refused is None
    assert [[p.kind for p in world.problems] for world in report.worlds] == [["config"], [], ["config"]]
    problem = report.worlds[0].problems[0]
    assert (problem.expected, problem.found, problem.ranks) == ("one of 1, 2, 4, 8, 16", "3", (0, 1, 2))
    assert problem.message == (
        "tensor-parallel size 3 does not divide the model's 16 attention heads and 8 key-value heads; "
        "sizes that fit are 1, 2, 4, 8, 16"
    )


def test_a_crash_while_a_model_is_built_is_a_problem_of_every_world_it_happens_in(folder: Path, tmp_path: Path) -> None:
    job = changed(folder, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["ignore"].append("model.layers.0.self_attn.k_proj")
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = prove(replace(job, tp=(1, 2)))
    assert [(p.kind, p.ranks) for p in report.problems] == [("create", (0,)), ("create", (0, 1))]
    assert all("shards of model.layers.0.self_attn.qkv_proj" in p.message for p in report.problems)


# --- the command ----------------------------------------------------------------------------------


def command(verb: str, job: Any, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m vllm_mso_hub`; the report is report.json in `folder`."""
    (folder / "job.json").write_text(json.dumps(job))
    return subprocess.run(
        [sys.executable, "-m", "vllm_mso_hub", verb, folder / "job.json", folder / "report.json"],
        env={**{k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_command_writes_a_report_and_prints_nothing(folder: Path, tmp_path: Path) -> None:
    done = command("shapes", Job.of_folder(folder, tp=(1, 2)).as_dict(), tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert Report.from_dict(json.loads((tmp_path / "report.json").read_text())).ok


@pytest.mark.parametrize(
    ("verb", "job", "message"),
    [("shapes", {"version": 9}, "vllm_mso_hub: job: version 9, expected 1"), ("strange", {}, "usage: python -m")],
)
def test_a_call_that_makes_no_sense_says_so(verb: str, job: Any, message: str, tmp_path: Path) -> None:
    done = command(verb, job, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert not (tmp_path / "report.json").exists()


@pytest.mark.skipif(not SOURCES, reason="MSO_VLLM_SOURCES names no folder with another version of vLLM")
def test_another_tested_version_gives_the_same_verdicts(folder: Path, tmp_path: Path) -> None:
    gone = ("model.layers.0.self_attn.k_proj.weight_scale", "model.layers.1.mlp.down_proj.weight_packed")
    whole = Job.of_folder(folder, tp=(1, 3, 4), pp=2)
    job = replace(whole, tensors=tuple(header for header in whole.tensors if header.name not in gone))
    path = os.pathsep.join([SOURCES, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = command("shapes", job.as_dict(), tmp_path, PYTHONPATH=path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    there, here = Report.from_dict(json.loads((tmp_path / "report.json").read_text())), prove(job)
    assert there.vllm != here.vllm
    assert there.problems == here.problems
    assert {problem.tensor for problem in here.problems} == {*gone, ""}
