"""What a plan for kt-kernel holds, under which names, and what it refuses before anything is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mso_hub.errors import PlanError, RecipeError
from mso_hub.formats.dialects.ktransformers import Place, expert_place, rest_name, source_names, template
from mso_hub.pipeline import make_plan
from mso_hub.plan import Plan, Recipe
from mso_hub.plan.kt import KtRecipe
from mso_hub.plan.kt_problems import fitting
from mso_hub.source import MemorySource
from tests.helpers import checkpoint_files, random_tensor, tensors_in
from tests.kt.helpers import Experts, converted, decoded, moe_files, rest

EXPERTS = Experts()


def planned(files: Mapping[str, bytes], **settings: Any) -> Plan:
    """The plan alone."""
    return make_plan(MemorySource(files), KtRecipe(**settings))


def refusal(files: Mapping[str, bytes], **settings: Any) -> str:
    """What a plan is refused with."""
    with pytest.raises(PlanError) as caught:
        planned(files, **settings)
    return str(caught.value)


# --- what is written --------------------------------------------------------------------------------


def test_a_file_for_each_layer_then_the_rest() -> None:
    """Names, dtypes and shapes as kt-kernel's loader has them; index and config name everything."""
    files = moe_files(Experts(layers=2))
    plan, out = converted(files, KtRecipe(scheme="kt-int4", threadpool_count=2))
    names = [f"model-{at:05d}-of-00003.safetensors" for at in (1, 2, 3)]
    assert [shard.name for shard in plan.shards] == names
    stored = tensors_in(out)
    codes, scale = (stored[f"blk.1.ffn_down_exps.1.numa.1.{leaf}"] for leaf in ("weight", "scale"))
    assert (codes.dtype, tuple(codes.shape)) == (torch.int8, (128 * 128 // 2,))
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (128,))
    kept = {rest_name(name): tensor for name, tensor in rest(Experts(layers=2)).items()}
    assert {"embed_tokens.weight", "norm.weight", "lm_head.weight", "blk.0.mlp.gate.weight"} < kept.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in kept.items())
    assert len(stored) == len(kept) + 2 * 2 * 3 * 2 * 2
    index = json.loads(out["model.safetensors.index.json"])
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in stored.values())
    assert {name: len(data) for name, data in out.items() if name != "mso_hub.json"} == plan.sizes(
        {name: len(data) for name, data in files.items()}
    )


def test_headers_and_config_say_method_nodes_and_source() -> None:
    """The source's digest comes from its headers: the same wherever it lies, another for another checkpoint."""
    first, again = (converted(moe_files(EXPERTS), KtRecipe(threadpool_count=2))[1] for _ in range(2))
    assert first == again
    raw = first["model-00001-of-00002.safetensors"]
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    said = json.loads(first["config.json"])["ktransformers"]
    assert (metadata["format"], metadata["kt_method"], metadata["kt_threadpool_count"]) == ("pt", "INT8", "2")
    assert (said["method"], said["threadpool_count"], said["source"]) == ("INT8", 2, metadata["kt_source"])
    other = json.loads(converted(moe_files(Experts(hidden=256)), KtRecipe())[1]["config.json"])["ktransformers"]
    assert other["source"] != said["source"]


def test_experts_alone_and_later_layers_alone() -> None:
    """--experts_only leaves the rest out; --resume-layer keeps the numbers that files have in a whole conversion."""
    files = moe_files(Experts(layers=3))
    whole = converted(files, KtRecipe())[1]
    only = tensors_in(converted(files, KtRecipe(experts_only=True))[1])
    assert only.keys() == {name for name in tensors_in(whole) if "_exps." in name}
    plan, later = converted(files, KtRecipe(resume_layer=2))
    assert sorted(n for n in later if n.endswith("s")) == [f"model-0000{n}-of-00004.safetensors" for n in (3, 4)]
    assert all(later[name] == whole[name] for name in later if name.endswith(".safetensors"))
    assert any("layers below 2" in note for note in plan.notes)
    assert "resume_layer 3 leaves no layer, the last is 2" in refusal(files, resume_layer=3)


