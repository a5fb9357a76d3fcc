"""What `mso-hub smoke` asks and what it gets back: two JSON files, read strictly on both sides.

    shapes:    Job  -> Report     headers -> what every rank would not load as it is stored
    generate:  see `vllm_mso_hub.generate`

A key that is missing, unknown or of the wrong type is a `JobError` that names the key: the two sides are shipped
together, so a difference is a mistake and never something to guess at.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

VERSION = 1

PROBLEM_KINDS = ("config", "create", "load", "missing", "partial", "unread", "ignored", "cast", "broadcast", "empty")
REFUSAL_KINDS = ("version", "architecture", "remote_code", "heads", "config")

_HEADER_LIMIT = 100 * 2**20  # safetensors' own limit: a larger header is not a header


class JobError(ValueError):
    """A job or a report that is not what `job.py` describes; the message names the key."""


@dataclass(frozen=True, slots=True)
class Header:
    """One tensor of the checkpoint: `dtype` is a safetensors tag ("U8", "F8_E4M3"), `file` the name of its shard."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    def as_list(self) -> list[Any]:
        """JSON form: [name, dtype, shape, file]."""
        return [self.name, self.dtype, list(self.shape), self.file]

    @classmethod
    def from_list(cls, data: Any) -> Header:
        """Inverse of `as_list`; JobError when an entry is of another type."""
        if not isinstance(data, (list, tuple)) or len(data) != 4:
            raise JobError(f"tensors: expected [name, dtype, shape, file], got {_short(data)}")
        name, dtype, shape, file = data
        return cls(
            _text(name, "tensors: name"),
            _text(dtype, f"tensors: dtype of {name}"),
            _numbers(shape, f"tensors: shape of {name}"),
            _text(file, f"tensors: file of {name}"),
        )


@dataclass(frozen=True, slots=True)
class Job:
    """A checkpoint's headers and the worlds (numbers of ranks) to load them into.

    name               for messages only
    folder             holds config.json, hf_quant_config.json and the model's *.py where it has them; no weights
    tensors            in the order of the files
    tp, pp, ep         tensor-parallel sizes, pipeline stages, expert parallelism
    layers             only the first `layers` decoder layers; 0 means all of them
    trust_remote_code  let the model's own Python run
    """

    name: str
    folder: str
    tensors: tuple[Header, ...]
    tp: tuple[int, ...] = (1, 2, 4, 8)
    pp: int = 1
    ep: bool = False
    layers: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.tp or any(size < 1 for size in self.tp):
            raise JobError(f"tp: expected sizes of at least 1, got {list(self.tp)}")
        if self.pp < 1:
            raise JobError(f"pp: expected at least 1 stage, got {self.pp}")
        if self.layers < 0:
            raise JobError(f"layers: expected 0 (all of them) or more, got {self.layers}")

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "version": VERSION,
            "name": self.name,
            "folder": self.folder,
            "tensors": [header.as_list() for header in self.tensors],
            "tp": list(self.tp),
            "pp": self.pp,
            "ep": self.ep,
            "layers": self.layers,
            "trust_remote_code": self.trust_remote_code,
        }

    @classmethod
    def from_dict(cls, data: Any) -> Job:
        """Inverse of `as_dict`; JobError names the key that is missing, unknown or of the wrong type."""
        found = _record(data, "job", cls, versioned=True)
        return cls(
            name=_text(found["name"], "job: name"),
            folder=_text(found["folder"], "job: folder"),
            tensors=tuple(Header.from_list(entry) for entry in _items(found["tensors"], "job: tensors")),
            tp=_numbers(found["tp"], "job: tp"),
            pp=_number(found["pp"], "job: pp"),
            ep=_flag(found["ep"], "job: ep"),
            layers=_number(found["layers"], "job: layers"),
            trust_remote_code=_flag(found["trust_remote_code"], "job: trust_remote_code"),
        )

    @classmethod
    def of_folder(
        cls,
        path: str | Path,
        tp: Iterable[int] = (1, 2, 4, 8),
        *,
        pp: int = 1,
        ep: bool = False,
        layers: int = 0,
        trust_remote_code: bool = False,
    ) -> Job:
        """The job of a checkpoint on this disk; reads the headers of its safetensors files, no weights."""
        folder = Path(path)
        return cls(str(folder), str(folder), tuple(_headers(folder)), tuple(tp), pp, ep, layers, trust_remote_code)


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding, in one world: the same finding of several ranks is one Problem.

    kind       one of PROBLEM_KINDS
    tensor     name in the checkpoint; "" where none applies
    parameter  name in vLLM's model; "" where none applies
    ranks      the ranks that it happens on
    message    a full sentence for a person, with the way out where there is one
    """

    kind: str
    tensor: str
    parameter: str
    ranks: tuple[int, ...]
    expected: str
    found: str
    message: str

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "kind": self.kind,
            "tensor": self.tensor,
            "parameter": self.parameter,
            "ranks": list(self.ranks),
            "expected": self.expected,
            "found": self.found,
            "message": self.message,
        }

    @classmethod
    def from_dict(cls, data: Any) -> Problem:
        """Inverse of `as_dict`; JobError names the key."""
        found = _record(data, "problem", cls)
        return cls(
            kind=_one_of(found["kind"], PROBLEM_KINDS, "problem: kind"),
            tensor=_text(found["tensor"], "problem: tensor"),
            parameter=_text(found["parameter"], "problem: parameter"),
            ranks=_numbers(found["ranks"], "problem: ranks"),
            expected=_text(found["expected"], "problem: expected"),
            found=_text(found["found"], "problem: found"),
            message=_text(found["message"], "problem: message"),
        )


@dataclass(frozen=True, slots=True)
class World:
    """All ranks of one tensor-parallel size: what they hold (`rank_bytes`, parameters in bytes) and what is wrong."""

    tp: int
    pp: int
    ep: bool
    seconds: float
    rank_bytes: tuple[int, ...]
    problems: tuple[Problem, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "tp": self.tp,
            "pp": self.pp,
            "ep": self.ep,
            "seconds": self.seconds,
            "rank_bytes": list(self.rank_bytes),
            "problems": [problem.as_dict() for problem in self.problems],
        }

    @classmethod
    def from_dict(cls, data: Any) -> World:
        """Inverse of `as_dict`; JobError names the key."""
        found = _record(data, "world", cls)
        return cls(
            tp=_number(found["tp"], "world: tp"),
            pp=_number(found["pp"], "world: pp"),
            ep=_flag(found["ep"], "world: ep"),
            seconds=_real(found["seconds"], "world: seconds"),
            rank_bytes=_numbers(found["rank_bytes"], "world: rank_bytes"),
            problems=tuple(Problem.from_dict(entry) for entry in _items(found["problems"], "world: problems")),
        )


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why nothing could be checked: `kind` is one of REFUSAL_KINDS, `message` one sentence."""

    kind: str
    message: str

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"kind": self.kind, "message": self.message}

    @classmethod
    def from_dict(cls, data: Any) -> Refusal:
        """Inverse of `as_dict`; JobError names the key."""
        found = _record(data, "refused", cls)
        return cls(_one_of(found["kind"], REFUSAL_KINDS, "refused: kind"), _text(found["message"], "refused: message"))


