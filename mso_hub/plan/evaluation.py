"""What an evaluation found, for JSON, tables and model cards: how a checkpoint predicts text, and how like another one.

perplexity   exp of the mean of -log p(next token), over all tokens but the first of each row
KL           mean over all tokens of sum p_ref * (log p_ref - log p), in nats: 0 means the same predictions
agreement    share of all tokens after which both predict the same next token as the most likely one
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mso_hub.errors import RecipeError

KIND = "mso_hub evaluation 1"
"""Kind and version of the file."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The model that the evaluated one was compared with.

    source      repo or name of the folder, at `commit` where it is a repo's, else ""
    kl          nats per token; `kl_error` is the standard error of that mean, from its spread over rows; None for one
    """

    source: str
    commit: str
    perplexity: float
    kl: float
    kl_error: float | None
    agreement: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A checkpoint that predicted some text.

    source       repo or name of the folder, at `commit` where it is a repo's, else ""
    fingerprint  SHA-256 in hex of its config, its tensors' names and samples of its weights
    scheme       how it was quantized for this: as it is stored, or a recipe that was tried without writing it
    activations  how activations were quantized -> number of linear layers; empty where none was
    cache        attention layers whose keys and values were quantized to FP8
    text         what was read: `tokens` token ids in `rows` rows, whose SHA-256 in hex is `sha256`
    dtype        of everything that is not quantized: BF16, F16 or F32
    notes        what a reader of the numbers should know
    tried        a recipe was tried on it without writing its result
    """

    source: str
    commit: str
    fingerprint: str
    scheme: str
    activations: Mapping[str, int]
    cache: int
    text: str
    rows: int
    tokens: int
    sha256: str
    dtype: str
    version: str
    perplexity: float
    reference: Reference | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)
    tried: bool = False

    def as_dict(self) -> dict[str, Any]:
        """JSON."""
        return {"kind": KIND, **asdict(self), "notes": list(self.notes)}


def write_evaluation(found: Evaluation, path: str | Path) -> None:
    """FILE.json, or FILE.md as a table; RecipeError for another ending."""
    where = check_place(path)
    text = markdown(found) if where.suffix == ".md" else json.dumps(found.as_dict(), indent=1) + "\n"
    where.write_text(text, encoding="utf-8")


def check_place(path: str | Path) -> Path:
    """Where numbers are to go; RecipeError for another ending than .json and .md, and where there is no such folder."""
    where = Path(path)
    if where.suffix not in (".json", ".md"):
        raise RecipeError(f"{where}: an evaluation ends in .json or .md, got {where.suffix or 'no ending'!r}")
    if where.is_dir() or not where.absolute().parent.is_dir():
        raise RecipeError(f"{where}: needs the name of a file in a folder that exists, got another one")
    return where


def read_evaluation(path: str | Path) -> Evaluation:
    """What `write_evaluation` wrote as JSON; RecipeError for any other file, OSError for one that cannot be read."""
    data = Path(path).read_bytes()
    try:
        said = json.loads(data)
        return _evaluation(said)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecipeError(
            f"{path}: must be an evaluation of mso_hub (`mso-hub evaluate --output FILE.json`), it cannot be read as "
            f"one: {f'{error!r}':.120}; give another file"
        ) from error


def _evaluation(said: Mapping[str, Any]) -> Evaluation:
    if said["kind"] != KIND:
        raise ValueError(f"it is {said['kind']!r:.80}")
    values = {f.name: said[f.name] for f in fields(Evaluation)}
    compared = values["reference"]
    if compared is not None:
        values["reference"] = Reference(**compared)
        numbers = [compared["perplexity"], compared["kl"], compared["agreement"], compared["kl_error"] or 0.0]
    else:
        numbers = []
    for value in (values["perplexity"], *numbers):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"needs finite numbers, got {value!r:.40}")
    for name in ("source", "commit", "fingerprint", "scheme", "text", "sha256", "dtype", "version"):
        if not isinstance(values[name], str):
            raise TypeError(f"{name} must be text, got {values[name]!r:.40}")
    for name in ("rows", "tokens", "cache"):
        if type(values[name]) is not int:
            raise TypeError(f"{name} must be a whole number, got {values[name]!r:.40}")
    values["activations"] = {str(kind): int(count) for kind, count in values["activations"].items()}
    values["notes"] = tuple(str(note) for note in values["notes"])
    values["tried"] = bool(values["tried"])
    return Evaluation(**values)


