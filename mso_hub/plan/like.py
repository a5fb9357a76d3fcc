"""`--like`: the quantization config of a published model -> a Recipe that does the same to another checkpoint.

    ModelOpt            quant_algo for all, or quantized_layers (MIXED_PRECISION); exclude_modules or ignore
    compressed-tensors  config_groups, each for the modules that its targets name; ignore
    DeepSeek's fp8      blocks of 128 x 128; modules_to_not_convert

A scheme is found by comparing what the config says with what our own encoders write, so what reads as a scheme here
is what would be written. What a config cannot tell: how scales were searched for, and the activation scales
themselves. Modules that Recipe.default_ignore leaves alone stay, but for those that the reference names and for an
output head that it quantizes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from mso_hub.errors import RecipeError
from mso_hub.formats import FORMATS, IMPORTED, Format, Scheme, build
from mso_hub.formats.detect import quantization_configs
from mso_hub.formats.dialects.modelopt import MIXED, QUANT_CONFIG_FILE
from mso_hub.plan.fusion import unit_of
from mso_hub.plan.recipe import Patterns, Recipe, Rule
from mso_hub.plan.recipe_file import finish
from mso_hub.plan.reference import config_files, exclude_lists
from mso_hub.plan.select import EXPERT, LINEAR

HEAD = "lm_head"
DEEPSEEK_KEYS = {
    "quant_method", "fmt", "activation_scheme", "weight_block_size", "modules_to_not_convert", "ignored_layers",
}  # fmt: skip
REFUSED = ("sparsity_config", "transform_config")
"""Parts of a compressed-tensors config that change weights in ways that nothing here undoes or does."""


def recipe_like(where: str | Path, **said: Any) -> Recipe:
    """What a reference model's config says, as a recipe.

    where  config.json or hf_quant_config.json, the folder that holds them, or hf://org/name
    said   fields of Recipe that go before it, as in `read_recipe`
    Raises RecipeError for a config without quantization and for what this package cannot write, named.
    """
    for name, content in sorted(config_files(where), key=lambda entry: Path(entry[0]).name == QUANT_CONFIG_FILE):
        for config in _configs(content):
            return finish(name, _fields(name, config, said.get("layout")), said)
    raise RecipeError(f"{where}: needs the config of a quantized model, this one has no quantization_config")


def _configs(content: Any) -> Iterator[Mapping[str, Any]]:
    """The quantization configs of a file, flattened to what config.json has."""
    if not isinstance(content, dict):
        return
    for config in [*quantization_configs(content), content]:
        inner = config.get("quantization")
        if isinstance(inner, dict) and "quant_algo" in inner:
            yield {**inner, "quant_method": "modelopt"}
        elif "quant_method" in config or "quant_algo" in config:
            yield config


def _fields(name: str, config: Mapping[str, Any], layout: str | None) -> dict[str, Any]:
    """Fields of Recipe, with the layout that was asked for or else the reference's own."""
    method = str(config.get("quant_method", "modelopt"))
    ignore = tuple(exclude_lists(config))
    if method.startswith("modelopt"):
        own, rules = "modelopt", _modelopt_rules(name, config, ignore)
    elif method == "compressed-tensors":
        own, rules = method, _group_rules(name, config, ignore)
    elif method == "fp8":
        own, rules = "deepseek", _deepseek_rules(name, config)
    else:
        raise RecipeError(
            f"{name}: quant_method {method!r} cannot be written; modelopt, compressed-tensors and fp8 (blocks of 128 "
            "x 128) can, `mso-hub formats` lists all"
        )
    return {
        "layout": layout or own,
        "rules": tuple(rules),
        "imported_ignore": ignore,
        "kv_cache": _kv_cache(name, config),
    }


def _kv_cache(name: str, config: Mapping[str, Any]) -> bool:
    """Is an FP8 KV cache announced? RecipeError for any other."""
    said = config.get("kv_cache_scheme") or config.get("kv_cache_quant_algo")
    if not said:
        return False
    kind = (said.get("num_bits"), said.get("type", "float")) if isinstance(said, dict) else said
    if kind not in ((8, "float"), "FP8"):
        raise RecipeError(f"{name}: a KV cache as {said!r} cannot be announced, FP8 can; take it out of the config")
    return True


# ------------------------------------------------------------------------------------------------- what can be written


