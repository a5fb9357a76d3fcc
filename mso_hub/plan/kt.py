"""A plan for KTransformers: routed experts as kt-kernel's processors read them, the rest of the model beside them.

Unlike other layouts this one regroups and renames. There is a file for each layer with experts, then files for the rest
as it is stored, quantized or not; or, without `merge`, a tree with a file for every tensor of an expert.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from mso_hub.checkpoint import Checkpoint, TensorInfo
from mso_hub.errors import PlanError, RecipeError
from mso_hub.formats.decoders.base import ReadShape
from mso_hub.formats.decoders.kt import read_kt
from mso_hub.formats.detect import read_weights
from mso_hub.formats.dialects.ktransformers import (
    LAYOUT,
    METADATA,
    PROJECTIONS,
    Place,
    announcement,
    expert_place,
    rest_name,
    source_names,
    tree_file,
)
from mso_hub.formats.kt import KT_FORMATS, Kt
from mso_hub.formats.kt_rows import rows_of
from mso_hub.formats.weight import Weight
from mso_hub.plan.config import carried_files
from mso_hub.plan.experts import is_fused_experts, split_experts
from mso_hub.plan.kt_problems import bias_problems, expert_problems, kt_notes
from mso_hub.plan.planner import FORMAT_VERSION, Plan, raise_problems
from mso_hub.plan.recipe import Recipe
from mso_hub.plan.select import decoder_layer, layer_count
from mso_hub.plan.shards import ShardPlan, as_json, one_shard
from mso_hub.plan.steps import Step

INPUT_TYPES = ("auto", "bf16", "fp16", "fp8")
REST_BYTES = 5 * 10**9
"""Of a file with tensors outside the routed experts, at most: what an interrupted run has to copy again."""
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class KtRecipe(Recipe):
    """Settings of a conversion for kt-kernel. Of Recipe's fields only `scheme` has a choice: kt-int4 or kt-int8.

    threadpool_count  NUMA nodes of the server; kt-kernel does not notice when it is another one
    merge             safetensors; False: a tree of .kt files, which holds experts only
    experts_only      leave the rest of the model out: a server reads it from the source
    resume_layer      leave out the layers below it
    input_type        what the experts must be stored as: bf16, fp16, fp8, or auto for anything that can be decoded
    """

    scheme: str = "kt-int8"
    layout: str = LAYOUT
    threadpool_count: int = 1
    merge: bool = True
    experts_only: bool = False
    resume_layer: int = 0
    input_type: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what kt-kernel has no word for."""
        own = {f.name for f in fields(KtRecipe)} - {f.name for f in fields(Recipe)}
        idle = [f.name for f in fields(Recipe) if f.name not in (*own, "scheme", "layout")]
        self._refuse(idle, f"{self.scheme} takes all routed experts and has no such setting")
        if self.scheme not in KT_FORMATS:
            raise RecipeError(f"format must be {' or '.join(KT_FORMATS)} for KTransformers, got {self.scheme!r}")
        if self.layout != LAYOUT:
            raise RecipeError(f"{self.scheme} is always in the layout {LAYOUT}, got {self.layout!r}; leave it out")
        if self.threadpool_count < 1 or self.resume_layer < 0:
            raise RecipeError(
                "threadpool_count must be 1 or more and resume_layer 0 or more, got "
                f"{self.threadpool_count} and {self.resume_layer}"
            )
        if self.input_type not in INPUT_TYPES:
            raise RecipeError(f"input_type must be one of {', '.join(INPUT_TYPES)}, got {self.input_type!r}")

    @property
    def method(self) -> str:
        """kt-kernel's name of the format."""
        return KT_FORMATS[self.scheme]

    @property
    def label(self) -> str:
        """The format."""
        return self.scheme

    @property
    def words(self) -> list[str]:
        """Options of `mso-hub quantize` that say the same."""
        found = ["--format", self.scheme, "--threadpool_count", str(self.threadpool_count)]
        found += [] if self.merge else ["--no_merge_safetensor"]
        found += ["--experts_only"] if self.experts_only else []
        return found + (["--resume_layer", str(self.resume_layer)] if self.resume_layer else [])

    @property
    def measures(self) -> bool:
        """Is the error to be measured whether a card is written or not? INT4 loses much, and the user is told."""
        return self.scheme == "kt-int4"


