"""Every way in which the package can store a checkpoint, derived from its table of formats and its presets.

A new format, layout, width of activations, group size or preset appears here by itself. The scale search is left
out: it changes numbers, never names or shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from mso_hub import Recipe, read_recipe
from mso_hub.errors import RecipeError
from mso_hub.formats import FORMATS
from mso_hub.formats.scheme import Choices
from mso_hub.plan.presets import preset_names


@dataclass(frozen=True, slots=True)
class Variant:
    """A name for reports, and what to ask the engine for.

    family  format, layout and bits of activations, or the kind of recipe: of each family one variant goes through
            the slow tests
    """

    name: str
    recipe: Recipe
    family: str


def _asked(name: str, choices: Choices) -> Iterator[tuple[str, dict[str, object]]]:
    """(name, settings) for every combination that the choices of a format name."""
    for layout in choices.loaders:
        symmetries = (True, False) if choices.asymmetric else (None,)
        for bits, group, symmetric in product(choices.activations[layout], choices.group_sizes or (None,), symmetries):
            words = [name, layout, f"a{bits}"]
            words += [] if group is None else [f"g{group}" if group else "rows"]
            words += ["asymmetric"] if symmetric is False else []
            settings = {"scheme": name, "layout": layout, "activations": bits, "group_size": group}
            yield " ".join(words), {**settings, "symmetric": symmetric, "mode": "all-linear"}


def _formats() -> tuple[list[Variant], dict[str, str]]:
    """Every combination that a recipe can ask for, with a static activation scale where it takes one; the refused."""
    found: list[Variant] = []
    refused: dict[str, str] = {}
    for name, entry in FORMATS.items():
        for label, settings in _asked(name, entry.choices):
            family = f"{name} {settings['layout']} a{settings['activations']}"
            try:
                found.append(Variant(label, Recipe(**settings), family))  # type: ignore[arg-type]
            except RecipeError as error:
                refused[label] = str(error)
            try:
                recipe = Recipe(**settings, input_scale=1.0)  # type: ignore[arg-type]
            except RecipeError:
                continue  # most formats have no such scale
            found.append(Variant(f"{label} static", recipe, family))
    return found, refused


def _with_kv_cache() -> Iterator[Variant]:
    """An FP8 KV cache in both layouts that have a word for it, announced and with scales of its own."""
    for layout, name in product(("compressed-tensors", "modelopt"), ("nvfp4", "fp8_dynamic")):
        recipe = Recipe(scheme=name, layout=layout, mode="all-linear", kv_cache=True)
        yield Variant(f"{name} {layout} kv", recipe, f"kv {layout}")


def _presets() -> tuple[list[Variant], dict[str, str]]:
    """The presets that do not treat all linear layers alike, in both layouts; the refused.

    Rules for some decoder layers are moved to the first: the models here have two.
    """
    found: list[Variant] = []
    refused: dict[str, str] = {}
    for name, layout in product(preset_names(), ("compressed-tensors", "modelopt")):
        label = f"{name} {layout}"
        try:
            recipe = read_recipe(name, layout=layout)
        except RecipeError as error:
            refused[label] = str(error)
            continue
        if len(recipe.rules) > 1 or recipe.rules[0].mode != "all-linear":
            rules = tuple(replace(rule, layers=(0,)) if rule.layers else rule for rule in recipe.rules)
            kind = "mixed" if len({rule.scheme.format for rule in rules}) > 1 else "partial"
            found.append(Variant(label, replace(recipe, rules=rules), f"{kind} {layout}"))
    return found, refused


_FORMATS, _NO_FORMATS = _formats()
_PRESETS, _NO_PRESETS = _presets()
VARIANTS: tuple[Variant, ...] = (*_FORMATS, *_with_kv_cache(), *_PRESETS)
UNASKABLE: dict[str, str] = _NO_FORMATS | _NO_PRESETS
"""What no recipe can ask for -> the error."""

EXPERTS = ("qwen3_moe", "mixtral", "deepseek_v3", "trained")
"""Models of the tests that have experts."""

REFUSED_BY_PLAN: dict[str, tuple[tuple[str, ...], str]] = {
    "fp8_dynamic modelopt a8": (EXPERTS, "no engine loads fp8_dynamic experts"),
    "fp8_dynamic modelopt kv": (EXPERTS, "no engine loads fp8_dynamic experts"),
    "fp8_block modelopt a8": (EXPERTS, "no engine loads fp8_block experts"),
    "nvfp4_edge_layers_fp8 modelopt": (("qwen3_moe", "mixtral", "trained"), "no engine loads fp8_dynamic experts"),
    **{
        f"{name} {layout}": (("llama",), "matches no weight|covers a weight")
        for name in (
            "mxfp8_nvfp4_experts", "nvfp4_experts_fp8_block_attention", "nvfp4_experts_fp8_rest",
            "nvfp4_experts_only", "w4a16_g32_experts",
        )
        for layout in ("compressed-tensors", "modelopt")
    },
}  # fmt: skip
"""Variant -> models that the planner refuses it for, before a byte is written, and words of the error."""


def refusal(model: str, variant: Variant) -> str | None:
    """Words of the error with which the planner refuses a variant for a model; None where it takes it."""
    models, reason = REFUSED_BY_PLAN.get(variant.name, ((), ""))
    return reason if model in models else None


def first_of_each_family(model: str) -> list[Variant]:
    """Of each format and layout, KV cache and mixed recipe the first variant that the planner takes for a model."""
    found: dict[str, Variant] = {}
    for variant in VARIANTS:
        if refusal(model, variant) is None:
            found.setdefault(variant.family, variant)
    return list(found.values())
