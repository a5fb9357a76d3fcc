"""Selection -> steps: what becomes of every weight, and the scales that are written beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mso_hub.checkpoint import TensorInfo
from mso_hub.formats import IMPORTED, Format
from mso_hub.formats.nvfp4 import NVFP4_CHOICES, POWER, Nvfp4
from mso_hub.formats.weight import FLOAT_DTYPES, Weight
from mso_hub.plan.recipe import Recipe
from mso_hub.plan.select import Selection

KV_LEAVES = {"k_scale": "k_proj", "v_scale": "v_proj"}
CONSTANT_SCALE = 1.0
"""Activation scale of W4A4 where nothing is known: block scales made at run time do the work."""


@dataclass(frozen=True, slots=True)
class Step:
    """One weight on its way.

    outputs  what it becomes, in the format's order, then one F32 tensor for each of `extras`
    format   its encoder; None when it is copied or decoded
    unit     key into Plan.units when its scale comes from the largest magnitude of the unit
    extras   numbers written beside it: activation scale, KV-cache scale
    scale_of unit whose members must all have this copied scale
    """

    weight: Weight
    outputs: tuple[TensorInfo, ...]
    format: Format | None = None
    unit: str | None = None
    extras: tuple[float, ...] = ()
    scale_of: str | None = None

    @property
    def dense(self) -> str:
        """Dtype to which its scales are rounded."""
        return scale_dtype(self.weight, self.format)

    @property
    def row_step(self) -> int:
        """Its blocks start at a multiple of this many rows."""
        return 1 if self.format is None else self.format.row_step

    @property
    def changes(self) -> bool:
        """Do its numbers get another form?"""
        return self.format is not None or self.weight.decoder is not None


def scale_dtype(weight: Weight, form: Format | None) -> str:
    """Dtype to which scales are rounded: the weight's.

    F32 where loaders take it and a packed source may have such scales itself, or F16 would be too narrow for them.
    """
    wide = form is not None and form.wide_scales and (is_packed(weight) or weight.dtype == "F16")
    return "F32" if wide else weight.dtype


def is_packed(weight: Weight) -> bool:
    """Is a weight stored as codes and scales? A view of dense numbers is not."""
    return weight.decoder is not None and weight.decoder.layout != ""


def stays_packed(weight: Weight, form: Format) -> bool:
    """Is a packed weight stored as the format would store it? Then its bytes are copied."""
    if weight.decoder is None:
        return False
    suffixes = {info.name.rpartition(".")[2]: info for info in weight.parts.values()}
    wanted = {info.name.rpartition(".")[2]: info for info in form.outputs(weight.module, weight.shape, weight.dtype)}
    scales = ("weight_scale", "weight_shape")  # of any dtype: loaders convert them
    return suffixes.keys() == wanted.keys() and all(
        info.shape == suffixes[name].shape and (info.dtype == suffixes[name].dtype or _is_free(name, info, scales))
        for name, info in wanted.items()
    )


def _is_free(name: str, info: TensorInfo, scales: Sequence[str]) -> bool:
    return name in scales and info.dtype in ("BF16", "F16", "F32", "I64")


def settled(selection: Selection) -> Selection:
    """The selection with the encoder that suits the source: exact powers of two where a unit was MXFP4."""
    formats = dict(selection.formats)
    default = NVFP4_CHOICES.searches[0]
    for members in selection.units.values():
        form = formats[members[0].module]
        was_mxfp4 = all(w.decoder is not None and w.decoder.scheme == "mxfp4" for w in members)
        if isinstance(form, Nvfp4) and form.search == default and was_mxfp4:
            formats |= {w.module: replace(form, search=POWER) for w in members}
    return replace(selection, formats=formats)


def input_scales(selection: Selection, recipe: Recipe) -> tuple[dict[str, float], list[str]]:
    """Activation scale (multiplier) of each module that needs one, the largest of its unit; problems."""
    scales: dict[str, float] = {}
    missing: list[str] = []
    for members in selection.units.values():
        form, said = selection.formats[members[0].module], selection.scales[members[0].module]
        if not form.static:
            continue
        if said != IMPORTED:
            scales |= {w.module: float(CONSTANT_SCALE if said is None else said) for w in members}
            continue
        found = [recipe.input_amax[w.module] for w in members if w.module in recipe.input_amax]
        missing += [w.module for w in members if w.module not in recipe.input_amax]
        if found:
            scales |= {w.module: form.input_scale(max(found) * _headroom(form, recipe)) for w in members}
    if not missing:
        return scales, []
    if recipe.calibration is not None:
        return scales, [recipe.calibration.missing(module) for module in missing]
    return scales, [
        f"{missing[0]}: has no input_scale among the imported ones, nor have {len(missing) - 1} others; ignore them"
    ]


def _headroom(form: Format, recipe: Recipe) -> float:
    """Factor on a measured magnitude; what another checkpoint had is taken as it is."""
    if recipe.calibration is None:
        return 1.0
    return form.headroom if recipe.calibration.headroom is None else recipe.calibration.headroom


class Stepper:
    """Makes the steps of one name space.

    runtime  stored tensors that only the quantized runtime reads, by name: scales of activations and KV caches
    """

    def __init__(
        self, selection: Selection, scales: Mapping[str, float], recipe: Recipe, runtime: Mapping[str, TensorInfo]
    ) -> None:
        self._selection, self._scales, self._recipe, self._runtime = selection, scales, recipe, runtime
        self._unit_of = {w.module: key for key, members in selection.units.items() for w in members}
        self._kv = _kv_scales(recipe)
        self._renamed: dict[str, str] = {}
        self.used: set[str] = set()

    def steps(self, weights: Sequence[Weight]) -> list[Step]:
        """One step per output weight, in the order in which the source stores them."""
        kept = self._selection.kept
        self._renamed = {_stored_module(w): w.module for w in weights}
        found = [self._with_kv(Step(w, (_decoded(w),)), w.module) for w in weights if w.module in kept]
        for weight in self._selection.chosen:
            first, *others = self._chosen(weight)
            found += [self._with_kv(first, weight.module), *others]
        found += self._kept_scales()
        return sorted(found, key=lambda step: (step.weight.home.file, step.weight.home.begin, step.weight.name))

    @property
    def problems(self) -> list[str]:
        """Given KV-cache scales without an attention layer."""
        return [f"kv_scales: there is no {module} here; they belong to another model" for module in self._kv]

    def _chosen(self, weight: Weight) -> Iterator[Step]:
        module = weight.module
        form = self._selection.formats[module]
        scale = self._own_scale(weight, form) if form.static else None
        outputs: tuple[TensorInfo, ...] = ()
        extras: tuple[float, ...] = ()
        if isinstance(scale, TensorInfo):
            self.used.add(scale.name)
            yield Step(Weight(scale.name, scale.dtype, scale.shape, {"weight": scale}), (_named(scale, module),))
        elif scale is not None:
            info, value = form.input_output(module, scale)
            outputs, extras = (info,), (value,)
        if self._stays_packed(weight):
            for info in weight.parts.values():
                dense = Weight(info.name, info.dtype, info.shape, {"weight": info})
                number = math.prod(info.shape) == 1 and info.dtype in FLOAT_DTYPES
                shared = self._unit_of[module] if form.shares and number else None
                yield Step(dense, (_named(info, module), *outputs), extras=extras, scale_of=shared)
                outputs, extras = (), ()
            return
        unit = self._unit_of[module] if form.shares else None
        infos = form.outputs(module, weight.shape, scale_dtype(weight, form))
        yield Step(weight, (*infos, *outputs), form, unit, extras)

    def _own_scale(self, weight: Weight, form: Format) -> float | TensorInfo:
        """The activation scale: what the recipe says, or the source's own where it says nothing."""
        module = weight.module
        info, _ = form.input_output(module, 1.0)
        members = self._selection.units[self._unit_of[module]]
        stored = [self._runtime.get(f"{_stored_module(w)}.{info.name.rpartition('.')[2]}") for w in members]
        if self._selection.scales[module] is None and all(self._stays_packed(w) for w in members) and all(stored):
            return self._runtime[f"{_stored_module(weight)}.{info.name.rpartition('.')[2]}"]
        return self._scales[module]

    def _stays_packed(self, weight: Weight) -> bool:
        """Are its bytes copied? All members of a unit with a common scale, or none."""
        form = self._selection.formats[weight.module]
        members = self._selection.units[self._unit_of[weight.module]] if form.shares else (weight,)
        return all(stays_packed(w, form) for w in members)

    def _with_kv(self, step: Step, module: str) -> Step:
        """The first step of a module with the KV-cache scales that are given for it."""
        found = self._kv.pop(module, None)
        if found is None:
            return step
        infos, values = found
        return replace(step, outputs=(*step.outputs, *infos), extras=(*step.extras, *values))

    def _kept_scales(self) -> Iterator[Step]:
        """KV-cache scales of the source, under the name that the layout gives them."""
        if not self._recipe.kv_cache or self._recipe.kv_scales:
            return
        for name, info in self._runtime.items():
            module, _, leaf = name.rpartition(".")
            if leaf in KV_LEAVES:
                self.used.add(name)
                stored = f"{module.removesuffix(f'.{KV_LEAVES[leaf]}')}.{KV_LEAVES[leaf]}"
                attention = self._renamed.get(stored, stored).rpartition(".")[0]
                target = kv_name(attention, leaf, self._recipe.layout)
                yield Step(Weight(name, info.dtype, info.shape, {"weight": info}), (replace(info, name=target),))


