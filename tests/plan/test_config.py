"""config.json, ignore lists and companions of the output: what loaders parse, and nothing that is stale."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from torch import Tensor

from mso_hub.errors import PlanError
from mso_hub.pipeline import make_plan
from mso_hub.plan import Plan, Recipe
from mso_hub.plan.config import carried_files, substring_problem
from mso_hub.source import MemorySource
from tests.helpers import checkpoint_files, random_tensor

L = "model.layers.0"
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "rope_scaling": {"factor": 2.5, "type": "yarn"},
    "time_step_limit": [0.0, float("inf")],
    "auto_map": {"AutoModel": "modeling_x.X"},
    "note": "Größe ≥ 1",
    "empty": None,
    "list": [],
}


def matrices(*modules: str) -> dict[str, Tensor]:
    """32 by 32 matrices."""
    return {f"{module}.weight": random_tensor(32, 32, seed=at) for at, module in enumerate(modules)}


ATTENTION = matrices(*(f"{L}.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")))
MLP = matrices(*(f"{L}.mlp.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")))
EXPERTS = matrices(*(f"{L}.mlp.experts.{e}.{leaf}" for e in (0, 1) for leaf in ("gate_proj", "up_proj", "down_proj")))
ROUTER = matrices(f"{L}.mlp.gate")
NORM = {"model.norm.weight": random_tensor(32)}


def plan_of(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = CONFIG,
    others: Mapping[str, bytes] | None = None,
    **recipe: Any,
) -> Plan:
    """The plan for a single-file repo in memory."""
    files = checkpoint_files({"model.safetensors": tensors}, config) | dict(others or {})
    return make_plan(MemorySource(files), Recipe(**recipe))


def ignored(plan: Plan) -> list[str]:
    """The ignore list that is written."""
    found = plan.config["quantization_config"]["ignore"]
    assert isinstance(found, list)
    return found


# --- quantization_config --------------------------------------------------------------------------


@pytest.mark.parametrize(("input_scale", "preset"), [(None, "NVFP4A16"), (1.0, "NVFP4")])
def test_compressed_tensors_parses_the_config(input_scale: float | None, preset: str) -> None:
    """The real library reads its own preset out of it: weight-only, or with local activations."""
    plan = plan_of(MLP, input_scale=input_scale)
    written = json.loads(plan.files["config.json"])["quantization_config"]
    parsed = QuantizationConfig.model_validate(written)
    assert (parsed.format, parsed.quantization_status) == ("nvfp4-pack-quantized", "compressed")
    assert parsed.ignore == written["ignore"] == ["lm_head"]
    (scheme,) = parsed.config_groups.values()
    expected = preset_name_to_scheme(preset, ["Linear"])
    assert scheme == expected.model_copy(update={"format": "nvfp4-pack-quantized"})
    assert (scheme.input_activations is None) is (input_scale is None)
    assert "hf_quant_config.json" not in plan.files


@pytest.mark.parametrize(("input_scale", "algorithm"), [(None, "W4A16_NVFP4"), (1.0, "NVFP4")])
def test_modelopt_gets_both_of_its_files(input_scale: float | None, algorithm: str) -> None:
    """config.json for vLLM and hf_quant_config.json for TensorRT-LLM say the same."""
    plan = plan_of(MLP, layout="modelopt", input_scale=input_scale)
    config = json.loads(plan.files["config.json"])["quantization_config"]
    file = json.loads(plan.files["hf_quant_config.json"])
    assert config["quant_method"] == "modelopt"
    assert config["quant_algo"] == file["quantization"]["quant_algo"] == algorithm
    assert config["ignore"] == file["quantization"]["exclude_modules"] == ["lm_head"]
    assert config["producer"] == file["producer"]
    assert config["producer"]["name"] == "modelopt"
    assert file["quantization"]["group_size"] == 16
    (group,) = config["config_groups"].values()
    assert ("input_activations" in group) is (input_scale is not None)
    assert all(group[part]["num_bits"] == 4 and group[part]["group_size"] == 16 for part in group if part != "targets")


def test_an_excluded_module_is_written_into_the_config() -> None:
    """Patterns of --ignore and of a reference config end up as exact names: the prototype forgot them."""
    pattern = (f"{L}.mlp.experts",)
    for plan in (plan_of(MLP | EXPERTS, ignore=pattern), plan_of(MLP | EXPERTS, imported_ignore=pattern)):
        assert {name.removesuffix(".weight") for name in EXPERTS} <= set(ignored(plan))


# --- ignore list ----------------------------------------------------------------------------------


def test_ignore_has_exact_names_aliases_and_the_head() -> None:
    """Every dense linear module, the fused name under which engines ask, and lm_head though it is tied."""
    plan = plan_of(ATTENTION | EXPERTS | ROUTER | NORM)
    assert ignored(plan) == sorted(
        [
            "lm_head",
            f"{L}.mlp.gate",
            f"{L}.self_attn.qkv_proj",
            *(f"{L}.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")),
        ]
    )


def test_ignore_names_the_container_of_ignored_experts() -> None:
    """vLLM asks for `mlp.experts`, per-expert names and fused names alone would not match."""
    plan = plan_of(ATTENTION | EXPERTS, mode="all-linear", ignore=(f"{L}.mlp.experts",))
    names = {name.removesuffix(".weight") for name in EXPERTS}
    aliases = {f"{L}.mlp.experts", f"{L}.mlp.experts.0.gate_up_proj", f"{L}.mlp.experts.1.gate_up_proj", "lm_head"}
    assert set(ignored(plan)) == names | aliases


def test_ignore_names_the_container_of_a_fused_bank() -> None:
    """A 3-D bank that stays has its name in the list, the container's, and those that vLLM asks for."""
    bank = {
        f"{L}.mlp.experts.gate_up_proj": random_tensor(2, 96, 32),
        f"{L}.mlp.experts.down_proj": random_tensor(2, 32, 48),
    }
    plan = plan_of(bank | ATTENTION, mode="all-linear", ignore=("*.experts",))
    assert set(ignored(plan)) == {
        "lm_head",
        f"{L}.mlp.experts",
        f"{L}.mlp.experts.gate_up_proj",
        f"{L}.mlp.experts.down_proj",
        *(f"{L}.mlp.experts.0.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")),
    }


