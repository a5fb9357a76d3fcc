"""Notebook 02 from a fresh JupyterLab to the end of its panel: the test of it, and where the README's picture is from.

python -m tests.browser.play     the same without pytest; the pictures lie in artifacts/
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.browser.lab import ARTIFACTS, ROOT, VIEWPORT, WORK, Lab, opened
from tests.browser.looks import faint, overflowing
from tests.browser.panel import BUTTONS, FIELDS, Panel, bars, slow_downloads

if TYPE_CHECKING:
    from playwright.sync_api import Locator

NOTEBOOK = ROOT / "notebooks" / "02_quantize.ipynb"
RUN = ("read", "encode", "upload", "commit")
CHECK = ("hash", "check")
SLOW = 1e6
"""Bytes a second while Pause is pressed: the small model has ten million."""
MARGIN, EDGE = 16, 3
"""Pixels around the panel's picture, and of the line above its cell."""
NARROW = 760
"""Pixels of a window in which everything must still fit."""
ALT = "img[alt*='relative squared error']"


def play(folder: Path) -> Path:
    """Run all, look at plan, run and report, then use the panel -> its picture; AssertionError where one is wrong."""
    with opened(NOTEBOOK, folder, scale=2) as lab:
        lab.run_all()
        look_at_plan(lab.cell("job = mso_hub.Job("))
        look_at_run(lab.cell("job.run()"))
        look_at_report(lab.cell("job.report"), lab)
        panel = Panel(lab, lab.cell("panel = "))
        use_keyboard(panel, lab)
        pause_and_go_on(panel, lab)
        shot = whole(panel, lab)
        look_around(lab)
        return shot


def look_at_plan(cell: Locator) -> None:
    """Table, sizes, time and memory, the line that serves it."""
    table = cell.locator("table").first
    assert [head.strip() for head in table.locator("th").all_inner_texts()] == [
        "weights", "become", "count", "before", "after", "left",
    ]  # fmt: skip
    assert "model.layers.N.mlp.experts.N.down_proj" in table.inner_text()
    shown = cell.locator(".jp-OutputArea").inner_text()
    for word in ("before", "after", "bits", "time", "memory", "vllm serve dev/tiny-qwen3-moe-NVFP4"):
        assert word in shown, f"{word!r} is not in\n{shown}"


def look_at_run(cell: Locator) -> None:
    """Bars at their end, and what was made."""
    assert bars(cell) == dict.fromkeys(RUN, 100.0)
    cell.get_by_text(re.compile(r"^done: 112 weights, .* -> ")).wait_for()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/dev/tiny-qwen3-moe-NVFP4", href(cell))


def look_at_report(where: Locator, lab: Lab) -> None:
    """No problems, a picture that was drawn, link, the line that serves it."""
    where.get_by_text("no problems found").wait_for()
    where.locator(ALT).wait_for()
    drawn = where.locator(ALT).evaluate("image => [image.complete, image.naturalWidth, image.clientWidth]")
    assert drawn[0], drawn
    assert drawn[1] > drawn[2] > 600, f"pixels of the picture and on the page: {drawn[1:]}"
    assert "/dev/tiny-qwen3-moe-NVFP4" in href(where)
    assert where.locator("pre", has_text="vllm serve dev/tiny-qwen3-moe-NVFP4").is_visible()
    folded = where.locator("details").first
    folded.locator("summary").click()
    assert folded.locator("table").is_visible()
    folded.locator("summary").click()


def href(where: Locator) -> str:
    """Address behind the link to the output."""
    return where.locator("a[href^=http]").last.get_attribute("href") or ""


def use_keyboard(panel: Panel, lab: Lab) -> None:
    """Every field has a name, Tab goes from top to bottom, and Space presses a button."""
    for name in FIELDS:
        assert panel.field(name).is_visible(), name
    for name in BUTTONS:
        assert panel.button(name).is_visible(), name
    assert panel.button("Pause").is_disabled()
    wanted = ["Search", *FIELDS[:1], *FIELDS[1:], "Plan", "Run"]
    assert panel.tab_order(len(wanted)) == wanted
    panel.field("attention too").check()
    panel.button("Plan").focus()
    lab.page.keyboard.press("Space")
    panel.says("this is the plan; nothing was written")
    panel.idle()
    for kind in ("mlp.experts.N.down_proj", "self_attn.v_proj"):
        assert kind in panel.box.locator("table").first.inner_text()
    assert bars(panel.box) == {}


def pause_and_go_on(panel: Panel, lab: Lab) -> None:
    """Pause in the middle, then Run to the end: bars, report, link."""
    with slow_downloads(lab, SLOW):
        panel.button("Run").click()
        panel.says(re.compile(r"^[1-5] of 6 shards stored$"), WORK)
        panel.button("Pause").click()
        panel.says(re.compile("^paused: what is complete is kept; press Run to go on"))
        panel.idle()
    stopped = bars(panel.box)
    assert tuple(stopped) == RUN
    assert 0 < stopped["encode"] < 100, stopped
    lab.picture("paused")
    panel.button("Run").click()
    panel.says(re.compile(r"^done: http"), WORK)
    panel.idle()
    assert bars(panel.box) == dict.fromkeys((*RUN, *CHECK), 100.0)
    assert panel.button("Pause").is_disabled()
    look_at_report(panel.box, lab)
    assert href(panel.box).endswith("/dev/tiny-qwen3-moe-NVFP4-panel")


def whole(panel: Panel, lab: Lab) -> Path:
    """A picture of the panel from its line of code to the end of the plot, without the frame of the active cell."""
    lab.page.set_viewport_size({"width": VIEWPORT["width"], "height": 2000})
    lab.page.get_by_role("heading", name="Next step").click()
    panel.cell.evaluate("cell => cell.scrollIntoView({block: 'start'})")
    top, plot = panel.cell.bounding_box(), panel.box.locator(ALT).bounding_box()
    assert top is not None
    assert plot is not None
    left, above = top["x"], top["y"] + EDGE
    right, below = plot["x"] + plot["width"] + MARGIN, plot["y"] + plot["height"]
    clip = {"x": left, "y": above, "width": right - left, "height": below - above}
    shot = lab.picture("panel", clip=clip)
    lab.page.set_viewport_size(VIEWPORT)
    panel.cell.evaluate("cell => cell.scrollIntoView({block: 'start'})")
    return shot


def look_around(lab: Lab) -> None:
    """Both themes and a narrow window: everything can be read, nothing is cut off, the console is silent."""
    assert faint(lab) == []
    assert overflowing(lab) == []
    lab.picture("light")
    lab.menu("Settings", "Theme", "JupyterLab Dark")
    lab.page.locator("body[data-jp-theme-light=false]").wait_for(state="attached")
    assert faint(lab) == []
    lab.picture("dark")
    lab.page.set_viewport_size({"width": NARROW, "height": 1000})
    assert overflowing(lab) == []
    lab.picture("narrow")
    said = [text for kind, text in lab.console if kind == "error"]
    assert said == [], "\n".join(said)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        play(Path(scratch) / "play")
    sys.stdout.write(f"pictures: {ARTIFACTS}\n")
