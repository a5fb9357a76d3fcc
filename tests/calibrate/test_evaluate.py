"""The small trained model on text that it never saw: every number against the whole model under transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mso_hub.calibrate.evaluate import Settings, evaluate
from mso_hub.calibrate.text import Rows
from mso_hub.calibrate.walk import Memory, Observer, Walk
from mso_hub.errors import CheckpointError, MsoError, NonFiniteError, RecipeError
from mso_hub.events import BatchDone, Calibrating, Evaluated, Event, LayerDone
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from mso_hub.plan.evaluation import Evaluation, Reference, read_evaluation, write_evaluation
from mso_hub.source import open_source
from tests.calibrate.architectures import quiet_transformers, save, token_ids
from tests.calibrate.heldout import REAL, divergence, heldout, logits, perplexity

SHORT = heldout(1024)
ALL: dict[str, Any] = {"mode": "all-linear"}


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    """Without transformers' advice about kernels that are not installed."""
    with quiet_transformers():
        yield


def against(found: Evaluation) -> Reference:
    """What it was compared with."""
    assert found.reference is not None
    return found.reference


def tried(recipe: Recipe, rows: Rows = SHORT) -> Reference:
    """A recipe on the trained model, without writing it."""
    return against(evaluate(REAL, rows, recipe=recipe))


def copy(folder: Path, **changes: Any) -> Path:
    """The trained model in another folder; `changes` replace tensors, None removes one."""
    folder.mkdir()
    for file in REAL.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
            continue
        tensors = load_file(file) | {k: v for k, v in changes.items() if v is not None}
        save_file({k: v for k, v in tensors.items() if k not in changes or v is not None}, folder / file.name)
    return folder


def test_a_model_is_like_itself_and_has_the_perplexity_that_transformers_gives_it() -> None:
    found = evaluate(REAL, SHORT, against=REAL)
    assert found.perplexity == against(found).perplexity
    assert found.perplexity == pytest.approx(perplexity(SHORT, logits(REAL, SHORT)), rel=1e-6)
    assert (against(found).kl, against(found).kl_error, against(found).agreement) == (0, 0, 1)
    assert (found.scheme, found.activations, found.cache, found.tokens) == ("BF16", {}, 0, 1024)


def test_a_packed_checkpoint_has_the_logits_of_its_decompressed_twin(tmp_path: Path) -> None:
    """Bit for bit, and the numbers that follow from them."""
    convert(REAL, tmp_path / "packed", Recipe(**ALL))
    convert(tmp_path / "packed", tmp_path / "dense", Recipe(scheme="bf16"))
    expected, original = logits(tmp_path / "dense", SHORT), logits(REAL, SHORT)
    walk, hidden = Walk(open_source(tmp_path / "packed")), dict[int, torch.Tensor]()
    batches = [torch.from_numpy(batch) for batch in SHORT.batches()]
    walk.run(batches, Observer(), logits=hidden.__setitem__)
    assert all(torch.equal(torch.cat(list(walk.head(hidden[at])), 1), whole) for at, whole in enumerate(expected))
    found = evaluate(tmp_path / "packed", SHORT, against=REAL)
    kl, agreement = divergence(original, expected)
    assert against(found).kl == pytest.approx(kl, rel=1e-4)
    assert against(found).agreement == agreement
    assert found.perplexity == pytest.approx(perplexity(SHORT, expected), rel=1e-6)
    assert found.scheme == "NVFP4 (W4A16, compressed-tensors)"


BANDS: tuple[tuple[str, Recipe, float, float], ...] = (
    ("INT8 W8A16", Recipe(scheme="w8a16", **ALL), 0, 0.0005),
    ("INT8 W8A8", Recipe(scheme="int8", **ALL), 0, 0.0005),
    ("FP8 block", Recipe(scheme="fp8_block", **ALL), 0.0002, 0.0015),
    ("NVFP4 W4A16", Recipe(**ALL), 0.001, 0.006),
    ("INT4 g32", Recipe(scheme="w4a16", group_size=32, **ALL), 0.0015, 0.004),
    ("INT4 g128", Recipe(scheme="w4a16", group_size=128, **ALL), 0.002, 0.006),
    ("MXFP4 W4A16", Recipe(scheme="mxfp4", **ALL), 0.002, 0.006),
    ("NVFP4 W4A4", Recipe(activations=4, **ALL), 0.006, 0.015),
    ("MXFP4 W4A4", Recipe(scheme="mxfp4", activations=4, **ALL), 0.01, 0.03),
    ("NVFP4 W4A4, amax / 8", Recipe(input_scale=2 / 2688, **ALL), 0.1, 2),
)


def test_every_scheme_is_in_its_band_and_they_keep_their_order() -> None:
    """KL per token, from INT8 to activations that are clipped: what is wired wrongly is off by orders of magnitude."""
    rows = heldout(4096)
    found = [tried(recipe, rows).kl for _, recipe, _, _ in BANDS]
    for (name, _, low, high), kl in zip(BANDS, found, strict=True):
        assert low < kl < high, name
    assert found == sorted(found)


