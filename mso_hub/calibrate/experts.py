"""Experts one at a time: a model's own arithmetic over weights that are read when they are used.

Models of transformers 5 hold all experts of a layer in two 3-D parameters, and their eager forward multiplies with one
row of them after the other: `linear(x, self.gate_up_proj[expert])`. Here a stand-in takes the parameter's place. Its
rows are read when they are multiplied with (`expert`), or taken from the filled parameter (`stack`); the observer is
told, and everything around the product stays the model's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mso_hub.calibrate.observer import Watch
from mso_hub.calibrate.table import Entry, Table
from mso_hub.errors import CheckpointError, PlanError

Read = Callable[[str, int | None], Tensor]
"""(stored name, row or None) -> one row of a stored tensor, or all of it."""
MERGES = {("MergeModulelist",), ("MergeModulelist", "Concatenate")}
"""Conversions of which one expert's part is just its own tensors."""
NAMES = ("gate_up_proj", "up_proj", "down_proj")
"""Parameters that hold the matrices of all experts."""
LEFT = {torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm}
"""Products with the weight on the right as it is, [K, N]."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One of the matrices of every expert of a bank: gate and up together, up alone, or down.

    attribute  parameter of the bank: `gate_up_proj`
    count      experts
    parts      for every expert the stored tensors of which it is made, in order; empty when they are one 3-D tensor
    whole      the stored 3-D tensor, None when there is one for each expert
    simple     can one expert be had without converting the whole?
    keys       every stored tensor that it is made of
    """

    attribute: str
    count: int
    parts: tuple[tuple[str, ...], ...]
    whole: str | None
    simple: bool
    keys: tuple[str, ...]

    def names(self, expert: int) -> tuple[str, ...]:
        """Stored module names of an expert's matrices."""
        if self.whole is not None:
            return (f"{self.whole.removesuffix('.weight')}[{expert}]",)
        return tuple(name.removesuffix(".weight") for name in self.parts[expert])


@dataclass(frozen=True, slots=True)
class Bank:
    """All experts of one module; `path` is its place in the model."""

    path: str
    matrices: tuple[Matrix, ...]

    @property
    def simple(self) -> bool:
        """Can its experts be read one at a time?"""
        return all(matrix.simple for matrix in self.matrices)

    @property
    def keys(self) -> frozenset[str]:
        """Stored tensors that make its matrices."""
        return frozenset(key for matrix in self.matrices for key in matrix.keys)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Paths of the parameters that the matrices fill."""
        return tuple(f"{self.path}.{matrix.attribute}" for matrix in self.matrices)

    def names(self) -> list[str]:
        """Stored module names of all its matrices."""
        return [n for e in range(self.matrices[0].count) for matrix in self.matrices for n in matrix.names(e)]


def bank_attributes(module: nn.Module) -> tuple[str, ...]:
    """Parameters of a module that hold the matrices of many experts; empty for other modules."""
    found = tuple(n for n in NAMES if (p := module._parameters.get(n)) is not None and p.dim() == 3)  # noqa: SLF001
    return found if len(found) > 1 else ()


def read_bank(path: str, module: nn.Module, table: Table) -> Bank:
    """Of what a bank is made; CheckpointError where a stored tensor is missing."""
    return Bank(path, tuple(_matrix(path, name, getattr(module, name), table) for name in bank_attributes(module)))


def _matrix(path: str, attribute: str, parameter: Tensor, table: Table) -> Matrix:
    entries = table.made_of.get(f"{path}.{attribute}", ())
    count = len(parameter)
    if not entries:
        raise CheckpointError(f"{path}.{attribute}: no stored tensor makes it; the checkpoint is incomplete")
    steps = entries[0].place.steps
    keys = tuple(entry.name for entry in entries)
    if "MergeModulelist" not in steps:
        return Matrix(attribute, count, (), entries[0].name, not steps, keys)
    found: dict[int, list[Entry]] = {}
    for entry in entries:
        number = int(re.findall(r"(?<=\.)\d+(?=\.)", entry.name)[-1])
        found.setdefault(number, []).append(entry)
    missing = set(range(count)) - found.keys()
    if missing or len({len(members) for members in found.values()}) > 1:
        which = min(missing) if missing else min(found, key=lambda number: len(found[number]))
        raise CheckpointError(f"{path}.{attribute}: not all stored tensors of expert {which} are there")
    for members in found.values():
        members.sort(key=_rank)
    parts = tuple(tuple(e.name for e in found[number]) for number in range(count))
    return Matrix(attribute, count, parts, None, steps in MERGES, keys)


def _rank(entry: Entry) -> int:
    return entry.place.merge.index(entry.place.pattern or "")


@contextmanager
def experts_of(
    bank: Bank, module: nn.Module, watch: Watch, read: Read | None, place: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Within the block stand-ins take the place of a bank's parameters.

    read   gives stored tensors, None when the parameters are filled
    place  brings what was read to the device and dtype of the bank
    """
    for matrix in bank.matrices:
        # Python looks here first, and whoever lists parameters still finds the real one.
        module.__dict__[matrix.attribute] = StandIn(bank, matrix, module, watch, read, place)
    try:
        yield
    finally:
        for matrix in bank.matrices:
            del module.__dict__[matrix.attribute]


