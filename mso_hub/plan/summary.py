"""What a plan changes and leaves, by kind of module (layer and expert numbers become N), and what to call it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mso_hub.formats import Format
from mso_hub.formats.dialects.ktransformers import LAYOUT as KTRANSFORMERS
from mso_hub.formats.weight import FLOAT_DTYPES, Weight
from mso_hub.plan.kt import KtRecipe
from mso_hub.plan.planner import Plan
from mso_hub.plan.recipe import Recipe
from mso_hub.plan.recipe_file import MANIFEST

HINT = " (--all_linear takes it)"
"""End of a reason that helps who converts, and nobody else."""
INTEGERS = ("w4a16", "w8a16", "int8", "kt-int4", "kt-int8")
DTYPES = {"BF16": "BF16", "F16": "FP16", "F32": "FP32"}
"""Safetensors dtype -> what people call it."""


@dataclass(frozen=True, slots=True)
class Change:
    """Weights of one kind that get another form.

    kind           `model.layers.N.mlp.up_proj`
    becomes        scheme or dtype
    before, after  bytes
    encoded        quantized now, neither decoded nor copied
    """

    kind: str
    becomes: str
    count: int
    before: int
    after: int
    encoded: bool = False


@dataclass(frozen=True, slots=True)
class Kept:
    """Modules that stay as they are for one reason.

    kinds  the most frequent first
    """

    reason: str
    count: int
    kinds: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """How weights are stored.

    scheme       `nvfp4`, `int4`, or a floating-point dtype: `BF16`
    bits         of a weight, and of an activation while it is multiplied; 16 stands for all that is not quantized
    layout       how it lies on disk, "" for dense weights
    """

    scheme: str
    bits: int = 16
    activation_bits: int = 16
    layout: str = ""

    @property
    def label(self) -> str:
        """`NVFP4 (W4A16, compressed-tensors)`, `BF16`."""
        if not self.layout:
            return DTYPES.get(self.scheme, self.scheme)
        return f"{self.scheme.upper()} ({self.short}, {self.layout})"

    @property
    def short(self) -> str:
        """`W4A16`."""
        return f"W{self.bits}A{self.activation_bits}"

    @property
    def tags(self) -> tuple[str, ...]:
        """As the Hub's users look for it."""
        if not self.layout:
            return (self.label.lower(),)
        engine = () if self.layout == KTRANSFORMERS else ("vllm",)
        return (self.scheme, self.short.lower(), self.layout, f"{self.bits}-bit", *engine)


def form_of(weight: Weight) -> Stored:
    """How one weight is stored, whatever its activations."""
    decoder = weight.decoder
    if decoder is None or not decoder.layout:
        return Stored(weight.dtype)
    return Stored(decoder.scheme, decoder.bits, layout=decoder.layout)


def planned_form(form: Format) -> Stored:
    """How weights of a format are stored, in the words that a decoder has for them."""
    scheme = "fp8" if form.name.startswith("fp8") else f"int{form.bits}" if form.name in INTEGERS else form.name
    return Stored(scheme, form.bits, form.activations, form.layout)


def packed_as(weights: Iterable[Weight]) -> str:
    """Schemes of those weights that are packed: `INT4`, "" where none is."""
    return " and ".join(sorted({form_of(weight).scheme.upper() for weight in weights if weight.decoder is not None}))


