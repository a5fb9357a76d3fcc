"""What activations are like, as a file: safetensors, keyed by the names that modules have on disk.

    NAME.input_amax            F32 []   largest |x| that the module's input had; 0 where it saw nothing
    NAME.tokens                I64 []   rows of its input, over all text
    NAME.input_channel_amax    F32 [K]  the same for each column, where a method asked for it
    NAME.input_second_moment   F32 [K]  sum of x^2 / tokens
    ATTENTION.k_amax, .v_amax  F32 []   keys and values as they enter the KV cache

`NAME[5]` is row 5 of a tensor that holds several experts. `__metadata__` says which model ran over which text. Numbers
of single modules come first, so that reading them is one read; vectors are read one by one. A file that somebody sends
is hostile input: everything is checked before it is believed.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mso_hub.checkpoint import Array, TensorInfo, build_header, header_length, parse_header
from mso_hub.errors import CheckpointError, RecipeError, SinkError
from mso_hub.sink.local import sync_folder

KIND = "activation statistics of mso_hub, version 1"
AMAX, TOKENS, KEYS, VALUES = "input_amax", "tokens", "k_amax", "v_amax"
NUMBERS = {AMAX: "F32", TOKENS: "I64", KEYS: "F32", VALUES: "F32"}
"""Last component of a name -> dtype, for what is one number."""
CHANNELS, MOMENTS = "input_channel_amax", "input_second_moment"
VECTORS = (CHANNELS, MOMENTS)
DIGEST = re.compile(r"[0-9a-f]{64}")
COUNT_LIMIT = 1 << 53
"""Tokens; more would be no count, and JSON readers could not hold it."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Which model ran over which text. Every field is a string or a number in `__metadata__`.

    source        repo id, or the folder's own name; `commit` 40 hex digits, "" for a folder
    identity      Checkpoint.identity: digest of sizes and times in a folder, of object ids on a Hub
    fingerprint   digest of headers and of samples of the weights: the same for a copy in another place
    text          what was read, in words; `rows` of it with `tokens` token ids in all; `sha256` of these ids
    dtype         of the activations; `settings` that numbers may depend on: attention, experts, ...
    layers        decoder layers that ran
    mso_hub, torch, transformers   versions
    """

    source: str
    commit: str
    identity: str
    fingerprint: str
    text: str
    rows: int
    tokens: int
    sha256: str
    dtype: str
    settings: str
    layers: int
    mso_hub: str
    torch: str
    transformers: str

    @property
    def where(self) -> str:
        """`org/name at commit 0123456789ab`."""
        return self.source + (f" at commit {self.commit[:12]}" if self.commit else "")

    @property
    def job(self) -> dict[str, str | int]:
        """Everything but the versions of programs: what must be the same for statistics to be the ones asked for."""
        versions = ("mso_hub", "torch", "transformers")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in versions}

    def metadata(self) -> dict[str, str]:
        """As `__metadata__` has it."""
        return {"kind": KIND, **{f.name: str(getattr(self, f.name)) for f in fields(self)}}


@dataclass(frozen=True, slots=True)
class Statistics:
    """A file of statistics, its numbers in memory.

    amax     module -> largest |x| of its input, 0 where it saw nothing; `tokens` module -> rows that it saw
    caches   attention module -> largest magnitude of (keys, values)
    vectors  tensor name -> where it lies in the file at `path`
    """

    provenance: Provenance
    amax: Mapping[str, float]
    tokens: Mapping[str, int]
    caches: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    vectors: Mapping[str, TensorInfo] = field(default_factory=dict)
    path: Path | None = None

    def __repr__(self) -> str:
        """One line: the last expression of a notebook cell shows it."""
        made = self.provenance
        return f"Statistics({made.where}, {len(self.amax):,} modules, {made.tokens:,} tokens of {made.text})"

    def vector(self, module: str, kind: str) -> Array:
        """One of VECTORS for a module, F32 [K]; RecipeError where the file does not have it."""
        info = self.vectors.get(f"{module}.{kind}")
        if info is None or self.path is None:
            raise RecipeError(
                f"{self.path}: has no {module}.{kind}; calibrate again with --channels, or take a method without it"
            )
        with self.path.open("rb") as file:
            file.seek(info.begin)
            values: Array = np.frombuffer(file.read(info.nbytes), np.float32)
        if values.shape != info.shape or not np.all(np.isfinite(values)) or np.any(values < 0):
            raise CheckpointError(f"{self.path}: {info.name} must be finite and >= 0; calibrate again")
        return values.copy()


def plain(name: str) -> str:
    """A name as metadata has it: `?` in place of what a terminal would obey, or UTF-8 cannot hold."""
    return "".join(c if c.isprintable() else "?" for c in name)


def partial_folder(path: Path) -> Path:
    """Where unfinished statistics lie: `FILE.partial`."""
    return path.with_name(f"{path.name}.partial")


def read_statistics(path: str | Path, *, part: bool = False) -> Statistics:
    """The statistics in a file; no vector is read.

    part  they are those of one decoder layer, and may be none

    Raises RecipeError where there is no such file or only an unfinished one, CheckpointError for anything that is not
    a whole and sensible file of statistics.
    """
    path = Path(path)
    if not path.is_file():
        if partial_folder(path).is_dir():
            raise RecipeError(
                f"{path}: the calibration is not complete, {partial_folder(path)} has its beginning; run the same "
                "`mso-hub calibrate` again to go on"
            )
        found = "a folder" if path.is_dir() else "nothing"
        raise RecipeError(f"{path}: must be a file that `mso-hub calibrate` wrote, found {found} there")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = header_length(file.read(8), str(path), size)
        shard = parse_header(file.read(length), str(path), size)
        provenance = _provenance(str(path), shard.metadata)
        numbers = [info for info in shard.tensors if info.name.rpartition(".")[2] in NUMBERS]
        vectors = {i.name: i for i in shard.tensors if i.name.rpartition(".")[2] in VECTORS}
        _check_tensors(str(path), shard.tensors)
        file.seek(8 + length)
        end = max((info.end for info in numbers), default=8 + length)
        raw = file.read(end - 8 - length)
    statistics = _statistics(path, provenance, {i.name: _number(i, raw, 8 + length) for i in numbers}, vectors)
    if not statistics.amax and not part:
        raise CheckpointError(f"{path}: holds no statistics of any module; calibrate again")
    return statistics


def _provenance(file: str, metadata: Mapping[str, str]) -> Provenance:
    """`__metadata__` -> Provenance; CheckpointError for what no calibration of this tool says."""
    if metadata.get("kind") != KIND:
        raise CheckpointError(
            f"{file}: not statistics of this version: must say {KIND!r}, says {str(metadata.get('kind'))[:80]!r}; "
            "write them with `mso-hub calibrate`"
        )
    found: dict[str, Any] = {}
    for f in fields(Provenance):
        value = metadata.get(f.name)
        number = f.type in ("int", int)
        digits = value is not None and value.isascii() and value.isdigit() and len(value) < 16
        if value is None or (number and not digits) or value != plain(value):
            raise CheckpointError(f"{file}: {f.name} is {str(value)[:80]!r} in its metadata; calibrate again")
        found[f.name] = int(value) if number else value
    made = Provenance(**found)
    if not all(DIGEST.fullmatch(digest) for digest in (made.identity, made.fingerprint, made.sha256)):
        raise CheckpointError(f"{file}: its metadata needs three SHA-256 digests; calibrate again")
    if not made.tokens or not made.rows or not made.layers:
        raise CheckpointError(f"{file}: {made.tokens} tokens through {made.layers} layers; calibrate again")
    return made


def _check_tensors(file: str, tensors: Iterable[TensorInfo]) -> None:
    """CheckpointError for a tensor that is none of the module docstring's."""
    for info in tensors:
        leaf = info.name.rpartition(".")[2]
        good = (info.dtype == NUMBERS[leaf] and info.shape == ()) if leaf in NUMBERS else False
        if leaf in VECTORS:
            good = info.dtype == "F32" and len(info.shape) == 1
        if not good:
            raise CheckpointError(
                f"{file}: {info.name[:200]!r} {info.dtype} {list(info.shape)} is no statistic of this version; write "
                "them with `mso-hub calibrate`"
            )


