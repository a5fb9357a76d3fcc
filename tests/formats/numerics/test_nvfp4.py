"""NVFP4 kernels, byte for byte: ModelOpt, compressed-tensors and our own torch reference."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import NVFP4A16
from hypothesis import given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.qtensor import NVFP4QTensor

from mso_hub.formats.numerics import floats, nvfp4
from mso_hub.formats.numerics.reference import nvfp4 as reference
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

GLOBAL_SCALES = [2.0**k for k in range(-134, 118, 7)] + [0.02 / 2688, 3.3e-5, 1.7, 3.0e38 / 2688]

global_scales = st.one_of(st.floats(2.0**-100, 2.0**100, width=32), st.floats(2.0**-149, 2.0**116, width=32))


def assert_like_modelopt(values: floats.Array, dtype: str, scale: np.float32) -> None:
    """Codes and scales equal ModelOpt's, except in blocks where it divides zero by zero."""
    packed, block_scale = nvfp4.encode(values, dtype, scale)
    tensor = torch.tensor(scale)
    quantized, theirs, _ = NVFP4QTensor.quantize(to_torch(values, dtype), 16, weights_scaling_factor_2=tensor)
    np.testing.assert_array_equal(block_scale, to_bits(theirs))
    defined = np.repeat((theirs.float() * tensor).numpy() != 0, 8, axis=1)
    np.testing.assert_array_equal(packed[defined], quantized._quantized_data.numpy()[defined])


def usable(scale: np.float32, search: str) -> np.float32:
    """A global scale that a search accepts: a power of two for "power"."""
    return nvfp4.power_scale(float(scale)) if search == "power" else scale


def assert_like_reference(values: floats.Array, dtype: str, scale: np.float32, search: str) -> None:
    """Every byte of `nvfp4` equals `reference`."""
    packed, block_scale = nvfp4.encode(values, dtype, scale, search=search)
    codes, theirs = reference.encode(to_torch(values, dtype), torch.tensor(scale), search=search)
    np.testing.assert_array_equal(block_scale, to_bits(theirs))
    np.testing.assert_array_equal(packed, codes.numpy())


def block_errors(values: floats.Array, dtype: str, scale: np.float32, search: str) -> floats.Array:
    """Squared error of each block in plain float64, from the bytes as a reader sees them."""
    packed, block_scale = nvfp4.encode(values, dtype, scale, search=search)
    near = nvfp4.decode(packed, block_scale, scale, "F32").astype(np.float64)
    far = floats.widen(values, dtype).astype(np.float64)
    squares: floats.Array = (far - near) ** 2
    return squares.reshape(values.shape[0], values.shape[1] // 16, 16).sum(-1)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_every_finite_pattern_encodes_like_modelopt(dtype: str, order: str) -> None:
    """All numbers of the dtype under global scales from far too small to far too large."""
    values = all_finite(dtype)
    if order == "shuffled":
        flat = np.random.default_rng(1).permutation(values.reshape(-1))
        values = flat.reshape(values.shape)
    own = nvfp4.global_scale(floats.amax(values, dtype))
    for scale in [own, *map(np.float32, GLOBAL_SCALES)]:
        assert_like_modelopt(values, dtype, scale)


def test_float32_bits_encode_like_modelopt() -> None:
    """Random F32 bits, then numbers close enough to each other to use all codes."""
    rng = np.random.default_rng(2)
    raw = finite(rng.integers(0, 1 << 32, (1024, 256), np.uint32), "F32")
    for values in (raw, gaussian((1024, 256), "F32"), gaussian((1024, 256), "F32") * np.float32(1e-37)):
        own = nvfp4.global_scale(floats.amax(values, "F32"))
        for scale in [own, *map(np.float32, GLOBAL_SCALES)]:
            assert_like_modelopt(values, "F32", scale)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data(), scale=global_scales)
@settings(deadline=None, max_examples=100)
def test_encode_equals_modelopt_and_all_searches_equal_the_reference(
    dtype: str, data: st.DataObject, scale: float
) -> None:
    """Any shape, any finite bits, any global scale."""
    values = data.draw(matrices(dtype))
    assert_like_modelopt(values, dtype, np.float32(scale))
    own = nvfp4.global_scale(floats.amax(values, dtype))
    for chosen in (np.float32(scale), own):
        for search in nvfp4.SEARCHES:
            assert_like_reference(values, dtype, usable(chosen, search), search)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("search", nvfp4.SEARCHES)
