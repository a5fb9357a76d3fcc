"""Plans, reports and comparisons as plain text of at most 100 columns. Strings in, strings out: the CLI prints them."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from mso_hub.checkpoint import Checkpoint
from mso_hub.errors import RecipeError
from mso_hub.formats import ALIASES, DENSE, FORMATS, READABLE
from mso_hub.formats.detect import quantization_configs
from mso_hub.formats.kt import KT_FORMATS
from mso_hub.plan import Plan
from mso_hub.plan.presets import ALIASES as PRESET_ALIASES
from mso_hub.plan.presets import find_preset, near_preset, preset_comment, preset_names, preset_text
from mso_hub.plan.recipe import LAYOUTS
from mso_hub.plan.recipe_file import read_recipe
from mso_hub.plan.summary import changes, kind_of, size
from mso_hub.verify import Comparison, Report

SHOWN = 12
COLUMNS = 100


def table(rows: Iterable[Sequence[object]], heads: Sequence[str]) -> str:
    """Columns padded to their widest entry; numbers to the right."""
    cells = [list(map(str, heads)), *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(heads))]
    right = [all(row[at][:1].isdigit() or not row[at] for row in cells[1:]) for at in range(len(heads))]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """Everything that `plan --json` says."""
    return {
        "source": plan.source,
        "job": plan.job,
        "scheme": plan.recipe.label or DENSE,
        "layout": plan.recipe.layout,
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "shards": [{"name": s.name, "nbytes": s.nbytes, "tensors": len(s.tensors)} for s in plan.shards],
        "quantized": {
            step.weight.module: {"format": step.format.name, "shape": list(step.weight.shape),
                                 "bytes_before": step.weight.nbytes,
                                 "bytes_after": sum(i.nbytes for i in step.outputs)}
            for shard in plan.shards for step in shard.steps if step.format is not None
        },
        "kept": dict(plan.kept),
        "dropped": list(plan.dropped),
        "units": {key: [w.module for w in members] for key, members in plan.units.items() if len(members) > 1},
        "carried": list(plan.carried),
        "left_behind": list(plan.behind),
        "quantization_config": plan.config.get("quantization_config"),
        "notes": list(plan.notes),
    }  # fmt: skip


def _changed(plan: Plan) -> tuple[str, str]:
    """Table of what is encoded or decoded, by kind of module; and the one of what stays."""
    rows = [(c.kind, c.becomes, c.count, size(c.before), size(c.after)) for c in changes(plan)]
    kept = Counter((kind_of(module), why) for module, why in plan.kept.items() if why != "not a linear layer's weight")
    stays = [(name, n, why) for (name, why), n in sorted(kept.items())]
    more = [(f"and {len(stays) - 40} more kinds", "", "--json lists them all")] if len(stays) > 40 else []
    return (
        table(rows, ("module", "becomes", "count", "before", "after")),
        table([*stays[:40], *more], ("stays as it is", "count", "why")),
    )


def plan_text(plan: Plan) -> str:
    """What `mso-hub plan` prints."""
    changed, stays = _changed(plan)
    shared = {key for key, m in plan.units.items() if len(m) > 1 and plan.formats[m[0].module].shares}
    fused = Counter(map(kind_of, shared))
    ratio = plan.write_bytes / max(1, plan.read_bytes)
    blocks = [
        f"{plan.source} -> {plan.recipe.label or DENSE} ({plan.recipe.layout})",
        changed,
        stays,
        table(
            [(key, n, ", ".join(sorted({w.module.rpartition(".")[2] for w in _members(plan, key)})))
             for key, n in sorted(fused.items())],
            ("one scale for", "count", "members"),
        ) if fused else "",
        f"size    {size(plan.read_bytes)} -> {size(plan.write_bytes)} ({ratio:.0%})",
        f"files   {len(plan.shards)} shards written, {len(plan.carried)} files carried along",
        *(f"note    {note}" for note in plan.notes),
    ]  # fmt: skip
    return "\n\n".join(block for block in blocks if block)


def _members(plan: Plan, leaf: str) -> Iterable[Any]:
    return next(members for key, members in plan.units.items() if kind_of(key) == leaf and len(members) > 1)


def inspect_dict(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `inspect --json` says: dtypes, sizes, shards, quantization."""
    by_dtype: dict[str, list[int]] = {}
    for info in (info for shard in checkpoint.shards.values() for info in shard.tensors):
        row = by_dtype.setdefault(info.dtype, [0, 0])
        row[0] += 1
        row[1] += info.nbytes
    configs = quantization_configs(checkpoint.config)
    return {
        "name": checkpoint.name,
        "architectures": checkpoint.config.get("architectures"),
        "model_type": checkpoint.config.get("model_type"),
        "quantization": [{k: c.get(k) for k in ("quant_method", "quant_algo", "format") if c.get(k)} for c in configs],
        "dtypes": {d: {"tensors": n, "nbytes": b} for d, (n, b) in sorted(by_dtype.items())},
        "indices": [g.index for g in checkpoint.groups if g.index],
        "shards": {s.name: {"tensors": len(s.tensors), "nbytes": s.nbytes} for s in checkpoint.shards.values()},
        "files": dict(checkpoint.files),
    }


