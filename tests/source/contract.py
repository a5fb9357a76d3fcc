"""What every Source must do; each backend's tests inherit this and provide `open_files`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from mso_hub.errors import CheckpointError
from mso_hub.source import Source, read_checkpoint
from tests.helpers import checkpoint_files, random_tensor

FILES = {"a.bin": bytes(range(200)), "deep/er/b.txt": b"text", "empty": b""}


class SourceContract:
    """Laws of `Source`."""

    @abstractmethod
    def open_files(self, files: Mapping[str, bytes], folder: Path) -> Source:
        """A source that holds these files; `folder` is empty and may be used."""

    def test_lists_every_file_with_its_size(self, tmp_path: Path) -> None:
        """Names are repo paths with forward slashes, in a stable order."""
        found = self.open_files(FILES, tmp_path).files()
        assert found == {name: len(data) for name, data in FILES.items()}
        assert list(found) == list(self.open_files(FILES, tmp_path).files())

    def test_reads_exactly_the_bytes_asked_for(self, tmp_path: Path) -> None:
        """Any range, the empty one and the whole file too."""
        source = self.open_files(FILES, tmp_path)
        for begin, end in ((0, 200), (0, 0), (17, 18), (199, 200), (200, 200), (50, 150)):
            assert source.read("a.bin", begin, end).tobytes() == FILES["a.bin"][begin:end]
        assert source.read("deep/er/b.txt", 0, 4).tobytes() == b"text"

    def test_what_it_reads_belongs_to_the_caller(self, tmp_path: Path) -> None:
        """A returned array is writable, and writing into it changes neither the source nor another read."""
        source = self.open_files(FILES, tmp_path)
        first = source.read("a.bin", 0, 10)
        assert first.dtype == np.uint8
        first[:] = 0
        assert source.read("a.bin", 0, 10).tobytes() == FILES["a.bin"][:10]

    @pytest.mark.parametrize(("begin", "end"), [(0, 201), (199, 300), (500, 501)])
    def test_a_short_file_is_an_error(self, begin: int, end: int, tmp_path: Path) -> None:
        """Bytes past the end are never made up."""
        source = self.open_files(FILES, tmp_path)
        with pytest.raises(CheckpointError, match=r"a\.bin: wanted bytes"):
            source.read("a.bin", begin, end)

    def test_a_missing_file_is_an_error(self, tmp_path: Path) -> None:
        """The error names the file."""
        with pytest.raises(CheckpointError, match=r"gone\.bin: cannot be read"):
            self.open_files(FILES, tmp_path).read("gone.bin", 0, 1)

    def test_the_stamp_follows_the_content(self, tmp_path: Path) -> None:
        """Another length is another stamp; the same file asked twice has the same one."""
        first = self.open_files(FILES, tmp_path / "1")
        longer = self.open_files(FILES | {"empty": b"x"}, tmp_path / "2")
        assert first.stamp("empty") == first.stamp("empty")
        assert first.stamp("empty") != longer.stamp("empty")

    def test_a_checkpoint_is_the_same_from_every_backend(self, tmp_path: Path) -> None:
        """Shards, groups and config do not depend on where the bytes come from."""
        shards = {
            "model-1.safetensors": {"model.norm.weight": random_tensor(8)},
            "model-2.safetensors": {"lm_head.weight": random_tensor(4, 8), "x": random_tensor(0, 3)},
        }
        source = self.open_files(checkpoint_files(shards, {"hidden_size": 8}), tmp_path)
        checkpoint = read_checkpoint(source)
        assert checkpoint.name == source.name
        assert checkpoint.config == {"hidden_size": 8}
        assert {n: [i.name for i in s.tensors] for n, s in checkpoint.shards.items()} == {
            "model-1.safetensors": ["model.norm.weight"],
            "model-2.safetensors": ["lm_head.weight", "x"],
        }
        for info in checkpoint.groups[0].tensors.values():
            expected = next(tensors[info.name] for tensors in shards.values() if info.name in tensors)
            assert info.shape == tuple(expected.shape)
            assert (
                source.read(info.file, info.begin, info.end).tobytes() == expected.view(torch.uint8).numpy().tobytes()
            )
