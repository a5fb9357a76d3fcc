"""`mso-hub demo`: a real checkpoint there and back, and every command that it shows does what it says."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mso_hub.cli import main
from mso_hub.demo import TINY_MODEL, run_demo
from mso_hub.errors import RecipeError, VerifyError
from mso_hub.hub.devhub import DevHub
from mso_hub.hub.devhub.seed import connect
from mso_hub.source import open_source, read_checkpoint
from tests.helpers import tensors_of, tiny_llama, write_checkpoint


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Caches, logs and logins of the client of their own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        for name in ("HF_HOME", "HF_XET_CACHE", "MSO_HUB_CACHE"):
            patch.setenv(name, str(folder / name))
        patch.delenv("HF_TOKEN", raising=False)
        yield folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo in a process of its own, from an empty folder: where, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    words = [str(Path(sys.executable).parent / "mso-hub"), "demo"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True, cwd=folder)
    return folder / "demo-output", done.stdout


def test_the_trained_model_goes_there_and_back(demo: tuple[Path, str]) -> None:
    """NVFP4 in under half of the bytes in a repo, BF16 again in a folder, both verified."""
    folder, shown = demo
    with DevHub(folder / "hub", xet=True) as hub:
        source = open_source("hf://dev/tiny-qwen3-moe-NVFP4", client=connect(hub, "read"))
        packed = [info for shard in read_checkpoint(source).shards.values() for info in shard.tensors]
        source.close()
    dense, original = tensors_of(folder / "bf16"), tensors_of(TINY_MODEL)
    assert sum(info.name.endswith("weight_packed") for info in packed) == 112
    assert {name: (t.dtype, t.shape) for name, t in dense.items()} == {
        name: (t.dtype, t.shape) for name, t in original.items()
    }
    assert sum(info.nbytes for info in packed) < 0.5 * sum(t.nbytes for t in original.values())
    assert shown.count("no problems found") == 2
    assert "serve it: vllm serve dev/tiny-qwen3-moe-NVFP4" in shown


def test_the_commands_shown_do_the_same(
    demo: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Typed into a shell, beside the Hub that the demo left, they find everything done and no problem either."""
    folder, shown = demo
    commands = [shlex.split(line)[2:] for line in shown.splitlines() if line.startswith("$ mso-hub ")]
    verbs = [command[0] for command in commands]
    assert verbs == ["inspect", "plan", "quantize", "verify", "decompress", "verify"]
    with DevHub(folder / "hub", xet=True) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", hub.token())
        for command in commands:
            words = [word.replace("NVFP4", "AGAIN").replace("demo-output", str(tmp_path)) for word in command]
            result = CliRunner().invoke(main, words)
            assert result.exit_code == 0, result.output
    for path in (folder / "bf16").glob("*.safetensors"):
        assert (tmp_path / "bf16" / path.name).read_bytes() == path.read_bytes()


def test_the_demo_can_be_repeated_and_takes_another_model(tmp_path: Path) -> None:
    """An earlier result of it is replaced, also by one of another model."""
    lines: list[str] = []
    for seed in (1, 2):
        source = tiny_llama(tmp_path / str(seed) / "in", seed=seed)
        run_demo(str(source), tmp_path / "out", lines.append)
        name = "model.embed_tokens.weight"
        assert torch.equal(tensors_of(tmp_path / "out" / "bf16")[name], tensors_of(source)[name])
    assert sum("no problems found" in line for line in lines) == 4


def test_a_check_that_fails_ends_the_demo(tmp_path: Path) -> None:
    """Weights that NVFP4 cannot follow: a report with problems is never shown as a success."""
    weight = torch.full((16, 16), 1e-6)
    weight[0, 0] = 1.0  # everything else is far below the smallest step
    shrunk = {"model.layers.0.mlp.down_proj.weight": weight, "model.layers.0.mlp.up_proj.weight": weight * 0 + 1e-6}
    shrunk["model.layers.0.mlp.gate_proj.weight"] = weight * 1e6
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": shrunk}, {"model_type": "llama"})
    lines: list[str] = []
    with pytest.raises(VerifyError, match="problems, the first"):
        run_demo(str(source), tmp_path / "out", lines.append)
    assert not any("serve it" in line for line in lines)


def test_the_model_of_the_repository_is_not_in_the_wheel(tmp_path: Path) -> None:
    """Where it is not, the message says what to do."""
    with pytest.raises(RecipeError, match=r"nowhere: .*pass --source DIR"):
        run_demo(str(tmp_path / "nowhere"), tmp_path / "out", print)
    assert not (tmp_path / "out").exists()
