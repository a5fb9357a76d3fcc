"""kt-kernel's weights for AMX and AVX512: what it calls the experts, and what of the model's own names it leaves.

    blk.{layer}.ffn_{gate,up,down}_exps.{expert}.numa.{part}.weight   I8 [n*k] (INT8) or [n*k/2] (INT4), packed tiles
    blk.{layer}.ffn_{gate,up,down}_exps.{expert}.numa.{part}.scale    F32 [n]
    blk.{layer}...                                                    the rest of a layer, from `model.layers.{layer}`

or, in a tree of files, one of them each: `_layer_{layer}/_numa_{part}/INT8_gate_{expert}_{bytes}Byte_quant_.kt`.
There are as many parts as NUMA nodes: gate and up are cut by rows, down by columns, each part with its own scales.
kt-kernel checks neither that number nor the method, so both are in the header of every file that is written here, with
a digest of the source, and in config.json under `ktransformers`, with the names that the source had.

Source: kt-kernel 0.7.2, utils/loader.py and operators/amx/moe.hpp; its scripts/convert_cpu_weights.py for the names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mso_hub.errors import CheckpointError, PlanError

LAYOUT = "ktransformers"
"""The layout's name, and the key of config.json."""
METHODS = {"INT4": 4, "INT8": 8}
"""kt-kernel's name -> bits."""
PROJECTIONS = ("gate", "up", "down")
LEAVES = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down",
}  # fmt: skip
"""What models call the projections of an expert -> what kt-kernel calls them."""
EXPERT = re.compile(
    r"^(?P<before>(?:.*\.)?layers\.)(?P<layer>\d+)(?P<block>\..+\.experts\.|\.experts\.)(?P<expert>\d+)\."
    rf"(?P<leaf>{'|'.join(LEAVES)})$"
)
"""Module of a routed expert's projection."""
STORED = re.compile(r"^blk\.(\d+)\.ffn_(gate|up|down)_exps\.(\d+)\.numa\.(\d+)\.(weight|scale)$")
TREE_LAYER = re.compile(r"^_layer_(\d+)/.*\.kt$")
METADATA = ("kt_method", "kt_threadpool_count", "kt_source")
"""Keys in a file's header: INT4 or INT8, the number of parts, a digest of the source's headers."""
_PREFIX = "language_model."
_STANDARD = "model.layers.{layer}.mlp.experts.{expert}.{leaf}_proj"
_HEADS = {"blk": "model.layers", "embed_tokens": "model.embed_tokens", "norm": "model.norm"}
"""Where kt-kernel's own converter has taken names from."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a projection of an expert belongs."""

    layer: int
    projection: str
    expert: int

    @property
    def module(self) -> str:
        """Name without part and suffix."""
        return f"blk.{self.layer}.ffn_{self.projection}_exps.{self.expert}"


@dataclass(frozen=True, slots=True)
class Names:
    """What the source called its tensors.

    experts  projection -> template of its module, with {layer} and {expert}
    heads    first component of a name in kt-kernel's checkpoint -> what it was made from
    """

    experts: Mapping[str, str]
    heads: Mapping[str, str]

    def expert(self, place: Place) -> str:
        """Module of a projection as the source called it."""
        template = self.experts[place.projection]
        return template.replace("{layer}", str(place.layer)).replace("{expert}", str(place.expert))

    def rest(self, name: str) -> str:
        """Any other tensor as the source called it."""
        head, dot, tail = name.partition(".")
        return f"{self.heads.get(head, head)}{dot}{tail}"


def expert_place(module: str) -> Place | None:
    """Place of a model's routed expert; None for every other module."""
    match = EXPERT.match(module)
    return Place(int(match["layer"]), LEAVES[match["leaf"]], int(match["expert"])) if match else None


def template(module: str) -> str:
    """Name of an expert's projection with {layer} and {expert} in place of its numbers."""
    match = EXPERT.match(module)
    if match is None:
        raise PlanError(f"{module}: not a routed expert's projection; kt-kernel has no place for it")
    return f"{match['before']}{{layer}}{match['block']}{{expert}}.{match['leaf']}"


def rest_name(name: str) -> str:
    """A tensor outside the routed experts as kt-kernel's converter calls it."""
    short = name.replace(_PREFIX, "", 1)
    for before, after in (("model.layers.", "blk."), ("layers.", "blk."), ("model.", "")):
        if short.startswith(before):
            return after + short.removeprefix(before)
    return short


def source_names(experts: Iterable[str], rest: Iterable[str]) -> Names:
    """What config.json has to say, so that every name can be had back; PlanError where one rule does not do.

    experts  modules of the routed experts' projections
    rest     names of the tensors that are written beside them
    """
    templates: dict[str, str] = {}
    for module in experts:
        place = expert_place(module)
        if place is not None and templates.setdefault(place.projection, template(module)) != template(module):
            raise PlanError(
                f"{module}: other experts are called {templates[place.projection]}; kt-kernel counts the experts of a "
                "layer once, rename one of them"
            )
    heads: dict[str, str] = {}
    for name in rest:
        head, dot, tail = rest_name(name).partition(".")
        origin = name.removesuffix(dot + tail)
        if heads.setdefault(head, origin) != origin:
            raise PlanError(
                f"{name}: becomes {rest_name(name)}, and so would a name that begins with {heads[head]}; leave the "
                "rest of the model out with --experts_only"
            )
    return Names(templates, heads)


def announcement(method: str, parts: int, source: str, names: Names) -> dict[str, Any]:
    """Value of `ktransformers` in config.json."""
    return {
        "method": method, "threadpool_count": parts, "source": source,
        "experts": dict(names.experts), "names": dict(names.heads),
    }  # fmt: skip


def announced_names(config: Mapping[str, Any]) -> Names:
    """Names of the source from config.json; those of kt-kernel's own converter where it does not tell."""
    said = config.get(LAYOUT)
    if said is None:
        return Names({p: _STANDARD.replace("{leaf}", p) for p in PROJECTIONS}, _HEADS)
    experts, heads = (_texts(said.get(key)) if isinstance(said, dict) else None for key in ("experts", "names"))
    if experts is None or heads is None or set(experts) != set(PROJECTIONS):
        raise CheckpointError(
            f"config.json: {LAYOUT} must hold the source's names as `experts` (gate, up, down) and `names`, got "
            f"{said!r:.120}; restore the config.json that belongs to these weights"
        )
    return Names(experts, heads)


def _texts(value: object) -> dict[str, str] | None:
    """A mapping of texts to texts, None for anything else."""
    return value if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()) else None


def without_layout(metadata: Mapping[str, str]) -> dict[str, str]:
    """A file's header without what it says of kt-kernel: no longer true of what is made from it."""
    return {key: value for key, value in metadata.items() if key not in METADATA}


def tree_file(place: Place, part: int, method: str, nbytes: int, suffix: str) -> str:
    """Path of one tensor of a tree of files; `suffix` is weight or scale."""
    kind = "quant" if suffix == "weight" else "scale"
    name = f"{method}_{place.projection}_{place.expert}_{nbytes}Byte_{kind}_.kt"
    return f"_layer_{place.layer}/_numa_{part}/{name}"