def test_what_the_user_is_told() -> None:
    """The number of nodes, always; how coarse INT4 is, with what was measured; a strange activation."""
    plan, _ = converted(moe_files(EXPERTS, hidden_act="gelu"), KtRecipe(scheme="kt-int4", threadpool_count=2))
    notes = "\n".join(plan.notes)
    for words in ("--kt-threadpool-count 2", "AMXINT4", "25 %", "--group_size 32", "measured on a sample", "'gelu'"):
        assert words in notes
    assert len(converted(moe_files(EXPERTS), KtRecipe())[0].notes) == 1


# --- names ------------------------------------------------------------------------------------------

BANKS = {
    "qwen": ("model.layers.{}.mlp.experts.{}.", ("gate_proj", "up_proj", "down_proj")),
    "vision-language": ("model.language_model.layers.{}.mlp.experts.{}.", ("gate_proj", "up_proj", "down_proj")),
    "kimi": ("language_model.model.layers.{}.mlp.experts.{}.", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("model.layers.{}.block_sparse_moe.experts.{}.", ("w1", "w3", "w2")),
    "deepseek-v4": ("layers.{}.ffn.experts.{}.", ("w1", "w3", "w2")),
    "jamba": ("model.layers.{}.feed_forward.experts.{}.", ("gate_proj", "up_proj", "down_proj")),
    "lfm2": ("model.layers.{}.feed_forward.experts.{}.", ("w1", "w3", "w2")),
    "nemotron": ("backbone.layers.{}.mixer.experts.{}.", ("gate_proj", "up_proj", "down_proj")),
}
COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")


@pytest.mark.parametrize("family", BANKS)
def test_experts_of_every_family_get_kt_kernels_names_and_theirs_back(family: str) -> None:
    """The same bytes as Qwen's; decoded again they have the names, and everything else the bytes, of the source."""
    prefix, leaves = BANKS[family]
    top = prefix.partition("layers.")[0]
    matrices = EXPERTS.matrices()
    theirs = dict(zip(("gate", "up", "down"), leaves, strict=True))
    tensors = {prefix.format(layer, e) + theirs[p] + ".weight": w for (layer, e, p), w in matrices.items()}
    others = {
        f"{top}embed_tokens.weight": random_tensor(11, 128),
        f"{top}layers.0.self_attn.q_proj.weight": random_tensor(8, 8),
        f"{top}norm.weight": torch.ones(5), "lm_head.weight": random_tensor(3, 5),
        "vision_tower.blocks.0.weight": random_tensor(2, 2),
    }  # fmt: skip
    out = converted(checkpoint_files({"model.safetensors": tensors | others}, EXPERTS.config()), KtRecipe())[1]
    qwen = converted(moe_files(EXPERTS, matrices), KtRecipe())[1]
    stored, wanted = tensors_in(out), tensors_in(qwen)
    experts = {name for name in wanted if "_exps." in name}
    assert all(torch.equal(stored[name], wanted[name]) for name in experts)
    back = decoded(out)
    assert back.keys() == tensors.keys() | others.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in others.items())


@pytest.mark.parametrize("key", COUNTS)
@pytest.mark.parametrize("nested", [False, True])
def test_the_number_of_experts_is_checked_under_every_name(key: str, nested: bool) -> None:
    """transformers 5 renames num_experts to num_local_experts when it saves, and kt-kernel's converter stops there."""
    config = EXPERTS.config()
    del config["num_experts"]
    tensors = tensors_in(moe_files(EXPERTS))
    for count, right in ((2, True), (3, False)):
        said = {key: count}
        files = checkpoint_files({"m.safetensors": tensors}, config | ({"text_config": said} if nested else said))
        if right:
            assert planned(files).shards
        else:
            assert "experts 0 to 2, found 2, the first that differs is 2" in refusal(files)


