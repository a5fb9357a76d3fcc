"""MXFP4 and MXFP8 kernels: compressed-tensors, ModelOpt, transformers and our own torch reference."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
from compressed_tensors.compressors.mxfp8 import MXFP8QuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import MXFP4A16, MXFP8A16
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from mso_hub.formats.numerics import floats, mx
from mso_hub.formats.numerics.reference import mx as reference
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

Encoded = tuple[floats.Array, floats.Array]
SCHEMES = {"mxfp4": (MXFP4PackedCompressor, MXFP4A16), "mxfp8": (MXFP8QuantizationCompressor, MXFP8A16)}
ENCODERS: dict[str, Callable[..., Encoded]] = {
    "mxfp4 absmax": mx.encode_mxfp4,
    "mxfp4 mse": partial(mx.encode_mxfp4, search="mse"),
    "mxfp8": mx.encode_mxfp8,
}
mx_matrices = partial(matrices, multiple=32)


def decoder(name: str) -> Callable[[floats.Array, floats.Array, str], floats.Array]:
    return mx.decode_mxfp8 if name == "mxfp8" else mx.decode_mxfp4


def compressed_tensors(values: floats.Array, dtype: str, name: str) -> Encoded:
    """Codes and scales as its compressor writes them."""
    compressor, preset = SCHEMES[name]
    scheme = QuantizationScheme(targets=["Linear"], **preset)
    weight = to_torch(values, dtype)
    scale, _ = compute_dynamic_scales_and_zp(weight, scheme.weights, torch.nn.Linear(1, 1))
    state = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    codes = state["weight_packed"] if name == "mxfp4" else state["weight"].view(torch.uint8)
    return codes.numpy(), state["weight_scale"].numpy()


def modelopt_mxfp8(values: floats.Array, dtype: str) -> Encoded:
    stored, scale = MXFP8QTensor.quantize(to_torch(values, dtype))
    return stored._quantized_data.view(torch.uint8).numpy(), scale.reshape(len(values), -1).numpy()


def block_errors(values: floats.Array, dtype: str, near: floats.Array) -> floats.Array:
    """Sum of squares over each block of 32, in float64."""
    wide = floats.widen(values, dtype).astype(np.float64)
    squares: floats.Array = (wide - near.astype(np.float64)) ** 2
    return squares.reshape(len(values), -1, 32).sum(-1)


def amax_fraction(values: floats.Array, dtype: str) -> floats.Array:
    """1 <= f < 2 of the largest magnitude f * 2**k of each block, 0 for zeros."""
    amax = np.abs(floats.widen(values, dtype)).reshape(len(values), -1, 32).max(-1)
    return 2 * np.frexp(amax)[0]


def unpacked(packed: floats.Array) -> floats.Array:
    """Codes [rows, cols]."""
    codes: floats.Array = np.stack((packed & 15, packed >> 4), -1).reshape(len(packed), -1)
    return codes


def samples(dtype: str) -> list[floats.Array]:
    """Every finite pattern, sorted and shuffled, or random F32 bits; then weights, and blocks of all magnitudes."""
    rng = np.random.default_rng(1)
    if dtype == "F32":
        found = [finite(rng.integers(0, 1 << 32, (512, 256), np.uint32), "F32")]
    else:
        values = all_finite(dtype)
        found = [values, rng.permutation(values.reshape(-1)).reshape(values.shape)]
    wide = rng.standard_normal((512, 256)) * np.exp2(rng.integers(-120, 120, (512, 1)))
    if dtype != "F16":
        narrowed = torch.from_numpy(wide.astype(np.float32)).to(TORCH[dtype])
        found.append(to_bits(narrowed).view(floats.storage(dtype)))
    return [*found, gaussian((256, 256), dtype)]


def is_huge(values: floats.Array, dtype: str) -> floats.Array:
    """Blocks for which compressed-tensors' scale is infinite."""
    amax = np.abs(floats.widen(values, dtype)).reshape(len(values), -1, 32).max(-1)
    huge: floats.Array = amax >= 1.75 * 2.0**127
    return huge


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_mxfp4_equals_compressed_tensors(dtype: str) -> None:
    """Every scale, and every code but for the sign of zero."""
    for values in samples(dtype):
        packed, scale = mx.encode_mxfp4(values, dtype)
        codes, theirs = compressed_tensors(values, dtype, "mxfp4")
        fair = ~is_huge(values, dtype)
        np.testing.assert_array_equal(scale[fair], theirs[fair])
        step = floats.E8M0[np.repeat(scale, 32, axis=1)]
        quotient = (to_torch(values, dtype) / torch.from_numpy(step).to(TORCH[dtype])).float().numpy()
        zeros = np.signbit(floats.widen(values, dtype)) & (quotient == 0)  # -0.0, and what underflows to it there
        expected = np.where(zeros, 0, unpacked(packed))
        same = np.repeat(fair, 32, axis=1)
        np.testing.assert_array_equal(expected[same], unpacked(codes)[same])


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("library", ["compressed-tensors", "modelopt"])
def test_mxfp8_equals_both_libraries_where_the_largest_code_is_not_448(library: str, dtype: str) -> None:
    """From 1.75 to 1.8125 times a power of two ours is one less; `DEVIATIONS` measures that."""
    for values in samples(dtype):
        codes, scale = mx.encode_mxfp8(values, dtype)
        theirs = modelopt_mxfp8 if library == "modelopt" else partial(compressed_tensors, name="mxfp8")
        their_codes, their_scale = theirs(values, dtype)
        fraction = amax_fraction(values, dtype)
        tied = (fraction >= 1.75) & (fraction <= 1.8125) & ~is_huge(values, dtype)
        fair = ~tied & ~is_huge(values, dtype)
        np.testing.assert_array_equal(scale[fair], their_scale[fair])
        np.testing.assert_array_equal(codes[np.repeat(fair, 32, axis=1)], their_codes[np.repeat(fair, 32, axis=1)])
        assert set((their_scale[tied].astype(int) - scale[tied]).tolist()) <= {0, 1}


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_encoders_equal_the_reference(name: str, dtype: str, data: st.DataObject) -> None:
    assert_like_reference(name, data.draw(mx_matrices(dtype)), dtype)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern_encodes_like_the_reference(name: str, dtype: str) -> None:
    for values in samples(dtype):
        assert_like_reference(name, values, dtype)


