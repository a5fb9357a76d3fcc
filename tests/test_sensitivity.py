"""Which weights a model can spare bits of: trials against recipes tried as a whole, and choices made by them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mso_hub.assess import choose_formats
from mso_hub.calibrate.evaluate import Settings, evaluate
from mso_hub.calibrate.evaluate.sensitivity import Cost
from mso_hub.calibrate.text import Rows
from mso_hub.calibrate.text.rows import digest
from mso_hub.calibrate.walk import Memory
from mso_hub.errors import RecipeError
from mso_hub.events import Calibrating, Event, LayerDone
from mso_hub.losses import Divergence, ErrorTable, read_table, write_table
from mso_hub.plan import Recipe
from mso_hub.sensitivity import measure_sensitivity
from tests.calibrate.architectures import quiet_transformers
from tests.calibrate.heldout import REAL, heldout

WHOLE = Recipe(mode="all-linear")
FORMATS = ["nvfp4", "fp8"]
F32 = Settings(dtype="F32")
TEXT = heldout(2048)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Without transformers' advice about kernels that are not installed."""
    with quiet_transformers():
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[ErrorTable, Cost, list[Event]]:
    """Every group of the trained model under two formats, with what was told on the way."""
    work = tmp_path_factory.mktemp("work")
    events: list[Event] = []
    costs: list[Cost] = []
    with quiet_transformers():
        table = measure_sensitivity(
            REAL, WHOLE, TEXT, FORMATS, settings=replace(F32, memory=Memory(work=work)), on_cost=costs.append,
            on_event=events.append,
        )  # fmt: skip
    assert not list(work.iterdir())
    return table, costs[0], events


def divergence(table: ErrorTable) -> Divergence:
    """What it does to predictions."""
    assert table.divergence is not None
    return table.divergence


@pytest.mark.parametrize(
    ("group", "label"),
    [("model.layers.0.self_attn.qkv_proj", "fp8"), ("model.layers.2.mlp.experts", "nvfp4"),
     ("model.layers.3.self_attn.o_proj", "fp8"), ("model.layers.3.mlp.experts", "fp8"), ("", "nvfp4"), ("", "fp8")],
)  # fmt: skip
def test_a_trial_is_the_recipe_that_quantizes_these_weights_alone(
    group: str, label: str, measured: tuple[ErrorTable, Cost, list[Event]]
) -> None:
    """To the last bit, though it began behind the layers that it does not change."""
    parent, _, fused = group.rpartition(".")
    names = [f"{parent}.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")] if fused == "qkv_proj" else [group]
    recipe = Recipe(scheme=label, targets=tuple(names)) if group else Recipe(scheme=label, mode="all-linear")
    found = evaluate(REAL, TEXT, recipe=recipe, settings=F32).reference
    assert found is not None
    known = divergence(measured[0])
    assert (known.groups[group][label] if group else known.together[label]) == found.kl
    assert found.kl > 0


def test_every_group_is_there_and_the_cost_was_said(measured: tuple[ErrorTable, Cost, list[Event]]) -> None:
    """Four layers of three groups under two formats, and each format for all of them."""
    table, cost, events = measured
    assert len(divergence(table).groups) == 12
    assert {tuple(kl) for kl in divergence(table).groups.values()} == {("nvfp4", "fp8")}
    assert cost == Cost(26, 4, 4 + 3 + 2 * (4 + 3 * (4 + 3 + 2 + 1)))
    assert [e.layers for e in events if isinstance(e, Calibrating)] == [cost.passes]
    assert [e.index for e in events if isinstance(e, LayerDone)] == list(range(cost.passes))
    assert "18.8 runs" in str(cost)


def test_the_table_survives_its_file(measured: tuple[ErrorTable, Cost, list[Event]], tmp_path: Path) -> None:
    write_table(measured[0], tmp_path / "table.json")
    assert read_table(tmp_path / "table.json") == measured[0]


def test_bits_go_where_predictions_need_them(measured: tuple[ErrorTable, Cost, list[Event]], tmp_path: Path) -> None:
    """At the same number of bits the choice by KL predicts more like the model than the choice by squared error."""
    write_table(measured[0], tmp_path / "table.json")
    rows = heldout(6144)
    unseen = Rows("unseen", rows.sequences[16:], digest(rows.sequences[16:]), (), (), 16)
    kl = []
    for table in (None, tmp_path / "table.json"):
        choice = choose_formats(REAL, WHOLE, fallback=["fp8", "bf16"], target_bits=6, table=table)
        found = evaluate(REAL, unseen, recipe=choice.recipe, settings=F32).reference
        assert found is not None
        kl.append(found.kl)
        assert ("sum of KL divergences" in choice.summary) == (table is not None)
    assert kl[1] < 0.85 * kl[0]


def test_a_table_that_lacks_something_is_refused_and_kept(
    measured: tuple[ErrorTable, Cost, list[Event]], tmp_path: Path
) -> None:
    """It took hours; a format or a group that it does not have is no reason to measure anew."""
    path = tmp_path / "table.json"
    write_table(measured[0], path)
    before = path.read_bytes()
    with pytest.raises(RecipeError, match=r"do not cover it.*--sensitivity"):
        choose_formats(REAL, WHOLE, fallback=["mxfp8"], target_bits=6, table=path)
    assert path.read_bytes() == before
    known = divergence(measured[0])
    fewer = {name: kl for name, kl in known.groups.items() if "layers.1." not in name}
    write_table(replace(measured[0], divergence=replace(known, groups=fewer)), path)
    with pytest.raises(RecipeError, match=r"model\.layers\.1\..*do not cover it"):
        choose_formats(REAL, WHOLE, fallback=["fp8"], target_bits=6, table=path)


def test_a_limit_of_the_error_goes_by_the_error(measured: tuple[ErrorTable, Cost, list[Event]], tmp_path: Path) -> None:
    """--max_nmse means the same with such a table and without."""
    write_table(measured[0], tmp_path / "table.json")
    with_table, without = (
        choose_formats(REAL, WHOLE, fallback=["fp8"], max_nmse=0.0066, table=table)
        for table in (tmp_path / "table.json", None)
    )
    assert (with_table.recipe, with_table.summary) == (without.recipe, without.summary)


def test_formats_that_change_nothing_are_refused() -> None:
    with pytest.raises(RecipeError, match="keeps every number"):
        measure_sensitivity(REAL, WHOLE, TEXT, ["bf16"])