def _number(info: TensorInfo, raw: bytes, base: int) -> float:
    """One number, finite and >= 0."""
    kind = np.float32 if info.dtype == "F32" else np.int64
    value = np.frombuffer(raw, kind, 1, info.begin - base)[0]
    if not 0 <= value < (math.inf if info.dtype == "F32" else COUNT_LIMIT):
        raise CheckpointError(f"{info.file}: {info.name[:200]!r} must be finite and >= 0, is {value}; calibrate again")
    return float(value) if info.dtype == "F32" else int(value)


def _statistics(
    path: Path, made: Provenance, numbers: Mapping[str, float], vectors: Mapping[str, TensorInfo]
) -> Statistics:
    """Numbers by name -> by module; CheckpointError where one of a pair is missing."""
    by: dict[str, dict[str, float]] = {leaf: {} for leaf in NUMBERS}
    for name, value in numbers.items():
        module, _, leaf = name.rpartition(".")
        by[leaf][module] = value
    for first, second in ((AMAX, TOKENS), (KEYS, VALUES)):
        for module in sorted(by[first].keys() ^ by[second].keys()):
            there = first if module in by[first] else second
            raise CheckpointError(f"{path}: {module} has {there} alone, {first} and {second} belong together")
    if lost := next((name for name in vectors if name.rpartition(".")[0] not in by[AMAX]), None):
        raise CheckpointError(f"{path}: {lost} stands alone, its module has no {AMAX}; calibrate again")
    tokens = {module: int(count) for module, count in by[TOKENS].items()}
    if wrong := next((m for m, value in by[AMAX].items() if value and not tokens[m]), None):
        raise CheckpointError(f"{path}: {wrong} has an {AMAX} without a token; calibrate again")
    return Statistics(made, by[AMAX], tokens, {m: (k, by[VALUES][m]) for m, k in by[KEYS].items()}, vectors, path)


