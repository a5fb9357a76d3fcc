"""START HERE: a model's own forward, one decoder layer in memory at a time, straight from the checkpoint.

For every decoder layer: read its tensors (decoded, if they are packed), run all batches through it, keep the outputs,
let the weights go. What enters a layer is what its model's own forward gives it (`parent`), so that hidden states,
logits and everything seen on the way are bit for bit those of the whole model in memory.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mso_hub.calibrate.attention import Attention
from mso_hub.calibrate.cache import Cache, FileCache, MemoryCache, State
from mso_hub.calibrate.loading import Loader
from mso_hub.calibrate.memory import Memory, Needs, limit_kernels
from mso_hub.calibrate.observer import Layer, Observer, Watch, hooked
from mso_hub.calibrate.replica import Replica, copy_layer, first
from mso_hub.calibrate.skeleton import build_skeleton, read_blueprint, release, said_dtype
from mso_hub.calibrate.table import read_table, require_whole
from mso_hub.calibrate.weights import TORCH, Weights, float_dtype
from mso_hub.errors import PlanError, RecipeError
from mso_hub.events import LayerDone, Listener, ignore
from mso_hub.source import Source, read_checkpoint

__all__ = ["Layer", "Memory", "Needs", "Observer", "State", "Walk"]

EXPERT, STACK = "expert", "stack"
LOGITS = 64 << 20
"""Bytes of logits in F32 that are made at a time."""


class Walk:
    """A checkpoint, ready to be run layer by layer.

    source             folder or Hub repo, dense or in any format that can be decoded
    dtype              of weights and arithmetic; None: what config.json says
    attention          `sdpa`, `eager`, ...; None: what transformers takes for this model
    experts            `expert`: each expert is read when it is used and never kept; `stack`: all of a layer at once
    device             `cpu`, `cuda:0`, or several of them, which then share the batches
    memory             limits; outputs of layers go to files when they would not fit
    trust_remote_code  run the repo's own code where transformers has none for this model
    on_event           hears LayerDone

    Only headers are read here. Raises CheckpointError for a broken source, RecipeError for a model that transformers
    does not know or a setting that it does not have, PlanError for a layer that does not fit.
    """

    def __init__(
        self,
        source: Source,
        *,
        dtype: str | None = None,
        attention: str | None = None,
        experts: str = EXPERT,
        device: str | Sequence[str] = "cpu",
        memory: Memory | None = None,
        trust_remote_code: bool = False,
        on_event: Listener = ignore,
    ) -> None:
        if experts not in (EXPERT, STACK):
            raise RecipeError(f"experts must be {EXPERT!r} or {STACK!r}, got {experts!r}")
        limit_kernels()
        self.source, self.memory, self._on_event = source, memory or Memory(), on_event
        self.devices = _checked((device,) if isinstance(device, str) else tuple(device))
        self.checkpoint = read_checkpoint(source)
        blueprint = read_blueprint(source, self.checkpoint, trust_remote_code=trust_remote_code)
        self.dtype = float_dtype(self.checkpoint, dtype or said_dtype(self.checkpoint.config))
        self.weights = Weights(source, self.checkpoint, self.dtype)
        skeletons = [build_skeleton(blueprint, TORCH[self.dtype], attention) for _ in self.devices]
        self.table = read_table(skeletons[0], self.weights.names)
        require_whole(skeletons[0], self.table, self.weights)
        self._replicas = [Replica(s, self.table, d) for s, d in zip(skeletons, self.devices, strict=True)]
        self._skeleton = skeletons[0]
        self._loader = Loader(
            self.weights, self.table, skeletons[0], TORCH[self.dtype], self.memory.work, one_expert=experts == EXPERT
        )
        self._settings = f"{self.dtype} {self._skeleton.text._attn_implementation} {experts}"  # noqa: SLF001

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self._skeleton.layers)

    @property
    def config(self) -> Any:
        """The library's config of the model."""
        return self._skeleton.config

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding: ids are below this."""
        return int(self._skeleton.text.vocab_size)

    @property
    def modules(self) -> tuple[str, ...]:
        """Stored names of all linear layers that an observer may see, experts and lm_head included."""
        return self._loader.modules()

    def layer_of(self, module: str) -> int | None:
        """Decoder layer of one of `modules`, None for those around the layers."""
        return self._loader.layer_of(module)

    def needs(self, batches: Sequence[Tensor]) -> Needs:
        """Memory that running these batches takes, from headers alone."""
        return self._loader.needs(batches)

    def run(
        self,
        batches: Sequence[Tensor],
        observer: Observer,
        *,
        start: State | None = None,
        logits: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        """Run token ids through all layers.

        batches   I64 [rows, length] each, without padding
        observer  sees, and may change, what linear layers get
        start     go on after its last complete layer, and keep it up to date
        logits    gets (batch, hidden states [rows, length, H] as the head gets them); `head` makes logits of them

        Raises RecipeError for token ids that the model does not have, PlanError when a limit is below what one layer
        needs (before a weight is read), ResumeError for a state of something else.
        """
        self._check(batches)
        self.needs(batches).check(self.memory, self.devices)
        watch = Watch(observer)
        attention = Attention(watch)
        with ExitStack() as stack:
            cache = stack.enter_context(self._cache(batches, start))
            stack.enter_context(self._loader.base(batches, self._replicas))
            stack.enter_context(attention.watching())
            for replica in self._replicas:
                stack.enter_context(hooked(replica.around(), watch, replica.parent.between))
            for index in range(0 if start is None else start.layers_done, self.layers):
                began = time.monotonic()
                with self._layer(index, batches, cache, watch) as layer:
                    self._through(layer, observer, watch, attention)
                cache.turn(index)
                if start is not None and isinstance(cache, FileCache):
                    start.advance(cache, index, self._key(batches))
                tokens = sum(batch.numel() for batch in batches)
                self._on_event(LayerDone(index, self.layers, tokens, time.monotonic() - began))
            self._finish(batches, cache, watch, logits)

    def head(self, hidden: Tensor, observer: Observer | None = None) -> Iterator[Tensor]:
        """Logits [rows, n, V] of hidden states [rows, length, H] as `run` hands them out, n positions at a time.

        observer  may change what the head multiplies (its weight is asked for whenever this is called)
        The head's weights are read at the first call and stay until `close`.
        """
        self._loader.head(self.devices[0])
        step = max(1, LOGITS // (4 * self.vocab_size * hidden.shape[0]))
        with torch.no_grad(), self._loader.shown_head(observer):
            for at in range(0, hidden.shape[1], step):
                yield self._replicas[0].parent.logits(hidden[:, at : at + step].to(self.devices[0]))

    def close(self) -> None:
        """Let the weights of the head go."""
        release(self._skeleton.model)

    def _check(self, batches: Sequence[Tensor]) -> None:
        if not batches:
            raise RecipeError("batches: there is no text to run; give at least one batch of token ids")
        for number, batch in enumerate(batches):
            if batch.dim() != 2 or batch.dtype != torch.int64 or not batch.numel():
                raise RecipeError(
                    f"batches[{number}]: must be token ids I64 [rows, length], got {batch.dtype} {list(batch.shape)}"
                )
            if int(batch.max()) >= self.vocab_size or int(batch.min()) < 0:
                raise RecipeError(
                    f"batches[{number}]: holds the token id {int(batch.max())}, the model's embedding has "
                    f"{self.vocab_size} rows; take the tokenizer that belongs to {self.source.name}"
                )

    def _key(self, batches: Sequence[Tensor]) -> str:
        """What a state belongs to."""
        digest = hashlib.sha256(f"{self.checkpoint.identity} {self._settings}".encode())
        for batch in batches:
            digest.update(f"{list(batch.shape)}".encode() + batch.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @contextmanager
    def _cache(self, batches: Sequence[Tensor], start: State | None) -> Iterator[Cache]:
        if start is not None:
            yield start.open(self._key(batches))
            return
        cache = MemoryCache(self.needs(batches).room(self.memory), self.memory.work)
        try:
            yield cache
        finally:
            cache.close()

    @contextmanager
    def _layer(self, index: int, batches: Sequence[Tensor], cache: Cache, watch: Watch) -> Iterator[_Loaded]:
        """A layer with its weights on all devices, as the observer wants them."""
        with self._loader.layer(index, watch, self._replicas, len(batches), self.needs(batches).spare(self.memory)):
            primary = self._replicas[0]
            watch.adapt_weights(primary.linears(index))
            loaded = _Loaded(index, self.table.layers[index], self._replicas, batches, cache, watch)
            loaded.spread()
            yield loaded

    def _through(self, layer: _Loaded, observer: Observer, watch: Watch, attention: Attention) -> None:
        """All batches through one layer; a second time when the observer has changed its weights."""
        observer.begin_layer(layer)
        with ExitStack() as stack:
            for replica in self._replicas:
                stack.enter_context(replica.watched(layer.index, watch, attention))
            layer.run_all(keep=not observer.changes_weights)
        changed = observer.end_layer(layer)
        if changed and not observer.changes_weights:
            raise PlanError(
                f"{type(observer).__name__}: its end_layer says that it changed weights; an observer that does so must "
                "set changes_weights"
            )
        if observer.changes_weights:
            layer.spread()
            with watch.not_told():
                layer.run_all(keep=True)

    def _finish(
        self, batches: Sequence[Tensor], cache: Cache, watch: Watch, logits: Callable[[int, Tensor], None] | None
    ) -> None:
        """What follows the last layer; the observer is told what the head gets, whether or not there are logits."""
        for number, batch in enumerate(batches):
            hidden = self._replicas[0].finish(batch, cache.get(number))
            for _, names in self._loader.head_linear().values():
                watch.inputs(names, hidden)
            if logits is not None:
                logits(number, hidden)


def _checked(devices: tuple[str, ...]) -> tuple[str, ...]:
    """RecipeError for a device that is not there."""
    for device in devices:
        try:
            found = torch.device(device)
        except RuntimeError as error:
            raise RecipeError(f"device: {device!r} is no name of a device; take cpu or cuda:0, cuda:1, ...") from error
        count = torch.cuda.device_count()
        if found.type not in ("cpu", "cuda"):
            raise RecipeError(f"device: models run on cpu or cuda:0, cuda:1, ..., got {device!r}")
        if found.type == "cuda" and (found.index or 0) >= count:
            raise RecipeError(f"device: {device!r} is not there, torch sees {count} CUDA devices; take cpu")
    if not devices:
        raise RecipeError("device: needs at least one device, cpu or cuda:0")
    return devices


class _Loaded:
    """The layer that has its weights."""

    def __init__(
        self, index: int, keys: Sequence[str], replicas: Sequence[Replica], batches: Sequence[Tensor], cache: Cache,
        watch: Watch,
    ) -> None:  # fmt: skip
        self.index = index
        self._replicas, self._batches, self._cache, self._watch = replicas, batches, cache, watch
        self._kept = False
        marker = f".{index}."
        self.name = next((key[: key.index(marker)] + f".{index}" for key in keys if marker in key), str(index))

    @property
    def module(self) -> nn.Module:
        """On the first device."""
        return self._replicas[0].skeleton.layers[self.index]

    @property
    def linears(self) -> Mapping[str, nn.Module]:
        """Stored name -> linear layer."""
        return {name: module for module, names in self._replicas[0].linears(self.index).values() for name in names}

    def forward(self, batch: int) -> Tensor:
        """Hidden states behind the layer, for a batch."""
        if self._kept:
            raise PlanError(
                f"{self.name}: its inputs are gone; forward works in begin_layer, and in end_layer of an observer with "
                "changes_weights"
            )
        with self._watch.not_told():
            return first(self._replicas[0].run(self.index, self._batches[batch], self._cache, batch)[0])

    def spread(self) -> None:
        """The weights of the first device on the others."""
        for replica in self._replicas[1:]:
            copy_layer(self.module, replica.skeleton.layers[self.index], replica.device)

    def run_all(self, *, keep: bool) -> None:
        """Every batch on its device."""

        def work(number: int) -> None:
            replica = self._replicas[number]
            for batch in range(number, len(self._batches), len(self._replicas)):
                tree = replica.run(self.index, self._batches[batch], self._cache, batch)
                if keep:
                    self._cache.put(batch, tree)

        self._kept = keep
        if len(self._replicas) == 1:
            work(0)
            return
        with ThreadPoolExecutor(len(self._replicas), thread_name_prefix="mso-calibrate") as pool:
            list(pool.map(work, range(len(self._replicas))))
