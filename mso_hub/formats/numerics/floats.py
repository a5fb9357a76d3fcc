"""Stored floating-point numbers as bits: widen, narrow, largest magnitude, E4M3, E8M0.

Layouts (sign, exponent, mantissa bits; the exponent bias is in brackets):

    F32    1  8 23 (127)     BF16   1  8  7 (127)     the upper half of an F32
    F16    1  5 10 (15)      E4M3   1  4  3 (7)       no infinity, NaN is 0x7f / 0xff, max 448
                             E8M0   0  8  0 (127)     powers of two, NaN is 0xff

Two facts carry this file. First, BF16 -> F32 is a shift by 16 bits, and F32 -> BF16 is that shift
after rounding to nearest, ties to even. Second, for numbers of one sign the order of the bit
patterns is the order of the values, with infinity above every finite number and NaN above
infinity. So one integer maximum over the bits without sign gives the largest magnitude and also
tells whether anything non-finite was seen.

Everywhere `values` is a C-contiguous array and `dtype` its safetensors tag; see `storage`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mso_hub.formats.numerics.kernel import kernel

Array = npt.NDArray[Any]

STORAGE: dict[str, type[np.generic]] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
"""Safetensors dtype tag -> numpy type that holds it (BF16 as raw bits)."""

_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
_CHUNK = 1 << 17  # elements per step of the scans: two passes then read the second time from cache


def storage(dtype: str) -> type[np.generic]:
    """Numpy type that holds `dtype`: uint16 (bits) for BF16, float16 for F16, float32 for F32."""
    if dtype not in STORAGE:
        raise ValueError(f"dtype {dtype!r} holds no plain floats; known: {', '.join(STORAGE)}")
    return STORAGE[dtype]


def flat_bits(values: Array, dtype: str) -> Array:
    """View `values` of any shape as its 1-D read-only bits: uint16 (BF16, F16) or uint32 (F32).

    Read-only on purpose: numba compiles once more for arrays that may be written, and weights
    that come from a memory map may not.
    """
    expected = np.dtype(storage(dtype))
    if values.dtype != expected or not values.flags.c_contiguous:
        raise ValueError(
            f"{dtype} values must be a C-contiguous {expected} array, got {values.dtype} with strides {values.strides}"
        )
    bits = values.reshape(-1).view(np.uint32 if dtype == "F32" else np.uint16)
    bits.flags.writeable = False
    return bits


def amax(values: Array, dtype: str) -> float:
    """Largest |v|, exactly as stored; inf or NaN when any element is not finite; 0.0 when empty.

    Per chunk, for b-bit patterns u: the unsigned maximum is 2**(b-1) + the largest negative
    magnitude when there is any negative number, the signed maximum is the largest positive one.
    """
    bits = flat_bits(values, dtype)
    signed = np.int32 if dtype == "F32" else np.int16
    sign = 1 << (8 * bits.itemsize - 1)
    largest = 0
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        largest = max(largest, int(chunk.max()) - sign, int(chunk.view(signed).max()))
    pattern = np.array([largest], dtype=bits.dtype).view(storage(dtype))
    return float(widen(pattern, dtype)[0])


def first_nonfinite(values: Array, dtype: str) -> int | None:
    """Index into the flattened `values` of the first NaN or Inf, None when all are finite."""
    bits = flat_bits(values, dtype)
    infinity = bits.dtype.type(_INFINITY[dtype])
    for start in range(0, bits.size, _CHUNK):
        bad = (bits[start : start + _CHUNK] & infinity) == infinity
        if bad.any():
            return start + int(bad.argmax())
    return None


def widen(values: Array, dtype: str) -> npt.NDArray[np.float32]:
    """Same numbers as float32, same shape. Exact: every BF16 and F16 number is a float32."""
    bits = flat_bits(values, dtype)
    if dtype == "BF16":
        wide: npt.NDArray[np.uint32] = bits.astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32).reshape(values.shape)
    return values.astype(np.float32, copy=False)


def narrow(values: npt.NDArray[np.float32], dtype: str) -> Array:
    """Round float32 to `dtype`, same shape: nearest, ties to even.

    NaN stays NaN and what is too large becomes infinity, as torch's cast does.
    """
    bits = flat_bits(values, "F32")
    if dtype == "BF16":
        out = np.empty(values.shape, np.uint16)
        store_f32(bits, out.reshape(-1))
        return out
    with np.errstate(over="ignore"):
        return values.astype(storage(dtype), copy=False)


@kernel
def load_f32(bits: Array, x: Array) -> None:
    """Widen `bits` [n] (uint16 BF16 or uint32 F32) into x [n], the uint32 bits of float32."""
    shift = np.uint32(16 if bits.itemsize == 2 else 0)
    for i in range(bits.size):
        x[i] = np.uint32(bits[i]) << shift


@kernel
def store_f32(x: Array, out: Array) -> None:
    """Narrow x [n], the uint32 bits of float32, into out [n] (uint16 BF16 or uint32 F32)."""
    if out.itemsize == 4:
        for i in range(x.size):
            out[i] = x[i]
        return
    for i in range(x.size):
        u = x[i]
        # Adding just under half of the last kept bit, plus that bit itself, carries exactly
        # when the number rounds up. A NaN must not be carried into infinity or zero.
        rounded = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        quiet = (u >> np.uint32(16)) | np.uint32(0x40)
        out[i] = quiet if (u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else rounded


def _e4m3_values() -> npt.NDArray[np.float32]:
    """Value of each of the 256 E4M3 codes: (-1)**s * 2**(e-7) * (1 + m/8), subnormal m * 2**-9."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    value[code & 0x7F == 0x7F] = np.nan
    table: npt.NDArray[np.float32] = np.where(code >= 128, -value, value).astype(np.float32)
    table.flags.writeable = False
    return table


