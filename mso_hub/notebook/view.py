"""What other calls of the package return, as a cell shows it: `view(mso_hub.prove(dst))`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mso_hub.assess import Choice
from mso_hub.calibrate.statistics import Statistics
from mso_hub.checkpoint import Checkpoint
from mso_hub.display import inspect_dict
from mso_hub.errors import MsoError, RecipeError
from mso_hub.formats import DENSE
from mso_hub.generation import GenerationReport
from mso_hub.losses import ErrorTable, by_kind, decibel, sqnr
from mso_hub.notebook.heat import banded, ranges_of
from mso_hub.notebook.panes import Bars, Command, Heading, Line, Link, Pane, Part, Picture, Table, clean, wrap
from mso_hub.notebook.plot import draw_evaluations, draw_formats, draw_ranges, has_matplotlib, png
from mso_hub.notebook.report import grid
from mso_hub.plan.evaluation import Evaluation, facts
from mso_hub.plan.summary import percent, size
from mso_hub.recard import NewCard
from mso_hub.serving import Served
from mso_hub.smoke import ShapeReport
from mso_hub.verify import Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 12
"""Rows of differences, problems and notes."""
WORST = 5
WIDE = 11
"""Characters of a column whose name has several parts."""
ACROSS = 4
"""Formats beside each other."""
FENCE = "---\n"


@dataclass(frozen=True, slots=True)
class Total:
    """A format over all weights that it can hold.

    bits   stored for a number, scales included
    share  of the bytes that the same weights take now
    nmse   sum of squared differences over sum of squares
    worst  of one weight
    """

    label: str
    count: int
    nbytes: int
    bits: float
    share: float
    nmse: float
    worst: float


class MarkdownPane:
    """Markdown as pages render it; its source, wrapped, as text."""

    def __init__(self, markdown: str) -> None:
        self.markdown = markdown

    def __str__(self) -> str:
        return "\n".join(piece for line in self.markdown.splitlines() for piece in wrap(line, 80))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/markdown": self.markdown, "text/plain": str(self)}


def view(thing: object) -> Pane | MarkdownPane:
    """What other calls return, for a cell: Checkpoint, ErrorTable, Choice, Comparison, ShapeReport, GenerationReport,
    Served, NewCard, Statistics, Evaluation, or an error.

    A dict of names and Evaluations is a table of them. A string is the address of a page: a link.

    Jupyter shows the result by itself, `print` as text of 80 columns. RecipeError for anything else; Job, its plan and
    its report show themselves.
    """
    if isinstance(thing, NewCard):
        return _card(thing)
    for kind, parts in PARTS.items():
        if isinstance(thing, kind):
            return Pane(parts(thing))
    raise RecipeError(
        f"view: must be one of {', '.join(kind.__name__ for kind in PARTS)}, NewCard, got {type(thing).__name__}"
    )


def totals(table: ErrorTable) -> list[Total]:
    """Every format of a table over all weights, in the order in which they were asked for."""
    found = []
    for label in table.labels:
        held = [(weight, weight.losses[label]) for weight in table.weights.values() if label in weight.losses]
        if not held:
            continue
        nbytes = sum(loss.nbytes for _, loss in held)
        energy = math.fsum(weight.energy for weight, _ in held)
        error = math.fsum(loss.error for _, loss in held)
        found.append(Total(
            label, len(held), nbytes, 8 * nbytes / max(1, sum(weight.numbers for weight, _ in held)),
            nbytes / max(1, sum(weight.dense for weight, _ in held)), error / energy if energy else 0.0,
            max(weight.nmse(label) for weight, _ in held),
        ))  # fmt: skip
    return found


def plot_formats(table: ErrorTable) -> Figure:
    """Bits against error of every format, and sizes, as a matplotlib Figure.

    Raises RecipeError without matplotlib, and for a table in which no format holds any weight.
    """
    found = totals(table)
    if not found:
        raise RecipeError(f"{table.source}: none of {', '.join(table.labels) or 'no formats'} holds any weight")
    if not has_matplotlib():
        raise RecipeError("a picture needs matplotlib: pip install 'mso-hub[notebook]'; view(table) has it as text")
    return draw_formats([(t.label, t.bits, t.nmse, t.nbytes) for t in found], table.source)


def _checkpoint(checkpoint: Checkpoint) -> Iterator[Part]:
    facts = inspect_dict(checkpoint)
    named = facts["architectures"]
    architectures = ", ".join(map(str, named)) if isinstance(named, list) else str(named or "no architecture")
    said = ", ".join(" ".join(map(str, q.values())) for q in facts["quantization"]) or "none announced"
    yield Heading(f"{checkpoint.name}: {architectures}, quantization: {said}")
    dtypes = [(d, f"{v['tensors']:,}", size(v["nbytes"])) for d, v in facts["dtypes"].items()]
    yield Table(("dtype", "tensors", "size"), dtypes)
    shards = [(name, f"{s['tensors']:,}", size(s["nbytes"])) for name, s in facts["shards"].items()]
    yield Table(("shard", "tensors", "size"), shards, f"{len(shards):,} shards")


def _errors(table: ErrorTable) -> Iterator[Part]:
    yield Heading(f"{table.source}: {len(table.weights):,} weights in {len(table.labels)} formats ({table.layout})")
    found = totals(table)
    if found and has_matplotlib():
        yield Picture(png(plot_formats(table)), "bits a number against error, and sizes; the tables say the same")
    rows = [
        (t.label, f"{t.count:,}", f"{t.bits:.2f}", size(t.nbytes), percent(t.nmse), percent(t.worst),
         decibel(sqnr(t.nmse)))
        for t in found
    ]  # fmt: skip
    yield Table(("format", "weights", "bits", "size", "error", "worst", "SQNR"), rows)
    yield Bars([(t.label, t.share, f"{100 * t.share:.0f} % of its bytes now") for t in found])
    yield from _by_kind(table, [t.label for t in found])
    reasons = sorted({(label, why) for weight in table.weights.values() for label, why in weight.barred.items()})
    yield from (Line(f"{label}: {why}", "not in") for label, why in reasons[:SHOWN])


def _by_kind(table: ErrorTable, labels: Sequence[str]) -> Iterator[Part]:
    """Mean errors, kinds of weights down and formats across, as many tables as 80 columns need."""
    means = {(row.kind, row.label): row.mean for row in by_kind(table)}
    kinds = dict.fromkeys(kind for kind, _ in means)
    for at in range(0, len(labels), ACROSS):
        some = labels[at : at + ACROSS]
        rows = [(kind, *(percent(means.get((kind, label))) for label in some)) for kind in kinds]
        yield Table(("weights", *some), rows, f"mean error by kind of weight: {', '.join(some)}")


def _choice(choice: Choice) -> Iterator[Part]:
    first, *rest = choice.summary.splitlines()
    yield Heading(first)
    yield from (Line(line) for line in rest)
    yield from (Line(note, "note") for note in choice.notes[:SHOWN])
    if len(choice.notes) > SHOWN:
        yield Line(f"and {len(choice.notes) - SHOWN:,} more: choice.notes")


def _comparison(found: Comparison) -> Iterator[Part]:
    yield Heading(f"{found.common:,} weights in both, {found.identical:,} of them equal byte for byte")
    for label, name, only in zip("AB", found.names, found.only, strict=True):
        yield Line(f"{name}; {len(only):,} weights only here", label)
    worst = [(e.name.removesuffix(".weight"), e.stored, percent(e.nmse)) for e in found.errors[:SHOWN]]
    yield Table(("largest differences, B against A", "B stored as", "error"), worst)


def _shapes(report: ShapeReport) -> Iterator[Part]:
    facts = f"{report.architecture}, {report.tensors:,} tensors, asked vLLM {report.vllm} in {report.seconds:.0f} s"
    yield Heading(f"{report.name}: {facts}")
    if report.refused is not None:
        yield Line(report.refused.message, "PROBLEM")
    rows = [
        (world.label, size(max(world.rank_bytes)) if world.rank_bytes else "",
         "no, see below" if world.problems else "every tensor on every rank")
        for world in report.worlds
    ]  # fmt: skip
    yield Table(("size", "a rank", "loads"), rows)
    for world in report.worlds:
        for problem in world.problems[:SHOWN]:
            where = problem.tensor or problem.parameter
            yield Line(f"{world.label}: {f'{where}: ' if where else ''}{problem.message}", "PROBLEM")


def _generation(report: GenerationReport) -> Iterator[Part]:
    yield Heading(f"{report.name}: vLLM {report.vllm} on {report.device}, in {report.seconds:.0f} s")
    yield from (Line(problem, "PROBLEM") for problem in report.problems)
    if not report.dense:
        rule = "must equal them in BF16" if report.weight_only else "may differ from BF16: activations are quantized"
        yield Line(f"its weights against the same in {DENSE.upper()}; {rule}")
    rows = [
        (str(at), f"{pair.output.nll:.4f}", f"{pair.reference.nll:.4f}",
         "the same" if pair.output.tokens == pair.reference.tokens else "others")
        for at, pair in enumerate(report.pairs, 1)
    ]  # fmt: skip
    yield Table(("prompt", "nats a token", "in BF16", "tokens"), rows)
    yield from (Line(kernel, "kernel") for kernel in report.kernels)


def _served(served: Served) -> Iterator[Part]:
    yield Heading(f"{served.where} on {served.gpu.name}, {served.gpu.memory:g} GiB")
    rows = [
        (v.found.form, "experts" if v.found.experts else "linear layers", f"{v.found.count:,}", size(v.found.nbytes),
         "refused" if v.refused else f"{v.kernel.how}: {v.kernel.name}" if v.kernel else "unknown")
        for v in served.verdicts
    ]  # fmt: skip
    yield Table(("format", "used for", "count", "size", "kernel"), rows)
    yield from (Line(f"{v.found.form}: {v.refused}", "refused") for v in served.verdicts if v.refused)
    yield from (Line(f"TP {rank.tp}: {reason}", "cut") for rank in served.ranks for reason in rank.reasons[:3])
    yield from (Line(note, "note") for note in served.notes[:SHOWN])
    yield Command(served.command) if served.command else Line("no size can be served on this GPU", "PROBLEM")


def _statistics(statistics: Statistics) -> Iterator[Part]:
    from mso_hub.calibrate.scales import by_module, shared_amax

    made = statistics.provenance
    heat = ranges_of(statistics)
    yield Heading(f"{made.where}: {len(statistics.amax):,} modules, {made.tokens:,} tokens of {made.text}")
    if has_matplotlib():
        yield Picture(png(draw_ranges(heat, "")), "largest magnitudes by layer and projection; the tables say the same")
    title = "largest |x| that entered, by layer and projection"
    yield from grid(banded(heat, merge=max), title, "{:.3g}".format, WIDE)
    largest = sorted(statistics.amax.items(), key=lambda entry: -entry[1])[:WORST]
    rows = [(module, f"{value:.4g}", f"{statistics.tokens[module]:,}") for module, value in largest]
    yield Table(("module", "largest |x|", "tokens"), rows, "the largest")
    yield from (Line(note, "note") for note in shared_amax(statistics)[1].notes(by_module(statistics)[0]))


def _evaluation(found: Evaluation) -> Iterator[Part]:
    first, *rest = facts(found)
    yield Heading(f"{first[1]}: {found.scheme}")
    yield Table(("what", "found"), rest)
    yield from (Line(note, "note") for note in found.notes)


def _evaluations(found: Mapping[str, Any]) -> Iterator[Part]:
    wrong = next((value for value in found.values() if not isinstance(value, Evaluation)), None)
    if not found or wrong is not None:
        got = "an empty dict" if not found else f"one of {type(wrong).__name__}"
        raise RecipeError(f"view: a dict must be of names and Evaluations, got {got}")
    texts = {(one.text, one.tokens, one.sha256) for one in found.values()}
    told = [f"{tokens:,} tokens of {text}" for text, tokens, _ in texts]
    yield Heading(f"{len(found):,} evaluations on {told[0]}" if len(texts) == 1 else f"{len(found):,} evaluations")
    if len(texts) > 1:
        yield Line("the texts differ, so these numbers cannot be compared", "note")
    against = {name: one.reference for name, one in found.items() if one.reference is not None}
    if against and has_matplotlib():
        rows = [(name, max(0.0, other.kl), other.kl_error, other.agreement) for name, other in against.items()]
        yield Picture(png(draw_evaluations(rows, "")), "KL divergence and equal first choices; the table says the same")
    table = [
        (name, f"{other.kl:.5f}" if other else "", f"{other.kl_error:.5f}" if other and other.kl_error else "",
         f"{100 * other.agreement:.2f} %" if other else "", f"{one.perplexity:.4f}")
        for name, one in found.items() for other in [one.reference]
    ]  # fmt: skip
    yield Table(("scheme", "KL", "+-", "same choice", "perplexity"), table)
    others = {(other.source, f"{other.perplexity:.4f}") for other in against.values()}
    yield from (Line(f"{where}, whose perplexity is {perplexity}", "against") for where, perplexity in sorted(others))


def _error(error: MsoError) -> Iterator[Part]:
    first, *rest = str(error).splitlines()
    yield Heading(f"{type(error).__name__}: {first}")
    yield from (Line(line.strip()) for line in rest)


def _address(url: str) -> Iterator[Part]:
    yield Link(url)


def _card(card: NewCard) -> MarkdownPane:
    """The metadata in front as a block of YAML: pages take it for a line and a heading."""
    text = card.content.decode()
    head, between, rest = text.removeprefix(FENCE).partition(f"\n{FENCE}")
    if not text.startswith(FENCE) or not between:
        return MarkdownPane(text)
    lines = "\n".join(clean(line) for line in head.splitlines())
    return MarkdownPane(f"```yaml\n{lines}\n```\n{rest}")


PARTS: dict[type, Callable[[Any], Iterator[Part]]] = {
    Checkpoint: _checkpoint, ErrorTable: _errors, Choice: _choice, Comparison: _comparison, ShapeReport: _shapes,
    GenerationReport: _generation, Served: _served, Statistics: _statistics, Evaluation: _evaluation,
    dict: _evaluations, MsoError: _error, str: _address,
}  # fmt: skip
