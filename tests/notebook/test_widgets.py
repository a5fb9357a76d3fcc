"""Progress as widgets, and the picture of a report, without a kernel; tests/browser looks at them in JupyterLab."""

from __future__ import annotations

import io
from typing import Any

import pytest

from mso_hub.notebook.heat import Heat
from mso_hub.notebook.plot import SPELLED, draw, png
from mso_hub.notebook.track import Progress, Snapshot
from mso_hub.notebook.views import Widgets, status

ipywidgets = pytest.importorskip("ipywidgets")
pytest.importorskip("matplotlib")
SIZES = (("nvfp4", 100, 28), ("as it was", 50, 50))


def at(state: str, *bars: Progress) -> Snapshot:
    return Snapshot(bars, state, 61.0, 0.0, None, 0)


def rows(box: Any) -> list[str]:
    """Names of bars, and what other lines say, from top to bottom."""
    return [child.children[0].value if hasattr(child, "children") else child.value for child in box.children]


def test_a_bar_that_comes_late_takes_its_place() -> None:
    """What there is to hash is known after what there is to compare."""
    view = Widgets(ipywidgets.VBox())
    view.draw(at("reading headers", Progress("check", 0, 9)))
    assert rows(view.box) == ["check", "reading headers, 1:01 so far"]
    view.draw(at("checking hashes", Progress("hash", 4, 8), Progress("check", 0, 9)))
    assert rows(view.box) == ["hash", "check", "checking hashes, 1:01 so far"]
    assert [row.children[1].value for row in view.box.children[:2]] == [50.0, 0.0]


def test_a_second_view_draws_below_the_first() -> None:
    box = ipywidgets.VBox()
    Widgets(box).draw(at("done", Progress("read", 9, 9)))
    Widgets(box).draw(at("reading headers", Progress("check", 0, 9)))
    assert rows(box) == ["read", "done, after 1:01", "check", "reading headers, 1:01 so far"]


@pytest.mark.parametrize(("state", "style"), [("done", "success"), ("paused", "warning"), ("stopped", "danger")])
def test_how_it_ended_has_a_colour_and_a_word(state: str, style: str) -> None:
    view = Widgets(ipywidgets.VBox())
    view.draw(at("encoding", Progress("read", 1, 9)))
    bar = view.box.children[0].children[1]
    assert bar.bar_style == ""
    view.draw(at(state, Progress("read", 9, 9)), last=True)
    assert bar.bar_style == style
    assert status(at(state)) == f"{state}, after 1:01"


def heat(layers: int, first: float) -> Heat:
    names = tuple(map(str, range(layers)))
    return Heat(names, ("a", "b"), {(name, kind): first for name in names for kind in ("a", "b")})


@pytest.mark.parametrize(("error", "shown"), [(0.00663, "0.663"), (0.000012, "0.00120"), (0.25, "25.0"), (0.0, "0")])
def test_a_small_grid_spells_its_numbers(error: float, shown: str) -> None:
    figure = draw(heat(3, error), SIZES, "where")
    assert {text.get_text() for text in figure.axes[0].texts} == {shown}
    assert len(figure.axes[0].texts) == 6
    assert not list(draw(heat(SPELLED[0] + 1, error), SIZES, "where").axes[0].texts)


def test_a_cell_without_a_number_stays_empty() -> None:
    """A layer without such a weight, and one whose error is infinite."""
    found = Heat(("0", "1"), ("a", "b"), {("0", "a"): 0.01, ("1", "b"): float("inf")})
    assert [text.get_text() for text in draw(found, SIZES, "").axes[0].texts] == ["1.00"]


def test_the_picture_has_a_title_where_nothing_else_says_of_what() -> None:
    titled, bare = (draw(heat(2, 0.01), SIZES, title) for title in ("hf://me/out", ""))
    assert titled.get_suptitle() == "hf://me/out"
    assert bare.get_suptitle() == ""
    assert io.BytesIO(png(bare)).read(8) == b"\x89PNG\r\n\x1a\n"