def assert_like_reference(name: str, values: floats.Array, dtype: str) -> None:
    codes, scale = ENCODERS[name](values, dtype)
    weight = to_torch(values, dtype)
    if name == "mxfp8":
        theirs, their_scale = reference.encode_mxfp8(weight)
    else:
        theirs, their_scale = reference.encode_mxfp4(weight, search=name.split()[1])
    np.testing.assert_array_equal(scale, their_scale.numpy())
    np.testing.assert_array_equal(codes, to_bits(theirs))


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_decoded_numbers_encode_to_the_same_bytes(name: str, dtype: str, data: st.DataObject) -> None:
    """In the dtype of the values and in F32; the sign of zero included."""
    values = data.draw(mx_matrices(dtype))
    assume(dtype != "F16" or floats.amax(values, dtype) < 57344)
    assert_stable(name, values, dtype)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern_decoded_encodes_to_the_same_bytes(name: str, dtype: str) -> None:
    for values in samples(dtype):
        assert_stable(
            name, values[np.abs(floats.widen(values, dtype)).max(1) < 57344] if dtype == "F16" else values, dtype
        )


def assert_stable(name: str, values: floats.Array, dtype: str) -> None:
    codes, scale = ENCODERS[name](values, dtype)
    for stored in {dtype, "F32"}:
        there = decoder(name)(codes, scale, stored)
        assert np.isfinite(floats.widen(there, stored)).all()
        again, rescale = ENCODERS[name](there, stored)
        np.testing.assert_array_equal(rescale, scale)
        np.testing.assert_array_equal(again, codes)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_weights_in_f32_find_their_scales_again_in_short_dtypes(dtype: str) -> None:
    """The numbers of a code and a power of two fit both."""
    values = gaussian((256, 1024), "F32")
    for name, encode in ENCODERS.items():
        codes, scale = encode(values, "F32")
        again, rescale = encode(decoder(name)(codes, scale, dtype), dtype)
        large = scale >= 127 - 14 if dtype == "F16" else scale >= 0
        np.testing.assert_array_equal(rescale[large], scale[large])
        np.testing.assert_array_equal(again.reshape(*scale.shape, -1)[large], codes.reshape(*scale.shape, -1)[large])


class Deviation(NamedTuple):
    """A block that a library writes otherwise."""

    name: str
    library: Callable[..., Encoded]
    block: list[float]
    reason: str
    ours: float
    theirs: float
    """Sums of squared errors."""


