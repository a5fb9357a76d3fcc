"""Encode integer weights on the CPU: 2- to 8-bit codes, one scale for a group of columns or for a row.

    w ~= (code - zero_point) * scale         code = rne(clamp(w / scale + zero_point)), in -2**(bits-1) .. 2**(bits-1)-1

                scale                              zero_point
    symmetric   amax / ((2**bits - 1) / 2)         none
    else        (max - min) / (2**bits - 1)        rne(-2**(bits-1) - min / scale), where min <= 0 <= max

All arithmetic is float32 with true divisions, by the scale as it will be stored. Codes, scales and zero points of
"absmax" are those of compressed-tensors 0.20 for F32 weights, but for groups that a scale reproduces exactly or whose
image two scales share; `integer_search` says how those are chosen. For BF16 and F16 weights compressed-tensors works in
that dtype, less exactly. `integer` decodes, `reference` is the same arithmetic in plain torch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mso_hub.formats.numerics.e2m1 import column_weights
from mso_hub.formats.numerics.floats import PRECISION, Array, amax, flat_bits, load_f16, load_f32, round_f32, storage
from mso_hub.formats.numerics.integer import words_per_row
from mso_hub.formats.numerics.integer_search import (
    BIG,
    LANES,
    best,
    exact_code,
    find,
    grid,
    is_certain,
    scale_over,
    span,
)
from mso_hub.formats.numerics.kernel import kernel

SEARCHES = ("absmax", "mse")
"""How a scale is chosen: from the largest magnitude (or both ends), or by trying several."""

_TILE = 2048  # numbers, or a group if that is more: the steps work on what is in the cache
_ZERO, _EXACT, _ROUNDED = 0, 1, 2
_EPS = {"F32": 2.0**-23, "BF16": 2.0**-7, "F16": 2.0**-10}


def encode(
    values: Array,
    dtype: str,
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    scale_dtype: str,
    search: str = "absmax",
    importance: npt.NDArray[np.float64] | None = None,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32], npt.NDArray[np.int8] | None]:
    """Quantize a matrix in groups of columns.

    values       [rows, cols] finite, held as `floats.storage(dtype)`
    bits         2 to 8
    group_size   columns per scale, a divisor of cols; None for one scale per row
    symmetric    without zero points
    scale_dtype  BF16, F16 or F32, the dtype in which the scales will be stored
    search       a group that some scale reproduces exactly gets that scale. Otherwise "absmax": the scale above;
                 "mse": of that scale and `grid`, the one with the smallest sum of (w - dequantized)**2; the differences
                 are float32, the sum is float64 in 16 lanes, ties go to the first
    importance   [cols] numbers >= 0, only with "mse": the squares are multiplied by that of their column, the sum is in
                 column order; the best scale is then fitted to its codes, sum(w x c) / sum(w c**2), while that helps
    returns      codes int8 [rows, cols], scale float32 [rows, groups] rounded to scale_dtype, zero_point int8
                 [rows, groups] or None
    direction    the scale multiplies: w ~= (code - zero_point) * scale
    zeros        an all-zero group has the scale that compressed-tensors gives it, the eps of scale_dtype
    stable       encoding what `integer.decode` gives in `dtype` gives the same codes, scales and zero points again;
                 where scale_dtype is neither `dtype` nor F32, as long as scales are normal numbers of scale_dtype
    raises       ValueError when cols is no multiple of group_size, or a scale rounds to 0 or to infinity in scale_dtype
    source       absmax: compressed-tensors 0.20 calculate_qparams and quantize
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
    storage(scale_dtype)
    codes = np.empty((rows, cols), np.int8)
    scale, zero_point = np.empty((rows, cols // size), np.float32), np.empty((rows, cols // size), np.int8)
    weights = column_weights(importance, cols, search)
    tried = grid(bits, size, symmetric=symmetric) if search == "mse" else np.empty(0, np.float32)
    options = (bits, symmetric, PRECISION[dtype], PRECISION[scale_dtype])
    out = (codes.reshape(-1).view(np.uint8), scale.reshape(-1), zero_point.reshape(-1))
    bad = _encode(flat_bits(values, dtype), size, options, np.float32(_EPS[scale_dtype]), tried, weights, *out)
    if bad >= 0:
        row, group = divmod(bad, cols // size)
        part = values[row, group * size : (group + 1) * size]
        raise ValueError(_message(row, group, np.ascontiguousarray(part), dtype, scale_dtype))
    return codes, scale, None if symmetric else zero_point


def pack(codes: npt.NDArray[np.int8], bits: int) -> npt.NDArray[np.int32]:
    """Pack codes along the columns: one dense bit stream a row, the first code in the lowest bits.

    codes    int8 [rows, cols] in -2**(bits-1) .. 2**(bits-1) - 1, stored plus 2**(bits-1)
    returns  int32 [rows, ceil(cols * bits / 32)]; unused bits are 0
    source   compressed-tensors 0.20 pack_to_int32; `integer.unpack(dense=True)` is the inverse
    """
    if codes.dtype != np.int8 or codes.ndim != 2:
        raise ValueError(f"codes must be an int8 matrix, got {codes.dtype} {list(codes.shape)}")
    packed = np.empty((codes.shape[0], words_per_row(codes.shape[1], bits, dense=True)), np.int32)
    contiguous = np.ascontiguousarray(codes).view()
    contiguous.flags.writeable = False
    _pack(contiguous, bits, packed.view(np.uint32))
    return packed


def pack_zero_point(zero_point: npt.NDArray[np.int8], bits: int) -> npt.NDArray[np.int32]:
    """Pack zero points along the rows.

    zero_point  int8 [rows, groups]; a block of rows begins at a multiple of 32
    returns     int32 [ceil(rows * bits / 32), groups]
    source      compressed-tensors 0.20 pack_to_int32 with packed_dim=0; inverse `integer.unpack_zero_point(dense=True)`
    """
    return np.ascontiguousarray(pack(np.ascontiguousarray(zero_point.T), bits).T)


def _message(row: int, group: int, values: Array, dtype: str, scale_dtype: str) -> str:
    """What to say of a group whose scale cannot be stored."""
    largest = amax(values, dtype)
    return (
        f"the scale of row {row}, group {group} with amax {largest:.6g} would round to 0 or infinity in {scale_dtype}; "
        "keep this weight as it is"
    )


@kernel
def _load(bits_in: Array, precision: int, x: Array) -> None:
    """Widen numbers of any dtype into x, the uint32 bits of float32."""
    if precision == 2:
        load_f16(bits_in, x)
    else:
        load_f32(bits_in, x)


@kernel
def _ends(x: Array, begin: int, end: int) -> tuple[np.float32, np.float32, np.float32]:
    """Smallest and largest number of x[begin:end] (uint32 bits of finite float32), or 0 where that is beyond; the
    smallest magnitude but 0.

    Flipping the lower bits of negative numbers makes the order of signed integers that of the numbers. 0 - 1 is the
    largest unsigned integer.
    """
    low, high, least = np.int32(0), np.int32(0), np.uint32(0xFFFFFFFF)
    for i in range(np.uint64(begin), np.uint64(end)):  # unsigned, so that no index can count from the end
        key = np.int32(x[i])
        key ^= (key >> np.int32(31)) & np.int32(0x7FFFFFFF)
        low, high = min(low, key), max(high, key)
        least = min(least, np.uint32(np.uint32(x[i] & np.uint32(0x7FFFFFFF)) - np.uint32(1)))
    low ^= (low >> np.int32(31)) & np.int32(0x7FFFFFFF)
    down = np.float32(np.uint32(low).view(np.float32) + np.float32(0.0))  # -0.0 + 0.0 is 0.0
    return down, np.uint32(high).view(np.float32), np.uint32(least + np.uint32(1)).view(np.float32)


@kernel
def _quantize(x: Array, scale: Array, zero_point: Array, bits: int, codes: Array) -> None:
    """Codes [n] uint8 (bits of int8) of x [n] under scale and zero_point [n], as `integer_search.code_of`."""
    lowest = np.float32(-(1 << (bits - 1)))
    highest = np.float32(-lowest - np.float32(1))
    for i in range(x.size):
        y = np.float32(np.float32(x[i] / scale[i]) + zero_point[i])
        codes[i] = np.uint8(np.float32(min(max(y, lowest), highest) + BIG).view(np.uint32) & np.uint32(0xFF))


@kernel
def _decode(codes: Array, scale: Array, zero_point: Array, precision: int, y: Array) -> None:
    """Images y [n] float32 of codes [n] uint8 (bits of int8) under scale and zero_point [n]."""
    for i in range(y.size):
        y[i] = np.float32(np.float32(np.int8(codes[i])) - zero_point[i]) * scale[i]
    if precision == 1:
        u = y.view(np.uint32)
        for i in range(y.size):
            even = np.uint32(u[i] >> np.uint32(16)) & np.uint32(1)
            u[i] = np.uint32(u[i] + np.uint32(0x7FFF) + even) & np.uint32(0xFFFF0000)
    elif precision == 2:
        for i in range(y.size):
            y[i] = round_f32(y[i], precision)


@kernel
def _choose(
    x: Array, size: int, options: tuple[int, bool, int, int], eps: np.float32, tried: Array, weights: Array, first: int,
    scales: Array, kinds: Array,
) -> int:  # fmt: skip
    """Fill scales [2, groups], scales and zero points, for the groups of `size` numbers in x [n] float32.

    weights         float64 [cols], empty for equal ones; the first group is number `first` of the matrix
    kinds [groups]  _ZERO, _EXACT or _ROUNDED
    Returns the first group whose scale cannot be stored, or -1.
    """
    u = x.view(np.uint32)
    padded, lanes = np.zeros(-(-size // LANES) * LANES, np.float32), np.empty(LANES, np.float64)
    for group in range(x.size // size):
        begin, end = group * size, (group + 1) * size
        ends = _ends(u, begin, end)
        if ends[0] == 0 and ends[1] == 0:
            scales[0, group], scales[1, group], kinds[group] = eps, 0, _ZERO
            continue
        chosen, kinds[group] = find(x, begin, end, ends, *options, (np.float32(0.0), np.float32(0.0))), _EXACT
        if chosen[0] == 0:
            kinds[group] = _ROUNDED
            if tried.size:
                for i in range(size):
                    padded[i] = x[begin + i]
                column = (first + group) * size % max(1, weights.size)
                chosen = best(padded, weights[column : column + size], ends, *options, tried, lanes)
            else:
                chosen = scale_over(span(ends[0], ends[1], options[0], options[1]), ends[0], *options)
        if chosen[0] == 0:
            return group
        scales[0, group], scales[1, group] = chosen
    return -1


@kernel
def _settle(x: Array, y: Array, size: int, options: tuple[int, bool, int, int], scales: Array, kinds: Array) -> bool:
    """Give the groups with numbers x and images y the scales that encoding y gives; see `integer_search`.

    Where there is one that reproduces x, y becomes x. Returns whether the codes are no longer those of y.
    """
    certain, u = is_certain(options[0], options[1], options[2]), y.view(np.uint32)
    changed = not certain
    for group in range(y.size // size):
        begin, end = group * size, (group + 1) * size
        if kinds[group] == _EXACT:
            y[begin:end] = x[begin:end]
        if kinds[group] == _ROUNDED:
            guess = (scales[0, group], scales[1, group])
            chosen = find(y, begin, end, _ends(u, begin, end), *options, guess)
            if chosen[0] > 0:
                changed = changed or chosen != guess
                scales[0, group], scales[1, group] = chosen
    return changed


@kernel
def _spread(values: Array, size: int, wide: Array) -> None:
    """Fill wide [n] with values [n / size], each `size` times."""
    for group in range(wide.size // size):
        for i in range(np.uint64(group * size), np.uint64((group + 1) * size)):
            wide[i] = values[group]


@kernel
def _encode(
    bits_in: Array,
    size: int,
    options: tuple[int, bool, int, int],
    eps: np.float32,
    tried: Array,
    weights: Array,
    codes: Array,
    scale: Array,
    zero_point: Array,
) -> int:
    """Fill codes [n], scale and zero_point [n / size] from bits_in [n], some groups at a time.

    options  bits, symmetric, precision, precision of scales
    weights  float64 [cols], of squared errors; empty for equal ones
    Returns the first group whose scale cannot be stored, or -1.
    """
    bits, _, precision, _ = options
    tile = max(1, _TILE // size) * size
    scales, kinds = np.empty((2, tile // size), np.float32), np.empty(tile // size, np.int8)
    buffers = np.empty((4, tile), np.float32)
    for start in range(0, bits_in.size, tile):
        stop = min(start + tile, bits_in.size)
        n, first, to = stop - start, start // size, codes[start:stop]
        x, y, s, z = buffers[0, :n], buffers[1, :n], buffers[2, :n], buffers[3, :n]
        _load(bits_in[start:stop], precision, x.view(np.uint32))
        bad = _choose(x, size, options, eps, tried, weights, first, scales, kinds)
        if bad >= 0:
            return first + bad
        _spread(scales[0], size, s)
        _spread(scales[1], size, z)
        _quantize(x, s, z, bits, to)
        _decode(to, s, z, precision, y)
        if _settle(x, y, size, options, scales, kinds):
            _spread(scales[0], size, s)
            _spread(scales[1], size, z)
            _quantize(y, s, z, bits, to)
            _decode(to, s, z, precision, x)
            for i in range(n):
                if x[i] != y[i]:
                    to[i] = np.uint8(np.int32(exact_code(y[i], s[i], z[i], bits, precision)) & 0xFF)
        for group in range(n // size):
            scale[first + group], zero_point[first + group] = scales[0, group], np.int8(scales[1, group])
    return -1


@kernel
def _pack(codes: Array, bits: int, packed: Array) -> None:
    """Fill packed [rows, words] uint32 with the codes [rows, cols] plus 2**(bits-1), lowest bits first."""
    cols = codes.shape[1]
    flip = np.uint8(1 << (bits - 1))  # flipping the top bit of a code adds 2**(bits-1)
    for r in range(codes.shape[0]):
        source, words = codes[r].view(np.uint8), packed[r]
        words[words.size - 1] = 0
        octets = words.view(np.uint8)
        if bits == 8:
            for k in range(cols):
                octets[k] = source[k] ^ flip
            continue
        if bits == 4:
            for k in range(cols // 2):
                octets[k] = ((source[2 * k] ^ flip) & np.uint8(0xF)) | ((source[2 * k + 1] ^ flip) << np.uint8(4))
            if cols % 2:
                octets[cols // 2] = (source[cols - 1] ^ flip) & np.uint8(0xF)
            continue
        held, count, word = np.uint64(0), 0, 0
        for k in range(cols):
            held |= np.uint64((source[k] ^ flip) & np.uint8((1 << bits) - 1)) << np.uint64(count)
            count += bits
            if count >= 32:
                words[word] = np.uint32(held & np.uint64(0xFFFFFFFF))
                held, count, word = held >> np.uint64(32), count - 32, word + 1
        if count:
            words[word] = np.uint32(held)
