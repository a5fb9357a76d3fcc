"""Is everything there that config.json announces, and nothing else? Layers, experts, members, norms.

vLLM loads a quantized checkpoint without a layer, a norm or an expert and serves random numbers in their place, so
what is missing must be found here. config.json says how many layers and experts there are; beyond that, layers of the
same kind hold the same tensors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from mso_hub.formats.detect import RUNTIME_SCALES
from mso_hub.plan.fusion import units
from mso_hub.plan.recipe import DEFAULT_IGNORE
from mso_hub.plan.select import APART
from mso_hub.verify.claims import shown
from mso_hub.verify.kt import holds_experts_only
from mso_hub.verify.opened import Opened
from mso_hub.verify.parallel import EXPERTS, experts_of, setting, whole

LAYER = re.compile(r"^(?P<stack>(?:.+?\.)?(?:layers|h|blocks))\.(?P<number>\d{1,4})\.(?P<rest>.+)$")
EXPERT = re.compile(r"^(?P<bank>(?:.+\.)?experts)\.(?P<number>\d{1,4})\.(?P<leaf>.+)$")
LIMIT = 10_000
"""Layers, and experts of a layer, beyond which a number is a mistake; names and configs come from strangers."""
OTHER_STACKS = re.compile(r"(^|\.)(encoder|decoder)(\.|$)")
"""Models with two stacks of layers: num_hidden_layers is of one of them."""
MTP_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "num_mtp_layers")
SHARING = ("num_kv_shared_layers", "use_cla", "cla_share_factor", "attention_k_eq_v")
"""Settings of models some of whose layers have no keys or values of their own."""
SHARED = re.compile(r"(^|\.)(k_proj|v_proj|k_norm|v_norm|kv_\w+|indexer)(\.|$)")
NORM = re.compile(r"(norm|ln_f|ln_out)\w*(\.weight)?$")
GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


@dataclass(frozen=True, slots=True)
class Stack:
    """The decoder layers of the text model.

    name    `model.layers`
    layers  number -> names below it; those of experts are left out
    """

    name: str
    layers: Mapping[int, AbstractSet[str]]


def structure_problems(mine: Opened) -> Iterator[str]:
    """Sentences about what is missing, or is there and belongs to nothing.

    A checkpoint whose config.json has no num_hidden_layers, or that has neither an embedding nor a vocab_size, is part
    of a model and is not judged; of experts for kt-kernel without the rest only the shapes are.
    """
    config = mine.checkpoint.config
    if whole(setting(config, "num_hidden_layers")) is None:
        return
    if holds_experts_only(mine):
        yield from _shape_problems(mine)
        return
    for key in ("num_hidden_layers", *EXPERTS):
        if (whole(setting(config, key)) or 0) > LIMIT:
            yield f"config.json: {key} {setting(config, key):,} is more than any model has; restore config.json"
            return
    names = {weight.name for weight in mine.weights.values() if not _is_leftover(weight.name, mine.refused)}
    names |= {f"{module}.weight" for module in mine.refused}
    stack = _stack(names)
    if not any(DEFAULT_IGNORE["embedding"].search(name.rpartition(".")[0]) and not _apart(name) for name in names):
        if stack is not None and whole(setting(config, "vocab_size")):
            yield "config.json is that of a whole model, the embedding is missing: model.embed_tokens.weight"
        return
    if not setting(config, "block_configs"):  # models whose layers differ one by one
        if stack is not None:
            yield from _layer_problems(config, stack, names)
            yield from _end_problems(config, stack, names)
        yield from _expert_problems(config, names)
    yield from _shape_problems(mine)


def _is_leftover(name: str, refused: Mapping[str, str]) -> bool:
    """Is it a companion of a packed weight that is not understood, or of nothing?"""
    return RUNTIME_SCALES.search(name) is not None or (
        name.rpartition(".")[0] in refused and not name.endswith(".bias")
    )


def _apart(name: str) -> bool:
    """Does a name belong to a tower, a projector or MTP, which have layers and experts of their own?"""
    return any(DEFAULT_IGNORE[reason].search(name) for reason in APART)


def _stack(names: Iterable[str]) -> Stack | None:
    """The stack with the most tensors that is no tower's; None without one."""
    found: dict[str, dict[int, set[str]]] = {}
    apart: dict[str, bool] = {}
    for name in names:
        match = LAYER.match(name)
        if match is None:
            continue
        stack = match["stack"]
        if stack not in apart:
            apart[stack] = _apart(stack) or OTHER_STACKS.search(stack) is not None
        if apart[stack]:
            continue
        rest = found.setdefault(stack, {}).setdefault(int(match["number"]), set())
        rest.add("experts" if EXPERT.match(match["rest"]) else match["rest"])
    if not found:
        return None
    name = max(found, key=lambda stack: sum(map(len, found[stack].values())))
    return Stack(name, found[name])


# --- layers -----------------------------------------------------------------------------------------


def _layer_problems(config: Mapping[str, Any], stack: Stack, names: AbstractSet[str]) -> Iterator[str]:
    count = whole(setting(config, "num_hidden_layers"))
    if setting(config, "num_layers") not in (None, count):
        count = None  # models that count blocks of a layer
    last = max(stack.layers) + 1 if count is None else count
    if lost := [f"{stack.name}.{n}" for n in range(last) if n not in stack.layers]:
        why = f"config.json has num_hidden_layers {count}" if count is not None else f"layer {last - 1} is stored"
        yield f"layers are missing, vLLM would serve random numbers in their place ({why}): {shown(lost)}"
    if count is not None:
        extra = [n for n in sorted(stack.layers) if n >= count + (whole(setting(config, *MTP_LAYERS)) or 0)]
        found = [name for n in extra for name in sorted(names) if name.startswith(f"{stack.name}.{n}.")]
        if found:
            yield f"config.json has num_hidden_layers {count}, so no loader takes {shown(found)}"
    layers = {n: rest for n, rest in stack.layers.items() if count is None or n < count}
    yield from _odd_layers(config, stack.name, layers)


