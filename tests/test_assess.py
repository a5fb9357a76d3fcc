"""Errors of several formats in one pass, and the recipes chosen from them: against what the formats really write."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from mso_hub import Choice, ErrorTable, Recipe, choose_formats, convert, make_plan, measure_errors, verify_checkpoint
from mso_hub.cli import main
from mso_hub.engine import ThreadEngine
from mso_hub.errors import MsoError, PlanError, RecipeError
from mso_hub.events import Event, ShardDone, ShardResumed, TensorDone
from mso_hub.formats import FORMATS, Scheme
from mso_hub.losses import read_table, sqnr, write_table
from mso_hub.plan import Rule
from mso_hub.sink import MemorySink
from mso_hub.source import MemorySource
from tests.helpers import checkpoint_files, random_tensor, tiny_llama, tiny_moe, write_checkpoint
from tests.hubs import spans, twice, world

TRAINED = Path(__file__).parent / "models" / "tiny-qwen3-moe"
LINEAR = Recipe(mode="all-linear")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert model in three shards, with every dimension a multiple of 128."""
    return tiny_moe(tmp_path_factory.mktemp("assess") / "in", hidden=256, shards=3)


@pytest.fixture(scope="module")
def table(source: Path) -> ErrorTable:
    """Every format that can be written."""
    return measure_errors(source, LINEAR, tuple(FORMATS))


def invoke(*words: object) -> Result:
    """Run the program in this process."""
    return CliRunner().invoke(main, list(map(str, words)))


def succeed(*words: object) -> Result:
    """Run the program to a good end."""
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    return result


# --- measuring --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_errors_and_sizes_are_those_of_what_the_format_writes(
    source: Path, table: ErrorTable, tmp_path: Path, name: str
) -> None:
    """`verify` decodes the finished checkpoint by other code, in BF16's and F32's own blocks."""
    plan = convert(source, tmp_path / "out", Recipe(scheme=name, mode="all-linear"))
    found = {error.name: error for error in verify_checkpoint(tmp_path / "out", source=source).errors}
    assert found.keys() == table.weights.keys()
    for step in (step for shard in plan.shards for step in shard.steps if step.format is not None):
        measured, error = table.weights[step.weight.name], found[step.weight.name]
        assert measured.nmse(name) == pytest.approx(error.nmse, rel=1e-6)
        assert measured.losses[name].largest == pytest.approx(error.max_abs, rel=1e-6)
        assert measured.losses[name].nbytes == sum(info.nbytes for info in step.outputs)
        assert (measured.numbers, measured.dense) == (math.prod(step.weight.shape), step.weight.nbytes)


def test_threads_and_memory_do_not_show_in_the_table(source: Path, table: ErrorTable) -> None:
    """Not in the last digit: the recipe that is chosen from it names the job."""
    for workers, memory in ((1, 1 << 20), (5, 3 << 20)):
        assert measure_errors(source, LINEAR, tuple(FORMATS), engine=ThreadEngine(workers, memory)) == table


def test_one_pass_serves_every_format() -> None:
    """Each byte of a weight that the recipe offers is read once, of others none."""
    tensors = {f"m.layers.0.mlp.{leaf}_proj.weight": random_tensor(64, 64, seed=at) for at, leaf in enumerate("abc")}
    tensors["m.norm.weight"] = random_tensor(64)
    source = MemorySource(checkpoint_files({"model.safetensors": tensors}, {"model_type": "llama"}))
    measure_errors(source, Recipe(mode="all-linear", ignore=("*.c_proj",)), ("nvfp4", "fp8", "fp8_block", "mxfp4"))
    body = [read for read in source.reads if read[0].endswith(".safetensors") and read[2] - read[1] == 2 * 64 * 64]
    assert len(body) == len(set(body)) == 2


def test_without_names_the_schemes_of_the_rules_are_measured(source: Path) -> None:
    """With their settings, those that are not the default in the label."""
    other = FORMATS["w4a16"].choices.searches[1]
    rules = (
        Rule(Scheme("w4a16", group_size=32, symmetric=False, search=other), ("re:.*experts",)),
        Rule(Scheme("fp8_dynamic"), mode="all-linear"),
    )
    found = measure_errors(source, Recipe(rules=rules))
    assert found.labels == (f"w4a16 group_size=32 asymmetric search={other}", "fp8_dynamic")
    assert len(found.weights) == 2 * (4 + 12)


