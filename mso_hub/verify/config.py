"""Does the announced quantization agree with what is stored? The rules are those of vLLM's loaders."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from mso_hub.checkpoint import Checkpoint
from mso_hub.formats.decoders.nvfp4 import Nvfp4Decoder
from mso_hub.formats.detect import quantization_configs
from mso_hub.formats.weight import FLOAT_DTYPES, Weight
from mso_hub.plan.recipe import DEFAULT_IGNORE

SHOWN = 3


def _entries(config: Mapping[str, Any]) -> list[str]:
    ignore = config.get("ignore")
    return [e for e in ignore if isinstance(e, str)] if isinstance(ignore, list) else []


def _compiled(entry: str) -> re.Pattern[str] | None:
    """A `re:` entry, None when it is not a regular expression."""
    try:
        return re.compile(entry.removeprefix("re:"))
    except (re.error, OverflowError, RecursionError):
        return None


def ignored_by(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Does the ignore list of a quantization_config cover a module, as vLLM decides it?

    compressed-tensors entries match exactly or as `re:` patterns, ModelOpt entries as globs and as substrings.
    """
    entries = _entries(config)
    if config.get("quant_method") == "compressed-tensors":
        names = set(entries)
        patterns = [p for p in map(_compiled, (e for e in entries if e.startswith("re:"))) if p is not None]
        return lambda module: module in names or any(p.match(module) for p in patterns)
    globs = [e for e in entries if any(c in e for c in "*?[")]
    return lambda module: any(e in module for e in entries) or any(fnmatchcase(module, e) for e in globs)


def _shown(modules: Sequence[str]) -> str:
    more = f" and {len(modules) - SHOWN} more" if len(modules) > SHOWN else ""
    return ", ".join(modules[:SHOWN]) + more


def _has_activations(config: Mapping[str, Any]) -> bool:
    groups = config.get("config_groups")
    return isinstance(groups, dict) and any(g.get("input_activations") for g in groups.values() if isinstance(g, dict))


def config_problems(checkpoint: Checkpoint, weights: Sequence[Weight], runtime_scales: Sequence[str]) -> Iterator[str]:
    """Sentences for every contradiction between config.json and the stored tensors.

    runtime_scales  names of stored activation scales
    """
    configs = quantization_configs(checkpoint.config)
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
    if not packed:
        yield "config.json: announces a quantization, every weight is dense; remove quantization_config"
        return
    if broken := [e for e in _entries(config) if e.startswith("re:") and _compiled(e) is None]:
        yield f"config.json: ignore holds patterns that are no regular expressions: {_shown(broken)}"
    is_ignored = ignored_by(config)
    covered = [w.module for w in packed if is_ignored(w.module)]
    if covered:
        yield f"config.json: ignore covers modules that are stored packed: {_shown(covered)}"
    linear = [w for w in weights if w.decoder is None and len(w.shape) == 2 and w.name.endswith(".weight")]
    modules = [w.module for w in linear if w.dtype in FLOAT_DTYPES]
    open_ones = [m for m in modules if not (DEFAULT_IGNORE["embedding"].search(m) or is_ignored(m))]
    if open_ones:
        yield f"config.json: stored dense and not in ignore, so loaders expect them packed: {_shown(open_ones)}"
    yield from _layout_problems(checkpoint, config, packed)
    yield from _activation_problems(config, packed, runtime_scales)


def _layout_problems(checkpoint: Checkpoint, config: Mapping[str, Any], packed: Sequence[Weight]) -> Iterator[str]:
    method = config.get("quant_method")
    for weight in packed:
        if isinstance(weight.decoder, Nvfp4Decoder) and weight.decoder.layout != method:
            yield f"{weight.name}: stored in the layout {weight.decoder.layout}, config.json says {method!r}"
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
    fp4 = [w.module for w in packed if isinstance(w.decoder, Nvfp4Decoder)]
    if _has_activations(config):
        missing = [m for m in fp4 if m not in have]
        if missing:
            yield f"input scales are announced and missing, vLLM would serve garbage: {_shown(missing)}"
    elif spare := [m for m in fp4 if m in have]:
        yield f"weight-only is announced, input scales are stored all the same: {_shown(spare)}"
