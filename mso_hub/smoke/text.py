"""A ShapeReport as plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mso_hub.plan.summary import size
from mso_hub.smoke.report import Problem, ShapeReport, World

_NUMBER = re.compile(r"[0-9][0-9,]*")


def shape_text(report: ShapeReport) -> str:
    """What `mso-hub smoke` prints: a line for each world, then every problem of each."""
    about = ", ".join(filter(None, [report.architecture, f"{report.tensors:,} tensors"]))
    head = f"{report.name}: {about}, asked vLLM {report.vllm} in {report.seconds:.0f} s"
    if report.refused is not None:
        return f"{head}\nPROBLEM {report.refused.message}"
    rows = [(world.label, _weight(world.rank_bytes), _verdict(world)) for world in report.worlds]
    label, weight = (max((len(row[at]) for row in rows), default=0) for at in (0, 1))
    lines = [f"{row[0]:<{label}}  {row[1]:<{weight}}  {row[2]}" for row in rows]
    found = list(_problems(report))
    return "\n".join([head, *lines, *([""] if found else []), *found])


def first_problems(report: ShapeReport, most: int) -> list[str]:
    """A refusal, or one line for each problem, at most so many, and how many there are more."""
    if report.refused is not None:
        return [report.refused.message]
    found = [f"{world.label}: {problem.message}" for world in report.worlds for problem in world.problems]
    return found[:most] + ([f"and {len(found) - most} more"] if len(found) > most else [])


def _verdict(world: World) -> str:
    count = len(world.problems)
    return "ok" if not count else f"{count} problem{'s' * (count > 1)}"


def _weight(rank_bytes: Sequence[int]) -> str:
    """`1.2 GB a rank`, or from the lightest to the heaviest; nothing where none was made."""
    if not rank_bytes:
        return ""
    low, high = size(min(rank_bytes)), size(max(rank_bytes))
    return f"{high} a rank" if low == high else f"{low} to {high} a rank"


def _problems(report: ShapeReport) -> Iterator[str]:
    """Every kind of problem once: of those that differ in numbers alone, the first, and how many are like it."""
    alike: dict[tuple[str, str, str], list[tuple[World, Problem]]] = {}
    for world in report.worlds:
        for problem in world.problems:
            key = (problem.kind, _NUMBER.sub("N", problem.tensor or problem.parameter), _NUMBER.sub("N", problem.found))
            alike.setdefault(key, []).append((world, problem))
    for group in alike.values():
        yield from _problem(*group[0])
        if len(group) > 1:
            labels = ", ".join(dict.fromkeys(world.label for world, _ in group))
            yield f"    and {len(group) - 1:,} more like it, of {labels} (all of them: --json)"


def _problem(world: World, problem: Problem) -> Iterator[str]:
    """Tensor, ranks, expected, found, and the sentence."""
    yield f"PROBLEM {world.label}{_ranks(problem.ranks)}: {problem.tensor or problem.parameter or problem.kind}"
    if problem.expected or problem.found:
        yield f"    expected {problem.expected}, found {problem.found}"
    yield f"    {problem.message}"


def _ranks(ranks: Sequence[int]) -> str:
    """`, rank 0`, `, ranks 0-3`, `, ranks 0 2`."""
    if not ranks:
        return ""
    if len(ranks) == 1:
        return f", rank {ranks[0]}"
    whole = list(ranks) == list(range(ranks[0], ranks[-1] + 1))
    return ", ranks " + (f"{ranks[0]}-{ranks[-1]}" if whole else " ".join(map(str, ranks)))
