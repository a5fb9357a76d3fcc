"""A notebook of the repository, cell by cell in a fresh kernel, in a copy of its folder."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.notebook.kernels import Cell, Kernel, kernel

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NO_PROXY = "http://127.0.0.1:9"
"""A proxy that is not there: whatever leaves this machine fails."""
OFFLINE = {
    **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), NO_PROXY),
    "NO_PROXY": "", "no_proxy": "", "HF_TOKEN": "",
}  # fmt: skip


USER = "user"
"""Where the user's own caches are."""


@dataclass(frozen=True, slots=True)
class Ran:
    """A cell of a notebook and what it shows; `tags` are its own."""

    source: str
    tags: tuple[str, ...]
    cell: Cell
    seconds: float


class Book:
    """A notebook in a kernel; its next cell is the first one that has not run."""

    def __init__(self, place: Kernel, path: Path) -> None:
        self.kernel = place
        self.ran: list[Ran] = []
        self._left = [cell for cell in cells(path) if cell["cell_type"] == "code"]

    def run(self, until: str = "", *, setup: str = "") -> None:
        """All that is left, or up to the cell with such a line, which is not run; `setup` follows the parameters."""
        while self._left and not (until and until in self._left[0]["source"]):
            cell = self._left.pop(0)
            began = time.monotonic()
            tags = tuple(cell["metadata"].get("tags", ()))
            shown = self.kernel.cell(cell["source"])
            self.ran.append(Ran(cell["source"], tags, shown, time.monotonic() - began))
            if setup and "parameters" in tags:
                self.kernel.cell(setup)

    def skip(self) -> str:
        """Source of the next cell, which counts as run."""
        return str(self._left.pop(0)["source"])

    @property
    def text(self) -> str:
        """Everything that was shown, as text."""
        return "\n".join(ran.cell.text for ran in self.ran)

    @property
    def seconds(self) -> float:
        """Of all cells."""
        return sum(ran.seconds for ran in self.ran)

    def value(self, expression: str) -> Any:
        """A value of the kernel, by way of JSON."""
        return json.loads(self.kernel.cell(f"import json; print(json.dumps({expression}))").text)


def cells(path: Path) -> list[dict[str, Any]]:
    """Cells with their sources as one text."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in found]


@contextmanager
def opened(name: str, folder: Path, env: Mapping[str, str] | None = None) -> Iterator[Book]:
    """A notebook (the beginning of its name is enough) in a fresh kernel, offline unless `env` says otherwise."""
    path = next(path for path in NOTEBOOKS if path.name.startswith(name))
    folder.mkdir(exist_ok=True)
    shutil.copy(path, folder)
    home = {"HF_HOME": str(folder / USER / "huggingface"), "XDG_CACHE_HOME": str(folder / USER)}
    with kernel(folder, {**home, **OFFLINE, **(env or {})}) as place:
        yield Book(place, path)


def require_readable(book: Book) -> None:
    """No error stream, no line beyond 80 columns, none that moves the cursor."""
    for ran in book.ran:
        assert not [output for output in ran.cell.outputs if output.get("name") == "stderr"], ran.cell.text
        wide = [line for line in ran.cell.text.split("\n") if len(line) > 80 or "\r" in line]
        assert not wide, f"{ran.source}\n{wide}"
