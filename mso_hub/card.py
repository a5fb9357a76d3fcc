"""The model card of an output: where it comes from, what was done to it, what that cost, how to serve it."""

from __future__ import annotations

import shlex
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from mso_hub.engine import SAMPLE, exactness, noted_errors, noted_inexact
from mso_hub.hub import Address, is_address, looks_like_repo, parse_address
from mso_hub.hub.model_card import (
    CARRIED,
    HEAD,
    SENSES,
    STORAGE_TAG,
    Value,
    code,
    default_endpoint,
    join_card,
    parse_metadata,
    plain,
    resolve_link,
    table,
    visible,
)
from mso_hub.plan import Plan, Recipe
from mso_hub.plan.calibration import described
from mso_hub.plan.evaluation import Evaluation, card_blocks, model_index
from mso_hub.plan.method import FOLDED
from mso_hub.plan.steps import CONSTANT_SCALE
from mso_hub.plan.summary import (
    DTYPES,
    Kept,
    Stored,
    by_reason,
    changes,
    command,
    imported,
    main_dtype,
    packed_as,
    percent,
    planned_form,
    serve_words,
    size,
)
from mso_hub.source import Source

CARD = "README.md"
FIRST = f"the first rows of every weight (up to {SAMPLE:,} numbers)"
SHOWN = 8
"""Reasons why modules stay, and kinds of modules for each of them, that a card spells out."""


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

    target       as `vllm serve` takes it: `org/name`, `./folder`; `revision` where it is not on the default branch
    stored       how weights are stored, most bytes first
    base         repo id for `base_model`, None when it is not known
    source       repo that was read, `commit` and `folder` of it, on the Hub at `endpoint`; None for a folder on disk
    before       bytes of all weights in the source, None when it is not known; `after` counts shards, index and configs
    packed       schemes of the source's packed weights that have another form now, "" where there are none
    recipe       how it was made, None when it is not known; `imported` names what of it no command line tells
    measured     how the errors were found
    exactness    how much of what was MXFP4 is NVFP4 without a loss, "" where nothing was
    activation   where activation scales come from, "" where there are none
    made         this tool made the checkpoint; otherwise only the card is its work
    exact        what is not in the table has the bytes of the source
    own          the original card speaks about this very checkpoint, so that all its tags and its base model hold
    files        of the output, for links to a licence
    evaluation   how it predicts text, where that was measured
    """

    target: str
    stored: tuple[Stored, ...]
    rows: Sequence[Row]
    after: int
    kept: Sequence[Kept] = ()
    before: int | None = None
    base: str | None = None
    source: str | None = None
    commit: str | None = None
    endpoint: str | None = None
    measured: str = ""
    exactness: str = ""
    activation: str = ""
    remote_code: bool = False
    revision: str | None = None
    text_only: bool = False
    made: bool = True
    exact: bool = False
    own: bool = False
    files: Container[str] = field(default_factory=tuple)
    packed: str = ""
    recipe: Recipe | None = None
    imported: Sequence[str] = ()
    folder: str = ""
    evaluation: Evaluation | None = None

    @property
    def quantized(self) -> bool:
        """Is any weight packed?"""
        return any(stored.layout for stored in self.stored)

    @property
    def label(self) -> str:
        """All forms."""
        return " and ".join(dict.fromkeys(stored.label for stored in self.stored))

    @property
    def hub(self) -> str:
        """Where links lead."""
        return self.endpoint or default_endpoint()


class Target(Protocol):
    """The parts of a sink that a card needs."""

    @property
    def name(self) -> str:
        """Address or folder."""

    @property
    def notes(self) -> Mapping[str, float]:
        """Numbers noted by this run and the ones that it continues."""


def write_card(
    plan: Plan, source: Source, sink: Target, base_model: str | None = None, *, whole: bool = False
) -> bytes:
    """README.md for the output of a plan, with the errors that the run noted; never raises for what the source says.

    base_model  repo id or address, where the source does not tell; RecipeError for the address of anything but a model
    whole       errors were measured on every number, not on SAMPLE of each weight
    """
    recipe, origin = plan.recipe, source.origin
    target, revision = target_of(sink.name)
    facts = Facts(
        target=target,
        revision=revision,
        stored=_planned(plan),
        rows=_rows(plan, noted_errors(sink.notes)),
        kept=by_reason(plan.kept) if not recipe.decodes else (),
        before=plan.read_bytes,
        after=plan.write_bytes,
        base=repo_of(base_model) if base_model else origin.repo_id if origin else None,
        source=origin.repo_id if origin else None,
        commit=origin.commit if origin else None,
        endpoint=origin.endpoint if origin else None,
        measured="while converting, on " + ("every number" if whole else FIRST),
        exactness=exactness(noted_inexact(plan, sink.notes)),
        activation=_activation(recipe),
        remote_code="auto_map" in plan.config,
        text_only=recipe.text_only,
        exact=recipe.by_method is None or recipe.by_method.name not in FOLDED,
        files={*plan.carried, *plan.files},
        packed=packed_as(step.weight for shard in plan.shards for step in shard.steps),
        recipe=recipe,
        imported=imported(
            scales=bool(recipe.input_amax) and recipe.calibration is None,
            ignore=bool(recipe.imported_ignore and not recipe.rules),
        ),
        folder=parse_address(source.name).folder if is_address(source.name) else "",
    )
    return render(facts, read_card(source)).encode()


def _planned(plan: Plan) -> tuple[Stored, ...]:
    """Every form that quantized weights get, most bytes first; the main dtype where none is quantized."""
    if plan.recipe.decodes:
        sizes = [(info.dtype, info.nbytes) for shard in plan.shards for info in shard.tensors]
        return (Stored(main_dtype(sizes)),)
    found: dict[Stored, int] = {}
    for weight in (weight for members in plan.units.values() for weight in members):
        stored = planned_form(plan.formats[weight.module])
        found[stored] = found.get(stored, 0) + weight.number_bytes
    return tuple(sorted(found, key=lambda stored: -found[stored]))


def _activation(recipe: Recipe) -> str:
    if recipe.calibration is not None:
        facts = recipe.calibration.facts
        return described(facts, inputs=bool(recipe.input_amax), cache=bool(recipe.kv_scales))
    if recipe.input_amax:
        return "imported from another checkpoint, one for each module"
    constants = {r.scheme.input_scale for r in recipe.all_rules if isinstance(r.scheme.input_scale, int | float)}
    if not constants:
        four = (r.scheme.format == "nvfp4" and r.scheme.activations == 4 for r in recipe.all_rules)
        constants = {CONSTANT_SCALE} if any(four) else set()
    return constant_scale(constants.pop()) if len(constants) == 1 else ""


def constant_scale(value: float) -> str:
    """What a card says of one activation scale for all modules."""
    return f"uncalibrated: the constant {value:.6g} for every module"


def _rows(plan: Plan, errors: Mapping[tuple[str, str], tuple[int, float, float]]) -> list[Row]:
    """Errors stand beside what was encoded, and only where every weight of a kind was measured."""
    rows = []
    for change in changes(plan):
        count, *quality = errors.get((change.kind, change.becomes), (0, 0.0, 0.0))
        known = quality if change.encoded and count == change.count else (None, None)
        rows.append(Row(change.kind, change.becomes, change.count, change.before, change.after, *known))
    return rows


def read_card(source: Source) -> bytes:
    """The part of a repo's README.md that can hold metadata, empty when there is none."""
    files = source.files()
    return source.read(CARD, 0, min(files[CARD], HEAD)).tobytes() if CARD in files else b""


