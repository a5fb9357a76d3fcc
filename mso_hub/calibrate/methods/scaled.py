"""A source in which some tensors are multiplied by scales while they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mso_hub.calibrate.methods.folds import Fold, Slot
from mso_hub.checkpoint import Array, Checkpoint, TensorInfo
from mso_hub.errors import PlanError
from mso_hub.formats.decoders.base import shape_reader
from mso_hub.formats.detect import read_weights
from mso_hub.formats.weight import Reader, Weight
from mso_hub.source import Range, Source
from mso_hub.source.overlay import Computed, OverlaySource, Part

F32 = NDArray[np.float32]


class Factors:
    """Factors of stored tensors: every one can be broadcast over its tensor.

    shapes  stored tensor -> shape
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self.of: dict[str, list[F32]] = {}

    def add(self, fold: Fold, scales: F32) -> None:
        """Divide the producers by the scales [size], multiply the consumers."""
        for slot in fold.producers:
            self._multiply(slot, np.float32(1) / scales, rows=True)
        for slot in fold.consumers:
            self._multiply(slot, scales, rows=False)

    def _multiply(self, slot: Slot, by: F32, *, rows: bool) -> None:
        shape = self._shapes[slot.tensor]
        axis = len(shape) - 2 if rows and len(shape) > 1 else len(shape) - 1
        factor = np.ones([size if at in (axis, 0) else 1 for at, size in enumerate(shape)], np.float32)
        if slot.expert is None and axis:
            factor = factor[:1]
        place: list[slice | int] = [slice(None)] * len(shape)
        place[axis] = slice(slot.first, slot.first + len(by))
        if slot.expert is not None:
            place[0] = slot.expert
        elif axis:
            place[0] = 0
        view = factor[tuple(place)]
        view *= by.reshape([len(by) if at == axis else 1 for at in range(len(shape))][len(shape) - view.ndim :])
        self._merge(slot.tensor, factor)

    def _merge(self, tensor: str, factor: F32) -> None:
        """Factors of one shape are kept as one."""
        known = next((f for f in self.of.setdefault(tensor, []) if f.shape == factor.shape), None)
        if known is None:
            self.of[tensor].append(factor)
        else:
            known *= factor


def scaled(source: Source, checkpoint: Checkpoint, factors: Mapping[str, Iterable[F32]], dtype: str) -> OverlaySource:
    """The source with tensors times their factors: in F32, rounded once to the dtype of the tensor.

    dtype  what packed weights become: BF16, F16 or F32
    Raises PlanError for a tensor that is no number, or part of something else.
    """
    replaced: dict[str, list[Part]] = {}
    left = dict(factors)
    for group in checkpoint.groups:
        weights, _ = read_weights(group.tensors, checkpoint.config, shape_reader(source.read), dtype)
        for weight in weights:
            if weight.name not in left:
                continue
            found = list(left.pop(weight.name))
            names = [part.name for part in weight.parts.values()]
            replaced |= {name: [] for name in names[1:]}
            replaced[names[0]] = [_computed(weight, found)]
    if left:
        raise PlanError(f"{min(left)}: cannot be scaled, there is no such weight")
    stamp = "\0".join(f"{name} {f.tobytes().hex()}" for name, found in sorted(factors.items()) for f in found)
    return OverlaySource(source, checkpoint, replaced, {}, stamp)


def _computed(weight: Weight, factors: list[F32]) -> Computed:
    info = TensorInfo(weight.name, weight.dtype, weight.shape)
    step = 1 if weight.decoder is None else weight.decoder.row_step
    needs: Callable[[int, int], list[Range]] = weight.ranges
    return Computed(info, needs, partial(_rows, weight, factors), step)


def _rows(weight: Weight, factors: list[F32], read: Reader, start: int, stop: int) -> Array:
    """Rows [start, stop) times the factors."""
    from mso_hub.formats.numerics.floats import narrow, widen

    values, tag = weight.values(weight.load(read, start, stop), start, stop)
    wide = widen(np.ascontiguousarray(values), tag).copy()
    for factor in factors:
        wide *= factor[start:stop] if factor.shape[0] == weight.shape[0] and factor.shape[0] > 1 else factor
    if not np.isfinite(wide).all():
        raise PlanError(f"{weight.name}: is not finite under the scales of the method; calibrate with more text")
    return narrow(wide, weight.dtype)


def exact_scales(norm: F32, scales: F32, dtype: str) -> F32:
    """Scales near the given ones by which a norm's weight can be divided and, in its dtype, multiplied back exactly.

    So only the consumers are rounded. Where the quotient is zero or infinite the scale becomes 1.
    """
    from mso_hub.formats.numerics.floats import narrow, widen

    with np.errstate(all="ignore"):
        there = widen(narrow(norm / scales, dtype), dtype)
        back = norm / there
    fine = np.isfinite(back) & (back > 0) & np.isfinite(there) & (there != 0)
    return np.where(fine, back, np.float32(1)).astype(np.float32)


def is_scale(scales: F32) -> bool:
    """Finite and positive, all of them?"""
    return bool(np.isfinite(scales).all() and (scales > 0).all() and math.prod(scales.shape) > 0)
