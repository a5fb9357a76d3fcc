"""A file of statistics: what is written is what is read, nothing half, nothing hostile, nothing foreign."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mso_hub.calibrate.statistics import (
    KIND,
    Provenance,
    Statistics,
    partial_folder,
    read_statistics,
    write_statistics,
)
from mso_hub.errors import CheckpointError, MsoError, RecipeError, SinkError

MADE = Provenance(
    "org/name", "c" * 40, "1" * 64, "2" * 64, "text.jsonl", 4, 512, "3" * 64, "BF16", "sdpa", 2, "0.1", "2.13", "5.23",
)  # fmt: skip
AMAX = {"model.layers.0.up_proj": 1.5, "model.layers.0.mlp.experts.7.w1": 0.0, "x.experts.gate_up_proj[3]": 2.0**-20}
TOKENS = {"model.layers.0.up_proj": 512, "model.layers.0.mlp.experts.7.w1": 0, "x.experts.gate_up_proj[3]": 1}
CACHES = {"model.layers.0.self_attn": (8.0, 0.25)}
SOME = Statistics(MADE, AMAX, TOKENS, CACHES)
VECTORS = {"model.layers.0.up_proj.input_channel_amax": (4,), "model.layers.0.up_proj.input_second_moment": (4,)}
BLOCKS = (np.array([1.5, 0, 1, 0.5], np.float32), np.array([0.5, 0, 0.25, 0.125], np.float32))


def written(folder: Path, statistics: Statistics = SOME) -> Path:
    path = folder / "model.stats"
    write_statistics(path, statistics, VECTORS, iter(BLOCKS))
    return path


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    found = read_statistics(written(tmp_path))
    assert (found.provenance, dict(found.amax), dict(found.tokens), dict(found.caches)) == (MADE, AMAX, TOKENS, CACHES)
    assert list(map(tuple, [found.vector("model.layers.0.up_proj", "input_channel_amax")])) == [tuple(BLOCKS[0])]
    assert tuple(found.vector("model.layers.0.up_proj", "input_second_moment")) == tuple(BLOCKS[1])
    assert repr(found) == "Statistics(org/name at commit cccccccccccc, 3 modules, 512 tokens of text.jsonl)"


def test_the_safetensors_library_reads_it_too(tmp_path: Path) -> None:
    tensors = load_file(written(tmp_path))
    assert {name: (t.dtype.name, t.shape) for name, t in tensors.items()} == {
        **{f"{module}.input_amax": ("float32", ()) for module in AMAX},
        **{f"{module}.tokens": ("int64", ()) for module in TOKENS},
        "model.layers.0.self_attn.k_amax": ("float32", ()), "model.layers.0.self_attn.v_amax": ("float32", ()),
        **dict.fromkeys(VECTORS, ("float32", (4,))),
    }  # fmt: skip
    assert tensors["x.experts.gate_up_proj[3].input_amax"] == np.float32(2.0**-20)


def test_equal_statistics_are_equal_bytes_in_whatever_order_they_were_found(tmp_path: Path) -> None:
    first = written(tmp_path).read_bytes()
    backwards = replace(SOME, amax=dict(reversed(AMAX.items())), tokens=dict(reversed(TOKENS.items())))
    assert written(tmp_path, backwards).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["model.stats"]


def test_a_vector_that_nobody_measured_is_named(tmp_path: Path) -> None:
    found = read_statistics(written(tmp_path))
    with pytest.raises(RecipeError, match=r"has no x\.y\.input_second_moment; calibrate again with --channels"):
        found.vector("x.y", "input_second_moment")


def test_what_is_not_there_or_not_complete_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "model.stats"
    with pytest.raises(RecipeError, match="must be a file that `mso-hub calibrate` wrote, found nothing there"):
        read_statistics(path)
    with pytest.raises(RecipeError, match="found a folder there"):
        read_statistics(tmp_path)
    partial_folder(path).mkdir()
    with pytest.raises(RecipeError, match=r"not complete.*run the same `mso-hub calibrate` again to go on"):
        read_statistics(path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Nothing is left behind; root may write everywhere, so the folder is one that is not there."""
    with pytest.raises(SinkError, match=r"no/model\.stats: cannot be written: No such file"):
        written(tmp_path / "no")
    assert not list(tmp_path.iterdir())


