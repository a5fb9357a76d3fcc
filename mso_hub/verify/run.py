"""verify_checkpoint(): structure, hashes, config, scales, then the numbers against the source and a reference."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from mso_hub.checkpoint import Array, TensorInfo, parse_config
from mso_hub.engine.threads import default_workers
from mso_hub.errors import CheckpointError, PlanError, VerifyError
from mso_hub.events import Listener, TensorDone, ignore
from mso_hub.formats.decoders.nvfp4 import Nvfp4Decoder
from mso_hub.formats.detect import quantization_configs
from mso_hub.formats.dialects.modelopt import QUANT_CONFIG_FILE
from mso_hub.formats.weight import FLOAT_DTYPES, Reader, Weight
from mso_hub.plan.experts import is_fused_experts, split_experts
from mso_hub.plan.fusion import units
from mso_hub.plan.text import text_model
from mso_hub.source import Source, open_source, read_checkpoint
from mso_hub.verify.config import config_problems
from mso_hub.verify.manifest import check_manifest, wrong_source
from mso_hub.verify.opened import Opened, opening
from mso_hub.verify.report import Report, TensorError
from mso_hub.verify.scales import check_scales

CHUNK = 8 << 20
ROWS = 480
"""Row ranges are multiples of this: every decoder may start there."""
PACKED_LIMIT = {8: 0.01, 7: 0.01, 6: 0.02, 5: 0.05, 4: 0.1, 3: 0.3, 2: 0.6}
"""Bits -> NMSE above which a packed weight counts as wrong. FP8 has 0.0007, NVFP4 0.009, INT4 in groups of 128 up to
0.03 where tails are heavy, one scale a row more; a wrong scale or sign gives 0.1 to 4."""
ROUNDED_LIMIT = 1e-4
"""The same for a weight that was only decoded and rounded; BF16 has 3e-6."""


def verify_checkpoint(
    where: str | Path | Source,
    *,
    source: str | Path | Source | None = None,
    reference: str | Path | None = None,
    on_event: Listener = ignore,
) -> Report:
    """Check a finished checkpoint.

    source     where it came from: dequantized error per weight, equality of what was not to change
    reference  "modelopt" (recomputes every NVFP4 weight with ModelOpt; needs `source`) or a checkpoint to compare
               with byte by byte
    Raises CheckpointError for headers that cannot be read at all; everything else is in `Report.problems`.
    """
    with ExitStack() as stack:
        mine = stack.enter_context(opening(where, on_event))
        theirs = like(stack.enter_context(opening(source, on_event)), mine) if source is not None else None
        return _verify(mine, theirs, reference, on_event)


def _verify(mine: Opened, theirs: Opened | None, reference: str | Path | None, on_event: Listener) -> Report:
    weights = list(mine.weights.values())
    problems, hashed = check_manifest(mine.source)
    problems += _index_problems(mine)
    problems += _file_problems(mine)
    problems += config_problems(mine.checkpoint, weights, mine.runtime_scales)
    shared, scale_problems = check_scales(mine)
    problems += scale_problems
    identical = 0
    errors: list[TensorError] = []
    far: list[str] = []
    equal: dict[str, int] = {}
    with ThreadPoolExecutor(default_workers()) as pool:
        if theirs is not None:
            far += _missing(mine, theirs)
            pairs = [(w, theirs.weights[n]) for n, w in mine.weights.items() if n in theirs.weights]
            for pair, outcome in zip(pairs, pool.map(lambda p: distance(mine, theirs, *p), pairs), strict=True):
                on_event(TensorDone(pair[0].name, pair[1].nbytes))
                identical += outcome is None
                if outcome is not None:
                    errors.append(outcome)
                    far += _too_far(outcome, pair[0])
            problems = [*wrong_source(mine.source, theirs.source, far), *problems, *far]
        if reference is not None:
            equal, different = _compare_reference(mine, theirs, reference, pool)
            problems += different
    return Report(
        mine.source.name, tuple(problems), sum(len(s.tensors) for s in mine.checkpoint.shards.values()),
        sum(w.decoder is not None for w in weights), hashed, shared, identical, tuple(errors), equal,
    )  # fmt: skip


def _index_problems(mine: Opened) -> Iterator[str]:
    """total_size of every index against the tensors that it lists."""
    for group in mine.checkpoint.groups:
        if group.index is None:
            continue
        raw = mine.source.read(group.index, 0, mine.source.files()[group.index]).tobytes()
        metadata = json.loads(raw).get("metadata")
        said = metadata.get("total_size") if isinstance(metadata, dict) else None
        found = sum(group.tensors[name].nbytes for name in group.indexed)
        if said is not None and said != found:
            said = f"{said:,}" if isinstance(said, int | float) else repr(said)
            yield f"{group.index}: total_size says {said} bytes, its tensors have {found:,}"


def _file_problems(mine: Opened) -> Iterator[str]:
    """hf_quant_config.json against config.json: TensorRT-LLM reads one, vLLM the other."""
    files = mine.checkpoint.files
    configs = quantization_configs(mine.checkpoint.config)
    if QUANT_CONFIG_FILE not in files or not configs or configs[0].get("quant_method") != "modelopt":
        return
    content = parse_config(
        mine.source.read(QUANT_CONFIG_FILE, 0, files[QUANT_CONFIG_FILE]).tobytes(), QUANT_CONFIG_FILE
    )
    nested = content.get("quantization")
    said = nested if isinstance(nested, dict) else {}
    for key, other in (("quant_algo", "quant_algo"), ("exclude_modules", "ignore")):
        if said.get(key) != configs[0].get(other):
            yield f"{QUANT_CONFIG_FILE}: {key} differs from {other} of config.json; engines would load different models"


def like(theirs: Opened, mine: Opened) -> Opened:
    """The source under the names of the output: vision parts dropped, fused experts split, where that was done."""
    weights = dict(theirs.weights)
    config = theirs.checkpoint.config
    if mine.checkpoint.config.get("architectures") != config.get("architectures"):
        try:
            text = text_model(config, {n: w.shape for n, w in weights.items()})
            weights = {text.names[n]: replace(w, name=text.names[n]) for n, w in weights.items() if n in text.names}
            config = text.config
        except PlanError:
            pass  # not a multimodal source: if names differ, that is reported as missing weights
    for weight in [w for n, w in weights.items() if is_fused_experts(w) and n not in mine.weights]:
        del weights[weight.name]
        weights.update((part.name, part) for part in split_experts(weight, config, theirs.weights))
    return replace(theirs, weights=weights)


def _missing(mine: Opened, theirs: Opened) -> Iterator[str]:
    for label, names in (
        ("weights of the source are missing", [n for n in theirs.weights if n not in mine.weights]),
        ("weights are not in the source", [n for n in mine.weights if n not in theirs.weights]),
    ):
        if names:
            yield f"{len(names)} {label}, the first is {names[0]}"


def _row_ranges(*weights: Weight) -> list[tuple[int, int]]:
    """Row ranges of about CHUNK bytes of float32 that suit the decoders of all weights."""
    rows = weights[0].shape[0] if weights[0].shape else 1
    if any(w.decoder is not None and w.decoder.row_step == 0 for w in weights):
        return [(0, rows)]
    per_row = max(1, 4 * math.prod(weights[0].shape[1:]))
    height = max(1, CHUNK // per_row // ROWS) * ROWS
    return [(at, min(at + height, rows)) for at in range(0, rows, height)]


def _numbers(weight: Weight, read: Reader, start: int, stop: int) -> Array:
    from mso_hub.formats.numerics.floats import widen

    values, dtype = weight.values(weight.load(read, start, stop), start, stop)
    return widen(values, dtype)


def _layout(weight: Weight) -> tuple[object, ...]:
    """How a weight is stored; equal for two weights whose bytes can be compared."""
    return weight.dtype, weight.decoder, {role: (part.dtype, part.shape) for role, part in weight.parts.items()}


def _bytes_of(array: Array) -> Array:
    return array.reshape(-1).view(np.uint8)


def distance(mine: Opened, theirs: Opened, now: Weight, before: Weight) -> TensorError | None:
    """Error of one weight, None when both are stored alike and their bytes are equal."""
    stored = now.decoder.name if now.decoder else now.dtype
    if now.shape != before.shape:
        return TensorError(now.name, math.inf, math.inf, f"{stored} {list(now.shape)}, source {list(before.shape)}")
    ranges = _row_ranges(now, before)
    if _layout(now) == _layout(before):
        loads = ((now.load(mine.source.read, *r), before.load(theirs.source.read, *r)) for r in ranges)
        if all(np.array_equal(_bytes_of(a[role]), _bytes_of(b[role])) for a, b in loads for role in a):
            return None
    if any(w.decoder is None and w.dtype not in FLOAT_DTYPES for w in (now, before)):
        return TensorError(now.name, math.inf, math.inf, f"{stored}, other bytes than the source")
    try:
        nmse, largest = _error(mine, theirs, now, before, ranges)
    except CheckpointError as damage:  # a scale that decodes to nothing: this weight's finding, not the end
        return TensorError(now.name, math.inf, math.inf, f"{stored}, {damage}")
    return TensorError(now.name, nmse, largest, stored)


def _error(
    mine: Opened, theirs: Opened, now: Weight, before: Weight, ranges: Sequence[tuple[int, int]]
) -> tuple[float, float]:
    """(relative squared error, largest difference) of one weight against the source."""
    error = energy = largest = 0.0
    with np.errstate(all="ignore"):  # a damaged scale may give infinities: they are the finding
        for start, stop in ranges:
            reference = _numbers(before, theirs.source.read, start, stop)
            difference = _numbers(now, mine.source.read, start, stop) - reference
            error += float(np.square(difference, dtype=np.float64).sum())
            energy += float(np.square(reference, dtype=np.float64).sum())
            largest = max(largest, float(np.abs(difference).max(initial=0)))
    return error / energy if energy > 0 else (0.0 if error == 0 else math.inf), largest


def _too_far(error: TensorError, weight: Weight) -> list[str]:
    limit = PACKED_LIMIT.get(weight.decoder.bits, 0.6) if weight.decoder is not None else ROUNDED_LIMIT
    if error.nmse <= limit:
        return []
    return [f"{error.name}: relative squared error {error.nmse:.3g} ({error.stored}), at most {limit} is plausible"]


def _compare_reference(
    mine: Opened, theirs: Opened | None, reference: str | Path, pool: ThreadPoolExecutor
) -> tuple[dict[str, int], list[str]]:
    """Byte comparison with ModelOpt's own quantizer or with another checkpoint."""
    if reference == "modelopt":
        if theirs is None:
            raise VerifyError("--reference modelopt recomputes the weights from the source; give --source too")
        return _compare_modelopt(mine, theirs)
    with closing(open_source(reference)) as other:
        tensors = {i.name: i for s in read_checkpoint(other).shards.values() for i in s.tensors}
        own = [i for s in mine.checkpoint.shards.values() for i in s.tensors]
        problems = [f"{i.name}: not in {reference}" for i in own if i.name not in tensors]
        problems += [f"{n}: only in {reference}" for n in sorted(set(tensors) - {i.name for i in own})]
        both = [i for i in own if i.name in tensors]
        outcomes = pool.map(lambda i: _first_difference(mine.source, i, other, tensors[i.name]), both)
        different = [outcome for outcome in outcomes if outcome is not None]
    return {str(reference): len(both) - len(different)}, problems + different


