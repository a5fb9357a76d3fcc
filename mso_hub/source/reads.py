"""What a run announces to its source: which bytes it will read, in which order, so that a distant one reads ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Range = tuple[str, int, int]
"""(file, begin, end): bytes [begin, end) of a file of the repo."""


@dataclass(frozen=True, slots=True)
class Job:
    """The reads behind one output shard.

    name   the shard's path; jobs are worked on one after another, in the order in which they are announced
    reads  every `Source.read` that the job will make, in about that order (threads may swap neighbours); a range that
           is read twice is listed twice. Called once, when its turn comes: the list may be long.
    """

    name: str
    reads: Callable[[], Sequence[Range]]
