"""The bits that FP8 kernels work on, vector by vector, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mso_hub.formats.numerics import floats
from tests.formats.numerics.strategies import TORCH, all_patterns, finite, to_bits, to_torch


def random_f32() -> floats.Array:
    """Float32 numbers of every exponent, ties of BF16 and F16 among them, then numbers around the range of F16."""
    rng = np.random.default_rng(5)
    raw = finite(rng.integers(0, 1 << 32, 20_000, np.uint32), "F32")
    short = (raw.view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)
    small = (rng.integers(-(1 << 26), 1 << 26, 20_000) * 2.0**-41).astype(np.float32)
    edge = np.array(
        [0, -0.0, 65504, 65519.996, 65520, 65536, -65520, 2.0**-14, 2.0**-25, 3 * 2.0**-25, 3e38], np.float32
    )
    return np.concatenate([raw, short, small, (small * 2.0**32).astype(np.float32), edge])


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_rounding_one_or_many_is_torchs(dtype: str) -> None:
    values = random_f32()
    theirs = to_bits(torch.from_numpy(values).to(TORCH[dtype]).float())
    one = np.array([floats.round_f32(v, floats.PRECISION[dtype]) for v in values], np.float32)
    np.testing.assert_array_equal(one.view(np.uint32), theirs)
    many = values.view(np.uint32).copy()
    floats.round_all(many, floats.PRECISION[dtype])
    np.testing.assert_array_equal(many, theirs)
    assert np.isnan(floats.round_f32(np.float32(np.nan), floats.PRECISION[dtype]))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("steps", [-1, 0, 1])
def test_the_next_number_has_the_next_bits(dtype: str, steps: int) -> None:
    """All positive numbers of the 16-bit dtypes, subnormal ones and the step down from infinity included."""
    largest = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}[dtype]
    bits = np.unique(np.linspace(2, largest - 2, 40_000, dtype=np.int64))
    wide = torch.from_numpy(bits).to(torch.int32 if dtype == "F32" else torch.int16)
    theirs = (wide + steps).view(TORCH[dtype]).float().numpy()
    values = wide.view(TORCH[dtype]).float().numpy()
    ours = np.array([floats.next_f32(v, floats.PRECISION[dtype], steps) for v in values], np.float32)
    np.testing.assert_array_equal(ours, theirs)
    finite_max = torch.finfo(TORCH[dtype]).max
    assert floats.next_f32(np.float32(np.inf), floats.PRECISION[dtype], -1) == np.float32(finite_max)
    assert floats.next_f32(np.float32(finite_max), floats.PRECISION[dtype], 1) in {np.inf, np.float32(65536)}
    assert not floats.next_f32(np.float32(0), floats.PRECISION[dtype], -1) > 0


def test_every_finite_f16_and_every_e4m3_code_is_widened() -> None:
    patterns = all_patterns("F16")
    patterns = patterns[np.isfinite(patterns)]
    x = np.empty(patterns.size, np.uint32)
    floats.load_f16(patterns.view(np.uint16), x)
    np.testing.assert_array_equal(x, to_bits(to_torch(patterns, "F16").float()))
    codes = np.arange(256, dtype=np.uint8)
    x = np.empty(256, np.uint32)
    floats.load_e4m3(codes, x)
    theirs = torch.from_numpy(codes).view(torch.float8_e4m3fn).float()
    nan = theirs.isnan().numpy()
    np.testing.assert_array_equal(x[~nan], to_bits(theirs)[~nan])
    assert np.isnan(x.view(np.float32)[nan]).all()


@given(step=st.floats(2.0**-140, 2.0**116, width=32), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_codes_of_quotients_are_torchs(step: float, seed: int) -> None:
    """Random bits, numbers around the step, and the ties between two codes with their neighbours."""
    rng = np.random.default_rng(seed)
    values = floats.E4M3[:127]
    ties = ((values[1:] + values[:-1]) / 2 * np.float32(step)).astype(np.float32)
    near = (rng.standard_normal(2000) * step * 100).astype(np.float32)
    raw = finite(rng.integers(0, 1 << 32, 2000, np.uint32), "F32")
    x = np.concatenate([raw, near, ties, -ties, np.nextafter(ties, np.float32(0)), np.array([0, -0.0], np.float32)])
    x = finite(x.view(np.uint32), "F32")
    codes = np.empty(x.size, np.uint8)
    floats.e4m3_codes(x.view(np.uint32), np.float32(step), codes)
    quotient = torch.from_numpy(x) / torch.tensor(step, dtype=torch.float32)
    np.testing.assert_array_equal(codes, to_bits(quotient.clamp(-448, 448).to(torch.float8_e4m3fn)))


def test_e8m0_is_torchs() -> None:
    """The value of each of the 256 codes; 0 is a subnormal float32, 255 is NaN."""
    codes = np.arange(256, dtype=np.uint8).reshape(4, 64)
    theirs = torch.from_numpy(codes).view(torch.float8_e8m0fnu).float().numpy()
    np.testing.assert_array_equal(floats.e8m0_to_f32(codes), theirs)
    assert [float(floats.E8M0[c]) for c in (0, 1, 127, 254)] == [2.0**-127, 2.0**-126, 1, 2.0**127]
    assert np.isnan(floats.E8M0[255])