def test_a_shape_that_a_format_cannot_hold_is_named_and_the_others_are_measured(tmp_path: Path) -> None:
    folder = odd_columns(tmp_path)
    found = measure_errors(folder, LINEAR, ("nvfp4", "mxfp4", "fp8")).weights["model.layers.0.mlp.down_proj.weight"]
    assert found.losses.keys() == {"fp8"}
    assert "multiple of 16" in found.barred["nvfp4"]
    assert "multiple of 32" in found.barred["mxfp4"]


def odd_columns(folder: Path) -> Path:
    """A layer whose down_proj has 40 columns: for formats without groups alone."""
    names = {"gate_proj": (40, 64), "up_proj": (40, 64), "down_proj": (64, 40)}
    tensors = {f"model.layers.0.mlp.{n}.weight": random_tensor(*s, seed=len(n)) for n, s in names.items()}
    return write_checkpoint(folder / "odd", {"model.safetensors": tensors}, {"model_type": "llama"})


def test_numbers_whose_scales_cannot_be_stored_bar_a_format(tmp_path: Path) -> None:
    """An F16 scale of 1e-6 / 448 is zero; NVFP4 has an F32 scale besides."""
    tensors = {"m.mlp.down_proj.weight": random_tensor(64, 64, spread=1e-6, dtype=torch.float16)}
    folder = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, {"model_type": "llama"})
    found = measure_errors(folder, Recipe(), ("nvfp4", "fp8_dynamic")).weights["m.mlp.down_proj.weight"]
    assert found.losses.keys() == {"nvfp4"}
    assert "cannot be stored" in found.barred["fp8_dynamic"]


