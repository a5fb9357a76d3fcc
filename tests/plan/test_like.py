"""`--like`: a published config becomes the recipe that would write it; what cannot be written is named."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, preset_name_to_scheme

from mso_hub.cli import main
from mso_hub.errors import PlanError, RecipeError
from mso_hub.formats import FORMATS, IMPORTED, Scheme
from mso_hub.pipeline import convert, make_plan
from mso_hub.plan import Recipe, Rule
from mso_hub.plan.like import recipe_like
from mso_hub.plan.recipe_file import read_recipe
from tests.helpers import tiny_llama, tiny_moe, write_files
from tests.hubs import world


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Expert width 128, so that every group and block fits."""
    return tiny_moe(tmp_path_factory.mktemp("moe") / "in", hidden=256, layers=1, experts=2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama") / "in", layers=3, hidden=256)


def digests(folder: Path) -> dict[str, str]:
    """Every file but the manifest, which has the recipe's own words."""
    return {p.name: sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != "mso_hub.json"}


def reference(folder: Path, config: Mapping[str, Any], name: str = "config.json") -> Path:
    """A folder with a config, and no weights."""
    content = {"quantization_config": config} if name == "config.json" else config
    return write_files(folder, {name: json.dumps(content).encode()})


# --- there and back -------------------------------------------------------------------------------


def every_format() -> Iterator[Any]:
    """Each format in each layout with each choice that a config tells."""
    for name, entry in FORMATS.items():
        choices = entry.choices
        for layout in choices.loaders:
            for bits in choices.activations[layout]:
                for group in choices.group_sizes or (None,):
                    for symmetric in (True, False) if choices.asymmetric else (None,):
                        said = {"activations": bits, "group_size": group, "symmetric": symmetric}
                        label = "-".join(str(word) for word in (name, layout, *said.values()) if word is not None)
                        if (name, layout) != ("fp8", "modelopt"):
                            yield pytest.param(name, layout, {**said, "input_scale": None}, id=label)
                        if name == "fp8":
                            yield pytest.param(name, layout, {**said, "input_scale": 1.5}, id=f"{label}-static")


@pytest.mark.parametrize(("name", "layout", "said"), list(every_format()))
def test_our_own_output_is_made_again(
    name: str, layout: str, said: dict[str, Any], moe: Path, llama: Path, tmp_path: Path
) -> None:
    """The same configs and the same bytes from the config alone, and from the ones with a KV cache."""
    if layout == "modelopt" and name in ("fp8_dynamic", "fp8_block"):
        moe = llama  # no engine loads such experts
    for mode, kv_cache in (("all-linear", layout != "deepseek"), ("mlp", False)):
        recipe = Recipe(scheme=name, layout=layout, mode=mode, kv_cache=kv_cache, **said)
        first, second = tmp_path / mode, tmp_path / f"{mode}-again"
        convert(moe, first, recipe)
        scale = {} if said["input_scale"] is None else {"input_scale": said["input_scale"]}
        found = recipe_like(first, **scale)
        assert (found.layout, found.kv_cache, found.label) == (layout, kv_cache, name)
        convert(moe, second, found)
        assert digests(first) == digests(second)


REST = Rule(Scheme("nvfp4"))
MIXED = {
    "experts apart": (Rule(Scheme("nvfp4"), ("*.experts",)), Rule(Scheme("fp8_dynamic"), mode="all-linear")),
    "edge layers": (
        Rule(Scheme("fp8_dynamic"), layers=(0, -1)),
        Rule(Scheme("nvfp4", activations=4)),
        Rule(Scheme("fp8_block"), ("re:.*self_attn",)),
    ),
    "a head": (Rule(Scheme("fp8_dynamic"), ("lm_head",), default_ignore=False), REST),
    "a head as the rest": (Rule(Scheme("nvfp4"), ("lm_head",), default_ignore=False), REST),
    "what stays": (
        Rule(Scheme("bf16"), ("*.down_proj",)),
        Rule(Scheme("mxfp8"), ("*.up_proj", "*.gate_proj")),
        Rule(Scheme("fp8_dynamic"), ("*.self_attn",)),
    ),
}


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("kind", MIXED)
def test_our_own_mixtures_are_made_again(kind: str, layout: str, moe: Path, llama: Path, tmp_path: Path) -> None:
    """Targets as patterns or names, aliases of fused modules, heads."""
    source = moe if "experts" in kind else llama
    recipe = Recipe(layout=layout, rules=MIXED[kind], kv_cache=kind == "what stays")
    convert(source, tmp_path / "first", recipe)
    found = recipe_like(tmp_path / "first")
    convert(source, tmp_path / "second", found)
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


def test_without_the_default_list_only_the_option_follows(moe: Path, tmp_path: Path) -> None:
    """A router that is quantized among "all linear" is not named: --no_default_ignore takes the reference literally."""
    recipe = Recipe(scheme="fp8_dynamic", mode="all-linear", default_ignore=False)
    first = convert(moe, tmp_path / "first", recipe)
    assert "model.layers.0.mlp.gate" in first.formats
    careful = make_plan(moe, recipe_like(tmp_path / "first"))
    assert set(first.formats) - set(careful.formats) == {"model.layers.0.mlp.gate"}
    literal = recipe_like(tmp_path / "first", default_ignore=False)
    convert(moe, tmp_path / "second", literal)
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


def test_activation_scales_come_from_the_reference_too(llama: Path, tmp_path: Path) -> None:
    """--like and --input_scale name the same output."""
    amax = {
        f"model.layers.{n}.mlp.{leaf}_proj": 0.5 + n + at / 4
        for n in range(3) for at, leaf in enumerate(("gate", "up", "down"))
    }  # fmt: skip
    for layout in ("compressed-tensors", "modelopt"):
        for name in ("nvfp4", "fp8"):
            folder = tmp_path / f"{layout}-{name}"
            convert(llama, folder / "first", Recipe(name, layout, input_scale=IMPORTED, input_amax=amax))
            words = ["quantize", "--input_dir", llama, "--output_dir", folder / "second", "--like", folder / "first",
                     "--input_scale", folder / "first"]  # fmt: skip
            result = CliRunner().invoke(main, list(map(str, words)))
            assert result.exit_code == 0, result.output
            assert digests(folder / "first") == digests(folder / "second")


def test_fp8_needs_its_activation_scale_from_somewhere(llama: Path, tmp_path: Path) -> None:
    """The config says that there is one, not which."""
    for layout in ("compressed-tensors", "modelopt"):
        convert(llama, tmp_path / layout, Recipe("fp8", layout, input_scale=1.0))
        with pytest.raises(
            RecipeError, match=r"fp8 for Linear has static activation scales, .* add --input_scale WHERE"
        ):
            recipe_like(tmp_path / layout)
        found = recipe_like(tmp_path / layout, input_scale=2.0)
        assert found.rules[0].scheme.input_scale == 2.0


def test_another_layout_can_be_asked_for(llama: Path, tmp_path: Path) -> None:
    """The same schemes lie on disk otherwise, where they exist there."""
    convert(llama, tmp_path / "modelopt", Recipe("nvfp4", "modelopt", activations=4))
    found = recipe_like(tmp_path / "modelopt", layout="compressed-tensors")
    convert(llama, tmp_path / "like", found)
    convert(llama, tmp_path / "direct", Recipe("nvfp4", activations=4))
    assert digests(tmp_path / "like") == digests(tmp_path / "direct")
    convert(llama, tmp_path / "int4", Recipe("w4a16"))
    with pytest.raises(RecipeError, match=r"w4a16 in the layout 'modelopt': .*; use the layout compressed-tensors"):
        recipe_like(tmp_path / "int4", layout="modelopt")


def test_recipes_of_the_hub(llama: Path, tmp_path: Path) -> None:
    """A repo's config, its mso_hub.json by either name, and the line of its card; a repo that has neither."""
    with world(tmp_path, xet=False) as hub:
        repo = hub.name()
        hub.convert(llama, f"hf://{repo}", "--recipe", "nvfp4_mlp_only")
        config = json.loads(hub.content(repo, "config.json"))["quantization_config"]
        ways = (("--like", ""), ("--recipe", ""), ("--recipe", "/mso_hub.json"))
        for option, path in ways:
            done = hub.run("plan", llama, option, f"hf://{repo}{path}", "--json")
            assert json.loads(done.stdout)["quantization_config"] == config, done.stderr
        line = f"mso-hub quantize --recipe hf://{repo}/mso_hub.json --input_dir FOLDER --output_dir hf://{repo}"
        assert f"| Command | `{line}` |" in hub.content(repo, "README.md").decode()
        dense = hub.put({"config.json": b"{}"})
        refused = [hub.run("plan", llama, option, f"hf://{dense}") for option in ("--recipe", "--like")]
    assert [done.returncode for done in refused] == [2, 2]
    assert "needs a mso_hub.json to be a recipe, has none; --like takes the config" in refused[0].stderr
    assert "needs the config of a quantized model" in refused[1].stderr


# --- published configs ----------------------------------------------------------------------------


def weights_of(**said: Any) -> dict[str, Any]:
    """QuantizationArgs as an older release writes them: no scale_dtype, no zp_dtype."""
    return {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "num_bits": 8,
        "observer": "minmax", "observer_kwargs": {}, "strategy": "channel", "symmetric": True, "type": "float",
    } | said  # fmt: skip


def groups(*entries: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {f"group_{at}": dict(entry) for at, entry in enumerate(entries)},
        **more,
    }


INT4 = {"targets": ["Linear"], "weights": weights_of(num_bits=4, type="int", strategy="group", group_size=32)}
KIMI = groups(
    {**INT4, "input_activations": None, "output_activations": None},
    ignore=["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
    kv_cache_scheme=None,
)
DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def test_kimi_k2(moe: Path, tmp_path: Path) -> None:
    """INT4 in groups of 32 in the experts alone; its config is nested in text_config from K2.5 on."""
    nested = write_files(
        tmp_path / "nested", {"config.json": json.dumps({"text_config": {"quantization_config": KIMI}}).encode()}
    )
    for where in (reference(tmp_path / "flat", KIMI), nested, nested / "config.json"):
        found = recipe_like(where)
        assert found.rules == (Rule(Scheme("w4a16", 16, 32, symmetric=True), ("Linear",), optional=True),)
        plan = make_plan(moe, found)
        assert {module.split(".")[4] for module in plan.formats} == {"experts"}
        missing = "2 imported exclude patterns match nothing here, the first is 're:.*shared_experts.*'"
        assert plan.notes == (missing,)


def test_deepseek_v3(moe: Path, tmp_path: Path) -> None:
    """No ignore list at all: heads, routers and embeddings stay all the same."""
    found = recipe_like(reference(tmp_path, DEEPSEEK))
    plan = make_plan(moe, found)
    assert plan.config["quantization_config"] == {
        **DEEPSEEK, "modules_to_not_convert": ["lm_head", "model.embed_tokens", "model.layers.0.mlp.gate"],
    }  # fmt: skip
    assert make_plan(moe, read_recipe("deepseek_fp8")).config == plan.config


def test_modelopt_mixed_precision(moe: Path, tmp_path: Path) -> None:
    """Every layer by its name, a bank of experts by its own; nothing else, also what is left alone by default."""
    attention: dict[str, dict[str, Any]] = {
        f"model.layers.0.self_attn.{leaf}_proj": {"quant_algo": "FP8"} for leaf in "qkvo"
    }
    experts: dict[str, dict[str, Any]] = {
        f"model.layers.0.mlp.experts.{n}.{leaf}_proj": {"quant_algo": "NVFP4", "group_size": 16}
        for n in range(2) for leaf in ("gate", "up", "down")
    }  # fmt: skip
    head: dict[str, dict[str, Any]] = {
        "lm_head": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        "model.layers.9.x": {"quant_algo": "FP8"},
    }
    content = {
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quantization": {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8",
                         "quantized_layers": {**attention, **experts, **head}},
    }  # fmt: skip
    found = recipe_like(reference(tmp_path, content, "hf_quant_config.json"), input_scale=1.0)
    assert [rule.scheme.format for rule in found.rules] == ["fp8", "nvfp4", "nvfp4"]
    assert found.rules[1].targets == ("model.layers.0.mlp.experts",)
    assert (found.layout, found.kv_cache) == ("modelopt", True)
    plan = make_plan(moe, found)
    forms = {module: f"{form.algo}" for module, form in plan.formats.items()}
    assert forms == {name: entry["quant_algo"] for name, entry in {**attention, **experts, **head}.items()
                     if name != "model.layers.9.x"}  # fmt: skip
    assert plan.notes == (
        f"rule 1 ({found.rules[0].label}): 1 of its 5 targets match nothing here, the first is 'model.layers.9.x'",
    )


def test_modelopt_for_all_with_wildcards(moe: Path, tmp_path: Path) -> None:
    """config.json goes before hf_quant_config.json, as it does in vLLM; wildcards are honoured, misses are noted."""
    said = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "ignore": ["lm_head", "*.self_attn*", "*.mlp.gate", "mtp*"],
        "config_groups": {"group_0": {"weights": {}, "input_activations": {}, "targets": ["Linear"]}},
    }
    where = reference(tmp_path, said)
    reference(tmp_path, {"quantization": {"quant_algo": "FP8"}}, "hf_quant_config.json")
    plan = make_plan(moe, recipe_like(where))
    assert {module.split(".")[4] for module in plan.formats} == {"experts"}
    assert plan.config["quantization_config"]["quant_algo"] == "NVFP4"
    assert plan.notes == ("1 imported exclude patterns match nothing here, the first is 'mtp*'",)
    weight_only = said | {"config_groups": {"group_0": {"weights": {}, "targets": ["Linear"]}}}
    plan = make_plan(moe, recipe_like(reference(tmp_path, weight_only)))
    assert plan.config["quantization_config"]["quant_algo"] == "W4A16_NVFP4"