def write_statistics(
    path: Path, statistics: Statistics, vectors: Mapping[str, tuple[int, ...]] | None = None,
    read: Iterator[Array] | None = None,
) -> None:  # fmt: skip
    """Write a file whole or not at all: the same content gives the same bytes.

    vectors  tensor name -> shape of each vector; `read` gives their numbers in the order of their names
    Raises SinkError when the disk does not take it.
    """
    numbers: list[tuple[str, str, float]] = []
    numbers += [(f"{module}.{TOKENS}", "I64", count) for module, count in statistics.tokens.items()]
    numbers += [(f"{module}.{AMAX}", "F32", value) for module, value in statistics.amax.items()]
    for module, pair in statistics.caches.items():
        numbers += [(f"{module}.{leaf}", "F32", value) for leaf, value in zip((KEYS, VALUES), pair, strict=True)]
    numbers.sort(key=lambda entry: (entry[1] != "I64", entry[0]))  # 8 bytes before 4, so that all are aligned
    shapes = sorted((vectors or {}).items())
    infos = [TensorInfo(name, dtype, ()) for name, dtype, _ in numbers]
    infos += [TensorInfo(name, "F32", shape) for name, shape in shapes]
    header, _ = build_header(infos, path.name, statistics.provenance.metadata())
    counts = np.array([value for _, dtype, value in numbers if dtype == "I64"], np.int64)
    values = np.array([value for _, dtype, value in numbers if dtype == "F32"], np.float32)
    blocks = (block.astype(np.float32, copy=False).tobytes() for block in read or iter(()))
    write_whole(path, chain((header, counts.tobytes(), values.tobytes()), blocks))


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Bytes -> file that appears from one moment to the next and survives a power cut; SinkError otherwise."""
    partial = path.with_name(f".{path.name}.mso-partial")
    try:
        with partial.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SinkError(
            f"{path}: cannot be written: {error.strerror}; check the folder and the space on its disk, then run the "
            "same command"
        ) from error
