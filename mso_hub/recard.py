"""The model card of a finished checkpoint, from what verify finds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mso_hub.card import CARD, Facts, Row, base_of, label_of, render, split_name, tags_of
from mso_hub.errors import VerifyError
from mso_hub.formats import DENSE
from mso_hub.formats.nvfp4 import Nvfp4Decoder
from mso_hub.formats.weight import Weight
from mso_hub.hub import Client, parse_address
from mso_hub.hub.model_card import commit_texts
from mso_hub.plan.summary import kind_of
from mso_hub.source import Source, open_source
from mso_hub.verify import MANIFEST, Opened, Report, like, opening, verify_checkpoint


def make_card(where: str | Path, *, source: str | Path | None = None, base_model: str | None = None) -> bytes:
    """README.md of a finished checkpoint.

    source      where it came from: adds sizes before, the error of every weight, licence and tags
    base_model  repo id, where neither the source nor mso_hub.json tells
    Raises VerifyError when verify finds a problem: a card must not recommend a broken checkpoint.
    """
    report = verify_checkpoint(where, source=source)
    if not report.ok:
        raise VerifyError(
            f"{report.where}: no card for a checkpoint with {len(report.problems)} problems, the first: "
            f"{report.problems[0]}; `mso-hub verify` lists them"
        )
    with ExitStack() as stack:
        mine = stack.enter_context(opening(where))
        theirs = like(stack.enter_context(opening(source)), mine) if source is not None else None
        original = _card_of((theirs or mine).source)
        return render(_facts(mine, theirs, report, base_model), original).encode()


def _card_of(source: Source) -> str:
    files = source.files()
    return source.read(CARD, 0, files[CARD]).tobytes().decode("utf-8", "replace") if CARD in files else ""


def _facts(mine: Opened, theirs: Opened | None, report: Report, base_model: str | None) -> Facts:
    packed = [w for w in mine.weights.values() if w.decoder is not None]
    label, tags = _stored(packed, activations=bool(mine.runtime_scales))
    target, revision = split_name(mine.source.name)
    manifest = _manifest(mine.source)
    origin = theirs.source.origin if theirs else None
    config = (theirs or mine).checkpoint.config
    return Facts(
        target=target,
        label=label,
        tags=tags,
        rows=_rows(mine, theirs, report),
        after=_nbytes(mine),
        before=_nbytes(theirs) if theirs else None,
        base=base_model or manifest.get("source") or base_of(origin, config),
        commit=manifest.get("commit") or (origin.commit if origin else None),
        endpoint=origin.endpoint if origin else None,
        quantized=bool(packed),
        measured="measured by verify on every number",
        remote_code="auto_map" in mine.checkpoint.config,
        revision=revision,
    )


def _stored(packed: Sequence[Weight], *, activations: bool) -> tuple[str, tuple[str, ...]]:
    """(label, tags) of how weights are stored."""
    if not packed:
        return label_of(DENSE, "", activations=False), tags_of(DENSE, "")
    decoder = packed[0].decoder
    if isinstance(decoder, Nvfp4Decoder):
        return label_of("nvfp4", decoder.layout, activations=activations), tags_of("nvfp4", decoder.layout)
    return decoder.name if decoder else "", ("compressed-tensors", "vllm")


def _nbytes(opened: Opened) -> int:
    return sum(info.nbytes for shard in opened.checkpoint.shards.values() for info in shard.tensors)


def _rows(mine: Opened, theirs: Opened | None, report: Report) -> list[Row]:
    """One row for each kind of weight that is packed or has changed."""
    errors = {error.name: error.nmse for error in report.errors}
    kinds: dict[str, list[str]] = {}
    for name, weight in mine.weights.items():
        if weight.decoder is not None or name in errors:
            kinds.setdefault(kind_of(weight.module), []).append(name)
    rows = []
    for kind, names in sorted(kinds.items()):
        first = mine.weights[names[0]]
        found = [errors[n] for n in names if n in errors]
        before = sum(theirs.weights[n].nbytes for n in names if n in theirs.weights) if theirs else None
        becomes = "nvfp4" if isinstance(first.decoder, Nvfp4Decoder) else _name(first)
        after = sum(mine.weights[n].nbytes for n in names)
        quality = (sum(found) / len(found), max(found)) if found else (None, None)
        rows.append(Row(kind, becomes, len(names), before, after, *quality))
    return rows


def _name(weight: Weight) -> str:
    return weight.decoder.name if weight.decoder else weight.dtype


def _manifest(source: Source) -> dict[str, Any]:
    files = source.files()
    if MANIFEST not in files:
        return {}
    try:
        content = json.loads(source.read(MANIFEST, 0, files[MANIFEST]).tobytes())
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def publish_card(where: str | Path, content: bytes) -> str:
    """Put a card into a folder or commit it to a repo, with its digest in mso_hub.json -> where it is to be seen."""
    source = open_source(where)
    try:
        files = {CARD: content}
        manifest = _manifest(source)
        if isinstance(manifest.get("files"), dict):
            manifest["files"][CARD] = {"nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            manifest["files"] = dict(sorted(manifest["files"].items()))
            files[MANIFEST] = (json.dumps(manifest, indent=2) + "\n").encode()
        if source.path is None and source.origin is not None:
            address = parse_address(str(where))
            return commit_texts(Client(), address, source.origin.commit, files, "Model card, written with mso_hub")
    finally:
        source.close()
    return _write(Path(where), files.items())


def _write(folder: Path, files: Iterable[tuple[str, bytes]]) -> str:
    for name, data in files:
        partial = folder / f".{name}.partial"
        partial.write_bytes(data)
        partial.replace(folder / name)
    return str(folder / CARD)
