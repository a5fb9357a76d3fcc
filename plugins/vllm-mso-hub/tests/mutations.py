"""Thirty-eight ways of leaving a checkpoint as it is or of breaking it, each with the tensors that a report must name.

A mutation is a function of an opened copy. It changes the tensors or the JSON files and returns a `Change`; None where
the checkpoint has nothing to change that way (a mismatch of global scales needs global scales).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from changes import LAYER, Change, Copy

NEXT = "model.layers.1"
ATTENTION = f"{LAYER}.self_attn"
K, OUT = f"{ATTENTION}.k_proj", f"{ATTENTION}.o_proj"


Mutation = Callable[[Copy], Change | None]


def none(copy: Copy) -> Change | None:
    """The control."""
    return Change(harmless="nothing was changed")


# --- scales of a wrong shape ----------------------------------------------------------------------


def _matrix(copy: Copy, leaf: str, new: Callable[[Tensor], Tensor]) -> Change | None:
    """Another scale of an MLP's projection, where it is a matrix."""
    name = copy.scale(f"{copy.mlp}.{leaf}")
    return copy.change(name, new) if copy.tensors[name].dim() == 2 else None


def _more(scale: Tensor, axis: int) -> Tensor:
    """The first row or column once more at the end; through bytes, which torch can join in every dtype."""
    raw = scale.view(torch.uint8) if scale.element_size() == 1 else scale
    return torch.cat([raw, raw.narrow(axis, 0, 1)], axis).view(scale.dtype)


def down_scale_double_rows(copy: Copy) -> Change | None:
    """Twice the rows."""
    return _matrix(copy, "down_proj", lambda s: s.repeat_interleave(2, 0) if s.element_size() > 1 else (
        s.view(torch.uint8).repeat(2, 1).view(s.dtype)))  # fmt: skip


def down_scale_extra_col(copy: Copy) -> Change | None:
    """A column too many, on the dimension that ranks cut."""
    return _matrix(copy, "down_proj", lambda scale: _more(scale, 1))


def down_scale_missing_col(copy: Copy) -> Change | None:
    """A column too few."""
    return _matrix(copy, "down_proj", lambda scale: scale[:, :-1])


def gate_scale_extra_col(copy: Copy) -> Change | None:
    """A column too many, on the dimension that no rank cuts."""
    return _matrix(copy, "gate_proj", lambda scale: _more(scale, 1))


def gate_scale_extra_row(copy: Copy) -> Change | None:
    """A row too many, on the dimension that ranks cut."""
    return _matrix(copy, "gate_proj", lambda scale: _more(scale, 0))


def gate_scale_missing_row(copy: Copy) -> Change | None:
    """A row too few."""
    return _matrix(copy, "gate_proj", lambda scale: scale[:-1])


def scale_swizzled_1d(copy: Copy) -> Change | None:
    """Flat, as kernels have it after loading."""
    return _matrix(copy, "gate_proj", lambda scale: scale.flatten())


def scale_transposed(copy: Copy) -> Change | None:
    """Rows and columns exchanged."""
    return _matrix(copy, "gate_proj", lambda scale: scale.T)


# --- codes of a wrong shape or dtype --------------------------------------------------------------


