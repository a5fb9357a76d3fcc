"""The panel of widgets as somebody at the keyboard and the mouse sees it."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.browser.lab import STEP, WORK, Lab

if TYPE_CHECKING:
    from playwright.sync_api import Locator

BUTTONS = ("Search", "Plan", "Run", "Pause")
FIELDS = ("Search", "Source", "Output", "Scheme", "Layout", "attention too", "text only", "private repo")
"""What a screen reader calls them."""


class Panel:
    """The panel that a cell of the notebook shows."""

    def __init__(self, lab: Lab, cell: Locator) -> None:
        self._lab, self.cell = lab, cell
        self.box = cell.locator(".jp-OutputArea .widget-vbox").first

    def button(self, name: str) -> Locator:
        """One of BUTTONS."""
        return self.box.get_by_role("button", name=name, exact=True)

    def field(self, name: str) -> Locator:
        """What has this label."""
        return self.box.get_by_label(name, exact=True)

    def says(self, text: str | re.Pattern[str], seconds: float = STEP) -> Locator:
        """Wait until it shows a text."""
        found = self.box.get_by_text(text).first
        found.wait_for(timeout=1000 * seconds)
        return found

    def idle(self, seconds: float = WORK) -> None:
        """Wait until what a button started has ended."""
        ready = self.box.locator("button:enabled", has_text=re.compile("^Run$"))
        ready.wait_for(timeout=1000 * seconds)

    def tab_order(self, steps: int) -> list[str]:
        """Names of what has the focus, from the search field on, pressing Tab so often."""
        name = "e => e.labels?.length ? e.labels[0].textContent : e.textContent"
        self.field("Search").focus()
        found = []
        for _ in range(steps):
            found.append(str(self._lab.page.evaluate(f"() => ({name})(document.activeElement)")).strip())
            self._lab.page.keyboard.press("Tab")
        return found


def bars(where: Locator) -> dict[str, float]:
    """Name of each progress bar -> percent, as drawn."""
    found: dict[str, float] = {}
    for row in where.locator(".widget-hbox").filter(has=where.page.locator(".progress-bar")).all():
        style = row.locator(".progress-bar").get_attribute("style") or ""
        width = re.search(r"width: ([\d.]+)%", style)
        found[row.locator("div.widget-label").inner_text()] = float(width[1]) if width else 0.0
    return found


@contextmanager
def slow_downloads(lab: Lab, rate: float) -> Iterator[None]:
    """Bytes a second that the notebook's embedded Hub sends while the block runs."""
    port = next(lab.folder.glob("devhub/*/port")).read_text(encoding="ascii")

    def tune(value: float) -> Any:
        url = f"http://127.0.0.1:{port}/_devhub/settings"
        request = urllib.request.Request(url, json.dumps({"bandwidth_down": value}).encode(), method="POST")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=STEP) as response:
            return json.load(response)

    tune(rate)
    try:
        yield
    finally:
        tune(0.0)
