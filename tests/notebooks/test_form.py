"""What a notebook of the repository looks like: same frame, stripped, short, no token, links that lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.notebooks.running import NOTEBOOKS, ROOT, cells

nbformat = pytest.importorskip("nbformat", reason="needs nbformat, nbclient and ipykernel")

TOOL = ROOT / "tools" / "notebooks.py"
BUDGET = 15
TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}|Bearer\s|(?i:token|password|secret)\s*=\s*[\"'][^\"']")
LINK = re.compile(r"\]\(([^)\s]+)\)")

every = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def tagged(path: Path, tag: str) -> list[int]:
    return [at for at, cell in enumerate(cells(path)) if tag in cell["metadata"].get("tags", ())]


def test_they_are_numbered_without_a_gap() -> None:
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{at:02}_" for at in range(8)]


def test_nothing_is_left_for_the_tool_to_do() -> None:
    """Badges, install and login cells, stripped outputs: python tools/notebooks.py renews them."""
    done = subprocess.run([sys.executable, str(TOOL), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@every
def test_it_is_a_valid_notebook_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        assert cell.outputs == []
        assert cell.execution_count is None


@every
def test_it_is_short(path: Path) -> None:
    found = cells(path)
    assert len(found) < BUDGET
    assert all(len(cell["source"].splitlines()) <= 12 for cell in found)


@every
def test_no_cell_holds_a_token(path: Path) -> None:
    assert not TOKEN.findall(path.read_text(encoding="utf-8"))


@every
def test_every_notebook_begins_alike(path: Path) -> None:
    """Title and badges, install, parameters, login."""
    title, install, parameters, login, *_ = cells(path)
    assert title["source"].startswith(f"# {path.name[:2]} ")
    assert title["source"].count(f"blob/main/notebooks/{path.name}") == 2
    assert "colab.research.google.com" in title["source"]
    assert "kaggle.com" in title["source"]
    assert [tagged(path, tag) for tag in ("install", "parameters", "login")] == [[1], [2], [3]]
    first = parameters["source"].splitlines()[0]
    assert first.startswith(f'HUB = "devhub/{path.name[:2]}"  # the line to change')
    assert "mso_hub" in install["source"]
    assert "use_hub(HUB)" in login["source"]


@every
def test_every_notebook_ends_alike(path: Path) -> None:
    """Assertions, then what comes next; a notebook that makes a repo says how to serve it."""
    *_, before, last = cells(path)
    assert before["cell_type"] == "code"
    assert "assert " in before["source"]
    assert last["source"].startswith("## Next step\n")
    following = NOTEBOOKS.index(path) + 1
    target = NOTEBOOKS[following].name if following < len(NOTEBOOKS) else "../README.md"
    assert f"({target})" in last["source"]
    runs = any(".run()" in cell["source"] for cell in cells(path))
    assert runs == ("```bash\nvllm serve " in last["source"])


@every
def test_every_link_inside_the_repository_leads_somewhere(path: Path) -> None:
    links = [link for cell in cells(path) for link in LINK.findall(cell["source"])]
    inside = [link for link in links if "://" not in link]
    assert inside
    assert not [link for link in inside if not (path.parent / link).is_file()]


def test_the_quickstart_needs_five_code_cells() -> None:
    assert sum(cell["cell_type"] == "code" for cell in cells(NOTEBOOKS[0])) == 5


def test_the_readme_lists_them_all() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\(notebooks/(\w+\.ipynb)\)", readme) == [path.name for path in NOTEBOOKS]
