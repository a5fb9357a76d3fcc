"""A checkpoint as its runtime would compute it: which activations, keys and values are quantized, and how."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mso_hub.calibrate.evaluate.activations import Quantizer, fp8_static
from mso_hub.calibrate.evaluate.inputs import WAY_OUT, Wish, quantizers, wish_of
from mso_hub.calibrate.observer import Layer, Observer
from mso_hub.calibrate.scales import planned_names
from mso_hub.calibrate.walk import Walk
from mso_hub.calibrate.weights import Weights, model_group
from mso_hub.checkpoint import TensorInfo
from mso_hub.errors import CheckpointError
from mso_hub.events import BatchDone, Listener
from mso_hub.formats.decoders.smoothed import Smoothed
from mso_hub.formats.detect import quantization_configs
from mso_hub.formats.dialects.ktransformers import LAYOUT as KTRANSFORMERS
from mso_hub.formats.scales import read_kv_scales
from mso_hub.formats.weight import FLOAT_DTYPES, Weight, read_rows
from mso_hub.plan.summary import DTYPES, form_of

Caches = Callable[[str], tuple[Quantizer, Quantizer] | None]
"""Attention module -> what becomes of its keys and values; None: nothing."""


class Runtime(Observer):
    """Quantizes activations, keys and values of a walk, and tells how far a layer is.

    inputs  module -> what becomes of its input
    caches  what becomes of keys and values
    """

    def __init__(self, inputs: Mapping[str, Quantizer], caches: Caches, on_event: Listener) -> None:
        self._inputs, self._caches, self._on_event = inputs, caches, on_event
        self._last: tuple[Tensor, int, Quantizer, Tensor] | None = None
        self._counted = ""
        self.attention: set[str] = set()

    def begin_layer(self, layer: Layer) -> None:
        """Its first linear tells how far it is."""
        self._counted, self._last = "", None

    def inputs(self, module: str, x: Tensor) -> Tensor:
        """As the runtime multiplies it; q, k and v get one tensor, and it is quantized once."""
        self._counted = self._counted or module
        if module == self._counted and x.numel():
            self._on_event(BatchDone(x.numel() // x.shape[-1]))
        quantize = self._inputs.get(module)
        if quantize is None or not x.numel():
            return x
        version = x._version  # noqa: SLF001 - torch's count of changes in place
        last = self._last
        if last is not None and last[0] is x and last[1] == version and last[2] is quantize:
            return last[3]
        found = quantize(x)
        self._last = x, version, quantize, found
        return found

    def keys_values(self, module: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """As they come out of the cache again."""
        pair = self._caches(module)
        if pair is None or k.dim() != 4:  # the latent of DeepSeek's attention is only shown
            return None
        self.attention.add(module)
        return pair[0](k), pair[1](v)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is evaluated.

    scheme       for people: `NVFP4 (W4A4, compressed-tensors)`
    activations  how -> number of linear layers whose activations are quantized so
    tried        a recipe is tried on it
    """

    walk: Walk
    observer: Runtime
    scheme: str
    activations: Mapping[str, int]
    notes: tuple[str, ...]
    tried: bool = False


def as_stored(walk: Walk, *, weights_only: bool, on_event: Listener) -> Subject:
    """A checkpoint as it is; CheckpointError where its config says of activations what is not known here.

    weights_only  leave activations, keys and values alone
    """
    config: Mapping[str, Any] = next(iter(quantization_configs(walk.checkpoint.config)), {})
    weights = walk.weights
    packed = {m: w for m in walk.modules if (w := stored_weight(weights, m)) is not None and form_of(w).layout}
    wishes = {} if weights_only else _wishes(config, packed)
    tensors = model_group(walk.checkpoint).tensors

    def read(name: str) -> Tensor:
        return _number(walk, tensors.get(name), name)

    by_name = {planned: wish for m, wish in wishes.items() for planned in planned_names(m)}
    found = quantizers(by_name, read)
    inputs = {m: found[planned_names(m)[0]] for m in wishes}
    forms = (replace(form_of(w), activation_bits=_bits(wishes.get(m))) for m, w in packed.items())
    scheme = " and ".join(dict.fromkeys(form.label for form in forms)) or DTYPES.get(walk.dtype, walk.dtype)
    return Subject(
        walk,
        Runtime(inputs, no_caches if weights_only else _caches(walk, config, tensors), on_event),
        scheme,
        counted(wishes),
        tuple(_notes(packed, weights_only=weights_only)),
    )


