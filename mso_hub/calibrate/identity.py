"""Is this the model whose activations were measured? By commit, by the state of a folder, or by samples of weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mso_hub.calibrate.statistics import Statistics
from mso_hub.checkpoint import Checkpoint
from mso_hub.errors import RecipeError
from mso_hub.source import Source

SAMPLES = 64
"""Weights of which some bytes are compared: training changes all of them."""
SAMPLE_BYTES = 4096


def fingerprint(source: Source, checkpoint: Checkpoint) -> str:
    """SHA-256 in hex of config.json, of all names, dtypes and shapes, and of bytes from the middle of SAMPLES weights.

    The same for a copy in another place, also where it is cut into other shards; another one after any training.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    infos = sorted((info for shard in checkpoint.shards.values() for info in shard.tensors), key=lambda i: i.name)
    for info in infos:
        digest.update(f"{info.name}\0{info.dtype}\0{info.shape}\0".encode())
    large = [info for info in infos if len(info.shape) > 1] or infos
    for at in range(min(SAMPLES, len(large))):
        info = large[at * len(large) // min(SAMPLES, len(large))]
        middle = info.begin + max(0, info.nbytes - SAMPLE_BYTES) // 2
        digest.update(source.read(info.file, middle, min(middle + SAMPLE_BYTES, info.end)).data)
    return digest.hexdigest()


def named(source: Source) -> tuple[str, str]:
    """(repo or name of the folder, commit or "") of a source: what may be published, no path of this machine."""
    if source.origin is not None:
        return source.origin.repo_id, source.origin.commit
    return (source.path.resolve().name if source.path is not None else Path(source.name).name), ""


def require_same_model(statistics: Statistics, source: Source, checkpoint: Checkpoint) -> None:
    """RecipeError for statistics of another model, or of another commit of this one."""
    made = statistics.provenance
    if made.identity == checkpoint.identity:
        return
    name, commit = named(source)
    if not (commit and made.commit) and made.fingerprint == fingerprint(source, checkpoint):
        return  # a copy of a folder, or a download of a repo
    here = {info.name for shard in checkpoint.shards.values() for info in shard.tensors}
    strange = [module for module in statistics.amax if not _holds(here, module)]
    found = ", whose weights or config are others"
    if strange:
        found = f"; {len(strange):,} of its {len(statistics.amax):,} modules are not here, the first is {strange[0]}"
    at = f" at commit {commit[:12]}" if commit else ""
    raise RecipeError(
        f"{statistics.path}: these are statistics of {made.where}, not of {name}{at}"
        f"{found}; calibrate this one with `mso-hub calibrate`"
    )


def _holds(names: set[str], module: str) -> bool:
    """Does a checkpoint have a module, whatever form its weight has?"""
    bare = module.partition("[")[0]
    endings = ("", ".weight", ".weight_packed", ".qweight", "_blocks")
    return any(f"{bare}{ending}" in names for ending in endings)
