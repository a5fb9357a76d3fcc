"""Statistics for tests, with numbers that are easy to recognise, and text that needs no tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from mso_hub.calibrate.identity import fingerprint, named
from mso_hub.calibrate.statistics import Provenance, Statistics, write_statistics
from mso_hub.calibrate.text import Rows
from mso_hub.calibrate.text.rows import digest
from mso_hub.source import open_source, read_checkpoint

TOKENS = 100


def made_from(source: str | Path) -> Provenance:
    """As a calibration of this very checkpoint would say it."""
    with closing(open_source(source)) as opened:
        checkpoint = read_checkpoint(opened)
        return Provenance(
            *named(opened), checkpoint.identity, fingerprint(opened, checkpoint), "a text", 4, 4 * TOKENS, "5" * 64,
            "BF16", "settings", 2, "0.1", "2.13", "5.23",
        )  # fmt: skip


def some_amax(source: str | Path) -> dict[str, float]:
    """Every matrix below the layers -> a power of two times 1 to 7, another one for the next module."""
    with closing(open_source(source)) as opened:
        names = sorted(
            n for group in read_checkpoint(opened).groups for n, t in group.tensors.items() if len(t.shape) > 1
        )
    modules = [name.removesuffix(".weight") for name in names if ".layers." in name]
    return {module: (1 + at % 7) * 2.0 ** (at % 5) for at, module in enumerate(modules)}


def write_some(
    path: Path, source: str | Path, amax: Mapping[str, float] | None = None, *,
    caches: Mapping[str, tuple[float, float]] | None = None, **changed: object,
) -> Path:  # fmt: skip
    """A file of statistics: modules with an amax of 0 saw nothing; `changed` are other fields of its provenance."""
    found = dict(some_amax(source) if amax is None else amax)
    made = replace(made_from(source), **changed)  # type: ignore[arg-type]
    tokens = {module: TOKENS if value else 0 for module, value in found.items()}
    write_statistics(path, Statistics(made, found, tokens, caches or {}))
    return path


def rows_of(rows: int, length: int, vocabulary: int = 96, *, batch_size: int = 2, seed: int = 0) -> Rows:
    """Random token ids as a text."""
    numbers = np.random.default_rng(seed)
    found = tuple(numbers.integers(0, vocabulary, length) for _ in range(rows))
    return Rows("random ids", found, digest(found), (), (), batch_size)
