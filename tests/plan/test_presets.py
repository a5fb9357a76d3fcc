"""Presets: every one is a recipe that works, says what it is, and does what the recipe does that it is modelled on.

The oracle are the recipes that ModelOpt ships: YAML lists of quantizers, of which the last that matches decides.
"""

from __future__ import annotations

from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from compressed_tensors.quantization import QuantizationConfig

from mso_hub.cli import main
from mso_hub.errors import PlanError
from mso_hub.pipeline import convert, make_plan
from mso_hub.plan import Plan
from mso_hub.plan.presets import ALIASES, find_preset, preset_comment, preset_names, preset_text
from mso_hub.plan.recipe_file import read_recipe
from mso_hub.plan.summary import kind_of
from tests.helpers import attention_shapes, base_config, in_shards, mlp_shapes, weights, write_checkpoint

HIDDEN = 256
EXPERTS = ("nvfp4_experts_only", "w4a16_g32_experts", "mxfp8_nvfp4_experts", "nvfp4_experts_fp8_rest",
           "nvfp4_experts_fp8_block_attention")  # fmt: skip
"""Presets that a dense model has nothing for."""
LAYERS = 6
Shapes = dict[str, tuple[int, ...]]


def model(folder: Path, *, moe: bool) -> Path:
    """Six layers of attention and feed-forward, with what a preset should leave alone."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (8, HIDDEN), "lm_head": (8, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= attention_shapes(prefix, HIDDEN)
        if moe:
            shapes |= mlp_shapes(f"{prefix}.mlp.experts.0", HIDDEN, 128)
            shapes |= mlp_shapes(f"{prefix}.mlp.experts.1", HIDDEN, 128)
            shapes |= mlp_shapes(f"{prefix}.mlp.shared_expert", HIDDEN, 128)
            shapes |= {f"{prefix}.mlp.gate": (2, HIDDEN), f"{prefix}.mlp.shared_expert_gate": (1, HIDDEN)}
        else:
            shapes |= mlp_shapes(f"{prefix}.mlp", HIDDEN, 256)
    config = {"model_type": "qwen2_moe", "moe_intermediate_size": 128, **base_config(HIDDEN, LAYERS, 8, torch.bfloat16)}
    return write_checkpoint(folder, in_shards(weights(shapes, torch.bfloat16, 0), 1), config)


def hybrid(folder: Path) -> Path:
    """As Nemotron-H: one mixer a layer, Mamba, attention or experts with a latent projection."""
    mamba: Shapes = {"in_proj": (HIDDEN, HIDDEN), "out_proj": (HIDDEN, HIDDEN), "conv1d": (HIDDEN, 1, 4)}
    attention: Shapes = {f"{leaf}_proj": (HIDDEN, HIDDEN) for leaf in "qkvo"}
    experts: Shapes = {
        f"{part}.{leaf}": (HIDDEN, HIDDEN)
        for part in ("experts.0", "experts.1", "shared_experts") for leaf in ("up_proj", "down_proj")
    }  # fmt: skip
    latent = {"fc1_latent_proj": (HIDDEN, HIDDEN), "fc2_latent_proj": (HIDDEN, HIDDEN), "gate": (2, HIDDEN)}
    shapes: dict[str, tuple[int, ...]] = {"backbone.embeddings": (8, HIDDEN), "lm_head": (8, HIDDEN)}
    mixers: tuple[Shapes, ...] = (mamba, attention, {**experts, **latent})
    for layer, mixer in enumerate(mixers):
        shapes |= {f"backbone.layers.{layer}.mixer.{name}": shape for name, shape in mixer.items()}
    config = {"model_type": "nemotron_h", **base_config(HIDDEN, 3, 8, torch.bfloat16)}
    return write_checkpoint(folder, in_shards(weights(shapes, torch.bfloat16, 0), 1), config)


def linear_attention(folder: Path) -> Path:
    """As Qwen3.5: a gated delta net in one layer, attention in the next."""
    delta = {"in_proj_qkv": (512, HIDDEN), "in_proj_z": (HIDDEN, HIDDEN), "in_proj_a": (4, HIDDEN),
             "in_proj_b": (4, HIDDEN), "out_proj": (HIDDEN, HIDDEN), "conv1d": (512, 1, 4)}  # fmt: skip
    prefix = "model.layers"
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.0.linear_attn.{name}": shape for name, shape in delta.items()}
    shapes |= attention_shapes(f"{prefix}.1", HIDDEN)
    shapes |= mlp_shapes(f"{prefix}.0.mlp", HIDDEN, 256) | mlp_shapes(f"{prefix}.1.mlp", HIDDEN, 256)
    config = {"model_type": "qwen3_5", **base_config(HIDDEN, 2, 8, torch.bfloat16)}
    return write_checkpoint(folder, in_shards(weights(shapes, torch.bfloat16, 0), 1), config)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("presets")
    return {
        "dense": model(folder / "dense", moe=False),
        "moe": model(folder / "moe", moe=True),
        "hybrid": hybrid(folder / "hybrid"),
        "linear attention": linear_attention(folder / "linear"),
    }


def stored(plan: Plan) -> dict[str, str]:
    """Module -> format and bits of activations."""
    return {module: f"{form.name} A{form.activations}" for module, form in plan.formats.items()}


def kinds(plan: Plan) -> dict[str, str]:
    """Kind of module without its prefix -> format."""
    return {
        kind_of(module).partition("layers.N.")[2] or module: form.name for module, form in plan.formats.items()
    }  # fmt: skip


# --- every preset ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_says_what_it_is_and_works(name: str, sources: dict[str, Path]) -> None:
    """Two lines of comment; a plan for an expert model that compressed-tensors parses and that leaves gates alone."""
    what, modelled = preset_comment(name)
    assert len(what) > 20
    assert modelled.startswith(("Modelled on ", "What mso-hub quantize does"))
    plan = make_plan(sources["moe"], read_recipe(name))
    said = plan.config["quantization_config"]
    if said["quant_method"] == "compressed-tensors":
        QuantizationConfig.model_validate(said)
    assert "model.layers.0.mlp.experts.0.up_proj" in plan.formats
    gates = [f"model.layers.{n}.mlp.{leaf}" for n in range(LAYERS) for leaf in ("gate", "shared_expert_gate")]
    assert not {"lm_head", *gates} & plan.formats.keys()


@pytest.mark.parametrize("name", preset_names())
def test_a_dense_model_is_quantized_or_refused(name: str, sources: dict[str, Path]) -> None:
    """Never is nothing quantized, and no attention alone where the experts were meant."""
    if name in EXPERTS:
        with pytest.raises(PlanError, match=r"no rule of the recipe covers a weight here|matches no weight"):
            make_plan(sources["dense"], read_recipe(name))
    else:
        assert "model.layers.0.mlp.up_proj" in make_plan(sources["dense"], read_recipe(name)).formats


@pytest.mark.parametrize("name", [name for name in preset_names() if "layout" not in preset_text(name)])
def test_a_preset_is_for_every_layout_that_has_its_formats(name: str, sources: dict[str, Path]) -> None:
    """--layout modelopt works, or the formats do not exist there, or FP8 has no activation scale."""
    recipe = read_recipe(name)
    if recipe.label.split(" + ")[0] in ("mxfp4", "w4a16", "w8a16", "int8"):
        return
    scale = {"input_scale": 1.0} if name == "fp8" else {}
    # No engine loads FP8 experts of a row or a block in this layout.
    source = sources["dense" if "fp8_" in recipe.label and "experts" not in name else "moe"]
    plan = make_plan(source, read_recipe(name, layout="modelopt", **scale))
    assert plan.config["quantization_config"]["quant_method"] == "modelopt"


def test_other_names_are_presets() -> None:
    """Each alias, whatever its capitals and dashes; an alias never hides a preset."""
    for alias, name in ALIASES.items():
        assert find_preset(alias) == find_preset(alias.upper().replace("_", "-")) == name
    assert set(ALIASES.values()) <= set(preset_names())
    assert not ALIASES.keys() & set(preset_names())
    assert find_preset("NVFP4-MLP-only") == "nvfp4_mlp_only"
    assert find_preset("nvfp5") is None


def test_names_that_promise_a_search_keep_it(sources: dict[str, Path]) -> None:
    """They have no preset of their own because the default is what they mean."""
    for name in ("nvfp4_w4a4_weight_mse_fp8_sweep", "int4_awq"):
        plan = make_plan(sources["dense"], read_recipe(name))
        assert {form.search for form in plan.formats.values()} == {"mse"}


def test_the_program_lists_them() -> None:
    """By each of the names that the option has; with a name it prints the file, to be changed."""
    listed = [
        CliRunner().invoke(main, words)
        for words in (["formats", "--presets"], ["formats", "--list_configs"], ["formats", "--list-configs"],
                      ["quantize", "--list_configs"], ["quantize", "--list-configs"])
    ]  # fmt: skip
    assert all(result.exit_code == 0 for result in listed)
    assert len({result.stdout for result in listed}) == 1
    text = listed[0].stdout
    assert max(map(len, text.splitlines())) <= 100
    for name in (*preset_names(), *ALIASES):
        assert any(line.split("  ")[0].strip() == name for line in text.splitlines()), name
    one = CliRunner().invoke(main, ["formats", "--presets", "nemotron_3"])
    assert one.stdout == preset_text("nvfp4_experts_fp8_rest")
    wrong = CliRunner().invoke(main, ["formats", "--presets", "nemotron_4"])
    assert wrong.exit_code == 2
    assert "nemotron_4: there is no such preset; did you mean 'nemotron_3'" in wrong.stderr


def test_a_preset_of_two_formats_is_written(sources: dict[str, Path], tmp_path: Path) -> None:
    """Through the program, and found complete by the recipe of its own output."""
    words = ["quantize", "--input_dir", str(sources["moe"]), "--output_dir", str(tmp_path / "out"), "--recipe"]
    made = CliRunner().invoke(main, [*words, "nvfp4_experts_fp8_rest"])
    assert made.exit_code == 0, made.output
    again = CliRunner().invoke(main, [*words, str(tmp_path / "out")])
    assert "was complete already" in again.output
    plan = convert(sources["moe"], tmp_path / "out", read_recipe("nemotron_3"))
    assert set(kinds(plan).values()) == {"nvfp4", "fp8_dynamic"}


# --- what they are modelled on --------------------------------------------------------------------

ATTENTION = {f"self_attn.{leaf}_proj" for leaf in "qkvo"}
ROUTED = {f"mlp.experts.N.{leaf}_proj" for leaf in ("gate", "up", "down")}
SHARED = {f"mlp.shared_expert.{leaf}_proj" for leaf in ("gate", "up", "down")}
MLP = {f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")}


def test_nemotron(sources: dict[str, Path]) -> None:
    """Experts NVFP4, shared experts and Mamba FP8, attention and latent projections BF16, KV cache FP8."""
    plan = make_plan(sources["hybrid"], read_recipe("nemotron_3"))
    assert kinds(plan) == (
        {f"mixer.experts.N.{leaf}_proj": "nvfp4" for leaf in ("up", "down")}
        | {f"mixer.shared_experts.{leaf}_proj": "fp8_dynamic" for leaf in ("up", "down")}
        | {f"mixer.{leaf}_proj": "fp8_dynamic" for leaf in ("in", "out")}
    )
    assert plan.config["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8
    assert kinds(make_plan(sources["moe"], read_recipe("nemotron_3"))) == (
        dict.fromkeys(ROUTED, "nvfp4") | dict.fromkeys(SHARED, "fp8_dynamic")
    )


def test_edge_layers(sources: dict[str, Path]) -> None:
    """The first four and the last feed-forward layer FP8, layer 4 NVFP4, all attention FP8."""
    plan = make_plan(sources["dense"], read_recipe("nvfp4_edge_layers_fp8"))
    by_layer = {int(m.split(".")[2]): f.name for m, f in plan.formats.items() if ".mlp." in m}
    assert by_layer == {0: "fp8_dynamic", 1: "fp8_dynamic", 2: "fp8_dynamic", 3: "fp8_dynamic", 4: "nvfp4",
                        5: "fp8_dynamic"}  # fmt: skip
    assert {f.name for m, f in plan.formats.items() if "self_attn" in m} == {"fp8_dynamic"}
    assert plan.recipe.kv_cache


def test_qwen(sources: dict[str, Path]) -> None:
    """NVFP4 weights in every feed-forward part, FP8 in both kinds of attention but for the delta net's gates."""
    recipe = read_recipe("qwen3.5")
    expected = dict.fromkeys(ATTENTION, "fp8_dynamic")
    assert kinds(make_plan(sources["moe"], recipe)) == expected | dict.fromkeys(ROUTED | SHARED, "nvfp4")
    delta = {f"linear_attn.{leaf}": "fp8_dynamic" for leaf in ("in_proj_qkv", "in_proj_z", "out_proj")}
    plan = make_plan(sources["linear attention"], recipe)
    assert kinds(plan) == expected | delta | dict.fromkeys(MLP, "nvfp4")
    assert stored(plan)["model.layers.0.mlp.up_proj"] == "nvfp4 A16"


