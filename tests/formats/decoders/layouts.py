"""One checkpoint for every layout that is decoded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from tests.formats.decoders.definitions import DEEPSEEK, awq, deepseek, deepseek_experts, gpt_oss, gptq
from tests.formats.decoders.libraries import (
    compressed,
    modelopt_fp8,
    modelopt_fp8_blocks,
    modelopt_fp8_rows,
    modelopt_int4,
    modelopt_int8,
    modelopt_mxfp4,
    modelopt_mxfp8,
    modelopt_nvfp4,
)
from tests.formats.decoders.stored import COLUMNS, E8M0, Case
from tests.helpers import random_tensor

GPTQ: dict[str, Any] = {"quant_method": "gptq", "checkpoint_format": "gptq", "sym": False}
GPTQ_V2: dict[str, Any] = GPTQ | {"checkpoint_format": "gptq_v2"}
AUTO_ROUND: dict[str, Any] = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "sym": False,
    "data_type": "int",
}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
AUTO_AWQ: dict[str, Any] = {**AUTO_ROUND, "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 128}
FLOAT: dict[str, Any] = {"num_bits": 8, "type": "float"}
INT: dict[str, Any] = {"num_bits": 8, "type": "int"}
BLOCK: dict[str, Any] = {"strategy": "block", "block_structure": [128, 128]}
GROUP: dict[str, Any] = {"strategy": "group", "group_size": 32}
MX: dict[str, Any] = {**GROUP, "type": "float", "scale_dtype": "torch.uint8"}

CASES: dict[str, Callable[[], Case]] = {
    "FP8 tensor": compressed("float-quantized", "FP8 per tensor", "fp8", **FLOAT, strategy="tensor"),
    "FP8 channel": compressed("float-quantized", "FP8 per channel", "fp8", **FLOAT, strategy="channel"),
    "FP8 channel F16": compressed(
        "float-quantized", "FP8 per channel", "fp8", torch.float16, **FLOAT, strategy="channel"
    ),
    "FP8 block": compressed("float-quantized", "FP8 128x128 blocks", "fp8", torch.float32, **FLOAT, **BLOCK),
    "FP8 block BF16": compressed("float-quantized", "FP8 128x128 blocks", "fp8", **FLOAT, **BLOCK),
    "FP8 group": compressed("float-quantized", "FP8 groups of 32", "fp8", torch.float32, **FLOAT, **GROUP),
    "FP8 naive": compressed("naive-quantized", "FP8 per channel", "fp8", **FLOAT, strategy="channel"),
    "INT8 tensor": compressed("int-quantized", "INT8 per tensor", "int8", **INT, strategy="tensor"),
    "INT8 channel": compressed("int-quantized", "INT8 per channel", "int8", **INT, strategy="channel"),
    "INT8 group": compressed("int-quantized", "INT8 groups of 32", "int8", torch.float32, **INT, **GROUP),
    "INT8 asymmetric": compressed("int-quantized", "INT8 groups of 32", "int8", **INT, **GROUP, symmetric=False),
    "INT8 naive": compressed("naive-quantized", "INT8 per channel", "int8", **INT, strategy="channel"),
    "INT4 a byte": compressed("int-quantized", "INT4 groups of 32", "int4", num_bits=4, type="int", **GROUP),
    "MXFP8": compressed("mxfp8-quantized", "MXFP8 (compressed-tensors)", "mxfp8", num_bits=8, **MX),
    "MXFP4": compressed("mxfp4-pack-quantized", "MXFP4 (compressed-tensors)", "mxfp4", num_bits=4, **MX),
    "ModelOpt FP8": modelopt_fp8,
    "ModelOpt FP8 rows": modelopt_fp8_rows,
    "ModelOpt FP8 blocks": modelopt_fp8_blocks,
    "ModelOpt MXFP8": modelopt_mxfp8,
    "ModelOpt MXFP4": modelopt_mxfp4,
    "ModelOpt NVFP4": modelopt_nvfp4,
    "ModelOpt NVFP4 smoothed": functools.partial(modelopt_nvfp4, random_tensor(COLUMNS, seed=6).abs() + 0.5),
    "ModelOpt INT8": modelopt_int8,
    "ModelOpt INT8 smoothed": functools.partial(modelopt_int8, random_tensor(COLUMNS, seed=5).abs() + 0.5),
    "ModelOpt INT4": modelopt_int4,
    "DeepSeek F32": deepseek("weight_scale_inv", torch.float32, DEEPSEEK),
    "DeepSeek BF16": deepseek("weight_scale_inv", torch.bfloat16, DEEPSEEK),
    "DeepSeek E8M0": deepseek("weight_scale_inv", E8M0, DEEPSEEK | {"scale_fmt": "ue8m0"}),
    "DeepSeek-V4": deepseek("scale", E8M0, DEEPSEEK | {"scale_fmt": "ue8m0"}),
    "DeepSeek-V4 experts": deepseek_experts(torch.int8),
    "DeepSeek-V4 experts U8": deepseek_experts(torch.uint8),
    "gpt-oss": gpt_oss,
    "AWQ": awq(AWQ),
    "AWQ by AutoRound": awq(AUTO_AWQ),
    "GPTQ 2": gptq(2, 1, GPTQ),
    "GPTQ 3": gptq(3, 1, GPTQ),
    "GPTQ 4": gptq(4, 1, GPTQ),
    "GPTQ 8": gptq(8, 1, GPTQ),
    "GPTQ v2": gptq(4, 2, GPTQ_V2),
    "GPTQ act order": gptq(4, 1, GPTQ | {"desc_act": True}, act_order=True),
    "GPTQ by AutoRound": gptq(4, 1, AUTO_ROUND),
}


@functools.cache
def case(name: str) -> Case:
    """A case, made once."""
    return CASES[name]()