def stored_weight(weights: Weights, module: str) -> Weight | None:
    """The weight of one of a walk's modules; None for one that a walk makes of several."""
    stem = module.partition("[")[0]
    return weights.weight(f"{stem}.weight") or weights.weight(stem)


def _wishes(config: Mapping[str, Any], packed: Mapping[str, Weight]) -> dict[str, Wish]:
    """Modules whose activations are quantized."""
    found: dict[str, Wish] = {}
    for module, weight in packed.items():
        if form_of(weight).layout == KTRANSFORMERS:
            continue
        wish = wish_of(config, planned_names(module)[0], form_of(weight).scheme)
        if wish is None:
            continue
        if isinstance(weight.decoder, Smoothed):
            raise CheckpointError(
                f"{module}: its activations are multiplied with pre_quant_scale before they are quantized, which is "
                f"not done here; {WAY_OUT}"
            )
        found[module] = wish
    return found


def _notes(packed: Mapping[str, Weight], *, weights_only: bool) -> list[str]:
    notes = ["activations, keys and values were left as they are"] if weights_only and packed else []
    if any(form_of(weight).layout == KTRANSFORMERS for weight in packed.values()):
        notes.append("kt-kernel quantizes activations of its experts to INT8, which was not done here")
    return notes


def counted(wishes: Mapping[str, Wish]) -> dict[str, int]:
    """Kind -> modules."""
    kinds = [wish.kind for wish in wishes.values()]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def _bits(wish: Wish | None) -> int:
    return 16 if wish is None else 4 if "FP4" in wish.kind else 8


def _number(walk: Walk, info: TensorInfo | None, name: str) -> Tensor:
    """A stored scale, F32 []; CheckpointError where there is none, or no usable one."""
    if info is None or info.dtype not in FLOAT_DTYPES or math.prod(info.shape) != 1:
        found = "there is none" if info is None else f"it is {info.dtype} {list(info.shape)}"
        raise CheckpointError(f"{name}: needs one number, the scale of static activations; {found}; {WAY_OUT}")
    from mso_hub.formats.numerics.floats import widen

    value = torch.tensor(float(widen(read_rows(walk.source.read, info), info.dtype).reshape(-1)[0]))
    if not 0 < float(value) < math.inf:
        raise CheckpointError(f"{name}: an activation scale must be finite and > 0, got {float(value)}; {WAY_OUT}")
    return value


def no_caches(module: str) -> None:
    """Keys and values stay."""


def _caches(walk: Walk, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Caches:
    """FP8 under the stored scales, 1 where there are none as vLLM takes it; where the config announces such a cache."""
    said = config.get("kv_cache_scheme") or config.get("kv_cache_quant_algo")
    if not said:
        return no_caches
    bits = (said.get("num_bits"), said.get("type")) if isinstance(said, dict) else (8, "float") if said == "FP8" else ()
    if bits != (8, "float") or (isinstance(said, dict) and said.get("dynamic")):
        raise CheckpointError(
            f"{walk.checkpoint.name}: config.json announces a KV cache of {said}, only FP8 with static scales is known "
            f"here; {WAY_OUT}"
        )
    return caches_of(read_kv_scales(tensors.values(), walk.source.read))


def caches_of(scales: Mapping[str, tuple[float, float]]) -> Caches:
    """FP8 keys and values everywhere, under these scales (multipliers, by attention module) or 1."""
    made: dict[str, tuple[Quantizer, Quantizer]] = {}

    def find(module: str) -> tuple[Quantizer, Quantizer]:
        if module not in made:
            keys, values = (fp8_static(torch.tensor(s)) for s in scales.get(module, (1.0, 1.0)))
            made[module] = keys, values
        return made[module]

    return find
