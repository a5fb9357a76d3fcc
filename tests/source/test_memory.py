"""A repo in memory: the contract, and its record of reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mso_hub.source import MemorySource, Source
from tests.source.contract import SourceContract


class TestMemorySource(SourceContract):
    """The contract, from bytes."""

    def open_files(self, files: Mapping[str, bytes], folder: Path) -> Source:
        """The files as they are."""
        return MemorySource(files)


def test_every_read_is_recorded() -> None:
    """Tests count passes over a tensor with this."""
    source = MemorySource({"a": b"abcdef"}, "there")
    source.read("a", 1, 3)
    source.read("a", 1, 3)
    assert source.reads == [("a", 1, 3), ("a", 1, 3)]
    assert (source.name, source.path) == ("there", None)


def test_the_stamp_is_the_content() -> None:
    """Equal bytes under two names have one stamp, and one bit changes it."""
    source = MemorySource({"a": b"same", "b": b"same", "c": b"sbme"})
    assert source.stamp("a") == source.stamp("b") != source.stamp("c")