def test_a_head_that_is_not_ignored_is_quantized(llama: Path, tmp_path: Path) -> None:
    """In a list of what stays, an absence says so; a model with a tied head has none, which is no error."""
    plan = make_plan(llama, recipe_like(reference(tmp_path, groups(INT4, ignore=[]))))
    assert "lm_head" in plan.formats
    tensors = tiny_llama(tmp_path / "tied", hidden=128, layers=1, shards=1)
    from safetensors.torch import load_file, save_file

    kept = {
        name: tensor for name, tensor in load_file(tensors / "model.safetensors").items() if name != "lm_head.weight"
    }
    save_file(kept, tensors / "model.safetensors")
    for ignore in ([], ["lm_head"]):
        plan = make_plan(tensors, recipe_like(reference(tmp_path, groups(INT4, ignore=ignore))))
        assert len(plan.formats) == 7
        assert len(plan.notes) == 1


def test_a_named_group_goes_before_linear(llama: Path, tmp_path: Path) -> None:
    """Wherever it stands, as loaders have it; names go by their order."""
    fp8 = {
        "weights": weights_of(),
        "format": "float-quantized",
        "input_activations": weights_of(strategy="token", dynamic=True),
    }
    config = groups(
        {**INT4, "format": "pack-quantized"}, {**fp8, "targets": ["re:.*self_attn.*", "re:.*down_proj"]},
        {**INT4, "targets": ["re:.*(q_proj|down_proj)"]},
    )  # fmt: skip
    plan = make_plan(llama, recipe_like(reference(tmp_path, config)))
    forms = {module.rpartition(".")[2]: form.name for module, form in plan.formats.items()}
    assert forms == dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"), "fp8_dynamic") | dict.fromkeys(
        ("gate_proj", "up_proj"), "w4a16"
    )


