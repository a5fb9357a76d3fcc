"""Hessians of a layer's linear layers, within a limit, one after another.

Those of linear layers with the same input (q, k and v; gate and up) are one. Those that do not fit in the limit wait
for another pass of the batches through the layer. A bank of experts is seen once: what enters it and how it is routed
is kept, and then some experts at a time get their own rows again, as many as the limit allows, so that never more than
their Hessians exist.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mso_hub.calibrate.cache import Cache, FileCache, MemoryCache
from mso_hub.calibrate.experts import bank_attributes
from mso_hub.calibrate.methods.gptq import Hessian
from mso_hub.calibrate.observer import Layer
from mso_hub.calibrate.replica import to_device
from mso_hub.errors import MsoError

NUMBER = re.compile(r"\.(\d+)\.\w+$|\[(\d+)\]$")
"""Number of an expert in the name of its linear layer."""
Use = Callable[[list[str], Hessian], None]
"""(linear layers with the same inputs, their Hessian) -> nothing."""


class Shared:
    """Hessians of linear layers, one for those that get the same tensor, as long as they fit.

    limit  bytes of Hessians; one is always made
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._key: dict[str, str] = {}
        self._last: tuple[Tensor, str] | None = None
        self.members: dict[str, list[str]] = {}
        self.held: dict[str, Hessian] = {}
        self.waiting: list[str] = []

    def add(self, module: str, x: Tensor) -> None:
        """A linear layer got x [..., K]."""
        key = self._key.get(module)
        if key is None:
            key = self._last[1] if self._last is not None and self._last[0] is x else module
            self._key[module] = key
            self.members.setdefault(key, []).append(module)
            if key == module:
                self._make(key, x)
        self._last = x, key
        if key == module and key in self.held:
            self.held[key].add(x)

    def _make(self, key: str, x: Tensor) -> None:
        size = 4 * x.shape[-1] ** 2
        if self.held and size + sum(h.sum.nbytes for h in self.held.values()) > self._limit:
            self.waiting.append(key)
        else:
            self.held[key] = Hessian(x.shape[-1], x.device)

    def take(self) -> Iterator[tuple[list[str], Hessian]]:
        """Modules and their Hessian, which is let go when the next one is asked for."""
        for key in list(self.held):
            yield self.members[key], self.held.pop(key)


class Gather:
    """Collects Hessians for an observer: `begin` a layer, `see` every input, `finish` when all batches went through.

    limit    bytes of Hessians at a time
    batches  how many the walk runs
    scratch  folder for what experts get, None to keep it in memory
    """

    def __init__(self, limit: int, batches: int, scratch: Path | None) -> None:
        self._limit, self._batches, self._scratch = limit, batches, scratch
        self._shared = Shared(limit)
        self._banks: list[_Entered] = []
        self._experts: frozenset[int] = frozenset()
        self._columns: Mapping[str, int] = {}
        self._apart: frozenset[str] = frozenset()

    def begin(self, layer: Layer, columns: Mapping[str, int]) -> None:
        """A layer whose linear layers are wanted: name in the walk -> columns."""
        self._columns, self._experts, self._shared = columns, frozenset(), Shared(self._limit)
        self._apart = frozenset(columns) - frozenset(layer.linears)
        banks = [m for m in layer.module.modules() if bank_attributes(m)] if self._apart else []
        self._banks = [_Entered(module, self._scratch) for module in banks]

    def see(self, module: str, x: Tensor) -> None:
        """Add to the Hessian, of an expert only in its turn."""
        if module in self._columns and (module not in self._apart or _number(module) in self._experts):
            self._shared.add(module, x)

    def finish(self, layer: Layer, use: Use) -> None:
        """Hand out every Hessian once; each is let go before the next ones are made."""
        for bank in self._banks:
            bank.done()
        self._hand_out(use)
        while self._shared.waiting:
            self._again(layer)
            self._hand_out(use)
        for bank in self._banks:
            self._replay(bank, use)
            bank.close()

    def renew(self) -> None:
        """Let the observer replace weights of banks that are filled."""
        for bank in self._banks:
            bank.renew()

    def _hand_out(self, use: Use) -> None:
        for modules, hessian in self._shared.take():
            use(modules, hessian)

    def _again(self, layer: Layer) -> None:
        """Another pass for linear layers whose Hessians did not fit."""
        members = [module for key in self._shared.waiting for module in self._shared.members[key]]
        self._shared = Shared(self._limit)

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                self._shared.add(name, args[0])

            return before

        handles = [layer.linears[name].register_forward_pre_hook(hook(name)) for name in members]
        try:
            for batch in range(self._batches):
                layer.forward(batch)
        finally:
            for handle in handles:
                handle.remove()

    def _replay(self, bank: _Entered, use: Use) -> None:
        """Some experts at a time: their Hessians from their rows of what entered the bank."""
        sizes: dict[int, dict[int, int]] = {}
        for name in self._apart:
            sizes.setdefault(_number(name), {})[self._columns[name]] = 4 * self._columns[name] ** 2
        for group in _groups({number: sum(found.values()) for number, found in sorted(sizes.items())}, self._limit):
            self._experts, self._shared = frozenset(group), Shared(1 << 62)
            bank.replay(group)
            self._hand_out(use)
        self._experts = frozenset()


