"""The searches of NVFP4: what they promise about encoding twice, four over six, and MXFP4 without loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from modelopt.torch.export.shard_cast_utils import mxfp4_kmax, quantize_mxfp4_to_nvfp4_lossless
from modelopt.torch.quantization.qtensor import NVFP4QTensor

from mso_hub.formats.numerics import floats, mx, nvfp4
from mso_hub.formats.numerics.reference import nvfp4 as reference
from tests.formats.numerics.strategies import DTYPES, gaussian, matrices, to_torch

FINDING = ("mse", "four_over_six")
SMALLEST_NORMAL = {"BF16": 2.0**-126, "F16": 2.0**-14, "F32": 2.0**-126}


def plain(packed: floats.Array) -> floats.Array:
    """Codes [rows, cols] with 0 for the negative zero."""
    codes = np.stack((packed & 15, packed >> 4), -1).reshape(len(packed), -1)
    return np.where(codes == 8, 0, codes)


def found_again(values: floats.Array, dtype: str, stored: str, search: str) -> bool:
    """Encode, decode to `stored`, encode with the scale of the new amax: the same codes and block scales.

    Both layouts are decoded; the reciprocal that compressed-tensors stores is another rounding.
    returns  False where the scale, or a number in `stored`, is not normal, so that nothing was compared
    """
    scale = nvfp4.global_scale(floats.amax(values, dtype), search=search)
    if scale < SMALLEST_NORMAL["F32"]:
        return False
    packed, block_scale = nvfp4.encode(values, dtype, scale, search=search)
    for there in (
        nvfp4.decode(packed, block_scale, scale, stored),
        nvfp4.decode_divided(packed, block_scale, np.float32(1) / scale, stored),
    ):
        wide = np.abs(floats.widen(there, stored))
        if not (np.isfinite(wide) & ((wide >= SMALLEST_NORMAL[stored]) | (plain(packed) == 0))).all():
            return False
        again = nvfp4.global_scale(float(wide.max()), search=search)
        repacked, rescale = nvfp4.encode(there, stored, again, search=search)
        np.testing.assert_array_equal(rescale, block_scale)
        np.testing.assert_array_equal(plain(repacked), plain(packed))
    return True


@st.composite
def short(draw: st.DrawFn) -> floats.Array:
    """Few small integers times powers of two: ties, images of several scales, blocks far below the largest."""
    rows, blocks = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    size = rows * blocks * 16
    numbers = draw(st.sampled_from([(0, 1, 2, 4), (0, 2, 3, 6), (0, 4, 8), tuple(range(64)), (0, 45, 60, 90)]))
    index = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    values = np.array(numbers, np.float32)[index % len(numbers)].reshape(rows, blocks, 16)
    exponents = draw(st.lists(st.integers(-20, 0), min_size=rows * blocks, max_size=rows * blocks))
    values *= np.exp2(np.array(exponents, np.float32)).reshape(rows, blocks, 1)
    values[..., ::3] *= -1
    return values.reshape(rows, blocks * 16)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("search", FINDING)
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_short_numbers_find_their_scales_again(search: str, stored: str, data: st.DataObject) -> None:
    values = data.draw(short())
    if stored == "F16":  # a largest number for which the smallest step is a normal number
        values[0, 0] = 2.0**15
    assert found_again(values, "F32", stored, search)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("search", FINDING)
@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_any_numbers_find_their_scales_again(search: str, dtype: str, data: st.DataObject) -> None:
    values = data.draw(matrices(dtype))
    compared = [found_again(values, dtype, stored, search) for stored in DTYPES]
    assume(any(compared))


@pytest.mark.parametrize("search", FINDING)
@pytest.mark.parametrize("stored", DTYPES)
def test_blocks_of_every_size_find_their_scales_again(search: str, stored: str) -> None:
    """Block maxima from the tensor's amax to nothing, log-uniform, some of them just above a power of two."""
    rng = np.random.default_rng(5)
    blocks = rng.standard_normal((1 << 14, 16)) * np.exp2(rng.uniform(-24, 3, (1 << 14, 1)))
    blocks[0, 0] = 100.0
    tied = np.exp2(np.ceil(np.log2(np.abs(blocks)))) * rng.choice([1, 1.25, 1.5, 1.75], blocks.shape)
    factor = 256.0 if stored == "F16" else 1.0  # so that the smallest step is a normal number
    for values in (blocks, np.copysign(tied, blocks)):
        assert found_again((factor * values).astype(np.float32), "F32", stored, search)


@pytest.mark.parametrize("search", FINDING)
def test_the_largest_number_survives(search: str) -> None:
    """The next reader derives the same global scale from it."""
    for seed in range(20):
        values = gaussian((16, 64), "BF16", seed)
        amax = floats.amax(values, "BF16")
        scale = nvfp4.global_scale(amax, search=search)
        there = nvfp4.decode(*nvfp4.encode(values, "BF16", scale, search=search), scale, "BF16")
        assert floats.amax(there, "BF16") == amax