E4M3 = _e4m3_values()
"""float32 [256]: E4M3 code -> value."""


@kernel
def e4m3_from_f32(value: np.float32) -> int:
    """E4M3 code (0..255) of one float32: nearest, ties to even, saturating at +-448; NaN is 0x7f.

    Normal numbers (|v| >= 2**-6) keep 3 of 23 mantissa bits, rounded as in `store_f32`, and change
    the bias from 127 to 7: 120 << 3 is 960. Below that the step is 2**-9, which is the step of
    float32 next to 2**14, so the addition of 2**14 does the rounding and leaves the code in the
    low bits.
    """
    if np.isnan(value):
        return 0x7F
    sign = (np.float32(value).view(np.uint32) >> np.uint32(24)) & np.uint32(0x80)
    magnitude = min(np.float32(abs(value)), np.float32(448.0))
    if magnitude < np.float32(2.0**-6):
        u = np.float32(magnitude + np.float32(2.0**14)).view(np.uint32)
        code = u - np.float32(2.0**14).view(np.uint32)
    else:
        u = np.float32(magnitude).view(np.uint32)
        rounded = u + np.uint32(0x7FFFF) + ((u >> np.uint32(20)) & np.uint32(1))
        code = (rounded >> np.uint32(20)) - np.uint32(960)
    return int(code | sign)


PRECISION = {"F32": 0, "BF16": 1, "F16": 2}
"""Safetensors dtype tag -> the number by which a kernel knows it."""


@kernel
def round_f32(value: np.float32, precision: int) -> np.float32:
    """Nearest number of a dtype (`PRECISION`), ties to even, as float32; too large is infinite."""
    if precision == 0:
        return value
    u = np.float32(value).view(np.uint32)
    sign = np.uint32(u & np.uint32(0x80000000))
    magnitude = np.float32(abs(value))
    if not magnitude < np.float32(np.inf):
        return value
    if precision == 1:
        u = np.uint32(u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1)))
        return np.uint32(u & np.uint32(0xFFFF0000)).view(np.float32)
    if magnitude < np.float32(2.0**-14):
        # The step of F16 below its normal numbers, 2**-24, is that of float32 from 0.5 to 1.
        u = np.float32(np.float32(magnitude + np.float32(0.5)) - np.float32(0.5)).view(np.uint32)
        return np.uint32(u | sign).view(np.float32)
    if magnitude >= np.float32(65520.0):
        return np.uint32(sign | np.uint32(0x7F800000)).view(np.float32)
    u = np.uint32(u + np.uint32(0xFFF) + ((u >> np.uint32(13)) & np.uint32(1)))
    return np.uint32(u & np.uint32(0xFFFFE000)).view(np.float32)


