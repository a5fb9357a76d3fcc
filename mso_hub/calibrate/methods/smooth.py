"""SmoothQuant: activations with outliers in few columns are divided there, so that INT8 activations round less.

    s = max|x|**alpha / max|w|**(1 - alpha)       per column, over all text and over all rows of the consumers

Only norms are divided. Where a column is always zero, or a weight's is, s is 1.

Source: Xiao et al., SmoothQuant, arXiv 2211.10438, equation 4; llm-compressor 0.14 modifiers/smoothquant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mso_hub.calibrate.methods.folds import Fold
from mso_hub.calibrate.methods.scaled import F32
from mso_hub.calibrate.methods.targets import Numbers, Target, by_shown
from mso_hub.calibrate.observer import Layer
from mso_hub.errors import NonFiniteError, RecipeError


class SmoothChoice:
    """Chooses by the largest magnitudes.

    alpha  how much of the difficulty moves to the weights, between 0 and 1
    """

    norms_only = True
    again = False

    def __init__(self, targets: Mapping[int, Sequence[Target]], numbers: Numbers, *, alpha: float = 0.5) -> None:
        if not 0 <= alpha <= 1:
            raise RecipeError(f"alpha must be between 0 and 1, got {alpha}")
        self._targets, self._numbers, self._alpha = targets, numbers, alpha
        self._folds: Sequence[Fold] = ()
        self._shown: dict[str, list[Target]] = {}
        self._largest: dict[str, Tensor] = {}

    def begin(self, layer: Layer, folds: Sequence[Fold]) -> None:
        """Start anew."""
        self._folds, self._largest = folds, {}
        self._shown = by_shown(self._targets.get(layer.index, ()))

    def see(self, module: str, x: Tensor) -> None:
        """Largest magnitude of each column."""
        found = x.detach().reshape(-1, x.shape[-1]).abs().amax(0).float().cpu()
        known = self._largest.get(module)
        self._largest[module] = found if known is None else torch.maximum(known, found)

    def finish(self, layer: Layer) -> dict[str, F32]:
        """Scales of every fold whose consumers were seen."""
        found: dict[str, F32] = {}
        for fold in self._folds:
            seen = [self._largest[slot.shown] for slot in fold.consumers if slot.shown in self._largest]
            if not seen:
                continue
            inputs = torch.stack(seen).amax(0)
            if not bool(torch.isfinite(inputs).all()):
                raise NonFiniteError(f"{fold.name}: what it hands on held NaN or Inf")
            found[fold.name] = smoothing(inputs, self._weights(fold), self._alpha)
        return found

    def _weights(self, fold: Fold) -> Tensor:
        """Largest magnitude of each column of the quantized consumers."""
        targets = [t for slot in fold.consumers for t in self._shown.get(slot.shown, ())]
        return torch.stack([self._numbers.tensor(t.step.weight).float().abs().amax(0) for t in targets]).amax(0)


def smoothing(inputs: Tensor, weights: Tensor, alpha: float) -> F32:
    """Scales F32 [K] from largest magnitudes [K] of inputs and of weights."""
    scales = inputs.double() ** alpha / weights.double() ** (1 - alpha)
    fine = torch.isfinite(scales) & (inputs > 0) & (weights > 0)
    return torch.where(fine, scales.clamp(1e-5, 1e5), 1.0).numpy().astype(np.float32)
