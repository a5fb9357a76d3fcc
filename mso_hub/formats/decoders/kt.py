"""kt-kernel's experts, merged or as a tree of files -> weights under the names of the model.

Method and number of parts follow from the tensors: a down projection has as many scales as a gate has columns, which
tells INT4 from INT8. What headers and config.json say must agree; the numbers are in `numerics/kt.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mso_hub.checkpoint import Array, TensorInfo
from mso_hub.errors import CheckpointError
from mso_hub.formats.dialects.ktransformers import LAYOUT, METHODS, PROJECTIONS, STORED, Names, Place, announced_names
from mso_hub.formats.kt import COLUMNS, ROWS, STEP
from mso_hub.formats.weight import Weight

Parts = dict[int, dict[str, TensorInfo]]
"""NUMA node -> weight and scale."""


@dataclass(frozen=True, slots=True)
class KtDecoder:
    """Reads one projection.

    width   bits of a code
    rows    of a part
    columns of a part
    parts   how many there are
    across  parts lie side by side (down projection), not one below the other
    """

    width: int
    rows: int
    columns: int
    parts: int
    across: bool

    @property
    def name(self) -> str:
        """The format's."""
        return f"kt-int{self.width}"

    @property
    def scheme(self) -> str:
        """Integers."""
        return f"int{self.width}"

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.width

    @property
    def layout(self) -> str:
        """kt-kernel's."""
        return LAYOUT

    @property
    def row_step(self) -> int:
        """Any row may start a block; the tiles that it shares with others are read with it."""
        return 1

    def _within(self, part: int, start: int, stop: int) -> tuple[int, int]:
        """Rows of a part that rows [start, stop) of the weight are, in whole blocks of tiles."""
        above = 0 if self.across else part * self.rows
        first, last = max(start - above, 0), min(stop - above, self.rows)
        if first >= last:
            return 0, 0
        block = ROWS[self.width]
        return first // block * block, min(-(-last // block) * block, self.rows)

    def part_rows(self, role: str, start: int, stop: int) -> tuple[int, int] | None:
        """Bytes of codes, or scales, of whole blocks of tiles."""
        kind, _, part = role.partition(".")
        first, last = self._within(int(part or 0), start, stop)
        size = self.columns * self.width // 8 if kind == "codes" else 1
        return first * size, last * size

    def decode(self, parts: Mapping[str, Array], start: int, stop: int, dtype: str) -> Array:
        """Rows [start, stop)."""
        from mso_hub.formats.numerics import kt
        from mso_hub.formats.numerics.floats import narrow

        out = np.empty((stop - start, self.columns * (self.parts if self.across else 1)), np.float32)
        for part in range(self.parts):
            first, last = self._within(part, start, stop)
            if first == last:
                continue
            numbers = kt.decode(parts[_role("codes", part)], parts[_role("scale", part)], self.columns, bits=self.width)
            above = 0 if self.across else part * self.rows
            top, bottom = max(start, above + first), min(stop, above + last)
            left = part * self.columns if self.across else 0
            out[top - start : bottom - start, left : left + self.columns] = numbers[
                top - above - first : bottom - above - first
            ]
        return narrow(out, dtype)


def _role(kind: str, part: int) -> str:
    return f"{kind}.{part}" if part else kind


def has_kt(tensors: Mapping[str, TensorInfo]) -> bool:
    """Are there experts of kt-kernel among them?"""
    return any(name.startswith("blk.") and STORED.match(name) for name in tensors)


