"""What encoding did, noted shard by shard, so that a resumed run knows it of every shard that it keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing

from mso_hub.engine.distance import Distance
from mso_hub.engine.threads import Piece
from mso_hub.formats.nvfp4 import GROUP_SIZE, POWER, Nvfp4
from mso_hub.plan import Plan, ShardPlan, Step
from mso_hub.plan.summary import kind_of

QUALITIES = ("count", "sum", "worst")
"""What is noted of weights of one kind and format: how many, and the sum and the largest of their NMSE."""
PARTS = ("error", "energy", "largest")
"""What is noted of one weight: fields of Distance."""


def note_errors(
    pieces: Generator[Piece, None, None], note: Callable[[str, float], None], *, each: bool = False
) -> Generator[Piece, None, None]:
    """Pass pieces on; when a shard is about to be complete, note the errors of its weights by kind and format.

    each  note them weight by weight too
    What was MXFP4 and becomes NVFP4 is noted with the number of blocks that are not exact.
    """
    found: dict[str, Distance] = {}
    with closing(pieces):
        for piece in pieces:
            name = piece.step.weight.name
            if piece.distance is not None:
                found[name] = found[name] + piece.distance if name in found else piece.distance
            if piece.done and piece.step is piece.shard.steps[-1]:
                for key, value in _notes(piece.shard, found, each=each):
                    note(key, value)
                found.clear()
            yield piece


def _notes(shard: ShardPlan, found: Mapping[str, Distance], *, each: bool) -> Iterator[tuple[str, float]]:
    kinds: dict[tuple[str, str], list[float]] = {}
    for step in shard.steps:
        if step.format is not None and step.weight.name in found:
            key = kind_of(step.weight.module), step.format.name
            kinds.setdefault(key, []).append(found[step.weight.name].nmse)
    for key, errors in kinds.items():
        for quality, value in zip(QUALITIES, (len(errors), math.fsum(errors), max(errors)), strict=True):
            yield json.dumps(["error", shard.name, *key, quality]), value
    powers = [found[step.weight.name].inexact for step in shard.steps if keeps_powers(step)]
    if powers:
        yield json.dumps(["inexact", shard.name]), sum(powers)
    for name, distance in found.items() if each else ():
        for part, value in zip(PARTS, (distance.error, distance.energy, distance.largest), strict=True):
            yield json.dumps(["weight", shard.name, name, part]), value


def keeps_powers(step: Step) -> bool:
    """Was the weight MXFP4, and becomes NVFP4 with scales that lose nothing where that is possible?"""
    return isinstance(step.format, Nvfp4) and step.format.search == POWER


def noted_errors(notes: Mapping[str, float]) -> dict[tuple[str, str], tuple[int, float, float]]:
    """(Kind, format) -> (weights, mean, worst) over all shards, whatever their order; other notes are skipped."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for key, value in notes.items():
        match _parsed(key):
            case ["error", str(), str(kind), str(form), str(quality)] if quality in QUALITIES:
                found.setdefault((kind, form), {quality: [] for quality in QUALITIES})[quality].append(value)
    return {
        kind: (int(sum(row["count"])), math.fsum(row["sum"]) / max(1.0, sum(row["count"])), max(row["worst"]))
        for kind, row in found.items()
        if row["worst"]
    }


def noted_distances(notes: Mapping[str, float]) -> dict[tuple[str, str], Distance]:
    """(Shard, weight) -> what encoding did to it, of those that were noted one by one; other notes are skipped."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for key, value in notes.items():
        match _parsed(key):
            case ["weight", str(shard), str(name), str(part)]:
                found.setdefault((shard, name), {})[part] = value
    return {
        key: Distance(row["error"], row["energy"], row["largest"])
        for key, row in found.items()
        if row.keys() == set(PARTS)
    }


def noted_inexact(plan: Plan, notes: Mapping[str, float]) -> tuple[int, int] | None:
    """(Blocks of 16 that are not exact, all blocks) of what was MXFP4 and is NVFP4 now; None where it was not noted."""
    shards = {shard.name: [step.weight.shape for step in shard.steps if keeps_powers(step)] for shard in plan.shards}
    counts = [notes.get(json.dumps(["inexact", name])) for name, shapes in shards.items() if shapes]
    known = [int(count) for count in counts if count is not None]
    if not known or len(known) < len(counts):
        return None
    return sum(known), sum(math.prod(shape) for shapes in shards.values() for shape in shapes) // GROUP_SIZE


def exactness(counted: tuple[int, int] | None) -> str:
    """A clause about blocks that are not exact, "" where nothing was counted."""
    if counted is None:
        return ""
    return f"{counted[0]:,} of {counted[1]:,} blocks were not exact" + ("" if counted[0] else ", nothing was lost")


def _parsed(key: str) -> object:
    """The key of a note of ours, None for any other: the name of a unit may look like one."""
    try:
        return json.loads(key) if key.startswith('["') else None
    except ValueError:
        return None