def test_minimax_kimi_and_deepseek(sources: dict[str, Path]) -> None:
    """MXFP8 with NVFP4 experts; INT4 g32 experts alone; NVFP4 experts with block FP8 attention; block FP8 all over."""
    plan = make_plan(sources["moe"], read_recipe("minimax_m3"))
    assert kinds(plan) == dict.fromkeys(ROUTED, "nvfp4") | dict.fromkeys(SHARED | ATTENTION, "mxfp8")
    plan = make_plan(sources["moe"], read_recipe("kimi_k2"))
    assert kinds(plan) == dict.fromkeys(ROUTED, "w4a16")
    group = plan.config["quantization_config"]["config_groups"]["group_0"]
    assert (group["weights"]["group_size"], group["weights"]["symmetric"]) == (32, True)
    plan = make_plan(sources["moe"], read_recipe("kimi_k3"))
    assert kinds(plan) == dict.fromkeys(ROUTED, "nvfp4") | dict.fromkeys(ATTENTION, "fp8_block")
    plan = make_plan(sources["moe"], read_recipe("deepseek_v3"))
    assert kinds(plan) == dict.fromkeys(ROUTED | SHARED | ATTENTION, "fp8_block")
    assert plan.config["quantization_config"]["weight_block_size"] == [128, 128]


