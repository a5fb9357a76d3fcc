"""What a run will take: measured on a few MB of the checkpoint itself, on this machine, just before it is told.

Every kind of work (format, and how the source stores the weight) is done to one small block: read, decode, encode.
What cannot be measured without writing, the output's disk or network, is not part of the number, and is said so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mso_hub.checkpoint import Array
from mso_hub.engine import ThreadEngine
from mso_hub.formats import Format
from mso_hub.formats.weight import Weight
from mso_hub.plan import Plan, Step
from mso_hub.source import Source

BLOCK = 2 << 20
"""Bytes of numbers of a sample; a few hold what a thread does in a run."""
KINDS = 4
"""Kinds of work that are measured; those with fewer bytes count with the slowest of them."""
ROUNDS = 3
STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class Estimate:
    """What was measured and what follows for the whole run.

    sampled  source bytes that were read for it
    read     seconds to read all weights at the speed of the samples
    encode   seconds to decode and encode them on all threads
    threads  how many
    budget   bytes of weights held in memory at once: the engine's budget, or the largest unit where that is kept whole
    now      bytes that this Python holds already; 0 where the system does not tell
    """

    sampled: int
    read: float
    encode: float
    threads: int
    budget: int
    now: int


def resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not tell."""
    try:
        lines = STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:")), 0)


def measure(plan: Plan, source: Source, engine: ThreadEngine) -> Estimate:
    """Read and encode one block of each kind of work; nothing is written."""
    kinds: dict[tuple[Format | None, str, str], list[Step]] = {}
    for step in (step for shard in plan.shards for step in shard.steps):
        decoder = step.weight.decoder
        kinds.setdefault((step.format, decoder.name if decoder else "", step.weight.dtype), []).append(step)
    found = sorted(kinds.values(), key=lambda steps: -sum(s.weight.nbytes for s in steps))
    working = [steps for steps in found if steps[0].changes]
    sampled, spent, rates = 0, 0.0, []
    for steps in working[:KINDS] or found[:1]:
        step = max(steps, key=lambda s: s.weight.nbytes)
        rows = step.weight.blocks(BLOCK, step.row_step)[0]
        began = time.perf_counter()
        loaded = step.weight.load(source.read, *rows)
        spent += time.perf_counter() - began
        nbytes = sum(part.nbytes for part in loaded.values())
        sampled += nbytes
        if step.changes:
            rates.append((nbytes / _seconds(step, loaded, rows, engine), steps))
    slowest = min((rate for rate, _ in rates), default=0.0)
    encode = sum(_bytes(steps) / rate for rate, steps in rates)
    encode += sum(_bytes(steps) / slowest for steps in working[KINDS:])
    return Estimate(
        sampled, plan.read_bytes * spent / max(1, sampled), encode, engine.workers, _budget(plan, source, engine),
        resident(),
    )  # fmt: skip


def _bytes(steps: Sequence[Step]) -> int:
    return sum(step.weight.nbytes for step in steps)


def _seconds(step: Step, loaded: dict[str, Array], rows: tuple[int, int], engine: ThreadEngine) -> float:
    """Seconds that a block takes when all threads are at it; the first round, which compiles, does not count."""
    work = _work(step, loaded, rows, engine)
    work()
    with ThreadPoolExecutor(engine.workers) as pool:
        best = float("inf")
        for _ in range(ROUNDS):
            began = time.perf_counter()
            for done in [pool.submit(work) for _ in range(engine.workers)]:
                done.result()
            best = min(best, (time.perf_counter() - began) / engine.workers)
    return best


def _work(step: Step, loaded: dict[str, Array], rows: tuple[int, int], engine: ThreadEngine) -> Callable[[], object]:
    """What a run does to a block between reading and writing."""
    from mso_hub.formats.numerics import floats

    weight, form = step.weight, step.format
    if form is None:
        return lambda: weight.decoder.decode(loaded, *rows, weight.dtype) if weight.decoder else None

    def encode() -> object:
        """Largest magnitude, then codes and scales."""
        values, dtype = weight.values(loaded, *rows)
        return engine.encode(form, values, dtype, step.dense, floats.amax(values, dtype))

    return encode


def _budget(plan: Plan, source: Source, engine: ThreadEngine) -> int:
    """The engine's budget, or the largest unit that is kept whole because reading it again would cost a download."""
    largest = max((sum(map(_numbers, members)) for members in plan.units.values()), default=0)
    return max(engine.memory, largest) if source.distant else engine.memory


def _numbers(weight: Weight) -> int:
    return weight.number_bytes
