"""What formats do to the numbers of each weight, as JSON and Markdown: before a run for several, after it for one.

NMSE      sum of squared differences over sum of squares
max       largest difference
SQNR      -10 log10 NMSE, in dB: 3 dB more is half the squared error
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mso_hub.checkpoint import DTYPE_BITS
from mso_hub.engine import Distance, noted_distances
from mso_hub.errors import RecipeError
from mso_hub.formats import DENSE, FORMATS, Format
from mso_hub.formats.weight import Weight
from mso_hub.hub.model_card import code, plain, table
from mso_hub.plan import Plan, Step
from mso_hub.plan.summary import Kept, by_reason, kind_of, percent, size

TABLE = "mso_hub error table 1"
"""Kind and version of the file: raised when the same format starts to give other numbers."""
ENDINGS = (".json", ".md")
SHOWN = 2000
"""Weights that Markdown lists, the worst first; JSON has them all."""
UNMEASURED = "written by an earlier run that did not measure"


@dataclass(frozen=True, slots=True)
class Loss:
    """What a format does to a weight: sum of squared differences, largest difference, bytes that it takes."""

    error: float
    largest: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class Measured:
    """A weight and what formats do to it.

    energy  sum of its squares
    dense   bytes that it takes where it stays
    losses  label of a format -> what it does; `barred` says of other formats why they cannot hold it
    """

    numbers: int
    energy: float
    dense: int
    losses: Mapping[str, Loss] = field(default_factory=dict)
    barred: Mapping[str, str] = field(default_factory=dict)

    def nmse(self, label: str) -> float:
        """Squared error over squared numbers."""
        error = self.losses[label].error
        return error / self.energy if self.energy > 0 else (math.inf if error > 0 else 0.0)


@dataclass(frozen=True, slots=True)
class Divergence:
    """What formats do to a model's predictions: KL divergence in nats per token, one group of weights at a time.

    text      what was read: `tokens` token ids, whose SHA-256 in hex is `sha256`
    groups    weights that are stored alike -> label of a format -> KL; groups that text does not reach are not there
    together  label -> KL with all groups in that format
    """

    text: str
    tokens: int
    sha256: str
    groups: Mapping[str, Mapping[str, float]]
    together: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ErrorTable:
    """Every weight that a recipe offers under every format.

    source      where the weights were read, `identity` its digest
    layout      of the formats
    weights     name -> what formats do to it
    divergence  what they do to predictions, where that was measured too
    """

    source: str
    identity: str
    layout: str
    weights: Mapping[str, Measured]
    divergence: Divergence | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Formats, in the order in which they were asked for."""
        return tuple(dict.fromkeys(label for w in self.weights.values() for label in (*w.losses, *w.barred)))


@dataclass(frozen=True, slots=True)
class Row:
    """A kind of module under one format: mean and worst NMSE over its weights, SQNR over all their numbers."""

    kind: str
    label: str
    count: int
    bits: float
    mean: float
    worst: float
    where: str
    largest: float
    sqnr: float


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a run did.

    facts  what it was, as pairs of words
    notes  sentences
    kept   module -> why it stays
    """

    facts: Sequence[tuple[str, str]]
    table: ErrorTable
    notes: Sequence[str] = ()
    kept: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Was every weight measured?"""
        return not any(weight.barred for weight in self.table.weights.values())


def label_of(form: Format) -> str:
    """An encoder by its name and by what is not its default: `w4a16 group_size=32 search=mse`."""
    if form.name not in FORMATS:
        return form.name
    choices = FORMATS[form.name].choices
    group = getattr(form, "group_size", None)
    said = [f"group_size={group}"] if choices.group_sizes and group not in (None, choices.group_sizes[0]) else []
    said += ["asymmetric"] if getattr(form, "symmetric", True) is False else []
    said += [f"search={form.search}"] if form.search != choices.searches[0] else []
    return " ".join([form.name, *said])


