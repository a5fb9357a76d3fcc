"""Encode integer weights on CUDA: see `numerics.integer_encode` for the format, whose bytes these kernels reproduce."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mso_hub.formats.numerics.cuda.floats import launch, load_f32, loadable, precision, require_device
from mso_hub.formats.numerics.cuda.integer_search import best, code_of, ends, exact_code, find, image, scale_over, span
from mso_hub.formats.numerics.integer import words_per_row
from mso_hub.formats.numerics.integer_encode import SEARCHES
from mso_hub.formats.numerics.integer_search import grid

_TILE = 1024  # words


def encode(
    values: Tensor,
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    scale_dtype: torch.dtype,
    search: str = "absmax",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize a matrix in groups of columns, byte for byte as `numerics.integer_encode.encode`.

    values       BF16, F16 or F32 [rows, cols], contiguous, finite
    bits         2 to 8
    group_size   columns per scale, a divisor of cols; None for one scale per row
    symmetric    without zero points
    scale_dtype  bfloat16, float16 or float32, the dtype in which the scales will be stored
    search       "absmax" or "mse"
    returns      codes int8 [rows, cols], scale F32 [rows, groups] rounded to scale_dtype, zero_point int8
                 [rows, groups] or None
    direction    the scale multiplies: w ~= (code - zero_point) * scale
    raises       ValueError when cols is no multiple of group_size, or a scale rounds to 0 or to infinity in scale_dtype
    """
    if values.ndim != 2 or 0 in values.shape or not 2 <= bits <= 8:
        raise ValueError(f"integers need a matrix and 2 to 8 bits, got {list(values.shape)} and {bits} bits")
    if search not in SEARCHES:
        raise ValueError(f"search must be one of {', '.join(SEARCHES)}, got {search!r}")
    rows, cols = values.shape
    size = cols if group_size is None else group_size
    if size < 1 or cols % size:
        raise ValueError(
            f"group_size must divide the {cols} columns, got {group_size}; None is one scale for a whole row"
        )
    stored, shape = loadable(values), (rows, cols // size)
    codes = torch.empty((rows, cols), dtype=torch.int8, device=values.device)
    scale = torch.empty(shape, dtype=torch.float32, device=values.device)
    zero_point = torch.empty(shape, dtype=torch.int8, device=values.device)
    tried = torch.from_numpy(grid(bits, size, symmetric=symmetric)).to(values.device)
    count = tried.numel() if search == "mse" else 0
    groups, (tile_groups, tile) = scale.numel(), (32, 32) if size <= 256 else (4, 256)
    launch(
        _encode, (triton.cdiv(groups, tile_groups),), stored, codes, scale, zero_point, tried, count, groups, size,
        eps=torch.finfo(scale_dtype).eps, mse=count > 0, bits=bits, symmetric=symmetric,
        precision=precision(values.dtype), scale_precision=precision(scale_dtype),
        tile_groups=tile_groups, tile=tile,
    )  # fmt: skip
    if not bool(scale.all()):
        row, group = divmod(int((scale == 0).flatten().nonzero()[0]), shape[1])
        largest = float(values[row, group * size : (group + 1) * size].abs().max())
        raise ValueError(
            f"the scale of row {row}, group {group} with amax {largest:.6g} would round to 0 or infinity in "
            f"{scale_dtype}"
        )
    return codes, scale, None if symmetric else zero_point


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the columns: one dense bit stream a row, the first code in the lowest bits.

    codes    int8 [rows, cols] in -2**(bits-1) .. 2**(bits-1) - 1, stored plus 2**(bits-1)
    returns  int32 [rows, ceil(cols * bits / 32)]; unused bits are 0
    """
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise ValueError(f"codes must be an int8 matrix, got {codes.dtype} {list(codes.shape)}")
    require_device(codes)
    rows, cols = codes.shape
    words = words_per_row(cols, bits, dense=True)
    packed = torch.empty((rows, words), dtype=torch.int32, device=codes.device)
    if packed.numel():
        grid = (rows, triton.cdiv(words, _TILE))
        launch(_pack, grid, codes.contiguous(), packed, cols, words, bits=bits, tile=_TILE)
    return packed


def pack_zero_point(zero_point: Tensor, bits: int) -> Tensor:
    """Pack zero points along the rows.

    zero_point  int8 [rows, groups]; a block of rows begins at a multiple of 32
    returns     int32 [ceil(rows * bits / 32), groups]
    """
    return pack(zero_point.T.contiguous(), bits).T.contiguous()


@triton.jit
def _encode(
    x: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    zero_point: tl.tensor,
    tried: tl.tensor,
    tried_size: tl.tensor,
    groups: tl.tensor,
    size: tl.tensor,
    eps: tl.constexpr,
    mse: tl.constexpr,
    bits: tl.constexpr,
    symmetric: tl.constexpr,
    precision: tl.constexpr,
    scale_precision: tl.constexpr,
    tile_groups: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Fill codes [groups * size], scale and zero_point [groups] from x; scale 0 where none can be stored."""
    group = tl.program_id(0).to(tl.int64) * tile_groups + tl.arange(0, tile_groups)
    live = group < groups
    x += group * size
    nothing = tl.zeros((tile_groups,), tl.float32)
    low, high, _ = ends(x, size, nothing, nothing, live, False, bits, precision, tile)  # noqa: FBT003
    wanted = live & ((low < 0.0) | (high > 0.0))
    exact, zero = find(
        x, size, nothing, nothing, wanted, False, bits, symmetric, precision, scale_precision, tile  # noqa: FBT003
    )  # fmt: skip
    wanted = wanted & (exact == 0.0)
    if mse:
        guess, guess_zero = best(
            x, size, low, high, wanted, tried, tried_size, bits, symmetric, precision, scale_precision
        )
    else:
        guess, guess_zero = scale_over(
            span(low, high, bits, symmetric), low, wanted, bits, symmetric, precision, scale_precision
        )
    wanted = wanted & (guess > 0.0)
    guess, guess_zero = tl.where(wanted, guess, 0.0), tl.where(wanted, guess_zero, 0.0)
    settled, settled_zero = find(
        x, size, guess, guess_zero, wanted, True, bits, symmetric, precision, scale_precision, tile  # noqa: FBT003
    )  # fmt: skip
    chosen = tl.where(exact > 0.0, exact, tl.where(settled > 0.0, settled, guess))
    chosen_zero = tl.where(exact > 0.0, zero, tl.where(settled > 0.0, settled_zero, guess_zero))
    is_zero = live & (low == 0.0) & (high == 0.0)
    tl.store(scale + group, tl.where(is_zero, eps, chosen), mask=live)
    tl.store(zero_point + group, tl.where(is_zero, 0.0, chosen_zero).to(tl.int32).to(tl.int8), mask=live)
    certain: tl.constexpr = precision != 1 or bits < 8 or symmetric
    settled_same = (settled == 0.0) | ((settled == guess) & (settled_zero == guess_zero))
    plain = certain & ((exact > 0.0) | (wanted & settled_same))
    codes += group * size
    both = (guess, guess_zero, chosen, chosen_zero)
    _store_codes(x, codes, size, live, is_zero, *both, plain, bits, precision, tile)


@triton.jit
def _store_codes(
    x: tl.tensor,
    codes: tl.tensor,
    size: tl.tensor,
    live: tl.tensor,
    is_zero: tl.tensor,
    guess: tl.tensor,
    guess_zero: tl.tensor,
    scale: tl.tensor,
    zero_point: tl.tensor,
    plain: tl.tensor,
    bits: tl.constexpr,
    precision: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Fill codes: of the numbers where `plain`, else those that reproduce the numbers or their images under a guess."""
    replaced = ((guess > 0.0) & (plain == 0))[:, None]
    for start in range(0, size, tile):
        k = start + tl.arange(0, tile)[None, :]
        inside = live[:, None] & (k < size)
        v = load_f32(x[:, None] + k, inside)
        v = tl.where(replaced, image(v, guess[:, None], guess_zero[:, None], bits, precision), v)
        nearest = code_of(v, scale[:, None], zero_point[:, None], bits)
        code = exact_code(v, scale[:, None], zero_point[:, None], bits, precision)
        code = tl.where(is_zero[:, None], 0.0, tl.where(plain[:, None], nearest, code))
        tl.store(codes[:, None] + k, code.to(tl.int32).to(tl.int8), mask=inside)


@triton.jit
def _pack(
    codes: tl.tensor, packed: tl.tensor, cols: tl.tensor, words: tl.tensor, bits: tl.constexpr, tile: tl.constexpr
) -> None:
    """Fill packed [rows, words] from codes [rows, cols] plus 2**(bits-1), lowest bits first."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * tile + tl.arange(0, tile)
    held = tl.zeros((tile,), tl.int64)
    for i in range((31 + bits) // bits + 1):  # the codes with a bit in this word, one of them may lie outside
        k = word * 32 // bits + i
        code = tl.load(codes + row * cols + k, mask=k < cols, other=0).to(tl.int64)
        code = tl.where(k < cols, (code + (1 << (bits - 1))) & ((1 << bits) - 1), 0)
        place = k.to(tl.int64) * bits - word.to(tl.int64) * 32  # above -bits
        moved = tl.where(place < 0, code >> tl.maximum(-place, 0), code << tl.maximum(tl.minimum(place, 32), 0))
        held |= tl.where(place < 32, moved, 0)
    tl.store(packed + row * words + word, held.to(tl.int32), mask=word < words)