DEVIATIONS = [
    Deviation(
        "mxfp8 exponent, compressed-tensors",
        partial(compressed_tensors, name="mxfp8"),
        [1.75, 3 * 2.0**-17],
        "448 is a code, so an amax of 1.75 * 2**k needs no larger exponent",
        0.0,
        2.0**-34,
    ),
    Deviation(
        "mxfp8 exponent, ModelOpt",
        modelopt_mxfp8,
        [1.78125, 3 * 2.0**-17],
        "232 rounds to 224, which is 448 under the next smaller exponent",
        2.0**-10,
        2.0**-10 + 2.0**-34,
    ),
    Deviation(
        "mxfp4 largest exponent, compressed-tensors",
        partial(compressed_tensors, name="mxfp4"),
        [1.75 * 2.0**127],
        "that library takes 2**128 for the scale, which is infinite, and so the codes are 0",
        2.0**250,
        (1.75 * 2.0**127) ** 2,
    ),
    Deviation(
        "mxfp8 largest exponent, ModelOpt",
        modelopt_mxfp8,
        [1.9375 * 2.0**127],
        "under the next exponent the number becomes 2**128",
        9 * 2.0**246,
        float("inf"),
    ),
    Deviation(
        "mxfp4 sign of zero, compressed-tensors",
        partial(compressed_tensors, name="mxfp4"),
        [1.0, -0.0],
        "code 8 decodes to -0.0, so -0.0 has code 8",
        0.0,
        0.0,
    ),
]


@pytest.mark.parametrize("case", DEVIATIONS, ids=lambda case: case.name)
def test_deviations_differ_and_lose_no_more(case: Deviation) -> None:
    values = np.zeros((1, 32), np.float32)
    values[0, : len(case.block)] = case.block
    name = case.name.split()[0]
    encode, decode = (mx.encode_mxfp4, mx.decode_mxfp4) if name == "mxfp4" else (mx.encode_mxfp8, mx.decode_mxfp8)
    ours, theirs = encode(values, "F32"), case.library(values, "F32")
    assert ours[0].tobytes() != theirs[0].tobytes()
    errors = [float(block_errors(values, "F32", decode(codes, scale, "F32"))[0, 0]) for codes, scale in (ours, theirs)]
    assert errors == [case.ours, case.theirs]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("library", ["compressed-tensors", "modelopt"])
def test_no_block_of_mxfp8_loses_more_than_with_a_library(library: str) -> None:
    """Over blocks whose largest number is in the range where the exponents differ."""
    rng = np.random.default_rng(2)
    values = (rng.standard_normal((512, 256)) * np.exp2(-rng.integers(0, 24, (512, 256)))).astype(np.float32)
    values[:, ::32] = rng.uniform(1.7, 1.85, (512, 8)).astype(np.float32) * 8
    theirs = modelopt_mxfp8 if library == "modelopt" else partial(compressed_tensors, name="mxfp8")
    ours, found = (
        block_errors(values, "F32", mx.decode_mxfp8(codes, scale, "F32"))
        for codes, scale in (mx.encode_mxfp8(values, "F32"), theirs(values, "F32"))
    )
    assert (ours <= found).all()
    assert (ours < found).sum() > 100


def best_of_all(values: floats.Array, name: str) -> floats.Array:
    """Least squared error of each block under any exponent from six below to four above that of absmax."""
    decode, encode = (mx.decode_mxfp8, mx.encode_mxfp8) if name == "mxfp8" else (mx.decode_mxfp4, mx.encode_mxfp4)
    _, scale = encode(values, "F32")
    best = np.full(scale.shape, np.inf)
    for offset in range(-6, 5):
        exponent = np.clip(scale.astype(int) + offset, 0, 254)
        step = np.repeat(np.exp2(exponent - 127.0), 32, axis=1)
        if name == "mxfp8":
            quotient = torch.from_numpy((values / step).astype(np.float32)).clamp(-448, 448)
            near = quotient.to(torch.float8_e4m3fn).float().numpy()
        else:
            grid = decode(np.array([[0x10, 0x32, 0x54, 0x76] * 4], np.uint8), np.array([[127]], np.uint8), "F32")[0, :8]
            distance = np.abs(np.abs(values / step)[..., None] - grid)
            near = np.copysign(grid[distance.argmin(-1)], values)
        best = np.minimum(best, block_errors(values, "F32", near * step))
    return best


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_no_other_exponent_has_less_error(name: str) -> None:
    """Weights, uniform numbers, blocks close to each threshold, and blocks that only a smaller exponent suits."""
    rng = np.random.default_rng(3)
    base = rng.standard_normal((256, 256))
    mixed = base * np.exp2(-rng.integers(0, 12, (256, 256)).astype(float))
    close = base * 0.01
    close[:, ::32] = rng.choice([1.0, 1.25, 1.5, 1.75, 1.8125], (256, 8)) * (
        1 + rng.choice([-1, 0, 1], (256, 8)) * 2e-7
    )
    alike = rng.choice([1.0, 1.1, 1.249, 0.26, 0.37, 1.74], (256, 256))
    for values in (base, mixed, close, alike, rng.uniform(-1, 1, (256, 256))):
        values32 = values.astype(np.float32)
        encoded = (
            mx.encode_mxfp8(values32, "F32") if name == "mxfp8" else mx.encode_mxfp4(values32, "F32", search="mse")
        )
        near = (mx.decode_mxfp8 if name == "mxfp8" else mx.decode_mxfp4)(*encoded, "F32")
        np.testing.assert_allclose(block_errors(values32, "F32", near), best_of_all(values32, name), rtol=1e-6)


