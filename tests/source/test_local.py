"""A folder as a source: the contract, links, caches, and names that no repo can hold."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from mso_hub.errors import CheckpointError
from mso_hub.source import LocalSource, Source, open_source, read_checkpoint
from tests.helpers import random_tensor, tiny_llama, write_checkpoint, write_files
from tests.source.contract import SourceContract


class TestLocalSource(SourceContract):
    """The contract, from files on disk."""

    def open_files(self, files: Mapping[str, bytes], folder: Path) -> Source:
        """The files below a folder."""
        return open_source(write_files(folder, files))


def test_the_stamp_of_a_rewritten_file_changes(tmp_path: Path) -> None:
    """Same size, other content, later time: a resumed run must notice."""
    source = open_source(write_files(tmp_path, {"a": b"one"}))
    before = source.stamp("a")
    (tmp_path / "a").write_bytes(b"two")
    os.utime(tmp_path / "a", ns=(1, 1))
    assert source.stamp("a") != before


def test_reads_a_folder_of_links_like_the_cache_of_the_hub(tmp_path: Path) -> None:
    """snapshots/COMMIT/model.safetensors -> ../../blobs/HASH is how huggingface_hub keeps a repo."""
    real = tiny_llama(tmp_path / "real")
    snapshot = tmp_path / "cache" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "cache" / "blobs").mkdir()
    for number, file in enumerate(sorted(real.iterdir())):
        blob = tmp_path / "cache" / "blobs" / f"{number:064x}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    checkpoint = read_checkpoint(open_source(snapshot))
    assert len(checkpoint.shards) == 2
    assert checkpoint.config["model_type"] == "llama"


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "sub/x.json"])
def test_a_link_to_nothing_is_an_error(name: str, tmp_path: Path) -> None:
    """A half deleted cache must not look like a checkpoint with fewer files."""
    write_checkpoint(tmp_path, {"a.safetensors": {"x": random_tensor(2)}})
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to("../blobs/gone")
    with pytest.raises(CheckpointError, match=r"link points at '\.\./blobs/gone', which does not exist"):
        read_checkpoint(open_source(tmp_path))


def test_a_link_to_itself_is_an_error(tmp_path: Path) -> None:
    """A loop ends with a message."""
    (tmp_path / "a.safetensors").symlink_to("a.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_source(tmp_path).files()


@pytest.mark.parametrize("folder", [".git", ".cache/huggingface", "__pycache__", "sub/.ipynb_checkpoints"])
def test_version_control_and_caches_are_not_part_of_a_repo(folder: str, tmp_path: Path) -> None:
    """Not even when a broken shard lies in them."""
    write_checkpoint(tmp_path, {"a.safetensors": {"x": random_tensor(2)}})
    write_files(tmp_path, {f"{folder}/b.safetensors": b"junk"})
    assert list(read_checkpoint(open_source(tmp_path)).shards) == ["a.safetensors"]


def test_hidden_files_are_part_of_a_repo(tmp_path: Path) -> None:
    """.gitattributes says which files are large: it comes along."""
    source = open_source(write_files(tmp_path, {".gitattributes": b"*.safetensors filter=lfs"}))
    assert list(source.files()) == [".gitattributes"]


def test_a_named_pipe_is_passed_over(tmp_path: Path) -> None:
    """Opening one would wait for ever."""
    write_checkpoint(tmp_path, {"a.safetensors": {"x": random_tensor(2)}})
    os.mkfifo(tmp_path / "b.safetensors")
    assert list(read_checkpoint(open_source(tmp_path)).shards) == ["a.safetensors"]


def test_a_file_name_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    """No repo can hold such a name, and no JSON either."""
    (tmp_path / os.fsdecode(b"bad\xff.txt")).write_bytes(b"")
    with pytest.raises(CheckpointError, match="must be UTF-8") as caught:
        open_source(tmp_path).files()
    str(caught.value).encode()


def test_reading_needs_a_folder(tmp_path: Path) -> None:
    """A path that is not there and a path of a file: the error says which."""
    write_checkpoint(tmp_path, {"a.safetensors": {"x": random_tensor(2)}})
    with pytest.raises(CheckpointError, match="found nothing there"):
        open_source(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="found a file there"):
        open_source(tmp_path / "a.safetensors")
    assert isinstance(open_source(str(tmp_path)), LocalSource)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """Sizes are taken once; a shard cut afterwards is found when its bytes are missing."""
    write_checkpoint(tmp_path, {"a.safetensors": {"x": random_tensor(64)}})
    source = open_source(tmp_path)
    info = read_checkpoint(source).groups[0].tensors["x"]
    os.truncate(tmp_path / "a.safetensors", info.end - 1)
    with pytest.raises(CheckpointError, match="it changed while it was read"):
        source.read(info.file, info.begin, info.end)


def test_linked_folders_come_along_and_loops_are_refused(tmp_path: Path) -> None:
    """A folder that is a link belongs to the repo; a link to a folder above it would never end."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "notes.txt").write_text("kept")
    repo = tmp_path / "repo"
    repo.mkdir()
    (repo / "docs").symlink_to(tmp_path / "elsewhere")
    assert LocalSource(repo).files() == {"docs/notes.txt": 4}
    (repo / "loop").symlink_to(repo)
    with pytest.raises(CheckpointError, match="loop: the link leads back"):
        LocalSource(repo).files()
