"""What a cell shows, twice: HTML without scripts, style sheets or colours of its own, and text of 80 columns.

Names come from checkpoints and repos of strangers: everything is escaped, control characters are spelled out.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise, zip_longest
from typing import Any

COLUMNS = 80
ROWS = 24
"""Rows of a table that HTML shows at once; the others are folded away."""
LEAST = 4
"""Characters of a text column at least."""
CELL = "padding:.15em .7em;text-align:{};vertical-align:top"
TABLE = "border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.6em 0"
LINK = "text-decoration:underline"
"""Inside of widgets a link has the colour of text."""
RULE = "border-bottom:1px solid #808080"
FLEX = "display:flex;gap:.7em;"
BLOCK = '<div style="margin:.5em 0">{}</div>'
LABEL = "flex:none;width:{:.1f}em"
SHORT, LONG = 5.5, 14.0
"""Width of the labels in front of lines, and of long ones in front of bars."""


@dataclass(frozen=True, slots=True)
class Heading:
    """The first line."""

    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """A sentence or two; with a label, like `size`, in front."""

    text: str
    label: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under heads; columns of numbers are set to the right.

    title  summary of a table that is folded away in HTML; text shows it in full
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""


@dataclass(frozen=True, slots=True)
class Bars:
    """Shares of a whole: label, share from 0 to 1, what it is."""

    rows: Sequence[tuple[str, float, str]]


@dataclass(frozen=True, slots=True)
class Command:
    """A line to copy."""

    text: str


@dataclass(frozen=True, slots=True)
class Link:
    """An address to open."""

    url: str
    label: str = "link"


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG for HTML; text says the same in other parts."""

    png: bytes
    alt: str


Part = Heading | Line | Table | Bars | Command | Link | Picture


class Pane:
    """Parts in order; Jupyter shows it by itself, `print` shows its text."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self.parts = tuple(parts)

    def __str__(self) -> str:
        return pane_text(self.parts)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return bundle(self.parts)


def bundle(parts: Sequence[Part]) -> dict[str, str]:
    """Both forms, by MIME type."""
    return {"text/html": pane_html(parts), "text/plain": pane_text(parts)}


def clean(text: object) -> str:
    """Text whose control characters cannot move a cursor, end a line or turn the writing direction."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


# --- text ---------------------------------------------------------------------------------------------


def pane_text(parts: Sequence[Part]) -> str:
    """Parts with an empty line between them, at most 80 columns wide."""
    blocks = [_text(part) for part in parts]
    lines = ["\n" if is_line(a) and is_line(b) else "\n\n" for a, b in pairwise(parts)]
    shown = [f"{block}{gap if block else ''}" for block, gap in zip_longest(blocks, lines, fillvalue="")]
    return "".join(shown).rstrip("\n")


def is_line(part: Part) -> bool:
    """Does it follow another line without a gap?"""
    return isinstance(part, Line | Link)


def _text(part: Part) -> str:
    if isinstance(part, Heading):
        return "\n".join(wrap(part.text, COLUMNS))
    if isinstance(part, Line):
        return labelled(part.label, part.text)
    if isinstance(part, Link):
        return labelled(part.label, part.url)
    if isinstance(part, Table):
        return text_table(part)
    if isinstance(part, Bars):
        width = max((len(clean(label)) for label, _, _ in part.rows), default=0)
        width = min(width, 24)
        return "\n".join(
            f"{cut(label, width).ljust(width)}  {'#' * round(24 * min(1.0, share)):24}  {cut(what, 28)}".rstrip()
            for label, share, what in part.rows
        )
    return "\n".join(wrap(part.text, COLUMNS)) if isinstance(part, Command) else ""


def labelled(label: str, text: str) -> str:
    """`size    1 GB -> 0.3 GB`, wrapped under itself."""
    indent = 8 if label else 0
    first, *more = wrap(text, COLUMNS - indent) or [""]
    return "\n".join([label.ljust(indent) + first, *(" " * indent + line for line in more)])


def cut(text: object, width: int) -> str:
    """At most `width` characters, the middle left out."""
    found = clean(text)
    if len(found) <= width:
        return found
    head = (width - 3) // 2
    return found[:head] + "..." + found[len(found) - (width - 3 - head) :]


def wrap(text: object, width: int) -> list[str]:
    """Lines of at most `width` characters; names are broken after a dot or a slash where that is possible."""
    spaced = clean(text)
    lines: list[str] = []
    for line in textwrap.wrap(spaced, width, break_long_words=False, break_on_hyphens=False) or [""]:
        rest = line
        while len(rest) > width:
            at = max(rest.rfind(c, 0, width) for c in "./ ") + 1
            at = at if at > width // 3 else width
            lines.append(rest[:at].rstrip())
            rest = rest[at:]
        lines.append(rest)
    return lines


