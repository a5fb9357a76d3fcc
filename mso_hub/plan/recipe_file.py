"""`--recipe`: a TOML or YAML file, a preset, or the mso_hub.json of an output -> Recipe.

    layout = "modelopt"
    kv_cache = "fp8"
    skip_layers = [0, -1]

    [[rules]]                     # the first rule that covers a module decides
    format = "nvfp4"
    targets = ["*.experts"]
    input_scale = 1.0

    [[rules]]
    format = "fp8_dynamic"
    mode = "all-linear"
    layers = ["0-3"]

Keys and their meaning are those of Recipe, Rule and Scheme.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mso_hub.errors import RecipeError
from mso_hub.formats import ALIASES, DENSE, FORMATS, IMPORTED, Scheme
from mso_hub.formats.kt import KT_FORMATS
from mso_hub.hub import is_address
from mso_hub.plan.kt import recipe_of_output
from mso_hub.plan.layers import check_layers, split_layers
from mso_hub.plan.measured import STAND_IN, plain_takes_scale, takes_scale, waiting
from mso_hub.plan.presets import find_preset, near_preset, near_word, preset_text
from mso_hub.plan.recipe import LAYOUTS, MODES, Recipe, Rule, named_scheme
from mso_hub.source import open_source

MANIFEST = "mso_hub.json"
SUFFIXES = (".toml", ".yaml", ".yml", ".json")
FOREIGN = {
    "quantize": "a recipe of ModelOpt; `mso-hub formats --presets` lists presets by its names",
    "quant_cfg": "a recipe of ModelOpt; `mso-hub formats --presets` lists presets by its names",
    "default_stage": "a recipe of llm-compressor; --like takes the config.json of a model that it made",
    "quant_stage": "a recipe of llm-compressor; --like takes the config.json of a model that it made",
    "quantization_config": "the config of a model; give it to --like",
    "quantization": "the config of a model; give it to --like",
}
"""Keys that tell what else a file is."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of value: what is expected, how it is read (ValueError for anything else), and the words there are."""

    expected: str
    read: Callable[[Any], Any]
    words: tuple[str, ...] = ()


def read_recipe(where: str | Path, **said: Any) -> Recipe:
    """The recipe of a file, a preset or an output.

    where  FILE.toml or FILE.yaml; the name of a preset; or mso_hub.json, the folder or the hf://org/name that holds it
    said   fields of Recipe that go before the file's: layout, text_only, kv_cache, ...; `ignore` and `skip_layers`
           add up; `input_scale` and `input_amax` are for every rule whose activations can have a static scale;
           `waits` is True where these will be measured, see plan/measured.py
    Raises RecipeError that names the place, what was found there and what is allowed.
    """
    name, text = _open(str(where))
    found = _parse(name, text)
    for key, what in FOREIGN.items():
        if key in found and "rules" not in found:
            raise RecipeError(f"{name}: is {what}; found {key!r}")
    if name.endswith(".json"):
        settings = found.get("recipe")
        if not isinstance(settings, dict):
            raise RecipeError(f"{name}: needs the settings of a conversion (`recipe`), has {_listed(found)}")
        if settings.get("scheme") in KT_FORMATS:
            return _for_kt(name, settings, said)
        return finish(name, _from_manifest(name, settings), said)
    return finish(name, _from_file(name, found), said)


def _for_kt(name: str, settings: Mapping[str, Any], said: Mapping[str, Any]) -> Recipe:
    """The recipe of a conversion for kt-kernel; nothing can be given beside it."""
    if given := [key for key, value in said.items() if value not in (None, False, (), {})]:
        raise RecipeError(f"{name}: is for kt-kernel and takes no {given[0]}; leave it out")
    return recipe_of_output(name, settings)


def finish(name: str, found: Mapping[str, Any], said: Mapping[str, Any]) -> Recipe:
    """Fields of a recipe that was read, with those that were given beside it -> Recipe."""
    given = {key: value for key, value in said.items() if value is not None}
    rules: tuple[Rule, ...] = tuple(found.get("rules", ()))
    scale = given.pop("input_scale", None)
    if given.pop("waits", False):
        rules = waiting(rules)
        if not rules and plain_takes_scale(Scheme(found.get("scheme", "nvfp4"), found.get("activations"))):
            given["input_scale"] = STAND_IN
    elif scale is not None and rules:
        if not any(map(takes_scale, rules)):
            labels = ", ".join(rule.label for rule in rules)
            raise RecipeError(f"{name}: --input_scale {scale}: no rule has static activation scales ({labels})")
        rules = tuple(
            replace(rule, scheme=replace(rule.scheme, input_scale=scale)) if takes_scale(rule) else rule
            for rule in rules
        )
    elif scale is not None:
        given["input_scale"] = scale
    kept = [*rules, *([] if rules else [Rule(Scheme(input_scale=found.get("input_scale")))])]
    needs = [rule for rule in kept if rule.scheme.input_scale == IMPORTED]
    if needs and "input_scale" not in given and not given.get("input_amax"):
        raise RecipeError(
            f"{name}: {needs[0].label} has static activation scales, which are not in it; add --input_scale WHERE "
            "(a checkpoint that has them), --stats FILE (statistics of a calibration) or --input_scale 1.0"
        )
    for key in ("ignore", "imported_ignore", "skip_layers"):
        given[key] = tuple(dict.fromkeys((*found.get(key, ()), *given.get(key, ()))))
    try:
        return Recipe(**{**found, **given, "rules": rules})
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}") from error


