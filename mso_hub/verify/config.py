"""Does the announced quantization agree with what is stored? The rules are those of vLLM's loaders."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from mso_hub.checkpoint import Checkpoint
from mso_hub.formats.detect import quantization_configs
from mso_hub.formats.weight import FLOAT_DTYPES, Weight
from mso_hub.plan.recipe import DEFAULT_IGNORE
from mso_hub.verify.announced import compiled, entries, expects_packed, ignored_by, needs_input_scale
from mso_hub.verify.claims import claim_problems, shown


def config_problems(
    checkpoint: Checkpoint, weights: Sequence[Weight], runtime_scales: Sequence[str], refused: Collection[str] = ()
) -> Iterator[str]:
    """Sentences for every contradiction between config.json and the stored tensors.

    runtime_scales  names of stored activation scales
    refused         modules of which it is known already that they are not what the config says
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
    if not packed and not refused:
        yield "config.json: announces a quantization, every weight is dense; remove quantization_config"
    if not packed:
        return
    if broken := [e for e in entries(config) if e.startswith("re:") and compiled(e) is None]:
        yield f"config.json: ignore holds patterns that are no regular expressions: {shown(broken)}"
    is_ignored = ignored_by(config)
    covered = [w.module for w in packed if is_ignored(w.module)]
    if covered:
        yield f"config.json: ignore covers modules that are stored packed: {shown(covered)}"
    if unnamed := [w.module for w in packed if not expects_packed(config, w.module)]:
        yield f"config.json: stored packed and in no group, so loaders expect them dense: {shown(unnamed)}"
    linear = [w for w in weights if w.decoder is None and len(w.shape) == 2 and w.name.endswith(".weight")]
    modules = [w.module for w in linear if w.dtype in FLOAT_DTYPES]
    open_ones = [
        m for m in modules
        if not (DEFAULT_IGNORE["embedding"].search(m) or is_ignored(m)) and expects_packed(config, m)
    ]  # fmt: skip
    if open_ones:
        yield f"config.json: stored dense and not in ignore, so loaders expect them packed: {shown(open_ones)}"
    sound = [w for w in packed if w.module not in refused]
    yield from _layout_problems(checkpoint, config, sound)
    yield from claim_problems(config, sound)
    yield from _activation_problems(config, packed, runtime_scales)


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
