"""verify without a source: what config.json announces must be there, and nothing else; odd models are left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from mso_hub.sink import MemorySink
from mso_hub.source import MemorySource
from mso_hub.verify import verify_checkpoint
from tests.helpers import checkpoint_files, random_tensor, tensors_in, tensors_of, tiny_llama, tiny_moe

Tensors = dict[str, Tensor]
Config = dict[str, Any]
Edit = Callable[[Tensors, Config], object]
LAST = "model.layers.3"
EXPERT = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensors, Config]]:
    """Tensors and config.json of a Llama and a Qwen3-MoE of four layers, dense and in NVFP4."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    for name, make in (("llama", tiny_llama), ("moe", tiny_moe)):
        dense = make(folder / name, layers=4)
        found[f"{name} dense"] = (tensors_of(dense), json.loads((dense / "config.json").read_text()))
        sink = MemorySink()
        convert(dense, sink, Recipe(mode="all-linear"))
        found[name] = (tensors_in(sink.files), json.loads(sink.files["config.json"]))
    return found


def problems(model: tuple[Tensors, Config], edit: Edit) -> str:
    """What verify says after a change of tensors or config.json, one problem a line."""
    tensors, config = dict(model[0]), json.loads(json.dumps(model[1]))
    edit(tensors, config)
    files = checkpoint_files({"model.safetensors": tensors}, config)
    return "\n".join(verify_checkpoint(MemorySource(files)).problems)


def remove(beginning: str) -> Edit:
    """Take away every tensor whose name begins so."""

    def edit(tensors: Tensors, config: Config) -> None:
        found = [name for name in tensors if name.startswith(beginning)]
        assert found, beginning
        for name in found:
            del tensors[name]

    return edit


def again(beginning: str, beside: str) -> Edit:
    """Every tensor whose name begins so once more, under another name."""

    def edit(tensors: Tensors, config: Config) -> None:
        tensors.update({n.replace(beginning, beside): t for n, t in tensors.items() if n.startswith(beginning)})

    return edit


def add(name: str, *shape: int) -> Edit:
    """A tensor more."""
    return lambda tensors, _: tensors.update({name: random_tensor(*shape)})


FOUND: dict[str, tuple[str, Edit, str]] = {
    "the last layer": ("llama", remove(f"{LAST}."), f"(config.json has num_hidden_layers 4): {LAST}"),
    "a layer in the middle": ("moe", remove("model.layers.1."), "num_hidden_layers 4): model.layers.1"),
    "a layer of a dense model": ("llama dense", remove("model.layers.0."), "num_hidden_layers 4): model.layers.0"),
    "a norm": ("llama", remove("model.layers.2.input_layernorm"), "layer 0 has: model.layers.2.input_layernorm.weight"),
    "a linear layer": ("llama", remove("model.layers.2.self_attn.o_proj."), "model.layers.2.self_attn.o_proj.weight"),
    "a member of a fused unit": ("moe", remove("model.layers.2.self_attn.k_proj."), "2.self_attn.k_proj.weight"),
    "the last norm": ("llama", remove("model.norm."), "norm after the last layer is missing"),
    "the output head": ("llama", remove("lm_head."), "the output head is missing: lm_head.weight"),
    "the embedding": ("llama", remove("model.embed_tokens."), "the embedding is missing: model.embed_tokens.weight"),
    "an expert": ("moe", remove(f"{EXPERT}.2."), f"(config.json says 4 experts): {EXPERT}.2.down_proj.weight"),
    "the last expert": ("moe", remove(f"{EXPERT}.3."), f"{EXPERT}.3.down_proj.weight"),
    "a projection of an expert": ("moe", remove(f"{EXPERT}.0.up_proj."), f"{EXPERT}.0.up_proj.weight"),
    "a layer too many": ("llama", again(f"{LAST}.", "model.layers.4."), "no loader takes model.layers.4.input_l"),
    "an expert too many": ("moe", again(f"{EXPERT}.0.", f"{EXPERT}.4."), f"4 experts, so no loader takes {EXPERT}.4."),
    "a module that no other layer has": (
        "llama dense", add("model.layers.2.mlp.extra.weight", 8, 8),
        "no other layer has such tensors, loaders know no place for them: model.layers.2.mlp.extra.weight"),
    "a tensor beside a packed weight": (
        "llama", add("model.layers.2.mlp.down_proj.foo", 8), "know no such tensors: model.layers.2.mlp.down_proj.foo"),
    "rows of a gate": (
        "llama dense", lambda t, _: t.update({"model.layers.2.mlp.gate_proj.weight": random_tensor(64, 64)}),
        "model.layers.2.mlp.gate_proj.weight: gate_proj [64, 64], up_proj [128, 64], down_proj [64, 128] do not fit"),
    "columns of a fused member": (
        "llama dense", lambda t, _: t.update({"model.layers.2.self_attn.v_proj.weight": random_tensor(32, 48)}),
        "model.layers.2.self_attn.v_proj.weight: k_proj [32, 64], q_proj [64, 64], v_proj [32, 48] do not fit"),
}  # fmt: skip