def test_absmax_finds_its_scales_again_above_the_third_e4m3_number() -> None:
    """And not where the second one makes the largest number 4, as ModelOpt's bytes demand."""
    rng = np.random.default_rng(6)
    blocks = (rng.standard_normal((1 << 14, 16)) * np.exp2(rng.uniform(-16, 3, (1 << 14, 1)))).astype(np.float32)
    blocks[0, 0] = 100.0
    scale = nvfp4.global_scale(100.0)
    packed, block_scale = nvfp4.encode(blocks, "F32", scale)
    for stored in ("BF16", "F32"):
        there = nvfp4.decode(packed, block_scale, scale, stored)
        repacked, rescale = nvfp4.encode(there, stored, scale)
        same = (rescale == block_scale).all(1) & (plain(repacked) == plain(packed)).all(1)
        lost = (plain(packed) == 0).all(1)
        assert same[(block_scale[:, 0] > 3) | (block_scale[:, 0] == 1) & ~lost].all()
        assert not same[block_scale[:, 0] == 2].all()


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("other", ["absmax", "four_over_six", "power"])
def test_mse_keeps_what_another_search_has_written(other: str, dtype: str) -> None:
    """Exactly representable blocks are not changed, whoever made them."""
    rng = np.random.default_rng(7)
    values = (rng.standard_normal((512, 64)) * np.exp2(rng.uniform(-6, 0, (512, 1)))).astype(np.float32)
    scale = nvfp4.global_scale(floats.amax(values, "F32"), search=other)
    there = nvfp4.decode(*nvfp4.encode(values, "F32", scale, search=other), scale, dtype)
    again = nvfp4.decode(*nvfp4.encode(there, dtype, scale, search="mse"), scale, dtype)
    # 6 * (s * global) and 4 * (s * 3/2 * global) may differ in the last bit of F32.
    tolerance = 0 if dtype == "BF16" else 2.0**-22
    np.testing.assert_allclose(floats.widen(again, dtype), floats.widen(there, dtype), rtol=tolerance)


def test_of_two_scales_with_one_image_the_smaller_is_written() -> None:
    """1.5 and its double fit 4 and 2 under .375, and 6 and 3 under .25; .3125 has no two thirds."""
    block = np.zeros((1, 16), np.float32)
    block[0, :3] = [1.5, -0.75, 1.5]
    packed, scale = nvfp4.encode(block, "F32", np.float32(1), search="mse")
    assert (scale.tolist(), plain(packed)[0, :3].tolist()) == ([[0x28]], [7, 13, 7])
    block[0, :3] = [1.25, -0.625, 0.3125]
    packed, scale = nvfp4.encode(block, "F32", np.float32(1), search="mse")
    assert (scale.tolist(), plain(packed)[0, :3].tolist()) == ([[0x2A]], [6, 12, 2])


@pytest.mark.parametrize("search", FINDING)
def test_blocks_that_become_zero_have_the_scale_of_zeros(search: str) -> None:
    values = np.zeros((1, 48), np.float32)
    values[0, 0], values[0, 20] = 2688.0, -1e-4
    _, scale = nvfp4.encode(values, "F32", np.float32(1), search=search)
    assert scale.tolist()[0][1:] == [0x38, 0x38]


def test_four_over_six_takes_the_better_of_its_two_scales() -> None:
    """Against measuring both with the decoder's arithmetic in float64."""
    values = gaussian((16, 256), "F32", seed=8)
    amax = floats.amax(values, "F32")
    scale = nvfp4.global_scale(amax, search="four_over_six")
    assert (
        scale
        == np.float32(amax) / np.float32(6 * 256)
        == reference.global_scale(torch.tensor(amax), search="four_over_six").item()
    )
    blocks = np.abs(values.astype(np.float64)).reshape(16, 16, 16)
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float64)
    errors = []
    for divisor in (6, 4):
        wanted = torch.from_numpy((blocks.max(-1) / divisor / scale).astype(np.float32))
        step = wanted.to(torch.float8_e4m3fn).float().numpy().astype(np.float64) * scale
        near = (blocks[..., None] - table * step[..., None, None]) ** 2
        errors.append(near.min(-1).sum(-1))
    there = nvfp4.decode(*nvfp4.encode(values, "F32", scale, search="four_over_six"), scale, "F32")
    found = ((there.astype(np.float64) - values) ** 2).reshape(16, 16, 16).sum(-1)
    np.testing.assert_allclose(found, np.minimum(*errors), rtol=1e-6)


def test_four_over_six_cuts_the_error_by_a_tenth() -> None:
    """And the full search by more, which is why there are both."""
    values = gaussian((256, 1024), "BF16")
    total = {}
    for search in ("absmax", "four_over_six", "mse"):
        scale = nvfp4.global_scale(floats.amax(values, "BF16"), search=search)
        there = nvfp4.decode(*nvfp4.encode(values, "BF16", scale, search=search), scale, "F32")
        total[search] = float(((there.astype(np.float64) - floats.widen(values, "BF16")) ** 2).sum())
    assert total["mse"] < total["four_over_six"] < 0.9 * total["absmax"]


