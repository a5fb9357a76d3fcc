"""AWQ: columns that meet large activations are multiplied up before rounding, and what enters them is divided.

    s = a**r / m**(1 - r)  or  a**r       a = mean |x|, m = mean |w| within its group, per column; r = 0, 1/20 .. 19/20
    minimize over s       sum over linear layers of E ||(W - Q(W s) / s) x||^2

The error is that of the linear layers that share the input, computed from H = E[x x^T] instead of from stored inputs
(on at most 256 rows of each), with the format's own encoder as Q. s is divided by the geometric mean of its ends.
s = 1 is among the choices (r = 0 of the second form): no layer gets a larger error on this text.

Source: Lin et al., AWQ, arXiv 2306.00978; llm-compressor 0.14 modifiers/awq for the two forms, the grid and the
normalization. They measure the output of the whole block in place of its linear layers'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mso_hub.calibrate.methods.folds import Fold
from mso_hub.calibrate.methods.gptq import Hessian
from mso_hub.calibrate.methods.grids import Grid
from mso_hub.calibrate.methods.hessians import Gather
from mso_hub.calibrate.methods.scaled import F32
from mso_hub.calibrate.methods.targets import Numbers, Target, by_shown
from mso_hub.calibrate.observer import Layer
from mso_hub.errors import MsoError, NonFiniteError

GRID = 20
SAMPLE = 256
"""Rows of a weight on which errors are measured."""
LEAST = 1e-4


class Means:
    """Sums of |x| over the inputs of linear layers, F64 [K] each."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    def add(self, module: str, x: Tensor) -> None:
        """Inputs [..., K]."""
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        found = flat.abs().sum(0, dtype=torch.float64).cpu()
        self._sums[module] = self._sums[module] + found if module in self._sums else found
        self.rows[module] = self.rows.get(module, 0) + len(flat)

    def mean(self, modules: Sequence[str]) -> Tensor | None:
        """Mean of |x| F64 [K] over all inputs of these; None where there was none. NonFiniteError for NaN or Inf."""
        seen = [module for module in modules if self.rows.get(module)]
        if not seen:
            return None
        found = torch.stack([self._sums[m] for m in seen]).sum(0) / sum(self.rows[m] for m in seen)
        if not bool(torch.isfinite(found).all()):
            raise NonFiniteError(f"{seen[0]}: its inputs held NaN or Inf")
        return found


class AwqChoice:
    """Chooses by output error.

    least_rows  inputs that the consumers of a fold must have seen together; one with fewer stays as it is
    """

    norms_only = False
    again = True

    def __init__(
        self, targets: Mapping[int, Sequence[Target]], numbers: Numbers, gather: Gather, *, least_rows: int
    ) -> None:
        self._targets, self._numbers, self._gather, self._least = targets, numbers, gather, least_rows
        self._shown: dict[str, list[Target]] = {}
        self._fold_of: dict[str, Fold] = {}
        self._means = Means()
        self._main = False
        self._candidates: dict[str, list[Tensor]] = {}
        self._losses: dict[str, Tensor] = {}

    def begin(self, layer: Layer, folds: Sequence[Fold]) -> None:
        """Listen to the weights that are quantized and lie behind a fold."""
        every = by_shown(self._targets.get(layer.index, ()))
        self._fold_of = {slot.shown: fold for fold in folds for slot in fold.consumers if slot.shown in every}
        self._shown = {name: every[name] for name in self._fold_of}
        self._means, self._main = Means(), True
        self._candidates, self._losses = {}, {}
        self._gather.begin(layer, {name: fold.size for name, fold in self._fold_of.items()})

    def see(self, module: str, x: Tensor) -> None:
        """Means from the pass over all batches, Hessians whenever they are wanted."""
        if self._main and module in self._fold_of:
            self._means.add(module, x)
        self._gather.see(module, x)

    def finish(self, layer: Layer) -> dict[str, F32]:
        """The best candidate of each fold."""
        self._main = False
        folds = {fold.name: fold for fold in self._fold_of.values()}
        for fold in folds.values():
            members = [name for name, own in self._fold_of.items() if own is fold]
            mean = self._means.mean(members)
            if mean is not None and sum(self._means.rows.get(name, 0) for name in members) >= self._least:
                self._candidates[fold.name] = candidates(mean, self._magnitude(members))
                self._losses[fold.name] = torch.zeros(len(self._candidates[fold.name]), dtype=torch.float64)
        self._gather.finish(layer, self._measure)
        self._numbers.forget()
        best = {name: int(losses.argmin()) for name, losses in self._losses.items()}
        return {name: self._candidates[name][at].numpy().astype(np.float32) for name, at in best.items()}

    def _magnitude(self, modules: Sequence[str]) -> Tensor:
        """Mean of |w| / largest of its group, F64 [K], over all rows of the modules' weights."""
        total, rows = torch.zeros(()), 0
        for target in (t for name in modules for t in self._shown[name]):
            grid, numbers = self._grid(target, None)
            size = numbers.shape[1] // grid.steps.shape[1]
            parts = numbers.double().abs().reshape(len(numbers), -1, size)
            scaled = parts / parts.amax(-1, keepdim=True).clamp(min=1e-300)
            total = total + scaled.reshape(len(numbers), -1).sum(0)
            rows += len(numbers)
        return total / max(1, rows)

    def _grid(self, target: Target, scales: Tensor | None) -> tuple[Grid, Tensor]:
        """A sample of a target's rows under scales [K], on its grid, and the rows as they are."""
        numbers = self._numbers.tensor(target.step.weight)
        step = max(1, len(numbers) // SAMPLE)
        numbers = numbers[::step][:SAMPLE].contiguous()
        amax = self._numbers.amax(target.step)
        scaled = numbers
        if scales is not None:
            scaled = (numbers.float() * scales.float()).to(numbers.dtype)
            amax = max(amax, float(scaled.abs().max())) if target.step.unit is not None else amax
        form, count = target.form, len(numbers)
        if count % form.row_step:
            scaled = torch.cat([scaled, scaled[: form.row_step - count % form.row_step]])
        try:
            return Grid.build(form, scaled, target.step.dense, amax), numbers
        except MsoError as error:
            raise type(error)(f"{target.module}: {error}") from error

    def _measure(self, modules: Sequence[str], hessian: Hessian) -> None:
        """Add the errors of linear layers with the same input, under every candidate of their fold."""
        mean: Tensor | None = None
        for name in modules:
            fold = self._fold_of[name].name
            if fold not in self._candidates or not hessian.rows:
                continue
            mean = hessian.mean if mean is None else mean
            for target in self._shown[name]:
                weight = target.shape[0] * hessian.rows
                for at, scales in enumerate(self._candidates[fold]):
                    grid, numbers = self._grid(target, scales)
                    image = grid.decoded(grid.arrays, numbers.shape[1])[: len(numbers)] / scales.float()
                    lost = (numbers.float() - image).to(mean.device)
                    self._losses[fold][at] += float(((lost @ mean) * lost).sum()) / len(numbers) * weight


def candidates(activations: Tensor, weights: Tensor) -> list[Tensor]:
    """Scales F64 [K] to try; the first is 1.

    activations, weights  F64 [K] >= 0, mean magnitudes of columns
    """
    a, m = activations.clamp(min=LEAST), weights.clamp(min=LEAST)
    found = [torch.ones_like(a)]
    for at in range(GRID):
        ratio = at / GRID
        forms = [a**ratio / m ** (1 - ratio)] + ([a**ratio] if at else [])
        found += [(s / (s.max() * s.min()).sqrt()).clamp(LEAST, 1 / LEAST) for s in forms]
    return found
