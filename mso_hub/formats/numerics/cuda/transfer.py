"""Numbers to a GPU and back."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from mso_hub.formats.numerics.floats import Array

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Device:
    """One CUDA device; with TRITON_INTERPRET=1 Triton's interpreter plays it on the processor.

    turn  held while kernels run: the interpreter has global state
    """

    def __init__(self, number: int) -> None:
        """ValueError where there is no such device."""
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        found = torch.cuda.device_count()
        if not interpreted and number >= found:
            raise ValueError(f"{found} CUDA devices are here")
        self._device = torch.device("cpu" if interpreted else f"cuda:{number}")
        self.turn: AbstractContextManager[object] = threading.Lock() if interpreted else nullcontext()

    def send(self, values: Array, dtype: str) -> Tensor:
        """Numbers held as `floats.storage(dtype)`, any shape, as a tensor of that dtype on the device."""
        bits = values.view(np.int16) if dtype == "BF16" else values
        tensor = torch.from_numpy(bits if bits.flags.writeable else bits.copy())
        return tensor.view(DTYPES[dtype]).to(self._device)


def fetch(tensors: Iterable[Tensor]) -> tuple[Array, ...]:
    """Results of kernels in this machine's memory; FP8 and BF16 come as kernels return them, as their bits."""
    return tuple(tensor.cpu().numpy() for tensor in tensors)
