"""A packed weight as a test sees it, and the numbers that go into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mso_hub.checkpoint import Array
from mso_hub.formats.decoders.base import shape_reader
from mso_hub.formats.detect import read_weights
from mso_hub.formats.weight import Weight
from mso_hub.source import MemorySource, read_checkpoint
from tests.helpers import checkpoint_files, random_tensor

NAME = "model.layers.0.mlp.up_proj"
BANK = "model.layers.0.mlp.experts.down_proj"
ROWS, COLUMNS = 200, 256
E8M0, FP8 = torch.float8_e8m0fnu, torch.float8_e4m3fn
Tensors = dict[str, Tensor]
Oracle = Callable[[torch.dtype], Tensor]


@dataclass(frozen=True)
class Case:
    """A packed weight.

    tensors  what is stored, full names
    config   quantization_config
    oracle   dtype -> the dense weight
    shown    name of the decoder
    scheme, layout, bits  what the decoder says of itself
    weight   name of the dense weight
    signed   does the oracle keep the sign of a zero?
    """

    tensors: Tensors
    config: Mapping[str, Any]
    oracle: Oracle
    shown: str
    scheme: str
    layout: str
    bits: int
    weight: str = f"{NAME}.weight"
    signed: bool = True
    dropped: tuple[str, ...] = field(default=())


def named(**tensors: Tensor) -> Tensors:
    """Tensors of the module, by their last name component."""
    return {f"{NAME}.{leaf}": tensor.contiguous() for leaf, tensor in tensors.items()}


def matrix(dtype: torch.dtype = torch.float32, rows: int = ROWS) -> Tensor:
    """Normal numbers with outliers, zeros and a row of zeros."""
    values = random_tensor(rows, COLUMNS, dtype=torch.float32, seed=rows)
    values[3, ::7] *= 50
    values[5] = 0
    values[:, 9] = 0
    return values.to(dtype)


def as_float(tensor: Tensor) -> Tensor:
    """F32, also of E8M0 exponents."""
    return torch.exp2(tensor.view(torch.uint8).float() - 127) if tensor.dtype == E8M0 else tensor.float()


def exponents(*shape: int) -> Tensor:
    """E8M0 exponents around 2**-8, as uint8."""
    return torch.randint(110, 128, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def spread(scale: Tensor, rows: int, columns: int, height: int, width: int) -> Tensor:
    """A matrix of scales, each repeated over its cell."""
    return scale.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]


def opened(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[MemorySource, dict[str, Weight], list[str]]:
    """A checkpoint in memory, its weights by name and the names that are dropped."""
    quantized = {"quantization_config": dict(config)} if config else {}
    source = MemorySource(checkpoint_files({"model.safetensors": dict(tensors)}, {"model_type": "x"} | quantized))
    checkpoint = read_checkpoint(source)
    weights, dropped = read_weights(checkpoint.groups[0].tensors, checkpoint.config, shape_reader(source.read), "BF16")
    return source, {weight.name: weight for weight in weights}, dropped


def decoded(source: MemorySource, weight: Weight, start: int, stop: int, dtype: str) -> Array:
    """Rows of a weight."""
    assert weight.decoder is not None
    return weight.decoder.decode(weight.load(source.read, start, stop), start, stop, dtype)
