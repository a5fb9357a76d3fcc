"""The JSON of the output: config.json patched as JSON, index, ignore list, and which files come along."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from mso_hub.checkpoint import other_models
from mso_hub.formats.weight import Weight
from mso_hub.plan.fusion import unit_of, units
from mso_hub.plan.select import EXPERT, is_linear

QUANTIZATION_FILES = frozenset(
    [
        "hf_quant_config.json",
        "quant_config.json",
        "quantization_config.json",
        "quantize_config.json",
        "recipe.yaml",
        "recipe.yml",
        "mso_hub.json",
    ]
)
"""Describe how the source was quantized: false for the output."""
REPO_FILES = frozenset([".gitattributes", ".gitignore"])
"""Settings of one git repo: another repo has its own."""
OTHER_WEIGHTS = re.compile(
    r"(^|/)(pytorch_model|consolidated|model|tf_model|flax_model|rust_model|adapter_model)\S*"
    r"\.(bin|pth?|h5|msgpack|ot|ckpt)(\.index\.json)?$|\.(gguf|onnx|onnx_data|tflite|mlmodel)$"
)
"""The same weights in other containers: they would contradict the output."""
PROCESSOR_FILES = re.compile(r"(^|/)(\w*processor_config|image_processor\w*|video_processor\w*)\.json$")


def carried_files(files: Mapping[str, int], *, text_only: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Files of the source -> (those that come along unchanged, those that stay behind)."""
    carried: list[str] = []
    behind: list[str] = []
    apart = other_models(files)
    for name in files:
        if name == "config.json":
            continue
        if name.startswith(apart):
            carried.append(name)
            continue
        stale = PurePosixPath(name).name in QUANTIZATION_FILES or name in REPO_FILES or OTHER_WEIGHTS.search(name)
        (behind if stale or (text_only and PROCESSOR_FILES.search(name)) else carried).append(name)
    return tuple(carried), tuple(behind)


def ignore_list(kept: Mapping[str, tuple[Weight, str]], chosen: Iterable[str]) -> list[str]:
    """Exact names of every linear module that stays, plus the names under which engines ask for them.

    Those are the fused module, also where members are missing (shared keys and values: vLLM finds no `k_proj` in
    the list then), the experts' container and the projections of its first expert as compressed-tensors' MoE method
    asks for them whatever the model calls them, and `lm_head` even where it is tied to the embedding and not stored.
    """
    names = {module for module, (weight, _) in kept.items() if is_linear(weight)}
    aliases = {*units(sorted(names)), *filter(None, map(unit_of, names))}
    banks = {match["bank"] for match in map(EXPERT.match, names) if match}
    banks |= {module.rpartition(".")[0] for module in names if module.rpartition(".")[0].endswith(".experts")}
    aliases |= banks | {f"{bank}.0.{leaf}" for bank in banks for leaf in ("gate_proj", "up_proj", "down_proj")}
    if not any(module.endswith("lm_head") for module in chosen):
        names.add("lm_head")
    return sorted(names | aliases)


def substring_problem(ignore: Iterable[str], chosen: Iterable[str]) -> str | None:
    """vLLM matches ModelOpt ignore lists as substrings: a sentence about one that covers a quantized module."""
    chosen = list(chosen)
    everything = "\n".join([*chosen, *units(chosen)])
    ignored = set(ignore)
    # A name below another ignored name is a part of nothing that the shorter one is not a part of.
    for name in (n for n in ignored if not any(n[:at] in ignored for at, c in enumerate(n) if c == ".")):
        if name in everything:
            hit = next(m for m in everything.split("\n") if name in m)
            return (
                f"{name}: stays unquantized, but vLLM's ModelOpt loader would match it as a part of {hit!r}, which "
                "is quantized; use the compressed-tensors layout"
            )
    return None
