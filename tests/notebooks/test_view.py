"""What other calls return, as a cell shows it: complete text of 80 columns, and HTML in which names stay names."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

import mso_hub
from mso_hub.errors import PlanError, RecipeError
from mso_hub.generation import GenerationReport, Output, Pair
from mso_hub.losses import Measured
from mso_hub.notebook import plot_formats, view
from mso_hub.notebook.view import totals
from mso_hub.recard import make_card
from mso_hub.serving import find_gpu, serve_check
from mso_hub.smoke import Problem, ShapeReport, World
from mso_hub.smoke.report import Refusal
from mso_hub.source import read_checkpoint
from tests.notebook.kernels import TRAINED

FORMATS = ("nvfp4", "fp8_dynamic")
LONG = "model.layers.0.mlp.experts.<b>.down_proj_of_a_name_that_is_longer_than_a_line_of_eighty_columns.weight_scale"


def text_of(thing: object) -> str:
    """Its text, which fits into 80 columns; both forms are there."""
    shown = view(thing)
    bundle = shown._repr_mimebundle_()
    assert bundle["text/plain"] == str(shown)
    assert max(map(len, str(shown).split("\n"))) <= 80
    assert {"text/html", "text/markdown"} & bundle.keys()
    assert "<b>.down" not in bundle.get("text/html", "")
    return " ".join(str(shown).split())


@pytest.fixture(scope="module")
def errors() -> mso_hub.ErrorTable:
    return mso_hub.measure_errors(TRAINED, mso_hub.Recipe(mode="all-linear"), FORMATS)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("view") / "out"
    mso_hub.convert(TRAINED, out, mso_hub.Recipe())
    return out


def test_a_checkpoint() -> None:
    with closing(mso_hub.open_source(TRAINED)) as source:
        shown = text_of(read_checkpoint(source))
    assert "Qwen3MoeForCausalLM, quantization: none announced" in shown
    assert "BF16 135 10.0 MB" in shown
    assert "6 shards" in shown


def test_errors_of_several_formats(errors: mso_hub.ErrorTable) -> None:
    shown = text_of(errors)
    assert "112 weights in 2 formats" in shown
    assert "28 % of its bytes now" in shown
    assert "<img" in view(errors)._repr_mimebundle_()["text/html"]
    assert plot_formats(errors).axes[0].get_yscale() == "log"


def test_totals_are_over_all_numbers(errors: mso_hub.ErrorTable) -> None:
    """NMSE of the whole is the sum of squared errors over the sum of squares, not a mean of means."""
    found = {total.label: total for total in totals(errors)}
    weights = errors.weights.values()
    for label in FORMATS:
        wanted = math.fsum(w.losses[label].error for w in weights) / math.fsum(w.energy for w in weights)
        assert found[label].nmse == pytest.approx(wanted)
        assert found[label].worst == max(weight.nmse(label) for weight in weights)
        assert found[label].nbytes == sum(weight.losses[label].nbytes for weight in weights)
    assert found["nvfp4"].bits < found["fp8_dynamic"].bits < 16


def test_a_format_that_holds_nothing_is_named(errors: mso_hub.ErrorTable) -> None:
    barred = {name: Measured(w.numbers, w.energy, w.dense, {}, {"mxfp4": LONG}) for name, w in errors.weights.items()}
    table = replace(errors, weights=barred)
    assert totals(table) == []
    assert "not in mxfp4: model.layers.0" in text_of(table)
    with pytest.raises(RecipeError, match="none of mxfp4 holds any weight"):
        plot_formats(table)


def test_a_choice() -> None:
    recipe = mso_hub.Recipe(mode="all-linear")
    choice = mso_hub.choose_formats(TRAINED, recipe, fallback=("fp8_dynamic",), target_bits=5)
    assert "at most 5 asked for" in text_of(choice)


def test_a_comparison(output: Path) -> None:
    shown = text_of(mso_hub.compare_checkpoints(output, TRAINED))
    assert "135 weights in both, 39 of them equal byte for byte" in shown
    assert "0 weights only here" in shown


def test_what_a_gpu_makes_of_it(output: Path) -> None:
    with closing(mso_hub.open_source(output)) as source:
        shown = text_of(serve_check(source, find_gpu("H100")))
    assert "on H100, 80 GiB" in shown
    assert "vllm serve" in shown
    assert "attention heads" in shown


def test_a_card(output: Path) -> None:
    """The metadata is a block of YAML: a page would take it for a line and a heading."""
    shown = view(make_card(output, source=TRAINED))
    assert text_of(make_card(output, source=TRAINED)).startswith("```yaml library_name: transformers")
    assert shown._repr_mimebundle_()["text/markdown"].startswith("```yaml\n")


def test_what_vllm_would_not_load() -> None:
    problem = Problem("missing", LONG, "w13", (0, 1), "[4]", "nothing", "is never written; quantize it again")
    one = World(tp=1, pp=1, ep=False, seconds=1.0, rank_bytes=(1 << 20,), problems=())
    worlds = (one, replace(one, tp=8, rank_bytes=(), problems=(problem,)))
    report = ShapeReport("m", 7, "/python", "0.33.0", "2.13", "Llama", 3.2, 1 << 20, worlds, None)
    shown = text_of(report)
    assert "tp 1 1.0 MB every tensor on every rank" in shown
    assert "PROBLEM tp 8: model.layers.0" in shown
    assert "PROBLEM no such model" in text_of(replace(report, worlds=(), refused=Refusal("version", "no such model")))


def test_what_it_generates() -> None:
    same, other = Output((1, 2), 5.25), Output((1, 3), 5.5)
    report = GenerationReport(
        "m", "/python", "0.33.0", "cpu", emulated=True, kernels=(LONG,), seconds=9.0, weight_only=True, dense=False,
        pairs=(Pair(same, same), Pair(other, same)), problems=("prompt 2: other tokens",),
    )  # fmt: skip
    shown = text_of(report)
    assert "must equal them in BF16" in shown
    assert "1 5.2500 5.2500 the same" in shown
    assert "2 5.5000 5.2500 others" in shown
    assert "PROBLEM prompt 2: other tokens" in shown


def test_an_error_and_an_address() -> None:
    assert text_of(PlanError(f"out: nothing was written\n  {LONG}: no")).startswith("PlanError: out: nothing was")
    assert text_of("https://huggingface.co/me/model").startswith("link https://huggingface.co/me/")


def test_what_shows_itself_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"must be one of Checkpoint, .* got int"):
        view(3)
