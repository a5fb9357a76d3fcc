"""One rank: vLLM's own create_weights and load_weights on meta tensors, watched element by element.

After an exception the same iterator is handed to `load_weights` again, so that every tensor that vLLM refuses is seen.
What a loader had collected when it raised is lost to it, so the counts of such a pass prove nothing: the pass is
repeated on a fresh model without the refused tensors, until one goes through.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_mso_hub.compat.model import meta_model, optional_parameters
from vllm_mso_hub.compat.world import fake_world
from vllm_mso_hub.job import Header
from vllm_mso_hub.shapes.stream import meta_tensors
from vllm_mso_hub.track import Broadcast, Cast, Reads, Tracker

_PASSES = 8
_NOISE = re.compile(
    r" The available parameters belonging to .*"  # hundreds of names, in any order
    r"|\s*\[type=\w+, input_value=.*?\]\s*For further information visit \S+",  # pydantic shows its whole input
    re.DOTALL,
)
_ERRORS = 2000


@dataclass(frozen=True, slots=True)
class Parameter:
    """What a rank holds and how much of it was written, in elements; `sources` as in `Tracker.sources`."""

    shape: tuple[int, ...]
    numel: int
    written: int
    optional: bool
    sources: dict[str, int]


@dataclass(slots=True)
class Rank:
    """What happened on one rank.

    failed      create_weights or the distributed set-up raised: kind and text; nothing else is known then
    refused     checkpoint tensor -> what load_weights raised; "" is an error that no tensor is to blame for
    aborted     there was no end to the errors, so nothing was counted
    """

    rank: int
    failed: tuple[str, str] | None = None
    refused: dict[str, str] = field(default_factory=dict)
    aborted: bool = False
    nbytes: int = 0
    parameters: dict[str, Parameter] = field(default_factory=dict)
    casts: set[Cast] = field(default_factory=set)
    broadcasts: set[Broadcast] = field(default_factory=set)


def load_rank(config: Any, rank: int, headers: Sequence[Header], reads: Reads) -> Rank:
    """Build and load rank `rank` of the world of a VllmConfig; `reads` gains what it reads of each tensor."""
    result = Rank(rank)
    with fake_world(config, rank):
        for _ in range(_PASSES):
            config.compilation_config.static_forward_context.clear()  # every attention layer enters its name here
            try:
                model = meta_model(config)
            except Exception as error:  # noqa: BLE001 - whatever a model's constructor raises is the finding
                result.failed = ("create", explain(error))
                return result
            here: Reads = {}
            tracker = Tracker(here)
            errors = _load(model, headers, tracker, result.refused)
            if not errors:
                _keep(result, model, tracker)
                _join(reads, here)
                return result
            result.refused.update(errors)
            if len(result.refused) > _ERRORS or "" in errors:
                break
    result.aborted = True
    result.refused.setdefault("", f"{len(result.refused):,} tensors were refused, the rest was not looked at")
    return result


def _load(model: Any, headers: Sequence[Header], tracker: Tracker, skip: dict[str, str]) -> dict[str, str]:
    """One pass over the checkpoint without `skip`: checkpoint tensor -> what vLLM raised on it."""
    errors: dict[str, str] = {}
    stream = tracker.follow(meta_tensors(headers, skip))
    with tracker, torch.no_grad():
        tracker.watch(model.named_parameters())
        while len(errors) <= _ERRORS:
            try:
                model.load_weights(stream)
            except Exception as error:  # noqa: BLE001 - any error of a weight loader is a finding, with its tensor
                name = _blamed(error, tracker) or tracker.current or ""
                if name in errors or name in skip:  # no progress: the same thing would be raised for ever
                    errors.setdefault("", explain(error))
                    break
                errors[name] = explain(error)
            else:
                break
    return errors


def _blamed(error: BaseException, tracker: Tracker) -> str | None:
    """The checkpoint tensor in the innermost frame that holds one: loaders that collect first fail on another later."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        local = frame.f_locals
        for value in (local.get("loaded_weight"), *local.values()):
            if isinstance(value, torch.Tensor) and (name := tracker.name_of(value)) is not None:
                return name
    return None


def explain(error: BaseException) -> str:
    """One line: the exception's own text, or where it was raised when it has none."""
    text = " ".join(_NOISE.sub("", str(error)).split())
    frames = traceback.extract_tb(error.__traceback__)
    if not text and frames:
        last = frames[-1]
        text = f"{last.line} ({last.filename.rpartition('/')[2]}:{last.lineno})"
    return f"{type(error).__name__}: {text}"[:1000]


def _keep(result: Rank, model: Any, tracker: Tracker) -> None:
    optional = optional_parameters(model)
    for name, parameter in model.named_parameters():
        result.parameters[name] = Parameter(
            tuple(parameter.shape),
            parameter.numel(),
            tracker.written(name, parameter),
            name in optional,
            tracker.sources(name),
        )
        result.nbytes += parameter.numel() * parameter.element_size()
    result.casts, result.broadcasts = tracker.casts, tracker.broadcasts


def _join(reads: Reads, here: Reads) -> None:
    for name, by_path in here.items():
        for path, regions in by_path.items():
            known = reads.setdefault(name, {}).setdefault(path, regions)
            if known is not regions:
                known.update(regions)
