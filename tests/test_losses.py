"""Error tables and reports as files: what is written is read again, and Markdown says the same as JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mso_hub.errors import RecipeError
from mso_hub.formats import FORMATS, Scheme, build
from mso_hub.losses import (
    SHOWN,
    ErrorTable,
    Loss,
    Measured,
    RunReport,
    by_kind,
    check_path,
    label_of,
    read_table,
    report_dict,
    report_markdown,
    sqnr,
    table_dict,
    table_markdown,
    write_report,
    write_table,
)

positive = st.floats(0, 1e30, allow_subnormal=False)
losses = st.builds(Loss, positive, positive, st.integers(0, 1 << 40))
weights = st.builds(
    Measured, st.integers(1, 1 << 40), positive, st.integers(0, 1 << 40),
    st.dictionaries(st.sampled_from(["nvfp4", "fp8", "w4a16 group_size=32"]), losses),
    st.dictionaries(st.sampled_from(["mxfp4", "int8"]), st.text()),
)  # fmt: skip
tables = st.builds(ErrorTable, st.text(), st.text(), st.text(), st.dictionaries(st.text(min_size=1), weights))


def layers(count: int) -> ErrorTable:
    """One kind of module in several layers, the later the worse; the last one cannot be MXFP4."""
    entries = {
        f"model.layers.{n}.mlp.up_proj.weight": Measured(
            100, 10.0, 200, {"nvfp4": Loss(0.1 * (n + 1), 0.5 + n, 57), "fp8": Loss(0.0, 0.0, 100)},
            {"mxfp4": "needs 32 | columns"} if n + 1 == count else {},
        )
        for n in range(count)
    }  # fmt: skip
    return ErrorTable("somewhere/model", "id", "compressed-tensors", entries)


def rows(markdown: str, mark: str) -> list[list[str]]:
    """Cells of the table rows that hold a text; a bar inside a cell is escaped."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ") and mark in line]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


# --- files ------------------------------------------------------------------------------------------


@given(tables)
def test_a_table_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, table: ErrorTable) -> None:
    """Bit for bit: a choice that is made again must name the same job."""
    path = tmp_path_factory.mktemp("table") / "t.json"
    write_table(table, path)
    assert read_table(path) == table
    json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", '{"kind": 3}', '{"kind": "mso_hub error table 1"}', "[" * 100_000,
        '{"kind": "mso_hub error table 1", "source": "", "identity": "", "layout": "", "weights": []}',
        '{"kind": "mso_hub error table 1", "source": "", "identity": "", "layout": "", "weights": {"a": {}}}',
    ],
)  # fmt: skip
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    """Nothing is overwritten that may be somebody's."""
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(
        RecipeError, match=r"t\.json: must be an error table of mso_hub, .*give another name, or delete"
    ):
        read_table(path)


def test_a_table_of_another_version_is_none(tmp_path: Path) -> None:
    """It is ours, so it may be replaced."""
    path = tmp_path / "t.json"
    path.write_text(json.dumps({**table_dict(layers(1)), "kind": "mso_hub error table 999"}))
    assert read_table(path) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("report", "ends in .json or .md, got 'no ending'"),
        ("report.html", "ends in .json or .md, got '.html'"),
        ("missing/report.md", "needs the name of a file in a folder that exists"),
        ("folder.md", "needs the name of a file in a folder that exists"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "folder.md").mkdir()
    with pytest.raises(RecipeError, match=words):
        check_path(tmp_path / name)


# --- numbers ----------------------------------------------------------------------------------------


@given(st.floats(1e-300, 1e300))
def test_sqnr_is_the_nmse_in_decibel(nmse: float) -> None:
    assert 10 ** (-sqnr(nmse) / 10) == pytest.approx(nmse, rel=1e-12)


def test_no_error_is_infinitely_good_and_error_without_energy_infinitely_bad() -> None:
    weight = Measured(1, 0.0, 2, {"same": Loss(0.0, 0.0, 1), "other": Loss(1.0, 1.0, 1)})
    assert (weight.nmse("same"), sqnr(weight.nmse("same"))) == (0, math.inf)
    assert weight.nmse("other") == math.inf
    content = table_dict(ErrorTable("s", "i", "l", {"m.weight": weight}))["weights"]["m.weight"]["formats"]
    assert (content["same"]["sqnr_db"], content["other"]["nmse"]) == (None, None)


