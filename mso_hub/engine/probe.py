"""An encoder that keeps no codes: it tells what other encoders do to each row. One pass measures several formats."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mso_hub.checkpoint import Array, TensorInfo
from mso_hub.engine.distance import widened
from mso_hub.errors import RecipeError
from mso_hub.formats import Format, Scheme


@dataclass(frozen=True, slots=True)
class Probe(Format):
    """Encodes under each candidate, decodes, compares.

    scheme      what the rule wants for these weights, `name` its format
    candidates  label -> encoder
    packed      the weights come from a packed source, so that wide scales are F32
    """

    scheme: Scheme
    candidates: Mapping[str, Format]
    packed: bool = False
    name: str = ""
    layout: str = ""
    search: str = ""

    @property
    def bits(self) -> int:
        """Of a sum."""
        return 64

    @property
    def activations(self) -> int:
        """None is quantized."""
        return 16

    @property
    def shares(self) -> bool:
        """Does any candidate need the largest magnitude of the unit?"""
        return any(form.shares for form in self.candidates.values())

    @property
    def row_step(self) -> int:
        """Where every candidate may start."""
        return math.lcm(*(form.row_step for form in self.candidates.values()))

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """None: a weight is measured under those candidates that can hold it."""
        return None

    def outputs(self, module: str, shape: tuple[int, ...], dtype: str) -> tuple[TensorInfo, ...]:
        """F64: sums of squares [N], then for each candidate sums of squared differences and largest ones [N, 2]."""
        energy = TensorInfo(f"{module}.energy", "F64", shape[:1])
        return energy, *(TensorInfo(f"{module}.{label}", "F64", (shape[0], 2)) for label in self.candidates)

    def encode(self, values: Array, dtype: str, dense: str, amax: float) -> tuple[Array, ...]:
        """Rows [r, K] -> their `outputs`; infinite for a candidate that cannot store one of its scales.

        A row's numbers depend on that row alone, however many are measured at once.
        """
        energy = np.empty(len(values))
        for rows, numbers in widened(values, dtype):
            energy[rows] = np.square(numbers, dtype=np.float64).sum(axis=1)
        return energy, *(self._measure(form, values, dtype, dense, amax) for form in self.candidates.values())

    def _measure(self, form: Format, values: Array, dtype: str, dense: str, amax: float) -> Array:
        found = np.full((len(values), 2), np.inf)
        stored = "F32" if self.packed and form.wide_scales else dense
        try:
            after = form.decode(form.encode(values, dtype, stored, amax), values.shape[1], stored, amax)
        except ValueError:
            return found
        for rows, numbers in widened(values, dtype):
            difference = np.abs(after[rows] - numbers).astype(np.float64)
            found[rows, 0] = np.square(difference).sum(axis=1)
            found[rows, 1] = difference.max(axis=1, initial=0)
        return found

    def decode(self, arrays: tuple[Array, ...], columns: int, dense: str, amax: float) -> Array:
        """There are no codes: RecipeError."""
        raise RecipeError(f"{self.name} measures {', '.join(self.candidates)} and keeps no codes to decode")

    @property
    def group(self) -> Mapping[str, Any]:
        """No config can name it: RecipeError."""
        raise RecipeError(f"{self.name} measures {', '.join(self.candidates)} and has no name in a config")
