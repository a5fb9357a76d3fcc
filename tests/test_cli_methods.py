"""`quantize --method`: one job of text, statistics, method and conversion; stopped on the way, verified, refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from mso_hub.cli import main
from mso_hub.cli.methods import work_folder
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from mso_hub.source import open_source, read_checkpoint
from tests.helpers import tensors_of, tiny_moe
from tests.hubs import world
from tests.running import command, digests, paused, proceed, run

MODEL = Path(__file__).parent / "models" / "tiny-qwen3-moe"
SIZE = ("--calib_size", "8", "--max_seq_len", "128", "--batch_size", "4")
INT4 = ("--format", "w4a16", "--group_size", "32")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred lines of plain text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    said = "the documentation of a library says what every function takes and returns, and when it raises"
    path.write_text("\n\n".join(f"{said[at % 7 :]}, {said[: at % 50]}, number {at}" for at in range(400)))
    return path


@pytest.fixture(scope="module")
def gptq(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small trained model in INT4, by GPTQ."""
    out = tmp_path_factory.mktemp("gptq") / "out"
    done = quantize(out, "--method", "gptq", "--calib_dataset", text, *INT4, *SIZE)
    assert done.exit_code == 0, done.output
    assert "96 weights, 10.0 MB -> 5.5 MB in" in done.stdout
    assert "of 96 weights were quantized with gptq" in done.stdout
    return out


def invoke(*arguments: object) -> Result:
    """Run the program in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def quantize(out: Path, *arguments: object, source: Path = MODEL) -> Result:
    """Run `quantize`."""
    return invoke("quantize", "--input_dir", source, "--output_dir", out, *arguments)


def shards(folder: Path) -> dict[str, bytes]:
    """Content of the shards of an output."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_gptq_is_named_in_the_manifest_and_accepted_by_verify(gptq: Path) -> None:
    """A quarter of its codes is not the nearest, which is what GPTQ is about; nothing but the output is left."""
    said = json.loads((gptq / "mso_hub.json").read_text())["method"]
    assert (said["name"], said["tokens"], said["rows"]) == ("gptq", 1024, 8)
    assert said["settings"] == {"dampening_frac": 0.01, "actorder": "static", "least_rows": 32}
    checked = invoke("verify", gptq, "--source", MODEL)
    assert checked.exit_code == 0, checked.output
    assert "method, as mso_hub.json has it: GPTQ over 1,024 tokens in 8 rows of" in checked.stdout
    found = json.loads(invoke("verify", gptq, "--source", MODEL, "--json").stdout)
    assert max(error["strays"] for error in found["errors"]) > 1000
    assert [path.name for path in gptq.parent.iterdir()] == ["out"]


def test_codes_of_gptq_that_are_nonsense_are_still_found(gptq: Path, tmp_path: Path) -> None:
    """Codes of another weight are a damage, whatever the manifest says."""
    shown = invoke("verify", spoilt(gptq, tmp_path / "spoilt", "weight_packed"), "--source", MODEL)
    assert shown.exit_code == 2
    assert "is plausible" in shown.stdout


