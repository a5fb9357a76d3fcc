"""`--load-format mso_checked`: vLLM's default loader, and an error instead of a model that is only partly written.

vLLM checks names, and of quantized models not even those: a checkpoint without half of a fused scale, without a layer,
or with weights of another dtype is served, and answers nonsense. Here every copy into a parameter is counted while
vLLM loads, at any parallel size and on any device; what is not written, repeated or converted by value is an error
that lists all of it, for each rank. `model_loader_extra_config` takes, beside vLLM's own keys:

    report  path of a JSON file; every rank writes PATH.rank0.json, PATH.rank1.json, ..
    strict  false logs the problems as a warning and serves the model

A drafter of speculative decoding gets some of its weights from the model that it drafts for, after loading: for one of
these, problems are logged.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from vllm_mso_hub.compat import private
from vllm_mso_hub.compat.model import optional_parameters
from vllm_mso_hub.track import Tracker

_log = logging.getLogger("vllm.mso_hub")
_DefaultModelLoader: Any = private("vllm.model_executor.model_loader.default_loader", "DefaultModelLoader")
_BOOKKEEPING = (".weight_shape", ".g_idx", ".weight_g_idx")  # integers of any width, whose values nobody multiplies


class IncompleteModelError(ValueError):
    """Parameters were not written as the checkpoint stores them; the message lists all of them."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that loading did wrong.

    kind       missing (nothing written), partial, broadcast or cast
    parameter  name in vLLM's model
    message    a sentence with numbers
    """

    kind: str
    parameter: str
    message: str


class CheckedLoader(_DefaultModelLoader):  # type: ignore[misc]
    """vLLM's DefaultModelLoader, watched."""

    def __init__(self, load_config: Any) -> None:
        options = load_config.model_loader_extra_config
        options = dict(options) if isinstance(options, dict) else options  # vLLM says what is wrong with others
        report, strict = _own_options(options)
        plain = copy.copy(load_config)
        plain.load_format = "auto"
        plain.model_loader_extra_config = options
        super().__init__(plain)
        self._report, self._strict = report, strict
        self._tracker: Tracker | None = None

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """vLLM's iterator over the checkpoint, each tensor known to the tracker before it is handed out."""
        tensors = super().get_all_weights(model_config, model)
        return tensors if self._tracker is None else self._tracker.follow(_unwatched(tensors, self._tracker))

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """vLLM's own, then IncompleteModelError unless every parameter was written as it is stored."""
        tracker = Tracker()
        tracker.watch(model.named_parameters())
        self._tracker = tracker
        try:
            with tracker:
                super().load_weights(model, model_config)
        finally:
            self._tracker = None
        world = private("vllm.distributed.parallel_state", "get_world_group")()
        self.judge(findings(model, tracker), model_config, int(world.rank_in_group), int(world.world_size))

    def judge(self, found: list[Finding], model_config: Any, rank: int, ranks: int) -> None:
        """Write the report; IncompleteModelError, or a warning where the options or a drafter ask for no more."""
        name = str(model_config.model)
        if self._report is not None:
            content = {"model": name, "rank": rank, "ranks": ranks, "problems": [asdict(finding) for finding in found]}
            Path(f"{self._report}.rank{rank}.json").write_text(json.dumps(content, indent=2))
        if not found:
            _log.info("mso_checked: rank %d of %d: every parameter of %s is written", rank, ranks, name)
            return
        lines = "".join(f"\n  {finding.kind}: {finding.message}" for finding in found)
        text = f"mso_checked: rank {rank} of {ranks}: {len(found)} problems in {name}{lines}"
        if self._strict and model_config.runner_type != "draft":
            raise IncompleteModelError(text)
        _log.warning("%s", text)


def _unwatched(tensors: Iterator[tuple[str, Tensor]], tracker: Tracker) -> Iterator[tuple[str, Tensor]]:
    """The same pairs, read while the tracker is off: reading a file is half of all operations, and none of its."""
    done = object()
    while True:
        tracker.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            pair = next(tensors, done)
        finally:
            tracker.__enter__()  # type: ignore[no-untyped-call]
        if pair is done:
            return
        yield cast("tuple[str, Tensor]", pair)


def findings(model: nn.Module, tracker: Tracker) -> list[Finding]:
    """What a tracker saw go wrong with a model's parameters; those that a checkpoint may leave out are passed over."""
    found = []
    optional = optional_parameters(model) | _quantized_online(model)
    for name, parameter in model.named_parameters():
        written = tracker.written(name, parameter)
        if written < parameter.numel() and name not in optional:
            sources = ", ".join(tracker.sources(name)) or "no tensor of the checkpoint"
            counts = f"{written:,} of {parameter.numel():,} elements written"
            message = f"{name} {list(parameter.shape)}: {counts}, by {sources}"
            found.append(Finding("partial" if written else "missing", name, message))
    for repeat in sorted(tracker.broadcasts, key=lambda repeat: repeat.tensor):
        message = (
            f"{repeat.tensor} {list(repeat.stored)} is repeated to fill {list(repeat.filled)} of {repeat.parameter}"
        )
        found.append(Finding("broadcast", repeat.parameter, message))
    for change in sorted(tracker.casts, key=lambda change: change.tensor):
        if not change.tensor.endswith(_BOOKKEEPING):
            to = f"{change.wanted} of {change.parameter}"
            message = f"{change.tensor} is stored as {change.stored} and converted to the {to}".replace("torch.", "")
            found.append(Finding("cast", change.parameter, message))
    return found


def _quantized_online(model: nn.Module) -> set[str]:
    """Parameters of modules that vLLM quantizes while it loads: it writes their scales itself, later."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if getattr(getattr(module, "quant_method", None), "uses_meta_device", False)
        for name, _ in module.named_parameters(recurse=False)
    }


def _own_options(options: Any) -> tuple[str | None, bool]:
    """`report` and `strict`, taken out of the options; ValueError when one of them makes no sense."""
    if not isinstance(options, dict):
        return None, True
    report, strict = options.pop("report", None), options.pop("strict", True)
    if report is not None and not (isinstance(report, str) and Path(report).parent.is_dir()):
        raise ValueError(f"report: expected a path in a folder that exists, got {report!r}")
    if not isinstance(strict, bool):
        raise ValueError(f"strict: expected true or false, got {strict!r}")
    return report, strict
