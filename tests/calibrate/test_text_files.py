"""Files on this machine, and the built-in text: read without any package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mso_hub.calibrate.text import PYTHON_DOCS, DataSet
from mso_hub.calibrate.text.files import DOCUMENT, LONGEST, cut_documents
from mso_hub.calibrate.text.place import open_dataset
from mso_hub.calibrate.text.python_docs import python_docs, python_docs_name, split_docs
from mso_hub.errors import RecipeError
from tests.calibrate.texts import numbered, numbers, read, sentence, write_jsonl


def contents(path: Path) -> list[str]:
    """Every document of a data set, sorted."""
    opened = open_dataset(DataSet(str(path)))
    return sorted(row["text"] for row in opened.rows(0, ("text",), 1))


def test_a_slice_of_a_file_holds_these_rows(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.jsonl")
    found = numbers(read(DataSet(str(path), split="train[10:40]"), packing=False))
    assert len(found) == 20
    assert set(found) <= set(range(10, 40))
    assert set(numbers(read(DataSet(str(path), split="train[90%:]"), packing=False))) == set(range(180, 200))
    assert read(DataSet(str(path), split="train[:2]"), packing=False).name == f"{path} (train[:2])"


def test_a_file_has_no_other_split(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.jsonl")
    with pytest.raises(RecipeError, match=r"a\.jsonl.*: has one split, train, got 'test'"):
        read(DataSet(str(path), split="test"))
    with pytest.raises(RecipeError, match="split must be a name, with one slice at most"):
        read(DataSet(str(path), split="train[:5][2]"))


def test_json_lines_may_have_marks_blank_lines_and_other_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "t\\u00fco"}\n{"text": "three"}')
    assert contents(path) == ["one", "three", "tüo"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "line 3 is no JSON: Expecting property name"),
        ("[1]", 'line 3 must be a JSON object like {"text": ...}, got list'),
        ("[" * 100_000, "line 3 is no JSON"),
    ],
)
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "x"}}\n\n{line}\n')
    with pytest.raises(RecipeError) as error:
        read(path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(path))


def test_a_file_without_rows_is_an_error(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_text("\n\n")
        with pytest.raises(RecipeError, match="holds no"):
            read(tmp_path / name)


def test_plain_text_is_cut_at_blank_lines_into_documents(tmp_path: Path) -> None:
    paragraphs = [f"{sentence(n, 120)}\n" for n in range(30)]
    path = tmp_path / "book.txt"
    path.write_bytes("\n".join(paragraphs).replace("\n", "\r\n").encode())
    found = contents(path)
    assert 5 < len(found) < 15
    assert sorted(part for text in found for part in text.split("\n\n")) == sorted(p.strip() for p in paragraphs)
    assert read(path).ids.shape == (20, 64)


@given(st.lists(st.integers(0, 9000), max_size=12))
def test_cutting_plain_text_loses_nothing_but_blank_edges(lengths: list[int]) -> None:
    text = "".join("x" * length + "\n" for length in lengths)
    found = list(cut_documents(text))
    assert "".join(found).replace("\n", "") == text.replace("\n", "")
    assert all(len(part) < LONGEST + 9001 for part in found)
    assert all(len(part) >= DOCUMENT for part in found[:-1])


def test_what_is_not_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(RecipeError, match="not UTF-8 text"):
        read(tmp_path / "a.txt")


def test_a_folder_of_plain_text_is_one_data_set(tmp_path: Path) -> None:
    for at in range(4):
        (tmp_path / "d" / str(at)).mkdir(parents=True)
        (tmp_path / "d" / str(at) / "x.md").write_text(sentence(at))
    assert contents(tmp_path / "d") == sorted(map(sentence, range(4)))


@pytest.mark.parametrize("path", ["a.jsonl", "data/a.parquet", "/no/such/folder", "./text", "a/b/c", "what is this"])
def test_a_path_that_names_nothing_never_goes_to_the_hub(path: str) -> None:
    with pytest.raises(RecipeError, match="no file and no folder is there"):
        read(path)


def test_a_file_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_bytes(b"PK")
    with pytest.raises(RecipeError, match=r"a\.docx: is no data set that can be read; known are \.jsonl, .*\.parquet"):
        read(tmp_path / "a.docx")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="the folder holds no files"):
        read(tmp_path / "empty")


def test_an_unusable_column_is_an_error_that_lists_the_columns(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "x", "id": 1}])
    with pytest.raises(
        RecipeError, match=r"no usable column for a formatter: needs text or .*columns are: body, id\. Name"
    ):
        read(path)
    with pytest.raises(RecipeError, match="has no column 'boby'; its columns are: body, id"):
        read(DataSet(str(path), text_column="boby"))


def test_the_built_in_text_names_its_version_and_its_hash() -> None:
    rows = read(PYTHON_DOCS, max_samples=8, max_seq_len=128)
    version = ".".join(map(str, sys.version_info[:3]))
    assert rows.name == python_docs_name()
    assert rows.name.startswith(f"python-docs {version} (sha256 ")
    assert rows.ids.shape == (8, 128)
    assert rows.sha256 == read(PYTHON_DOCS, max_samples=8, max_seq_len=128).sha256


def test_the_built_in_text_is_large_and_its_test_split_is_apart() -> None:
    train, test = split_docs("train"), split_docs("test")
    assert sum(map(len, train)) > 1_400_000
    assert sum(map(len, test)) > 40_000
    assert sorted(train + test) == sorted(python_docs())
    assert not set(train) & set(test)
    with pytest.raises(RecipeError, match="has the splits train and test, got 'validation'"):
        read(DataSet(PYTHON_DOCS, split="validation"))


def test_text_files_and_the_built_in_text_need_neither_datasets_nor_torch(tmp_path: Path) -> None:
    numbered(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_text(sentence(1))
    program = """
import sys
from mso_hub.calibrate.text import DataSet
from mso_hub.calibrate.text.place import open_dataset
for path in ("a.jsonl", "b.txt", "python-docs"):
    opened = open_dataset(DataSet(path))
    assert next(opened.rows(0, opened.columns, 1))["text"]
print(sorted({"datasets", "torch", "transformers", "pyarrow", "huggingface_hub"} & sys.modules.keys()))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stdout == "[]\n"
