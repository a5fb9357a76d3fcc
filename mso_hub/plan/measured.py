"""Recipes whose activation scales are measured: which of their rules take some, and how these get in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mso_hub.errors import RecipeError
from mso_hub.formats import ALIASES, IMPORTED, Scheme
from mso_hub.plan.calibration import Calibration
from mso_hub.plan.experts import FUSED_EXPERTS
from mso_hub.plan.recipe import Recipe, Rule
from mso_hub.plan.select import EXPERT

STAND_IN = 1.0
"""Activation scale of a recipe that waits for its statistics: what is planned is the same, but for this number."""


def takes_scale(rule: Rule) -> bool:
    """Can the activations of a rule have a static scale? NVFP4 in a rule that says nothing of them keeps them."""
    scheme = rule.scheme
    return scheme.format == "fp8" or (
        scheme.format == "nvfp4" and (scheme.activations == 4 or scheme.input_scale is not None)
    )


def plain_takes_scale(scheme: Scheme) -> bool:
    """The same for settings without rules, where asking for statistics means W4A4 unless they say otherwise."""
    scheme = ALIASES.get(scheme.format, scheme)
    return scheme.format == "fp8" or (scheme.format == "nvfp4" and scheme.activations in (None, 4))


def waiting(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Rules with STAND_IN in every one that takes an activation scale."""
    return tuple(
        replace(rule, scheme=replace(rule.scheme, input_scale=STAND_IN)) if takes_scale(rule) else rule
        for rule in rules
    )


def require_taker(recipe: Recipe, option: str) -> None:
    """RecipeError for a recipe that waits for statistics and has no use for any."""
    if not recipe.kv_cache and all(rule.scheme.input_scale is None for rule in recipe.all_rules):
        raise RecipeError(
            f"{option}: {recipe.label} has no static activation scale, and no FP8 KV cache is announced, so statistics "
            "would have no effect; take nvfp4 (W4A4), fp8 or --kv_cache fp8, or leave it out"
        )


def with_measured(
    recipe: Recipe, amax: Mapping[str, float], kv: Mapping[str, tuple[float, float]], calibration: Calibration
) -> Recipe:
    """The recipe with measured activation scales in place of its numbers.

    amax  on-disk module -> largest magnitude of its input, > 0, without headroom
    kv    attention module -> scales of keys and values, multipliers: amax / 448; used where the KV cache is announced
    Raises RecipeError where the recipe has no use for them.
    """
    require_taker(recipe, "statistics")
    rules = tuple(
        rule if rule.scheme.input_scale is None else replace(rule, scheme=replace(rule.scheme, input_scale=IMPORTED))
        for rule in recipe.rules
    )
    takes = any(rule.scheme.input_scale is not None for rule in recipe.all_rules)
    if not takes and not kv:
        raise RecipeError(
            f"kv_cache: the statistics of {calibration.source or calibration.text} hold nothing for a k_proj; give "
            "--kv_scales WHERE, or leave the statistics out: engines take 1.0 then"
        )
    return replace(
        recipe,
        rules=rules,
        input_scale=IMPORTED if takes and not rules else None,
        input_amax=dict(amax) if takes else {},
        kv_scales=dict(kv) if recipe.kv_cache else {},
        calibration=calibration,
    )


def under_new_names(recipe: Recipe, names: Mapping[str, str]) -> Recipe:
    """The recipe with its activation scales under the names of the output, where these differ from the source's.

    names  weight as the source calls it -> weight in the output; scales under other names stay as they are
    """
    if not (recipe.input_amax or recipe.kv_scales):
        return recipe
    renamed: dict[str, str] = {}
    for old, new in names.items():
        fused = FUSED_EXPERTS.match(old), FUSED_EXPERTS.match(new)
        if fused[0] and fused[1]:
            renamed[fused[0]["bank"]] = fused[1]["bank"]
        before, after = old.removesuffix(".weight"), new.removesuffix(".weight")
        renamed |= {before: after, before.rpartition(".")[0]: after.rpartition(".")[0]}

    def rename(module: str) -> str:
        """An expert of a bank that is one tensor has the bank's new name."""
        expert = EXPERT.match(module)
        if module in renamed or not (expert and expert["bank"] in renamed):
            return renamed.get(module, module)
        return renamed[expert["bank"]] + module[expert.end("bank") :]

    made = recipe.calibration
    if made is not None:
        unseen, zeros, silent = (tuple(map(rename, names)) for names in (made.unseen, made.zeros, made.silent))
        made = replace(made, unseen=unseen, zeros=zeros, silent=silent)
    return replace(
        recipe,
        input_amax={rename(module): value for module, value in recipe.input_amax.items()},
        kv_scales={rename(module): value for module, value in recipe.kv_scales.items()},
        calibration=made,
    )
