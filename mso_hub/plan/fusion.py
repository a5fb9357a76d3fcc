"""Who shares a scale: the tensors that an inference engine fuses into one parameter.

vLLM loads q_proj, k_proj and v_proj as one `qkv_proj`, gate_proj and up_proj as one `gate_up_proj`, w1 and w3 of
an expert as one `w13`, and keeps a single global scale for each; members with different scales are served wrong
after one warning. So every member of such a unit gets the largest amax of all. The rule goes by the last name
component under the same parent, at any depth: members may be missing (KV sharing, MLA without q_lora) or lie in
different shards.
"""

from __future__ import annotations

from collections.abc import Iterable

FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "fused_wqkv_a": ("wq_a", "wkv_a_with_mqa"),
    "wqkv": ("wq", "wk", "wv"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
"""Engine's name of the fused module -> last components of its members."""

KIMI_LINEAR = ("q_proj", "k_proj", "v_proj", "g_a_proj", "f_a_proj", "b_proj")
"""Inputs of a Kimi delta attention layer, one projection `in_proj_qkvgfab` in engines that fuse them."""

_ALIAS_OF = {member: alias for alias, members in FUSED.items() for member in members}
_PLACE = {member: at for members in (KIMI_LINEAR, *FUSED.values()) for at, member in enumerate(members)}


def unit_of(module: str) -> str | None:
    """Key of the unit that a module belongs to, or None: `model.layers.0.mlp.up_proj` -> `...mlp.gate_up_proj`.

    The key is the path of the fused module as vLLM names it, so that it serves in ignore lists too.
    """
    parent, _, leaf = module.rpartition(".")
    alias = _ALIAS_OF.get(leaf)
    return None if alias is None else f"{parent}.{alias}" if parent else alias


def place_in_unit(module: str) -> int:
    """Where engines put a module's rows among those of its unit, whatever the order in the checkpoint."""
    return _PLACE.get(module.rpartition(".")[2], 0)


def units(modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Unit key -> its modules in the order given; only units with two members or more.

    A Kimi delta attention layer (one with `f_a_proj` beside its q, k and v) is one larger unit.
    """
    modules = list(modules)
    linear_attention = {m.rpartition(".")[0] for m in modules if m.endswith(".f_a_proj")}
    found: dict[str, list[str]] = {}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        if parent in linear_attention and leaf in KIMI_LINEAR:
            found.setdefault(f"{parent}.in_proj_qkvgfab", []).append(module)
        elif (key := unit_of(module)) is not None:
            found.setdefault(key, []).append(module)
    return {key: tuple(members) for key, members in found.items() if len(members) > 1}