def inspect_text(checkpoint: Checkpoint) -> str:
    """What `mso-hub inspect` prints."""
    facts = inspect_dict(checkpoint)
    shards = [(n, s["tensors"], size(s["nbytes"])) for n, s in facts["shards"].items()]
    more = [(f"and {len(shards) - SHOWN} more", "", "")] if len(shards) > SHOWN else []
    quantization = ", ".join(" ".join(map(str, q.values())) for q in facts["quantization"]) or "none announced"
    named = facts["architectures"]
    architectures = ", ".join(map(str, named)) if isinstance(named, list) and named else named or "no architecture"
    return "\n\n".join([
        f"{facts['name']}: {architectures}, quantization: {quantization}",
        table([(d, v["tensors"], size(v["nbytes"])) for d, v in facts["dtypes"].items()], ("dtype", "tensors", "size")),
        table([*shards[:SHOWN], *more], ("shard", "tensors", "size")),
    ])  # fmt: skip


def report_text(report: Report) -> str:
    """What `mso-hub verify` prints."""
    lines = [
        f"{report.where}: {report.tensors:,} tensors, {report.packed:,} packed weights",
        f"files with the SHA-256 of the manifest: {report.hashed:,}",
    ]
    if report.units:
        bad = sum("one global scale" in problem for problem in report.problems)
        lines.append(f"fused units with one shared scale: {report.units - bad:,} of {report.units:,}")
    if report.identical or report.errors:
        lines.append(f"against the source: {report.identical:,} tensors unchanged, {len(report.errors):,} changed")
    blocks = ["\n".join(lines)]
    if report.errors:
        kinds: dict[tuple[str, str], list[float]] = {}
        for error in report.errors:
            kinds.setdefault((kind_of(error.name), error.stored), []).append(error.nmse)
        rows = [
            (name, stored, len(v), f"{100 * sum(v) / len(v):.4f} %", f"{100 * max(v):.4f} %")
            for (name, stored), v in sorted(kinds.items())
        ]
        blocks.append(table(rows, ("weight", "stored as", "count", "mean error", "worst error")))
        blocks.append("error: sum of squared differences over sum of squares, dequantized against the source")
    blocks += [f"byte for byte like {name}: {n:,} tensors" for name, n in report.reference.items()]
    blocks += [f"note    {note}" for note in report.notes]
    shown = [f"PROBLEM {problem}" for problem in report.problems[:SHOWN]]
    if len(report.problems) > SHOWN:
        shown.append(f"and {len(report.problems) - SHOWN} more problems")
    return "\n\n".join([*blocks, "\n".join(shown) or "no problems found"])


