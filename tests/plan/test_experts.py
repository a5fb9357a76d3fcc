"""Fused experts become one weight per expert, as quantized loaders name them: the same numbers, or a refusal."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mso_hub.checkpoint import TensorInfo
from mso_hub.errors import PlanError
from mso_hub.formats.weight import Weight
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from mso_hub.plan.experts import is_fused_experts, split_experts
from mso_hub.sink import MemorySink
from mso_hub.source import MemorySource
from tests.helpers import checkpoint_files, random_tensor, tensors_in

BANK = "model.layers.0.mlp.experts"
HIDDEN, WIDTH, EXPERTS = 32, 48, 3
CONFIG: dict[str, Any] = {"hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "num_hidden_layers": 1}


def separate(
    experts: int = EXPERTS, hidden: int = HIDDEN, width: int = WIDTH, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """The experts as tensors of their own, each with another magnitude so that no two share a global scale."""
    shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    return {
        f"{BANK}.{e}.{leaf}.weight": random_tensor(*shape, seed=10 * e + at, spread=0.02 * (e + at + 1), dtype=dtype)
        for e in range(experts)
        for at, (leaf, shape) in enumerate(shapes.items())
    }


def fused(experts: Mapping[str, Tensor], *, turned: bool = False, suffix: str = "") -> dict[str, Tensor]:
    """The same numbers as gate_up_proj [E, 2I, H] and down_proj [E, H, I]; turned: [E, H, 2I] and [E, I, H]."""
    count = len(experts) // 3

    def bank(*leaves: str) -> Tensor:
        stacked = [torch.cat([experts[f"{BANK}.{e}.{leaf}.weight"] for leaf in leaves]) for e in range(count)]
        return torch.stack([w.T if turned else w for w in stacked])

    return {
        f"{BANK}.gate_up_proj{suffix}": bank("gate_proj", "up_proj"),
        f"{BANK}.down_proj{suffix}": bank("down_proj"),
    }


def converted(tensors: Mapping[str, Tensor], config: Mapping[str, Any] = CONFIG, **recipe: Any) -> dict[str, Tensor]:
    """The tensors of an output in memory."""
    sink = MemorySink()
    convert(MemorySource(checkpoint_files({"model.safetensors": tensors}, config)), sink, Recipe(**recipe))
    return tensors_in(sink.files)


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Are two checkpoints equal bit by bit?"""
    return first.keys() == second.keys() and all(
        first[n].dtype == second[n].dtype
        and first[n].shape == second[n].shape
        and torch.equal(first[n].view(-1).view(torch.uint8), second[n].view(-1).view(torch.uint8))
        for n in first
    )


@pytest.mark.parametrize("suffix", ["", ".weight"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_bank_becomes_the_bytes_of_its_experts(turned: bool, suffix: str, dtype: torch.dtype) -> None:
    """Whichever way the bank is stored, the output is that of the same experts stored one by one."""
    experts = separate(dtype=dtype)
    assert same(converted(fused(experts, turned=turned, suffix=suffix)), converted(experts))


@pytest.mark.parametrize("turned", [False, True])
def test_the_numbers_come_back(turned: bool) -> None:
    """There and back, each expert holds about its own numbers: error below that of Gaussian NVFP4, 0.9 %."""
    experts = separate()
    sink = MemorySink()
    convert(MemorySource(checkpoint_files({"m.safetensors": fused(experts, turned=turned)}, CONFIG)), sink, Recipe())
    back = MemorySink()
    convert(MemorySource(sink.files), back, Recipe(scheme="bf16"))
    found = tensors_in(back.files)
    assert found.keys() == experts.keys()
    for name, tensor in experts.items():
        error = (found[name].float() - tensor.float()).square().sum() / tensor.float().square().sum()
        assert error < 0.012, name


def test_gate_and_up_share_a_scale_and_experts_do_not() -> None:
    """The fused unit is one expert's gate and up."""
    found = converted(fused(separate(), turned=True))
    scales = {n: float(t) for n, t in found.items() if n.endswith("weight_global_scale")}
    assert len(scales) == 3 * EXPERTS
    assert len(set(scales.values())) == 2 * EXPERTS
    for expert in range(EXPERTS):
        one, other = (scales[f"{BANK}.{expert}.{leaf}.weight_global_scale"] for leaf in ("gate_proj", "up_proj"))
        assert one == other


@given(
    experts=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)).map(lambda s: (16 * s[0], 16 * s[1])),
    turned=st.booleans(),
)
@settings(deadline=None, max_examples=25)
def test_any_sizes_are_split_right_or_refused(experts: int, sizes: tuple[int, int], turned: bool) -> None:
    """Square expert matrices are refused; all others give the bytes of separate experts."""
    hidden, width = sizes
    config = CONFIG | {"hidden_size": hidden, "moe_intermediate_size": width}
    tensors = separate(experts, hidden, width)
    if hidden in (width, 2 * width):
        with pytest.raises(PlanError, match="does not tell rows from columns"):
            converted(fused(tensors, turned=turned), config)
        return
    assert same(converted(fused(tensors, turned=turned), config), converted(tensors, config))


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_size": HIDDEN, "intermediate_size": WIDTH},
        {"hidden_size": HIDDEN, "intermediate_size": 4 * WIDTH, "moe_intermediate_size": WIDTH},
        {"text_config": {"hidden_size": HIDDEN, "intermediate_size": WIDTH}, "vision_config": {"hidden_size": 8}},
        {"hidden_size": HIDDEN, "expert_ffn_hidden_size": WIDTH},
    ],
)
def test_sizes_are_found_where_families_keep_them(config: dict[str, Any]) -> None:
    """Llama-4 calls the expert's width intermediate_size, nested in text_config; others have a field for it."""
    experts = separate()
    assert same(converted(fused(experts), config), converted(experts, config))


