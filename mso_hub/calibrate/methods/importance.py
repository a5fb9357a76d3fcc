"""Scales by importance: squared errors of a weight's columns count as much as the mean square of what they multiply.

    minimize over the scales of a group      sum over its columns of E[x^2] * (w - dequantized)^2

This is the output's expected squared error, with the inputs taken as uncorrelated. Codes are still nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mso_hub.calibrate.methods.packing import Packing
from mso_hub.calibrate.methods.targets import Numbers, Target
from mso_hub.calibrate.methods.work import Work
from mso_hub.calibrate.observer import Layer
from mso_hub.errors import NonFiniteError

WEIGHTED = "weighted search"


class Moments:
    """Sums of squares of the inputs of linear layers, F64 [K] each, and how many inputs there were."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    def add(self, module: str, x: Tensor) -> None:
        """Inputs [..., K] of any float dtype."""
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        found = flat.square().sum(0, dtype=torch.float64)
        self._sums[module] = self._sums[module] + found if module in self._sums else found
        self.rows[module] = self.rows.get(module, 0) + len(flat)

    def mean(self, module: str) -> Tensor:
        """E[x^2] F64 [K]; NonFiniteError where an input was NaN or infinite."""
        found = (self._sums[module] / max(1, self.rows[module])).cpu()
        if not bool(torch.isfinite(found).all()):
            raise NonFiniteError(f"{module}: its inputs held NaN or Inf")
        return found


class WeightedWalk(Packing):
    """One pass: second moments of a layer's inputs, then its weights under the scales that suit them.

    least_rows  inputs that an expert must have seen; one with fewer is rounded to nearest
    """

    def __init__(
        self, targets: Mapping[int, Sequence[Target]], numbers: Numbers, work: Work, *, least_rows: int
    ) -> None:
        super().__init__(targets, numbers, work)
        self._least = least_rows
        self._moments = Moments()

    def begin_layer(self, layer: Layer) -> None:
        """Start anew."""
        super().begin_layer(layer)
        self._moments = Moments()

    def inputs(self, module: str, x: Tensor) -> Tensor:
        """Add the squares."""
        if module in self._shown:
            self._moments.add(module, x)
        return x

    def end_layer(self, layer: Layer) -> bool:
        """Pack everything; the layer in memory stays as it is."""
        self.pack(self._moments.rows, lambda name: self._moments.mean(name).numpy())
        return False

    def pack(self, rows: Mapping[str, int], moment: Callable[[str], NDArray[np.float64]]) -> None:
        """Pack all targets of the open file.

        rows    inputs that each linear layer has seen
        moment  linear layer -> E[x^2] [K]
        """
        for name, targets in self._shown.items():
            if rows.get(name, 0) >= self._least:
                for target in targets:
                    grid, _ = self.grid(target, moment(name))
                    self.put(target, grid, None, method=WEIGHTED, rows=rows[name])
        self.finish(rows)
