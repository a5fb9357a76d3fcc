"""GPTQ over a walk: as soon as the Hessian of some linear layers is there, their codes.

The layer's outputs, which the next layer gets, come from the quantized weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mso_hub.calibrate.methods.gptq import Hessian, MethodSettings, factor, output_error, quantize, second_moment
from mso_hub.calibrate.methods.hessians import Gather
from mso_hub.calibrate.methods.packing import Packing
from mso_hub.calibrate.methods.targets import Numbers, Target
from mso_hub.calibrate.methods.work import Work
from mso_hub.calibrate.observer import Layer
from mso_hub.errors import MsoError

GPTQ = "gptq"
SAMPLE = 256
"""Rows of a weight on which the report's errors are measured."""


class GptqWalk(Packing):
    """The observer."""

    changes_weights = True

    def __init__(
        self, targets: Mapping[int, Sequence[Target]], numbers: Numbers, work: Work, settings: MethodSettings,
        gather: Gather,
    ) -> None:  # fmt: skip
        super().__init__(targets, numbers, work)
        self._settings, self._gather = settings, gather
        self._rows: dict[str, int] = {}

    def begin_layer(self, layer: Layer) -> None:
        """Listen to what enters the experts."""
        super().begin_layer(layer)
        self._rows = {}
        self._gather.begin(layer, {name: parts[0].shape[1] for name, parts in self._shown.items()})

    def inputs(self, module: str, x: Tensor) -> Tensor:
        """Add to the Hessian."""
        self._gather.see(module, x)
        return x

    def end_layer(self, layer: Layer) -> bool:
        """Quantize everything, what has its Hessian first."""
        self._gather.finish(layer, self._quantize)
        self.finish(self._rows)
        self.replace(layer)
        self._gather.renew()
        return True

    def _quantize(self, modules: Sequence[str], hessian: Hessian) -> None:
        """Codes of linear layers with the same inputs; those that saw too little are left to be rounded."""
        self._rows |= dict.fromkeys(modules, hessian.rows)
        if hessian.rows < self._settings.least_rows:
            return
        try:
            mean = hessian.mean
            factors = factor(mean, self._settings)
        except MsoError as error:
            raise type(error)(f"{modules[0]}: {error}") from error
        moment = second_moment(mean).cpu().numpy()
        for target in (t for name in modules for t in self._shown[name]):
            by_moment = self._settings.weighted and target.form.search == "mse"
            grid, numbers = self.grid(target, moment if by_moment else None)
            grid, numbers = grid.to(mean.device), numbers.to(mean.device)
            codes = quantize(numbers, factors, grid, self._settings)
            rows = slice(0, SAMPLE)
            image = grid.decoded(grid.filled(codes), numbers.shape[1])
            nearest = grid.decoded(grid.arrays, numbers.shape[1])
            self.put(
                target, grid, codes, method=GPTQ, rows=hessian.rows, raised=factors.raised,
                error=output_error(numbers[rows], image[rows], mean),
                nearest_error=output_error(numbers[rows], nearest[rows], mean),
            )  # fmt: skip
