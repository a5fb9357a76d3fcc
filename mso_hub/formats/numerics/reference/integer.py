"""Integer weights in plain torch.

    w ~= (code - zero_point) * scale         code = round(clamp(w / scale + zero_point)), half to even

Packed, codes are stored plus 2**(bits - 1) so that they are not negative, in a stream of bits that is cut into int32
words. Each group of columns has a scale; without zero points it is

    scale = amax / 7.5                       for 4 bits, whose codes go from -8 to 7; amax / 127.5 for 8 bits

so that the largest number lies in the middle between what 7 and 8 can reach. With zero points, scale = (max - min) / 15
and zero_point = round(-8 - min / scale), where min and max are taken with 0, so that 0 is decoded to 0.

The code divides by the scale that was *rounded* to the dtype in which it is stored, so its rounding error is
compensated. "mse" tries other scales: a smaller one clips the largest number for the benefit of the rest.

Encoding what was decoded must change nothing. Decoding rounds (code - zero_point) * scale to the dtype of the weights,
say BF16, and from these numbers, the *image*, amax / 7.5 gives another scale than the one they were made with. So a
group is first tested for being an image: `find` tries the few scales that could have made it. And since two scales can
make the same image, the scale of any other group is exchanged for the one that `find` sees in its image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mso_hub.formats.numerics.integer_search import grid

LANES = 16


def unpack(packed: Tensor, bits: int, cols: int, *, dense: bool) -> Tensor:
    """Codes of a matrix packed along its columns, offset removed.

    packed   I32 [rows, words]; dense: one bit stream for the row, else floor(32 / bits) codes a word
    returns  I32 [rows, cols] in -2**(bits-1) .. 2**(bits-1) - 1
    """
    stream = (packed.unsqueeze(-1) >> torch.arange(32)) & 1  # [rows, words, 32], lowest bit first
    if not dense:
        stream = stream[..., : 32 // bits * bits]  # the bits above the last whole code are unused
    code_bits = stream.flatten(1)[:, : cols * bits].reshape(packed.shape[0], cols, bits)
    code = (code_bits << torch.arange(bits)).sum(-1)
    return code.int() - (1 << (bits - 1))


def decode(
    code: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """(code - zero_point) * scale in F32, rounded once to `dtype`.

    code        I32 [rows, cols]
    scale       F32 [rows, groups], multiplies
    zero_point  I32 or I8 [rows, groups], None means 0
    group       I64 [cols], group of each column: arange(cols) // group_size, or g_idx
    returns     [rows, cols]
    """
    distance = code if zero_point is None else code - zero_point.int()[:, group]
    return (distance.float() * scale[:, group]).to(dtype)


def decode_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, *, group_size: int, dtype: torch.dtype) -> Tensor:
    """AutoAWQ's GEMM layout: I32 [K, N/8] and [K/g, N/8], scales [K/g, N]; returns [N, K].

    Nibble 0, 1, 2 .. of a word, from the lowest bits on, is column 0, 2, 4, 6, 1, 3, 5, 7 of eight.
    """

    def nibbles(words: Tensor) -> Tensor:
        lowest_first = (words.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
        return lowest_first[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(1)

    group = torch.arange(qweight.shape[0]) // group_size
    return decode(nibbles(qweight).T, scales.float().T, nibbles(qzeros).T, group, dtype)


def decode_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    group: Tensor,
    *,
    bits: int,
    zero_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """GPTQ's layout.

    qweight      I32 [K*bits/32, N], a bit stream down each column
    qzeros       I32 [K/g, N*bits/32], a bit stream along each row
    scales       [K/g, N]
    group        I64 [K], group of each input: arange(K) // group_size, or g_idx
    zero_offset  1 where zero points are stored minus one (gptq), else 0 (gptq_v2)
    returns      [N, K]
    """
    rows, cols = scales.shape[1], qweight.shape[0] * 32 // bits
    code = unpack(qweight.T, bits, cols, dense=True)
    if zero_offset and 32 % bits == 0:  # one more in every code; a carry undoes the borrow of a code that was 0
        qzeros = qzeros + sum(1 << low for low in range(0, 32, bits))
    zero_point = unpack(qzeros, bits, rows, dense=True).T
    if zero_offset and 32 % bits:
        half = 1 << (bits - 1)
        zero_point = (zero_point + half + 1) % (2 * half) - half
    return decode(code, scales.float().T, zero_point, group, dtype)


def encode(
    weight: Tensor,
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    scale_dtype: torch.dtype,
    search: str = "absmax",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes I8 [rows, cols], scales F32 [rows, groups] and zero points I8 [rows, groups] or None.

    weight       BF16, F16 or F32 [rows, cols], finite
    group_size   columns per scale, a divisor of cols; None for one scale per row
    scale_dtype  dtype in which the scales will be stored; they are rounded to it
    """
    rows, cols = weight.shape
    size = group_size or cols
    rule = Rule(bits, symmetric, weight.dtype, scale_dtype)
    tried = torch.from_numpy(grid(bits, size, symmetric=symmetric)) if search == "mse" else None
    encoded = [rule.encode(group.float(), tried) for group in weight.reshape(-1, size)]
    codes, scale, zero_point = (torch.stack(part) for part in zip(*encoded, strict=True))
    zeros = None if symmetric else zero_point.reshape(rows, -1).to(torch.int8)
    return codes.reshape(rows, cols).to(torch.int8), scale.reshape(rows, -1), zeros


