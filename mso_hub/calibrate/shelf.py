"""Experts of one layer in a file: fetched and decoded once, mapped and read as often as they are used."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mso_hub.calibrate.experts import Bank, Read
from mso_hub.calibrate.weights import Weights
from mso_hub.errors import SinkError


def kept(read: Read, room: int) -> Read:
    """The same, which keeps what it has read until `room` bytes are full: the first to come stay, for every batch."""
    here: dict[tuple[str, int | None], Tensor] = {}
    left = room

    def first(name: str, row: int | None) -> Tensor:
        nonlocal left
        found = here.get((name, row))
        if found is None:
            found = read(name, row)
            if found.nbytes <= left:
                left -= found.nbytes
                here[name, row] = found
        return found

    return first


@contextmanager
def shelf(weights: Weights, banks: Sequence[Bank], folder: Path | None) -> Iterator[Read]:
    """All matrices of some banks in one temporary file -> what reads them there.

    folder  where the file is, None for the system's place; SinkError when there is no room
    """
    places: dict[tuple[str, int | None], tuple[int, int, torch.dtype, tuple[int, ...]]] = {}
    with tempfile.TemporaryFile(prefix="mso-hub-experts-", dir=folder) as file:
        at = 0
        for name, row in _pieces(banks):
            tensor = weights.get(name) if row is None else weights.rows(name, row, row + 1)[0]
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            try:
                file.write(data.data)
                file.write(bytes(-len(data) % 64))  # aligned, as memory would be
            except OSError as error:
                raise SinkError(
                    f"{folder or tempfile.gettempdir()}: no room for the experts of a layer: {error}"
                ) from error
            places[name, row] = (at, at + len(data), tensor.dtype, tuple(tensor.shape))
            at += len(data) + -len(data) % 64
        file.flush()
        mapped = np.memmap(file, np.uint8, "c")

        def read(name: str, row: int | None) -> Tensor:
            begin, end, dtype, shape = places[name, row]
            return torch.from_numpy(mapped[begin:end]).view(dtype).reshape(shape)

        yield read


def _pieces(banks: Sequence[Bank]) -> Iterator[tuple[str, int | None]]:
    for bank in banks:
        for matrix in bank.matrices:
            for expert in range(matrix.count):
                if matrix.whole is not None:
                    yield matrix.whole, expert
                else:
                    yield from ((name, None) for name in matrix.parts[expert])
