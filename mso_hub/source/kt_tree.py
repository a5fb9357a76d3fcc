"""A tree of kt-kernel's files, a tensor in each, as shards without a header.

    _layer_{layer}/_numa_{part}/INT8_gate_{expert}_{bytes}Byte_quant_.kt     codes
    _layer_{layer}/_numa_{part}/INT8_gate_{expert}_{bytes}Byte_scale_.kt     scales, F32

Their tensors get the names that they have in kt-kernel's safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mso_hub.checkpoint import Shard, TensorInfo
from mso_hub.errors import CheckpointError

TREE_FILE = re.compile(
    r"^_layer_(\d+)/_numa_(\d+)/(?P<method>INT4|INT8)_(gate|up|down)_(\d+)_(?P<bytes>\d+)Byte_(?P<kind>quant|scale)_\.kt$"
)


def tree_shards(files: Mapping[str, int]) -> dict[str, Shard]:
    """Path -> shard for every file of such a tree, none where there is no tree; CheckpointError for a wrong size."""
    found: dict[str, Shard] = {}
    methods = set()
    for name, nbytes in files.items():
        match = TREE_FILE.match(name)
        if match is None:
            continue
        if int(match["bytes"]) != nbytes:
            raise CheckpointError(f"{name}: its name says {match['bytes']} bytes, it has {nbytes}; copy it again")
        layer, part, _, projection, expert, _, kind = match.groups()
        if kind == "scale" and nbytes % 4:
            raise CheckpointError(f"{name}: must hold float32 numbers, has {nbytes} bytes; copy it again")
        module = f"blk.{layer}.ffn_{projection}_exps.{expert}.numa.{part}"
        scale = kind == "scale"
        shape = (nbytes // 4 if scale else nbytes,)
        info = TensorInfo(f"{module}.{'scale' if scale else 'weight'}", "F32" if scale else "I8", shape, name, 0)
        found[name] = Shard(name, nbytes, (info,), {"kt_method": match["method"]})
        methods.add(match["method"])
    if len(methods) > 1:
        raise CheckpointError("_layer_*: holds files of INT4 and of INT8; keep those of one conversion")
    return found