@kernel
def round_all(x: Array, precision: int) -> None:
    """`round_f32` for x [n], the uint32 bits of float32 without NaN, in place."""
    values = x.view(np.float32)
    if precision == 1:
        for i in range(x.size):
            u = np.uint32(x[i] + np.uint32(0x7FFF) + ((x[i] >> np.uint32(16)) & np.uint32(1)))
            x[i] = u & np.uint32(0xFFFF0000)
    if precision == 2:
        for i in range(x.size):
            sign, u = np.uint32(x[i] & np.uint32(0x80000000)), np.uint32(x[i] & np.uint32(0x7FFFFFFF))
            magnitude = np.float32(abs(values[i]))
            small = np.float32(np.float32(magnitude + np.float32(0.5)) - np.float32(0.5)).view(np.uint32)
            normal = np.uint32(u + np.uint32(0xFFF) + ((u >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
            near = np.uint32(small) if magnitude < np.float32(2.0**-14) else np.uint32(normal)
            x[i] = sign | (near if near < np.uint32(0x47800000) else np.uint32(0x7F800000))


@kernel
def next_f32(value: np.float32, precision: int, steps: int) -> np.float32:
    """The number `steps` (-1, 0 or 1) places above a positive number of a dtype (`PRECISION`).

    Below 0 and above infinity there is nothing; what comes back then is no positive finite number.
    """
    if steps == 0:
        return value
    if precision == 2 and steps < 0 and value == np.float32(np.inf):
        return np.float32(65504.0)
    if precision == 2 and (value < np.float32(2.0**-14) or (steps < 0 and value == np.float32(2.0**-14))):
        return np.float32(value + np.float32(steps) * np.float32(2.0**-24))
    unit = np.int64(1)
    if precision == 1:
        unit = np.int64(1 << 16)
    if precision == 2:
        unit = np.int64(1 << 13)
    u = np.float32(value).view(np.uint32)
    return np.uint32(np.int64(u) + steps * unit).view(np.float32)


@kernel
def load_f16(bits: Array, x: Array) -> None:
    """Widen finite F16 bits [n] (uint16) into x [n], the uint32 bits of float32.

    Moved 13 places, exponent and mantissa stand where float32 has them, with a bias of 15 instead
    of 127. Multiplying by 2**112 mends that, for subnormal numbers too.
    """
    values = x.view(np.float32)
    for i in range(bits.size):
        x[i] = np.uint32(bits[i] & np.uint16(0x7FFF)) << np.uint32(13)
    for i in range(bits.size):
        values[i] *= np.float32(2.0**112)
    for i in range(bits.size):
        x[i] |= np.uint32(bits[i] & np.uint16(0x8000)) << np.uint32(16)


@kernel
def e4m3_codes(x: Array, step: np.float32, codes: Array) -> None:
    """E4M3 codes [n] (uint8) of x / step, for x [n] the uint32 bits of finite float32 and a positive step.

    Nearest, ties to even, saturating at +-448; -0.0 is 0x80. The roundings are those of `e4m3_from_f32`, without
    its branches.
    """
    values = x.view(np.float32)
    for i in range(codes.size):
        y = min(np.float32(abs(values[i]) / step), np.float32(448.0))
        u = np.float32(y).view(np.uint32)
        even = np.uint32(u >> np.uint32(20)) & np.uint32(1)
        normal = np.uint32(np.uint32(u + np.uint32(0x7FFFF) + even) >> np.uint32(20)) - np.uint32(960)
        subnormal = np.float32(y + np.float32(2.0**14)).view(np.uint32)
        code = np.uint8(subnormal) if y < np.float32(2.0**-6) else np.uint8(normal)
        codes[i] = code | np.uint8(np.uint32(x[i] >> np.uint32(24)) & np.uint32(0x80))


@kernel
def load_e4m3(codes: Array, x: Array) -> None:
    """Widen E4M3 codes [n] (uint8) into x [n], the uint32 bits of float32; 0x7f and 0xff become NaN.

    As `load_f16`: 20 places, and 2**120 for the biases 7 and 127.
    """
    values = x.view(np.float32)
    for i in range(codes.size):
        x[i] = np.uint32(codes[i] & np.uint8(0x7F)) << np.uint32(20)
    for i in range(codes.size):
        values[i] *= np.float32(2.0**120)
    for i in range(codes.size):
        nan = np.uint32(0x7FC00000) if codes[i] & np.uint8(0x7F) == np.uint8(0x7F) else np.uint32(0)
        x[i] |= nan | (np.uint32(codes[i] & np.uint8(0x80)) << np.uint32(24))


def _e8m0_values() -> npt.NDArray[np.float32]:
    """Value of each of the 256 E8M0 codes: 2**(code - 127); 255 is NaN, 0 is a subnormal float32."""
    table = np.ldexp(np.float32(1), np.arange(256, dtype=np.int32) - 127).astype(np.float32)
    table[255] = np.nan
    table.flags.writeable = False
    return table


with np.errstate(over="ignore"):  # 2**128, whose place NaN takes
    E8M0 = _e8m0_values()
"""float32 [256]: E8M0 code -> value, a power of two."""


def e8m0_to_f32(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Values of E8M0 codes of any shape: 2**(code - 127), exact; 0xff is NaN."""
    values: npt.NDArray[np.float32] = E8M0[codes]
    return values
