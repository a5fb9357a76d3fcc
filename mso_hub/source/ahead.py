"""In which order announced reads are best fetched from far away. Pure: ranges in, moves out.

Each file that a job mainly reads is streamed once, front to back. What is needed long before the stream comes by, or
so long after it that holding it would cost too much memory, is fetched in pieces of its own. Packed checkpoints need
that: safetensors sorts tensors by dtype, so that the scales of a weight lie gigabytes away from its codes.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from mso_hub.source.reads import Range

SLACK = 256 << 20
"""Bytes that may be held because they come by in the stream before they are needed."""
PIECE = 8 << 20
"""Bytes of a piece at most, unless one read alone is longer."""
CHEAP = 1 << 20
"""Bytes of a piece that may be held for however long."""
JOINT = 256 << 10
"""Unneeded bytes between two reads that are fetched along, to save a request."""
OPEN = 16
"""Pieces of one file that may still grow: parts of a weight alternate between so many regions at most."""


@dataclass(eq=False, slots=True)
class Cell:
    """Bytes that are fetched once and handed out for one or several uses.

    uses   how often it is read
    first  announced bytes before its first use
    again  the same range was fetched for an earlier use, too long ago to be still held
    side   fetched in a piece, not by the stream
    """

    file: str
    begin: int
    end: int
    first: int
    uses: int = 1
    again: bool = False
    side: bool = False

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.begin


@dataclass(eq=False, slots=True)
class Advance:
    """The stream of a file goes on to `end`; `held` bytes may be in memory then for uses further on."""

    file: str
    end: int
    held: int


@dataclass(eq=False, slots=True)
class Piece:
    """A range fetched beside the stream, for these cells."""

    file: str
    begin: int
    end: int
    held: int
    cells: list[Cell] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Schedule:
    """What to fetch for one job.

    cells    in the order of their first use
    moves    in the order in which they are needed
    streams  file -> cells that its stream fills, by offset
    """

    cells: Sequence[Cell]
    moves: Sequence[Advance | Piece]
    streams: dict[str, list[Cell]]


def schedule(reads: Sequence[Range], streamed: Collection[str], *, near: int, slack: int = SLACK) -> Schedule:
    """Plan the fetching of a job.

    streamed  files that get a stream; all others are read in pieces
    near      announced bytes between two uses of a range up to which it is held instead of fetched again
    """
    uses = _uses(reads, near)
    cells = [cell for cell, first, _ in uses if first]
    planner = _Planner(cells, streamed, near, slack)
    for cell, first, last in uses:
        if first:
            planner.need(cell)
        if last:
            planner.release(cell)
    streams: dict[str, list[Cell]] = {}
    for cell in sorted((c for c in cells if not c.side), key=_by_begin):
        streams.setdefault(cell.file, []).append(cell)
    return Schedule(cells, planner.moves, streams)


def main_file(reads: Iterable[Range]) -> str | None:
    """The file of which a job reads the most bytes; None when it reads nothing."""
    share: dict[str, int] = {}
    for file, begin, end in dict.fromkeys(reads):
        share[file] = share.get(file, 0) + end - begin
    best = max(share, key=lambda file: share[file], default=None)
    return best if best is not None and share[best] else None


def segments(cells: Iterable[Cell], gap: int) -> list[tuple[int, int]]:
    """The ranges that cover cells sorted by offset; holes shorter than `gap` are read through."""
    found: list[tuple[int, int]] = []
    for cell in cells:
        if found and cell.begin < found[-1][1] + gap:
            found[-1] = (found[-1][0], max(found[-1][1], cell.end))
        else:
            found.append((cell.begin, cell.end))
    return found


def _by_begin(cell: Cell) -> tuple[int, int]:
    return cell.begin, cell.end


def _by_end(cell: Cell) -> tuple[int, int]:
    return cell.end, cell.begin


def _uses(reads: Sequence[Range], near: int) -> list[tuple[Cell, bool, bool]]:
    """Every read with its cell: is this the cell's first use, is it the last?"""
    latest: dict[Range, tuple[Cell, int]] = {}
    uses: list[tuple[Cell, bool]] = []
    done = 0
    for place in reads:
        file, begin, end = place
        if begin >= end:
            continue
        known = latest.get(place)
        if known is not None and done - known[1] <= near:
            known[0].uses += 1
            cell, first = known[0], False
        else:
            cell, first = Cell(file, begin, end, done, again=known is not None), True
        done += end - begin
        latest[place] = (cell, done)
        uses.append((cell, first))
    left = {id(cell): cell.uses for cell, _ in uses}
    found = []
    for cell, first in uses:
        left[id(cell)] -= 1
        found.append((cell, first, left[id(cell)] == 0))
    return found


