"""Stored tensor -> parameter -> decoder layer, from names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mso_hub.calibrate.skeleton import Skeleton
from mso_hub.calibrate.transformers_api import Names, Place
from mso_hub.calibrate.weights import Weights
from mso_hub.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored tensor that a parameter is made of.

    name   as it is stored (as a dense checkpoint calls it)
    place  where it goes
    """

    name: str
    place: Place

    @property
    def module(self) -> str:
        """The name without `.weight`."""
        return self.name.removesuffix(".weight")


@dataclass(frozen=True, slots=True)
class Table:
    """Which stored tensors make which part of a model.

    layers    one entry per decoder layer: names of stored tensors
    base      those of the decoder beside its layers: embedding, norms
    rest      those of the model around the decoder: head, other towers
    unused    those that the model has no place for: layers for multi-token prediction, other models
    made_of   parameter or buffer -> what it is made of
    """

    layers: tuple[tuple[str, ...], ...]
    base: tuple[str, ...]
    rest: tuple[str, ...]
    unused: tuple[str, ...]
    made_of: dict[str, tuple[Entry, ...]]

    def modules(self, parameter: str) -> tuple[str, ...]:
        """Stored names of the modules of a parameter `X.weight`; its own name where it is tied to another one."""
        found = self.made_of.get(parameter)
        if not found:
            return (parameter.removesuffix(".weight"),)
        return tuple(dict.fromkeys(entry.module for entry in found))


def read_table(skeleton: Skeleton, names: Iterable[str]) -> Table:
    """Sort the names of a checkpoint."""
    rules = Names(skeleton.model)
    count = len(skeleton.layers)
    layers: list[list[str]] = [[] for _ in range(count)]
    base: list[str] = []
    rest: list[str] = []
    unused: list[str] = []
    made_of: dict[str, list[Entry]] = {}
    in_layer = re.compile(re.escape(skeleton.prefix) + r"(\d+)\.")
    for name in names:
        place = rules.place(name)
        if place is None:
            unused.append(name)
            continue
        for target in place.targets:
            made_of.setdefault(target, []).append(Entry(name, place))
        match = in_layer.match(place.targets[0])
        if match:
            layers[int(match[1])].append(name)
        else:
            (base if place.targets[0].startswith(skeleton.top) else rest).append(name)
    entries = {target: tuple(found) for target, found in made_of.items()}
    return Table(tuple(map(tuple, layers)), tuple(base), tuple(rest), tuple(unused), entries)


def require_whole(skeleton: Skeleton, table: Table, weights: Weights) -> None:
    """CheckpointError, from headers alone, for what the layers and the head lack and for a weight of another shape."""
    state = skeleton.base.state_dict(prefix=skeleton.top)
    lost = [name for name, tensor in state.items() if tensor.is_meta and name not in table.made_of]
    tied = any(getattr(config, "tie_word_embeddings", False) for config in (skeleton.config, skeleton.text))
    head = skeleton.model.get_output_embeddings()  # type: ignore[operator]
    path = next((name for name, module in skeleton.model.named_modules() if module is head), None)
    if path is not None and not tied and f"{path}.weight" not in table.made_of:
        lost.append(f"{path}.weight")
    if lost:
        more = f", nor {len(lost) - 1:,} others" if len(lost) > 1 else ""
        raise CheckpointError(
            f"{weights.checkpoint.name}: no stored tensor makes {lost[0]}{more}; the checkpoint is incomplete or its "
            "config.json belongs to another model"
        )
    for name, entries in table.made_of.items():
        if not name.startswith(skeleton.prefix) or len(entries) > 1 or entries[0].place.pattern is not None:
            continue
        wanted, found = list(state[name].shape), list(weights.shape(entries[0].name))
        if found != wanted:
            raise CheckpointError(f"{name}: config.json makes it {wanted}, the stored tensors {found}")
