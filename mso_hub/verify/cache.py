"""Scales of a quantized KV cache: announced, beside an attention layer, both of them, finite and positive."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mso_hub.checkpoint import TensorInfo
from mso_hub.formats.detect import quantization_configs
from mso_hub.formats.weight import FLOAT_DTYPES, read_rows
from mso_hub.verify.announced import announces_cache
from mso_hub.verify.claims import shown
from mso_hub.verify.opened import Opened

SCALE = re.compile(r"^(?P<attention>.+?)(\.[qkv]+_proj|\.attn)?\.(?P<which>[kv])_scale$")
"""`X.k_scale`, as ModelOpt has it `X.k_proj.k_scale`, or as vLLM names its parameters `X.attn.k_scale`."""
KEYS_OR_VALUES = re.compile(r"^(W?q?kv\w*|[kv]_\w+|w[qkv]*[kv]\w*|query_key_value|key|value|c_attn|in_proj\w*)$")
"""Names of layers that make keys or values."""
READERS = ("compressed-tensors", "modelopt")
"""Quantization methods whose loaders keep the scales only where the config announces the cache."""


def cache_problems(mine: Opened) -> Iterator[str]:
    """Sentences about k_scale and v_scale tensors."""
    found: dict[str, dict[str, TensorInfo]] = {}
    infos = {info.name: info for shard in mine.checkpoint.shards.values() for info in shard.tensors}
    for name in mine.runtime_scales:
        if match := SCALE.match(name):
            found.setdefault(match["attention"], {})[match["which"]] = infos[name]
    if not found:
        return
    configs = quantization_configs(mine.checkpoint.config)
    if configs and configs[0].get("quant_method") in READERS and not announces_cache(configs[0]):
        yield f"config.json: announces no KV cache, so loaders leave out its scales: {shown(list(found))}"
    attentions = {
        module.rpartition(".")[0] for module in (weight.module for weight in mine.weights.values())
        if KEYS_OR_VALUES.match(module.rpartition(".")[2])
    }  # fmt: skip
    if strange := [name for name in found if not attentions & {name, f"{name}.attn"}]:
        yield f"scales of a KV cache beside what is no attention layer, loaders leave them out: {shown(strange)}"
    if halves := [name for name, scales in found.items() if len(scales) == 1]:
        yield f"one of k_scale and v_scale is missing: {shown(halves)}"
    yield from _values(mine, found)


def _values(mine: Opened, found: Mapping[str, Mapping[str, TensorInfo]]) -> Iterator[str]:
    from mso_hub.formats.numerics.floats import widen

    for attention, scales in found.items():
        for which, info in scales.items():
            numbers: Any = read_rows(mine.source.read, info)
            value = float(widen(numbers, info.dtype).reshape(-1)[0]) if info.dtype in FLOAT_DTYPES else math.nan
            if not 0 < value < math.inf:
                yield f"{attention}: {which}_scale must be finite and > 0, found {value}"