@pytest.mark.parametrize(
    ("modules", "alias"),
    [
        (("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), "self_attn.fused_qkv_a_proj"),
        (("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"), "linear_attn.in_proj_qkvz"),
        (("linear_attn.in_proj_a", "linear_attn.in_proj_b"), "linear_attn.in_proj_ba"),
        (("self_attn.q_proj",), "self_attn.qkv_proj"),
        (("self_attn.q_proj", "self_attn.f_a_proj", "self_attn.b_proj"), "self_attn.in_proj_qkvgfab"),
    ],
)
def test_ignore_has_the_fused_name(modules: tuple[str, ...], alias: str) -> None:
    """Of units that stay, and of a lone member: engines look for partners that share its keys and do not exist."""
    names = [f"{L}.{module}" for module in modules]
    found = ignored(plan_of(MLP | matrices(*names)))
    assert {*names, f"{L}.{alias}"} <= set(found)


def test_a_quantized_module_is_never_ignored() -> None:
    """Nor is its fused name, its container, or a stored output head that was chosen."""
    tensors = ATTENTION | EXPERTS | ROUTER | NORM | matrices("lm_head")
    plan = plan_of(tensors, mode="all-linear")
    assert ignored(plan) == ["lm_head", f"{L}.mlp.gate"]
    everything = plan_of(tensors, targets=("*",), default_ignore=False, ignore=("*norm",))
    assert ignored(everything) == []


def test_an_embedding_is_ignored_by_name() -> None:
    """vLLM builds some embeddings with a quantization config: the list says that they are dense."""
    found = ignored(plan_of(MLP | matrices("model.embed_tokens") | NORM))
    assert found == ["lm_head", "model.embed_tokens"]


def test_a_substring_of_a_quantized_module_is_refused_for_modelopt() -> None:
    """vLLM matches ModelOpt's list by substring: a dense `mlp.gate` would switch off the quantized gate_proj."""
    tensors = MLP | ROUTER
    with pytest.raises(PlanError, match=rf"{L}\.mlp\.gate: .* part of '{L}\.mlp\.gate_proj', which is quantized; use"):
        plan_of(tensors, layout="modelopt")
    assert f"{L}.mlp.gate" in ignored(plan_of(tensors))
    told = plan_of(tensors, layout="modelopt", unloadable=True)
    assert told.notes[0].startswith(f"vLLM does not load this: {L}.mlp.gate: stays unquantized, but vLLM's ModelOpt")


def test_a_substring_of_a_fused_name_is_refused_for_modelopt() -> None:
    """The engine asks for `gate_up_proj`; what covers that name covers quantized weights."""
    problem = substring_problem(["x.mlp.gate_up"], ["x.mlp.gate_proj", "x.mlp.up_proj"])
    assert problem is not None
    assert problem.startswith("x.mlp.gate_up: stays unquantized")
    experts = ["x.mlp.experts.0.gate_proj", "x.mlp.experts.0.up_proj"]
    assert substring_problem(["x.mlp.gate", "lm_head"], experts) is None


# --- the rest of config.json ----------------------------------------------------------------------


def test_other_fields_are_kept_as_they_are() -> None:
    """config.json is patched, not rebuilt: every other value, and their order, survive."""
    written = json.loads(plan_of(MLP).files["config.json"])
    assert list(written) == [*CONFIG, "quantization_config"]
    assert {key: written[key] for key in CONFIG} == CONFIG
    text = plan_of(MLP).files["config.json"].decode()
    assert "Größe ≥ 1" in text


STALE = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("part", [None, "text_config", "llm_config"])
def test_an_old_quantization_config_is_replaced(part: str | None, key: str) -> None:
    """At the top, and nested as in Kimi-K2.5's text_config: the output announces one quantization, its own."""
    config = CONFIG | ({key: STALE} if part is None else {part: {"hidden_size": 32, key: STALE}})
    written = json.loads(plan_of(MLP, config).files["config.json"])
    assert "fp8" not in json.dumps(written)
    assert written["quantization_config"]["quant_method"] == "compressed-tensors"
    if part is not None:
        assert written[part] == {"hidden_size": 32}


def test_a_checkpoint_without_config_cannot_be_announced() -> None:
    """Without config.json no loader would know that the weights are packed."""
    with pytest.raises(PlanError, match=r"needs its config\.json, there is none; add it"):
        plan_of(MLP, None)


# --- files that come along ------------------------------------------------------------------------

CARRIED = [
    "README.md",
    "LICENSE",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "modeling_x.py",
    "assets/figure.png",
    "sub/deep/notes.txt",
    "tokenizer.bin.txt",
    "recipe_for_soup.md",
    "1_Pooling/config.json",
    "params.json",
    "training_args.bin",
    "spiece.model",
    "added_tokens.json",
]
BEHIND = [
    ".gitattributes",
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "recipe.yaml",
    "mso_hub.json",
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "original/consolidated.00.pth",
    "model.gguf",
    "sub/q4.gguf",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "tf_model.h5",
    "flax_model.msgpack",
    "rust_model.ot",
    "model.ckpt",
    "old/hf_quant_config.json",
]


def test_all_other_files_come_along_and_stale_ones_do_not() -> None:
    """Tokenizers, templates, code, licences and subfolders are carried; other containers of the weights are not."""
    others = dict.fromkeys([*CARRIED, *BEHIND], b"x")
    plan = plan_of(MLP, others=others)
    assert sorted(plan.carried) == sorted(CARRIED)
    assert sorted(plan.behind) == sorted(BEHIND)
    assert any(note.startswith("not carried, they describe the old weights") for note in plan.notes)


def test_modelopts_file_is_replaced_and_not_carried() -> None:
    """An old hf_quant_config.json gives way to the new one."""
    plan = plan_of(MLP, others={"hf_quant_config.json": b"{}"}, layout="modelopt")
    assert plan.behind == ("hf_quant_config.json",)
    assert "W4A16_NVFP4" in plan.files["hf_quant_config.json"].decode()


def test_a_text_model_needs_no_image_processor() -> None:
    """With text_only the files that describe images stay behind, tokenizers come along."""
    files = dict.fromkeys(["preprocessor_config.json", "processor_config.json", "tokenizer.json", "config.json"], 1)
    carried, behind = carried_files(files, text_only=True)
    assert carried == ("tokenizer.json",)
    assert behind == ("preprocessor_config.json", "processor_config.json")


def test_a_model_in_a_subfolder_is_carried_and_not_converted() -> None:
    """A draft model with a config of its own comes along byte for byte, whatever its format."""
    draft = dict.fromkeys(("draft/config.json", "draft/hf_quant_config.json", "draft/model.safetensors"), b"x")
    plan = plan_of(MLP, others=draft)
    assert set(plan.carried) == set(draft)
    assert not any(shard.name.startswith("draft/") for shard in plan.shards)