def kv_name(attention: str, leaf: str, layout: str) -> str:
    """Name of a KV-cache scale: ModelOpt has it below the projection, compressed-tensors below the attention."""
    return f"{attention}.{KV_LEAVES[leaf]}.{leaf}" if layout == "modelopt" else f"{attention}.{leaf}"


def _kv_scales(recipe: Recipe) -> dict[str, tuple[tuple[TensorInfo, ...], tuple[float, ...]]]:
    """Module of a key projection -> tensors and values of the given scales."""
    shape = () if recipe.layout == "modelopt" else (1,)
    return {
        f"{attention}.k_proj": (
            tuple(TensorInfo(kv_name(attention, leaf, recipe.layout), "F32", shape) for leaf in KV_LEAVES), pair,
        )
        for attention, pair in recipe.kv_scales.items()
    }  # fmt: skip


def _stored_module(weight: Weight) -> str:
    """The module as the source calls it."""
    return weight.home.name.rpartition(".")[0]


def _named(info: TensorInfo, module: str) -> TensorInfo:
    """A stored tensor of a module under the name that the module has in the output."""
    return TensorInfo(f"{module}.{info.name.rpartition('.')[2]}", info.dtype, info.shape)


def _decoded(weight: Weight) -> TensorInfo:
    return TensorInfo(weight.name, weight.dtype, weight.shape)
