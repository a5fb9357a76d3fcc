"""What people do wrong with calibration, by commands: one message that names the thing, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from mso_hub.calibrate.statistics import read_statistics
from mso_hub.cli import main
from tests.helpers import INDEX

MODEL = Path(__file__).parent / "models" / "tiny-qwen3-moe"
SIZE = ("--calib_size", "4", "--max_seq_len", "64", "--batch_size", "2")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain text, enough for a few rows."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"number {at} of what a library says of its functions and errors" for at in range(300)))
    return path


def invoke(*arguments: object) -> Result:
    """Run the program in this process; an error that it does not explain fails the test."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=True)


def calibrate(folder: Path, text: Path, *more: object, model: Path = MODEL) -> Result:
    """`mso-hub calibrate` into a folder."""
    words = ["calibrate", "--input_dir", model, "--output", folder / "stats", "--calib_dataset", text, *SIZE, *more]
    return invoke(*words)


def refused(done: Result) -> str:
    """The message of an exit code 2, on one line."""
    assert done.exit_code == 2, (done.exception, done.output)
    return " ".join(done.stderr.split())


def copy(folder: Path, **changes: object) -> Path:
    """The small trained model, its config.json changed."""
    shutil.copytree(MODEL, folder)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | changes))
    return folder


def without(folder: Path, part: str) -> Path:
    """The small trained model without the tensors whose name has a part."""
    copy(folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({name: t for name, t in tensors.items() if part not in name}, path, {"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if part not in name}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


LINES = '{"text": "\\ud800 half a character, and enough words after it that nobody could call the row short"}\n' * 60


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("half.jsonl", LINES, "left out: 60 empty or unreadable ('utf-8' codec can't encode character"),
        ("binary.txt", "\0" * 5000, "not text: has a byte 0 at character 0, as binary files have"),
        ("deep.yaml", "[" * 5000, "its tables and lists lie too deep in one another"),
    ],
)
def test_text_that_is_none(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    words = ["calibrate", "--input_dir", MODEL, "--output", tmp_path / "stats", *SIZE]
    option = "--dataset_yaml" if name.endswith("yaml") else "--calib_dataset"
    assert message in refused(invoke(*words, option, path))
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_an_empty_slice_is_called_that(text: Path, tmp_path: Path) -> None:
    assert "the split holds no documents" in refused(calibrate(tmp_path, text, "--dataset_split", "train[:0]"))


def test_rows_may_be_shorter_than_the_usual_least_document(text: Path, tmp_path: Path) -> None:
    done = calibrate(tmp_path, text, "--max_seq_len", "16")
    assert done.exit_code == 0, done.output
    assert "4 rows of 16 tokens" in done.stderr


def test_rows_longer_than_the_model_is_made_for_get_a_warning(text: Path, tmp_path: Path) -> None:
    done = calibrate(tmp_path, text, "--max_seq_len", "600")
    assert done.exit_code == 0, done.output
    assert "warning: rows have 600 tokens, config.json says that the model takes at most 512" in done.stderr


CONFIGS: dict[str, tuple[dict[str, object], str]] = {
    "no layer": ({"num_hidden_layers": 0}, "config.json says 0 decoder layers"),
    "an unknown function": ({"hidden_act": "nope"}, "the model cannot be built from its config.json: KeyError: 'nope'"),
    "more experts at once than there are": (
        {"num_experts_per_tok": 99},
        "decoder layer 0: the model's own code fails for 2 rows of 64 tokens: RuntimeError: selected index k out of",
    ),
    "heads that do not fit": ({"num_attention_heads": 3}, "o_proj.weight: config.json makes it [256, 192], the stored"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_does_not_fit_is_explained(name: str, text: Path, tmp_path: Path) -> None:
    said, message = CONFIGS[name]
    assert message in refused(calibrate(tmp_path, text, model=copy(tmp_path / "model", **said)))
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_a_kernel_that_the_config_names_need_not_be_here(text: Path, tmp_path: Path) -> None:
    model = copy(tmp_path / "model", _attn_implementation="flash_attention_2")
    done = calibrate(tmp_path, text, model=model)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("part", ["layers.3.self_attn.v_proj.weight", "lm_head"])
def test_a_missing_weight_is_found_before_the_first_layer(part: str, text: Path, tmp_path: Path) -> None:
    """Also the head of a model that does not tie it: the embedding in its place would be silently wrong."""
    model = without(tmp_path / "model", part)
    message = refused(calibrate(tmp_path, text, model=model))
    assert "no stored tensor makes" in message
    assert part in message
    assert [each.name for each in tmp_path.iterdir()] == ["model"]
    words = ["evaluate", model, "--calib_dataset", text, "--calib_size", "2", "--max_seq_len", "64"]
    assert part in refused(invoke(*words))


def test_nan_is_named_where_it_begins(text: Path, tmp_path: Path) -> None:
    model = copy(tmp_path / "model")
    for path in model.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if "layers.2.self_attn.q_proj.weight" in name:
                tensors[name].view(-1)[5] = torch.nan
        save_file(tensors, path, {"format": "pt"})
    message = refused(calibrate(tmp_path, text, model=model))
    assert "model.layers.2.self_attn.o_proj: its input holds NaN" in message


@pytest.mark.parametrize("device", ["xpu", "mps", "meta"])
def test_devices_that_are_none_of_ours(device: str, text: Path, tmp_path: Path) -> None:
    assert f"got '{device}'" in refused(calibrate(tmp_path, text, "--device", device))


def test_statistics_do_not_become_a_part_of_the_model(text: Path, tmp_path: Path) -> None:
    model = copy(tmp_path / "model")
    words = ["calibrate", "--input_dir", model, "--output", model / "stats.safetensors", "--calib_dataset", text]
    assert "lies in the folder of the model" in refused(invoke(*words))


def test_fresh_replaces_nothing_but_statistics(text: Path, tmp_path: Path) -> None:
    (tmp_path / "stats").write_text("the only copy of a thesis")
    assert "--fresh leaves it alone" in refused(calibrate(tmp_path, text, "--fresh"))
    assert (tmp_path / "stats").read_text() == "the only copy of a thesis"
    (tmp_path / "stats").unlink()
    assert calibrate(tmp_path, text).exit_code == 0
    whole = (tmp_path / "stats").read_bytes()
    (tmp_path / "stats").write_bytes(whole[:-9])
    assert calibrate(tmp_path, text, "--fresh").exit_code == 0
    assert (tmp_path / "stats").read_bytes() == whole


def _taken(folder: Path) -> Path:
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    return folder


def _file(path: Path) -> Path:
    path.write_text("mine")
    return path


@pytest.mark.parametrize("make", [_taken, _file])
@pytest.mark.parametrize("method", [(), ("--method", "gptq", "--format", "w4a16")])
def test_an_output_that_is_in_use_is_refused_before_the_model_runs(
    make: Callable[[Path], Path], method: tuple[str, ...], text: Path, tmp_path: Path
) -> None:
    out = make(tmp_path / "out")
    words = ["quantize", "--input_dir", MODEL, "--output_dir", out, "--calib_dataset", text, *SIZE]
    done = invoke(*words, *(method or ("--calibrate",)))
    assert "must be a new or empty folder" in refused(done)
    assert "tok/s" not in done.stderr
    assert not list(tmp_path.glob("*.statistics.safetensors*"))


def test_names_that_a_terminal_would_obey_are_written_plainly(text: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a\x1b[31m\nb.txt"
    shutil.copy(text, odd)
    done = calibrate(tmp_path, odd)
    assert done.exit_code == 0, done.output
    assert read_statistics(tmp_path / "stats").provenance.text.endswith("a?[31m?b.txt")


def test_a_name_that_is_no_utf_8_is_refused(text: Path, tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(str(tmp_path)) + b"/\xff")
    words = ["calibrate", "--input_dir", MODEL, "--output", name, "--calib_dataset", text]
    assert "must be UTF-8" in refused(invoke(*words))
