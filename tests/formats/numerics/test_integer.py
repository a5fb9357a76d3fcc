"""Packed integers against compressed-tensors and against the definition in Python integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st

from mso_hub.formats.numerics import floats, integer
from mso_hub.formats.numerics.reference import integer as reference
from tests.formats.numerics.strategies import DTYPES, TORCH, bits_type, to_bits, to_torch

BITS = range(2, 9)


def pack(codes: floats.Array, bits: int, *, dense: bool) -> floats.Array:
    """Pack int8 codes [rows, cols] from the definition, one Python integer per row or word."""

    def words(row: list[int]) -> list[bytes]:
        stored = [q + 2 ** (bits - 1) for q in row]
        per = len(row) if dense else 32 // bits
        parts = [stored[i : i + per] for i in range(0, len(row), per)]
        return [
            sum(q << (i * bits) for i, q in enumerate(part)).to_bytes(4 * -(-len(part) * bits // 32), "little")
            for part in parts
        ]

    rows = [np.frombuffer(b"".join(words(row)), np.int32) for row in codes.tolist()]
    return np.stack(rows)


def random_codes(rng: np.random.Generator, shape: tuple[int, int], bits: int) -> floats.Array:
    """Codes over the whole range of `bits`."""
    return rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(np.int8)


@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 5),
    cols=st.integers(1, 80),
    dense=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=200)
def test_unpack_reverses_the_definition(bits: int, rows: int, cols: int, dense: bool, seed: int) -> None:
    """Both packings, any width; dense ones are packed by compressed-tensors as well."""
    codes = random_codes(np.random.default_rng(seed), (rows, cols), bits)
    packed = pack(codes, bits, dense=dense)
    assert packed.shape[1] == integer.words_per_row(cols, bits, dense=dense)
    np.testing.assert_array_equal(integer.unpack(packed, bits, cols, dense=dense), codes)
    plain = reference.unpack(torch.from_numpy(packed), bits, cols, dense=dense)
    np.testing.assert_array_equal(plain.numpy(), codes)
    if dense:
        np.testing.assert_array_equal(pack_to_int32(torch.from_numpy(codes), bits).numpy(), packed)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_both_packings_are_one_where_codes_fill_words(bits: int) -> None:
    """Why a 4-bit checkpoint of any age reads the same."""
    codes = random_codes(np.random.default_rng(bits), (3, 77), bits)
    np.testing.assert_array_equal(pack(codes, bits, dense=True), pack(codes, bits, dense=False))


@given(bits=st.sampled_from(BITS), rows=st.integers(1, 70), dense=st.booleans())
@settings(deadline=None, max_examples=60)
def test_zero_points_unpack_along_rows(bits: int, rows: int, dense: bool) -> None:
    """compressed-tensors packs them with packed_dim=0."""
    zeros = random_codes(np.random.default_rng(rows), (rows, 3), bits)
    packed = np.ascontiguousarray(pack(np.ascontiguousarray(zeros.T), bits, dense=dense).T)
    np.testing.assert_array_equal(integer.unpack_zero_point(packed, bits, rows, dense=dense), zeros)
    if dense:
        theirs = pack_to_int32(torch.from_numpy(zeros), bits, packed_dim=0)
        np.testing.assert_array_equal(theirs.numpy(), packed)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_decode_equals_compressed_tensors(bits: int, dtype: str, group_size: int | None, symmetric: bool) -> None:
    """Group and channel scales of the output's dtype, with and without zero points."""
    rows, cols = 24, 96
    rng = np.random.default_rng(bits)
    codes = torch.from_numpy(random_codes(rng, (rows, cols), bits))
    groups = 1 if group_size is None else cols // group_size
    scale = torch.from_numpy(rng.standard_normal((rows, groups), np.float32)).to(TORCH[dtype])
    zeros = torch.from_numpy(random_codes(rng, (rows, groups), bits))
    args = QuantizationArgs(
        num_bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        strategy="group" if group_size else "channel",
    )
    state = {
        "weight_packed": pack_to_int32(codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, cols]),
    }
    if not symmetric:
        state["weight_zero_point"] = pack_to_int32(zeros, bits, packed_dim=0)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    theirs = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    ours = integer.decode(
        state["weight_packed"].numpy(),
        scale.float().numpy(),
        None if symmetric else integer.unpack_zero_point(state["weight_zero_point"].numpy(), bits, rows, dense=True),
        None,
        bits=bits,
        group_size=group_size,
        cols=cols,
        dense=True,
        dtype=dtype,
    )
    assert theirs.dtype == TORCH[dtype]
    np.testing.assert_array_equal(ours.view(bits_type(dtype)), to_bits(theirs))


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_decode_equals_the_definition_and_the_reference(data: st.DataObject) -> None:
    """Any width, packing, rest of a group, zero point, group order and output dtype."""
    bits, dense = data.draw(st.sampled_from(BITS)), data.draw(st.booleans())
    rows, cols = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 70))
    group_size = data.draw(st.one_of(st.none(), st.integers(1, cols)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    groups = -(-cols // (group_size or cols))
    codes = random_codes(rng, (rows, cols), bits)
    scale = (rng.standard_normal((rows, groups)) * 10.0 ** rng.integers(-30, 30)).astype(np.float32)
    zeros = random_codes(rng, (rows, groups), bits) if data.draw(st.booleans()) else None
    g_idx = rng.integers(0, groups, cols).astype(np.int32) if data.draw(st.booleans()) else None
    dtype = data.draw(st.sampled_from(DTYPES))

    group = np.arange(cols) // (group_size or cols) if g_idx is None else g_idx
    distance = codes.astype(np.int32) - (0 if zeros is None else zeros.astype(np.int32)[:, group])
    exact = to_torch(distance.astype(np.float32) * scale[:, group], "F32").to(TORCH[dtype])
    packed = pack(codes, bits, dense=dense)
    ours = integer.decode(
        packed, scale, zeros, g_idx, bits=bits, group_size=group_size, cols=cols, dense=dense, dtype=dtype
    )
    np.testing.assert_array_equal(ours.view(bits_type(dtype)), to_bits(exact))
    if g_idx is None:
        single = integer.decode_int8(codes, scale, zeros, group_size=group_size, dtype=dtype)
    else:
        single = integer.decode_indexed(codes, scale, zeros, g_idx, group_size=group_size, dtype=dtype)
    np.testing.assert_array_equal(single.view(bits_type(dtype)), to_bits(exact))
    plain = reference.decode(
        reference.unpack(torch.from_numpy(packed), bits, cols, dense=dense),
        torch.from_numpy(scale),
        None if zeros is None else torch.from_numpy(zeros),
        torch.from_numpy(group).long(),
        TORCH[dtype],
    )
    np.testing.assert_array_equal(ours.view(bits_type(dtype)), to_bits(plain))


def refused(message: str, **changes: object) -> None:
    """Decode an 8 x 64 INT4 matrix with one thing wrong."""
    right = {
        "packed": np.zeros((8, 8), np.int32),
        "scale": np.ones((8, 2), np.float32),
        "zero_point": None,
        "g_idx": None,
        "bits": 4,
        "group_size": 32,
        "cols": 64,
        "dense": True,
        "dtype": "BF16",
    }
    integer.decode(**right)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        integer.decode(**{**right, **changes})  # type: ignore[arg-type]


def test_decode_refuses_arrays_that_do_not_fit_together() -> None:
    """Kernels read without bounds checks: a damaged checkpoint must stop before them."""
    refused(r"need int32 \[rows, 8\], got int32 \[8, 7\]", packed=np.zeros((8, 7), np.int32))
    refused(r"need int32 \[rows, 8\], got uint32", packed=np.zeros((8, 8), np.uint32))
    refused(r"float32 scale \[8, 2\], got float32 \[8, 1\]", scale=np.ones((8, 1), np.float32))
    refused(r"zero_point must be int8 \[8, 2\]", zero_point=np.zeros((8, 1), np.int8))
    refused(r"64 group numbers in 0\.\.1", g_idx=np.full(64, 2, np.int32))
    refused(r"64 group numbers in 0\.\.1", g_idx=np.full(64, -1, np.int32))
    refused(r"64 group numbers in 0\.\.1", g_idx=np.zeros(63, np.int32))
    refused("at least 1, or None", group_size=0)
    refused("2 to 8 bits, got 9", bits=9)
    refused("holds no plain floats", dtype="F8_E4M3")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [7, 640, None])
def test_rows_longer_than_a_tile_are_decoded_as_a_whole(bits: int, group_size: int | None) -> None:
    """Kernels work on 2048 columns at a time; groups and padded words do not end there."""
    rng = np.random.default_rng(bits)
    codes = random_codes(rng, (2, 5001), bits)
    groups = 1 if group_size is None else -(-5001 // group_size)
    scale = rng.standard_normal((2, groups), np.float32)
    exact = codes.astype(np.float32) * np.repeat(scale, group_size or 5001, axis=1)[:, :5001]
    for dense in (True, False):
        options = {"bits": bits, "group_size": group_size, "cols": 5001, "dense": dense, "dtype": "F32"}
        ours = integer.decode(pack(codes, bits, dense=dense), scale, None, None, **options)  # type: ignore[arg-type]
        np.testing.assert_array_equal(ours, exact)
    np.testing.assert_array_equal(integer.decode_int8(codes, scale, None, group_size=group_size, dtype="F32"), exact)


def test_decode_int8_refuses_what_is_not_int8() -> None:
    scale = np.ones((8, 2), np.float32)
    with pytest.raises(ValueError, match=r"codes must be an int8 matrix, got uint8 \[8, 64\]"):
        integer.decode_int8(np.zeros((8, 64), np.uint8), scale, None, group_size=32, dtype="BF16")
    with pytest.raises(ValueError, match=r"float32 scale \[8, 2\], got float32 \[8, 1\]"):
        integer.decode_int8(np.zeros((8, 64), np.int8), scale[:, :1], None, group_size=32, dtype="BF16")
