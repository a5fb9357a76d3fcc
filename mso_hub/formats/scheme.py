"""What a recipe asks for, and what every encoder answers to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mso_hub.checkpoint import Array, TensorInfo
from mso_hub.errors import RecipeError

IMPORTED = "imported"
"""The `input_scale` that stands for the activation scales of another checkpoint."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How some weights are to be stored; what is None is the format's own choice.

    format       key of FORMATS, or DENSE
    activations  bits of an activation while it is multiplied: 16, 8 or 4
    group_size   columns per scale; 0 for one scale a row
    symmetric    integers without a zero point
    search       how scales are chosen: absmax, mse, ...
    input_scale  static activation scale (a multiplier), or "imported"
    """

    format: str = "nvfp4"
    activations: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    search: str | None = None
    input_scale: float | str | None = None

    def __post_init__(self) -> None:
        """Refuse a scale that float32 or its reciprocal cannot hold."""
        scale = self.input_scale
        if isinstance(scale, str) and scale != IMPORTED:
            raise RecipeError(f'input_scale must be a number or "{IMPORTED}", got {scale!r}')
        if isinstance(scale, int | float) and not 2.0**-126 <= scale <= 2.0**126:
            raise RecipeError(f"input_scale must be a finite number > 0, 1.2e-38 to 8.5e37, got {scale}")


class Format(ABC):
    """One scheme in one layout: states its outputs from shapes alone, makes them, and says how a config names it.

    name    key in FORMATS
    layout  how it lies on disk: compressed-tensors, modelopt or deepseek
    search  how scales are chosen
    static  does every weight carry an activation scale?
    """

    name: str
    layout: str
    search: str
    static: bool = False

    @property
    @abstractmethod
    def bits(self) -> int:
        """Width of a code."""

    @property
    @abstractmethod
    def activations(self) -> int:
        """Bits of an activation while it is multiplied; 16 stands for all that is not quantized."""

    @property
    def shares(self) -> bool:
        """Do the weights that an engine fuses share one scale, made from the largest magnitude among them?"""
        return False

    @property
    def headroom(self) -> float:
        """Factor on the largest magnitude that was measured, for activations that no calibration text showed."""
        return 1.0

    @property
    def wide_scales(self) -> bool:
        """Do loaders keep scales in F32, whatever the model's dtype?"""
        return False

    @property
    def row_step(self) -> int:
        """A block of rows starts at a multiple of this."""
        return 1

    @abstractmethod
    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be stored, or None."""

    def fused_problem(self, shapes: Sequence[tuple[int, ...]]) -> str | None:
        """Why engines cannot fuse weights of these shapes in this order, or None."""
        return None

    @property
    def unloadable(self) -> str | None:
        """Why vLLM loads no weight stored this way, and what it loads; None where it does."""
        return None

    @property
    def expert_problem(self) -> str | None:
        """Why vLLM loads no experts stored this way, and what it loads; None where it does."""
        return None

    @property
    def head_problem(self) -> str | None:
        """Why vLLM loads no output head stored this way, and what it loads; None where it does."""
        return None

    @abstractmethod
    def outputs(self, module: str, shape: tuple[int, ...], dtype: str) -> tuple[TensorInfo, ...]:
        """Tensors that replace a weight: those of `encode` in order, then those of `scalars`.

        dtype  what the model's dense weights are: BF16, F16 or F32
        """

    @abstractmethod
    def encode(self, values: Array, dtype: str, dense: str, amax: float) -> tuple[Array, ...]:
        """A block of rows -> the same rows of each row-wise output.

        values  [r, K] held as `dtype`; F32 where a packed source was decoded
        dense   what the model's dense weights are: scales are rounded to it where the layout stores them so
        amax    largest magnitude of the unit, for formats that share a scale; else unused
        Raises ValueError for a scale that its dtype cannot hold.
        """

    def encode_weighted(
        self, values: Array, dtype: str, dense: str, amax: float, importance: NDArray[np.float64]
    ) -> tuple[Array, ...]:
        """As `encode` with scales that have the least squared error, the squares times what their column weighs.

        importance  [K] finite numbers >= 0, such as the mean square of what each column is multiplied with
        """
        raise RecipeError(f"{self.name}: its scales cannot be chosen by importance; take nvfp4, mxfp4, w4a16 or w8a16")

    @abstractmethod
    def decode(self, arrays: tuple[Array, ...], columns: int, dense: str, amax: float) -> Array:
        """What `encode` made of a block of rows, as F32 [r, columns] again."""

    def scalars(self, shape: tuple[int, ...], amax: float) -> tuple[Array, ...]:
        """The outputs that do not go by rows."""
        return ()

    def input_output(self, module: str, scale: float) -> tuple[TensorInfo, float]:
        """The activation scale's tensor (F32, one element) and what is stored in it for a multiplier `scale`."""
        raise RecipeError(f"{self.name} has no static activation scale, {module} was given {scale}; leave it out")

    def input_scale(self, amax: float) -> float:
        """Multiplier for activations whose largest magnitude is `amax`."""
        raise RecipeError(f"{self.name} has no static activation scale, got amax {amax}; leave it out")

    @property
    @abstractmethod
    def group(self) -> Mapping[str, Any]:
        """compressed-tensors: `format`, `weights` and `input_activations` of its config group."""

    @property
    def algo(self) -> str:
        """ModelOpt: its quant_algo."""
        raise RecipeError(f"{self.name} has no name in ModelOpt's layout, got {self.layout!r}")


@dataclass(frozen=True, slots=True)
class Choices:
    """What a format can be asked for. In every tuple the first entry is the default.

    loaders      layout -> runtimes that load it
    activations  layout -> bits of activations
    static       activation bits that need a scale in the checkpoint
    group_sizes  columns per scale, 0 for one scale a row; empty where the format fixes them
    asymmetric   may there be zero points?
    searches     how scales may be chosen
    """

    loaders: Mapping[str, str]
    activations: Mapping[str, tuple[int, ...]]
    searches: tuple[str, ...]
    group_sizes: tuple[int, ...] = ()
    asymmetric: bool = False
    refusals: Mapping[str, str] = field(default_factory=dict)

    def check(self, scheme: Scheme, layout: str) -> None:
        """RecipeError for a combination that does not exist or that no runtime loads."""
        name = scheme.format
        if layout not in self.loaders:
            why = self.refusals.get(layout, "there is no such layout of this format")
            raise RecipeError(f"{name} in the layout {layout!r}: {why}; use the layout {' or '.join(self.loaders)}")
        for said, known, option in (
            (scheme.activations, self.activations[layout], "activations"),
            (scheme.group_size, self.group_sizes, "group_size"),
            (scheme.search, self.searches, "scale_search"),
        ):
            if said is None or said in known:
                continue
            if not known:
                raise RecipeError(f"{option}: {name} has no choice of it, got {said!r}; leave it out")
            reason = self.refusals.get(f"{option} {said}", "")
            raise RecipeError(
                f"{option} of {name} ({layout}) must be {' or '.join(map(str, known))}, got {said!r}"
                + (f": {reason}" if reason else "")
            )
        if scheme.symmetric is False and not self.asymmetric:
            raise RecipeError(f"{name} is always symmetric; leave --asymmetric out")
        if scheme.symmetric is True and not self.group_sizes:
            raise RecipeError(f"{name} is always symmetric; leave --symmetric out")
