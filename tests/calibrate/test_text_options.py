"""The options of the command line that say which text a model is run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from mso_hub.calibrate.text import DataSet, one_dataset
from mso_hub.cli.text_options import (
    INPUT_MODEL,
    OUTPUT_MODEL,
    TEXT,
    TEXT_OPTIONS,
    require_text,
    text_lines,
    text_settings,
)
from mso_hub.errors import RecipeError
from tests.calibrate.texts import numbered, read

Settings = dict[str, Any]


def parsed(*words: str) -> Settings:
    """Options of TEXT, as a command gets them."""
    found: Settings = {}

    @click.command()
    @TEXT
    def command(**options: Any) -> None:
        found.update(options)

    command.main(list(words), standalone_mode=False)
    return found


def test_without_options_the_text_is_512_rows_of_512_tokens_of_cnn_dailymail() -> None:
    options = parsed()
    assert set(options) == set(TEXT_OPTIONS)
    assert text_settings(options) == one_dataset("cnn_dailymail", max_samples=512, max_seq_len=512)


@pytest.mark.parametrize(
    "words",
    [
        "--calib_dataset x.txt --calib_size 3 --max_seq_len 99 --dataset_split train[:9]",
        "--calib-dataset x.txt --calib-size 3 --max-seq-len 99 --dataset-split train[:9]",
        "--dataset x.txt --num_calibration_samples 3 --max_sequence_length 99 --dataset_split train[:9]",
        "--dataset x.txt --num-calibration-samples 3 --max-sequence-length 99 --dataset_split train[:9]",
        "--dataset x.txt --max_samples 3 --max_sequence_length 99 --dataset_split train[:9]",
    ],
)
def test_every_spelling_means_the_same(words: str) -> None:
    found = text_settings(parsed(*words.split(), "--batch_size", "2", "--no_packing", "--oversample_ratio", "2"))
    assert found.datasets == (DataSet("x.txt", split="train[:9]", streaming=True),)
    assert (found.max_samples, found.max_seq_len, found.batch_size) == (3, 99, 2)
    assert (found.packing, found.oversample_ratio) == (False, 2.0)


def test_the_command_line_goes_before_the_yaml(tmp_path: Path) -> None:
    path = tmp_path / "sets.yaml"
    path.write_text("datasets: [{path: a.jsonl}]\ncalibration: {max_samples: 9, seed: 1}\n")
    found = text_settings(parsed("--dataset_yaml", str(path), "--calib_size", "5"))
    assert (found.max_samples, found.max_seq_len, found.seed) == (5, 2048, 1)
    with pytest.raises(RecipeError, match=r"--dataset_split test: --dataset_yaml .* says this too; keep one"):
        text_settings(parsed("--dataset_yaml", str(path), "--dataset_split", "test"))


def test_an_option_that_would_be_ignored_is_refused() -> None:
    require_text(parsed(), "add --calibrate")
    with pytest.raises(
        RecipeError, match="--calib_size: is for a run that reads text; add --calibrate, or leave it out"
    ):
        require_text(parsed("--max_samples", "4"), "add --calibrate")
    with pytest.raises(RecipeError, match="--no_packing: is for a run"):
        require_text(parsed("--no_packing"), "add --calibrate")


@click.command()
@INPUT_MODEL
@OUTPUT_MODEL
def where(input_dir: str, output_dir: str) -> None:
    """Where a command would read and write."""
    click.echo(f"{input_dir} -> {output_dir}")


def test_the_models_come_from_the_option_then_the_environment_then_dotenv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INPUT_MODEL", raising=False)
    monkeypatch.delenv("OUTPUT_MODEL", raising=False)
    missing = CliRunner().invoke(where, [])
    assert missing.exit_code == 2
    assert "Missing option '--input_dir'" in missing.output
    (tmp_path / ".env").write_text("INPUT_MODEL=/from/dotenv\nOUTPUT_MODEL='~/out'\n")
    assert CliRunner().invoke(where, []).output == f"/from/dotenv -> {Path('~/out').expanduser()}\n"
    monkeypatch.setenv("INPUT_MODEL", "/from/environment")
    assert CliRunner().invoke(where, ["--output_dir", "/said"]).output == "/from/environment -> /said\n"
    (tmp_path / ".env").write_bytes(b"\xff\xfe=\xff")
    found = CliRunner().invoke(where, [])
    assert isinstance(found.exception, RecipeError)
    assert ".env: cannot be read for OUTPUT_MODEL" in str(found.exception)


def test_a_person_is_told_the_text_its_size_and_the_warnings(tmp_path: Path) -> None:
    one, other = numbered(tmp_path / "a.jsonl"), numbered(tmp_path / "b.jsonl", 4)
    assert text_lines(read(one)) == [f"text: {one}: 20 rows of 64 tokens, 1,280 tokens"]
    lines = text_lines(read(one, other, packing=False, max_samples=10, oversample_ratio=2.0))
    assert lines[0].startswith(f"text: {one} + {other}: 10 rows")
    assert lines[1:3] == [f"  {one}: 6 rows from 10 documents", f"  {other}: 4 rows from 4 documents"]
    assert lines[3] == f"warning: {other}: 4 rows of the 5 of its share; none was left out"
