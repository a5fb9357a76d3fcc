"""What the user wants: scheme, layout, which modules, which not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import translate

from mso_hub.errors import RecipeError
from mso_hub.formats.weight import FLOAT_DTYPES

LAYOUTS = ("compressed-tensors", "modelopt")
SEARCHES = ("absmax", "mse")
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
class Recipe:
    """Settings of one conversion. Everything here enters the job digest, so a changed field is another job.

    scheme          key of FORMATS: what weights become
    layout          how the scheme is named on disk, one of LAYOUTS
    mode            which modules `targets` stands for when it is empty: one of MODES
    targets         globs or `re:` patterns of module names, or "Linear" for all; replaces `mode`
    ignore          globs or `re:` patterns of module names that keep their numbers; each must match something
    imported_ignore patterns of a reference model's config; those that match nothing here are reported
    default_ignore  leave embeddings, heads, norms, routers, convolutions, vision, projectors and MTP alone
    input_scale     activation scale for W4A4 (multiplier, amax/2688): one for all, or None for W4A16
    input_scales    the same per module, imported from a calibrated checkpoint
    scale_search    how block scales are chosen, one of SEARCHES
    dtype           what packed weights become when they are decoded: BF16, F16 or F32
    text_only       drop vision and audio parts, flatten names and config
    """

    scheme: str = "nvfp4"
    layout: str = "compressed-tensors"
    mode: str = "mlp"
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    imported_ignore: tuple[str, ...] = ()
    default_ignore: bool = True
    input_scale: float | None = None
    input_scales: Mapping[str, float] = field(default_factory=dict)
    scale_search: str = "absmax"
    dtype: str = "BF16"
    text_only: bool = False

    @property
    def activations(self) -> bool:
        """Are activations quantized too (W4A4)?"""
        return self.input_scale is not None or bool(self.input_scales)

    def __post_init__(self) -> None:
        """Refuse unknown words here, so that no later stage has to."""
        for name, value, known in (
            ("layout", self.layout, LAYOUTS),
            ("mode", self.mode, MODES),
            ("scale_search", self.scale_search, SEARCHES),
            ("dtype", self.dtype, FLOAT_DTYPES),
        ):
            if value not in known:
                raise RecipeError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.targets and self.mode != "mlp":
            raise RecipeError(f"targets {list(self.targets)} and mode {self.mode!r} contradict each other; keep one")
        if self.scheme == "bf16":
            self._refuse_encoder_settings()
        for scale in (
            *((self.input_scale,) if self.input_scale is not None else ()),
            *self.input_scales.values(),
        ):
            if not 2.0**-126 <= scale <= 2.0**126:  # float32 holds these and their reciprocals
                raise RecipeError(f"input_scale must be a finite number > 0, 1.2e-38 to 8.5e37, got {scale}")

    def _refuse_encoder_settings(self) -> None:
        """Decoding chooses nothing: settings that would have no effect are mistakes."""
        default = Recipe()
        idle = [
            f.name for f in fields(self)
            if f.name not in ("scheme", "dtype", "text_only") and getattr(self, f.name) != getattr(default, f.name)
        ]  # fmt: skip
        if idle:
            raise RecipeError(
                f"scheme {self.scheme!r} decodes every packed weight and takes no {', '.join(idle)}; leave them out"
            )


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
