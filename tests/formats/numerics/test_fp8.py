"""FP8 kernels, byte for byte: our own torch reference, compressed-tensors and ModelOpt."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mso_hub.formats.numerics import floats, fp8, fp8_search
from mso_hub.formats.numerics.reference import fp8 as reference
from tests.formats.numerics.strategies import (
    DTYPES,
    TORCH,
    all_finite,
    bits_type,
    finite,
    gaussian,
    matrices,
    to_bits,
    to_torch,
)

Size = tuple[int, int]
Encoded = tuple[floats.Array, floats.Array]


@st.composite
def cells(draw: st.DrawFn, dtype: str) -> floats.Array:
    """Matrices that are hard on scales: raw bits, images of codes, few distinct numbers, mostly zeros, outliers."""
    kind = draw(st.sampled_from(["bits", "image", "ties", "zeros", "outlier", "gauss"]))
    if kind == "bits":
        return draw(matrices(dtype, multiple=draw(st.sampled_from([1, 3, 16]))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 48)))
    exponent = draw(st.integers(-30, 6) if dtype == "F16" else st.integers(-140, 110))
    unit = np.float32(2.0**exponent * rng.uniform(1, 2))
    values = rng.standard_normal(shape).astype(np.float32)
    if kind == "image":
        values = floats.E4M3[rng.integers(0, 127, shape)] * rng.choice(np.array([-1, 1], np.float32), shape)
    if kind == "ties":
        values = rng.integers(-16, 17, shape).astype(np.float32) * np.float32(0.5)
    if kind == "zeros":
        values[rng.random(shape) < 0.8] = 0
    if kind == "outlier":
        values[rng.integers(0, shape[0]), rng.integers(0, shape[1])] *= np.float32(2.0 ** rng.integers(1, 12))
    bits = floats.narrow(values * unit, dtype).view(bits_type(dtype))
    return finite(bits, dtype)


def encoded_alike(values: floats.Array, dtype: str, scale_dtype: str, size: Size, search: str) -> Encoded | None:
    """Codes and scales, the same as the reference's; None when both find a scale that cannot be stored."""
    try:
        codes, scale = reference.encode(to_torch(values, dtype), TORCH[scale_dtype], size, search=search)
    except reference.ScaleOutOfRange:
        with pytest.raises(ValueError, match="can only store as 0 or infinity"):
            fp8.encode_blocks(values, dtype, scale_dtype, size=size, search=search)
        return None
    ours = fp8.encode_blocks(values, dtype, scale_dtype, size=size, search=search)
    assert_same(ours, (codes.numpy(), scale.numpy()))
    return ours


def assert_same(ours: Encoded, theirs: Encoded) -> None:
    np.testing.assert_array_equal(ours[1], theirs[1])
    np.testing.assert_array_equal(ours[0], theirs[0])


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data(), size=st.sampled_from([(1, 1000), (1, 7), (2, 3), (3, 16), (128, 128)]))
@settings(deadline=None, max_examples=80)
def test_bytes_equal_the_reference_and_survive_decoding(
    dtype: str, scale_dtype: str, data: st.DataObject, size: Size
) -> None:
    """Any dtype of weights with any dtype of scales; encoding what was decoded gives the same bytes again."""
    values = data.draw(cells(dtype))
    for search in fp8.SEARCHES:
        ours = encoded_alike(values, dtype, scale_dtype, size, search)
        if ours is None:
            continue
        codes, scale = ours
        np.testing.assert_array_equal(floats.widen(floats.narrow(scale, scale_dtype), scale_dtype), scale)
        decoded = fp8.decode(codes, scale, size, dtype)
        plain = reference.decode(torch.from_numpy(codes), torch.from_numpy(scale), size, TORCH[dtype])
        np.testing.assert_array_equal(decoded.view(bits_type(dtype)), to_bits(plain))
        assert np.isfinite(floats.amax(decoded, dtype))
        for again in fp8.SEARCHES:
            assert_same(fp8.encode_blocks(decoded, dtype, scale_dtype, size=size, search=again), ours)