def recipe_of_output(name: str, settings: Mapping[str, Any]) -> KtRecipe:
    """`recipe` of an mso_hub.json that a conversion for kt-kernel wrote -> its settings; RecipeError."""
    own = {f.name: f for f in fields(KtRecipe) if f.name not in {g.name for g in fields(Recipe)}}
    given = {key: settings[key] for key in ("scheme", *own) if key in settings}
    wrong = [key for key, f in own.items() if key in given and type(given[key]) is not type(f.default)]
    if wrong:
        raise RecipeError(f"{name}: {wrong[0]} is {given[wrong[0]]!r}; take the version of mso_hub that made it")
    return KtRecipe(**given)


@dataclass(slots=True)
class _Model:
    """What a checkpoint holds.

    experts  place -> weight, of all routed experts
    others   module -> weight outside of them
    rest     tensors as they are stored, under the names of the source
    beyond   modules of experts that kt-kernel does not run: those of layers for multi-token prediction
    """

    experts: dict[Place, Weight] = field(default_factory=dict)
    others: dict[str, Weight] = field(default_factory=dict)
    rest: dict[str, TensorInfo] = field(default_factory=dict)
    beyond: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def plan_kt(checkpoint: Checkpoint, recipe: KtRecipe, read_shape: ReadShape) -> Plan:
    """Plan a conversion from headers; PlanError with all problems at once, naming what kt-kernel could hold."""
    model = _read(checkpoint, read_shape)
    problems = [*model.problems, *bias_problems(model.others)]
    problems += expert_problems(model.experts, checkpoint.config, recipe)
    raise_problems(checkpoint.name, problems)
    experts = {p: w for p, w in model.experts.items() if p.layer >= recipe.resume_layer}
    if not experts:
        last = max(place.layer for place in model.experts)
        raise PlanError(f"{checkpoint.name}: resume_layer {recipe.resume_layer} leaves no layer, the last is {last}")
    rest = {} if recipe.experts_only or not recipe.merge else model.rest
    names = source_names([w.module for w in model.experts.values()], rest)
    said = announcement(recipe.method, recipe.threadpool_count, source_digest(checkpoint), names)
    layers = sorted({place.layer for place in model.experts})
    steps = {layer: list(_layer_steps(layer, experts, recipe)) for layer in layers}
    shards = _merged(layers, steps, rest, said) if recipe.merge else _tree(steps, recipe.method)
    config = {**checkpoint.config, LAYOUT: said}
    files = {"config.json": as_json(config)} | ({INDEX: _index(shards)} if recipe.merge else {})
    carried, behind = carried_files(checkpoint.files, text_only=False)
    encoded = [step for layer in layers for step in steps[layer]]
    dropped = [] if rest else [*model.rest]
    skipped = [w.name for p, w in model.experts.items() if p.layer < recipe.resume_layer]
    return Plan(
        source=checkpoint.name,
        job=_job(checkpoint, recipe),
        recipe=recipe,
        shards=tuple(shards),
        units={step.weight.module: (step.weight,) for step in encoded},
        formats={step.weight.module: step.format for step in encoded if step.format is not None},
        kept=dict.fromkeys(model.others, "not a routed expert") if rest else {},
        dropped=(*dropped, *model.beyond, *skipped),
        config=config,
        files=files,
        carried=carried,
        behind=behind,
        notes=tuple(kt_notes(checkpoint.config, recipe, model.beyond, skipped)),
    )