def test_weights_encode_like_the_reference(dtype: str, search: str) -> None:
    """Enough Gaussian rows to fill several tiles and leave a rest."""
    values = gaussian((37, 16 * 23), dtype)
    assert_like_reference(values, dtype, nvfp4.global_scale(floats.amax(values, dtype), search=search), search)


def test_ties_signs_and_saturation_in_literal_bytes() -> None:
    """Thresholds go to the even code; -0.0 is 0, a tiny negative is 8; too much is 7."""
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -0.0, -1e-30, -2.5, -3.5, -5.0, 0.0]
    loud = [448 * 6.0, 448 * 7.0] + [0.0] * 14  # amax/6 is over 448: the scale saturates, and the code
    packed, scale = nvfp4.encode(np.array([ties + loud], np.float32), "F32", np.float32(1.0))
    assert packed.tobytes().hex() == "20426476a880ec0e" + "77" + "00" * 7
    assert scale.tolist() == [[0x38, 0x7E]]


def test_scales_are_clamped_to_what_e4m3_can_hold() -> None:
    """2**-9 is code 1, 448 is code 126, and a block of zeros has the scale 1.0."""
    values = np.zeros((1, 48), np.float32)
    values[0, 16], values[0, 32] = 1e-6, 1e6
    _, scale = nvfp4.encode(values, "F32", np.float32(1.0))
    assert scale.tolist() == [[0x38, 0x01, 0x7E]]


def test_zero_tensor_survives_the_round_trip() -> None:
    """ModelOpt writes NaN scales here; we write zeros under scales of one."""
    scale = nvfp4.global_scale(0.0)
    packed, block_scale = nvfp4.encode(np.zeros((2, 32), np.uint16), "BF16", scale, search="mse")
    assert scale == 1.0
    assert not packed.any()
    assert (block_scale == 0x38).all()
    assert not nvfp4.decode(packed, block_scale, scale, "BF16").any()


def test_global_scale_equals_modelopt_unless_that_is_zero() -> None:
    """Every non-negative BF16 amax; a quotient that underflows gives 1.0, not 0."""
    amaxes = np.arange(0x7F80, dtype=np.uint16)
    theirs = NVFP4QTensor.get_weights_scaling_factor_2(torch.zeros(1))
    assert theirs == 0  # the case the guard is for
    wide = to_torch(amaxes, "BF16").float()
    expected = wide / (6.0 * 448.0)
    expected[expected == 0] = 1.0
    ours = np.array([nvfp4.global_scale(float(a)) for a in wide], np.float32)
    np.testing.assert_array_equal(ours, expected.numpy())
    np.testing.assert_array_equal(ours, reference.global_scale(wide).numpy())
    one = to_torch(np.array([0x3F9D], np.uint16), "BF16")
    assert nvfp4.global_scale(float(one)) == NVFP4QTensor.get_weights_scaling_factor_2(one).numpy()


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_search_cuts_the_error_of_gaussian_weights_by_a_fifth(dtype: str) -> None:
    """The reason to offer it."""
    values = gaussian((256, 1024), dtype)
    scale = nvfp4.global_scale(floats.amax(values, dtype))
    plain = block_errors(values, dtype, scale, "absmax").sum()
    assert block_errors(values, dtype, scale, "mse").sum() <= 0.8 * plain


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_search_is_never_worse_on_any_block(dtype: str, data: st.DataObject) -> None:
    """Measured apart from the search, in float64, so only its own rounding is allowed for."""
    values = data.draw(matrices(dtype))
    scale = nvfp4.global_scale(floats.amax(values, dtype))
    plain, searched = (block_errors(values, dtype, scale, s) for s in ("absmax", "mse"))
    assert (searched <= plain * (1 + 1e-6)).all()