def _odd_layers(config: Mapping[str, Any], stack: str, layers: Mapping[int, AbstractSet[str]]) -> Iterator[str]:
    """One layer that has less, or more, than layers that are otherwise like it."""
    kinds: dict[frozenset[str], list[int]] = {}
    for number, rest in sorted(layers.items()):
        kinds.setdefault(frozenset(rest), []).append(number)
    shares = any(setting(config, key) for key in SHARING)
    for kind, numbers in kinds.items():
        if len(numbers) > 1:
            continue
        (odd,) = numbers
        larger = [other for other in kinds if kind < other]
        smaller = [other for other in kinds if kind > other and len(kinds[other]) > 1]
        if larger:
            other = min(larger, key=lambda found: (-len(kinds[found]), len(found)))
            missing = sorted(other - kind)
            if not (shares and all(SHARED.search(name) for name in missing)) and len(kind) > 0:
                listed = shown([f"{stack}.{odd}.{name}" for name in missing])
                where = kinds[other]
                doubt = f"; or {stack}.{where[0]}.{missing[0]} is too many" if len(where) == 1 else ""
                yield f"tensors are missing that layer {where[0]} has: {listed}{doubt}"
        elif smaller and not any(other < kind for other in kinds if len(kinds[other]) == 1):
            listed = shown([f"{stack}.{odd}.{name}" for name in sorted(kind - max(smaller, key=len))])
            yield f"no other layer has such tensors, loaders know no place for them: {listed}"


def _end_problems(config: Mapping[str, Any], stack: Stack, names: AbstractSet[str]) -> Iterator[str]:
    """The norm after the last layer, and the output head of a model that has one of its own."""
    root = stack.name.rpartition(".")[0]
    prefix = f"{root}." if root else ""
    beside = [n for n in names if n.startswith(prefix) and not n.startswith(f"{stack.name}.") and not _apart(n)]
    if any(NORM.search(n) for rest in stack.layers.values() for n in rest) and not any(map(NORM.search, beside)):
        yield f"the norm after the last layer is missing, vLLM would serve random numbers: {prefix}norm.weight"
    architectures = config.get("architectures")
    causal = isinstance(architectures, list) and any(str(a).endswith("ForCausalLM") for a in architectures)
    if causal and setting(config, "tie_word_embeddings") is False and root == "model":
        heads = [n for n in names if DEFAULT_IGNORE["output head"].search(n.rpartition(".")[0])]
        if not heads and f"{prefix}embed_tokens.weight" in names:
            yield "config.json says tie_word_embeddings false, the output head is missing: lm_head.weight"


# --- experts ----------------------------------------------------------------------------------------


def _expert_problems(config: Mapping[str, Any], names: Iterable[str]) -> Iterator[str]:
    banks: dict[str, dict[int, set[str]]] = {}
    for name in names:
        match = EXPERT.match(name)
        if match is not None and not _apart(name):
            banks.setdefault(match["bank"], {}).setdefault(int(match["number"]), set()).add(match["leaf"])
    count = experts_of(config)
    lost: list[str] = []
    spare: list[str] = []
    for bank, experts in sorted(banks.items()):
        usual = Counter(map(frozenset, experts.values())).most_common(1)[0][0]
        total = max(experts) + 1 if count is None else count
        for number in range(total):
            lost += [f"{bank}.{number}.{leaf}" for leaf in sorted(usual - experts.get(number, set()))]
        spare += [f"{bank}.{n}.{leaf}" for n, leaves in sorted(experts.items()) if n >= total for leaf in leaves]
    said = "other experts of their layers have them" if count is None else f"config.json says {count} experts"
    if lost:
        yield f"missing of experts, vLLM would serve random numbers in their place ({said}): {shown(lost)}"
    if spare:
        yield f"{said}, so no loader takes {shown(sorted(spare))}"


# --- shapes -----------------------------------------------------------------------------------------


def _shape_problems(mine: Opened) -> Iterator[str]:
    """Layers that engines fuse have the same input, and the matrices of a gated MLP are [I, H], [I, H] and [H, I]."""
    shapes = {w.module: w.shape for w in mine.weights.values() if len(w.shape) == 2 and w.name.endswith(".weight")}
    homes = {w.module: w.home.name for w in mine.weights.values()}
    for members in units(module for module in shapes if not _apart(module)).values():
        yield from _odd_one(homes, {m: (0, shapes[m][1]) for m in members}, shapes)
    for gate, shape in shapes.items():
        parent, _, leaf = gate.rpartition(".")
        for names in GATED:
            up, down = (f"{parent}.{name}" for name in names[1:])
            if leaf == names[0] and up in shapes and down in shapes and shape[1] == shapes[up][1]:
                yield from _odd_one(homes, {gate: shape, up: shapes[up], down: shapes[down][::-1]}, shapes)


def _odd_one(
    homes: Mapping[str, str], voted: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """A sentence about the weights that do not fit, the one that differs from the others first.

    voted  module -> what must be equal
    """
    (common, votes), *others = Counter(voted.values()).most_common()
    if not others:
        return
    odd = next(module for module, found in voted.items() if found != common or votes == 1)
    listed = ", ".join(f"{module.rpartition('.')[2]} {list(shapes[module])}" for module in voted)
    yield f"{homes[odd]}: {listed} do not fit together; the checkpoint is damaged"
