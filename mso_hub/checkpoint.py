"""Nouns of a checkpoint, and the bytes of a safetensors header in both directions.

A file is `u64 header_length | header JSON | tensor bytes`; the header maps a tensor name to dtype, shape and
`data_offsets` [begin, end) relative to the end of the header. A header comes from strangers, so `parse_header`
believes nothing: bounded length, known dtypes, sizes that add up, no overlap, no hole, no name twice.
Source: the format section of the safetensors README.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from numpy.typing import NDArray

from mso_hub.errors import CheckpointError

Array = NDArray[Any]
"""Numbers or bytes of a tensor."""
HEADER_LIMIT = 100_000_000
"""Bytes; the safetensors library refuses longer headers too."""
RANK_LIMIT = 32
"""Sizes in a shape: what numpy 1 can hold."""
DEPTH_LIMIT = 64
"""Levels of nested JSON that is carried to the output."""

DTYPE_BITS: dict[str, int] = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "I8": 8, "U8": 8, "BOOL": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A named array as a header describes it.

    name   key in the header
    dtype  safetensors tag: BF16, F8_E4M3, U8, ...
    shape  row-major
    file   shard that holds it, relative to the repo; empty until placed
    begin  absolute byte offset in that file
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str = ""
    begin: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor on disk."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def end(self) -> int:
        """Absolute offset one past the last byte."""
        return self.begin + self.nbytes


@dataclass(frozen=True, slots=True)
class Shard:
    """One `.safetensors` file of the input: its tensors in offset order, its `__metadata__`, its size in bytes."""

    name: str
    nbytes: int
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that one loader sees together: an index and its shards, or the unindexed files of a folder.

    index     repo path of `*.safetensors.index.json`, or None
    extra     the index's `metadata` without total_size, carried to the output
    tensors   name -> where it lies
    indexed   names that the index lists (files beside it add the rest)
    """

    index: str | None
    tensors: Mapping[str, TensorInfo]
    indexed: frozenset[str] = frozenset()
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything known of a repo without reading a weight.

    name        for messages
    identity    digest of the files that matter (object ids on a Hub, sizes and times in a folder); not of the card
    shards      repo path -> Shard
    groups      name spaces; each shard belongs to exactly one
    config      parsed config.json, empty when there is none
    files       every other file: repo path -> bytes
    """

    name: str
    identity: str
    shards: Mapping[str, Shard]
    groups: tuple[Group, ...]
    config: Mapping[str, Any]
    files: Mapping[str, int]


def _fail(file: str, what: str) -> CheckpointError:
    return CheckpointError(f"{file}: {what}; the file is damaged or not safetensors: fetch it again")


def _short(value: object) -> str:
    """The beginning of a stranger's value, for messages."""
    try:
        return f"{value!r:.80}"
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {_short(twice)} appears twice")
    return out


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _writable(value: Any, raw: bytes) -> Any:
    """A parsed value, once it is sure that its text is UTF-8 again: escapes can spell half a surrogate pair."""
    if b"\\u" in raw:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _strict_json(raw: bytes) -> Any:
    """JSON as RFC 8259 has it, in UTF-8, no key twice; ValueError or RecursionError otherwise."""
    return _writable(json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant), raw)


def _check_depth(value: object) -> None:
    """ValueError for JSON that nests deeper than DEPTH_LIMIT: writing it again would exhaust the stack."""
    level = [value]
    for _ in range(DEPTH_LIMIT):
        level = [
            child for v in level if isinstance(v, dict | list) for child in (v.values() if isinstance(v, dict) else v)
        ]
        if not level:
            return
    raise ValueError(f"nested deeper than {DEPTH_LIMIT} levels")


def parse_config(raw: bytes, file: str) -> dict[str, Any]:
    """config.json -> its fields. Python's NaN and Infinity pass, as configs have them; raises CheckpointError."""
    try:
        value = _writable(json.loads(raw.decode()), raw)
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: must hold a JSON object, found {type(value).__name__}")
    return value


def header_length(first8: bytes, file: str, file_size: int) -> int:
    """Length in bytes of the JSON header, from the first 8 bytes of a file of `file_size` bytes."""
    if len(first8) < 8:
        raise _fail(file, f"needs at least 8 bytes of header length, got {len(first8)}")
    length = int.from_bytes(first8, "little")
    if length > HEADER_LIMIT:
        raise _fail(file, f"the header may have at most {HEADER_LIMIT:,} bytes, its length field says {length:,}")
    if 8 + length > file_size:
        raise _fail(file, f"the header needs {8 + length:,} bytes, the file has {file_size:,}")
    return length


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _too_large(shape: Sequence[int]) -> bool:
    """Sizes that no array can have, also where a zero among them leaves no element."""
    return math.prod(max(1, size) for size in shape) >= 1 << 60


