"""A repo on a running server, and requests without a client library in between."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.hf_api import RepoFile

from mso_hub.hub.devhub import DevHub, Request

CLIENT_WARNS = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
"""The client hands LFS uploads to httpx in a way that is deprecated there."""


def noise(nbytes: int, seed: int = 0) -> bytes:
    """Bytes that do not compress and are the same each time."""
    return random.Random(seed).randbytes(nbytes)


@dataclass(frozen=True)
class Answer:
    """What a raw request got; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def raw(method: str, url: str, body: bytes | None = None, **headers: str) -> Answer:
    """One request; follows nothing, retries nothing. Keyword `range_` becomes the header Range."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=20)
    try:
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        connection.request(method, target, body, {k.strip("_").replace("_", "-"): v for k, v in headers.items()})
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


@dataclass(frozen=True)
class Site:
    """A server, a client with the write token of its default user, and an empty repo."""

    hub: DevHub
    api: HfApi
    repo: str

    def as_user(self, token: str | None) -> HfApi:
        return HfApi(self.hub.endpoint, token if token is not None else False)

    def put(self, path: str, data: bytes, **more: Any) -> str:
        """Commit one file; the commit's id."""
        info = self.api.create_commit(self.repo, [CommitOperationAdd(path, data)], commit_message=f"add {path}", **more)
        return str(info.oid)

    def get(self, path: str, revision: str = "main", **more: Any) -> bytes:
        """Content of a file by the client's own download."""
        more.setdefault("force_download", True)
        return Path(self.api.hf_hub_download(self.repo, path, revision=revision, **more)).read_bytes()

    def info(self, path: str, revision: str = "main") -> RepoFile:
        """What the server says of one file."""
        [found] = self.api.get_paths_info(self.repo, [path], revision=revision)
        assert isinstance(found, RepoFile)
        return found

    def link(self, path: str) -> str:
        """Signed URL of a large file."""
        answer = raw("GET", f"{self.hub.endpoint}/{self.repo}/resolve/main/{path}", Authorization=self.bearer)
        assert answer.status == 302
        return answer.headers["location"]

    def upload_link(self, data: bytes) -> str:
        """Signed URL for an upload of these bytes by LFS."""
        wanted = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
        asked = json.dumps({"operation": "upload", "objects": [wanted]}).encode()
        url = f"{self.hub.endpoint}/{self.repo}.git/info/lfs/objects/batch"
        answer = raw("POST", url, asked, Authorization=self.bearer).json()
        return str(answer["objects"][0]["actions"]["upload"]["href"])

    @property
    def bearer(self) -> str:
        return f"Bearer {self.hub.token()}"

    def commit(self, *lines: Mapping[str, Any], revision: str = "main") -> Answer:
        """A commit as it stands on the wire, with the header line given or a plain one."""
        head = () if lines and lines[0]["key"] == "header" else ({"key": "header", "value": {"summary": "raw"}},)
        body = b"\n".join(json.dumps(line).encode() for line in (*head, *lines))
        url = f"{self.hub.endpoint}/api/models/{self.repo}/commit/{revision}"
        return raw("POST", url, body, Authorization=self.bearer)

    def requests(self, method: str = "", part: str = "") -> list[Request]:
        """Logged requests with this method and this text in the path."""
        return [r for r in self.hub.log() if r.method.startswith(method) and part in r.path]


def small(path: str, data: bytes) -> dict[str, Any]:
    """Line of a commit that adds a small file."""
    return {"key": "file", "value": {"path": path, "content": base64.b64encode(data).decode(), "encoding": "base64"}}
