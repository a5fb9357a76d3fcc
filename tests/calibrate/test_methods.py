"""Methods over a walk: on the small trained model, and on tiny random ones for what their checkpoints look like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mso_hub.calibrate.collect import collect_statistics
from mso_hub.calibrate.methods import METHODS, MethodSettings, Prepared, from_statistics, run
from mso_hub.calibrate.observer import Observer
from mso_hub.calibrate.walk import Memory, Walk
from mso_hub.calibrate.weights import Weights
from mso_hub.errors import RecipeError, ResumeError
from mso_hub.events import Event, LayerDone
from mso_hub.pipeline import convert, make_plan
from mso_hub.plan import Recipe
from mso_hub.source import open_source, read_checkpoint
from mso_hub.verify import verify_checkpoint
from tests.calibrate.architectures import quiet_transformers, save, token_ids
from tests.calibrate.heldout import heldout as heldout_rows
from tests.calibrate.methods import INT4, REAL, batches, cut, heldout, kl, kl_of, predictions

SMALL = 4096
"""Tokens where the quality does not matter."""
INT8_ROWS = Recipe(scheme="w8a16", mode="all-linear", group_size=0)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """Held-out text."""
    return heldout(8192)


@pytest.fixture(scope="module")
def original(ids: Tensor) -> Tensor:
    """What the BF16 model predicts."""
    return predictions(REAL, ids)


def prepared(recipe: Recipe, folder: Path, method: str = "gptq", tokens: int = SMALL, **settings: object) -> Prepared:
    """A method over the small trained model."""
    walk = Walk(open_source(REAL))
    return run(walk, batches(tokens), recipe, folder, method=method, settings=MethodSettings(**settings))  # type: ignore[arg-type]


def bits(tensor: Tensor) -> Tensor:
    """Its bytes."""
    return tensor.reshape(-1).view(torch.uint8)


def packed(folder: Path) -> dict[str, Tensor]:
    """All tensors of the layer files of a work folder."""
    return {k: v for path in sorted(folder.glob("layer-*.safetensors")) for k, v in load_file(path).items()}


def test_every_method_answers_more_like_the_original_than_rounding_to_nearest(
    ids: Tensor, original: Tensor, tmp_path: Path
) -> None:
    """INT4 in groups of 32, every linear layer; GPTQ by far. Measured: see tests/benchmarks/bench_methods.py."""
    nearest = kl_of(REAL, INT4, original, ids, tmp_path / "nearest")
    found = {}
    for method, tokens in {"gptq": 8192, "weighted": 32768, "awq": 8192}.items():
        made = prepared(INT4, tmp_path / method / "work", method, tokens)
        found[method] = kl_of(made.source, INT4, original, ids, tmp_path / method)
    assert found["gptq"] < 0.5 * nearest
    assert found["weighted"] < nearest
    assert found["awq"] < nearest


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(scheme="nvfp4", mode="all-linear"),
        Recipe(scheme="nvfp4", mode="all-linear", layout="modelopt", activations=4),
        Recipe(scheme="mxfp4", mode="all-linear"),
        Recipe(scheme="w4a16", mode="all-linear", group_size=32, symmetric=False),
        INT8_ROWS,
        Recipe(scheme="int8", mode="all-linear"),
    ],
    ids=["nvfp4", "nvfp4 modelopt w4a4", "mxfp4", "w4a16 asymmetric", "w8a16 rows", "int8"],
)
def test_gptq_packs_what_the_conversion_copies(recipe: Recipe, ids: Tensor, original: Tensor, tmp_path: Path) -> None:
    """In the layout that the format has, with nothing encoded again; better than nearest in every one of them."""
    made = prepared(recipe, tmp_path / "work", tokens=16384)
    plan = convert(made.source, tmp_path / "packed", recipe)
    assert not any(step.format for shard in plan.shards for step in shard.steps)
    there = packed(tmp_path / "work")
    out = {k: v for path in (tmp_path / "packed").glob("*.safetensors") for k, v in load_file(path).items()}
    assert there.keys() <= out.keys()
    assert all(torch.equal(bits(out[name]), bits(tensor)) for name, tensor in there.items())
    plain = convert(REAL, tmp_path / "plain", recipe)
    assert plan.config == plain.config
    names = [{s.name: {t.name for t in s.tensors} for s in p.shards} for p in (plan, plain)]
    assert names[0] == names[1]
    assert not verify_checkpoint(open_source(tmp_path / "packed")).problems
    for name in ("packed", "plain"):
        convert(tmp_path / name, tmp_path / f"{name} dense", Recipe(scheme="bf16"))
    mine, nearest = (kl(original, predictions(tmp_path / f"{name} dense", ids)) for name in ("packed", "plain"))
    # Eight bits lose about as little as the dense result, which is rounded to BF16.
    assert mine < (0.95 if recipe.scheme in ("w8a16", "int8") else 0.75) * nearest


def test_a_limit_on_memory_changes_nothing(tmp_path: Path) -> None:
    """Several passes, one expert at a time, inputs of experts in files: the same codes."""
    prepared(INT4, tmp_path / "all")
    walk = Walk(open_source(REAL), memory=Memory(cpu=600 << 20))
    run(walk, batches(SMALL), INT4, tmp_path / "little", hessians=300_000)
    one, other = packed(tmp_path / "all"), packed(tmp_path / "little")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert not list((tmp_path / "little").glob("experts-*"))


def test_experts_together_or_one_at_a_time_give_the_same(tmp_path: Path) -> None:
    """`stack` fills the bank, quantized weights are put into it."""
    found = {}
    for experts in ("expert", "stack"):
        walk = Walk(open_source(REAL), experts=experts)
        run(walk, batches(SMALL), INT4, tmp_path / experts)
        found[experts] = packed(tmp_path / experts)
    assert all(torch.equal(found["expert"][k], found["stack"][k]) for k in found["expert"])


class _Killed(Exception):
    """Stands for a crash."""


def _stop_after(layer: int) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if isinstance(event, LayerDone) and event.index == layer:
            raise _Killed

    return listen


@pytest.mark.parametrize("method", ["gptq", "weighted", "awq"])
def test_a_run_that_ended_early_goes_on(method: str, tmp_path: Path) -> None:
    """After the last complete layer, with the result that it would have had."""
    whole = prepared(INT4, tmp_path / "whole", method)
    with pytest.raises(_Killed):
        run(Walk(open_source(REAL), on_event=_stop_after(1)), batches(SMALL), INT4, tmp_path / "torn", method=method)
    assert len(list((tmp_path / "torn").glob("layer-*.safetensors"))) == 2
    seen: list[int] = []
    walk = Walk(open_source(REAL), on_event=lambda e: seen.append(e.index) if isinstance(e, LayerDone) else None)
    made = run(walk, batches(SMALL), INT4, tmp_path / "torn", method=method)
    assert seen == [2, 3]
    one, other = packed(tmp_path / "whole"), packed(tmp_path / "torn")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert made.notes == whole.notes
    with pytest.raises(ResumeError, match="work of another run"):
        run(walk, batches(SMALL), INT4, tmp_path / "torn", method=method, settings=MethodSettings(least_rows=7))


def test_experts_that_saw_too_little_are_rounded_to_nearest(tmp_path: Path) -> None:
    """They are there, they are counted, and a layer's other weights have their method."""
    walk = Walk(open_source(REAL))
    made = run(walk, [batches(256, 1)[0][:, :64]], INT4, tmp_path / "work")
    assert any("saw too little" in note for note in made.notes)
    convert(made.source, tmp_path / "packed", INT4)
    convert(REAL, tmp_path / "plain", INT4)
    mine, plain = (
        {k: v for path in (tmp_path / n).glob("*.safetensors") for k, v in load_file(path).items()}
        for n in ("packed", "plain")
    )
    assert mine.keys() == plain.keys()
    same = {k for k in mine if k.endswith("weight_packed") and torch.equal(mine[k], plain[k])}
    assert same
    assert all("experts" in name for name in same)
    assert any(f"the first is {name.removesuffix('.weight_packed')}" in " ".join(made.notes) for name in same)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("qwen3_5_moe", INT8_ROWS),
        ("mixtral", INT8_ROWS),
        ("llama", INT8_ROWS),
        ("deepseek_v3", INT8_ROWS),
        ("gemma3", INT8_ROWS),
        ("qwen3_next", INT8_ROWS),
    ],
)
@pytest.mark.parametrize("method", ["gptq", "weighted", "awq"])
def test_other_architectures(name: str, recipe: Recipe, method: str, tmp_path: Path) -> None:
    """Fused 3-D experts, other names, latent attention, norms that add one: as many tensors as without a method."""
    with quiet_transformers():
        folder = save(name, tmp_path / "model", torch.bfloat16)
        walk = Walk(open_source(folder))
        made = run(walk, cut(token_ids(8, 48), 2), recipe, tmp_path / "work", method=method)
    plan, plain = make_plan(made.source, recipe), make_plan(folder, recipe)
    assert {t.name for s in plan.shards for t in s.tensors} == {t.name for s in plain.shards for t in s.tensors}
    assert plan.config == plain.config
    convert(made.source, tmp_path / "packed", recipe)
    out = Weights(open_source(tmp_path / "packed"), read_checkpoint(open_source(tmp_path / "packed")), "F32")
    before = Weights(made.source, read_checkpoint(made.source), "F32")
    for weight in out.names:
        if weight in before.names and before.shape(weight) == out.shape(weight):
            a, b = before.get(weight).float(), out.get(weight).float()
            assert (a - b).norm() <= 0.02 * a.norm() + 1e-6, weight


