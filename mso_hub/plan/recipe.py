"""What the user wants: scheme, layout, which modules, which not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import translate
from typing import Any

from mso_hub.errors import RecipeError
from mso_hub.formats import ALIASES, DENSE, FORMATS, IMPORTED, Format, Scheme, build
from mso_hub.formats.kt import KT_FORMATS
from mso_hub.formats.weight import FLOAT_DTYPES
from mso_hub.plan.calibration import Calibration
from mso_hub.plan.layers import check_layers
from mso_hub.plan.method import Method

LAYOUTS = ("compressed-tensors", "modelopt", "deepseek")
MODES = ("mlp", "all-linear")

MLP_LEAVES = frozenset(
    [
        "gate_proj",
        "up_proj",
        "down_proj",
        "gate_up_proj",
        "w1",
        "w2",
        "w3",
        "w13",
        "fc1",
        "fc2",
        "dense_h_to_4h",
        "dense_4h_to_h",
    ]
)
MLP_PARENT = re.compile(
    r"(^|\.)(mlps?|ffn|feed_forward|block_sparse_moe|moe|mixer|experts|shared_experts?|share_expert)(\.|$)"
)
"""Path components under which a linear layer belongs to the feed-forward part, in every family we know."""

DEFAULT_IGNORE: dict[str, re.Pattern[str]] = {
    "vision or audio tower": re.compile(
        r"(^|\.)(vision\w*|visual\w*|image\w*|audio\w*|speech\w*|vit|vpm|apm|sam_model|radio_model|siglip\w*|sound\w*|talker"
        r"|token2wav|code2wav)(\.|$)"
    ),
    "multimodal projector": re.compile(
        r"(^|\.)(\w*projector\w*|mm_\w+|aligner|connector|resampler|merger|patch_merger|mlp1|embed_(vision|audio))(\.|$)"
    ),
    "sparse-attention indexer": re.compile(r"(^|\.)indexer(\.|$)"),
    "MTP": re.compile(r"(^|\.)(mtp\w*|nextn\w*|mtp_layers|eh_proj|shared_head)(\.|$)"),
    "convolution": re.compile(r"(^|[._])(conv\w*|patch_embed\w*)(\.|$)"),
    "embedding": re.compile(r"(^|[._])(embed\w*|word_embeddings?|wte|wpe|position_embeddings?)(\.|$)"),
    "output head": re.compile(r"(^|\.)(lm_head|output_layer|score|classifier|v_head|output)$"),
    "norm": re.compile(r"(norm|layernorm|ln_f|ln_\d|rmsnorm)\w*$"),
    "router or gate": re.compile(
        r"(^|\.)(router|gate|wg|shared_expert_gate|e_score_correction_bias)(\.|$)|\.router_\w+$"
    ),
    "linear-attention gate": re.compile(r"\.linear_attn\.in_proj_(a|b|ba)$|\.(A_log|dt_bias|f_b_proj|g_b_proj)$"),
}
"""Reason -> modules that keep their numbers unless `default_ignore` is off. Searched in the module name."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Which modules get which scheme; the first rule that covers a module decides.

    targets         globs or `re:` patterns of module names, or "Linear" for all; replaces `mode`
    mode            which modules are meant when `targets` is empty: one of MODES
    layers          only in these decoder layers: numbers and ranges like 0, "0-3", -1 (the last one); empty for all
    default_ignore  False: what `targets` covers is taken also where Recipe.default_ignore would leave it alone
    optional        models without such modules are fine: a note says so, instead of an error
    """

    scheme: Scheme
    targets: tuple[str, ...] = ()
    mode: str = "mlp"
    layers: tuple[int | str, ...] = ()
    default_ignore: bool = True
    optional: bool = False

    def __post_init__(self) -> None:
        """Refuse an unknown mode, one that contradicts the targets, and what is no number of a layer."""
        check_layers("layers", self.layers)
        if self.mode not in MODES:
            raise RecipeError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.targets and self.mode != "mlp":
            raise RecipeError(f"targets {list(self.targets)} and mode {self.mode!r} contradict each other; keep one")
        if not self.default_ignore and not self.targets:
            raise RecipeError(f"default_ignore: a rule without targets cannot switch it off, got mode {self.mode!r}")

    @property
    def label(self) -> str:
        """For messages: `fp8_dynamic for re:.*self_attn.*`."""
        named = ", ".join(self.targets[:2]) + (", ..." if len(self.targets) > 2 else "") if self.targets else self.mode
        where = f" in layers {', '.join(map(str, self.layers))}" if self.layers else ""
        return f"{self.scheme.format} for {named}{where}"


def named_scheme(name: str, said: Mapping[str, Any]) -> Scheme:
    """The scheme that a name stands for, historic ones too, with the fields of `said` that are not None."""
    base = ALIASES.get(name, Scheme(name))
    return replace(base, **{key: value for key, value in said.items() if value is not None})


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of one conversion. Everything here enters the job digest, so a changed field is another job.

    scheme          key of FORMATS: what weights become; `activations`, `group_size`, `symmetric`, `scale_search` and
                    `input_scale` say more about it, as in Scheme
    layout          how schemes are named on disk, one of LAYOUTS
    mode            which modules `targets` stands for when it is empty: one of MODES
    targets         globs or `re:` patterns of module names, or "Linear" for all; replaces `mode`
    rules           several schemes in one checkpoint, in place of `scheme`, `mode` and `targets`
    ignore          globs or `re:` patterns of module names that keep their numbers; each must match something
    imported_ignore patterns of a reference model's config; those that match nothing here are reported
    default_ignore  leave embeddings, heads, norms, routers, convolutions, vision, projectors and MTP alone
    skip_layers     decoder layers that keep their numbers, as in Rule.layers
    input_amax      largest magnitude of each module's activations, for `input_scale` "imported"
    kv_cache        announce an FP8 KV cache; `kv_scales` are its scales (multipliers, amax / 448), attention module ->
                    (k, v), engines take 1.0 where there are none
    calibration     where `input_amax` and `kv_scales` were measured; None: they are another checkpoint's
    by_method       what made the source's weights ready for this; None: they are as their maker left them
    dtype           what packed weights become when they are decoded: BF16, F16 or F32
    text_only       drop vision and audio parts, flatten names and config
    unloadable      write also what vLLM is known not to load; the plan's notes say what that is
    """

    scheme: str = "nvfp4"
    layout: str = "compressed-tensors"
    mode: str = "mlp"
    targets: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    ignore: tuple[str, ...] = ()
    imported_ignore: tuple[str, ...] = ()
    default_ignore: bool = True
    skip_layers: tuple[int | str, ...] = ()
    activations: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    scale_search: str | None = None
    input_scale: float | str | None = None
    input_amax: Mapping[str, float] = field(default_factory=dict)
    kv_cache: bool = False
    kv_scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    calibration: Calibration | None = None
    by_method: Method | None = None
    dtype: str = "BF16"
    text_only: bool = False
    unloadable: bool = False

    @property
    def all_rules(self) -> tuple[Rule, ...]:
        """`rules`, or the one that the flat settings stand for."""
        return self.rules or (Rule(self._flat, self.targets, self.mode),)

    @property
    def _flat(self) -> Scheme:
        """The flat settings as a Scheme; what a historic name stands for, where nothing else is said."""
        said: dict[str, Any] = {
            "activations": self.activations, "group_size": self.group_size, "symmetric": self.symmetric,
            "search": self.scale_search, "input_scale": self.input_scale,
        }  # fmt: skip
        return named_scheme(self.scheme, said)

    @property
    def decodes(self) -> bool:
        """Does it only decode packed weights?"""
        return not self.rules and self.scheme == DENSE

    @property
    def label(self) -> str:
        """Every scheme once: `nvfp4`, `nvfp4 + fp8_dynamic`."""
        return " + ".join(dict.fromkeys(rule.scheme.format for rule in self.all_rules if rule.scheme.format != DENSE))

    @property
    def measures(self) -> bool:
        """Is the error of a sample measured and told, whatever else is asked for?"""
        return False

    def __post_init__(self) -> None:
        """Refuse unknown words here, so that no later stage has to."""
        check_layers("skip_layers", self.skip_layers)
        for name, value, known in (("layout", self.layout, LAYOUTS), ("dtype", self.dtype, FLOAT_DTYPES)):
            if value not in known:
                raise RecipeError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.rules:
            self._refuse(("scheme", "mode", "targets", "activations", "group_size", "symmetric", "scale_search",
                          "input_scale"), "a recipe with rules has it in each rule")  # fmt: skip
        elif self.decodes:
            kept = ("scheme", "dtype", "text_only")
            self._refuse(
                [f.name for f in fields(self) if f.name not in kept],
                f"scheme {self.scheme!r} decodes every packed weight and takes no such setting",
            )
        elif self.scheme in KT_FORMATS:
            raise RecipeError(f"format {self.scheme} regroups and renames experts for KTransformers; take a KtRecipe")
        elif self.scheme not in (*FORMATS, *ALIASES):
            raise RecipeError(f"format must be one of {', '.join([*FORMATS, *ALIASES, DENSE])}, got {self.scheme!r}")
        formats = [build(rule.scheme, self.layout, unloadable=self.unloadable) for rule in self.all_rules]
        if self.rules and not any(formats):
            raise RecipeError(f"rules must quantize something, got {self.label or DENSE!r} only; use decompress")
        self._check_scales(formats)

    def _check_scales(self, formats: Sequence[Format | None]) -> None:
        """Activation scales must have a taker, and takers of imported ones must get some."""
        for rule, form in zip(self.all_rules, formats, strict=True):
            if rule.scheme.input_scale is not None and (form is None or not form.static):
                raise RecipeError(
                    f"input_scale: {rule.label} has no static activation scale, got {rule.scheme.input_scale!r}; "
                    "leave it out"
                )
        imported = any(rule.scheme.input_scale == IMPORTED for rule in self.all_rules)
        if imported != bool(self.input_amax):
            found = f"{len(self.input_amax)} imported scales, {'some' if imported else 'no'} rule that takes them"
            raise RecipeError(f'input_scale "{IMPORTED}" and --input_scale WHERE belong together, got {found}')
        values = [*self.input_amax.values(), *(scale for pair in self.kv_scales.values() for scale in pair)]
        if any(not 2.0**-126 <= value <= 2.0**126 for value in values):
            raise RecipeError(f"activation scales must be finite and > 0, got {min(values)} to {max(values)}")
        if self.kv_cache and self.layout == "deepseek":
            raise RecipeError(f"kv_cache: the layout {self.layout!r} has no word for it; leave it out")
        if self.calibration is not None and not (self.input_amax or self.kv_scales):
            raise RecipeError(f"calibration: nothing of it is here, it read {self.calibration.text!r}; leave it out")
        if self.kv_scales and not self.kv_cache:
            raise RecipeError(f"kv_scales: {len(self.kv_scales)} were given without kv_cache; add it")

    def _refuse(self, names: Iterable[str], why: str) -> None:
        """RecipeError for settings that would have no effect."""
        default = {f.name: f.default for f in fields(self)}
        empty: dict[str, Any] = {"input_amax": {}, "kv_scales": {}}
        idle = [name for name in names if getattr(self, name) != empty.get(name, default[name])]
        if idle:
            raise RecipeError(f"{', '.join(idle)}: {why}; leave it out")


