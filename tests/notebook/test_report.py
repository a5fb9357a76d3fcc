"""The report: what it says as text, as HTML and as a picture, with matplotlib and without."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mso_hub
from mso_hub.notebook.heat import BANDS, OUTSIDE, banded, heat_of, place_of
from mso_hub.notebook.panes import pane_text
from mso_hub.notebook.plot import png
from mso_hub.notebook.report import ReportView, breakdown, errors_parts
from mso_hub.plan import Recipe
from mso_hub.verify import TensorError, verify_checkpoint
from tests.helpers import tiny_moe

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> mso_hub.Job:
    """A MoE that was converted."""
    folder = tmp_path_factory.mktemp("report")
    made = mso_hub.Job(tiny_moe(folder / "in", layers=3, experts=4), folder / "out", progress="none", mode="all-linear")
    made.run()
    return made


def test_it_is_a_report_made_once(job: mso_hub.Job) -> None:
    report = job.report
    assert report is job.report
    assert isinstance(report, mso_hub.Report)
    direct = verify_checkpoint(job.dst, source=job.src)
    assert (report.ok, report.problems, report.errors) == (True, (), direct.errors)
    assert report.as_dict()["ok"] is True


def test_text_is_complete_and_narrow(job: mso_hub.Job) -> None:
    """Every number of the picture is in the text."""
    text = str(job.report)
    assert text == job.report._repr_mimebundle_()["text/plain"]
    assert max(map(len, text.split("\n"))) <= 80
    heat = heat_of(job.report.errors)
    assert heat.layers == ("0", "1", "2")
    assert len(heat.kinds) == 7
    assert len(heat.cells) == 21
    for value in heat.cells.values():
        assert f"{100 * value:.4f}" in text
    for word in ("no problems found", "nvfp4", "as it was", "config and index", "fused units", "vllm serve", job.dst):
        assert word in text


def test_sizes_add_up(job: mso_hub.Job) -> None:
    rows = breakdown(job.plan)
    shards = sum(shard.nbytes - len(shard.header) for shard in job.plan.shards)
    texts = sum(map(len, job.plan.files.values()))
    scales = sum(4 for shard in job.plan.shards for step in shard.steps for _ in step.extras)
    assert sum(before for _, before, _ in rows) - texts == job.plan.read_bytes
    assert sum(after for _, _, after in rows) - texts == shards
    assert scales >= 0


def test_a_picture_is_drawn_and_closed(job: mso_hub.Job) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure = job.report.plot()
    grid, sizes, *_ = figure.axes
    assert [tick.get_text() for tick in grid.get_yticklabels()] == ["0", "1", "2"]
    assert len(grid.get_xticklabels()) == 7
    assert [tick.get_text() for tick in sizes.get_xticklabels()] == ["before", "after"]
    assert png(figure).startswith(PNG)
    html = job.report._repr_mimebundle_()["text/html"]
    assert html.count("<img") == 1
    assert "https://" not in html
    assert pyplot.get_fignums() == []


def test_without_matplotlib_the_text_is_all_there() -> None:
    """In a Python where it is missing: a sentence names the extra, the tables are shown, plot() says what to do."""
    program = """
import sys
sys.modules["matplotlib"] = None
import tempfile
import mso_hub
from pathlib import Path
from tests.helpers import tiny_moe
with tempfile.TemporaryDirectory() as folder:
    job = mso_hub.Job(tiny_moe(Path(folder) / "in"), Path(folder) / "out", progress="none")
    job.run()
    bundle = job.report._repr_mimebundle_()
    assert "<img" not in bundle["text/html"]
    assert "pip install &#x27;mso-hub[notebook]&#x27;" in bundle["text/html"]
    assert bundle["text/html"].count("<table") >= 3
    try:
        job.report.plot()
    except mso_hub.MsoError as error:
        print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert "a picture of the errors needs matplotlib: pip install 'mso-hub[notebook]'" in run.stdout
    assert "print(job.report) has the same as text" in run.stdout


