"""What a checkpoint's own config and scales make a runtime do to activations, module by module.

A module's activations are quantized where its weight is stored packed and its quantization_config says how. Static
scales of weights that an engine fuses become one, as vLLM does it:

    linear layers   NVFP4 in compressed-tensors: the largest of the divisors 6 * 448 / amax
                    (schemes/compressed_tensors_w4a4_nvfp4.py); all others: the largest multiplier (modelopt.py, fp8.py)
    experts         the largest multiplier among all experts, one for w1 and w3, one for w2
                    (fused_moe/oracle/nvfp4.py; utils/fp8_utils.py: process_fp8_input_tensor_strategy_moe)

What vLLM does to weights meanwhile (FP8 parts of a fused layer requantized under the largest of their scales) is not
done here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mso_hub.calibrate.evaluate import activations
from mso_hub.calibrate.evaluate.activations import Quantizer
from mso_hub.errors import CheckpointError
from mso_hub.formats.dialects import compressed_tensors, modelopt
from mso_hub.plan.fusion import units
from mso_hub.plan.select import EXPERT

WAY_OUT = "--weights_only evaluates it with activations as they are"
WEIGHT_ONLY = ("awq", "gptq", "auto-round", "intel/auto-round", "mxfp4", "")
"""Values of quant_method whose runtimes leave activations alone; "" where there is no config."""
MODELOPT: Mapping[str, str | None] = {
    "NVFP4": "NVFP4", "W4A16_NVFP4": None, "FP8": "FP8 static", "FP8_PER_CHANNEL_PER_TOKEN": "FP8 per token",
    "FP8_PB_WO": "FP8 per 128 columns", "MXFP8": "MXFP8", "W4A16_AWQ": None, "W8A16": None,
}  # fmt: skip
"""quant_algo -> kind, as vLLM's modelopt.py has it; None leaves activations alone."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to quantize activations.

    dynamic  what does it where no scale is stored
    static   stored scale -> what does it
    """

    dynamic: Quantizer | None = None
    static: Callable[[Tensor], Quantizer] | None = None


KINDS: dict[str, Kind] = {
    "NVFP4": Kind(static=activations.nvfp4),
    "MXFP4": Kind(activations.mxfp4),
    "MXFP8": Kind(activations.mxfp8),
    "FP8 static": Kind(static=activations.fp8_static),
    "FP8 per token": Kind(activations.fp8_token),
    "FP8 per tensor": Kind(activations.fp8_tensor),
    "INT8 per token": Kind(activations.int8_token),
    "INT8 static": Kind(static=activations.int8_static),
}
COLUMNS = "FP8 per {} columns"


@dataclass(frozen=True, slots=True)
class Wish:
    """What a config says of one module's activations.

    kind     key of KINDS, or COLUMNS of some number
    divisor  the stored scale divides: compressed-tensors' NVFP4
    columns  under one scale, where the kind is COLUMNS
    """

    kind: str
    divisor: bool = False
    columns: int = 0

    @property
    def static(self) -> bool:
        """Does it need a stored scale?"""
        return not self.columns and KINDS[self.kind].static is not None

    @property
    def suffix(self) -> str:
        """Name of that scale."""
        return "input_global_scale" if self.divisor else "input_scale"


def wish_of(config: Mapping[str, Any], module: str, scheme: str) -> Wish | None:
    """What a quantization_config says of the activations of a module whose weight is packed; None: they stay.

    scheme  what its weight is: nvfp4, fp8, int4, ...
    Raises CheckpointError for a way that is not known here.
    """
    method = config.get("quant_method")
    method = method.lower() if isinstance(method, str) else ""
    if method in WEIGHT_ONLY:
        return None
    if method == "compressed-tensors":
        group = compressed_tensors.group_of(config, module)
        inputs = None if group is None else group.get("input_activations")
        return None if inputs is None else of_arguments(inputs, module)
    if method == "modelopt":
        algo = modelopt.algorithm(config, module) or ""
        if algo not in MODELOPT:
            raise _unknown(module, f"quant_algo {algo}")
        kind = MODELOPT[algo]
        return None if kind is None else Wish(kind, columns=128 if kind == COLUMNS.format(128) else 0)
    if method == "fp8" and scheme == "fp8":
        return _of_fp8(config, module)
    raise _unknown(module, f"{scheme} weights under quant_method {method}")


def of_arguments(inputs: Mapping[str, Any], module: str) -> Wish:
    """compressed-tensors' `input_activations`; CheckpointError for what is not known here."""
    if not isinstance(inputs, Mapping):
        raise _unknown(module, f"input_activations {inputs!r}")
    kind, bits, size = inputs.get("type"), inputs.get("num_bits"), inputs.get("group_size")
    strategy, dynamic = inputs.get("strategy"), inputs.get("dynamic")
    if inputs.get("symmetric") is False:
        raise _unknown(module, f"asymmetric {kind} activations of {bits} bits")
    found: Wish | None = None
    if kind == "float" and bits == 4:
        found = {16: Wish("NVFP4", divisor=True), 32: Wish("MXFP4")}.get(size or 0)
    elif kind == "float" and bits == 8 and strategy == "group" and size and dynamic:
        mx = size == 32 and inputs.get("scale_dtype") == "torch.uint8"
        found = Wish("MXFP8") if mx else Wish(COLUMNS.format(size), columns=size)
    elif kind in ("float", "int") and bits == 8:
        name = "FP8" if kind == "float" else "INT8"
        how = {"token": "per token", "tensor": "per tensor"}.get(str(strategy)) if dynamic else None
        how = "static" if dynamic in (False, None) and strategy in ("tensor", None) else how
        found = Wish(f"{name} {how}") if how and f"{name} {how}" in KINDS else None
    if found is None:
        raise _unknown(
            module, f"{kind} activations of {bits} bits, strategy {strategy}, group_size {size}, dynamic {dynamic}"
        )
    return found