def test_awq_changes_nothing_but_where_scales_are(ids: Tensor, original: Tensor, tmp_path: Path) -> None:
    """Its source predicts what the original does, up to the rounding of BF16; its numbers are others."""
    made = prepared(INT4, tmp_path / "work", "awq", 8192)
    assert any("40 inputs" in note for note in made.notes)
    walk = Walk(made.source)
    found: dict[int, Tensor] = {}
    text = cut(ids[:16], 8)

    def keep(batch: int, hidden: Tensor) -> None:
        found[batch] = torch.cat(list(walk.head(hidden)), 1)

    walk.run(text, Observer(), logits=keep)
    mine = torch.cat([found[0], found[1]]).flatten(0, 1).float().log_softmax(-1)
    assert kl(original[: len(mine)], mine) < 3e-4
    a, b = walk.weights, Walk(open_source(REAL)).weights
    for part in ("input_layernorm", "self_attn.q_proj", "mlp.gate", "mlp.experts.3.down_proj"):
        name = f"model.layers.1.{part}.weight"
        assert not torch.equal(a.get(name), b.get(name)), name


def test_a_norm_that_adds_one_is_left_alone(tmp_path: Path) -> None:
    """Gemma computes with 1 + weight, so dividing the weight would be another model: the proof says no."""
    with quiet_transformers():
        folder = save("gemma3", tmp_path / "model", torch.bfloat16)
        walk = Walk(open_source(folder))
        made = run(walk, cut(token_ids(8, 48), 2), INT8_ROWS, tmp_path / "work", method="awq")
    assert any("keep their scale" in note and "layernorm" in note for note in made.notes)
    a, b = Weights(made.source, read_checkpoint(made.source), "BF16"), walk.weights
    norms = [name for name in a.names if name.endswith("layernorm.weight")]
    assert norms
    assert all(torch.equal(a.get(name), b.get(name)) for name in norms)


