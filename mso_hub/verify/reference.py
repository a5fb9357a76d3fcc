"""Byte for byte: against another checkpoint, or against ModelOpt's own quantizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mso_hub.checkpoint import Array, TensorInfo
from mso_hub.errors import VerifyError
from mso_hub.formats import FORMATS
from mso_hub.formats.decoders.nvfp4 import Nvfp4Decoder
from mso_hub.formats.nvfp4 import POWER
from mso_hub.formats.weight import Reader, Weight
from mso_hub.plan.fusion import units
from mso_hub.source import Source, open_source, read_checkpoint
from mso_hub.verify.opened import Opened

CHUNK = 8 << 20
MODELOPT = "absmax"
SEARCHES = tuple(search for search in FORMATS["nvfp4"].choices.searches if search != MODELOPT)
"""Ways to choose scales that are not ModelOpt's."""


@dataclass(frozen=True, slots=True)
class Compared:
    """What a comparison byte by byte found.

    equal     tensors, or weights, that are equal
    problems  one sentence each
    notes     sentences about what was not compared
    """

    equal: int
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()


def compare_reference(mine: Opened, theirs: Opened | None, reference: str | Path, pool: ThreadPoolExecutor) -> Compared:
    """With "modelopt" every NVFP4 weight, computed anew from the source `theirs`; else every tensor of a checkpoint."""
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
    return Compared(len(both) - len(different), (*problems, *different))


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


def _compare_modelopt(mine: Opened, theirs: Opened) -> Compared:
    """Codes and block scales against NVFP4QTensor.quantize, one fused unit after the other."""
    from mso_hub.formats.numerics import floats

    packed = {
        w.module: w for w in mine.weights.values() if isinstance(w.decoder, Nvfp4Decoder) and w.name in theirs.weights
    }
    others = sum(w.decoder is not None for w in mine.weights.values()) - len(packed)
    if not packed:
        raise VerifyError(
            f"--reference modelopt recomputes NVFP4 weights, and {mine.source.name} shares none with the source "
            f"({others:,} packed weights in all); leave it out, --source alone measures their error"
        )
    shared = units(packed)
    alone = packed.keys() - {m for members in shared.values() for m in members}
    nearest: Counter[str] = Counter()
    problems: list[str] = []
    for members in [*shared.values(), *((m,) for m in sorted(alone))]:
        originals = [theirs.weights[packed[m].name] for m in members]
        values = [_whole(w, theirs.source.read) for w in originals]
        searches = (POWER, *SEARCHES) if all(_is_mxfp4(w) for w in originals) else SEARCHES
        amax = max(floats.amax(v, dtype) for v, dtype in values)
        for module, value in zip(members, values, strict=True):
            stored = packed[module].load(mine.source.read, 0, len(value[0]))
            search, wrong = _nearest(stored, value, amax, searches)
            if wrong:
                whose = "ModelOpt's" if search == MODELOPT else f"what --scale_search {search} gives in"
                problems.append(f"{module}: {wrong:,} bytes differ from {whose} codes and scales")
            else:
                nearest[search] += 1
    equal = nearest.pop(MODELOPT, 0)
    notes = [f"{others:,} packed weights are not NVFP4 and were not compared with ModelOpt"] if others else []
    return Compared(equal, (*(_searched(*found) for found in nearest.items()), *problems), tuple(notes))


def _is_mxfp4(weight: Weight) -> bool:
    return weight.decoder is not None and weight.decoder.scheme == "mxfp4"


def _nearest(
    stored: Mapping[str, Array], value: tuple[Array, str], amax: float, searches: Sequence[str]
) -> tuple[str, int]:
    """Whose codes and block scales the stored ones are, or are nearest to, and how many bytes differ from them."""
    from mso_hub.formats.numerics import modelopt, nvfp4

    def wrong(made: tuple[Array, Array]) -> int:
        pairs = zip((stored["codes"], stored["scale"]), made, strict=True)
        return sum(int(np.count_nonzero(ours != theirs)) for ours, theirs in pairs)

    found = {MODELOPT: wrong(modelopt.encode(*value, nvfp4.global_scale(amax)))}
    for search in searches if found[MODELOPT] else ():
        found[search] = wrong(nvfp4.encode(*value, nvfp4.global_scale(amax, search=search), search=search))
    best = min(found, key=lambda name: found[name])
    return best, found[best]


def _searched(search: str, count: int) -> str:
    if search == POWER:
        return f"{count:,} NVFP4 weights were MXFP4 and have exact powers of two as scales, which are not ModelOpt's"
    return (
        f"{count:,} NVFP4 weights have searched scales (--scale_search {search}), so their bytes are not ModelOpt's; "
        "--scale_search absmax gives those"
    )


def _whole(weight: Weight, read: Reader) -> tuple[Array, str]:
    rows = weight.shape[0]
    return weight.values(weight.load(read, 0, rows), 0, rows)