def test_search_lowers_some_exponents_and_no_error_grows() -> None:
    values = gaussian((256, 1024), "BF16")
    plain, searched = (mx.encode_mxfp4(values, "BF16", search=s) for s in mx.SEARCHES)
    errors = [block_errors(values, "BF16", mx.decode_mxfp4(*e, "F32")) for e in (plain, searched)]
    assert (errors[1] <= errors[0]).all()
    assert errors[1].sum() < 0.9999 * errors[0].sum()
    assert set((plain[1].astype(int) - searched[1]).reshape(-1).tolist()) == {0, 1}


def test_exponents_in_literal_bytes() -> None:
    """Thresholds, zeros, the smallest and the largest numbers."""
    amaxes = [1.0, 1.5, np.nextafter(np.float32(1.75), 0), 1.75, 1.8125, np.nextafter(np.float32(1.8125), 2)]
    amaxes += [0.0, 2.0**-149, 2.0**-125, 2.0**-124, 3.4e38]
    values = np.zeros((len(amaxes), 32), np.float32)
    values[:, 5] = amaxes
    assert mx.encode_mxfp4(values, "F32")[1].reshape(-1).tolist() == [125, 125, 125, 126, 126, 126, 0, 0, 0, 1, 252]
    assert mx.encode_mxfp8(values, "F32")[1].reshape(-1).tolist() == [119, 119, 119, 119, 119, 120, 0, 0, 0, 0, 246]