def test_a_packed_source_is_measured_by_what_it_decodes_to(source: Path, tmp_path: Path) -> None:
    """What is stored already as a format has it is copied, so nothing is lost; MXFP4 fits into NVFP4."""
    convert(source, tmp_path / "packed", Recipe(scheme="mxfp4", mode="all-linear"))
    found = measure_errors(tmp_path / "packed", LINEAR, ("mxfp4", "nvfp4", "fp8_dynamic"))
    for weight in found.weights.values():
        assert (weight.losses["mxfp4"].error, weight.losses["mxfp4"].nbytes) == (0, weight.numbers * 17 // 32)
        assert weight.losses["nvfp4"].error == 0
        assert weight.losses["fp8_dynamic"].error >= 0
        assert weight.dense == 2 * weight.numbers


@pytest.mark.parametrize("turned", [False, True])
def test_fused_experts_are_measured_one_by_one(turned: bool) -> None:
    """Views of one stored tensor have the errors of the same experts stored apart, and go to bf16 as a whole."""
    bank = "model.layers.0.mlp.experts"
    config = {"model_type": "x", "hidden_size": 64, "moe_intermediate_size": 48, "num_hidden_layers": 1}
    shapes = {"gate_proj": (48, 64), "up_proj": (48, 64), "down_proj": (64, 48)}
    apart = {
        f"{bank}.{e}.{leaf}.weight": random_tensor(*shape, seed=3 * e + at)
        for e in range(2)
        for at, (leaf, shape) in enumerate(shapes.items())
    }
    experts = [[apart[f"{bank}.{e}.{leaf}.weight"] for leaf in shapes] for e in range(2)]
    halves = (torch.stack([torch.cat([g, u]) for g, u, _ in experts]), torch.stack([down for *_, down in experts]))
    gate_up, down = (half.transpose(1, 2) if turned else half for half in halves)
    fused = {f"{bank}.gate_up_proj": gate_up, f"{bank}.down_proj": down}
    together, separate = (
        MemorySource(checkpoint_files({"model.safetensors": tensors}, config)) for tensors in (fused, apart)
    )
    found = measure_errors(together, Recipe(), ("nvfp4", "fp8_block"))
    assert found.weights == measure_errors(separate, Recipe(), ("nvfp4", "fp8_block")).weights
    choice = choose_formats(together, Recipe(), fallback=("fp8_dynamic", "bf16"), max_nmse=0.002)
    assert targets(choice) == {"fp8_dynamic": (bank,)}
    assert set(make_plan(together, choice.recipe).formats) == {name.removesuffix(".weight") for name in apart}


def test_names_that_two_folders_share_are_told_apart() -> None:
    """Each index is a name space; the unit of one has nothing to do with that of the other."""
    files: dict[str, bytes] = {"config.json": json.dumps({"model_type": "llama"}).encode()}
    for at, folder in enumerate(("", "second/")):
        tensors = {"m.mlp.down_proj.weight": random_tensor(64, 64, seed=at, spread=0.1**at)}
        made = checkpoint_files({"model.safetensors": tensors}, index=True)
        files |= {f"{folder}{name}": data for name, data in made.items()}
    found = measure_errors(MemorySource(files), Recipe(), ("nvfp4",))
    assert list(found.weights) == ["m.mlp.down_proj.weight", "second/model.safetensors: m.mlp.down_proj.weight"]
    assert len({weight.energy for weight in found.weights.values()}) == 2


@pytest.mark.parametrize(
    ("recipe", "formats", "words"),
    [
        (Recipe(layout="modelopt"), ("nvfp4", "w4a16"), r"w4a16 in the layout 'modelopt'.*use the layout compressed"),
        (Recipe(), ("nvfp5",), "format must be one of nvfp4, .*got 'nvfp5'"),
        (Recipe(), ("bf16",), "keeps every number"),
        (Recipe(scheme="bf16"), ("nvfp4",), "quantizes nothing"),
    ],
)
def test_formats_that_cannot_be_compared_are_refused_up_front(
    recipe: Recipe, formats: tuple[str, ...], words: str
) -> None:
    """Before a byte of a weight is read."""
    source = MemorySource({})
    with pytest.raises(RecipeError, match=words):
        measure_errors(source, recipe, formats)
    assert not source.reads


def test_a_source_that_changes_meanwhile_has_no_table(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "in", shards=3)
    last = max(folder.glob("*.safetensors"))

    def touch(event: Event) -> None:
        if isinstance(event, TensorDone):
            last.touch()

    with pytest.raises(MsoError, match=f"{last.name}: changed while it was read; run it again"):
        measure_errors(folder, LINEAR, ("fp8",), on_event=touch)


def test_a_repo_on_a_hub_is_measured_as_its_folder_is(source: Path, tmp_path: Path) -> None:
    """Each byte of a weight travels once, but for units that lie in two shards, however little memory there is."""
    files = {path.name: path.read_bytes() for path in sorted(source.iterdir())}
    with world(tmp_path / "hub", xet=False) as place:
        repo = place.put(files)
        words = ("--all_linear", "--formats", "nvfp4,fp8_block", "--progress", "none", "--memory_budget", "1MiB")
        done = place.run("errors", f"hf://{repo}@main", *words, "--output", tmp_path / "errors.json")
        assert (done.returncode, done.stderr) == (0, "")
        read = {name: ranges for name, ranges in spans(place.log(), repo).items() if name.endswith(".safetensors")}
    found, local = read_table(tmp_path / "errors.json"), measure_errors(source, LINEAR, ("nvfp4", "fp8_block"))
    assert found is not None
    assert (found.weights, found.layout) == (local.weights, local.layout)
    assert found.identity != local.identity
    units = make_plan(source, LINEAR).units.values()
    cut = [members for members in units if len({weight.home.file for weight in members}) > 1]
    assert len(read) == 3
    assert sum(map(twice, read.values())) <= sum(weight.nbytes for members in cut for weight in members)


# --- choosing ---------------------------------------------------------------------------------------


def targets(choice: Choice) -> dict[str, tuple[str, ...]]:
    """Format -> what its rule names."""
    return {rule.scheme.format: rule.targets for rule in choice.recipe.rules}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dense layers; in the first v_proj has outliers that NVFP4 and FP8 pay for, in the second down_proj."""
    folder = tiny_llama(tmp_path_factory.mktemp("uneven") / "in", hidden=128, shards=4)
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name in ("model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.down_proj.weight"):
                tensor[:, ::16] *= 200
        save_file(tensors, path, {"format": "pt"})
    return folder


WORST = {"layers.0.self_attn.qkv_proj", "layers.1.mlp.down_proj"}


def test_what_loses_too_much_goes_down_the_ladder_with_all_that_engines_need_alike(uneven: Path) -> None:
    """The first format that is good enough; a fused unit moves as a whole; every other module stays where it was."""
    table = measure_errors(uneven, LINEAR, ("nvfp4", "fp8", "fp8_dynamic"))
    limit = sorted(weight.nmse("nvfp4") for weight in table.weights.values())[len(table.weights) * 2 // 3]
    choice = choose_formats(uneven, LINEAR, fallback=("fp8", "bf16"), max_nmse=limit)
    assert targets(choice).keys() == {"nvfp4", "fp8"}
    moved = {name for members in targets(choice).values() for name in members}
    assert moved == {name.removesuffix(".weight") for name in table.weights}
    plan = make_plan(uneven, choice.recipe)
    for members in plan.units.values():
        found = {plan.formats[weight.module].name for weight in members}
        worst = max(table.weights[weight.name].nmse("nvfp4") for weight in members)
        assert found == {"nvfp4" if worst <= limit else "fp8"}
    assert len(choice.notes) == len({note.partition(" ")[0] for note in choice.notes})
    assert all("nvfp4 -> fp8: " in note and " has NMSE 0.0" in note for note in choice.notes)


def test_bf16_always_satisfies_and_is_reported_as_kept(uneven: Path, tmp_path: Path) -> None:
    """Between the errors of FP8: the worst groups keep their bytes."""
    table = measure_errors(uneven, LINEAR, ("fp8_dynamic",))
    errors = sorted(weight.nmse("fp8_dynamic") for weight in table.weights.values())
    limit = errors[len(errors) // 2]
    choice = choose_formats(uneven, LINEAR, fallback=("fp8_dynamic", "bf16"), max_nmse=limit)
    report = tmp_path / "report.json"
    plan = convert(uneven, MemorySink(), choice.recipe, report=[report], notes=choice.notes)
    content = json.loads(report.read_bytes())
    assert max(entry["nmse"] for entry in content["weights"].values()) <= limit
    kept = {m for m, why in content["kept"].items() if why.startswith("rule bf16")}
    assert kept == set(targets(choice)["bf16"]) == {m for m, why in plan.kept.items() if why.startswith("rule bf16")}
    assert all(table.weights[f"{m}.weight"] for m in kept)
    assert content["notes"][: len(choice.notes)] == list(choice.notes) == list(plan.notes[: len(choice.notes)])


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_a_bank_of_experts_moves_as_one_and_is_named_by_its_container(
    source: Path, layout: str, tmp_path: Path
) -> None:
    """The output is one that verify finds nothing wrong with, in either layout."""
    table = measure_errors(source, Recipe(layout=layout), ("nvfp4",))
    banks = [f"model.layers.{n}.mlp.experts" for n in range(2)]
    worst = [max(w.nmse("nvfp4") for name, w in table.weights.items() if name.startswith(bank)) for bank in banks]
    better, other = sorted(range(2), key=lambda at: worst[at])
    # ModelOpt's layout has no experts in fp8_dynamic that an engine loads: the ladder passes over it.
    finer = "mxfp8" if layout == "modelopt" else "fp8_dynamic"
    ladder = ("fp8_dynamic", "mxfp8")
    choice = choose_formats(source, Recipe(layout=layout), fallback=ladder, max_nmse=worst[better])
    assert targets(choice) == {"nvfp4": (banks[better],), finer: (banks[other],)}
    assert choice.notes[0].startswith(f"{banks[other]} (12 weights): nvfp4 -> {finer}: {banks[other]}.")
    plan = convert(source, tmp_path / "out", choice.recipe)
    assert {name for name, form in plan.formats.items() if form.name == "nvfp4"} == {
        name.removesuffix(".weight") for name in table.weights if name.startswith(banks[better])
    }
    report = verify_checkpoint(tmp_path / "out", source=source)
    assert not report.problems


def test_where_nothing_satisfies_the_limit_the_weight_is_named(uneven: Path) -> None:
    with pytest.raises(PlanError, match=r"model\.layers\.\S+\.weight: its NMSE must be at most 1e-06, .*--fallback"):
        choose_formats(uneven, LINEAR, fallback=("fp8",), max_nmse=1e-6)
    with pytest.raises(PlanError, match="every weight would stay bf16"):
        choose_formats(uneven, LINEAR, fallback=("fp8", "bf16"), max_nmse=1e-6)


def test_a_shape_that_a_format_cannot_hold_skips_it(tmp_path: Path) -> None:
    """Plain quantizing refuses such a weight; without a fallback so does the choice."""
    folder = odd_columns(tmp_path)
    choice = choose_formats(folder, Recipe(), fallback=("fp8",), max_nmse=0.1)
    prefix = "model.layers.0.mlp"
    assert targets(choice) == {"nvfp4": (f"{prefix}.gate_proj", f"{prefix}.up_proj"), "fp8": (f"{prefix}.down_proj",)}
    assert "needs a last dimension that is a multiple of 16" in choice.notes[0]
    with pytest.raises(PlanError, match=r"down_proj: needs a format that can hold it.*add bf16 to --fallback"):
        choose_formats(folder, Recipe(), max_nmse=0.1)


def test_weights_that_cannot_be_fused_in_a_format_skip_it_together(uneven: Path) -> None:
    """k_proj ends inside a block of 128 rows, so q, k and v stay as they are."""
    recipe = Recipe(scheme="fp8_block", layout="deepseek", mode="all-linear")
    choice = choose_formats(uneven, recipe, fallback=("bf16",), max_nmse=0.1)
    kept = {f"model.layers.{n}.self_attn.{leaf}_proj" for n in range(2) for leaf in "qkv"}
    assert set(targets(choice)["bf16"]) == kept
    assert "engines fuse them" in choice.notes[0]
    assert make_plan(uneven, choice.recipe).formats.keys().isdisjoint(kept)


def test_every_rule_begins_its_own_ladder(source: Path) -> None:
    """Experts at NVFP4, attention at MXFP8; the limit moves the experts alone."""
    rules = (Rule(Scheme("nvfp4", activations=4), ("*.experts",)), Rule(Scheme("mxfp8"), mode="all-linear"))
    choice = choose_formats(source, Recipe(rules=rules, kv_cache=True), fallback=("fp8",), max_nmse=0.001)
    assert [rule.scheme for rule in choice.recipe.rules] == [Scheme("mxfp8"), Scheme("fp8")]
    assert choice.recipe.rules[1].targets == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    assert choice.recipe.kv_cache
    stays = choose_formats(source, Recipe(rules=rules), fallback=("fp8",), max_nmse=0.1)
    assert [rule.scheme for rule in stays.recipe.rules] == [rule.scheme for rule in rules]
    assert not stays.notes


def test_a_rule_that_overrules_the_default_ignore_list_keeps_its_modules(uneven: Path) -> None:
    """lm_head goes where its rule and the limit send it; the embedding stays where it is."""
    head = Rule(Scheme("nvfp4"), ("lm_head",), default_ignore=False)
    recipe = Recipe(rules=(head, Rule(Scheme("nvfp4"), mode="all-linear")))
    limit = measure_errors(uneven, recipe).weights["lm_head.weight"].nmse("nvfp4")
    choice = choose_formats(uneven, recipe, fallback=("fp8",), max_nmse=0.999 * limit)
    assert "lm_head" in targets(choice)["fp8"]
    plan = make_plan(uneven, choice.recipe)
    assert plan.formats.keys() == make_plan(uneven, recipe).formats.keys() > {"lm_head"}
    assert "model.embed_tokens" in plan.kept


def test_a_unit_that_two_rules_cover_is_refused_as_it_is_without_a_choice(source: Path) -> None:
    rules = (Rule(Scheme("nvfp4"), ("*.q_proj",)), Rule(Scheme("fp8"), mode="all-linear"))
    with pytest.raises(PlanError, match=r"engines fuse .*k_proj becomes fp8, .*q_proj nvfp4: give"):
        choose_formats(source, Recipe(rules=rules), fallback=("fp8",), max_nmse=0.1)


@pytest.mark.parametrize("bits", [4.6, 5.5, 7.0, 12.0])
def test_a_budget_is_kept_by_what_is_written(uneven: Path, bits: float, tmp_path: Path) -> None:
    """Average bits and total squared error of the output are those that the choice promises."""
    choice = choose_formats(uneven, LINEAR, fallback=("fp8_dynamic", "bf16"), target_bits=bits)
    report = tmp_path / "report.json"
    plan = convert(uneven, MemorySink(), choice.recipe, report=[report])
    weights = json.loads(report.read_bytes())["weights"]
    dense = [choice.table.weights[f"{m}.weight"] for m, why in plan.kept.items() if why.startswith("rule bf16")]
    numbers = sum(weight.numbers for weight in choice.table.weights.values())
    stored = 8 * (sum(entry["bytes"] for entry in weights.values()) + sum(weight.dense for weight in dense))
    assert len(weights) + len(dense) == len(choice.table.weights)
    assert stored <= bits * numbers
    assert choice.summary.startswith(f"{stored / numbers:.4g} bits on average, at most {bits:g} asked for")
    error = math.fsum(entry["squared_error"] for entry in weights.values())
    assert f"squared error {error:.6g}" in choice.summary


def test_more_bits_mean_less_error_and_the_worst_groups_come_first(uneven: Path) -> None:
    """With room for one group, it is one of those with outliers."""
    first = choose_formats(uneven, LINEAR, fallback=("fp8_dynamic",), target_bits=5.0)
    assert any(name in note for note in first.notes for name in WORST)
    with pytest.raises(PlanError, match=r"target_bits 4: the cheapest choice has 4\.50\d bits on average \(nvfp4\)"):
        choose_formats(uneven, LINEAR, fallback=("fp8_dynamic",), target_bits=4)
    all_of_it = choose_formats(uneven, LINEAR, fallback=("fp8_dynamic",), target_bits=9)
    assert targets(all_of_it).keys() == {"fp8_dynamic"}


def test_the_config_says_what_each_module_has(uneven: Path, tmp_path: Path) -> None:
    """Exact groups: compressed-tensors' own schema takes it, and finds every module in the group of its format."""
    from compressed_tensors.quantization import QuantizationConfig

    choice = choose_formats(uneven, LINEAR, fallback=("fp8_dynamic", "bf16"), target_bits=5.5)
    plan = convert(uneven, tmp_path / "out", choice.recipe)
    said = json.loads((tmp_path / "out" / "config.json").read_bytes())["quantization_config"]
    QuantizationConfig.model_validate(said)
    assert len(said["config_groups"]) == len({form.name for form in plan.formats.values()}) > 1
    assert not verify_checkpoint(tmp_path / "out", source=uneven).problems


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({}, "give max_nmse or target_bits, one of the two; got None and None"),
        ({"max_nmse": 0.1, "target_bits": 5}, "one of the two; got 0.1 and 5"),
        ({"max_nmse": 0}, "max_nmse must be a number > 0, got 0"),
        ({"target_bits": math.nan}, "target_bits must be a number > 0, got nan"),
        ({"max_nmse": 0.1, "fallback": ("w4a16",)}, "w4a16 in the layout 'modelopt'"),
        ({"max_nmse": 0.1, "table": "errors.md"}, "needs a name that ends in .json"),
    ],
)
def test_wishes_that_contradict_themselves_are_refused_up_front(wish: dict[str, Any], words: str) -> None:
    source = MemorySource({})
    with pytest.raises(RecipeError, match=words):
        choose_formats(source, Recipe(layout="modelopt"), **wish)
    assert not source.reads


