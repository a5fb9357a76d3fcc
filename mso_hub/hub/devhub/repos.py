"""Repos on disk: commits are immutable files, everything else of a repo is one small file that is replaced.

FOLDER/repos/KIND/OWNER/NAME/repo.json          facts, refs, discussions
FOLDER/repos/KIND/OWNER/NAME/commits/SHA.json   parent, message, path -> entry
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import re
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mso_hub.hub.devhub.disk import Entry, write_json
from mso_hub.hub.devhub.settings import NAME

KINDS = ("models", "datasets", "spaces")
BRANCH, TAG, PULL = "refs/heads/", "refs/tags/", "refs/pr/"
_SHA = re.compile(r"[0-9a-f]{40}")

Tree = Mapping[str, Entry]


class Refused(Exception):
    """A request that is answered with an HTTP error.

    code     the Hub's X-Error-Code, "" for none
    headers  more of them, as X-Repo-Commit with a missing file
    """

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers or {})


@dataclass(frozen=True, slots=True)
class Commit:
    """What the repo held at one moment; `date` is ISO 8601 in UTC."""

    id: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    tree: Tree


def now() -> str:
    """The time as the Hub writes it."""
    moment = dt.datetime.now(dt.timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def require_path(path: Any) -> str:
    """A file path inside a repo, or a 400."""
    parts = path.split("/") if isinstance(path, str) else [""]
    if any(part in {"", ".", "..", ".git"} for part in parts) or "\0" in path or "\\" in path:
        raise Refused(400, f"{path!r} is not a valid path in a repo")
    return str(path)


def require_ref_name(name: Any) -> str:
    """Name of a branch or tag, or a 400."""
    if not isinstance(name, str) or not re.fullmatch(r"(?!.*\.\.)[\w][\w./+-]{0,200}", name) or name.endswith("/"):
        raise Refused(400, f"Invalid reference name: {name!r}")
    return name


class Repo:
    """One repo. Whoever changes it holds `lock` from the first look to `save`."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder, self.facts = folder, facts
        self.lock = threading.RLock()
        self._load = lru_cache(maxsize=64)(self._read_commit)

    @property
    def id(self) -> str:
        """OWNER/NAME."""
        return str(self.facts["id"])

    @property
    def kind(self) -> str:
        """Models, datasets or spaces, as in the address of the API."""
        return str(self.facts["kind"])

    @property
    def owner(self) -> str:
        """The user or organization it belongs to."""
        return self.id.split("/")[0]

    @property
    def page(self) -> str:
        """Path of its page and of its files: datasets and spaces have a prefix."""
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"

    @property
    def refs(self) -> dict[str, str]:
        """Full name of a ref -> commit."""
        refs: dict[str, str] = self.facts["refs"]
        return refs

    @property
    def discussions(self) -> list[dict[str, Any]]:
        """Discussions and pull requests, number n at position n - 1."""
        found: list[dict[str, Any]] = self.facts["discussions"]
        return found

    def save(self) -> None:
        """Make the changes of refs and facts last."""
        write_json(self.folder / "repo.json", self.facts)

    def ref(self, revision: str) -> str | None:
        """Full name of the ref that a revision names, None for a commit or nothing."""
        for name in (BRANCH + revision, TAG + revision, revision):
            if name in self.refs:
                return name
        return None

    def resolve(self, revision: str) -> str:
        """Commit of a branch, tag, full ref or commit; 404 RevisionNotFound."""
        ref = self.ref(revision)
        if ref is not None:
            return self.refs[ref]
        if _SHA.fullmatch(revision) and (self.folder / "commits" / f"{revision}.json").exists():
            return revision
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, sha: str) -> Commit:
        """A commit by its full id."""
        return self._load(sha)

    def _read_commit(self, sha: str) -> Commit:
        facts = json.loads((self.folder / "commits" / f"{sha}.json").read_bytes())
        tree = {path: Entry(*entry) for path, entry in facts.pop("tree").items()}
        return Commit(id=sha, tree=tree, **facts)

    def history(self, sha: str) -> Iterator[Commit]:
        """A commit and its ancestors."""
        at: str | None = sha
        while at is not None:
            commit = self.commit(at)
            yield commit
            at = commit.parent

    def new_commit(self, tree: Tree, parent: str | None, title: str, message: str, author: str) -> str:
        """Store a commit; no ref moves."""
        facts = {
            "parent": parent, "title": title, "message": message, "author": author, "date": now(),
            "tree": {path: [e.size, e.oid, e.sha256] for path, e in sorted(tree.items())},
        }  # fmt: skip
        digest = hashlib.sha1(json.dumps(facts).encode() + uuid.uuid4().bytes, usedforsecurity=False)
        write_json(self.folder / "commits" / f"{digest.hexdigest()}.json", facts)
        return digest.hexdigest()


class Store:
    """All repos of a server."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "repos"
        self._repos: dict[tuple[str, str], Repo] = {}
        self._lock = threading.RLock()
        for path in self._folder.glob("*/*/*/repo.json"):
            facts = json.loads(path.read_bytes())
            self._repos[facts["kind"], facts["id"]] = Repo(path.parent, facts)

    def find(self, kind: str, repo_id: str) -> Repo | None:
        """A repo, or None."""
        return self._repos.get((kind, repo_id))

    def listed(self, kind: str) -> list[Repo]:
        """Repos of a kind, the newest first."""
        found = [repo for (its_kind, _), repo in list(self._repos.items()) if its_kind == kind]
        return sorted(found, key=lambda repo: (repo.facts["created"], repo.id), reverse=True)

    def create(self, kind: str, repo_id: str, author: str, *, private: bool, attributes: Entry) -> tuple[Repo, bool]:
        """(repo, whether it is new); a new one has a commit with .gitattributes on main, as on the Hub."""
        owner, _, name = repo_id.partition("/")
        if kind not in KINDS or not NAME.fullmatch(owner) or not NAME.fullmatch(name):
            raise Refused(400, f"Invalid repo: {kind} {repo_id!r}")
        with self._lock:
            found = self.find(kind, repo_id)
            if found is not None:
                return found, False
            facts = {
                "id": repo_id, "kind": kind, "private": private, "gated": False, "disabled": False, "granted": [],
                "created": now(), "refs": {}, "messages": {}, "discussions": [],
            }  # fmt: skip
            repo = Repo(self._folder / kind / owner / name, facts)
            first = repo.new_commit({".gitattributes": attributes}, None, "initial commit", "", author)
            repo.refs[BRANCH + "main"] = first
            repo.save()
            self._repos[kind, repo_id] = repo
            return repo, True

    def delete(self, repo: Repo) -> None:
        """Remove a repo; its content stays, other repos may share it."""
        with self._lock, repo.lock:
            del self._repos[repo.kind, repo.id]
            (repo.folder / "repo.json").unlink()  # gone from this moment on
            shutil.rmtree(repo.folder)