class StandIn:
    """In the place of a 3-D parameter: hands out one expert's matrix, or is multiplied with as a whole."""

    def __init__(
        self, bank: Bank, matrix: Matrix, module: nn.Module, watch: Watch, read: Read | None,
        place: Callable[[Tensor], Tensor],
    ) -> None:  # fmt: skip
        self.bank, self.matrix, self.watch = bank, matrix, watch
        self._module, self._read, self._place = module, read, place
        self._adapted: set[int] = set()

    @property
    def parameter(self) -> Tensor:
        """What it stands for."""
        found = self._module._parameters[self.matrix.attribute]  # noqa: SLF001
        assert found is not None  # noqa: S101 - bank_attributes found it
        return found

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        return self.parameter.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameter."""
        return self.parameter.dtype

    def __getitem__(self, expert: int | Tensor) -> OneExpert:
        return OneExpert(self, int(expert))

    def weights(self, expert: int, *, turned: bool) -> tuple[Tensor, ...]:
        """An expert's matrices as they are stored and as the observer wants them; one where they are together.

        turned  they are [K, N]
        """
        if self._read is None:
            whole = self.parameter[expert]
            if self.watch.sees_weights and expert not in self._adapted:
                self._adapted.add(expert)
                names = self.matrix.names(expert)
                for name, part in zip(names, whole.chunk(len(names), -1 if turned else 0), strict=True):
                    part.copy_(self._adapt(name, part, turned=turned))
            return (whole,)
        stored = self.matrix.parts[expert] if self.matrix.whole is None else (self.matrix.whole,)
        row = None if self.matrix.whole is None else expert
        tensors = [self._place(self._read(name, row)) for name in stored]
        names = self.matrix.names(expert)
        return tuple(self._adapt(name, tensor, turned=turned) for name, tensor in zip(names, tensors, strict=True))

    def renew(self) -> None:
        """Ask the observer again for every matrix, where the parameter is filled."""
        self._adapted.clear()

    def _adapt(self, name: str, tensor: Tensor, *, turned: bool) -> Tensor:
        if not self.watch.sees_weights:
            return tensor
        wanted = self.watch.weight(name, tensor.T if turned else tensor).to(tensor.dtype)
        return wanted.T if turned else wanted

    def product(self, expert: int, x: Tensor, dtype: torch.dtype | None, *, turned: bool) -> Tensor:
        """x times one expert's matrix, with the observer told; `dtype` to widen the matrix first."""
        inputs = self.watch.inputs(self.matrix.names(expert), x)
        weights = [w if dtype is None else w.to(dtype) for w in self.weights(expert, turned=turned)]
        if any(given is not inputs[0] for given in inputs) and len(weights) == 1:
            weights = list(weights[0].chunk(len(inputs), -1 if turned else 0))
        done = [a @ w if turned else F.linear(a, w) for a, w in zip(inputs, weights)]  # noqa: B905 - or one weight for all
        return done[0] if len(done) == 1 else torch.cat(done, -1)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        """Llama-4 gives every expert every token, all but those routed to it as zeros: bmm([E, T, K], [E, K, N])."""
        if func is not torch.bmm or kwargs or not isinstance(args[1], StandIn):
            raise _unknown(next(a for a in args if isinstance(a, StandIn)), func)
        x, own = args
        return torch.cat([own.routed(e, x[e]) for e in range(len(x))])

    def routed(self, expert: int, x: Tensor) -> Tensor:
        """[1, T, N] of x [T, K], in which tokens of other experts are zeros; those are not shown to the observer."""
        hit = x.abs().amax(-1) > 0
        if bool(hit.any()):
            shown = x[hit]
            (wanted,) = self.watch.inputs(self.matrix.names(expert), shown)
            x = x if wanted is shown else x.index_put((hit,), wanted)
        (weight,) = self.weights(expert, turned=True)
        return torch.bmm(x[None], weight[None])


class OneExpert:
    """In the place of one row of the parameter; `dtype` when it was widened."""

    def __init__(self, owner: StandIn, expert: int, dtype: torch.dtype | None = None) -> None:
        self.owner, self._expert, self._dtype = owner, expert, dtype

    def float(self) -> OneExpert:
        """The same in F32."""
        return OneExpert(self.owner, self._expert, torch.float32)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        """The products that models make with one expert's matrix: linear(x, w) and x @ w."""
        right = args[1] if len(args) == 2 and not kwargs else None
        if isinstance(right, OneExpert) and func is F.linear:
            return right.product(args[0], turned=False)
        if isinstance(right, OneExpert) and func in LEFT:
            return right.product(args[0], turned=True)
        raise _unknown(next(a for a in args if isinstance(a, OneExpert)).owner, func)

    def product(self, x: Tensor, *, turned: bool) -> Tensor:
        """x times the matrix."""
        return self.owner.product(self._expert, x, self._dtype, turned=turned)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return self.product(x, turned=True)


def _unknown(own: StandIn, func: Any) -> PlanError:
    use = getattr(func, "__name__", func)
    return PlanError(
        f"{own.bank.path}.{own.matrix.attribute}: the model uses its experts' weights in {use}, which cannot be "
        "watched; please report the architecture"
    )
