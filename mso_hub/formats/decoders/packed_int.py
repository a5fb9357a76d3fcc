"""INT2 to INT8 weights of compressed-tensors' pack-quantized format, decode only.

    w = (code - zero_point) * scale[row, group]         code = stored bits - 2**(bits-1), offset binary

The group of column k is k // group_size, or weight_g_idx[k] where activation order was used; channel-wise weights
have one group. Kimi-K2 stores its experts this way (4 bits, groups of 32, symmetric).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mso_hub.checkpoint import Array, TensorInfo
from mso_hub.errors import CheckpointError, PlanError
from mso_hub.formats.decoders.base import Built, ReadShape, Stored
from mso_hub.formats.dialects import compressed_tensors
from mso_hub.formats.weight import FLOAT_DTYPES


@dataclass(frozen=True, slots=True)
class PackedInt:
    """How one weight is packed.

    module         for messages
    rows, columns  logical [N, K]
    bits           width of a code
    group_size     columns per scale, None for one scale a row
    dense          codes straddle words (3, 5, 6, 7 bits since compressed-tensors 0.16) or leave their top bits empty
    scale_dtype    dtype of weight_scale
    """

    module: str
    rows: int
    columns: int
    bits: int
    group_size: int | None
    dense: bool
    scale_dtype: str

    @property
    def name(self) -> str:
        """For reports."""
        return f"pack-quantized INT{self.bits}"

    @property
    def scheme(self) -> str:
        """int4, ..."""
        return f"int{self.bits}"

    @property
    def layout(self) -> str:
        """compressed-tensors alone packs this way."""
        return "compressed-tensors"

    @property
    def row_step(self) -> int:
        """32 rows of zero points fill whole words at any width, dense or not at 2, 4 and 8 bits."""
        return 32 if self.dense or 32 % self.bits == 0 else 32 // self.bits

    def part_rows(self, role: str, start: int, stop: int) -> tuple[int, int] | None:
        """Zero points are packed along rows; g_idx and weight_shape are needed whole."""
        if role in ("g_idx", "shape"):
            return None
        if role != "zero_point":
            return start, stop
        if self.dense:
            return start * self.bits // 32, math.ceil(stop * self.bits / 32)
        per_word = 32 // self.bits
        return start // per_word, math.ceil(stop / per_word)

    def decode(self, parts: Mapping[str, Array], start: int, stop: int, dtype: str) -> Array:
        """Rows in `dtype`, (code - zero_point) * scale in fp32, rounded once."""
        from mso_hub.formats.numerics import floats, integer

        if "shape" in parts and parts["shape"].reshape(-1).tolist() != [self.rows, self.columns]:
            raise CheckpointError(
                f"{self.module}.weight_shape says {parts['shape'].tolist()}, [{self.rows}, {self.columns}] is packed; "
                "the companions belong to another weight"
            )
        g_idx, groups = parts.get("g_idx"), parts["scale"].shape[1]
        if g_idx is not None and not 0 <= g_idx.min() <= g_idx.max() < groups:
            raise CheckpointError(
                f"{self.module}.weight_g_idx: must hold group numbers below {groups}, found {g_idx.min()} to "
                f"{g_idx.max()}; the companions belong to another weight"
            )
        zero_point = None
        if "zero_point" in parts:
            zero_point = integer.unpack_zero_point(parts["zero_point"], self.bits, stop - start, dense=self.dense)
        scale = floats.widen(parts["scale"], self.scale_dtype)
        return integer.decode(
            parts["codes"], scale, zero_point, g_idx,
            bits=self.bits, group_size=self.group_size, cols=self.columns, dense=self.dense, dtype=dtype,
        )  # fmt: skip


def _columns(module: str, parts: Mapping[str, TensorInfo], bits: int, group: int, read_shape: ReadShape) -> int:
    """Logical K, from shapes where they decide it, else from the weight_shape tensor."""
    words, groups = parts["codes"].shape[1], parts["scale"].shape[1]
    said = parts.get("shape")
    if said is not None and (said.dtype not in ("I32", "I64") or said.shape != (2,)):
        raise CheckpointError(f"{said.name}: must be two integers, got {said.dtype} {list(said.shape)}")
    if group > 0 and groups > 1:
        columns = groups * group
        if words in (math.ceil(columns * bits / 32), math.ceil(columns / (32 // bits))):
            return columns
    if said is not None:
        rows, columns = read_shape(said)
        if rows == parts["codes"].shape[0] and columns > 0:
            return columns
        raise CheckpointError(
            f"{module}.weight_shape says {[rows, columns]}, {parts['codes'].shape[0]} rows are stored"
        )
    raise CheckpointError(
        f"{module}: {words} packed words and {groups} groups do not say how many columns there are, and "
        "weight_shape is missing; the checkpoint is incomplete"
    )


def _check_companions(module: str, parts: Mapping[str, TensorInfo], decoder: PackedInt) -> None:
    """Zero points and g_idx against the shapes that the codes and scales ask for; reading on would leave them."""
    rows, groups = parts["scale"].shape
    words = math.ceil(rows * decoder.bits / 32) if decoder.dense else math.ceil(rows / (32 // decoder.bits))
    for role, dtypes, shape in (
        ("zero_point", ("I32",), (words, groups)),
        ("g_idx", ("I32", "I64"), (decoder.columns,)),
    ):
        info = parts.get(role)
        if info is not None and (info.dtype not in dtypes or info.shape != shape):
            raise CheckpointError(
                f"{info.name}: must be {dtypes[0]} {list(shape)}, got {info.dtype} {list(info.shape)}; "
                f"it does not belong to {module}.weight_packed, or there is no decoder for it"
            )


def packed_int(stored: Stored) -> Built:
    """Decoder and logical shape of one packed weight, everything checked against its stored shapes."""
    module, parts = stored.module, stored.parts
    if stored.said.method != "compressed-tensors":
        raise CheckpointError(
            f"{module}: stored packed, but config.json has no compressed-tensors quantization_config, at the top "
            "or nested; restore the config.json that belongs to these weights"
        )
    args = compressed_tensors.weight_args(stored.said.config, module)
    bits, group = args.get("num_bits"), args.get("group_size") or 0
    packed, scale = parts["codes"], parts["scale"]
    if not isinstance(group, int):
        raise PlanError(f"{module}: group_size must be a number of columns or null, got {group!r}; there is no decoder")
    if args.get("type") != "int" or not isinstance(bits, int) or not 2 <= bits <= 8 or packed.dtype != "I32":
        raise PlanError(
            f"{module}: pack-quantized needs int codes of 2 to 8 bits in I32, got "
            f"{args.get('type')} {bits!r} bits in {packed.dtype}; there is no decoder for that"
        )
    if len(packed.shape) != 2 or len(scale.shape) != 2 or scale.shape[0] != packed.shape[0]:
        raise CheckpointError(
            f"{module}: weight_packed {list(packed.shape)} and weight_scale {list(scale.shape)} must be matrices "
            "with the same number of rows; the checkpoint is damaged"
        )
    if scale.dtype not in FLOAT_DTYPES:
        raise PlanError(f"{module}.weight_scale: must be one of {', '.join(FLOAT_DTYPES)}, got {scale.dtype}")
    columns = _columns(module, parts, bits, group, stored.read_shape)
    words, groups = packed.shape[1], scale.shape[1]
    dense, padded = words == math.ceil(columns * bits / 32), words == math.ceil(columns / (32 // bits))
    if not (dense or padded) or (dense and padded and 32 % bits):
        if dense:
            raise CheckpointError(
                f"{module}: {columns} columns of {bits} bits could be packed in two ways; there is no telling which"
            )
        raise stored.contradiction(f"{bits} bits: {columns} columns of them do not fill {words} words of 32 bits")
    grouped = group > 0 and groups > 1
    if groups != (math.ceil(columns / group) if grouped else 1):
        raise stored.contradiction(f"groups of {group}: {columns} columns in them do not make {groups} scales a row")
    if "zero_point" not in parts and args.get("symmetric") is False:
        raise stored.contradiction("asymmetric, weight_zero_point is missing")
    if "zero_point" in parts and args.get("symmetric") is True:
        raise stored.contradiction("symmetric, weight_zero_point is there")
    decoder = PackedInt(module, packed.shape[0], columns, bits, group if grouped else None, dense, scale.dtype)
    _check_companions(module, parts, decoder)
    return decoder, (packed.shape[0], columns)