def test_smoothquant_moves_outliers_into_weights(tmp_path: Path) -> None:
    """For INT8 activations; the largest activation per column is nearer to the largest weight."""
    recipe = Recipe(scheme="int8", mode="all-linear")
    made = prepared(recipe, tmp_path / "work", "smoothquant")
    assert any("8 inputs" in note for note in made.notes)
    assert make_plan(made.source, recipe).config == make_plan(REAL, recipe).config
    with pytest.raises(RecipeError, match="activations of 8 bits or fewer"):
        prepared(INT4, tmp_path / "other", "smoothquant")


def test_a_packed_source_can_be_quantized_with_a_method(ids: Tensor, original: Tensor, tmp_path: Path) -> None:
    """FP8 in blocks to INT4: what the recipe leaves alone is decoded, as without a method."""
    convert(REAL, tmp_path / "fp8", Recipe(scheme="fp8_block", mode="all-linear"))
    recipe = Recipe(scheme="w4a16", group_size=32)
    for method in ("gptq", "awq"):
        walk = Walk(open_source(tmp_path / "fp8"))
        made = run(walk, batches(8192), recipe, tmp_path / method / "work", method=method)
        assert make_plan(made.source, recipe).config == make_plan(tmp_path / "fp8", recipe).config
        if method == "gptq":
            nearest = kl_of(tmp_path / "fp8", recipe, original, ids, tmp_path / "nearest")
            assert kl_of(made.source, recipe, original, ids, tmp_path / method) < nearest


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    """Before anything is computed, each with the way out."""
    walk = Walk(open_source(REAL))
    with pytest.raises(RecipeError, match=f"method must be one of {', '.join(METHODS)}, got 'magic'"):
        run(walk, batches(SMALL), INT4, tmp_path / "a", method="magic")
    with pytest.raises(RecipeError, match="--method gptq: fp8_block has nothing that it could choose"):
        run(walk, batches(SMALL), Recipe(scheme="fp8_block"), tmp_path / "b")


def test_second_moments_from_a_file_give_what_a_walk_gives(tmp_path: Path) -> None:
    """Without running the model again; statistics without them say how they are made."""
    text = heldout_rows(SMALL)
    walk = Walk(open_source(REAL))
    run(walk, [torch.from_numpy(ids) for ids in text.batches()], INT4, tmp_path / "walk", method="weighted")
    made = collect_statistics(REAL, text, tmp_path / "with.safetensors", channels=True)
    found = from_statistics(open_source(REAL), made, INT4, tmp_path / "file")
    assert make_plan(found.source, INT4).config == make_plan(REAL, INT4).config
    one, other = packed(tmp_path / "walk"), packed(tmp_path / "file")
    assert one.keys() == other.keys()
    changed = sum(int((bits(one[k]) != bits(other[k])).sum()) for k in one)
    assert changed < 1e-3 * sum(bits(one[k]).numel() for k in one)  # the file has F32
    plain = collect_statistics(REAL, text, tmp_path / "without.safetensors")
    with pytest.raises(RecipeError, match="calibrate again with --channels"):
        from_statistics(open_source(REAL), plain, INT4, tmp_path / "none")