WRITTEN: dict[str, Recipe] = {
    "nvfp4": Recipe(activations=4, **ALL),
    "nvfp4 modelopt": Recipe(layout="modelopt", input_scale=0.004, **ALL),
    "nvfp4 experts": Recipe(input_scale=0.002),
    "mxfp4": Recipe(scheme="mxfp4", activations=4, **ALL),
    "mxfp4 W4A8": Recipe(scheme="mxfp4", activations=8, **ALL),
    "mxfp8": Recipe(scheme="mxfp8", **ALL),
    "mxfp8 modelopt": Recipe(scheme="mxfp8", layout="modelopt", **ALL),
    "fp8": Recipe(scheme="fp8", **ALL),
    "fp8 static": Recipe(scheme="fp8", input_scale=0.05, **ALL),
    "fp8 modelopt": Recipe(scheme="fp8", layout="modelopt", input_scale=0.05, **ALL),
    "fp8_dynamic": Recipe(scheme="fp8_dynamic", **ALL),
    "fp8_dynamic modelopt": Recipe(scheme="fp8_dynamic", layout="modelopt", ignore=("*experts*",), **ALL),
    "fp8_block": Recipe(scheme="fp8_block", **ALL),
    "fp8_block modelopt": Recipe(scheme="fp8_block", layout="modelopt", ignore=("*experts*",), **ALL),
    "deepseek": Recipe(scheme="fp8_block", layout="deepseek", **ALL),
    "int8": Recipe(scheme="int8", **ALL),
    "w4a16": Recipe(scheme="w4a16", group_size=32, symmetric=False, **ALL),
    "cache": Recipe(kv_cache=True, **ALL),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_recipe_would_do_is_what_it_does(name: str, tmp_path: Path) -> None:
    """The numbers of a recipe that is only tried are those of the checkpoint that it writes, to the last bit."""
    rows, recipe = heldout(512), WRITTEN[name]
    convert(REAL, tmp_path / "out", recipe)
    planned = evaluate(REAL, rows, recipe=recipe)
    written = evaluate(tmp_path / "out", rows, against=REAL)
    assert against(planned).kl > 0
    assert (planned.tried, written.tried) == (True, False)
    same = replace(planned, source="out", fingerprint=written.fingerprint, scheme=written.scheme, tried=False)
    assert same == replace(written, reference=planned.reference, perplexity=planned.perplexity)
    assert (planned.perplexity, against(planned)) == (written.perplexity, against(written))
    assert planned.scheme.startswith(written.scheme)


@pytest.mark.parametrize("name", ["granitemoe", "qwen3_5_moe", "deepseek_v3", "phi3", "falcon_h1", "gemma3"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    """Experts in one tensor, fused projections, latent attention, Mamba layers: tried as it would be written."""
    model = save(name, tmp_path / "model")
    rows = Rows("random", tuple(token_ids(2, 24).numpy()), "", (), (), 2)
    recipe = Recipe(scheme="fp8", input_scale=0.02, unloadable=True, **ALL)
    convert(model, tmp_path / "out", recipe)
    written = evaluate(tmp_path / "out", rows, against=model)
    assert against(written) == against(evaluate(model, rows, recipe=recipe))
    assert against(written).kl > 0
    assert written.activations["FP8 static"] > 0


def test_weights_only_leaves_activations_alone(tmp_path: Path) -> None:
    convert(REAL, tmp_path / "out", Recipe(activations=4, kv_cache=True, **ALL))
    found = evaluate(tmp_path / "out", SHORT, against=REAL, weights_only=True)
    assert against(found).kl == tried(Recipe(**ALL)).kl
    assert (found.activations, found.cache) == ({}, 0)
    assert "left as they are" in found.notes[0]


def test_an_fp8_cache_costs_little_and_a_wrong_scale_of_it_much() -> None:
    """Keys and values go through E4M3; a scale that clips them ruins the model."""
    layers = [f"model.layers.{layer}.self_attn" for layer in range(4)]
    kl = {
        scale: tried(Recipe(scheme="w8a16", kv_cache=True, kv_scales=dict.fromkeys(layers, (scale, scale)), **ALL)).kl
        for scale in (1.0, 0.0002)
    }
    plain = tried(Recipe(scheme="w8a16", **ALL)).kl
    assert plain < kl[1.0] < 0.003
    assert kl[0.0002] > 0.05
    assert evaluate(REAL, heldout(256), recipe=Recipe(scheme="w8a16", kv_cache=True, **ALL)).cache == 4


def test_hidden_states_in_files_give_the_same_numbers(tmp_path: Path) -> None:
    """A limit of main memory puts the reference's hidden states into files, which are gone afterwards."""
    recipe = Recipe(**ALL)
    settings = Settings(memory=Memory(cpu=8 << 30, work=tmp_path))
    limited = evaluate(REAL, SHORT, recipe=recipe, settings=settings)
    assert limited == evaluate(REAL, SHORT, recipe=recipe)
    assert not list(tmp_path.iterdir())


def test_rows_of_unequal_length_count_by_their_tokens() -> None:
    flat = heldout(512).ids.reshape(-1)
    sequences = (flat[:100], flat[100:140], flat[140:240])
    rows = Rows("three rows", sequences, "", (), (), 2)
    found = evaluate(REAL, rows)
    parts = [perplexity(Rows("", (s,), "", (), (), 1), logits(REAL, Rows("", (s,), "", (), (), 1))) for s in sequences]
    nats = sum(torch.tensor(part).log().item() * (len(s) - 1) for part, s in zip(parts, sequences, strict=True))
    assert found.perplexity == pytest.approx(torch.tensor(nats / (240 - 3)).exp().item(), rel=1e-4)


def test_progress_counts_the_layers_of_both_models() -> None:
    events: list[Event] = []
    evaluate(REAL, heldout(256), against=REAL, on_event=events.append)
    assert [e.layers for e in events if isinstance(e, Calibrating)] == [8]
    assert [(e.index, e.layers) for e in events if isinstance(e, LayerDone)] == [(at, 8) for at in range(8)]
    assert sum(e.tokens for e in events if isinstance(e, BatchDone)) == 8 * 256
    assert isinstance(events[-1], Evaluated)


def test_numbers_survive_their_file(tmp_path: Path) -> None:
    found = evaluate(REAL, heldout(256), recipe=Recipe(activations=4, **ALL))
    write_evaluation(found, tmp_path / "found.json")
    assert read_evaluation(tmp_path / "found.json") == found
    write_evaluation(found, tmp_path / "found.md")
    assert f"{against(found).kl:.5f}" in (tmp_path / "found.md").read_text()
    with pytest.raises(RecipeError, match=r"\.json or \.md"):
        write_evaluation(found, tmp_path / "found.txt")


@pytest.mark.parametrize("change", [{"kind": "mso_hub error table 1"}, {"perplexity": "low"}, {"reference": {"kl": 1}}])
def test_a_file_of_something_else_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    found = evaluate(REAL, heldout(256)).as_dict() | change
    (tmp_path / "found.json").write_text(json.dumps(found))
    with pytest.raises(RecipeError, match="must be an evaluation of mso_hub"):
        read_evaluation(tmp_path / "found.json")


def test_models_with_other_vocabularies_cannot_be_compared(tmp_path: Path) -> None:
    """By their size, and by what their tokenizers call a token."""
    other = copy(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RecipeError, match="different tokenizers"):
        evaluate(other, SHORT, against=REAL)
    with pytest.raises(RecipeError, match=r"have 2,048 and .* token ids"):
        evaluate(REAL, SHORT, against=save("llama", tmp_path / "llama"))


def test_a_broken_weight_is_an_error_and_not_a_number(tmp_path: Path) -> None:
    name = "model.norm.weight"
    broken = copy(tmp_path / "broken")
    for file in broken.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name][0] = torch.nan
            save_file(tensors, file)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        evaluate(broken, heldout(256), against=REAL)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(RecipeError, match="rows of one token"):
        evaluate(REAL, Rows("ones", (SHORT.sequences[0][:1],), "", (), (), 1))
    with pytest.raises(RecipeError, match="quantizes nothing"):
        evaluate(REAL, SHORT, recipe=Recipe(scheme="bf16"))
    with pytest.raises(RecipeError, match="text_only"):
        evaluate(REAL, SHORT, recipe=Recipe(text_only=True))


def test_activations_that_are_not_known_name_the_way_out(tmp_path: Path) -> None:
    convert(REAL, tmp_path / "out", Recipe(scheme="int8", **ALL))
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["num_bits"] = 4
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"int activations of 4 bits.*--weights_only"):
        evaluate(tmp_path / "out", SHORT)
    assert evaluate(tmp_path / "out", SHORT, weights_only=True).activations == {}


def test_a_lost_scale_is_named(tmp_path: Path) -> None:
    """vLLM would take whatever lies in memory."""
    convert(REAL, tmp_path / "out", Recipe(input_scale=1.0, **ALL))
    lost = "model.layers.1.self_attn.q_proj.input_global_scale"
    for file in (tmp_path / "out").glob("*.safetensors"):
        save_file({k: v for k, v in load_file(file).items() if k != lost}, file, metadata={"format": "pt"})
    index = tmp_path / "out" / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text())
        content["weight_map"].pop(lost, None)
        index.write_text(json.dumps(content))
    with pytest.raises(MsoError, match=rf"{lost}.*--weights_only"):
        evaluate(tmp_path / "out", SHORT)