def target_of(name: str) -> tuple[str, str | None]:
    """Name of a source or sink -> (what `vllm serve` takes, its `--revision`).

    A folder is named from the folder that holds it: a card travels, the path on this machine does not. A pull request
    is to become a part of the default branch, so it needs no revision.
    """
    if not is_address(name):
        return f"./{Path(name).resolve().name}", None
    address = parse_address(name)
    revision = address.revision
    default = revision in (None, "main") or str(revision).startswith("refs/pr/")
    return address.repo_id, None if default else revision


def repo_of(text: str) -> str:
    """Repo id of what a user gave as a base model: `org/name`, with `hf://` or a revision or as a web address too."""
    if is_address(text):
        return parse_address(text).repo_id
    repo = text.partition("@")[0]
    return repo if looks_like_repo(repo) else text


def metadata_of(facts: Facts, original: bytes) -> dict[str, Value]:
    """YAML of the card: what stays true of the source, and what this output is."""
    carried = parse_metadata(original)
    found: dict[str, Value] = {key: carried[key] for key in CARRIED if key in carried}
    link = found.pop("license_link", None)
    if isinstance(link, str):
        repo, revision = facts.source or facts.base, facts.commit or "main"
        kept = resolve_link(link, here=facts.files, endpoint=facts.hub, repo=repo, revision=revision)
        found |= {"license_link": kept} if kept else {}
    if facts.text_only and found.get("pipeline_tag") in SENSES:
        found["pipeline_tag"] = "text-generation"
    library = found.setdefault("library_name", "transformers")
    if not facts.own and STORAGE_TAG.fullmatch(str(library)):
        found["library_name"] = "transformers"
    own = carried if facts.own else {}
    if base := facts.base or own.get("base_model"):
        found["base_model"] = base
        relation = "quantized" if facts.quantized else None if facts.base else own.get("base_model_relation")
        found |= {"base_model_relation": relation} if relation else {}
    found["tags"] = _tags(facts, carried.get("tags", []))
    return {key: found[key] for key in (*CARRIED, "base_model", "base_model_relation", "tags") if key in found}