def test_a_config_of_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    """No entry of its list matches, or none of its layers."""
    with pytest.raises(PlanError, match="none of the 2 imported exclude patterns matches a weight"):
        make_plan(llama, recipe_like(reference(tmp_path, groups(INT4, ignore=["backbone.x", "re:.*mixer.*"]))))
    mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"backbone.x": {"quant_algo": "MXFP8"}}}
    with pytest.raises(PlanError, match=r"no rule of the recipe covers a weight here \(mxfp8 for backbone.x\)"):
        make_plan(llama, recipe_like(reference(tmp_path, mixed)))


# --- the library's own schemes ----------------------------------------------------------------------

STORED = {"W4A16": "pack-quantized", "W8A16": "pack-quantized", "W8A8": "int-quantized", "INT8": "int-quantized",
          "NVFP4": "nvfp4-pack-quantized", "MXFP4": "mxfp4-pack-quantized", "MXFP8": "mxfp8-quantized",
          "FP8": "float-quantized"}  # fmt: skip
OURS = {
    "W8A16": "w8a16", "W4A16": "w4a16", "W4A16_ASYM": "w4a16", "W8A8": "int8", "INT8": "int8", "FP8": "fp8",
    "FP8_DYNAMIC": "fp8_dynamic", "FP8_BLOCK": "fp8_block", "NVFP4A16": "nvfp4", "NVFP4": "nvfp4", "MXFP4A16": "mxfp4",
    "MXFP4": "mxfp4", "MXFP8A16": "mxfp8", "MXFP8": "mxfp8",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PRESET_SCHEMES))
