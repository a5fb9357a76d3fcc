"""Handlers: the bytes of files."""

from __future__ import annotations

import json
import struct
from typing import Any

from mso_hub.hub.devhub.access import require_files
from mso_hub.hub.devhub.repos import BRANCH, Commit, Refused
from mso_hub.hub.devhub.state import Call, Reply, json_reply
from mso_hub.hub.devhub.storage import byte_range

HEADER_LIMIT = 25_000_000
"""Bytes of a safetensors header that the Hub reads at most."""


def resolve(call: Call) -> Reply:
    """GET or HEAD /ID/resolve/REV/PATH: small files at once, large ones by a redirect to the storage origin."""
    repo = call.repo()
    require_files(call.caller, repo)
    sha = repo.resolve(call.params["rev"])
    path = call.params["path"]
    entry = repo.commit(sha).tree.get(path)
    headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes", "Access-Control-Expose-Headers": "*"}
    if entry is None:
        raise Refused(404, "Entry not found", "EntryNotFound", headers)
    if entry.sha256 is None:
        span = byte_range(call.headers.get("range"), entry.size)
        if span is None:
            raise Refused(416, "Range not satisfiable", "", {"Content-Range": f"bytes */{entry.size}"})
        headers |= {"ETag": f'"{entry.oid}"', "content-type": "application/octet-stream"}
        partial = "range" in call.headers and entry.size > 0
        if partial:
            headers["Content-Range"] = f"bytes {span[0]}-{span[1] - 1}/{entry.size}"
        return Reply(206 if partial else 200, call.state.contents.read(entry, *span), headers)
    headers["Location"] = call.signed("GET", f"/files/{repo.page}/{entry.sha256}/{path}")
    headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    xet_hash = call.state.contents.xet_hash(entry.sha256)
    if xet_hash:
        headers["X-Xet-Hash"] = xet_hash
        headers["Link"] = f'<{call.hub}/api/{repo.kind}/{repo.id}/xet-read-token/{sha}>; rel="xet-auth"'
    return Reply(302, f"Found. Redirecting to {headers['Location']}".encode(), headers)


def safetensors_metadata(call: Call) -> Reply:
    """GET /api/models/ID/safetensors-metadata/INDEX: metadata of the index and the headers of all shards, of main."""
    repo = call.repo()
    require_files(call.caller, repo)
    commit, path = repo.commit(repo.refs[BRANCH + "main"]), call.params["path"]
    index = _json(_read(call, commit, path, 0, HEADER_LIMIT), path)
    headers: dict[str, Any] = {}
    folder = path.rpartition("/")[0]
    for shard in sorted(set(index.get("weight_map", {}).values())):
        name = f"{folder}/{shard}" if folder else shard
        (length,) = struct.unpack("<Q", _read(call, commit, name, 0, 8).ljust(8, b"\0"))
        if length > HEADER_LIMIT:
            raise Refused(400, f"{name}: the header has {length} bytes, more than {HEADER_LIMIT}")
        headers[shard] = _json(_read(call, commit, name, 8, 8 + length), name)
    return json_reply({"index": {"metadata": index.get("metadata")}, "headers": headers})


def _read(call: Call, commit: Commit, path: str, start: int, stop: int) -> bytes:
    entry = commit.tree.get(path)
    if entry is None:
        raise Refused(404, f"{path} does not exist", "EntryNotFound", {"X-Repo-Commit": commit.id})
    return call.state.contents.read(entry, start, stop)


def _json(data: bytes, path: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise Refused(400, f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refused(400, f"{path}: must be a JSON object, got {type(value).__name__}")
    return value
