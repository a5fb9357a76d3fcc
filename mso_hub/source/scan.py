"""All files of a repo -> Checkpoint: which shards belong together, what every header says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from mso_hub.checkpoint import (
    Checkpoint,
    Group,
    Shard,
    TensorInfo,
    header_length,
    other_models,
    parse_config,
    parse_header,
    parse_index,
)
from mso_hub.errors import CheckpointError
from mso_hub.source.kt_tree import tree_shards

if TYPE_CHECKING:
    from mso_hub.source import Source

INDEX_SUFFIX = ".safetensors.index.json"
BESIDE = frozenset({"README.md", ".gitattributes", ".gitignore"})
"""Files that say nothing about the weights: an edit of the card must not make an unfinished run another job."""
FIRST_READ = 65_536
"""Bytes asked for before the header length is known: one read is enough for most shards."""


def read_shard(source: Source, file: str, size: int) -> Shard:
    """Header of one file, by one or two range reads."""
    first = source.read(file, 0, min(size, FIRST_READ)).tobytes()
    length = header_length(first[:8], file, size)
    raw = first[8 : 8 + length]
    if len(raw) < length:
        raw += source.read(file, len(first), 8 + length).tobytes()
    return parse_header(raw, file, size)


def _merge(shards: Iterable[Shard], where: str) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for info in shard.tensors:
            if info.name in tensors:
                raise CheckpointError(
                    f"{where}: the tensor {info.name!r} is in {tensors[info.name].file} and in {shard.name}; "
                    "remove the file that is stale"
                )
            tensors[info.name] = info
    return tensors


def _indexed_group(index: str, source: Source, shards: Mapping[str, Shard], files: Mapping[str, int]) -> Group:
    weight_map, metadata = parse_index(source.read(index, 0, files[index]).tobytes(), index)
    for shard in sorted(set(weight_map.values()) - set(shards)):
        raise CheckpointError(f"{index}: points at {shard!r}, which is not in {source.name}; download it again")
    tensors = _merge((shards[name] for name in sorted(set(weight_map.values()))), index)
    for name, shard in weight_map.items():
        found = tensors[name].file if name in tensors else "no shard"
        if found != shard:
            raise CheckpointError(
                f"{index}: says that {name!r} is in {shard!r}, {found} holds it; the index does not fit the shards"
            )
    extra = {k: v for k, v in metadata.items() if k != "total_size"}
    return Group(index, tensors, frozenset(weight_map), extra)


def _join_loose(groups: list[Group], loose: list[Shard]) -> list[Group]:
    """Unindexed files join the index of their folder, as loaders that glob a folder see them."""
    by_folder: dict[str, list[Shard]] = {}
    for shard in loose:
        by_folder.setdefault(str(PurePosixPath(shard.name).parent), []).append(shard)
    for folder, shards in by_folder.items():
        tensors = _merge(shards, folder)
        home = next((g for g in groups if g.index and str(PurePosixPath(g.index).parent) == folder), None)
        if home is None:
            groups.append(Group(None, tensors))
            continue
        for name in tensors.keys() & home.tensors.keys():
            raise CheckpointError(
                f"{home.index}: {name!r} is in {home.tensors[name].file} and again in {tensors[name].file}, which "
                "the index does not list; remove the file that is stale"
            )
        groups[groups.index(home)] = Group(home.index, {**home.tensors, **tensors}, home.indexed, home.extra)
    return groups


def read_checkpoint(source: Source) -> Checkpoint:
    """Read and check every header, index and config.json of a repo; no weight is read.

    Raises CheckpointError for a header that lies, an index that points nowhere or a tensor held twice.
    """
    files = source.files()
    apart = other_models(files)
    own = {name: size for name, size in files.items() if not name.startswith(apart)}
    shards = {name: read_shard(source, name, size) for name, size in own.items() if name.endswith(".safetensors")}
    tree = {} if shards else tree_shards(own)
    if not shards and not tree:
        models = f", models of their own in {', '.join(apart)}" if apart else ""
        old = any(name.endswith((".bin", ".pth", ".pt", ".gguf")) for name in own)
        way_out = (
            "convert .bin or .pth weights to safetensors first" if old else "give the folder or the branch of the model"
        )
        raise CheckpointError(
            f"{source.name}: needs at least one .safetensors file, found {len(own)} other files{models}; {way_out}"
        )
    indices = [name for name in own if name.endswith(INDEX_SUFFIX) and not tree]
    groups = [_indexed_group(name, source, shards, files) for name in indices]
    owned: dict[str, str] = {}
    for group in groups:
        for shard in sorted({info.file for info in group.tensors.values()}):
            if shard in owned:
                raise CheckpointError(f"{shard}: listed by {owned[shard]} and by {group.index}; keep one index")
            owned[shard] = str(group.index)
    groups = _join_loose(groups, [shard for name, shard in shards.items() if name not in owned])
    if tree:
        groups.append(Group(None, _merge(tree.values(), source.name)))
    digest = hashlib.sha256()
    for name in sorted(set(files) - BESIDE):
        digest.update(f"{name}\0{source.stamp(name)}\0".encode())
    config: dict[str, Any] = {}
    if "config.json" in files:
        config = parse_config(source.read("config.json", 0, files["config.json"]).tobytes(), "config.json")
    shards |= tree
    rest = {n: s for n, s in files.items() if n not in shards and n not in indices}
    return Checkpoint(source.name, digest.hexdigest(), shards, tuple(groups), config, rest)
