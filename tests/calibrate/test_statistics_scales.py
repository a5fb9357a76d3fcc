"""Statistics -> scales of a checkpoint: who shares, what those get that saw nothing, whose statistics are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mso_hub.calibrate.scales import shared_amax, with_statistics
from mso_hub.calibrate.statistics import read_statistics
from mso_hub.card import write_card
from mso_hub.errors import PlanError, RecipeError
from mso_hub.formats import Scheme
from mso_hub.pipeline import convert, make_plan
from mso_hub.plan import Recipe, Rule
from mso_hub.plan.recipe_file import read_recipe
from mso_hub.recard import make_card
from mso_hub.sink import MemorySink
from mso_hub.source import open_source
from mso_hub.verify import verify_checkpoint
from tests.calibrate.statistics import some_amax, write_some
from tests.helpers import in_shards, random_tensor, tensors_of, tiny_llama, tiny_moe, write_checkpoint

L = "model.layers.0"
W4A4 = Recipe(input_scale=1.0, mode="all-linear")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of four experts."""
    return tiny_moe(tmp_path_factory.mktemp("scales") / "moe")


def converted(source: Path, target: Path, stats: Path, recipe: Recipe = W4A4, **said: float) -> dict[str, torch.Tensor]:
    """Everything that a conversion with statistics writes."""
    convert(source, target, with_statistics(recipe, stats, source, **said))
    assert verify_checkpoint(target, source=source).ok
    return tensors_of(target)


def largest(amax: dict[str, float], module: str) -> float:
    """What a module is to get: the largest of its fused partners, of an expert's the largest of its layer."""
    leaves = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gu", "up_proj": "gu"}
    parts = module.split(".")
    group = leaves.get(parts[-1], parts[-1])

    def same(other: str) -> bool:
        """Do the two share a scale?"""
        theirs = other.split(".")
        where = ".mlp.experts." in module and ".mlp.experts." in other
        near = theirs[2] == parts[2] if where else theirs[:-1] == parts[:-1]
        return near and leaves.get(theirs[-1], theirs[-1]) == group

    return max(value for other, value in amax.items() if same(other))


@pytest.mark.parametrize(
    ("layout", "name"), [("modelopt", "input_scale"), ("compressed-tensors", "input_global_scale")]
)
def test_nvfp4_gets_twice_the_magnitude_in_both_layouts(layout: str, name: str, moe: Path, tmp_path: Path) -> None:
    """2 * amax / 2688, or its reciprocal; fused weights and the experts of a layer share the largest."""
    stats = write_some(tmp_path / "stats", moe)
    found = converted(moe, tmp_path / "out", stats, replace(W4A4, layout=layout))
    scales = {key.rpartition(".")[0]: float(value) for key, value in found.items() if key.endswith(f".{name}")}
    amax = some_amax(moe)
    assert len(scales) == 2 * (4 + 4 * 3)
    for module, scale in scales.items():
        multiplier = torch.tensor(2 * largest(amax, module) / 2688, dtype=torch.float32)
        assert scale == float(multiplier if layout == "modelopt" else 1 / multiplier), module


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize(("said", "factor"), [({}, 1.0), ({"headroom": 4.0}, 4.0)])
def test_fp8_gets_the_magnitude_itself(
    layout: str, said: dict[str, float], factor: float, moe: Path, tmp_path: Path
) -> None:
    """amax / 448: FP8 clips nothing that was seen, and each factor costs a bit of its range."""
    recipe = Recipe(scheme="fp8", input_scale=1.0, mode="all-linear", layout=layout)
    found = converted(moe, tmp_path / "out", write_some(tmp_path / "stats", moe), recipe, **said)
    amax = some_amax(moe)
    scales = {key.rpartition(".")[0]: float(value) for key, value in found.items() if key.endswith(".input_scale")}
    assert len(scales) == 32
    for module, scale in scales.items():
        assert scale == float(torch.tensor(factor * largest(amax, module) / 448, dtype=torch.float32)), module