def test_kinds_have_the_mean_and_worst_of_their_weights_and_the_ratio_of_their_sums() -> None:
    nvfp4, fp8 = by_kind(layers(4))
    assert (nvfp4.kind, nvfp4.label, nvfp4.count) == ("model.layers.N.mlp.up_proj", "nvfp4", 4)
    assert nvfp4.bits == 8 * 57 / 100
    assert nvfp4.mean == pytest.approx(0.025)
    assert (nvfp4.worst, nvfp4.where, nvfp4.largest) == (0.04, "model.layers.3.mlp.up_proj.weight", 3.5)
    assert nvfp4.sqnr == pytest.approx(-10 * math.log10(1.0 / 40))
    assert (fp8.label, fp8.sqnr) == ("fp8", math.inf)


@pytest.mark.parametrize(
    ("scheme", "label"),
    [
        *((Scheme(name), name) for name in FORMATS),
        (Scheme("nvfp4", activations=4, input_scale=1.0), "nvfp4"),
        *((Scheme("nvfp4", search=s), f"nvfp4 search={s}") for s in FORMATS["nvfp4"].choices.searches[1:]),
        (Scheme("w4a16", group_size=0), "w4a16 group_size=0"),
        (Scheme("w4a16", group_size=128, symmetric=False), "w4a16 asymmetric"),
    ],
)
def test_a_label_says_what_is_not_the_default_of_the_weights(scheme: Scheme, label: str) -> None:
    """Activations change nothing about them."""
    form = build(scheme, "compressed-tensors")
    assert form is not None
    assert label_of(form) == label


# --- Markdown ---------------------------------------------------------------------------------------


def test_a_table_in_markdown_has_every_weight_the_worst_first() -> None:
    text = table_markdown(layers(3))
    each = rows(text.partition("## Weight by weight")[2], "up_proj")
    assert [cells[0] for cells in each[:3]] == [f"`model.layers.{n}.mlp.up_proj.weight`" for n in (2, 1, 0)]
    assert each[0][1:] == ["nvfp4", "3.0000 %", "2.5", "15.23 dB"]
    assert ["fp8", "0.0000 %", "0", "exact"] in [cells[1:] for cells in each]
    assert each[-1] == ["`model.layers.2.mlp.up_proj.weight`", "mxfp4", r"needs 32 \| columns"]


def test_markdown_of_a_large_model_stays_readable() -> None:
    text = table_markdown(layers(SHOWN))
    assert len(rows(text.partition("## Weight by weight")[2], ".weight`")) == SHOWN + 1
    assert f"And {SHOWN:,} more with smaller errors; the JSON has them all." in text


def report(**more: Any) -> RunReport:
    """A run of two layers."""
    settings: dict[str, Any] = {"facts": [("Source", "a*b"), ("NMSE", "0.02")], "table": layers(2), **more}
    return RunReport(**settings)


def test_a_report_in_markdown_says_what_stays_and_why_by_kind() -> None:
    kept: Mapping[str, str] = {"lm_head": "output head", "m.0.router": "router or gate", "m.1.router": "router or gate"}
    text = report_markdown(report(kept=kept, notes=["m.up: nvfp4 -> fp8"]))
    assert rows(text, "router") == [["router or gate", "2", "`m.N.router`"]]
    assert rows(text, "lm") == [["output head", "1", "`lm_head`"]]
    assert r"- m.up: nvfp4 -\> fp8" in text
    assert r"| Source | a\*b |" in text
    assert len(rows(text, "model.layers.N")) == 2


def test_a_report_as_json_has_one_entry_a_weight(tmp_path: Path) -> None:
    weight = Measured(100, 10.0, 200, {"nvfp4": Loss(0.1, 0.5, 57)})
    lost = Measured(100, 0.0, 200, {}, {"fp8": "written by an earlier run"})
    found = report(table=ErrorTable("s", "job", "modelopt", {"a.weight": weight, "b.weight": lost}), kept={"c": "norm"})
    assert not found.complete
    content = report_dict(found)
    assert content["weights"]["a.weight"] == {
        "format": "nvfp4", "numbers": 100, "bytes": 57, "squared_error": 0.1, "nmse": 0.01, "max_abs": 0.5,
        "sqnr_db": 20.0,
    }  # fmt: skip
    assert content["weights"]["b.weight"] == {"format": "fp8", "numbers": 100, "problem": "written by an earlier run"}
    assert content["kept"] == {"c": "norm"}
    write_report(found, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_bytes()) == content
