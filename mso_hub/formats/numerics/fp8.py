"""FP8 on the CPU: E4M3 codes under one float scale a row, a block of 128 x 128, or a tensor.

    w ~= e4m3[code] * scale         scale = amax / 448, a multiplier

Byte layout, for w [rows, cols]: codes U8 [rows, cols] (E4M3 bits); scale [rows, 1], [ceil(rows / 128),
ceil(cols / 128)] or [1, 1], float32 numbers here, already rounded to the dtype in which they will be stored. A block at
the edge is a partial one, nothing is padded. All arithmetic is float32 with true divisions.

Rows and blocks are one thing to the kernels, cells of `size` numbers; `fp8_search` chooses their scales. "absmax"
writes the bytes of compressed-tensors 0.20 and ModelOpt 0.47 for F32 weights, except in all-zero cells, in cells that a
scale reproduces exactly, and in the rare ones whose image two scales share (see there). For BF16 and F16 weights both
libraries divide in that dtype, which is less exact. `reference` is the same algorithm in plain torch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mso_hub.formats.numerics.floats import (
    E4M3,
    PRECISION,
    Array,
    amax,
    e4m3_codes,
    flat_bits,
    load_e4m3,
    narrow,
    round_f32,
    storage,
    store_f32,
)
from mso_hub.formats.numerics.fp8_search import (
    E4M3_MAX,
    GRID,
    TILE,
    absmax,
    best,
    code_of,
    find,
    image,
    load,
    widen_bits,
)
from mso_hub.formats.numerics.kernel import kernel

BLOCK = (128, 128)

SEARCHES = ("absmax", "mse")
"""How a scale is chosen: from the largest magnitude, or by trying 24 scales from there to twice that."""

_ONE = np.ones(1, np.float32)


def tensor_scale(amax: float) -> np.float32:
    """Scale of a tensor with one scale: float32 amax / 448, a multiplier; 1.0 when that is 0.

    amax     largest |w| over every tensor that shares the scale, finite
    source   ModelOpt 0.47 FP8QTensor, which has no guard against 0
    """
    if not np.isfinite(amax) or amax < 0:
        raise ValueError(f"amax must be finite and >= 0, got {amax}; look for NaN or Inf in the tensor")
    scale = np.float32(amax) / np.float32(E4M3_MAX)
    return np.float32(1.0) if scale == 0 else np.float32(scale)


def encode_rows(
    values: Array, dtype: str, scale_dtype: str, *, search: str = "absmax"
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Quantize a matrix with one scale a row (output channel).

    values       [rows, cols] finite, held as `floats.storage(dtype)`
    scale_dtype  BF16, F16 or F32, the dtype in which the scales will be stored
    search       a row that some scale reproduces exactly gets that scale. Otherwise "absmax": s = amax / 448,
                 rounded to scale_dtype, or the number below where amax would be decoded to infinity; "mse": of
                 amax / 448 * 2**(k/24), k = 0..23, each rounded, the scale with the smallest sum of
                 (w - dequantized)**2; the differences are float32, the sum is float64 in 64 lanes. Ties go to the
                 smaller. An all-zero row gets 1.0
    returns      codes uint8 [rows, cols] (E4M3 bits), scale float32 [rows, 1], rounded to scale_dtype
    direction    the scale multiplies: code = rne_e4m3(clamp(w / scale, -448, 448))
    stable       encoding what `decode` gives in `dtype` gives the same codes and scales again
    raises       ValueError when s rounds to 0 or to infinity in scale_dtype
    source       absmax: compressed-tensors 0.20 calculate_qparams and quantize, strategy "channel"
    """
    return _encode(values, dtype, scale_dtype, (1, values.shape[-1]), search)