@pytest.mark.parametrize(("layout", "key"), [
    ("modelopt", "self_attn.k_proj.k_scale"), ("compressed-tensors", "self_attn.k_scale"),
])  # fmt: skip
def test_the_kv_cache_gets_its_scales_also_alone(layout: str, key: str, tmp_path: Path) -> None:
    """amax / 448 in both layouts; weights whose format has no static scale get none, and that is fine."""
    llama = tiny_llama(tmp_path / "llama")
    caches = {f"model.layers.{n}.self_attn": (8.0 + n, 0.5) for n in (0, 1)}
    stats = write_some(tmp_path / "stats", llama, caches=caches)
    recipe = Recipe(scheme="nvfp4", activations=16, kv_cache=True, layout=layout)
    found = converted(llama, tmp_path / "out", stats, recipe)
    assert float(found[f"{L}.{key}"]) == float(torch.tensor(8 / 448))
    values = key.replace("k_proj", "v_proj").replace("k_scale", "v_scale")
    assert float(found[f"model.layers.1.{values}"]) == float(torch.tensor(0.5 / 448))
    assert not [name for name in found if "input" in name.rpartition(".")[2]]
    plan = make_plan(llama, with_statistics(recipe, stats, llama, headroom=2.0))
    assert 16 / 448 in {value for shard in plan.shards for step in shard.steps for value in step.extras}


def test_experts_that_saw_nothing_get_the_layers_largest_and_are_counted(moe: Path, tmp_path: Path) -> None:
    """Never missing, never zero: an engine would divide by it."""
    amax = some_amax(moe)
    unseen = [f"{L}.mlp.experts.2.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")]
    amax |= dict.fromkeys(unseen, 0.0)
    stats = write_some(tmp_path / "stats", moe, amax)
    found = converted(moe, tmp_path / "out", stats, replace(W4A4, layout="modelopt"))
    for module in unseen:
        assert found[f"{module}.input_scale"] == found[f"{module.replace('experts.2', 'experts.0')}.input_scale"] > 0
    (note,) = make_plan(moe, with_statistics(W4A4, stats, moe)).notes
    assert note.startswith("1 of 8 experts saw no token of a text (400 tokens)")
    skipping = with_statistics(replace(W4A4, skip_layers=(0,)), stats, moe)
    assert make_plan(moe, skipping).notes == ()


def test_own_values_of_experts_stay_in_the_file(moe: Path, tmp_path: Path) -> None:
    stats = read_statistics(write_some(tmp_path / "stats", moe))
    shared, _ = shared_amax(stats)
    own = {stats.amax[f"{L}.mlp.experts.{e}.down_proj"] for e in range(4)}
    assert len(own) > 1
    assert {shared[f"{L}.mlp.experts.{e}.down_proj"] for e in range(4)} == {max(own)}


def test_a_layer_without_a_single_token_is_an_error(moe: Path, tmp_path: Path) -> None:
    """Nothing near it tells what its activations are like."""
    amax = {module: 0.0 if f"{L}.mlp.experts" in module else value for module, value in some_amax(moe).items()}
    stats = write_some(tmp_path / "stats", moe, amax)
    with pytest.raises(PlanError, match=r"experts\.0\.gate_proj: saw no token .* calibrate with more text, or ignore"):
        make_plan(moe, with_statistics(W4A4, stats, moe))
    make_plan(moe, with_statistics(replace(W4A4, skip_layers=(0,)), stats, moe))


def test_a_module_that_the_model_never_ran_is_named_with_the_ways_out(moe: Path, tmp_path: Path) -> None:
    amax = some_amax(moe)
    del amax[f"{L}.self_attn.o_proj"]
    stats = write_some(tmp_path / "stats", moe, amax)
    with pytest.raises(PlanError, match=r"self_attn\.o_proj: has no statistics.*ignore it, or .* --input_scale 1\.0"):
        make_plan(moe, with_statistics(W4A4, stats, moe))
    make_plan(moe, with_statistics(replace(W4A4, ignore=(f"{L}.self_attn.o_proj",)), stats, moe))


