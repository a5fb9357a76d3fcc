"""The two JSON files: what is written is read back, and everything else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vllm_mso_hub.job import Header, Job, JobError, Problem, Refusal, Report, World

JOB = Job(
    "hf://org/name@abc",
    "/some/folder",
    (Header("model.norm.weight", "BF16", (64,), "a.safetensors"), Header("x.scale", "F32", (), "b.safetensors")),
    tp=(1, 8),
    pp=2,
    ep=True,
    layers=3,
    trust_remote_code=True,
)
PROBLEM = Problem("partial", "k.weight_scale", "qkv.weight_scale", (0, 1), "8 elements written", "6", "A sentence.")
REPORT = Report(
    "0.32.0",
    "2.13.0",
    "LlamaForCausalLM",
    1.5,
    10**9,
    (World(2, 1, ep=False, seconds=0.5, rank_bytes=(7, 7), problems=(PROBLEM,)),),
)


@pytest.mark.parametrize("thing", [JOB, REPORT, Report("9", "2", "", 0.0, 1, (), Refusal("version", "Too new."))])
def test_json_gives_back_what_was_written(thing: Job | Report) -> None:
    assert type(thing).from_dict(json.loads(json.dumps(thing.as_dict()))) == thing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tp": [0]}, "tp: expected sizes of at least 1"),
        ({"tp": []}, "tp: expected sizes of at least 1"),
        ({"tp": "1,2"}, "job: tp: expected a list"),
        ({"tp": [True]}, "job: tp: expected a whole number"),
        ({"pp": 0}, "pp: expected at least 1 stage, got 0"),
        ({"layers": -1}, "job: layers: expected a whole number"),
        ({"ep": 1}, "job: ep: expected true or false, got 1"),
        ({"name": None}, "job: name: expected text, got None"),
        ({"version": 2}, "version 2, expected 1"),
        ({"tensors": [["a", "BF16", [1]]]}, r"expected \[name, dtype, shape, file\]"),
        ({"tensors": [["a", "BF16", [-1], "f"]]}, "shape of a: expected a whole number"),
        ({"more": 1}, r"missing keys \[\], unknown keys \['more'\]"),
    ],
)
def test_a_job_that_is_wrong_is_refused_with_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        Job.from_dict({**JOB.as_dict(), **change})


def test_a_missing_key_is_named() -> None:
    data = REPORT.as_dict()
    del data["worlds"][0]["rank_bytes"]
    with pytest.raises(JobError, match=r"world: missing keys \['rank_bytes'\]"):
        Report.from_dict(data)


def test_an_unknown_kind_of_problem_is_refused() -> None:
    with pytest.raises(JobError, match="problem: kind: expected one of config, create"):
        Problem.from_dict({**PROBLEM.as_dict(), "kind": "strange"})


def test_a_report_is_ok_only_when_something_was_checked_and_nothing_was_found() -> None:
    assert not REPORT.ok
    assert not Report("9", "2", "", 0.0, 1, ()).ok
    assert Report("9", "2", "", 0.0, 1, (World(1, 1, ep=False, seconds=0.1, rank_bytes=(3,), problems=()),)).ok


def test_the_job_of_a_folder_holds_the_headers_of_the_files_that_the_index_names(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / "one.safetensors", {"format": "pt"})
    save_file({"b": torch.zeros((), dtype=torch.uint8)}, tmp_path / "two.safetensors")
    save_file({"c": torch.zeros(1)}, tmp_path / "left-over.safetensors")
    index = {"weight_map": {"b": "two.safetensors", "a": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    job = Job.of_folder(tmp_path, tp=(2,))
    assert job.tensors == (Header("a", "BF16", (2, 3), "one.safetensors"), Header("b", "U8", (), "two.safetensors"))
    assert (job.name, job.folder, job.tp) == (str(tmp_path), str(tmp_path), (2,))


def test_a_folder_without_shards_is_no_job(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="holds no"):
        Job.of_folder(tmp_path)