def test_codes_in_literal_bytes() -> None:
    """Thresholds go to the even code, zero keeps its sign, too much is 6."""
    values = np.zeros((1, 32), np.float32)
    values[0, :16] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -0.0, -1e-30, -2.5, -3.5, -5.0, 0.0]
    packed, scale = mx.encode_mxfp4(values, "F32")
    assert (packed.tobytes().hex(), scale.tolist()) == ("20426476a888ec0e" + "00" * 8, [[127]])
    codes, scale = mx.encode_mxfp8(np.where(values == 6, 464, values).astype(np.float32), "F32")
    assert (codes[0, [0, 7, 8, 10, 11]].tolist(), scale.tolist()) == ([0x28, 0x7E, 0xA8, 0x80, 0x80], [[127]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_mxfp4_equals_compressed_tensors_and_modelopt(dtype: str) -> None:
    """Every code under every scale; ModelOpt in each dtype, compressed-tensors in BF16."""
    packed = np.tile(np.arange(256, dtype=np.uint8), (255, 1))
    scale = np.repeat(np.arange(255, dtype=np.uint8)[:, None], 16, axis=1)
    ours = mx.decode_mxfp4(packed, scale, dtype).view(bits_type(dtype))
    stored = MXFP4QTensor(torch.Size((255, 512)), TORCH[dtype], torch.from_numpy(packed))
    theirs = stored.dequantize(TORCH[dtype], scale=torch.from_numpy(scale), block_sizes={-1: 32})
    np.testing.assert_array_equal(ours, to_bits(theirs))
    plain = reference.decode_mxfp4(torch.from_numpy(packed), torch.from_numpy(scale), TORCH[dtype])
    np.testing.assert_array_equal(ours, to_bits(plain))
    if dtype == "BF16":
        state = {"weight_packed": torch.from_numpy(packed), "weight_scale": torch.from_numpy(scale)}
        scheme = QuantizationScheme(targets=["Linear"], **MXFP4A16)
        np.testing.assert_array_equal(ours, to_bits(MXFP4PackedCompressor.decompress(state, scheme)["weight"]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_mxfp8_equals_compressed_tensors_and_modelopt(dtype: str) -> None:
    """Every code that is a number under every scale."""
    numbers = np.array([c for c in range(256) if c & 0x7F != 0x7F] + [0, 0], np.uint8)
    codes = np.tile(numbers, (255, 1))
    scale = np.repeat(np.arange(255, dtype=np.uint8)[:, None], 8, axis=1)
    ours = mx.decode_mxfp8(codes, scale, dtype).view(bits_type(dtype))
    float8 = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    stored = MXFP8QTensor(torch.Size(codes.shape), TORCH[dtype], float8)
    np.testing.assert_array_equal(ours, to_bits(stored.dequantize(TORCH[dtype], scale=torch.from_numpy(scale))))
    plain = reference.decode_mxfp8(float8, torch.from_numpy(scale), TORCH[dtype])
    np.testing.assert_array_equal(ours, to_bits(plain))
    if dtype == "BF16":
        state = {"weight": float8, "weight_scale": torch.from_numpy(scale)}
        scheme = QuantizationScheme(targets=["Linear"], **MXFP8A16)
        np.testing.assert_array_equal(ours, to_bits(MXFP8QuantizationCompressor.decompress(state, scheme)["weight"]))


def test_the_scale_255_and_the_codes_7f_and_ff_are_nan() -> None:
    assert np.isnan(mx.decode_mxfp4(np.zeros((1, 16), np.uint8), np.full((1, 1), 255, np.uint8), "F32")).all()
    codes = np.zeros((1, 64), np.uint8)
    codes[0, :2] = [0x7F, 0xFF]
    found = np.isnan(mx.decode_mxfp8(codes, np.array([[127, 255]], np.uint8), "F32"))
    assert found[0, :2].all()
    assert not found[0, 2:32].any()
    assert found[0, 32:].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 64, 3), (3, 100, 2)])
def test_gpt_oss_experts_equal_transformers(dtype: str, shape: tuple[int, int, int]) -> None:
    """Turned, in tiles with and without a rest, also as a slice of the experts."""
    rng = np.random.default_rng(4)
    blocks = rng.integers(0, 256, (*shape, 16), np.uint8)
    scales = rng.integers(115, 135, shape).astype(np.uint8)
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=TORCH[dtype])
    ours = mx.decode_gpt_oss(blocks, scales, dtype)
    np.testing.assert_array_equal(ours.view(bits_type(dtype)), to_bits(theirs))
    part = mx.decode_gpt_oss(blocks[-1:], scales[-1:], dtype)
    np.testing.assert_array_equal(part.view(bits_type(dtype)), ours[-1:].view(bits_type(dtype)))
    plain = reference.decode_gpt_oss(torch.from_numpy(blocks), torch.from_numpy(scales), TORCH[dtype])
    np.testing.assert_array_equal(ours.view(bits_type(dtype)), to_bits(plain))


def test_row_blocks_in_threads_give_the_bytes_of_the_whole() -> None:
    values = gaussian((64, 512), "BF16")
    for encode in ENCODERS.values():
        with ThreadPoolExecutor(4) as pool:
            parts = list(pool.map(partial(encode, dtype="BF16"), np.split(values, 8)))
        for whole, cut in zip(encode(values, "BF16"), zip(*parts, strict=True), strict=True):
            np.testing.assert_array_equal(whole, np.concatenate(cut))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mx.encode_mxfp4(np.zeros((2, 16), np.uint16), "BF16"), r"multiple of 32, got \[2, 16\]"),
        (lambda: mx.encode_mxfp8(np.zeros((2, 2, 32), np.uint16), "BF16"), "needs a matrix"),
        (lambda: mx.encode_mxfp4(np.zeros((2, 32), np.uint16), "BF16", search="best"), "absmax, mse, got 'best'"),
        (lambda: mx.decode_mxfp4(np.zeros((2, 16), np.uint8), np.zeros((1, 1), np.uint8), "F32"), r"must be \[2, 1\]"),
        (lambda: mx.decode_mxfp8(np.zeros((2, 32), np.uint8), np.zeros((2, 1), np.int8), "F32"), "uint8 and int8"),
        (lambda: mx.decode_mxfp8(np.zeros((2, 32), np.uint8), np.zeros((2, 1), np.uint8), "F64"), "known: BF16"),
        (lambda: mx.decode_gpt_oss(np.zeros((1, 2, 2, 8), np.uint8), np.zeros((1, 2, 2), np.uint8), "F32"), "K/32, 16"),
    ],
)
def test_refusals_show_the_limit_and_the_value(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