def _entry(name: str, raw: object, file: str, base: int) -> tuple[TensorInfo, int]:
    """One header entry -> TensorInfo and the end offset that it claims (absolute)."""
    if not isinstance(raw, dict):
        raise _fail(file, f"tensor {name!r} must be a JSON object, got {type(raw).__name__}")
    dtype, shape, offsets = raw.get("dtype"), raw.get("shape"), raw.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{file}: tensor {name!r} has the dtype {_short(dtype)}; known are {', '.join(DTYPE_BITS)}; "
            "a newer mso_hub may read it"
        )
    if not isinstance(shape, list) or len(shape) > RANK_LIMIT or not all(map(_is_count, shape)) or _too_large(shape):
        raise _fail(file, f"tensor {name!r} needs up to {RANK_LIMIT} sizes >= 0 as shape, got {_short(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _fail(file, f"tensor {name!r} needs data_offsets [begin, end], got {_short(offsets)}")
    info = TensorInfo(name, dtype, tuple(shape), file, base + offsets[0])
    if math.prod(shape) * DTYPE_BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise _fail(
            file,
            f"tensor {name!r} {dtype} {_short(shape)} does not fill its data_offsets {offsets}, which span "
            f"{offsets[1] - offsets[0]:,} bytes",
        )
    return info, base + offsets[1]


def parse_header(raw: bytes, file: str, file_size: int) -> Shard:
    """The JSON header of `file` -> Shard, every entry checked; raises CheckpointError.

    raw        the header's bytes, without the 8 length bytes
    file_size  bytes of the whole file, known from the file system or the Hub
    """
    try:
        header = _strict_json(raw)
    except (ValueError, RecursionError) as error:
        raise _fail(file, f"the header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise _fail(file, f"the header must be a JSON object, got {type(header).__name__}")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _fail(file, f"__metadata__ must map strings to strings, got {_short(metadata)}")
    base = 8 + len(raw)
    entries = [_entry(name, value, file, base) for name, value in header.items()]
    entries.sort(key=lambda e: (e[0].begin, e[1]))
    position = base
    for info, end in entries:
        if info.begin != position:
            kind = "overlaps the tensor before it" if info.begin < position else "leaves a hole before it"
            raise _fail(file, f"tensor {info.name!r} {kind}: it begins at {info.begin:,}, expected {position:,}")
        position = end
    if position != file_size:
        raise _fail(file, f"the tensors end at byte {position:,}, the file has {file_size:,}")
    return Shard(file, file_size, tuple(info for info, _ in entries), metadata)


def build_header(
    tensors: Iterable[TensorInfo], file: str, metadata: Mapping[str, str]
) -> tuple[bytes, tuple[TensorInfo, ...]]:
    """First bytes of a shard that holds `tensors` back to back in this order, and the tensors placed in it.

    Padded with spaces so that the tensor bytes start at a multiple of 8, as the safetensors library does.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    position, offsets = 0, []
    for info in tensors:
        header[info.name] = {
            "dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, position + info.nbytes],
        }  # fmt: skip
        offsets.append((info, position))
        position += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    placed = tuple(replace(info, file=file, begin=8 + len(text) + at) for info, at in offsets)
    return len(text).to_bytes(8, "little") + text, placed


def safe_path(path: str, where: str) -> str:
    """A repo path from an index, checked: relative, forward slashes, nothing that leaves the repo."""
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path or ":" in path:
        raise CheckpointError(
            f"{where}: the weight_map points at {path!r}; a shard must be a relative path inside the repo"
        )
    return str(pure)


def parse_index(raw: bytes, file: str) -> tuple[dict[str, str], dict[str, Any]]:
    """`*.safetensors.index.json` -> (tensor name -> shard path, metadata); raises CheckpointError."""
    try:
        index = _strict_json(raw)
        _check_depth(index)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}; fetch it again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{file}: needs a weight_map of tensor name to shard, got {_short(weight_map)}")
    folder = PurePosixPath(file).parent
    paths = {value: str(folder / safe_path(value, file)) for value in set(weight_map.values())}
    metadata = index.get("metadata")
    return {name: paths[value] for name, value in weight_map.items()}, metadata if isinstance(metadata, dict) else {}


def other_models(files: Iterable[str]) -> tuple[str, ...]:
    """Prefixes `folder/` of the subfolders that hold a model of their own: those with a config.json.

    A draft model or an original export beside the weights; it is carried along, never converted with them.
    """
    return tuple(name.removesuffix("config.json") for name in files if name.endswith("/config.json"))
