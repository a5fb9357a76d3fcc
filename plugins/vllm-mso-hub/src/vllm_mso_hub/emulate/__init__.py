"""Emulation: `LLM(...).generate` on a CPU for formats that vLLM has no CPU kernel for.

vLLM creates, loads and fuses the parameters; only the multiplication is ours. A weight is dequantized once, an
activation is quantized and dequantized in every step where the format says so, and the product is vLLM's own BF16
product. What vLLM computes itself on the CPU that it runs on stays vLLM's:

    format                              linear layers                   experts
    BF16                                vLLM                            vLLM
    NVFP4 W4A16, W4A4                   emulated                        emulated
    MXFP4 W4A16, W4A8, W4A4             emulated                        emulated
    MXFP8 W8A16, W8A8                   emulated                        emulated
    FP8, scale of the checkpoint        vLLM, its quantizer emulated    emulated
    FP8, dynamic                        vLLM                            emulated
    FP8 blocks, DeepSeek's FP8          vLLM with AMX, else emulated    vLLM with AMX, else emulated
    INT8                                vLLM                            vLLM with AMX, else emulated
    W4A16                               vLLM for multiples of 32        vLLM with AMX and symmetric, else emulated
    W8A16                               emulated                        emulated

The `kernels` of a report (`vllm_mso_hub.generate`) say which it was. Weight-only formats give the very numbers of the
checkpoint that `mso-hub decompress` writes, except W4A16 where vLLM computes it: in another order, and with AMX on
activations in INT8.

Whether MXFP4 and MXFP8 quantize activations follows the recipe. vLLM's own choice follows the GPU: its schemes for
these two are W4A4 and W8A8 by name, and weight-only wherever it takes a Marlin kernel.
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def install() -> None:
    """Make vLLM of this process emulate; a second call does nothing. MissingName when a name of vLLM's is gone."""
    from vllm_mso_hub.compat import emulation
    from vllm_mso_hub.emulate import linear, moe

    emulation.check_names()
    kernels = linear.kernels()
    weight_only, latent = kernels.pop(linear.WEIGHT_ONLY), kernels.pop(linear.LATENT)
    for kind, kernel in kernels.items():
        emulation.register_kernel(kernel, kind)
    emulation.replace(emulation.LINEAR, "MarlinNvFp4LinearKernel", lambda _: weight_only)
    emulation.keep_divisors()
    emulation.keep_activations()
    emulation.fill_fp8_operator(_fp8)
    emulation.keep_latent_weights(latent)
    emulation.quantize_in_the_kernel()
    emulation.take_any_shape()
    experts = moe.placeholder()
    for module, choice in emulation.CHOICES:
        emulation.offer_backend(module, choice, experts)
    for method in emulation.METHODS:
        emulation.dequantize_experts(method, moe.install, experts)


def _fp8(numbers: Any, scale: Any) -> Any:
    """F8_E4M3 codes of numbers under a scale []: nearest, saturating."""
    import torch

    return (numbers.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
