"""A model on one device, of which at most one decoder layer has weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mso_hub.calibrate.attention import Attention, attention_names
from mso_hub.calibrate.cache import Cache
from mso_hub.calibrate.observer import Watch, hooked, linears_of
from mso_hub.calibrate.parent import Parent, first, mappings
from mso_hub.calibrate.skeleton import Skeleton
from mso_hub.calibrate.table import Table
from mso_hub.errors import CheckpointError, MsoError, PlanError


class Replica:
    """One copy of the model; several of them share the work of a layer.

    device  where it computes
    """

    def __init__(self, skeleton: Skeleton, table: Table, device: str) -> None:
        self.skeleton, self.device = skeleton, device
        self.parent = Parent(skeleton)
        self._table = table
        move_buffers(skeleton.model, device)

    def around(self) -> dict[str, tuple[nn.Module, tuple[str, ...]]]:
        """Linear layers of the decoder beside its layers."""
        below = f"{self.skeleton.list}."
        found = linears_of(self.skeleton.base, self.skeleton.top, self._table)
        return {path: linear for path, linear in found.items() if not path.startswith(below)}

    def linears(self, layer: int) -> dict[str, tuple[nn.Module, tuple[str, ...]]]:
        """Linear layers of a decoder layer."""
        return linears_of(self.skeleton.layers[layer], f"{self.skeleton.prefix}{layer}.", self._table)

    @contextmanager
    def watched(self, layer: int, watch: Watch, attention: Attention) -> Iterator[None]:
        """Within the block the observer sees what passes through a decoder layer."""
        linears = self.linears(layer)
        stored = {module: names[0] for module, names in linears.values()}
        modules = attention_names(self.skeleton.layers[layer], stored)
        with hooked(linears, watch), attention.among(modules):
            yield

    def forward(self, layer: int, ids: Tensor, before: Any) -> tuple[Any, dict[str, Any]]:
        """A decoder layer's output for a batch, and what it wrote into arguments for later layers.

        before  what `keep` made of the layer before it, None for layer 0
        """
        output, written = (None, {}) if before is None else (to_device(part, self.device) for part in before)
        args, kwargs = self.parent.arguments(ids.to(self.device), layer, output)
        for name, value in mappings(kwargs).items():
            value.update(written.get(name, {}))
        found = self.skeleton.layers[layer](*args, **kwargs)
        return found, {name: dict(value) for name, value in mappings(kwargs).items()}

    def run(self, layer: int, ids: Tensor, cache: Cache, batch: int) -> tuple[Any, dict[str, Any]]:
        """`forward` with what the cache has for this batch.

        Raises PlanError where memory ends, CheckpointError for whatever else ends the model's own code.
        """
        with torch.no_grad(), explained(f"decoder layer {layer}", ids):
            return self.forward(layer, ids, cache.get(batch) if layer else None)

    def finish(self, ids: Tensor, last: Any) -> Tensor:
        """Hidden states [rows, length, H] as the head gets them; errors as `run`."""
        with torch.no_grad(), explained("what follows the layers", ids):
            return self.parent.finish(ids.to(self.device), to_device(last[0], self.device))


@contextmanager
def explained(part: str, ids: Tensor) -> Iterator[None]:
    """Errors of torch and of a model's code within the block -> PlanError for memory, else CheckpointError."""
    try:
        yield
    except MsoError:
        raise
    except (RuntimeError, IndexError, KeyError) as error:
        text = f"{ids.shape[0]:,} rows of {ids.shape[1]:,} tokens"
        if isinstance(error, torch.OutOfMemoryError) or "t allocate memory" in str(error):
            raise PlanError(
                f"{part}: no memory is left to compute {text}; lower --batch_size or --max_seq_len, the same text in "
                "smaller pieces"
            ) from error
        why = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{part}: the model's own code fails for {text}: {type(error).__name__}: {why}; its config.json does not "
            "fit its weights, or --max_seq_len is beyond what it takes"
        ) from error


def copy_layer(source: nn.Module, target: nn.Module, device: str) -> None:
    """Filled parameters and buffers of one module in another of the same kind; on the same device they are shared."""
    for (_, here), (_, there) in zip(source.named_modules(), target.named_modules(), strict=True):
        for name, parameter in here._parameters.items():  # noqa: SLF001
            if parameter is not None and not parameter.is_meta:
                there._parameters[name] = nn.Parameter(parameter.to(device), requires_grad=False)  # noqa: SLF001
        for name, buffer in here._buffers.items():  # noqa: SLF001
            if buffer is not None and not buffer.is_meta:
                there._buffers[name] = buffer.to(device)  # noqa: SLF001


def move_buffers(model: nn.Module, device: str) -> None:
    """Buffers that are not stored, to a device."""
    for module in model.modules():
        for name, buffer in module._buffers.items():  # noqa: SLF001
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)  # noqa: SLF001


def to_device(tree: Any, device: str) -> Any:
    """A nest with its tensors on a device."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {key: to_device(value, device) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(to_device(item, device) for item in tree)
    return tree


__all__ = ["Replica", "copy_layer", "first", "move_buffers", "to_device"]