def _first_difference(source: Source, info: TensorInfo, other: Source, their: TensorInfo) -> str | None:
    if (info.dtype, info.shape) != (their.dtype, their.shape):
        return f"{info.name}: {info.dtype} {list(info.shape)}, the reference has {their.dtype} {list(their.shape)}"
    for at in range(0, info.nbytes, CHUNK):
        stop = min(at + CHUNK, info.nbytes)
        a = source.read(info.file, info.begin + at, info.begin + stop)
        b = other.read(their.file, their.begin + at, their.begin + stop)
        if not np.array_equal(a, b):
            first = at + int(np.flatnonzero(a != b)[0])
            return f"{info.name}: differs from the reference from byte {first:,} of {info.nbytes:,} on"
    return None


def _compare_modelopt(mine: Opened, theirs: Opened) -> tuple[dict[str, int], list[str]]:
    """Codes and block scales against NVFP4QTensor.quantize, one fused unit after the other."""
    from mso_hub.formats.numerics import floats, modelopt, nvfp4

    packed = {
        w.module: w for w in mine.weights.values() if isinstance(w.decoder, Nvfp4Decoder) and w.name in theirs.weights
    }
    shared = units(packed)
    alone = packed.keys() - {m for members in shared.values() for m in members}
    equal, problems = 0, []
    for members in [*shared.values(), *((m,) for m in sorted(alone))]:
        originals = [theirs.weights[packed[m].name] for m in members]
        values = [_whole(w, theirs.source.read) for w in originals]
        amax = max(floats.amax(v, dtype) for v, dtype in values)
        for module, (value, dtype) in zip(members, values, strict=True):
            stored = packed[module].load(mine.source.read, 0, packed[module].shape[0])
            codes, scale = modelopt.encode(value, dtype, nvfp4.global_scale(amax))
            wrong = int(np.count_nonzero(stored["codes"] != codes)) + int(np.count_nonzero(stored["scale"] != scale))
            equal += wrong == 0
            if wrong:
                problems.append(f"{module}: {wrong:,} bytes differ from ModelOpt's codes and scales")
    return {"modelopt": equal}, problems


def _whole(weight: Weight, read: Reader) -> tuple[Array, str]:
    rows = weight.shape[0]
    return weight.values(weight.load(read, 0, rows), 0, rows)
