"""The panel in a real kernel: its buttons work on a thread, the kernel stays free, Pause is a pause."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import mso_hub
from mso_hub.plan import Recipe
from tests.notebook.kernels import TRAINED, Kernel, kernel
from tests.running import digests

pytest.importorskip("ipywidgets")
SETUP = f"""
import os, time, warnings
os.environ["HF_HUB_DISABLE_XET"] = "1"
import mso_hub, mso_hub.notebook
from mso_hub.hub.devhub import DevHub
from mso_hub.hub.devhub.seed import connect, seed
from huggingface_hub.utils import disable_progress_bars
disable_progress_bars()
hub = DevHub("hub")
client = connect(hub)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    seed(client, "dev/tiny", {str(TRAINED)!r})
panel = mso_hub.notebook.panel(client=client)
"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Kernel]:
    """A kernel with a Hub of its own and a panel."""
    with kernel(tmp_path, {"MSO_HUB_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}) as found:
        found.cell(SETUP)
        yield found
        found.cell("hub.close()")


def test_search_plan_run_and_result(place: Kernel) -> None:
    shown = place.cell("panel")
    assert "application/vnd.jupyter.widget-view+json" in shown.kinds
    assert "mso_hub.Job does the same" in shown.text
    place.cell("panel.query.value = 'tin'; panel.find.click(); assert panel.wait(60)")
    place.cell("assert panel.message.value == '1 repos found', panel.message.value")
    place.cell("panel.found.value = 'hf://dev/tiny'; assert panel.src.value == 'hf://dev/tiny'")
    place.cell("panel.dst.value = 'hf://dev/tiny-NVFP4'; panel.all_linear.value = panel.private.value = True")
    place.cell("panel.plan.click(); assert panel.wait(60)")
    place.cell("assert 'self_attn.q_proj' in panel.result.value; assert not client.api.repo_exists('dev/tiny-NVFP4')")
    place.cell("panel.run.click(); assert panel.wait(80)")
    place.cell("assert panel.message.value.startswith('done: http'), panel.message.value")
    place.cell("assert 'no problems found' in panel.result.value and '<img' in panel.result.value")
    place.cell("assert client.api.model_info('dev/tiny-NVFP4').private")
    place.cell("assert panel.pause.disabled and not panel.run.disabled")


def test_pause_and_go_on(place: Kernel, tmp_path: Path) -> None:
    """Pressed while the download is slow; the same bytes as without."""
    place.cell("hub.set(bandwidth_down=3e6)")
    place.cell("panel.src.value, panel.dst.value = 'hf://dev/tiny', 'out'; panel.all_linear.value = True")
    place.cell("""
panel.run.click()
end = time.monotonic() + 80
while not (os.path.exists(".out.mso-journal") and '"file"' in open(".out.mso-journal").read()):
    assert time.monotonic() < end, panel.message.value
    time.sleep(0.01)
panel.pause.click()
assert panel.wait(60)
assert panel.job.paused, panel.message.value
assert panel.message.value.startswith("paused"), panel.message.value
assert not os.path.exists("out")
""")
    place.cell("hub.set(bandwidth_down=0)")
    place.cell("panel.run.click(); assert panel.wait(80)")
    place.cell("assert panel.message.value == 'done: out', panel.message.value")
    mso_hub.convert(TRAINED, tmp_path / "direct", Recipe(mode="all-linear"))
    changed = {n for n, d in digests(tmp_path / "direct").items() if digests(tmp_path / "out").get(n) != d}
    assert changed <= {"mso_hub.json"}


def test_errors_are_sentences_in_the_panel(place: Kernel) -> None:
    """Nothing is raised, nothing is printed, and what a stranger named cannot act."""
    for setting, message in (
        ("panel.src.value = ''", "source and output must both be given"),
        ("panel.src.value, panel.dst.value = 'hf://dev/none', 'out'", "hf://dev/none"),
        ("panel.src.value, panel.dst.value = '<b>x</b>', 'out'", "&lt;b&gt;x&lt;/b&gt;: the input must be a folder"),
    ):
        cell = place.cell(f"{setting}; panel.run.click(); assert panel.wait(60)")
        assert cell.outputs == []
        place.cell(f"assert {message!r} in panel.message.value, panel.message.value")