@cache
def _writable(layout: str) -> tuple[tuple[Scheme, Format], ...]:
    """Every scheme of a layout with its encoder, plain ones first; searches apart, which no config tells."""
    found = []
    for name, entry in FORMATS.items():
        choices = entry.choices
        options = product(
            choices.activations.get(layout, ()),
            choices.group_sizes or (None,),
            (True, False) if choices.asymmetric else (None,),
            (None, IMPORTED),
        )
        for activations, group_size, symmetric, scale in options:
            scheme = Scheme(name, activations, group_size, symmetric, None, scale)
            try:
                form = build(scheme, layout)
            except RecipeError:  # this layout needs an activation scale
                continue
            if form is not None and (scale is None or form.static):
                found.append((scheme, form))
    return tuple(found)


def _by_algo(name: str, said: Any, place: str) -> Scheme:
    """ModelOpt's quant_algo -> scheme; its activation scale is still to be given."""
    algo = str(said).upper()
    for scheme, form in _writable("modelopt"):
        if form.algo == algo:
            return scheme
    known = ", ".join(dict.fromkeys(form.algo for _, form in _writable("modelopt")))
    raise RecipeError(f"{name}: {place} {said!r} cannot be written in ModelOpt's layout, {known} can")


def _modelopt_rules(name: str, config: Mapping[str, Any], ignore: Sequence[str]) -> list[Rule]:
    said = str(config.get("quant_algo")).upper()
    layers = config.get("quantized_layers")
    if said != MIXED or not isinstance(layers, dict):
        if said == "NVFP4" and _weight_only(config):
            said = "W4A16_NVFP4"
        return _with_head([Rule(_by_algo(name, said, "quant_algo"), (LINEAR,), optional=True)], ignore)
    modules: dict[Scheme, list[str]] = {}
    for module, entry in layers.items():
        algo = entry.get("quant_algo") if isinstance(entry, dict) else entry
        modules.setdefault(_by_algo(name, algo, f"quantized_layers, {module}: quant_algo"), []).append(module)
    whole = _banks(modules)
    return [
        Rule(scheme, tuple(dict.fromkeys(whole.get(module, module) for module in names)), default_ignore=False,
             optional=True)
        for scheme, names in modules.items()
    ]  # fmt: skip


def _weight_only(config: Mapping[str, Any]) -> bool:
    """NVFP4 without input_activations in any group is W4A16, as vLLM reads it."""
    groups = config.get("config_groups")
    entries = list(groups.values()) if isinstance(groups, dict) else []
    return bool(entries) and all(isinstance(e, dict) and e.get("input_activations") is None for e in entries)


def _banks(modules: Mapping[Scheme, Sequence[str]]) -> dict[str, str]:
    """Expert -> its bank, where all experts of the bank have one scheme: a fused bank has no other name."""
    schemes: dict[str, set[Scheme]] = {}
    members: dict[str, str] = {}
    for scheme, names in modules.items():
        for match in filter(None, map(EXPERT.match, names)):
            members[match[0]] = match["bank"]
            schemes.setdefault(match["bank"], set()).add(scheme)
    return {module: bank for module, bank in members.items() if len(schemes[bank]) == 1}


# ----------------------------------------------------------------------------------------------------- config groups


def _group_rules(name: str, config: Mapping[str, Any], ignore: Sequence[str]) -> list[Rule]:
    for key in REFUSED:
        if isinstance(part := config.get(key), dict) and any(part.values()):
            raise RecipeError(f"{name}: has a {key}, which cannot be done here; take it out, or another reference")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise RecipeError(f"{name}: needs config_groups, has {', '.join(config) or 'nothing'}")
    named: list[Rule] = []
    by_class: list[Rule] = []
    for key, group in groups.items():
        place = f"{name}: config_groups, {key}"
        targets = group.get("targets") if isinstance(group, dict) else None
        if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
            raise RecipeError(f"{place}: needs a list of targets, got {targets!r}")
        scheme = _by_group(place, group, config)
        classes = [t for t in targets if t[:1].isupper() and "." not in t]
        if classes and classes != [LINEAR]:
            raise RecipeError(f"{place}: the target {classes[0]!r} is a class; only {LINEAR} and names can be chosen")
        if names := _without_aliases([t for t in targets if t not in classes]):
            named.append(Rule(scheme, tuple(names), optional=True))
        if classes:
            by_class.append(Rule(scheme, (LINEAR,), optional=True))
    return _with_head([*named, *by_class], ignore)


