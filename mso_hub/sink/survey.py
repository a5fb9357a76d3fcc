"""What lies at the target already: nothing, our finished output, another job's, or somebody's files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mso_hub.errors import SinkError
from mso_hub.hub import RemoteFile
from mso_hub.sink.journal import Entry

MANIFEST = "mso_hub.json"
NEUTRAL = frozenset({".gitattributes", ".gitignore", "LICENSE", "README.md"})
"""Files that a repo may have and still counts as empty."""
EDITABLE = frozenset({"LICENSE", "README.md"})
"""Files that people improve on the website after a run; that makes the output no other one."""
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf", ".pt", ".pth")
STALE = (".safetensors", ".safetensors.index.json")
"""Weights that a proposal takes out of the way, because readers would load them instead."""


@dataclass(frozen=True, slots=True)
class Survey:
    """The target at one commit.

    inherited  everything there also lies on the default branch, or stays there: it may be replaced
    manifest   mso_hub.json of an earlier output, {} without one
    proposal   it is a pull request
    """

    name: str
    commit: str
    files: Mapping[str, RemoteFile] = field(default_factory=dict)
    inherited: bool = False
    manifest: Mapping[str, Any] = field(default_factory=dict)
    proposal: bool = False

    @property
    def elsewhere(self) -> str:
        """Ways out that replace nothing."""
        if self.proposal:
            return "close this pull request, and the same command opens a new one"
        return "choose another repo, write to a branch of its own with --branch, or propose it with --create_pr"

    @property
    def finished(self) -> str | None:
        """Job of a finished output."""
        job = self.manifest.get("job")
        return job if isinstance(job, str) else None

    @property
    def listed(self) -> Mapping[str, Any]:
        """Files of the manifest."""
        files = self.manifest.get("files")
        return files if isinstance(files, Mapping) else {}

    def require_room(self, job: str, *, fresh: bool) -> None:
        """SinkError when something lies there that this run must not replace."""
        if self.inherited:
            return
        elsewhere = self.elsewhere
        if self.finished is None:
            foreign = sorted(self.files.keys() - NEUTRAL)
            if foreign:
                more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
                raise SinkError(
                    f"{self.name}: the output must be an empty repo or branch, found {foreign[0]}{more} that "
                    f"{'are' if more else 'is'} not of this tool; {elsewhere}"
                )
            return
        if not fresh:
            raise SinkError(
                f"{self.name}: holds a finished run with another source or other settings (job {self.finished[:12]}, "
                f"this one is {job[:12]}); {elsewhere}, or replace it with --fresh"
            )
        foreign = sorted(path for path in self.files.keys() - self.listed.keys() if path.endswith(WEIGHTS))
        if foreign:
            raise SinkError(
                f"{self.name}: --fresh replaces what this tool wrote, and {foreign[0]} is not of it; {elsewhere}"
            )

    def stale(self, written: Mapping[str, object]) -> list[str]:
        """Files that the new output replaces without writing them."""
        old = self.files.keys() & self.listed.keys()
        if self.inherited:
            old |= {path for path in self.files if path.endswith(STALE)}
        return sorted(old - written.keys() - {MANIFEST})

    def entries(self, sizes: Mapping[str, int]) -> dict[str, Entry]:
        """Files of our finished output; SinkError when the repo does not hold what the manifest says."""
        try:
            entries = {n: Entry(int(self.listed[n]["nbytes"]), str(self.listed[n]["sha256"])) for n in sizes}
        except (ValueError, KeyError, TypeError) as error:
            raise SinkError(
                f"{self.name}/{MANIFEST}: must list all {len(sizes)} files of the output, it does not ({error!r}); "
                "start over with --fresh"
            ) from error
        for name, found in self._differences(entries):
            raise SinkError(
                f"{self.name}/{name}: the finished output had {entries[name].nbytes:,} bytes there, found {found}; "
                "restore it, or start over with --fresh"
            )
        return entries

    def _differences(self, entries: Mapping[str, Entry]) -> Iterator[tuple[str, str]]:
        for name in entries.keys() - EDITABLE:
            file, entry = self.files.get(name), entries[name]
            if file is None:
                yield name, "none"
            elif file.nbytes != entry.nbytes:
                yield name, f"{file.nbytes:,}"
            elif file.sha256 is not None and file.sha256 != entry.sha256:
                yield name, "others"

    def require_same(self, name: str, entry: Entry, sha256: str) -> None:
        """SinkError when a small file of the finished output has other bytes."""
        if sha256 != entry.sha256:
            raise SinkError(
                f"{self.name}/{name}: the finished output had {entry.nbytes:,} bytes there, found others; "
                "restore it, or start over with --fresh"
            )

    def changes(self, new: Survey) -> list[str]:
        """Paths that differ between this commit and a later one."""
        paths = sorted(self.files.keys() | new.files.keys())
        return [path for path in paths if self.files.get(path) != new.files.get(path)]


def collides(path: str) -> bool:
    """Would this file, new in the repo, make a different checkpoint of it?"""
    return path.endswith((*WEIGHTS, "config.json")) or path == MANIFEST


def parse_manifest(content: bytes) -> dict[str, Any]:
    """mso_hub.json; {} when it is not one."""
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("job"), str) else {}
