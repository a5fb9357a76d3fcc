"""Formats of modules -> `quantization_config`: exact groups of modules, named as shortly as loaders allow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from mso_hub.formats import Format
from mso_hub.formats.dialects import compressed_tensors, deepseek, modelopt
from mso_hub.formats.weight import Weight
from mso_hub.plan.fusion import unit_of
from mso_hub.plan.recipe import Recipe
from mso_hub.plan.select import EXPERT, HEAD, LINEAR, is_linear

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""What vLLM's compressed-tensors MoE method calls the projections of an expert."""


def linear_modules(kept: Mapping[str, tuple[Weight, str]]) -> list[str]:
    """Modules that stay and that a loader may ask the config for."""
    return [module for module, (weight, _) in kept.items() if is_linear(weight)]


def announce(
    config: Mapping[str, Any], recipe: Recipe, formats: Mapping[str, Format], kept: Sequence[str], ignore: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """config.json with its `quantization_config`, and the layout's own JSON files.

    kept  linear modules that stay: no pattern may cover them
    """
    by_name: dict[str, tuple[Format, list[str]]] = {}
    for module, form in formats.items():
        key = form.algo if recipe.layout == "modelopt" else repr(form.group)
        by_name.setdefault(key, (form, []))[1].append(module)
    groups = list(by_name.values())
    files: dict[str, dict[str, Any]] = {}
    if recipe.layout == "modelopt":
        named = [(form.algo, _with_aliases(modules)) for form, modules in groups]
        said = modelopt.config(named, ignore, kv_cache=recipe.kv_cache)
        files[modelopt.QUANT_CONFIG_FILE] = modelopt.file(named, ignore, kv_cache=recipe.kv_cache)
    elif recipe.layout == "deepseek":
        said = deepseek.config(ignore)
    else:
        if len(groups) == 1:
            targets = [[LINEAR, *_heads(formats)]]
        else:
            targets = group_targets([modules for _, modules in groups], kept)
        pairs = [(form.group, names) for (form, _), names in zip(groups, targets, strict=True)]
        said = compressed_tensors.config(pairs, ignore, kv_cache=recipe.kv_cache)
    return {"config.json": {**config, "quantization_config": said}, **files}


def _heads(modules: Iterable[str]) -> list[str]:
    """Patterns for output heads: vLLM's are of a class of their own, which `Linear` does not mean."""
    return [_pattern(module, layers=None) for module in modules if HEAD.search(module)]


def _with_aliases(modules: Iterable[str]) -> list[str]:
    """Modules and the container of their experts, under which vLLM asks ModelOpt's config for them."""
    names = dict.fromkeys(modules)
    return [*names, *dict.fromkeys(match["bank"] for match in map(EXPERT.match, names) if match)]


def group_targets(groups: Sequence[Sequence[str]], kept: Sequence[str]) -> list[list[str]]:
    """Targets of several config groups: one pattern for a kind of module where it is exact, else names.

    A pattern begins at the first component that all engines have in common (`layers.`), because engines put their own
    prefixes before it and cannot rewrite patterns. The fused module that an engine makes of several is named too.

    kept  modules that no pattern may cover
    """
    known = {module: at for at, modules in enumerate(groups) for module in modules} | dict.fromkeys(kept, -1)
    targets: list[list[str]] = []
    for at, modules in enumerate(groups):
        others = {module for module, group in known.items() if group != at}
        kinds: dict[str, list[str]] = {}
        for module in modules:
            kinds.setdefault(_pattern(module, layers=None), []).append(module)
        named: list[str] = []
        for pattern, members in kinds.items():
            named += _exact(pattern, members, others)
        aliases = dict.fromkeys(alias for name in named for alias in _aliases(name) if not _covers(alias, others))
        targets.append([*named, *(alias for alias in aliases if alias not in named)])
    return targets


def _aliases(target: str) -> Iterator[str]:
    """Other names under which engines ask for the modules of a target.

    That is the fused module, and for experts the projections as vLLM calls them in models that call them otherwise.
    """
    dot, end = (r"\.", "$") if target.startswith("re:") else (".", "")
    parent, found, leaf = target.removesuffix(end).rpartition(dot)
    fused = unit_of(leaf)
    if found and fused is not None:
        yield f"{parent}{dot}{fused}{end}"
    if parent.rpartition(dot)[0].endswith("experts"):
        yield from (f"{parent}{dot}{projection}{end}" for projection in PROJECTIONS)


def _covers(target: str, modules: AbstractSet[str]) -> bool:
    """Does a name or a pattern match any of the modules, as loaders match it?"""
    if not target.startswith("re:"):
        return target in modules
    compiled = re.compile(target[3:])
    return any(compiled.match(module) for module in modules)


def _pattern(module: str, layers: Sequence[str] | None) -> str:
    """`re:` pattern of a module's kind: numbers become \\d+, or the first one a choice of `layers`."""
    parts = module.split(".")
    if "layers" in parts:
        parts = parts[parts.index("layers") :]
    words: list[str] = []
    for part in parts:
        if not part.isdigit():
            words.append(re.escape(part))
        elif layers is not None:
            words.append("(" + "|".join(layers) + ")")
            layers = None
        else:
            words.append(r"\d+")
    return r"re:(.*\.)?" + r"\.".join(words) + "$"


def _exact(pattern: str, members: Sequence[str], others: AbstractSet[str]) -> list[str]:
    """The pattern where it covers none of the others; with the members' layer numbers; else every name."""
    layer = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")
    found = [match[1] for match in map(layer.search, members) if match]
    numbers = sorted(dict.fromkeys(found), key=int)
    for candidate in (pattern, _pattern(members[0], numbers)) if len(found) == len(members) else (pattern,):
        if not _covers(candidate, others):
            return [candidate]
    return list(members)