def fused(matrices: Mapping[tuple[int, int, str], Tensor], *, turned: bool) -> dict[str, Tensor]:
    """Banks of all experts of a layer: [E, 2I, H] and [E, H, I], or with both matrices turned."""
    count = len(matrices) // 3
    pairs = torch.stack([torch.cat([matrices[0, e, "gate"], matrices[0, e, "up"]]) for e in range(count)])
    downs = torch.stack([matrices[0, e, "down"] for e in range(count)])
    prefix = "model.layers.0.mlp.experts"
    if turned:
        pairs, downs = pairs.transpose(1, 2), downs.transpose(1, 2)
    return {f"{prefix}.gate_up_proj": pairs.contiguous(), f"{prefix}.down_proj": downs.contiguous()}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("turned", [False, True])
def test_fused_experts_are_told_apart_by_the_sizes_of_the_config(turned: bool, parts: int) -> None:
    """Either way they give the bytes of separate experts; kt-kernel's converter garbles one of them."""
    experts = Experts(inner=384)
    matrices = experts.matrices()
    files = checkpoint_files({"m.safetensors": fused(matrices, turned=turned) | rest(experts)}, experts.config())
    recipe = KtRecipe(threadpool_count=parts, experts_only=True)
    one, other = (tensors_in(converted(f, recipe)[1]) for f in (files, moe_files(experts, matrices)))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_fused_experts_that_could_be_either_are_refused() -> None:
    experts = Experts(inner=128, hidden=128)
    files = checkpoint_files({"m.safetensors": fused(experts.matrices(), turned=False)}, experts.config())
    assert "does not tell rows from columns" in refusal(files)


@given(st.integers(0, 99), st.integers(0, 999), st.sampled_from(sorted(BANKS)))
@settings(max_examples=30)
def test_places_of_experts(layer: int, expert: int, family: str) -> None:
    prefix, leaves = BANKS[family]
    for projection, leaf in zip(("gate", "up", "down"), leaves, strict=True):
        module = prefix.format(layer, expert) + leaf
        place = expert_place(module)
        assert place == Place(layer, projection, expert)
        names = source_names([prefix.format(0, 0) + name for name in leaves], [])
        assert names.expert(place) == module
        assert template(module) == prefix.format("{layer}", "{expert}") + leaf


@pytest.mark.parametrize(
    "module",
    ["model.layers.0.mlp.shared_experts.gate_proj", "model.layers.0.mlp.gate_proj", "experts.0.gate_proj",
     "model.layers.0.mlp.experts.gate_up_proj", "model.layers.x.mlp.experts.0.w1"],
)  # fmt: skip
def test_what_is_no_routed_expert(module: str) -> None:
    assert expert_place(module) is None
    with pytest.raises(PlanError, match="not a routed expert"):
        template(module)


def test_names_that_cannot_be_had_back_are_refused() -> None:
    """Two experts with different names, or two tensors that would have one."""
    with pytest.raises(PlanError, match="counts the experts of a layer once"):
        source_names(["layers.0.mlp.experts.0.w1", "layers.0.moe.experts.1.w1"], [])
    with pytest.raises(PlanError, match="--experts_only"):
        source_names([], ["model.norm.weight", "norm.bias"])


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "inner", "hidden", "fits"),
    [("kt-int4", 768, 2048, [1, 2, 3, 6]), ("kt-int8", 768, 2048, [1, 2, 3, 4, 6, 12]), ("kt-int4", 128, 128, [1])],
)
def test_numbers_of_nodes_that_do_not_fit_are_refused_with_those_that_do(
    scheme: str, inner: int, hidden: int, fits: list[int]
) -> None:
    """768 is Qwen3-30B-A3B: kt-kernel dies in its first layer when it is cut for 8."""
    bits = 4 if scheme == "kt-int4" else 8
    assert fitting(inner, hidden, bits) == fits
    experts = Experts(inner=inner, hidden=hidden, count=1)
    for count in range(1, 14):
        if count in fits:
            assert planned(moe_files(experts), scheme=scheme, threadpool_count=count).shards
        else:
            said = refusal(moe_files(experts), scheme=scheme, threadpool_count=count)
            assert f"--threadpool-count may be {', '.join(map(str, fits))}" in said


