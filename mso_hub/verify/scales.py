"""Scales of a checkpoint: finite, positive, the same where engines keep one for several weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from mso_hub.checkpoint import DTYPE_BITS
from mso_hub.errors import CheckpointError
from mso_hub.formats.decoders.nvfp4 import Nvfp4Decoder
from mso_hub.formats.dialects.ktransformers import LAYOUT as KTRANSFORMERS
from mso_hub.formats.weight import FLOAT_DTYPES, NUMPY, Weight, read_rows
from mso_hub.plan.calibration import described
from mso_hub.plan.fusion import unit_of, units
from mso_hub.plan.select import EXPERT
from mso_hub.verify.companions import INPUT_SCALES
from mso_hub.verify.lost import lost_scales
from mso_hub.verify.manifest import read_manifest
from mso_hub.verify.opened import Opened
from mso_hub.verify.report import alike

CHUNK = 8 << 20
EXPERT_INPUTS = 1e-5
"""Difference of activation scales that vLLM 0.32 lets pass, fused_moe/routed_experts.py."""


def global_scale(mine: Opened, weight: Weight) -> float:
    """The F32 global scale of an NVFP4 weight as it is stored."""
    return float(read_rows(mine.source.read, weight.parts["global"]).reshape(-1)[0])


def check_scales(mine: Opened) -> tuple[int, list[str]]:
    """(fused units of NVFP4, problems): scales finite, positive, equal where engines keep one, and none lost.

    Of FP8 per tensor vLLM takes the largest scale of a fused unit, and requantizes to it, so that members may differ;
    only compressed-tensors' experts refuse different activation scales.
    """
    packed = {w.module: w for w in mine.weights.values() if isinstance(w.decoder, Nvfp4Decoder)}
    scales = {module: global_scale(mine, weight) for module, weight in packed.items()}
    inputs = _input_scales(mine)
    problems = [
        f"{module}: the {kind} scale must be finite and > 0, found {scale}"
        for kind, values in (("global", scales), ("activation", inputs))
        for module, scale in values.items() if not 0 < scale < math.inf
    ]  # fmt: skip
    for weight in (w for w in mine.weights.values() if "scale" in w.parts):
        problems += _block_scales(mine, weight)
    narrow = ((w.module, _too_narrow(mine, w)) for w in mine.weights.values())
    problems += alike({module: found for module, found in narrow if found})
    shared = units(packed)
    for key, members in shared.items():
        for kind, values in (("global", scales), ("activation", inputs)):
            if len({values[m] for m in members if m in values}) > 1:
                listed = ", ".join(f"{m} {values[m]:.6g}" for m in members if m in values)
                problems.append(f"{key}: engines keep one {kind} scale for all members, found {listed}")
    return len(shared), problems + list(_expert_inputs(mine, inputs)) + list(_lonely([*packed, *mine.refused]))


def scale_notes(mine: Opened) -> Iterator[str]:
    """A sentence about where activation scales come from, where mso_hub.json says that a model ran for them."""
    leaves = {name.rpartition(".")[2] for name in mine.runtime_scales}
    facts = read_manifest(mine.source).get("calibration")
    if not isinstance(facts, dict) or not leaves:
        return
    said = described(facts, inputs=bool(leaves & set(INPUT_SCALES)), cache=bool(leaves & {"k_scale", "v_scale"}))
    if said:
        yield f"activation scales, as mso_hub.json has it: {said}"


def _expert_inputs(mine: Opened, inputs: Mapping[str, float]) -> Iterator[str]:
    """Activation scales of an expert's gate and up in FP8: vLLM's compressed-tensors loader wants them within 1e-5."""
    fp8 = [w.module for w in mine.weights.values() if w.decoder is not None and w.decoder.scheme == "fp8"]
    layout = {w.module: w.decoder.layout for w in mine.weights.values() if w.decoder is not None}
    experts = (m for m in fp8 if m in inputs and EXPERT.match(m) and layout[m] == "compressed-tensors")
    for key, members in units(experts).items():
        values = [inputs[m] for m in members]
        if max(values) - min(values) > EXPERT_INPUTS:
            listed = ", ".join(f"{m} {inputs[m]:.6g}" for m in members)
            yield f"{key}: vLLM refuses experts whose members have different activation scales, found {listed}"


def _block_scales(mine: Opened, weight: Weight) -> Iterator[str]:
    """A sentence where a scale of a weight is NaN, infinite or negative, or zero over codes that are not."""
    from mso_hub.formats.numerics.floats import widen

    info, zero = weight.parts["scale"], False
    item = max(1, DTYPE_BITS[info.dtype] // 8)
    for begin in range(info.begin, info.end, CHUNK):
        bits = mine.source.read(info.file, begin, min(begin + CHUNK, info.end))
        if info.dtype == "F8_E4M3":
            if np.any((bits & 0x7F) == 0x7F):
                yield f"{weight.module}: a block scale is NaN"
                return
            if np.any(bits > 0x80):
                yield f"{weight.module}: a block scale is negative"
                return
            zero |= bool(np.any((bits & 0x7F) == 0))
        if info.dtype in ("U8", "F8_E8M0") and np.any(bits == 0xFF):
            yield f"{weight.module}: a block scale is NaN"
            return
        if info.dtype in FLOAT_DTYPES and bits.nbytes % item == 0:
            scale = widen(bits.view(NUMPY[info.dtype]), info.dtype)
            if not np.all(np.isfinite(scale)):
                yield f"{weight.module}: a scale is not finite"
                return
            if np.any(scale < 0):
                yield f"{weight.module}: a scale is negative"
                return
            zero |= bool(np.any(scale == 0))
    if not zero:
        return
    try:
        lost = lost_scales(mine.source.read, weight)
    except CheckpointError as damage:  # a global scale that decodes to nothing: this weight's finding, not the end
        yield str(damage)
        return
    if lost:
        yield (
            f"{weight.module}: {lost:,} scales are zero over codes that are not, so the numbers are lost; "
            "the checkpoint is damaged"
        )


def _too_narrow(mine: Opened, weight: Weight) -> str:
    """A sentence where bytes hold integers that need more bits than the config says; nothing else reads them."""
    info, decoder = weight.parts.get("codes"), weight.decoder
    if info is None or info.dtype != "I8" or decoder is None or decoder.scheme in ("mxfp4", "int8"):
        return ""
    if decoder.layout == KTRANSFORMERS:  # two codes in a byte
        return ""
    limit = 1 << (decoder.bits - 1)
    for begin in range(info.begin, info.end, CHUNK):
        codes = mine.source.read(info.file, begin, min(begin + CHUNK, info.end)).view(np.int8)
        if codes.min(initial=0) < -limit or codes.max(initial=0) >= limit:
            found = f"{codes.min()} to {codes.max()}"
            return f"{weight.module}: config.json says {decoder.bits} bits, stored are codes from {found}"
    return ""


def _input_scales(mine: Opened) -> dict[str, float]:
    """Module -> stored activation scale, in the layout's own direction."""
    from mso_hub.formats.numerics.floats import widen

    infos = {info.name: info for shard in mine.checkpoint.shards.values() for info in shard.tensors}
    found = {}
    for name in mine.runtime_scales:
        module, _, suffix = name.rpartition(".")
        info = infos[name]
        if suffix in INPUT_SCALES and info.dtype in FLOAT_DTYPES and math.prod(info.shape) == 1:
            found[module] = float(widen(read_rows(mine.source.read, info).reshape(-1), info.dtype)[0])
    return found


def _lonely(modules: Iterable[str]) -> Iterator[str]:
    """Halves of gate/up pairs whose other half is missing, where other layers have both."""
    pairs: dict[str, list[str]] = {}
    for module in modules:
        key = unit_of(module)
        if key is not None and key.endswith(("gate_up_proj", "w13")):
            pairs.setdefault(key, []).append(module)
    if any(len(members) > 1 for members in pairs.values()):
        yield from (f"{m[0]}: its partner is missing, other layers have both" for m in pairs.values() if len(m) == 1)
