"""Text files on this machine, read without any package: .jsonl and .txt.

.jsonl  one JSON object a line; lines are found once and read when they are taken
.txt    cut at blank lines into documents of about 4,000 characters, so that a book is many documents and a list of
        short paragraphs is not one document each
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from mso_hub.calibrate.text.opened import Opened, Row, from_rows
from mso_hub.errors import RecipeError

DOCUMENT = 4_000
"""Characters after which a document of a .txt file ends at the next blank line."""
LONGEST = 4 * DOCUMENT
"""Characters after which it ends at the next line, blank or not."""


def open_jsonl(path: Path, name: str, split: str) -> Opened:
    """A file of JSON lines -> its rows. Raises RecipeError that names the line for what is no JSON object."""
    lines = JsonLines(path, _line_starts(path))
    if not len(lines):
        raise RecipeError(f"{path}: holds no rows; needs one JSON object a line")
    return from_rows(name, tuple(map(str, lines[0])), lines, split)


def open_txt(paths: Sequence[Path], name: str, split: str) -> Opened:
    """Files of plain text -> documents with the column `text`. Raises RecipeError for what is not UTF-8."""
    rows = [{"text": text} for path in paths for text in cut_documents(_read(path))]
    if not rows:
        raise RecipeError(f"{name}: holds no text")
    return from_rows(name, ("text",), rows, split)


def cut_documents(text: str) -> Iterator[str]:
    """Plain text -> documents that end at a blank line after DOCUMENT characters, at any line after LONGEST."""
    held: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        held.append(line)
        size += len(line)
        if (size >= DOCUMENT and not line.strip()) or size >= LONGEST:
            yield "".join(held).strip()
            held, size = [], 0
    if rest := "".join(held).strip():
        yield rest


@dataclass(frozen=True, slots=True)
class JsonLines(Sequence[Row]):
    """Rows of a .jsonl file by number; only the row that is asked for is read.

    starts  offset in bytes and number of every line that is not blank, one after the other
    """

    path: Path
    starts: array[int]

    def __len__(self) -> int:
        return len(self.starts) // 2

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Row]: ...
    def __getitem__(self, at: int | slice) -> Row | Sequence[Row]:
        if isinstance(at, slice):
            return [self[each] for each in range(*at.indices(len(self)))]
        start, number = self.starts[2 * at], self.starts[2 * at + 1]
        with self.path.open("rb") as file:
            file.seek(start)
            line = file.readline()
        place = f"{self.path}: line {number}"
        try:
            # utf-8-sig: a mark at the start of the file is no part of the first row.
            row: Any = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{place} is no JSON: {' '.join(str(error).split())}; correct it") from error
        if not isinstance(row, dict):
            raise RecipeError(f'{place} must be a JSON object like {{"text": ...}}, got {type(row).__name__}')
        return row


def _line_starts(path: Path) -> array[int]:
    starts, offset = array("q"), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                starts.extend((offset, number))
            offset += len(line)
    return starts


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text: {error}") from error
    if "\0" in text:
        raise RecipeError(f"{path}: not text: has a byte 0 at character {text.index(chr(0)):,}, as binary files have")
    return re.sub(r"\r\n?", "\n", text)