def _open(where: str) -> tuple[str, str]:
    """(name for messages, text) of a file, a preset, or the manifest of an output."""
    if is_address(where):
        return _open_remote(where.removesuffix(f"/{MANIFEST}"))
    preset = find_preset(where)
    if preset is not None:
        return f"preset {preset}", preset_text(preset)
    path = Path(where)
    path = path / MANIFEST if path.is_dir() else path
    if not path.is_file():
        if path.name == MANIFEST or path.suffix in SUFFIXES or len(path.parts) > 1:
            raise RecipeError(f"{where}: needs a recipe, found no file {path}; check the path")
        raise RecipeError(
            f"{where}: no preset and no file has this name{near_preset(where)}; "
            "`mso-hub formats --presets` lists the presets"
        )
    if path.suffix not in SUFFIXES:
        raise RecipeError(f"{where}: a recipe is a file {', '.join(SUFFIXES[:3])} or {MANIFEST}, got {path.name}")
    try:
        return str(path), path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where}: not UTF-8 text: {error}") from error


def _open_remote(where: str) -> tuple[str, str]:
    with closing(open_source(where)) as source:
        files = source.files()
        if MANIFEST not in files:
            raise RecipeError(
                f"{where}: needs a {MANIFEST} to be a recipe, has none; --like takes the config of any quantized model"
            )
        return f"{where}/{MANIFEST}", source.read(MANIFEST, 0, files[MANIFEST]).tobytes().decode(errors="replace")


def _parse(name: str, text: str) -> dict[str, Any]:
    """TOML, YAML or JSON by the name -> its table."""
    content: Any
    try:
        if name.endswith((".yaml", ".yml")):
            content = parse_yaml(text)
        elif name.endswith(".json"):
            content = json.loads(text)
        else:
            content = _parse_toml(text)
    except (ValueError, RecursionError) as error:
        place = " ".join(str(error).split())
        raise RecipeError(f"{name}: cannot be read: {place}; correct it") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{name}: needs a table of settings with `rules`, got {type(content).__name__}")
    return content


def _parse_toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def parse_yaml(text: str) -> Any:
    """YAML without tags; ValueError for what is malformed or says a key twice."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
        """Refuses a key that is said twice, of which PyYAML takes the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            """As SafeLoader."""
            keys = [key.value for key, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise ValueError(f"{twice!r} stands there twice, line {node.start_mark.line + 1}")
            return dict(super().construct_mapping(node, deep=deep))

    try:
        return yaml.load(text, Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("its tables and lists lie too deep in one another") from error


def _typed(kind: type, expected: str) -> _Kind:
    """A value of exactly this type: true is no number, 1 is not true."""

    def read(value: Any) -> Any:
        if type(value) is not kind:
            raise ValueError
        return value

    return _Kind(expected, read)


def _one_of(*words: str) -> _Kind:
    def read(value: Any) -> str:
        if value not in words:
            raise ValueError
        return str(value)

    return _Kind(" or ".join(words) if len(words) < 4 else f"one of {', '.join(words)}", read, words)


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, str) and entry for entry in value):
        raise ValueError
    return tuple(value)


def _layers(value: Any) -> tuple[int | str, ...]:
    said = split_layers(value) if isinstance(value, str) else (value,) if isinstance(value, int) else value
    if not isinstance(said, list | tuple):
        raise ValueError
    try:
        check_layers("layers", said)
    except RecipeError as error:
        raise ValueError from error
    return tuple(said)


def _scale(value: Any) -> float | str:
    if value == IMPORTED:
        return IMPORTED
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    return float(value)


def _kv_cache(value: Any) -> bool:
    if value != "fp8" and value is not False:
        raise ValueError
    return value is not False


