"""What kt-kernel could not load, said before anything is written, and what the user should know of what it can."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mso_hub.formats.dialects.ktransformers import PROJECTIONS, Place
from mso_hub.formats.kt import COLUMNS, KT_FORMATS
from mso_hub.formats.weight import FLOAT_DTYPES, Weight

if TYPE_CHECKING:
    from mso_hub.plan.kt import KtRecipe

EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")
"""What models call the number of routed experts; transformers renames one to another when it saves."""
BETTER = (
    "kt-kernel also reads --format w4a16 --group_size 32 (its RAWINT4), --format nvfp4 --layout modelopt and "
    "--format fp8_block --layout deepseek"
)
STORED = {"bf16": "BF16", "fp16": "F16", "fp8": "fp8"}
BIAS = re.compile(r"layers\.\d+\..*\bexperts\.(\d+\.\w+\.bias|\w*proj(_bias|\.bias))$")
SILU = ("silu", "swish")


def expert_problems(experts: Mapping[Place, Weight], config: Mapping[str, Any], recipe: KtRecipe) -> Iterator[str]:
    """Sentences about experts that are missing, and about sizes that kernels and NUMA nodes cannot hold."""
    if not experts:
        yield (
            "there are no routed experts, and kt-kernel runs nothing else; it knows layers.N.*.experts.N.gate_proj, "
            "up_proj and down_proj, w1, w3 and w2, and fused experts.gate_up_proj and down_proj"
        )
        return
    missing = list(missing_experts(experts, config))
    yield from missing
    if missing:
        return
    yield from _shape_problems(experts, recipe)
    yield from _type_problems(experts, recipe)


def bias_problems(names: Iterable[str]) -> Iterator[str]:
    """A sentence about the first bias of a routed expert."""
    found = [name for name in names if BIAS.search(name)]
    if found:
        yield f"{found[0]}: kt-kernel has no biases of experts, its answers would be those of another model"


def text_setting(config: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The first of some fields that config.json has, at the top or in its text model; None without any."""
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, dict) else {}):
        for name in names:
            if part.get(name) is not None:
                return part[name]
    return None


def missing_experts(experts: Mapping[Place, Weight], config: Mapping[str, Any]) -> Iterator[str]:
    """Every layer must have the same experts, 0 to E - 1, each with its three projections."""
    said = text_setting(config, EXPERT_COUNTS)
    layers: dict[int, dict[str, set[int]]] = {}
    for place in experts:
        layers.setdefault(place.layer, {p: set() for p in PROJECTIONS})[place.projection].add(place.expert)
    most = max(len(found) for kinds in layers.values() for found in kinds.values())
    count = said if isinstance(said, int) else most
    for layer, kinds in layers.items():
        for projection, found in kinds.items():
            if found != set(range(count)):
                lost = sorted(set(range(count)) - found) or sorted(found - set(range(count)))
                yield (
                    f"layer {layer}: needs {projection} projections of the experts 0 to {count - 1}, found "
                    f"{len(found)}, the first that differs is {lost[0]}; the checkpoint is incomplete, or another kind "
                    "of model"
                )
                return


def fitting(inner: int, hidden: int, bits: int) -> list[int]:
    """Numbers of NUMA nodes that experts of these sizes can be cut for."""
    multiple = COLUMNS[bits]
    if inner % multiple or hidden % multiple:
        return []
    return [count for count in range(1, inner // multiple + 1) if inner // multiple % count == 0]


def _shape_problems(experts: Mapping[Place, Weight], recipe: KtRecipe) -> Iterator[str]:
    bits = 4 if recipe.scheme == "kt-int4" else 8
    seen = set()
    for place, gate in experts.items():
        if place.projection != "gate":
            continue
        trio = [experts.get(Place(place.layer, p, place.expert)) for p in PROJECTIONS]
        shapes = tuple(w.shape for w in trio if w is not None)
        if shapes in seen:
            continue
        seen.add(shapes)
        inner, hidden = gate.shape
        if any(shape != (inner, hidden) for shape in shapes[:2]) or any(s != (hidden, inner) for s in shapes[2:]):
            listed = ", ".join(str(list(shape)) for shape in shapes)
            yield f"{gate.name}: gate, up and down have the shapes {listed}; they do not fit together"
            continue
        fits = fitting(inner, hidden, bits)
        if recipe.threadpool_count in fits:
            continue
        what = f"{gate.name}: experts of {inner} x {hidden} in {recipe.scheme}"
        if fits:
            yield (
                f"{what} cannot be cut for {recipe.threadpool_count} NUMA nodes, each needs a multiple of "
                f"{COLUMNS[bits]} of the {inner}; --threadpool-count may be {', '.join(map(str, fits))}"
            )
            continue
        other = [f for f, b in (("kt-int8", 8),) if f != recipe.scheme and fitting(inner, hidden, b)]
        ways = f"use --format {other[0]}; or {BETTER}" if other else BETTER
        yield f"{what}: both sizes must be multiples of {COLUMNS[bits]}; {ways}"


def _type_problems(experts: Mapping[Place, Weight], recipe: KtRecipe) -> Iterator[str]:
    """Experts that are not stored as the user said, or as no number at all."""
    wanted = STORED.get(recipe.input_type)
    for weight in experts.values():
        decoder = weight.decoder
        stored = decoder.scheme if decoder is not None and decoder.scheme else weight.dtype
        if decoder is None and weight.dtype not in FLOAT_DTYPES:
            yield f"{weight.name}: can only quantize {', '.join(FLOAT_DTYPES)}, got {weight.dtype}"
            return
        if wanted is not None and stored != wanted:
            yield f"{weight.name}: --input-type says {recipe.input_type}, stored is {stored}; leave the option out"
            return


def kt_notes(
    config: Mapping[str, Any], recipe: KtRecipe, beyond: Sequence[str], skipped: Sequence[str]
) -> Iterator[str]:
    """What the user should know."""
    count = recipe.threadpool_count
    yield (
        f"made for {count} NUMA node{'s' * (count > 1)}: start the server with --kt-threadpool-count {count} and "
        f"--kt-method AMX{KT_FORMATS[recipe.scheme]}; kt-kernel does not notice another number and computes nonsense"
    )
    if recipe.scheme == "kt-int4":
        yield (
            "kt-int4 is coarse, one scale for a whole row of 4-bit codes: Gaussian experts have a relative output "
            f"error of 25 %, w4a16 in groups of 32 of 17 %; {BETTER}"
        )
    if beyond:
        yield (
            f"{len(beyond)} experts of layers for multi-token prediction are left out, kt-kernel does not run them; "
            f"the first is {beyond[0]}"
        )
    if skipped:
        yield f"{len(skipped)} weights of layers below {recipe.resume_layer} are left out, as --resume-layer says"
    act = text_setting(config, ("hidden_act", "hidden_activation"))
    if act is not None and act not in SILU:
        yield f"the experts' activation is {act!r}, kt-kernel computes SiLU; its answers would be wrong"
