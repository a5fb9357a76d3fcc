"""The model card of an output: where it comes from, what was done to it, what that cost, how to serve it."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

from mso_hub.engine import SAMPLE, Piece
from mso_hub.formats import DENSE
from mso_hub.hub import Origin
from mso_hub.hub.model_card import join_card, split_card
from mso_hub.plan import Plan
from mso_hub.plan.summary import changes, kind_of, size
from mso_hub.source import Source

CARD = "README.md"
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name", "inference")
"""Metadata that is as true of the output as of the source."""
FOREIGN_TAGS = frozenset({
    "compressed-tensors", "modelopt", "nvfp4", "fp8", "mxfp4", "mxfp8", "int4", "int8", "4-bit", "8-bit", "awq",
    "gptq", "w4a16", "w8a8", "vllm", "mso_hub", "bf16",
})  # fmt: skip
"""Tags that speak of how numbers are stored: the source's are not the output's."""
QUALITIES = ("count", "sum", "worst")


@dataclass(frozen=True, slots=True)
class Row:
    """Weights of one kind: bytes before and after, and squared error over squared numbers (mean, worst) if known."""

    kind: str
    becomes: str
    count: int
    before: int | None
    after: int
    mean: float | None = None
    worst: float | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What a card says.

    target    `org/name`, or a folder; `revision` where it is not the default branch
    base      repo id of the source, None when it is not known; `commit` and `endpoint` where it is on a Hub
    label     how the weights are stored: `NVFP4 (W4A16, compressed-tensors)`
    tags      the same in the Hub's words
    before    bytes of all weights in the source, None when it is not known
    measured  how the errors were found
    """

    target: str
    label: str
    tags: tuple[str, ...]
    rows: Sequence[Row]
    after: int
    before: int | None = None
    base: str | None = None
    commit: str | None = None
    endpoint: str | None = None
    quantized: bool = True
    measured: str = ""
    remote_code: bool = False
    revision: str | None = None


class Target(Protocol):
    """The parts of a sink that a card needs."""

    @property
    def name(self) -> str:
        """Address or folder."""

    @property
    def notes(self) -> Mapping[str, float]:
        """Numbers noted by this run and the ones that it continues."""


def note_errors(pieces: Generator[Piece, None, None], note: Callable[[str, float], None]) -> Iterator[Piece]:
    """Pass pieces on; when a shard is about to be complete, note the errors of its kinds of weights.

    Noted before the shard counts as done, so that a resumed run knows the errors of every shard that it keeps.
    """
    found: dict[str, list[float]] = {}
    with closing(pieces):
        for piece in pieces:
            if piece.distance is not None:
                row = found.setdefault(kind_of(piece.step.weight.module), [0, 0.0, 0.0])
                row[0] += 1
                row[1] += piece.distance.nmse
                row[2] = max(row[2], piece.distance.nmse)
            if piece.done and piece.step is piece.shard.steps[-1]:
                for kind, row in found.items():
                    for quality, value in zip(QUALITIES, row, strict=True):
                        note(json.dumps(["error", piece.shard.name, kind, quality]), value)
                found.clear()
            yield piece


