"""A notebook as most users meet it: opened in JupyterLab, Run all, then its buttons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="needs playwright and jupyterlab: make browser")
pytest.importorskip("jupyterlab", reason="needs playwright and jupyterlab: make browser")


def test_run_all_then_pause_and_finish_with_the_panel(tmp_path: Path) -> None:
    """Its parts, and what they wait for, are in play.py; what a failure leaves lies in artifacts/."""
    from tests.browser.play import play

    assert play(tmp_path / "play").is_file()


def test_a_cell_that_fails_is_seen_and_leaves_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above could not fail."""
    from tests.browser import lab

    found = json.loads((lab.ROOT / "notebooks" / "00_quickstart.ipynb").read_text(encoding="utf-8"))
    code = next(cell for cell in found["cells"] if cell["cell_type"] == "code")
    found["cells"] = [{**code, "id": f"cell-{at}", "source": source} for at, source in enumerate(("1", "2 // 0", "3"))]
    notebook = tmp_path / "fails.ipynb"
    notebook.write_text(json.dumps(found), encoding="utf-8")
    left = tmp_path / "artifacts"
    monkeypatch.setattr(lab, "ARTIFACTS", left)
    with pytest.raises(AssertionError, match="ZeroDivisionError"), lab.opened(notebook, tmp_path / "lab") as opened:
        opened.run_all()
    assert sorted(path.name for path in left.iterdir()) == ["failed-console.txt", "failed-server.log", "failed.png"]
    assert "Kernel started" in (left / "failed-server.log").read_text(encoding="utf-8")