def test_search_finds_the_best_of_the_nine_codes() -> None:
    """Against trying them one at a time with the decoder; blocks with the scale 448 keep it."""
    values = gaussian((16, 256), "F32", seed=3)
    scale = nvfp4.global_scale(floats.amax(values, "F32"))
    _, first = nvfp4.encode(values, "F32", scale)
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float64)
    blocks = np.abs(values.astype(np.float64)).reshape(16, 16, 16, 1)
    best = np.full(first.shape, np.inf)
    for offset in range(-2, 7):
        code = np.clip(first.astype(int) + offset, 1, 126)
        step = (floats.E4M3[code] * scale).astype(np.float64)[..., None, None]
        best = np.minimum(best, ((blocks - table * step) ** 2).min(-1).sum(-1))
    kept = first == 126
    assert kept.sum() == 2
    np.testing.assert_allclose(block_errors(values, "F32", scale, "mse")[~kept], best[~kept], rtol=1e-6)


@pytest.mark.parametrize(
    ("numbers", "absmax", "chosen"),
    [
        ([3.0, 1.5, 6.0], 0x38, 0),  # exact with the first guess, nothing can beat that
        ([5.0, 5.875, 3.625], 0x38, -1),  # -2, -1 and +6 have the same error: the nearest
        ([2.75, 4.875, 2.875], 0x35, -1),  # -1, +1 and +5: the nearest, and of those the lower
        ([3.75, 3.25], 0x32, 4),  # +4 and +6
    ],
)
def test_equal_errors_are_settled_as_documented(numbers: list[float], absmax: int, chosen: int) -> None:
    """Short numbers, whose errors are exact and so can be equal."""
    block = np.zeros((1, 16), np.float32)
    block[0, : len(numbers)] = numbers
    codes = [int(nvfp4.encode(block, "F32", np.float32(1), search=s)[1][0, 0]) for s in ("absmax", "mse")]
    assert codes == [absmax, absmax + chosen]
    assert_like_reference(block, "F32", np.float32(1), "mse")


def test_equal_errors_are_settled_as_in_the_reference() -> None:
    """Many blocks of two or three short numbers, where ties are common."""
    values = np.random.default_rng(4).integers(-64, 65, (4096, 64)).astype(np.float32) / 8
    values.reshape(-1, 16)[:, 3:] = 0
    assert_like_reference(values, "F32", np.float32(1), "mse")


def test_row_blocks_in_threads_give_the_bytes_of_the_whole() -> None:
    """The engine cuts matrices by rows and runs the kernels side by side."""
    values = gaussian((64, 512), "BF16")
    scale = nvfp4.global_scale(floats.amax(values, "BF16"))
    for search in nvfp4.SEARCHES:
        encode = partial(nvfp4.encode, dtype="BF16", global_scale=usable(scale, search), search=search)
        with ThreadPoolExecutor(4) as pool:
            parts = list(pool.map(encode, np.split(values, 8)))
        for whole, cut in zip(encode(values), zip(*parts, strict=True), strict=True):
            np.testing.assert_array_equal(whole, np.concatenate(cut))