# --- the table as a file ----------------------------------------------------------------------------


def test_a_table_of_this_source_is_read_instead_of_measured(uneven: Path, tmp_path: Path) -> None:
    """It need not have been made for this choice, as long as it holds enough."""
    path = tmp_path / "errors.json"
    succeed("errors", uneven, "--all_linear", "--formats", "nvfp4,fp8,mxfp8", "--output", path)
    told: list[Event] = []
    kept = choose_formats(uneven, LINEAR, fallback=("fp8", "bf16"), target_bits=6, table=path, on_event=told.append)
    assert not told
    measured = choose_formats(uneven, LINEAR, fallback=("fp8", "bf16"), target_bits=6, on_event=told.append)
    assert told
    assert (kept.recipe, kept.notes) == (measured.recipe, measured.notes)


def test_a_table_that_lacks_something_is_measured_again_and_written(uneven: Path, tmp_path: Path) -> None:
    """Another format, more weights, another layout, a table of another version, or none at all."""
    path = tmp_path / "errors.json"
    recipes = (
        (Recipe(), ("fp8",)), (Recipe(), ("mxfp8",)), (LINEAR, ("mxfp8",)),
        (Recipe(layout="modelopt", mode="all-linear"), ("mxfp8",)),
    )  # fmt: skip
    seen = []
    for recipe, fallback in recipes:
        choose_formats(uneven, recipe, fallback=fallback, max_nmse=0.1, table=path)
        seen.append(read_table(path))
    assert len({(found.layout, found.labels, len(found.weights)) for found in seen if found}) == len(recipes)
    content = json.loads(path.read_bytes())
    path.write_text(json.dumps({**content, "kind": "mso_hub error table 0", "weights": 3}))
    assert read_table(path) is None
    choose_formats(uneven, LINEAR, fallback=("fp8",), max_nmse=0.1, table=path)
    assert read_table(path) is not None


