"""AWQ and GPTQ weights: `qweight`, `qzeros` and `scales`, stored [in, out] and several codes to an I32 word.

    w[n, k] = (q[k, n] - zero[group, n]) * scales[group, n]

               AutoAWQ (GEMM), 4 bits               GPTQ, 2, 3, 4 or 8 bits
    qweight    [K, N/8], packed along N             [K*bits/32, N], packed along K
    qzeros     [K/g, N/8]                           [K/g, N*bits/32], minus one in v1, as they are in v2
    scales     [K/g, N]                             [K/g, N]
    g_idx                                           [K], the group of each column; k // g where it is missing

AutoRound writes both. Shapes tell them apart; only the version of GPTQ is known from the config alone. An output row
is a column of what is stored, so every block of rows needs the whole weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mso_hub.checkpoint import Array
from mso_hub.errors import CheckpointError
from mso_hub.formats.decoders.announced import INTEGER_METHODS
from mso_hub.formats.decoders.base import Built, Stored
from mso_hub.formats.weight import FLOAT_DTYPES

WORD = 32
"""Bits of a word, and rows at which the words of every width begin anew."""
WIDTHS = (2, 3, 4, 8)
V1, V2 = 1, 0
"""What is added to a stored zero point."""


@dataclass(frozen=True, slots=True)
class AwqGptqDecoder:
    """Reads AWQ or GPTQ; the parts carry the roles `codes`, `zero_point`, `scale` and, for GPTQ, perhaps `g_idx`.

    module       for messages
    layout       awq or gptq
    shape        [N, K]
    group_size   columns per scale
    zero_offset  V1 or V2
    symmetric    the config says that every zero point is the middle of the range
    scale_dtype  dtype of `scales`
    """

    module: str
    layout: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    zero_offset: int
    symmetric: bool
    scale_dtype: str

    @property
    def name(self) -> str:
        """For reports."""
        version = f" v{1 if self.zero_offset == V1 else 2}" if self.layout == "gptq" else ""
        return f"{self.layout.upper()} INT{self.bits}{version}"

    @property
    def scheme(self) -> str:
        """int4, ..."""
        return f"int{self.bits}"

    @property
    def row_step(self) -> int:
        """One block: rows are stored as columns."""
        return 0

    def part_rows(self, role: str, start: int, stop: int) -> tuple[int, int] | None:
        """Everything."""
        return None

    def decode(self, parts: Mapping[str, Array], start: int, stop: int, dtype: str) -> Array:
        """Rows in `dtype`, (q - zero) * scale in fp32, rounded once."""
        from mso_hub.formats.numerics import awq_gptq

        first, last = start // WORD * WORD, min(-(-stop // WORD) * WORD, self.shape[0])
        per_word = slice(first * self.bits // WORD, -(-last * self.bits // WORD))
        codes = parts["codes"][:, per_word if self.layout == "awq" else slice(first, last)]
        zeros, scale = parts["zero_point"][:, per_word], parts["scale"][:, first:last]
        codes, zeros, scale = (np.ascontiguousarray(part) for part in (codes, zeros, scale))
        if self.layout == "awq":
            rows = awq_gptq.decode_awq(codes, zeros, scale, group_size=self.group_size, dtype=dtype)
        else:
            self._check_version(parts["zero_point"])
            rows = awq_gptq.decode_gptq(
                codes, zeros, scale, self._groups(parts),
                bits=self.bits, group_size=self.group_size, zero_offset=self.zero_offset, dtype=dtype,
            )  # fmt: skip
        return np.ascontiguousarray(rows[start - first : stop - first])

    def _groups(self, parts: Mapping[str, Array]) -> Array | None:
        """g_idx, checked; None where it only counts the groups."""
        g_idx, groups = parts.get("g_idx"), len(parts["scale"])
        if g_idx is None or np.array_equal(g_idx, np.arange(self.shape[1]) // self.group_size):
            return None
        if not 0 <= g_idx.min() <= g_idx.max() < groups:
            raise CheckpointError(
                f"{self.module}.g_idx: must hold group numbers below {groups}, found {g_idx.min()} to {g_idx.max()}; "
                "the companions belong to another weight"
            )
        return g_idx.astype(np.int32)

    def _check_version(self, zeros: Array) -> None:
        """Symmetric zero points are all alike, and tell the version; a wrong one would shift every number."""
        if not self.symmetric or WORD % self.bits:
            return
        other = (1 << (self.bits - 1)) - (V2 if self.zero_offset == V1 else V1)
        word = sum(other << at for at in range(0, WORD, self.bits))
        if (zeros.view(np.uint32) == word).all():
            said, found = ("gptq", "gptq_v2") if self.zero_offset == V1 else ("gptq_v2", "gptq")
            raise CheckpointError(
                f"{self.module}.qzeros: config.json says checkpoint_format {said} and symmetric, the zero points are "
                f"those of {found}; correct checkpoint_format in config.json"
            )


def awq_gptq(stored: Stored) -> Built:
    """Decoder and shape of one AWQ or GPTQ weight; shapes that fit neither are a PlanError."""
    words, width = stored.matrix()
    groups, rows = stored.matrix("scale")
    zero_groups, zero_words = stored.matrix("zero_point")
    if stored.parts["zero_point"].dtype != "I32" or stored.parts["scale"].dtype not in FLOAT_DTYPES:
        raise stored.refuse(f"needs qzeros I32 and scales of {', '.join(FLOAT_DTYPES)}")
    bits, rest = divmod(WORD * zero_words, rows)
    is_awq = width != rows
    codes = rows if is_awq else words * WORD // max(1, bits)
    fits = width * 8 == rows and bits == 4 if is_awq else bits in WIDTHS and words * WORD % bits == 0
    if rest or zero_groups != groups or not fits:
        raise stored.refuse(
            "needs qweight [K, N/8], qzeros [K/g, N/8], scales [K/g, N] (AWQ), or qweight [K*bits/32, N], "
            "qzeros [K/g, N*bits/32], scales [K/g, N] (GPTQ of 2, 3, 4 or 8 bits)"
        )
    layout = "awq" if is_awq else "gptq"
    _check_method(stored, layout)
    columns = words if is_awq else codes
    decoder = AwqGptqDecoder(
        stored.module,
        layout,
        (rows, columns),
        bits,
        _group_size(stored, columns, groups),
        V2 if is_awq else _zero_offset(stored),
        stored.said.symmetric is True,
        stored.parts["scale"].dtype,
    )
    g_idx = stored.parts.get("g_idx")
    if g_idx is not None and (is_awq or g_idx.dtype not in ("I32", "I64") or g_idx.shape != (columns,)):
        raise stored.refuse(f"needs g_idx I32 [{columns}], and only beside a GPTQ weight")
    return decoder, (rows, columns)


def _group_size(stored: Stored, columns: int, groups: int) -> int:
    """Columns per scale: what the config says, if it makes this many groups, else equal parts."""
    said = stored.said.group_size
    if said is None:
        if columns % groups:
            raise stored.refuse(f"config.json must give group_size: {columns} columns are not {groups} equal groups")
        return columns // groups
    size = said if said > 0 else columns
    if math.ceil(columns / size) != groups:
        raise stored.contradiction(f"group_size {said}, which makes {math.ceil(columns / size)} groups of {columns}")
    return size


def _check_method(stored: Stored, layout: str) -> None:
    """The config against the layout that the shapes have."""
    config = stored.said.config
    kind = " ".join(str(config.get(key, "")) for key in ("quant_method", "packing_format")).lower()
    other = "gptq" if layout == "awq" else "awq"
    if other in kind and layout not in kind:
        raise stored.contradiction(other.upper())
    version = config.get("version") or config.get("format") or "gemm"
    if layout == "awq" and stored.said.method == "awq" and str(version).lower() != "gemm":
        raise stored.refuse(f"AWQ is decoded as version gemm, config.json says {version}")


def _zero_offset(stored: Stored) -> int:
    """V1 or V2, from the config: nothing stored tells."""
    config = stored.said.config
    if stored.said.method not in INTEGER_METHODS:
        raise CheckpointError(
            f"{stored.module}: GPTQ stores zero points minus one (gptq) or as they are (gptq_v2), and config.json has "
            "no quantization_config that says which; restore the config.json that belongs to these weights"
        )
    form = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if form not in ("gptq", "gptq_v2"):
        raise stored.refuse(f"GPTQ is decoded as checkpoint_format gptq or gptq_v2, config.json says {form}")
    return V2 if form == "gptq_v2" else V1
