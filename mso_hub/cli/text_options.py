"""The options that say which text a model is run on, and the model's place from the environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mso_hub.cli.options import Command, given, opt, several
from mso_hub.errors import RecipeError

if TYPE_CHECKING:
    from mso_hub.calibrate.text import Rows, TextSettings


def also(name: str, *aliases: str, **settings: Any) -> Callable[[Command], Command]:
    """An option under several names, each in its underscore and dash form; the value goes by the first."""
    forms = [form for each in (name, *aliases) for form in (f"--{each}", f"--{each.replace('_', '-')}")]
    return click.option(*dict.fromkeys(forms), name, callback=given, **settings)


def from_environment(name: str) -> str | None:
    """A variable of the environment, then of a `.env` file in the working directory; None when neither has it.

    Raises RecipeError for a `.env` that cannot be read.
    """
    if value := os.environ.get(name, "").strip():
        return value
    if not Path(".env").is_file():
        return None
    from dotenv import dotenv_values

    try:
        return (dotenv_values(".env").get(name) or "").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f".env: cannot be read for {name}: {error}; repair it, or set {name}") from error


def _place(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Click takes a default that a function gives for an answer, also when it is None."""
    if value is None and not ctx.resilient_parsing:
        raise click.MissingParameter(ctx=ctx, param=parameter)
    return given(ctx, parameter, value)


def _place_option(name: str, variable: str, what: str) -> Callable[[Command], Command]:
    """A required place that the environment may give."""
    return click.option(
        f"--{name}",
        f"--{name.replace('_', '-')}",
        name,
        metavar="WHERE",
        default=partial(from_environment, variable),
        callback=_place,
        help=f"{what} [{variable} of the environment or of .env].",
    )


INPUT_MODEL = _place_option("input_dir", "INPUT_MODEL", "Checkpoint to read: a folder, or hf://org/name@rev")
OUTPUT_MODEL = _place_option("output_dir", "OUTPUT_MODEL", "What to write: a new folder, or hf://org/name")
TEXT = several(
    also(
        "calib_dataset", "dataset", metavar="NAME",
        help="Text: a file, a folder, org/name on the Hub, or python-docs, which needs no network [cnn_dailymail].",
    ),
    also("dataset_split", metavar="NAME", help="Split of the data set, sliced at will: test, train[:1000] [train]."),
    also("dataset_yaml", metavar="FILE", help="Several data sets with weights, formatters, columns, in place of one."),
    also(
        "calib_size", "max_samples", "num_calibration_samples", type=int, metavar="N", help="Rows of text [512].",
    ),
    also("max_seq_len", "max_sequence_length", type=int, metavar="N", help="Tokens of a row [512; YAML 2048]."),
    also("batch_size", type=int, metavar="N", help="Rows that go through the model together [8]."),
    also("oversample_ratio", type=float, metavar="X", help="How much more text is read than used [1.5]."),
    opt("no_packing", is_flag=True, help="One document a row, of any length, in place of full rows."),
)  # fmt: skip
TEXT_OPTIONS = (
    "calib_dataset", "dataset_split", "dataset_yaml", "calib_size", "max_seq_len", "batch_size", "oversample_ratio",
    "no_packing",
)  # fmt: skip
"""Their names among the options of a command."""


def text_settings(options: dict[str, Any]) -> TextSettings:
    """Options of TEXT -> TextSettings; RecipeError for what contradicts itself."""
    from mso_hub.calibrate.text import one_dataset, read_dataset_yaml

    said = {
        "max_samples": options["calib_size"],
        "max_seq_len": options["max_seq_len"],
        "batch_size": options["batch_size"],
        "oversample_ratio": options["oversample_ratio"],
        "packing": False if options["no_packing"] else None,
    }
    if yaml := options["dataset_yaml"]:
        for name in ("calib_dataset", "dataset_split"):
            if options[name]:
                raise RecipeError(f"--{name} {options[name]}: --dataset_yaml {yaml} says this too; keep one of them")
        return read_dataset_yaml(yaml, **said)
    return one_dataset(options["calib_dataset"], options["dataset_split"], **said)


def require_text(options: dict[str, Any], reason: str) -> None:
    """RecipeError for an option of TEXT that would be ignored; `reason` says what is missing: `add --calibrate`."""
    for name in TEXT_OPTIONS:
        if options[name]:
            raise RecipeError(f"--{name}: is for a run that reads text; {reason}, or leave it out")


def text_lines(rows: Rows) -> list[str]:
    """What a person is told of the text: its name and size, each data set's part, and the warnings."""
    lengths = f" of {rows.length:,} tokens" if rows.tokens == rows.length * len(rows.sequences) else ""
    lines = [f"text: {rows.name}: {len(rows.sequences):,} rows{lengths}, {rows.tokens:,} tokens"]
    if len(rows.shares) > 1:
        lines += [f"  {share.name}: {share.rows:,} rows from {share.documents:,} documents" for share in rows.shares]
    return lines + [f"warning: {warning}" for warning in rows.warnings]
