"""mso_hub.json beside a finished checkpoint: made from what, and do its files still have their bytes?"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from mso_hub.events import Hashed, Listener, ignore
from mso_hub.hub import looks_like_repo
from mso_hub.plan.method import Method, read_method
from mso_hub.source import Source

MANIFEST = "mso_hub.json"
CARD = "README.md"
"""The one file that publishers edit: it may change, its digest tells whether it did."""
CHUNK = 8 << 20
COMMIT = re.compile(r"[0-9a-f]{40}")


def read_manifest(source: Source) -> dict[str, Any]:
    """mso_hub.json, {} where there is none or it is no JSON object."""
    files = source.files()
    if MANIFEST not in files:
        return {}
    try:
        content = json.loads(source.read(MANIFEST, 0, files[MANIFEST]).tobytes())
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def bytes_to_hash(source: Source) -> int:
    """Bytes that check_manifest reads: of announced files for which the repo does not vouch itself."""
    files, listed = source.files(), read_manifest(source).get("files")
    names = [name for name in listed if name in files] if isinstance(listed, dict) else []
    return sum(files[name] for name in names if source.sha256(name) is None)


def check_manifest(source: Source, on_event: Listener = ignore) -> tuple[list[str], int]:
    """Files against the SHA-256 of mso_hub.json, where there is one: (problems, files that agree).

    A card that was edited or taken away is no problem, and does not count as a file that agrees.
    """
    files = source.files()
    if MANIFEST not in files:
        return [], 0
    problems, good = [], 0
    try:
        announced = json.loads(source.read(MANIFEST, 0, files[MANIFEST]).tobytes())["files"].items()
        for name, entry in announced:
            if files.get(name) == entry["nbytes"] and sha256_of(source, name, on_event) == entry["sha256"]:
                good += 1
            elif name == CARD:
                continue
            elif files.get(name) != entry["nbytes"]:
                problems.append(f"{name}: had {entry['nbytes']:,} bytes when it was written, found {files.get(name)}")
            else:
                problems.append(f"{name}: its SHA-256 differs from {MANIFEST}; the file changed after it was written")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problems.append(f"{MANIFEST}: not a manifest of this tool ({error!r})")
    return problems, good


def sha256_of(source: Source, name: str, on_event: Listener = ignore) -> str:
    """As the repo vouches for it (the Hub hashes what it stores), else of every byte."""
    known = source.sha256(name)
    if known is not None:
        return known
    digest, size = hashlib.sha256(), source.files()[name]
    for begin in range(0, size, CHUNK):
        end = min(begin + CHUNK, size)
        digest.update(source.read(name, begin, end).data)
        on_event(Hashed(name, end - begin))
    return digest.hexdigest()


def has_foreign_card(source: Source) -> bool:
    """Is there a README.md that this tool did not write, or that was edited since?"""
    if CARD not in source.files():
        return False
    listed = read_manifest(source).get("files")
    entry = listed.get(CARD) if isinstance(listed, dict) else None
    return not isinstance(entry, dict) or entry.get("sha256") != sha256_of(source, CARD)


def is_ours(source: Source) -> bool:
    """Does mso_hub.json say that this tool made the checkpoint?"""
    manifest = read_manifest(source)
    return isinstance(manifest.get("job"), str) and isinstance(manifest.get("recipe"), dict)


def method_of(source: Source) -> Method | None:
    """The method that mso_hub.json names, None where this tool only rounded."""
    return read_method(read_manifest(source).get("method"))


def made_from(source: Source) -> tuple[str, str] | None:
    """(repo id, commit) that a checkpoint was made from, None where mso_hub.json does not tell."""
    manifest = read_manifest(source)
    repo, commit = manifest.get("source"), manifest.get("commit")
    if isinstance(repo, str) and looks_like_repo(repo) and isinstance(commit, str) and COMMIT.fullmatch(commit):
        return repo, commit
    return None


def wrong_source(mine: Source, theirs: Source, differences: Sequence[str]) -> list[str]:
    """One sentence where a checkpoint differs from a source that it was not made from; a copy of it is as good."""
    made, origin = made_from(mine), theirs.origin
    if made is None or not differences or (origin and made == (origin.repo_id, origin.commit)):
        return []
    address = "hf://{}@{}".format(*made)
    given = f"hf://{origin.repo_id}@{origin.commit}" if origin else theirs.name
    return [f"{mine.name}: this checkpoint was made from {address}, not from {given}; verify it against that"]
