"""Errors of weights, or magnitudes of activations -> a grid of decoder layers by projections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mso_hub.plan.summary import kind_of
from mso_hub.verify import TensorError

if TYPE_CHECKING:
    from mso_hub.calibrate.statistics import Statistics

BANDS = 28
"""Rows of a text table; more layers share a row."""
OUTSIDE = "-"
"""Row of weights that belong to no layer."""


@dataclass(frozen=True, slots=True)
class Heat:
    """One number for the modules of each layer and projection.

    layers  numbers as text, in order; OUTSIDE last
    kinds   `self_attn.q_proj`, `mlp.experts.N.up_proj`, ...
    cells   (layer, kind) -> mean relative squared error (NMSE) of the weights there, infinite where one cannot be
            compared; or the largest magnitude of their inputs
    """

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    cells: dict[tuple[str, str], float]


def mean(values: Sequence[float]) -> float:
    """Of at least one."""
    return sum(values) / len(values)


def heat_of(errors: Iterable[TensorError]) -> Heat:
    """The grid of all weights that changed."""
    return _gathered(((*place_of(error.name.removesuffix(".weight")), error.nmse) for error in errors), mean)


def ranges_of(statistics: Statistics) -> Heat:
    """The grid of all modules, and of the keys and values of attention: the largest |x| that entered.

    Projections beside each other with the same numbers in every layer share one name: `self_attn.k/q/v_proj`.
    """
    from mso_hub.calibrate.scales import by_module

    found = [(*place_of(module), value) for module, value in by_module(statistics)[0].items()]
    for module, pair in statistics.caches.items():
        layer, kind = place_of(module)
        found += [(layer, f"{kind} {what}", value) for what, value in zip(("keys", "values"), pair, strict=True)]
    heat = _gathered(found, max)
    columns: dict[tuple[str, tuple[float | None, ...]], list[str]] = {}
    for kind in heat.kinds:
        numbers = tuple(heat.cells.get((layer, kind)) for layer in heat.layers)
        columns.setdefault((kind.rpartition(".")[0], numbers), []).append(kind)
    names = {same[0]: _joined(same) for same in columns.values()}
    cells = {(layer, names[kind]): value for (layer, kind), value in heat.cells.items() if kind in names}
    return Heat(heat.layers, tuple(names.values()), cells)


def _joined(kinds: Sequence[str]) -> str:
    """`attn.k_proj`, `attn.q_proj` -> `attn.k/q_proj`; `mlp.w1`, `mlp.w3` -> `mlp.w1/w3`."""
    prefix, dot, _ = kinds[0].rpartition(".")
    leaves = [kind.rpartition(".")[2] for kind in kinds]
    ends = {leaf.partition("_")[2] for leaf in leaves}
    if len(ends) > 1 or "" in ends:
        return prefix + dot + "/".join(leaves)
    return f"{prefix}{dot}{'/'.join(leaf.partition('_')[0] for leaf in leaves)}_{ends.pop()}"


def _gathered(found: Iterable[tuple[str, str, float]], merge: Callable[[list[float]], float]) -> Heat:
    """(layer, kind, value) of each module -> the grid."""
    cells: dict[tuple[str, str], list[float]] = {}
    for layer, kind, value in found:
        cells.setdefault((layer, kind), []).append(value)
    numbers = sorted({layer for layer, _ in cells}, key=lambda layer: (layer == OUTSIDE, len(layer), layer))
    kinds = dict.fromkeys(kind for _, kind in sorted(cells, key=lambda key: (key[0] == OUTSIDE, key[1])))
    return Heat(tuple(numbers), tuple(kinds), {key: merge(values) for key, values in cells.items()})


def place_of(module: str) -> tuple[str, str]:
    """`model.layers.3.mlp.experts.7.up_proj` -> (`3`, `mlp.experts.N.up_proj`): the first number is the layer's."""
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if part.isascii() and part.isdigit()), None)
    if at is None or at + 1 == len(parts):
        return OUTSIDE, kind_of(module)
    return str(int(parts[at])), kind_of(".".join(parts[at + 1 :]))


def banded(heat: Heat, most: int = BANDS, merge: Callable[[list[float]], float] = mean) -> Heat:
    """The grid with at most `most` rows: neighbouring layers share one, which has their mean, or what `merge` says."""
    inside = [layer for layer in heat.layers if layer != OUTSIDE]
    step = -(-len(inside) // max(1, most - 1))
    if len(heat.layers) <= most or step < 2:
        return heat
    layers: list[str] = []
    cells: dict[tuple[str, str], float] = {}
    for some in [inside[at : at + step] for at in range(0, len(inside), step)]:
        label = f"{some[0]}-{some[-1]}" if len(some) > 1 else some[0]
        layers.append(label)
        for kind in heat.kinds:
            values = [heat.cells[layer, kind] for layer in some if (layer, kind) in heat.cells]
            if values:
                cells[label, kind] = merge(values)
    if OUTSIDE in heat.layers:
        layers.append(OUTSIDE)
        cells |= {key: value for key, value in heat.cells.items() if key[0] == OUTSIDE}
    return Heat(tuple(layers), heat.kinds, cells)