class _Entered:
    """What enters a bank of experts, batch by batch, until `close`."""

    def __init__(self, module: nn.Module, scratch: Path | None) -> None:
        self._module = module
        self._folder = None if scratch is None else tempfile.TemporaryDirectory(prefix="experts-", dir=scratch)
        self._cache: Cache = MemoryCache() if self._folder is None else FileCache(Path(self._folder.name))
        self._count = 0
        self._device = torch.device("cpu")
        self._handle = module.register_forward_pre_hook(self._enter, with_kwargs=True)

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self._cache.put(self._count, (args, kwargs))
        self._count += 1

    def done(self) -> None:
        """All batches have passed."""
        self._handle.remove()
        self._cache.turn(0)

    def replay(self, experts: Sequence[int]) -> None:
        """Run the rows of some experts again."""
        numbers = torch.tensor(list(experts), device=self._device)
        with torch.no_grad():
            for batch in range(self._count):
                args, kwargs = to_device(self._cache.get(batch), str(self._device))
                if not kwargs and _is_routed(args):
                    hidden, chosen, shares = args
                    token, place = torch.isin(chosen, numbers).nonzero(as_tuple=True)
                    if not len(token):
                        continue
                    # One row for each pair of token and expert, so that nobody else is computed.
                    args = hidden[token], chosen[token, place, None], shares[token, place, None]
                self._module(*args, **kwargs)

    def renew(self) -> None:
        """Let the observer replace weights of a bank that is filled."""
        for name in bank_attributes(self._module):
            self._module.__dict__[name].renew()

    def close(self) -> None:
        """Forget."""
        self._cache.close()
        if self._folder is not None:
            self._folder.cleanup()


def _is_routed(args: tuple[Any, ...]) -> bool:
    """Are these hidden states [tokens, H], experts I64 [tokens, top k] and their shares [tokens, top k]?"""
    if len(args) != 3 or not all(isinstance(arg, Tensor) and arg.dim() == 2 for arg in args):
        return False
    hidden, chosen, shares = args
    return chosen.dtype == torch.int64 and chosen.shape == shares.shape and len(hidden) == len(chosen)


def _number(name: str) -> int:
    found = NUMBER.search(name)
    if found is None:
        raise MsoError(f"{name}: is no expert's linear layer; please report this")
    return int(found[1] or found[2])


def _groups(sizes: Mapping[int, int], limit: int) -> Iterator[list[int]]:
    """Experts in groups whose sizes add up to at most `limit`, one at least."""
    group: list[int] = []
    held = 0
    for number, size in sizes.items():
        if group and held + size > limit:
            yield group
            group, held = [], 0
        group.append(number)
        held += size
    if group:
        yield group
