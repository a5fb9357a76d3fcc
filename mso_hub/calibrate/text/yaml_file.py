"""`--dataset_yaml`: which data sets, in which shares, and how much of them.

    datasets:
      - {path: abisee/cnn_dailymail, name: 3.0.0, split: train, weight: 2, formatter: raw_text, columns: [article]}
      - {path: chats.jsonl, split: train, weight: 1, formatter: sharegpt}
    calibration: {max_samples: 512, max_seq_len: 2048, seed: 42, min_token_length: 32, oversample_ratio: 1.5}

Keys of a data set are those of DataSet, keys of `calibration` those of TextSettings. Paths are relative to the folder
in which the command runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mso_hub.calibrate.text.settings import DataSet, TextSettings, named_dataset
from mso_hub.errors import RecipeError
from mso_hub.plan.presets import near_word
from mso_hub.plan.recipe_file import parse_yaml

MAX_SEQ_LEN = 2048
"""Tokens of a row where the file does not say it."""
TEXT, NUMBER, WHOLE, FLAG = "text", "a number", "a whole number", "true or false"
KINDS: dict[str, tuple[type, ...]] = {TEXT: (str,), NUMBER: (int, float), WHOLE: (int,), FLAG: (bool,)}
DATASET_KEYS = {
    "name": TEXT, "path": TEXT, "split": TEXT, "weight": NUMBER, "text_column": TEXT, "streaming": FLAG,
    "formatter": TEXT, "columns": "a list of column names",
}  # fmt: skip
CALIBRATION_KEYS = {
    "max_samples": WHOLE, "max_seq_len": WHOLE, "seed": WHOLE, "min_token_length": WHOLE, "oversample_ratio": NUMBER,
    "packing": FLAG, "batch_size": WHOLE,
}  # fmt: skip


def read_dataset_yaml(path: str | Path, **said: Any) -> TextSettings:
    """A data-set file -> TextSettings.

    said  fields of TextSettings that go before the file's; None: not said
    Raises RecipeError that names the file, the entry, what is allowed there and what was found.
    """
    file = Path(path)
    try:
        content = parse_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror}; check the path") from error
    except ValueError as error:
        raise RecipeError(f"{file}: cannot be read: {' '.join(str(error).split())}; correct it") from error
    found = _table(str(file), content, {"datasets": "", "calibration": ""})
    entries = found.get("datasets")
    if not isinstance(entries, list) or not entries:
        raise RecipeError(f"{file}: needs a list of at least one data set under `datasets`, got {entries!r}")
    datasets = tuple(_dataset(f"{file}: data set {at}", entry) for at, entry in enumerate(entries, 1))
    numbers = _values(f"{file}: calibration", found.get("calibration") or {}, CALIBRATION_KEYS)
    given = {key: value for key, value in said.items() if value is not None}
    try:
        return TextSettings(datasets, **{"max_seq_len": MAX_SEQ_LEN, **numbers, **given})
    except RecipeError as error:
        raise RecipeError(f"{file}: {error}") from error


def _dataset(place: str, entry: Any) -> DataSet:
    found = _values(place, entry, DATASET_KEYS)
    if "path" not in found:
        raise RecipeError(f"{place}: needs a path, has {', '.join(found) or 'nothing'}")
    try:
        return named_dataset(found.pop("path"), **found)
    except RecipeError as error:
        raise RecipeError(f"{place}: {error}") from error


def _table(place: str, content: Any, known: Mapping[str, str]) -> dict[str, Any]:
    """RecipeError for what is no table, and for a key that is not known."""
    if not isinstance(content, dict):
        raise RecipeError(f"{place}: must be a table of settings ({', '.join(known)}), got {content!r}")
    for key in content:
        if key not in known:
            raise RecipeError(f"{place}: {key!r} is no setting, known are {', '.join(known)}{near_word(key, known)}")
    return content


def _values(place: str, content: Any, known: Mapping[str, str]) -> dict[str, Any]:
    """Values of the right kind; a key without a value (`name:`) counts as not said."""
    found = {key: value for key, value in _table(place, content, known).items() if value is not None}
    for key, value in found.items():
        if key == "columns":
            good = isinstance(value, list) and all(isinstance(column, str) and column for column in value)
        elif key == "name":
            # YAML reads `name: 3.0` as a number.
            good = isinstance(value, str | int | float) and not isinstance(value, bool)
        else:
            # true is no number.
            good = isinstance(value, KINDS[known[key]]) and isinstance(value, bool) == (known[key] == FLAG)
        if not good:
            raise RecipeError(f"{place}: {key} must be {known[key]}, got {value!r}")
    if "columns" in found:
        found["columns"] = tuple(found["columns"])
    return found | ({"name": str(found["name"])} if "name" in found else {})
