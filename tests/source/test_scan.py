"""From the files of a repo to shards and groups: every arrangement that real repos have, and every broken one."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from mso_hub.checkpoint import Checkpoint
from mso_hub.errors import CheckpointError
from mso_hub.source import MemorySource, read_checkpoint
from mso_hub.source.scan import FIRST_READ
from tests.helpers import INDEX, checkpoint_files, random_tensor

T = random_tensor(2, 4)
TWO = {"a.safetensors": {"x": T}, "b.safetensors": {"y": T}}


def scan(files: Mapping[str, bytes]) -> Checkpoint:
    """Read a repo that is held in memory."""
    return read_checkpoint(MemorySource(files, "repo"))


def index_of(weight_map: Mapping[str, str]) -> bytes:
    """An index without metadata."""
    return json.dumps({"weight_map": weight_map}).encode()


def test_a_single_file_needs_no_index() -> None:
    """One file is one group that no index lists."""
    checkpoint = scan(checkpoint_files({"model.safetensors": {"x": T, "y": T}}))
    (group,) = checkpoint.groups
    assert (group.index, sorted(group.tensors), group.indexed) == (None, ["x", "y"], frozenset())
    assert checkpoint.config == {}


def test_an_index_joins_its_shards() -> None:
    """Tensors of all shards form one group, and the index's other metadata is kept."""
    files = checkpoint_files(TWO)
    files[INDEX] = json.dumps(
        {"metadata": {"total_size": 9, "origin": {"a": 1}}, "weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    ).encode()
    (group,) = scan(files).groups
    assert (group.index, dict(group.extra)) == (INDEX, {"origin": {"a": 1}})
    assert {n: i.file for n, i in group.tensors.items()} == {"x": "a.safetensors", "y": "b.safetensors"}
    assert group.indexed == {"x", "y"}


def test_several_files_without_an_index_are_one_group() -> None:
    """As loaders see them that glob a folder."""
    (group,) = scan(checkpoint_files(TWO, index=False)).groups
    assert (group.index, sorted(group.tensors)) == (None, ["x", "y"])


def test_two_indices_in_two_folders_are_two_name_spaces() -> None:
    """Both may hold a tensor of the same name."""
    files = {f"{part}/{name}": data for part in ("text", "draft") for name, data in checkpoint_files(TWO).items()}
    groups = {group.index: group for group in scan(files).groups}
    assert set(groups) == {f"text/{INDEX}", f"draft/{INDEX}"}
    assert groups[f"draft/{INDEX}"].tensors["x"].file == "draft/a.safetensors"


def test_an_extra_file_joins_the_index_of_its_folder() -> None:
    """`mtp.safetensors` beside an index that does not list it belongs to the model all the same."""
    files = checkpoint_files(TWO) | checkpoint_files({"mtp.safetensors": {"mtp.fc.weight": T}})
    (group,) = scan(files).groups
    assert sorted(group.tensors) == ["mtp.fc.weight", "x", "y"]
    assert group.indexed == {"x", "y"}


def test_an_extra_file_in_another_folder_is_a_group_of_its_own() -> None:
    """It may name its tensors as it likes."""
    files = checkpoint_files(TWO) | checkpoint_files({"draft/model.safetensors": {"x": T}})
    assert [(g.index, sorted(g.tensors)) for g in scan(files).groups] == [(INDEX, ["x", "y"]), (None, ["x"])]


def test_a_weight_map_may_point_into_subfolders() -> None:
    """Nested shard paths are found, below the folder of the index."""
    shards = {"one/a.safetensors": {"x": T}, "two/deep/b.safetensors": {"y": T}}
    (group,) = scan(checkpoint_files(shards)).groups
    assert {i.file for i in group.tensors.values()} == set(shards)
    below = {f"model/{name}": data for name, data in checkpoint_files(shards).items()}
    (group,) = scan(below).groups
    assert {i.file for i in group.tensors.values()} == {f"model/{name}" for name in shards}


def test_a_shard_without_tensors_is_allowed() -> None:
    """It belongs to its folder and holds nothing."""
    checkpoint = scan(checkpoint_files(TWO) | {"empty.safetensors": save({}, metadata={"format": "pt"})})
    assert checkpoint.shards["empty.safetensors"].tensors == ()
    assert len(checkpoint.groups) == 1


def test_a_shard_of_companions_alone_is_allowed() -> None:
    """Scales of a packed weight may lie in another shard than its codes."""
    shards = {
        "a.safetensors": {"m.weight_packed": torch.zeros(2, 1, dtype=torch.int32)},
        "b.safetensors": {"m.weight_scale": T, "m.weight_shape": torch.tensor([2, 8])},
    }
    (group,) = scan(checkpoint_files(shards)).groups
    assert group.tensors["m.weight_scale"].file == "b.safetensors"


def test_a_partial_index_takes_the_whole_shard() -> None:
    """A shard whose index lists only some of its tensors holds the others too."""
    files = checkpoint_files({"a.safetensors": {"x": T, "y": T}}) | {INDEX: index_of({"x": "a.safetensors"})}
    (group,) = scan(files).groups
    assert sorted(group.tensors) == ["x", "y"]
    assert group.indexed == {"x"}


def test_headers_longer_than_the_first_read_are_read_to_their_end() -> None:
    """Thousands of tensors: the rest of the header takes one more range, and no weight is read."""
    tensors = {f"model.layers.{n}.mlp.experts.{n}.down_proj.weight": T for n in range(1200)}
    source = MemorySource(checkpoint_files({"model.safetensors": tensors}))
    shard = read_checkpoint(source).shards["model.safetensors"]
    assert len(shard.tensors) == 1200
    first = shard.tensors[0].begin
    assert first > FIRST_READ
    assert source.reads == [("model.safetensors", 0, FIRST_READ), ("model.safetensors", FIRST_READ, first)]


def without(files: Mapping[str, bytes], name: str) -> dict[str, bytes]:
    """All files but one."""
    return {n: data for n, data in files.items() if n != name}


MAPS = {"x": "a.safetensors", "y": "b.safetensors"}
FULL = checkpoint_files(TWO)
BROKEN: dict[str, tuple[dict[str, bytes], str]] = {
    "nothing at all": ({}, "repo: needs at least one .safetensors file, found 0 other files"),
    "pickles only": ({"pytorch_model.bin": b"PK"}, "needs at least one .safetensors file, found 1 other files"),
    "shard missing": (without(FULL, "b.safetensors"), f"{INDEX}: points at 'b.safetensors', which is not in repo"),
    "tensor nowhere": (
        FULL | {INDEX: index_of(MAPS | {"z": "a.safetensors"})},
        f"{INDEX}: says that 'z' is in 'a.safetensors', no shard holds it",
    ),
    "tensor elsewhere": (
        FULL | {INDEX: index_of({"x": "b.safetensors", "y": "a.safetensors"})},
        "'x' is in 'b.safetensors', a.safetensors holds it",
    ),
    "tensor in two shards": (
        checkpoint_files({"a.safetensors": {"x": T}, "b.safetensors": {"x": T, "y": T}}) | {INDEX: index_of(MAPS)},
        f"{INDEX}: the tensor 'x' is in a.safetensors and in b.safetensors",
    ),
    "tensor in two loose files": (
        checkpoint_files({"a.safetensors": {"x": T}, "b.safetensors": {"x": T}}, index=False),
        "the tensor 'x' is in a.safetensors and in b.safetensors",
    ),
    "tensor in an extra file too": (
        FULL | checkpoint_files({"old.safetensors": {"x": T}}),
        f"{INDEX}: 'x' is in a.safetensors and again in old.safetensors",
    ),
    "shard in two indices": (
        FULL | {"other.safetensors.index.json": FULL[INDEX]},
        "a.safetensors: listed by",
    ),
    "parent folder": (FULL | {INDEX: index_of(MAPS | {"x": "../a.safetensors"})}, "points at '../a.safetensors'"),
    "absolute path": (FULL | {INDEX: index_of(MAPS | {"x": "/a.safetensors"})}, "points at '/a.safetensors'"),
    "backslash": (FULL | {INDEX: index_of(MAPS | {"x": "..\\a"})}, "must be a relative path inside the repo"),
    "drive letter": (FULL | {INDEX: index_of(MAPS | {"x": "C:a"})}, "must be a relative path inside the repo"),
    "index cut": (FULL | {INDEX: FULL[INDEX][:-5]}, f"{INDEX}: not valid JSON"),
    "index without a map": (FULL | {INDEX: b"{}"}, f"{INDEX}: needs a weight_map"),
    "config cut": (FULL | {"config.json": b'{"a"'}, "config.json: not valid JSON"),
    "config a list": (FULL | {"config.json": b"[]"}, "config.json: must hold a JSON object, found list"),
    "shard empty": (FULL | {"a.safetensors": b""}, "a.safetensors: needs at least 8 bytes"),
    "shard cut in its header": (
        FULL | {"a.safetensors": FULL["a.safetensors"][:40]},
        "a.safetensors: the header needs",
    ),
    "shard cut in its data": (FULL | {"a.safetensors": FULL["a.safetensors"][:-1]}, "a.safetensors: the tensors end"),
    "shard with a tail": (FULL | {"a.safetensors": FULL["a.safetensors"] + b"x"}, "a.safetensors: the tensors end"),
    "not a shard": (FULL | {"a.safetensors": b"version https://git-lfs.github.com/spec/v1\n"}, "a.safetensors: "),
}


@pytest.mark.parametrize(("files", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_repo_is_refused(files: dict[str, bytes], message: str) -> None:
    """One error that names the file and what is wrong, before any weight is read."""
    with pytest.raises(CheckpointError) as caught:
        scan(files)
    assert message in str(caught.value)


def test_the_unbroken_repo_is_read() -> None:
    """The files that the broken ones were made from are fine."""
    assert sorted(scan(FULL).groups[0].tensors) == ["x", "y"]


@given(cut=st.integers(0, 10**6), name=st.sampled_from(sorted(FULL)))
def test_a_file_cut_anywhere_is_refused(cut: int, name: str) -> None:
    """Every prefix of every file of a checkpoint is noticed."""
    files = dict(FULL)
    files[name] = files[name][: cut % len(files[name])]
    with pytest.raises(CheckpointError):
        scan(files)


def test_the_identity_follows_every_file_that_matters() -> None:
    """Another byte in a shard, in the config or in a carried file is another checkpoint; a rerun is the same."""
    files = checkpoint_files(TWO, {"a": 1}) | {"tokenizer.json": b"{}"}
    first = scan(files).identity
    assert scan(dict(reversed(files.items()))).identity == first
    for name, data in files.items():
        changed = data[:-1] + bytes([data[-1] ^ 1]) if name.endswith(".safetensors") else data + b" "
        assert scan(files | {name: changed}).identity != first
    renamed = without(files, "tokenizer.json") | {"merges.txt": b"{}"}
    assert scan(renamed).identity != first
    beside = {"README.md": b"a better card", ".gitattributes": b"*.bin filter=lfs"}
    assert scan(files | beside).identity == first


def test_other_files_are_listed() -> None:
    """What is neither shard nor index is offered to be carried along, config.json among it."""
    files = checkpoint_files(TWO, {"a": 1}) | {"sub/tokenizer.json": b"{}"}
    assert scan(files).files == {"config.json": len(files["config.json"]), "sub/tokenizer.json": 2}
