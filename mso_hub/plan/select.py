"""Which weights change and which stay, each with its reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mso_hub.errors import PlanError
from mso_hub.formats.weight import FLOAT_DTYPES, Weight
from mso_hub.plan.experts import is_fused_experts, split_experts
from mso_hub.plan.fusion import units
from mso_hub.plan.recipe import DEFAULT_IGNORE, Patterns, Recipe, default_reason, is_mlp

DECODER_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
CONV1D = frozenset(["gpt2", "openai-gpt", "imagegpt", "decision_transformer"])
"""Model types whose linear layers are stored [in, out]: groups along the last dimension would be the wrong ones."""
EMBEDDING = DEFAULT_IGNORE["embedding"]
LINEAR = "Linear"
"""The target that means every linear layer, as compressed-tensors recipes write it."""
EXPERT = re.compile(r"^(?P<bank>.*\bexperts)\.\d+\.(?P<leaf>\w+)$")


@dataclass(frozen=True, slots=True)
class Selection:
    """What `select` decided.

    chosen    weights to quantize
    kept      weights that stay -> why
    units     unit key -> chosen weights that share a scale; a weight on its own is a unit of one
    unused    imported patterns that matched nothing
    idle      sentences about typed patterns that matched nothing here: a problem when no group has a match
    problems  everything that makes the plan impossible
    """

    chosen: tuple[Weight, ...]
    kept: Mapping[str, tuple[Weight, str]]
    units: Mapping[str, tuple[Weight, ...]]
    unused: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def is_linear(weight: Weight) -> bool:
    """Could a linear layer own this weight?"""
    return is_fused_experts(weight) or (len(weight.shape) >= 2 and weight.name.endswith(".weight"))


def _layers(config: Mapping[str, Any]) -> int | None:
    """Number of decoder layers; MTP layers of DeepSeek and GLM are counted on from there."""
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, dict) else {}):
        if isinstance(part.get("num_hidden_layers"), int):
            return int(part["num_hidden_layers"])
    return None


def _chooser(recipe: Recipe, config: Mapping[str, Any]) -> tuple[Callable[[Weight], str | None], list[Patterns]]:
    """Function from a linear weight to why it stays (None: it is chosen), and the pattern sets that it uses."""
    named = [target for target in recipe.targets if target != LINEAR]
    ignore, imported, targets = (Patterns(p) for p in (recipe.ignore, recipe.imported_ignore, named))
    everything = recipe.mode == "all-linear" or LINEAR in recipe.targets
    layers = _layers(config)

    def reason(weight: Weight) -> str | None:
        """Why the weight stays, None when it is chosen."""
        module = weight.module
        if (pattern := ignore.find(module)) is not None:
            return f"ignore {pattern}"
        if (pattern := imported.find(module)) is not None:
            return f"exclude config {pattern}"
        if not is_linear(weight):
            return "not a linear layer's weight"
        if recipe.default_ignore:
            if (why := default_reason(module)) is not None:
                return why
            layer = DECODER_LAYER.search(module)
            if layer and layers is not None and int(layer[1]) >= layers:
                return "MTP"
        if EMBEDDING.search(module):
            return "embedding"  # a look-up, never a linear layer: no loader takes a packed one
        if recipe.targets and LINEAR not in recipe.targets:
            return None if targets.find(module) else "no target matches"
        if len(weight.shape) != 2 and not is_fused_experts(weight):
            return "not a matrix"
        if not (everything or is_fused_experts(weight) or is_mlp(module)):
            return "outside the MLP (--all_linear takes it)"
        return None

    return reason, [ignore, imported, targets]


def _unused(recipe: Recipe, sets: Sequence[Patterns]) -> tuple[list[str], list[str]]:
    """Sentences about patterns that the user typed in vain, and the imported ones that matched nothing."""
    ignore, imported, targets = sets
    idle = [f"ignore {p!r} matches no weight of this checkpoint; correct it or leave it out" for p in ignore.unused]
    idle += [
        f"targets {p!r} matches no weight that could be quantized (norms and embeddings never, heads and others only "
        "with --no_default_ignore); correct it or leave it out"
        for p in targets.unused
    ]
    if recipe.imported_ignore and len(imported.unused) == len(set(recipe.imported_ignore)):
        idle.append(
            f"none of the {len(recipe.imported_ignore)} imported exclude patterns matches a weight, the first is "
            f"{recipe.imported_ignore[0]!r}; they belong to another model"
        )
    return idle, imported.unused


def _split_units(chosen: Mapping[str, Weight], kept: Mapping[str, tuple[Weight, str]]) -> list[str]:
    """Units and banks of experts of which only a part is chosen: engines cannot load them."""
    problems = []
    for key, members in units([*chosen, *kept]).items():
        inside, outside = [m for m in members if m in chosen], [m for m in members if m in kept]
        if inside and outside:
            problems.append(
                f"{key}: engines fuse {', '.join(members)}, so all or none can be quantized; "
                f"{outside[0]} stays ({kept[outside[0]][1]}): choose or ignore all of them"
            )
    stay: dict[tuple[str, str], str] = {}
    for module in kept:
        if match := EXPERT.match(module):
            stay.setdefault((match["bank"], match["leaf"]), module)
    for module in chosen:
        match = EXPERT.match(module)
        other = stay.pop((match["bank"], match["leaf"]), None) if match else None
        if match and other:
            problems.append(
                f"{match['bank']}: experts load as one tensor, so all or none can be quantized; {other} stays "
                f"({kept[other][1]}), {module} does not: choose or ignore all of them"
            )
    return problems


def select(
    weights: Sequence[Weight],
    recipe: Recipe,
    config: Mapping[str, Any],
    problem_of: Callable[[tuple[int, ...]], str | None],
) -> Selection:
    """Go through all weights of a group once and decide.

    problem_of  why the format cannot store a shape, or None
    """
    reason_of, sets = _chooser(recipe, config)
    chosen: dict[str, Weight] = {}
    kept: dict[str, tuple[Weight, str]] = {}
    problems: list[str] = []
    modules: list[str] = []
    names = {weight.name: None for weight in weights}
    if config.get("model_type") in CONV1D:
        problems.append(
            f"model_type {config['model_type']!r} stores linear layers as [in, out]; it cannot be quantized"
        )
    for weight in weights:
        why = reason_of(weight)
        if why is not None:
            kept[weight.module] = (weight, why)
            modules.append(weight.module)
            continue
        try:
            parts = list(split_experts(weight, config, names)) if is_fused_experts(weight) else [weight]
        except PlanError as error:
            problems.append(str(error))
            continue
        for part in parts:
            problem = problem_of(part.shape)
            if problem is None and part.dtype not in FLOAT_DTYPES:
                problem = f"can only quantize {', '.join(FLOAT_DTYPES)}, got {part.dtype}"
            chosen[part.module] = part
            modules.append(part.module)
            if problem is not None:
                problems.append(f"{weight.name}: {problem}; add it to `ignore`")
                break
    problems += [
        f"{module}: {count} weights have this name; the checkpoint is damaged, remove the stale ones"
        for module, count in Counter(modules).items() if count > 1
    ]  # fmt: skip
    idle, unused = _unused(recipe, sets)
    linear = {name: entry for name, entry in kept.items() if is_linear(entry[0])}
    problems += _split_units(chosen, linear)
    shared = units(chosen)
    together = {module for members in shared.values() for module in members}
    alone = {module: (module,) for module in chosen if module not in together}
    by_unit = {key: tuple(chosen[m] for m in members) for key, members in {**shared, **alone}.items()}
    return Selection(tuple(chosen.values()), kept, by_unit, tuple(unused), tuple(idle), tuple(problems))