class Patterns:
    """Globs and `re:` patterns over module names.

    `re:` patterns match from the start of a name. Globs match a whole name or whole leading components, so that
    `model.layers.1` covers `model.layers.1.mlp.up_proj` and never `model.layers.10`. A trailing `.weight` is free.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._plain: set[str] = set()
        self._compiled: list[tuple[str, re.Pattern[str]]] = []
        self._unused = dict.fromkeys(patterns)
        for pattern in self._unused:
            if not pattern.startswith("re:") and not any(c in pattern for c in "*?["):
                self._plain.add(pattern)
                continue
            source = pattern[3:] if pattern.startswith("re:") else translate(pattern)[:-2] + r"(\..*)?\Z"
            try:
                self._compiled.append((pattern, re.compile(source)))
            except (re.error, OverflowError, RecursionError) as error:
                raise RecipeError(f"{pattern!r} is not a regular expression: {error}") from error

    def find(self, module: str) -> str | None:
        """A pattern that covers the module, or None; every pattern that does counts as used."""
        if not (self._plain or self._compiled):
            return None
        hits = []
        for end in (at for at, c in enumerate(module + ".weight.") if c == "."):
            prefix = (module + ".weight")[:end]
            if prefix in self._plain:
                hits.append(prefix)
        for pattern, compiled in self._compiled:
            if compiled.match(module) or compiled.match(module + ".weight"):
                hits.append(pattern)
        for hit in hits:
            self._unused.pop(hit, None)
        return hits[0] if hits else None

    @property
    def unused(self) -> list[str]:
        """Patterns that covered nothing so far: typing errors, most of the time."""
        return list(self._unused)


def default_reason(module: str) -> str | None:
    """Why a module stays as it is by default, or None."""
    return next((reason for reason, pattern in DEFAULT_IGNORE.items() if pattern.search(module)), None)


def is_mlp(module: str) -> bool:
    """Is a linear layer part of a feed-forward block or an expert?"""
    parent, _, leaf = module.rpartition(".")
    return leaf in MLP_LEAVES and MLP_PARENT.search(parent) is not None
