"""Rows of data sets -> text and turns; conversations through the tokenizer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from mso_hub.calibrate.text import DataSet
from mso_hub.calibrate.text.formatters import DETECTED, Reading, Unreadable, as_lines, choose_reading
from mso_hub.errors import RecipeError
from tests.calibrate.texts import CHATML, read, sentence, texts, tokenizer, write_jsonl


@pytest.fixture
def chatting() -> Any:
    """The small tokenizer with a chat template."""
    made = copy.deepcopy(tokenizer())
    made.chat_template = CHATML
    return made


def turns(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": sentence(number)}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"text", "content", "messages"}, ("raw_text", ("text",))),
        ({"article", "content"}, ("raw_text", ("content",))),
        ({"article", "highlights", "id"}, ("raw_text", ("article",))),
        ({"conversations", "messages"}, ("sharegpt", ("conversations",))),
        ({"messages", "instruction", "output"}, ("chat_completion", ("messages",))),
        ({"instruction", "input", "output", "prompt", "response"}, ("prompt_answer", ("instruction", "output"))),
        ({"prompt", "response"}, ("prompt_answer", ("prompt", "response"))),
    ],
)
def test_columns_are_found_in_this_order(columns: set[str], expected: tuple[str, tuple[str, ...]]) -> None:
    for order in (sorted(columns), sorted(columns, reverse=True)):
        assert choose_reading(DataSet("x"), order) == Reading(*expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"text_column": "b"}, ("raw_text", ("b",))),
        ({"columns": ("b",)}, ("raw_text", ("b",))),
        ({"columns": ("messages",)}, ("chat_completion", ("messages",))),
        ({"columns": ("a", "b")}, ("prompt_answer", ("a", "b"))),
        ({"formatter": "sharegpt", "columns": ("b",)}, ("sharegpt", ("b",))),
        ({"formatter": "chat_completion"}, ("chat_completion", ("messages",))),
        ({"formatter": "prompt_answer"}, ("prompt_answer", ("prompt", "response"))),
    ],
)
def test_what_is_named_goes_before_what_is_found(settings: Any, expected: tuple[str, tuple[str, ...]]) -> None:
    found = ["text", "a", "b", "messages", "prompt", "response"]
    assert choose_reading(DataSet("x", **settings), found) == Reading(*expected)


def test_a_prompt_without_its_answer_is_no_usable_pair() -> None:
    with pytest.raises(
        RecipeError, match=r"needs instruction \+ output or prompt \+ response; its columns are: prompt"
    ):
        choose_reading(DataSet("x", formatter="prompt_answer"), ["prompt"])


@pytest.mark.parametrize(
    ("formatter", "row", "expected"),
    [
        ("raw_text", {"text": "abc"}, "abc"),
        ("raw_text", {"text": None}, ""),
        ("raw_text", {}, ""),
        ("prompt_answer", {"prompt": "a", "response": "b"}, "user: a\nassistant: b"),
        ("prompt_answer", {"prompt": "a", "response": " "}, ""),
        ("sharegpt", {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "h"},
                                        {"from": "gpt", "value": "g"}]}, "system: s\nuser: h\nassistant: g"),
        ("chat_completion", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"},
                                                                       {"type": "image"}, "b"]}]}, "user: a\nb"),
        ("chat_completion", {"messages": [{"role": "user", "content": "a", "tool_calls": None},
                                          {"role": "assistant", "content": None}]}, "user: a"),
        ("chat_completion", {"messages": []}, ""),
    ],
)  # fmt: skip
def test_rows_become_text_or_turns(formatter: str, row: dict[str, Any], expected: str) -> None:
    columns = next(columns for f, columns in reversed(DETECTED) if f == formatter)
    reading = Reading(formatter, ("text",) if formatter == "raw_text" else columns)
    document = reading.document(row)
    assert (document if isinstance(document, str) else as_lines(document)) == expected


@pytest.mark.parametrize(
    ("formatter", "value", "message"),
    [
        ("raw_text", 5, "int where text is needed"),
        ("sharegpt", "a", "str where a list of turns {from, value} is needed"),
        ("sharegpt", [{"role": "user", "content": "x"}], "a turn with the keys role, content where from and value"),
        ("chat_completion", [{"role": 1, "content": "x"}], "a turn with the keys role, content"),
    ],
)
def test_values_of_another_kind_say_what_they_are(formatter: str, value: Any, message: str) -> None:
    with pytest.raises(Unreadable) as error:
        Reading(formatter, ("c",)).document({"c": value})
    assert message in str(error.value)


def test_conversations_become_role_lines_without_a_chat_template(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns(n)} for n in range(40)])
    rows = read(path, packing=False, max_seq_len=512, max_samples=5)
    assert all(text.startswith("user: document ") and text.endswith("\nassistant: yes") for text in texts(rows))


def test_conversations_go_through_the_chat_template_where_there_is_one(tmp_path: Path, chatting: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns(n)} for n in range(40)])
    rows = read(path, packing=False, max_seq_len=512, max_samples=5, encoder=chatting)
    assert all(text.startswith("<user>document ") and text.endswith("<assistant>yes\n") for text in texts(rows))


def test_conversations_that_the_template_refuses_are_left_out_with_a_warning(tmp_path: Path, chatting: Any) -> None:
    other = [{"role": "tool", "content": sentence(1)}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns(n) if n % 4 else other} for n in range(40)])
    rows = read(path, packing=False, max_samples=20, encoder=chatting)
    assert len(rows.sequences) == 20
    (warning,) = rows.warnings
    assert "empty or unreadable (the chat template refuses it: no tools here)" in warning
    write_jsonl(path, [{"messages": other}] * 40)
    with pytest.raises(RecipeError, match=r"no text is left: .*the chat template refuses it: no tools here"):
        read(path, encoder=chatting)
