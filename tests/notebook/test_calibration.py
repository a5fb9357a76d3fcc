"""A model over text, from a cell: statistics that a Job takes, measurements, methods, how all of it is shown."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mso_hub
from mso_hub.calibrate.evaluate import evaluate as run_evaluate
from mso_hub.calibrate.scales import with_statistics
from mso_hub.calibrate.statistics import Statistics
from mso_hub.calibrate.text import TextSettings, one_dataset
from mso_hub.errors import MsoError, RecipeError
from mso_hub.events import BatchDone, Calibrated, Calibrating, LayerDone, Waiting
from mso_hub.notebook import Job, calibrate, evaluate, prepare, view
from mso_hub.notebook.calibration import STOPPED
from mso_hub.notebook.heat import OUTSIDE, ranges_of
from mso_hub.notebook.job import PAUSED
from mso_hub.notebook.plot import draw_ranges
from mso_hub.notebook.track import Walking
from mso_hub.notebook.views import amounts, line, status
from mso_hub.plan.evaluation import Evaluation
from tests.calibrate.texts import numbered, read
from tests.helpers import tiny_moe
from tests.notebook.kernels import NO_WIDGETS, TRAINED, kernel
from tests.running import digests

SMALL: dict[str, Any] = {"rows": 8, "max_seq_len": 64, "progress": "none"}
LONG = "rows=48, max_seq_len=256"
"""Enough text that a layer takes a while."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered(tmp_path_factory.mktemp("text") / "numbers.jsonl")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("MSO_HUB_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def statistics(text: Path, cache: Path) -> Statistics:
    assert cache.is_dir()
    return calibrate(TRAINED, text=text, **SMALL)


@pytest.fixture(scope="module")
def measured(text: Path) -> dict[str, Evaluation]:
    recipe = mso_hub.Recipe(scheme="mxfp4", mode="all-linear")
    return {
        "alone": evaluate(TRAINED, text=text, **SMALL),
        "<b>in four bits": evaluate(TRAINED, recipe=recipe, text=text, **SMALL),
    }


def shown(thing: object) -> str:
    """Its text in 80 columns; markup in names stays text."""
    bundle = view(thing)._repr_mimebundle_()
    assert max(map(len, bundle["text/plain"].split("\n"))) <= 80
    assert "<b>in" not in bundle["text/html"]
    return " ".join(bundle["text/plain"].split())


# --- statistics and what takes them -------------------------------------------------------------------


def test_statistics_that_nobody_named_lie_in_the_cache_and_are_taken_again(
    statistics: Statistics, text: Path, cache: Path
) -> None:
    """The same words give the same file, without a run; other words another one."""
    assert statistics.path is not None
    assert statistics.path.parent == cache / "statistics"
    before = statistics.path.stat().st_mtime_ns
    assert calibrate(TRAINED, text=text, **SMALL) == statistics
    assert statistics.path.stat().st_mtime_ns == before
    other = calibrate(TRAINED, text=text, **{**SMALL, "rows": 4})
    assert other.path != statistics.path
    assert other.provenance.tokens == 4 * 64


def test_a_job_with_statistics_writes_what_convert_writes(statistics: Statistics, tmp_path: Path) -> None:
    """nvfp4 is W4A4 then; a file says the same as what was read from it."""
    plain = mso_hub.Recipe(mode="all-linear", input_scale=1.0)
    mso_hub.convert(TRAINED, tmp_path / "direct", with_statistics(plain, statistics, TRAINED, headroom=3))
    for number, stats in enumerate((statistics, statistics.path, str(statistics.path))):
        job = Job(TRAINED, tmp_path / str(number), mode="all-linear", stats=stats, headroom=3, progress="none")
        job.run()
        assert digests(tmp_path / str(number)) == digests(tmp_path / "direct")
    manifest = json.loads((tmp_path / "0" / "mso_hub.json").read_bytes())
    assert manifest["calibration"]["sha256"] == statistics.provenance.sha256
    names = {info.name.rpartition(".")[2] for shard in job.plan.shards for s in shard.steps for info in s.outputs}
    assert "input_global_scale" in names


def test_rules_and_recipe_files_take_statistics_too(statistics: Statistics, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('[[rules]]\ntargets = ["Linear"]\nformat = "nvfp4"\nactivations = 4\n')
    job = Job(TRAINED, tmp_path / "out", recipe=tmp_path / "r.toml", stats=statistics, progress="none")
    assert job.recipe.input_amax
    assert job.recipe.calibration is not None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"headroom": 2.0}, "headroom 2: is for measured scales; add stats=FILE"),
        ({"stats": "f", "headroom": 0.5}, "headroom: must be 1 to 4096, got 0.5"),
        ({"stats": "f", "input_scale": 1.0}, "stats and input_scale both say"),
        ({"stats": "f", "scheme": "w4a16"}, "stats: w4a16 has no static activation scale"),
        ({"stat": "f"}, "Job has no such setting; did you mean stats?"),
    ],
)
def test_words_about_scales_that_cannot_be_are_refused_where_they_are_typed(words: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match="(?s)" + said):
        Job("in", "out", **words)