def text_table(table: Table, columns: int = COLUMNS) -> str:
    """Columns padded to their widest entry; where that is too wide, the widest columns wrap."""
    cells = [[clean(c) for c in row] for row in table.rows]
    if not cells:
        return ""
    heads = [clean(head) for head in table.heads]
    widths = [max(len(row[at]) for row in [heads, *cells]) for at in range(len(heads))]
    while sum(widths) + 2 * (len(widths) - 1) > columns and max(widths) > LEAST:
        widths[widths.index(max(widths))] -= 1
    right = _numeric(cells, len(heads))
    lines = wrap(f"{table.title}:", columns) if table.title else []
    lines += [*_row(heads, widths, right), "  ".join("-" * width for width in widths)]
    for row in cells:
        lines += _row(row, widths, right)
    return "\n".join(lines)


def _row(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    wrapped = [wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
    return [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in zip_longest(*wrapped, fillvalue="")
    ]


def _numeric(cells: Sequence[Sequence[str]], count: int) -> list[bool]:
    return [all(row[at][:1].isdigit() or row[at] in ("", "-") for row in cells) for at in range(count)]


# --- HTML ---------------------------------------------------------------------------------------------


def pane_html(parts: Sequence[Part]) -> str:
    """Parts in one div; text and lines take their colours from the theme."""
    return f'<div style="max-width:62em;line-height:1.5">{"".join(map(_html, parts))}</div>'


def _html(part: Part) -> str:
    if isinstance(part, Heading):
        return BLOCK.format(f"<b>{safe(part.text)}</b>")
    if isinstance(part, Line):
        return _labelled_html(part.label, safe(part.text)) if part.label else f"<div>{safe(part.text)}</div>"
    if isinstance(part, Command):
        return f'<pre style="margin:.5em 0;background:none;color:inherit"><code>{safe(part.text)}</code></pre>'
    if isinstance(part, Link):
        return _labelled_html(part.label, _anchor(part.url))
    if isinstance(part, Picture):
        from base64 import b64encode

        data = b64encode(part.png).decode()
        return f'<img style="max-width:100%" alt="{safe(part.alt)}" src="data:image/png;base64,{data}">'
    if isinstance(part, Bars):
        width = max(SHORT, min(LONG, max((0.55 * len(clean(label)) for label, _, _ in part.rows), default=0.0)))
        return BLOCK.format("".join(_bar(*row, width) for row in part.rows)) if part.rows else ""
    return _html_table(part)


def safe(text: object) -> str:
    """Escaped for text and for attributes in quotes."""
    return escape(clean(text), quote=True)


def _anchor(url: str) -> str:
    """A link where the address is one of the web's, else its text: `javascript:` is an address too."""
    if url.startswith(("https://", "http://")):
        return f'<a style="{LINK}" href="{safe(url)}" target="_blank" rel="noopener">{safe(url)}</a>'
    return f"<code>{safe(url)}</code>"


def _labelled_html(label: str, content: str) -> str:
    """Label and content beside each other; a long content wraps beside its label."""
    return (
        f'<div style="{FLEX}"><b style="{LABEL.format(SHORT)}">{safe(label)}</b>'
        f'<span style="min-width:0;overflow-wrap:anywhere">{content}</span></div>'
    )


def _bar(label: str, share: float, what: str, width: float) -> str:
    filled = 100 * min(1.0, max(0.0, share))
    inside = f'<div style="width:{filled:.1f}%;height:.6em;background:currentColor;opacity:.6"></div>'
    return (
        f'<div style="{FLEX}align-items:center;font-variant-numeric:tabular-nums">'
        f'<span style="{LABEL.format(width)}">{safe(label)}</span>'
        f'<div style="flex:0 1 16em;border:1px solid #808080">{inside}</div><span>{safe(what)}</span></div>'
    )


def _html_table(table: Table) -> str:
    cells = [[clean(c) for c in row] for row in table.rows]
    if not cells:
        return ""
    right = _numeric(cells, len(table.heads))
    shown = "" if table.title else _rows_html(table.heads, cells[:ROWS], right)
    rest = cells if table.title else cells[ROWS:]
    if rest:
        summary = table.title or f"{len(rest):,} more"
        shown += f"<details><summary>{safe(summary)}</summary>{_rows_html(table.heads, rest, right)}</details>"
    return shown


def _rows_html(heads: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    styles = [CELL.format("right" if r else "left") for r in right]
    head = "".join(f'<th style="{style};{RULE}">{safe(h)}</th>' for h, style in zip(heads, styles, strict=True))
    body = ""
    for row in cells:
        inside = "".join(f'<td style="{style}">{safe(c)}</td>' for c, style in zip(row, styles, strict=True))
        body += f"<tr>{inside}</tr>"
    return f'<table style="{TABLE}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