def sqnr(nmse: float) -> float:
    """NMSE as a ratio in dB; infinite for 0."""
    return -10 * math.log10(nmse) if nmse > 0 else math.inf


def by_kind(measured: ErrorTable) -> list[Row]:
    """One row for each kind of module and each format that can hold all of that kind."""
    found: dict[tuple[str, str], list[tuple[str, Measured]]] = {}
    for name, weight in measured.weights.items():
        for label in weight.losses:
            found.setdefault((kind_of(name.removesuffix(".weight")), label), []).append((name, weight))
    order = {label: at for at, label in enumerate(measured.labels)}
    return [_row(kind, label, found[kind, label]) for kind, label in sorted(found, key=lambda k: (k[0], order[k[1]]))]


def _row(kind: str, label: str, members: Sequence[tuple[str, Measured]]) -> Row:
    errors = [(weight.nmse(label), name) for name, weight in members]
    worst, where = max(errors, key=lambda pair: pair[0])
    losses = [weight.losses[label] for _, weight in members]
    numbers = sum(weight.numbers for _, weight in members)
    return Row(
        kind, label, len(members), 8 * sum(loss.nbytes for loss in losses) / max(1, numbers),
        math.fsum(error for error, _ in errors) / len(errors), worst, where, max(loss.largest for loss in losses),
        sqnr(_ratio([loss.error for loss in losses], [weight.energy for _, weight in members])),
    )  # fmt: skip


def _ratio(errors: Iterable[float], energies: Iterable[float]) -> float:
    error, energy = math.fsum(errors), math.fsum(energies)
    return error / energy if energy > 0 else 0.0


def check_path(path: str | Path) -> Path:
    """Where a report is to go; RecipeError for another ending than ENDINGS and for a folder that is not there."""
    where = Path(path)
    if where.suffix not in ENDINGS:
        raise RecipeError(f"{where}: a report ends in {' or '.join(ENDINGS)}, got {where.suffix or 'no ending'!r}")
    if where.is_dir() or not where.absolute().parent.is_dir():
        raise RecipeError(f"{where}: needs the name of a file in a folder that exists, got another one")
    return where


def write_table(measured: ErrorTable, path: str | Path) -> None:
    """The table as JSON or Markdown, as the ending says."""
    where = check_path(path)
    where.write_text(table_markdown(measured) if where.suffix == ".md" else _json(table_dict(measured)), "utf-8")


def write_report(report: RunReport, path: str | Path) -> None:
    """The report as JSON or Markdown, as the ending says."""
    where = check_path(path)
    where.write_text(report_markdown(report) if where.suffix == ".md" else _json(report_dict(report)), "utf-8")


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _quality(weight: Measured, label: str) -> dict[str, Any]:
    if label in weight.barred:
        return {"problem": weight.barred[label]}
    loss = weight.losses[label]
    return {
        "bytes": loss.nbytes, "squared_error": loss.error, "nmse": _finite(weight.nmse(label)),
        "max_abs": loss.largest, "sqnr_db": _finite(sqnr(weight.nmse(label))),
    }  # fmt: skip


def table_dict(measured: ErrorTable) -> dict[str, Any]:
    """JSON of an error table; `sqnr_db` is null where nothing is lost."""
    return {
        "kind": TABLE,
        "version": version("mso-hub"),
        "source": measured.source,
        "identity": measured.identity,
        "layout": measured.layout,
        "weights": {
            name: {"numbers": weight.numbers, "energy": weight.energy, "dense_bytes": weight.dense,
                   "formats": {label: _quality(weight, label) for label in (*weight.losses, *weight.barred)}}
            for name, weight in measured.weights.items()
        },
        **({} if measured.divergence is None else {"divergence": asdict(measured.divergence)}),
    }  # fmt: skip


