"""Who shares a global scale, by architecture family, with the names that published checkpoints have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mso_hub.plan.fusion import FUSED, KIMI_LINEAR, unit_of, units

L = "model.layers.3"
FAMILIES: dict[str, tuple[str, str, dict[str, str]]] = {
    "Llama, Qwen, Mistral, Gemma": (
        f"{L}.self_attn",
        "q_proj k_proj v_proj o_proj",
        {"qkv_proj": "q_proj k_proj v_proj"},
    ),
    "dense MLP": (f"{L}.mlp", "gate_proj up_proj down_proj", {"gate_up_proj": "gate_proj up_proj"}),
    "Mixtral, MiniMax": (f"{L}.block_sparse_moe.experts.7", "w1 w2 w3", {"w13": "w1 w3"}),
    "DeepSeek-V4 ffn": (f"{L}.ffn.experts.0", "w1 w2 w3", {"w13": "w1 w3"}),
    "Qwen-MoE, DeepSeek, Kimi, GLM": (
        f"{L}.mlp.experts.127",
        "gate_proj down_proj up_proj",
        {"gate_up_proj": "gate_proj up_proj"},
    ),
    "shared experts": (
        f"{L}.mlp.shared_experts",
        "gate_proj up_proj down_proj",
        {"gate_up_proj": "gate_proj up_proj"},
    ),
    "Qwen2-MoE shared expert": (
        f"{L}.mlp.shared_expert",
        "gate_proj up_proj down_proj",
        {"gate_up_proj": "gate_proj up_proj"},
    ),
    "Llama-4": (f"{L}.feed_forward", "gate_proj up_proj down_proj", {"gate_up_proj": "gate_proj up_proj"}),
    "Llama-4 shared expert": (
        f"{L}.feed_forward.shared_expert",
        "gate_proj up_proj down_proj",
        {"gate_up_proj": "gate_proj up_proj"},
    ),
    "MLA": (
        f"{L}.self_attn",
        "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj",
        {"fused_qkv_a_proj": "q_a_proj kv_a_proj_with_mqa"},
    ),
    "MLA without q_lora": (f"{L}.self_attn", "q_proj kv_a_proj_with_mqa kv_b_proj o_proj", {}),
    "Qwen3-Next": (f"{L}.linear_attn", "in_proj_qkvz in_proj_ba out_proj", {}),
    "Qwen3.5": (
        f"{L}.linear_attn",
        "in_proj_qkv in_proj_z in_proj_b in_proj_a out_proj",
        {"in_proj_qkvz": "in_proj_qkv in_proj_z", "in_proj_ba": "in_proj_b in_proj_a"},
    ),
    "Kimi-Linear KDA": (
        f"{L}.self_attn",
        "q_proj k_proj v_proj f_a_proj f_b_proj b_proj g_a_proj g_b_proj o_proj",
        {"in_proj_qkvgfab": "q_proj k_proj v_proj f_a_proj b_proj g_a_proj"},
    ),
    "shared keys and values": (f"{L}.self_attn", "q_proj o_proj", {}),
    "keys without values": (f"{L}.self_attn", "q_proj k_proj o_proj", {"qkv_proj": "q_proj k_proj"}),
    "expert without gate": (f"{L}.mlp.experts.0", "up_proj down_proj", {}),
    "fused on disk": (f"{L}.mlp", "gate_up_proj down_proj", {}),
    "Mistral's own names": (
        "layers.3.attention",
        "wq wk wv wo",
        {"wqkv": "wq wk wv"},
    ),
    "MLA in DeepSeek's own names": (
        "layers.3.attn",
        "wq_a wkv_a_with_mqa wq_b wo",
        {"fused_wqkv_a": "wq_a wkv_a_with_mqa"},
    ),
}
PREFIXES = ("", "language_model.", "model.language_model.", "thinker.model.")


def named(parent: str, leaves: str) -> tuple[str, ...]:
    """`parent` before each of the words."""
    return tuple(f"{parent}.{leaf}" for leaf in leaves.split())


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("family", FAMILIES)
def test_units_of_a_family(family: str, prefix: str) -> None:
    """Exactly the expected units, their members in stored order, under any prefix."""
    parent, leaves, expected = FAMILIES[family]
    parent = prefix + parent
    assert units(named(parent, leaves)) == {
        f"{parent}.{alias}": named(parent, members) for alias, members in expected.items()
    }


def test_layers_and_experts_never_share() -> None:
    """Members have one parent: a layer, an expert or a shared expert each has its own unit."""
    parents = [f"{L}.mlp.experts.0", f"{L}.mlp.experts.1", f"{L}.mlp.shared_experts", "model.layers.4.mlp"]
    modules = [name for parent in parents for name in named(parent, "up_proj gate_proj")]
    assert units(modules) == {f"{parent}.gate_up_proj": named(parent, "up_proj gate_proj") for parent in parents}


def test_a_kda_layer_leaves_its_neighbours_alone() -> None:
    """In a hybrid model only the layers that have `f_a_proj` are one large unit."""
    kda, mla = named("model.layers.0.self_attn", "q_proj k_proj f_a_proj"), named(f"{L}.self_attn", "q_proj k_proj")
    assert units([*kda, *mla]) == {
        "model.layers.0.self_attn.in_proj_qkvgfab": kda,
        f"{L}.self_attn.qkv_proj": mla,
    }


def test_names_without_a_parent_work() -> None:
    """A bare layer is its own name space."""
    assert units(["up_proj", "gate_proj"]) == {"gate_up_proj": ("up_proj", "gate_proj")}
    assert unit_of("up_proj") == "gate_up_proj"
    assert unit_of("o_proj") is None


@pytest.mark.parametrize(
    "module", ["x.my_q_proj", "x.q_proj.weight", "x.q_proj.lora_A", "x.up_projector", "x.w12", "x.gate", "q_proj.x"]
)
def test_only_the_last_component_decides(module: str) -> None:
    """Names that merely contain a member's name belong to no unit."""
    assert unit_of(module) is None


leaves = st.sampled_from(sorted({m for members in FUSED.values() for m in members} | {*KIMI_LINEAR, "o_proj"}))
modules = st.lists(
    st.builds("{}.{}".format, st.sampled_from(["a", "a.b", "layers.1", "layers.11"]), leaves), unique=True, max_size=20
)


@given(names=modules)
def test_units_are_disjoint_and_have_one_parent(names: list[str]) -> None:
    """Whatever the names: no module is in two units, none has fewer than two members, all share a parent."""
    found = units(names)
    members = [m for unit in found.values() for m in unit]
    assert len(members) == len(set(members))
    assert set(members) <= set(names)
    for key, unit in found.items():
        assert len(unit) > 1
        assert {m.rpartition(".")[0] for m in unit} == {key.rpartition(".")[0]}


@given(names=modules, data=st.data())
def test_the_order_of_names_does_not_decide(names: list[str], data: st.DataObject) -> None:
    """Shards may hold tensors in any order."""
    shuffled = data.draw(st.permutations(names))
    assert {k: set(v) for k, v in units(shuffled).items()} == {k: set(v) for k, v in units(names).items()}
