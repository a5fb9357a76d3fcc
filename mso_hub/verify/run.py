"""verify_checkpoint(): structure, hashes, config, scales, then the numbers against the source and a reference."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from mso_hub.checkpoint import Array, parse_config
from mso_hub.engine.threads import default_workers
from mso_hub.errors import CheckpointError, PlanError, VerifyError
from mso_hub.events import CheckReady, Listener, TensorDone, ignore
from mso_hub.formats.detect import module_of, quantization_configs
from mso_hub.formats.dialects.modelopt import QUANT_CONFIG_FILE
from mso_hub.formats.weight import FLOAT_DTYPES, Reader, Weight
from mso_hub.plan.experts import is_fused_experts, split_experts
from mso_hub.plan.method import FOLDED, Method
from mso_hub.plan.text import text_model
from mso_hub.source import Source
from mso_hub.verify.announced import announces_cache
from mso_hub.verify.cache import cache_problems
from mso_hub.verify.companions import companion_problems
from mso_hub.verify.config import config_notes, config_problems
from mso_hub.verify.incomplete import refusals
from mso_hub.verify.kt import as_converted, kt_problems, kt_source_notes
from mso_hub.verify.manifest import bytes_to_hash, check_manifest, is_ours, method_of, wrong_source
from mso_hub.verify.opened import Opened, opening
from mso_hub.verify.parallel import parallel_notes, parallel_problems
from mso_hub.verify.reference import compare_reference
from mso_hub.verify.report import Report, TensorError, alike
from mso_hub.verify.rounding import can_count, count_strays
from mso_hub.verify.scales import check_scales, scale_notes
from mso_hub.verify.structure import structure_problems

CHUNK = 8 << 20
ROWS = 480
"""Row ranges are multiples of this: every decoder may start there."""
PACKED_LIMIT = {8: 0.01, 7: 0.01, 6: 0.02, 5: 0.05, 4: 0.12, 3: 0.3, 2: 0.6}
"""Bits -> NMSE above which a packed weight counts as wrong; codes of another weight give 2, zeros 1.

