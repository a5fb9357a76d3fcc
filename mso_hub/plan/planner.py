"""Headers + recipe -> Plan: every output byte's place and origin, before a weight is read.

One object decides what is written and how it is announced: the shards' headers, the index, `quantization_config`
and its ignore list all come from the same steps, so they cannot disagree.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mso_hub.checkpoint import Checkpoint, Group, TensorInfo
from mso_hub.errors import PlanError
from mso_hub.formats import DENSE, Format
from mso_hub.formats.decoders.base import ReadShape
from mso_hub.formats.decoders.kt import read_kt
from mso_hub.formats.detect import quantization_configs, read_weights, with_dtype, without_quantization
from mso_hub.formats.weight import Weight
from mso_hub.plan.announce import announce, linear_modules
from mso_hub.plan.config import REPO_FILES, carried_files, ignore_list, substring_problem
from mso_hub.plan.measured import under_new_names
from mso_hub.plan.recipe import Recipe
from mso_hub.plan.select import Selection, select
from mso_hub.plan.shards import ShardPlan, as_json, index_file, plan_shards
from mso_hub.plan.steps import Step, Stepper, input_scales, settled
from mso_hub.plan.text import text_model

FORMAT_VERSION = 2
"""Part of every job digest: raised when the same recipe starts to give other bytes."""
SHOWN = 8
"""Problems spelled out in one message; the rest is counted."""


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """Everything that will happen.

    job       digest of source, recipe and format version: the name of this piece of work
    units     unit key -> weights that engines fuse, wherever they are stored
    formats   module of a quantized weight -> how it is stored
    kept      module -> why its numbers stay
    dropped   stored tensors that do not reach the output
    config    content of config.json, empty when the source has none
    files     text files to write, repo path -> bytes: config, index, layout's own
    carried   source files copied unchanged; `behind` are those that are not
    notes     what the user should know
    """

    source: str
    job: str
    recipe: Recipe
    shards: tuple[ShardPlan, ...]
    units: Mapping[str, tuple[Weight, ...]]
    formats: Mapping[str, Format]
    kept: Mapping[str, str]
    dropped: tuple[str, ...]
    config: Mapping[str, Any]
    files: Mapping[str, bytes]
    carried: tuple[str, ...]
    behind: tuple[str, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        """One line: the last expression of a notebook cell shows it."""
        changed = sum(step.changes for shard in self.shards for step in shard.steps)
        sizes = f"{self.read_bytes:,} -> {self.write_bytes:,} bytes"
        return f"Plan({self.source} -> {self.recipe.label or DENSE}, {changed:,} weights, {sizes})"

    @property
    def read_bytes(self) -> int:
        """Source bytes of all weights that are used."""
        return sum(shard.read_bytes for shard in self.shards)

    @property
    def write_bytes(self) -> int:
        """Bytes of all shards and text files; carried files come on top."""
        return sum(shard.nbytes for shard in self.shards) + sum(map(len, self.files.values()))

    def sizes(self, source_files: Mapping[str, int]) -> dict[str, int]:
        """Every file of the output -> bytes: shards first, config and index last."""
        sizes = {name: nbytes for shard in self.shards for name, nbytes in shard.files.items()}
        sizes |= {name: source_files[name] for name in self.carried}
        return sizes | {name: len(data) for name, data in self.files.items()}


def raise_problems(source: str, problems: Sequence[str]) -> None:
    """PlanError with the first problems and the number of the others, where there are any."""
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise PlanError(f"{source}: nothing was written\n  " + "\n  ".join([*problems[:SHOWN], *more]))


def _job(checkpoint: Checkpoint, recipe: Recipe) -> str:
    later = ("unloadable", "calibration", "by_method")
    said = {k: value for k, value in asdict(recipe).items() if k not in later or value}
    settings = json.dumps([FORMAT_VERSION, checkpoint.identity, said], sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _GroupPlan:
    config: Mapping[str, Any]
    selection: Selection
    steps: Sequence[Step]
    problems: list[str]
    dropped: list[str]
    packed: int
    measured: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class _NameSpace:
    """Weights of a group under the names of the output.

    runtime  stored tensors that only the quantized runtime reads
    dropped  those, and the weights that a text-only output leaves out
    names    weight as the source calls it -> its name here, where these differ
    """

    weights: Sequence[Weight]
    config: Mapping[str, Any]
    runtime: Mapping[str, TensorInfo]
    dropped: Sequence[str]
    names: Mapping[str, str] = field(default_factory=dict)


def _name_space(group: Group, checkpoint: Checkpoint, recipe: Recipe, read_shape: ReadShape) -> _NameSpace:
    weights, dropped = read_weights(group.tensors, checkpoint.config, read_shape, recipe.dtype)
    named = read_kt(group.tensors, checkpoint.config, recipe.dtype)[0]
    runtime = {name: named[name] for name in dropped}
    if not recipe.text_only:
        return _NameSpace(weights, checkpoint.config, runtime, dropped)
    text = text_model(checkpoint.config, {w.name: w.shape for w in weights})
    dropped += [w.name for w in weights if w.name not in text.names]
    weights = [replace(w, name=text.names[w.name]) for w in weights if w.name in text.names]
    return _NameSpace(weights, text.config, runtime, dropped, text.names)


def _selection(
    group: Group, checkpoint: Checkpoint, space: _NameSpace, recipe: Recipe,
    encoders: Sequence[Format | None] | None = None,
) -> Selection:  # fmt: skip
    """What the rules choose in one name space; with several of them, a unit is named with its own."""
    selection = select(space.weights, recipe, space.config, encoders)
    if len(checkpoint.groups) == 1:
        return selection
    where = group.index or next((info.file for info in group.tensors.values()), "")
    return replace(selection, units={f"{where}: {key}": members for key, members in selection.units.items()})


def _plan_group(group: Group, checkpoint: Checkpoint, recipe: Recipe, read_shape: ReadShape) -> _GroupPlan:
    """Decide about every weight of one name space, and find what stands in the way."""
    space = _name_space(group, checkpoint, recipe, read_shape)
    weights, dropped = space.weights, list(space.dropped)
    packed = sum(w.decoder is not None for w in weights)
    if recipe.decodes:
        kept = {w.module: (w, "decoded" if w.decoder else "stays dense") for w in weights}
        selection = Selection((), {}, {}, kept, {})
    else:
        selection = settled(_selection(group, checkpoint, space, recipe))
    recipe = under_new_names(recipe, space.names)
    scales, missing = input_scales(selection, recipe)
    problems = [*selection.problems, *missing]
    if problems:
        return _GroupPlan(space.config, selection, (), problems, dropped, packed)
    stepper = Stepper(selection, scales, recipe, space.runtime)
    steps = stepper.steps(weights)
    left = [name for name in dropped if name not in stepper.used]
    measured = recipe.calibration.notes(scales) if recipe.calibration is not None else []
    return _GroupPlan(space.config, selection, steps, stepper.problems, left, packed, measured)


def offered(
    checkpoint: Checkpoint, recipe: Recipe, read_shape: ReadShape, encoders: Sequence[Format | None]
) -> tuple[Selection, ...]:
    """What the rules choose in each name space, under other encoders; PlanError as `plan_checkpoint` raises it.

    encoders  one for each of `recipe.all_rules`, None for a rule that keeps
    """
    spaces = [(group, _name_space(group, checkpoint, recipe, read_shape)) for group in checkpoint.groups]
    found = tuple(_selection(group, checkpoint, space, recipe, encoders) for group, space in spaces)
    _require_choice(checkpoint, recipe, found, [problem for selection in found for problem in selection.problems])
    return found


def _require_choice(
    checkpoint: Checkpoint, recipe: Recipe, selections: Sequence[Selection], problems: Sequence[str]
) -> None:
    """PlanError with all problems, patterns that match nowhere among them, or where nothing was chosen."""
    idle = _in_every([selection.idle for selection in selections])
    raise_problems(checkpoint.name, [*problems, *idle])
    if not any(selection.chosen for selection in selections):
        raise_problems(checkpoint.name, [_nothing_chosen(recipe)])


def _nothing_chosen(recipe: Recipe) -> str:
    if not recipe.rules:
        return "the recipe chooses no weight at all; try --all_linear or other targets"
    rules = "; ".join(rule.label for rule in recipe.rules)
    return f"no rule of the recipe covers a weight here ({rules}); take a recipe for this kind of model"


def _in_every(lists: Sequence[Sequence[str]]) -> list[str]:
    """Entries that no list lacks, in the order of the first."""
    return [entry for entry in lists[0] if all(entry in other for other in lists[1:])]


def _group_shards(part: _GroupPlan, checkpoint: Checkpoint) -> list[ShardPlan]:
    """Output shards of one name space; PlanError when two of its tensors would get one name."""
    shards = plan_shards(part.steps, checkpoint)
    twice = [n for n, count in Counter(i.name for s in shards for i in s.tensors).items() if count > 1]
    raise_problems(checkpoint.name, [f"{n}: two weights become this tensor; remove the stale one" for n in twice])
    return shards


def _configs(
    checkpoint: Checkpoint, recipe: Recipe, parts: Sequence[_GroupPlan]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """config.json of the output and the layout's own JSON files, with one ignore list in all of them.

    With them sentences about what vLLM does not load, for a recipe that wants it all the same.
    """
    config = without_quantization(parts[0].config)
    if recipe.decodes:
        if any(part.packed for part in parts):
            config = with_dtype(config, recipe.dtype)
        return {"config.json": config} if config else {}, []
    if not config:
        raise PlanError(f"{checkpoint.name}: a quantized model needs its config.json, there is none; add it")
    kept = {m: entry for part in parts for m, entry in part.selection.kept.items()}
    formats = {m: form for part in parts for m, form in part.selection.formats.items()}
    ignore = ignore_list(kept, formats)
    covered = substring_problem(ignore, formats) if recipe.layout == "modelopt" else None
    if covered is not None and not recipe.unloadable:
        raise PlanError(covered)
    barred = [sentence for part in parts for sentence in part.selection.barred] + ([covered] if covered else [])
    return announce(config, recipe, formats, linear_modules(kept), ignore), barred


def plan_checkpoint(checkpoint: Checkpoint, recipe: Recipe, read_shape: ReadShape) -> Plan:
    """Plan a whole conversion from headers; raises PlanError with all problems at once, RecipeError for settings.

    read_shape  reads the two integers of a weight_shape tensor, asked only where shapes leave K open
    """
    parts = [_plan_group(group, checkpoint, recipe, read_shape) for group in checkpoint.groups]
    problems = [problem for part in parts for problem in part.problems]
    if recipe.decodes:
        raise_problems(checkpoint.name, problems)
    else:
        _require_choice(checkpoint, recipe, [part.selection for part in parts], problems)
    if recipe.decodes and not recipe.text_only and not any(part.packed for part in parts):
        stale = " (its quantization_config is stale)" if quantization_configs(checkpoint.config) else ""
        raise_problems(checkpoint.name, [f"every weight is dense already{stale}; there is nothing to decompress"])
    configs, barred = _configs(checkpoint, recipe, parts)
    files = {name: as_json(content) for name, content in configs.items()}
    by_group = [_group_shards(part, checkpoint) for part in parts]
    for group, members in zip(checkpoint.groups, by_group, strict=True):
        files |= index_file(group, members)
    carried, behind = carried_files(checkpoint.files, text_only=recipe.text_only)
    shards = [shard for members in by_group for shard in members]
    return Plan(
        source=checkpoint.name,
        job=_job(checkpoint, recipe),
        recipe=recipe,
        shards=tuple(sorted(shards, key=lambda shard: shard.name)),
        units={key: members for part in parts for key, members in part.selection.units.items()},
        formats={module: form for part in parts for module, form in part.selection.formats.items()},
        kept={module: why for part in parts for module, (_, why) in part.selection.kept.items()},
        dropped=tuple(name for part in parts for name in part.dropped),
        config=configs.get("config.json", {}),
        files=files,
        carried=carried,
        behind=behind,
        notes=(
            *(f"vLLM does not load this: {why}" for why in barred),
            *_notes(checkpoint, recipe, shards, parts, behind),
        ),
    )


def _is_lost(name: str, selection: Selection) -> bool:
    """Is a stored tensor the activation scale of a quantized weight for which nobody gave another?"""
    module, _, leaf = name.rpartition(".")
    return leaf in ("input_scale", "input_global_scale") and selection.scales.get(module, "") is None


def _notes(
    checkpoint: Checkpoint,
    recipe: Recipe,
    shards: Sequence[ShardPlan],
    parts: Sequence[_GroupPlan],
    behind: Sequence[str],
) -> tuple[str, ...]:
    notes = [sentence for part in parts for sentence in part.selection.overlaps]
    notes += _in_every([part.selection.absent for part in parts])
    notes += [sentence for part in parts for sentence in part.measured]
    if recipe.calibration is not None and recipe.kv_cache and not recipe.kv_scales:
        notes.append("the statistics hold nothing for a k_proj, so the FP8 KV cache has no scales; engines take 1.0")
    if lost := [name for part in parts for name in part.dropped if _is_lost(name, part.selection)]:
        notes.append(
            f"{len(lost)} activation scales of the source are not taken over, the first is {lost[0]}; "
            f"--input_scale {checkpoint.name} takes them, for formats with static activation scales"
        )
    if unused := _in_every([part.selection.unused for part in parts]):
        notes.append(f"{len(unused)} imported exclude patterns match nothing here, the first is {unused[0]!r}")
    whole = {name for name in checkpoint.shards if name.endswith(".safetensors")}  # kt-kernel has a file per tensor
    if empty := sorted(whole - {shard.name for shard in shards}):
        notes.append(f"{len(empty)} shards are left without tensors and not written: {', '.join(empty[:3])}")
    if stale := [name for name in behind if name not in (*REPO_FILES, "mso_hub.json")]:
        notes.append(f"not carried, they describe the old weights: {', '.join(stale[:5])}")
    return tuple(notes)
