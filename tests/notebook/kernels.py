"""A real kernel, driven cell by cell as a notebook drives it, interrupted as its stop button does."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs nbformat, nbclient and ipykernel")
nbclient = pytest.importorskip("nbclient", reason="needs nbformat, nbclient and ipykernel")
pytest.importorskip("ipykernel", reason="needs nbformat, nbclient and ipykernel")

TIMEOUT = 90
TRAINED = Path(__file__).resolve().parents[1] / "models" / "tiny-qwen3-moe"
NO_WIDGETS = "import sys; sys.modules['ipywidgets'] = None"
"""How Python itself marks a module that is not there."""


class Kernel:
    """A kernel and the notebook that it runs."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def cell(self, source: str, *, fails: bool = False) -> Cell:
        """Run one more cell -> what it shows."""
        code = nbformat.v4.new_code_cell(source, metadata={"tags": ["raises-exception"] if fails else []})
        self.client.nb.cells.append(code)
        self.client.execute_cell(code, len(self.client.nb.cells) - 1)
        cell = Cell(code.outputs)
        assert fails == bool(cell.errors), cell.text
        return cell

    def interrupt_when(self, ready: Callable[[], bool]) -> threading.Thread:
        """Press stop as soon as something has happened, while a cell runs."""

        def press() -> None:
            end = time.monotonic() + TIMEOUT
            while not ready() and time.monotonic() < end:
                time.sleep(0.01)
            asyncio.run(self.client.km.interrupt_kernel())

        thread = threading.Thread(target=press, daemon=True)
        thread.start()
        return thread


class Cell:
    """What a cell shows."""

    def __init__(self, outputs: list[Any]) -> None:
        self.outputs = outputs

    @property
    def errors(self) -> list[Any]:
        """Outputs that are errors."""
        return [output for output in self.outputs if output.output_type == "error"]

    @property
    def text(self) -> str:
        """All text, as a reader without HTML sees it."""
        return "\n".join(
            "".join(output.get("text", "")) or output.get("data", {}).get("text/plain", "")
            or "\n".join(output.get("traceback", ()))
            for output in self.outputs
        )  # fmt: skip

    @property
    def html(self) -> str:
        """All HTML."""
        return "\n".join(output.get("data", {}).get("text/html", "") for output in self.outputs)

    @property
    def kinds(self) -> set[str]:
        """MIME types of what it displays."""
        return {kind for output in self.outputs for kind in output.get("data", {})}


@contextmanager
def kernel(folder: Path, env: Mapping[str, str] | None = None) -> Iterator[Kernel]:
    """A fresh kernel that works in `folder`; warnings of its cells are errors of the test."""
    notebook = nbformat.v4.new_notebook()
    client = nbclient.NotebookClient(notebook, timeout=TIMEOUT, resources={"metadata": {"path": str(folder)}})
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **(env or {})}
    with client.setup_kernel(env=settings):
        yield Kernel(client)


def shards_in(journal: Path) -> int:
    """Files that an unfinished output has so far."""
    return journal.read_text().count('"file"') if journal.is_file() else 0
