"""The prototype's two entry points: every documented parameter does what it says, or is refused."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mso_hub import StreamingQuantizer, decompress_model_incremental
from mso_hub.errors import MsoError, PlanError, RecipeError, SinkError
from mso_hub.events import Event, Published, ShardDone, ShardResumed
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from tests.helpers import random_tensor, tensors_of, tiny_moe, write_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert model in three shards."""
    return tiny_moe(tmp_path_factory.mktemp("legacy") / "in", shards=3)


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, quantized."""
    folder = tmp_path_factory.mktemp("legacy") / "packed"
    convert(source, folder, Recipe())
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def stopping(after: type[Event]) -> Callable[[Event], None]:
    """A listener that ends the run at the first event of a kind, as Ctrl-C would."""

    def listen(event: Event) -> None:
        if isinstance(event, after):
            raise KeyboardInterrupt

    return listen


def test_signatures_are_those_that_old_scripts_call() -> None:
    """Order, names and defaults; what was added is keyword-only."""
    quantizer = inspect.signature(StreamingQuantizer.__init__).parameters
    positional = [p for p in quantizer.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    assert [(p.name, p.default) for p in positional] == [
        ("input_dir", inspect.Parameter.empty), ("output_dir", inspect.Parameter.empty), ("format", "nvfp4"),
        ("mlp_only", True), ("exclude_config", None), ("block_size", 16), ("device", "cpu"), ("num_gpus", 0),
        ("resume", True), ("verbose", True), ("calibrate", False), ("calib_size", 512),
        ("calib_dataset", "cnn_dailymail"),
    ]  # fmt: skip
    decompress = inspect.signature(decompress_model_incremental).parameters
    positional = [p for p in decompress.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional] == [
        ("model_path", inspect.Parameter.empty), ("output_path", inspect.Parameter.empty), ("num_gpus", 0),
        ("fresh", False), ("text_only", False), ("verbose", True),
    ]  # fmt: skip


@pytest.mark.parametrize(("mlp_only", "mode"), [(True, "mlp"), (False, "all-linear")])
def test_the_quantizer_is_convert_under_its_old_name(mlp_only: bool, mode: str, source: Path, tmp_path: Path) -> None:
    """Paths as text, all parameters by position: the same files as the new call."""
    settings = ("nvfp4", mlp_only, None, 16, "cpu", 0, True, False, False, 512, "x")
    plan = StreamingQuantizer(str(source), str(tmp_path / "old"), *settings).run()
    convert(source, tmp_path / "new", Recipe(mode=mode))
    assert contents(tmp_path / "old") == contents(tmp_path / "new")
    assert any("self_attn" in key for key in plan.units) == (not mlp_only)


def test_layout_and_input_scale_reach_the_recipe(source: Path, tmp_path: Path) -> None:
    """ModelOpt's format was the prototype's; W4A4 had a scale of one."""
    StreamingQuantizer(source, tmp_path / "old", layout="modelopt", input_scale=1.0).run()
    convert(source, tmp_path / "new", Recipe(layout="modelopt", input_scale=1.0))
    assert contents(tmp_path / "old") == contents(tmp_path / "new")


@pytest.mark.parametrize("as_folder", [False, True])
def test_an_exclude_config_is_honoured(as_folder: bool, source: Path, tmp_path: Path) -> None:
    """A file or its folder; what it excludes is dense in the output and in its ignore list."""
    reference = tmp_path / "reference"
    reference.mkdir()
    content = {"quantization": {"exclude_modules": ["model.layers.0.mlp.experts*", "lm_head", "nothing.like.it"]}}
    (reference / "hf_quant_config.json").write_text(json.dumps(content))
    where = reference if as_folder else reference / "hf_quant_config.json"
    plan = StreamingQuantizer(source, tmp_path / "out", exclude_config=where).run()
    found = tensors_of(tmp_path / "out")
    assert "model.layers.0.mlp.experts.1.up_proj.weight" in found
    assert "model.layers.1.mlp.experts.1.up_proj.weight_packed" in found
    assert "model.layers.0.mlp.experts.1.up_proj" in plan.config["quantization_config"]["ignore"]
    assert any("nothing.like.it" in note for note in plan.notes)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"block_size": 32}, "block_size must be 16 for nvfp4, got 32"),
    ({"block_size": 0}, "block_size must be 16 for nvfp4, got 0"),
    ({"device": "cuda:99"}, "device cuda:99: .* CUDA devices are here; leave it out"),
    ({"device": "tpu"}, "device must be cpu, cuda or cuda:N, got 'tpu'"),
    ({"num_gpus": 1}, "num_gpus 1: this version computes on processors or on one GPU"),
    ({"calibrate": True, "calib_size": 8, "calib_dataset": "c4"}, "calibrate with 8 samples of c4.*input_scale=1.0"),
    ({"layout": "gguf"}, "layout must be one of compressed-tensors, modelopt, deepseek, got 'gguf'"),
    ({"input_scale": -1.0}, "input_scale must be a finite number > 0"),
    ({"exclude_config": "/nowhere.json"}, "nowhere.json: needs a quantization config"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_cannot_be_done_is_refused_at_once(settings: dict[str, Any], message: str, source: Path) -> None:
    """In the constructor, before a run of hours: no parameter is taken and ignored."""
    with pytest.raises(RecipeError, match=message):
        StreamingQuantizer(source, "/unused", **settings)


@pytest.mark.parametrize("scheme", ["fp8", "int4_awq"])
def test_the_formats_that_the_prototype_only_offered(scheme: str, tmp_path: Path) -> None:
    """It raised NotImplementedError after hours; now they are what Recipe makes of the names."""
    tensors = {f"model.layers.0.mlp.{p}_proj.weight": random_tensor(128, 128) for p in ("gate", "up", "down")}
    wide = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, {"model_type": "llama"})
    plan = StreamingQuantizer(wide, tmp_path / "old", format=scheme).run()
    convert(wide, tmp_path / "new", Recipe(scheme=scheme))
    assert contents(tmp_path / "old") == contents(tmp_path / "new")
    assert {form.name for form in plan.formats.values()} == {"fp8" if scheme == "fp8" else "w4a16"}


@pytest.mark.parametrize("scheme", ["NVFP4", "int3", "awq"])
def test_formats_that_do_not_exist_are_refused(scheme: str, source: Path, tmp_path: Path) -> None:
    """At once, with those there are."""
    with pytest.raises(RecipeError, match=rf"format must be one of nvfp4, .* int4_awq, .*bf16, got '{scheme}'"):
        StreamingQuantizer(source, tmp_path / "out", format=scheme)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [{"device": "auto"}, {"device": "cpu"}, {"num_gpus": 0}, {"block_size": 16}])
def test_historic_settings_without_effect_are_taken(settings: dict[str, Any], source: Path, tmp_path: Path) -> None:
    """Old notebooks pass them explicitly."""
    StreamingQuantizer(source, tmp_path / "out", **settings).run()
    assert (tmp_path / "out" / "mso_hub.json").is_file()


def test_resume_continues_and_its_opposite_starts_over(source: Path, tmp_path: Path) -> None:
    """A run that was stopped after a shard; the journal decides, not the existence of files."""
    whole = tmp_path / "whole"
    StreamingQuantizer(source, whole).run()
    for resume in (True, False):
        out = tmp_path / f"out-{resume}"
        with pytest.raises(KeyboardInterrupt):
            StreamingQuantizer(source, out, on_event=stopping(ShardDone)).run()
        assert not out.exists()
        events: list[Event] = []
        StreamingQuantizer(source, out, resume=resume, on_event=events.append).run()
        resumed = {event.shard for event in events if isinstance(event, ShardResumed)}
        assert bool(resumed) == resume
        assert contents(out) == contents(whole)


def test_a_finished_output_is_replaced_only_without_resume(source: Path, tmp_path: Path) -> None:
    """Other settings over a finished output are refused; starting over is explicit."""
    out = tmp_path / "out"
    StreamingQuantizer(source, out).run()
    with pytest.raises(SinkError, match="holds a finished run with another source or other settings"):
        StreamingQuantizer(source, out, mlp_only=False).run()
    StreamingQuantizer(source, out, mlp_only=False, resume=False).run()
    assert "model.layers.0.self_attn.q_proj.weight_packed" in tensors_of(out)


@pytest.mark.parametrize("verbose", [True, False])
def test_verbose_decides_whether_anybody_listens(
    verbose: bool, source: Path, packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Progress goes to on_event; nothing is printed either way."""
    quantized: list[Event] = []
    dense: list[Event] = []
    StreamingQuantizer(source, tmp_path / "out", verbose=verbose, on_event=quantized.append).run()
    decompress_model_incremental(packed, tmp_path / "dense", verbose=verbose, on_event=dense.append)
    for events in (quantized, dense):
        assert bool(events) == verbose
        assert not verbose or isinstance(events[-1], Published)
    assert capfd.readouterr() == ("", "")