def command(recipe: Recipe, source: str, target: str) -> str:
    """The command line that makes an output again; what is the default is left out, and rules are in its mso_hub.json.

    source, target  words of the shell as they are to stand there
    """
    words = ["mso-hub", "quantize"]
    if isinstance(recipe, KtRecipe):
        return " ".join([*words, *recipe.words, "--input_dir", source, "--output_dir", target])
    default = Recipe(scheme=recipe.scheme)
    if recipe.decodes:
        extract = recipe.text_only and recipe.dtype == default.dtype
        words[1] = "extract-text" if extract else "decompress"
        words += ["--dtype", DTYPES[recipe.dtype].lower()] if recipe.dtype != default.dtype else []
        words += ["--text_only"] if recipe.text_only and not extract else []
    elif recipe.rules:
        words += ["--recipe", f"{target}/{MANIFEST}"]
    else:
        words += ["--format", recipe.scheme] if recipe.scheme != Recipe().scheme else []
        words += ["--layout", recipe.layout] if recipe.layout != default.layout else []
        words += ["--all_linear"] if recipe.mode == "all-linear" else []
        words += [word for pattern in recipe.targets for word in ("--targets", shlex.quote(pattern))]
        words += [word for pattern in recipe.ignore for word in ("--ignore", shlex.quote(pattern))]
        words += [] if recipe.default_ignore else ["--no_default_ignore"]
        words += ["--skip_layers", ",".join(map(str, recipe.skip_layers))] if recipe.skip_layers else []
        words += [] if recipe.activations is None else ["--activations", str(recipe.activations)]
        words += [] if recipe.group_size is None else ["--group_size", str(recipe.group_size)]
        words += [] if recipe.symmetric is None else ["--symmetric" if recipe.symmetric else "--asymmetric"]
        if isinstance(recipe.input_scale, int | float):
            words += ["--input_scale", repr(float(recipe.input_scale))]
        words += ["--scale_search", recipe.scale_search] if recipe.scale_search is not None else []
        words += ["--kv_cache", "fp8"] if recipe.kv_cache else []
        words += ["--text_only"] if recipe.text_only else []
        words += ["--no_smoke"] if recipe.unloadable else []
    words += [] if recipe.by_method is None else recipe.by_method.words
    if recipe.calibration is not None:
        words += ["--stats", "STATISTICS"]
        headroom = recipe.calibration.headroom
        words += [] if headroom is None else ["--headroom", f"{headroom:g}"]
    return " ".join([*words, "--input_dir", source, "--output_dir", target])


def serve_words(
    target: str, revision: str | None, stored: Sequence[Stored], recipe: Recipe | None, model: str | None
) -> list[str]:
    """The command that serves an output.

    target, revision  of the output, `model` where it was made from
    """
    packed = next((form for form in stored if form.layout), None)
    if packed is None or packed.layout != KTRANSFORMERS:
        return ["vllm", "serve", target, *(["--revision", revision] if revision else [])]
    server = ["python", "-m", "sglang.launch_server", f"--model={model or 'MODEL'}"]
    nodes = [f"--kt-threadpool-count={recipe.threadpool_count}"] if isinstance(recipe, KtRecipe) else []
    folder = f"--kt-weight-path=./{target.rpartition('/')[2]}"
    return [*server, folder, f"--kt-method=AMX{packed.scheme.upper()}", *nodes]


def imported(*, scales: bool, ignore: bool) -> list[str]:
    """Parts of a recipe that were read from other checkpoints."""
    return ["imported activation scales"] * scales + ["an imported exclude list"] * ignore


def percent(value: float | None) -> str:
    """A share with four digits, nothing for None."""
    return "" if value is None else f"{100 * value:.4f} %"


def size(nbytes: float) -> str:
    """1536 -> `1.5 KB`, decimal units."""
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def kind_of(module: str) -> str:
    """`model.layers.3.mlp.experts.17.up_proj` -> `model.layers.N.mlp.experts.N.up_proj`."""
    return ".".join("N" if part.isdigit() else part for part in module.split("."))


def changes(plan: Plan) -> list[Change]:
    """One entry for each kind of module and each form that it gets, sorted."""
    found: dict[tuple[str, str, bool], list[int]] = {}
    for step in (step for shard in plan.shards for step in shard.steps):
        if not step.changes:
            continue
        becomes = step.format.name if step.format is not None else step.outputs[0].dtype
        encoded = step.format is not None
        row = found.setdefault((kind_of(step.weight.module), becomes, encoded), [0, 0, 0])
        row[0] += 1
        row[1] += step.weight.nbytes
        row[2] += sum(info.nbytes for info in step.outputs)
    return [
        Change(kind, becomes, count, before, after, encoded)
        for (kind, becomes, encoded), (count, before, after) in sorted(found.items())
    ]


def by_reason(kept: Mapping[str, str]) -> list[Kept]:
    """Module -> reason, as Plan.kept has it -> one entry for each reason, the one with most modules first."""
    found: dict[str, Counter[str]] = {}
    for module, reason in kept.items():
        found.setdefault(reason.removesuffix(HINT), Counter())[kind_of(module)] += 1
    entries = [
        Kept(reason, kinds.total(), tuple(sorted(kinds, key=lambda kind: (-kinds[kind], kind))))
        for reason, kinds in found.items()
    ]
    return sorted(entries, key=lambda entry: (-entry.count, entry.reason))


def main_dtype(sizes: Sequence[tuple[str, int]]) -> str:
    """Of (dtype, bytes) of all tensors the floating-point dtype with most bytes; BF16 where there is none."""
    total = dict.fromkeys(FLOAT_DTYPES, 0)
    for dtype, nbytes in sizes:
        if dtype in total:
            total[dtype] += nbytes
    return max(total, key=lambda dtype: total[dtype])