def test_power_scale_is_exact() -> None:
    """Around every power of two and every 6 * 2**k: the least power p with amax <= 6 * 256 * p."""
    for k in range(-126, 128):
        for base in (1.0, 1.5):
            for step in (-1, 0, 1):
                amax = (
                    float(np.float32(base * 2.0**k))
                    if step == 0
                    else float(np.nextafter(np.float32(base * 2.0**k), np.float32(np.inf if step > 0 else 0)))
                )
                scale = float(nvfp4.power_scale(amax))
                assert np.frexp(scale)[0] == 0.5
                assert amax <= 6 * 256 * scale
                assert amax > 3 * 256 * scale or scale == 2.0**-140
                assert reference.global_scale(torch.tensor(amax), search="power").item() == scale
    assert nvfp4.power_scale(0.0) == nvfp4.global_scale(0.0, search="power") == 1


@st.composite
def mxfp4(draw: st.DrawFn) -> tuple[floats.Array, floats.Array]:
    """Any codes, under exponents that span at most 17 binades and stay where BF16 is normal."""
    rows, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    lowest = draw(st.integers(2, 235))
    scales = draw(st.lists(st.integers(lowest, lowest + 17), min_size=rows * groups, max_size=rows * groups))
    size = rows * groups * 16
    packed = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8).reshape(rows, groups * 16)
    if draw(st.booleans()):
        packed = packed & np.uint8(0x99)  # nothing but 0 and .5
    return packed, np.array(scales, np.uint8).reshape(rows, groups)


@given(stored=mxfp4())
@settings(deadline=None, max_examples=300)
def test_mxfp4_becomes_nvfp4_without_loss(stored: tuple[floats.Array, floats.Array]) -> None:
    """Values equal those of ModelOpt's cast, and a second pass finds the same bytes."""
    packed, exponents = stored
    values = mx.decode_mxfp4(packed, exponents, "BF16")
    scale = nvfp4.global_scale(floats.amax(values, "BF16"), search="power")
    codes, block_scale = nvfp4.encode(values, "BF16", scale, search="power")
    assert nvfp4.count_inexact(values, "BF16", codes, block_scale, scale) == 0
    for dtype in ("BF16", "F32"):
        there = nvfp4.decode(codes, block_scale, scale, dtype)
        again, rescale = nvfp4.encode(there, dtype, scale, search="power")
        np.testing.assert_array_equal(rescale, block_scale)
        np.testing.assert_array_equal(plain(again), plain(codes))
    torch_scale = torch.from_numpy(exponents.copy())
    theirs = quantize_mxfp4_to_nvfp4_lossless(
        torch.from_numpy(packed.copy()), torch_scale, mxfp4_kmax(torch_scale), "cpu"
    )
    cast, their_scale, their_global, blocks, lossless = theirs
    assert blocks == lossless
    shape = torch.Size(values.shape)
    float_values = NVFP4QTensor(shape, torch.float32, cast).dequantize(
        torch.float32, scale=their_scale, double_scale=their_global, block_sizes={-1: 16}
    )
    np.testing.assert_array_equal(nvfp4.decode(codes, block_scale, scale, "F32"), float_values.numpy())


@pytest.mark.parametrize("search", ["power", "mse"])
def test_inexact_blocks_are_counted_and_fall_back_on_the_search(search: str) -> None:
    """A block 18 binades below the largest, one that is no MXFP4 at all, and one that is."""
    values = np.zeros((1, 64), np.float32)
    values[0, 0], values[0, 16], values[0, 32:35], values[0, 48] = 6.0, 6.5 * 2.0**-18, [5.0, 0.3, 0.7], 3.0
    scale = nvfp4.power_scale(6.0)
    packed, block_scale = nvfp4.encode(values, "F32", scale, search=search)
    assert nvfp4.count_inexact(values, "F32", packed, block_scale, scale) == 2
    searched = nvfp4.encode(values, "F32", scale, search="mse")
    np.testing.assert_array_equal(block_scale[0, 1:3], searched[1][0, 1:3])
    np.testing.assert_array_equal(packed[0, 8:24], searched[0][0, 8:24])


def test_tensors_that_are_not_mxfp4_lose_no_more_than_with_the_search() -> None:
    values = gaussian((64, 256), "BF16", seed=9)
    scale = nvfp4.power_scale(floats.amax(values, "BF16"))
    power, searched = (nvfp4.encode(values, "BF16", scale, search=s) for s in ("power", "mse"))
    np.testing.assert_array_equal(power[1], searched[1])
    np.testing.assert_array_equal(power[0], searched[0])
    np.testing.assert_array_equal(
        reference.encode(to_torch(values, "BF16"), torch.tensor(scale), search="power")[0], power[0]
    )
