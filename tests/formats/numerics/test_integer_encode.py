"""Integer codes against the plain torch twin, and the law that encoding what was decoded changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mso_hub.formats.numerics import floats, integer, integer_encode
from mso_hub.formats.numerics.integer_search import grid
from mso_hub.formats.numerics.reference import integer as reference
from tests.formats.numerics.strategies import (
    DTYPES,
    EXPONENT,
    LOWEST_EXPONENT_BIT,
    TORCH,
    all_finite,
    bits_type,
    finite,
    gaussian,
    matrices,
    to_torch,
)

Encoded = tuple[floats.Array, floats.Array, floats.Array | None]
BITS = (2, 3, 4, 5, 6, 7, 8)


@st.composite
def rules(draw: st.DrawFn, dtype: str) -> dict[str, Any]:
    """Bits, symmetry, search, and a dtype of scales for which the law holds: that of the weights, or F32."""
    return {
        "bits": draw(st.sampled_from(BITS)),
        "symmetric": draw(st.booleans()),
        "search": draw(st.sampled_from(integer_encode.SEARCHES)),
        "scale_dtype": draw(st.sampled_from(sorted({dtype, "F32"}))),
    }


@st.composite
def grids(draw: st.DrawFn, dtype: str, size: int) -> floats.Array:
    """Small multiples of a number: ties, images and groups with few different numbers, of any magnitude."""
    most = draw(st.sampled_from([1, 2, 8, 15, 16, 255, 300]))
    numbers = st.lists(st.integers(-most, most), min_size=2 * size, max_size=2 * size)
    multiples = np.array(draw(numbers), np.float32).reshape(2, size)
    exponent = draw(st.integers(0, EXPONENT[dtype] // LOWEST_EXPONENT_BIT[dtype] - 12))
    mantissa = draw(st.integers(0, LOWEST_EXPONENT_BIT[dtype] - 1))
    pattern = np.array([exponent * LOWEST_EXPONENT_BIT[dtype] + mantissa], bits_type(dtype))
    unit = floats.widen(pattern.view(floats.storage(dtype)), dtype)[0]
    half = np.float32(draw(st.sampled_from([1.0, 0.5, 1 / 3])))
    with np.errstate(over="ignore"):
        wide = multiples * np.float32(unit * half)
    return finite(floats.narrow(wide, dtype).view(bits_type(dtype)), dtype)


@st.composite
def weights(draw: st.DrawFn, dtype: str) -> tuple[floats.Array, int | None]:
    """A matrix and a group size that divides its columns."""
    size = draw(st.sampled_from([1, 2, 3, 16, 24, 32]))
    values = draw(st.one_of(grids(dtype, 2 * size), matrices(dtype, multiple=size)))
    if draw(st.booleans()):
        values[:, :size] = 0
    if draw(st.booleans()):
        values[:, 0] = finite(np.full(1, EXPONENT[dtype] - 1, bits_type(dtype)), dtype)  # the largest number
    return values, draw(st.sampled_from([size, None]))


def encode(values: floats.Array, dtype: str, group_size: int | None, rule: dict[str, Any]) -> Encoded | None:
    """Codes, scales and zero points; None where a scale cannot be stored."""
    try:
        return integer_encode.encode(values, dtype, group_size=group_size, **rule)
    except ValueError as error:
        assert "would round to 0 or infinity" in str(error)  # noqa: PT017
        return None


def assert_equal(mine: Encoded, other: Encoded) -> None:
    """The same bytes."""
    for a, b in zip(mine, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_encoding_what_was_decoded_changes_nothing(dtype: str, data: st.DataObject) -> None:
    (values, group_size), rule = data.draw(weights(dtype)), data.draw(rules(dtype))
    encoded = encode(values, dtype, group_size, rule)
    assert encoded is not None, "a scale of the dtype of the weights can always be stored"
    decoded = integer.decode_int8(*encoded, group_size=group_size, dtype=dtype)
    assert floats.first_nonfinite(decoded, dtype) is None
    again = encode(decoded, dtype, group_size, rule)
    assert again is not None
    assert_equal(again, encoded)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(deadline=None, max_examples=80)
def test_bytes_are_those_of_the_twin(dtype: str, data: st.DataObject) -> None:
    """Which tries every scale that could have made a group, without the filters of the kernels."""
    (values, group_size), rule = data.draw(weights(dtype)), data.draw(rules(dtype))
    rule["scale_dtype"] = data.draw(st.sampled_from(DTYPES))
    mine = encode(values, dtype, group_size, rule)
    named = rule | {"scale_dtype": TORCH[rule["scale_dtype"]]}
    if mine is None:
        with pytest.raises(ValueError, match="0 or infinity"):
            reference.encode(to_torch(values, dtype), group_size=group_size, **named)
        return
    plain = reference.encode(to_torch(values, dtype), group_size=group_size, **named)
    assert_equal(mine, tuple(None if part is None else part.numpy() for part in plain))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", integer_encode.SEARCHES)
def test_weight_like_numbers_are_stable_and_equal_the_twin(dtype: str, bits: int, symmetric: bool, search: str) -> None:
    """Groups, whole rows and rows with a large outlier."""
    values = gaussian((6, 1280), dtype)
    values[3:, 7] = values[3:, 7] * (1 if dtype == "BF16" else 20)
    for group_size, scale_dtype in ((32, dtype), (128, "F32"), (None, "F32")):
        rule = {"bits": bits, "symmetric": symmetric, "search": search, "scale_dtype": scale_dtype}
        mine = encode(values, dtype, group_size, rule)
        assert mine is not None
        decoded = integer.decode_int8(*mine, group_size=group_size, dtype=dtype)
        again = encode(decoded, dtype, group_size, rule)
        assert again is not None
        assert_equal(again, mine)
        torch_rule = rule | {"scale_dtype": TORCH[scale_dtype]}
        plain = reference.encode(to_torch(values[2:5], dtype), group_size=group_size, **torch_rule)  # type: ignore[arg-type]
        rows = tuple(None if part is None else part[2:5] for part in mine)
        assert_equal(rows, tuple(None if part is None else part.numpy() for part in plain))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_finite_number_survives_a_round_trip(dtype: str, bits: int, symmetric: bool) -> None:
    """All patterns of a 16-bit dtype in order, so that groups are of one magnitude, up to the largest there is.

    Scales that are subnormal numbers may be rounded far down, as those of compressed-tensors, and clip.
    """
    values = all_finite(dtype)
    rule = {"bits": bits, "symmetric": symmetric, "search": "absmax", "scale_dtype": dtype}
    encoded = encode(values, dtype, 32, rule)
    assert encoded is not None
    decoded = integer.decode_int8(*encoded, group_size=32, dtype=dtype)
    near, far = (floats.widen(x, dtype).astype(np.float64) for x in (decoded, values))
    steps = np.repeat(encoded[1].astype(np.float64), 32, axis=1)
    usual = steps > 128 * reference.smallest(TORCH[dtype])
    assert usual.mean() > 0.4
    assert (np.abs(near - far) <= steps * 1.2 + np.abs(far) * 2.0**-8)[usual].all()
    again = encode(decoded, dtype, 32, rule)
    assert again is not None
    assert_equal(again, encoded)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 1024])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_is_not_worse_in_any_group_and_better_in_the_sum(bits: int, group_size: int, symmetric: bool) -> None:
    values = gaussian((16, 2048), "F32")
    rule = {"bits": bits, "symmetric": symmetric, "scale_dtype": "F32"}
    sums = {}
    for search in integer_encode.SEARCHES:
        encoded = encode(values, "F32", group_size, rule | {"search": search})
        assert encoded is not None
        decoded = integer.decode_int8(*encoded, group_size=group_size, dtype="F32").astype(np.float64)
        sums[search] = ((decoded - values) ** 2).reshape(-1, group_size).sum(1)
    assert (sums["mse"] <= sums["absmax"] * (1 + 1e-6)).all()
    assert sums["mse"].sum() < sums["absmax"].sum() * 0.995


def test_mse_finds_the_best_of_a_fine_grid_within_a_percent() -> None:
    """INT4 in groups of 32: against 2000 scales from amax / 16 to amax / 6."""
    values = gaussian((4, 1024), "F32")
    groups = values.reshape(-1, 1, 32).astype(np.float64)
    scale = np.abs(groups).max(-1, keepdims=True) / np.linspace(6, 16, 2000)[:, None]
    error = groups - np.clip(np.rint(groups / scale), -8, 7) * scale
    best = (error**2).sum(-1).min(-1).sum()
    encoded = encode(values, "F32", 32, {"bits": 4, "symmetric": True, "scale_dtype": "F32", "search": "mse"})
    assert encoded is not None
    decoded = integer.decode_int8(*encoded, group_size=32, dtype="F32").astype(np.float64)
    assert best <= ((decoded - values) ** 2).sum() < best * 1.01


@pytest.mark.parametrize("bits", BITS)
def test_the_grid_keeps_the_largest_code_in_use(bits: int) -> None:
    """The first two divisors are the largest codes, so that both ways to use the whole range are tried exactly."""
    top = 2 ** (bits - 1)
    for size in (32, 4096):
        divisors = grid(bits, size, symmetric=True)
        assert divisors[:2].tolist() == [top - 1, top]
        assert (divisors >= np.float32(top - 1.5)).all()
        kept = grid(bits, size, symmetric=False)
        assert (kept > 0).all()
        assert (kept < 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codes_in_use", [4, 5, 6, 7, 8])
def test_int4_of_others_comes_back_as_it_was(dtype: str, codes_in_use: int) -> None:
    """Decoded INT4 checkpoints encode to the same numbers, whatever the largest code of a group is."""
    rng = np.random.default_rng(codes_in_use)
    codes = rng.integers(-codes_in_use, min(codes_in_use, 7) + 1, (64, 256)).astype(np.int8)
    scale = floats.narrow(np.abs(rng.standard_normal((64, 8), np.float32)) * np.float32(0.01), dtype)
    values = integer.decode_int8(codes, floats.widen(scale, dtype), None, group_size=32, dtype=dtype)
    encoded = encode(values, dtype, 32, {"bits": 4, "symmetric": True, "scale_dtype": dtype, "search": "absmax"})
    assert encoded is not None
    np.testing.assert_array_equal(integer.decode_int8(*encoded, group_size=32, dtype=dtype), values)


def test_blocks_of_rows_give_the_bytes_of_the_whole() -> None:
    values = gaussian((64, 384), "BF16")
    rule = {"bits": 4, "symmetric": False, "search": "mse", "scale_dtype": "BF16"}
    whole = encode(values, "BF16", 128, rule)
    blocks = [encode(values[start : start + 5], "BF16", 128, rule) for start in range(0, 64, 5)]
    assert whole is not None
    for i in range(3):
        np.testing.assert_array_equal(np.concatenate([block[i] for block in blocks]), whole[i])  # type: ignore[index]


@given(bits=st.sampled_from(BITS), rows=st.integers(1, 40), cols=st.integers(1, 80), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=150)
def test_packing_is_undone_by_unpacking(bits: int, rows: int, cols: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, cols)).astype(np.int8)
    packed = integer_encode.pack(codes, bits)
    np.testing.assert_array_equal(integer.unpack(packed, bits, cols, dense=True), codes)
    zeros = integer_encode.pack_zero_point(codes, bits)
    np.testing.assert_array_equal(integer.unpack_zero_point(zeros, bits, rows, dense=True), codes)
    np.testing.assert_array_equal(zeros.T, integer_encode.pack(np.ascontiguousarray(codes.T), bits))
    if cols * bits % 32:
        assert (packed[:, -1].view(np.uint32) >> np.uint32(cols * bits % 32) == 0).all(), "unused bits are 0"


def refused(message: str, **changes: object) -> None:
    """Encode a 2 x 64 matrix with one thing wrong."""
    right: dict[str, Any] = {
        "values": gaussian((2, 64), "F32"),
        "dtype": "F32",
        "bits": 4,
        "group_size": 32,
        "symmetric": True,
        "scale_dtype": "F32",
    }
    integer_encode.encode(**right)
    with pytest.raises(ValueError, match=message):
        integer_encode.encode(**right | changes)


def test_encode_refuses_what_it_cannot_store() -> None:
    refused("group_size must divide the 64 columns, got 24", group_size=24)
    refused("group_size must divide the 64 columns, got 0", group_size=0)
    refused("search must be one of absmax, mse, got 'best'", search="best")
    refused("2 to 8 bits", bits=9)
    refused("need a matrix", values=np.zeros((2, 0), np.float32))
    refused("holds no plain floats", scale_dtype="F8_E4M3")
    large = gaussian((2, 64), "F32")
    large[1, 40] = 1e30
    refused(r"row 1, group 1 with amax 1e\+30 would round to 0 or infinity in F16", values=large, scale_dtype="F16")
    small = np.zeros((2, 64), np.float32)
    small[1, 3] = 1e-20
    refused("row 1, group 0 with amax 1e-20 would round to 0", values=small, scale_dtype="F16")
    with pytest.raises(ValueError, match="codes must be an int8 matrix, got int32"):
        integer_encode.pack(np.zeros((2, 8), np.int32), 4)


def test_scales_of_16_bit_weights_have_no_more_bits_than_they() -> None:
    """In F32 the scale is the one that BF16 would have, so that it can be found again from decoded weights."""
    values = gaussian((8, 256), "BF16")
    rule = {"bits": 8, "symmetric": True, "search": "absmax"}
    wide, own = (encode(values, "BF16", None, rule | {"scale_dtype": dtype}) for dtype in ("F32", "BF16"))
    assert wide is not None
    assert own is not None
    assert_equal(wide, own)
    assert torch.equal(torch.from_numpy(wide[1]).bfloat16().float(), torch.from_numpy(wide[1]))