def test_activations_of_nothing_but_zeros_get_a_scale_that_nothing_exceeds(tmp_path: Path) -> None:
    """The smallest scale would clip whatever another text brings."""
    llama = tiny_llama(tmp_path / "llama")
    stats = read_statistics(write_some(tmp_path / "stats", llama))
    dead = f"{L}.mlp.down_proj"
    zeros = replace(stats, amax={**stats.amax, dead: 0.0})
    found, made = shared_amax(zeros)
    assert (found[dead], made.zeros) == (448.0, (dead,))
    plan = make_plan(llama, with_statistics(W4A4, zeros, llama))
    (note,) = plan.notes
    assert note.startswith("1 modules had nothing but zeros as input; their activation scales stand for magnitudes up")


def test_experts_in_one_tensor_are_found_by_their_row(tmp_path: Path) -> None:
    """`experts.gate_up_proj[1]` is what `experts.1.gate_proj` and `.up_proj` get."""
    bank = f"{L}.mlp.experts"
    tensors = {f"{bank}.gate_up_proj": random_tensor(2, 64, 48), f"{bank}.down_proj": random_tensor(2, 48, 32)}
    config = {"model_type": "qwen3_5_moe_text", "hidden_size": 48, "moe_intermediate_size": 32, "num_hidden_layers": 1}
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, config)
    amax = {
        f"{L}.mlp.experts.{leaf}[{e}]": v for leaf, v in (("gate_up_proj", 2.0), ("down_proj", 3.0)) for e in (0, 1)
    }
    stats = write_some(tmp_path / "stats", source, {**amax, f"{L}.mlp.experts.down_proj[0]": 0.0})
    plan = make_plan(source, with_statistics(Recipe(input_scale=1.0, layout="modelopt"), stats, source))
    scales = {step.weight.module: step.extras for shard in plan.shards for step in shard.steps}
    assert scales == {
        f"{L}.mlp.experts.{e}.{leaf}": (float(torch.tensor(2 * value / 2688)),)
        for e in (0, 1) for leaf, value in (("gate_proj", 2.0), ("up_proj", 2.0), ("down_proj", 3.0))
    }  # fmt: skip
    assert plan.notes[0].startswith("1 of 2 experts saw no token")


def test_the_language_model_of_a_multimodal_one_keeps_its_scales_under_new_names(tmp_path: Path) -> None:
    """Statistics have the names that the source has on disk, the output its own."""
    llama = tiny_llama(tmp_path / "llama", shards=1)
    config = json.loads((llama / "config.json").read_text())
    whole = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": config}
    tensors = {f"language_model.{name}": value for name, value in tensors_of(llama).items()}
    tensors["vision_tower.x.weight"] = random_tensor(16, 16)
    source = write_checkpoint(tmp_path / "in", in_shards(tensors, 1), {**whole, "vision_config": {}})
    caches = {f"language_model.model.layers.{n}.self_attn": (1.0, 2.0) for n in (0, 1)}
    stats = write_some(tmp_path / "stats", source, caches=caches)
    recipe = replace(W4A4, text_only=True, kv_cache=True, layout="modelopt")
    convert(source, tmp_path / "out", with_statistics(recipe, stats, source))
    found = tensors_of(tmp_path / "out")
    expected = some_amax(source)[f"language_model.{L}.mlp.down_proj"]
    assert float(found[f"{L}.mlp.down_proj.input_scale"]) == float(torch.tensor(2 * expected / 2688))
    assert float(found[f"{L}.self_attn.v_proj.v_scale"]) == float(torch.tensor(2 / 448))


# ------------------------------------------------------------------------------------------------- whose they are


def test_a_copy_is_the_same_model_wherever_it_lies_and_however_it_is_cut(moe: Path, tmp_path: Path) -> None:
    stats = write_some(tmp_path / "stats", moe)
    shutil.copytree(moe, tmp_path / "copy")
    config = json.loads((moe / "config.json").read_text())
    write_checkpoint(tmp_path / "recut", in_shards(tensors_of(moe), 5), config)
    for place in ("copy", "recut"):
        assert with_statistics(W4A4, stats, tmp_path / place) == with_statistics(W4A4, stats, moe)