def down_weight_cols_cut(copy: Copy) -> Change | None:
    """Half of the columns of the codes."""
    return copy.change(copy.codes(f"{copy.mlp}.down_proj"), lambda codes: codes[:, : codes.shape[1] // 2])


def weight_rows_cut(copy: Copy) -> Change | None:
    """Half of the rows of the codes."""
    return copy.change(copy.codes(f"{copy.mlp}.gate_proj"), lambda codes: codes[: len(codes) // 2])


def weight_as_int8(copy: Copy) -> Change | None:
    """The same bytes under another dtype."""
    return copy.change(copy.codes(f"{copy.mlp}.gate_proj"), lambda codes: codes.view(torch.int8))


# --- scales of a wrong dtype or value -------------------------------------------------------------


def scale_as_f32(copy: Copy) -> Change | None:
    """The same scales in F32."""
    name = copy.scale(f"{copy.mlp}.down_proj")
    before = copy.tensors[name].dtype
    if before == torch.float32:
        return None
    changed = copy.change(name, lambda scale: scale.float())
    return Change(harmless="an F32 scale holds every BF16 number") if before == torch.bfloat16 else changed


def scale_as_uint8(copy: Copy) -> Change | None:
    """E4M3 bytes called U8; other dtypes rounded to integers."""
    name = copy.scale(f"{copy.mlp}.down_proj")
    if copy.tensors[name].dtype == torch.uint8:
        return None
    return copy.change(name, lambda s: s.view(torch.uint8) if s.element_size() == 1 else s.to(torch.uint8))


def scale_nan(copy: Copy) -> Change | None:
    """One scale is NaN."""

    def new(scale: Tensor) -> Tensor:
        flat = scale.clone().reshape(-1)
        if scale.element_size() == 1:
            flat.view(torch.uint8)[-1] = 0xFF if scale.dtype == torch.uint8 else 0x7F
        else:
            flat[-1] = float("nan")
        return flat.reshape(scale.shape)

    return copy.change(copy.scale(f"{copy.mlp}.down_proj"), new)


def _global(copy: Copy, module: str, new: Callable[[Tensor], Tensor]) -> Change | None:
    name = copy.unique(module)
    return copy.change(name, new) if name else None


def gs_fp16(copy: Copy) -> Change | None:
    """A global scale in F16, which has no room for 1e-5."""
    return _global(copy, f"{copy.mlp}.down_proj", lambda scale: scale.half())


def gs_shape_1(copy: Copy) -> Change | None:
    """A global scale as [1], where it was []."""
    name = copy.unique(f"{copy.mlp}.down_proj")
    if not name or copy.tensors[name].shape == (1,):
        return None
    copy.change(name, lambda scale: scale.reshape(1))
    return Change(harmless="loaders take one number as [] or as [1]")


def gs_shape_2(copy: Copy) -> Change | None:
    """A global scale for two."""
    return _global(copy, f"{copy.mlp}.down_proj", lambda scale: scale.reshape(1).repeat(2))


def gs_zero(copy: Copy) -> Change | None:
    """A global scale of zero."""
    return _global(copy, f"{copy.mlp}.down_proj", torch.zeros_like)


def gate_up_gs_mismatch(copy: Copy) -> Change | None:
    """Gate and up with global scales of their own."""
    return _global(copy, f"{copy.mlp}.up_proj", lambda scale: scale * 2)


def qkv_gs_mismatch(copy: Copy) -> Change | None:
    """K with a global scale of its own."""
    return _global(copy, K, lambda scale: scale * 2)


def input_scale_mismatch(copy: Copy) -> Change | None:
    """Gate and up, which have the same input, with activation scales of their own."""
    name = copy.input(f"{copy.mlp}.up_proj")
    if not name:
        return None
    changed = copy.change(name, lambda scale: scale * 4)
    if copy.unique(f"{copy.mlp}.up_proj"):
        return changed
    return Change(harmless="vLLM takes the larger scale of FP8, whose numbers keep their precision under it")


# --- tensors that are missing ---------------------------------------------------------------------


def missing_all_input_scales(copy: Copy) -> Change | None:
    """No activation scale at all, and they are announced."""
    names = [name for name in copy.tensors if name.endswith((".input_scale", ".input_global_scale"))]
    return copy.remove(*names) if names else None


def missing_input_scale(copy: Copy) -> Change | None:
    """One activation scale."""
    name = copy.input(f"{copy.mlp}.down_proj")
    return copy.remove(name) if name else None


def missing_gs(copy: Copy) -> Change | None:
    """One global scale."""
    name = copy.unique(f"{copy.mlp}.down_proj")
    return copy.remove(name) if name else None


def missing_k_scale(copy: Copy) -> Change | None:
    """The scales of one member of a fused layer."""
    return copy.remove(copy.scale(K))


def missing_scale(copy: Copy) -> Change | None:
    """The scales of a layer that is not fused."""
    return copy.remove(copy.scale(OUT))


def missing_weight(copy: Copy) -> Change | None:
    """The codes, while their scales stay."""
    return copy.remove(copy.codes(OUT))


def missing_norm(copy: Copy) -> Change | None:
    """A norm of the second layer."""
    return copy.remove(f"{NEXT}.post_attention_layernorm.weight")


def missing_layer(copy: Copy) -> Change | None:
    """The whole second layer."""
    copy.remove(*[name for name in copy.tensors if name.startswith(f"{NEXT}.")])
    return Change((NEXT,))


# --- tensors that are too many --------------------------------------------------------------------


def extra_expert(copy: Copy) -> Change | None:
    """An expert more than config.json says."""
    if copy.mlp == f"{LAYER}.mlp":
        return None
    bank, count = f"{LAYER}.mlp.experts", copy.config["num_experts"]
    found = {name: tensor for name, tensor in copy.tensors.items() if name.startswith(f"{bank}.0.")}
    added = {name.replace(f"{bank}.0.", f"{bank}.{count}."): tensor.clone() for name, tensor in found.items()}
    copy.tensors |= added
    return Change((f"{bank}.{count}",))


def extra_layer(copy: Copy) -> Change | None:
    """A layer more than config.json says."""
    name = f"model.layers.{copy.config['num_hidden_layers']}"
    found = {name: tensor for name, tensor in copy.tensors.items() if name.startswith(f"{LAYER}.")}
    copy.tensors |= {key.replace(LAYER, name): tensor.clone() for key, tensor in found.items()}
    return Change((name,))


def extra_module(copy: Copy) -> Change | None:
    """A linear layer that the model does not have."""
    name = f"{ATTENTION}.extra_proj.weight"
    copy.tensors[name] = torch.zeros(copy.config["hidden_size"], copy.config["hidden_size"], dtype=torch.bfloat16)
    return Change((name,))


def extra_suffix(copy: Copy) -> Change | None:
    """A smoothing scale beside a layer of a format that has none."""
    name = f"{copy.mlp}.down_proj.pre_quant_scale"
    rows = copy.tensors[copy.codes(f"{copy.mlp}.gate_proj")].shape[0]
    copy.tensors[name] = torch.ones(rows, dtype=torch.bfloat16)
    return Change((name,))


# --- the config and the tensors say different things ----------------------------------------------


def fused_shard_ignore(copy: Copy) -> Change | None:
    """One member of a fused layer in the ignore list."""
    copy.ignore(K)
    return Change((K,))


def ignored_but_quantized(copy: Copy) -> Change | None:
    """A packed layer in the ignore list."""
    copy.ignore(OUT)
    return Change((OUT,))


def not_quantized_layer(copy: Copy) -> Change | None:
    """A dense layer that the ignore list lacks."""
    rows = copy.config["hidden_size"]
    columns = copy.config["num_attention_heads"] * copy.config["head_dim"]
    copy.remove(*[name for name in copy.tensors if name.startswith(f"{OUT}.")])
    copy.tensors[f"{OUT}.weight"] = torch.full((rows, columns), 0.01, dtype=torch.bfloat16)
    return Change((OUT,))


def wrong_group_size(copy: Copy) -> Change | None:
    """Groups of twice the size, where the config says one."""
    groups = copy.said.get("config_groups", {}).values()
    found = [args for group in groups for args in (group["weights"], group.get("input_activations")) if args]
    sized = [args for args in found if args.get("group_size")]
    for args in sized:
        args["group_size"] *= 2
    packed = {name.rpartition(".")[0] for name in copy.tensors if name.endswith(".weight_scale")}
    return Change(tuple(sorted(packed))) if sized else None


MUTATIONS: dict[str, Mutation] = {
    mutation.__name__: mutation
    for mutation in (
        down_scale_double_rows, down_scale_extra_col, down_scale_missing_col, down_weight_cols_cut, extra_expert,
        extra_layer, extra_module, extra_suffix, fused_shard_ignore, gate_scale_extra_col, gate_scale_extra_row,
        gate_scale_missing_row, gate_up_gs_mismatch, gs_fp16, gs_shape_1, gs_shape_2, gs_zero, ignored_but_quantized,
        input_scale_mismatch, missing_all_input_scales, missing_gs, missing_input_scale, missing_k_scale,
        missing_layer, missing_norm, missing_scale, missing_weight, none, not_quantized_layer, qkv_gs_mismatch,
        scale_as_f32, scale_as_uint8, scale_nan, scale_swizzled_1d, scale_transposed, weight_as_int8, weight_rows_cut,
        wrong_group_size,
    )
}  # fmt: skip
