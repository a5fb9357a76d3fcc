"""What vLLM has to know of a checkpoint before it loads a weight: configs and headers, of a source or of a plan."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mso_hub.checkpoint import TensorInfo
from mso_hub.errors import CheckpointError
from mso_hub.plan import Plan
from mso_hub.source import Source, read_checkpoint

CONFIGS = (
    "config.json",
    "hf_quant_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""Files that vLLM may read before it makes a model."""
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Headers:
    """A checkpoint without its weights.

    files    name -> content: configs, and the repo's own code where it may run
    tensors  in the order in which vLLM meets them: file by file, as they lie there
    """

    name: str
    files: Mapping[str, bytes]
    tensors: tuple[TensorInfo, ...]

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json."""
        content = json.loads(self.files["config.json"])
        return content if isinstance(content, dict) else {}

    def write(self, folder: Path) -> None:
        """The files into a folder."""
        for name, data in self.files.items():
            (folder / name).write_bytes(data)


def headers_of_source(source: Source, *, code: bool = False) -> Headers:
    """Headers and configs of a folder or a repo; CheckpointError where vLLM would find none.

    code  take the repo's Python files too
    """
    checkpoint = read_checkpoint(source)
    indexed: set[str] | None = None
    for group in checkpoint.groups:
        if group.index == INDEX:
            indexed = {group.tensors[name].file for name in group.indexed}
    tensors = {shard.name: shard.tensors for shard in checkpoint.shards.values()}
    files = {name: _text(source, name) for name in _wanted(source.files(), code=code)}
    return _headers(source.name, files, tensors, indexed)


def headers_of_plan(plan: Plan, source: Source, *, code: bool = False) -> Headers:
    """Headers and configs that a plan will write, byte for byte; CheckpointError where vLLM would find none.

    source  of the plan, for what is carried along
    code    take the repo's Python files too
    """
    index = plan.files.get(INDEX)
    indexed = set(json.loads(index)["weight_map"].values()) if index is not None else None
    files = {name: plan.files[name] for name in _wanted(plan.files, code=code)}
    files |= {name: _text(source, name) for name in _wanted(plan.carried, code=code)}
    return _headers(plan.source, files, {shard.name: shard.tensors for shard in plan.shards}, indexed)


def _wanted(names: Iterable[str], *, code: bool) -> list[str]:
    """Of the names of a repo those that vLLM reads at its top."""
    return [name for name in names if name in CONFIGS or (code and name.endswith(".py") and "/" not in name)]


def _text(source: Source, name: str) -> bytes:
    return source.read(name, 0, source.files()[name]).tobytes()


def _headers(
    name: str, files: Mapping[str, bytes], shards: Mapping[str, tuple[TensorInfo, ...]], indexed: set[str] | None
) -> Headers:
    """Of all shards those that vLLM loads: at the top of the repo, and in its index where it has one."""
    if "config.json" not in files:
        raise CheckpointError(f"{name}: vLLM needs its config.json, there is none; add it")
    top = [shard for shard in sorted(shards) if "/" not in shard and (indexed is None or shard in indexed)]
    tensors = tuple(info for shard in top for info in shards[shard])
    if not tensors:
        raise CheckpointError(
            f"{name}: vLLM loads .safetensors files with tensors at its top, found none among {len(shards)} files; "
            "give the folder or the branch of the model"
        )
    return Headers(name, files, tensors)