TEXT = _typed(str, "text")
NUMBER = _typed(int, "a whole number")
FLAG = _typed(bool, "true or false")
TEXTS = _Kind("a list of patterns", _texts)
LAYERS = _Kind('layers like [0, "2-4", -1]', _layers)
SCHEME_KEYS: dict[str, tuple[str, _Kind]] = {
    "format": ("format", _one_of(*FORMATS, *ALIASES, DENSE)),
    "activations": ("activations", NUMBER),
    "group_size": ("group_size", NUMBER),
    "symmetric": ("symmetric", FLAG),
    "scale_search": ("search", TEXT),
    "input_scale": ("input_scale", _Kind(f'a number or "{IMPORTED}"', _scale)),
}
"""Key of a rule -> field of Scheme."""
RULE_KEYS = {
    "targets": TEXTS,
    "mode": _one_of(*MODES),
    "layers": LAYERS,
    "default_ignore": FLAG,
    "optional": FLAG,
}
RECIPE_KEYS = {
    "layout": _one_of(*LAYOUTS),
    "kv_cache": _Kind('"fp8" or false', _kv_cache, ("fp8",)),
    "ignore": TEXTS,
    "default_ignore": FLAG,
    "skip_layers": LAYERS,
    "text_only": FLAG,
}


def _read(place: str, key: str, kind: _Kind, value: Any) -> Any:
    try:
        return kind.read(value)
    except ValueError as error:
        hint = near_word(value, kind.words)
        raise RecipeError(f"{place}: {key} must be {kind.expected}, got {value!r}{hint}") from error


def _listed(content: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, list(content)[:8])) or "nothing"


def _known(place: str, content: Mapping[Any, Any], known: Mapping[str, Any]) -> None:
    """RecipeError for a key that is not known."""
    for key in content:
        if key in known:
            continue
        raise RecipeError(f"{place}: {key!r} is no setting, known are {', '.join(known)}{near_word(key, known)}")


def _from_file(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """A file's table -> fields of Recipe."""
    _known(name, content, {**RECIPE_KEYS, "rules": None})
    found = {key: _read(name, key, RECIPE_KEYS[key], content[key]) for key in RECIPE_KEYS if key in content}
    rules = content.get("rules")
    if not isinstance(rules, list) or not rules:
        raise RecipeError(f"{name}: needs at least one rule ([[rules]] with a format), got {rules!r}")
    found["rules"] = tuple(_rule(f"{name}: rule {at}", rule) for at, rule in enumerate(rules, 1))
    return found


def _rule(place: str, content: Any) -> Rule:
    if not isinstance(content, dict):
        raise RecipeError(f"{place}: must be a table of settings, got {content!r}")
    _known(place, content, {**SCHEME_KEYS, **RULE_KEYS})
    if "format" not in content:
        raise RecipeError(f"{place}: needs a format, has {_listed(content)}")
    if bool(content.get("targets")) == ("mode" in content):
        raise RecipeError(f"{place}: needs targets or else a mode ({' or '.join(MODES)}), has {_listed(content)}")
    said = {
        field: _read(place, key, kind, content[key]) for key, (field, kind) in SCHEME_KEYS.items() if key in content
    }
    which = {key: _read(place, key, kind, content[key]) for key, kind in RULE_KEYS.items() if key in content}
    try:
        return Rule(named_scheme(said.pop("format"), said), **which)
    except RecipeError as error:
        raise RecipeError(f"{place}: {error}") from error


def _from_manifest(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe as mso_hub.json has it -> fields of Recipe; settings of later versions are not known here."""
    known = {f.name for f in fields(Recipe)}
    if unknown := [key for key in settings if key not in known]:
        raise RecipeError(f"{name}: {unknown[0]!r} is no setting of this version of mso_hub; take the one that made it")
    try:
        return manifest_settings(settings)
    except (TypeError, ValueError, KeyError) as error:
        raise RecipeError(f"{name}: its recipe cannot be read ({error}); take the version that made it") from error


def manifest_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`recipe` of an mso_hub.json -> fields of Recipe; TypeError, ValueError or KeyError for what none of them can be.

    A count in place of the imported exclude patterns, which older versions wrote, is left out.
    """
    found: dict[str, Any] = {}
    for f in fields(Recipe):
        if f.name not in settings or isinstance(value := settings[f.name], dict):
            continue
        if f.name == "rules":
            found["rules"] = tuple(map(_manifest_rule, value))
        elif isinstance(f.default, tuple):
            found |= {f.name: _manifest_list(value)} if f.name != "imported_ignore" or isinstance(value, list) else {}
        elif f.default is not None and type(value) is not type(f.default):
            raise TypeError(f"{f.name} is {value!r}")
        else:
            found[f.name] = value
    return found


def _manifest_list(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, str | int) for entry in value):
        raise TypeError(f"{value!r} is no list")
    return tuple(value)


def _manifest_rule(said: Mapping[str, Any]) -> Rule:
    lists = {key: _manifest_list(said[key]) for key in ("targets", "layers") if key in said}
    return Rule(**{**said, **lists, "scheme": Scheme(**said["scheme"])})
