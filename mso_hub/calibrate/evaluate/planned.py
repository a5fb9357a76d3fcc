"""A checkpoint as a recipe would leave it, without writing it: weights are quantized and dequantized as they are read.

The numbers are those that `mso-hub quantize` would store and a decoder would read: the same plan, the same encoders,
the largest magnitude of a fused unit where its members share a scale. What is packed as wanted already stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mso_hub.calibrate.evaluate.activations import Quantizer
from mso_hub.calibrate.evaluate.inputs import WAY_OUT, Wish, quantizers, wish_of
from mso_hub.calibrate.evaluate.subject import (
    Caches,
    Runtime,
    Subject,
    caches_of,
    counted,
    no_caches,
)
from mso_hub.calibrate.scales import planned_names
from mso_hub.calibrate.walk import Walk
from mso_hub.checkpoint import Array
from mso_hub.errors import CheckpointError, RecipeError
from mso_hub.events import Listener
from mso_hub.formats import Format
from mso_hub.formats.decoders.base import shape_reader
from mso_hub.formats.detect import quantization_configs
from mso_hub.formats.scales import read_kv_scales
from mso_hub.formats.weight import Weight
from mso_hub.plan import Plan, Recipe, plan_checkpoint
from mso_hub.plan.steps import scale_dtype
from mso_hub.plan.summary import planned_form
from mso_hub.source import Source

KEPT = 64
"""Units whose largest magnitude is remembered: the parts of a unit are read one soon after another."""


class Encoded:
    """Weights of a source under encoders.

    units    weights that engines fuse, of all that are encoded
    formats  module of a plan -> its encoder; a module that is not there stays
    """

    def __init__(self, source: Source, units: Sequence[Sequence[Weight]], formats: Mapping[str, Format]) -> None:
        self._source, self._formats = source, formats
        self._weights = {w.module: w for members in units for w in members}
        self._unit = {w.module: members for members in units for w in members}
        self._amax: dict[str, float] = {}

    def covers(self, stored: str) -> bool:
        """Does a module of a walk get other numbers?"""
        return any(module in self._formats for module in planned_names(stored))

    def weight(self, stored: str, w: Tensor) -> Tensor:
        """What a runtime multiplies with in place of a weight [N, K] of a walk, in its dtype."""
        modules = planned_names(stored)
        if not self.covers(stored):
            return w
        parts = [self._dequantized(module) for module in modules]
        whole = torch.cat(parts).to(w.device, w.dtype)
        if whole.shape != w.shape:
            raise RecipeError(f"{stored}: would be {list(whole.shape)}, the model multiplies with {list(w.shape)}")
        return whole

    def _dequantized(self, module: str) -> Tensor:
        """F32 [N, K]."""
        weight, form = self._weights[module], self._formats[module]
        values, dtype = self._values(weight)
        dense, amax = scale_dtype(weight, form), self._largest(module) if form.shares else 0.0
        try:
            arrays = form.encode(values, dtype, dense, amax)
        except ValueError as error:
            raise CheckpointError(f"{weight.name}: cannot be {form.name}: {error}; add it to `ignore`") from error
        return torch.from_numpy(form.decode(arrays, weight.shape[1], dense, amax))

    def _values(self, weight: Weight) -> tuple[Array, str]:
        rows = weight.shape[0]
        return weight.values(weight.load(self._source.read, 0, rows), 0, rows)

    def _largest(self, module: str) -> float:
        """Among the numbers of the unit."""
        from mso_hub.formats.numerics.floats import amax

        if module not in self._amax:
            found = max(amax(*self._values(weight)) for weight in self._unit[module])
            if not math.isfinite(found):
                raise CheckpointError(f"{module}: its weights, or those fused with it, hold NaN or infinity")
            while len(self._amax) >= KEPT:
                del self._amax[next(iter(self._amax))]
            self._amax |= dict.fromkeys((w.module for w in self._unit[module]), found)
        return self._amax[module]


class Planned(Runtime):
    """A Runtime whose weights are quantized as they are read."""

    def __init__(self, encoded: Encoded, inputs: Mapping[str, Quantizer], caches: Caches, on_event: Listener) -> None:
        super().__init__(inputs, caches, on_event)
        self._encoded = encoded

    def weight(self, module: str, w: Tensor) -> Tensor:
        """Quantized and dequantized, where the recipe says so."""
        return self._encoded.weight(module, w)


def as_planned(walk: Walk, recipe: Recipe, *, weights_only: bool, on_event: Listener) -> Subject:
    """A checkpoint as a recipe would leave it; PlanError and RecipeError as a plan has them."""
    if recipe.text_only:
        raise RecipeError("text_only: renames weights, which a recipe that is only tried cannot; leave it out")
    if recipe.decodes:
        raise RecipeError(
            f"scheme {recipe.scheme!r} quantizes nothing, so there is nothing to try; leave the recipe out"
        )
    plan = plan_checkpoint(walk.checkpoint, recipe, shape_reader(walk.source.read))
    changed = {step.weight.module for shard in plan.shards for step in shard.steps if step.format is not None}
    formats = {module: form for module, form in plan.formats.items() if module in changed}
    encoded = Encoded(walk.source, list(plan.units.values()), formats)
    wishes, scales = ({}, {}) if weights_only else (_wishes(plan, walk), _numbers(plan, walk))

    def read(name: str) -> Tensor:
        if name not in scales:
            raise CheckpointError(f"{name}: the recipe gives this activation no scale; {WAY_OUT}")
        return torch.tensor(scales[name])

    by_name = {planned: wish for stored, wish in wishes.items() for planned in planned_names(stored)}
    found = quantizers(by_name, read)
    inputs = {stored: found[planned_names(stored)[0]] for stored in wishes}
    caches = caches_of(_cache_scales(plan, walk)) if recipe.kv_cache and not weights_only else no_caches
    notes = ["activations, keys and values were left as they are"] if weights_only else []
    unreached = len(formats) - sum(m in formats for stored in walk.modules for m in planned_names(stored))
    if unreached:
        notes.append(f"{unreached:,} of the quantized weights do nothing for text, and were not used")
    forms = " and ".join(dict.fromkeys(planned_form(form).label for form in plan.formats.values()))
    return Subject(
        walk, Planned(encoded, inputs, caches, on_event), forms, counted(wishes), tuple(notes), tried=True,
    )  # fmt: skip


def _wishes(plan: Plan, walk: Walk) -> dict[str, Wish]:
    """What the config that would be written says of every module's activations."""
    config: Mapping[str, Any] = next(iter(quantization_configs(plan.config)), {})
    found: dict[str, Wish] = {}
    for stored in walk.modules:
        module = planned_names(stored)[0]
        if module in plan.formats:
            form = plan.formats[module]
            wish = wish_of(config, module, "fp8" if form.name.startswith("fp8") else form.name)
            found |= {} if wish is None else {stored: wish}
    return found


def _numbers(plan: Plan, walk: Walk) -> dict[str, float]:
    """Scales that would be written: those that are made, and those of the source that are taken over."""
    made: dict[str, float] = {}
    for step in (step for shard in plan.shards for step in shard.steps):
        for info, value in zip(step.outputs[len(step.outputs) - len(step.extras) :], step.extras, strict=True):
            made[info.name] = value
        info = step.weight.home
        if step.format is None and info.name.endswith((".input_scale", ".input_global_scale")) and not step.extras:
            made[step.outputs[0].name] = _first(walk, step.weight)
    return made


def _first(walk: Walk, weight: Weight) -> float:
    from mso_hub.formats.numerics.floats import widen

    values = weight.load(walk.source.read, 0, weight.shape[0] if weight.shape else 1)["weight"]
    return float(widen(values, weight.dtype).reshape(-1)[0])


def _cache_scales(plan: Plan, walk: Walk) -> dict[str, tuple[float, float]]:
    """Attention module -> scales of keys and values: those of the recipe, else the source's own."""
    if plan.recipe.kv_scales:
        return dict(plan.recipe.kv_scales)
    tensors = (info for shard in walk.checkpoint.shards.values() for info in shard.tensors)
    return read_kv_scales(tensors, walk.source.read)