def test_statistics_of_another_model_are_refused(statistics: Statistics, tmp_path: Path) -> None:
    job = Job(tiny_moe(tmp_path / "in"), tmp_path / "out", stats=statistics, progress="none")
    with pytest.raises(MsoError, match="these are statistics of tiny-qwen3-moe, not of"):
        _ = job.plan


# --- measurements and methods -------------------------------------------------------------------------


def test_it_measures_what_the_library_measures(measured: dict[str, Evaluation], text: Path) -> None:
    rows = read(text, max_samples=8)
    assert measured["alone"] == run_evaluate(TRAINED, rows)
    assert measured["alone"].reference is None
    in_four = measured["<b>in four bits"].reference
    assert in_four is not None
    assert in_four.kl > 0


def test_what_a_method_made_measures_like_what_is_written_of_it(text: Path, cache: Path, tmp_path: Path) -> None:
    """And the card, or mso_hub.json, says which method it was."""
    recipe = mso_hub.Recipe(scheme="w4a16", mode="all-linear", group_size=32)
    prepared = prepare(TRAINED, recipe, "weighted", text=text, **SMALL)
    assert "importance-weighted scale search over 512 tokens" in repr(prepared)
    assert any((cache / "weighted").iterdir())
    plan = prepared.write(tmp_path / "out")
    with closing(prepared.source):
        tried = evaluate(prepared, against=TRAINED, text=text, **SMALL)
    written = evaluate(tmp_path / "out", against=TRAINED, text=text, **SMALL)
    assert tried.reference == written.reference
    assert plan.recipe.by_method == prepared.method
    assert json.loads((tmp_path / "out" / "mso_hub.json").read_bytes())["method"]["name"] == "weighted"


def test_a_method_that_changes_activations_refuses_scales_from_before_it(statistics: Statistics) -> None:
    recipe = with_statistics(mso_hub.Recipe(input_scale=1.0), statistics, TRAINED)
    with pytest.raises(RecipeError, match="awq: changes the activations"):
        prepare(TRAINED, recipe, "awq", progress="none")


def test_settings_of_the_text_say_everything(text: Path) -> None:
    settings: TextSettings = one_dataset(str(text), max_samples=4, max_seq_len=32)
    assert evaluate(TRAINED, text=settings, progress="none").tokens == 128
    with pytest.raises(RecipeError, match="rows: text is TextSettings"):
        evaluate(TRAINED, text=settings, rows=2, progress="none")


# --- how it is shown ----------------------------------------------------------------------------------


def test_ranges_are_the_largest_of_a_layer_and_equal_neighbours_share_a_column(statistics: Statistics) -> None:
    heat = ranges_of(statistics)
    assert heat.layers == ("0", "1", "2", "3", OUTSIDE)
    assert "self_attn.k/q/v_proj" in heat.kinds
    assert heat.kinds[-1] == "lm_head"
    bank = [value for name, value in statistics.amax.items() if name.startswith("model.layers.2.mlp.experts.")]
    assert max(heat.cells["2", kind] for kind in heat.kinds if "experts" in kind) == max(bank)
    keys, values = statistics.caches["model.layers.1.self_attn"]
    assert (heat.cells["1", "self_attn keys"], heat.cells["1", "self_attn values"]) == (keys, values)


def test_a_view_of_statistics(statistics: Statistics) -> None:
    """Every cell of the picture is in the text, and experts that saw nothing are told of."""
    said = shown(statistics)
    assert "113 modules, 512 tokens of" in said
    assert f"{statistics.amax['lm_head']:.3g}" in said
    assert "experts saw no token" in said
    heat = ranges_of(statistics)
    assert len(draw_ranges(heat, "").axes[0].texts) == len(heat.cells)


def test_a_module_that_saw_nothing_has_no_colour(statistics: Statistics) -> None:
    """The logarithm of zero is none."""
    name = "model.layers.0.self_attn.o_proj"
    heat = ranges_of(replace(statistics, amax={**statistics.amax, name: 0.0}))
    assert len(draw_ranges(heat, "").axes[0].texts) == len(heat.cells) - 1


def test_a_view_of_evaluations(measured: dict[str, Evaluation]) -> None:
    one = shown(measured["alone"])
    assert f"Perplexity {measured['alone'].perplexity:.4f}" in one
    both = shown(measured)
    other = measured["<b>in four bits"].reference
    assert other is not None
    assert f"{other.kl:.5f}" in both
    assert f"{100 * other.agreement:.2f} %" in both
    assert "<img" in view(measured)._repr_mimebundle_()["text/html"]


def test_evaluations_on_different_texts_say_so(measured: dict[str, Evaluation]) -> None:
    found = {"a": measured["alone"], "b": replace(measured["alone"], sha256="0" * 64)}
    assert "cannot be compared" in shown(found)


@pytest.mark.parametrize(("thing", "got"), [({}, "an empty dict"), ({"a": 3}, "one of int")])
def test_other_dicts_are_refused(thing: dict[str, object], got: str) -> None:
    with pytest.raises(RecipeError, match=f"must be of names and Evaluations, got {got}"):
        view(thing)


