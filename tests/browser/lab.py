"""JupyterLab with one notebook in a headless browser, and what a failure leaves in `artifacts/`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ROOT / "artifacts"
"""Screenshots of every run; of one that failed also the browser's console and the server's log."""
START, STEP, WORK = 90.0, 60.0, 180.0
"""Seconds that a server, a click and the cells of a notebook may take on a busy machine."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VIEWPORT: Any = {"width": 1180, "height": 1240}
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is in the page, also out of sight
}
CELL = ".jp-Notebook .jp-CodeCell"
PROMPT = f"{CELL} .jp-InputArea-prompt"
ERRORS = "[data-mime-type='application/vnd.jupyter.error'], [data-mime-type='application/vnd.jupyter.stderr']"


def find_browser() -> str:
    """MSO_CHROMIUM, or the first one on PATH; RuntimeError that says how to get one."""
    found = os.environ.get("MSO_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        raise RuntimeError(f"{', '.join(BROWSERS)}: none is on PATH; run tools/install_browser.sh, or set MSO_CHROMIUM")
    return found


class Lab:
    """A notebook that is open in JupyterLab.

    page     playwright's
    folder   where the notebook lies and its kernel works
    console  what the browser's console said: its kind, its text
    """

    def __init__(self, page: Page, folder: Path) -> None:
        self.page, self.folder = page, folder
        self.console: list[tuple[str, str]] = []
        page.set_default_timeout(1000 * STEP)
        page.on("console", lambda message: self.console.append((message.type, message.text)))
        page.on("pageerror", lambda error: self.console.append(("error", str(error))))

    def menu(self, *path: str) -> None:
        """Click through the menu bar: `Run`, `Run All Cells`."""
        self.page.locator("#jp-MainMenu .lm-MenuBar-itemLabel", has_text=path[0]).click()
        for depth, label in enumerate(path[1:]):
            item = self.page.locator(".lm-Menu").nth(depth).locator(".lm-Menu-item", has=self._exactly(label))
            item.click()

    def _exactly(self, label: str) -> Locator:
        return self.page.locator(".lm-Menu-itemLabel").get_by_text(label, exact=True)

    def run_all(self) -> None:
        """Run all cells and wait until each is done; AssertionError where one has an error or writes to stderr."""
        self.menu("Run", "Run All Cells")
        ran = "prompt => /^\\[\\d+\\]:$/.test(prompt.textContent.trim())"
        wrong = f"document.querySelector(`{ERRORS}`)"
        self.until(PROMPT, f"all => {wrong} || (all.length > 0 && all.every({ran}))", WORK)
        shown = self.page.locator(ERRORS).all_inner_texts()
        assert not shown, "\n".join(shown)

    def until(self, selector: str, condition: str, seconds: float = STEP) -> None:
        """Until a condition in JavaScript holds for the list of all elements of a selector."""
        self.page.wait_for_function(
            f"selector => ({condition})([...document.querySelectorAll(selector)])", arg=selector, timeout=1000 * seconds
        )

    def cell(self, beginning: str) -> Locator:
        """The code cell with a line that begins like this."""
        line = self.page.locator(".cm-line").get_by_text(re.compile(f"^{re.escape(beginning)}"))
        return self.page.locator(CELL).filter(has=line)

    def picture(self, name: str, clip: Any = None) -> Path:
        """A screenshot in `artifacts/`, of the page or of a part of it."""
        ARTIFACTS.mkdir(exist_ok=True)
        path = ARTIFACTS / f"{name}.png"
        self.page.screenshot(path=path, clip=clip, animations="disabled")
        return path


@contextmanager
def opened(notebook: Path, folder: Path, scale: float = 1.0) -> Iterator[Lab]:
    """A copy of a notebook, opened in a JupyterLab of its own that runs in `folder`.

    scale  pixels of a screenshot for one of the page
    """
    from playwright.sync_api import sync_playwright

    for old in ARTIFACTS.glob("failed*"):
        old.unlink()
    home = folder / "home"
    work = folder / "notebooks"
    work.mkdir(parents=True)
    shutil.copy(notebook, work)
    with server(home, work) as address, sync_playwright() as play:
        options = [] if os.getuid() else ["--no-sandbox"]
        browser = play.chromium.launch(executable_path=find_browser(), args=options)
        try:
            yield from _with_evidence(browser, f"{address}/lab/tree/{notebook.name}", home, scale)
        finally:
            browser.close()


def _with_evidence(browser: Browser, url: str, home: Path, scale: float) -> Iterator[Lab]:
    """The page; when something fails, what it looked like and what was said."""
    page = browser.new_page(viewport=VIEWPORT, device_scale_factor=scale)
    lab = Lab(page, home.parent / "notebooks")
    try:
        page.route(re.compile("^https?://(?!127[.]0[.]0[.]1)"), _no_picture)
        page.goto(url, timeout=1000 * START)
        lab.until(PROMPT, "all => all.length > 0", START)
        page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for(timeout=1000 * START)
        if page.locator("#jp-left-stack").is_visible():
            page.keyboard.press("Control+b")
        yield lab
    except BaseException:
        lab.picture("failed")
        said = "\n".join(f"{kind}: {text}" for kind, text in lab.console)
        (ARTIFACTS / "failed-console.txt").write_text(said + "\n", encoding="utf-8")
        shutil.copy(home / "server.log", ARTIFACTS / "failed-server.log")
        sys.stderr.write(f"see {ARTIFACTS}: failed.png, failed-console.txt, failed-server.log\n")
        raise


def _no_picture(route: Any) -> None:
    """Badges of other sites: an empty picture, also where there is a network."""
    route.fulfill(status=200, content_type="image/svg+xml", body='<svg xmlns="http://www.w3.org/2000/svg"/>')


@contextmanager
def server(home: Path, work: Path) -> Iterator[str]:
    """JupyterLab on a free port of loopback, with settings of its own; without a token, for this machine only."""
    for name, values in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    words = [
        "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", "--ServerApp.token=",
        "--ServerApp.password=", f"--ServerApp.root_dir={work}", "--LabApp.extension_manager=readonly",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None",
    ]  # fmt: skip
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *words], cwd=work, env=_environment(home), stdout=log, stderr=log
        )
        try:
            yield _address(process, home)
        finally:
            process.terminate()
            try:
                process.wait(STEP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environment(home: Path) -> dict[str, str]:
    """Nothing of the user's: no settings, no login, no cache."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "HF_", "MSO_"))}
    private = {
        "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython",
        "HF_HOME": "hf", "XDG_CACHE_HOME": "cache",
    }  # fmt: skip
    return {**mine, **{name: str(home / place) for name, place in private.items()}, "OMP_NUM_THREADS": "1"}


def _address(process: subprocess.Popen[bytes], home: Path) -> str:
    """Where it listens, from the file that it writes when it does."""
    end = time.monotonic() + START
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        for path in (home / "runtime").glob("jpserver-*.json"):
            if url := json.loads(path.read_text(encoding="utf-8") or "{}").get("url"):
                return str(url).rstrip("/")
        time.sleep(0.05)
    said = (home / "server.log").read_text(encoding="utf-8", errors="replace")
    raise RuntimeError(f"JupyterLab did not start within {START:.0f} s:\n{said[-4000:]}")