def comparison_text(comparison: Comparison) -> str:
    """What `mso-hub compare` prints."""
    a, b = comparison.names
    only = f"{len(comparison.only[0]):,} only in A, {len(comparison.only[1]):,} only in B"
    both = f"{comparison.common:,} weights in both ({comparison.identical:,} equal byte for byte)"
    blocks = [f"A {a}\nB {b}\n{both}, {only}"]
    rows = [
        (label, kind, *(f"{q:.4g}" for q in quantiles))
        for label, scales in zip("AB", comparison.scales, strict=True) for kind, quantiles in scales.items()
    ]  # fmt: skip
    if rows:
        blocks.append(table(rows, ("", "NVFP4 scale", "min", "5 %", "median", "95 %", "max")))
    if comparison.errors:
        worst = [(e.name, e.stored, f"{100 * e.nmse:.4f} %", f"{e.max_abs:.4g}") for e in comparison.errors[:SHOWN]]
        blocks.append(table(worst, ("largest differences (B against A)", "B stored as", "error", "max abs")))
    return "\n\n".join(blocks)


def formats_rows() -> list[tuple[str, ...]]:
    """A row for each format: name, what it is, what each layout has (W4A16, ...), group sizes, default search."""
    rows = []
    for name, entry in FORMATS.items():
        choices = entry.choices
        kinds = {layout: choices.activations[layout] for layout in choices.loaders}
        cells = (" ".join(f"W{entry.bits}A{bits}" for bits in kinds.get(layout, ())) for layout in LAYOUTS)
        rows.append((name, entry.summary, *cells, " ".join(map(str, choices.group_sizes)), choices.searches[0]))
    return rows


def _options() -> list[tuple[str, str]]:
    """Options that only some formats have -> those formats."""
    by_option: dict[str, list[str]] = {}
    for name, entry in FORMATS.items():
        if len(entry.choices.searches) > 1:
            by_option.setdefault(f"--scale_search {' '.join(sorted(entry.choices.searches))}", []).append(name)
    by_option["--asymmetric"] = [name for name, entry in FORMATS.items() if entry.choices.asymmetric]
    return [(option, " ".join(names)) for option, names in by_option.items()]


def _loaders() -> list[tuple[str, str]]:
    """Layout -> who loads it, and which formats only some of them do."""
    rows = []
    for layout in LAYOUTS:
        by_loader: dict[str, list[str]] = {}
        for name, entry in FORMATS.items():
            if layout in entry.choices.loaders:
                by_loader.setdefault(entry.choices.loaders[layout], []).append(name)
        rows.append((layout, "; ".join(f"{who}: {' '.join(names)}" for who, names in by_loader.items())))
    return rows


def formats_text() -> str:
    """What `mso-hub formats` prints."""
    historic = [(name, f"historic name of {scheme.format}", *[""] * 5) for name, scheme in ALIASES.items()]
    experts = [(name, f"{kind} experts for KTransformers", *[""] * 4, "absmax") for name, kind in KT_FORMATS.items()]
    dense = (DENSE, "decoded: `decompress`", *[""] * 5)
    return "\n\n".join([
        table([*formats_rows(), *experts, *historic, dense], ("writes", "what", *LAYOUTS, "group_size", "scales")),
        table([*_options(), *_loaders()], ("option or layout", "formats")),
        table(READABLE.items(), ("reads", "what")),
    ])  # fmt: skip


def presets_text(name: str | None = None) -> str:
    """What `mso-hub formats --presets` prints: all of them, or the file of one; RecipeError for an unknown name."""
    if name is not None:
        preset = find_preset(name)
        if preset is None:
            raise RecipeError(f"{name}: there is no such preset{near_preset(name)}; --presets alone lists them")
        return preset_text(preset).rstrip()
    labels = {preset: read_recipe(preset).label for preset in preset_names()}
    width = COLUMNS - 4 - max(map(len, labels)) - max(map(len, labels.values()))
    rows = []
    for preset, label in labels.items():
        first, *more = textwrap.wrap(preset_comment(preset)[0], width)
        rows += [(preset, label, first), *(("", "", line) for line in more)]
    return "\n\n".join([
        table(rows, ("preset", "formats", "what")),
        table(sorted(PRESET_ALIASES.items()), ("also called", "preset")),
    ])  # fmt: skip
