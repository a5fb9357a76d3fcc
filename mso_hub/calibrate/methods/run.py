"""START HERE: a source, text and a recipe -> a source that converts to better weights.

gptq, weighted      packed weights are made layer by layer in a work folder; the returned source shows them in
                    place of the original ones, and the ordinary conversion copies them
awq, smoothquant    scales move from activations into weights; the returned source multiplies them in while it is
                    read, and the ordinary conversion rounds to nearest
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mso_hub.calibrate.identity import require_same_model
from mso_hub.calibrate.methods.awq import AwqChoice
from mso_hub.calibrate.methods.fold_walk import Choice, FoldWalk, prefix_of, read_scales, shapes_of
from mso_hub.calibrate.methods.folds import find_folds
from mso_hub.calibrate.methods.gptq import MethodSettings
from mso_hub.calibrate.methods.gptq_walk import GPTQ, GptqWalk
from mso_hub.calibrate.methods.grids import require_support
from mso_hub.calibrate.methods.hessians import Gather
from mso_hub.calibrate.methods.importance import WeightedWalk
from mso_hub.calibrate.methods.packed import overlay
from mso_hub.calibrate.methods.packing import NEAREST, Packing
from mso_hub.calibrate.methods.scaled import Factors, exact_scales, scaled
from mso_hub.calibrate.methods.smooth import SmoothChoice
from mso_hub.calibrate.methods.targets import Numbers, Target, plan_targets
from mso_hub.calibrate.methods.work import Work
from mso_hub.calibrate.statistics import MOMENTS, Statistics
from mso_hub.calibrate.walk import State, Walk
from mso_hub.checkpoint import Checkpoint
from mso_hub.errors import RecipeError
from mso_hub.plan import Plan, Recipe
from mso_hub.source import Source, read_checkpoint

WEIGHTED, AWQ, SMOOTHQUANT = "weighted", "awq", "smoothquant"
METHODS = (GPTQ, WEIGHTED, AWQ, SMOOTHQUANT)
HESSIANS = 2 << 30
"""Bytes of Hessians at a time where no memory limit says otherwise; else a quarter of it."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a method made of a source.

    source  to be converted with the same recipe
    notes   sentences for the plan and the card: what was done, and where it could not be done
    """

    source: Source
    notes: tuple[str, ...]


def run(
    walk: Walk, batches: Sequence[Tensor], recipe: Recipe, folder: Path, *, method: str = GPTQ,
    settings: MethodSettings | None = None, hessians: int | None = None,
) -> Prepared:  # fmt: skip
    """Run a method over some text; continues where an earlier run of the same job in the same folder ended.

    walk      over the source that is to be converted
    batches   token ids I64 [rows, length] each, without padding
    recipe    what the result will be converted with
    folder    work folder; it must stay until the conversion is done
    settings  of the method
    hessians  bytes of Hessians at a time; None: a quarter of the walk's memory limit, 2 GiB where it has none
    Raises RecipeError for a method or format that does not exist or fit, PlanError as planning does, ResumeError for a
    folder with other work, NonFiniteError for NaN or Inf in weights or activations.
    """
    if method in (AWQ, SMOOTHQUANT):
        return _folded(walk, batches, recipe, folder, method, settings or MethodSettings(), hessians)
    return _packed(walk, batches, recipe, folder, method, settings or MethodSettings(), hessians)


def choose_targets(walk: Walk, recipe: Recipe, method: str) -> tuple[Plan, list[Target], dict[int, list[Target]]]:
    """What a method would work on: the plan, all weights that are quantized, those of each decoder layer.

    Raises what `run` raises for a method, a recipe or a device that do not go together; no weight is read.
    """
    if method not in METHODS:
        raise RecipeError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == GPTQ and len(walk.devices) > 1:
        raise RecipeError(f"--method {GPTQ}: runs on one device, got {', '.join(walk.devices)}; give one")
    plan, targets = plan_targets(walk.source, walk.checkpoint, recipe)
    for target in targets:
        if method != SMOOTHQUANT:
            require_support(target.form, method)
        elif target.form.activations > 8:
            raise RecipeError(
                f"--method {method}: is for activations of 8 bits or fewer, {target.form.name} here has "
                f"{target.form.activations}; take int8, or --method {AWQ}"
            )
    return plan, targets, _by_layer(walk, targets)


def _folded(
    walk: Walk,
    batches: Sequence[Tensor],
    recipe: Recipe,
    folder: Path,
    method: str,
    settings: MethodSettings,
    hessians: int | None,
) -> Prepared:
    """Methods that move scales."""
    plan, _, layers = choose_targets(walk, recipe, method)
    said = asdict(settings) if method == AWQ else {"alpha": settings.alpha}
    work = Work(folder, _key(walk, batches, recipe, method, said))
    numbers = Numbers(walk.source, plan.units)
    choice: Choice = SmoothChoice(layers, numbers, alpha=settings.alpha)
    if method == AWQ:
        choice = AwqChoice(layers, numbers, _gather(walk, batches, folder, hessians), least_rows=settings.least_rows)
    walk.run(batches, FoldWalk(walk, layers, work, choice), start=State(work.state))
    factors, folded, refused = _factors(walk, work, norms_only=choice.norms_only)
    notes = [f"{method}: scales of {folded:,} inputs were moved into the weights behind them"]
    if refused:
        notes.append(
            f"{len(refused):,} inputs keep their scale, the model's output would not stay the same; the first is "
            f"{refused[0]}"
        )
    return Prepared(scaled(walk.source, walk.checkpoint, factors.of, recipe.dtype), tuple(notes))


def _factors(walk: Walk, work: Work, *, norms_only: bool) -> tuple[Factors, int, list[str]]:
    """Factors of every tensor, how many folds made them, and those that were refused."""
    factors, refused, count = Factors({n: walk.weights.shape(n) for n in walk.weights.names}), [], 0
    for layer in work.layers():
        chosen = read_scales(work, layer)
        refused += list(work.report(layer)["refused"])
        for fold in find_folds(prefix_of(walk, layer), shapes_of(walk, layer), norms_only=norms_only):
            if fold.name in chosen:
                scales = chosen[fold.name]
                if fold.norm:
                    norm = walk.weights.get(fold.producers[0].tensor).float().numpy()
                    scales = exact_scales(norm, scales, walk.dtype)
                factors.add(fold, scales)
                count += 1
    return factors, count, refused


def _packed(
    walk: Walk,
    batches: Sequence[Tensor],
    recipe: Recipe,
    folder: Path,
    method: str,
    settings: MethodSettings,
    hessians: int | None,
) -> Prepared:
    """Methods that pack weights in the work folder."""
    plan, targets, layers = choose_targets(walk, recipe, method)
    work = Work(folder, _key(walk, batches, recipe, method, asdict(settings)))
    numbers = Numbers(walk.source, plan.units)
    if method == GPTQ:
        observer: Packing = GptqWalk(layers, numbers, work, settings, _gather(walk, batches, folder, hessians))
    else:
        observer = WeightedWalk(layers, numbers, work, least_rows=settings.least_rows)
    walk.run(batches, observer, start=State(work.state))
    done = [target for members in layers.values() for target in members]
    made = overlay(walk.source, walk.checkpoint, plan, done, work)
    return Prepared(made, _notes(work, len(targets) - len(done)))


def from_statistics(
    source: Source, statistics: Statistics, recipe: Recipe, folder: Path, *, settings: MethodSettings | None = None
) -> Prepared:
    """The weighted search with second moments from a file of statistics: no model runs.

    statistics  of this source, made with second moments (`channels`)
    folder      work folder; it must stay until the conversion is done
    Raises RecipeError for statistics of another model or without second moments, and what `run` raises.
    """
    checkpoint = read_checkpoint(source)
    require_same_model(statistics, source, checkpoint)
    plan, targets = plan_targets(source, checkpoint, recipe)
    for target in targets:
        require_support(target.form, WEIGHTED)
    files = {name: at for at, name in enumerate(sorted({t.step.weight.home.file for t in targets}))}
    parts: dict[int, list[Target]] = {at: [] for at in files.values()}
    for target in targets:
        parts[files[target.step.weight.home.file]].append(target)
    least = (settings or MethodSettings()).least_rows
    read = statistics.path.read_bytes() if statistics.path is not None else b""
    said = {"least_rows": least, "statistics": hashlib.sha256(read).hexdigest()}
    work = Work(folder, _digest(checkpoint, recipe, WEIGHTED, said))
    packer = WeightedWalk(parts, Numbers(source, plan.units), work, least_rows=least)
    for at in sorted(parts.keys() - set(work.layers())):
        packer.open(at)
        packer.pack(statistics.tokens, lambda name: statistics.vector(name, MOMENTS).astype(np.float64))
    return Prepared(overlay(source, checkpoint, plan, targets, work), _notes(work, 0))


def _notes(work: Work, left: int) -> tuple[str, ...]:
    """What was done, in sentences."""
    said = {module: entry for layer in work.layers() for module, entry in work.report(layer).items()}
    nearest = [module for module, entry in said.items() if entry["method"] == NEAREST]
    methods = sorted({entry["method"] for entry in said.values()} - {NEAREST})
    found = [f"{len(said) - len(nearest):,} of {len(said):,} weights were quantized with {' and '.join(methods)}"]
    if nearest:
        found.append(
            f"{len(nearest):,} weights saw too little of the text and were rounded to nearest, the first is "
            f"{nearest[0]}"
        )
    if left:
        found.append(f"{left:,} weights outside the decoder layers were rounded to nearest")
    if raised := [module for module, entry in said.items() if entry.get("raised")]:
        found.append(f"{len(raised):,} weights needed more than dampening_frac, the first is {raised[0]}")
    return tuple(found)


def _by_layer(walk: Walk, targets: Sequence[Target]) -> dict[int, list[Target]]:
    """Targets of each decoder layer; those outside of the layers are left out."""
    home = {key: layer for layer, keys in enumerate(walk.table.layers) for key in keys}
    known = set(walk.modules)
    found: dict[int, list[Target]] = {layer: [] for layer in range(walk.layers)}
    for target in targets:
        stem = target.shown.partition("[")[0]
        layer = next((home[key] for key in (f"{stem}.weight", stem) if key in home), None)
        if layer is not None and target.shown in known:
            found[layer].append(target)
    if not any(found.values()):
        raise RecipeError("the recipe takes no weight of a decoder layer, a method has nothing to do; leave it out")
    return found


def _gather(walk: Walk, batches: Sequence[Tensor], folder: Path, limit: int | None) -> Gather:
    """What collects Hessians, within a share of the walk's memory."""
    memory = walk.memory.cpu if walk.devices[0] == "cpu" else walk.memory.gpu
    if limit is None:
        limit = HESSIANS if memory is None else memory // 4
    return Gather(limit, len(batches), None if walk.memory.cpu is None else folder)


def _key(walk: Walk, batches: Sequence[Tensor], recipe: Recipe, method: str, settings: dict[str, Any]) -> str:
    """Digest of everything that decides what a work folder holds."""
    digest = hashlib.sha256(_digest(walk.checkpoint, recipe, method, settings).encode())
    for batch in batches:
        digest.update(str(list(batch.shape)).encode() + batch.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _digest(checkpoint: Checkpoint, recipe: Recipe, method: str, settings: dict[str, Any]) -> str:
    """Of a source and of what is asked for."""
    said = json.dumps([checkpoint.identity, asdict(recipe), method, settings], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()
