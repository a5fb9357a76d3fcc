"""What a walk shows to whoever watches, and the hooks that show it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from mso_hub.calibrate import transformers_api as api
from mso_hub.calibrate.table import Table
from mso_hub.errors import PlanError


class Observer:
    """Base class: sees everything, changes nothing. A module is called by its stored name.

    A linear that is fused in memory and not on disk (gate_proj, up_proj) is told once for each stored name. Row 5 of a
    stored 3-D tensor of experts is called `NAME[5]`. With several devices the calls come from several threads, one at
    a time, and which batch comes first is not fixed.

    changes_weights  `end_layer` changes weights of the layer in memory: its outputs are computed after that, in a
                     second pass over the batches, and what the first pass computes is not kept
    """

    changes_weights = False

    def begin_layer(self, layer: Layer) -> None:
        """The layer's weights are in memory, nothing was computed yet."""

    def inputs(self, module: str, x: Tensor) -> Tensor:
        """Input of a linear layer, [..., K] with tokens first, before it is multiplied; what is returned is multiplied.

        Every linear of the decoder layers and around them (lm_head too), and every expert's with the tokens that are
        routed to it: an expert without tokens is not told. Not called in the second pass.
        """
        return x

    def weight(self, module: str, w: Tensor) -> Tensor:
        """Weight [N, K] before it is used: once a layer, an expert's whenever it is read; may return another one."""
        return w

    def keys_values(self, module: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values as an engine caches them, by attention module: [rows, KV heads, length, head size].

        After rotary embedding and norms. Of latent attention (DeepSeek): the latent with the rotary part behind it,
        and the latent, [rows, length, size]. What is returned takes their place, except in latent attention, which has
        computed with them already. Not called in the second pass.
        """
        return None

    def end_layer(self, layer: Layer) -> bool:
        """All batches went through; the returned truth says whether weights changed (see `changes_weights`)."""
        return False


class Layer(Protocol):
    """A decoder layer with its weights in memory."""

    @property
    def index(self) -> int:
        """Counted from 0."""

    @property
    def name(self) -> str:
        """Stored prefix: `model.layers.3`."""

    @property
    def module(self) -> nn.Module:
        """The layer itself, on the first device."""

    @property
    def linears(self) -> Mapping[str, nn.Module]:
        """Stored name -> linear layer, without experts that are read one at a time."""

    def forward(self, batch: int) -> Tensor:
        """Hidden states [rows, length, H] behind the layer, for a batch; nothing is observed or kept.

        In `begin_layer`, and in `end_layer` of an observer that changes weights: later the inputs are gone.
        """


class Watch:
    """An observer behind a lock, with what it overrides known, so that nothing is done for nobody."""

    def __init__(self, observer: Observer) -> None:
        kind = type(observer)
        self._observer = observer
        self._lock = threading.Lock()
        self.sees_inputs = kind.inputs is not Observer.inputs
        self.sees_weights = kind.weight is not Observer.weight
        self.sees_attention = kind.keys_values is not Observer.keys_values
        self._silent = False

    @contextmanager
    def not_told(self) -> Iterator[None]:
        """Within the block the observer hears of no inputs, keys or values; weights are still as it wants them."""
        before, self._silent = self._silent, True
        try:
            yield
        finally:
            self._silent = before

    def inputs(self, modules: Sequence[str], x: Tensor) -> list[Tensor]:
        """Tell it under each name -> what each of them multiplies."""
        if not self.sees_inputs or self._silent:
            return [x] * len(modules)
        with self._lock:
            return [self._observer.inputs(name, x) for name in modules]

    def weight(self, module: str, w: Tensor) -> Tensor:
        """The weight that is used."""
        if not self.sees_weights:
            return w
        with self._lock:
            return self._observer.weight(module, w)

    def keys_values(self, module: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """Pass them on -> what takes their place, None where they stay."""
        if self._silent:
            return None
        with self._lock:
            return self._observer.keys_values(module, k, v)

    def adapt_weights(self, linears: Mapping[str, tuple[nn.Module, tuple[str, ...]]]) -> None:
        """Let it replace the weights of linear layers; path -> (layer, stored names of its rows, in order)."""
        if not self.sees_weights:
            return
        for path, (linear, names) in linears.items():
            weight = linear.weight
            assert isinstance(weight, Tensor)  # noqa: S101 - is_linear chose it
            turned = api.is_turned(linear)
            own = weight.T if turned else weight
            if len(names) > 1 and own.shape[0] % len(names):
                raise PlanError(
                    f"{path}: is made of {', '.join(names)} in unequal parts, whose weights cannot be told apart"
                )
            parts = own.chunk(len(names))
            changed = [self.weight(name, part) for name, part in zip(names, parts, strict=True)]
            if all(a is b for a, b in zip(parts, changed, strict=True)):
                continue
            whole = changed[0] if len(changed) == 1 else torch.cat(changed)
            whole = (whole.T if turned else whole).to(weight.dtype).contiguous()
            linear.weight = nn.Parameter(whole, requires_grad=False)


def linears_of(module: nn.Module, prefix: str, table: Table) -> dict[str, tuple[nn.Module, tuple[str, ...]]]:
    """Path -> linear layer and the stored names that make its rows, for all below a module with a parameter prefix."""
    return {
        path: (child, table.modules(f"{prefix}{path}.weight"))
        for path, child in module.named_modules()
        if api.is_linear(child)
    }


@contextmanager
def hooked(
    linears: Mapping[str, tuple[nn.Module, tuple[str, ...]]], watch: Watch, when: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """Within the block the observer sees, and may change, what these linear layers get."""
    if not watch.sees_inputs:
        yield
        return
    handles = [module.register_forward_pre_hook(_hook(names, watch, when)) for module, names in linears.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    names: tuple[str, ...], watch: Watch, when: Callable[[], bool]
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not when():
            return None
        found = watch.inputs(names, args[0])
        return None if found[0] is args[0] else (found[0], *args[1:])

    return before
