"""What vLLM's own loaders said, as the plugin reports it: JSON -> ShapeReport, read strictly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mso_hub.errors import SmokeError
from mso_hub.smoke.strict import entries, load, number, text, typed, whole_numbers


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that a rank does not load as it is stored.

    kind       config, create, load, missing, partial, unread, ignored, cast, broadcast or empty
    tensor     its name in the checkpoint, or the one that should have been there; "" where none is meant
    parameter  of vLLM's model, "" where none is meant
    ranks      that found it
    message    one sentence for a person, with the way out where there is one
    """

    kind: str
    tensor: str
    parameter: str
    ranks: tuple[int, ...]
    expected: str
    found: str
    message: str


@dataclass(frozen=True, slots=True)
class World:
    """All ranks at one tensor-parallel size.

    rank_bytes  bytes of the parameters of each rank
    """

    tp: int
    pp: int
    ep: bool
    seconds: float
    rank_bytes: tuple[int, ...]
    problems: tuple[Problem, ...]

    @property
    def label(self) -> str:
        """`tp 2`, `tp 2, pp 2`."""
        return f"tp {self.tp}" + (f", pp {self.pp}" if self.pp > 1 else "") + (", ep" if self.ep else "")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why nothing could be checked at all.

    kind  version, architecture, remote_code, heads or config
    """

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class ShapeReport:
    """Does a checkpoint load in vLLM, tensor by tensor, at every tensor-parallel size that was asked for?

    name      of the checkpoint; `tensors` is how many it has, none of which was read
    python    the Python that has this vLLM and this torch
    peak_rss  bytes of memory that the check took
    """

    name: str
    tensors: int
    python: str
    vllm: str
    torch: str
    architecture: str
    seconds: float
    peak_rss: int
    worlds: tuple[World, ...]
    refused: Refusal | None

    @property
    def ok(self) -> bool:
        """Was everything checked, and is nothing wrong?"""
        return self.refused is None and not self.problems

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Those of all worlds."""
        return tuple(problem for world in self.worlds for problem in world.problems)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"ok": self.ok, **asdict(self)}


def read_shape_report(data: bytes, name: str, tensors: int, python: str, sizes: Sequence[int]) -> ShapeReport:
    """The plugin's report of one checkpoint; SmokeError for anything that it would not have written.

    sizes  tensor-parallel sizes that were asked for: a report without all of them is none
    """
    content = load(data)
    try:
        found = entries(content, "report", "vllm torch architecture seconds peak_rss worlds refused")
        refused = found["refused"]
        report = ShapeReport(
            name, tensors, python, text(found, "vllm"), text(found, "torch"), text(found, "architecture"),
            number(found, "seconds"), typed(found, "peak_rss", int),
            tuple(map(_world, typed(found, "worlds", list))), None if refused is None else _refusal(refused),
        )  # fmt: skip
    except ValueError as error:
        raise SmokeError(f"the report of {python} cannot be used: {error}") from error
    worlds = [world.tp for world in report.worlds]
    if refused is None and worlds != list(sizes):
        raise SmokeError(f"the report of {python} cannot be used: it has the sizes {worlds}, not {list(sizes)}")
    return report


def _world(value: Any) -> World:
    found = entries(value, "world", "tp pp ep seconds rank_bytes problems")
    return World(
        typed(found, "tp", int), typed(found, "pp", int), typed(found, "ep", bool), number(found, "seconds"),
        whole_numbers(found, "rank_bytes"), tuple(map(_problem, typed(found, "problems", list))),
    )  # fmt: skip


def _problem(value: Any) -> Problem:
    found = entries(value, "problem", "kind tensor parameter ranks expected found message")
    texts = {key: text(found, key) for key in found if key != "ranks"}
    return Problem(ranks=whole_numbers(found, "ranks"), **texts)


def _refusal(value: Any) -> Refusal:
    found = entries(value, "refused", "kind message")
    return Refusal(text(found, "kind"), text(found, "message"))