@pytest.mark.parametrize("what", FOUND)
def test_what_is_missing_or_too_many_is_named(what: str, models: dict[str, tuple[Tensors, Config]]) -> None:
    """Packed or dense, without a source to compare with."""
    model, edit, expected = FOUND[what]
    assert expected in problems(models[model], edit)


def share_keys(tensors: Tensors, config: Config) -> None:
    """As Gemma 3n: the last layer has no keys and values of its own."""
    config["num_kv_shared_layers"] = 1
    for leaf in ("k_proj", "v_proj"):
        remove(f"{LAST}.self_attn.{leaf}.")(tensors, config)


def mtp(tensors: Tensors, config: Config) -> None:
    """As DeepSeek-V3: a layer for multi-token prediction after the last one."""
    config["num_nextn_predict_layers"] = 1
    again(f"{LAST}.", "model.layers.4.")(tensors, config)
    tensors["model.layers.4.eh_proj.weight"] = random_tensor(64, 128)
    config["quantization_config"]["ignore"] += ["model.layers.4.eh_proj", "model.layers.4.mlp.gate"]


def dense_first(tensors: Tensors, config: Config) -> None:
    """As DeepSeek-V3: the first layer has an MLP where the others have experts."""
    remove("model.layers.0.mlp.")(tensors, config)
    experts = f"{EXPERT}.0."
    for name in [name for name in tensors if name.startswith(experts)]:
        tensors[name.replace(experts, "model.layers.0.mlp.")] = tensors[name]
    config["quantization_config"]["ignore"].remove("model.layers.0.mlp.gate")


def one_by_one(tensors: Tensors, config: Config) -> None:
    """As Nemotron: a search took attention out of a layer."""
    config["block_configs"] = [{}]
    remove("model.layers.2.self_attn.")(tensors, config)


def every_other(tensors: Tensors, config: Config) -> None:
    """Two kinds of layers: some have no norm of their own before the MLP."""
    for layer in (1, 3):
        remove(f"model.layers.{layer}.post_attention_layernorm")(tensors, config)


def tower(tensors: Tensors, config: Config) -> None:
    """A vision tower has layers and numbers of its own."""
    for layer in range(9):
        tensors[f"vision_tower.encoder.layers.{layer}.norm.weight"] = random_tensor(8)


def part_of_a_model(tensors: Tensors, config: Config) -> None:
    """Without an embedding and without the config of a whole model nothing is announced."""
    remove("model.embed_tokens.")(tensors, config)
    remove(f"{LAST}.")(tensors, config)
    del config["vocab_size"]


