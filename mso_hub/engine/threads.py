"""Threads over row blocks: reading, arithmetic and writing overlap, memory stays under a budget.

    look ahead:  load the blocks of the next units and take their amax      (bounded by `memory`)
    encode:      blocks of the units whose amax is known                    (a few per thread in flight)
    hand out:    finished pieces in plan order

The kernels, reads and writes release the GIL. Blocks are cut by size alone and every block is computed on its own,
so the number of threads never shows in the bytes.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TypeVar

import numpy as np

from mso_hub.checkpoint import Array, TensorInfo
from mso_hub.engine.distance import WHOLE, Distance, distance
from mso_hub.errors import CheckpointError, MsoError, NonFiniteError, PlanError
from mso_hub.formats.device import CPU, encoder, require_kernels
from mso_hub.formats.nvfp4 import POWER, Nvfp4
from mso_hub.formats.weight import Reader, Weight
from mso_hub.plan import Plan, ShardPlan, Step
from mso_hub.source.reads import Range

BLOCK = 8 << 20
"""Bytes of numbers per row block at most: large enough for the kernels, small against the budget."""
LEAST_BLOCK = 256 << 10
"""The same at least, whatever the budget: below it calls cost more than arithmetic."""

MEMORY = 448 << 20
"""Default budget in bytes; half of it just holds gate_proj and up_proj of an 8B model."""

_NOTHING: Array = np.empty(0)

Block = tuple[int, int]
Item = TypeVar("Item")
Result = TypeVar("Result")


_Encoded = tuple[tuple[Array, ...], Distance | None]


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of one output tensor, to be appended to what came before.

    done      marks the step's last piece
    distance  of this block of an encoded step, where the run measures it
    """

    shard: ShardPlan
    step: Step
    info: TensorInfo
    data: Array
    done: bool = False
    distance: Distance | None = None


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A step's blocks in memory, or (values None) only the promise to read them again."""

    step: Step
    blocks: Sequence[Block]
    amax: float
    values: list[tuple[Array, str]] | None


def default_workers() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _largest(amaxes: Iterable[float]) -> float:
    """Maximum that is infinite as soon as one value is NaN or Inf (`max` may lose a NaN)."""
    found = list(amaxes)
    return max(found, default=0.0) if all(amax < float("inf") for amax in found) else float("inf")


def _until_error(items: Iterable[Item], failed: list[Exception]) -> Iterator[Item]:
    """Items up to an error, which waits in `failed`: looking ahead must not cost the blocks that came before."""
    try:
        yield from items
    except (MsoError, OSError) as error:
        failed.append(error)