def _tags(facts: Facts, tags: Iterable[str]) -> list[str]:
    """The source's where they are still true, then the scheme's, each once."""
    senses = SENSES if facts.text_only else frozenset[str]()
    added = [tag for stored in facts.stored for tag in stored.tags] + (["mso_hub"] if facts.made else [])
    kept = [tag for tag in tags if tag.lower() not in senses and tag not in added]
    if not facts.own or facts.made:
        kept = [tag for tag in kept if not STORAGE_TAG.fullmatch(tag)]
    return list(dict.fromkeys([*kept, *added]))


def render(facts: Facts, original: bytes) -> str:
    """The whole README.md; `original` is the source's, empty when it has none. Never raises for what it holds."""
    metadata = metadata_of(facts, original)
    named = facts.base or facts.source or metadata.get("base_model")
    base = named if isinstance(named, str) else None
    serve = serve_words(facts.target, facts.revision, facts.stored, facts.recipe, base)
    serve += ["--trust-remote-code"] if facts.remote_code else []
    blocks = [
        f"# {plain(facts.target.rpartition('/')[2])}",
        _intro(facts, _link(facts, base) if base else None),
        "## Serve it",
        f"```bash\n{visible(shlex.join(serve))}\n```",
        "## How it was made" if facts.made else "## How it is stored",
        table(_summary(facts), ("", "")),
        *_changes(facts),
        *_kept(facts),
        *card_blocks(facts.evaluation),
    ]
    index = model_index(facts.evaluation, facts.target.rpartition("/")[2])
    return join_card({**metadata, **index}, "\n\n".join(blocks) + "\n")


def _intro(facts: Facts, link: str | None) -> str:
    what = f"The language model of {link or 'a multimodal model'}, without vision and audio parts; its weights are"
    if not facts.text_only:
        what = f"{link} with its weights" if link else "A checkpoint with its weights"
    more = f" The card of {link} says what the model is for and how to use it." if link else ""
    lost = f" The source was quantized ({facts.packed}): what that lost is not restored here." if facts.packed else ""
    trained = " The weights were not trained any further." if facts.made else ""
    return f"{what} stored as {facts.label}.{trained}{lost}{more}"


