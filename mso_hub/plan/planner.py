"""Headers + recipe -> Plan: every output byte's place and origin, before a weight is read.

One object decides what is written and how it is announced: the shards' headers, the index, `quantization_config`
and its ignore list all come from the same steps, so they cannot disagree.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mso_hub.checkpoint import DTYPE_BITS, Checkpoint, Group, Shard, TensorInfo, build_header
from mso_hub.errors import PlanError, RecipeError
from mso_hub.formats import DENSE, FORMATS, Format
from mso_hub.formats.detect import quantization_configs, read_weights, with_dtype, without_quantization
from mso_hub.formats.packed_int import ReadShape
from mso_hub.formats.weight import Weight
from mso_hub.plan.config import REPO_FILES, carried_files, check_substrings, ignore_list
from mso_hub.plan.recipe import Recipe
from mso_hub.plan.select import Selection, select
from mso_hub.plan.text import text_model

FORMAT_VERSION = 1
"""Part of every job digest: raised when the same recipe starts to give other bytes."""
SHOWN = 8
"""Problems spelled out in one message; the rest is counted."""


@dataclass(frozen=True, slots=True)
class Step:
    """One weight on its way.

    outputs      what it becomes, in the format's order
    unit         key into Plan.units when it is encoded, else None: copied or decoded
    input_scale  activation scale (multiplier) written beside it, None for weight-only
    """

    weight: Weight
    outputs: tuple[TensorInfo, ...]
    unit: str | None = None
    input_scale: float | None = None


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output file: its header bytes, its tensors in file order, and the steps that fill it in that order.

    original  size of the source's file of this name when nothing in it changes: the file itself is copied, and
              `header` is empty; None otherwise
    """

    name: str
    header: bytes
    tensors: tuple[TensorInfo, ...]
    steps: tuple[Step, ...]
    original: int | None = None

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        if self.original is not None:
            return self.original
        return len(self.header) + sum(info.nbytes for info in self.tensors)

    @property
    def read_bytes(self) -> int:
        """Source bytes of its weights."""
        return sum(step.weight.nbytes for step in self.steps)


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """Everything that will happen.

    job       digest of source, recipe and format version: the name of this piece of work
    format    encoder, None when nothing is encoded
    units     unit key -> weights that share one amax, wherever they are stored
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
    format: Format | None
    shards: tuple[ShardPlan, ...]
    units: Mapping[str, tuple[Weight, ...]]
    kept: Mapping[str, str]
    dropped: tuple[str, ...]
    config: Mapping[str, Any]
    files: Mapping[str, bytes]
    carried: tuple[str, ...]
    behind: tuple[str, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        """One line: the last expression of a notebook cell shows it."""
        changed = sum(s.unit is not None or s.weight.decoder is not None for p in self.shards for s in p.steps)
        sizes = f"{self.read_bytes:,} -> {self.write_bytes:,} bytes"
        return f"Plan({self.source} -> {self.recipe.scheme}, {changed:,} weights, {sizes})"

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
        sizes = {shard.name: shard.nbytes for shard in self.shards}
        sizes |= {name: source_files[name] for name in self.carried}
        return sizes | {name: len(data) for name, data in self.files.items()}


def _format(recipe: Recipe) -> Format | None:
    if recipe.scheme == DENSE:
        return None
    if recipe.scheme not in FORMATS:
        raise RecipeError(f"format must be one of {', '.join([*FORMATS, DENSE])}, got {recipe.scheme!r}")
    return FORMATS[recipe.scheme](layout=recipe.layout, search=recipe.scale_search)


def _raise_problems(source: str, problems: Sequence[str]) -> None:
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise PlanError(f"{source}: nothing was written\n  " + "\n  ".join([*problems[:SHOWN], *more]))


def _input_scales(selection: Selection, recipe: Recipe) -> tuple[dict[str, float], list[str]]:
    """Activation scale per chosen module, the largest of its unit; problems where an import has none."""
    if recipe.input_scale is not None:
        return {weight.module: recipe.input_scale for weight in selection.chosen}, []
    scales: dict[str, float] = {}
    missing: list[str] = []
    for members in selection.units.values():
        found = [recipe.input_scales[w.module] for w in members if w.module in recipe.input_scales]
        missing += [w.module for w in members if w.module not in recipe.input_scales]
        scales.update({w.module: max(found) for w in members if found})
    if not recipe.input_scales or not missing:
        return scales, []
    return scales, [
        f"{missing[0]}: has no input_scale among the imported ones, nor have {len(missing) - 1} others; ignore them"
    ]


def _decoded(weight: Weight) -> TensorInfo:
    return TensorInfo(weight.name, weight.dtype, weight.shape)


def _steps(
    weights: Sequence[Weight], selection: Selection, scales: Mapping[str, float], form: Format | None
) -> list[Step]:
    """One step per output weight, in the order in which the source stores them."""
    unit_of = {w.module: key for key, members in selection.units.items() for w in members}
    steps = [Step(w, (_decoded(w),)) for w in weights if w.module in selection.kept]
    for weight in selection.chosen:
        assert form is not None  # noqa: S101 - select() chooses nothing without a format
        outputs = form.outputs(weight.module, weight.shape, activations=bool(scales))
        steps.append(Step(weight, outputs, unit_of[weight.module], scales.get(weight.module)))
    return sorted(steps, key=lambda step: (step.weight.home.file, step.weight.home.begin, step.weight.name))


def _in_order(steps: Sequence[Step]) -> tuple[list[Step], list[TensorInfo]]:
    """Steps and output tensors of one file in the order in which they are written.

    Members of a unit follow one another, so that a unit is read once. Tensors of a multiple of 8 bytes go first,
    as they come; the others (scalars, odd shapes) go last, the widest dtype first. So every tensor starts at a
    multiple of its item size, which mapping loaders need, and all but the scalars can be streamed.
    """
    first: dict[str, int] = {}
    for at, step in enumerate(steps):
        first.setdefault(step.unit or step.weight.name, at)
    grouped = sorted(range(len(steps)), key=lambda at: (first[steps[at].unit or steps[at].weight.name], at))
    ordered = [steps[at] for at in grouped]
    tail = [s for s in ordered if s.unit is None and s.outputs[0].nbytes % 8]
    tail.sort(key=_tail_key)
    body = [s for s in ordered if s.unit is not None or s.outputs[0].nbytes % 8 == 0]
    infos = [info for step in (*body, *tail) for info in step.outputs]
    aligned = [info for info in infos if info.nbytes % 8 == 0]
    return [*body, *tail], aligned + sorted((i for i in infos if i.nbytes % 8), key=_width_key)


def _width_key(info: TensorInfo) -> tuple[int, str]:
    return -DTYPE_BITS[info.dtype], info.name


def _tail_key(step: Step) -> tuple[int, str]:
    return _width_key(step.outputs[0])


def _shards(steps: Sequence[Step], checkpoint: Checkpoint) -> list[ShardPlan]:
    by_file: dict[str, list[Step]] = {}
    for step in steps:
        by_file.setdefault(step.weight.home.file, []).append(step)
    planned = []
    for name, members in by_file.items():
        ordered, infos = _in_order(members)
        if _is_unchanged(checkpoint.shards[name], members):
            shard = checkpoint.shards[name]
            place = {info.name: at for at, info in enumerate(shard.tensors)}
            stored = sorted(members, key=lambda step: place[step.weight.home.name])
            planned.append(ShardPlan(name, b"", shard.tensors, tuple(stored), shard.nbytes))
            continue
        header, placed = build_header(infos, name, checkpoint.shards[name].metadata)
        planned.append(ShardPlan(name, header, placed, tuple(ordered)))
    return planned


def _is_unchanged(shard: Shard, steps: Sequence[Step]) -> bool:
    """Does an output file hold what the source's file of its name holds, tensor by tensor?

    A file without `format` in its metadata is rewritten, because transformers refuses to load it, and so is one whose
    tensors do not start at multiples of their item size.
    """
    stays = all(s.unit is None and s.weight.decoder is None and s.outputs[0].name == s.weight.home.name for s in steps)
    whole = {step.weight.home.name for step in steps} == {info.name for info in shard.tensors}
    aligned = all(info.begin % max(1, DTYPE_BITS[info.dtype] // 8) == 0 for info in shard.tensors)
    return stays and whole and aligned and shard.metadata.get("format") == "pt"


def _index(group: Group, shards: Sequence[ShardPlan]) -> dict[str, bytes]:
    """The index file of a group; shards that the source's index leaves out stay out."""
    if group.index is None:
        return {}
    listed = {group.tensors[name].file for name in group.indexed}
    tensors = [info for shard in shards if shard.name in listed for info in shard.tensors]
    folder = group.index.rpartition("/")[0]
    weight_map = {i.name: i.file.removeprefix(f"{folder}/") if folder else i.file for i in tensors}
    metadata = {k: v for k, v in group.extra.items() if k != "total_parameters"}
    metadata["total_size"] = sum(info.nbytes for info in tensors)
    content = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return {group.index: _json(content)}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _job(checkpoint: Checkpoint, recipe: Recipe) -> str:
    settings = json.dumps([FORMAT_VERSION, checkpoint.identity, asdict(recipe)], sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _GroupPlan:
    config: Mapping[str, Any]
    weights: Sequence[Weight]
    selection: Selection
    scales: Mapping[str, float]
    problems: list[str]
    dropped: list[str]
    packed: int


def _plan_group(
    group: Group, checkpoint: Checkpoint, recipe: Recipe, form: Format | None, read_shape: ReadShape
) -> _GroupPlan:
    """Decide about every weight of one name space, and find what stands in the way."""
    weights, dropped = read_weights(group.tensors, checkpoint.config, read_shape, recipe.dtype)
    config: Mapping[str, Any] = checkpoint.config
    if recipe.text_only:
        text = text_model(config, {w.name: w.shape for w in weights})
        dropped += [w.name for w in weights if w.name not in text.names]
        weights = [replace(w, name=text.names[w.name]) for w in weights if w.name in text.names]
        config = text.config
    packed = sum(w.decoder is not None for w in weights)
    if form is None:
        kept = {w.module: (w, "decoded" if w.decoder else "stays dense") for w in weights}
        selection = Selection((), kept, {})
    else:
        selection = select(weights, recipe, config, form.problem)
        if len(checkpoint.groups) > 1:
            where = group.index or next((info.file for info in group.tensors.values()), "")
            units = {f"{where}: {key}": members for key, members in selection.units.items()}
            selection = replace(selection, units=units)
    scales, missing = _input_scales(selection, recipe)
    return _GroupPlan(config, weights, selection, scales, [*selection.problems, *missing], dropped, packed)


def _in_every(lists: Sequence[Sequence[str]]) -> list[str]:
    """Entries that no list lacks, in the order of the first."""
    return [entry for entry in lists[0] if all(entry in other for other in lists[1:])]


def _group_shards(part: _GroupPlan, checkpoint: Checkpoint, form: Format | None) -> list[ShardPlan]:
    """Output shards of one name space; PlanError when two of its tensors would get one name."""
    shards = _shards(_steps(part.weights, part.selection, part.scales, form), checkpoint)
    twice = [n for n, count in Counter(i.name for s in shards for i in s.tensors).items() if count > 1]
    _raise_problems(checkpoint.name, [f"{n}: two weights become this tensor; remove the stale one" for n in twice])
    return shards


def _configs(
    checkpoint: Checkpoint, recipe: Recipe, form: Format | None, parts: Sequence[_GroupPlan]
) -> dict[str, dict[str, Any]]:
    """config.json of the output and the layout's own JSON files, with one ignore list in all of them."""
    config = without_quantization(parts[0].config)
    if form is None:
        if any(part.packed for part in parts):
            config = with_dtype(config, recipe.dtype)
        return {"config.json": config} if config else {}
    if not config:
        raise PlanError(f"{checkpoint.name}: a quantized model needs its config.json, there is none; add it")
    kept = {m: entry for part in parts for m, entry in part.selection.kept.items()}
    chosen = [w.module for part in parts for w in part.selection.chosen]
    ignore = ignore_list(kept, chosen)
    if recipe.layout == "modelopt":
        check_substrings(ignore, chosen)
    config["quantization_config"] = form.config(ignore, activations=recipe.activations)
    return {"config.json": config, **form.extra_files(ignore, activations=recipe.activations)}


def plan_checkpoint(checkpoint: Checkpoint, recipe: Recipe, read_shape: ReadShape) -> Plan:
    """Plan a whole conversion from headers; raises PlanError with all problems at once, RecipeError for settings.

    read_shape  reads the two integers of a weight_shape tensor, asked only where shapes leave K open
    """
    form = _format(recipe)
    parts = [_plan_group(group, checkpoint, recipe, form, read_shape) for group in checkpoint.groups]
    idle = _in_every([part.selection.idle for part in parts])
    _raise_problems(checkpoint.name, [problem for part in parts for problem in part.problems] + idle)
    chosen = [w.module for part in parts for w in part.selection.chosen]
    if form is not None and not chosen:
        _raise_problems(checkpoint.name, ["the recipe chooses no weight at all; try --all_linear or other targets"])
    if form is None and not recipe.text_only and not any(part.packed for part in parts):
        stale = " (its quantization_config is stale)" if quantization_configs(checkpoint.config) else ""
        _raise_problems(checkpoint.name, [f"every weight is dense already{stale}; there is nothing to decompress"])
    configs = _configs(checkpoint, recipe, form, parts)
    files = {name: _json(content) for name, content in configs.items()}
    by_group = [_group_shards(part, checkpoint, form) for part in parts]
    for group, members in zip(checkpoint.groups, by_group, strict=True):
        files |= _index(group, members)
    carried, behind = carried_files(checkpoint.files, text_only=recipe.text_only)
    shards = [shard for members in by_group for shard in members]
    return Plan(
        source=checkpoint.name,
        job=_job(checkpoint, recipe),
        recipe=recipe,
        format=form,
        shards=tuple(sorted(shards, key=lambda shard: shard.name)),
        units={key: members for part in parts for key, members in part.selection.units.items()},
        kept={module: why for part in parts for module, (_, why) in part.selection.kept.items()},
        dropped=tuple(name for part in parts for name in part.dropped),
        config=configs.get("config.json", {}),
        files=files,
        carried=carried,
        behind=behind,
        notes=_notes(checkpoint, shards, parts, behind),
    )


def _notes(
    checkpoint: Checkpoint, shards: Sequence[ShardPlan], parts: Sequence[_GroupPlan], behind: Sequence[str]
) -> tuple[str, ...]:
    notes = []
    if unused := _in_every([part.selection.unused for part in parts]):
        notes.append(f"{len(unused)} imported exclude patterns match nothing here, the first is {unused[0]!r}")
    if empty := sorted(set(checkpoint.shards) - {shard.name for shard in shards}):
        notes.append(f"{len(empty)} shards are left without tensors and not written: {', '.join(empty[:3])}")
    if stale := [name for name in behind if name not in REPO_FILES]:
        notes.append(f"not carried, they describe the old weights: {', '.join(stale[:5])}")
    return tuple(notes)
