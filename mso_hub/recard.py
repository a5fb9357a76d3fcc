"""The model card of a finished checkpoint, ours or anybody's, from what verify finds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mso_hub.card import CARD, Facts, Row, constant_scale, read_card, render, repo_of, target_of
from mso_hub.checkpoint import TensorInfo
from mso_hub.errors import HubError, MsoError, RecipeError, SinkError, TransientError, VerifyError
from mso_hub.events import Listener, ignore
from mso_hub.formats import IMPORTED as IMPORTED_SCALE
from mso_hub.formats.detect import quantization_configs
from mso_hub.formats.dialects.modelopt import QUANT_CONFIG_FILE
from mso_hub.formats.scales import read_input_scales
from mso_hub.hub import Address, Client, is_address, looks_like_repo, parse_address
from mso_hub.hub.model_card import commit_card, parse_metadata, require_writable
from mso_hub.plan.calibration import described, read_facts
from mso_hub.plan.evaluation import Evaluation, read_evaluation
from mso_hub.plan.method import FOLDED, read_method
from mso_hub.plan.recipe import Recipe, default_reason
from mso_hub.plan.recipe_file import manifest_settings
from mso_hub.plan.select import is_linear
from mso_hub.plan.summary import Kept, Stored, by_reason, form_of, imported, kind_of, main_dtype, packed_as
from mso_hub.source import Source, open_source
from mso_hub.verify import (
    MANIFEST,
    Opened,
    Report,
    has_foreign_card,
    like,
    made_from,
    opening,
    read_manifest,
    verify_checkpoint,
)
from mso_hub.verify.announced import activation_bits
from mso_hub.verify.manifest import COMMIT

TITLE = "Model card, written with mso_hub"
IMPORTED = ("imported_", "input_amax", "kv_scales")
"""Names of a recipe's fields that hold what came from other checkpoints."""


@dataclass(frozen=True, slots=True)
class NewCard:
    """A card and where it belongs.

    content   README.md
    manifest  mso_hub.json with its digest, None where the checkpoint has none
    commit    of the repo that was verified, None for a folder
    changed   the checkpoint holds another card, or none
    foreign   the card that it holds is not this tool's work, or was edited since
    """

    where: str
    content: bytes
    manifest: bytes | None
    commit: str | None
    changed: bool
    foreign: bool = False


def make_card(
    where: str | Path,
    *,
    source: str | Path | None = None,
    base_model: str | None = None,
    evaluation: str | Path | None = None,
    on_event: Listener = ignore,
) -> NewCard:
    """README.md of a finished checkpoint; nothing is written.

    source      where it came from: adds sizes before, the error of every weight, licence and tags; by default the
                repo and commit of mso_hub.json, where these are known
    base_model  repo id, where neither the source nor mso_hub.json tells
    evaluation  JSON of `mso-hub evaluate` of this checkpoint; RecipeError for another one's
    Raises VerifyError when verify finds a problem (a card must not recommend a broken checkpoint), RecipeError for a
    base model that is no repo id, CheckpointError and HubError when the checkpoint or the source cannot be read.
    """
    base = repo_of(base_model) if base_model else None
    if base is not None and not looks_like_repo(base):
        raise RecipeError(f"base_model: must be the id of a repo on the Hub, like org/name; got {base_model!r}")
    numbers = read_evaluation(evaluation) if evaluation is not None else None
    with ExitStack() as stack:
        ours = stack.enter_context(closing(open_source(where, on_event=on_event)))
        found = _source(ours, source, on_event)
        other = stack.enter_context(closing(found)) if found is not None else None
        report = verify_checkpoint(ours, source=other, on_event=on_event)
        _require_good(report, _guessed(other) if source is None else "")
        mine = stack.enter_context(opening(ours))
        _require_own_numbers(numbers, mine)
        theirs = like(stack.enter_context(opening(other)), mine) if other is not None else None
        manifest = read_manifest(ours)
        content = _card(mine, theirs, report, manifest, base, numbers).encode()
        updated = _updated(manifest, content)
        commit = ours.origin.commit if ours.origin else None
        changed = not _holds(ours, {CARD: content, MANIFEST: updated})
        return NewCard(str(where), content, updated, commit, changed, changed and has_foreign_card(ours))