@pytest.mark.parametrize("search", fp8.SEARCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_survive_decoding(dtype: str, search: str) -> None:
    """Rows and blocks longer than a tile of the kernels, also ragged ones."""
    values = gaussian((300, 4321), dtype)
    for encode, size in ((fp8.encode_rows, (1, 4321)), (fp8.encode_blocks, fp8.BLOCK)):
        once = encode(values, dtype, dtype, search=search)
        assert_same(encode(fp8.decode(*once, size, dtype), dtype, dtype, search=search), once)
    sample = values[:130, :300].copy()
    codes, scale = reference.encode(to_torch(sample, dtype), TORCH[dtype], fp8.BLOCK, search=search)
    assert_same(fp8.encode_blocks(sample, dtype, dtype, search=search), (codes.numpy(), scale.numpy()))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_finite_pattern(dtype: str) -> None:
    """All numbers of the dtype, small rows first: the scale of each row is another one."""
    values = all_finite(dtype)
    for search in fp8.SEARCHES:
        for row in values[:: 7 if search == "mse" else 1]:
            encoded_alike(row[None], dtype, dtype, (1, 256), search)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(deadline=None, max_examples=80)
def test_one_scale_a_tensor(dtype: str, data: st.DataObject) -> None:
    """Bytes of the reference; torch's own cast; and a tensor whose scale is no subnormal survives decoding."""
    values = data.draw(cells(dtype))
    scale = fp8.tensor_scale(floats.amax(values, dtype))
    codes = fp8.encode_tensor(values, dtype, scale)
    weight, factor = to_torch(values, dtype), torch.tensor(scale)
    np.testing.assert_array_equal(codes, reference.encode_tensor(weight, factor).numpy())
    whole, one = values.shape, np.full((1, 1), scale)
    theirs = to_bits((weight.float() / factor).clamp(-448, 448).to(torch.float8_e4m3fn))
    for kept in (codes, theirs):
        decoded = fp8.decode(kept, one, whole, dtype)
        np.testing.assert_array_equal(decoded, fp8.decode(codes, one, whole, dtype))
    if dtype != "F16" and scale > 2.0**-110:
        np.testing.assert_array_equal(codes, theirs)
    if scale > 2.0**-120 and np.isfinite(floats.amax(decoded, dtype)):
        assert fp8.tensor_scale(floats.amax(decoded, dtype)) == scale
        np.testing.assert_array_equal(fp8.encode_tensor(decoded, dtype, scale), codes)


@pytest.mark.parametrize("scale_dtype", ["BF16", "F16"])
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_fp8_weights_of_others_come_back_without_loss(scale_dtype: str, data: st.DataObject, seed: int) -> None:
    """Any codes under any scale, as long as the largest code is 224 or more: zero error, whatever the search."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (3, 32), np.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    codes[:, 3] = data.draw(st.integers(0x76, 0x7E))
    scale = (rng.uniform(1, 2, (3, 1)) * 2.0**-8).astype(np.float32)
    scale = floats.widen(floats.narrow(scale, scale_dtype), scale_dtype)
    for dtype in (scale_dtype, "F32"):
        values = fp8.decode(codes, scale, (1, 32), dtype)
        for search in fp8.SEARCHES:
            ours = fp8.encode_rows(values, dtype, scale_dtype, search=search)
            np.testing.assert_array_equal(
                fp8.decode(*ours, (1, 32), dtype).view(bits_type(dtype)), values.view(bits_type(dtype))
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(127, 256), (1, 256), (16, 100), (128, 128)])
@pytest.mark.parametrize("unit", [1.0, 4.5e-5, 2.0**-140, 1e37])
def test_decode_equals_torch_for_every_code(dtype: str, size: Size, unit: float) -> None:
    """Bits, so that -0.0 counts; NaN codes give NaN; too large is infinite."""
    codes = np.tile(np.arange(256, dtype=np.uint8), (127, 1))
    shape = (-(-127 // size[0]), -(-256 // size[1]))
    scale = (np.random.default_rng(0).uniform(1, 2, shape) * unit).astype(np.float32)
    ours = fp8.decode(codes, scale, size, dtype)
    theirs = reference.decode(torch.from_numpy(codes), torch.from_numpy(scale), size, TORCH[dtype])
    nan = np.broadcast_to(codes & 0x7F == 0x7F, codes.shape)
    np.testing.assert_array_equal(np.isnan(floats.widen(ours, dtype)), nan)
    np.testing.assert_array_equal(ours.view(bits_type(dtype))[~nan], to_bits(theirs)[~nan])


@pytest.mark.parametrize("dtype", DTYPES)
def test_mse_is_never_worse_and_the_sum_is_right(dtype: str) -> None:
    """Against float64 numbers made here: the chosen scale has the least error of the grid, up to rounding."""
    values = gaussian((64, 512), dtype, seed=3)
    far = floats.widen(values, dtype).astype(np.float64)

    def errors(scale: floats.Array) -> floats.Array:
        codes = [fp8.encode_tensor(row, dtype, s) for row, s in zip(values, scale[:, 0], strict=True)]
        near = fp8.decode(np.stack(codes), scale, (1, 512), "F32").astype(np.float64)
        total: floats.Array = ((far - near) ** 2).sum(-1)
        return total

    base = (np.abs(far).max(-1, keepdims=True) / 448).astype(np.float32)
    grid = [floats.widen(floats.narrow(c * base, dtype), dtype) for c in fp8_search.GRID]
    best = np.min([errors(scale) for scale in grid], axis=0)
    chosen = errors(fp8.encode_rows(values, dtype, dtype, search="mse")[1])
    first = errors(fp8.encode_rows(values, dtype, dtype)[1])
    assert (chosen <= first).all()
    assert chosen.sum() < 0.97 * first.sum()
    np.testing.assert_allclose(chosen, best, rtol=1e-6)


def test_the_grid_is_the_same_on_every_machine() -> None:
    """2**(k/24) in float64 is far enough from a tie of float32 that no exp2 can round it differently."""
    exact = np.exp2(np.arange(24) / 24)
    for wrong in (exact * (1 - 2.0**-48), exact * (1 + 2.0**-48)):
        np.testing.assert_array_equal(wrong[1:].astype(np.float32), fp8_search.GRID[1:])
    assert fp8_search.GRID[0] == 1
    assert fp8_search.GRID[23] < 2


def test_row_blocks_in_threads_give_the_bytes_of_the_whole() -> None:
    """The engine cuts matrices by rows, blocks at multiples of 128, and runs the kernels side by side."""
    values = gaussian((512, 300), "BF16")
    for search in fp8.SEARCHES:
        for encode in (fp8.encode_rows, fp8.encode_blocks):
            run = partial(encode, dtype="BF16", scale_dtype="BF16", search=search)
            with ThreadPoolExecutor(4) as pool:
                parts = list(pool.map(run, np.split(values, 4)))
            assert_same(run(values), tuple(np.concatenate(p) for p in zip(*parts, strict=True)))  # type: ignore[arg-type]


def test_zeros_and_the_largest_numbers() -> None:
    """A zero row has the scale 1.0 and keeps its signs; no finite number is decoded to infinity."""
    values = np.zeros((3, 4), np.float16)
    values[0, 1], values[2] = -0.0, 65504
    codes, scale = fp8.encode_rows(values, "F16", "F16")
    assert scale[:2].tolist() == [[1.0], [1.0]]
    assert codes[0].tolist() == [0, 0x80, 0, 0]
    assert np.isfinite(fp8.decode(codes, scale, (1, 4), "F16")).all()
    assert fp8.tensor_scale(0.0) == 1
    assert fp8.tensor_scale(1e-45) == 1


@pytest.mark.parametrize("search", fp8.SEARCHES)
@pytest.mark.parametrize(
    ("value", "dtype"),
    [(1e-6, "F16"), (3e38, "F16"), (1e-39, "BF16"), (1e-43, "F32"), (np.nan, "BF16"), (np.inf, "F32")],
)
def test_a_scale_that_cannot_be_stored_is_an_error(search: str, value: float, dtype: str) -> None:
    """It names the place, counted within what was given; F16 scales are the ones that meet this in practice."""
    values = np.ones((200, 300), np.float32)
    values[130:] = value
    found = f"amax / 448 = {np.float32(value):.6g} / 448, which {dtype} can only store as 0 or infinity"
    with pytest.raises(ValueError, match=rf"row 130, column 0 is {re.escape(found)}"):
        fp8.encode_rows(values, "F32", dtype, search=search)
    values[:] = 1
    values[128:, 256:] = value
    with pytest.raises(ValueError, match=rf"row 128, column 256 is {re.escape(found)}"):
        fp8.encode_blocks(values, "F32", dtype, search=search)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: fp8.encode_rows(v, "BF16", "BF16", search="best"), "absmax, mse, got 'best'"),
        (lambda v: fp8.encode_rows(v, "BF16", "E4M3"), "known: BF16, F16, F32"),
        (lambda v: fp8.encode_rows(v[0], "BF16", "BF16"), r"needs a matrix .* got \[32\]"),
        (lambda v: fp8.encode_rows(v[:, :0], "BF16", "BF16"), r"needs a matrix .* got \[4, 0\]"),
        (lambda v: fp8.encode_blocks(v, "BF16", "BF16", size=(0, 1)), r"\(0, 1\)"),
        (lambda v: fp8.encode_tensor(v, "BF16", np.float32(0)), "positive number, got 0.0"),
        (lambda v: fp8.encode_tensor(v, "BF16", np.float32(np.nan)), "positive number, got nan"),
        (lambda v: fp8.tensor_scale(float("nan")), "finite and >= 0"),
        (lambda v: fp8.decode(v, np.ones((4, 1), np.float32), (1, 32), "BF16"), "uint8 bits .* got uint16"),
        (
            lambda v: fp8.decode(v.view(np.uint8), np.ones((4, 1), np.int32), (1, 64), "BF16"),
            "scales float32, .* int32",
        ),
        (
            lambda v: fp8.decode(v.view(np.uint8), np.ones((4, 1), np.float32), (1, 32), "BF16"),
            r"scale must be \[4, 2\], got \[4, 1\]",
        ),
        (lambda v: fp8.decode(v.view(np.uint8), np.ones((4, 1), np.float32), (0, 64), "BF16"), r"\(0, 64\)"),
    ],
)
def test_what_cannot_be_done_is_refused(call: object, message: str) -> None:
    """The kernels do not check bounds, so this must."""
    with pytest.raises(ValueError, match=message):
        call(np.zeros((4, 32), np.uint16))  # type: ignore[operator]
