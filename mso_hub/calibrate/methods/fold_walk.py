"""Scales that move from activations into weights, over a walk: first the proof that they may, then the choice.

Nothing in memory changes: the model computes the same before and after, so one pass over the text is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mso_hub.calibrate.cache import read_tree, write_tree
from mso_hub.calibrate.methods.folds import Fold, Slot, find_folds
from mso_hub.calibrate.methods.scaled import F32
from mso_hub.calibrate.methods.targets import Target
from mso_hub.calibrate.methods.work import Work
from mso_hub.calibrate.observer import Layer, Observer
from mso_hub.calibrate.walk import Walk


class Choice(Protocol):
    """How scales are chosen.

    norms_only  leave linear layers that follow one another alone
    again       `finish` may have to run the layer
    """

    norms_only: bool
    again: bool

    def begin(self, layer: Layer, folds: Sequence[Fold]) -> None:
        """A layer and the folds that are proven."""

    def see(self, module: str, x: Tensor) -> None:
        """Input of a linear layer."""

    def finish(self, layer: Layer) -> dict[str, F32]:
        """Fold -> scales [size]; a fold without an entry stays as it is."""


class FoldWalk(Observer):
    """The observer: proves folds at the beginning of a layer, writes the chosen scales at its end.

    targets  decoder layer -> weights that the recipe quantizes; a fold without one among its consumers is left out
    """

    def __init__(self, walk: Walk, targets: Mapping[int, Sequence[Target]], work: Work, choice: Choice) -> None:
        self._walk, self._targets, self._work, self._choice = walk, targets, work, choice
        self.changes_weights = choice.again
        self._paths = {entry.name: path for path, made in walk.table.made_of.items() for entry in made}
        self._trial: dict[str, list[tuple[Tensor, bool]]] = {}
        self._folds: list[Fold] = []
        self._refused: list[str] = []
        self._listening = False

    def begin_layer(self, layer: Layer) -> None:
        """Find the folds and prove them, kind by kind."""
        shapes = shapes_of(self._walk, layer.index)
        wanted = {target.shown for target in self._targets.get(layer.index, ())}
        found = find_folds(prefix_of(self._walk, layer.index), shapes, norms_only=self._choice.norms_only)
        found = [fold for fold in found if any(slot.shown in wanted for slot in fold.consumers)]
        kinds = {kind: [fold for fold in found if fold.kind == kind] for kind in {fold.kind: 0 for fold in found}}
        plain = layer.forward(0) if kinds else None
        self._folds, self._refused = [], []
        for folds in kinds.values():
            if plain is not None and self._proven(layer, folds, plain):
                self._folds += folds
            else:
                self._refused += [fold.name for fold in folds]
        self._choice.begin(layer, self._folds)
        self._listening = True

    def inputs(self, module: str, x: Tensor) -> Tensor:
        """Pass them on."""
        if self._listening:
            self._choice.see(module, x)
        return x

    def weight(self, module: str, w: Tensor) -> Tensor:
        """An expert's, under the scales that are being proven."""
        for factor, rows in self._trial.get(module, ()):
            w = w * (factor[:, None] if rows else factor).to(w)
        return w

    def end_layer(self, layer: Layer) -> bool:
        """Choose, and write."""
        chosen = self._choice.finish(layer)
        self._listening = False
        path = self._work.file(layer.index)
        write_tree(path.with_suffix(".tmp"), {k: torch.from_numpy(v) for k, v in chosen.items()}, durable=True)
        self._work.note(layer.index, {"folds": sorted(chosen), "refused": self._refused})
        path.with_suffix(".tmp").replace(path)
        return self.changes_weights

    def _proven(self, layer: Layer, folds: Sequence[Fold], plain: Tensor) -> bool:
        """Is the layer's output the same bit for bit under scales that lose nothing?"""
        generator = torch.Generator().manual_seed(layer.index)
        self._trial = {}
        with torch.no_grad(), self._undone() as undo:
            for fold in folds:
                powers = torch.randint(-2, 3, (fold.size,), generator=generator)
                scales = torch.ldexp(torch.ones(fold.size), powers)
                for slot in fold.producers:
                    self._apply(layer, slot, 1 / scales, undo, rows=True)
                for slot in fold.consumers:
                    self._apply(layer, slot, scales, undo, rows=False)
            return torch.equal(layer.forward(0), plain)

    @contextmanager
    def _undone(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Within the block weights may be changed in place; what is listed is put back."""
        undo: list[tuple[Tensor, Tensor]] = []
        try:
            yield undo
        finally:
            self._trial = {}
            for part, before in reversed(undo):
                part.copy_(before)

    def _apply(
        self, layer: Layer, slot: Slot, factor: Tensor, undo: list[tuple[Tensor, Tensor]], *, rows: bool
    ) -> None:
        """Multiply rows or columns of a tensor in memory, or of an expert when it is read."""
        part = self._part(layer, slot)
        if part is None:
            whole = torch.ones(slot.first + len(factor)) if rows else factor
            if rows:
                whole[slot.first :] = factor
            self._trial.setdefault(slot.shown, []).append((whole, rows))
            return
        own = part[slot.first : slot.first + len(factor)] if rows else part
        undo.append((own, own.clone()))
        by = factor.to(own)
        own.mul_(by[:, None] if rows and own.dim() == 2 else by)

    def _part(self, layer: Layer, slot: Slot) -> Tensor | None:
        """A stored matrix or vector in the memory of the layer; None for an expert that is read on demand."""
        path = self._paths[slot.tensor]
        below = path.split(f".{layer.index}.", 1)[1]
        module: nn.Module = layer.module.get_submodule(below.rpartition(".")[0])
        parameter = module._parameters.get(below.rpartition(".")[2])  # noqa: SLF001
        if parameter is None or parameter.is_meta or (slot.expert is None and parameter.dim() == 3):
            return None
        own = parameter.detach()
        if slot.expert is not None:
            return own[slot.expert]
        made = [entry.name for entry in self._walk.table.made_of[path]]
        height = len(own) // len(made)
        return own[made.index(slot.tensor) * height : (made.index(slot.tensor) + 1) * height]


def read_scales(work: Work, layer: int) -> dict[str, F32]:
    """What was chosen for a finished layer."""
    found: dict[str, Any] = read_tree(work.file(layer))
    return {name: np.array(tensor.numpy(), np.float32) for name, tensor in found.items()}


def shapes_of(walk: Walk, layer: int) -> dict[str, tuple[int, ...]]:
    """Stored tensor of a decoder layer -> shape."""
    return {name: walk.weights.shape(name) for name in walk.table.layers[layer]}


def prefix_of(walk: Walk, layer: int) -> str:
    """Stored prefix of a decoder layer: `model.layers.3`."""
    marker = f".{layer}."
    return next(n[: n.index(marker)] + marker[:-1] for n in walk.table.layers[layer] if marker in n)