def test_a_table_of_another_source_is_refused(uneven: Path, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "errors.json"
    write_table(measure_errors(source, LINEAR, ("nvfp4",)), path)
    with pytest.raises(RecipeError, match=f"{path.name}: holds errors of .*, the source is .*delete it"):
        choose_formats(uneven, LINEAR, max_nmse=0.1, table=path)


# --- the program ------------------------------------------------------------------------------------


def test_errors_prints_kinds_and_writes_every_weight(source: Path, tmp_path: Path) -> None:
    """The table is for people, the file for programs."""
    done = succeed("errors", source, "--formats", "nvfp4, fp8_dynamic", "--all_linear", "--output", tmp_path / "e.json")
    assert "in: 32 weights under nvfp4, fp8_dynamic\n" in done.stdout
    for words in ("model.layers.N.mlp.experts.N.up_proj", "fp8_dynamic", "4.50", " dB", "worst NMSE"):
        assert words in done.stdout
    found = read_table(tmp_path / "e.json")
    assert found is not None
    assert found == measure_errors(source, LINEAR, ("nvfp4", "fp8_dynamic"))
    succeed("errors", source, "--output", tmp_path / "e.md", "--progress", "none")
    assert (tmp_path / "e.md").read_text().startswith("# Errors of in\n")


def test_errors_says_which_formats_cannot_hold_what(tmp_path: Path) -> None:
    done = succeed("errors", odd_columns(tmp_path), "--formats", "nvfp4,fp8")
    assert "down_proj.weight cannot be nvfp4: nvfp4 needs a last dimension" in done.stdout


def quantize(source: Path, out: Path, *words: object) -> Result:
    """`mso-hub quantize` to a good end."""
    return succeed("quantize", "--input_dir", source, "--output_dir", out, "--progress", "none", *words)


def test_quantize_steps_down_and_reports_what_moved(source: Path, tmp_path: Path) -> None:
    """On the terminal, in the plan's notes, in both reports."""
    words = ("--all_linear", "--max_nmse", "0.002", "--fallback", "fp8_dynamic,bf16")
    reports = [tmp_path / "r.json", tmp_path / "r.md"]
    done = quantize(source, tmp_path / "out", *words, "--report", reports[0], "--report", reports[1])
    moved = "model.layers.0.mlp.experts (12 weights): nvfp4 -> fp8_dynamic"
    assert moved in done.stderr
    assert "worst NMSE 0.0" in done.stderr
    content = json.loads(reports[0].read_bytes())
    assert any(note.startswith(moved) for note in content["notes"])
    assert {entry["format"] for entry in content["weights"].values()} == {"fp8_dynamic"}
    assert max(entry["nmse"] for entry in content["weights"].values()) <= 0.002
    assert moved in reports[1].read_text().replace("\\", "")


def test_the_trained_model_keeps_a_budget_of_six_bits(tmp_path: Path) -> None:
    """From the first measurement to a checkpoint that verify accepts, in ModelOpt's layout."""
    report = tmp_path / "r.json"
    words = ("--all_linear", "--layout", "modelopt", "--target_bits", "6", "--fallback", "fp8_dynamic,bf16")
    done = quantize(TRAINED, tmp_path / "out", *words, "--report", report)
    assert "bits on average, at most 6 asked for" in done.stderr
    weights = json.loads(report.read_bytes())["weights"]
    assert {entry["format"] for entry in weights.values()} >= {"nvfp4", "fp8_dynamic"}
    checked = succeed("verify", tmp_path / "out", "--source", TRAINED)
    assert "no problems found" in checked.stdout


def test_quantize_keeps_a_budget_and_its_table(uneven: Path, tmp_path: Path) -> None:
    table = tmp_path / "errors.json"
    words = ("--all_linear", "--target_bits", "5.5", "--fallback", "fp8_dynamic", "--error_table", table)
    done = quantize(uneven, tmp_path / "out", *words)
    assert "at most 5.5 asked for" in done.stderr
    before = table.stat()
    again = quantize(uneven, tmp_path / "out", *words)
    assert "gap" in again.stderr
    assert (table.stat().st_mtime_ns, table.stat().st_size) == (before.st_mtime_ns, before.st_size)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--fallback", "fp8"), "--fallback fp8: needs --max_nmse or --target_bits"),
        (("--error_table", "e.json"), "--error_table e.json: needs --max_nmse"),
        (("--report", "r.txt"), "a report ends in .json or .md, got '.txt'"),
        (("--report", "no/such/r.md"), "needs the name of a file in a folder that exists"),
        (("--max_nmse", "1", "--fallback", "fp9"), "got 'fp9'"),
    ],
)
def test_options_that_cannot_work_are_refused(source: Path, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = invoke("quantize", "--input_dir", source, "--output_dir", tmp_path / "out", *words)
    assert done.exit_code == 2
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


# --- what a run did ---------------------------------------------------------------------------------


class Stop(Exception):
    """Ends a run after its first shard."""


def stop(event: Event) -> None:
    """A listener that ends the run when a shard is stored."""
    if isinstance(event, ShardDone):
        raise Stop


def test_a_resumed_run_reports_every_weight(source: Path, tmp_path: Path) -> None:
    """Those of the shards that the first run wrote too, and the same job is chosen again."""
    reports = [tmp_path / "whole.json", tmp_path / "resumed.json"]
    told: list[Event] = []
    choices = [choose_formats(source, LINEAR, fallback=("fp8",), target_bits=5.5) for _ in range(2)]
    convert(source, tmp_path / "whole", choices[0].recipe, report=reports[:1])
    with pytest.raises(Stop):
        convert(source, tmp_path / "out", choices[0].recipe, report=reports[1:], on_event=stop)
    plan = convert(source, tmp_path / "out", choices[1].recipe, report=reports[1:], on_event=told.append)
    kept = [event.shard for event in told if isinstance(event, ShardResumed)]
    assert 0 < len(kept) < len(plan.shards)
    whole, resumed = (json.loads(path.read_bytes()) for path in reports)
    assert resumed["weights"] == whole["weights"]
    assert resumed["facts"]["SQNR"] == whole["facts"]["SQNR"]


def test_shards_of_a_run_that_measured_nothing_are_named_as_such(source: Path, tmp_path: Path) -> None:
    """No number is made up for them, and the way to get it is told."""
    with pytest.raises(Stop):
        convert(source, tmp_path / "out", LINEAR, on_event=stop)
    report = tmp_path / "r.json"
    convert(source, tmp_path / "out", LINEAR, report=[report, tmp_path / "r.md"])
    content = json.loads(report.read_bytes())
    missing = [entry for entry in content["weights"].values() if "problem" in entry]
    assert 0 < len(missing) < len(content["weights"])
    assert content["facts"]["Not measured"].startswith(f"{len(missing)} weights")
    assert "mso-hub verify" in (tmp_path / "r.md").read_text()


def test_a_report_holds_the_errors_that_verify_finds(source: Path, tmp_path: Path) -> None:
    """Over all numbers, though a card would do with a sample; what stays is there with its reason."""
    report = tmp_path / "r.json"
    plan = convert(source, tmp_path / "out", Recipe(scheme="mxfp4"), report=[report], engine=ThreadEngine(2, 1 << 20))
    content = json.loads(report.read_bytes())
    found = {error.name: error for error in verify_checkpoint(tmp_path / "out", source=source).errors}
    assert found.keys() == content["weights"].keys()
    for name, entry in content["weights"].items():
        assert entry["nmse"] == pytest.approx(found[name].nmse, rel=1e-6)
        assert entry["max_abs"] == pytest.approx(found[name].max_abs, rel=1e-6)
        assert entry["sqnr_db"] == pytest.approx(sqnr(found[name].nmse))
    assert content["kept"] == dict(plan.kept)
    assert sum(1 for _ in (tmp_path / "out").glob("r.*")) == 0


def test_mxfp4_to_nvfp4_says_that_nothing_was_lost(source: Path, tmp_path: Path) -> None:
    """In the closing lines, the report and the card."""
    convert(source, tmp_path / "packed", Recipe(scheme="mxfp4", mode="all-linear"))
    report = tmp_path / "r.json"
    done = quantize(tmp_path / "packed", tmp_path / "out", "--all_linear", "--report", report, "--progress", "bar")
    shapes = {n: w.numbers for n, w in measure_errors(source, LINEAR).weights.items()}
    words = f"0 of {sum(shapes.values()) // 16:,} blocks were not exact, nothing was lost"
    assert f"note: MXFP4 to NVFP4: {words}" in done.stdout
    content = json.loads(report.read_bytes())
    assert content["notes"][-1] == f"MXFP4 to NVFP4: {words}"
    assert {entry["sqnr_db"] for entry in content["weights"].values()} == {None}
    assert content["facts"]["SQNR"] == "exact"
    sink = MemorySink()
    convert(tmp_path / "packed", sink, LINEAR, card=True)
    assert f"| MXFP4 to NVFP4 | {words} |" in sink.files["README.md"].decode()


def test_blocks_that_are_not_exact_are_counted_over_all_shards_of_a_resumed_run(tmp_path: Path) -> None:
    """Powers of two that span too much for E4M3: the smallest blocks lose, and each is counted once."""
    tensors = {}
    for layer in range(2):
        values = random_tensor(64, 256, seed=layer, dtype=torch.float32)
        values[layer, :32] *= 2.0**-24
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"] = values.bfloat16()
    shards = {f"model-{at}.safetensors": {name: t} for at, (name, t) in enumerate(tensors.items())}
    folder = write_checkpoint(tmp_path / "in", shards, {"model_type": "llama"})
    convert(folder, tmp_path / "packed", Recipe(scheme="mxfp4"))
    with pytest.raises(Stop):
        convert(tmp_path / "packed", tmp_path / "out", Recipe(), on_event=stop)
    plan = convert(tmp_path / "packed", tmp_path / "out", Recipe())
    assert plan.notes[-1] == "MXFP4 to NVFP4: 4 of 2,048 blocks were not exact"
