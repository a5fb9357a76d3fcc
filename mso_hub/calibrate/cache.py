"""What layers returned, batch by batch: in memory, or in files that are mapped; and the state to go on from.

A layer's output may be a tensor or any nest of tuples, lists and mappings of tensors and plain values. On disk it is
one safetensors file per batch and layer; the shape of the nest is JSON in its `__metadata__`. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mso_hub.calibrate.weights import TAGS, TORCH
from mso_hub.checkpoint import TensorInfo, build_header, header_length, parse_header
from mso_hub.errors import MsoError, ResumeError, SinkError
from mso_hub.sink.local import sync_folder

STATE = "state.json"
"""Names the last complete layer of a state; written last."""


def flatten(tree: Any, tensors: list[Tensor]) -> Any:
    """A nest without its tensors, as JSON; the tensors are appended to a list. MsoError for what is neither."""
    if isinstance(tree, Tensor):
        tensors.append(tree)
        return {"tensor": len(tensors) - 1}
    if isinstance(tree, bool | int | float | str) or tree is None:
        return {"value": tree}
    if isinstance(tree, Mapping):
        return {"mapping": [[flatten(key, tensors), flatten(value, tensors)] for key, value in tree.items()]}
    if type(tree) in (tuple, list):
        return {type(tree).__name__: [flatten(item, tensors) for item in tree]}
    raise MsoError(f"a decoder layer hands on a {type(tree).__name__}, which cannot be kept between layers")


def rebuild(shape: Any, tensors: list[Tensor]) -> Any:
    """The inverse of `flatten`; every mapping becomes a dict."""
    ((kind, content),) = shape.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "value":
        return content
    if kind == "mapping":
        return {rebuild(key, tensors): rebuild(value, tensors) for key, value in content}
    items = [rebuild(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def tree_bytes(tree: Any) -> int:
    """Bytes of the tensors of a nest."""
    tensors: list[Tensor] = []
    flatten(tree, tensors)
    return sum(t.numel() * t.element_size() for t in tensors)


class Cache(Protocol):
    """Outputs of the last complete layer, and those of the layer that runs."""

    def put(self, batch: int, tree: Any) -> None:
        """Output of the layer that runs; what its predecessor left for this batch may be gone after that."""

    def get(self, batch: int) -> Any:
        """Output of the last complete layer, on the CPU."""

    def turn(self, layer: int) -> None:
        """The layer is complete: what was put is what `get` returns."""

    def close(self) -> None:
        """Let go of everything that is not meant to stay."""


class MemoryCache:
    """In memory, as far as there is room; batches that find none go to files.

    room  bytes, None for no limit
    work  folder for the files, None for the system's; nothing is made there before it is needed
    """

    def __init__(self, room: int | None = None, work: Path | None = None) -> None:
        self._room, self._work, self._layer = room, work, -1
        self._kept: dict[int, tuple[Any, list[Tensor]]] = {}
        self._size: dict[int, int] = {}
        self._files: FileCache | None = None
        self._lock = threading.Lock()

    def put(self, batch: int, tree: Any) -> None:
        """Tensors of their own: no view keeps a larger one alive."""
        size = tree_bytes(tree)
        with self._lock:
            held = sum(self._size.values()) - self._size.get(batch, 0)
            fits = self._room is None or held + size <= self._room
            if fits:
                self._size[batch] = size
            else:
                self._size.pop(batch, None)
                self._kept.pop(batch, None)
                self._files = self._files or self._open()
        if not fits:
            assert self._files is not None  # noqa: S101 - made above
            self._files.put(batch, tree)
            return
        tensors: list[Tensor] = []
        shape = flatten(tree, tensors)
        self._kept[batch] = shape, [_own(t) for t in tensors]

    def get(self, batch: int) -> Any:
        """As it was put."""
        if batch not in self._kept:
            assert self._files is not None  # noqa: S101 - every batch was put
            return self._files.get(batch)
        shape, tensors = self._kept[batch]
        return rebuild(shape, tensors)

    @property
    def in_files(self) -> bool:
        """Did any batch find no room?"""
        return self._files is not None

    def turn(self, layer: int) -> None:
        """In memory `put` has replaced what was there."""
        self._layer = layer
        if self._files is not None:
            self._files.turn(layer)

    def close(self) -> None:
        """Forget, and remove the files."""
        self._kept.clear()
        if self._files is not None:
            self._files.close()

    def _open(self) -> FileCache:
        return FileCache(Path(tempfile.mkdtemp(prefix="mso-hub-", dir=self._work)), self._layer)


class FileCache:
    """In files below a folder, read through the page cache, which the system takes back when memory is short.

    layer    number of the last complete layer, -1 for none
    durable  every layer is synced before the one before it goes; False: for the space alone
    """

    def __init__(self, folder: Path, layer: int = -1, *, durable: bool = False) -> None:
        self._folder, self._layer, self._durable = folder, layer, durable
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, batch: int, tree: Any) -> None:
        """Write it; without durability the predecessor's goes at once (mapped tensors stay readable)."""
        folder = self._of(self._layer + 1)
        folder.mkdir(exist_ok=True)
        write_tree(folder / f"{batch}.safetensors", tree, durable=self._durable)
        if not self._durable:
            (self._of(self._layer) / f"{batch}.safetensors").unlink(missing_ok=True)

    def get(self, batch: int) -> Any:
        """Mapped from its file."""
        return read_tree(self._of(self._layer) / f"{batch}.safetensors")

    def turn(self, layer: int) -> None:
        """From now on this layer's files count."""
        if self._durable and self._of(layer).is_dir():
            sync_folder(self._of(layer))
        self._layer = layer
        if not self._durable:
            self.drop_before()

    def drop_before(self) -> None:
        """Remove what earlier layers and torn attempts left."""
        for path in self._folder.iterdir():
            if path.is_dir() and path != self._of(self._layer):
                shutil.rmtree(path)

    def close(self) -> None:
        """Remove everything, unless it is meant to stay."""
        if not self._durable:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _of(self, layer: int) -> Path:
        return self._folder / f"layer-{layer}"


