"""Does the announced quantization agree with what is stored? The rules are those of vLLM's loaders."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from mso_hub.checkpoint import Checkpoint
from mso_hub.formats.detect import quantization_configs
from mso_hub.formats.dialects.ktransformers import LAYOUT as KTRANSFORMERS
from mso_hub.formats.weight import FLOAT_DTYPES, Weight
from mso_hub.plan.fusion import unit_of, units
from mso_hub.plan.select import EXPERT
from mso_hub.verify.announced import (
    compiled,
    covering,
    entries,
    expects_packed,
    ignored_by,
    model_type,
    needs_input_scale,
    never_packed,
)
from mso_hub.verify.claims import claim_problems, shown
from mso_hub.verify.renamed import renamed_problems


def config_problems(
    checkpoint: Checkpoint, weights: Sequence[Weight], runtime_scales: Sequence[str], refused: Collection[str] = ()
) -> Iterator[str]:
    """Sentences for every contradiction between config.json and the stored tensors.

    runtime_scales  names of stored activation scales
    refused         modules of which it is known already that they are not what the config says
    """
    configs = quantization_configs(checkpoint.config)
    others = [w for w in weights if w.decoder is None or w.decoder.layout != KTRANSFORMERS]
    if len(others) < len(weights) and not any(w.decoder is not None for w in others):
        return  # kt-kernel's experts, which no quantization_config names: what the source had of it is about the rest
    weights = others
    packed = [w for w in weights if w.decoder is not None]
    if not configs:
        if packed:
            yield f"config.json: announces no quantization, {len(packed)} weights are packed ({packed[0].name})"
        if "hf_quant_config.json" in checkpoint.files:
            yield "hf_quant_config.json: announces a quantization, config.json does not; one of them is stale"
        return
    config = configs[0]
    if any(other != config for other in configs[1:]):
        yield "config.json: holds two different quantization configs, at the top and nested; loaders take the first"
    if not packed and not refused:
        yield "config.json: announces a quantization, every weight is dense; remove quantization_config"
    if not packed:
        return
    if broken := [e for e in entries(config) if e.startswith("re:") and compiled(e) is None]:
        yield f"config.json: ignore holds patterns that are no regular expressions: {shown(broken)}"
    is_ignored = ignored_by(config)
    covered = [w.module for w in packed if is_ignored(w.module)]
    if covered:
        by = covering(config, covered[0])
        yield f"config.json: the entry {by!r} of ignore covers modules that are stored packed: {shown(covered)}"
    if unnamed := [w.module for w in packed if not expects_packed(config, w.module)]:
        yield f"config.json: stored packed and in no group, so loaders expect them dense: {shown(unnamed)}"
    dense = [
        w.module for w in weights
        if w.decoder is None and len(w.shape) == 2 and w.name.endswith(".weight") and w.dtype in FLOAT_DTYPES
        and not never_packed(config, w.module, model_type(checkpoint.config))
    ]  # fmt: skip
    if open_ones := [m for m in dense if not is_ignored(m) and expects_packed(config, m)]:
        yield f"config.json: stored dense and not in ignore, so loaders expect them packed: {shown(open_ones)}"
    yield from _fused_problems(packed, dense)
    if config.get("quant_method") == "compressed-tensors":
        yield from renamed_problems(config, [*dense, *(w.module for w in packed)])
    sound = [w for w in packed if w.module not in refused]
    yield from _layout_problems(checkpoint, config, sound)
    yield from claim_problems(config, sound)
    yield from _activation_problems(config, packed, runtime_scales)


def config_notes(checkpoint: Checkpoint, weights: Sequence[Weight]) -> Iterator[str]:
    """Names in the ignore list that mean nothing here: a slip of the pen, or left over from another model."""
    modules = {weight.module for weight in weights}
    known = modules | {key for module in modules if (key := unit_of(module)) is not None}
    for module in modules:
        known.update(module[: dot.start()] for dot in re.finditer(r"\.", module))
    for config in quantization_configs(checkpoint.config)[:1]:
        plain = [e for e in entries(config) if "." in e and not e.startswith("re:") and not set("*?[") & set(e)]
        if idle := [e for e in plain if e not in known]:
            yield f"names in ignore that are not stored: {shown(idle)}"


def _fused_problems(packed: Sequence[Weight], dense: Sequence[str]) -> Iterator[str]:
    """Layers that engines fuse, and the experts of a layer, must be stored alike."""
    schemes = {w.module: w.decoder.scheme for w in packed if w.decoder is not None} | dict.fromkeys(dense, "dense")
    fused = dict(units(schemes))
    for module in schemes:
        if match := EXPERT.match(module):
            fused[match["bank"]] = (*fused.get(match["bank"], ()), module)
    for key, members in fused.items():
        found = {schemes[m]: m for m in reversed(members)}
        if len(found) > 1:
            listed = ", ".join(f"{module} is {scheme}" for scheme, module in found.items())
            yield f"{key}: engines fuse its members, so all must be stored alike; {listed}"


def _layout_problems(checkpoint: Checkpoint, config: Mapping[str, Any], packed: Sequence[Weight]) -> Iterator[str]:
    method = config.get("quant_method")
    for weight in packed:
        layout = weight.decoder.layout if weight.decoder is not None else ""
        if layout in ("compressed-tensors", "modelopt") and layout != method:
            yield f"{weight.name}: stored in the layout {layout}, config.json says {method!r}"
            break
    has_file = "hf_quant_config.json" in checkpoint.files
    if method == "compressed-tensors" and has_file:
        yield "hf_quant_config.json: left over from another quantization, config.json says compressed-tensors"
    if method == "modelopt" and not has_file:
        yield "hf_quant_config.json: missing; TensorRT-LLM reads it and not config.json"


def _activation_problems(
    config: Mapping[str, Any], packed: Sequence[Weight], runtime_scales: Sequence[str]
) -> Iterator[str]:
    have = {name.rpartition(".")[0] for name in runtime_scales if "input" in name.rpartition(".")[2]}
    needed = {w.module for w in packed if needs_input_scale(config, w.module)}
    if missing := [w.module for w in packed if w.module in needed - have]:
        yield f"input scales are announced and missing, vLLM would serve garbage: {shown(missing)}"
    if spare := [w.module for w in packed if w.module in have - needed]:
        yield f"input scales are stored, and the config does not announce any for them: {shown(spare)}"