def read_table(path: str | Path) -> ErrorTable | None:
    """What `table_dict` wrote; None for a table of another version, RecipeError for any other file."""
    try:
        content = json.loads(Path(path).read_bytes())
        kind = str(content["kind"])
        if kind == TABLE:
            weights = {str(name): _measured(entry) for name, entry in content["weights"].items()}
            said = content.get("divergence")
            return ErrorTable(
                str(content["source"]), str(content["identity"]), str(content["layout"]), weights,
                None if said is None else _divergence(said),
            )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _no_table(path, f"{error!r:.80}") from error
    if kind.startswith(TABLE.rpartition(" ")[0]):
        return None
    raise _no_table(path, f"it is {kind!r:.80}")


def _no_table(path: str | Path, found: str) -> RecipeError:
    return RecipeError(
        f"{path}: must be an error table of mso_hub, it cannot be read as one: {found}; give another name, or delete it"
    )


def _divergence(said: Mapping[str, Any]) -> Divergence:
    groups = {str(group): {str(n): float(kl) for n, kl in kls.items()} for group, kls in said["groups"].items()}
    together = {str(label): float(kl) for label, kl in said["together"].items()}
    return Divergence(str(said["text"]), int(said["tokens"]), str(said["sha256"]), groups, together)


def _measured(entry: Mapping[str, Any]) -> Measured:
    formats: Mapping[str, Mapping[str, Any]] = entry["formats"]
    losses = {
        label: Loss(float(said["squared_error"]), float(said["max_abs"]), int(said["bytes"]))
        for label, said in formats.items()
        if "problem" not in said
    }
    barred = {label: str(said["problem"]) for label, said in formats.items() if "problem" in said}
    return Measured(int(entry["numbers"]), float(entry["energy"]), int(entry["dense_bytes"]), losses, barred)


def run_report(plan: Plan, notes: Mapping[str, float], output: str) -> RunReport:
    """What a run did to every weight that it quantized, from what it noted."""
    noted = noted_distances(notes)
    steps = {(shard.name, step.weight.name): step for shard in plan.shards for step in shard.steps}
    moved = {name: shard for (shard, name), step in steps.items() if shard != step.weight.home.file}
    weights: dict[str, Measured] = {}
    for weight in (weight for members in plan.units.values() for weight in members):
        place = (moved.get(weight.name, weight.home.file), weight.name)
        label = label_of(plan.formats[weight.module])
        # Two folders of a repo may hold the same names.
        name = weight.name if weight.name not in weights else ": ".join(place)
        weights[name] = _written(weight, label, steps.get(place), noted.get(place))
    measured = ErrorTable(plan.source, plan.job, plan.recipe.layout, weights)
    return RunReport(tuple(_facts(plan, output, weights)), measured, plan.notes, plan.kept)


def _written(weight: Weight, label: str, step: Step | None, distance: Distance | None) -> Measured:
    """A weight of the output; one that was copied as it was packed has lost nothing."""
    numbers = math.prod(weight.shape)
    dense = numbers * DTYPE_BITS[weight.dtype] // 8
    if step is None or step.format is None:
        return Measured(numbers, 0.0, dense, {label: Loss(0.0, 0.0, weight.nbytes)})
    if distance is None:
        return Measured(numbers, 0.0, dense, {}, {label: UNMEASURED})
    nbytes = sum(info.nbytes for info in step.outputs)
    return Measured(numbers, distance.energy, dense, {label: Loss(distance.error, distance.largest, nbytes)})


def _facts(plan: Plan, output: str, weights: Mapping[str, Measured]) -> Iterator[tuple[str, str]]:
    losses = [(weight, loss) for weight in weights.values() for loss in weight.losses.values()]
    numbers = sum(weight.numbers for weight, _ in losses)
    yield "Source", plan.source
    yield "Output", output
    yield "Formats", f"{plan.recipe.label or DENSE} ({plan.recipe.layout})"
    yield "Size", f"{size(plan.read_bytes)} -> {size(plan.write_bytes)}"
    yield "Quantized", f"{len(weights):,} weights, {sum(weight.numbers for weight in weights.values()):,} numbers"
    if numbers:
        nmse = _ratio([loss.error for _, loss in losses], [weight.energy for weight, _ in losses])
        yield "Bits", f"{8 * sum(loss.nbytes for _, loss in losses) / numbers:.3f} a number, scales included"
        yield "NMSE", f"{nmse:.4e} over all of them"
        yield "SQNR", decibel(sqnr(nmse))
    if missing := sum(bool(weight.barred) for weight in weights.values()):
        yield (
            "Not measured",
            f"{missing:,} weights, {UNMEASURED}; `mso-hub verify OUTPUT --source SOURCE` compares them",
        )
    yield "Made with", f"mso_hub {version('mso-hub')}"


