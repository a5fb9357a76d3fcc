"""Integer codes against compressed-tensors: equal bytes for F32 weights, and a list of where ours differ and why."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from mso_hub.formats.numerics import floats, integer, integer_encode
from tests.formats.numerics.strategies import DTYPES, TORCH, bits_type, gaussian, matrices, to_bits, to_torch

Encoded = tuple[floats.Array, floats.Array, floats.Array | None]
GROUPS = [32, 128, None]


def scheme(bits: int, group_size: int | None, symmetric: bool) -> QuantizationScheme:
    """compressed-tensors' description of the weights."""
    strategy = "group" if group_size else "channel"
    args = QuantizationArgs(num_bits=bits, group_size=group_size, symmetric=symmetric, strategy=strategy)
    return QuantizationScheme(targets=["Linear"], weights=args)


def quantized(values: floats.Array, dtype: str, bits: int, group_size: int | None, symmetric: bool) -> dict[str, torch.Tensor]:
    """What compressed-tensors makes of the weights on a CPU, before packing."""
    weight, described = to_torch(values, dtype), scheme(bits, group_size, symmetric)
    groups = weight.unflatten(-1, (-1, group_size or weight.shape[1]))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), described.weights)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    return IntQuantizationCompressor.compress(state, described) | {"weight_zero_point": zero, "float": weight}


def theirs(values: floats.Array, dtype: str, bits: int, group_size: int | None, symmetric: bool) -> Encoded:
    """Codes, scales and zero points of compressed-tensors."""
    state = quantized(values, dtype, bits, group_size, symmetric)
    zero = None if symmetric else state["weight_zero_point"].numpy()
    return state["weight"].numpy(), state["weight_scale"].float().numpy(), zero


def ours(
    values: floats.Array, dtype: str, bits: int, group_size: int | None, symmetric: bool, search: str = "absmax"
) -> Encoded:
    """Codes, scales and zero points of ours, the scales in the dtype of the weights."""
    return integer_encode.encode(
        values, dtype, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=dtype, search=search
    )


def error(values: floats.Array, dtype: str, group_size: int | None, encoded: Encoded) -> float:
    """Sum of squared errors over the sum of squares, as decoded to the dtype of the weights."""
    far = floats.widen(values, dtype).astype(np.float64)
    decoded = integer.decode_int8(*encoded, group_size=group_size, dtype=dtype)
    near = floats.widen(decoded, dtype).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return float(((far - near) ** 2).sum() / max((far**2).sum(), 2.0**-1000))


def assert_equal(mine: Encoded, other: Encoded) -> None:
    """The same bytes."""
    for a, b in zip(mine, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("unit", [1.0, 1e-30, 1e30])
def test_f32_weights_get_their_bytes(bits: int, group_size: int | None, symmetric: bool, unit: float) -> None:
    values = gaussian((24, 256), "F32") * np.float32(unit)
    mine = ours(values, "F32", bits, group_size, symmetric)
    assert_equal(mine, theirs(values, "F32", bits, group_size, symmetric))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_tensors_are_theirs(bits: int, group_size: int | None, symmetric: bool) -> None:
    """weight_packed and weight_zero_point, also when the rows come in blocks of 32."""
    values = gaussian((72, 256), "F32")
    state = quantized(values, "F32", bits, group_size, symmetric)
    state["weight"] = state.pop("float")
    packed = PackedQuantizationCompressor.compress(state, scheme(bits, group_size, symmetric))
    codes, _, zero = ours(values, "F32", bits, group_size, symmetric)
    np.testing.assert_array_equal(integer_encode.pack(codes, bits), packed["weight_packed"].numpy())
    if zero is not None:
        blocks = [integer_encode.pack_zero_point(zero[start : start + 32], bits) for start in range(0, 72, 32)]
        np.testing.assert_array_equal(np.concatenate(blocks), packed["weight_zero_point"].numpy())


@given(data=st.data(), bits=st.sampled_from([4, 8]), symmetric=st.booleans())
@settings(deadline=None, max_examples=150)
def test_any_f32_group_equals_theirs_or_is_better(data: st.DataObject, bits: int, symmetric: bool) -> None:
    """Other bytes only where ours gives the group itself, or the decoded numbers of theirs."""
    values = data.draw(matrices("F32"))
    usual = (np.abs(values).max(-1) > 1e-35) & (np.abs(values).max(-1) < 1e37)
    values = np.ascontiguousarray(values[usual])
    if not values.size:
        return
    mine, other = ours(values, "F32", bits, None, symmetric), theirs(values, "F32", bits, None, symmetric)
    decoded = integer.decode_int8(*mine, group_size=None, dtype="F32")
    their_decoded = integer.decode_int8(*other, group_size=None, dtype="F32")
    for row in range(len(values)):
        same = all(a is None or b is None or (a[row] == b[row]).all() for a, b in zip(mine, other, strict=True))
        assert same or (decoded[row] == values[row]).all() or (decoded[row] == their_decoded[row]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_groups_are_theirs(dtype: str, symmetric: bool) -> None:
    values = np.zeros((2, 64), floats.storage(dtype))
    assert_equal(ours(values, dtype, 4, 32, symmetric), theirs(values, dtype, 4, 32, symmetric))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("group_size", GROUPS)
def test_symmetric_scales_of_16_bit_weights_are_theirs(dtype: str, group_size: int | None) -> None:
    """amax / 7.5 is rounded once in either arithmetic; only the codes differ, see the table."""
    values = gaussian((24, 256), dtype)
    mine, other = ours(values, dtype, 4, group_size, True), theirs(values, dtype, 4, group_size, True)
    differ = mine[1] != other[1]
    decoded = integer.decode_int8(*mine, group_size=group_size, dtype="F32").reshape(*differ.shape, -1)
    assert differ.mean() < 0.01, decoded[differ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_decode_of_single_bytes_is_theirs(dtype: str, group_size: int | None, symmetric: bool) -> None:
    values = gaussian((24, 256), dtype)
    codes, scale, zero = ours(values, dtype, 8, group_size, symmetric)
    state = {"weight": torch.from_numpy(codes), "weight_scale": torch.from_numpy(scale).to(TORCH[dtype])}
    if zero is not None:
        state["weight_zero_point"] = torch.from_numpy(zero)
    decoded = IntQuantizationCompressor.decompress(state, scheme(8, group_size, symmetric))["weight"]
    mine = integer.decode_int8(codes, scale, zero, group_size=group_size, dtype=dtype)
    np.testing.assert_array_equal(mine.view(bits_type(dtype)), to_bits(decoded))