# --- ModelOpt's own recipes -----------------------------------------------------------------------

SPEC = find_spec("modelopt_recipes")
MODELOPT = Path(next(iter(SPEC.submodule_search_locations))) if SPEC and SPEC.submodule_search_locations else Path()
needs_modelopt = pytest.mark.skipif(SPEC is None, reason="nvidia-modelopt is not installed")
NUMBERS = {
    ("e2m1", 16, "e4m3"): ("nvfp4", 4),
    ("e2m1", 32, "e8m0"): ("mxfp4", 4),
    ("e4m3", 32, "e8m0"): ("mxfp8", 8),
    ("e4m3", None, None): ("fp8", 8),
    ("e4m3", 128, None): ("fp8_block", 8),
    (4, 128, None): ("w4a16", 4),
    (8, None, None): ("w8a16", 8),
}
"""num_bits, columns of a block, format of its scale -> our format, bits."""


def quantizers(path: str) -> list[dict[str, Any]]:
    """The list of a recipe, its imports put in."""
    documents = [d for d in yaml.safe_load_all((MODELOPT / f"{path}.yaml").read_text()) if d is not None]
    imports = documents[0].get("imports", {}) if isinstance(documents[0], dict) else {}
    content = documents[-1]
    listed = content.get("quant_cfg", content.get("quantize", {}).get("quant_cfg", [content])) if isinstance(
        content, dict) else content  # fmt: skip
    found: list[dict[str, Any]] = []
    for entry in listed:
        if set(entry) == {"$import"}:
            found += quantizers(imports[entry["$import"]])
        elif "parent_class" not in entry:
            cfg = dict(entry.get("cfg") or {})
            if "$import" in cfg:
                numbers = yaml.safe_load((MODELOPT / f"{imports[cfg.pop('$import')]}.yaml").read_text())
                cfg = {**numbers, **cfg}
            found.append({**entry, "cfg": cfg})
    return found


