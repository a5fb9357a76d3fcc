"""Whatever the headers say: an error of ours, or a decoder that runs. Never a crash, never a read past an array."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mso_hub.errors import MsoError
from tests.formats.decoders.layouts import CASES, case
from tests.formats.decoders.stored import E8M0, FP8, decoded, opened

DTYPES = (torch.uint8, torch.int8, torch.int32, torch.int64, torch.bfloat16, torch.float16, torch.float32, FP8, E8M0)


@st.composite
def changed(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """Another shape, dtype or content; sizes near the right ones find the gaps between checks."""
    shape = list(tensor.shape)
    if draw(st.booleans()) or not shape:
        at = draw(st.integers(0, len(shape)))
        shape[at:] = draw(st.lists(st.sampled_from([0, 1, 2, 8, 32, 192, 200, 256]), max_size=3))
    else:
        at = draw(st.integers(0, len(shape) - 1))
        shape[at] = max(0, draw(st.sampled_from([shape[at] - 1, shape[at] + 1, 2 * shape[at], shape[at] // 2])))
    dtype = draw(st.sampled_from([tensor.dtype, *DTYPES]))
    size = torch.Size(shape).numel() * dtype.itemsize
    assume(size < 1 << 20)
    data = torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return data.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_header_is_decoded_or_refused(data: st.DataObject) -> None:
    """One tensor of a good weight is exchanged, with the config or without it."""
    made = case(data.draw(st.sampled_from(list(CASES))))
    name = data.draw(st.sampled_from(list(made.tensors)))
    tensors = {**made.tensors, name: data.draw(changed(made.tensors[name]))}
    config = made.config if data.draw(st.booleans()) else {}
    try:
        source, weights, _ = opened(tensors, config)
        for weight in weights.values():
            if weight.decoder is not None:
                values = decoded(source, weight, 0, weight.shape[0], "BF16")
                assert values.shape == weight.shape
    except MsoError:
        pass
