"""What config.json says of one module. Tensors decide how it is decoded; the config settles what shapes leave open.

A config that contradicts the tensors belongs to other weights, so the two must agree where both speak. Where a config
is silent (missing groups, unknown methods, a setting for each layer) nothing is compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mso_hub.formats.dialects import compressed_tensors, modelopt

ALGORITHMS = {
    "FP8": "fp8", "FP8_PER_CHANNEL_PER_TOKEN": "fp8", "FP8_PB_WO": "fp8", "FP8_PB_REAL": "fp8", "MXFP8": "mxfp8",
    "NVFP4": "nvfp4", "W4A16_NVFP4": "nvfp4", "NVFP4_AWQ": "nvfp4", "NVFP4_SVD": "nvfp4", "W4A8_NVFP4_FP8": "nvfp4",
    "MXFP4": "mxfp4", "W4A8_MXFP4_FP8": "mxfp4", "W4A16_AWQ": "int4", "W4A8_AWQ": "int4", "W8A16": "int8",
    "W8A8_SQ_PER_CHANNEL": "int8",
}  # fmt: skip
"""ModelOpt's quant_algo -> scheme."""
FP8_BLOCK = (128, 128)
"""Rows and columns under one scale of FP8_PB_WO, which its config does not tell; vLLM knows no other."""
INTEGER_METHODS = ("awq", "gptq", "auto-round", "intel/auto-round")
FP8_SCHEMES = frozenset({"fp8", "mxfp8", "mxfp4"})
"""What quant_method fp8 covers: DeepSeek-V4 keeps its experts in FP4 under it."""


@dataclass(frozen=True, slots=True)
class Announced:
    """The config's words on one module.

    text        for messages: "quant_method fp8, weight_block_size [128, 128]"; empty when it says nothing
    method      quant_method in lower case, empty without a config
    schemes     what the numbers may be; empty when the config leaves it open
    strategy    tensor, channel, block or group; empty when open
    cell        rows and columns under one scale where the strategy is block
    group_size  columns under one scale, None when open; 0 or -1 for a whole row
    symmetric   False when zero points must be there, None when open
    bits        width of an integer code, None when open
    config      the whole quantization_config that these words come from
    """

    text: str = ""
    method: str = ""
    schemes: frozenset[str] = frozenset()
    strategy: str = ""
    cell: tuple[int, int] | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    bits: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


def announced(configs: Sequence[Mapping[str, Any]], module: str) -> Announced:
    """What the first config that knows the module says; `configs` as `quantization_configs` finds them."""
    said = Announced()
    for config in configs:
        method = config.get("quant_method")
        method = method.lower() if isinstance(method, str) else ""
        if method == "compressed-tensors":
            said = _compressed_tensors(config, module)
        elif method == "modelopt":
            said = _modelopt(config, module)
        elif method in INTEGER_METHODS:
            said = _integers(config, method)
        else:
            said = _other(config, method)
        if said.schemes:
            break
    return said


def _pair(value: object) -> tuple[int, int] | None:
    """Two sizes from [128, 128] or the "128x128" of older configs."""
    if isinstance(value, str):
        value = [int(part) if part.isdigit() else part for part in value.lower().split("x")]
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(_is_size(size) for size in value):
        return None
    return value[0], value[1]


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _compressed_tensors(config: Mapping[str, Any], module: str) -> Announced:
    covering = compressed_tensors.group_of(config, module)
    if covering is None:
        return Announced(method="compressed-tensors", config=config)
    args = covering["weights"]
    kind, bits, group = args.get("type"), _whole(args.get("num_bits")), _whole(args.get("group_size"))
    scheme = ""
    if kind == "int" and bits is not None:
        scheme = f"int{bits}"
    elif kind == "float" and bits == 4:
        scheme = {16: "nvfp4", 32: "mxfp4"}.get(group or 0, "")
    elif kind == "float" and bits == 8:
        scheme = "mxfp8" if args.get("scale_dtype") == "torch.uint8" else "fp8"
    cell = _pair(args.get("block_structure"))
    strategy = args.get("strategy")
    strategy = strategy if isinstance(strategy, str) else ""
    where = f"block_structure {list(cell)}" if cell else f"group_size {group}" if group else f"strategy {strategy!r}"
    return Announced(
        f"{kind} {bits} bits, {where}" if scheme else "",
        "compressed-tensors",
        frozenset({scheme} if scheme else ()),
        strategy,
        cell,
        group,
        args.get("symmetric") if isinstance(args.get("symmetric"), bool) else None,
        bits,
        config,
    )


def _modelopt(config: Mapping[str, Any], module: str) -> Announced:
    algo = modelopt.algorithm(config, module)
    scheme = ALGORITHMS.get(algo or "")
    cell = FP8_BLOCK if algo == "FP8_PB_WO" else None
    return Announced(
        f"quant_algo {algo}" if scheme else "",
        "modelopt",
        frozenset({scheme} if scheme else ()),
        "block" if cell else "",
        cell,
        config=config,
    )


def _integers(config: Mapping[str, Any], method: str) -> Announced:
    """AWQ, GPTQ and AutoRound: one setting for all layers, unless some have their own."""
    bits, group = _whole(config.get("bits", config.get("w_bit"))), config.get("group_size", config.get("q_group_size"))
    kind = config.get("data_type", "int")
    if config.get("dynamic") or config.get("extra_config") or bits is None or kind != "int":
        return Announced(method=method, config=config)
    return Announced(
        f"{method} with {bits} bits, group_size {group}",
        method,
        frozenset({f"int{bits}"}),
        group_size=_whole(group),
        symmetric=config["sym"] if isinstance(config.get("sym"), bool) else None,
        bits=bits,
        config=config,
    )


def _other(config: Mapping[str, Any], method: str) -> Announced:
    if method == "fp8":
        block = config.get("weight_block_size")
        cell = _pair(block)
        return Announced(
            f"quant_method fp8, weight_block_size {list(cell) if cell else block}",
            method,
            FP8_SCHEMES,
            "block" if cell else "",
            cell,
            config=config,
        )
    if method == "mxfp4":
        return Announced("quant_method mxfp4", method, frozenset({"mxfp4"}), config=config)
    return Announced(method=method, config=config)