def test_decompression_is_convert_under_its_old_name(packed: Path, tmp_path: Path) -> None:
    """Paths as text, all parameters by position."""
    settings = (0, False, False, False)
    plan = decompress_model_incremental(str(packed), str(tmp_path / "old"), *settings)
    convert(packed, tmp_path / "new", Recipe(scheme="bf16"))
    assert contents(tmp_path / "old") == contents(tmp_path / "new")
    assert plan.formats == {}
    assert {t.dtype for t in tensors_of(tmp_path / "old").values()} == {torch.bfloat16}


def test_fresh_starts_over(packed: Path, tmp_path: Path) -> None:
    """An unfinished decompression is continued, unless fresh."""
    for fresh in (False, True):
        out = tmp_path / f"out-{fresh}"
        with pytest.raises(KeyboardInterrupt):
            decompress_model_incremental(packed, out, on_event=stopping(ShardDone))
        events: list[Event] = []
        decompress_model_incremental(packed, out, fresh=fresh, on_event=events.append)
        assert any(isinstance(event, ShardResumed) for event in events) != fresh
        assert (out / "mso_hub.json").is_file()


def test_text_only_leaves_the_vision_part_out(tmp_path: Path) -> None:
    """A multimodal checkpoint with one packed layer, as Kimi-K2.5 names things."""
    tensors = {
        "language_model.model.embed_tokens.weight": random_tensor(32, 64),
        "language_model.model.layers.0.mlp.up_proj.weight": random_tensor(32, 64),
        "vision_tower.blocks.0.mlp.fc0.weight": random_tensor(16, 16),
    }
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {}}
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, config)
    convert(source, tmp_path / "packed", Recipe())
    decompress_model_incremental(tmp_path / "packed", tmp_path / "whole")
    assert set(tensors_of(tmp_path / "whole")) == set(tensors)
    decompress_model_incremental(tmp_path / "packed", tmp_path / "text", text_only=True)
    assert set(tensors_of(tmp_path / "text")) == {
        "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight",
    }  # fmt: skip
    assert json.loads((tmp_path / "text" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_decompression_refuses_what_it_cannot_do(source: Path, packed: Path, tmp_path: Path) -> None:
    """GPUs, and a source without packed weights."""
    with pytest.raises(RecipeError, match="num_gpus 2: this version computes on processors or on one GPU"):
        decompress_model_incremental(packed, tmp_path / "out", num_gpus=2)
    with pytest.raises(PlanError, match="every weight is dense already"):
        decompress_model_incremental(source, tmp_path / "out")
    with pytest.raises(MsoError, match="found nothing there"):
        decompress_model_incremental(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()
