"""Small questions to the Hub about one repo, and its branches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any
from urllib.parse import quote

from mso_hub.hub.client import Client
from mso_hub.hub.repository import RemoteFile

PATHS = 500
"""Paths per request; the Hub takes 1000."""

HISTORY = 1000
"""Commits of a branch that are looked through."""


def is_private(client: Client, repo: str) -> bool | None:
    """May only some see the repo? None where there is no such repo, as far as this account may know."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    def once() -> bool | None:
        try:
            return bool(client.api.model_info(repo).private)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return None

    return client.attempt(once, what=f"hf://{repo}")


def head_of(client: Client, repo: str, revision: str) -> str:
    """Commit that a branch or pull request is at."""
    info = client.attempt(lambda: client.api.model_info(repo, revision=revision), what=f"hf://{repo}@{revision}")
    return str(info.sha)


def is_commit_of(client: Client, repo: str, commit: str, branch: str) -> bool:
    """Is the commit part of a branch's history?"""
    if head_of(client, repo, branch) == commit:
        return True

    def once() -> bool:
        listed: Any = client.api.list_repo_commits(repo, revision=branch)
        return any(found.commit_id == commit for found in islice(listed, HISTORY))

    return client.attempt(once, what=f"hf://{repo}@{branch}")


def paths_info(client: Client, repo: str, paths: Sequence[str], commit: str) -> dict[str, RemoteFile]:
    """What a commit holds at some paths; those that it does not have are left out."""
    from huggingface_hub.hf_api import RepoFile

    found = {}
    for begin in range(0, len(paths), PATHS):
        some = list(paths[begin : begin + PATHS])

        def once(some: list[str] = some) -> list[Any]:
            return list(client.api.get_paths_info(repo, some, revision=commit))

        for entry in client.attempt(once, what=f"hf://{repo}@{commit[:12]}"):
            if isinstance(entry, RepoFile):
                sha256 = entry.lfs.sha256 if entry.lfs else None
                found[entry.path] = RemoteFile(entry.path, entry.size, entry.blob_id, sha256, entry.xet_hash)
    return found


def read_small(client: Client, repo: str, path: str, commit: str) -> bytes | None:
    """A whole file of a commit, None where there is none."""
    from huggingface_hub.errors import RemoteEntryNotFoundError
    from huggingface_hub.utils import get_session, hf_raise_for_status

    url = f"{client.endpoint}/{repo}/resolve/{commit}/{quote(path)}"

    def once() -> bytes | None:
        response = get_session().get(url, headers=client.headers(), follow_redirects=True)
        try:
            hf_raise_for_status(response)
        except RemoteEntryNotFoundError:
            return None
        return bytes(response.content)

    return client.attempt(once, what=f"hf://{repo}/{path}")


def refs(client: Client, repo: str) -> tuple[set[str], set[str]]:
    """(branches, tags)."""
    found = client.attempt(lambda: client.api.list_repo_refs(repo), what=f"hf://{repo}")
    return {branch.name for branch in found.branches}, {tag.name for tag in found.tags}


def create_branch(client: Client, repo: str, branch: str) -> None:
    """From the head of the default branch; one that is there already is left alone."""
    client.attempt(lambda: client.api.create_branch(repo, branch=branch, exist_ok=True), what=f"hf://{repo}@{branch}")


def delete_branch(client: Client, repo: str, branch: str) -> None:
    """Gone afterwards, whether or not it was there."""
    from huggingface_hub.errors import RevisionNotFoundError

    def once() -> None:
        try:
            client.api.delete_branch(repo, branch=branch)
        except RevisionNotFoundError:
            return

    client.attempt(once, what=f"hf://{repo}@{branch}")
