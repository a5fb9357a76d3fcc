"""What a walk shows -> the largest magnitude, the number of tokens and, on request, columns of every module's input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mso_hub.calibrate.observer import Layer, Observer
from mso_hub.calibrate.statistics import CHANNELS, MOMENTS
from mso_hub.checkpoint import Array
from mso_hub.errors import NonFiniteError
from mso_hub.events import BatchDone, Listener, ignore


@dataclass(frozen=True, slots=True)
class Found:
    """What a module's input was like.

    amax     largest |x|, as F32
    tokens   rows
    vectors  CHANNELS and MOMENTS, F32 [K] each, where they were asked for
    """

    amax: float
    tokens: int
    vectors: Mapping[str, Array] = field(default_factory=dict)


Save = Callable[[int, Mapping[str, Found], Mapping[str, tuple[float, float]]], None]
"""(layer, module -> what its input was like, attention module -> largest magnitude of keys and of values)."""


@dataclass(slots=True)
class _Seen:
    """So far, of one module on one device; tensors stay there until the layer ends, so that nothing waits for it.

    amax     F32 []
    tokens   rows
    columns  F32 [K] largest |x|
    squares  F64 [K] sum of x^2
    """

    amax: Tensor
    tokens: int
    columns: Tensor | None
    squares: Tensor | None

    def add(self, other: _Seen) -> None:
        """The same module's next input."""
        self.amax = torch.maximum(self.amax, other.amax.to(self.amax.device))  # NaN stays NaN
        self.tokens += other.tokens
        if self.columns is not None and other.columns is not None:
            self.columns = torch.maximum(self.columns, other.columns.to(self.columns.device))
        if self.squares is not None and other.squares is not None:
            self.squares = self.squares + other.squares.to(self.squares.device)


class Collector(Observer):
    """Watches a walk; `save` gets what it saw whenever a layer ends, and at `flush`."""

    def __init__(self, save: Save, *, channels: bool = False, on_event: Listener = ignore) -> None:
        self._save, self._channels, self._on_event = save, channels, on_event
        self._inputs: dict[tuple[str, str], _Seen] = {}
        self._caches: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self._last: tuple[Tensor, int, _Seen] | None = None
        self._counted = ""

    def begin_layer(self, layer: Layer) -> None:
        """Its first linear that sees every token tells how far a layer is."""
        self._counted = ""

    def inputs(self, module: str, x: Tensor) -> Tensor:
        """Measure it; the tensor is handed on as it is."""
        if x.numel():
            self._tell(module, x)
            place = module, str(x.device)
            found = self._measured(x)
            if place in self._inputs:
                self._inputs[place].add(found)
            else:
                self._inputs[place] = _Seen(found.amax, found.tokens, found.columns, found.squares)
        return x

    def keys_values(self, module: str, k: Tensor, v: Tensor) -> None:
        """Measure both."""
        if not k.numel() or not v.numel():
            return
        with torch.no_grad():
            pair = k.abs().amax().float(), v.abs().amax().float()
        before = self._caches.get((module, str(k.device)), pair)
        self._caches[module, str(k.device)] = torch.maximum(before[0], pair[0]), torch.maximum(before[1], pair[1])

    def end_layer(self, layer: Layer) -> bool:
        """Hand out what was seen; no weight has changed."""
        self.flush(layer.index)
        return False

    def flush(self, layer: int) -> None:
        """Hand out what was seen since the last time; NonFiniteError names a module whose input is no number."""
        seen: dict[str, _Seen] = {}
        for (module, _), one in self._inputs.items():  # as they came: the first that is no number is where it began
            if module in seen:
                seen[module].add(one)
            else:
                seen[module] = one
        found = {module: _found(module, one) for module, one in seen.items()}
        caches: dict[str, tuple[float, float]] = {}
        for (module, _), pair in sorted(self._caches.items()):
            keys, values = (_finite(module, float(one), "its keys or values") for one in pair)
            before = caches.get(module, (0.0, 0.0))
            caches[module] = max(keys, before[0]), max(values, before[1])
        self._inputs.clear()
        self._caches.clear()
        self._last = None
        self._save(layer, found, caches)

    def _tell(self, module: str, x: Tensor) -> None:
        """An event for every batch, by the first module that a layer shows."""
        self._counted = self._counted or module
        if module == self._counted:
            self._on_event(BatchDone(x.numel() // x.shape[-1]))

    def _measured(self, x: Tensor) -> _Seen:
        """Of one input, which q, k and v get one after another as the same tensor."""
        version = x._version  # noqa: SLF001 - torch's count of changes in place
        if self._last is not None and self._last[0] is x and self._last[1] == version:
            return self._last[2]
        with torch.no_grad():
            rows = x.detach().reshape(-1, x.shape[-1])
            columns = squares = None
            if self._channels:
                columns = rows.abs().amax(0).float()
                squares = rows.float().square().sum(0, dtype=torch.float64)
            amax = rows.abs().amax().float() if columns is None else columns.amax()
        found = _Seen(amax, rows.shape[0], columns, squares)
        self._last = x, version, found
        return found


def _found(module: str, seen: _Seen) -> Found:
    vectors = {}
    if seen.columns is not None and seen.squares is not None:
        vectors[CHANNELS] = seen.columns.cpu().numpy()
        vectors[MOMENTS] = (seen.squares / seen.tokens).float().cpu().numpy()
    return Found(_finite(module, float(seen.amax), "its input"), seen.tokens, vectors)


def _finite(module: str, value: float, what: str) -> float:
    if not value < float("inf"):
        raise NonFiniteError(
            f"{module}: {what} holds NaN or infinity ({value}) while the model runs; the checkpoint is damaged, or its "
            "numbers need more range than this dtype has: try --calib_dtype fp32"
        )
    return value