@pytest.mark.parametrize(("model", "edit"), [
    ("llama", share_keys), ("moe", mtp), ("moe", dense_first), ("llama dense", one_by_one), ("llama", every_other),
    ("llama", tower), ("llama", part_of_a_model), ("llama", lambda *_: None), ("moe", lambda *_: None),
    ("moe dense", lambda *_: None),
])  # fmt: skip
def test_odd_models_are_no_problem(model: str, edit: Edit, models: dict[str, tuple[Tensors, Config]]) -> None:
    """Layers may differ where config.json or the names tell why."""
    assert problems(models[model], edit) == ""


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts"])
def test_a_number_that_no_model_has_is_no_list_of_that_length(
    key: str, models: dict[str, tuple[Tensors, Config]]
) -> None:
    """One sentence, at once."""
    said = problems(models["moe"], lambda _, config: config.update({key: 10**12}))
    assert said == f"config.json: {key} 1,000,000,000,000 is more than any model has; restore config.json"


def test_a_tied_head_is_not_missed(tmp_path: Path) -> None:
    """The embedding is the head."""
    folder = tiny_llama(tmp_path / "tied", shards=1)
    tensors, config = tensors_of(folder), json.loads((folder / "config.json").read_text())
    del tensors["lm_head.weight"]
    config["tie_word_embeddings"] = True
    assert verify_checkpoint(MemorySource(checkpoint_files({"model.safetensors": tensors}, config))).problems == ()


@pytest.mark.parametrize(("layout", "scheme", "lost"), [
    *(("compressed-tensors", "nvfp4", leaf) for leaf in ("weight_packed", "weight_scale")),
    *(("modelopt", "nvfp4", leaf) for leaf in ("weight", "weight_scale", "weight_scale_2")),
    *(("compressed-tensors", "fp8_dynamic", leaf) for leaf in ("weight", "weight_scale")),
    *(("deepseek", "fp8_block", leaf) for leaf in ("weight", "weight_scale_inv")),
])  # fmt: skip
def test_the_part_of_a_packed_weight_that_is_missing_is_named(
    layout: str, scheme: str, lost: str, models: dict[str, tuple[Tensors, Config]]
) -> None:
    """Whatever is left of it."""
    tensors, config = models["llama dense"]
    if scheme == "fp8_block":
        tensors = {name: t.repeat((4,) * t.dim()) for name, t in tensors.items()}
    sink = MemorySink()
    recipe = Recipe(scheme=scheme, layout=layout, mode="all-linear")
    convert(MemorySource(checkpoint_files({"model.safetensors": tensors}, config)), sink, recipe)
    module = "model.layers.1.self_attn.o_proj"
    left = {name: tensor for name, tensor in tensors_in(sink.files).items() if name != f"{module}.{lost}"}
    files = {**sink.files, **checkpoint_files({"model.safetensors": left})}
    del files["mso_hub.json"]
    (problem,) = verify_checkpoint(MemorySource(files)).problems
    assert problem.startswith(f"{module}: ")
    assert lost in problem
    assert "is not; the checkpoint is incomplete" in problem


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8])
def test_an_activation_scale_is_one_number(dtype: torch.dtype, models: dict[str, tuple[Tensors, Config]]) -> None:
    """In F32 for NVFP4; a vector or another dtype is not what loaders make room for."""
    tensors, config = models["llama dense"]
    sink = MemorySink()
    convert(
        MemorySource(checkpoint_files({"model.safetensors": tensors}, config)), sink,
        Recipe(mode="all-linear", input_scale=1.0),
    )  # fmt: skip
    name = "model.layers.1.self_attn.o_proj.input_global_scale"
    packed = tensors_in(sink.files)
    for wrong in (packed[name].to(dtype), packed[name].repeat(2)):
        files = {**sink.files, **checkpoint_files({"model.safetensors": {**packed, name: wrong}})}
        del files["mso_hub.json"]
        assert f"{name}: an activation scale is one number in F32, found" in "".join(
            verify_checkpoint(MemorySource(files)).problems
        )