def _source(ours: Source, given: str | Path | None, on_event: Listener) -> Source | None:
    """The one that was given, else the one that mso_hub.json names, else none."""
    if given is not None:
        return open_source(given, on_event=on_event)
    made = made_from(ours)
    if made is None:
        return None
    address = str(Address(*made))
    try:
        return open_source(address, on_event=on_event)
    except HubError as error:
        kind = TransientError if isinstance(error, TransientError) else HubError
        raise kind(
            f"{address}: {MANIFEST} says that {ours.name} was made from it, but it cannot be read ({error}); "
            "give a copy of it with --source WHERE"
        ) from error


def _guessed(source: Source | None) -> str:
    """What to add to a message about problems with a source that nobody gave."""
    return f"; it was compared with {source.name}, give another one with --source WHERE" if source else ""


def _require_good(report: Report, compared: str) -> None:
    problems = report.problems
    if problems:
        counted = "1 problem" if len(problems) == 1 else f"{len(problems)} problems, the first"
        raise VerifyError(
            f"{report.where}: must be without problems to get a card, found {counted}: {problems[0]}; "
            f"`mso-hub verify` lists all there are{compared}"
        )


def _require_own_numbers(numbers: Evaluation | None, mine: Opened) -> None:
    """RecipeError for an evaluation of another checkpoint."""
    from mso_hub.calibrate.identity import fingerprint

    if numbers and (numbers.tried or numbers.fingerprint != fingerprint(mine.source, mine.checkpoint)):
        raise RecipeError(f"evaluation: is of {numbers.source}, not of this checkpoint as it is; `mso-hub evaluate` it")


def _card(
    mine: Opened, theirs: Opened | None, report: Report, manifest: Mapping[str, Any], base: str | None,
    numbers: Evaluation | None,
) -> str:  # fmt: skip
    """The whole README.md."""
    inputs = _input_scales(mine)
    stored = _stored(mine)
    target, revision = target_of(mine.source.name)
    original = read_card(theirs.source) if theirs else b""
    own = not original
    if own:
        original = read_card(mine.source)
        # A README.md that came along from the source speaks about the source.
        own = not manifest or "mso_hub" in parse_metadata(original).get("tags", [])
    repo, commit, endpoint = _from(theirs, manifest)
    against = f" of {theirs.source.origin.repo_id}" if theirs and theirs.source.origin else ""
    facts = Facts(
        target=target,
        revision=revision,
        stored=stored,
        rows=_rows(mine, theirs, report, inputs),
        kept=_kept(mine) if any(s.layout for s in stored) else (),
        before=sum(weight.nbytes for weight in theirs.weights.values()) if theirs else None,
        after=_size(mine),
        base=base or repo,
        source=repo,
        commit=commit,
        endpoint=endpoint,
        measured=f"by `mso-hub verify` on every number{against}",
        activation=_measured(mine, inputs, manifest) or _activation(mine, inputs),
        remote_code="auto_map" in mine.checkpoint.config,
        text_only=theirs is not None and _architectures(theirs) != _architectures(mine),
        made=bool(manifest),
        exact=theirs is not None and not ((by := read_method(manifest.get("method"))) and by.name in FOLDED),
        own=own,
        files=mine.source.files(),
        packed=_unpacked(mine, theirs, _recipe(manifest)),
        recipe=_recipe(manifest),
        imported=_imported(manifest, inputs),
        evaluation=numbers,
    )
    return render(facts, original)


def _size(mine: Opened) -> int:
    """As a plan counts it: shards, indices and configs."""
    names = {"config.json", QUANT_CONFIG_FILE, *(group.index for group in mine.checkpoint.groups)}
    files = mine.source.files()
    return sum(shard.nbytes for shard in mine.checkpoint.shards.values()) + sum(files.get(n, 0) for n in names if n)


def _unpacked(mine: Opened, theirs: Opened | None, recipe: Recipe | None) -> str:
    """Schemes of the source's packed weights that have another form now; without it, what the recipe tells."""
    if theirs is None:  # decompress refuses a source without packed weights
        return "packed weights" if recipe and recipe.decodes and not recipe.text_only else ""
    pairs = ((weight, mine.weights.get(name)) for name, weight in theirs.weights.items())
    return packed_as(old for old, new in pairs if new is not None and form_of(old) != form_of(new))