def spoilt(folder: Path, target: Path, leaf: str) -> Path:
    """A copy in which two weights have each other's codes, with digests that fit."""
    shutil.copytree(folder, target)
    for path in sorted(target.glob("*.safetensors")):
        tensors = load_file(path)
        names = [name for name in tensors if name.endswith(f"down_proj.{leaf}")]
        if len(names) > 1:
            tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
            save_file(tensors, path)
    manifest = json.loads((target / "mso_hub.json").read_text())
    for name, entry in manifest["files"].items():
        data = (target / name).read_bytes()
        entry |= {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (target / "mso_hub.json").write_text(json.dumps(manifest))
    return target


def test_the_same_command_again_finds_it_complete(gptq: Path, text: Path) -> None:
    """Without another run of the model; other settings are refused before one."""
    before = digests(gptq.parent)
    words = ("--method", "gptq", "--calib_dataset", text, *INT4, *SIZE)
    again = quantize(gptq, *words)
    assert again.exit_code == 0, again.output
    assert "was complete already, nothing was written" in again.stdout
    other = quantize(gptq, *words, "--dampening_frac", "0.05", "--progress", "json")
    assert other.exit_code == 2
    assert "found a run with another source, text or settings; choose another one, or replace a run with --fresh" in (
        other.stderr
    )
    assert not [line for line in other.stdout.splitlines() if "LayerDone" in line]
    assert digests(gptq.parent) == before


@pytest.mark.parametrize("method", ["weighted", "awq"])
def test_other_methods_verify_against_the_source(method: str, text: Path, tmp_path: Path) -> None:
    """AWQ's numbers are others than the source's: verify says so, and compares what can be."""
    done = quantize(tmp_path / "out", "--method", method, "--calib_dataset", text, *INT4, *SIZE, "--all_linear")
    assert done.exit_code == 0, done.output
    checked = invoke("verify", tmp_path / "out", "--source", MODEL)
    assert checked.exit_code == 0, checked.output
    assert ("were multiplied by scales of awq" in checked.stdout) == (method == "awq")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if method == "awq":
        shown = invoke("verify", spoilt(tmp_path / "out", tmp_path / "spoilt", "weight_packed"), "--source", MODEL)
        assert shown.exit_code == 2
        assert "numbers do not have the sign of the source's" in shown.stdout


def test_smoothquant_is_for_eight_bits(text: Path, tmp_path: Path) -> None:
    words = ("--method", "smoothquant", "--alpha", "0.6", "--calib_dataset", text, *SIZE)
    done = quantize(tmp_path / "out", "--format", "int8", "--all_linear", *words)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / "mso_hub.json").read_text())["method"]["settings"] == {"alpha": 0.6}
    assert invoke("verify", tmp_path / "out", "--source", MODEL).exit_code == 0
    refused = quantize(tmp_path / "other", "--format", "w4a16", *words)
    assert refused.exit_code == 2
    assert "is for activations of 8 bits or fewer" in refused.stderr


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_static_scales_are_measured_in_the_same_job(method: str, text: Path, tmp_path: Path) -> None:
    """W4A4 with an FP8 KV cache: GPTQ's scales are those of `--calibrate`, AWQ's are measured on what it left."""
    words = ("--format", "nvfp4", "--activations", "4", "--all_linear", "--kv_cache", "fp8", "--calib_dataset", text)
    done = quantize(tmp_path / "out", "--method", method, *words, *SIZE)
    assert done.exit_code == 0, done.output
    checked = invoke("verify", tmp_path / "out", "--source", MODEL)
    assert checked.exit_code == 0, checked.output
    assert "measured over 1,024 tokens in 8 rows of" in checked.stdout
    plain = quantize(tmp_path / "plain", "--calibrate", *words, *SIZE)
    assert plain.exit_code == 0, plain.output
    mine, other = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "plain")
    assert mine.keys() == other.keys()
    scales = [name for name in mine if name.endswith(("input_global_scale", "k_scale", "v_scale"))]
    assert len(scales) == 112 + 8
    same = [name for name in scales if mine[name].item() == other[name].item()]
    assert len(same) == len(scales) if method == "gptq" else len(same) < len(scales)
    left = sorted(path.name for path in tmp_path.iterdir())
    kept = ["out.statistics.safetensors"] if method == "gptq" else []
    assert left == sorted(["out", *kept, "plain", "plain.statistics.safetensors"])


