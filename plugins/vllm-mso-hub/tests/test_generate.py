"""What `mso-hub smoke --generate` asks of vLLM: jobs that make no sense, reports, errors, and two real ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from models import TRAINED, converted
from mso_hub import Recipe
from vllm_mso_hub.generate import KEYS, cache_bytes, check, run
from vllm_mso_hub.job import JobError

NVFP4 = Recipe(scheme="nvfp4", mode="all-linear")
PROMPT = [5, 17, 80, 3, 44, 91, 12, 60, 7, 33, 2, 100]


def _job(folder: Path | str = "/nowhere", **changes: Any) -> dict[str, Any]:
    job = {"version": 1, "name": "a model", "folder": str(folder), "prompts": [PROMPT], "max_tokens": 4}
    return {**job, "tp": 1, "emulate": True, "max_model_len": 64, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": [[]]}, "prompts"),
        ({"prompts": [[1, 2], "text"]}, "got both"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"tp": "2"}, "tp"),
        ({"version": 2}, "version 2"),
        ({"temperature": 1}, "temperature"),
    ],
)
def test_a_job_that_makes_no_sense_is_an_error_that_names_the_key(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError, match=words):
        check(_job(**changes))


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_needed(key: str) -> None:
    job = _job()
    del job[key]
    with pytest.raises(JobError, match=key):
        check(job)


def test_the_last_line_of_a_crash_is_its_error(tmp_path: Path) -> None:
    """What is torn down after it may say more than a person wants to read."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((TRAINED / "config.json").read_text())
    (tmp_path / "job.json").write_text(json.dumps(_job(tmp_path / "model")))
    paths = [str(tmp_path / name) for name in ("job.json", "report.json")]
    command = [sys.executable, "-m", "vllm_mso_hub", "generate", *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert not (tmp_path / "report.json").exists()
    assert "Cannot find any model weights" in done.stderr.splitlines()[-1]


def test_a_report_holds_tokens_and_likelihoods() -> None:
    report = run(_job(TRAINED, prompts=["Return a list of the words in the string.", "def"], max_tokens=6))
    assert json.loads(json.dumps(report)) == report
    assert {key: report[key] for key in ("version", "device", "emulated")} == {
        "version": 1,
        "device": "cpu",
        "emulated": True,
    }
    assert report["kernels"] == ["UnquantizedFusedMoEMethod: CPUUnquantizedExperts, 4 layers"]
    for output in report["outputs"]:
        assert len(output["tokens"]) == 6
        likelihoods = output["prompt_logprobs"]
        assert all(number < 0 for number in likelihoods)
        assert output["prompt_nll"] == (-sum(likelihoods) / len(likelihoods) if likelihoods else None)
    assert report["outputs"][0]["prompt_nll"] < 7.0  # 2,048 tokens at random have 7.6 nats


def test_a_model_that_loads_in_part_is_an_error(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = converted(tiny("llama"), NVFP4, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight_scale"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"partial: model\.layers\.1\.self_attn\.qkv_proj\.weight_scale"):
        run(_job(folder))


def test_room_for_a_cache_grows_with_the_model() -> None:
    small = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}
    large = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 80}
    assert cache_bytes(small, 64) == 8 * 2**20
    assert cache_bytes(large, 256) >= 2 * 2 * 8 * 128 * 80 * 256


def _python(job: dict[str, Any], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "vllm_mso_hub", "generate", str(folder / "job.json"), str(folder / "report.json")]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def test_without_emulation_vllm_says_what_it_lacks(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    done = _python(_job(converted(tiny("llama"), NVFP4, tmp_path / "model"), emulate=False), tmp_path)
    assert done.returncode not in (0, 2)
    assert "NVFP4 kernel" in done.stderr
    assert not (tmp_path / "report.json").exists()


def test_two_real_ranks_answer_like_one(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Four processes of vLLM, each with the plugin from its entry point: checked loader and emulation in both ranks."""
    assert any(hook.value == "vllm_mso_hub:register" for hook in entry_points(group="vllm.general_plugins"))
    folder = converted(tiny("llama"), NVFP4, tmp_path / "model")
    done = _python(_job(folder, tp=2), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    two, one = json.loads((tmp_path / "report.json").read_text()), run(_job(folder))
    assert two["kernels"] == one["kernels"] == ["CompressedTensorsW4A4Fp4: EmulatedNvFp4WeightOnlyKernel, 8 layers"]
    ours, theirs = two["outputs"][0]["prompt_logprobs"], one["outputs"][0]["prompt_logprobs"]
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 0.05  # sums in another order, in BF16


def test_ranks_that_would_not_find_the_plugin_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    with pytest.raises(JobError, match="VLLM_PLUGINS='another' leaves out mso_hub"):
        run(_job(tp=2))
