"""The checkpoint's own tokenizer: which files are fetched, what rows begin with, what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mso_hub.calibrate.text import open_tokenizer
from mso_hub.calibrate.text.tokenizer import make_encoder
from mso_hub.errors import CheckpointError
from mso_hub.source import MemorySource, open_source
from tests.calibrate.texts import MODEL, TOKENIZER_FILES, numbered, read, texts, tokenizer, write_jsonl

FILES = {name: (MODEL / name).read_bytes() for name in TOKENIZER_FILES}


def with_start() -> dict[str, bytes]:
    """The small tokenizer as Llama's is: it puts a token before every text."""
    found = json.loads(FILES["tokenizer.json"])
    token = "<|end|>"  # noqa: S105 - a token of text
    start = {"SpecialToken": {"id": token, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    found["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, text],
        "pair": [start, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [0], "tokens": [token]}},
    }
    return {**FILES, "tokenizer.json": json.dumps(found).encode()}


def test_only_the_tokenizer_is_fetched_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    others = {
        "model.safetensors": b"w" * 100,
        "modeling_x.py": b"raise SystemExit",
        "README.md": b"#",
        "a/vocab.json": b"",
    }
    source = MemorySource({**FILES, **others})
    opened = open_tokenizer(source)
    assert {name for name, _, _ in source.reads} == set(TOKENIZER_FILES)
    assert not list(tmp_path.iterdir())
    assert opened.encode("hello world") == open_tokenizer(open_source(MODEL)).encode("hello world")


@pytest.mark.parametrize("left_out", ["tokenizer.json", None])
def test_a_checkpoint_without_tokenizer_is_an_error_that_names_the_file(left_out: str | None) -> None:
    files = {name: data for name, data in FILES.items() if left_out and name != left_out}
    with pytest.raises(
        CheckpointError, match=r"mine: has no tokenizer: needs tokenizer\.json .*, has (config|nothing)"
    ):
        open_tokenizer(MemorySource(files, "mine"))


def test_a_broken_tokenizer_is_an_error_that_names_the_checkpoint() -> None:
    with pytest.raises(CheckpointError, match="mine: its tokenizer cannot be opened: "):
        open_tokenizer(MemorySource({**FILES, "tokenizer.json": b'{"model": 1}'}, "mine"))


def test_code_of_the_checkpoint_runs_only_when_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"}
    code = b"""
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
class OwnConfig(PreTrainedConfig):
    model_type = "own"
class Own(PreTrainedTokenizerFast):
    mine = 5
"""
    model = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    files = {"tokenizer_config.json": json.dumps(config).encode(), "config.json": json.dumps(model).encode()}
    source = MemorySource({**FILES, **files, "own.py": code}, "own")
    with pytest.raises(CheckpointError, match=r"own: its tokenizer cannot be opened.*with --trust_remote_code only"):
        open_tokenizer(source)
    assert open_tokenizer(source, trust_remote_code=True).mine == 5


def test_rows_begin_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    opened = open_tokenizer(MemorySource(with_start()))
    assert make_encoder(opened).start == (0,)
    path = numbered(tmp_path / "a.jsonl")
    packed, plain = read(path, encoder=opened), read(path, encoder=opened, packing=False)
    assert packed.ids.shape == (20, 64)
    assert (packed.ids[:, 0] == 0).all()
    assert all(row[0] == 0 and row[1] != 0 and len(row) <= 64 for row in plain.sequences)


def test_a_template_that_writes_the_first_token_itself_does_not_double_it(tmp_path: Path) -> None:
    opened = open_tokenizer(MemorySource(with_start()))
    opened.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    rows = [{"messages": [{"role": "user", "content": "word " * 60}]} for _ in range(40)]
    found = read(write_jsonl(tmp_path / "a.jsonl", rows), encoder=opened, packing=False)
    assert all(row[0] == 0 and row[1] != 0 for row in found.sequences)


def test_without_an_end_token_documents_are_joined_by_an_empty_line(tmp_path: Path) -> None:
    config = {"tokenizer_class": "TokenizersBackend", "eos_token": None}
    opened = open_tokenizer(MemorySource({**FILES, "tokenizer_config.json": json.dumps(config).encode()}))
    rows = read(numbered(tmp_path / "a.jsonl"), encoder=opened, max_seq_len=256)
    assert rows.warnings == ("the tokenizer has no end-of-text token: documents are joined by an empty line",)
    assert not any((row == 0).any() for row in rows.sequences)
    assert all("\n\ndocument " in text for text in texts(rows))


def test_a_document_is_cut_without_being_tokenized_to_its_end() -> None:
    seen: list[int] = []

    class Spy:
        """The small tokenizer, which tells how much it was given."""

        eos_token_id = 0

        def __call__(self, text: str, **settings: Any) -> Any:
            seen.append(len(text))
            return tokenizer()(text, **settings)

    ids = make_encoder(Spy()).ids("some words and " * 100_000, 50)
    assert len(ids) == 50
    assert max(seen) <= 800
    assert np.array_equal(ids, tokenizer().encode("some words and " * 100)[:50])