@dataclass(frozen=True)
class Rule:
    """How groups are encoded. Scales, zero points and codes are F32 tensors of no dimension or of the group's."""

    bits: int
    symmetric: bool
    dtype: torch.dtype
    scale_dtype: torch.dtype

    @property
    def lowest(self) -> int:
        """-8 for 4 bits."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """7 for 4 bits."""
        return (1 << (self.bits - 1)) - 1

    def encode(self, x: Tensor, tried: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scale and zero point of one group."""
        if not x.any():
            eps = torch.tensor(torch.finfo(self.scale_dtype).eps)  # as in compressed-tensors
            return torch.zeros_like(x), eps, torch.tensor(0.0)
        found = self.find(x)
        if found:
            return self.exact_code(x, *found), *found
        first = self.scale_over(self.span(x), x)
        scale, zero_point = first if tried is None else self.best(x, first, tried)
        codes = self.code(x, scale, zero_point)
        y = self.decode(codes, scale, zero_point)
        found = self.find(y)
        return (self.exact_code(y, *found), *found) if found else (codes, scale, zero_point)

    def code(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """round(clamp(x / scale + zero_point))."""
        return (x / scale + zero_point).clamp(self.lowest, self.highest).round()

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Image, rounded to the dtype of the weights."""
        return ((codes - zero_point) * scale).to(self.dtype).float()

    def exact_code(self, y: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Codes that are decoded to y: the nearest, or the one above or below.

        Only 255 steps in BF16, which has 256 numbers for a power of two, can make a neighbour necessary.
        """
        nearest = codes = self.code(y, scale, zero_point)
        if self.dtype == torch.bfloat16 and self.bits == 8:
            for other in (nearest - 1, nearest + 1):
                fits = (other >= self.lowest) & (other <= self.highest) & (self.decode(other, scale, zero_point) == y)
                codes = torch.where(fits, other, codes)
            codes = torch.where(self.decode(nearest, scale, zero_point) == y, nearest, codes)
        return codes

    def find(self, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """First scale and zero point that reproduce a group."""
        for scale in self.possible_scales(y):
            zero_point = torch.tensor(0.0) if self.symmetric else self.exact_zero_point(y, scale)
            if zero_point is not None:
                codes = self.exact_code(y, scale, zero_point)
                if torch.equal(self.decode(codes, scale, zero_point), y):
                    return scale, zero_point
        return None

    def possible_scales(self, y: Tensor) -> Iterator[Tensor]:
        """Scales that could have made this image, in order; the last one is the smallest number of the dtype."""
        most, step = y.abs().max(), torch.tensor(smallest(self.dtype))
        for code in self.possible_largest_codes(y):
            for steps in (0, -1, 1):
                scale = self.round_scale(most / code, steps)
                if 0 < scale < math.inf and (code * scale).to(self.dtype).float() == most:
                    yield scale
        if most <= 2**self.bits * step and step.to(self.scale_dtype) == step:
            yield step

    def possible_largest_codes(self, y: Tensor) -> range:
        """|code - zero_point| that the largest magnitude may have had."""
        low, high, most = y.min().clamp(max=0).double(), y.max().clamp(min=0).double(), y.abs().max()
        top, number = -self.lowest, 2**self.bits - 1
        coarse = most < 256 * top * smallest(self.dtype)  # scales are few there, and the largest codes may be unused
        if self.symmetric:
            first = top if -low == most else top - 1
            return range(first, (top // 2 if coarse or self.bits <= 4 else top - 1) - 1, -1)
        guess = int((number * most.double() / (high - low)).round())
        slack = 2 if self.bits > 4 and self.dtype == torch.bfloat16 else 0
        last = guess // 2 if coarse else guess - 2 - slack
        return range(min(guess + slack, number), max(last, 1) - 1, -1)

    def exact_zero_point(self, y: Tensor, scale: Tensor) -> Tensor | None:
        """Zero point that gives the smallest number the lowest code, if there is one."""
        down, up = self.multiple(y.min().clamp(max=0), scale), self.multiple(y.max().clamp(min=0), scale)
        if down is None or up is None or up - down > 2**self.bits:
            return None
        too_many = up - down > 2**self.bits - 1  # by rounding, which moves the larger of both
        zero_point = self.highest - up if too_many and up < -down else self.lowest - down
        return zero_point if self.lowest <= zero_point <= self.highest else None

    def multiple(self, value: Tensor, scale: Tensor) -> Tensor | None:
        """The n for which n * scale is rounded to `value`."""
        nearest = (value / scale).round()
        numbers = (nearest, nearest + 1, nearest - 1) if self.dtype == torch.bfloat16 else (nearest,)
        return next((n for n in numbers if (n * scale).to(self.dtype).float() == value), None)

    def round_scale(self, value: Tensor, steps: int = 0) -> Tensor:
        """The scale nearest to `value`, or `steps` places above.

        If scales were finer than the weights, they could not be found again. So scale * 2**(bits - 1) is a number of
        the dtype of the weights, too.
        """
        if self.dtype in (torch.float32, self.scale_dtype):
            return step_from(value.to(self.scale_dtype), steps).float()
        product = step_from((value * -self.lowest).to(self.dtype), steps).float()
        return (product / -self.lowest).to(self.scale_dtype).float()

    def span(self, x: Tensor, kept: Tensor | float = 1.0) -> Tensor:
        """What one code covers, if this part of both ends is kept."""
        low, high = x.min().clamp(max=0) * kept, x.max().clamp(min=0) * kept
        number = (1 << self.bits) - 1
        if self.symmetric:
            return torch.maximum(-low, high) / (number / 2)
        return (high - low) / number if high - low < math.inf else high / number - low / number

    def scale_over(self, value: Tensor, x: Tensor, kept: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """Scale and zero point, smaller where a code would be decoded to infinity."""
        low = x.min().clamp(max=0) * kept
        value = value.clamp(max=torch.finfo(self.dtype).max / -self.lowest)
        while True:
            scale, zero_point = self.round_scale(value), torch.tensor(0.0)
            if not 0 < scale < math.inf:
                raise ValueError(f"a scale of {value} is 0 or infinity in {self.scale_dtype}")
            if not self.symmetric:
                zero_point = (self.lowest - low / scale).clamp(self.lowest, self.highest).round()
            ends = self.decode(torch.tensor([self.lowest, self.highest]).float(), scale, zero_point)
            if ends.isfinite().all():
                return scale, zero_point
            value = value * (1 - 2.0 ** -(self.bits + 1))

    def best(self, x: Tensor, first: tuple[Tensor, Tensor], tried: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point with the least squared error: `first`, or one of the grid."""
        chosen, least = first, self.squared_error(x, *first)
        for number in tried:
            if self.symmetric:
                pair = self._try(x.abs().max() / number, x)
            else:
                pair = self._try(self.span(x, number), x, number)
            if pair is not None and (error := self.squared_error(x, *pair)) < least:
                chosen, least = pair, error
        return chosen

    def _try(self, value: Tensor, x: Tensor, kept: Tensor | float = 1.0) -> tuple[Tensor, Tensor] | None:
        """`scale_over`, but None for what `find` would not find again in an image."""
        if self.round_scale(value.clamp(max=torch.finfo(self.dtype).max / -self.lowest)) == 0:
            return None
        scale, zero_point = self.scale_over(value, x, kept)
        unused = self.symmetric and (x.abs().max() / scale).round() < self.highest
        return None if unused or scale < smallest(self.dtype) else (scale, zero_point)

    def squared_error(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """F64 sum of (w - dequantized)**2 in 16 lanes, without the rounding to the dtype of the weights."""
        error = x - (self.code(x, scale, zero_point) - zero_point) * scale
        squares = torch.nn.functional.pad(error, (0, -len(error) % LANES)).double().square()
        lanes = torch.zeros(LANES, dtype=torch.float64)
        for part in squares.reshape(-1, LANES):
            lanes += part
        total = torch.zeros((), dtype=torch.float64)
        for lane in lanes:
            total += lane
        return total


def smallest(dtype: torch.dtype) -> float:
    """Smallest positive number of a dtype, a subnormal one."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def step_from(value: Tensor, steps: int) -> Tensor:
    """The number some places above a positive one: for these, the order of the bits is that of the numbers."""
    as_integer = {2: torch.int16, 4: torch.int32}[value.element_size()]
    return (value.view(as_integer) + steps).view(value.dtype)
