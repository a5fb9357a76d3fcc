"""Statistics -> activation scales of a recipe: who shares, and what those get that saw no token.

Weights that an engine fuses have the same input, so theirs is the same by construction. Experts of one layer share one
value for each projection, the largest of all of them: engines keep one for the bank, and an expert that few tokens
reached would have a value that the next text exceeds. So an expert that saw no token has a value too: a missing or a
zero scale divides by zero in engines. Too large a value costs nothing, too small a one clips.

source   Model Optimizer `layer_sync_moe_local_experts_amax`; vLLM #45212, compressed-tensors #595 for what goes wrong
"""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path

from mso_hub.calibrate.identity import require_same_model
from mso_hub.calibrate.statistics import Statistics, read_statistics
from mso_hub.errors import RecipeError
from mso_hub.plan import Recipe
from mso_hub.plan.calibration import LONE_AMAX, Calibration
from mso_hub.plan.measured import with_measured
from mso_hub.plan.select import EXPERT
from mso_hub.source import Source, open_source, read_checkpoint

ROW = re.compile(r"^(?P<bank>.*)\.(?P<leaf>\w+)\[(?P<expert>\d+)\]$")
"""`NAME.experts.gate_up_proj[5]`: one expert of a tensor that holds all of them."""
PARTS = {"gate_up_proj": ("gate_proj", "up_proj")}
LEAST = 2.0**-100
"""Anything smaller is as good as zero: a scale made of it could not be inverted."""
CACHE_LARGEST = 448.0
"""Of E4M3: the scale of a KV cache is a multiplier, amax / 448."""
WEIGHTS = ("weight", "weight_packed", "qweight")
"""Scales of a KV cache lie beside keys' weights; latent attention has none, nor have engines a place for its scales."""
HEADROOM_LIMITS = (1.0, 4096.0)


def planned_names(module: str) -> tuple[str, ...]:
    """The modules of a plan that an on-disk name stands for: two for the gate and up rows of a fused expert."""
    row = ROW.match(module)
    if row is None:
        return (module,)
    return tuple(f"{row['bank']}.{row['expert']}.{leaf}" for leaf in PARTS.get(row["leaf"], (row["leaf"],)))


def by_module(statistics: Statistics) -> tuple[dict[str, float], dict[str, int]]:
    """(largest |x|, tokens) by the names of a plan, each module's own."""
    amax: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for name, value in statistics.amax.items():
        for module in planned_names(name):
            amax[module] = max(value, amax.get(module, 0.0))
            tokens[module] = max(statistics.tokens[name], tokens.get(module, 0))
    return amax, tokens


def shared_amax(statistics: Statistics, headroom: float | None = None) -> tuple[dict[str, float], Calibration]:
    """(module of a plan -> largest |x|, always > 0; where they come from), by the rules of the module docstring.

    headroom  factor that a plan puts on each value, kept in the Calibration; None: that of each format
    """
    own, tokens = by_module(statistics)
    banks: dict[tuple[str, str], float] = {}
    reached: set[str] = set()
    for module, value in own.items():
        if match := EXPERT.match(module):
            key = match["bank"], match["leaf"]
            banks[key] = max(value, banks.get(key, 0.0))
            reached |= {match["bank"]} if tokens[module] else set()
    found: dict[str, float] = {}
    unseen, zeros, silent = [], [], []
    for module, value in own.items():
        match = EXPERT.match(module)
        largest = banks[match["bank"], match["leaf"]] if match else value
        if not (match["bank"] in reached if match else tokens[module]):
            silent.append(module)
        elif largest < LEAST:
            zeros.append(module)
            found[module] = LONE_AMAX
        else:
            found[module] = largest
            unseen += [module] if value < LEAST else []
    made = statistics.provenance
    return found, Calibration(
        made.text, made.rows, made.tokens, made.sha256, made.source, made.commit, made.mso_hub,
        headroom, tuple(unseen), tuple(zeros), tuple(silent),
    )  # fmt: skip


def cache_scales(statistics: Statistics, headroom: float = 1.0) -> dict[str, tuple[float, float]]:
    """Attention module -> scales of its keys and values in an FP8 cache, multipliers: amax * headroom / 448."""

    def scale(value: float) -> float:
        """A cache that only ever saw zeros has the engine's own scale of 1."""
        return value * headroom / CACHE_LARGEST if value >= LEAST else 1.0

    return {module: (scale(keys), scale(values)) for module, (keys, values) in statistics.caches.items()}


def check_headroom(headroom: float | None) -> None:
    """RecipeError for a factor that would make a scale too small, or senseless."""
    low, high = HEADROOM_LIMITS
    if headroom is not None and not low <= headroom <= high:
        raise RecipeError(
            f"headroom: must be {low:g} to {high:g}, got {headroom}: below 1 every larger activation would be clipped"
        )


def with_statistics(
    recipe: Recipe, statistics: Statistics | str | Path, source: Source | str | Path, *, headroom: float | None = None
) -> Recipe:
    """A recipe with the activation scales that statistics give, and with scales of the KV cache where it announces one.

    recipe      its rules have an `input_scale` where they are to get measured ones: any number stands for that
    statistics  a file that `mso-hub calibrate` wrote, or what `read_statistics` made of it
    source      the model that will be converted: RecipeError when the statistics are another one's, or another commit's
    headroom    factor on every magnitude, 1 to 4096; None: 2 for NVFP4, 1 for FP8 and for the KV cache
    """
    check_headroom(headroom)
    found = statistics if isinstance(statistics, Statistics) else read_statistics(statistics)
    if isinstance(source, str | Path):
        with closing(open_source(source)) as opened:
            return with_statistics(recipe, found, opened, headroom=headroom)
    checkpoint = read_checkpoint(source)
    require_same_model(found, source, checkpoint)
    if recipe.kv_cache and recipe.kv_scales and found.caches:
        raise RecipeError(
            f"kv_scales: {found.path} has scales of {len(found.caches)} KV caches too; keep one of the two"
        )
    amax, calibration = shared_amax(found, headroom)
    caches = {
        module: pair
        for module, pair in cache_scales(found, headroom or 1.0).items()
        if any(f"{module}.k_proj.{leaf}" in group.tensors for group in checkpoint.groups for leaf in WEIGHTS)
    }
    return with_measured(recipe, amax, recipe.kv_scales or caches, calibration)
