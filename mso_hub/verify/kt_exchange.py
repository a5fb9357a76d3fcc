"""What kt-kernel gets and gives back: files of a few experts and of tokens, and the answers that are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mso_hub.checkpoint import DTYPE_BITS, Array, TensorInfo, build_header, header_length, parse_header
from mso_hub.formats.decoders.base import widen_scale
from mso_hub.formats.decoders.kt import KtDecoder
from mso_hub.formats.dialects.ktransformers import PROJECTIONS, Place
from mso_hub.formats.weight import NUMPY, Reader, Weight

CHOSEN = 2
"""Experts that a token is sent to."""
TOKENS = (1, 7, 48)
"""Batches: kt-kernel has other kernels for a single token and for many."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in memory: `bits` carries its dtype's bits in one dimension."""

    dtype: str
    shape: tuple[int, ...]
    bits: Array


def expert_tensors(read: Reader, trios: Sequence[Sequence[Weight]], method: str) -> dict[str, Stored]:
    """Stored parts of some experts of a layer, as layer 0 and numbered from 0, under the names that kt-kernel knows.

    trios   gate, up and down of each
    method  kt-kernel's name of how they are stored
    """
    found: dict[str, Stored] = {}
    for number, trio in enumerate(trios):
        for projection, weight in zip(PROJECTIONS, trio, strict=True):
            module = f"model.layers.0.mlp.experts.{number}.{projection}_proj"
            if method == "BF16":
                found[f"{module}.weight"] = Stored("BF16", weight.shape, decoded(read, weight, "BF16").reshape(-1))
                continue
            for info in weight.parts.values():
                leaf = info.name.rpartition(".")[2]
                stored = Stored(info.dtype, info.shape, read(info.file, info.begin, info.end))
                if isinstance(weight.decoder, KtDecoder):
                    part = info.name.rsplit(".", 2)[1]
                    found[f"{Place(0, projection, number).module}.numa.{part}.{leaf}"] = stored
                elif method == "FP8" and leaf != "weight":  # kt-kernel takes no other name and dtype
                    scale = widen_scale(stored.bits.view(NUMPY[info.dtype]), info.dtype)
                    found[f"{module}.weight_scale_inv"] = Stored("F32", info.shape, scale)
                else:
                    found[f"{module}.{leaf}"] = stored
    return found


def decoded(read: Reader, weight: Weight, dtype: str = "F32") -> Array:
    """All rows of a weight in a dtype."""
    from mso_hub.formats.numerics.floats import narrow, widen

    blocks = []
    for start, stop in weight.blocks(8 << 20):
        values, held = weight.values(weight.load(read, start, stop), start, stop)
        blocks.append(narrow(widen(values, held), dtype))
    return np.concatenate(blocks)


def inputs_for(experts: int, hidden: int) -> dict[str, Stored]:
    """Tokens: x.N BF16 [n, hidden], ids.N I64 [n, chosen], shares.N F32 [n, chosen], a batch for each of TOKENS.

    Among the batches every expert is asked.
    """
    from mso_hub.formats.numerics.floats import narrow

    rng = np.random.default_rng(0)
    chosen = min(CHOSEN, experts)
    found: dict[str, Stored] = {}
    for number, count in enumerate(TOKENS):
        x = narrow(rng.standard_normal((count, hidden)).astype(np.float32), "BF16")
        ids = np.stack([(np.arange(chosen) + token) % experts for token in range(count)]).astype(np.int64)
        shares = rng.random((count, chosen)).astype(np.float32) + np.float32(0.1)
        shares /= shares.sum(axis=1, keepdims=True)
        for name, dtype, array in (("x", "BF16", x), ("ids", "I64", ids), ("shares", "F32", shares)):
            found[f"{name}.{number}"] = Stored(dtype, array.shape, array.reshape(-1))
    return found


def reference(
    experts: Sequence[Sequence[Array]], inputs: Mapping[str, Stored], widths: tuple[int, int] | None = None
) -> dict[str, NDArray[np.float32]]:
    """Answers y.N [n, hidden] in F32: the sum over chosen experts of share * down(silu(gate(x)) * up(x)).

    experts  gate [I, H], up [I, H] and down [H, I] of each, F32
    widths   of the stretches of H and of I whose activations are rounded to INT8 together; None: they are not rounded
    """
    from mso_hub.formats.numerics.floats import narrow, widen

    def half(values: Array) -> Array:
        """To BF16, as kt-kernel keeps what is between its products."""
        return widen(narrow(np.ascontiguousarray(values, np.float32), "BF16"), "BF16")

    found = {}
    for number in range(len(TOKENS)):
        x, ids, shares = (_array(inputs[f"{name}.{number}"]) for name in ("x", "ids", "shares"))
        y = np.zeros_like(x)
        x = _rounded(x, widths[0]) if widths else x
        for at, (gate, up, down) in enumerate(experts):
            g = half(x @ gate.T)
            between = half(g / (1 + np.exp(-g)) * half(x @ up.T))
            answer = (_rounded(between, widths[1]) if widths else between) @ down.T
            y += ((ids == at) * shares).sum(axis=1, keepdims=True) * answer
        found[f"y.{number}"] = y
    return found


def _rounded(x: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Numbers [n, K] rounded to INT8 with one scale for a row of a stretch of columns."""
    stretches = x.reshape(len(x), -1, width)
    scale = np.abs(stretches).max(axis=2, keepdims=True) / 127
    codes = np.rint(stretches / np.where(scale > 0, scale, 1))
    return np.asarray(codes * scale, np.float32).reshape(x.shape)


def _array(stored: Stored) -> Array:
    """As numbers numpy knows: BF16 becomes F32."""
    from mso_hub.formats.numerics.floats import widen

    bits = stored.bits.view(NUMPY[stored.dtype])
    return (widen(bits, stored.dtype) if stored.dtype == "BF16" else bits).reshape(stored.shape)


def write_tensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """A safetensors file; the widest dtypes first, so that every tensor is aligned."""
    names = sorted(tensors, key=lambda name: -DTYPE_BITS[tensors[name].dtype])
    infos = [TensorInfo(name, tensors[name].dtype, tensors[name].shape) for name in names]
    header, _ = build_header(infos, path.name, {})
    with path.open("wb") as file:
        file.write(header)
        for name in names:
            file.write(np.ascontiguousarray(tensors[name].bits).view(np.uint8).data)


def read_tensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Tensors of a safetensors file as arrays, BF16 as F32; and what its header says beside them."""
    raw = path.read_bytes()
    length = header_length(raw[:8], path.name, len(raw))
    shard = parse_header(raw[8 : 8 + length], path.name, len(raw))
    found = {
        info.name: _array(Stored(info.dtype, info.shape, np.frombuffer(raw[info.begin : info.end], np.uint8)))
        for info in shard.tensors
    }
    return found, dict(shard.metadata)