def _summary(facts: Facts) -> list[tuple[str, str]]:
    """Rows of the first table, those that have something to say."""
    source = _link(facts, facts.source) if facts.source else "a folder"
    commit = f" at commit `{facts.commit}`" if facts.source and facts.commit else ""
    packed = [stored for stored in facts.stored if stored.layout]
    by = f"mso_hub {version('mso-hub')}"
    sizes = f"{size(facts.before)} -> {size(facts.after)} ({facts.after / facts.before:.0%})" if facts.before else ""
    rows = [
        ("Source", source + commit if facts.made or facts.source else ""),
        ("Scheme", "; ".join(dict.fromkeys(f"{s.scheme.upper()}, {s.short}" for s in packed)) or facts.label),
        ("Layout", ", ".join(dict.fromkeys(stored.layout for stored in packed))),
        ("Method", facts.recipe.by_method.sentence if facts.recipe and facts.recipe.by_method else ""),
        ("Activation scale", facts.activation),
        ("MXFP4 to NVFP4", facts.exactness),
        ("Size", sizes or size(facts.after)),
        ("Command", _command(facts)),
        ("Made with" if facts.made else "Card written with", by),
    ]
    return [row for row in rows if row[1]]


def _command(facts: Facts) -> str:
    """What makes it again, and what of the recipe that line cannot tell."""
    if facts.recipe is None:
        return ""
    source = str(Address(facts.source, facts.commit, facts.folder)) if facts.source else ""
    target = facts.target if facts.target.startswith("./") else str(Address(facts.target, facts.revision))
    line = command(facts.recipe, shlex.quote(source) if source else "FOLDER", shlex.quote(target))
    python = [f"dtype {facts.recipe.dtype}"] if not facts.recipe.decodes and facts.recipe.dtype != "BF16" else []
    unsaid = " and ".join([*facts.imported, *python])
    return code(line) + (f" (with {unsaid})" if unsaid else "")


def _changes(facts: Facts) -> Iterator[str]:
    """Table of what is packed or was converted, how its errors were found, and a word about the rest."""
    columns = {
        "module": [code(row.kind) for row in facts.rows],
        "stored as": [DTYPES.get(row.becomes, row.becomes) for row in facts.rows],
        "count": [f"{row.count:,}" for row in facts.rows],
        "before": [size(row.before) if row.before else "" for row in facts.rows],
        "after": [size(row.after) for row in facts.rows],
        "mean error": [percent(row.mean) for row in facts.rows],
        "worst error": [percent(row.worst) for row in facts.rows],
    }
    known = {head: cells for head, cells in columns.items() if any(cells)}
    if facts.rows:
        yield table(list(zip(*known.values(), strict=True)), list(known))
    if "mean error" in known:
        yield (
            "Errors are sums of squared differences over sums of squares of the source's numbers, once the weights "
            f"are dequantized: mean and worst over the weights of a kind. They were measured {facts.measured}."
        )
    if facts.exact:
        yield f"{'Everything else' if facts.rows else 'Every tensor'} has the bytes of the source."


def _kept(facts: Facts) -> Iterator[str]:
    """What was not quantized and why, in a few lines."""
    if not facts.kept:
        return
    yield "Not quantized:"
    rows = [(plain(kept.reason), f"{kept.count:,}", _some(kept.kinds)) for kept in facts.kept[:SHOWN]]
    rest = facts.kept[SHOWN:]
    more = [(f"{len(rest):,} other reasons", f"{sum(kept.count for kept in rest):,}", "")] if rest else []
    yield table([*rows, *more], ("why", "count", "modules"))


def _some(kinds: Sequence[str]) -> str:
    more = f" and {len(kinds) - SHOWN // 2:,} more" if len(kinds) > SHOWN // 2 else ""
    return ", ".join(map(code, kinds[: SHOWN // 2])) + more


def _link(facts: Facts, repo: str) -> str:
    return f"[{plain(repo)}]({facts.hub}/{quote(repo, safe='/')})"
