"""Token embeddings of which only the rows that the text needs are in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mso_hub.calibrate.skeleton import Skeleton
from mso_hub.calibrate.table import Table
from mso_hub.calibrate.weights import Weights
from mso_hub.errors import MsoError

BLOCK = 32 << 20
"""Bytes of a table that are read at a time."""
PER_LAYER = "embed_tokens_per_layer"
"""Gemma's second table, looked up with the same tokens."""


def used_tokens(batches: Sequence[Tensor]) -> Tensor:
    """Every token id of a text once, ascending, and 0: models put it where a token has no place in a smaller table."""
    every = torch.cat([torch.zeros(1, dtype=torch.int64), *(batch.flatten() for batch in batches)])
    found: Tensor = torch.unique(every)
    return found


def token_tables(skeleton: Skeleton, table: Table) -> dict[str, str]:
    """Path of an embedding that is looked up with token ids -> the one stored tensor that it is made of."""
    found: dict[str, str] = {}
    main: Any = skeleton.model.get_input_embeddings()  # type: ignore[operator]
    for name, module in skeleton.base.named_modules():
        if isinstance(module, nn.Embedding) and (module is main or name.rpartition(".")[2] == PER_LAYER):
            path = f"{skeleton.top}{name}"
            entries = table.made_of.get(f"{path}.weight", ())
            if len(entries) == 1 and not entries[0].place.steps:
                found[path] = entries[0].name
    return found


def read_used(weights: Weights, name: str, used: Tensor) -> Tensor:
    """Rows `used` of a stored table [V, H], read block by block; ids past its end are left out."""
    count = weights.shape(name)[0]
    step = max(1, BLOCK * count // max(1, weights.nbytes(name)))
    parts = []
    for at in range(0, count, step):
        wanted = used[(used >= at) & (used < at + step)]
        if len(wanted):
            parts.append(weights.rows(name, at, min(at + step, count))[wanted - at])
    return torch.cat(parts)


@contextmanager
def filled(module: nn.Module, rows: Tensor, used: Tensor) -> Iterator[None]:
    """Within the block an embedding looks its ids up among the rows that are there.

    rows  [U, H], one for each of `used`
    """
    kept = module._parameters["weight"]  # noqa: SLF001
    module._parameters["weight"] = nn.Parameter(rows, requires_grad=False)  # noqa: SLF001
    handle = module.register_forward_pre_hook(_lookup(used.to(rows.device)[: len(rows)]))
    try:
        yield
    finally:
        handle.remove()
        module._parameters["weight"] = kept  # noqa: SLF001


def _lookup(used: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        place = torch.searchsorted(used, args[0]).clamp(max=len(used) - 1)
        if not torch.equal(used[place], args[0]):
            raise MsoError("the model looks up tokens that are not in the text; please report the architecture")
        return (place, *args[1:])

    return before