class State:
    """A folder from which a walk can go on after its last complete layer, also after a crash.

    Give it to `Walk.run`, which checks that it belongs to the same walk, goes on where it ends and keeps it up to
    date. One run at a time.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._said: dict[str, Any] = {}
        if (self.folder / STATE).is_file():
            self._said = json.loads((self.folder / STATE).read_text(encoding="utf-8"))

    @property
    def layers_done(self) -> int:
        """Complete decoder layers."""
        return int(self._said.get("layer", -1)) + 1

    def open(self, key: str) -> FileCache:
        """The outputs that it holds; ResumeError when they come from another model, other text or other settings."""
        found = self._said.get("key")
        if found is not None and found != key:
            raise ResumeError(
                f"{self.folder}: holds the state of a calibration of another model, text or dtype; remove the folder "
                "to start again, or give the settings of that run"
            )
        cache = FileCache(self.folder, self.layers_done - 1, durable=True)
        cache.drop_before()
        return cache

    def advance(self, cache: FileCache, layer: int, key: str) -> None:
        """A layer is complete and its files are synced: say so in one step, then drop what came before."""
        self._said = {"key": key, "layer": layer}
        new = self.folder / f"{STATE}.tmp"
        with new.open("w", encoding="utf-8") as out:
            json.dump(self._said, out)
            out.flush()
            os.fsync(out.fileno())
        new.replace(self.folder / STATE)
        sync_folder(self.folder)
        cache.drop_before()


def write_tree(path: Path, tree: Any, *, durable: bool) -> None:
    """One safetensors file with a nest; SinkError when there is no room."""
    tensors: list[Tensor] = []
    shape = flatten(tree, tensors)
    order = sorted(range(len(tensors)), key=lambda at: -tensors[at].element_size())  # wide ones first: all aligned
    infos = [TensorInfo(str(at), TAGS[tensors[at].dtype], tuple(tensors[at].shape)) for at in order]
    header, _ = build_header(infos, path.name, {"tree": json.dumps(shape)})
    try:
        with path.open("wb") as out:
            out.write(header)
            for at in order:
                out.write(_own(tensors[at]).reshape(-1).view(torch.uint8).numpy().data)
            if durable:
                out.flush()
                os.fsync(out.fileno())
    except OSError as error:
        raise SinkError(f"{path}: outputs of a decoder layer cannot be kept there: {error.strerror}") from error


def read_tree(path: Path) -> Any:
    """The nest in a file, mapped: pages are read when they are used, and writing to a tensor leaves the file alone."""
    if not path.is_file():
        raise ResumeError(f"{path}: is missing; remove {path.parent.parent} to start again")
    mapped = np.memmap(path, np.uint8, "c")
    length = header_length(mapped[:8].tobytes(), str(path), len(mapped))
    shard = parse_header(mapped[8 : 8 + length].tobytes(), str(path), len(mapped))
    tensors = {int(t.name): _mapped(mapped, t) for t in shard.tensors}
    return rebuild(json.loads(shard.metadata["tree"]), [tensors[at] for at in sorted(tensors)])


def _mapped(mapped: np.memmap[Any, np.dtype[np.uint8]], info: TensorInfo) -> Tensor:
    if not info.nbytes:
        return torch.empty(info.shape, dtype=TORCH[info.dtype])
    return torch.from_numpy(mapped[info.begin : info.end]).view(TORCH[info.dtype]).reshape(info.shape)


def _own(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and alone in its storage."""
    found = tensor.detach().to("cpu").contiguous()
    return found if found.untyped_storage().nbytes() == found.numel() * found.element_size() else found.clone()
