"""Tensors beside the codes of packed weights: in the shape and dtype that loaders make room for, and none too many."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mso_hub.checkpoint import TensorInfo
from mso_hub.formats.decoders.fp8 import Fp8Decoder
from mso_hub.formats.decoders.nvfp4 import Nvfp4Decoder
from mso_hub.formats.decoders.smoothed import ROLE, Smoothed
from mso_hub.formats.dialects import modelopt
from mso_hub.formats.weight import FLOAT_DTYPES, Weight
from mso_hub.verify.announced import METHODS, needs_input_scale
from mso_hub.verify.claims import shown
from mso_hub.verify.opened import Opened
from mso_hub.verify.report import alike

INPUT_SCALES = ("input_scale", "input_global_scale")
SMOOTHED = ("AWQ", "SVD", "SMOOTHQUANT", "SQ")
"""Words in the names of ModelOpt's algorithms whose loaders read a pre_quant_scale."""


def companion_problems(config: Mapping[str, Any], mine: Opened) -> Iterator[str]:
    """Sentences about tensors that loaders have no place for, and about scales in a shape or dtype of another layout.

    config  a quantization_config
    """
    packed = [weight for weight in mine.weights.values() if weight.decoder is not None]
    if config.get("quant_method") not in METHODS:
        return
    modules = {weight.module for weight in packed}
    spare = [
        w.name for w in mine.weights.values()
        if w.decoder is None and w.name.rpartition(".")[0] in modules and not w.name.endswith(".bias")
    ]  # fmt: skip
    spare += [w.parts[ROLE].name for w in packed if isinstance(w.decoder, Smoothed) and not _is_smoothed(config, w)]
    if spare:
        yield f"beside packed weights, loaders of this format know no such tensors: {shown(spare)}"
    yield from alike({w.module: found for w in packed if (found := _row_scales(config, w))})
    yield from alike({name: found for name, found in _input_scales(config, mine, packed) if found})


def _is_smoothed(config: Mapping[str, Any], weight: Weight) -> bool:
    """Does the config announce a smoothing scale?"""
    algo = modelopt.algorithm(config, weight.module) or ""
    return config.get("quant_method") == "modelopt" and any(word in algo for word in SMOOTHED)


def _row_scales(config: Mapping[str, Any], weight: Weight) -> str:
    """Scales of rows: compressed-tensors has them as [N, 1], ModelOpt as [N]; loaders take no other shape."""
    scale, decoder = weight.parts.get("scale"), weight.decoder
    if scale is None or not isinstance(decoder, Fp8Decoder) or decoder.grid != (weight.shape[0], 1):
        return ""
    method, rows = config.get("quant_method"), weight.shape[0]
    wanted: dict[object, tuple[int, ...]] = {"compressed-tensors": (rows, 1), "modelopt": (rows,)}
    right = wanted.get(method, scale.shape)
    by_row = method != "modelopt" or modelopt.algorithm(config, weight.module) == "FP8_PER_CHANNEL_PER_TOKEN"
    if rows == 1 or not by_row or decoder.cell != (1, weight.shape[1]) or scale.shape == right:
        return ""
    return f"{scale.name}: {method} keeps scales of rows as {list(right)}, found {list(scale.shape)}"


def _input_scales(config: Mapping[str, Any], mine: Opened, packed: Sequence[Weight]) -> Iterator[tuple[str, str]]:
    """(name, sentence) for every activation scale that is read and is not one number of a float dtype."""
    infos = {info.name: info for shard in mine.checkpoint.shards.values() for info in shard.tensors}
    by_module = {weight.module: weight for weight in packed}
    for name in mine.runtime_scales:
        module, _, suffix = name.rpartition(".")
        if suffix in INPUT_SCALES and module in by_module and needs_input_scale(config, module):
            yield name, _input_scale(infos[name], by_module[module])


def _input_scale(info: TensorInfo, weight: Weight) -> str:
    dtypes = ("F32",) if isinstance(weight.decoder, Nvfp4Decoder) else FLOAT_DTYPES
    if info.dtype in dtypes and math.prod(info.shape) == 1:
        return ""
    found = f"{info.dtype} {list(info.shape)}"
    return f"{info.name}: an activation scale is one number in {' or '.join(dtypes)}, found {found}"
