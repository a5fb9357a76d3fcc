"""kt-kernel's experts: what headers and config.json say of them against what is stored, and what was left out.

kt-kernel asks none of this: with another number of NUMA nodes it computes nonsense or dies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from mso_hub.formats.decoders.kt import KtDecoder
from mso_hub.formats.dialects.ktransformers import LAYOUT, METADATA, expert_place
from mso_hub.formats.weight import Weight
from mso_hub.plan.kt import source_digest
from mso_hub.plan.kt_problems import missing_experts
from mso_hub.plan.select import decoder_layer, layer_count
from mso_hub.verify.opened import Opened


def kt_experts(mine: Opened) -> dict[str, Weight]:
    """Experts that are stored for kt-kernel, by name."""
    return {name: w for name, w in mine.weights.items() if isinstance(w.decoder, KtDecoder)}


def holds_experts_only(mine: Opened) -> bool:
    """Was the rest of the model left out?"""
    return bool(mine.weights) and len(kt_experts(mine)) == len(mine.weights)


def kt_problems(mine: Opened) -> Iterator[str]:
    """Sentences about method, number of parts, source and missing experts."""
    experts = kt_experts(mine)
    if not experts:
        return
    kinds = {_kind(weight): name for name, weight in experts.items()}
    if len(kinds) > 1:
        found = ", ".join(f"{name} is {method} for {parts} NUMA nodes" for (method, parts), name in kinds.items())
        yield f"kt-kernel takes one method and one number of NUMA nodes, found {found}"
        return
    (method, parts), _ = kinds.popitem()
    stored = {"kt_method": method, "kt_threadpool_count": parts}
    said = mine.checkpoint.config.get(LAYOUT)
    sources = {}
    if isinstance(said, dict):
        sources[str(said.get("source"))] = "config.json"
        yield from _contradictions("config.json", stored, {
            "kt_method": str(said.get("method")), "kt_threadpool_count": str(said.get("threadpool_count")),
        })  # fmt: skip
    for name in dict.fromkeys(part.file for weight in experts.values() for part in weight.parts.values()):
        metadata = mine.checkpoint.shards[name].metadata
        yield from _contradictions(name, stored, metadata)
        if METADATA[2] in metadata:
            sources.setdefault(metadata[METADATA[2]], name)
    if len(sources) > 1:
        two = " and ".join(list(sources.values())[:2])
        yield f"files were made from different checkpoints: {two}; convert it again"
    places = {place: w for w in experts.values() if (place := expert_place(w.module)) is not None}
    yield from missing_experts(places, mine.checkpoint.config)


def _kind(weight: Weight) -> tuple[str, str]:
    decoder = weight.decoder
    assert isinstance(decoder, KtDecoder)  # noqa: S101 - for the type checker
    return f"INT{decoder.width}", str(decoder.parts)


def _contradictions(where: str, stored: Mapping[str, str], said: Mapping[str, str]) -> Iterator[str]:
    for key, value in stored.items():
        if said.get(key, value) != value:
            yield f"{where}: says {key.removeprefix('kt_')} {said[key]}, stored is {value}; files were mixed up"


def kt_source_notes(mine: Opened, theirs: Opened) -> Iterator[str]:
    """A sentence where the experts say that they were made from another checkpoint than the given one."""
    said = mine.checkpoint.config.get(LAYOUT)
    if kt_experts(mine) and isinstance(said, dict) and said.get("source") != source_digest(theirs.checkpoint):
        yield (
            f"{theirs.source.name}: has other headers than the checkpoint that the experts say they were made from, so "
            "compare the errors with care"
        )


def as_converted(theirs: Opened, mine: Opened) -> Opened:
    """The source without what a conversion for kt-kernel leaves out: MTP experts, and the rest if it was asked to."""
    if not kt_experts(mine):
        return theirs
    count = layer_count(theirs.checkpoint.config)
    routed = {
        name for name, w in theirs.weights.items()
        if expert_place(w.module) is not None and decoder_layer(w.module, count) is not None
    }  # fmt: skip
    rest = set() if holds_experts_only(mine) else {n for n in theirs.weights if n in mine.weights or not _is_expert(n)}
    return replace(theirs, weights={n: w for n, w in theirs.weights.items() if n in routed or n in rest})


def _is_expert(name: str) -> bool:
    return expert_place(name.removesuffix(".weight")) is not None
