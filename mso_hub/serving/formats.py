"""What vLLM sees in a checkpoint: formats by the names of the tables in `kernels`, and what it loads on no GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mso_hub.formats.decoders.announced import announced
from mso_hub.formats.decoders.packed_int import PackedInt
from mso_hub.formats.dialects import compressed_tensors, modelopt
from mso_hub.formats.weight import Weight
from mso_hub.plan.select import EXPERT

BLOCKED_EXPERTS = "vLLM has no kernel for experts in ModelOpt's {}; write them with the layout compressed-tensors"
READ = frozenset({"FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8"})
"""Algorithms of ModelOpt that vLLM 0.32 and 0.33 read: LINEAR_ALGOS of its modelopt.py."""
INSTEAD = {"int4": "w4a16", "int8": "int8 or w8a16", "mxfp4": "mxfp4", "nvfp4": "nvfp4", "fp8": "fp8_dynamic"}
"""Scheme of a decoder -> what to write with the layout compressed-tensors."""


@dataclass(frozen=True, slots=True)
class Found:
    """Packed weights that vLLM treats alike.

    form     name in the tables of `kernels`
    layout   compressed-tensors, modelopt, deepseek, gpt_oss, awq or gptq
    experts  of a mixture; else linear layers
    count    of weights
    nbytes   of all their tensors
    example  one of the modules
    refused  why vLLM loads it on no GPU, with the way out; "" when it does
    """

    form: str
    layout: str
    experts: bool
    count: int
    nbytes: int
    example: str
    refused: str = ""


def formats_of(weights: Iterable[Weight], configs: Sequence[Mapping[str, Any]]) -> tuple[Found, ...]:
    """The packed ones among the weights, by format, layout and use; most bytes first.

    configs  as `quantization_configs` finds them
    """
    grouped: dict[tuple[str, str, bool, str], list[Weight]] = {}
    for weight in weights:
        if weight.decoder is None:
            continue
        experts = EXPERT.match(weight.module) is not None or len(weight.shape) == 3 or ".experts." in weight.module
        form, refused = form_of(weight, configs, experts=experts)
        grouped.setdefault((form, weight.decoder.layout, experts, refused), []).append(weight)
    found = [
        Found(form, layout, experts, len(members), sum(map(stored_bytes, members)), members[0].module, refused)
        for (form, layout, experts, refused), members in grouped.items()
    ]
    return tuple(sorted(found, key=lambda f: -f.nbytes))


def stored_bytes(weight: Weight) -> int:
    """Bytes of all tensors that make a weight."""
    return sum(part.nbytes for part in weight.parts.values())


def form_of(weight: Weight, configs: Sequence[Mapping[str, Any]], *, experts: bool) -> tuple[str, str]:
    """Name in the tables of `kernels`, and why vLLM refuses it everywhere ("" when it does not)."""
    if weight.decoder is None:
        raise ValueError(f"{weight.name}: must be packed, is {weight.dtype}")
    scheme, layout = weight.decoder.scheme, weight.decoder.layout
    said = announced(configs, weight.module)
    if layout == "modelopt":
        return _of_modelopt(scheme, said.config, weight.module, experts=experts)
    inputs = _activations(said.config, weight.module) if layout == "compressed-tensors" else {}
    if scheme in ("nvfp4", "mxfp4", "mxfp8"):
        if layout == "compressed-tensors":
            return scheme if inputs else f"{scheme}a16", ""
        return "gpt_oss" if layout == "gpt_oss" else f"{scheme} of {layout}", ""
    if scheme == "fp8":
        return _of_fp8(weight, said.strategy, inputs, layout), ""
    if isinstance(weight.decoder, PackedInt) or layout in ("awq", "gptq"):
        if inputs:
            return ("w4a8_fp8" if inputs.get("type") == "float" else f"{scheme} with INT8 activations"), ""
        return {4: "w4a16", 8: "w8a16"}.get(weight.decoder.bits, scheme), ""
    return scheme, ""


def _of_fp8(weight: Weight, strategy: str, inputs: Mapping[str, Any], layout: str) -> str:
    """FP8 by what one scale covers and whether activations have scales of their own in the checkpoint."""
    scale = weight.parts.get("scale")
    many = scale is not None and max(scale.shape, default=1) > 1
    if strategy == "block" or layout == "deepseek":
        return "fp8_block" if many or strategy == "block" else "fp8"
    if layout == "compressed-tensors" and not inputs:
        return "fp8a16"
    return "fp8_dynamic" if many or strategy == "channel" else "fp8"


def _of_modelopt(scheme: str, config: Mapping[str, Any], module: str, *, experts: bool) -> tuple[str, str]:
    """ModelOpt's formats by their quant_algo."""
    algo = modelopt.algorithm(config, module) or ""
    if algo not in READ:
        instead = f"; use {INSTEAD[scheme]} with the layout compressed-tensors" if scheme in INSTEAD else ""
        return scheme, f"vLLM does not read ModelOpt's {algo or scheme}{instead}"
    groups = config.get("config_groups")
    listed = [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    if algo == "W4A16_NVFP4" or (algo == "NVFP4" and listed and not any(g.get("input_activations") for g in listed)):
        return "nvfp4a16", ""
    if scheme == "fp8":
        form = {"FP8_PB_WO": "fp8_block", "FP8_PER_CHANNEL_PER_TOKEN": "fp8_dynamic"}.get(algo, "fp8")
        mixed = isinstance(config.get("quantized_layers"), dict)
        blocked = experts and form != "fp8" and not (mixed and form == "fp8_block")
        return form, BLOCKED_EXPERTS.format(algo) if blocked else ""
    return scheme, ""


def _activations(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """`input_activations` of the config group of a module; empty for 16 bits."""
    group = compressed_tensors.group_of(config, module) or {}
    inputs = group.get("input_activations")
    return inputs if isinstance(inputs, dict) else {}