def encode_blocks(
    values: Array, dtype: str, scale_dtype: str, *, size: tuple[int, int] = BLOCK, search: str = "absmax"
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Quantize a matrix with one scale a block; as `encode_rows`, but for the shape of the cells.

    values   [rows, cols], beginning at a multiple of size[0] rows
    size     rows and columns of a block; blocks at the lower and right edge may be smaller
    returns  codes uint8 [rows, cols], scale float32 [ceil(rows / size[0]), ceil(cols / size[1])]
    source   absmax: compressed-tensors 0.20, strategy "block"
    """
    return _encode(values, dtype, scale_dtype, size, search)


def encode_tensor(values: Array, dtype: str, scale: np.float32) -> npt.NDArray[np.uint8]:
    """Quantize numbers of any shape with one given scale.

    values   finite, held as `floats.storage(dtype)`
    scale    positive float32 multiplier, see `tensor_scale`
    returns  codes uint8 (E4M3 bits) of the same shape: rne_e4m3(clamp(w / scale, -448, 448)), where two codes decode
             to the same number of `dtype` the one that this number gets, so that encoding it again changes nothing
    source   compressed-tensors 0.20 quantize, strategy "tensor"
    """
    _check_positive(scale)
    codes = np.empty(values.shape, np.uint8)
    _encode_tensor(flat_bits(values, dtype), PRECISION[dtype], np.float32(scale), codes.reshape(-1))
    return codes


def decode(codes: npt.NDArray[np.uint8], scale: npt.NDArray[np.float32], size: tuple[int, int], dtype: str) -> Array:
    """Dequantize: e4m3 * scale in float32, rounded once to `dtype`.

    codes    uint8 [rows, cols], E4M3 bits; 0x7f and 0xff give NaN
    scale    float32 [ceil(rows / size[0]), ceil(cols / size[1])], widened exactly from what is stored; multiplies
    size     rows and columns that share a scale: (rows, cols) for a tensor, (1, cols) for rows, (128, 128) for blocks
    returns  [rows, cols] held as `floats.storage(dtype)`
    source   compressed-tensors 0.20 dequantize, whose product in the dtype of the scale is this same rounding
    """
    _check_codes(codes, scale, size)
    rows, cols = codes.shape
    out = np.empty((rows, cols), storage("F32" if dtype == "F16" else dtype))
    bits = out.reshape(-1).view(np.uint16 if dtype == "BF16" else np.uint32)
    _decode(_readonly(codes), _readonly(scale), cols, size[0], size[1], bits)
    return narrow(out, dtype) if dtype == "F16" else out


def _encode(
    values: Array, dtype: str, scale_dtype: str, size: tuple[int, int], search: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Check, run the kernel, and name the cell whose scale cannot be stored."""
    if values.ndim != 2 or 0 in values.shape or min(size) < 1:
        raise ValueError(f"fp8 needs a matrix and cells with rows and columns, got {list(values.shape)} and {size}")
    if search not in SEARCHES:
        raise ValueError(f"search must be one of {', '.join(SEARCHES)}, got {search!r}")
    storage(scale_dtype)
    rows, cols = values.shape
    height, width = min(size[0], rows), min(size[1], cols)
    codes = np.empty((rows, cols), np.uint8)
    scale = np.empty((-(-rows // height), -(-cols // width)), np.float32)
    bits = flat_bits(values, dtype)
    grid = GRID if search == "mse" else _ONE
    precision, scale_precision = PRECISION[dtype], PRECISION[scale_dtype]
    bad = _encode_cells(bits, cols, height, width, precision, scale_precision, grid, codes.reshape(-1), scale)
    if bad >= 0:
        top, left = bad // cols, bad % cols
        largest = amax(np.ascontiguousarray(values[top : top + height, left : left + width]), dtype)
        raise ValueError(
            f"the scale of row {top}, column {left} is amax / 448 = {largest:.6g} / 448, which {scale_dtype} can only "
            f"store as 0 or infinity"
        )
    return codes, scale


def _check_positive(scale: np.float32) -> None:
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number, got {scale}")


def _check_codes(codes: npt.NDArray[np.uint8], scale: npt.NDArray[np.float32], size: tuple[int, int]) -> None:
    """Refuse what the kernel, which reads without bounds checks, would read past."""
    if codes.ndim != 2 or 0 in codes.shape or min(size) < 1:
        raise ValueError(f"fp8 needs a matrix and cells with rows and columns, got {list(codes.shape)} and {size}")
    if codes.dtype != np.uint8 or scale.dtype != np.float32:
        raise ValueError(f"fp8 codes are uint8 bits and scales float32, got {codes.dtype} and {scale.dtype}")
    expected = tuple(-(-n // part) for n, part in zip(codes.shape, size, strict=True))
    if scale.shape != expected:
        raise ValueError(
            f"fp8 needs one scale for {size[0]} rows and {size[1]} columns: codes are {list(codes.shape)}, "
            f"so scale must be {list(expected)}, got {list(scale.shape)}"
        )


def _readonly(array: Array) -> Array:
    """Flat contiguous view that kernels may not write: one compiled kernel for every caller, see `floats.flat_bits`."""
    flat = np.ascontiguousarray(array).reshape(-1).view()
    flat.flags.writeable = False
    return flat


@kernel
def _largest_bits(bits: Array) -> np.uint32:
    """Bits of the largest magnitude of `bits` [n]: without their sign the patterns are in order."""
    mask = np.uint32(0x7FFF if bits.itemsize == 2 else 0x7FFFFFFF)
    largest = np.uint32(0)
    for i in range(bits.size):
        largest = max(largest, np.uint32(bits[i]) & mask)
    return largest


@kernel
def _fill_table(guess: np.float32, scale: np.float32, precision: int, table: Array) -> bool:
    """Fill table [128] with the codes under `scale` of the image that each code has under `guess`.

    Returns whether any code changes. None does under the same scale as long as images are normal numbers of their
    dtype: rounding moves them by 2**-8 of themselves at most, and half way to the next code is 2**-5 or more.
    """
    tiny = np.float32(2.0**-14 if precision == 2 else 2.0**-126)
    if guess == scale and np.float32(guess * np.float32(2.0**-9)) >= tiny:
        return False
    changed = False
    for code in range(127):
        decoded = round_f32(np.float32(E4M3[code] * guess), precision)
        table[code] = code_of(decoded, scale)
        changed = changed or table[code] != code
    return changed


@kernel
def _choose(
    bits: Array,
    first: int,
    height: int,
    width: int,
    stride: int,
    largest: np.float32,
    precision: int,
    scale_precision: int,
    grid: Array,
) -> tuple[np.float32, np.float32]:
    """Scale under which a cell is encoded, and the one that is stored for its image; 0 when it cannot be stored."""
    if largest == 0:
        return np.float32(1.0), np.float32(1.0)
    none = np.float32(0.0)
    if not largest < np.float32(np.inf):
        return none, none
    exact = find(bits, first, height, width, stride, largest, precision, scale_precision, none)
    if exact > 0:
        return exact, exact
    scale = absmax(largest, precision, scale_precision)
    if not (scale > 0 and scale < np.float32(np.inf)):
        return none, none
    if grid.size > 1:
        scale = best(bits, first, height, width, stride, largest, precision, scale_precision, grid)
    reached = image(largest, scale, precision)
    settled = find(bits, first, height, width, stride, reached, precision, scale_precision, scale)
    return scale, settled if settled > 0 else scale


@kernel
def _encode_part(bits: Array, precision: int, scale: np.float32, x: Array, codes: Array) -> None:
    """Codes [n] of bits [n] under one scale; x is scratch of TILE numbers."""
    for start in range(0, bits.size, TILE):
        stop = min(start + TILE, bits.size)
        load(bits[start:stop], precision, x[: stop - start])
        e4m3_codes(x[: stop - start], scale, codes[start:stop])


@kernel
def _replace(codes: Array, table: Array) -> None:
    """Replace codes [n] by table [128] of their magnitude, keeping the sign."""
    for i in range(codes.size):
        codes[i] = table[codes[i] & np.uint8(0x7F)] | (codes[i] & np.uint8(0x80))


@kernel
def _encode_cells(
    bits: Array,
    cols: int,
    height: int,
    width: int,
    precision: int,
    scale_precision: int,
    grid: Array,
    codes: Array,
    scale: Array,
) -> int:
    """Fill codes [rows * cols] and scale [rows / height, cols / width], rounded up, from bits [rows * cols].

    Band by band: the largest magnitudes row by row, then the scales, then the codes row by row again. Returns the index
    of the first number of a cell whose scale cannot be stored, -1 when there is none.
    """
    rows, across = bits.size // cols, scale.shape[1]
    x = np.empty(TILE, np.uint32)
    largest = np.empty(across, np.uint32)
    guess = np.empty(across, np.float32)
    table = np.empty((across, 128), np.uint8)
    changed = np.empty(across, np.bool_)
    for top in range(0, rows, height):
        bottom = min(top + height, rows)
        largest[:] = 0
        for row in range(top, bottom):
            for cell in range(across):
                begin, end = row * cols + cell * width, row * cols + min((cell + 1) * width, cols)
                largest[cell] = max(largest[cell], _largest_bits(bits[begin:end]))
        for cell in range(across):
            first, wide = top * cols + cell * width, min(width, cols - cell * width)
            most = widen_bits(largest[cell], precision)
            both = _choose(bits, first, bottom - top, wide, cols, most, precision, scale_precision, grid)
            if both[0] == 0:
                return first
            guess[cell] = both[0]
            scale[top // height, cell] = both[1]
            changed[cell] = _fill_table(both[0], both[1], precision, table[cell])
        for row in range(top, bottom):
            for cell in range(across):
                begin, end = row * cols + cell * width, row * cols + min((cell + 1) * width, cols)
                part = codes[begin:end]
                _encode_part(bits[begin:end], precision, guess[cell], x, part)
                if changed[cell]:
                    _replace(part, table[cell])
    return -1


@kernel
def _encode_tensor(bits: Array, precision: int, scale: np.float32, codes: Array) -> None:
    """Fill codes [n] from bits [n] under one scale."""
    table = np.empty(128, np.uint8)
    _encode_part(bits, precision, scale, np.empty(TILE, np.uint32), codes)
    if _fill_table(scale, scale, precision, table):
        _replace(codes, table)


@kernel
def _decode(codes: Array, scale: Array, cols: int, height: int, width: int, out: Array) -> None:
    """Fill out [rows * cols] (uint16 BF16 or uint32 F32 bits) from codes [rows * cols] and scale, both flat."""
    x = np.empty(TILE, np.uint32)
    across = -(-cols // width)
    for row in range(codes.size // cols):
        for left in range(0, cols, width):
            step = scale[row // height * across + left // width]
            for start in range(left, min(left + width, cols), TILE):
                begin = row * cols + start
                end = row * cols + min(start + TILE, left + width, cols)
                part = x[: end - begin]
                load_e4m3(codes[begin:end], part)
                values = part.view(np.float32)
                for i in range(values.size):
                    values[i] *= step
                store_f32(part, out[begin:end])
