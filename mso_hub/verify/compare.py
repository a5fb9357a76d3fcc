"""Two checkpoints side by side: distributions of their scales, distance of their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from mso_hub.engine.threads import default_workers
from mso_hub.errors import VerifyError
from mso_hub.events import CheckReady, Listener, TensorDone, ignore
from mso_hub.formats.decoders.nvfp4 import Nvfp4Decoder
from mso_hub.formats.weight import read_rows
from mso_hub.verify.opened import Opened, opening
from mso_hub.verify.report import TensorError, plain
from mso_hub.verify.run import distance, like
from mso_hub.verify.scales import global_scale

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Result of compare_checkpoints.

    names      the two checkpoints
    common     weights in both; `only` those in one of them, per checkpoint
    identical  common weights stored alike with equal bytes
    errors     distance of the others, relative to the first
    scales     per checkpoint: quantiles 0, 5, 50, 95, 100 % of global scales (as multipliers) and of block scales
    """

    names: tuple[str, str]
    common: int
    only: tuple[tuple[str, ...], tuple[str, ...]]
    identical: int
    errors: tuple[TensorError, ...]
    scales: tuple[Mapping[str, tuple[float, ...]], Mapping[str, tuple[float, ...]]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; a number that is not finite is null there."""
        return cast("dict[str, Any]", plain(asdict(self)))


def _scale_quantiles(opened: Opened) -> dict[str, tuple[float, ...]]:
    from mso_hub.formats.numerics.floats import E4M3

    multipliers: list[float] = []
    counts = np.zeros(256, np.int64)
    for weight in opened.weights.values():
        if isinstance(weight.decoder, Nvfp4Decoder):
            scale = global_scale(opened, weight)
            if 0 < scale < math.inf:
                multipliers.append(scale if weight.decoder.layout == "modelopt" else 1 / scale)
            counts += np.bincount(read_rows(opened.source.read, weight.parts["scale"]).reshape(-1), minlength=256)
    if not multipliers:
        return {}
    order = np.argsort(E4M3[:127])
    cumulative = np.cumsum(counts[order])
    at = [min(int(np.searchsorted(cumulative, q * cumulative[-1])), 126) for q in QUANTILES[1:]]
    first = int(np.flatnonzero(counts[order])[0]) if counts[:127].any() else 0
    return {
        "global": tuple(float(q) for q in np.quantile(multipliers, QUANTILES)),
        "block": tuple(float(E4M3[order[i]]) for i in [first, *at]),
    }


def compare_checkpoints(first: str | Path, second: str | Path, *, on_event: Listener = ignore) -> Comparison:
    """Compare every weight that two checkpoints share, whatever their formats; VerifyError when they share none."""
    with opening(first, on_event) as a, opening(second, on_event) as b:
        return _compare((str(first), str(second)), like(a, b), like(b, a), on_event)


def _compare(names: tuple[str, str], a: Opened, b: Opened, on_event: Listener) -> Comparison:
    common = [n for n in a.weights if n in b.weights]
    if not common:
        raise VerifyError(
            f"{names[0]} and {names[1]}: share none of their {len(a.weights)} and {len(b.weights)} weights"
        )
    on_event(CheckReady(0, sum(b.weights[name].nbytes for name in common)))
    with ThreadPoolExecutor(default_workers()) as pool:
        outcomes = []
        for name, outcome in zip(
            common, pool.map(lambda n: distance(b, a, b.weights[n], a.weights[n]), common), strict=True
        ):
            outcomes.append(outcome)
            on_event(TensorDone(name, b.weights[name].nbytes))
    errors = tuple(
        sorted((e for e in outcomes if e is not None), key=lambda e: -math.inf if math.isnan(e.nmse) else -e.nmse)
    )
    return Comparison(
        names,
        len(common),
        (
            tuple(n for n in a.weights if n not in b.weights),
            tuple(n for n in b.weights if n not in a.weights),
        ),
        len(common) - len(errors),
        errors,
        (_scale_quantiles(a), _scale_quantiles(b)),
    )