def _recipe(manifest: Mapping[str, Any]) -> Recipe | None:
    """As mso_hub.json has it, without what was imported; None where it has none that can be read."""
    said = manifest.get("recipe")
    if not isinstance(said, dict):
        return None
    try:
        known = {key: value for key, value in manifest_settings(said).items() if not key.startswith(IMPORTED)}
        # The number stands for the scales that mso_hub.json leaves out.
        amax = {"": 1.0} if _has_imported_scales(said) else {}
        made = read_facts(manifest.get("calibration"))
        cache = {"": (1.0, 1.0)} if made and not amax and known.get("kv_cache") else {}
        return Recipe(
            **known, input_amax=amax, kv_scales=cache, calibration=made if amax or cache else None,
            by_method=read_method(manifest.get("method")),
        )  # fmt: skip
    except (MsoError, TypeError, ValueError, KeyError):  # of another version: the card does without the line
        return None


def _has_imported_scales(said: Mapping[str, Any]) -> bool:
    rules = [rule.get("scheme") for rule in said.get("rules") or () if isinstance(rule, dict)]
    schemes = [said, *(scheme for scheme in rules if isinstance(scheme, dict))]
    return any(scheme.get("input_scale") == IMPORTED_SCALE for scheme in schemes)


def _imported(manifest: Mapping[str, Any], inputs: Sequence[TensorInfo]) -> list[str]:
    said = manifest.get("recipe")
    said = said if isinstance(said, dict) else {}
    unsaid = said.get("scheme") == "nvfp4" and said.get("input_scale") is None and said.get("activations") is None
    measured = read_facts(manifest.get("calibration")) is not None
    scales = (_has_imported_scales(said) and not measured) or (bool(inputs) and unsaid and not said.get("rules"))
    inside = bool(said.get("rules")) and isinstance(said.get("imported_ignore"), list)
    return imported(scales=scales, ignore=bool(said.get("imported_ignore")) and not inside)


def _architectures(opened: Opened) -> object:
    return opened.checkpoint.config.get("architectures")


def _tensors(opened: Opened) -> Iterator[TensorInfo]:
    return (info for shard in opened.checkpoint.shards.values() for info in shard.tensors)


def _from(theirs: Opened | None, manifest: Mapping[str, Any]) -> tuple[str | None, str | None, str | None]:
    """(repo, commit, endpoint) of the source as mso_hub.json has it, or of the one that was given."""
    origin = theirs.source.origin if theirs else None
    repo, commit = manifest.get("source"), manifest.get("commit")
    endpoint = origin.endpoint if origin else None
    if isinstance(repo, str) and looks_like_repo(repo):
        return repo, commit if isinstance(commit, str) and COMMIT.fullmatch(commit) else None, endpoint
    return (origin.repo_id, origin.commit, endpoint) if origin else (None, None, None)


def _stored(mine: Opened) -> tuple[Stored, ...]:
    """Every form that packed weights have, most bytes first; the main dtype where none is packed."""
    config = next(iter(quantization_configs(mine.checkpoint.config)), {})
    sizes: dict[Stored, int] = {}
    for weight in mine.weights.values():
        if weight.decoder is not None:
            stored = replace(form_of(weight), activation_bits=activation_bits(config, weight.module))
            sizes[stored] = sizes.get(stored, 0) + weight.nbytes
    if not sizes:
        return (Stored(main_dtype([(info.dtype, info.nbytes) for info in _tensors(mine)])),)
    return tuple(sorted(sizes, key=lambda stored: -sizes[stored]))


def _input_scales(mine: Opened) -> list[TensorInfo]:
    """Stored activation scales of weights; scales of a KV cache are none."""
    names = {n for n in mine.runtime_scales if n.rpartition(".")[2] in ("input_scale", "input_global_scale")}
    return [info for info in _tensors(mine) if info.name in names and (info.dtype, info.nbytes) == ("F32", 4)]


def _measured(mine: Opened, inputs: Sequence[TensorInfo], manifest: Mapping[str, Any]) -> str:
    """What mso_hub.json says of a calibration, where there are scales that it can speak of."""
    cache = any(name.endswith((".k_scale", ".v_scale")) for name in mine.runtime_scales)
    facts = manifest.get("calibration")
    if not isinstance(facts, dict) or not (inputs or cache):
        return ""
    return described(facts, inputs=bool(inputs), cache=cache)


def _activation(mine: Opened, inputs: Sequence[TensorInfo]) -> str:
    """Equal scales everywhere were not measured on any text."""
    values = set(read_input_scales(inputs, mine.source.read).values())
    if not values:
        return ""
    return constant_scale(values.pop()) if len(values) == 1 else "as stored, not the same for every module"


