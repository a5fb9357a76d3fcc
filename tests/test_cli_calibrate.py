"""Calibration by commands: alone, as a part of `quantize`, stopped on the way, and what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mso_hub.calibrate.statistics import partial_folder, read_statistics
from mso_hub.cli import main
from mso_hub.cli.calibrate import beside
from tests.calibrate.statistics import write_some
from tests.helpers import tiny_moe
from tests.running import command, digests, paused, proceed, run

MODEL = Path(__file__).parent / "models" / "tiny-qwen3-moe"
SIZE = ("--calib_size", "6", "--max_seq_len", "64", "--batch_size", "2")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred lines of plain text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    said = "the documentation of a library says what every function takes and returns, and when it raises"
    lines = (f"{said[at % 7 :]}, {said[: at % 50]}, number {at}" for at in range(400))
    path.write_text("\n\n".join(lines))
    return path


@pytest.fixture(scope="module")
def stats(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the small trained model, by the command."""
    path = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    done = invoke("calibrate", "--input_dir", MODEL, "--output", path, "--calib_dataset", text, *SIZE)
    assert done.exit_code == 0, done.output
    assert re.search(r"113 modules over 384 tokens of .*text\.txt", done.stdout)
    assert f"mso-hub quantize --input_dir {MODEL} --output_dir OUT --stats {path}" in done.stdout
    assert "6 rows of 64 tokens, 384 tokens" in done.stderr
    assert re.search(r"100%\|.*tok/s, layer 4/4", done.stderr.replace("\r", "\n"))
    return path


def invoke(*arguments: object) -> Result:
    """Run the program in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def shards(folder: Path) -> dict[str, bytes]:
    """Content of the shards of an output."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_statistics_become_scales_that_verify_accepts(stats: Path, tmp_path: Path) -> None:
    """NVFP4 with static activation scales and an FP8 KV cache, in the two layouts."""
    for layout in ("compressed-tensors", "modelopt"):
        out = tmp_path / layout
        words = ["--stats", stats, "--kv_cache", "fp8", "--all_linear", "--layout", layout]
        done = invoke("quantize", "--input_dir", MODEL, "--output_dir", out, *words)
        assert done.exit_code == 0, done.output
        checked = invoke("verify", out, "--source", MODEL)
        assert checked.exit_code == 0, checked.output
        assert "measured over 384 tokens in 6 rows of" in checked.stdout
        said = json.loads((out / "mso_hub.json").read_text())["calibration"]
        assert (said["tokens"], said["source"], said["headroom"]) == (384, "tiny-qwen3-moe", None)


def test_plan_takes_statistics_and_counts_what_they_lack(tmp_path: Path) -> None:
    moe = tiny_moe(tmp_path / "moe")
    amax = {module: value for module, value in read_some(moe, tmp_path).items() if ".mlp.experts" in module}
    amax |= {module: 0.0 for module in amax if ".0.mlp.experts.1." in module or ".1.mlp.experts.3." in module}
    path = write_some(tmp_path / "lacking", moe, amax)
    planned = invoke("plan", moe, "--stats", path)
    assert planned.exit_code == 0, planned.output
    assert "2 of 8 experts saw no token of a text (400 tokens)" in planned.stdout
    refused = invoke("plan", moe, "--stats", path, "--all_linear")
    assert refused.exit_code == 2
    assert "self_attn.q_proj: has no statistics, the calibration never ran it" in refused.stderr


def read_some(moe: Path, folder: Path) -> dict[str, float]:
    """Statistics of every module of a checkpoint."""
    return dict(read_statistics(write_some(folder / "all", moe)).amax)


def test_calibrate_within_quantize_is_the_two_commands_in_one(text: Path, stats: Path, tmp_path: Path) -> None:
    """The same bytes; the statistics stay beside the output, so that the command can be repeated."""
    two, one = tmp_path / "two", tmp_path / "one"
    assert invoke("quantize", "--input_dir", MODEL, "--output_dir", two, "--stats", stats).exit_code == 0
    words = ["--input_dir", MODEL, "--output_dir", one, "--calibrate", "--calib_dataset", text, *SIZE]
    done = invoke("quantize", *words)
    assert done.exit_code == 0, done.output
    assert shards(one) == shards(two)
    kept = tmp_path / "one.statistics.safetensors"
    assert kept.read_bytes() == stats.read_bytes()
    assert f"statistics: {kept} (--stats takes them)" in done.stderr
    before = digests(tmp_path)
    again = invoke("quantize", *words)
    assert again.exit_code == 0, again.output
    assert "was complete already, nothing was written" in again.stdout
    assert digests(tmp_path) == before


def test_events_of_both_steps_are_json_lines(text: Path, tmp_path: Path) -> None:
    words = ["--input_dir", MODEL, "--output_dir", tmp_path / "out", "--calibrate", "--calib_dataset", text, *SIZE]
    done = invoke("quantize", *words, "--progress", "json")
    assert done.exit_code == 0, done.output
    events = [json.loads(line)["event"] for line in done.stdout.splitlines()]
    assert [e for e in events if e in ("Calibrating", "LayerDone", "Calibrated", "PlanReady", "Published")] == [
        "Calibrating", *["LayerDone"] * 4, "Calibrated", "PlanReady", "Published",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("event", "kill"), [("LayerDone", signal.SIGKILL), ("ShardDone", signal.SIGINT)])