def all_codes() -> tuple[floats.Array, floats.Array]:
    """Every byte of two codes under every scale that is a number: packed [254, 256], scale [254, 32]."""
    scales = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)
    return np.tile(np.arange(256, dtype=np.uint8), (254, 1)), np.repeat(scales[:, None], 32, axis=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiplier", [1.0, 0.02 / 2688, 3.3e-5, 2.0**-140, 1.0e35])
def test_decode_equals_modelopt_for_every_code_and_scale(dtype: str, multiplier: float) -> None:
    """Bits, so that the zero of code 8 counts, and overflow to infinity in F16."""
    packed, scale = all_codes()
    factor = torch.tensor(multiplier, dtype=torch.float32)
    float8 = torch.from_numpy(scale).view(torch.float8_e4m3fn)
    stored = NVFP4QTensor(torch.Size((254, 512)), TORCH[dtype], torch.from_numpy(packed))
    theirs = stored.dequantize(TORCH[dtype], scale=float8, double_scale=factor, block_sizes={-1: 16})
    ours = nvfp4.decode(packed, scale, np.float32(multiplier), dtype)
    np.testing.assert_array_equal(ours.view(bits_type(dtype)), to_bits(theirs))
    plain = reference.decode(torch.from_numpy(packed), float8, factor, TORCH[dtype])
    np.testing.assert_array_equal(ours.view(bits_type(dtype)), to_bits(plain))


@pytest.mark.parametrize("divisor", [1.0, 2688 / 0.02, 3.3e5, 2.0**120, 1.0e-35])
def test_decode_divided_equals_compressed_tensors(divisor: float) -> None:
    """Bits, so that the negative zero of code 8 counts; the other dtypes against the reference."""
    packed, scale = all_codes()
    factor = torch.tensor([divisor], dtype=torch.float32)
    float8 = torch.from_numpy(scale).view(torch.float8_e4m3fn)
    state = {"weight_packed": torch.from_numpy(packed), "weight_scale": float8, "weight_global_scale": factor}
    theirs = NVFP4PackedCompressor.decompress(state, QuantizationScheme(targets=["Linear"], **NVFP4A16))
    ours = nvfp4.decode_divided(packed, scale, np.float32(divisor), "BF16")
    np.testing.assert_array_equal(ours, to_bits(theirs["weight"]))
    for dtype in DTYPES:
        plain = reference.decode_divided(torch.from_numpy(packed), float8, factor, TORCH[dtype])
        ours = nvfp4.decode_divided(packed, scale, np.float32(divisor), dtype)
        np.testing.assert_array_equal(ours.view(bits_type(dtype)), to_bits(plain))


@pytest.mark.parametrize("search", nvfp4.SEARCHES)
@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_encoding_decoded_weights_again_loses_nothing(search: str, seed: int) -> None:
    """Decoded values lie on the grid of their block, so a second pass finds all of them again."""
    values = gaussian((4, 128), "BF16", seed)
    scale = nvfp4.global_scale(floats.amax(values, "BF16"), search=search)
    once = nvfp4.decode(*nvfp4.encode(values, "BF16", scale, search=search), scale, "F32")
    twice = nvfp4.decode(*nvfp4.encode(once, "F32", scale, search=search), scale, "F32")
    np.testing.assert_array_equal(once, twice)


@pytest.mark.parametrize(
    ("shape", "scale", "search", "message"),
    [
        ((2, 24), 1.0, "absmax", r"multiple of 16, got \[2, 24\]"),
        ((2, 2, 16), 1.0, "absmax", r"needs a matrix"),
        ((2, 16), 0.0, "absmax", "positive number, got 0.0"),
        ((2, 16), float("nan"), "mse", "positive number, got nan"),
        ((2, 16), 1.0, "best", "absmax, mse, four_over_six, power, got 'best'"),
        ((2, 16), 0.75, "power", "power of two, got 0.75"),
    ],
)
def test_encode_refuses_what_it_cannot_encode(shape: tuple[int, ...], scale: float, search: str, message: str) -> None:
    """Each error shows the limit and the value."""
    with pytest.raises(ValueError, match=message):
        nvfp4.encode(np.zeros(shape, np.uint16), "BF16", np.float32(scale), search=search)


@pytest.mark.parametrize("amax", [float("nan"), float("inf"), -1.0])
def test_global_scale_refuses_what_is_not_a_magnitude(amax: float) -> None:
    """A NaN in the weights must stop here at the latest."""
    with pytest.raises(ValueError, match="finite and >= 0"):
        nvfp4.global_scale(amax)


def test_decode_refuses_scales_of_another_matrix() -> None:
    """The kernel does not check bounds, so this must."""
    packed, one = np.zeros((2, 16), np.uint8), np.float32(1)
    for decode in (nvfp4.decode, nvfp4.decode_divided):
        with pytest.raises(ValueError, match=r"scale must be \[2, 2\], got \[2, 1\]"):
            decode(packed, np.zeros((2, 1), np.uint8), one, "BF16")
        with pytest.raises(ValueError, match="uint8 bits, got uint8 and int8"):
            decode(packed, np.zeros((2, 2), np.int8), one, "BF16")
        with pytest.raises(ValueError, match="known: BF16, F16, F32"):
            decode(packed, np.zeros((2, 2), np.uint8), one, "F64")
