"""Which weights change and which stay, each with its reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mso_hub.errors import PlanError
from mso_hub.formats import Format, Scheme, build
from mso_hub.formats.weight import FLOAT_DTYPES, Weight
from mso_hub.plan.experts import FUSED_EXPERTS, is_fused_experts, split_experts
from mso_hub.plan.fusion import place_in_unit, units
from mso_hub.plan.layers import layer_numbers
from mso_hub.plan.recipe import DEFAULT_IGNORE, Patterns, Recipe, default_reason, is_mlp

DECODER_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
MTP_PART = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head|nextn\w*|mtp\w*|embed_tokens)(\.|$)")
"""Parts that only a layer for multi-token prediction has."""
NUMBERED = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.|$)")
APART = ("vision or audio tower", "multimodal projector", "MTP")
"""Reasons of DEFAULT_IGNORE whose modules have layers of their own: no number of a decoder layer means those."""
CONV1D = frozenset(["gpt2", "openai-gpt", "imagegpt", "decision_transformer"])
"""Model types whose linear layers are stored [in, out]: groups along the last dimension would be the wrong ones."""
EMBEDDING = DEFAULT_IGNORE["embedding"]
HEAD = DEFAULT_IGNORE["output head"]
LINEAR = "Linear"
"""The target that means every linear layer, as compressed-tensors recipes write it."""
EXPERT = re.compile(r"^(?P<bank>.*\bexperts)\.\d+\.(?P<leaf>\w+)$")


@dataclass(frozen=True, slots=True)
class Selection:
    """What `select` decided.

    chosen    weights to quantize
    formats   module of a chosen weight -> its encoder; `scales` what its rule says of activation scales
    kept      weights that stay -> why
    units     unit key -> chosen weights that engines fuse; a weight on its own is a unit of one
    unused    imported patterns that matched nothing
    idle      sentences about typed patterns that matched nothing here: a problem when no group has a match
    overlaps  sentences about modules that several rules cover
    absent    sentences about optional rules that find less than they name
    problems  everything that makes the plan impossible
    barred    sentences about what vLLM does not load and the recipe wants all the same
    """

    chosen: tuple[Weight, ...]
    formats: Mapping[str, Format]
    scales: Mapping[str, float | str | None]
    kept: Mapping[str, tuple[Weight, str]]
    units: Mapping[str, tuple[Weight, ...]]
    unused: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    overlaps: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    barred: tuple[str, ...] = ()


def is_linear(weight: Weight) -> bool:
    """Could a linear layer own this weight?"""
    return is_fused_experts(weight) or (len(weight.shape) >= 2 and weight.name.endswith(".weight"))


def layer_count(config: Mapping[str, Any]) -> int | None:
    """Number of decoder layers; MTP layers of DeepSeek and GLM are counted on from there."""
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, dict) else {}):
        if isinstance(part.get("num_hidden_layers"), int):
            return int(part["num_hidden_layers"])
    return None


def decoder_layer(module: str, count: int | None) -> int | None:
    """Number of the decoder layer that a module is in; None outside of them and in MTP layers.

    count  decoder layers of the model; None where config.json does not tell
    """
    match = NUMBERED.search(module)
    if match is None or (count is not None and int(match[1]) >= count):
        return None
    return None if any(DEFAULT_IGNORE[reason].search(module) for reason in APART) else int(match[1])


class _Chooser:
    """Says of a linear weight why it stays, or which rule takes it; counts what every pattern did."""

    def __init__(
        self, recipe: Recipe, config: Mapping[str, Any], encoders: Sequence[Format | None] | None = None
    ) -> None:
        self._recipe = recipe
        self._rules = recipe.all_rules
        self._formats = encoders or [
            build(rule.scheme, recipe.layout, unloadable=recipe.unloadable) for rule in self._rules
        ]
        self._ignore, self._imported = Patterns(recipe.ignore), Patterns(recipe.imported_ignore)
        self._targets = [Patterns(t for t in rule.targets if t != LINEAR) for rule in self._rules]
        self._layers = layer_count(config)
        spans = [
            ("skip_layers", recipe.skip_layers),
            *((f"layers of rule {at}", r.layers) for at, r in enumerate(self._rules, 1)),
        ]
        found = [layer_numbers(option, said, self._layers) for option, said in spans]
        self._skipped, *self._within = (numbers for numbers, _ in found)
        self.problems = [problem for _, problems in found for problem in problems]
        self._counted_on: set[int] = set()
        self.stored: set[int | None] = set()
        self._overruling = [at for at, rule in enumerate(self._rules) if not rule.default_ignore]
        self._taken: Counter[int] = Counter()
        self._shadowed: Counter[tuple[int, int]] = Counter()

    def choose(self, weight: Weight) -> tuple[Format, Scheme] | str:
        """Encoder and scheme of the first rule that covers the weight, or why it stays."""
        module = weight.module
        if (pattern := self._ignore.find(module)) is not None:
            return f"ignore {pattern}"
        if (pattern := self._imported.find(module)) is not None:
            return f"exclude config {pattern}"
        if not is_linear(weight):
            return "not a linear layer's weight"
        layer = self._layer(module)
        if layer in self._skipped:
            return f"layer {layer} is in skip_layers"
        why = self._default(module) if self._recipe.default_ignore else None
        if why is not None and not self._overruling:
            return why
        if EMBEDDING.search(module):
            return "embedding"  # a look-up, never a linear layer: no loader takes a packed one
        offered = self._overruling if why is not None else range(len(self._rules))
        hits = [at for at in offered if self._covers(at, weight, layer)]
        if not hits:
            return why or self._reason(weight)
        self._taken[hits[0]] += 1
        self._shadowed.update((hits[0], later) for later in hits[1:])
        form, rule = self._formats[hits[0]], self._rules[hits[0]]
        return f"rule {rule.label}" if form is None else (form, rule.scheme)

    def _default(self, module: str) -> str | None:
        """Why a module stays unless a rule says otherwise, or None."""
        beyond = DECODER_LAYER.search(module)
        if beyond and self._layers is not None and int(beyond[1]) >= self._layers:
            reason = default_reason(module)
            if reason is None:
                self._counted_on.add(int(beyond[1]))
            return reason or "MTP"
        return default_reason(module)

    def _layer(self, module: str) -> int | None:
        """Asked only where a rule or skip_layers names layers."""
        if not self._skipped and not any(self._within):
            return None
        return decoder_layer(module, self._layers)

    def _covers(self, at: int, weight: Weight, layer: int | None) -> bool:
        rule = self._rules[at]
        if rule.layers and layer not in self._within[at]:
            return False
        if self._targets[at].find(weight.module) is not None:
            return True
        if len(weight.shape) != 2 and not is_fused_experts(weight):
            return False
        if LINEAR in rule.targets or (not rule.targets and rule.mode == "all-linear"):
            return True
        return not rule.targets and (is_fused_experts(weight) or is_mlp(weight.module))

    def _reason(self, weight: Weight) -> str:
        if len(weight.shape) != 2 and not is_fused_experts(weight):
            return "not a matrix"
        if all(rule.targets or rule.layers for rule in self._rules):
            return "no target matches" if len(self._rules) == 1 else "no rule covers it"
        return "outside the MLP (--all_linear takes it)"

    def idle(self) -> list[str]:
        """Sentences about patterns and rules that the user typed in vain."""
        found = [
            f"ignore {p!r} matches no weight of this checkpoint; correct it or leave it out"
            for p in self._ignore.unused
        ]
        for at, patterns in enumerate(self._targets):
            if self._rules[at].optional:
                continue
            found += [
                f"targets {p!r} matches no weight that could be quantized (norms and embeddings never, heads and "
                "others only with --no_default_ignore); correct it or leave it out"
                for p in patterns.unused
            ]
            if len(self._rules) > 1 and not self._taken[at] and not patterns.unused:
                found.append(self._nothing_left(at))
        found += self._unknown_layers()
        imported = self._recipe.imported_ignore
        # Entries like lm_head say nothing about the model: it may be tied to the embedding.
        if len(self._imported.unused) == len(set(imported)) and not all(map(default_reason, imported)):
            found.append(
                f"none of the {len(imported)} imported exclude patterns matches a weight, the first is "
                f"{imported[0]!r}; they belong to another model"
            )
        return found

    def _unknown_layers(self) -> list[str]:
        """Layers that are named and not there."""
        missing = sorted(set(self._skipped).union(*self._within) - self.stored)
        if not missing:
            return []
        said = "" if self._layers is None else f", though num_hidden_layers in config.json is {self._layers}"
        return [f"layers: there is no layer {missing[0]} here{said}; correct it or leave it out"]

    def beyond(self, names: Iterable[str]) -> list[str]:
        """Layers beyond those that config.json counts, which are no MTP layers either."""
        numbered = [(int(match[1]), name) for name in names if (match := NUMBERED.search(name))]
        marked = {number for number, name in numbered if MTP_PART.search(name)}
        strange = sorted(self._counted_on - marked)
        if not strange:
            return []
        return [
            (
                f"config.json: num_hidden_layers is {self._layers}, but layer {strange[0]} is stored and is no MTP "
                "layer; correct config.json"
            )
        ]

    def absent(self) -> list[str]:
        """Sentences about optional rules that find less than they name."""
        found = []
        for at, (rule, patterns) in enumerate(zip(self._rules, self._targets, strict=True)):
            if rule.optional and not self._taken[at]:
                found.append(self._nothing_left(at).partition(";")[0])
            elif rule.optional and (unused := patterns.unused):
                found.append(
                    f"rule {at + 1} ({rule.label}): {len(unused)} of its {len(rule.targets)} targets match nothing "
                    f"here, the first is {unused[0]!r}"
                )
        return found

    def _nothing_left(self, at: int) -> str:
        earlier = sorted({first for first, later in self._shadowed if later == at})
        label = f"rule {at + 1} ({self._rules[at].label})"
        if not earlier:
            return f"{label} covers no weight that could be quantized; correct it or leave it out"
        before = " and ".join(f"rule {first + 1} ({self._rules[first].label})" for first in earlier)
        return f"{label} gets nothing, {before} before it covers every module it names; put it first or leave it out"

    @property
    def unused(self) -> list[str]:
        """Imported patterns that matched nothing."""
        return self._imported.unused

    @property
    def overlaps(self) -> list[str]:
        """Sentences about modules that several rules cover."""
        return [
            f"{count} weights are covered by rule {first + 1} ({self._rules[first].label}) and by rule {later + 1} "
            f"({self._rules[later].label}): the first decides"
            for (first, later), count in sorted(self._shadowed.items()) if self._taken[later]
        ]  # fmt: skip


def _different(members: Sequence[str], formats: Mapping[str, Format], kept: Mapping[str, tuple[Weight, str]]) -> str:
    """Which two of some modules that must be stored alike are not; "" when they are."""
    inside = [m for m in members if m in formats]
    outside = [m for m in members if m not in formats]
    if inside and outside:
        return f"{outside[0]} stays ({kept[outside[0]][1]}), {inside[0]} does not"
    other = next((m for m in inside if formats[m] != formats[inside[0]]), None)
    if other is None:
        return ""
    return f"{inside[0]} becomes {formats[inside[0]].name}, {other} {formats[other].name}"


def _split_units(formats: Mapping[str, Format], kept: Mapping[str, tuple[Weight, str]]) -> list[str]:
    """Units and banks of experts whose members are not all stored alike: engines cannot load them."""
    problems = []
    for key, members in units([*formats, *kept]).items():
        if found := _different(members, formats, kept):
            problems.append(
                f"{key}: engines fuse {', '.join(members)}, so all must be stored alike; {found}: give all of them to "
                "one rule, or ignore all"
            )
    banks: dict[str, list[str]] = {}
    for module in (*formats, *kept):
        if match := EXPERT.match(module) or FUSED_EXPERTS.match(module):
            banks.setdefault(match["bank"], []).append(module)
    for bank, experts in banks.items():
        if any(m in formats for m in experts) and (found := _different(experts, formats, kept)):
            problems.append(
                f"{bank}: experts load as one tensor, so all must be stored alike; {found}: give all of them to one "
                "rule, or ignore all"
            )
    return problems


def loader_problem(module: str, form: Format) -> str | None:
    """Why vLLM does not load a module in a form, where it loads others in it; None where it does."""
    if EXPERT.match(module):
        return form.expert_problem
    return form.head_problem if HEAD.search(module) else None


def _barred(formats: Mapping[str, Format]) -> list[str]:
    """Sentences about what vLLM does not load: formats, banks of experts, output heads."""
    found = dict.fromkeys(form.unloadable for form in formats.values() if form.unloadable is not None)
    for module, form in formats.items():
        if (problem := loader_problem(module, form)) is not None:
            bank = EXPERT.match(module)
            found[f"{bank['bank'] if bank else module}: {problem}; or add it to `ignore`"] = None
    return list(found)


def _shape_problems(units_: Mapping[str, Sequence[Weight]], formats: Mapping[str, Format]) -> list[str]:
    """Units that engines cannot fuse because of their sizes."""
    fused = {key: sorted(m, key=lambda w: place_in_unit(w.module)) for key, m in units_.items() if len(m) > 1}
    found = ((key, formats[m[0].module].fused_problem([w.shape for w in m])) for key, m in fused.items())
    return [f"{key}: {problem}" for key, problem in found if problem is not None]


def select(
    weights: Sequence[Weight], recipe: Recipe, config: Mapping[str, Any],
    encoders: Sequence[Format | None] | None = None,
) -> Selection:  # fmt: skip
    """Go through all weights of a group once and decide.

    encoders  in place of those that the rules name, one for each rule; None for a rule that keeps
    """
    chooser = _Chooser(recipe, config, encoders)
    chosen: dict[str, Weight] = {}
    formats: dict[str, Format] = {}
    scales: dict[str, float | str | None] = {}
    kept: dict[str, tuple[Weight, str]] = {}
    problems: list[str] = [*chooser.problems]
    modules: list[str] = []
    names = {weight.name: None for weight in weights}
    if config.get("model_type") in CONV1D:
        problems.append(
            f"model_type {config['model_type']!r} stores linear layers as [in, out]; it cannot be quantized"
        )
    chooser.stored = {decoder_layer(weight.module, None) for weight in weights}
    for weight in weights:
        choice = chooser.choose(weight)
        if isinstance(choice, str):
            kept[weight.module] = (weight, choice)
            modules.append(weight.module)
            continue
        form, scheme = choice
        try:
            parts = list(split_experts(weight, config, names)) if is_fused_experts(weight) else [weight]
        except PlanError as error:
            problems.append(str(error))
            continue
        for part in parts:
            problem = form.problem(part.shape)
            if problem is None and part.dtype not in FLOAT_DTYPES:
                problem = f"can only quantize {', '.join(FLOAT_DTYPES)}, got {part.dtype}"
            chosen[part.module], formats[part.module], scales[part.module] = part, form, scheme.input_scale
            modules.append(part.module)
            if problem is not None:
                problems.append(f"{weight.name}: {problem}; add it to `ignore`")
                break
    problems += [
        f"{module}: {count} weights have this name; the checkpoint is damaged, remove the stale ones"
        for module, count in Counter(modules).items() if count > 1
    ]  # fmt: skip
    barred = _barred(formats)
    problems += ([] if recipe.unloadable else barred) + chooser.beyond(names)
    linear = {name: entry for name, entry in kept.items() if is_linear(entry[0])}
    split = _split_units(formats, linear)
    shared = units(chosen)
    together = {module for members in shared.values() for module in members}
    alone = {module: (module,) for module in chosen if module not in together}
    by_unit = {key: tuple(chosen[m] for m in members) for key, members in {**shared, **alone}.items()}
    problems += split or _shape_problems(by_unit, formats)
    return Selection(
        tuple(chosen.values()), formats, scales, kept, by_unit, tuple(chooser.unused), tuple(chooser.idle()),
        tuple(chooser.overlaps), tuple(chooser.absent()), tuple(problems), tuple(barred),
    )  # fmt: skip
