"""The Triton kernels make the bytes of the numba kernels.

Every test runs twice: under Triton's interpreter, which needs no GPU, and on a GPU where there is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mso_hub.formats.numerics import floats, fp8, integer, integer_encode, nvfp4
from tests.formats.numerics.cuda_worker import Kernels, assert_same
from tests.formats.numerics.strategies import DTYPES, all_finite, bits_type, finite, gaussian, matrices

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

FEW = settings(deadline=None, max_examples=10)
SCALES = st.floats(2.0**-149, 2.0**116, width=32)
SIZES = [None, (3, 7), (2, 64), (128, 128)]


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """The functions of the cuda package."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    made = Kernels(request.param)
    yield made
    made.close()


def mixture(dtype: str, rows: int, cols: int, seed: int = 0) -> floats.Array:
    """A row each of: Gaussian, any bits, multiples of 1/8 and zeros, zeros, one outlier, subnormal, largest numbers."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, cols)).astype(np.float32) * np.float32(0.02)
    values[2::7] = rng.integers(-64, 65, values[2::7].shape) * (np.arange(cols) % 16 < 3) / 8
    values[3::7] = 0
    values[4::7, :: min(cols, 40)] *= 1000
    values[5::7] *= {"F16": 2.0**-14, "BF16": 2.0**-124, "F32": 2.0**-124}[dtype]
    stored = floats.narrow(values, dtype)
    largest = {"F16": np.float16(65504), "BF16": np.uint16(0x7F7F), "F32": np.float32(2.0**127)}[dtype]
    stored[6::7, ::3] = largest
    bits = rng.integers(0, 1 << 32, stored[1::7].shape, np.uint32).astype(bits_type(dtype))
    stored[1::7] = finite(bits, dtype)
    return np.ascontiguousarray(stored)


@pytest.mark.parametrize("dtype", DTYPES)
def test_amax(kernels: Kernels, dtype: str) -> None:
    """The largest magnitude, NaN, infinity, and nothing."""
    values = mixture(dtype, 14, 48)
    assert kernels("floats.amax", values) == floats.amax(values, dtype)
    assert kernels("floats.amax", -floats.widen(values, dtype)) == floats.amax(values, dtype)
    assert np.isnan(kernels("floats.amax", np.array([1, np.nan, np.inf], np.float32)))
    assert kernels("floats.amax", np.array([1, -np.inf], np.float32)) == np.inf
    assert kernels("floats.amax", values[:0]) == 0


@pytest.mark.parametrize("search", nvfp4.SEARCHES)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), scale=SCALES)
@FEW
def test_nvfp4_encodes_the_same(kernels: Kernels, search: str, data: st.DataObject, dtype: str, scale: float) -> None:
    """Any bits under any global scale, and under their own."""
    values = data.draw(matrices(dtype))
    any_scale = np.float32(2.0 ** np.floor(np.log2(scale)) if search == "power" else scale)
    for chosen in (any_scale, nvfp4.global_scale(floats.amax(values, dtype), search=search)):
        theirs = nvfp4.encode(values, dtype, chosen, search=search)
        assert_same(kernels("nvfp4.encode", values, chosen, search=search), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("search", nvfp4.SEARCHES)
def test_nvfp4_encodes_many_blocks_the_same(kernels: Kernels, search: str, dtype: str) -> None:
    """Several tiles and a rest; then what they decode to once more, which is where scales tie."""
    values = mixture(dtype, 70, 16 * 9)
    calm = np.delete(values, slice(1, None, 7), axis=0)  # no arbitrary bits: what is largest is not far from the rest
    calm = np.delete(calm, slice(5, None, 6), axis=0)
    for tensor in (values, calm):
        own = nvfp4.global_scale(floats.amax(tensor, dtype), search=search)
        theirs = nvfp4.encode(tensor, dtype, own, search=search)
        assert_same(kernels("nvfp4.encode", tensor, own, search=search), theirs)
    again = nvfp4.decode(*theirs, own, dtype)
    assert_same(kernels("nvfp4.encode", again, own, search=search), nvfp4.encode(again, dtype, own, search=search))


@pytest.mark.parametrize("search", nvfp4.SEARCHES[1:])
def test_nvfp4_settles_equal_errors_the_same(kernels: Kernels, search: str) -> None:
    """Blocks of three short numbers, whose errors are exact and so are often equal."""
    values = np.random.default_rng(4).integers(-64, 65, (256, 64)).astype(np.float32) / 8
    values.reshape(-1, 16)[:, 3:] = 0
    values[0, :3], values[0, 16:19], values[0, 32:35] = (5, 5.875, 3.625), (2.75, 4.875, 2.875), (3.75, 3.25, 0)
    theirs = nvfp4.encode(values, "F32", np.float32(1), search=search)
    assert_same(kernels("nvfp4.encode", values, np.float32(1), search=search), theirs)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_nvfp4_encodes_every_pattern_the_same(kernels: Kernels, dtype: str) -> None:
    """All numbers of the dtype, among neighbours and among strangers."""
    values = all_finite(dtype)
    mixed = np.random.default_rng(1).permutation(values.reshape(-1)).reshape(values.shape)
    own = nvfp4.global_scale(floats.amax(values, dtype))
    for tensor, scale in ((values, own), (mixed, own), (mixed, np.float32(2.0**-20))):
        assert_same(kernels("nvfp4.encode", tensor, scale), nvfp4.encode(tensor, dtype, scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 0.02 / 2688, 2.0**-140, 1.0e35])
def test_nvfp4_decodes_the_same(kernels: Kernels, dtype: str, factor: float) -> None:
    """Every byte of two codes under every scale, NaN too."""
    packed = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scale = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 32, axis=1)
    theirs = nvfp4.decode(packed, scale, np.float32(factor), dtype)
    assert_same(kernels("nvfp4.decode", packed, scale, factor, dtype), theirs)
    theirs = nvfp4.decode_divided(packed, scale, np.float32(factor), dtype)
    assert_same(kernels("nvfp4.decode_divided", packed, scale, factor, dtype), theirs)


def encode_both(
    kernels: Kernels, name: str, values: floats.Array, dtype: str, *rest: str, **options: Any
) -> tuple[floats.Array, ...] | None:
    """What numba makes, after the comparison; None when both refuse the matrix with the same words."""
    module, _, function = name.partition(".")
    numba = {"fp8": fp8, "integer_encode": integer_encode}[module]
    try:
        theirs = getattr(numba, function)(values, dtype, *rest, **options)
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error).split("F32")[0].split("BF16")[0].split("F16")[0])):
            kernels(name, values, *rest, **options)
        return None
    assert_same(kernels(name, values, *rest, **options), theirs)
    return tuple(theirs)


@pytest.mark.parametrize("search", fp8.SEARCHES)
@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from(DTYPES),
    size=st.sampled_from(SIZES),
    multiple=st.sampled_from([1, 3, 16]),
)
@FEW
def test_fp8_encodes_and_decodes_the_same(
    kernels: Kernels,
    search: str,
    data: st.DataObject,
    dtype: str,
    scale_dtype: str,
    size: tuple[int, int] | None,
    multiple: int,
) -> None:
    """Any bits, any cells, whole and partial; then the decoded matrix, which some scale reproduces."""
    values = data.draw(matrices(dtype, multiple=multiple))
    name, options = ("fp8.encode_rows", {}) if size is None else ("fp8.encode_blocks", {"size": size})
    encoded = encode_both(kernels, name, values, dtype, scale_dtype, search=search, **options)
    if encoded:
        codes, scale = encoded
        cells = size or (1, values.shape[1])
        decoded = fp8.decode(codes, scale, cells, dtype)
        assert_same(kernels("fp8.decode", codes, scale, cells, dtype), decoded)
        assert encode_both(kernels, name, decoded, dtype, scale_dtype, search=search, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "shape", "search"),
    [
        ((1, 2200), (6, 2200), "absmax"),
        ((1, 2200), (3, 2200), "mse"),
        ((128, 128), (140, 150), "absmax"),
        ((128, 70), (130, 75), "mse"),
    ],
)
def test_fp8_encodes_long_cells_the_same(
    kernels: Kernels, dtype: str, size: tuple[int, int], shape: tuple[int, int], search: str
) -> None:
    """Cells of several tiles and a rest; then decoded ones, in which the last numbers fit no scale."""
    values = gaussian(shape, dtype)
    encoded = encode_both(kernels, "fp8.encode_blocks", values, dtype, "F32", size=size, search=search)
    assert encoded is not None
    codes, scale = encoded
    decoded = fp8.decode(codes, scale, size, dtype)
    decoded[-2:, -3:] = values[-2:, -3:]
    assert encode_both(kernels, "fp8.encode_blocks", decoded, dtype, dtype, size=size, search=search)


@given(data=st.data(), dtype=st.sampled_from(DTYPES), scale=SCALES)
@FEW
def test_fp8_encodes_under_one_scale_the_same(kernels: Kernels, data: st.DataObject, dtype: str, scale: float) -> None:
    """Any scale, and that of the matrix."""
    values = data.draw(matrices(dtype))
    for chosen in (np.float32(scale), fp8.tensor_scale(floats.amax(values, dtype))):
        assert_same(kernels("fp8.encode_tensor", values, chosen), fp8.encode_tensor(values, dtype, chosen))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_decodes_every_code_the_same(kernels: Kernels, dtype: str) -> None:
    """NaN too, with scales for the matrix, for rows and for blocks."""
    codes = np.tile(np.arange(256, dtype=np.uint8), (6, 1))
    for size in ((6, 256), (1, 256), (2, 100)):
        shape = (-(-6 // size[0]), -(-256 // size[1]))
        scale = np.random.default_rng(0).lognormal(0, 20, shape).astype(np.float32)
        assert_same(kernels("fp8.decode", codes, scale, size, dtype), fp8.decode(codes, scale, size, dtype))


@given(
    bits=st.sampled_from(range(2, 9)),
    rows=st.integers(1, 5),
    cols=st.integers(1, 80),
    dense=st.booleans(),
    group_size=st.sampled_from([None, 1, 3, 8, 32, 64]),
    with_zeros=st.booleans(),
    with_index=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
@settings(FEW, max_examples=40)
def test_integers_decode_the_same(
    kernels: Kernels,
    bits: int,
    rows: int,
    cols: int,
    dense: bool,
    group_size: int | None,
    with_zeros: bool,
    with_index: bool,
    dtype: str,
    seed: int,
) -> None:
    """Any words, both packings, groups that end inside a row, zero points, scattered groups."""
    rng = np.random.default_rng(seed)
    groups = 1 if group_size is None else -(-cols // group_size)
    packed = random_integers(rng, (rows, integer.words_per_row(cols, bits, dense=dense)), np.int32)
    scale = rng.standard_normal((rows, groups)).astype(np.float32)
    words = random_integers(rng, (integer.words_per_row(rows, bits, dense=dense), groups), np.int32)
    zeros = integer.unpack_zero_point(words, bits, rows, dense=dense)
    assert_same(kernels("integer.unpack_zero_point", words, bits, rows, dense=dense), zeros)
    index = rng.integers(0, groups, cols).astype(np.int32) if with_index else None
    arguments = (packed, scale, zeros if with_zeros else None, index)
    options: dict[str, Any] = {"bits": bits, "group_size": group_size, "cols": cols, "dense": dense, "dtype": dtype}
    assert_same(kernels("integer.decode", *arguments, **options), integer.decode(*arguments, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [None, 96])
def test_unpacked_integers_decode_the_same(kernels: Kernels, dtype: str, group_size: int | None) -> None:
    """Rows longer than a tile."""
    rng = np.random.default_rng(3)
    codes, groups = random_integers(rng, (3, 1500), np.int8), 1 if group_size is None else 16
    scale, zeros = rng.standard_normal((3, groups)).astype(np.float32), random_integers(rng, (3, groups), np.int8)
    options: dict[str, Any] = {"group_size": group_size, "dtype": dtype}
    theirs = integer.decode_int8(codes, scale, zeros, **options)
    assert_same(kernels("integer.decode_int8", codes, scale, zeros, **options), theirs)
    index = rng.integers(0, groups, 1500).astype(np.int32)
    theirs = integer.decode_indexed(codes, scale, None, index, **options)
    assert_same(kernels("integer.decode_indexed", codes, scale, None, index, **options), theirs)


def random_integers(rng: np.random.Generator, shape: tuple[int, ...], kind: type[np.signedinteger]) -> floats.Array:
    """Any bits of an integer type."""
    limits = np.iinfo(kind)
    return rng.integers(limits.min, limits.max + 1, shape).astype(kind)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", integer_encode.SEARCHES)
@given(
    data=st.data(),
    bits=st.sampled_from([2, 4, 8]),
    group_size=st.sampled_from([None, 8, 16]),
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from(DTYPES),
)
@settings(FEW, max_examples=4)
def test_integers_encode_the_same(
    kernels: Kernels,
    symmetric: bool,
    search: str,
    data: st.DataObject,
    bits: int,
    group_size: int | None,
    dtype: str,
    scale_dtype: str,
) -> None:
    """Any bits in any groups; then the decoded matrix, which some scale reproduces."""
    values = data.draw(matrices(dtype))
    options: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    options |= {"scale_dtype": scale_dtype, "search": search}
    encoded = encode_both(kernels, "integer_encode.encode", values, dtype, **options)
    if encoded:
        codes, scale, zeros = encoded
        decoded = integer.decode_int8(codes, scale, zeros, group_size=group_size, dtype=dtype)
        if np.isfinite(floats.amax(decoded, dtype)):
            assert encode_both(kernels, "integer_encode.encode", decoded, dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group_size", "shape", "search"),
    [
        (4, 128, (20, 256), "absmax"),
        (8, 32, (7, 96), "absmax"),
        (8, None, (4, 1100), "absmax"),
        (4, 32, (7, 64), "mse"),
    ],
)
def test_integers_encode_many_groups_the_same(
    kernels: Kernels,
    bits: int,
    group_size: int | None,
    shape: tuple[int, int],
    search: str,
    symmetric: bool,
    dtype: str,
) -> None:
    """Several tiles and a rest; then decoded ones, in which the last number fits no scale."""
    values = mixture(dtype, *shape)
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "scale_dtype": "F32", "search": search}
    encoded = encode_both(kernels, "integer_encode.encode", values, dtype, **options)
    assert encoded is not None
    codes, scale, zeros = encoded
    decoded = integer.decode_int8(codes, scale, zeros, group_size=group_size, dtype=dtype)
    decoded[-1] = values[0]
    decoded[-2, :-1] = decoded[0, :-1]
    assert encode_both(kernels, "integer_encode.encode", decoded, dtype, **options | {"scale_dtype": dtype})


def test_codes_that_bf16_confuses_are_encoded_the_same(kernels: Kernels) -> None:
    """255 steps have more bits than a BF16 number: decoded ones may lie next to another code."""
    options: dict[str, Any] = {"bits": 8, "group_size": 32, "symmetric": False, "scale_dtype": "BF16"}
    values = floats.narrow(np.random.default_rng(8).uniform(-1, 3, (8, 64)).astype(np.float32), "BF16")
    for _ in range(2):
        codes, scale, zeros = encode_both(kernels, "integer_encode.encode", values, "BF16", **options) or ()
        values = integer.decode_int8(codes, scale, zeros, group_size=32, dtype="BF16")


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_are_packed_the_same(kernels: Kernels, bits: int) -> None:
    """Along columns and, for zero points, along rows; several tiles of words and a rest."""
    rng = np.random.default_rng(bits)
    for shape in ((3, 45), (2, 2100 * 16 // bits)):
        codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(np.int8)
        assert_same(kernels("integer_encode.pack", codes, bits), integer_encode.pack(codes, bits))
        zeros = np.ascontiguousarray(codes.T)
        packed = integer_encode.pack_zero_point(zeros, bits)
        assert_same(kernels("integer_encode.pack_zero_point", zeros, bits), packed)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("nvfp4.encode", (np.zeros((2, 24), np.uint16), 1.0), r"multiple of 16, got \[2, 24\]"),
        ("nvfp4.encode", (np.zeros((2, 16), np.uint16), 0.0), "positive number, got 0.0"),
        ("nvfp4.encode", (np.zeros((2, 16), np.int32), 1.0), "contiguous tensor of .* got torch.int32"),
        (
            "nvfp4.decode",
            (np.zeros((2, 16), np.uint8), np.zeros((2, 1), np.uint8), 1.0, "BF16"),
            r"\[2, 16\] and \[2, 1\]",
        ),
        ("fp8.encode_rows", (np.zeros((0, 16), np.uint16), "F32"), r"got \[0, 16\]"),
        ("fp8.encode_tensor", (np.zeros((2, 16), np.uint16), np.inf), "positive number, got inf"),
        (
            "fp8.decode",
            (np.zeros((2, 16), np.uint8), np.zeros((2, 2), np.float32), (1, 16), "F32"),
            r"must be \[2, 1\]",
        ),
        ("integer.unpack", (np.zeros((2, 3), np.int32), 4, 16), r"\[rows, 2\], got torch.int32 \[2, 3\]"),
    ],
)
def test_what_cannot_be_encoded_or_decoded_is_refused(
    kernels: Kernels, name: str, arguments: tuple[Any, ...], message: str
) -> None:
    """The kernels check no bounds, so the functions do."""
    options = {"dense": True} if name == "integer.unpack" else {}
    with pytest.raises(ValueError, match=message):
        kernels(name, *arguments, **options)


def test_a_tensor_on_the_cpu_is_refused_without_the_interpreter() -> None:
    """It would read memory that the GPU does not have."""
    from mso_hub.formats.numerics.cuda import nvfp4 as ours

    with pytest.raises(ValueError, match="need tensors on a CUDA device, got cpu"):
        ours.encode(torch.zeros(2, 16), 1.0)
