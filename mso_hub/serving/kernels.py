"""Which kernel vLLM takes for a format on a compute capability, and whether it multiplies in that format.

Source: vLLM 0.32.0 and 0.33.0, which agree in every row; paths are relative to vllm/model_executor. A test runs
vLLM's own selection for each row. Capabilities between the ranges (8.7, 11.0, ...) were not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

NATIVE = "native"
"""Tensor cores multiply as the checkpoint asks."""
WEIGHT_ONLY = "weight-only"
"""The kernel decodes weights to 16 bits and activations stay there: memory is saved, arithmetic is not."""
NARROWER = "narrower"
"""Activations are rounded to the width of the weights, which the checkpoint does not ask for."""
REFUSED = "refused"
LINEAR = "kernels/linear"
MOE = "layers/fused_moe"
CT = "layers/quantization/compressed_tensors"
MODELOPT = "layers/quantization/modelopt.py"


@dataclass(frozen=True, slots=True)
class Kernel:
    """What vLLM does on a range of capabilities.

    first, last  capability times ten, both included
    how          NATIVE, WEIGHT_ONLY, NARROWER or REFUSED
    name         of the kernel, or why there is none
    source       file
    chosen       class that vLLM's selection returns there, or its backend for experts; the first is the usual one
    """

    first: int
    last: int
    how: str
    name: str
    source: str
    chosen: tuple[str, ...] = ()


def _rows(*rows: tuple[int, int, str, str, str, str]) -> tuple[Kernel, ...]:
    return tuple(Kernel(*row[:5], tuple(row[5].split())) for row in rows)


_NO_INT8 = "CUTLASS has no INT8 kernel for Blackwell, vLLM fails in the first step; use FP8 or W8A16"
_INT8_SOURCE = "csrc/libtorch_stable/quantization/w8a8/cutlass/c3x/scaled_mm_helper.hpp"
_HOPPER_ONLY = "4-bit integers with FP8 activations run on sm90 alone; use W4A16"
_FP8_A16 = "HummingFP8ScaledMMLinearKernel MarlinFP8ScaledMMLinearKernel"
DENSE: dict[str, tuple[Kernel, ...]] = {
    "nvfp4": _rows(
        (75, 89, WEIGHT_ONLY, "Marlin", f"{LINEAR}/nvfp4/marlin.py", "MarlinNvFp4LinearKernel"),
        (90, 90, WEIGHT_ONLY, "Humming", f"{LINEAR}/nvfp4/humming.py", "HummingNvFp4LinearKernel"),
        (100, 103, NATIVE, "FlashInfer CuTe", f"{LINEAR}/nvfp4/flashinfer.py", "FlashInferCuteDslNvFp4LinearKernel"),
        (120, 121, NATIVE, "FlashInfer CUTLASS", f"{LINEAR}/nvfp4/flashinfer.py", "FlashInferCutlassNvFp4LinearKernel"),
    ),
    "nvfp4a16": _rows(
        (75, 89, NATIVE, "Marlin", f"{LINEAR}/nvfp4/marlin.py", "MarlinNvFp4LinearKernel"),
        (90, 90, NATIVE, "Humming", f"{LINEAR}/nvfp4/humming.py", "HummingNvFp4LinearKernel"),
        (100, 103, NATIVE, "FlashInfer CuTe W4A16", f"{LINEAR}/nvfp4/flashinfer.py",
         "FlashInferCuteDslNvFp4W4A16LinearKernel"),
        (120, 121, NATIVE, "Marlin", f"{LINEAR}/nvfp4/marlin.py", "MarlinNvFp4LinearKernel"),
    ),
    "mxfp4": _rows(
        (80, 89, WEIGHT_ONLY, "Marlin", f"{LINEAR}/mxfp4/marlin.py", "MarlinMxFp4LinearKernel"),
        (90, 90, WEIGHT_ONLY, "Humming", f"{LINEAR}/mxfp4/humming.py", "HummingMxFp4LinearKernel"),
        (100, 103, NATIVE, "FlashInfer", f"{LINEAR}/mxfp4/flashinfer.py", "FlashInferMxFp4LinearKernel"),
        (120, 121, NATIVE, "FlashInfer", f"{LINEAR}/mxfp4/flashinfer.py", "FlashInferMxFp4LinearKernel"),
    ),
    "mxfp8": _rows(
        (75, 89, WEIGHT_ONLY, "Marlin", f"{LINEAR}/mxfp8/marlin.py", "MarlinMxfp8LinearKernel"),
        (90, 90, WEIGHT_ONLY, "Humming", f"{LINEAR}/mxfp8/humming.py", "HummingMxfp8LinearKernel"),
        (100, 103, NATIVE, "FlashInfer CuTe", f"{LINEAR}/mxfp8/flashinfer.py", "FlashInferCutedslMxfp8LinearKernel"),
        (120, 121, NATIVE, "FlashInfer CUTLASS", f"{LINEAR}/mxfp8/flashinfer.py", "FlashInferCutlassMxfp8LinearKernel"),
    ),
    "fp8": _rows(
        (75, 86, WEIGHT_ONLY, "Marlin or Humming", f"{LINEAR}/scaled_mm/marlin.py",
         "MarlinFP8ScaledMMLinearKernel HummingFP8ScaledMMLinearKernel"),
        (89, 90, NATIVE, "CUTLASS", f"{LINEAR}/scaled_mm/cutlass.py", "CutlassFP8ScaledMMLinearKernel"),
        (100, 103, NATIVE, "FlashInfer", f"{LINEAR}/scaled_mm/flashinfer.py", "FlashInferFP8ScaledMMLinearKernel"),
        (120, 121, NATIVE, "FlashInfer", f"{LINEAR}/scaled_mm/flashinfer.py", "FlashInferFP8ScaledMMLinearKernel"),
    ),
    "fp8_dynamic": _rows(
        (75, 86, WEIGHT_ONLY, "Marlin or Humming", f"{LINEAR}/scaled_mm/marlin.py",
         "MarlinFP8ScaledMMLinearKernel HummingFP8ScaledMMLinearKernel"),
        (89, 90, NATIVE, "CUTLASS", f"{LINEAR}/scaled_mm/cutlass.py", "CutlassFP8ScaledMMLinearKernel"),
        (100, 103, NATIVE, "CUTLASS", f"{LINEAR}/scaled_mm/cutlass.py", "CutlassFP8ScaledMMLinearKernel"),
        (120, 121, NATIVE, "CUTLASS", f"{LINEAR}/scaled_mm/cutlass.py", "CutlassFP8ScaledMMLinearKernel"),
    ),
    "fp8_block": _rows(
        (75, 89, WEIGHT_ONLY, "Marlin or Humming", f"{LINEAR}/scaled_mm/marlin.py",
         "MarlinFP8ScaledMMLinearKernel HummingFP8ScaledMMLinearKernel"),
        (90, 90, NATIVE, "FlashInfer or DeepGEMM", f"{LINEAR}/scaled_mm/flashinfer.py",
         "FlashInferFp8DeepGEMMDynamicBlockScaledKernel"),
        (100, 103, NATIVE, "FlashInfer or DeepGEMM", f"{LINEAR}/scaled_mm/flashinfer.py",
         "FlashInferFp8DeepGEMMDynamicBlockScaledKernel"),
        (120, 121, NATIVE, "FlashInfer or DeepGEMM", f"{LINEAR}/scaled_mm/flashinfer.py",
         "FlashInferFp8DeepGEMMDynamicBlockScaledKernel"),
    ),
    "fp8a16": _rows(
        (75, 90, NATIVE, "Humming or Marlin", f"{LINEAR}/scaled_mm/humming.py", _FP8_A16),
        (100, 103, NATIVE, "Humming or Marlin", f"{LINEAR}/scaled_mm/humming.py", _FP8_A16),
        (120, 121, NATIVE, "Humming or Marlin", f"{LINEAR}/scaled_mm/humming.py", _FP8_A16),
    ),
    "w4a16": _rows(
        (75, 89, NATIVE, "Marlin", f"{LINEAR}/mixed_precision/marlin.py", "MarlinLinearKernel"),
        (90, 90, NATIVE, "Machete; Humming for groups of 32", f"{LINEAR}/mixed_precision/machete.py",
         "MacheteLinearKernel HummingLinearKernel"),
        (100, 103, NATIVE, "Marlin", f"{LINEAR}/mixed_precision/marlin.py", "MarlinLinearKernel"),
        (120, 121, NATIVE, "Marlin", f"{LINEAR}/mixed_precision/marlin.py", "MarlinLinearKernel"),
    ),
    "w8a16": _rows(
        (75, 89, NATIVE, "Marlin; Humming with zero points", f"{LINEAR}/mixed_precision/marlin.py",
         "MarlinLinearKernel HummingLinearKernel"),
        (90, 90, NATIVE, "Machete; Humming for groups of 32", f"{LINEAR}/mixed_precision/machete.py",
         "MacheteLinearKernel HummingLinearKernel"),
        (100, 103, NATIVE, "Marlin; Humming with zero points", f"{LINEAR}/mixed_precision/marlin.py",
         "MarlinLinearKernel HummingLinearKernel"),
        (120, 121, NATIVE, "Marlin; Humming with zero points", f"{LINEAR}/mixed_precision/marlin.py",
         "MarlinLinearKernel HummingLinearKernel"),
    ),
    "int8": _rows(
        (75, 90, NATIVE, "CUTLASS", f"{LINEAR}/scaled_mm/cutlass.py", "CutlassInt8ScaledMMLinearKernel"),
        (100, 121, REFUSED, _NO_INT8, _INT8_SOURCE, ""),
    ),
    "w4a8_fp8": _rows(
        (75, 89, REFUSED, _HOPPER_ONLY, f"{CT}/compressed_tensors.py", ""),
        (90, 90, NATIVE, "CUTLASS W4A8", f"{LINEAR}/mixed_precision/cutlass.py", "CutlassW4A8LinearKernel"),
        (100, 121, REFUSED, _HOPPER_ONLY, f"{CT}/compressed_tensors.py", ""),
    ),
}  # fmt: skip
"""Format as vLLM tells them apart -> what it does with linear layers."""

EXPERTS: dict[str, tuple[Kernel, ...]] = {
    "nvfp4": _rows(
        (75, 89, WEIGHT_ONLY, "Marlin", f"{MOE}/oracle/nvfp4.py", "MARLIN"),
        (90, 90, WEIGHT_ONLY, "Humming", f"{MOE}/oracle/nvfp4.py", "HUMMING"),
        (100, 103, NATIVE, "FlashInfer TRT-LLM", f"{MOE}/oracle/nvfp4.py", "FLASHINFER_TRTLLM"),
        (120, 121, NATIVE, "FlashInfer CUTLASS", f"{MOE}/oracle/nvfp4.py", "FLASHINFER_CUTLASS"),
    ),
    "nvfp4a16": _rows(
        (75, 89, NATIVE, "Marlin", f"{MOE}/oracle/nvfp4.py", "MARLIN"),
        (90, 90, NATIVE, "Humming", f"{MOE}/oracle/nvfp4.py", "HUMMING"),
        (100, 103, NATIVE, "Marlin", f"{MOE}/oracle/nvfp4.py", "MARLIN"),
        (120, 121, NATIVE, "Marlin", f"{MOE}/oracle/nvfp4.py", "MARLIN"),
    ),
    "mxfp8": _rows(
        (75, 89, WEIGHT_ONLY, "Marlin", f"{MOE}/oracle/mxfp8.py", "MARLIN"),
        (90, 90, WEIGHT_ONLY, "Humming", f"{MOE}/oracle/mxfp8.py", "HUMMING"),
        (100, 103, NATIVE, "FlashInfer TRT-LLM", f"{MOE}/oracle/mxfp8.py", "FLASHINFER_TRTLLM"),
        (120, 121, WEIGHT_ONLY, "Marlin", f"{MOE}/oracle/mxfp8.py", "MARLIN"),
    ),
    "fp8": _rows(
        (75, 86, WEIGHT_ONLY, "Marlin", f"{MOE}/oracle/fp8.py", "MARLIN"),
        (89, 89, NATIVE, "Triton", f"{MOE}/oracle/fp8.py", "TRITON"),
        (90, 90, NATIVE, "FlashInfer CUTLASS", f"{MOE}/oracle/fp8.py", "FLASHINFER_CUTLASS"),
        (100, 103, NATIVE, "FlashInfer TRT-LLM", f"{MOE}/oracle/fp8.py", "FLASHINFER_TRTLLM"),
        (120, 121, NATIVE, "FlashInfer CUTLASS", f"{MOE}/oracle/fp8.py", "FLASHINFER_CUTLASS"),
    ),
    "fp8_dynamic": _rows(
        (75, 86, WEIGHT_ONLY, "Marlin", f"{MOE}/oracle/fp8.py", "MARLIN"),
        (89, 89, NATIVE, "Triton", f"{MOE}/oracle/fp8.py", "TRITON"),
        (90, 90, NATIVE, "CUTLASS", f"{MOE}/oracle/fp8.py", "VLLM_CUTLASS"),
        (100, 103, NATIVE, "CUTLASS", f"{MOE}/oracle/fp8.py", "VLLM_CUTLASS"),
        (120, 121, NATIVE, "Triton", f"{MOE}/oracle/fp8.py", "TRITON"),
    ),
    "fp8_block": _rows(
        (75, 86, WEIGHT_ONLY, "Marlin", f"{MOE}/oracle/fp8.py", "MARLIN"),
        (89, 90, NATIVE, "Triton", f"{MOE}/oracle/fp8.py", "TRITON"),
        (100, 103, NATIVE, "FlashInfer TRT-LLM", f"{MOE}/oracle/fp8.py", "FLASHINFER_TRTLLM"),
        (120, 121, NATIVE, "DeepGEMM", f"{MOE}/oracle/fp8.py", "DEEPGEMM"),
    ),
    "w4a16": _rows(
        (75, 89, NATIVE, "Marlin", f"{MOE}/oracle/int_wna16.py", "MARLIN"),
        (90, 90, NATIVE, "Humming", f"{MOE}/oracle/int_wna16.py", "HUMMING"),
        (100, 103, NATIVE, "Marlin", f"{MOE}/oracle/int_wna16.py", "MARLIN"),
        (120, 121, NATIVE, "Marlin", f"{MOE}/oracle/int_wna16.py", "MARLIN"),
    ),
    "int8": _rows(
        (75, 90, NATIVE, "Triton", f"{MOE}/oracle/int8.py", "TRITON"),
        (100, 103, NATIVE, "Triton", f"{MOE}/oracle/int8.py", "TRITON"),
        (120, 121, NATIVE, "Triton", f"{MOE}/oracle/int8.py", "TRITON"),
    ),
    "mxfp4": _rows(
        (80, 90, WEIGHT_ONLY, "Marlin", f"{CT}/compressed_tensors_moe/compressed_tensors_moe_w4a4_mxfp4.py",
         "MarlinExperts"),
        (100, 103, NATIVE, "CUTLASS",
         f"{CT}/compressed_tensors_moe/compressed_tensors_moe_w4a4_mxfp4.py", "CutlassExpertsMxfp4"),
        (120, 121, WEIGHT_ONLY, "Marlin", f"{CT}/compressed_tensors_moe/compressed_tensors_moe_w4a4_mxfp4.py",
         "MarlinExperts"),
    ),
    "gpt_oss": _rows(
        (80, 89, NATIVE, "Marlin", f"{MOE}/oracle/mxfp4.py", "MARLIN"),
        (90, 90, NATIVE, "FlashInfer CUTLASS", f"{MOE}/oracle/mxfp4.py", "FLASHINFER_CUTLASS_MXFP4_BF16"),
        (100, 103, NATIVE, "FlashInfer TRT-LLM", f"{MOE}/oracle/mxfp4.py", "FLASHINFER_TRTLLM_MXFP4_BF16"),
        (120, 121, NATIVE, "Marlin", f"{MOE}/oracle/mxfp4.py", "MARLIN"),
    ),
}  # fmt: skip
"""The same for numbered or fused experts."""


def _sixteen(rows: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """The same kernels for a checkpoint that asks for activations of 16 bits, which vLLM does not look at.

    Source: CompressedTensorsW4A4Mxfp4, CompressedTensorsW8A8Mxfp8 and their MoE methods.
    """
    return tuple(replace(row, how={NATIVE: NARROWER, WEIGHT_ONLY: NATIVE}.get(row.how, row.how)) for row in rows)


for _table in (DENSE, EXPERTS):
    _table |= {f"{_form}a16": _sixteen(_table[_form]) for _form in ("mxfp4", "mxfp8")}
EXPERTS["w8a16"] = EXPERTS["w4a16"]

FLOORS = {
    "modelopt": (("fp8", "fp8_dynamic", "fp8_block", "mxfp8"), 80, f"{MODELOPT}: get_min_capability"),
}
"""Layout -> formats whose config vLLM refuses below a capability, whatever kernel there is."""


def kernel_for(form: str, layout: str, capability: int, *, experts: bool) -> Kernel | None:
    """The row for a format on a capability; None where the table has none."""
    rows = (EXPERTS if experts else DENSE).get(form, ())
    floor = FLOORS.get(layout)
    if floor and form in floor[0] and capability < floor[1]:
        return Kernel(75, floor[1] - 1, REFUSED, f"the layout {layout} needs {floor[1] / 10}", floor[2])
    found = next((row for row in rows if row.first <= capability <= row.last), None)
    if found is None and rows and capability < rows[0].first:
        return Kernel(0, rows[0].first - 1, REFUSED, f"needs {rows[0].first / 10} or newer", rows[0].source)
    return found
