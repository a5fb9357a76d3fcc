"""Layouts that no library here writes: their definitions in torch. gpt-oss and AWQ are read by a library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.formats.decoders.stored import (
    BANK,
    COLUMNS,
    E8M0,
    FP8,
    ROWS,
    Case,
    as_float,
    exponents,
    matrix,
    named,
    spread,
)
from tests.helpers import random_tensor

# DeepSeek


def deepseek(leaf: str, dtype: torch.dtype, config: Mapping[str, Any]) -> Callable[[], Case]:
    """FP8 in blocks of 128 x 128, the scale a multiplier of any dtype."""

    def make() -> Case:
        grid = (-(-ROWS // 128), -(-COLUMNS // 128))
        scale = exponents(*grid).view(E8M0) if dtype == E8M0 else random_tensor(*grid, dtype=dtype).abs()
        codes = (matrix() * 1000).clamp(-448, 448).to(FP8)
        wide = spread(as_float(scale), ROWS, COLUMNS, 128, 128)
        return Case(
            named(weight=codes) | named(**{leaf: scale}), config, (codes.float() * wide).to,
            "FP8 128x128 blocks", "fp8", "deepseek", 8,
        )  # fmt: skip

    return make


DEEPSEEK: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])


def e2m1(packed: Tensor) -> Tensor:
    """Two codes a byte, low nibble first; bit 3 is the sign."""
    codes = torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2).long()
    return E2M1[codes & 7] * torch.where(codes >= 8, -1.0, 1.0)


def random_bytes(*shape: int) -> Tensor:
    """Every byte may come."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


def deepseek_experts(dtype: torch.dtype) -> Callable[[], Case]:
    """DeepSeek-V4: `weight` I8 or U8 [N, K/2], `scale` F8_E8M0 [N, K/32]."""

    def make() -> Case:
        packed, scale = random_bytes(ROWS, COLUMNS // 2), exponents(ROWS, COLUMNS // 32)
        dense = e2m1(packed) * as_float(scale.view(E8M0)).repeat_interleave(32, 1)
        return Case(
            named(weight=packed.view(dtype), scale=scale.view(E8M0)), DEEPSEEK | {"scale_fmt": "ue8m0"},
            dense.to, "MXFP4 (DeepSeek)", "mxfp4", "deepseek", 4,
        )  # fmt: skip

    return make


def gpt_oss() -> Case:
    """`NAME_blocks` and `NAME_scales`; transformers' dense weight is [E, K, N]."""
    blocks, scales = random_bytes(3, ROWS, 2, 16), exponents(3, ROWS, 2)
    return Case(
        {f"{BANK}_blocks": blocks, f"{BANK}_scales": scales}, {"quant_method": "mxfp4"},
        lambda dtype: convert_moe_packed_tensors(blocks, scales, dtype=dtype),
        "gpt-oss MXFP4", "mxfp4", "gpt-oss", 4, weight=BANK,
    )  # fmt: skip


# AWQ and GPTQ


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes along dimension 0, little end first, into I32 words; codes of 3 bits may straddle two words."""
    stream = ((codes[:, None] >> torch.arange(bits)[None, :, None]) & 1).reshape(-1, 32, codes.shape[1])
    words = (stream.long() << torch.arange(32)[None, :, None]).sum(1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def codes_of(bits: int, rows: int, columns: int, seed: int = 0) -> Tensor:
    """Random codes of the whole range."""
    return torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed))


def awq(config: Mapping[str, Any]) -> Callable[[], Case]:
    """AutoAWQ's GEMM layout; compressed-tensors' converter and unpacker read it."""

    def make() -> Case:
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # which column each nibble holds
        mixed = (torch.arange(ROWS).reshape(-1, 8)[:, order]).reshape(-1)
        codes, zeros = codes_of(4, COLUMNS, ROWS), codes_of(4, COLUMNS // 128, ROWS, 1)
        qweight, qzeros = (pack(part[:, mixed].T, 4).T.contiguous() for part in (codes, zeros))
        scales = random_tensor(COLUMNS // 128, ROWS, dtype=torch.float16).abs()
        quantized, wide, zero = AutoAWQConverter()._convert_gemm_module(qweight, scales, qzeros)

        def oracle(dtype: torch.dtype) -> Tensor:
            scale, offset = (t.float().repeat_interleave(128, 1) for t in (wide, zero))
            return ((quantized - offset) * scale).to(dtype)

        return Case(named(qweight=qweight, qzeros=qzeros, scales=scales), config, oracle, "AWQ INT4", "int4", "awq", 4)

    return make


def gptq(bits: int, version: int, config: Mapping[str, Any], *, act_order: bool = False) -> Callable[[], Case]:
    """GPTQ: packed along K, zero points along N; v1 stores them minus one."""

    def make() -> Case:
        rows, group = 192, 64  # 3-bit zero points fill whole words at multiples of 32
        groups = COLUMNS // group
        codes, zeros = codes_of(bits, COLUMNS, rows), codes_of(bits, groups, rows, 1).clamp(min=1)
        scales = random_tensor(groups, rows, dtype=torch.float16).abs()
        g_idx = torch.arange(COLUMNS) // group
        if act_order:
            g_idx = g_idx[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(3))]
        tensors = named(
            qweight=pack(codes, bits), qzeros=pack((zeros - (2 - version)).T, bits).T, scales=scales, g_idx=g_idx.int()
        )
        dense = ((codes - zeros[g_idx]).float() * scales.float()[g_idx]).T
        shown = f"GPTQ INT{bits} v{version}"
        return Case(
            tensors, {"bits": bits, "group_size": group} | dict(config), dense.to, shown, f"int{bits}", "gptq", bits
        )

    return make
