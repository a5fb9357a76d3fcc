"""What the codes of a weight may stand for: every format that GPTQ can fill, seen as steps, zero points and rounding.

    integers    w ~= (code - zero) * step        code = rne(clamp(w / step + zero))
    E2M1        w ~= value(code) * step          value: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives

The steps come from the format's own encoder, so they are what is stored, and what is made of the codes is decoded by
the format itself: nothing here decides about bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mso_hub.checkpoint import Array
from mso_hub.errors import NonFiniteError, PlanError, RecipeError
from mso_hub.formats import Format
from mso_hub.formats.integer import Integer
from mso_hub.formats.mx import Mx
from mso_hub.formats.nvfp4 import Nvfp4

TAGS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
"""torch dtype -> safetensors tag."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def supports(form: Format) -> bool:
    """Can GPTQ choose this format's codes?"""
    return isinstance(form, Integer | Nvfp4) or (isinstance(form, Mx) and form.name == "mxfp4")


def require_support(form: Format, method: str) -> None:
    """RecipeError for a format whose codes or scales a method cannot choose."""
    if not supports(form):
        raise RecipeError(
            f"--method {method}: {form.name} has nothing that it could choose; take w4a16, w8a16, int8, nvfp4 or "
            "mxfp4, or leave it out"
        )


def numbers(weight: Tensor) -> tuple[Array, str]:
    """A matrix as the encoders take it: numpy array, BF16 as uint16 bits, and its dtype tag."""
    held = weight.detach().cpu().contiguous()
    if held.dtype not in TAGS:
        held = held.float()
    tag = TAGS[held.dtype]
    return (held.view(torch.uint16).numpy() if tag == "BF16" else held.numpy()), tag


@dataclass(frozen=True, slots=True)
class Grid:
    """The grid of one weight [N, K] under settled scales.

    form    its format
    dense   dtype to which scales are rounded, where the layout stores them so
    amax    largest magnitude of its unit, for formats that share a scale
    arrays  what the encoder gave for it, round to nearest: codes, scales, zero points
    steps   F32 [N, G], what one step of the codes is worth in each group of columns
    zeros   F32 [N, G] zero points, None without
    """

    form: Format
    dense: str
    amax: float
    arrays: tuple[Array, ...]
    steps: Tensor
    zeros: Tensor | None

    @classmethod
    def build(
        cls, form: Format, weight: Tensor, dense: str, amax: float, importance: NDArray[np.float64] | None = None
    ) -> Grid:
        """The grid that the format gives a weight [N, K]; scales by importance [K] where it is given.

        Raises NonFiniteError for NaN or Inf, PlanError for a scale that its dtype cannot hold.
        """
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError("holds NaN or Inf")
        values, tag = numbers(weight)
        try:
            if importance is None:
                arrays = form.encode(values, tag, dense, amax)
            else:
                arrays = form.encode_weighted(values, tag, dense, amax, importance)
        except ValueError as error:
            raise PlanError(f"{form.name} cannot hold it: {error}; add it to `ignore`") from error
        steps, zeros = _steps(form, arrays, dense, amax)
        device = weight.device
        held = None if zeros is None else torch.from_numpy(zeros).to(device)
        return cls(form, dense, amax, arrays, torch.from_numpy(steps).to(device), held)

    def to(self, device: torch.device) -> Grid:
        """The same on another device."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return replace(self, steps=self.steps.to(device), zeros=zeros)

    def nearest(self, values: Tensor, steps: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes and what they stand for, of numbers F32 with steps (and zero points) of the same shape.

        returns  codes as F32: integers of the format, or signed values of E2M1; and their images F32
        """
        if not isinstance(self.form, Integer):
            magnitude = _e2m1(values.abs() / steps)
            signed = torch.where(values < 0, -magnitude, magnitude)
            return signed, signed * steps
        top = float(1 << (self.form.bits - 1))
        y = values / steps
        codes = (y if zeros is None else y + zeros).clamp(-top, top - 1).round()
        return codes, (codes if zeros is None else codes - zeros) * steps

    def filled(self, codes: Tensor) -> tuple[Array, ...]:
        """The encoder's arrays with other codes [N, K], as `nearest` gives them, under the same scales."""
        found = codes.cpu()
        if isinstance(self.form, Integer):
            zero = None if self.zeros is None else self.zeros.cpu().to(torch.int8).numpy()
            return self.form.assemble(found.to(torch.int8).contiguous().numpy(), self.arrays[1], zero)
        ends = torch.tensor([(a + b) / 2 for a, b in pairwise(E2M1)])
        nibbles = torch.bucketize(found.abs(), ends).to(torch.uint8)
        nibbles |= (found < 0).to(torch.uint8) << 3
        pairs = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
        return (pairs.contiguous().numpy(), *self.arrays[1:])

    def decoded(self, arrays: tuple[Array, ...], columns: int) -> Tensor:
        """What arrays of the format stand for: F32 [N, K] on the device of the steps."""
        found = self.form.decode(arrays, columns, self.dense, self.amax)
        return torch.from_numpy(np.ascontiguousarray(found)).to(self.steps.device)


def _e2m1(y: Tensor) -> Tensor:
    """Nearest E2M1 magnitude of numbers F32 >= 0, ties to even.

    The spacing is .5 below 2, 1 below 4, then 2; adding 2**23 spacings rounds to a multiple of it.
    """
    big = torch.where(y < 2, 2.0**22, torch.where(y < 4, 2.0**23, 2.0**24)).to(y.dtype)
    return ((y + big) - big).clamp(max=6.0)


def _steps(form: Format, arrays: tuple[Array, ...], dense: str, amax: float) -> tuple[Array, Array | None]:
    """Steps and zero points F32 [N, G] of what an encoder made."""
    from mso_hub.formats.numerics import floats, integer

    if isinstance(form, Integer):
        scale = floats.widen(arrays[1], dense)
        if form.symmetric:
            return scale, None
        zero = integer.unpack_zero_point(arrays[2], form.bits, len(arrays[0]), dense=True)
        return scale, zero.astype(np.float32)
    if isinstance(form, Nvfp4):
        stored = form.scalars((), amax)[0][0]
        block = floats.E4M3[arrays[1]]
        return (block * stored if form.layout == "modelopt" else block / stored), None
    if isinstance(form, Mx):
        return floats.E8M0[arrays[1]], None
    raise RecipeError(f"{form.name}: has no steps that codes could be chosen for")
