"""Both forms of what a cell shows: text of 80 columns, and inert HTML in the colours of the theme."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mso_hub.notebook.panes import (
    COLUMNS,
    ROWS,
    Bars,
    Command,
    Heading,
    Line,
    Link,
    Pane,
    Part,
    Picture,
    Table,
    clean,
    pane_html,
    pane_text,
    wrap,
)

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</details></table></div><h1>",
    "&lt;already&gt;",
    "\x1b[2Jmodel\rname\n\u202eevil\u2066",
    "\ud800",
]
NAMES = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=200))
ALLOWED = {
    "div", "p", "b", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "pre", "code", "a", "span",
    "img",
}  # fmt: skip


class Reader(HTMLParser):
    """Which tags and attributes there are, what the text says, and that every tag is closed."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def every_part(name: str) -> list[Part]:
    return [
        Heading(name), Line(name, "note"), Line(name), Command(name), Link(name), Link(f"https://hub/{name}"),
        Table(("weights", name), [(name, 1), (name, 2)]), Table(("folded",), [(name,)], name),
        Bars([(name, 0.5, name), ("b", 2.0, "more than all")]), Picture(b"png", name),
    ]  # fmt: skip


@given(NAMES)
def test_names_are_text_and_nothing_else(name: str) -> None:
    """Whatever a tensor or a repo is called, the tags are ours, no attribute acts, and the name can be read."""
    found = read(pane_html(every_part(name)))
    assert found.tags <= ALLOWED
    assert {key for key, _ in found.attributes} <= {"style", "href", "target", "rel", "src", "alt"}
    for key, value in found.attributes:
        assert key != "href" or str(value).startswith("https://hub/")
        assert key != "src" or str(value).startswith("data:image/png;base64,")
    assert clean(name).strip() in found.text


@given(NAMES)
def test_text_fits_and_moves_no_cursor(name: str) -> None:
    text = pane_text(every_part(name))
    assert max(map(len, text.split("\n"))) <= COLUMNS
    assert all(c.isprintable() or c == "\n" for c in text)
    text.encode()


@given(NAMES, st.integers(8, 60))
def test_wrapping_loses_nothing_but_spaces(name: str, width: int) -> None:
    lines = wrap(name, width)
    assert max(map(len, lines)) <= width
    assert "".join("".join(lines).split()) == "".join(clean(name).split())


@pytest.mark.parametrize("columns", [2, 5, 9])
def test_wide_tables_wrap_and_keep_every_character(columns: int) -> None:
    rows = [[f"model.layers.{at}.a_name_of_column_{at}" for at in range(columns)]]
    text = pane_text([Table([f"h{at}" for at in range(columns)], rows)])
    assert max(map(len, text.split("\n"))) <= COLUMNS
    joined = sorted(re.sub(r"[\s-]", "", text))
    assert joined == sorted("".join([*(f"h{at}" for at in range(columns)), *rows[0]]))


def test_colours_are_those_of_the_theme() -> None:
    html = pane_html(every_part("name"))
    colours = re.findall(r"(?:background|color)\s*:\s*([^;\"]+)", html)
    assert set(colours) <= {"none", "inherit", "currentColor"}
    assert "<script" not in html
    assert "<link" not in html
    assert "<style" not in html


def test_long_tables_are_folded() -> None:
    """HTML shows some rows and folds the others away; text has them all."""
    pane = Pane([Table(("name", "n"), [(f"row{at}", at) for at in range(100)])])
    bundle = pane._repr_mimebundle_()
    shown, folded = bundle["text/html"].split("<details>")
    assert shown.count("<tr>") == ROWS + 1
    assert folded.count("<tr>") == 100 - ROWS + 1
    assert bundle["text/plain"].count("row") == 100
    assert str(pane) == bundle["text/plain"]


def test_an_address_is_a_link_only_on_the_web() -> None:
    assert "<a " not in pane_html([Link("javascript:alert(1)"), Link("/home/user/out")])
    assert 'href="https://hub/a"' in pane_html([Link("https://hub/a")])