class ThreadEngine:
    """Runs shard plans on this machine's processors.

    workers  threads
    memory   bytes of numbers held at once; a unit above half of it is read twice instead of kept
    device   where blocks are encoded: cpu, or cuda:N with the same bytes; RecipeError where there is none
    """

    def __init__(self, workers: int | None = None, memory: int = MEMORY, device: str = CPU) -> None:
        self.workers = workers or default_workers()
        self.memory = memory
        self.device = CPU if device == "auto" else device
        self.encode = encoder(device)

    def run(
        self, plan: Plan, shards: Iterable[ShardPlan], read: Reader, notes: MutableMapping[str, float], *,
        apart: Reader | None = None, once: bool = False, measure: int = 0,
        abort: Callable[[], None] = lambda: None,
    ) -> Generator[Piece, None, None]:  # fmt: skip
        """All pieces of the shards, shard by shard, each output tensor front to back.

        read     Source.read
        apart    Source.read_apart, for members of a unit that lie in other shards; `read` by default
        notes    `unit: weight` -> amax, where members lie in several shards: for the other shards and a resumed run
        once     keep every unit in memory, also one above half the budget: reading it again would cost a download
        measure  pieces tell what encoding did to so many numbers of each weight
        abort    called when the run ends early, before its threads are waited for: they may wait for the network
        Raises NonFiniteError for NaN or Inf in a weight that is encoded or decoded.
        """
        require_kernels(plan.formats.values(), self.device)
        with ThreadPoolExecutor(self.workers, thread_name_prefix="mso") as pool:
            run = _Run(plan, read, apart or read, notes, pool, self, once=once, measure=measure)
            try:
                yield from run.pieces(shards)
            except BaseException:
                abort()
                raise
            finally:
                pool.shutdown(cancel_futures=True)

    @property
    def block(self) -> int:
        """Bytes of numbers per row block."""
        return min(BLOCK, max(LEAST_BLOCK, self.memory // (8 * self.workers)))

    def keeps(self, steps: Sequence[Step], *, once: bool) -> bool:
        """Do the numbers of a unit stay in memory between its amax and its encoding?"""
        size = sum(step.weight.number_bytes for step in steps)
        return steps[0].unit is not None and (once or size <= self.memory // 2)

    def reads(self, shard: ShardPlan, *, once: bool = False) -> list[Range]:
        """Every read that `run` makes for a shard, in its order; amax of members in other shards comes on top."""
        found: list[Range] = []
        for steps in _runs(shard):
            passes = 1 if steps[0].unit is None or self.keeps(steps, once=once) else 2
            for step in list(steps) * passes:
                found += (
                    r for block in step.weight.blocks(self.block, step.row_step) for r in step.weight.ranges(*block)
                )
        return found


def _runs(shard: ShardPlan) -> list[list[Step]]:
    """Steps of a shard, members of a unit together."""
    return [list(steps) for _, steps in groupby(shard.steps, key=lambda s: s.unit or s.weight.name)]


class _Run:
    def __init__(
        self, plan: Plan, read: Reader, apart: Reader, notes: MutableMapping[str, float], pool: ThreadPoolExecutor,
        engine: ThreadEngine, *, once: bool, measure: int,
    ) -> None:  # fmt: skip
        self._plan, self._read, self._notes, self._pool, self._engine = plan, read, notes, pool, engine
        self._apart, self._memory, self._once, self._measure = apart, engine.memory, once, measure
        self._width = 2 * engine.workers + 1
        self._block = engine.block

    def pieces(self, shards: Iterable[ShardPlan]) -> Iterator[Piece]:
        """Encoded pieces in order; a few blocks stay queued so that no thread waits for the consumer."""
        pending: deque[tuple[ShardPlan, Step, bool, float, Future[_Encoded]]] = deque()
        failed: list[Exception] = []
        for shard, loaded in _until_error(self._ahead(shards), failed):
            for at, block in enumerate(loaded.blocks):
                values = loaded.values[at] if loaded.values is not None else None
                if loaded.values is not None:
                    loaded.values[at] = (_NOTHING, "")  # the task owns the block now: memory goes when it is done
                future = self._pool.submit(self._finish, loaded.step, block, values, loaded.amax)
                last = at + 1 == len(loaded.blocks)
                pending.append((shard, loaded.step, last, loaded.amax, future))
                while len(pending) > self._width or (pending and pending[0][4].done()):
                    yield from self._hand_out(*pending.popleft())
        while pending:
            yield from self._hand_out(*pending.popleft())
        if failed:
            raise failed[0]

    def _hand_out(
        self, shard: ShardPlan, step: Step, last: bool, amax: float, future: Future[_Encoded]
    ) -> Iterator[Piece]:
        arrays, distance = future.result()
        scalars: tuple[Array, ...] = ()
        if step.scale_of is not None:
            self._check_copied(step, arrays[0])
        if last:
            scalars = step.format.scalars(step.weight.shape, amax) if step.format is not None else ()
            scalars += tuple(np.array([value], np.float32) for value in step.extras)
        row_wise = len(arrays)
        for at, data in enumerate((*arrays, *scalars)):
            if at < row_wise or last:
                final = last and at + 1 == row_wise + len(scalars)
                yield Piece(shard, step, step.outputs[at], data, final, None if at else distance)

    def _check_copied(self, step: Step, value: Array) -> None:
        """A scale that is copied must be a number, and the one that its partners have."""
        from mso_hub.formats.numerics.floats import widen

        name, key = step.weight.name, f"{step.scale_of}: copied scale"
        scale = float(widen(value, step.weight.dtype).reshape(-1)[0])
        if not 0 < scale < float("inf"):
            raise CheckpointError(f"{name}: the scale must be finite and > 0, found {scale}; the checkpoint is damaged")
        noted = self._notes.setdefault(key, scale)
        if noted != scale:
            raise CheckpointError(
                f"{name}: engines keep one scale for {step.scale_of}, found {scale:.9g} here and {noted:.9g} in a "
                "partner; decompress the checkpoint and quantize the result"
            )

    def _finish(self, step: Step, block: Block, held: tuple[Array, str] | None, amax: float) -> _Encoded:
        """One block from stored bytes (or held numbers) to output rows."""
        weight = step.weight
        if step.format is not None:
            values, dtype = held or weight.values(weight.load(self._read, *block), *block)
            if step.unit is None:
                _require_finite(weight, values, dtype, block[0])
            try:
                arrays = self._engine.encode(step.format, values, dtype, step.dense, amax)
            except ValueError as error:
                raise PlanError(
                    f"{weight.name}: {step.format.name} cannot hold it: {error}; add it to `ignore`, or take another "
                    "format for it"
                ) from error
            return arrays, self._distance(step, block[0], values, dtype, arrays, amax)
        loaded = weight.load(self._read, *block)
        if weight.decoder is None:
            return (loaded["weight"],), None
        decoded = weight.decoder.decode(loaded, *block, weight.dtype)
        _require_finite(weight, decoded, weight.dtype, block[0])
        return (decoded,), None

    def _distance(
        self, step: Step, first: int, values: Array, dtype: str, arrays: tuple[Array, ...], amax: float
    ) -> Distance | None:
        """Decode the first rows of an encoded block, as many as are to be measured, and compare."""
        form = step.format
        limit = WHOLE if isinstance(form, Nvfp4) and form.search == POWER else self._measure
        rows = -(-limit // max(1, values.shape[1])) - first
        if form is None or rows <= 0:
            return None
        if rows < len(values):
            rows = -(-rows // form.row_step) * form.row_step
        if rows < len(values):
            cuts = (rows if len(array) == len(values) else rows // form.row_step for array in arrays)
            arrays = tuple(array[:cut] for array, cut in zip(arrays, cuts, strict=True))
        return distance(values[:rows], dtype, form.decode(arrays, values.shape[1], step.dense, amax))

    def _ahead(self, shards: Iterable[ShardPlan]) -> Iterator[tuple[ShardPlan, _Loaded]]:
        """Steps in order, those to encode with their unit's amax and, where they fit, their numbers.

        Loads of the units that follow are under way while the caller works on this one.
        """
        queue: deque[tuple[ShardPlan, list[Step], list[list[Future[tuple[Array, str, float]]]] | None]] = deque()
        held = 0
        runs = [(shard, steps) for shard in shards for steps in _runs(shard)]
        at = 0
        while at < len(runs) or queue:
            while at < len(runs):
                shard, steps = runs[at]
                size = sum(s.weight.number_bytes for s in steps)
                keep = self._engine.keeps(steps, once=self._once)
                if queue and (len(queue) > self._width or (keep and held + size > self._memory // 2)):
                    break
                queue.append((shard, steps, self._start(steps) if keep else None))
                held += size if keep else 0
                at += 1
            shard, steps, futures = queue.popleft()
            if futures is not None:
                held -= sum(s.weight.number_bytes for s in steps)
            ready = self._collect(steps, futures)
            del futures  # they hold the blocks, which must go one by one as they are encoded
            yield from ((shard, loaded) for loaded in ready)

    def _start(self, steps: Sequence[Step]) -> list[list[Future[tuple[Array, str, float]]]]:
        submit = self._pool.submit
        return [
            [submit(self._load, s.weight, block) for block in s.weight.blocks(self._block, s.row_step)] for s in steps
        ]

    def _load(self, weight: Weight, block: Block, read: Reader | None = None) -> tuple[Array, str, float]:
        from mso_hub.formats.numerics import floats

        values, dtype = weight.values(weight.load(read or self._read, *block), *block)
        return values, dtype, floats.amax(values, dtype)

    def _collect(
        self, steps: Sequence[Step], futures: list[list[Future[tuple[Array, str, float]]]] | None
    ) -> list[_Loaded]:
        """Wait for a unit's loads and settle its amax."""
        unit = steps[0].unit
        if unit is None:
            return [_Loaded(s, s.weight.blocks(self._block, s.row_step), 0.0, None) for s in steps]
        own: dict[str, float] = {}
        values: list[list[tuple[Array, str]] | None] = []
        for at, step in enumerate(steps):
            if futures is None:
                own[step.weight.name] = self._amax(step)
                values.append(None)
                continue
            results = [load.result() for load in futures[at]]
            own[step.weight.name] = amax = _largest(result[2] for result in results)
            values.append([result[:2] for result in results])
            if not amax < float("inf"):
                self._refuse(step.weight)
        amax = self._unit_amax(unit, own)
        return [
            _Loaded(s, s.weight.blocks(self._block, s.row_step), amax, v) for s, v in zip(steps, values, strict=True)
        ]

    def _unit_amax(self, unit: str, own: MutableMapping[str, float]) -> float:
        """Largest amax of a unit; members in other shards are read once more, and every amax is noted.

        CheckpointError when a weight has another amax than when its partner's shard was written: that one is wrong.
        """
        foreign = [weight for weight in self._plan.units[unit] if weight.name not in own]
        if not foreign:
            return max(own.values())
        # Two folders of a repo may hold the same names: only with its unit does a name mean one weight.
        for name, amax in own.items():
            noted = self._notes.setdefault(f"{unit}: {name}", amax)
            if noted != amax:
                raise CheckpointError(
                    f"{name}: its largest value was {noted:.9g} when a shard with its partner was written, it is "
                    f"{amax:.9g} now; the source changed, or bytes on their way: start over with --fresh"
                )
        keys = {f"{unit}: {weight.name}": weight for weight in foreign}
        for key, weight in keys.items():
            if key not in self._notes:
                self._notes[key] = self._scan(weight, weight.blocks(self._block), self._apart)
        return max(*own.values(), *(self._notes[key] for key in keys))

    def _amax(self, step: Step) -> float:
        """Amax of a weight that is not kept, block by block, in the blocks that are read again to encode it."""
        return self._scan(step.weight, step.weight.blocks(self._block, step.row_step), self._read)

    def _scan(self, weight: Weight, blocks: Sequence[Block], read: Reader) -> float:
        load = partial(self._load, weight, read=read)
        amax = _largest(result[2] for result in self._windowed(load, blocks))
        if not amax < float("inf"):
            self._refuse(weight)
        return amax

    def _windowed(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(self._pool.submit(work, item))
            if len(pending) > self._width:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _refuse(self, weight: Weight) -> None:
        """Find the first NaN or Inf and name it."""
        for start, stop in weight.blocks(self._block):
            values, dtype = weight.values(weight.load(self._read, start, stop), start, stop)
            _require_finite(weight, values, dtype, start)


def _require_finite(weight: Weight, values: Array, dtype: str, first_row: int) -> None:
    """NonFiniteError that names the first NaN or Inf of a block of rows."""
    from mso_hub.formats.numerics import floats

    at = floats.first_nonfinite(values, dtype)
    if at is None:
        return
    width = math.prod(weight.shape[1:])
    row, column = first_row + at // width, at % width
    found = floats.widen(values.reshape(-1)[at : at + 1], dtype)[0]
    place = f"found {found} at row {row}, column {column}"
    if weight.decoder is None:
        raise NonFiniteError(
            f"{weight.name}: weights must be finite to be quantized, {place}; repair the checkpoint or add the tensor "
            "to `ignore`"
        )
    raise NonFiniteError(
        f"{weight.name}: {weight.decoder.name} must decode to finite numbers, {place}; a stored scale is damaged, or "
        f"{dtype} cannot hold the number: fetch the checkpoint again, or decompress to another dtype"
    )
