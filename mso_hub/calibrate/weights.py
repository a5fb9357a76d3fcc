"""Stored tensors as torch tensors under the names of a dense checkpoint: what is packed is decoded on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mso_hub.checkpoint import Array, Checkpoint, Group
from mso_hub.errors import CheckpointError
from mso_hub.formats.decoders.base import shape_reader
from mso_hub.formats.detect import read_weights
from mso_hub.formats.weight import FLOAT_DTYPES, Weight
from mso_hub.source import Source

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "C64": torch.complex64,
}  # fmt: skip
"""Safetensors dtype -> torch dtype."""
TAGS = {dtype: tag for tag, dtype in TORCH.items()}
"""Torch dtype -> safetensors dtype."""
ALIGNED = 64
"""Bytes, as torch aligns its own memory."""
BLOCK = 16 << 20
"""Bytes of numbers that are decoded at a time."""


class Weights:
    """The tensors of a checkpoint. Safe to read from several threads.

    source  where the bytes come from
    dtype   what packed weights become: BF16, F16 or F32
    """

    def __init__(self, source: Source, checkpoint: Checkpoint, dtype: str) -> None:
        self._source = source
        self.checkpoint = checkpoint
        tensors = model_group(checkpoint).tensors
        found, _ = read_weights(tensors, checkpoint.config, shape_reader(source.read), dtype)
        self._weights = {weight.name: weight for weight in found}

    @property
    def distant(self) -> bool:
        """Does every read have to travel?"""
        return self._source.distant

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor, as a dense checkpoint calls it."""
        return tuple(self._weights)

    def weight(self, name: str) -> Weight | None:
        """How it is stored; None where there is none of this name."""
        return self._weights.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of its numbers."""
        return self._weights[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """What `get` returns."""
        return TORCH[self._weights[name].dtype]

    def nbytes(self, name: str) -> int:
        """Bytes of its numbers in memory, decoded."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def packed(self, name: str) -> bool:
        """Does it have to be decoded?"""
        return self._weights[name].decoder is not None

    def get(self, name: str) -> Tensor:
        """All of a tensor, in memory of its own; packed ones in fp32 arithmetic, rounded once to their dtype."""
        shape = self.shape(name)
        return self.rows(name, 0, shape[0] if shape else 1)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) along the first dimension, read and decoded without the others where that is possible."""
        weight = self._weights[name]
        shape = (stop - start, *weight.shape[1:]) if weight.shape else ()
        if weight.decoder is None:
            loaded = weight.load(self._source.read, start, stop)["weight"]
            return _tensor(loaded, weight.dtype, shape)
        blocks = [b for b in weight.blocks(BLOCK) if b[0] < stop and b[1] > start]
        parts = [self._decode(weight, *block) for block in blocks]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole[start - blocks[0][0] : stop - blocks[0][0]]

    def _decode(self, weight: Weight, start: int, stop: int) -> Tensor:
        if weight.decoder is None:
            raise CheckpointError(f"{weight.name}: is not packed")
        loaded = weight.load(self._source.read, start, stop)
        decoded = weight.decoder.decode(loaded, start, stop, weight.dtype)
        return _tensor(decoded, weight.dtype, (stop - start, *weight.shape[1:]))


def model_group(checkpoint: Checkpoint) -> Group:
    """The tensors that a loader of the whole model sees; CheckpointError where several sets of files could be it."""
    groups = [g for g in checkpoint.groups if not any("/" in info.file for info in g.tensors.values())]
    named = [g for g in groups if g.index == "model.safetensors.index.json"]
    chosen = named or groups
    if len(chosen) != 1:
        found = ", ".join(str(g.index or "files without an index") for g in groups) or "none"
        raise CheckpointError(
            f"{checkpoint.name}: needs one set of weights beside config.json, found {len(groups)}: {found}; keep "
            "model.safetensors.index.json and the files that it lists"
        )
    return chosen[0]


def float_dtype(checkpoint: Checkpoint, said: object) -> str:
    """BF16, F16 or F32: what is said (in these words, or in those of a config.json), else the dtype of most numbers.

    BF16 where all are packed.
    """
    tags = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", **{tag: tag for tag in FLOAT_DTYPES}}
    if isinstance(said, str) and said.removeprefix("torch.") in tags:
        return tags[said.removeprefix("torch.")]
    count = dict.fromkeys(FLOAT_DTYPES, 0)
    for info in model_group(checkpoint).tensors.values():
        if info.dtype in count:
            count[info.dtype] += math.prod(info.shape)
    return max(count, key=lambda tag: count[tag])


def _tensor(data: Array, tag: str, shape: Sequence[int]) -> Tensor:
    """Bytes or numbers of a known dtype -> tensor over the same memory, or a copy where that is not aligned.

    Products in MKL differ in their last bits with the alignment of what they are given.
    """
    flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    found = torch.from_numpy(flat).view(TORCH[tag]).reshape(tuple(shape))
    return found if found.data_ptr() % ALIGNED == 0 else found.clone()