def noted_errors(notes: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Kind -> (mean, worst) over all shards."""
    found: dict[str, dict[str, float]] = {}
    for key, value in notes.items():
        if not key.startswith('["error"'):
            continue
        _, _, kind, quality = json.loads(key)
        row = found.setdefault(kind, dict.fromkeys(QUALITIES, 0.0))
        row[quality] = max(row[quality], value) if quality == "worst" else row[quality] + value
    return {kind: (row["sum"] / max(1.0, row["count"]), row["worst"]) for kind, row in found.items()}


def write_card(plan: Plan, source: Source, sink: Target, base_model: str | None = None) -> bytes:
    """README.md for the output of a plan, with the errors that the run noted."""
    errors = noted_errors(sink.notes)
    rows = [
        Row(c.kind, c.becomes, c.count, c.before, c.after, *errors.get(c.kind, (None, None))) for c in changes(plan)
    ]
    files = source.files()
    original = source.read(CARD, 0, files[CARD]).tobytes().decode("utf-8", "replace") if CARD in files else ""
    target, revision = split_name(sink.name)
    recipe = plan.recipe
    facts = Facts(
        target=target,
        label=label_of(recipe.scheme, recipe.layout, activations=recipe.activations),
        tags=tags_of(recipe.scheme, recipe.layout),
        rows=rows,
        after=sum(shard.nbytes for shard in plan.shards),
        before=plan.read_bytes,
        base=base_model or base_of(source.origin, plan.config),
        commit=source.origin.commit if source.origin else None,
        endpoint=source.origin.endpoint if source.origin else None,
        quantized=recipe.scheme != DENSE,
        measured=f"measured while converting, on the first rows of every weight (up to {SAMPLE:,} numbers)",
        remote_code="auto_map" in plan.config,
        revision=revision,
    )
    return render(facts, original).encode()


def label_of(scheme: str, layout: str, *, activations: bool) -> str:
    """`NVFP4 (W4A16, compressed-tensors)`, `BF16`."""
    bits = "W4A4" if activations else "W4A16"
    return scheme.upper() if scheme == DENSE else f"{scheme.upper()} ({bits}, {layout})"


def tags_of(scheme: str, layout: str) -> tuple[str, ...]:
    """How the Hub's users look for it."""
    return (DENSE,) if scheme == DENSE else (scheme, layout, "4-bit", "vllm")


def split_name(name: str) -> tuple[str, str | None]:
    """`hf://org/name@revision` -> (`org/name`, revision); a folder stays as it is."""
    if not name.startswith("hf://"):
        return name, None
    repo, _, revision = name.removeprefix("hf://").partition("@")
    return repo, revision or None


def base_of(origin: Origin | None, config: Mapping[str, Any]) -> str | None:
    """The repo that was converted: the source's own, or the one that config.json remembers."""
    if origin is not None:
        return origin.repo_id
    remembered = config.get("_name_or_path")
    return (
        remembered
        if isinstance(remembered, str) and remembered.count("/") == 1 and remembered[0] not in "./~"
        else None
    )


def metadata_of(facts: Facts, carried: Mapping[str, Any]) -> dict[str, Any]:
    """YAML of the card: what stays true of the source, and what this output is."""
    found = {key: carried[key] for key in CARRIED if carried.get(key) is not None}
    found.setdefault("library_name", "transformers")
    tags = carried.get("tags")
    own = [tag for tag in tags if isinstance(tag, str) and tag not in FOREIGN_TAGS] if isinstance(tags, list) else []
    if facts.base:
        found["base_model"] = facts.base
        if facts.quantized:
            found["base_model_relation"] = "quantized"
    return {**found, "tags": [*own, *facts.tags, "mso_hub"]}


def render(facts: Facts, original: str) -> str:
    """The whole README.md; `original` is the source's, "" when it has none."""
    carried, _ = split_card(original) if original else ({}, "")
    name = facts.target.rstrip("/").rpartition("/")[2]
    link = f"[{facts.base}]({facts.endpoint or 'https://huggingface.co'}/{facts.base})" if facts.base else "its source"
    serve = f"vllm serve {facts.target}" + (f" --revision {facts.revision}" if facts.revision else "")
    serve += " --trust-remote-code" if facts.remote_code else ""
    blocks = [
        f"# {name}",
        f"{link} with its weights stored as {facts.label}. Its own card says what the model is for and how to use it.",
        "## Serve it",
        f"```bash\n{serve}\n```",
        "## What was done",
        _table([
            ("Source", f"{facts.base or 'a folder'}" + (f" at commit `{facts.commit}`" if facts.commit else "")),
            ("Scheme", facts.label),
            ("Weights", _sizes(facts)),
            ("Made with", f"mso_hub {version('mso-hub')}"),
        ], ("", "")),
        _changes(facts),
        "Everything else is as it was in the source.",
    ]  # fmt: skip
    return join_card(metadata_of(facts, carried), "\n\n".join(blocks) + "\n")


def _sizes(facts: Facts) -> str:
    if not facts.before:
        return size(facts.after)
    return f"{size(facts.before)} -> {size(facts.after)} ({facts.after / facts.before:.0%})"


def _changes(facts: Facts) -> str:
    known = any(row.mean is not None for row in facts.rows)
    heads = ("module", "becomes", "count", "before", "after", *(("mean error", "worst error") if known else ()))
    rows = []
    for row in facts.rows:
        errors = (_percent(row.mean), _percent(row.worst)) if known else ()
        rows.append(
            (
                f"`{row.kind}`",
                row.becomes,
                f"{row.count:,}",
                size(row.before) if row.before else "",
                size(row.after),
                *errors,
            )
        )
    said = "Error: sum of squared differences over sum of squares, dequantized against the source; " + facts.measured
    return _table(rows, heads) + (f"\n\n{said}." if known else "")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.4f} %"


def _table(rows: Iterable[Sequence[str]], heads: Sequence[str]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
