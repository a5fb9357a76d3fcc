"""What verify found."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class TensorError:
    """Distance of one weight from the source, both as numbers.

    nmse     sum of squared differences / sum of squares of the source; 0 when both are zero
    max_abs  largest |difference|
    stored   how the weight is stored now
    strays   numbers that are not stored as the code nearest to the source's; None where that is not known
    flips    numbers with another sign than the source's; None where they were not compared
    """

    name: str
    nmse: float
    max_abs: float
    stored: str
    strays: int | None = None
    flips: int | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """Result of verify_checkpoint.

    where      the checkpoint
    problems   one sentence each; empty means that it passed
    tensors    stored tensors
    packed     weights stored packed
    hashed     files whose SHA-256 equals the manifest's
    units      fused units with two packed members or more, all of one global scale unless problems say otherwise
    identical  weights stored as in the source, byte for byte
    errors     distance of every weight that changed
    reference  what it was compared with byte by byte -> number of equal tensors
    notes      sentences about what could not be checked
    """

    where: str
    problems: tuple[str, ...]
    tensors: int
    packed: int
    hashed: int
    units: int
    identical: int = 0
    errors: tuple[TensorError, ...] = ()
    reference: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """For JSON; a number that is not finite is null there."""
        return {"ok": self.ok, **plain(asdict(self))}


def alike(sentences: Mapping[str, str]) -> Iterator[str]:
    """Sentences about modules, one for all that differ in their names and numbers only.

    sentences  module -> its sentence
    """
    kinds: dict[str, list[str]] = {}
    for module, sentence in sentences.items():
        words = sentence.replace(module, "").replace(module.rpartition(".")[2], "")
        kinds.setdefault(re.sub(r"-?\d+", "", words), []).append(sentence)
    for same in kinds.values():
        yield same[0] + (f" (and {len(same) - 1:,} more weights like it)" if len(same) > 1 else "")


def plain(value: Any) -> Any:
    """The value without NaN and Inf, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
