"""The sink in memory keeps the contract."""

from __future__ import annotations

import pytest

from mso_hub.sink import MemorySink, Sink
from tests.sink.contract import SinkContract


class TestMemorySink(SinkContract):
    """Every run uses the same object."""

    @pytest.fixture(autouse=True)
    def _place(self) -> None:
        self.sink = MemorySink()

    def open(self) -> Sink:
        """The object itself: what it holds is what an earlier run left."""
        return self.sink

    def visible(self) -> dict[str, bytes]:
        """Its files."""
        return self.sink.files

    def test_it_lies_in_no_folder(self) -> None:
        """Nobody may take it for a folder on this machine."""
        assert self.sink.path is None
        assert self.sink.name == self.sink.address == "memory"