class _Planner:
    """Walks the uses in order and knows what is held at each of them."""

    def __init__(self, cells: Sequence[Cell], streamed: Collection[str], near: int, slack: int) -> None:
        self.moves: list[Advance | Piece] = []
        self._near, self._slack, self._held = near, slack, 0
        self._here: set[Cell] = set()
        by_file: dict[str, list[Cell]] = {}
        for cell in cells:
            if cell.file in streamed and not cell.again:
                by_file.setdefault(cell.file, []).append(cell)
        self._lines = {file: _Line(members) for file, members in by_file.items()}
        self._growing: dict[str, list[Piece]] = {}

    def need(self, cell: Cell) -> None:
        """The first use of a cell: it must be here."""
        if cell in self._here:
            return
        line = None if cell.side or cell.again else self._lines.get(cell.file)
        if line is None:
            self._aside(cell)
            return
        if cell not in line.spine and self._held + line.before(cell) > self._slack:
            line.leave(cell)
            self._aside(cell)
            return
        for passed in line.advance(cell):
            self._hold(passed)
        self._evict(cell)
        self._note(cell)

    def release(self, cell: Cell) -> None:
        """The last use of a cell was served."""
        self._here.discard(cell)
        self._held -= cell.size

    def _hold(self, cell: Cell) -> None:
        self._here.add(cell)
        self._held += cell.size

    def _evict(self, current: Cell) -> None:
        """Give up what is needed last, until the rest may be held; it will be fetched again, in pieces."""
        line = self._lines[current.file]
        while self._held > self._slack + current.size:
            latest = line.latest(self._here, current)
            if latest is None:
                return
            latest.side = True
            self._here.discard(latest)
            self._held -= latest.size

    def _note(self, cell: Cell) -> None:
        """The stream of a file goes on; two moves in a row are one."""
        if self.moves and isinstance(self.moves[-1], Advance) and self.moves[-1].file == cell.file:
            last = self.moves[-1]
            last.end, last.held = max(last.end, cell.end), max(last.held, self._held)
        else:
            self.moves.append(Advance(cell.file, cell.end, self._held))

    def _aside(self, cell: Cell) -> None:
        """Into a piece that lies beside it and is needed at about the same time, or into a new one."""
        cell.side = True
        self._hold(cell)
        growing = self._growing.setdefault(cell.file, [])
        for piece in growing:
            if self._fits(cell, piece):
                piece.end = max(piece.end, cell.end)
                piece.cells.append(cell)
                return
        piece = Piece(cell.file, cell.begin, cell.end, self._held, [cell])
        self.moves.append(piece)
        growing.append(piece)
        del growing[:-OPEN]

    def _fits(self, cell: Cell, piece: Piece) -> bool:
        end = max(piece.end, cell.end)
        beside = piece.begin <= cell.begin <= piece.end + JOINT
        short = end - piece.begin <= (PIECE if cell.first - piece.cells[0].first <= self._near else CHEAP)
        return beside and short


class _Line:
    """The cells of one streamed file and how far its stream has come.

    spine  the heaviest set of cells that are needed in the order of their offsets: the stream follows those
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.spine = _heaviest_ascent(cells)
        self._order = sorted(cells, key=_by_end)
        self._rank = {cell: rank for rank, cell in enumerate(self._order)}
        self._ahead = _Sums(len(cells))
        for rank, cell in enumerate(self._order):
            self._ahead.add(rank, cell.size)
        self._next = 0
        self._kept: list[tuple[int, int, Cell]] = []

    def before(self, cell: Cell) -> int:
        """Bytes of cells that the stream would pass on its way to this one."""
        return self._ahead.below(self._rank[cell])

    def leave(self, cell: Cell) -> None:
        """This cell will not come by the stream."""
        self._ahead.add(self._rank[cell], -cell.size)

    def advance(self, cell: Cell) -> list[Cell]:
        """Go on to the end of a cell -> the cells that came by, with it."""
        passed = []
        while self._next <= self._rank[cell]:
            other = self._order[self._next]
            if not other.side:
                self.leave(other)
                passed.append(other)
                heapq.heappush(self._kept, (-other.first, self._next, other))
            self._next += 1
        return passed

    def latest(self, here: Collection[Cell], current: Cell) -> Cell | None:
        """The held cell that is needed last, taken from the list; never the current one or what was used before."""
        while self._kept:
            cell = heapq.heappop(self._kept)[2]
            if cell in here and cell.first > current.first:
                return cell
        return None


class _Sums:
    """Sums of prefixes of a list that changes (a Fenwick tree)."""

    def __init__(self, size: int) -> None:
        self._tree = [0] * (size + 1)

    def add(self, at: int, amount: int) -> None:
        """list[at] += amount."""
        at += 1
        while at < len(self._tree):
            self._tree[at] += amount
            at += at & -at

    def below(self, at: int) -> int:
        """sum(list[:at])."""
        total = 0
        while at:
            total += self._tree[at]
            at -= at & -at
        return total


def _heaviest_ascent(cells: Sequence[Cell]) -> set[Cell]:
    """Of cells in the order of use: the subsequence with ascending offsets that has the most bytes."""
    ranks = {begin: rank for rank, begin in enumerate(sorted({cell.begin for cell in cells}), start=1)}
    best: list[tuple[int, int]] = [(0, -1)] * (len(ranks) + 1)
    before: list[int] = []
    for number, cell in enumerate(cells):
        at, top = ranks[cell.begin], (0, -1)
        while at:
            top = max(top, best[at])
            at -= at & -at
        before.append(top[1])
        at, found = ranks[cell.begin], (top[0] + cell.size, number)
        while at < len(best):
            best[at] = max(best[at], found)
            at += at & -at
    number, spine = max(best)[1], set()
    while number >= 0:
        spine.add(cells[number])
        number = before[number]
    return spine