def modelopt_says(path: str, modules: list[str]) -> dict[str, str]:
    """Module -> format and bits of activations, for every module whose weight ModelOpt would quantize."""

    def last(name: str) -> dict[str, Any] | None:
        cfg = None
        for entry in quantizers_:
            if fnmatch(name, entry["quantizer_name"]):
                cfg = (entry["cfg"] or cfg) if entry.get("enable", True) else None
        return cfg

    quantizers_ = quantizers(path)
    found = {}
    for module in modules:
        weight, inputs = last(f"{module}.weight_quantizer"), last(f"{module}.input_quantizer")
        if weight is not None:
            name, _ = numbers_of(weight)
            bits = numbers_of(inputs)[1] if inputs is not None else 16
            found[module] = f"{'fp8_dynamic' if name == 'fp8' and weight.get('axis') == 0 else name} A{bits}"
    return found


def numbers_of(cfg: dict[str, Any]) -> tuple[str, int]:
    block = {key: value for key, value in (cfg.get("block_sizes") or {}).items() if value is not None}
    return NUMBERS[cfg["num_bits"], block.get(-1), block.get("scale_bits")]


def linear_modules(plan: Plan) -> list[str]:
    """Matrices of linear layers: what ModelOpt has quantizers for, of which it leaves embeddings out by their class."""
    return [m for m in (*plan.formats, *plan.kept) if "embed" not in m and "norm" not in m and "conv1d" not in m]