def test_stopped_in_either_step_the_same_command_goes_on(
    event: str, kill: signal.Signals, text: Path, stats: Path, tmp_path: Path
) -> None:
    """Ctrl-C is a pause with its own exit code, a kill is none; both lose at most the layer or the shard in hand."""
    out = tmp_path / "out"
    words = command(
        "quantize", MODEL, out, "--calibrate", "--calib_dataset", str(text), *SIZE, "--workers", "1", "--all_linear"
    )
    with paused(words, event) as process:
        os.kill(process.pid, kill)
        if kill == signal.SIGINT:
            code, _, said = proceed(process)
            assert code == 130
            assert "paused; what is complete is kept, the same command goes on" in said
        else:
            assert process.wait(60) == -signal.SIGKILL
    assert not out.exists()
    assert partial_folder(tmp_path / "out.statistics.safetensors").exists() == (event == "LayerDone")
    done = run([*words, "--progress", "json"])
    assert done.returncode == 0, done.stderr
    events: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    layers = [e["index"] for e in events if e["event"] == "LayerDone"]
    if event == "ShardDone":
        assert not layers
        assert [e for e in events if e["event"] == "ShardResumed"]
    else:
        assert layers in ([1, 2, 3], [2, 3], [3])
    assert (tmp_path / "out.statistics.safetensors").read_bytes() == stats.read_bytes()
    whole = invoke(
        "quantize", "--input_dir", MODEL, "--output_dir", tmp_path / "whole", "--stats", stats, "--all_linear"
    )
    assert whole.exit_code == 0
    assert shards(out) == shards(tmp_path / "whole")


@pytest.mark.slow
def test_ctrl_c_pauses_calibrate_alone(text: Path, stats: Path, tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    words = [sys.executable, "-m", "mso_hub.cli", "calibrate", "--input_dir", str(MODEL), "--output", str(path)]
    words += ["--calib_dataset", str(text), *SIZE]
    with paused(words, "LayerDone") as process:
        os.kill(process.pid, signal.SIGINT)
        code, events, said = proceed(process)
    assert (code, path.exists()) == (130, False)
    assert "Calibrated" not in {event["event"] for event in events}
    assert "the same command goes on" in said
    done = run([*words, "--quiet"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert path.read_bytes() == stats.read_bytes()


def test_what_is_impossible_is_said_before_the_model_runs(text: Path, tmp_path: Path) -> None:
    """A recipe that fits nothing, a module that no text reaches: no layer runs, nothing is left behind."""
    words = ["quantize", "--input_dir", MODEL, "--output_dir", tmp_path / "out", "--calibrate", "--calib_dataset", text]
    refused = invoke(*words, "--ignore", "no.such.module")
    assert refused.exit_code == 2
    assert "ignore 'no.such.module' matches no weight" in refused.stderr
    assert not list(tmp_path.iterdir())


def test_statistics_for_a_repo_lie_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One file for each place, so that two outputs never share one."""
    monkeypatch.setenv("MSO_HUB_CACHE", str(tmp_path))
    places = {beside(where) for where in ("hf://org/name", "hf://org/name@branch", "hf://org/other")}
    assert len(places) == 3
    assert {path.parent for path in places} == {tmp_path / "statistics"}
    assert beside(str(tmp_path / "out")) == tmp_path / "out.statistics.safetensors"


REFUSED: dict[str, tuple[list[str], str]] = {
    "two places for scales": (["--stats", "STATS", "--input_scale", "1"], "--stats and --input_scale say where"),
    "two calibrations": (["--stats", "STATS", "--calibrate"], "--stats and --calibrate say where activation scales"),
    "headroom of nothing": (["--headroom", "2"], "--headroom 2: is for measured scales; add --stats FILE or --calib"),
    "headroom below one": (["--stats", "STATS", "--headroom", "0.5"], "headroom: must be 1 to 4096, got 0.5"),
    "headroom below one, before hours": (["--calibrate", "--headroom", "0.5"], "headroom: must be 1 to 4096, got 0.5"),
    "statistics of nowhere": (["--stats", "/nowhere"], "must be a file that `mso-hub calibrate` wrote, found nothing"),
    "a format without a static scale": (["--stats", "STATS", "--format", "w4a16"], "has no static activation scale, a"),
    "a run for a format without one": (["--calibrate", "--format", "mxfp4"], "--calibrate: mxfp4 has no static activ"),
    "NVFP4 with FP8 activations": (["--stats", "STATS", "--activations", "8"], "no runtime loads NVFP4 weights with F"),
    "text without a run": (["--calib_size", "8"], "--calib_size: is for a run that reads text; add --calibrate, or"),
    "experts without a run": (["--experts", "stack"], "--experts: is for a run of the model; add --calibrate, or"),
    "code without a run": (["--trust_remote_code"], "--trust_remote_code: is for a run of the model; add --calibrate"),
    "a size that is none": (["--calibrate", "--max_cpu_memory", "much"], "max_cpu_memory: needs a size like 512MiB"),
    "other statistics": (["--stats", "OTHER"], "these are statistics of moe, not of tiny-qwen3-moe"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_are_refused_with_a_way_out(name: str, stats: Path, tmp_path: Path) -> None:
    words, message = REFUSED[name]
    other = write_some(tmp_path / "other", tiny_moe(tmp_path / "moe"))
    places = {"STATS": str(stats), "OTHER": str(other)}
    arguments = [places.get(word, word) for word in words]
    refused = invoke("quantize", "--input_dir", MODEL, "--output_dir", tmp_path / "out", *arguments)
    assert refused.exit_code == 2, refused.output
    assert message in " ".join(refused.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_is_refused(text: Path, tmp_path: Path) -> None:
    """By the file that is missing, and before a layer runs."""
    moe = tiny_moe(tmp_path / "moe")
    refused = invoke("calibrate", "--input_dir", moe, "--output", tmp_path / "stats", "--calib_dataset", text)
    assert refused.exit_code == 2
    assert "has no tokenizer: needs tokenizer.json" in refused.stderr
    assert not (tmp_path / "stats").exists()
