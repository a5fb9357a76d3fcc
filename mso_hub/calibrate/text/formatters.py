"""A row of a data set -> text or turns of a conversation. Which columns a formatter reads is settled once per data set.

raw_text         text | content | article | the given column
prompt_answer    [instruction, output] | [prompt, response] | the given two
sharegpt         conversations: [{from: human | gpt | system | ..., value: text}]
chat_completion  messages: [{role: user | assistant | system | ..., content: text or parts of text}]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mso_hub.calibrate.text.settings import DataSet
from mso_hub.errors import RecipeError

DETECTED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("raw_text", ("text",)),
    ("raw_text", ("content",)),
    ("raw_text", ("article",)),
    ("sharegpt", ("conversations",)),
    ("chat_completion", ("messages",)),
    ("prompt_answer", ("instruction", "output")),
    ("prompt_answer", ("prompt", "response")),
)
"""Formatter and columns, in the order in which they are looked for."""
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
"""ShareGPT's speakers -> roles of a chat template; other names stay."""

Turn = dict[str, str]
"""{"role": ..., "content": ...}"""


class Unreadable(ValueError):
    """A row whose value is not what the formatter reads; says what was found."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How the rows of one data set are read.

    formatter  one of FORMATTERS
    columns    the columns that it reads; all others are not even loaded
    """

    formatter: str
    columns: tuple[str, ...]

    def document(self, row: Mapping[str, Any]) -> str | list[Turn]:
        """Text, or the turns of a conversation; "" or [] where the row is empty.

        Raises Unreadable where the value is of another kind.
        """
        values = [row.get(column) for column in self.columns]
        if self.formatter == "raw_text":
            return _text(values[0])
        if self.formatter == "prompt_answer":
            prompt, answer = map(_text, values)
            both = prompt.strip() and answer.strip()
            return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] if both else []
        who, what = ("from", "value") if self.formatter == "sharegpt" else ("role", "content")
        return _turns(values[0], who, what)


def choose_reading(dataset: DataSet, found: Sequence[str]) -> Reading:
    """Formatter and columns for a data set that has the columns `found`.

    What the settings name goes first: text_column, then columns, then the formatter's usual columns, then DETECTED.
    Raises RecipeError that lists the columns of the data set when none fits.
    """
    have = ", ".join(found) or "none"
    asked = (dataset.text_column,) if dataset.text_column else dataset.columns
    missing = [column for column in asked if column not in found]
    if missing:
        raise RecipeError(f"{dataset.path}: has no column {missing[0]!r}; its columns are: {have}")
    if asked:
        return Reading(dataset.formatter or _formatter_of(asked), asked)
    for formatter, columns in DETECTED:
        if dataset.formatter in (None, formatter) and all(column in found for column in columns):
            return Reading(formatter, columns)
    what = f"formatter {dataset.formatter}" if dataset.formatter else "a formatter"
    usual = " or ".join(" + ".join(c) for f, c in DETECTED if dataset.formatter in (None, f))
    raise RecipeError(
        f"{dataset.path}: no usable column for {what}: needs {usual}; its columns are: {have}. Name one with "
        "text_column or columns in the data-set YAML"
    )


def as_lines(turns: Sequence[Turn]) -> str:
    """`role: text` lines, for a tokenizer without a chat template."""
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _formatter_of(columns: tuple[str, ...]) -> str:
    """Columns that were named without a formatter: the usual one of these names, else by their number."""
    usual: dict[tuple[str, ...], str] = {named: formatter for formatter, named in DETECTED}
    return usual.get(columns, "prompt_answer" if len(columns) == 2 else "raw_text")


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unreadable(f"{type(value).__name__} where text is needed")
    return value


def _content(value: Any) -> str:
    """Text of a turn: a text, or a list of parts of which the text parts count."""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in value]
        return "\n".join(part for part in parts if isinstance(part, str))
    return _text(value)


def _turns(value: Any, who: str, what: str) -> list[Turn]:
    """[{who: role, what: text}] -> turns; turns without text (calls of tools) are left out."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise Unreadable(f"{type(value).__name__} where a list of turns {{{who}, {what}}} is needed")
    found = []
    for turn in value:
        role = turn.get(who)
        if not isinstance(role, str) or what not in turn:
            raise Unreadable(f"a turn with the keys {', '.join(map(str, turn))} where {who} and {what} are needed")
        text = _content(turn[what])
        if text.strip():
            found.append({"role": ROLES.get(role, role), "content": text})
    return found
