"""Errors of weights -> a grid of decoder layers by projections."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mso_hub.plan.summary import kind_of
from mso_hub.verify import TensorError

BANDS = 28
"""Rows of a text table; more layers share a row."""
OUTSIDE = "-"
"""Row of weights that belong to no layer."""


@dataclass(frozen=True, slots=True)
class Heat:
    """Mean relative squared error (NMSE) of the weights of each layer and projection.

    layers  numbers as text, in order; OUTSIDE last
    kinds   `self_attn.q_proj`, `mlp.experts.N.up_proj`, ...
    cells   (layer, kind) -> mean over the weights there; infinite where one cannot be compared
    """

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    cells: dict[tuple[str, str], float]


def heat_of(errors: Iterable[TensorError]) -> Heat:
    """The grid of all weights that changed."""
    found: dict[tuple[str, str], list[float]] = {}
    for error in errors:
        found.setdefault(place_of(error.name.removesuffix(".weight")), []).append(error.nmse)
    numbers = sorted({layer for layer, _ in found}, key=lambda layer: (layer == OUTSIDE, len(layer), layer))
    kinds = dict.fromkeys(kind for _, kind in sorted(found, key=lambda key: key[1]))
    return Heat(tuple(numbers), tuple(kinds), {key: sum(v) / len(v) for key, v in found.items()})


def place_of(module: str) -> tuple[str, str]:
    """`model.layers.3.mlp.experts.7.up_proj` -> (`3`, `mlp.experts.N.up_proj`): the first number is the layer's."""
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if part.isascii() and part.isdigit()), None)
    if at is None or at + 1 == len(parts):
        return OUTSIDE, kind_of(module)
    return str(int(parts[at])), kind_of(".".join(parts[at + 1 :]))


def banded(heat: Heat, most: int = BANDS) -> Heat:
    """The grid with at most `most` rows: neighbouring layers share one, which has the mean of theirs."""
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
                cells[label, kind] = sum(values) / len(values)
    if OUTSIDE in heat.layers:
        layers.append(OUTSIDE)
        cells |= {key: value for key, value in heat.cells.items() if key[0] == OUTSIDE}
    return Heat(tuple(layers), heat.kinds, cells)