def _of_fp8(config: Mapping[str, Any], module: str) -> Wish:
    """vLLM's fp8.py: Fp8LinearMethod."""
    block, scheme = config.get("weight_block_size"), config.get("activation_scheme")
    if isinstance(block, list | tuple) and len(block) == 2 and isinstance(block[1], int) and scheme == "dynamic":
        return Wish(COLUMNS.format(block[1]), columns=block[1])
    if block is None and scheme in ("static", "dynamic"):
        return Wish("FP8 static" if scheme == "static" else "FP8 per token")
    raise _unknown(module, f"quant_method fp8 with activation_scheme {scheme}, weight_block_size {block}")


def _unknown(module: str, what: str) -> CheckpointError:
    return CheckpointError(f"{module}: config.json says {what}, which is not known here; {WAY_OUT}")


def quantizers(wishes: Mapping[str, Wish], read: Callable[[str], Tensor]) -> dict[str, Quantizer]:
    """Module -> what a runtime does to its input; modules that an engine fuses get the very same object.

    wishes  module, as a dense checkpoint with experts apart calls it -> what its config says
    read    name of a stored scale -> F32 []; raises CheckpointError where there is none
    """
    found: dict[str, Quantizer] = {}
    made: dict[tuple[Wish, float | None], Quantizer] = {}
    for members, expert in _together(wishes):
        by_wish: dict[Wish, list[str]] = {}
        for module in members:
            by_wish.setdefault(wishes[module], []).append(module)
        for wish, modules in by_wish.items():
            scale = _joined(wish, [read(f"{m}.{wish.suffix}") for m in modules], expert) if wish.static else None
            key = wish, None if scale is None else float(scale)
            quantizer = made.setdefault(key, _quantizer(wish, scale))
            found |= dict.fromkeys(modules, quantizer)
    return found


def _together(modules: Iterable[str]) -> list[tuple[list[str], bool]]:
    """Modules that have one scale in an engine, and whether they are experts."""
    banks: dict[tuple[str, bool], list[str]] = {}
    others: list[str] = []
    for module in modules:
        match = EXPERT.match(module)
        if match:
            banks.setdefault((match["bank"], match["leaf"] in ("down_proj", "w2")), []).append(module)
        else:
            others.append(module)
    fused = units(others)
    inside = {module for members in fused.values() for module in members}
    return [
        *((members, True) for members in banks.values()),
        *((list(members), False) for members in fused.values()),
        *(([module], False) for module in others if module not in inside),
    ]


def _joined(wish: Wish, scales: list[Tensor], expert: bool) -> Tensor:
    """One scale of several, in the direction that the quantizer wants: a divisor for NVFP4, else a multiplier."""
    stacked = torch.stack(scales)
    if wish.kind != "NVFP4":
        return stacked.max()
    if wish.divisor and not expert:
        return stacked.max()
    multipliers = 1 / stacked if wish.divisor else stacked
    return 1 / multipliers.max()


def _quantizer(wish: Wish, scale: Tensor | None) -> Quantizer:
    if wish.columns:
        return activations.fp8_columns(wish.columns)
    kind = KINDS[wish.kind]
    if kind.static is not None and scale is not None:
        return kind.static(scale)
    assert kind.dynamic is not None  # noqa: S101 - every kind has one of the two
    return kind.dynamic