def facts(found: Evaluation) -> list[tuple[str, str]]:
    """Pairs of words: what was evaluated, how, and the numbers."""
    rows = [
        ("Evaluated", _where(found.source, found.commit)),
        ("Quantized", found.scheme + (", tried without writing it" if found.tried else "")),
        ("Activations", said_activations(found)),
        ("Text", f"{found.tokens:,} tokens in {found.rows:,} rows of {found.text}"),
        ("Perplexity", f"{found.perplexity:.4f}"),
    ]
    other = found.reference
    if other is not None:
        spread = "" if other.kl_error is None else f" +- {other.kl_error:.5f}"
        rows += [
            ("Compared with", _where(other.source, other.commit)),
            ("Its perplexity", f"{other.perplexity:.4f} ({percent(found.perplexity / other.perplexity - 1)})"),
            ("KL divergence", f"{other.kl:.5f}{spread} nats per token"),
            ("Same first choice", f"{100 * other.agreement:.2f} %"),
        ]
    return rows


def said_activations(found: Evaluation) -> str:
    """`NVFP4 in 112 linear layers; FP8 keys and values in 4 attention layers`."""
    parts = [f"{kind} in {count:,} linear layers" for kind, count in found.activations.items()]
    parts += [f"FP8 keys and values in {found.cache:,} attention layers"] if found.cache else []
    return "; ".join(parts) or "not quantized"


def percent(change: float) -> str:
    """`+0.16 %`."""
    return f"{100 * change:+.2f} %"


def _where(source: str, commit: str) -> str:
    return f"{source} at {commit[:12]}" if commit else source


def markdown(found: Evaluation) -> str:
    """A table, what its rows mean, and notes."""
    from mso_hub.hub.model_card import plain, table

    blocks = [f"# Evaluation of {plain(found.source)}", table([(a, plain(b)) for a, b in facts(found)], ("", ""))]
    blocks.append(DEFINITIONS)
    if found.notes:
        blocks += ["\n".join(f"- {plain(note)}" for note in found.notes)]
    return "\n\n".join(blocks) + "\n"


def card_blocks(found: Evaluation | None) -> list[str]:
    """The part of a model card that speaks of an evaluation; nothing where there is none."""
    from mso_hub.hub.model_card import plain, table

    if found is None:
        return []
    rows = [(name, plain(said)) for name, said in facts(found)[2:]]
    notes = ["\n".join(f"- {plain(note)}" for note in found.notes)] if found.notes else []
    return ["## Evaluation", table(rows, ("", "")), *notes, DEFINITIONS]


def model_index(found: Evaluation | None, name: str) -> dict[str, Any]:
    """`model-index` of a card's metadata, which the Hub reads; {} where there is no evaluation.

    Source: huggingface_hub, repocard_data.py: eval_results_to_model_index.
    """
    if found is None:
        return {}
    metrics: list[dict[str, Any]] = [{"type": "perplexity", "value": round(found.perplexity, 4), "name": "Perplexity"}]
    if found.reference is not None:
        metrics += [
            {"type": "kl_divergence", "value": round(found.reference.kl, 6),
             "name": f"KL divergence from {found.reference.source}, nats per token"},
            {"type": "top1_agreement", "value": round(found.reference.agreement, 6),
             "name": f"Same most likely next token as {found.reference.source}"},
        ]  # fmt: skip
    result = {
        "task": {"type": "text-generation", "name": "Text Generation"},
        "dataset": {
            "name": f"{found.text}: {found.tokens:,} tokens in {found.rows:,} rows",
            "type": found.text.split()[0],
        },
        "metrics": metrics,
    }
    return {"model-index": [{"name": name, "results": [result]}]}


DEFINITIONS = (
    "Perplexity: exp of the mean negative log-likelihood of the next token. KL divergence: of the predictions from "
    "those of the model compared with, mean over all tokens. Same first choice: share of tokens after which both find "
    "the same next token the most likely."
)
