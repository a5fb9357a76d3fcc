"""An observer that packs the weights of each layer as it ends: what GPTQ and the weighted search have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mso_hub.calibrate.methods.grids import Grid, require_support
from mso_hub.calibrate.methods.targets import Numbers, Target, by_shown
from mso_hub.calibrate.methods.work import LayerFile, Work
from mso_hub.calibrate.observer import Layer, Observer
from mso_hub.errors import MsoError, PlanError

NEAREST = "nearest"
"""In reports: rounded to nearest, under the scales that the format chooses from the weight alone."""


class Packing(Observer):
    """Gets the layer's file ready, packs what is left at its end, puts packed weights in place of the layer's own.

    targets  decoder layer -> weights to pack; a layer without any is passed by
    """

    def __init__(self, targets: Mapping[int, Sequence[Target]], numbers: Numbers, work: Work) -> None:
        self._targets, self._numbers, self._work = targets, numbers, work
        self._shown: dict[str, list[Target]] = {}
        self._report: dict[str, dict[str, Any]] = {}
        self._replacing = False
        self._file: LayerFile

    def begin_layer(self, layer: Layer) -> None:
        """Open the layer's file."""
        self.open(layer.index)

    def open(self, index: int) -> None:
        """Open the file of a layer's targets."""
        targets = self._targets.get(index, ())
        self._shown = by_shown(targets)
        self._file = LayerFile(self._work.file(index), targets)
        self._report, self._replacing = {}, False

    def weight(self, module: str, w: Tensor) -> Tensor:
        """The packed weight, once there is one."""
        if not self._replacing or module not in self._shown:
            return w
        found = w.clone()
        for target in self._shown[module]:
            found[slice(*target.rows)] = torch.from_numpy(self._file.decoded(target)).to(w.device, w.dtype)
        return found

    def grid(self, target: Target, importance: NDArray[np.float64] | None = None) -> tuple[Grid, Tensor]:
        """A target's grid, with importance [K] in the choice of its scales, and its numbers [N, K]."""
        require_support(target.form, "gptq")
        numbers = self._numbers.tensor(target.step.weight)
        try:
            amax = self._numbers.amax(target.step)
            return Grid.build(target.form, numbers, target.step.dense, amax, importance), numbers
        except MsoError as error:
            raise type(error)(f"{target.module}: {error}") from error

    def put(self, target: Target, grid: Grid, codes: Tensor | None, **said: Any) -> None:
        """Write a target's arrays, with its own codes or those that are nearest, and note what was done."""
        self._file.put(target, grid.arrays if codes is None else grid.filled(codes), grid.amax)
        self._report[target.module] = said

    def finish(self, rows: Mapping[str, int]) -> None:
        """Round what is left to nearest and close the file.

        rows  inputs that linear layers have seen, by the name in the walk
        """
        for name, targets in self._shown.items():
            for target in (t for t in targets if t not in self._file):
                self._nearest(target, rows.get(name, 0))
        self._file.finish(self._report)
        self._numbers.forget()
        self._replacing = True

    def _nearest(self, target: Target, rows: int) -> None:
        values, tag = self._numbers.stored(target.step.weight)
        amax = self._numbers.amax(target.step)
        try:
            arrays = target.form.encode(values, tag, target.step.dense, amax)
        except ValueError as error:
            raise PlanError(f"{target.module}: {target.form.name} cannot hold it: {error}") from error
        self._file.put(target, arrays, amax)
        self._report[target.module] = {"method": NEAREST, "rows": rows}

    def replace(self, layer: Layer) -> None:
        """Packed weights in place of those of the layer in memory; experts that are read on demand come as `weight`."""
        merged: dict[int, tuple[nn.Module, list[str]]] = {}
        for name, linear in layer.linears.items():
            merged.setdefault(id(linear), (linear, []))[1].append(name)
        for linear, names in merged.values():
            weight = linear.weight
            assert isinstance(weight, Tensor)  # noqa: S101 - a linear layer's
            height = len(weight) // len(names)
            for at, name in enumerate(names):
                if name in self._shown:
                    part = weight.detach()[at * height : (at + 1) * height]
                    part.copy_(self.weight(name, part))
