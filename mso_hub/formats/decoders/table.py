"""The table of layouts: which stored tensors make one packed weight, and who reads it.

A row applies to a tensor whose name ends with `codes` and whose dtype is one of `dtypes`, when its key is there too:
the companion that tells this layout from the others. The first row that applies is taken. Its reader then checks every
shape. A new layout is a reader in this room and a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mso_hub.checkpoint import TensorInfo
from mso_hub.errors import CheckpointError
from mso_hub.formats.decoders.announced import announced
from mso_hub.formats.decoders.awq_gptq import awq_gptq
from mso_hub.formats.decoders.base import Built, ReadShape, Stored
from mso_hub.formats.decoders.fp8 import fp8
from mso_hub.formats.decoders.int8 import int4_pairs, int8
from mso_hub.formats.decoders.mx import gpt_oss, has_mx_scale, mxfp4, mxfp4_packed, mxfp8
from mso_hub.formats.decoders.nvfp4 import nvfp4
from mso_hub.formats.decoders.packed_int import packed_int
from mso_hub.formats.decoders.smoothed import ROLE, smoothed
from mso_hub.formats.weight import FLOAT_DTYPES, Weight

SCALE = (".weight_scale", ".weight_scale_inv", ".scale")
"""What the scale of `weight` is called; the first that is stored counts."""
E8M0 = ("U8", "F8_E8M0")
ANY: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """A row of the table.

    codes     end of the name of the tensor with the codes
    dtypes    its dtypes
    key       role of the companion that tells this layout from the others
    of        dtypes of that companion, ANY for all
    parts     role -> names of the companion, as they follow the module's name
    optional  roles that may be missing
    build     stored tensors -> decoder and shape
    when      a further condition
    """

    codes: str
    dtypes: tuple[str, ...]
    build: Callable[[Stored], Built]
    key: str = "scale"
    of: tuple[str, ...] = ANY
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"scale": SCALE})
    optional: tuple[str, ...] = ()
    when: Callable[[Stored], bool] = lambda _: True


_NVFP4_CT = {"scale": (".weight_scale",), "global": (".weight_global_scale",)}
_NVFP4 = {"scale": (".weight_scale",), "global": (".weight_scale_2",)}
_PACKED = {
    "scale": (".weight_scale",), "zero_point": (".weight_zero_point",), "g_idx": (".weight_g_idx",),
    "shape": (".weight_shape",),
}  # fmt: skip
_INT8 = {"scale": SCALE, "zero_point": (".weight_zero_point",)}
_WORDS = {"zero_point": (".qzeros",), "scale": (".scales",), "g_idx": (".g_idx",)}

LAYOUTS = (
    Layout(".weight_packed", ("U8",), nvfp4, "global", ANY, _NVFP4_CT),
    Layout(".weight_packed", ("U8",), mxfp4_packed),
    Layout(".weight_packed", ANY, packed_int, "scale", ANY, _PACKED, ("zero_point", "g_idx", "shape")),
    Layout(".weight", ("U8",), nvfp4, "global", ANY, _NVFP4),
    Layout(".weight", ("U8", "I8"), mxfp4, of=E8M0),
    Layout(".weight", ("F8_E4M3",), mxfp8, of=E8M0, when=has_mx_scale),
    Layout(".weight", ("F8_E4M3",), fp8),
    Layout(".weight", ("I8",), int8, "scale", FLOAT_DTYPES, _INT8, ("zero_point",)),
    Layout(".weight", ("U8",), int4_pairs, of=FLOAT_DTYPES),
    Layout(".qweight", ("I32",), awq_gptq, "scale", ANY, _WORDS, ("g_idx",)),
    Layout("_blocks", ("U8",), gpt_oss, "scale", ANY, {"scale": ("_scales",)}),
)
ENDINGS = tuple(dict.fromkeys(layout.codes for layout in LAYOUTS))
SMOOTH = ".pre_quant_scale"
"""May stand beside every `weight`."""
PACKED_ONLY = (".weight_packed", ".qweight")
"""Endings that no dense tensor has: without a key the checkpoint is incomplete."""


def find_packed(
    info: TensorInfo,
    tensors: Mapping[str, TensorInfo],
    configs: Sequence[Mapping[str, Any]],
    read_shape: ReadShape,
    dtype: str,
) -> Weight | None:
    """The packed weight whose codes a tensor holds; None when it holds no codes.

    configs  as `quantization_configs` finds them
    dtype    what the weight becomes when it is decoded
    Raises CheckpointError for missing parts and for a config that contradicts the tensors, PlanError for shapes that
    no reader knows.
    """
    ending = next((ending for ending in ENDINGS if info.name.endswith(ending)), None)
    if ending is None:
        return None
    module = info.name.removesuffix(ending)
    for layout in LAYOUTS:
        if layout.codes != ending or (layout.dtypes and info.dtype not in layout.dtypes):
            continue
        parts = _companions(module, layout, tensors)
        key = parts.get(layout.key)
        if key is None or (layout.of and key.dtype not in layout.of):
            continue
        _require_complete(module, layout, info, parts)
        smooth = tensors.get(module + SMOOTH) if ending == ".weight" else None
        smoothing = {ROLE: smooth} if smooth is not None else {}
        stored = Stored(module, {"codes": info, **parts, **smoothing}, announced(configs, module), read_shape)
        if layout.when(stored):
            return _weight(layout, stored, dtype)
    if ending in PACKED_ONLY:
        last = next(layout for layout in reversed(LAYOUTS) if layout.codes == ending)
        _require_complete(module, last, info, _companions(module, last, tensors))
    return None


def _companions(module: str, layout: Layout, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Role -> the first of its names that is stored."""
    found = {
        role: next((tensors[module + name] for name in names if module + name in tensors), None)
        for role, names in layout.parts.items()
    }
    return {role: part for role, part in found.items() if part is not None}


def _require_complete(module: str, layout: Layout, codes: TensorInfo, parts: Mapping[str, TensorInfo]) -> None:
    """CheckpointError for a companion that no shard holds."""
    for role, names in layout.parts.items():
        if role not in parts and role not in layout.optional:
            there = parts.get(layout.key, codes).name.removeprefix(f"{module}.")
            raise CheckpointError(
                f"{module}: {there} is there, {names[0].removeprefix('.')} is not; the checkpoint is incomplete"
            )


def _weight(layout: Layout, stored: Stored, dtype: str) -> Weight:
    """What the reader makes of the tensors, if the config does not say something else."""
    decoder, shape = smoothed(stored, layout.build(stored))
    said = stored.said.schemes
    if said and decoder.scheme not in said:
        raise stored.contradiction(" or ".join(sorted(said)))
    name = stored.module if layout.codes == "_blocks" else f"{stored.module}.weight"
    return Weight(name, dtype, shape, stored.parts, decoder)
