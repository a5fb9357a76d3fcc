"""A weight as arithmetic sees it: a named matrix, whatever tensors hold it on disk.

A dense weight is one tensor. A packed one is several (`weight_packed`, `weight_scale`, ...), perhaps in several
shards, and a decoder that turns any block of its rows into numbers. An expert inside a fused 3-D tensor is a view
of that tensor's bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mso_hub.checkpoint import DTYPE_BITS, Array, TensorInfo

Reader = Callable[[str, int, int], NDArray[np.uint8]]
"""(file, begin, end) -> bytes, as Source.read has it."""

FLOAT_DTYPES = ("BF16", "F16", "F32")
NUMPY = {
    "BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F8_E4M3": np.uint8,
    "F8_E8M0": np.uint8, "U8": np.uint8, "I8": np.int8, "I32": np.int32, "I64": np.int64,
}  # fmt: skip
"""Safetensors dtype -> numpy dtype that carries its bits (numpy has no BF16 and no FP8)."""


class Decoder(Protocol):
    """Turns stored parts of a weight into a block of its rows."""

    @property
    def name(self) -> str:
        """Format's name for reports: `nvfp4-pack-quantized`, `FP8 128x128 blocks`, ..."""

    @property
    def scheme(self) -> str:
        """What its numbers are, whatever the layout: nvfp4, mxfp4, mxfp8, fp8, int4, int8, ...; "" for dense ones."""

    @property
    def bits(self) -> int:
        """Width of a code."""

    @property
    def layout(self) -> str:
        """Whose names and shapes: compressed-tensors, modelopt, deepseek, gpt-oss, awq or gptq; "" for dense ones."""

    @property
    def row_step(self) -> int:
        """A block must start at a multiple of this many rows; 0 when rows cannot be split."""

    def part_rows(self, role: str, start: int, stop: int) -> tuple[int, int] | None:
        """First-dimension range of a part that rows [start, stop) need; None for the whole part."""

    def decode(self, parts: Mapping[str, Array], start: int, stop: int, dtype: str) -> Array:
        """Rows [start, stop) in `dtype` (BF16 as uint16 bits, F16 or F32), computed in fp32, rounded to nearest even.

        parts  role -> the ranges that `part_rows` asked for
        """


@dataclass(frozen=True, slots=True)
class Weight:
    """A named array of the model.

    name     as a dense checkpoint calls it: `model.layers.0.mlp.up_proj.weight`
    dtype    what its numbers are in a dense checkpoint: BF16, F32, ...
    shape    logical shape; two sizes when `decoder` is set, three for a bank of experts, whose rows are experts
    parts    role -> stored tensor; {"weight": info} when dense
    decoder  None when the stored bytes are the numbers
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Mapping[str, TensorInfo]
    decoder: Decoder | None = None

    @property
    def module(self) -> str:
        """The name without `.weight`."""
        return self.name.removesuffix(".weight")

    @property
    def home(self) -> TensorInfo:
        """The part that decides in which shard the result goes."""
        return next(iter(self.parts.values()))

    @property
    def nbytes(self) -> int:
        """Stored bytes of all parts; of a transposed view its own share."""
        if isinstance(self.decoder, Transposed):
            return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8
        return sum(part.nbytes for part in self.parts.values())

    @property
    def number_bytes(self) -> int:
        """Bytes of its numbers in memory: as stored when dense, F32 when packed."""
        return self.nbytes if self.decoder is None else 4 * math.prod(self.shape)

    def blocks(self, nbytes: int, multiple: int = 1) -> list[tuple[int, int]]:
        """Row ranges whose numbers take about `nbytes` each, starting where the decoder and the encoder allow it.

        multiple  rows of which every block of the encoder starts at a multiple
        """
        rows = self.shape[0] if self.shape else 1
        step = math.lcm(multiple, 1 if self.decoder is None else self.decoder.row_step or rows)
        height = max(1, nbytes * rows // max(1, self.number_bytes) // max(1, step)) * max(1, step)
        return [(at, min(at + height, rows)) for at in range(0, rows, height)] or [(0, 0)]

    def _part_rows(self, role: str, start: int, stop: int) -> tuple[int, int] | None:
        return (start, stop) if self.decoder is None else self.decoder.part_rows(role, start, stop)

    def load(self, read: Reader, start: int, stop: int) -> dict[str, Array]:
        """Stored bytes of rows [start, stop), role -> array with the bits of the part's dtype."""
        return {role: read_rows(read, info, self._part_rows(role, start, stop)) for role, info in self.parts.items()}

    def ranges(self, start: int, stop: int) -> list[tuple[str, int, int]]:
        """The reads that `load` makes for rows [start, stop)."""
        return [(info.file, *row_range(info, self._part_rows(role, start, stop))) for role, info in self.parts.items()]

    def values(self, loaded: Mapping[str, Array], start: int, stop: int) -> tuple[Array, str]:
        """Numbers of a loaded block and the dtype tag they carry: as stored when dense, else exact in F32."""
        if self.decoder is None:
            return loaded["weight"], self.dtype
        return self.decoder.decode(loaded, start, stop, "F32"), "F32"


def row_range(info: TensorInfo, rows: tuple[int, int] | None) -> tuple[int, int]:
    """File offsets of a first-dimension range of a stored tensor; of all of it for None."""
    if rows is None or not info.shape:
        return info.begin, info.end
    row = info.nbytes // max(1, info.shape[0])
    return info.begin + rows[0] * row, info.begin + rows[1] * row


def read_rows(read: Reader, info: TensorInfo, rows: tuple[int, int] | None = None) -> Array:
    """First-dimension range of a stored tensor as an array with the bits of its dtype; all of it for None."""
    shape = info.shape
    begin, end = row_range(info, rows)
    if rows is not None and shape:
        shape = (rows[1] - rows[0], *shape[1:])
    return (
        read(info.file, begin, end)
        .view(NUMPY.get(info.dtype, np.uint8))
        .reshape(shape if info.dtype in NUMPY else (-1,))
    )


@dataclass(frozen=True, slots=True)
class Transposed:
    """Columns [first, last) of a stored [in, out] matrix, read as rows of an [out, in] weight.

    Llama-4 and Qwen3-VL-MoE store fused experts this way (`x @ w` where a linear layer computes `x @ w.T`).
    """

    first: int
    last: int
    dtype: str

    @property
    def name(self) -> str:
        """For reports."""
        return "transposed"

    @property
    def scheme(self) -> str:
        """Dense."""
        return ""

    @property
    def bits(self) -> int:
        """As stored."""
        return DTYPE_BITS[self.dtype]

    @property
    def layout(self) -> str:
        """Dense."""
        return ""

    @property
    def row_step(self) -> int:
        """One block: a row range would be a strided read of the whole matrix."""
        return 0

    def part_rows(self, role: str, start: int, stop: int) -> tuple[int, int] | None:
        """Everything."""
        return None

    def decode(self, parts: Mapping[str, Array], start: int, stop: int, dtype: str) -> Array:
        """The numbers, turned."""
        from mso_hub.formats.numerics.floats import narrow, widen

        columns = parts["weight"][:, self.first + start : self.first + stop]
        turned = np.ascontiguousarray(columns.T)
        return turned if dtype == self.dtype else narrow(widen(turned, self.dtype), dtype)
