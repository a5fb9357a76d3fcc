"""A source in which packed weights of a work folder stand in place of the original ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mso_hub.calibrate.methods.targets import Target
from mso_hub.calibrate.methods.work import Work
from mso_hub.checkpoint import Checkpoint
from mso_hub.formats import Format
from mso_hub.formats.dialects import compressed_tensors
from mso_hub.plan import Plan
from mso_hub.plan.announce import group_targets
from mso_hub.source import LocalSource, Source
from mso_hub.source.overlay import Elsewhere, OverlaySource, Part

OURS, THEIRS = "quantization_config", "compression_config"
"""Both are read as a quantization_config; ours comes first and names its modules exactly."""


def overlay(source: Source, checkpoint: Checkpoint, plan: Plan, targets: Iterable[Target], work: Work) -> OverlaySource:
    """The source with the packed weights of all finished layers; the plan that made them copies them as they are.

    Of a stored 3-D tensor of experts the plan takes all or none, so all of it is replaced.
    """
    targets = list(targets)
    folder = LocalSource(work.folder)
    places = {name: info for layer in work.layers() for name, info in work.tensors(layer).items()}
    replaced: dict[str, list[Part]] = {}
    for target in targets:
        stored = [info.name for info in target.step.weight.parts.values()]
        replaced.setdefault(stored[0], []).extend(Elsewhere(i, places[i.name], folder) for i in target.outputs)
        replaced |= {name: [] for name in stored[1:]}
    config = _config(checkpoint.config, targets, plan)
    stamp = "\0".join(f"{work.file(n).name} {work.digest(n)}" for n in work.layers())
    return OverlaySource(source, checkpoint, replaced, {"config.json": json.dumps(config).encode()}, stamp)


def _config(config: Mapping[str, Any], targets: Sequence[Target], plan: Plan) -> dict[str, Any]:
    """config.json that says how the packed weights are stored, beside what it said of others."""
    groups: dict[str, tuple[Format, list[str]]] = {}
    for target in targets:
        groups.setdefault(repr(target.form.group), (target.form, []))[1].append(target.module)
    packed = {target.step.weight.module for target in targets}
    others = [module for module in (*plan.kept, *plan.formats) if module not in packed]
    names = group_targets([modules for _, modules in groups.values()], others)
    pairs = [(form.group, found) for (form, _), found in zip(groups.values(), names, strict=True)]
    said = dict(config)
    if isinstance(said.get(OURS), dict):
        said.setdefault(THEIRS, said[OURS])
    return {**said, OURS: compressed_tensors.config(pairs, (), kv_cache=False)}
