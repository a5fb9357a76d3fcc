"""Experts that a checkpoint stores as one 3-D tensor, seen as the 2-D weights that quantized loaders expect.

`experts.gate_up_proj` [E, 2I, H] (or turned, [E, H, 2I]) and `experts.down_proj` [E, H, I] (or [E, I, H]) become
`experts.{e}.gate_proj`, `.up_proj` and `.down_proj`. vLLM loads quantized experts by these names. Which axis is
which follows from the sizes in config.json; sizes that leave it open are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mso_hub.checkpoint import DTYPE_BITS, TensorInfo
from mso_hub.errors import PlanError
from mso_hub.formats.weight import Transposed, Weight

FUSED_EXPERTS = re.compile(r"^(?P<bank>.*\bexperts)\.(?P<leaf>gate_up_proj|down_proj)(\.weight)?$")
WIDTHS = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")


def is_fused_experts(weight: Weight) -> bool:
    """Is this a bank of experts in one tensor?"""
    return len(weight.shape) == 3 and FUSED_EXPERTS.match(weight.name) is not None


def _sizes(config: Mapping[str, Any]) -> tuple[int, int]:
    """(hidden size, expert width) of the text model."""
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, dict) else {}):
        width = next((part[key] for key in WIDTHS if isinstance(part.get(key), int)), None)
        if isinstance(part.get("hidden_size"), int) and width is not None:
            return part["hidden_size"], width
    raise PlanError(
        "config.json must give hidden_size and moe_intermediate_size to split fused experts, found neither; "
        "add the experts to `ignore`"
    )


def _is_turned(weight: Weight, leaf: str, config: Mapping[str, Any]) -> bool:
    """Is the input dimension the middle one ([E, in, out])?"""
    hidden, width = _sizes(config)
    straight = (2 * width, hidden) if leaf == "gate_up_proj" else (hidden, width)
    shape = weight.shape[1:]
    if straight[0] == straight[1] or shape not in (straight, straight[::-1]):
        reason = "does not tell rows from columns" if straight[0] == straight[1] else "fits neither order"
        raise PlanError(
            f"{weight.name}: shape {list(weight.shape)} {reason} for hidden_size {hidden} and expert width {width}; "
            "add it to `ignore`"
        )
    return shape != straight


def split_experts(weight: Weight, config: Mapping[str, Any], names: Mapping[str, object]) -> Iterator[Weight]:
    """One fused bank -> its experts' weights, as views of the stored bytes.

    names  every stored tensor name: a bias beside the bank means gpt-oss, which interleaves gate and up rows
    """
    match = FUSED_EXPERTS.match(weight.name)
    if match is None:
        raise PlanError(f"{weight.name}: not a bank of fused experts, shape {list(weight.shape)}")
    if weight.decoder is not None:
        raise PlanError(
            f"{weight.name}: experts packed in one tensor ({weight.decoder.name}) can be decoded, not quantized; add "
            "the experts to `ignore`, which makes them dense, or decompress the checkpoint"
        )
    bank, leaf = match["bank"], match["leaf"]
    if f"{bank}.{leaf}_bias" in names or f"{bank}.{leaf}.bias" in names:
        raise PlanError(
            f"{weight.name}: experts with a bias interleave gate and up (gpt-oss); they cannot be split; "
            "add the experts to `ignore`"
        )
    turned = _is_turned(weight, leaf, config)
    home = weight.parts["weight"]
    experts, middle, last = weight.shape
    slab_bytes = middle * last * DTYPE_BITS[home.dtype] // 8
    rows, columns = (last, middle) if turned else (middle, last)
    parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
    height = rows // len(parts)
    for expert in range(experts):
        begin = home.begin + expert * slab_bytes
        for at, part in enumerate(parts):
            name = f"{bank}.{expert}.{part}.weight"
            first = at * height
            if turned:
                view = TensorInfo(weight.name, home.dtype, (middle, last), home.file, begin)
                decoder = Transposed(first, first + height, home.dtype)
                yield Weight(name, home.dtype, (height, columns), {"weight": view}, decoder)
            else:
                offset = begin + first * columns * DTYPE_BITS[home.dtype] // 8
                view = TensorInfo(weight.name, home.dtype, (height, columns), home.file, offset)
                yield Weight(name, home.dtype, (height, columns), {"weight": view})