def test_statistics_of_another_model_are_refused(moe: Path, tmp_path: Path) -> None:
    """Of other weights, of another config, of another architecture: each says what differs, and what to do."""
    stats = write_some(tmp_path / "stats", moe)
    trained = tiny_moe(tmp_path / "trained", seed=1)
    with pytest.raises(RecipeError, match="statistics of moe, not of trained, whose weights or config are others; cal"):
        with_statistics(W4A4, stats, trained)
    shutil.copytree(moe, tmp_path / "changed")
    config = json.loads((moe / "config.json").read_text())
    (tmp_path / "changed" / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    with pytest.raises(RecipeError, match="whose weights or config are others"):
        with_statistics(W4A4, stats, tmp_path / "changed")
    llama = tiny_llama(tmp_path / "llama")
    with pytest.raises(
        RecipeError, match=r"not of llama; 26 of its 34 modules are not here, the first is model\.layers"
    ):
        with_statistics(W4A4, stats, llama)


def test_one_changed_weight_is_noticed_where_bytes_are_compared(moe: Path, tmp_path: Path) -> None:
    """Samples are taken of up to 64 matrices: all of a small model's."""
    tensors = tensors_of(moe)
    for name in (f"{L}.mlp.experts.3.up_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
        stats = write_some(tmp_path / "stats", moe)
        changed = {**tensors, name: tensors[name] * 1.5}
        folder = tmp_path / name
        write_checkpoint(folder, in_shards(changed, 2), json.loads((moe / "config.json").read_text()))
        with pytest.raises(RecipeError, match="whose weights or config are others"):
            with_statistics(W4A4, stats, folder)


# ---------------------------------------------------------------------------------------------- recipes and words


def test_statistics_without_use_are_refused(moe: Path, tmp_path: Path) -> None:
    stats = write_some(tmp_path / "stats", moe)
    for recipe in (Recipe(scheme="w4a16"), Recipe(scheme="fp8_dynamic"), Recipe(activations=16)):
        with pytest.raises(RecipeError, match="has no static activation scale, and no FP8 KV cache is announced"):
            with_statistics(recipe, stats, moe)
    with pytest.raises(RecipeError, match="hold nothing for a k_proj; give --kv_scales WHERE, or leave the statistics"):
        with_statistics(Recipe(scheme="w4a16", kv_cache=True), stats, moe)
    (note,) = make_plan(moe, with_statistics(replace(W4A4, kv_cache=True), stats, moe)).notes
    assert note == "the statistics hold nothing for a k_proj, so the FP8 KV cache has no scales; engines take 1.0"


@pytest.mark.parametrize("headroom", [0.5, 0.0, -1.0, float("nan"), float("inf"), 5000.0])
def test_a_senseless_headroom_is_refused(headroom: float, moe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="headroom: must be 1 to 4096, got"):
        with_statistics(W4A4, write_some(tmp_path / "stats", moe), moe, headroom=headroom)


def test_in_a_recipe_with_rules_those_that_take_a_scale_get_it(moe: Path, tmp_path: Path) -> None:
    rules = (
        Rule(Scheme("nvfp4", activations=4, input_scale=1.0), ("*.experts",)),
        Rule(Scheme("fp8_dynamic"), ("*.self_attn",)),
    )
    recipe = with_statistics(Recipe(rules=rules), write_some(tmp_path / "stats", moe), moe)
    assert [rule.scheme.input_scale for rule in recipe.rules] == ["imported", None]
    assert "model.layers.1.mlp.experts.3.w2" not in recipe.input_amax
    make_plan(moe, recipe)


def test_the_output_is_a_recipe_that_asks_for_statistics_again(moe: Path, tmp_path: Path) -> None:
    """Its mso_hub.json names the text, and holds no scale: statistics, or a number, have to be given."""
    stats = write_some(tmp_path / "stats", moe)
    convert(moe, tmp_path / "out", with_statistics(W4A4, stats, moe, headroom=3.0))
    said = json.loads((tmp_path / "out" / "mso_hub.json").read_text())
    assert said["calibration"] == {
        "text": "a text", "rows": 4, "tokens": 400, "sha256": "5" * 64, "source": "moe", "commit": "",
        "version": "0.1", "headroom": 3.0, "unseen": 0, "zeros": 0,
    }  # fmt: skip
    assert "calibration" not in said["recipe"]
    with pytest.raises(RecipeError, match=r"add --input_scale WHERE .* --stats FILE"):
        read_recipe(tmp_path / "out")
    again = with_statistics(read_recipe(tmp_path / "out", waits=True), stats, moe, headroom=3.0)
    convert(moe, tmp_path / "again", again)
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_card_and_verify_name_the_text(moe: Path, tmp_path: Path) -> None:
    """The card of a conversion and that of a finished checkpoint say the same; no path of this machine is in it."""
    stats = write_some(tmp_path / "stats", moe, caches={f"model.layers.{n}.self_attn": (1.0, 2.0) for n in (0, 1)})
    recipe = with_statistics(replace(W4A4, kv_cache=True), stats, moe)
    plan = convert(moe, tmp_path / "out", recipe)
    line = "| Activation scale | measured over 400 tokens in 4 rows of a text; keys and values of the KV cache too |"
    sink = MemorySink()
    for card in (write_card(plan, open_source(moe), sink), make_card(tmp_path / "out", source=moe).content):
        text = card.decode()
        assert line in text
        assert "--stats STATISTICS --input_dir" in text
        assert "imported activation scales" not in text
        assert str(tmp_path) not in text
    (note,) = (n for n in verify_checkpoint(tmp_path / "out").notes if "activation scales" in n)
    assert "measured over 400 tokens in 4 rows of a text; keys and values of the KV cache too" in note


@pytest.mark.parametrize("facts", [5, [], {}, {"text": 5}, {"text": "t", "tokens": "many"}, {"text": "t", "tokens": 5}])
def test_a_strange_manifest_breaks_neither_card_nor_verify(facts: object, moe: Path, tmp_path: Path) -> None:
    convert(moe, tmp_path / "out", with_statistics(W4A4, write_some(tmp_path / "stats", moe), moe))
    path = tmp_path / "out" / "mso_hub.json"
    said = json.loads(path.read_text()) | {"calibration": facts}
    path.write_text(json.dumps(said))
    assert verify_checkpoint(tmp_path / "out").ok
    assert "as stored, not the same for every module" in make_card(tmp_path / "out").content.decode()


def test_another_calibration_is_another_job(moe: Path, tmp_path: Path) -> None:
    """An unfinished output must not go on with other scales, nor say that it read another text."""
    recipes = [
        with_statistics(W4A4, write_some(tmp_path / "first", moe), moe),
        with_statistics(W4A4, write_some(tmp_path / "second", moe, text="another text"), moe),
        with_statistics(W4A4, tmp_path / "first", moe, headroom=2.0),
        W4A4,
    ]
    assert len({make_plan(moe, recipe).job for recipe in recipes}) == 4


def test_statistics_may_be_of_a_packed_source(moe: Path, tmp_path: Path) -> None:
    """FP8 in, W4A4 out: the module has the same name whatever form its weight has."""
    packed = tmp_path / "packed"
    convert(moe, packed, Recipe(scheme="fp8_dynamic", mode="all-linear"))
    amax = some_amax(moe)
    stats = write_some(tmp_path / "stats", packed, amax)
    found = converted(packed, tmp_path / "out", stats, replace(W4A4, layout="modelopt"))
    module = f"{L}.self_attn.o_proj"
    assert float(found[f"{module}.input_scale"]) == float(torch.tensor(2 * amax[module] / 2688))