SAME = {name: f"configs/ptq/presets/model/{name}" for name in (
    "nvfp4", "nvfp4_mlp_only", "nvfp4_experts_only", "nvfp4_omlp_only", "nvfp4_four_over_six",
    "nvfp4_w4a4_weight_mse_fp8_sweep", "w4a16_nvfp4", "fp8", "fp8_per_channel_per_token", "mxfp8", "mxfp4",
    "mxfp4_mlp_weight_only", "int4_blockwise_weight_only", "int8_weight_only",
)} | {
    "nvfp4_default": "general/ptq/nvfp4_default-kv_fp8_cast",
    "fp8_default": "general/ptq/fp8_default-kv_fp8_cast",
    "nvfp4_weight_only": "general/ptq/nvfp4_weight_only-kv_fp16",
    "nvfp4_experts_only_input_scale1": "general/ptq/nvfp4_experts_only_input_scale1-kv_fp8_cast",
    "minimax_m3": "huggingface/minimax_m3_vl/ptq/mxfp8_nvfp4_experts",
}  # fmt: skip


@needs_modelopt
@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_name_of_modelopt_means_the_same(name: str, kind: str, sources: dict[str, Path]) -> None:
    """The same modules, weights and activations."""
    if kind == "dense" and find_preset(name) in EXPERTS:
        return
    plan = make_plan(sources[kind], read_recipe(name))
    theirs = modelopt_says(SAME[name], linear_modules(plan))
    assert theirs
    assert stored(plan) == theirs


MIXED = {
    "nemotron_3": ("hybrid", "models/nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16/ptq/nvfp4-mse"),
    "qwen3.5": ("linear attention", "huggingface/qwen3_5/ptq/w4a16_nvfp4-fp8_attn-kv_fp8_cast"),
    "qwen3.6": ("moe", "huggingface/qwen3_5_moe/ptq/w4a16_nvfp4-fp8_attn-kv_fp8_cast"),
    "kimi_k3": ("moe", "models/moonshotai/Kimi-K3/ptq/nvfp4_experts-fp8_pb_attention"),
}


@needs_modelopt
@pytest.mark.parametrize("name", MIXED)
def test_a_published_mix_is_the_same_mix(name: str, sources: dict[str, Path]) -> None:
    """FP8 with one scale a tensor there has a scale for each row here; the head of Qwen3.5 stays BF16 here.

    Kimi K3 calls its experts block_sparse_moe, and its block FP8 is for weights alone in ModelOpt's terms.
    """
    kind, path = MIXED[name]
    plan = make_plan(sources[kind], read_recipe(name))
    renamed = {m.replace(".mlp.experts.", ".block_sparse_moe.experts."): m for m in linear_modules(plan)}
    if name != "kimi_k3":
        renamed = {m: m for m in linear_modules(plan)}
    theirs = {renamed[m]: form for m, form in modelopt_says(path, list(renamed)).items() if m != "lm_head"}
    same = {"fp8 A8": "fp8_dynamic A8", "fp8_block A16": "fp8_block A8"}
    assert stored(plan) == {m: same.get(form, form) for m, form in theirs.items()}


@needs_modelopt
def test_the_edge_layers_are_those_of_mistral(sources: dict[str, Path]) -> None:
    """Its 88 layers end with 87 where ours end with 5."""
    plan = make_plan(sources["dense"], read_recipe("mistral_medium_3.5"))
    names = {m.replace("layers.5.", "layers.87."): m for m in linear_modules(plan)}
    theirs = modelopt_says("models/mistralai/Mistral-Medium-3.5-128B/ptq/nvfp4-max-calib", list(names))
    assert stored(plan) == {names[m]: form.replace("fp8 ", "fp8_dynamic ") for m, form in theirs.items()}