def read_kt(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], dtype: str, refused: dict[str, str] | None = None
) -> tuple[dict[str, TensorInfo], list[Weight]]:
    """All other tensors under the names of the source, and the experts' weights; as they are where there are none.

    dtype    what the experts become when they are decoded
    refused  takes module -> why, for experts that are incomplete; None: the first of them is raised, CheckpointError
    """
    if not has_kt(tensors):
        return dict(tensors), []
    names = announced_names(config)
    rest: dict[str, TensorInfo] = {}
    found: dict[Place, Parts] = {}
    for name, info in tensors.items():
        match = STORED.match(name)
        if match is None:
            rest[names.rest(name)] = replace(info, name=names.rest(name))
            continue
        place = Place(int(match[1]), match[2], int(match[3]))
        found.setdefault(place, {}).setdefault(int(match[4]), {})[match[5]] = info
    weights = []
    for layer, expert in dict.fromkeys((place.layer, place.expert) for place in found):
        trio = {p: found.get(Place(layer, p, expert), {}) for p in PROJECTIONS}
        try:
            weights += _expert(layer, expert, trio, names, dtype)
        except CheckpointError as error:
            if refused is None:
                raise
            refused |= {names.expert(Place(layer, p, expert)): str(error) for p, parts in trio.items() if parts}
    return rest, weights


def _expert(layer: int, expert: int, trio: Mapping[str, Parts], names: Names, dtype: str) -> list[Weight]:
    """Three weights of an expert."""
    where = f"blk.{layer}.ffn_*_exps.{expert}"
    count = len(trio["gate"])
    for projection, parts in trio.items():
        there = sorted(parts)
        if not count or there != list(range(count)) or any(len(part) != 2 for part in parts.values()):
            raise CheckpointError(
                f"{where}: needs weight and scale of gate, up and down for the same NUMA nodes 0, 1, ..., found "
                f"{projection} for {there or 'none'} and gate for {sorted(trio['gate']) or 'none'}; the checkpoint is "
                "incomplete"
            )
    sizes = {p: _size(parts, where) for p, parts in trio.items()}
    (inner, wide), (hidden, tall) = sizes["gate"], sizes["down"]
    bits = next((bits for bits in METHODS.values() if wide * 8 == hidden * bits and tall * 8 == inner * bits), None)
    if bits is None or sizes["up"] != sizes["gate"] or not _fits(inner, hidden, bits):
        listed = ", ".join(f"{p} {rows} rows of {nbytes} bytes" for p, (rows, nbytes) in sizes.items())
        raise CheckpointError(f"{where}: {listed} are no expert in INT4 or INT8; the checkpoint is damaged")
    found = []
    for projection, parts in trio.items():
        across = projection == "down"
        rows, columns = (hidden, inner) if across else (inner, hidden)
        shape = (rows, columns * count) if across else (rows * count, columns)
        stored = {
            _role(kind, part): parts[part][suffix]
            for part in range(count) for kind, suffix in (("codes", "weight"), ("scale", "scale"))
        }  # fmt: skip
        name = f"{names.expert(Place(layer, projection, expert))}.weight"
        found.append(Weight(name, dtype, shape, stored, KtDecoder(bits, rows, columns, count, across)))
    return found


def _fits(inner: int, hidden: int, bits: int) -> bool:
    return not (inner % COLUMNS[bits] or hidden % COLUMNS[bits] or inner % STEP or hidden % STEP)


def _size(parts: Parts, where: str) -> tuple[int, int]:
    """(rows, bytes of a row) that every part of a projection has."""
    found = set()
    for part in parts.values():
        codes, scale = part["weight"], part["scale"]
        rows = scale.shape[0] if len(scale.shape) == 1 else 0
        if codes.dtype not in ("I8", "U8") or scale.dtype != "F32" or len(codes.shape) != 1 or not rows:
            raise CheckpointError(
                f"{where}: needs codes I8 and scales F32 in one dimension, found {codes.name} {codes.dtype} "
                f"{list(codes.shape)} and {scale.name} {scale.dtype} {list(scale.shape)}; the checkpoint is damaged"
            )
        found.add((rows, codes.shape[0] // rows if codes.shape[0] % rows == 0 else 0))
    if len(found) != 1:
        raise CheckpointError(f"{where}: its NUMA nodes have parts of different sizes; the checkpoint is damaged")
    return found.pop()
