"""GPTQ: quantize a weight column by column, each column's error made up for by those that are still free.

    minimize ||(W - Q) X||^2      H = 2/n sum x x^T + damping      U upper, U^T U = H^-1

For column j in the order taken: q_j = nearest code, e_j = (w_j - q_j) / U[j, j], and every later column k becomes
w_k - e_j U[j, k]. Blocks of columns are updated at once, which changes nothing but the speed.

Scales are settled before the first column and stay with their groups ("static groups"): columns can then be taken in
any order without an index of groups in the checkpoint. The order is that of falling diagonal entries of H (`static`,
llm-compressor's default, also called `weight` there) or as stored (`none`).

Source: Frantar et al., GPTQ, arXiv 2203.07259, algorithm 1; llm-compressor 0.14 gptq_quantize.py for damping, dead
columns and order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mso_hub.calibrate.methods.grids import Grid
from mso_hub.errors import NonFiniteError, RecipeError

STATIC, PLAIN = "static", "none"
ACTORDERS = (STATIC, PLAIN)
"""Order of columns: by falling second moment of their inputs, or as stored."""


@dataclass(frozen=True, slots=True)
class MethodSettings:
    """How a method runs; the defaults are llm-compressor's.

    dampening_frac  what is added to the diagonal of H, in parts of its mean
    actorder        one of ACTORDERS
    block           columns whose later ones are updated at once
    least_rows      inputs that an expert must have seen; one with fewer is rounded to nearest
    weighted        where the format searches for scales, do it by the second moment of what each column multiplies
    alpha           of SmoothQuant: how much of the outliers moves into the weights, 0 to 1
    """

    dampening_frac: float = 0.01
    actorder: str = STATIC
    block: int = 128
    least_rows: int = 32
    weighted: bool = False
    alpha: float = 0.5

    def __post_init__(self) -> None:
        """RecipeError for what cannot work."""
        if not 0 < self.dampening_frac <= 1:
            raise RecipeError(f"dampening_frac must be above 0 and at most 1, got {self.dampening_frac}")
        if self.actorder not in ACTORDERS:
            raise RecipeError(f"actorder must be one of {', '.join(ACTORDERS)}, got {self.actorder!r}")
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha must be 0 to 1, got {self.alpha}")
        if self.block < 1 or self.least_rows < 1:
            raise RecipeError(f"block and least_rows must be at least 1, got {self.block} and {self.least_rows}")


class Hessian:
    """Sum of x x^T over the inputs of some modules that all get the same, F32 [K, K], and how many there were."""

    __slots__ = ("rows", "sum")

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sum = torch.zeros((columns, columns), dtype=torch.float32, device=device)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Inputs [..., K] of any float dtype."""
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        self.sum.addmm_(flat.T, flat)
        self.rows += len(flat)

    @property
    def mean(self) -> Tensor:
        """H = 2/n sum x x^T, F32 [K, K]; NonFiniteError where inputs were NaN, infinite or too large to be squared."""
        if not bool(torch.isfinite(self.sum).all()):
            raise NonFiniteError("its inputs held NaN or Inf, or squares beyond float32")
        return self.sum * (2.0 / max(1, self.rows))


def second_moment(hessian: Tensor) -> Tensor:
    """E[x^2] F64 [K] of H."""
    return hessian.diagonal().double() / 2


@dataclass(frozen=True, slots=True)
class Factors:
    """A Hessian made ready, once for all weights that share their inputs.

    inverse  F32 [K, K], the upper factor U of H^-1, columns in the order taken
    order    I64 [K], column taken first, second, ...
    dead     columns that were always zero: their weights do not matter and become zero
    raised   times the damping had to be multiplied by ten before H could be factored
    """

    inverse: Tensor
    order: Tensor
    dead: Tensor
    raised: int


def factor(hessian: Tensor, settings: MethodSettings) -> Factors:
    """U of a Hessian F32 [K, K], damped; NonFiniteError where no damping up to its mean is enough."""
    matrix = hessian.clone()
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    order = torch.arange(len(matrix), device=matrix.device)
    if settings.actorder == STATIC:
        order = torch.argsort(diagonal, descending=True, stable=True)
        matrix = matrix[order][:, order]
    mean = float(matrix.diagonal().mean())
    share = settings.dampening_frac
    for raised in range(4):
        damped = matrix.clone()
        damped.diagonal().add_(share * mean)
        lower, bad = torch.linalg.cholesky_ex(damped)
        if not int(bad):
            inverse, bad = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(bad) and bool(torch.isfinite(inverse).all()):
                return Factors(inverse, order, dead, raised)
        share = min(1.0, 10 * share)
    raise NonFiniteError(
        f"its Hessian cannot be factored even with dampening_frac {share:g}; calibrate with more text, or ignore it"
    )


def quantize(weight: Tensor, factors: Factors, grid: Grid, settings: MethodSettings) -> Tensor:
    """Codes [N, K] as `Grid.nearest` gives them, of a weight [N, K] of any float dtype."""
    w = weight.float().masked_fill(factors.dead, 0.0)[:, factors.order]
    columns = w.shape[1]
    group = factors.order // (columns // grid.steps.shape[1])
    u = factors.inverse
    codes = torch.empty_like(w)
    for first in range(0, columns, settings.block):
        last = min(first + settings.block, columns)
        held, inner = w[:, first:last].clone(), u[first:last, first:last]
        steps = grid.steps[:, group[first:last]]
        zeros = None if grid.zeros is None else grid.zeros[:, group[first:last]]
        errors = torch.empty_like(held)
        for at in range(last - first):
            column = held[:, at]
            code, image = grid.nearest(column, steps[:, at], None if zeros is None else zeros[:, at])
            codes[:, first + at] = code
            errors[:, at] = (column - image) / inner[at, at]
            held[:, at + 1 :].addr_(errors[:, at], inner[at, at + 1 :], alpha=-1.0)
        w[:, last:].addmm_(errors, u[first:last, last:], alpha=-1.0)
    found = torch.empty_like(codes)
    found[:, factors.order] = codes
    return found


def output_error(weight: Tensor, image: Tensor, hessian: Tensor) -> float:
    """Mean over inputs of ||(W - Q) x||^2, from H = 2/n sum x x^T, in F64."""
    difference = (weight.double() - image.double()).to(hessian.device)
    return float(((difference @ hessian.double()) * difference).sum()) / 2