def report_dict(report: RunReport) -> dict[str, Any]:
    """JSON of a report: every weight with its format, what stays and why."""
    return {
        "facts": dict(report.facts),
        "notes": list(report.notes),
        "weights": {
            name: {"format": label, "numbers": weight.numbers, **_quality(weight, label)}
            for name, weight in report.table.weights.items()
            for label in (*weight.losses, *weight.barred)
        },
        "kept": dict(report.kept),
    }


def decibel(value: float) -> str:
    """SQNR as text, `exact` where nothing is lost."""
    return f"{value:.2f} dB" if math.isfinite(value) else "exact"


def _kinds(measured: ErrorTable) -> str:
    rows = [
        (code(row.kind), row.label, f"{row.count:,}", f"{row.bits:.3f}", percent(row.mean), percent(row.worst),
         f"{row.largest:.4g}", decibel(row.sqnr))
        for row in by_kind(measured)
    ]  # fmt: skip
    return table(rows, ("module", "format", "count", "bits", "mean NMSE", "worst NMSE", "max", "SQNR"))


def _each(measured: ErrorTable) -> Iterator[str]:
    """Every weight under every format, the worst first."""
    pairs = [(weight.nmse(label), name, label) for name, weight in measured.weights.items() for label in weight.losses]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    rows = [
        (code(name), label, percent(nmse), f"{measured.weights[name].losses[label].largest:.4g}", decibel(sqnr(nmse)))
        for nmse, name, label in pairs[:SHOWN]
    ]
    yield table(rows, ("weight", "format", "NMSE", "max", "SQNR"))
    if len(pairs) > SHOWN:
        yield f"And {len(pairs) - SHOWN:,} more with smaller errors; the JSON has them all."
    barred = [(code(n), label, plain(why)) for n, w in measured.weights.items() for label, why in w.barred.items()]
    if barred:
        yield table(barred[:SHOWN], ("weight", "format", "no error because"))


DEFINITIONS = (
    "NMSE: sum of squared differences over sum of squares, dequantized against the source; mean and worst are over the "
    "weights of a kind. Max: largest difference. SQNR: -10 log10 of the NMSE over all numbers of the kind."
)


def table_markdown(measured: ErrorTable) -> str:
    """An error table by kind of module, then weight by weight."""
    heads = (f"# Errors of {plain(Path(measured.source).name)}", f"From {code(measured.source)} ({measured.layout}).")
    return "\n\n".join([*heads, _kinds(measured), DEFINITIONS, "## Weight by weight", *_each(measured)]) + "\n"


def report_markdown(report: RunReport) -> str:
    """A report: what it was, errors by kind, what stays and why, notes, then weight by weight."""
    blocks = ["# What quantization did", table([(name, plain(said)) for name, said in report.facts], ("", ""))]
    blocks += ["## By kind of module", _kinds(report.table), DEFINITIONS]
    if report.kept:
        blocks += ["## What stays as it is", _kept(by_reason(report.kept))]
    if report.notes:
        blocks += ["## Notes", "\n".join(f"- {plain(note)}" for note in report.notes)]
    return "\n\n".join([*blocks, "## Weight by weight", *_each(report.table)]) + "\n"


def _kept(kept: Sequence[Kept]) -> str:
    rows = [(plain(entry.reason), f"{entry.count:,}", ", ".join(map(code, entry.kinds))) for entry in kept]
    return table(rows, ("why", "count", "modules"))