Rounding of normal numbers gives FP8 0.0007, NVFP4 0.009, MXFP4 0.013. The worst that a search over outliers in groups
of otherwise equal numbers found is 0.0035, 0.036 and 0.108. Integers have a higher limit where a scale is for many
columns, see `plausible`."""
ROUNDED_LIMIT = 1e-4
"""The same for a weight that was only decoded and rounded; BF16 has 3e-6."""
STRAYS = 0.5
"""Share of numbers that may have another code than the nearest where another tool chose the codes: GPTQ leaves 0.05 to
0.25. This tool rounds, so that there are none, but where mso_hub.json says that it took GPTQ."""
GPTQ = "gptq"
NOTHING = {"F16": 2.0**-22}
"""Dtype of the source -> differences below this are none, others below 1e-30: a format may turn whole weights of such
numbers to zero, and has no room for the scales of F16 ones."""


def verify_checkpoint(
    where: str | Path | Source,
    *,
    source: str | Path | Source | None = None,
    reference: str | Path | None = None,
    tp: Sequence[int] = (),
    ep: bool = False,
    on_event: Listener = ignore,
) -> Report:
    """Check a finished checkpoint.

    source     where it came from: dequantized error per weight, equality of what was not to change
    reference  "modelopt" (recomputes every NVFP4 weight with ModelOpt; needs `source`) or a checkpoint to compare
               with byte by byte
    tp         tensor-parallel sizes that it must fit; without any, a note says which of 1, 2, 4 and 8 it does
    ep         numbered experts are shared out whole (expert parallelism)
    Raises CheckpointError for headers that cannot be read at all, VerifyError for a reference that compares nothing
    and for a size below 1; everything else is in `Report.problems`.
    """
    if wrong := [size for size in tp if size < 1]:
        raise VerifyError(f"tp: a tensor-parallel size is 1 or more, got {wrong[0]}")
    with ExitStack() as stack:
        mine = stack.enter_context(opening(where, on_event, damaged=True))
        theirs = like(stack.enter_context(opening(source, on_event)), mine) if source is not None else None
        return _verify(mine, theirs, reference, (tp, ep), on_event)


def _verify(
    mine: Opened,
    theirs: Opened | None,
    reference: str | Path | None,
    parallel: tuple[Sequence[int], bool],
    on_event: Listener,
) -> Report:
    pairs = [(w, theirs.weights[n]) for n, w in mine.weights.items() if n in theirs.weights] if theirs else []
    on_event(CheckReady(bytes_to_hash(mine.source), sum(before.nbytes for _, before in pairs)))
    problems, hashed = check_manifest(mine.source, on_event)
    problems += _index_problems(mine)
    problems += _file_problems(mine)
    shared, found = _own_problems(mine)
    problems += found
    weights = list(mine.weights.values())
    tp, ep = parallel
    problems += parallel_problems(mine.checkpoint.config, weights, tp, ep=ep)
    notes = (*config_notes(mine.checkpoint, weights), *scale_notes(mine))
    notes += () if tp else tuple(parallel_notes(mine.checkpoint.config, weights))
    identical = 0
    errors: list[TensorError] = []
    far: list[str] = []
    scaled = 0
    equal: dict[str, int] = {}
    with ThreadPoolExecutor(default_workers()) as pool:
        if theirs is not None:
            notes += tuple(kt_source_notes(mine, theirs))
            far += _missing(mine, theirs)
            ours, method = is_ours(mine.source), method_of(mine.source)
            folded = method is not None and method.name in FOLDED
            outcomes = pool.map(lambda p: distance(mine, theirs, *p, count=True, signs=folded), pairs)
            rounded = ours and (method is None or method.name != GPTQ)
            for pair, outcome in zip(pairs, outcomes, strict=True):
                on_event(TensorDone(pair[0].name, pair[1].nbytes))
                identical += outcome is None
                if outcome is None:
                    continue
                found = _too_far(outcome, *pair, rounded=rounded)
                if found and folded and outcome.flips is not None:
                    scaled += 1
                    found = _flipped(outcome, pair[0])
                else:
                    errors.append(outcome)
                far += found
            notes += method_notes(method, scaled)
            problems = [*wrong_source(mine.source, theirs.source, far), *problems, *far]
        if reference is not None:
            compared = compare_reference(mine, theirs, reference, pool)
            equal = {str(reference): compared.equal}
            problems += compared.problems
            notes += compared.notes
    return Report(
        mine.source.name, tuple(problems), sum(len(s.tensors) for s in mine.checkpoint.shards.values()),
        sum(w.decoder is not None for w in weights), hashed, shared, identical, tuple(errors), equal, notes,
    )  # fmt: skip


def _own_problems(mine: Opened) -> tuple[int, list[str]]:
    """(fused units of NVFP4, sentences about what the config, the names, the shapes and the scales say together)."""
    weights = list(mine.weights.values())
    problems = [*alike(refusals(mine))]
    problems += config_problems(mine.checkpoint, weights, mine.runtime_scales, mine.refused)
    problems += structure_problems(mine)
    for config in quantization_configs(mine.checkpoint.config)[:1]:
        problems += companion_problems(config, mine)
    shared, scale_problems = check_scales(mine)
    problems += kt_problems(mine)
    return shared, [*problems, *scale_problems, *cache_problems(mine)]


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
    pairs = (("quant_algo", "quant_algo"), ("exclude_modules", "ignore"), ("quantized_layers", "quantized_layers"))
    for key, other in pairs:
        if said.get(key) != configs[0].get(other):
            yield f"{QUANT_CONFIG_FILE}: {key} differs from {other} of config.json; engines would load different models"
    if bool(said.get("kv_cache_quant_algo")) != announces_cache(configs[0]):
        yield f"{QUANT_CONFIG_FILE}: kv_cache_quant_algo differs from kv_cache_scheme of config.json"


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
    return as_converted(replace(theirs, weights=weights), mine)


def method_notes(method: Method | None, scaled: int) -> tuple[str, ...]:
    """Sentences about how weights were made, where that was more than rounding.

    scaled  weights that hold other numbers than the source's
    """
    if method is None:
        return ()
    found = (f"method, as mso_hub.json has it: {method.sentence}",)
    if not scaled:
        return found
    more = (
        f"{scaled:,} weights were multiplied by scales of {method.name}, which are kept nowhere: their numbers cannot "
        "be compared with the source's, and are not in the table; their signs can"
    )
    return (*found, more)


def _missing(mine: Opened, theirs: Opened) -> Iterator[str]:
    lost = [w for n, w in theirs.weights.items() if n not in mine.weights]
    for label, names in (
        ("weights of the source are missing", [w.name for w in lost if w.module not in mine.refused]),
        (
            "weights are not in the source",
            [n for n in mine.weights if n not in theirs.weights and module_of(n) not in mine.refused],
        ),
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


def distance(
    mine: Opened, theirs: Opened, now: Weight, before: Weight, *, count: bool = False, signs: bool = False
) -> TensorError | None:
    """Error of one weight, None when both are stored alike and their bytes are equal.

    count  count the strays too, and `signs` the flips
    """
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
        nmse, largest, strays, flips = _error(
            mine, theirs, now, before, ranges, count=count and can_count(now), signs=signs
        )
    except CheckpointError as damage:  # a scale that decodes to nothing: this weight's finding, not the end
        return TensorError(now.name, math.inf, math.inf, f"{stored}, {damage}")
    return TensorError(now.name, nmse, largest, stored, strays, flips)


def _error(
    mine: Opened,
    theirs: Opened,
    now: Weight,
    before: Weight,
    ranges: Sequence[tuple[int, int]],
    *,
    count: bool,
    signs: bool,
) -> tuple[float, float, int | None, int | None]:
    """(relative squared error, largest difference, strays, flips) of one weight against the source."""
    from mso_hub.formats.numerics.floats import widen

    error = energy = largest = 0.0
    strays = flips = 0
    with np.errstate(all="ignore"):  # a damaged scale may give infinities: they are the finding
        for rows in ranges:
            reference = _numbers(before, theirs.source.read, *rows)
            loaded = now.load(mine.source.read, *rows)
            values = widen(*now.values(loaded, *rows))
            difference = np.abs(values - reference)
            error += float(np.square(difference, dtype=np.float64).sum())
            energy += float(np.square(reference, dtype=np.float64).sum())
            largest = max(largest, float(difference.max(initial=0)))
            strays += count_strays(now, loaded, rows, values, difference, before.dtype) if count else 0
            flips += int(np.count_nonzero(values * reference < 0)) if signs else 0
    nmse = error / energy if energy > 0 else (0.0 if error == 0 else math.inf)
    return nmse, largest, strays if count else None, flips if signs else None


def plausible(weight: Weight) -> float:
    """NMSE that right rounding does not reach.

    An error is at most half a step of the integers, and at most the number itself. A step is the largest of the n
    numbers under a scale over (2**bits - 1) / 2 or less. So the worst NMSE is n / (n + (2**bits - 1)**2), where all
    numbers but one are half a step: 0.36 for INT4 in groups of 128, 0.95 for rows of 4096, 0.059 for INT8 there. The
    worst column of outliers comes to 0.14, 0.71 and 0.020, Student's t with 3 degrees of freedom to 0.05, 0.27 and
    0.002. Half a code less is assumed here, for the rounding of scales.
    """
    decoder = weight.decoder
    if decoder is None:
        return ROUNDED_LIMIT
    limit = PACKED_LIMIT.get(decoder.bits, 0.6)
    if not decoder.scheme.startswith("int") or "scale" not in weight.parts:
        return limit
    under, codes = math.prod(weight.shape) / math.prod(weight.parts["scale"].shape), (1 << decoder.bits) - 1.5
    return max(limit, under / (under + codes * codes))


def _flipped(error: TensorError, weight: Weight) -> list[str]:
    """A sentence for numbers with another sign than the source's: the scales of a method are positive."""
    if not error.flips:
        return []
    found = (
        f"{error.name}: {error.flips:,} of {math.prod(weight.shape):,} numbers do not have the sign of the source's "
        f"({error.stored}); it is damaged, or was made from something else"
    )
    return [found]


def _too_far(error: TensorError, weight: Weight, before: Weight, *, rounded: bool) -> list[str]:
    """A sentence for an error that is too large, or for numbers that are not where rounding puts them.

    rounded  this tool made the checkpoint
    """
    if error.max_abs < NOTHING.get(before.dtype, 1e-30) and not math.isnan(error.nmse):
        return []
    limit, numbers = plausible(weight), math.prod(weight.shape)
    if not error.nmse <= limit:
        return [
            f"{error.name}: relative squared error {error.nmse:.3g} ({error.stored}), at most {limit:.3g} is plausible"
        ]
    strays = error.strays or 0
    if strays <= (0 if rounded else STRAYS * numbers):
        return []
    found = (
        f"{error.name}: {strays:,} of {numbers:,} numbers do not have the code nearest to the source's "
        f"({error.stored}); it is damaged, or was made from something else"
    )
    return [found]