@pytest.mark.parametrize(
    "config", [{"architectures": ["x"]}, {"hidden_size": HIDDEN}, {"moe_intermediate_size": WIDTH}]
)
def test_a_config_without_sizes_is_refused(config: dict[str, Any]) -> None:
    """Guessing rows from columns would give a checkpoint that loads and speaks nonsense."""
    with pytest.raises(
        PlanError, match=r"must give hidden_size and moe_intermediate_size .* add the experts to `ignore`"
    ):
        converted(fused(separate()), config)


def test_sizes_that_fit_neither_order_are_refused() -> None:
    """The error names the tensor, its shape and what was expected."""
    with pytest.raises(PlanError, match=rf"{BANK}\.gate_up_proj: shape \[3, 96, 32\] fits neither order for .* 40;"):
        converted(fused(separate()), CONFIG | {"moe_intermediate_size": 40})


@pytest.mark.parametrize("bias", ["gate_up_proj_bias", "gate_up_proj.bias"])
def test_experts_with_a_bias_are_refused(bias: str) -> None:
    """gpt-oss interleaves the rows of gate and up: splitting in halves would mix them."""
    tensors = fused(separate()) | {f"{BANK}.{bias}": random_tensor(EXPERTS, 2 * WIDTH)}
    with pytest.raises(PlanError, match=r"gate_up_proj: experts with a bias interleave gate and up \(gpt-oss\)"):
        converted(tensors)


@pytest.mark.parametrize("pattern", [BANK, "*.experts", f"{BANK}.*_proj", "re:.*experts"])
def test_an_ignored_bank_is_copied_untouched(pattern: str) -> None:
    """Both its tensors keep names, shapes and bytes; one alone may not stay, because engines load a bank as one."""
    bank = fused(separate())
    other = {"model.layers.0.mlp.shared_expert.down_proj.weight": random_tensor(HIDDEN, WIDTH)}
    found = converted(bank | other, ignore=(pattern,))
    assert same({n: found[n] for n in bank}, bank)
    with pytest.raises(PlanError, match=rf"{BANK}: experts load as one tensor, so all must be stored alike"):
        converted(bank | other, ignore=(f"{BANK}.gate_up_proj",))


def test_a_bank_in_the_wrong_layout_can_be_ignored() -> None:
    """The way out that the error names works: gpt-oss's attention can still be quantized."""
    bank = fused(separate()) | {f"{BANK}.gate_up_proj_bias": random_tensor(EXPERTS, 2 * WIDTH)}
    other = {"model.layers.0.self_attn.o_proj.weight": random_tensor(HIDDEN, HIDDEN)}
    found = converted(bank | other, mode="all-linear", ignore=(BANK,))
    assert same({n: found[n] for n in bank}, bank)
    assert "model.layers.0.self_attn.o_proj.weight_packed" in found


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        (f"{BANK}.gate_up_proj", (2, 4, 6), True),
        (f"{BANK}.down_proj.weight", (2, 4, 6), True),
        ("language_model.model.layers.0.feed_forward.experts.down_proj", (2, 4, 6), True),
        (f"{BANK}.gate_up_proj", (4, 6), False),
        (f"{BANK}.gate_up_proj_bias", (2, 4, 6), False),
        (f"{BANK}.0.down_proj.weight", (2, 4, 6), False),
        ("model.layers.0.mlp.myexperts_x.gate_up_proj", (2, 4, 6), False),
        ("model.layers.0.mlp.gate_up_proj.weight", (2, 4, 6), False),
    ],
)
def test_what_a_bank_is(name: str, shape: tuple[int, ...], expected: bool) -> None:
    """Three sizes and the name of a bank; anything else is left to the other rules."""
    assert is_fused_experts(Weight(name, "BF16", shape, {"weight": TensorInfo(name, "BF16", shape)})) is expected


def test_views_lie_inside_the_bank() -> None:
    """Each expert is a byte range of the stored tensor; together they cover it once."""
    info = TensorInfo(f"{BANK}.gate_up_proj", "BF16", (EXPERTS, 2 * WIDTH, HIDDEN), "model.safetensors", 1000)
    parts = list(split_experts(Weight(info.name, "BF16", info.shape, {"weight": info}), CONFIG, {}))
    ranges = sorted((w.parts["weight"].begin, w.parts["weight"].end) for w in parts)
    assert ranges[0][0] == info.begin
    assert ranges[-1][1] == info.end
    assert all(end == begin for (_, end), (begin, _) in pairwise(ranges))
    assert {w.parts["weight"].file for w in parts} == {"model.safetensors"}
