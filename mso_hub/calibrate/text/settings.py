"""What text is asked for: data sets and their shares, how many rows of how many tokens; how shares become counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mso_hub.errors import RecipeError
from mso_hub.plan.presets import near_word

DEFAULT = "cnn_dailymail"
"""The data set that is taken when none is named."""
PYTHON_DOCS = "python-docs"
"""The built-in text: the documentation that ships inside CPython. Needs no network and no package."""
FORMATTERS = ("raw_text", "prompt_answer", "sharegpt", "chat_completion")
COLUMNS = {"raw_text": (1, 1), "prompt_answer": (2, 2), "sharegpt": (1, 1), "chat_completion": (1, 1)}
"""Formatter -> least and largest number of `columns`."""
KNOWN: dict[str, dict[str, Any]] = {
    "abisee/cnn_dailymail": {"name": "3.0.0", "text_column": "article"},
    "HuggingFaceH4/ultrachat_200k": {"split": "train_sft", "columns": ("messages",), "formatter": "chat_completion"},
}
"""Data set on the Hub -> settings that it needs and that a user need not repeat."""
SHORT = {"cnn_dailymail": "abisee/cnn_dailymail", "ultrachat_200k": "HuggingFaceH4/ultrachat_200k"}


@dataclass(frozen=True, slots=True)
class DataSet:
    """One data set and its share.

    path         a file (.jsonl, .txt, .parquet, ...), a folder, `org/name` or `org/name@revision` on the Hub, or
                 python-docs
    name         Hub: the configuration (subset); elsewhere what reports call the data set
    split        "train", "test", ... with an optional slice: "train[:1000]"
    weight       share of the rows, relative to the other data sets' weights
    text_column  column of plain text; means formatter raw_text
    streaming    read through `datasets` without downloading the whole data set first; shuffled in a window only
    formatter    one of FORMATTERS; None finds it from the columns
    columns      raw_text, sharegpt, chat_completion: one; prompt_answer: prompt and answer; () finds them
    """

    path: str
    name: str | None = None
    split: str = "train"
    weight: float = 1.0
    text_column: str | None = None
    streaming: bool = False
    formatter: str | None = None
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """RecipeError for settings that contradict each other."""
        if not self.path:
            raise RecipeError(
                f"data set: needs a path (a file, a folder, org/name or {PYTHON_DOCS}), got {self.path!r}"
            )
        if not 0 < self.weight < float("inf"):
            raise RecipeError(f"{self.path}: weight must be a number above 0, got {self.weight}")
        if self.formatter is not None and self.formatter not in FORMATTERS:
            raise RecipeError(
                f"{self.path}: formatter must be one of {', '.join(FORMATTERS)}, got {self.formatter!r}"
                f"{near_word(self.formatter, FORMATTERS)}"
            )
        if self.text_column is not None and (self.columns or self.formatter not in (None, "raw_text")):
            other = f"columns {list(self.columns)}" if self.columns else f"formatter {self.formatter}"
            raise RecipeError(
                f"{self.path}: text_column {self.text_column!r} is a column of plain text, {other} says something "
                "else; keep one of them"
            )
        self._check_columns()

    def _check_columns(self) -> None:
        if not self.columns:
            return
        if self.formatter is None:
            if len(self.columns) > 2:
                raise RecipeError(f"{self.path}: {len(self.columns)} columns need a formatter: {', '.join(FORMATTERS)}")
            return
        least, most = COLUMNS[self.formatter]
        if not least <= len(self.columns) <= most:
            raise RecipeError(
                f"{self.path}: formatter {self.formatter} takes {most} column{'s' if most > 1 else ''}, "
                f"got {len(self.columns)}: {', '.join(self.columns)}"
            )


@dataclass(frozen=True, slots=True)
class TextSettings:
    """How much text, and how it is cut.

    datasets          one or more
    max_samples       rows
    max_seq_len       tokens of a row: of every row when packed, at most otherwise
    seed              of every shuffle; data set number i, counted from 0, uses seed + i
    min_token_length  documents with fewer tokens are left out
    oversample_ratio  how much more is read than used, so that enough is left after filtering
    packing           documents joined by the end-of-text token and cut into full rows; else a document is a row
    batch_size        rows that go through the model together, at most
    """

    datasets: tuple[DataSet, ...]
    max_samples: int = 512
    max_seq_len: int = 512
    seed: int = 42
    min_token_length: int = 32
    oversample_ratio: float = 1.5
    packing: bool = True
    batch_size: int = 8

    def __post_init__(self) -> None:
        """RecipeError for numbers that no text can satisfy."""
        if not self.datasets:
            raise RecipeError(f"datasets: needs at least one data set, got none; {PYTHON_DOCS} is built in")
        least = {"max_samples": 1, "max_seq_len": 2, "min_token_length": 1, "batch_size": 1, "seed": 0}
        for key, lowest in least.items():
            if getattr(self, key) < lowest:
                raise RecipeError(f"{key}: must be at least {lowest}, got {getattr(self, key)}")
        if not 1 <= self.oversample_ratio <= 1000:
            raise RecipeError(f"oversample_ratio: must be between 1 and 1000, got {self.oversample_ratio}")
        if self.min_token_length > self.max_seq_len:
            raise RecipeError(
                f"min_token_length: must be at most max_seq_len ({self.max_seq_len}), got {self.min_token_length}"
            )


def named_dataset(path: str, **said: Any) -> DataSet:
    """A data set by its path or short name, with what is known of it; None stands for "not said".

    `cnn_dailymail` is abisee/cnn_dailymail, configuration 3.0.0, column article. What is said goes before what is
    known.
    """
    path = path.removeprefix("hf://datasets/")
    path = SHORT.get(path, path)
    given = {key: value for key, value in said.items() if value is not None}
    known = dict(KNOWN.get(path.partition("@")[0], {}))
    if given.keys() & {"text_column", "columns", "formatter"}:
        known = {key: value for key, value in known.items() if key not in {"text_column", "columns", "formatter"}}
    return DataSet(path, **{**known, **given})


def one_dataset(path: str | None, split: str | None = None, **said: Any) -> TextSettings:
    """Settings of `--calib_dataset`: one data set, 512 rows of 512 tokens unless said otherwise (None: not said).

    Rows that are shorter than min_token_length take documents of their own length.

    The data set is streamed, so that only what is used is fetched, unless the split says percentages: these need all.
    """
    given = {key: value for key, value in said.items() if value is not None}
    streaming = "%" not in (split or "")
    given.setdefault("min_token_length", max(1, min(32, given.get("max_seq_len", 32))))
    return TextSettings((named_dataset(path or DEFAULT, split=split, streaming=streaming),), **given)


def shares(total: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers that add up to `total` in proportion to the weights, by largest remainder.

    Every share is the exact one rounded down or up; those with the largest remainders are rounded up, the earlier one
    first where they are equal. Computed in fractions, so that no sum of floats decides.
    """
    exact = [Fraction(weight) for weight in weights]
    wanted = [total * weight / sum(exact) for weight in exact]
    found = [int(share) for share in wanted]
    by_remainder = sorted(range(len(found)), key=lambda at: (found[at] - wanted[at], at))
    for at in by_remainder[: total - sum(found)]:
        found[at] += 1
    return tuple(found)