@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("model.layers.3.mlp.experts.7.up_proj", ("3", "mlp.experts.N.up_proj")),
        ("model.language_model.layers.12.self_attn.q_proj", ("12", "self_attn.q_proj")),
        ("transformer.h.0.mlp.c_fc", ("0", "mlp.c_fc")),
        ("lm_head", (OUTSIDE, "lm_head")),
        ("mtp.fc.0", (OUTSIDE, "mtp.fc.N")),
    ],
)
def test_where_a_weight_stands(module: str, place: tuple[str, str]) -> None:
    assert place_of(module) == place


@given(st.integers(1, 200), st.integers(1, 3), st.booleans())
def test_many_layers_share_rows(layers: int, kinds: int, head: bool) -> None:
    """At most BANDS rows; the mean of what is shown is that of what there is, and no layer is lost."""
    errors = [
        TensorError(f"model.layers.{at}.mlp.p{kind}.weight", at / 1000, 0.0, "x")
        for at in range(layers) for kind in range(kinds)
    ]  # fmt: skip
    errors += [TensorError("lm_head.weight", 0.5, 0.0, "x")] if head else []
    heat = heat_of(errors)
    few = banded(heat)
    assert len(few.layers) <= BANDS + 1
    inside = [layer for layer in few.layers if layer != OUTSIDE]
    spans = [tuple(map(int, (label.split("-") * 2)[:2])) for label in inside]
    covered = [at for first, last in spans for at in range(first, last + 1)]
    assert covered == list(range(layers))
    weighted = sum(few.cells[label, "mlp.p0"] * (b - a + 1) for label, (a, b) in zip(inside, spans, strict=True))
    assert weighted / layers == pytest.approx(sum(at / 1000 for at in range(layers)) / layers)
    assert (OUTSIDE in few.layers) == head
    text = pane_text(errors_parts(replace(EMPTY, errors=tuple(errors))))
    assert max(map(len, text.split("\n"))) <= 80


EMPTY = ReportView("out", (), 0, 0, 0, 0)


@given(st.text(max_size=60), st.floats(allow_nan=True))
def test_hostile_names_and_numbers_are_shown_as_they_are(name: str, error: float) -> None:
    """Any name and any number has a report, as text and as HTML."""
    report = replace(
        EMPTY, where=name, errors=(TensorError(name, error, math.inf, name),), sizes=((name, 10, 3),),
        problems=(name,), notes=(name,), link=name, serve=name,
    )  # fmt: skip
    text = str(report)
    assert max(map(len, text.split("\n"))) <= 80
    assert all(c.isprintable() or c == "\n" for c in text)


def test_hostile_names_in_a_picture(job: mso_hub.Job) -> None:
    """matplotlib reads formulas between dollars: names are none."""
    pytest.importorskip("matplotlib")
    name = "model.layers.0.$\\frac{1}{</script>$.\x1b$"
    report = replace(job.report, where=name, errors=(TensorError(name, 0.1, 0.1, "x"),), sizes=((name, 2, 1),))
    assert report._repr_mimebundle_()["text/html"].count("<img") == 1
    assert re.search("<script", report._repr_mimebundle_()["text/html"]) is None


def test_nothing_changed() -> None:
    """A report without errors says so, and draws nothing."""
    bundle = EMPTY._repr_mimebundle_()
    assert "<img" not in bundle["text/html"]
    assert "no weight changed" in bundle["text/plain"]


def test_problems_come_first(tmp_path: Path) -> None:
    """A damaged output is not called good."""
    made = mso_hub.Job(tiny_moe(tmp_path / "in"), tmp_path / "out", progress="none")
    made.run()
    path = next((tmp_path / "out").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 0xFF
    path.write_bytes(data)
    text = str(made.report)
    assert not made.report.ok
    assert "PROBLEM" in text.split("\n\n")[1]
    assert Recipe() == made.recipe
