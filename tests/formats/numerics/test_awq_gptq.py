"""AWQ and GPTQ against compressed-tensors' converter, the definition in Python integers, and the plain torch twin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.entrypoints.convert import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st

from mso_hub.formats.numerics import floats
from mso_hub.formats.numerics.awq_gptq import decode_awq, decode_gptq
from mso_hub.formats.numerics.reference import integer as reference
from tests.formats.numerics.strategies import DTYPES, TORCH, bits_type, to_bits

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring columns each nibble of a word holds."""


def words(codes: floats.Array, bits: int) -> floats.Array:
    """Pack the rows of codes as one bit stream each, from the definition in Python integers."""
    streams = [sum(q << (i * bits) for i, q in enumerate(row)) for row in codes.tolist()]
    return np.stack([np.frombuffer(s.to_bytes(codes.shape[1] * bits // 8, "little"), np.int32) for s in streams])


def random_words(rng: np.random.Generator, *shape: int) -> floats.Array:
    """Any bits."""
    return rng.integers(-(2**31), 2**31, shape).astype(np.int32)


def random_scales(rng: np.random.Generator, *shape: int) -> floats.Array:
    """F16 scales as in a checkpoint."""
    return (np.abs(rng.standard_normal(shape)) * 0.01).astype(np.float16)


def expected(
    codes: floats.Array, zeros: floats.Array, scales: floats.Array, group: floats.Array, dtype: str
) -> floats.Array:
    """Bits of (q - z) * s, for codes [K, N], zeros and scales [groups, N]."""
    distance = (codes.astype(np.int64) - zeros.astype(np.int64)[group]).astype(np.float32)
    return to_bits(torch.from_numpy(distance * scales.astype(np.float32)[group]).T.to(TORCH[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("shape", [(256, 192), (128, 72)])
def test_awq_equals_the_converter_of_compressed_tensors(dtype: str, group_size: int, shape: tuple[int, int]) -> None:
    """Converted to pack-quantized and decompressed, which rounds to F16; F32 and BF16 from its integers."""
    cols, rows = shape
    rng = np.random.default_rng(group_size)
    qweight, qzeros = random_words(rng, cols, rows // 8), random_words(rng, cols // group_size, rows // 8)
    scales = random_scales(rng, cols // group_size, rows)
    tensors = {
        "m.qweight": torch.from_numpy(qweight),
        "m.qzeros": torch.from_numpy(qzeros),
        "m.scales": torch.from_numpy(scales),
    }
    converted = AutoAWQConverter(group_size=group_size).process(tensors)
    args = QuantizationArgs(num_bits=4, group_size=group_size, symmetric=False, strategy="group")
    state = {name.removeprefix("m."): tensor for name, tensor in converted.items()}
    state["weight_scale"] = state["weight_scale"].to(TORCH["F32" if dtype == "BF16" else dtype])
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    theirs = PackedQuantizationCompressor.decompress(state, scheme)["weight"].to(TORCH[dtype])
    ours = decode_awq(qweight, qzeros, scales, group_size=group_size, dtype=dtype)
    np.testing.assert_array_equal(ours.view(bits_type(dtype)), to_bits(theirs))


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_awq_equals_the_definition_and_the_twin(data: st.DataObject) -> None:
    cols, rows = data.draw(st.integers(1, 150)), 8 * data.draw(st.integers(1, 20))
    group_size, dtype = data.draw(st.integers(1, cols)), data.draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    group = np.arange(cols) // group_size
    groups = int(group[-1]) + 1
    codes, zeros = rng.integers(0, 16, (cols, rows)), rng.integers(0, 16, (groups, rows))
    scales = random_scales(rng, groups, rows)
    mixed = np.arange(rows).reshape(-1, 8)[:, AWQ_ORDER].reshape(-1)
    qweight, qzeros = words(codes[:, mixed], 4), words(zeros[:, mixed], 4)
    ours = decode_awq(qweight, qzeros, scales, group_size=group_size, dtype=dtype)
    np.testing.assert_array_equal(ours.view(bits_type(dtype)), expected(codes, zeros, scales, group, dtype))
    tensors = [torch.from_numpy(part) for part in (qweight, qzeros, scales)]
    plain = reference.decode_awq(*tensors, group_size=group_size, dtype=TORCH[dtype])
    np.testing.assert_array_equal(ours.view(bits_type(dtype)), to_bits(plain))


@given(data=st.data(), bits=st.sampled_from([2, 3, 4, 8]), zero_offset=st.sampled_from([0, 1]))
@settings(deadline=None, max_examples=120)
def test_gptq_equals_the_definition_and_the_twin(data: st.DataObject, bits: int, zero_offset: int) -> None:
    """Any group size, with and without g_idx; zero points of v1 are 1 and more, so that one can be subtracted."""
    cols, rows = 32 * data.draw(st.integers(1, 5)), 32 * data.draw(st.integers(1, 5))
    group_size, dtype = data.draw(st.integers(1, cols)), data.draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    groups = -(-cols // group_size)
    g_idx = rng.integers(0, groups, cols).astype(np.int32) if data.draw(st.booleans()) else None
    group = np.arange(cols) // group_size if g_idx is None else g_idx
    codes, zeros = rng.integers(0, 2**bits, (cols, rows)), rng.integers(zero_offset, 2**bits, (groups, rows))
    scales = random_scales(rng, groups, rows)
    qweight = np.ascontiguousarray(words(np.ascontiguousarray(codes.T), bits).T)
    qzeros = words(zeros - zero_offset, bits)
    options: dict[str, Any] = {"bits": bits, "zero_offset": zero_offset}
    ours = decode_gptq(qweight, qzeros, scales, g_idx, group_size=group_size, dtype=dtype, **options)
    np.testing.assert_array_equal(ours.view(bits_type(dtype)), expected(codes, zeros, scales, group, dtype))
    tensors = [torch.from_numpy(part) for part in (qweight, qzeros, scales, group.astype(np.int64))]
    plain = reference.decode_gptq(*tensors, dtype=TORCH[dtype], **options)
    np.testing.assert_array_equal(ours.view(bits_type(dtype)), to_bits(plain))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_v1_undoes_the_borrow_of_a_zero_point_of_zero(bits: int) -> None:
    """GPTQModel turns gptq_v2 into gptq by subtracting 1, 1, 1 .. from words as a whole, and back by adding it."""
    rng = np.random.default_rng(bits)
    zeros = rng.integers(0, 2**bits, (4, 64))
    zeros[:, ::3] = 0
    stored = words(zeros, bits)
    ones = np.uint32(sum(1 << low for low in range(0, 32, bits)))
    subtracted = (stored.view(np.uint32) - ones).view(np.int32)
    qweight, scales = random_words(rng, 4 * bits, 64), random_scales(rng, 4, 64)
    first, second = (
        decode_gptq(qweight, qzeros, scales, None, bits=bits, group_size=32, zero_offset=offset, dtype="F32")
        for qzeros, offset in ((subtracted, 1), (stored, 0))
    )
    np.testing.assert_array_equal(first, second)


def test_gptq_3_bit_codes_are_those_of_auto_gptq() -> None:
    """Its words of ten codes, a part of one, ten, a part, ten, written out."""
    codes = np.random.default_rng(3).integers(0, 8, 32)
    words_of = [0, 0, 0]
    for j in range(10):
        words_of[0] |= int(codes[j]) << (3 * j)
        words_of[1] |= int(codes[11 + j]) << (3 * j + 1)
        words_of[2] |= int(codes[22 + j]) << (3 * j + 2)
    words_of[0] |= (int(codes[10]) & 3) << 30
    words_of[1] |= int(codes[10]) >> 2 | (int(codes[21]) & 1) << 31
    words_of[2] |= int(codes[21]) >> 1
    qweight = np.repeat(np.array(words_of, np.uint32).view(np.int32)[:, None], 32, axis=1)
    qzeros, scales = np.zeros((1, 3), np.int32), np.ones((1, 32), np.float16)
    decoded = decode_gptq(qweight, qzeros, scales, None, bits=3, group_size=32, zero_offset=0, dtype="F32")
    np.testing.assert_array_equal(decoded, np.tile(codes.astype(np.float32), (32, 1)))


def test_scales_may_be_of_any_dtype() -> None:
    rng = np.random.default_rng(0)
    qweight, qzeros = random_words(rng, 64, 8), random_words(rng, 2, 8)
    wide = floats.widen(floats.narrow(rng.standard_normal((2, 64), np.float32), "BF16"), "BF16")
    stored = [wide, floats.narrow(wide, "BF16"), wide.astype(np.float16)]
    decoded = [decode_awq(qweight, qzeros, scales, group_size=32, dtype="F32") for scales in stored]
    np.testing.assert_array_equal(decoded[0], decoded[1])
    np.testing.assert_array_equal(decoded[0], decoded[2])


def refused(message: str, **changes: object) -> None:
    """Decode a 64 x 64 GPTQ matrix with one thing wrong."""
    right: dict[str, Any] = {
        "qweight": np.zeros((8, 64), np.int32),
        "qzeros": np.zeros((2, 8), np.int32),
        "scales": np.ones((2, 64), np.float16),
        "g_idx": np.zeros(64, np.int32),
        "bits": 4,
        "group_size": 32,
        "zero_offset": 1,
        "dtype": "BF16",
    }
    decode_gptq(**right)
    with pytest.raises(ValueError, match=message):
        decode_gptq(**right | changes)


def test_shapes_that_do_not_fit_together_are_refused() -> None:
    """Kernels read without bounds checks: a damaged checkpoint must stop before them."""
    refused(r"qweight must be int32 \[8, 64\] in whole words, got int32 \[8, 63\]", qweight=np.zeros((8, 63), np.int32))
    refused(r"qweight must be int32 \[8, 64\] in whole words, got int64", qweight=np.zeros((8, 64), np.int64))
    refused(r"qzeros must be int32 \[2, 8\] in whole words, got int32 \[1, 8\]", qzeros=np.zeros((1, 8), np.int32))
    refused(r"scales must be floats \[2, 64\], got float16 \[1, 64\]", scales=np.ones((1, 64), np.float16))
    refused(r"scales must be floats \[2, 64\], got float64", scales=np.ones((2, 64)))
    refused(r"64 group numbers in 0\.\.1", g_idx=np.full(64, 2, np.int32))
    refused("2, 3, 4 or 8 bits and a zero offset of 0 or 1, got 5 and 1", bits=5)
    refused("2, 3, 4 or 8 bits and a zero offset of 0 or 1, got 4 and 2", zero_offset=2)
    refused("group_size must be at least 1, got 0", group_size=0)
    refused("qweight must be int32", bits=3)
    zeros, scales = np.zeros((2, 8), np.int32), np.ones((2, 64), np.float16)
    with pytest.raises(ValueError, match=r"qweight must be int32 \[64, 8\]"):
        decode_awq(np.zeros((64, 7), np.int32), zeros, scales, group_size=32, dtype="BF16")
    with pytest.raises(ValueError, match=r"qzeros must be int32 \[2, 8\]"):
        decode_awq(np.zeros((64, 8), np.int32), np.zeros((2, 7), np.int32), scales, group_size=32, dtype="BF16")
