"""--dataset_yaml: the contract, its defaults, and what is refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from mso_hub.calibrate.text import DataSet, TextSettings, read_dataset_yaml
from mso_hub.calibrate.text.yaml_file import CALIBRATION_KEYS, DATASET_KEYS
from mso_hub.errors import RecipeError
from tests.calibrate.texts import numbered, read

WHOLE = """
datasets:
  - path: abisee/cnn_dailymail
    name: 3.0.0
    split: train
    weight: 2
    text_column: highlights
    streaming: true
  - {path: chats.jsonl, name:, split: "train[:100]", weight: 0.5, formatter: sharegpt, columns: [talk]}
calibration: {max_samples: 64, max_seq_len: 1024, seed: 7, min_token_length: 16, oversample_ratio: 2}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "sets.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_key_of_the_contract_is_read(tmp_path: Path) -> None:
    assert read_dataset_yaml(written(tmp_path, WHOLE)) == TextSettings(
        (
            DataSet("abisee/cnn_dailymail", "3.0.0", "train", 2, "highlights", streaming=True),
            DataSet("chats.jsonl", split="train[:100]", weight=0.5, formatter="sharegpt", columns=("talk",)),
        ),
        max_samples=64, max_seq_len=1024, seed=7, min_token_length=16, oversample_ratio=2,
    )  # fmt: skip


def test_the_keys_are_the_fields_of_the_nouns() -> None:
    assert set(DATASET_KEYS) == {f.name for f in fields(DataSet)}
    assert set(CALIBRATION_KEYS) == {f.name for f in fields(TextSettings)} - {"datasets"}


def test_defaults_are_those_of_the_contract(tmp_path: Path) -> None:
    found = read_dataset_yaml(written(tmp_path, "datasets: [{path: a.jsonl}]"))
    assert found.datasets == (DataSet("a.jsonl", None, "train", 1.0, None, streaming=False),)
    assert (found.max_samples, found.max_seq_len, found.seed) == (512, 2048, 42)
    assert (found.min_token_length, found.oversample_ratio, found.packing) == (32, 1.5, True)


def test_what_the_command_line_says_goes_first(tmp_path: Path) -> None:
    path = written(tmp_path, WHOLE)
    found = read_dataset_yaml(path, max_samples=8, max_seq_len=256, oversample_ratio=1.0, batch_size=2, packing=None)
    assert (found.max_samples, found.max_seq_len, found.oversample_ratio, found.batch_size) == (8, 256, 1.0, 2)
    assert (found.seed, found.packing) == (7, True)


def test_the_order_of_keys_does_not_change_the_text(tmp_path: Path) -> None:
    data = numbered(tmp_path / "a.jsonl")
    one = written(
        tmp_path, f"datasets: [{{path: {data}, weight: 1, split: train}}]\ncalibration: {{seed: 3, max_samples: 4}}"
    )
    first = read_dataset_yaml(one)
    two = written(
        tmp_path, f"calibration: {{max_samples: 4, seed: 3}}\ndatasets: [{{split: train, weight: 1, path: {data}}}]"
    )
    assert read_dataset_yaml(two) == first
    assert read(*first.datasets, seed=first.seed).sha256 == read(*first.datasets, seed=3).sha256


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"must be a table of settings \(datasets, calibration\), got None"),
        ("[1]", "must be a table of settings"),
        ("datasets: []", "needs a list of at least one data set under `datasets`, got \\[\\]"),
        ("dataset: [{path: a}]", "'dataset' is no setting, known are datasets, calibration; did you mean 'datasets'"),
        ("datasets: [{pat: a}]", "data set 1: 'pat' is no setting, .*; did you mean 'path'"),
        ("datasets: [{split: a}]", "data set 1: needs a path, has split"),
        ("datasets: [{path: a}, x]", "data set 2: must be a table of settings"),
        ("datasets: [{path: a, formater: sharegpt}]", "did you mean 'formatter'"),
        (
            "datasets: [{path: a, formatter: chatcompletion}]",
            "data set 1: a: formatter .* did you mean 'chat_completion'",
        ),
        ("datasets: [{path: a, weight: much}]", "data set 1: weight must be a number, got 'much'"),
        ("datasets: [{path: a, weight: true}]", "weight must be a number, got True"),
        ("datasets: [{path: a, weight: -1}]", "weight must be a number above 0, got -1"),
        ("datasets: [{path: a, streaming: 1}]", "streaming must be true or false, got 1"),
        ("datasets: [{path: a, columns: text}]", "columns must be a list of column names, got 'text'"),
        ("datasets: [{path: a, path: b}]", "'path' stands there twice"),
        (
            "datasets: [{path: a}]\ncalibration: {max_sample: 3}",
            "calibration: 'max_sample' .*did you mean 'max_samples'",
        ),
        ("datasets: [{path: a}]\ncalibration: {max_samples: 1.5}", "max_samples must be a whole number, got 1.5"),
        ("datasets: [{path: a}]\ncalibration: {seed: true}", "seed must be a whole number, got True"),
        (
            "datasets: [{path: a}]\ncalibration: {min_token_length: 9999}",
            "min_token_length: must be at most max_seq_len",
        ),
        ("datasets: [{path: a", "cannot be read: "),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(RecipeError, match=message) as error:
        read_dataset_yaml(path)
    assert str(error.value).startswith(str(path))


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot be read: No such file"):
        read_dataset_yaml(tmp_path / "none.yaml")