@dataclass(frozen=True, slots=True)
class Report:
    """The answer to a Job. `refused` is None, or why nothing could be checked at all."""

    vllm: str
    torch: str
    architecture: str
    seconds: float
    peak_rss: int
    worlds: tuple[World, ...]
    refused: Refusal | None = None

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The problems of all worlds, in order."""
        return tuple(problem for world in self.worlds for problem in world.problems)

    @property
    def ok(self) -> bool:
        """Whether something was checked and nothing was found."""
        return self.refused is None and bool(self.worlds) and not self.problems

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "version": VERSION,
            "vllm": self.vllm,
            "torch": self.torch,
            "architecture": self.architecture,
            "seconds": self.seconds,
            "peak_rss": self.peak_rss,
            "worlds": [world.as_dict() for world in self.worlds],
            "refused": None if self.refused is None else self.refused.as_dict(),
        }

    @classmethod
    def from_dict(cls, data: Any) -> Report:
        """Inverse of `as_dict`; JobError names the key."""
        found = _record(data, "report", cls, versioned=True)
        return cls(
            vllm=_text(found["vllm"], "report: vllm"),
            torch=_text(found["torch"], "report: torch"),
            architecture=_text(found["architecture"], "report: architecture"),
            seconds=_real(found["seconds"], "report: seconds"),
            peak_rss=_number(found["peak_rss"], "report: peak_rss"),
            worlds=tuple(World.from_dict(entry) for entry in _items(found["worlds"], "report: worlds")),
            refused=None if found["refused"] is None else Refusal.from_dict(found["refused"]),
        )


def _record(data: Any, what: str, cls: type, *, versioned: bool = False) -> Mapping[str, Any]:
    """`data` as a mapping with exactly the fields of `cls` (and "version" where `versioned`)."""
    if not isinstance(data, Mapping):
        raise JobError(f"{what}: expected an object, got {_short(data)}")
    if versioned and data.get("version") != VERSION:
        raise JobError(
            f"{what}: version {data.get('version')!r}, expected {VERSION}: "
            "mso_hub and vllm_mso_hub are of different releases"
        )
    names = {field.name for field in fields(cls)} | ({"version"} if versioned else set())
    missing, unknown = sorted(names - set(data)), sorted(map(str, set(data) - names))
    if missing or unknown:
        raise JobError(f"{what}: missing keys {missing}, unknown keys {unknown}")
    return data


def _checked(value: Any, what: str, expected: str, test: Callable[[Any], bool]) -> Any:
    if not test(value):
        raise JobError(f"{what}: expected {expected}, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text(value: Any, what: str) -> str:
    return str(_checked(value, what, "text", lambda v: isinstance(v, str)))


def _one_of(value: Any, choices: tuple[str, ...], what: str) -> str:
    return str(_checked(value, what, f"one of {', '.join(choices)}", lambda v: v in choices))


def _flag(value: Any, what: str) -> bool:
    return bool(_checked(value, what, "true or false", lambda v: isinstance(v, bool)))


def _number(value: Any, what: str) -> int:
    return int(_checked(value, what, "a whole number of at least 0", _is_number))


def _real(value: Any, what: str) -> float:
    return float(_checked(value, what, "a number", lambda v: isinstance(v, float) or _is_number(v)))


def _items(value: Any, what: str) -> Iterable[Any]:
    return list(_checked(value, what, "a list", lambda v: isinstance(v, (list, tuple))))


def _numbers(value: Any, what: str) -> tuple[int, ...]:
    return tuple(_number(entry, what) for entry in _items(value, what))


def _headers(folder: Path) -> Iterator[Header]:
    """Every tensor of the folder's shards; the index, where there is one, says which files count."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise JobError(f"{folder}: holds no *.safetensors files")
    for file in files:
        with (folder / file).open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _HEADER_LIMIT:
                raise JobError(f"{folder / file}: header of {length:,} bytes, a safetensors header has at most 100 MiB")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            yield Header(name, entry["dtype"], tuple(entry["shape"]), file)