def test_progress_counts_layers_and_tokens() -> None:
    """Layers of an earlier run are not this run's speed."""
    now = [100.0]
    track = Walking(clock=lambda: now[0])
    assert track.snapshot().bars == ()
    assert "reading headers and text" in line(track.snapshot())
    track(Calibrating("text", 1000, 4, 1))
    now[0] += 2
    track(LayerDone(1, 4, 1000, 2.0))
    track(BatchDone(500))
    found = track.snapshot()
    assert [amounts(bar) for bar in found.bars] == ["2 of 4", "500 of 1,000 tokens"]
    assert found.rate == pytest.approx(1.5 * 250 / 2)
    assert found.left == pytest.approx(1.5 / 1.5 * 2)
    assert "tokens/s, 0:02 left" in status(found)
    assert len(line(found)) <= 80
    track(Waiting("a", 5.0, "busy"))
    assert "waiting for the Hub, busy" in status(track.snapshot())
    track(Calibrated("where", 3))
    track.end("done")
    assert [bar.share for bar in track.snapshot().bars] == [1.0]


def test_what_was_complete_already_is_shown_as_done() -> None:
    track = Walking()
    track(Calibrated("where", 3))
    track.end("done")
    assert line(track.snapshot()).startswith("layers 100%")


# --- in a kernel --------------------------------------------------------------------------------------


def call(name: str, text: Path, more: str = "") -> str:
    return f"found = mso_hub.notebook.{name}({str(TRAINED)!r}, {more} text={str(text)!r}, {LONG})"


def test_an_interrupted_calibration_goes_on_in_a_fresh_kernel(tmp_path: Path) -> None:
    """And ends with the bytes of one that was not interrupted."""
    text = numbered(tmp_path / "numbers.jsonl", 400)
    first = tmp_path / "s.partial" / "layer-00000.safetensors"
    env = {"MSO_HUB_CACHE": str(tmp_path / "cache")}
    with kernel(tmp_path, env) as place:
        place.cell(f"{NO_WIDGETS}; import mso_hub.notebook")
        stop = place.interrupt_when(first.is_file)
        paused = place.cell(call("calibrate", text, "'s',"), fails=True)
        stop.join()
        assert paused.errors[0].traceback == [PAUSED]
        assert not (tmp_path / "s").exists()
    stamp = first.stat().st_mtime_ns
    with kernel(tmp_path, env) as place:
        place.cell("import mso_hub.notebook")
        done = place.cell(call("calibrate", text, "'s',") + "; mso_hub.notebook.view(found)")
        assert "done: 113 modules" in done.text
        assert not [output for output in done.outputs if output.get("name") == "stderr"]
        assert stamp < (tmp_path / "s").stat().st_mtime_ns
    whole = calibrate(TRAINED, tmp_path / "whole", text=text, rows=48, max_seq_len=256, progress="none")
    assert whole.path is not None
    assert hashlib.sha256((tmp_path / "s").read_bytes()).digest() == hashlib.sha256(whole.path.read_bytes()).digest()


def test_an_interrupted_measurement_is_one_sentence(tmp_path: Path) -> None:
    text = numbered(tmp_path / "numbers.jsonl", 400)
    with kernel(tmp_path) as place:
        place.cell(f"{NO_WIDGETS}; import pathlib, mso_hub.notebook, mso_hub.notebook.track as t")
        place.cell("old = t.Walking._note\ndef note(self, e):\n    old(self, e)\n    pathlib.Path('began').touch()")
        place.cell("t.Walking._note = note")
        stop = place.interrupt_when((tmp_path / "began").is_file)
        stopped = place.cell(call("evaluate", text), fails=True)
        stop.join()
        assert stopped.errors[0].traceback == [STOPPED]
        place.cell(call("evaluate", text).replace("rows=48", "rows=2"))


@pytest.mark.parametrize("name", ["calibrate", "evaluate"])
def test_without_transformers_the_extra_is_named(name: str, text: Path, tmp_path: Path) -> None:
    with kernel(tmp_path, {"MSO_HUB_CACHE": str(tmp_path / "cache")}) as place:
        place.cell("import sys; sys.modules['transformers'] = None; import mso_hub.notebook")
        refused = place.cell(call(name, text), fails=True)
        assert "pip install 'mso-hub[calibrate]'" in " ".join(refused.text.split())
        assert len(refused.errors[0].traceback) <= 4


def test_a_job_without_widgets_brings_no_warning_of_tqdm(tmp_path: Path) -> None:
    """Also where no Hub was chosen before it: whatever imports the Hub's client later is silent."""
    for made in ("mso_hub.Job('hf://a/b', 'c')", "__import__('mso_hub.notebook').notebook.panel()"):
        with kernel(tmp_path) as place:
            place.cell(NO_WIDGETS)
            cell = place.cell(f"import mso_hub; made = {made}; import huggingface_hub.utils.tqdm")
            assert cell.text == ""
