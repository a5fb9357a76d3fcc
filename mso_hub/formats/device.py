"""Where blocks of rows are encoded: on this machine's processors, or on a GPU. The bytes are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from mso_hub.checkpoint import Array
from mso_hub.errors import RecipeError
from mso_hub.formats.fp8 import CHANNEL, TENSOR, Fp8
from mso_hub.formats.integer import Integer
from mso_hub.formats.nvfp4 import Nvfp4
from mso_hub.formats.scheme import Format

Encoder = Callable[[Format, Array, str, str, float], tuple[Array, ...]]
"""Format.encode with the format in front."""

CPU = "cpu"
PROCESSORS = (CPU, "auto")


def encoder(device: str) -> Encoder:
    """The encoder of a device: `cpu`, `cuda` or `cuda:1`; RecipeError where there is no such device."""
    if device in PROCESSORS:
        return lambda form, *rest: form.encode(*rest)
    return _Gpu(device).encode


def require_kernels(formats: Iterable[Format], device: str) -> None:
    """RecipeError for a format that has no kernels for a GPU, and where nothing is encoded at all."""
    formats = list(formats)
    if device in PROCESSORS:
        return
    if not formats:
        raise RecipeError(f"--device {device}: decoding runs on processors; leave it out")
    for form in dict.fromkeys(formats):
        if not isinstance(form, Nvfp4 | Fp8 | Integer):
            raise RecipeError(
                f"--device {device}: {form.name} has no GPU kernels; leave it out, the bytes do not change"
            )


class _Gpu:
    """One CUDA device."""

    def __init__(self, device: str) -> None:
        kind, _, number = device.partition(":")
        if kind != "cuda" or not (number.isdigit() or not number):
            raise RecipeError(f"--device must be cpu, cuda or cuda:N, got {device!r}")
        try:
            from mso_hub.formats.numerics.cuda.transfer import Device

            self._device = Device(int(number or 0))
        except (ImportError, ValueError) as error:
            raise RecipeError(f"--device {device}: {error}; leave it out, the bytes are the same") from error

    def encode(self, form: Format, values: Array, dtype: str, dense: str, amax: float) -> tuple[Array, ...]:
        """As Format.encode."""
        with self._device.turn:
            numbers = self._device.send(values, dtype)
            if isinstance(form, Nvfp4):
                return _nvfp4(form, numbers, amax)
            if isinstance(form, Fp8):
                return _fp8(form, numbers, dense, amax)
            if isinstance(form, Integer):
                return _integer(form, numbers, dense)
        raise RecipeError(f"--device: {form.name} has no GPU kernels; leave it out, the bytes are the same")


def _nvfp4(form: Nvfp4, numbers: Any, amax: float) -> tuple[Array, ...]:
    from mso_hub.formats.numerics.cuda import nvfp4
    from mso_hub.formats.numerics.cuda.transfer import fetch

    return fetch(nvfp4.encode(numbers, float(form.global_scale(amax)), search=form.search))


def _fp8(form: Fp8, numbers: Any, dense: str, amax: float) -> tuple[Array, ...]:
    from mso_hub.formats.numerics import floats
    from mso_hub.formats.numerics.cuda import fp8
    from mso_hub.formats.numerics.cuda.transfer import DTYPES, fetch
    from mso_hub.formats.numerics.fp8 import tensor_scale

    if form.name == TENSOR:
        return fetch((fp8.encode_tensor(numbers, float(tensor_scale(amax))),))
    encode = fp8.encode_rows if form.name == CHANNEL else fp8.encode_blocks
    codes, scale = fetch(encode(numbers, DTYPES[dense], search=form.search))
    return codes, floats.narrow(scale, dense) if form.layout == "compressed-tensors" else scale


def _integer(form: Integer, numbers: Any, dense: str) -> tuple[Array, ...]:
    from mso_hub.formats.numerics import floats
    from mso_hub.formats.numerics.cuda import integer_encode
    from mso_hub.formats.numerics.cuda.transfer import DTYPES, fetch

    codes, scale, zero = integer_encode.encode(
        numbers, bits=form.bits, group_size=form.group_size or None, symmetric=form.symmetric,
        scale_dtype=DTYPES[dense], search=form.search,
    )  # fmt: skip
    stored = floats.narrow(fetch((scale,))[0], dense)
    if form.name == "int8":
        return (*fetch((codes,)), stored)
    packed = fetch((integer_encode.pack(codes, form.bits),))
    zeros = () if zero is None else fetch((integer_encode.pack_zero_point(zero, form.bits),))
    return (*packed, stored, *zeros)
