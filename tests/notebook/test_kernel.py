"""Cells in a real kernel: a job is shown, run, interrupted, run again, reported; with widgets and without."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub.utils import disable_progress_bars

import mso_hub
from mso_hub.hub.devhub import DevHub
from mso_hub.hub.devhub.seed import connect, seed
from mso_hub.notebook.views import EVERY
from mso_hub.plan import Recipe
from tests.notebook.kernels import NO_WIDGETS, TRAINED, Cell, kernel, shards_in
from tests.running import digests, journal, listing

RATE = 4e6
"""Bytes a second: the trained model takes a few seconds, so that there is a middle to interrupt."""
JOB = "import mso_hub; job = mso_hub.Job({!r}, {!r}, mode='all-linear')"


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an uninterrupted run makes."""
    out = tmp_path_factory.mktemp("wanted") / "out"
    mso_hub.convert(TRAINED, out, Recipe(mode="all-linear"))
    return digests(out)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[DevHub, dict[str, str]]]:
    """A slow Hub that holds the trained model, and the environment that finds it."""
    disable_progress_bars()
    with DevHub(tmp_path_factory.mktemp("hub")) as server:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the client's own, about its LFS requests
            patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
            seed(connect(server), "dev/tiny", TRAINED)
        server.set(bandwidth_down=RATE)
        home = tmp_path_factory.mktemp("home")
        yield server, {
            "HF_ENDPOINT": server.endpoint, "HF_TOKEN": server.token(), "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home / "cache"),
        }  # fmt: skip


def narrow(cell: Cell) -> None:
    """Every line of text fits into 80 columns, and none moves the cursor."""
    lines = cell.text.split("\n")
    assert not [line for line in lines if len(line) > 80 or "\r" in line]


def test_a_job_is_shown_run_and_reported(tmp_path: Path, wanted: dict[str, str]) -> None:
    out = tmp_path / "out"
    with kernel(tmp_path) as place:
        place.cell(JOB.format(str(TRAINED), "out"))
        assert listing(tmp_path) == []
        shown = place.cell("job")
        assert listing(tmp_path) == []
        place.cell("job.plan")
        ran = place.cell("job.run()")
        again = place.cell("job.run()")
        report = place.cell("job.report")
        plot = place.cell("figure = job.report.plot(); figure")
        place.cell("import matplotlib.pyplot as plt; assert plt.get_fignums() == []")
        place.cell("assert not job.paused")
    assert digests(out) == wanted
    assert "self_attn.q_proj" in shown.text
    assert "vllm serve out" in shown.text
    assert {"text/html", "text/plain"} <= shown.kinds
    assert "application/vnd.jupyter.widget-view+json" in ran.kinds
    assert "done: 112 weights" in ran.text
    assert "was complete already, nothing was written" in again.text
    assert "no problems found" in report.text
    assert "<img" in report.html
    assert "image/png" in plot.kinds
    assert len([o for o in plot.outputs if "image/png" in o.get("data", {})]) == 1
    for cell in (shown, ran, again, report):
        narrow(cell)
        assert not [o for o in cell.outputs if o.get("name") == "stderr"]


def enough(path: Path, shards: int) -> bool:
    return shards_in(path) >= shards


@pytest.mark.parametrize("setup", ["", NO_WIDGETS], ids=["widgets", "text"])
def test_an_interrupt_is_a_pause_and_the_same_cell_goes_on(
    setup: str, tmp_path: Path, hub: tuple[DevHub, dict[str, str]], wanted: dict[str, str]
) -> None:
    """Stopped in the middle of a slow download; gone on with in a new kernel, stopped again, then in the same one."""
    _, env = hub
    out = tmp_path / "out"
    for stop_at in (1, 3):
        with kernel(tmp_path, env) as place:
            place.cell(setup)
            place.cell(JOB.format("hf://dev/tiny", "out"))
            stop = place.interrupt_when(partial(enough, journal(out), stop_at))
            paused = place.cell("job.run()")
            stop.join()
            assert "paused: what is complete is kept; run the cell again" in paused.text
            assert "Traceback" not in paused.text
            place.cell("assert job.paused")
            kept = shards_in(journal(out))
            assert kept >= stop_at
            assert not out.exists()
            narrow(paused)
            refused = place.cell("job.report", fails=True)
            assert refused.errors[0].traceback == ["VerifyError: out: there is no output yet; call job.run() first"]
            if stop_at > 1:
                finished = place.cell("job.run()")
                place.cell("assert not job.paused")
                assert "done: 112 weights" in finished.text
    assert listing(tmp_path) == ["out"]
    changed = {name for name, digest in digests(out).items() if wanted.get(name) != digest}
    assert changed <= {"mso_hub.json"}


def test_without_ipywidgets_progress_is_a_few_lines_of_text(tmp_path: Path, hub: tuple[DevHub, dict[str, str]]) -> None:
    """A line now and then, no carriage returns, and the panel says what to call."""
    _, env = hub
    with kernel(tmp_path, env) as place:
        place.cell(NO_WIDGETS)
        place.cell(JOB.format("hf://dev/tiny", "out"))
        began = time.monotonic()
        ran = place.cell("job.run()")
        took = time.monotonic() - began
        panel = place.cell("import mso_hub.notebook; mso_hub.notebook.panel()")
        refused = place.cell("mso_hub.Job('a', 'b', progress='widgets').run()", fails=True)
        asked = place.cell("mso_hub.Job('hf://dev/tiny', 'c', progress='widgets').run()", fails=True)
    stream = "".join(o.text for o in ran.outputs if o.output_type == "stream")
    lines = stream.splitlines()
    assert 2 <= len(lines) <= 3 + took / EVERY
    assert lines[-1].startswith("read 100%  encode 100%  write 100%  commit 100%")
    assert not {kind for kind in ran.kinds if "widget" in kind}
    narrow(ran)
    assert "pip install 'mso-hub[notebook]'" in panel.text
    assert "job.run()" in panel.text
    assert "Traceback" not in refused.text
    assert "needs ipywidgets" in asked.errors[0].traceback[0]


def test_a_refusal_is_one_sentence(tmp_path: Path) -> None:
    """Settings, source and shapes are refused without a page of traceback."""
    with kernel(tmp_path) as place:
        for source in (
            "import mso_hub; mso_hub.Job('nowhere', 'out').run()",
            "mso_hub.Job('nowhere', 'out', layuot='modelopt')",
            "mso_hub.Job('nowhere', 'out', private=True).run()",
        ):
            cell = place.cell(source, fails=True)
            assert len(cell.errors[0].traceback) <= 3
            assert "Traceback" not in cell.text
            narrow(cell)