def test_sizes_that_no_kernel_holds_name_what_does() -> None:
    """Only INT8 holds 192; nothing of kt-kernel's own holds 100."""
    assert "use --format kt-int8" in refusal(moe_files(Experts(inner=192)), scheme="kt-int4")
    said = refusal(moe_files(Experts(inner=100)), scheme="kt-int8")
    assert "both sizes must be multiples of 64" in said
    assert "--format w4a16 --group_size 32" in said


def changed(**tensors: Tensor | None) -> dict[str, bytes]:
    """The model with some expert tensors replaced, or gone; keys are `expert_projection`."""
    found = tensors_in(moe_files(EXPERTS))
    for key, tensor in tensors.items():
        expert, projection = key.removeprefix("e").split("_")
        name = f"model.layers.0.mlp.experts.{expert}.{projection}_proj.weight"
        del found[name]
        if tensor is not None:
            found[name] = tensor
    return checkpoint_files({"model.safetensors": found}, EXPERTS.config())


def test_experts_that_are_not_whole_are_refused() -> None:
    assert "needs up projections of the experts 0 to 1, found 1" in refusal(changed(e1_up=None))
    assert "do not fit together" in refusal(changed(e1_up=random_tensor(128, 128)))
    assert "do not fit together" in refusal(changed(e1_down=random_tensor(256, 128)))
    integers = torch.zeros(256, 128, dtype=torch.int32)
    assert "can only quantize BF16, F16, F32, got I32" in refusal(changed(e0_gate=integers))


def test_what_has_no_experts_is_refused() -> None:
    """With the names that are known."""
    files = checkpoint_files({"m.safetensors": rest(EXPERTS)}, EXPERTS.config())
    assert "there are no routed experts" in refusal(files)


def test_biases_of_experts_are_refused() -> None:
    """kt-kernel has no place for them: the model would answer without."""
    tensors = tensors_in(moe_files(EXPERTS))
    tensors["model.layers.0.mlp.experts.0.gate_proj.bias"] = torch.zeros(256)
    files = checkpoint_files({"m.safetensors": tensors}, EXPERTS.config())
    assert "experts.0.gate_proj.bias: kt-kernel has no biases" in refusal(files)


@pytest.mark.parametrize(("said", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_input_type_is_checked(said: str, dtype: torch.dtype) -> None:
    """--input-type of the historic converter: a wrong one is refused, not believed."""
    files = moe_files(EXPERTS, EXPERTS.matrices(dtype=dtype))
    assert planned(files, input_type=said).shards
    for other in {"bf16", "fp16", "fp8"} - {said}:
        assert f"--input-type says {other}, stored is" in refusal(files, input_type=other)
    packed = converted(moe_files(EXPERTS), Recipe(scheme="fp8_block", layout="deepseek"))[1]
    assert planned(packed, input_type="fp8").shards


def test_mtp_experts_are_left_out_and_said_so() -> None:
    """Layers beyond num_hidden_layers: kt-kernel does not run them; their other tensors stay."""
    files = moe_files(Experts(layers=2), num_hidden_layers=1)
    plan, out = converted(files, KtRecipe())
    stored = tensors_in(out)
    assert not any(name.startswith("blk.1.ffn") or ".experts." in name for name in stored)
    assert "blk.1.self_attn.q_proj.weight" in stored
    assert any("6 experts of layers for multi-token prediction" in note for note in plan.notes)


@pytest.mark.parametrize(
    "settings",
    [{"scheme": "nvfp4"}, {"layout": "modelopt"}, {"threadpool_count": 0}, {"resume_layer": -1},
     {"input_type": "int4"}, {"ignore": ("a",)}, {"group_size": 32}, {"text_only": True}, {"mode": "all-linear"}],
    ids=str,
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        KtRecipe(**settings)


def test_an_ordinary_recipe_says_which_one_to_take() -> None:
    with pytest.raises(RecipeError, match="take a KtRecipe"):
        Recipe(scheme="kt-int8")