def _without_aliases(targets: Sequence[str]) -> list[str]:
    """Names and patterns without those of fused modules whose members are there: no checkpoint stores those."""
    fused = {_fused(target) for target in targets}
    return [target for target in targets if target not in fused]


def _fused(target: str) -> str | None:
    """The fused module of a name, or of the last component of a pattern."""
    if not target.startswith("re:"):
        return unit_of(target)
    parent, dot, leaf = target.removesuffix("$").rpartition(r"\.")
    fused = unit_of(leaf)
    return None if fused is None or not dot else f"{parent}{dot}{fused}$"


def _by_group(place: str, group: Mapping[str, Any], config: Mapping[str, Any]) -> Scheme:
    """A config group -> scheme."""
    stored = group.get("format") or config.get("format")
    if (outputs := group.get("output_activations")) is not None:
        raise RecipeError(f"{place}: output_activations {outputs!r} cannot be written; take them out of the config")
    said = (stored, _arguments(group.get("weights")), _arguments(group.get("input_activations")))
    for scheme, form in _writable("compressed-tensors"):
        ours = form.group
        if said == (ours["format"], _arguments(ours["weights"]), _arguments(ours["input_activations"])):
            return scheme
    weights, inputs = (_in_words(group.get(key)) for key in ("weights", "input_activations"))
    raise RecipeError(
        f"{place}: weights {weights}, activations {inputs}, stored as {stored!r}: cannot be written; `mso-hub formats` "
        "lists what can"
    )


def _arguments(said: Any) -> tuple[Any, ...] | None:
    """QuantizationArgs as far as they change what is stored or computed; None for none."""
    if not isinstance(said, dict):
        return None
    size = said.get("group_size")
    size = None if size in (None, -1) else size
    strategy = said.get("strategy") or ("group" if size else "channel" if said.get("group_size") == -1 else "tensor")
    block = said.get("block_structure")
    if isinstance(block, str):
        block = [int(side) for side in re.findall(r"\d+", block)]
    return (
        said.get("num_bits", 8), said.get("type", "int"), said.get("symmetric", True), strategy, size,
        tuple(block) if isinstance(block, list) else block, said.get("dynamic", False),
        said.get("actorder") in ("group", True),
    )  # fmt: skip


def _in_words(said: Any) -> str:
    """`8 bit float, channel`; `none`."""
    if not isinstance(said, dict):
        return "none"
    details = [f"{key} {said[key]}" for key in ("group_size", "block_structure", "actorder") if said.get(key)]
    details += ["asymmetric"] * (said.get("symmetric") is False) + ["dynamic"] * bool(said.get("dynamic"))
    return ", ".join([f"{said.get('num_bits')} bit {said.get('type')} {said.get('strategy')}", *details])


def _with_head(rules: list[Rule], ignore: Sequence[str]) -> list[Rule]:
    """The rules and, before them, one for an output head that the reference quantizes: no default keeps that."""
    if Patterns(ignore).find(HEAD) is not None:
        return rules
    for rule in rules:
        hits = [t for t in rule.targets if t == LINEAR or Patterns([t]).find(HEAD) is not None]
        if hits:
            targets = tuple(HEAD if t == LINEAR else t for t in hits)
            only = Rule(rule.scheme, targets, default_ignore=False, optional=True)
            return [only, *(r for r in rules if r.targets != targets)]
    return rules


def _deepseek_rules(name: str, config: Mapping[str, Any]) -> list[Rule]:
    block, activations = config.get("weight_block_size"), config.get("activation_scheme", "dynamic")
    if block != [128, 128] or activations != "dynamic":
        raise RecipeError(
            f"{name}: quant_method 'fp8' with weight_block_size {block} and activations {activations!r} cannot be "
            "written; blocks of [128, 128] with dynamic ones can"
        )
    unknown = [key for key, value in config.items() if key not in DEEPSEEK_KEYS and value]
    if unknown:
        raise RecipeError(
            f"{name}: quant_method 'fp8' with {unknown[0]} {config[unknown[0]]!r} cannot be written; "
            "--recipe deepseek_fp8 writes blocks with F32 scales"
        )
    return [Rule(Scheme("fp8_block"), (LINEAR,), optional=True)]