def _job(checkpoint: Checkpoint, recipe: KtRecipe) -> str:
    settings = json.dumps([FORMAT_VERSION, checkpoint.identity, asdict(recipe)], sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()


def source_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of a source's config.json and headers: the same for a folder and a repo that hold the same files."""
    config = {key: value for key, value in checkpoint.config.items() if key != LAYOUT}
    infos = sorted((i.file, i.begin, i.name, i.dtype, i.shape) for s in checkpoint.shards.values() for i in s.tensors)
    return hashlib.sha256(json.dumps([config, infos], sort_keys=True).encode()).hexdigest()


def _read(checkpoint: Checkpoint, read_shape: ReadShape) -> _Model:
    """Every routed expert and everything else; experts of other towers are a part of the rest."""
    model = _Model()
    config, count = checkpoint.config, layer_count(checkpoint.config)
    for group in checkpoint.groups:
        model.rest |= read_kt(group.tensors, config, "BF16")[0]
        weights, _ = read_weights(group.tensors, config, read_shape, "BF16")
        names = {weight.name: None for weight in weights}
        for weight in weights:
            try:
                parts = list(_single(weight, config, names, count))
            except PlanError as error:
                model.problems.append(str(error))
                continue
            for part in parts:
                _sort_in(part, model, count)
    used = {info.name for w in model.experts.values() for info in w.parts.values()}
    used |= {info.name for w in list(model.others.values()) if w.module in model.beyond for info in w.parts.values()}
    for module in model.beyond:
        model.others.pop(module, None)
    model.rest = {name: info for name, info in model.rest.items() if name not in used}
    return model


def _single(
    weight: Weight, config: Mapping[str, Any], names: Mapping[str, object], count: int | None
) -> Iterator[Weight]:
    """A bank of routed experts one by one, any other weight as it is."""
    if is_fused_experts(weight) and decoder_layer(weight.module, count) is not None:
        yield from split_experts(weight, config, names)
    else:
        yield weight


def _sort_in(weight: Weight, model: _Model, count: int | None) -> None:
    place = expert_place(weight.module)
    if place is not None and decoder_layer(weight.module, count) is not None and len(weight.shape) == 2:
        if place in model.experts:
            model.problems.append(f"{weight.name}: {model.experts[place].name} is the same expert; remove one of them")
        model.experts[place] = weight
        return
    if place is not None and count is not None and place.layer >= count:
        model.beyond.append(weight.module)
    model.others[weight.module] = weight


def _layer_steps(layer: int, experts: Mapping[Place, Weight], recipe: KtRecipe) -> Iterator[Step]:
    """Expert by expert: gate and up cut by rows, down by columns."""
    count = recipe.threadpool_count
    for expert in sorted(place.expert for place in experts if place.layer == layer and place.projection == "gate"):
        for projection in PROJECTIONS:
            place = Place(layer, projection, expert)
            weight = experts[place]
            if projection == "down" or count == 1:
                form = Kt(recipe.scheme, count)
                yield Step(weight, form.outputs(place.module, weight.shape, "F32"), form)
                continue
            height = weight.shape[0] // count
            for part in range(count):
                form = Kt(recipe.scheme, first=part)
                name = f"{weight.module}.numa.{part}.weight"
                view = rows_of(weight, part * height, (part + 1) * height, name)
                yield Step(view, form.outputs(place.module, view.shape, "F32"), form)


def _merged(
    layers: Sequence[int], steps: Mapping[int, Sequence[Step]], rest: Mapping[str, TensorInfo], said: Mapping[str, Any]
) -> list[ShardPlan]:
    """A safetensors file for each layer with experts, then those with the rest."""
    others = _rest_steps(rest)
    count = len(layers) + len(others)
    metadata = dict(zip(METADATA, (said["method"], str(said["threadpool_count"]), said["source"]), strict=True))
    members = [*(steps[layer] for layer in layers), *others]
    return [
        one_shard(f"model-{at:05d}-of-{count:05d}.safetensors", part, metadata)
        for at, part in enumerate(members, 1) if part
    ]  # fmt: skip


def _rest_steps(rest: Mapping[str, TensorInfo]) -> list[list[Step]]:
    """Tensors as they are stored, under kt-kernel's names, in files of at most REST_BYTES."""
    files: list[list[Step]] = []
    room = 0
    for info in sorted(rest.values(), key=lambda info: (info.file, info.begin)):
        if info.nbytes > room or not files:
            files.append([])
            room = REST_BYTES
        room -= info.nbytes
        dense = Weight(info.name, info.dtype, info.shape, {"weight": info})
        files[-1].append(Step(dense, (TensorInfo(rest_name(info.name), info.dtype, info.shape),)))
    return files


def _tree(steps: Mapping[int, Sequence[Step]], method: str) -> list[ShardPlan]:
    """A file for each tensor; those of one step are written together."""
    shards = []
    for layer in steps:
        for step in steps[layer]:
            placed = tuple(replace(info, file=_tree_name(info, method)) for info in step.outputs)
            shards.append(ShardPlan(placed[-1].file, b"", placed, (step,), apart=True))
    return shards


def _tree_name(info: TensorInfo, method: str) -> str:
    """`blk.0.ffn_gate_exps.3.numa.1.weight` -> its path."""
    _, layer, leaf, expert, _, part, suffix = info.name.split(".")
    place = Place(int(layer), leaf.split("_")[1], int(expert))
    return tree_file(place, int(part), method, info.nbytes, suffix)


def _index(shards: Sequence[ShardPlan]) -> bytes:
    tensors = [info for shard in shards for info in shard.tensors]
    metadata = {"total_size": sum(info.nbytes for info in tensors)}
    weight_map = {info.name: info.file for info in sorted(tensors, key=lambda info: info.name)}
    return as_json({"metadata": metadata, "weight_map": weight_map})
