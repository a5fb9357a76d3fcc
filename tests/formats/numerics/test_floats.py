"""Bits of floating-point numbers against torch, which has them all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mso_hub.formats.numerics import floats
from tests.formats.numerics.strategies import (
    DTYPES,
    EXPONENT,
    TORCH,
    all_patterns,
    bits_type,
    gaussian,
    matrices,
    to_bits,
    to_torch,
)


def same_numbers(ours: floats.Array, theirs: torch.Tensor) -> bool:
    """Equal bits, and NaN in the same places: which NaN it is nobody promises."""
    kind = theirs.dtype
    mine = torch.from_numpy(np.array(ours).view(f"i{ours.itemsize}")).view(kind)
    nan = theirs.isnan()
    return torch.equal(mine.isnan(), nan) and bool((to_bits(mine)[~nan.numpy()] == to_bits(theirs)[~nan.numpy()]).all())


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_widen_is_exact_for_every_pattern(dtype: str) -> None:
    """All 65536 patterns, NaN and -0.0 included, become what torch makes of them."""
    patterns = all_patterns(dtype)
    assert same_numbers(floats.widen(patterns, dtype), to_torch(patterns, dtype).float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_rounds_like_torch(dtype: str) -> None:
    """Every upper half with the lower halves around a tie: below, on and above, for BF16 and F16."""
    high = np.arange(1 << 16, dtype=np.uint32)[:, None] << np.uint32(16)
    low = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = (high | low).view(np.float32)
    assert same_numbers(floats.narrow(values, dtype), to_torch(values, "F32").to(TORCH[dtype]))


def test_e4m3_table_is_torchs() -> None:
    """The value of each of the 256 codes."""
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert same_numbers(floats.E4M3, theirs)
    assert [float(floats.E4M3[c]) for c in (0, 1, 0x38, 0x7E, 0xFE)] == [0, 2**-9, 1, 448, -448]


def test_e4m3_rounds_to_nearest_even_and_saturates() -> None:
    """Every BF16 number, every tie between two codes and both neighbours of the tie."""
    codes = floats.E4M3[:127].astype(np.float64)
    ties = ((codes[:-1] + codes[1:]) / 2).astype(np.float32)
    around = np.concatenate([ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(np.inf))])
    bf16 = floats.widen(all_patterns("BF16"), "BF16")
    values = np.concatenate([around, -around, bf16[~np.isnan(bf16)]])
    ours = np.array([floats.e4m3_from_f32(v) for v in values], np.uint8)
    theirs = torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(ours, to_bits(theirs))
    assert floats.e4m3_from_f32(np.float32(np.nan)) == 0x7F


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_amax_is_the_largest_stored_magnitude(dtype: str, data: st.DataObject) -> None:
    """Exact, for any finite bits; an empty tensor has 0.0."""
    values = data.draw(matrices(dtype))
    assert floats.amax(values, dtype) == float(to_torch(values, dtype).abs().max())
    assert floats.amax(values[:0], dtype) == 0.0
    assert floats.first_nonfinite(values, dtype) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["inf", "-inf", "nan", "-nan"])
@pytest.mark.parametrize("where", [0, 131_071, 131_072, 200_000, 262_143])
def test_one_bad_element_is_seen_and_found(dtype: str, kind: str, where: int) -> None:
    """A single NaN or Inf of either sign, also at the edges of the scanned chunks."""
    values = gaussian((512, 512), dtype)
    pattern = EXPONENT[dtype] | ("nan" in kind) | (kind.startswith("-") << 8 * values.itemsize - 1)
    values.reshape(-1).view(bits_type(dtype))[where] = pattern
    assert not np.isfinite(floats.amax(values, dtype))
    assert floats.first_nonfinite(values, dtype) == where


def test_amax_reads_memory_that_may_not_be_written() -> None:
    """Weights come from read-only maps."""
    values = np.frombuffer(np.array([1.5, -2.5], np.float32).tobytes(), np.float32)
    assert floats.amax(values, "F32") == 2.5


@pytest.mark.parametrize(
    ("values", "dtype", "message"),
    [
        (np.zeros((4, 4), np.float32), "BF16", "must be a C-contiguous uint16"),
        (np.zeros((4, 4), np.float32).T[1:], "F32", "must be a C-contiguous float32"),
        (np.zeros((4, 4), np.float32), "F8_E4M3", "known: BF16, F16, F32"),
    ],
)
def test_values_that_do_not_match_their_dtype_are_refused(values: floats.Array, dtype: str, message: str) -> None:
    """Bits read under the wrong dtype would be silently wrong numbers."""
    with pytest.raises(ValueError, match=message):
        floats.amax(values, dtype)


def test_kernels_start_without_torch() -> None:
    """Only `reference` may cost the import of torch."""
    modules = "floats, integer, nvfp4"
    code = f"import sys; from mso_hub.formats.numerics import {modules}; sys.exit('torch' in sys.modules)"
    root = Path(floats.__file__).parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(root)})
