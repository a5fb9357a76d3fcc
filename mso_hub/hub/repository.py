"""A repo at one commit: what it holds, from the API, without touching a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from mso_hub.errors import HubError
from mso_hub.hub.address import Address
from mso_hub.hub.client import Client


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repo at one commit.

    path      in the repo
    nbytes    size
    blob_id   git object id; for LFS and Xet files that of the pointer
    sha256    of the content in hex, for LFS and Xet files; None for small files in git
    xet_hash  Xet storage knows the content by it; None in plain LFS and git
    """

    path: str
    nbytes: int
    blob_id: str
    sha256: str | None = None
    xet_hash: str | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a source's files come from, for cards, manifests and copies within one Hub.

    endpoint  of the Hub
    commit    40 hex digits
    revision  as the user typed it; None for the default branch
    private   not everybody may see the repo
    gated     everybody may see it, and has to ask for its files
    """

    endpoint: str
    repo_id: str
    commit: str
    revision: str | None = None
    private: bool = False
    gated: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A repo pinned to one commit.

    commit  40 hex digits; every later request names it, so that a moving branch cannot mix two states
    private, gated  as in Origin
    """

    address: Address
    commit: str
    files: Mapping[str, RemoteFile]
    private: bool = False
    gated: bool = False


def take_snapshot(client: Client, address: Address) -> Snapshot:
    """Resolve the revision once and list all files; HubError for a repo that is missing, private, gated, disabled."""
    what, repo = str(address), address.repo_id
    info = client.attempt(lambda: client.api.model_info(repo, revision=address.revision), what=what)
    # model_info shows the card of a gated repo to everyone; only this says whether its files may be read.
    client.attempt(lambda: client.api.auth_check(repo), what=what)
    commit = str(info.sha)
    files = dict(sorted(_list_files(client, repo, commit, what)))
    return Snapshot(address, commit, files, private=bool(info.private), gated=bool(info.gated))


def _list_files(client: Client, repo: str, commit: str, what: str) -> Iterator[tuple[str, RemoteFile]]:
    """The whole tree, page by page; each page is repeated on its own."""
    url: str | None = f"/api/models/{repo}/tree/{commit}?recursive=true&expand=false"
    while url is not None:
        page, links = client.attempt(partial(_page, client, url, what), what=what)
        for entry in page:
            if entry["type"] == "file":
                large = entry.get("lfs") or {}
                path, size = _safe(str(entry["path"]), what), int(entry["size"])
                yield path, RemoteFile(path, size, entry["oid"], large.get("oid"), entry.get("xetHash"))
        # A mirror may name the Hub itself in its links: stay with the one that was chosen.
        link = urlsplit(links.get("next", {}).get("url", ""))
        url = f"{link.path}?{link.query}" if link.query else None


def _safe(path: str, what: str) -> str:
    """A path that stays inside the repo: a folder may be written by these names."""
    if not path or path.startswith("/") or ".." in path.split("/") or "\\" in path or "\0" in path:
        raise HubError(
            f"{what}: lists a file {path!r}; a path must be relative and stay inside the repo: do not use it"
        )
    return path


def _page(client: Client, url: str, what: str) -> tuple[list[dict[str, Any]], dict[str, dict[str, str]]]:
    """Entries of one page, and the links to others."""
    response = client.request("GET", url, what=what)
    return response.json(), response.links
