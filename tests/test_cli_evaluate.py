"""Evaluation by the command: what it prints and writes, what is refused, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mso_hub.cli import main
from mso_hub.losses import read_table
from mso_hub.plan.evaluation import read_evaluation
from tests.calibrate.heldout import REAL
from tests.running import paused, proceed

SIZE = ("--rows", "6", "--max_seq_len", "64", "--batch_size", "3")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred lines of plain text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    said = "the documentation of a library says what every function takes and returns, and when it raises"
    path.write_text("\n\n".join(f"{said[at % 7 :]}, {said[: at % 50]}, number {at}" for at in range(300)))
    return path


def invoke(*arguments: object) -> Result:
    """Run the program in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def numbers(result: Result) -> dict[str, Any]:
    """What --json printed."""
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_model_and_what_was_made_of_it(text: Path, tmp_path: Path) -> None:
    """Numbers on the terminal and in files; the model card takes them."""
    out = tmp_path / "out"
    words = ("--input_dir", REAL, "--output_dir", out, "--all_linear", "--activations", "4")
    assert invoke("quantize", *words).exit_code == 0
    done = invoke("evaluate", out, "--against", REAL, "--text", text, *SIZE, "--output", tmp_path / "found.json")
    assert done.exit_code == 0, done.output
    for said in ("NVFP4 (W4A4, compressed-tensors)", "NVFP4 in 112 linear layers", "384 tokens in 6 rows of", "+- "):
        assert said in done.stdout
    assert "6 rows of 64 tokens" in done.stderr
    found = read_evaluation(tmp_path / "found.json")
    assert found.reference is not None
    assert f"{found.reference.kl:.5f}" in done.stdout
    card = invoke("card", out, "--source", REAL, "--evaluation", tmp_path / "found.json", "--output", "-")
    assert card.exit_code == 0, card.output
    assert "kl_divergence" in card.stdout
    tried = numbers(invoke("evaluate", REAL, "--format", "nvfp4", *words[4:], "--text", text, *SIZE, "--json"))
    assert tried["reference"] == found.as_dict()["reference"]


def test_statistics_of_a_calibration_are_tried_too(text: Path, tmp_path: Path) -> None:
    """Static FP8 scales from a file, without writing a checkpoint."""
    stats = tmp_path / "stats.safetensors"
    words = ("--calib_dataset", text, "--calib_size", "6", "--max_seq_len", "64")
    assert invoke("calibrate", "--input_dir", REAL, "--output", stats, *words).exit_code == 0
    ways = ("evaluate", REAL, "--format", "fp8", "--all_linear", "--text", text, *SIZE, "--json")
    found = numbers(invoke(*ways, "--stats", stats))
    assert found["activations"] == {"FP8 static": 112}
    assert 0 < found["reference"]["kl"] < 0.004
    assert numbers(invoke(*ways, "--stats", stats, "--headroom", "2"))["reference"]["kl"] != found["reference"]["kl"]


def test_sensitivity_says_its_cost_and_feeds_target_bits(text: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    words = ("--sensitivity", table, "--formats", "nvfp4,fp8", "--all_linear", "--text", text, *SIZE)
    done = invoke("evaluate", REAL, *words, "--progress", "none")
    assert done.exit_code == 0, done.output
    assert "26 trials, 75 passes through a layer: as long as 18.8 runs" in done.stderr
    assert "model.layers.0.self_attn.qkv_proj" in done.stdout
    assert "all of them together" in done.stdout
    found = read_table(table)
    assert found is not None
    assert found.divergence is not None
    choice = ("--target_bits", "6", "--fallback", "fp8,bf16", "--error_table", table)
    made = invoke("quantize", "--input_dir", REAL, "--output_dir", tmp_path / "out", "--all_linear", *choice)
    assert made.exit_code == 0, made.output
    assert "sum of KL divergences" in made.stderr


def test_numbers_in_another_dtype_are_other_numbers(text: Path) -> None:
    """An option that does nothing would be a lie."""
    ways = ("evaluate", REAL, "--text", text, *SIZE, "--json")
    short, wide = numbers(invoke(*ways)), numbers(invoke(*ways, "--calib_dtype", "fp32"))
    assert (short["dtype"], wide["dtype"]) == ("BF16", "F32")
    assert short["perplexity"] != wide["perplexity"]
    assert short["perplexity"] == pytest.approx(wide["perplexity"], rel=0.01)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--all_linear",), "--all_linear: is for a format that is tried"),
        (("--formats", "nvfp4"), "--formats nvfp4: is for --sensitivity"),
        (("--format", "nvfp4", "--weights_only"), "--weights_only: is for a checkpoint as it is"),
        (("--output", "found.txt"), r".json or .md"),
        (("--rows", "3", "--calib_size", "4"), "--rows and --calib_size are the same"),
        (("--sensitivity", "t.json", "--against", "there"), "--against: is not for --sensitivity"),
        (("--sensitivity", "t.md"), "ends in .json"),
        (("--headroom", "2"), "--headroom 2: is for measured scales"),
        (("--text", "nowhere/there.txt"), "nowhere/there.txt"),
        (("--max_seq_len", "100000"), "does not fill one row"),
    ],
)
def test_what_contradicts_itself_is_refused(
    words: tuple[str, ...], why: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one sentence, with exit code 2."""
    monkeypatch.chdir(tmp_path)
    known = () if "--text" in words else ("--text", text)
    done = invoke("evaluate", REAL, *known, *words)
    assert done.exit_code == 2, done.output
    assert why in done.stderr
    assert done.stderr.count("mso-hub: ") == 1


def test_ctrl_c_ends_it_and_leaves_nothing(text: Path, tmp_path: Path) -> None:
    """Also the files that hidden states go to under a limit of memory."""
    work = tmp_path / "work"
    work.mkdir()
    program = [sys.executable, "-m", "mso_hub.cli", "evaluate", str(REAL), "--against", str(REAL), "--text", str(text)]
    environment = {**os.environ, "TMPDIR": str(work)}
    words = [*program, "--rows", "40", "--max_seq_len", "64", "--batch_size", "1", "--max_cpu_memory", "4GB"]
    with paused(words, "LayerDone", env=environment) as process:
        os.kill(process.pid, signal.SIGINT)
        code, events, said = proceed(process)
    assert code == 130, said
    assert "stopped; nothing is kept of a measurement" in said
    assert not [event for event in events if event["event"] == "Evaluated"]
    assert not list(work.iterdir())


def test_json_events_end_with_the_numbers(text: Path) -> None:
    program = [sys.executable, "-m", "mso_hub.cli", "evaluate", str(REAL), "--format", "fp8_block", "--text", str(text)]
    done = subprocess.run(
        [*program, *SIZE, "--progress", "json"], capture_output=True, text=True, check=True, timeout=120
    )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events if event["event"] != "BatchDone"] == [
        "Calibrating", *["LayerDone"] * 8, "Evaluated",
    ]  # fmt: skip
    assert 0 < events[-1]["kl"] < 0.01
