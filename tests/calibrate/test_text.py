"""Text -> token rows: counts, shares, order, packing, and what is refused."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mso_hub.calibrate.text import DataSet, TextSettings, named_dataset, one_dataset, read_text
from mso_hub.calibrate.text.opened import in_window, shuffled
from mso_hub.calibrate.text.rows import digest, pack
from mso_hub.calibrate.text.settings import shares
from mso_hub.errors import CheckpointError, RecipeError
from tests.calibrate.texts import numbered, numbers, read, sentence, texts, tokenizer, write_jsonl


def test_packed_rows_are_exactly_as_many_and_as_long_as_asked_for(tmp_path: Path) -> None:
    rows = read(numbered(tmp_path / "a.jsonl"))
    assert rows.ids.shape == (20, 64)
    assert rows.ids.dtype == np.int64
    assert (rows.tokens, rows.length, rows.warnings) == (1280, 64, ())
    assert [batch.shape for batch in rows.batches(8)] == [(8, 64), (8, 64), (4, 64)]
    assert np.array_equal(np.concatenate(rows.batches(7)), rows.ids)


def test_packed_rows_are_the_documents_joined_by_end_of_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": sentence(n, 9)} for n in range(60)])
    rows = read(path, max_samples=4, max_seq_len=200, oversample_ratio=1.0)
    documents = [tokenizer().encode(sentence(n, 9)) for n in range(60)]
    for row in rows.sequences:
        ends = [-1, *np.flatnonzero(row == 0).tolist(), len(row)]
        first, *inside, last = (row[at + 1 : end].tolist() for at, end in itertools.pairwise(ends))
        assert all(part in documents for part in inside)
        assert any(document[len(document) - len(first) :] == first for document in documents)
        assert any(document[: len(last)] == last for document in documents)


@given(
    documents=st.lists(st.lists(st.integers(1, 9), max_size=9), max_size=9),
    length=st.integers(2, 7),
    start=st.sampled_from([[], [11]]),
)
def test_packing_keeps_every_token_in_order(documents: list[list[int]], length: int, start: list[int]) -> None:
    stream = [token for ids in documents for token in (*ids, 10)]
    rows = [row.tolist() for row in pack(documents, length, start, [10])]
    assert all(len(row) == length and row[: len(start)] == start for row in rows)
    found = [token for row in rows for token in row[len(start) :]]
    assert found == stream[: len(found)]
    assert len(stream) - len(found) < length - len(start)


def test_unpacked_rows_are_one_document_each_cut_at_the_length(tmp_path: Path) -> None:
    short, long = [{"text": sentence(n, 8)} for n in range(10)], [{"text": sentence(n, 99)} for n in range(10, 20)]
    rows = read(write_jsonl(tmp_path / "a.jsonl", short + long), packing=False, min_token_length=8, max_samples=20)
    assert sorted(numbers(rows)) == list(range(20))
    assert rows.length == 64
    assert all(len({len(row) for row in batch}) == 1 for batch in rows.batches())
    assert sum(len(batch) for batch in rows.batches()) == 20
    cut = [text for text, row in zip(texts(rows), rows.sequences, strict=True) if len(row) == 64]
    assert all(sentence(int(text.split()[1]), 99).startswith(text) for text in cut)
    with pytest.raises(ValueError, match="same shape"):
        assert rows.ids is None


def test_rows_are_the_same_every_time_and_the_seed_changes_them(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.jsonl")
    assert read(path).sha256 == read(path).sha256 == digest(read(path).sequences)
    assert read(path, seed=7).sha256 != read(path).sha256
    assert read(path, packing=False).sha256 != read(path).sha256


def test_rows_are_these_on_every_python_and_platform(tmp_path: Path) -> None:
    """A change of this digest means that a text read again is another text."""
    rows = read(numbered(tmp_path / "a.jsonl"), DataSet(str(numbered(tmp_path / "b.jsonl", 50, 500)), weight=0.5))
    assert rows.sha256 == "7f05319f954ad9a9c0cd5c602492b548693d7b17e2ed182d233b1482021506b2"


def test_the_digest_is_over_lengths_and_ids() -> None:
    rows = (np.array([1, 2], np.int64), np.array([3], np.int64))
    numbers = np.array([2, 1, 2, 1, 3], "<i8")
    assert digest(rows) == hashlib.sha256(numbers.tobytes()).hexdigest()
    assert digest(rows) != digest((np.array([1], np.int64), np.array([2, 3], np.int64)))


def test_order_is_spread_over_the_whole_data_set(tmp_path: Path) -> None:
    found = numbers(read(numbered(tmp_path / "a.jsonl", 1000), packing=False))
    assert len(set(found)) == 20
    assert min(found) < 200
    assert max(found) > 800


@given(total=st.integers(1, 5000), weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8))
def test_shares_add_up_and_are_within_one_of_the_exact_ones(total: int, weights: list[float]) -> None:
    found = shares(total, weights)
    assert sum(found) == total
    assert all(
        abs(share - total * weight / sum(weights)) < 1 + 1e-6 for share, weight in zip(found, weights, strict=True)
    )


def test_the_largest_remainder_gets_the_row_that_is_left() -> None:
    assert shares(10, [1, 1, 1]) == (4, 3, 3)
    assert shares(512, [0.5, 0.3, 0.2]) == (256, 154, 102)
    assert shares(3, [0.26, 0.25, 0.49]) == (1, 1, 1)


@pytest.mark.parametrize("packing", [True, False])
def test_every_data_set_gives_its_share_of_the_rows(tmp_path: Path, packing: bool) -> None:
    many = DataSet(str(numbered(tmp_path / "a.jsonl")), weight=3)
    few = DataSet(str(numbered(tmp_path / "b.jsonl", first=1000)), name="other", weight=1)
    rows = read(many, few, packing=packing)
    assert [share.rows for share in rows.shares] == [15, 5]
    assert rows.name == f"{many.path} + other"
    assert sum(share.tokens for share in rows.shares) == rows.tokens
    if not packing:
        assert sum(number >= 1000 for number in numbers(rows)) == 5
        assert [number >= 1000 for number in numbers(rows)] != [False] * 15 + [True] * 5, "rows are mixed"


def test_data_set_number_i_is_shuffled_with_seed_plus_i(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.jsonl")
    again = read(path, path, packing=False, max_samples=10, oversample_ratio=1.0)
    first = read(path, packing=False, max_samples=5, oversample_ratio=1.0)
    second = read(path, packing=False, max_samples=5, oversample_ratio=1.0, seed=43)
    assert sorted(numbers(again)) == sorted(numbers(first) + numbers(second))


def test_a_short_data_set_is_filled_from_the_others_with_a_warning(tmp_path: Path) -> None:
    enough, short = numbered(tmp_path / "a.jsonl"), numbered(tmp_path / "b.jsonl", 6)
    rows = read(enough, short, packing=False, oversample_ratio=2.0)
    assert [share.rows for share in rows.shares] == [14, 6]
    assert rows.warnings == (f"{short}: 6 rows of the 10 of its share; none was left out",)


def test_too_little_text_is_a_warning_that_says_what_to_do(tmp_path: Path) -> None:
    rows = read(numbered(tmp_path / "a.jsonl", 3), packing=False)
    assert len(rows.sequences) == 3
    expected = "3 rows of the 20 that were asked for; none was left out; name more text"
    assert rows.warnings == (expected,)


def test_documents_that_are_too_short_are_left_out_and_counted(tmp_path: Path) -> None:
    mixed = [{"text": sentence(n) if n % 2 else "short"} for n in range(100)]
    path = write_jsonl(tmp_path / "a.jsonl", mixed)
    rows = read(path, packing=False, max_samples=20, oversample_ratio=3.0)
    assert all(number % 2 for number in numbers(rows))
    (share,) = rows.shares
    assert (share.rows, share.documents + share.dropped) == (20, 60)
    few = read(path, packing=False, max_samples=20, oversample_ratio=1.0)
    assert "shorter than min_token_length 32; lower min_token_length, or raise oversample_ratio" in few.warnings[0]


def test_oversampling_reads_that_much_more_and_no_further(tmp_path: Path) -> None:
    rows = read(numbered(tmp_path / "a.jsonl"), packing=False, oversample_ratio=2.5)
    assert rows.shares[0].documents == 50


def test_one_long_document_does_not_become_the_whole_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": sentence(5, 9000)}, *({"text": sentence(n)} for n in range(90))])
    for seed in range(5):
        rows = read(path, seed=seed)
        assert len(rows.sequences) == 20
        assert rows.shares[0].documents > 5


def test_a_text_of_which_nothing_is_left_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "too short"}, {"text": ""}, {"text": None}, {"other": 1}])
    with pytest.raises(
        RecipeError, match=r"no text is left: .*4 documents read.*1 shorter than min_token_length 32, 3 e"
    ):
        read(path)
    path = write_jsonl(tmp_path / "b.jsonl", [{"text": sentence(1)}])
    with pytest.raises(RecipeError, match="does not fill one row of 500 tokens"):
        read(path, max_seq_len=500)


def test_a_token_beyond_the_embedding_is_an_error(tmp_path: Path) -> None:
    settings = TextSettings((DataSet(str(numbered(tmp_path / "a.jsonl"))),), max_samples=4, max_seq_len=64)
    assert read_text(settings, tokenizer(), vocab_size=2048).tokens == 256
    with pytest.raises(CheckpointError, match=r"its vocabulary has 2,048 tokens, the model's embedding only 300 rows"):
        read_text(settings, tokenizer(), vocab_size=300)


def test_rows_longer_than_the_model_takes_are_a_warning(tmp_path: Path) -> None:
    rows = read(numbered(tmp_path / "a.jsonl"), max_seq_len=600, max_samples=2)
    assert rows.warnings == ("rows have 600 tokens, the tokenizer announces at most 512 for this model",)


@given(count=st.integers(0, 60), seed=st.integers(0, 1000))
def test_a_shuffle_gives_every_number_once(count: int, seed: int) -> None:
    assert sorted(shuffled(count, seed)) == list(range(count))


@given(count=st.integers(0, 60), window=st.integers(1, 70), seed=st.integers(0, 9))
def test_a_shuffle_within_a_window_gives_every_row_once_and_none_early(count: int, window: int, seed: int) -> None:
    found = [row["n"] for row in in_window(({"n": n} for n in range(count)), seed, window)]
    assert sorted(found) == list(range(count))
    assert all(number < place + window + 1 for place, number in enumerate(found))


def test_cnn_dailymail_is_the_default_and_is_streamed() -> None:
    (dataset,) = one_dataset(None).datasets
    assert dataset == DataSet("abisee/cnn_dailymail", "3.0.0", text_column="article", streaming=True)
    assert (one_dataset(None).max_samples, one_dataset(None).max_seq_len) == (512, 512)
    assert one_dataset("cnn_dailymail", "test[10%:]").datasets[0].streaming is False


def test_what_is_said_goes_before_what_is_known() -> None:
    assert named_dataset("cnn_dailymail", columns=("highlights",), formatter="raw_text") == DataSet(
        "abisee/cnn_dailymail", "3.0.0", columns=("highlights",), formatter="raw_text"
    )
    assert named_dataset("hf://datasets/abisee/cnn_dailymail@abc", split="test").text_column == "article"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_samples": 0}, "max_samples: must be at least 1, got 0"),
        ({"max_seq_len": 16, "min_token_length": 32}, r"min_token_length: must be at most max_seq_len \(16\), got 32"),
        ({"oversample_ratio": 0.5}, "oversample_ratio: must be between 1 and 1000, got 0.5"),
        ({"batch_size": 0}, "batch_size: must be at least 1, got 0"),
    ],
)
def test_impossible_numbers_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        one_dataset("x.txt", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0}, "weight must be a number above 0, got 0"),
        ({"weight": float("nan")}, "weight must be a number above 0, got nan"),
        ({"formatter": "share_gpt"}, "got 'share_gpt'; did you mean 'sharegpt'?"),
        ({"formatter": "prompt_answer", "columns": ("a",)}, "formatter prompt_answer takes 2 columns, got 1: a"),
        ({"text_column": "a", "formatter": "sharegpt"}, "formatter sharegpt says something else"),
        ({"columns": ("a", "b", "c")}, "3 columns need a formatter"),
    ],
)
def test_a_data_set_that_contradicts_itself_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        named_dataset("x.txt", **settings)
