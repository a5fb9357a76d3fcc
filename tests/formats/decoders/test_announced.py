"""What configs of many hands say of a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from mso_hub.formats.decoders.announced import announced

FLOAT8: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": "128x64"}


def groups(*pairs: tuple[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A compressed-tensors config of target and weights."""
    entries = {f"group_{at}": {"targets": [target], "weights": dict(w)} for at, (target, w) in enumerate(pairs)}
    return {"quant_method": "compressed-tensors", "config_groups": entries}


@pytest.mark.parametrize(
    ("config", "schemes"),
    [
        (groups(("Linear", {"num_bits": 4, "type": "float", "group_size": 16})), {"nvfp4"}),
        (groups(("Linear", {"num_bits": 4, "type": "float", "group_size": 32})), {"mxfp4"}),
        (groups(("Linear", {"num_bits": 8, "type": "float", "scale_dtype": "torch.uint8"})), {"mxfp8"}),
        (groups(("Linear", {"num_bits": 3, "type": "int", "group_size": 128})), {"int3"}),
        (groups(("re:.*other", FLOAT8)), set()),
        (groups(("a.b", {"num_bits": "8", "type": ["float"]})), set()),
        ({"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"}, {"fp8"}),
        ({"quant_method": "modelopt", "quant_algo": None}, set()),
        ({"quant_method": "FP8"}, {"fp8", "mxfp8", "mxfp4"}),
        ({"quant_method": "mxfp4"}, {"mxfp4"}),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, {"int4"}),
        ({"quant_method": "gptq", "bits": [4]}, set()),
        ({"quant_method": "intel/auto-round", "bits": 8, "data_type": "fp8"}, set()),
        ({"quant_method": 7}, set()),
        ({}, set()),
    ],
)
def test_schemes(config: Mapping[str, Any], schemes: set[str]) -> None:
    """What the numbers may be; nothing where the config is silent or makes no sense."""
    said = announced([config], "a.b")
    assert said.schemes == schemes
    assert bool(said.text) == bool(schemes)


@pytest.mark.parametrize(
    ("block", "cell"),
    [
        ([128, 64], (128, 64)), ("128x64", (128, 64)), ("128X64", (128, 64)),
        ([128], None), ("128xK", None), ([0, 128], None), ([True, 1], None), (128, None), (None, None),
    ],
)  # fmt: skip
def test_blocks(block: object, cell: tuple[int, int] | None) -> None:
    """A list, or the text of older configs."""
    assert announced([groups(("Linear", FLOAT8 | {"block_structure": block}))], "a.b").cell == cell
    assert announced([{"quant_method": "fp8", "weight_block_size": block}], "a.b").cell == cell


def test_the_config_that_knows_the_module_is_taken() -> None:
    """A nested config may be the only one that covers it; a group that names it counts before a class."""
    outer, inner = {"quant_method": "modelopt", "quantized_layers": {}}, groups(("Linear", FLOAT8), ("a.b", {
        "num_bits": 4, "type": "int", "group_size": 32, "symmetric": False}))  # fmt: skip
    said = announced([outer, inner], "a.b")
    assert (said.method, said.bits, said.group_size, said.symmetric) == ("compressed-tensors", 4, 32, False)
    assert announced([outer, inner], "c").cell == (128, 64)