def test_schemes_of_compressed_tensors(name: str, llama: Path, tmp_path: Path) -> None:
    """Those that we write are recognized and written as the library says them; all others are refused by name."""
    scheme = json.loads(preset_name_to_scheme(name, ["Linear"]).model_dump_json())
    stored = next((form for prefix, form in STORED.items() if name.startswith(prefix)), "int-quantized")
    where = reference(tmp_path, groups({**scheme, "format": stored}))
    if name not in OURS:
        with pytest.raises(RecipeError, match=r"config_groups, group_0: weights .* cannot be written"):
            recipe_like(where)
        return
    found = recipe_like(where, **({"input_scale": 1.0} if name == "FP8" else {}))
    assert found.rules[0].scheme.format == OURS[name]
    written = make_plan(llama, found).config["quantization_config"]["config_groups"]["group_0"]
    for part in ("weights", "input_activations"):
        theirs, ours = scheme[part], written[part]
        assert (theirs is None) == (ours is None)
        for key in ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic"):
            assert theirs is None or theirs.get(key) == ours[key], (part, key)


# --- what cannot be done ----------------------------------------------------------------------------

NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "AWQ": ({"quant_method": "awq", "bits": 4}, ["quant_method 'awq' cannot be written", "`mso-hub formats`"]),
    "an algorithm": (NVFP4 | {"quant_algo": "W4A8_AWQ"}, ["quant_algo 'W4A8_AWQ' cannot be written", "W4A16_NVFP4"]),
    "one of many": (
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a.b": {"quant_algo": "NVFP4_AWQ"}}},
        ["quantized_layers, a.b: quant_algo 'NVFP4_AWQ' cannot be written"],
    ),
    "a KV cache": (NVFP4 | {"kv_cache_scheme": "NVFP4"}, ["a KV cache as 'NVFP4' cannot be announced, FP8 can"]),
    "an INT8 cache": (groups(INT4, kv_cache_scheme={"num_bits": 8, "type": "int"}), ["a KV cache as", "FP8 can"]),
    "3 bits": (
        groups({**INT4, "weights": weights_of(num_bits=3, type="int", strategy="group", group_size=64)}),
        ["config_groups, group_0: weights 3 bit int group, group_size 64, activations none", "'pack-quantized'"],
    ),
    "a group size": (
        groups({**INT4, "weights": weights_of(num_bits=4, type="int", strategy="group", group_size=256)}),
        ["weights 4 bit int group, group_size 256", "cannot be written; `mso-hub formats` lists what can"],
    ),
    "g_idx": (
        groups({**INT4, "weights": INT4["weights"] | {"actorder": "group"}}),  # type: ignore[operator]
        ["actorder group", "cannot be written"],
    ),
    "outputs": (groups({**INT4, "output_activations": weights_of()}), ["output_activations", "cannot be written"]),
    "a class": (groups({**INT4, "targets": ["LlamaAttention"]}), ["the target 'LlamaAttention' is a class"]),
    "no targets": (groups({**INT4, "targets": []}), ["needs a list of targets, got []"]),
    "no groups": (groups(), ["needs config_groups"]),
    "sparse": (groups(INT4, sparsity_config={"format": "sparse-24-bitmask"}), ["has a sparsity_config"]),
    "rotated": (groups(INT4, transform_config={"config_groups": {"R1": {}}}), ["has a transform_config"]),
    "FP8 for a tensor": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        ["weight_block_size None", "'static'"],
    ),
    "powers of two": (DEEPSEEK | {"scale_fmt": "ue8m0"}, ["with scale_fmt 'ue8m0'", "--recipe deepseek_fp8"]),
    "dense": ({}, ["needs the config of a quantized model"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_named(case: str, tmp_path: Path) -> None:
    """The place in the config, what it says, what there is."""
    config, words = REFUSED[case]
    where = reference(tmp_path, config)
    with pytest.raises(RecipeError) as error:
        recipe_like(where)
    assert str(error.value).startswith(str(where))
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)


def test_a_reference_that_is_not_there(tmp_path: Path) -> None:
    for where in (tmp_path, tmp_path / "nothing.json"):
        with pytest.raises(RecipeError, match="needs a quantization config"):
            recipe_like(where)


def test_the_program_refuses_with_one_message(llama: Path, tmp_path: Path) -> None:
    where = reference(tmp_path, NVFP4 | {"quant_algo": "W8A16"})
    result = CliRunner().invoke(main, ["plan", str(llama), "--like", str(where)])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"mso-hub: {where}/config.json: quant_algo 'W8A16' cannot be written")
