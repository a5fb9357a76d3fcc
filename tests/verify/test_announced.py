"""The ignore list against what is stored, in the names that vLLM matches it with."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from mso_hub.sink import MemorySink
from mso_hub.source import MemorySource
from mso_hub.verify import Report, verify_checkpoint
from mso_hub.verify.announced import never_packed
from tests.helpers import checkpoint_files, random_tensor, tensors_in

Config = dict[str, Any]
LANGUAGE, VISION = "model.language_model.layers.0", "model.visual.blocks.0.mlp.fc1"
PLAIN = "model.layers.0"


@cache
def written(layout: str, prefix: str, router: str) -> dict[str, bytes]:
    """One packed layer with a router and latent attention, and a dense layer of a tower."""
    shapes = {
        f"{prefix}.self_attn.q_a_proj": (64, 128), f"{prefix}.self_attn.kv_a_proj_with_mqa": (48, 128),
        f"{prefix}.mlp.shared_experts.gate_proj": (64, 128), f"{prefix}.mlp.shared_experts.up_proj": (64, 128),
        f"{prefix}.mlp.shared_experts.down_proj": (128, 64), router: (4, 128), VISION: (64, 64),
    }  # fmt: skip
    tensors = {f"{name}.weight": random_tensor(*shape, seed=at) for at, (name, shape) in enumerate(shapes.items())}
    sink = MemorySink()
    files = checkpoint_files({"model.safetensors": tensors}, {"model_type": "qwen3_moe"})
    convert(MemorySource(files), sink, Recipe(layout=layout, mode="all-linear"))
    return {name: data for name, data in sink.files.items() if name != "mso_hub.json"}


def checked(
    edit: Callable[[Config], object],
    layout: str = "compressed-tensors",
    prefix: str = PLAIN,
    tensors: Callable[[dict[str, Tensor]], object] = lambda _: None,
) -> Report:
    """verify after a change of config.json, of the file beside it, and of tensors."""
    files = dict(written(layout, prefix, f"{prefix}.mlp.gate"))
    config = json.loads(files["config.json"])
    edit(config)
    files["config.json"] = json.dumps(config).encode()
    if layout == "modelopt":
        beside = json.loads(files["hf_quant_config.json"])
        beside["quantization"]["exclude_modules"] = config["quantization_config"]["ignore"]
        files["hf_quant_config.json"] = json.dumps(beside).encode()
    found = tensors_in(files)
    tensors(found)
    return verify_checkpoint(MemorySource(files | checkpoint_files({"model.safetensors": found})))


def ignoring(*added: str, without: str = "") -> Callable[[Config], object]:
    """More entries in the ignore list, and one less."""

    def edit(config: Config) -> None:
        said = config["quantization_config"]
        said["ignore"] = [*(entry for entry in said["ignore"] if entry != without), *added]

    return edit


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_a_right_list_is_no_problem(layout: str) -> None:
    """In stored names, prefix or not."""
    for prefix in (PLAIN, LANGUAGE):
        assert checked(lambda _: None, layout, prefix).problems == ()


@pytest.mark.parametrize(("model_type", "asked"), [("qwen3_moe", True), ("deepseek_v3", False), ("mixtral", False)])
def test_routers_must_be_in_the_list_where_vllm_asks_for_them(model_type: str, asked: bool) -> None:
    """Qwen3-MoE's is a linear layer like the others, DeepSeek's is not."""

    def edit(config: Config) -> None:
        ignoring(without=f"{PLAIN}.mlp.gate")(config)
        config["model_type"] = model_type

    expected = (f"config.json: stored dense and not in ignore, so loaders expect them packed: {PLAIN}.mlp.gate",)
    assert checked(edit).problems == (expected if asked else ())


@pytest.mark.parametrize("entry", ["gate", "shared", "o"])
def test_a_short_name_of_modelopt_catches_too_much(entry: str) -> None:
    """It is looked for anywhere in a name; the entry is named."""
    (problem, *_) = checked(ignoring(entry), "modelopt").problems
    assert problem.startswith(f"config.json: the entry {entry!r} of ignore covers modules that are stored packed: ")
    assert f"{PLAIN}.mlp.shared_experts.gate_proj" in problem


def dense_member(tensors: dict[str, Tensor]) -> None:
    """kv_a is not packed."""
    name = f"{PLAIN}.self_attn.kv_a_proj_with_mqa"
    for stored in [stored for stored in tensors if stored.startswith(f"{name}.")]:
        del tensors[stored]
    tensors[f"{name}.weight"] = torch.zeros(48, 128, dtype=torch.bfloat16)


def test_members_of_a_fused_layer_must_be_stored_alike() -> None:
    """Latent attention's down projections too, although the list names the dense one."""
    name = f"{PLAIN}.self_attn"
    (problem, *_) = checked(ignoring(f"{name}.kv_a_proj_with_mqa"), tensors=dense_member).problems
    assert problem == (
        f"{name}.fused_qkv_a_proj: engines fuse its members, so all must be stored alike; "
        f"{name}.kv_a_proj_with_mqa is dense, {name}.q_a_proj is nvfp4"
    )


@pytest.mark.parametrize("pattern", [r"re:^model\.visual\..*", r"re:model.visual.blocks.*"])
def test_a_pattern_in_names_that_vllm_does_not_have_is_found(pattern: str) -> None:
    """Its tower is called `visual`, and patterns are not renamed."""
    (problem,) = checked(ignoring(pattern, without=VISION), prefix=LANGUAGE).problems
    assert problem == (
        f"config.json: ignore: {pattern} matches stored names and none of vLLM's, where {VISION} is "
        f"{VISION.removeprefix('model.')}; write re:.*visual.* or the names themselves: {VISION}"
    )


@pytest.mark.parametrize("entry", ["re:.*visual.*", r"re:(.*\.)?visual\.blocks.*", VISION])
def test_patterns_that_match_both_names_are_none(entry: str) -> None:
    """And plain names, which vLLM renames."""
    assert checked(ignoring(entry, without=VISION), prefix=LANGUAGE).problems == ()


def test_targets_in_names_that_vllm_does_not_have_are_found() -> None:
    """They would leave every layer dense there."""

    def edit(config: Config) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["targets"] = [r"re:^model\.language_model\..*_proj"]

    (problem,) = checked(edit, prefix=LANGUAGE).problems
    assert "targets of group_0: re:^model" in problem
    assert "is language_model.model.layers.0." in problem


def test_names_that_mean_nothing_are_noted() -> None:
    """No problem: engines pass over them. Fused names, parents and patterns mean something."""
    report = checked(
        ignoring("model.layers.7.mlp.gate", f"{PLAIN}.mlp.nothing", "re:.*absent.*", "lm_head", "model.visual")
    )
    assert report.problems == ()
    assert "names in ignore that are not stored: model.layers.7.mlp.gate, model.layers.0.mlp.nothing" in report.notes


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_a_head_counts_as_dense_where_the_method_never_packs_it(method: str) -> None:
    """The Hub is full of such checkpoints, and none of them has an ignore list."""
    assert never_packed({"quant_method": method}, "lm_head", "llama")
    assert not never_packed({"quant_method": method, "lm_head": True}, "lm_head", "llama")
    assert not never_packed({"quant_method": method}, f"{PLAIN}.mlp.up_proj", "llama")
