"""Tokenizers, rows and files for the tests of calibration text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mso_hub.calibrate.text import DataSet, Rows, TextSettings, open_tokenizer, read_text
from mso_hub.source import open_source

MODEL = Path(__file__).resolve().parents[1] / "models" / "tiny-qwen3-moe"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")
CHATML = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
    "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
)


@cache
def tokenizer() -> Any:
    """That of the small trained model: 2,048 tokens, EOS 0, no BOS, no chat template."""
    return open_tokenizer(open_source(MODEL))


def sentence(number: int, words: int = 40) -> str:
    """Text that tells its number, and is long enough not to be dropped."""
    return f"document {number} " + " ".join(f"says {number + word}" for word in range(words))


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(path: Path, count: int = 200, first: int = 0) -> Path:
    """A .jsonl of `count` numbered documents."""
    return write_jsonl(path, ({"text": sentence(first + at), "n": at} for at in range(count)))


def read(*datasets: DataSet | Path | str, encoder: Any = None, **settings: Any) -> Rows:
    """Rows of data sets with the small tokenizer: 20 rows of 64 tokens unless said otherwise."""
    sets = tuple(one if isinstance(one, DataSet) else DataSet(str(one)) for one in datasets)
    return read_text(TextSettings(sets, **{"max_samples": 20, "max_seq_len": 64, **settings}), encoder or tokenizer())


def texts(rows: Rows) -> list[str]:
    """Every row as text."""
    return [tokenizer().decode(row) for row in rows.sequences]


def numbers(rows: Rows) -> list[int]:
    """The document each unpacked row is from."""
    return [int(text.split()[1]) for text in texts(rows)]
