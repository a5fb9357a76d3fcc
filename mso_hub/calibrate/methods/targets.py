"""What a method has to pack: the weights that a recipe quantizes, by the names under which a walk shows them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mso_hub.calibrate.weights import TORCH
from mso_hub.checkpoint import Array, Checkpoint, TensorInfo
from mso_hub.errors import NonFiniteError, PlanError
from mso_hub.formats import Format
from mso_hub.formats.decoders.base import shape_reader
from mso_hub.formats.weight import Weight
from mso_hub.plan import Plan, Recipe, Step, plan_checkpoint
from mso_hub.plan.experts import FUSED_EXPERTS
from mso_hub.plan.select import EXPERT
from mso_hub.source import Source


@dataclass(frozen=True, slots=True)
class Target:
    """A weight that the recipe quantizes.

    step    of the plan
    module  its stored name; of a view of a stored 3-D tensor, the name that it gets beside that tensor
    shown   what a walk calls the linear layer that it is, or is a part of
    rows    first and one past the last of its rows there
    """

    step: Step
    module: str
    shown: str
    rows: tuple[int, int]

    @property
    def form(self) -> Format:
        """Its encoder."""
        if self.step.format is None:
            raise PlanError(f"{self.module}: is not quantized")
        return self.step.format

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, K]."""
        return self.step.weight.shape

    @property
    def is_view(self) -> bool:
        """Is it a part of a stored 3-D tensor?"""
        return self.shown.endswith("]")

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Tensors that it becomes, under its stored name."""
        return self.form.outputs(self.module, self.shape, self.step.dense)


def plan_targets(source: Source, checkpoint: Checkpoint, recipe: Recipe) -> tuple[Plan, list[Target]]:
    """The plan of a recipe, and what of it a method could pack; PlanError and RecipeError as planning raises them."""
    plan = plan_checkpoint(checkpoint, recipe, shape_reader(source.read))
    steps = [s for shard in plan.shards for s in shard.steps if s.format is not None]
    return plan, [_target(step) for step in steps]


def _target(step: Step) -> Target:
    weight = step.weight
    stored = weight.home.name
    bank, here = FUSED_EXPERTS.match(stored), EXPERT.match(weight.module)
    rows = weight.shape[0]
    if bank is None or here is None or f"{here['bank']}.{here['leaf']}" == stored.removesuffix(".weight"):
        module = stored.rpartition(".")[0]
        return Target(step, module, module, (0, rows))
    expert = weight.module.rpartition(".")[0].rpartition(".")[2]
    first = rows if here["leaf"] == "up_proj" else 0
    shown = f"{stored.removesuffix('.weight')}[{expert}]"
    return Target(step, f"{bank['bank']}.{expert}.{here['leaf']}", shown, (first, first + rows))


def by_shown(targets: Iterable[Target]) -> dict[str, list[Target]]:
    """Name in a walk -> targets that are its rows, in order."""
    found: dict[str, list[Target]] = {}
    for target in targets:
        found.setdefault(target.shown, []).append(target)
    return {name: sorted(members, key=lambda t: t.rows) for name, members in found.items()}


class Numbers:
    """Numbers of weights, read from the source when they are asked for.

    units  unit key -> weights that share a scale, as the plan has them
    """

    def __init__(self, source: Source, units: Mapping[str, Sequence[Weight]]) -> None:
        self._read, self._units = source.read, units
        self._amax: dict[str, float] = {}

    def stored(self, weight: Weight) -> tuple[Array, str]:
        """[N, K] as it is stored when dense, F32 when packed, and the dtype tag."""
        values, tag = weight.values(weight.load(self._read, 0, weight.shape[0]), 0, weight.shape[0])
        return np.ascontiguousarray(values), tag

    def tensor(self, weight: Weight) -> Tensor:
        """The same as a tensor."""
        values, tag = self.stored(weight)
        return torch.from_numpy(values).view(TORCH[tag]) if tag == "BF16" else torch.from_numpy(values)

    def amax(self, step: Step) -> float:
        """Largest magnitude of the step's unit, 0.0 where it has none; NonFiniteError for NaN or Inf in it."""
        from mso_hub.formats.numerics import floats

        if step.unit is None:
            return 0.0
        if step.unit not in self._amax:
            found = [floats.amax(*self.stored(weight)) for weight in self._units[step.unit]]
            if not all(math.isfinite(value) for value in found):
                raise NonFiniteError(f"{step.unit}: holds NaN or Inf")
            self._amax[step.unit] = max(found)
        return self._amax[step.unit]

    def forget(self) -> None:
        """Drop what is known of units: their layer is done."""
        self._amax.clear()