@pytest.mark.parametrize("how", [("--calibrate",), ("--method", "weighted")])
def test_several_devices_share_the_text_and_one_of_them_encodes(
    how: tuple[str, ...], text: Path, tmp_path: Path
) -> None:
    """Two that are the same processor: the output is that of one."""
    words = ("--format", "nvfp4", "--activations", "4", *how, "--calib_dataset", text, *SIZE)
    for name, device in (("one", "cpu"), ("two", "cpu,cpu")):
        done = quantize(tmp_path / name, *words, "--device", device)
        assert done.exit_code == 0, done.output
    assert shards(tmp_path / "one") == shards(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(("event", "kill"), [("LayerDone", signal.SIGKILL), ("ShardDone", signal.SIGINT)])
def test_stopped_in_either_step_the_same_command_goes_on(
    event: str, kill: signal.Signals, text: Path, gptq: Path, tmp_path: Path
) -> None:
    """Ctrl-C is a pause, a kill is none; both lose at most the layer or the shard in hand."""
    out = tmp_path / "out"
    words = command(
        "quantize", MODEL, out, "--method", "gptq", "--calib_dataset", str(text), *INT4, *SIZE, "--workers", "1"
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
    assert list(work_folder(str(out), "gptq").glob("layer-*.safetensors"))
    done = run([*words, "--progress", "json"])
    assert done.returncode == 0, done.stderr
    events: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    layers = [e["index"] for e in events if e["event"] == "LayerDone"]
    if event == "ShardDone":
        assert not layers
        assert [e for e in events if e["event"] == "ShardResumed"]
    else:
        assert layers in ([1, 2, 3], [2, 3], [3])
    assert shards(out) == shards(gptq)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unfinished_work_belongs_to_its_settings(text: Path, tmp_path: Path) -> None:
    """Others do not mix with it, and --fresh discards it."""
    out = tmp_path / "out"
    words = command("quantize", MODEL, out, "--method", "weighted", "--calib_dataset", str(text), *INT4, *SIZE)
    with paused(words, "LayerDone") as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
    other = run([*words, "--least_rows", "5"])
    assert other.returncode == 2
    assert "holds the work of another run" in other.stderr
    assert run([*words, "--least_rows", "5", "--fresh", "--quiet"]).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_from_hub_to_hub_with_a_card_that_names_the_method(text: Path, tmp_path: Path) -> None:
    """The work lies in the cache meanwhile, and is removed; the card tells of the source, not of the packed weights."""
    with world(tmp_path / "world", xet=False) as place:
        repo, out = place.name("in"), place.name("out")
        place.put({path.name: path.read_bytes() for path in sorted(MODEL.iterdir())}, repo)
        words = ["--input_dir", f"hf://{repo}", "--output_dir", f"hf://{out}", "--method", "gptq", *INT4, *SIZE]
        words += ["--calib_dataset", str(text), "--progress", "json"]
        done = place.run("quantize", *words)
        assert done.returncode == 0, done.stderr
        card = place.content(out, "README.md").decode()
        said = json.loads(place.content(out, "mso_hub.json"))
        again = place.run("quantize", *words)
        assert again.returncode == 0, again.stderr
        assert "LayerDone" not in again.stdout
        assert not list((place.home("one") / "cache" / "mso_hub" / "statistics").iterdir())
        checked = place.run("verify", f"hf://{out}", "--source", f"hf://{repo}")
        assert checked.returncode == 0, checked.stdout
        assert place.run("card", f"hf://{out}").returncode == 0
        later = place.content(out, "README.md").decode()
    assert said["method"]["name"] == "gptq"
    for text_of in (card, later):
        assert "GPTQ over 1,024 tokens in 8 rows of" in text_of
        assert "--method gptq --dampening_frac 0.01" in text_of
        assert "The source was quantized" not in text_of
    assert "10.0 MB -> 5.5 MB" in card


def test_the_settings_of_ktransformers_script(text: Path, tmp_path: Path) -> None:
    """Routed experts only, groups of 128, its damping; RTN reads no text and is plain rounding."""
    script = ("--quant_method", "RTN", "--quant_type", "W8A16", "--force_cpu")
    done = quantize(tmp_path / "rtn", *script)
    assert done.exit_code == 0, done.output
    convert(MODEL, tmp_path / "plain", Recipe(scheme="w8a16", targets=("*.experts",)))
    assert shards(tmp_path / "rtn") == shards(tmp_path / "plain")
    words = ("--quant_type", "W4A16", "--num_calibration_samples", "4", "--max_sequence_length", "64")
    done = quantize(tmp_path / "gptq", *words, "--dataset", text)
    assert done.exit_code == 0, done.output
    said = json.loads((tmp_path / "gptq" / "mso_hub.json").read_text())["method"]
    assert (said["tokens"], said["settings"]["dampening_frac"]) == (256, 0.1)
    packed = {n for g in read_checkpoint(open_source(tmp_path / "gptq")).groups for n in g.tensors if "packed" in n}
    assert len(packed) == 96
    assert all(".experts." in name for name in packed)


REFUSED: dict[str, tuple[list[str], str]] = {
    "a format without a choice": (["--format", "fp8_block", "--method", "gptq"], "--method gptq: fp8_block has noth"),
    "another tool's format": (["--format", "kt-int4", "--method", "gptq"], "--method gptq: kt-int4 is rounded to near"),
    "damping without GPTQ": (["--method", "awq", "--dampening_frac", "0.1"], "--dampening_frac: is for --method gptq"),
    "alpha without a method": (["--alpha", "0.5"], "--alpha: is for --method smoothquant; add it, or leave this out"),
    "damping out of range": (["--method", "gptq", "--dampening_frac", "2"], "dampening_frac must be above 0 and at"),
    "alpha out of range": (["--method", "smoothquant", "--alpha", "7", "--format", "int8"], "alpha must be"),
    "a report of rounding": (["--method", "gptq", "--report", "a.json"], "--report: measures rounding, which --method"),
    "weights around the layers": (
        ["--method", "gptq", "--no_default_ignore", "--targets", "lm_head"], "takes no weight of a decoder layer",
    ),
    "what matches nothing": (["--method", "gptq", "--ignore", "no.such"], "ignore 'no.such' matches no weight"),
    "several GPUs": (["--method", "gptq", "--device", "cpu,cpu"], "--method gptq: runs on one device, got cpu, cpu"),
    "little memory": (["--method", "gptq", "--max_cpu_memory", "2MiB"], "max_cpu_memory: decoder layer"),
    "statistics of another model": (["--method", "awq", "--stats", "x"], "--method awq changes the activations that"),
    "headroom of nothing": (["--method", "gptq", "--headroom", "2"], "--headroom 2: is for measured scales"),
    "static scales of a format without": (["--method", "gptq", "--calibrate", *INT4], "--calibrate: w4a16 has no st"),
    "the script and a format": (["--quant_method", "GPTQ", "--format", "nvfp4"], "--format: --quant_method and"),
    "the script's unknown method": (["--quant_method", "AWQ"], "--quant_method must be one of GPTQ, RTN, got 'AWQ'"),
    "the script's unknown type": (["--quant_type", "W2A16"], "--quant_type must be one of W4A16, W8A16, got 'W2A16'"),
    "text for RTN": (["--quant_method", "RTN", "--num_calibration_samples", "4"], "--calib_size: is for a run that r"),
    "two devices": (["--force_cpu", "--device", "cuda:0"], "--force_cpu and --device cuda:0 contradict each other"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_a_layer_runs(name: str, text: Path, tmp_path: Path) -> None:
    words, message = REFUSED[name]
    given = [] if "RTN" in words or "--method" not in words else ["--calib_dataset", str(text), *SIZE]
    refused = quantize(tmp_path / "out", *words, *given, "--progress", "json")
    assert refused.exit_code == 2, refused.output
    assert message in " ".join(refused.stderr.split())
    assert "LayerDone" not in refused.stdout
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_run_is_refused(text: Path, tmp_path: Path) -> None:
    """One that transformers does not know, one without a tokenizer, and a place that is taken."""
    words = ("--method", "gptq", "--calib_dataset", text, *INT4, *SIZE)
    moe = tiny_moe(tmp_path / "moe")
    refused = quantize(tmp_path / "out", *words, source=moe)
    assert refused.exit_code == 2
    assert "has no tokenizer: needs tokenizer.json" in refused.stderr
    config = json.loads((moe / "config.json").read_text())
    (moe / "config.json").write_text(json.dumps({**config, "architectures": ["NovelForCausalLM"], "model_type": "new"}))
    refused = quantize(tmp_path / "out", *words, source=moe)
    assert refused.exit_code == 2
    assert "has no NovelForCausalLM" in refused.stderr
    assert "--input_scale" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    refused = quantize(tmp_path / "taken", *words, "--progress", "json")
    assert refused.exit_code == 2
    assert "found files that are not of this tool" in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe", "taken"]
