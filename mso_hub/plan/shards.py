"""Steps -> output files: which tensor lies where, header bytes, index."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mso_hub.checkpoint import DTYPE_BITS, Checkpoint, Group, Shard, TensorInfo, build_header
from mso_hub.formats.dialects.ktransformers import TREE_LAYER, without_layout
from mso_hub.plan.steps import Step


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output file: its header bytes, its tensors in file order, and the steps that fill it in that order.

    original  size of the source's file of this name when nothing in it changes: the file itself is copied, and
              `header` is empty; None otherwise
    apart     every tensor is a file of its own, without a header; the shard has the name of the last one
    """

    name: str
    header: bytes
    tensors: tuple[TensorInfo, ...]
    steps: tuple[Step, ...]
    original: int | None = None
    apart: bool = False

    @property
    def files(self) -> dict[str, int]:
        """Files that it is written to -> bytes."""
        return {info.file: info.nbytes for info in self.tensors} if self.apart else {self.name: self.nbytes}

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        if self.original is not None:
            return self.original
        return len(self.header) + sum(info.nbytes for info in self.tensors)

    @property
    def read_bytes(self) -> int:
        """Source bytes of its weights."""
        return sum(step.weight.nbytes for step in self.steps)


def _in_order(steps: Sequence[Step]) -> tuple[list[Step], list[TensorInfo]]:
    """Steps and output tensors of one file in the order in which they are written.

    Members of a unit follow one another, so that a unit is read once. Tensors of a multiple of 8 bytes go first,
    as they come; the others (scalars, odd shapes) go last, the widest dtype first. So every tensor starts at a
    multiple of its item size, which mapping loaders need, and all but the scalars can be streamed.
    """
    first: dict[str, int] = {}
    for at, step in enumerate(steps):
        first.setdefault(step.unit or step.weight.name, at)
    grouped = sorted(range(len(steps)), key=lambda at: (first[steps[at].unit or steps[at].weight.name], at))
    ordered = [steps[at] for at in grouped]
    tail = [s for s in ordered if s.format is None and s.outputs[0].nbytes % 8]
    tail.sort(key=_tail_key)
    body = [s for s in ordered if s.format is not None or s.outputs[0].nbytes % 8 == 0]
    infos = [info for step in (*body, *tail) for info in step.outputs]
    aligned = [info for info in infos if info.nbytes % 8 == 0]
    return [*body, *tail], aligned + sorted((i for i in infos if i.nbytes % 8), key=_width_key)


def _width_key(info: TensorInfo) -> tuple[int, str]:
    return -DTYPE_BITS[info.dtype], info.name


def _tail_key(step: Step) -> tuple[int, str]:
    return _width_key(step.outputs[0])


def plan_shards(steps: Sequence[Step], checkpoint: Checkpoint) -> list[ShardPlan]:
    """One output file for each file that holds the first part of a weight."""
    by_file: dict[str, list[Step]] = {}
    for step in steps:
        by_file.setdefault(_file_of(step.weight.home.file), []).append(step)
    planned = []
    for name, members in by_file.items():
        if name not in checkpoint.shards:
            planned.append(one_shard(name, members, {}))
        elif _is_unchanged(checkpoint.shards[name], members):
            shard = checkpoint.shards[name]
            place = {info.name: at for at, info in enumerate(shard.tensors)}
            stored = sorted(members, key=lambda step: place[step.weight.home.name])
            planned.append(ShardPlan(name, b"", shard.tensors, tuple(stored), shard.nbytes))
        else:
            planned.append(one_shard(name, members, without_layout(checkpoint.shards[name].metadata)))
    return planned


def one_shard(name: str, steps: Sequence[Step], metadata: Mapping[str, str]) -> ShardPlan:
    """A file with what some steps make."""
    ordered, infos = _in_order(steps)
    header, placed = build_header(infos, name, metadata)
    return ShardPlan(name, header, placed, tuple(ordered))


def _file_of(stored: str) -> str:
    """Output file of what is stored in a file: its own name, a layer's where kt-kernel has a file for every tensor."""
    match = TREE_LAYER.match(stored)
    return f"model-layer-{int(match[1]):05d}.safetensors" if match else stored


def _is_unchanged(shard: Shard, steps: Sequence[Step]) -> bool:
    """Does an output file hold what the source's file of its name holds, tensor by tensor?

    A file without `format` in its metadata is rewritten, because transformers refuses to load it, and so is one whose
    tensors do not start at multiples of their item size.
    """
    stays = all(not s.changes and [info.name for info in s.outputs] == [s.weight.home.name] for s in steps)
    whole = {step.weight.home.name for step in steps} == {info.name for info in shard.tensors}
    aligned = all(info.begin % max(1, DTYPE_BITS[info.dtype] // 8) == 0 for info in shard.tensors)
    return stays and whole and aligned and shard.metadata.get("format") == "pt"


def index_file(group: Group, shards: Sequence[ShardPlan]) -> dict[str, bytes]:
    """The index file of a group; shards that the source's index leaves out stay out."""
    if group.index is None:
        return {}
    listed = {group.tensors[name].file for name in group.indexed}
    tensors = [info for shard in shards if shard.name in listed for info in shard.tensors]
    folder = group.index.rpartition("/")[0]
    weight_map = {i.name: i.file.removeprefix(f"{folder}/") if folder else i.file for i in tensors}
    metadata = {k: v for k, v in group.extra.items() if k != "total_parameters"}
    metadata["total_size"] = sum(info.nbytes for info in tensors)
    content = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return {group.index: as_json(content)}


def as_json(content: Mapping[str, Any]) -> bytes:
    """A JSON file."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
