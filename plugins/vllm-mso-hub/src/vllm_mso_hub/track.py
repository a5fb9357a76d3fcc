"""What `load_weights` does, seen below every loader: which elements it reads, which it writes, and what it converts.

vLLM's loaders end in `parameter.copy_(piece of a checkpoint tensor)`. A dispatch mode sees each of these copies, on
meta tensors as well as on real ones, and counts exactly: two ranks that read the same columns count once.

    with Tracker() as tracker:
        tracker.watch(model.named_parameters())
        model.load_weights(tracker.follow(checkpoint))
    tracker.written(name, parameter)   elements of this parameter that were written
    tracker.unread(name)               elements of this checkpoint tensor that nobody read

Storages are told apart by address; a weak reference keeps the address taken, never the data. A loader that asks a meta
tensor for its value gets zero: what it compares is then no different, which is all that can be said without values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm_mso_hub.regions import Regions

_aten = torch.ops.aten
_COPY, _ALIAS, _COMPUTE, _WRITE, _SKIP = "copy", "alias", "compute", "write", "skip"
_KIND: dict[Any, str] = {
    _aten.copy_.default: _COPY,
    _aten.clone.default: _ALIAS,
    _aten._to_copy.default: _ALIAS,  # noqa: SLF001 - the operator behind `Tensor.to`
}
_SHAPE_ONLY = {"empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full"}
_PRUNE_AT_LEAST = 4096


# checkpoint tensor -> what was read of it: under () of its own bytes, else of a copy that a loader made of all of it
Reads = dict[str, dict[tuple[int, ...], Regions]]


@dataclass(frozen=True, slots=True)
class Cast:
    """A copy that changed values on the way: FP8 codes read as integers, a BF16 weight rounded to FP8."""

    tensor: str
    parameter: str
    stored: torch.dtype
    wanted: torch.dtype


@dataclass(frozen=True, slots=True)
class Broadcast:
    """A copy of fewer elements than it filled."""

    tensor: str
    parameter: str
    stored: tuple[int, ...]
    filled: tuple[int, ...]


@dataclass(slots=True)
class _Source:
    """A checkpoint tensor, or a whole copy of one, inside a storage: bytes [start, end)."""

    name: str
    start: int
    end: int
    numel: int
    regions: Regions | None  # None: the operation that made it has been counted as reading
    path: tuple[int, ...] = ()
    copies: int = 0
    cast_from: torch.dtype | None = None


@dataclass(slots=True)
class _Target:
    """A parameter that is watched."""

    names: list[str]
    numel: int
    itemsize: int
    regions: Regions
    alive: StorageWeakRef
    sources: dict[str, int] = field(default_factory=dict)


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is read of each followed tensor and written of each watched parameter while it is active.

    reads         regions read so far, shared by the trackers of several ranks: pass the same dict to each of them
    casts         value-changing conversions of checkpoint tensors
    broadcasts    copies that filled more elements than they read
    current       the tensor handed out last; None before the first and after the last
    """

    def __init__(self, reads: Reads | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads: Reads = {} if reads is None else reads
        self.casts: set[Cast] = set()
        self.broadcasts: set[Broadcast] = set()
        self.current: str | None = None
        self._numel: dict[str, int] = {}
        self._targets: dict[int, _Target] = {}
        self._by_name: dict[str, _Target] = {}
        self._sources: dict[int, list[_Source]] = {}
        self._alive: dict[int, StorageWeakRef] = {}
        self._prune_at = _PRUNE_AT_LEAST

    # what is asked of it

    def watch(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Count what is written of these from now on; names that share a storage (tied weights) share the count."""
        for name, parameter in parameters:
            address = _address(parameter)
            target = self._targets.get(address)
            if target is None:
                size = parameter.untyped_storage().nbytes()
                target = _Target([], parameter.numel(), parameter.element_size(), Regions(size), _weak(parameter))
                self._targets[address] = target
            target.names.append(name)
            self._by_name[name] = target

    def follow(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same pairs, each known to the tracker before it is handed out; goes on after an error outside."""
        for name, tensor in tensors:
            self._numel[name] = tensor.numel()
            self._add_source(tensor, _Source(name, *_extent(tensor), tensor.numel(), self._regions(name, (), tensor)))
            self.current = name
            yield name, tensor
        self.current = None

    def written(self, name: str, parameter: torch.Tensor) -> int:
        """Elements of a parameter that were written; all of them where loading itself put this tensor there."""
        target = self._targets.get(_address(parameter))
        if target is None or name not in target.names:
            return parameter.numel()
        return min(target.regions.count() // target.itemsize, target.numel)

    def sources(self, parameter: str) -> dict[str, int]:
        """Checkpoint tensors that were copied into a parameter, with the elements that each of them filled."""
        target = self._by_name.get(parameter)
        return {} if target is None else target.sources

    def unread(self, tensor: str) -> int:
        """Elements of a followed tensor that no tracker with the same `reads` has read; its size if never touched."""
        numel = self._numel[tensor]
        return numel - read_elements(self.reads.get(tensor, {}), numel)

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """The followed tensor that `tensor` is a view or a copy of."""
        source = self._source(tensor)
        return None if source is None else source.name

    # how it is counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = _KIND.get(func) or _classify(func)
        if func is _aten._local_scalar_dense.default and args[0].is_meta:  # noqa: SLF001 - what `Tensor.item` calls
            return torch.zeros((), dtype=args[0].dtype, device="cpu").item()
        if kind is _COPY and args[1].is_meta and not args[0].is_meta:
            args[1].expand_as(args[0])  # raises as the copy would; there are no values to copy
            result = args[0]
        else:
            result = func(*args, **(kwargs or {}))  # before counting: an operation that raises has copied nothing
        if kind is _COPY:
            self._copied(args[0], args[1])
        elif kind is not _SKIP:
            written = _written(func, args, kwargs or {}) if kind is _WRITE else []
            self._computed(kind, _tensors((args, kwargs)), written, result)
        return result

    def _copied(self, filled: torch.Tensor, read: torch.Tensor) -> None:
        source = self._source(read)
        target = self._targets.get(_address(filled))
        if source is not None:
            _mark(source.regions, read, source.start)
        if target is not None:
            _mark(target.regions, filled, 0)
        if source is None:
            return
        parameter = target.names[0] if target is not None else ""
        if target is not None:
            target.sources[source.name] = target.sources.get(source.name, 0) + filled.numel()
            stored = read.dtype if source.cast_from is None else source.cast_from
            if stored != filled.dtype and (source.cast_from or _changes_values(stored, filled.dtype)):
                self.casts.add(Cast(source.name, parameter, stored, filled.dtype))
        if filled.numel() != read.numel():
            self.broadcasts.add(Broadcast(source.name, parameter, tuple(read.shape), tuple(filled.shape)))

    def _computed(self, kind: str, inputs: list[torch.Tensor], written: list[torch.Tensor], result: Any) -> None:
        sources = [(tensor, source) for tensor in inputs if (source := self._source(tensor)) is not None]
        for filled in written:
            target = self._targets.get(_address(filled))
            if target is not None:
                _mark(target.regions, filled, 0)
                for _, source in sources:
                    target.sources[source.name] = target.sources.get(source.name, 0) + filled.numel()
        if not sources:
            return
        tensor, source = sources[0]
        outputs = [] if kind is _WRITE else _tensors(result)
        whole = kind is _ALIAS and tensor.numel() == source.numel and source.regions is not None
        if not whole:
            for read, of in sources:
                _mark(of.regions, read, of.start)
        for output in outputs:
            if _address(output) not in self._sources:
                self._add_source(output, self._derived(tensor, source, output, whole))

    def _derived(self, tensor: torch.Tensor, source: _Source, output: torch.Tensor, whole: bool) -> _Source:
        path = (*source.path, source.copies)
        source.copies += 1
        regions = self._regions(source.name, path, output) if whole else None
        cast = source.cast_from or (tensor.dtype if _changes_values(tensor.dtype, output.dtype) else None)
        return _Source(source.name, *_extent(output), output.numel(), regions, path, cast_from=cast)

    def _regions(self, name: str, path: tuple[int, ...], tensor: torch.Tensor) -> Regions:
        by_path = self.reads.setdefault(name, {})
        if path not in by_path:
            start, end = _extent(tensor)
            by_path[path] = Regions(end - start)
        return by_path[path]

    def _add_source(self, tensor: torch.Tensor, source: _Source) -> None:
        key = _address(tensor)
        if key not in self._alive:
            self._alive[key] = _weak(tensor)
            self._sources[key] = []
        self._sources[key].append(source)
        if len(self._alive) > self._prune_at:
            for gone in [address for address, reference in self._alive.items() if _expired(reference)]:
                del self._alive[gone], self._sources[gone]
            self._prune_at = max(_PRUNE_AT_LEAST, 2 * len(self._alive))

    def _source(self, tensor: torch.Tensor) -> _Source | None:
        sources = self._sources.get(_address(tensor))
        if sources is None:
            return None
        if len(sources) == 1:
            return sources[0]
        at = tensor.storage_offset() * tensor.element_size()
        return next((source for source in reversed(sources) if source.start <= at < source.end), None)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _weak(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _expired(reference: StorageWeakRef) -> bool:
    return bool(reference.expired())  # type: ignore[no-untyped-call]


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - meta tensors have no data_ptr to tell them apart


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and the byte after the last of a contiguous tensor inside its storage."""
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + tensor.numel() * tensor.element_size()


def _mark(regions: Regions | None, view: torch.Tensor, base: int) -> None:
    if regions is None:
        return
    itemsize = view.element_size()
    offset = int(view.storage_offset()) * itemsize - base
    if view.is_contiguous():
        regions.add_run(offset, offset + view.numel() * itemsize)
    else:
        regions.add(offset, tuple(view.shape), view.stride(), itemsize)


def _classify(func: Any) -> str:
    """What an operator does to its tensors, from its schema; remembered."""
    schema = func._schema  # noqa: SLF001 - there is no public way to ask what an operator writes
    name = schema.name.rpartition("::")[2]
    returns = [of.alias_info for of in schema.returns]
    if schema.is_mutable:
        kind = _WRITE
    elif name in _SHAPE_ONLY or any(alias is not None for alias in returns):
        kind = _SKIP
    else:
        kind = _COMPUTE
    _KIND[func] = kind
    return kind


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an in-place operator writes, from its schema."""
    arguments = func._schema.arguments  # noqa: SLF001
    given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
    changed = [of.name for of in arguments if of.alias_info is not None and of.alias_info.is_write]
    return _tensors([given.get(name) for name in changed])


def _changes_values(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether converting reads the bits as other numbers: everything but wide float to wide float, wide int to wide."""
    if stored == wanted:
        return False
    if stored.is_floating_point != wanted.is_floating_point:
        return True
    return min(stored.itemsize, wanted.itemsize) < (2 if stored.is_floating_point else 4)


def read_elements(of_tensor: dict[tuple[int, ...], Regions], numel: int) -> int:
    """Elements read of a tensor of `numel` elements: of itself or of the copy that was read most."""
    return max((regions.count() * numel // regions.size for regions in of_tensor.values() if regions.size), default=0)
