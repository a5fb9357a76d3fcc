"""What config.json says of a packed weight against how it is stored, where decoding does not depend on it.

Decoding refuses a config that would make it read wrong numbers. Other mistakes it survives, and a loader does not: it
makes room for other scales than the stored ones, leaves zero points out, or takes the codes for narrower ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mso_hub.formats.decoders.announced import Announced, announced
from mso_hub.formats.dialects import compressed_tensors, modelopt
from mso_hub.formats.weight import Weight

SHOWN = 3
STRATEGIES = {"FP8": "tensor", "FP8_PER_CHANNEL_PER_TOKEN": "channel"}
"""ModelOpt's quant_algo -> how its scales lie, where `announced` leaves it open."""
STORED_AS = {
    ("nvfp4", "weight_packed"): ("nvfp4-pack-quantized",),
    ("mxfp4", "weight_packed"): ("mxfp4-pack-quantized",),
    ("mxfp8", "weight"): ("mxfp8-quantized",),
    ("fp8", "weight"): ("float-quantized", "naive-quantized"),
    ("int", "weight_packed"): ("pack-quantized",),
    ("int", "weight"): ("int-quantized", "naive-quantized"),
}
"""Kind of numbers and name of the codes -> what compressed-tensors may call that."""
Grid = tuple[int, int]


def shown(modules: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(modules[:SHOWN]) + (f" and {len(modules) - SHOWN} more" if len(modules) > SHOWN else "")


def claim_problems(config: Mapping[str, Any], packed: Sequence[Weight]) -> Iterator[str]:
    """A sentence for each kind of contradiction, with the modules that have it.

    config  a quantization_config
    """
    found: dict[str, list[str]] = {}
    for weight in packed:
        for problem in _contradictions(config, weight):
            found.setdefault(problem, []).append(weight.module)
    for problem, modules in found.items():
        yield f"config.json: {problem}: {shown(modules)}"


def _contradictions(config: Mapping[str, Any], weight: Weight) -> Iterator[str]:
    said, decoder = announced((config,), weight.module), weight.decoder
    if decoder is None or decoder.layout not in ("compressed-tensors", "modelopt", "deepseek"):
        return
    if said.bits is not None and said.bits != decoder.bits:
        yield f"says {said.bits} bits, stored are {decoder.bits}"
    if said.method == "compressed-tensors" and said.symmetric is True and "zero_point" in weight.parts:
        yield "says symmetric, so loaders leave out the zero points that are stored"
    form = _said_form(config, weight) if decoder.layout == said.method == "compressed-tensors" else None
    if form is not None and form not in _forms(weight):
        yield f"says format {form}, stored is {' or '.join(_forms(weight))}"
    stored, expected = _stored_grid(weight), _said_grid(config, said, weight)
    if stored is not None and expected is not None and stored != expected[0]:
        yield f"says one scale for {expected[1]}, stored {_words(stored, weight)}"


def _forms(weight: Weight) -> tuple[str, ...]:
    """What compressed-tensors may call the layout of a weight."""
    scheme = weight.decoder.scheme if weight.decoder is not None else ""
    kind = "int" if scheme.startswith("int") else scheme
    return STORED_AS.get((kind, weight.home.name.rpartition(".")[2]), ())


def _said_form(config: Mapping[str, Any], weight: Weight) -> str | None:
    """The `format` of a module's config group, or that of the whole config; None for names unknown here."""
    group = compressed_tensors.group_of(config, weight.module) or {}
    form = group.get("format") or config.get("format")
    known = {name for names in STORED_AS.values() for name in names}
    return form if isinstance(form, str) and form in known else None


def _stored_grid(weight: Weight) -> Grid | None:
    """Scales in each direction; None without any."""
    scale = weight.parts.get("scale")
    if scale is None:
        return None
    shape = scale.shape
    if math.prod(shape) == 1:
        return 1, 1
    if len(shape) == 4:
        return shape[0], shape[2]
    return (shape[0], shape[1]) if len(shape) == 2 else (shape[0], 1)


def _said_grid(config: Mapping[str, Any], said: Announced, weight: Weight) -> tuple[Grid, str] | None:
    """How many scales a loader makes room for, and what one is for; None where the config leaves it open."""
    rows, columns = weight.shape
    size, strategy = said.group_size, said.strategy
    if said.method == "modelopt":
        size = modelopt.group_size(config, weight.module)
        strategy = strategy or STRATEGIES.get(modelopt.algorithm(config, weight.module) or "", "")
    elif said.method == "fp8":
        if weight.decoder is None or weight.decoder.scheme != "fp8":  # DeepSeek-V4's experts have scales of their own
            return None
        strategy = strategy or ("tensor" if config.get("weight_block_size") is None else "")
    if strategy == "tensor":
        return (1, 1), "the tensor"
    if strategy == "channel":
        return (rows, 1), "a row"
    if strategy == "block" and said.cell:
        return (math.ceil(rows / said.cell[0]), math.ceil(columns / said.cell[1])), "{} x {}".format(*said.cell)
    if strategy in ("group", "tensor_group", "") and size is not None and size > 0:
        return (rows, math.ceil(columns / size)), f"{size} columns"
    return None


def _words(grid: Grid, weight: Weight) -> str:
    """For messages: how scales are stored."""
    if grid == (1, 1):
        return "is one for the tensor"
    if grid[0] != weight.shape[0]:
        return f"are {grid[0]} x {grid[1]} for {' x '.join(map(str, weight.shape))}"
    return "is one for a row" if grid[1] == 1 else f"is one for {math.ceil(weight.shape[1] / grid[1])} columns"
