"""The decoder's own forward with every layer replaced by a stand-in: what a layer gets, and what follows the last one.

No code here knows any architecture. Rotary embeddings, masks, side inputs and whatever a model threads from layer to
layer come out of its own forward: the stand-in at the wanted layer notes its arguments and stops; those before it
return the true output of the layer before the wanted one. The cost is embedding, rotary embedding and mask once per
layer and batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mso_hub.calibrate.skeleton import Skeleton
from mso_hub.errors import MsoError


class _Stop(Exception):
    """Thrown out of the decoder's forward: no error, the arguments are known."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_of_layer, self.kwargs_of_layer = args, kwargs


class _Plan:
    """What the stand-ins of one forward do; `armed` once the true output was handed on."""

    def __init__(self, stop: int, output: Any) -> None:
        self.stop, self.output, self.armed = stop, output, stop == 0


class _StandIn(nn.Module):
    """In the place of a decoder layer; answers for its attributes, which some decoders ask for."""

    def __init__(self, inner: nn.Module, index: int, plan: _Plan) -> None:
        super().__init__()
        object.__setattr__(self, "_inner", inner)  # not as a child: no parameter is to be found here
        self._index, self._plan = index, plan

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stop here, or hand the true output on."""
        if self._index == self._plan.stop:
            raise _Stop(args, kwargs)
        self._plan.armed = self._index == self._plan.stop - 1
        return self._plan.output


class Known:
    """Output of a part of a model of which only the hidden states are known; other outputs are None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, key: int | slice | str) -> Any:
        return self.last_hidden_state if key in (0, "last_hidden_state") else (self.last_hidden_state,)[key]  # type: ignore[index]


class _Given(nn.Module):
    """In the place of the whole decoder."""

    def __init__(self, inner: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "_inner", inner)
        self._hidden = hidden

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Known:
        """What was given."""
        return Known(self._hidden)


class Parent:
    """The model around its decoder layers."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton
        self._plan = _Plan(0, None)

    def between(self) -> bool:
        """Is what runs now new: behind the true output of the last layer that is known (hooks ask this)?"""
        return self._plan.armed

    def arguments(self, ids: Tensor, layer: int, before: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a layer gets for these token ids I64 [rows, length], when the layer before it returned `before`."""
        self._plan = _Plan(layer, before)
        with self._standing_in():
            try:
                self._skeleton.base(input_ids=ids, use_cache=False)
            except _Stop as stop:
                return stop.args_of_layer, stop.kwargs_of_layer
        raise MsoError(f"{type(self._skeleton.base).__name__}: its forward never called decoder layer {layer}")

    def finish(self, ids: Tensor, last: Any) -> Tensor:
        """Hidden states [rows, length, H] as the head gets them, when the last layer returned `last`."""
        self._plan = _Plan(len(self._skeleton.layers), last)
        with self._standing_in():
            output = self._skeleton.base(input_ids=ids, use_cache=False)
        found = output[0]
        assert isinstance(found, Tensor)  # noqa: S101 - every decoder returns its hidden states first
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, length, V] by the model's own forward, whose decoder is taken to return `hidden`."""
        model = self._skeleton.model
        name = self._skeleton.top.split(".")[0]
        inner = model._modules[name]  # noqa: SLF001
        assert inner is not None  # noqa: S101 - top is a path of modules
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        model._modules[name] = _Given(inner, hidden)  # noqa: SLF001
        try:
            output = model(input_ids=ids, use_cache=False)
        finally:
            model._modules[name] = inner  # noqa: SLF001
        found = output.logits
        assert isinstance(found, Tensor)  # noqa: S101 - a language model
        return found

    @contextmanager
    def _standing_in(self) -> Iterator[None]:
        layers = self._skeleton.layers
        real = list(layers)
        for index, layer in enumerate(real):
            layers[index] = _StandIn(layer, index, self._plan)
        try:
            yield
        finally:
            for index, layer in enumerate(real):
                layers[index] = layer


def first(output: Any) -> Tensor:
    """Hidden states of a layer's output."""
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)  # noqa: S101 - a decoder layer returns hidden states, alone or first
    return found


def mappings(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that layers write into for later layers, by name (Gemma hands keys and values on that way)."""
    from collections.abc import MutableMapping

    return {name: value for name, value in kwargs.items() if isinstance(value, MutableMapping)}