def _rows(mine: Opened, theirs: Opened | None, report: Report, inputs: Sequence[TensorInfo]) -> list[Row]:
    """One row for each kind of weight and each form, of those that are packed or have changed."""
    errors = {error.name: error.nmse for error in report.errors}
    scales = {info.name.rpartition(".")[0]: info.nbytes for info in inputs}
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, weight in mine.weights.items():
        if weight.decoder is not None or weight.name in errors:
            kinds.setdefault((kind_of(weight.module), form_of(weight).scheme), []).append(name)
    rows = []
    for key, names in sorted(kinds.items()):
        members = [mine.weights[name] for name in names]
        found = [errors[weight.name] for weight in members if weight.name in errors]
        before = sum(theirs.weights[n].nbytes for n in names if n in theirs.weights) if theirs else None
        after = sum(weight.nbytes + scales.get(weight.module, 0) for weight in members)
        quality = (sum(found) / len(found), max(found)) if found else (None, None)
        rows.append(Row(*key, len(names), before, after, *quality))
    return rows


def _kept(mine: Opened) -> list[Kept]:
    """Dense weights with the reasons that their names give."""
    reasons = {}
    for weight in mine.weights.values():
        if weight.decoder is None:
            linear = default_reason(weight.module) or "in the ignore list of config.json"
            reasons[weight.module] = linear if is_linear(weight) else "not a linear layer's weight"
    return by_reason(reasons)


def _updated(manifest: Mapping[str, Any], content: bytes) -> bytes | None:
    """mso_hub.json with the digest of a new README.md; all else stays as it is."""
    if not manifest:
        return None
    entry = {"nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    files = dict(sorted({**manifest["files"], CARD: entry}.items()))
    return (json.dumps({**manifest, "files": files}, indent=2) + "\n").encode()


def _holds(source: Source, wanted: Mapping[str, bytes | None]) -> bool:
    """Does a repo hold these files already?"""
    files = source.files()
    return all(
        data is None or (files.get(name) == len(data) and source.read(name, 0, len(data)).tobytes() == data)
        for name, data in wanted.items()
    )


def require_place(where: str | Path, *, fresh: bool = False) -> None:
    """Whether a card may be written there, before the long look at the weights.

    fresh  a README.md that this tool did not write, or that was edited since, may be replaced
    Raises SinkError for a folder that is not there or not writable and for such a README.md, RecipeError and HubError
    for a repo that this account may not commit to, for a tag, a commit, or a folder inside a repo.
    """
    if is_address(str(where)):
        require_writable(Client(), parse_address(str(where)))
    elif Path(where).is_dir() and not os.access(where, os.W_OK):
        raise SinkError(f"{where}: the card belongs into this folder, which cannot be written; give --output FILE")
    if not fresh:
        with closing(open_source(where)) as source:
            _require_own(str(where), foreign=has_foreign_card(source))


def _require_own(where: str, *, foreign: bool) -> None:
    if foreign:
        raise SinkError(
            f"{where}: has a {CARD} that mso_hub did not write (or that was edited since); print the card with "
            "--output -, or replace it with --fresh"
        )


def publish_card(card: NewCard, *, fresh: bool = False) -> str:
    """Put a card into its folder, or commit it on top of the commit that was verified -> where it is to be seen.

    README.md and its digest in mso_hub.json change, nothing else does; a card that is there already is left alone.
    fresh  replace a README.md that this tool did not write, or that was edited since
    Raises SinkError for such a README.md and for a folder that cannot be written, HubError when somebody committed to
    the repo meanwhile.
    """
    _require_own(card.where, foreign=card.foreign and not fresh)
    others = {} if card.manifest is None else {MANIFEST: card.manifest}
    if card.commit is not None:
        client, address = Client(), parse_address(card.where)
        if not card.changed:
            return f"{client.endpoint}/{address.repo_id}/commit/{card.commit}"
        return commit_card(client, address, card.commit, card.content, others, TITLE)
    if card.changed:
        _write(Path(card.where), {CARD: card.content, **others})
    return str(Path(card.where) / CARD)


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Each file appears whole, and none before all of them are on the disk."""
    partials = {name: folder / f".{name}.mso-partial" for name in files}
    name = ""
    try:
        for name, data in files.items():
            partials[name].write_bytes(data)
        for name, partial in partials.items():
            partial.replace(folder / name)
    except OSError as error:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
        raise SinkError(f"{folder / name}: cannot be written: {error.strerror}; run the same command") from error
