"""The Triton kernels make the bytes of the numba kernels: under Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mso_hub.formats.numerics import floats, nvfp4
from tests.formats.numerics.cuda_worker import Kernels
from tests.formats.numerics.strategies import DTYPES, all_finite, gaussian, matrices

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

EXAMPLES = settings(deadline=None, max_examples=25)

scales = st.one_of(st.floats(2.0**-100, 2.0**100, width=32), st.floats(2.0**-149, 2.0**116, width=32))


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """The functions of the cuda package."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    made = Kernels(request.param)
    yield made
    made.close()


def assert_same(ours: floats.Array, theirs: floats.Array) -> None:
    """Equal bits; a NaN may have any payload."""
    if theirs.dtype.kind == "f" or theirs.dtype == np.uint16:
        tag = {2: "F16", 4: "F32"}[theirs.itemsize] if theirs.dtype.kind == "f" else "BF16"
        a, b = (floats.widen(x.view(floats.storage(tag)), tag) for x in (ours, theirs))
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        ours, theirs = (np.where(np.isnan(x), 0, x).view(np.uint32) for x in (a, b))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data(), scale=scales)
@EXAMPLES
def test_nvfp4_encode(kernels: Kernels, dtype: str, data: st.DataObject, scale: float) -> None:
    values = data.draw(matrices(dtype))
    own = nvfp4.global_scale(floats.amax(values, dtype))
    assert kernels("floats.amax", values) == floats.amax(values, dtype)
    for chosen in (np.float32(scale), own):
        for ours, theirs in zip(kernels("nvfp4.encode", values, chosen), nvfp4.encode(values, dtype, chosen), strict=True):
            assert_same(ours, theirs)
    
def test_all(kernels):
    for dtype in ("BF16","F16"):
        values = all_finite(dtype)
        own = nvfp4.global_scale(floats.amax(values, dtype))
        for ours, theirs in zip(kernels("nvfp4.encode", values, own), nvfp4.encode(values, dtype, own), strict=True):
            assert_same(ours, theirs)

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiplier", [1.0, 0.02 / 2688, 3.3e-5, 2.0**-140, 1.0e35])
def test_nvfp4_decode(kernels, dtype, multiplier) -> None:
    scales = np.arange(256, dtype=np.uint8)
    packed, scale= np.tile(np.arange(256, dtype=np.uint8), (256, 1)), np.repeat(scales[:, None], 32, axis=1)
    assert_same(kernels("nvfp4.decode", packed, scale, multiplier, dtype), nvfp4.decode(packed, scale, np.float32(multiplier), dtype))
    assert_same(kernels("nvfp4.decode_divided", packed, scale, multiplier, dtype), nvfp4.decode_divided(packed, scale, np.float32(multiplier), dtype))

from mso_hub.formats.numerics import integer
@given(
    bits=st.sampled_from(range(2, 9)),
    rows=st.integers(1, 5),
    cols=st.integers(1, 80),
    dense=st.booleans(),
    group_size=st.sampled_from([None, 1,3,8,32,64]),
    zp=st.booleans(),
    gi=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
@settings(EXAMPLES, max_examples=150)
def test_int_decode(kernels, bits,rows,cols,dense,group_size,zp,gi,dtype,seed):
    rng = np.random.default_rng(seed)
    words = integer.words_per_row(cols, bits, dense=dense)
    packed = rng.integers(-2**31, 2**31, (rows, words)).astype(np.int32)
    groups = 1 if group_size is None else -(-cols//group_size)
    scale = rng.standard_normal((rows, groups)).astype(np.float32)
    zero = rng.integers(-128,128,(rows,groups)).astype(np.int8) if zp else None
    idx = rng.integers(0, groups, cols).astype(np.int32) if gi else None
    kw = dict(bits=bits, group_size=group_size, cols=cols, dense=dense, dtype=dtype)
    assert_same(kernels("integer.decode", packed, scale, zero, idx, **kw), integer.decode(packed, scale, zero, idx, **kw))
    w2 = rng.integers(-2**31, 2**31, (integer.words_per_row(rows, bits, dense=dense), groups)).astype(np.int32)
    assert_same(kernels("integer.unpack_zero_point", w2, bits, rows, dense=dense), integer.unpack_zero_point(w2, bits, rows, dense=dense))
