"""Real processes that end badly: every end is a message that names the program, how it ended and its last words."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mso_hub import Recipe, make_plan, prove
from mso_hub.errors import CheckpointError, RecipeError, SmokeError
from mso_hub.smoke import plugin_sources, python_of_vllm
from tests.helpers import tiny_llama

Program = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _own_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody's settings, and a folder for temporary files that must be empty in the end."""
    monkeypatch.delenv("MSO_VLLM_PYTHON", raising=False)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model")


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """A shell script in place of a Python: it has a vLLM, and runs the plugin as the script says."""

    def write(script: str) -> Path:
        path = tmp_path / "python"
        path.write_text(f'#!/bin/bash\nif [ "$1" = -c ]; then echo "[[3, 12], true]"; exit 0; fi\n{script}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return write


@pytest.fixture
def broken_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A package vllm of this Python's that does something when it is imported."""

    def write(code: str) -> None:
        (tmp_path / "site" / "vllm").mkdir(parents=True)
        (tmp_path / "site" / "vllm" / "__init__.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))

    return write


def refusal(model: Path, python: Path | str | None = None) -> str:
    with pytest.raises(SmokeError) as caught:
        prove(model, python=python)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------- which Python


def test_the_given_python_goes_before_the_variable_and_this_one_is_last(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert python_of_vllm() == Path(sys.executable)
    monkeypatch.setenv("MSO_VLLM_PYTHON", str(program("")))
    assert python_of_vllm() == program("")
    assert python_of_vllm("bash") == Path("/usr/bin/bash") or python_of_vllm("bash") == Path("/bin/bash")
    monkeypatch.setenv("MSO_VLLM_PYTHON", "")
    assert python_of_vllm() == Path(sys.executable)


def test_a_link_to_a_python_stays_a_link(tmp_path: Path) -> None:
    """A virtual environment is known by the path of its Python."""
    (tmp_path / "link").symlink_to(sys.executable)
    assert python_of_vllm(tmp_path / "link") == tmp_path / "link"


def test_a_python_that_is_not_there(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting that names it is named, and the way to get one."""
    said = refusal(model, "/nowhere/python")
    assert said.startswith(
        "--vllm-python /nowhere/python: must be a Python that has vLLM, found nothing there; `mso-hub"
    )
    assert "found a folder there; its Python is" in refusal(model, tmp_path)
    assert "found a file that cannot be run there" in refusal(model, model / "config.json")
    monkeypatch.setenv("MSO_VLLM_PYTHON", "/nowhere/python")
    assert refusal(model).startswith("MSO_VLLM_PYTHON /nowhere/python: must be a Python that has vLLM, found nothing")


def test_a_python_without_vllm(model: Path) -> None:
    """This one: vLLM has an environment of its own."""
    said = refusal(model)
    assert said.startswith(
        f"{sys.executable}: has no vLLM; `mso-hub setup-vllm` makes an environment with it; name its"
    )
    assert "--vllm-python PATH or in MSO_VLLM_PYTHON" in said


def test_a_program_that_is_no_python(model: Path, tmp_path: Path) -> None:
    """One that says something else, an old one, one that cannot run."""
    path = tmp_path / "python"
    for script, said in (
        ("#!/bin/bash\necho hello", "asked for its version it said 'hello'"),
        ("#!/bin/bash\necho '[[3, 8], true]'", "must be Python 3.10 or later, is 3.8"),
        ("#!/bin/bash\necho '[[\"abc\"], true]'", "asked for its version it said '[[\"abc\"], true]'"),
        ("#!/bin/bash\nkill -SEGV $$", "it said 'nothing and ended with -11'"),
        ("#!/nowhere/bash\n", "it does not run"),
    ):
        path.write_text(script)
        path.chmod(0o755)
        assert said in refusal(model, path)


# -------------------------------------------------------------------------------------------------------- bad ends


def test_a_vllm_that_cannot_be_imported(model: Path, broken_vllm: Callable[[str], None]) -> None:
    """Its traceback ends the message."""
    broken_vllm("raise RuntimeError('operator torchvision::nms does not exist')")
    said = refusal(model)
    assert f"{sys.executable} -m vllm_mso_hub shapes ended with exit code 1; its last lines:" in said
    assert said.endswith("RuntimeError: operator torchvision::nms does not exist")


@pytest.mark.parametrize(
    ("script", "how"),
    [
        ("kill -KILL $$", "was killed, most likely because the machine ran out of memory; it said nothing"),
        ("exit 137", "was killed, most likely because the machine ran out of memory"),
        ("kill -SEGV $$", "died of SIGSEGV"),
        ("exit 139", "died of SIGSEGV"),
        ("exit 7", "ended with exit code 7"),
        ("exit 200", "ended with exit code 200"),
        ("exit 0", "wrote no report"),
        ("echo MemoryError; exit 1", "ran out of memory; its last lines:\n  MemoryError"),
    ],
)
def test_a_process_that_dies(script: str, how: str, model: Path, program: Program) -> None:
    assert f"-m vllm_mso_hub shapes {how}" in refusal(model, program(script))


def test_the_last_lines_are_shown_of_both_streams(model: Path, program: Program) -> None:
    """Twenty of them, those that are blank left out."""
    said = refusal(model, program('for n in $(seq 30); do echo "line $n"; echo; done; echo end >&2; exit 1'))
    lines = [line.strip() for line in said.splitlines()[1:]]
    assert lines == [*(f"line {n}" for n in range(12, 31)), "end"]


def test_what_the_plugin_says_of_a_job_is_the_message(model: Path, program: Program) -> None:
    assert refusal(model, program("echo noise; echo 'vllm_mso_hub: tp: no'; exit 2")) == "tp: no"


GOOD = {
    "version": 1, "vllm": "0.32.0", "torch": "2", "architecture": "X", "seconds": 1, "peak_rss": 1, "worlds": [],
    "refused": {"kind": "architecture", "message": "no"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "the report must be a JSON object with a version, is b''"),
        ("null", "the report must be a JSON object"),
        ("[1]", "the report must be a JSON object"),
        ("{", "the report must be a JSON object"),
        (json.dumps({**GOOD, "version": 2}), "the report has version 2, this mso_hub reads version 1"),
        (json.dumps({**GOOD, "more": 1}), "report needs vllm torch"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "torch"}), "report needs vllm torch"),
        (json.dumps({**GOOD, "peak_rss": 1.5}), "peak_rss must be of type int, got 1.5"),
        (json.dumps({**GOOD, "worlds": [{"tp": True}]}), "world needs tp pp ep"),
        (json.dumps({**GOOD, "refused": None}), "it has the sizes [], not [1, 2, 4, 8]"),
    ],
)
def test_a_report_that_is_none(content: str, said: str, model: Path, program: Program) -> None:
    assert said in refusal(model, program(f"printf %s '{content}' > \"$5\""))


def test_a_refusal_of_the_plugin_is_a_report(model: Path, program: Program) -> None:
    """What nothing could be checked of is not fine."""
    report = prove(model, python=program(f"printf %s '{json.dumps(GOOD)}' > \"$5\""))
    assert not report.ok
    assert report.problems == ()
    assert report.refused is not None
    assert report.as_dict()["refused"] == {"kind": "architecture", "message": "no"}


def test_the_job_is_what_the_plugin_reads(model: Path, program: Program, tmp_path: Path) -> None:
    """All headers, the settings, a folder of configs; and the plugin's sources come first."""
    keep = f"cd {tmp_path}; cp $4 job.json; ls $(dirname $4)/model > ls; echo $PYTHONPATH > path; exit 1"
    with pytest.raises(SmokeError):
        prove(make_plan(model, Recipe()), tp=(2,), pp=2, ep=True, layers=2, python=program(keep))
    job = json.loads((tmp_path / "job.json").read_text())
    assert {key: job[key] for key in ("version", "name", "tp", "pp", "ep", "layers", "trust_remote_code")} == {
        "version": 1, "name": str(model), "tp": [2], "pp": 2, "ep": True, "layers": 2, "trust_remote_code": False,
    }  # fmt: skip
    assert ["model.layers.0.mlp.up_proj.weight_packed", "U8", [128, 32], "model-00001-of-00002.safetensors"] in job[
        "tensors"
    ]
    assert (tmp_path / "ls").read_text() == "config.json\n"
    assert (tmp_path / "path").read_text().split(os.pathsep)[0].strip() == str(plugin_sources())


def test_the_code_of_a_checkpoint_gets_no_token(
    model: Path, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it kept: modules of a checkpoint are imported from the folder of the job."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    refusal(model, program(f"env > {tmp_path}/env; exit 1"))
    said = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    assert "hf_secret" not in said.values()
    assert said["HF_TOKEN_PATH"] == os.devnull
    assert Path(said["HF_MODULES_CACHE"]).is_relative_to(tmp_path / "tmp")


def test_nothing_is_left_behind(model: Path, program: Program, tmp_path: Path) -> None:
    """No file, and no process that the program started."""
    refusal(model, program(f"sleep 60 & echo $! > {tmp_path}/pid; exit 1"))
    assert not list((tmp_path / "tmp").iterdir())
    assert ended(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_process(number: int, code: int, model: Path, program: Program, tmp_path: Path) -> None:
    """And what it started, and the folder of its job: Ctrl-C, a time limit, a terminal that is closed."""
    path = program(f"echo $$ > {tmp_path}/pid; sleep 60")
    command = [sys.executable, "-m", "mso_hub.cli", "smoke", str(model), "--vllm-python", str(path)]
    (tmp_path / "scratch").mkdir()
    env = {**os.environ, "TMPDIR": str(tmp_path / "scratch")}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert not list((tmp_path / "scratch").iterdir())
    assert "Traceback" not in said
    assert ended(int((tmp_path / "pid").read_text()))


def ended(pid: int) -> bool:
    """Is a process gone, or a zombie that nobody has to wait for?"""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


# ---------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tp": ()}, "tp must be different whole numbers > 0, got []"),
        ({"tp": (0,)}, "tp must be different whole numbers > 0, got [0]"),
        ({"tp": (2, 2)}, "tp must be different"),
        ({"pp": 0}, "pp must be a number of pipeline stages > 0, got 0"),
        ({"pp": 3}, "pp must be at most 2, a layer for each stage, got 3"),
        ({"pp": 2, "layers": 1}, "pp must be at most 1"),
        ({"layers": -1}, "layers must be a number of decoder layers, 0 for all, got -1"),
        ({"layers": 3}, "layers must be at most 2, the decoder layers of"),
    ],
)
def test_sizes_that_cannot_be(settings: dict[str, int], said: str, model: Path, program: Program) -> None:
    with pytest.raises(RecipeError) as caught:
        prove(model, python=program("exit 1"), **settings)  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_a_folder_of_nothing(tmp_path: Path, program: Program) -> None:
    with pytest.raises(CheckpointError, match="found nothing there"):
        prove(tmp_path / "nothing", python=program("exit 1"))
