"""Packed weights of a method, layer by layer in a folder: written as they are made, complete or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mso_hub.calibrate.methods.targets import Target
from mso_hub.checkpoint import Array, TensorInfo, build_header
from mso_hub.errors import MsoError, ResumeError
from mso_hub.formats.weight import NUMPY
from mso_hub.sink.local import sync_folder
from mso_hub.source import LocalSource
from mso_hub.source.scan import read_shard

JOB = "job.json"
STATE = "state"


class Work:
    """A folder with one safetensors file and one report per finished layer, and the state of the walk.

    key  of what is made here: source, recipe, method, settings, text
    Raises ResumeError for a folder with another key.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        job = folder / JOB
        if not job.exists():
            _write(job, json.dumps({"key": key}).encode())
        elif json.loads(job.read_text(encoding="utf-8")).get("key") != key:
            raise ResumeError(
                f"{folder}: holds the work of another run (another source, recipe, method, setting or text); give the "
                "settings of that run, or remove the folder to start again"
            )

    @property
    def state(self) -> Path:
        """Folder for the state of the walk."""
        return self.folder / STATE

    def file(self, layer: int) -> Path:
        """Packed weights of a layer."""
        return self.folder / f"layer-{layer:05}.safetensors"

    def report(self, layer: int) -> dict[str, Any]:
        """What was noted of a layer; ResumeError where it is not there."""
        path = self.file(layer).with_suffix(".json")
        if not path.exists() or not self.file(layer).exists():
            raise ResumeError(f"{self.folder}: layer {layer} is missing; remove the folder to start again")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def note(self, layer: int, report: Mapping[str, Any]) -> None:
        """Write the report of a layer, before its file gets its name."""
        _write(self.file(layer).with_suffix(".json"), json.dumps(report).encode())

    def layers(self) -> list[int]:
        """Numbers of finished layers."""
        return sorted(int(path.stem.partition("-")[2]) for path in self.folder.glob("layer-*.safetensors"))

    def digest(self, layer: int) -> str:
        """SHA-256 in hex of a finished layer's file."""
        digest = hashlib.sha256()
        with self.file(layer).open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def tensors(self, layer: int) -> dict[str, TensorInfo]:
        """Name -> where it lies, of a finished layer's file."""
        path = self.file(layer)
        shard = read_shard(LocalSource(self.folder), path.name, path.stat().st_size)
        return {info.name: info for info in shard.tensors}


class LayerFile:
    """Packed weights of the layer in hand, in a mapped file that gets its name when all of them are there."""

    def __init__(self, path: Path, targets: Sequence[Target]) -> None:
        self._path = path
        self._new = path.with_suffix(".tmp")
        header, placed = build_header([info for t in targets for info in t.outputs], path.name, {})
        self._places = {info.name: info for info in placed}
        self._left = set(self._places)
        size = len(header) + sum(info.nbytes for info in placed)
        self._map: NDArray[np.uint8] = np.memmap(self._new, np.uint8, "w+", shape=(size,))
        self._map[: len(header)] = np.frombuffer(header, np.uint8)
        self._amax: dict[str, float] = {}

    def put(self, target: Target, arrays: tuple[Array, ...], amax: float) -> None:
        """What the encoder, or a method in its place, made of a weight; amax as `Format.encode` got it."""
        scalars = target.form.scalars(target.shape, amax)
        for info, array in zip(target.outputs, (*arrays, *scalars), strict=True):
            place = self._places[info.name]
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            if raw.nbytes != place.nbytes:
                raise MsoError(f"{info.name}: needs {place.nbytes:,} bytes, {raw.nbytes:,} came; please report this")
            self._map[place.begin : place.end] = raw
            self._left.discard(info.name)
        self._amax[target.module] = amax

    def __contains__(self, target: Target) -> bool:
        """Is the weight there?"""
        return target.module in self._amax

    def decoded(self, target: Target) -> Array:
        """What the file holds of a weight, as F32 [N, K]."""
        amax = self._amax[target.module]
        count = len(target.outputs) - len(target.form.scalars(target.shape, amax))
        places = [self._places[info.name] for info in target.outputs[:count]]
        arrays = tuple(np.array(self._map[p.begin : p.end]).view(NUMPY[p.dtype]).reshape(p.shape) for p in places)
        return target.form.decode(arrays, target.shape[1], target.step.dense, amax)

    def finish(self, report: Mapping[str, Any]) -> None:
        """Everything is there: sync it, write the report, give the file its name."""
        if self._left:
            raise MsoError(f"{min(self._left)}: was not packed; please report this")
        assert isinstance(self._map, np.memmap)  # noqa: S101 - as it was made
        self._map.flush()
        with self._new.open("rb") as done:
            os.fsync(done.fileno())
        _write(self._path.with_suffix(".json"), json.dumps(report).encode())
        self._new.replace(self._path)
        sync_folder(self._path.parent)


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing, synced."""
    new = path.with_name(f"{path.name}.tmp")
    with new.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    new.replace(path)
