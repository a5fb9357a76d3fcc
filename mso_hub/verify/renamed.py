"""`re:` patterns written in names that vLLM does not have.

vLLM renames the modules of multimodal models and the plain names in ignore lists and targets with them, but not the
patterns. One that begins with a prefix that is renamed matches nothing there, and the layers that it was to leave
alone are taken for packed ones.
Source: hf_to_vllm_mapper of vLLM 0.32's models, apply_vllm_mapper of its compressed-tensors config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mso_hub.verify.announced import compiled, entries
from mso_hub.verify.claims import shown

PREFIXES = {
    "model.language_model.": "language_model.model.",
    "model.visual.": "visual.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.audio_tower.": "audio_tower.",
}
"""Beginning of a stored name -> the same in vLLM, in every model of its that has such names."""


def renamed(module: str) -> str:
    """A module as vLLM calls it; unchanged where no prefix is renamed."""
    for stored, known in PREFIXES.items():
        if module.startswith(stored):
            return known + module.removeprefix(stored)
    return module


def renamed_problems(config: Mapping[str, Any], modules: Sequence[str]) -> Iterator[str]:
    """A sentence for the ignore list and for every config group that covers modules by their stored names only.

    config   a quantization_config of compressed-tensors
    modules  linear ones
    """
    moved = [module for module in modules if renamed(module) != module]
    if not moved:
        return
    groups = config.get("config_groups")
    lists = {"ignore": entries(config)}
    for name, group in groups.items() if isinstance(groups, dict) else ():
        targets = group.get("targets") if isinstance(group, dict) else None
        lists[f"targets of {name}"] = [t for t in targets if isinstance(t, str)] if isinstance(targets, list) else []
    for where, listed in lists.items():
        yield from _missed(where, listed, moved)


def _missed(where: str, listed: Sequence[str], modules: Sequence[str]) -> Iterator[str]:
    patterns = [p for p in map(compiled, (entry for entry in listed if entry.startswith("re:"))) if p is not None]
    lost = [
        module for module in modules
        if module not in listed and any(p.match(module) for p in patterns)
        and not any(p.match(renamed(module)) for p in patterns)
    ]  # fmt: skip
    if lost:
        pattern = next(p.pattern for p in patterns if p.match(lost[0]))
        part = renamed(lost[0]).split(".")[0]
        yield (
            f"config.json: {where}: re:{pattern} matches stored names and none of vLLM's, where {lost[0]} is "
            f"{renamed(lost[0])}; write re:.*{part}.* or the names themselves: {shown(lost)}"
        )
