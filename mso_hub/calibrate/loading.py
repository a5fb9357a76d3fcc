"""Weights of a layer, of the embedding and of the head: into the model and out again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from mso_hub.calibrate import transformers_api as api
from mso_hub.calibrate.embedding import filled, read_used, token_tables, used_tokens
from mso_hub.calibrate.experts import Bank, Read, bank_attributes, experts_of, read_bank
from mso_hub.calibrate.memory import Needs, give_back, largest, streams, work_bytes
from mso_hub.calibrate.observer import Observer, Watch, hooked, linears_of
from mso_hub.calibrate.replica import Replica, copy_layer
from mso_hub.calibrate.shelf import kept, shelf
from mso_hub.calibrate.skeleton import Skeleton, release
from mso_hub.calibrate.table import Table
from mso_hub.calibrate.weights import Weights
from mso_hub.engine.threads import default_workers
from mso_hub.errors import CheckpointError

DISTANT = 8
"""Tensors that are fetched at once from far away."""


class Loader:
    """Fills parts of a model from a checkpoint.

    work        folder for files with decoded experts
    one_expert  read experts one at a time, where they are stored so that this is possible
    """

    def __init__(
        self, weights: Weights, table: Table, skeleton: Skeleton, dtype: torch.dtype, work: Path | None, *,
        one_expert: bool,
    ) -> None:  # fmt: skip
        self._weights, self._table, self._skeleton, self._dtype = weights, table, skeleton, dtype
        self._work, self._one_expert = work, one_expert
        self._workers = DISTANT if weights.distant else default_workers()
        self._banks = [
            [
                read_bank(f"{skeleton.prefix}{index}.{path}", module, table)
                for path, module in layer.named_modules()
                if bank_attributes(module)
            ]
            for index, layer in enumerate(skeleton.layers)
        ]

    # -- names -----------------------------------------------------------------------------------

    def modules(self) -> tuple[str, ...]:
        """Stored names of all linear layers, in the order of the model."""
        skeleton = self._skeleton
        found = [n for _, names in linears_of(skeleton.base, skeleton.top, self._table).values() for n in names]
        for banks in self._banks:
            for bank in banks:
                found += bank.names()
        found += [n for _, names in self.head_linear().values() for n in names]
        return tuple(dict.fromkeys(found))

    def layer_of(self, module: str) -> int | None:
        """Decoder layer of a stored module name."""
        stem = module.partition("[")[0]
        for index, keys in enumerate(self._table.layers):
            if stem in {key.removesuffix(".weight") for key in keys}:
                return index
        return None

    def head_linear(self) -> dict[str, tuple[nn.Module, tuple[str, ...]]]:
        """Path -> the head and its stored name; empty for a model without one."""
        model = self._skeleton.model
        head = model.get_output_embeddings()  # type: ignore[operator]
        path = next((name for name, module in model.named_modules() if module is head), None)
        return {} if path is None else {path: (head, self._table.modules(f"{path}.weight"))}

    # -- sizes -----------------------------------------------------------------------------------

    def needs(self, batches: Sequence[Tensor]) -> Needs:
        """What a walk over these batches needs, from headers alone."""
        width, tables = self._dtype.itemsize, token_tables(self._skeleton, self._table)
        tokens, used = [batch.numel() for batch in batches], len(used_tokens(batches))
        embedding = sum(self._bytes([key]) for key in self._table.base if key not in tables.values())
        for key in tables.values():
            embedding += used * self._bytes([key]) // max(1, self._weights.shape(key)[0])
        layers = {f"decoder layer {index}": self._layer_bytes(index) for index in range(len(self._banks))}
        name, layer = largest(layers)
        config = self._skeleton.text
        outputs = sum(tokens) * config.hidden_size * width * streams(config)
        shelves = [self._apart(i) for i in range(len(self._banks)) if self._shelved(self._apart(i), len(batches))]
        disk = max((self._bytes(k for bank in banks for k in bank.keys) for banks in shelves), default=0)
        return Needs(name, embedding, layer, work_bytes(config, max(tokens), width), outputs, disk)

    def _layer_bytes(self, index: int) -> int:
        """A layer's weights in memory: merging needs its parts and the whole, one expert is a share of its bank."""
        merged = {
            key for bank in self._banks[index] for matrix in bank.matrices if not matrix.simple for key in matrix.keys
        }
        merged |= {key for bank in self._banks[index] for m in bank.matrices if m.parts for key in m.keys}
        resident = self._resident(index)
        one = max((self._bytes(b.keys) // b.matrices[0].count for b in self._apart(index)), default=0)
        return self._bytes(resident) + self._bytes(key for key in resident if key in merged) + one

    def _bytes(self, keys: Iterable[str]) -> int:
        return sum(math.prod(self._weights.shape(key)) for key in keys) * self._dtype.itemsize

    # -- weights ---------------------------------------------------------------------------------

    @contextmanager
    def layer(self, index: int, watch: Watch, replicas: Sequence[Replica], uses: int, spare: int = 0) -> Iterator[None]:
        """A decoder layer with its weights, on the first device; its experts on all of them.

        uses   how often an expert may be read
        spare  bytes of memory for experts that are read again
        """
        banks = self._banks[index]
        apart = self._apart(index)
        self._fill(self._resident(index), replicas[0].device)
        without = [name for bank in apart for name in bank.parameters]
        self._require_filled(f"{self._skeleton.prefix}{index}", self._skeleton.layers[index], without)
        with ExitStack() as stack:
            read: Read = self._read if spare <= 0 or uses < 2 else kept(self._read, spare)
            if self._shelved(apart, uses):
                read = stack.enter_context(shelf(self._weights, apart, self._work))
            for replica in replicas:
                stack.callback(release, replica.skeleton.layers[index])
                for bank in banks:
                    stack.enter_context(self._experts(bank, replica, watch, read if bank in apart else None))
            yield
        give_back()

    @contextmanager
    def base(self, batches: Sequence[Tensor], replicas: Sequence[Replica]) -> Iterator[None]:
        """The decoder's tensors beside its layers, on every device; of embeddings the rows that the text needs."""
        skeleton = self._skeleton
        tables = token_tables(skeleton, self._table)
        self._fill([key for key in self._table.base if key not in tables.values()], replicas[0].device)
        apart = [f"{skeleton.prefix}{index}" for index in range(len(skeleton.layers))]
        self._require_filled(skeleton.top.removesuffix("."), skeleton.base, [*apart, *tables])
        used = used_tokens(batches)
        with ExitStack() as stack:
            for replica in replicas:
                if replica is not replicas[0]:
                    copy_layer(skeleton.base, replica.skeleton.base, replica.device)
                stack.callback(release, replica.skeleton.base)
            for path, name in tables.items():
                rows = read_used(self._weights, name, used).to(self._dtype)
                for replica in replicas:
                    module = replica.skeleton.model.get_submodule(path)
                    stack.enter_context(filled(module, rows.to(replica.device), used))
            yield

    def head(self, device: str) -> None:
        """The head's weights, on a device; a head that is tied to the embedding gets that tensor."""
        for path, (head, _) in self.head_linear().items():
            for name, parameter in list(head.named_parameters(recurse=False)):
                if not parameter.is_meta:
                    continue
                made = self._table.made_of.get(f"{path}.{name}")
                if made is None and name == "weight":
                    made = self._table.made_of.get(f"{self._embedding()}.weight")
                if made is None:
                    raise CheckpointError(f"{path}.{name}: no stored tensor makes it; the checkpoint is incomplete")
                tensor = self._weights.get(made[0].name).to(device, parameter.dtype)
                head.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def _embedding(self) -> str:
        """Path of the token embedding."""
        model = self._skeleton.model
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        return next((name for name, module in model.named_modules() if module is embedding), "")

    @contextmanager
    def shown_head(self, observer: Observer | None) -> Iterator[None]:
        """Within the block an observer sees the head, and its weights are as the observer wants them."""
        if observer is None:
            yield
            return
        watch, head = Watch(observer), self.head_linear()
        kept = {path: linear.weight for path, (linear, _) in head.items()}
        watch.adapt_weights(head)
        try:
            with hooked(head, watch):
                yield
        finally:
            for path, (linear, _) in head.items():
                linear.weight = kept[path]

    def _fill(self, keys: Sequence[str], device: str) -> None:
        """Read these, several at a time, and put them into the model."""
        if not keys:
            return
        with ThreadPoolExecutor(self._workers, thread_name_prefix="mso-load") as pool:
            tensors = dict(zip(keys, pool.map(self._weights.get, keys), strict=True))
        api.load_into(self._skeleton.model, tensors, self._dtype, device)

    def _apart(self, index: int) -> list[Bank]:
        """Banks of a layer whose experts are read one at a time."""
        return [bank for bank in self._banks[index] if self._one_expert and bank.simple]

    def _resident(self, index: int) -> list[str]:
        """Stored tensors that stay in memory while a layer runs."""
        left = {key for bank in self._apart(index) for key in bank.keys}
        return [key for key in self._table.layers[index] if key not in left]

    def _shelved(self, banks: Sequence[Bank], uses: int) -> bool:
        """Is it worth a file: would they be fetched, or decoded, more than once?"""
        slow = self._weights.distant or any(self._weights.packed(key) for bank in banks for key in bank.keys)
        return bool(banks) and slow and uses > 1

    def _require_filled(self, path: str, module: nn.Module, without: Sequence[str]) -> None:
        tensors = [*module.named_parameters(prefix=path), *module.named_buffers(prefix=path)]
        lost = [n for n, t in tensors if t.is_meta and not f"{n}.".startswith(tuple(f"{w}." for w in without))]
        if lost:
            raise CheckpointError(
                f"{self._weights.checkpoint.name}: no stored tensor makes {lost[0]}, nor {len(lost) - 1} others; the "
                "checkpoint is incomplete or its config.json belongs to another model"
            )

    def _experts(self, bank: Bank, replica: Replica, watch: Watch, read: Read | None) -> AbstractContextManager[None]:
        module = replica.skeleton.model.get_submodule(bank.path)
        dtype = getattr(module, bank.matrices[0].attribute).dtype

        def place(tensor: Tensor) -> Tensor:
            return tensor.to(replica.device, dtype)

        return experts_of(bank, module, watch, read, place)

    def _read(self, name: str, row: int | None) -> Tensor:
        return self._weights.get(name) if row is None else self._weights.rows(name, row, row + 1)[0]