Damage = Callable[[dict[str, Any], dict[str, str]], object]
N = "model.layers.0.up_proj"
DAMAGE: dict[str, tuple[Damage, str]] = {
    "another kind of file": (lambda t, m: m.update(kind="weights"), "not statistics of this version"),
    "no kind": (lambda t, m: m.pop("kind"), "must say 'activation statistics of mso_hub, version 1', says 'None'"),
    "a later version": (lambda t, m: m.update(kind=KIND[:-1] + "2"), "not statistics of this version"),
    "no text": (lambda t, m: m.pop("text"), "text is 'None' in its metadata"),
    "a count in words": (lambda t, m: m.update(tokens="many"), "tokens is 'many' in its metadata"),
    "a negative count": (lambda t, m: m.update(rows="-1"), "rows is '-1' in its metadata"),
    "a huge count": (lambda t, m: m.update(layers="9" * 5000), "layers is '9{80}' in its metadata"),
    "no tokens": (lambda t, m: m.update(tokens="0"), "0 tokens through 2 layers"),
    "no digest": (lambda t, m: m.update(sha256="x" * 64), "needs three SHA-256 digests"),
    "NaN": (lambda t, m: t.update({f"{N}.input_amax": np.float32("nan")}), "up_proj.input_amax' must be finite and >"),
    "infinity": (lambda t, m: t.update({f"{N}.input_amax": np.float32("inf")}), "must be finite and >= 0, is inf"),
    "less than nothing": (lambda t, m: t.update({f"{N}.input_amax": np.float32(-1)}), "finite and >= 0, is -1"),
    "a negative number of tokens": (lambda t, m: t.update({f"{N}.tokens": np.int64(-1)}), "must be finite and >= 0"),
    "too many tokens": (lambda t, m: t.update({f"{N}.tokens": np.int64(1 << 60)}), "must be finite and >= 0"),
    "another dtype": (lambda t, m: t.update({f"{N}.input_amax": np.float64(1)}), r"F64 \[\] is no statistic"),
    "another shape": (lambda t, m: t.update({f"{N}.input_amax": np.ones(1, np.float32)}), r"F32 \[1\] is no statist"),
    "a weight": (lambda t, m: t.update({"a.weight": np.ones((2, 2), np.float32)}), r"'a.weight' F32 \[2, 2\] is no"),
    "a matrix of channels": (
        lambda t, m: t.update({f"{N}.input_channel_amax": np.ones((2, 2), np.float32)}), "is no statistic",
    ),
    "an amax alone": (lambda t, m: t.pop(f"{N}.tokens"), "up_proj has input_amax alone"),
    "tokens alone": (lambda t, m: t.pop(f"{N}.input_amax"), "up_proj has tokens alone"),
    "keys alone": (lambda t, m: t.pop("model.layers.0.self_attn.v_amax"), "self_attn has k_amax alone"),
    "an amax of nothing": (lambda t, m: t.update({f"{N}.tokens": np.int64(0)}), "has an input_amax without a token"),
    "a vector alone": (lambda t, m: t.update({"a.input_second_moment": np.ones(2, np.float32)}), "a.input_second_mom"),
    "nothing": (lambda t, m: t.clear(), "holds no statistics of any module"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_or_hostile_file_is_refused(name: str, tmp_path: Path) -> None:
    """Each with its own sentence, before anything of it is used."""
    path = written(tmp_path)
    tensors: dict[str, Any] = dict(load_file(path))
    metadata = {"kind": KIND, **MADE.metadata()}
    damage, message = DAMAGE[name]
    damage(tensors, metadata)
    save_file({key: np.asarray(value) for key, value in tensors.items()}, path, metadata)
    with pytest.raises(CheckpointError, match=message):
        read_statistics(path)


def test_a_file_cut_anywhere_or_with_one_other_byte_never_crashes(tmp_path: Path) -> None:
    """Either it is refused by name, or what it says is sensible."""
    path = written(tmp_path)
    data = path.read_bytes()
    for end in range(0, len(data), 7):
        path.write_bytes(data[:end])
        with pytest.raises(CheckpointError, match=str(path)):
            read_statistics(path)
    for at in range(0, len(data), 5):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])
        try:
            found = read_statistics(path)
        except MsoError as error:
            assert str(path) in str(error)  # noqa: PT017 - either end is right
        else:
            assert all(0 <= value < float("inf") for value in found.amax.values())


def test_vectors_are_checked_when_they_are_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    tensors = load_file(path)
    tensors[f"{N}.input_second_moment"] = np.array([1, np.nan, 1, 1], np.float32)
    save_file(tensors, path, {"kind": KIND, **MADE.metadata()})
    with pytest.raises(CheckpointError, match="input_second_moment must be finite and >= 0"):
        read_statistics(path).vector(N, "input_second_moment")


def test_metadata_is_text_that_people_can_read(tmp_path: Path) -> None:
    data = written(tmp_path).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"]["text"] == "text.jsonl"
    assert header["__metadata__"]["commit"] == "c" * 40
    assert all(isinstance(value, str) for value in header["__metadata__"].values())
