"""Git LFS over HTTP: which objects the Hub has, and one object sent in one piece or in parts.

Written out, because the client's own way reads the file again to hash it, draws progress bars and hides what went
wrong in a RuntimeError.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from mso_hub.errors import HubError, MsoError
from mso_hub.hub.client import Client, client_errors, may_pass, status_of
from mso_hub.hub.memory import MemoryFile
from mso_hub.hub.target import Target

MIME = "application/vnd.git-lfs+json"
BATCH = 100
"""Objects per request."""
SIGNATURES = 3
"""Times that storage URLs are asked for: a slow line may outlive the first ones."""
REFUSED = frozenset({400, 401, 403})
"""Statuses that are about the signature of the URL or the bytes that came: a new URL and a new try may cure them."""


def batch(client: Client, target: Target, objects: Iterable[tuple[str, int]]) -> dict[str, dict[str, Any]]:
    """What the Hub wants done to store objects of (SHA-256, bytes) -> by SHA-256; no "actions" where it has them."""
    rest, answers = iter(objects), {}
    while chunk := list(islice(rest, BATCH)):
        body: dict[str, Any] = {
            "operation": "upload",
            "transfers": ["basic", "multipart"],
            "objects": [{"oid": oid, "size": nbytes} for oid, nbytes in chunk],
            "hash_algo": "sha256",
        }
        if not target.create_pr:
            body["ref"] = {"name": target.revision}
        found = client.ask(
            "POST", f"/{target.repo_id}.git/info/lfs/objects/batch", what=str(target), json=body,
            headers={"Accept": MIME, "Content-Type": MIME},
        )  # fmt: skip
        answers.update({answer["oid"]: answer for answer in found["objects"]})
    return answers


def present(client: Client, target: Target, objects: Iterable[tuple[str, int]]) -> set[str]:
    """SHA-256 of those objects that the Hub says it has; of Xet objects it may not know."""
    answers = batch(client, target, objects)
    return {oid for oid, answer in answers.items() if not answer.get("actions") and "error" not in answer}


def send_lfs(client: Client, target: Target, path: str, memory: MemoryFile, sha256: str) -> None:
    """Store one object; every request is repeated as long as the client's patience lasts."""
    from huggingface_hub.errors import HfHubHTTPError

    for left in reversed(range(SIGNATURES)):
        answer = batch(client, target, [(sha256, memory.nbytes)])[sha256]
        if "error" in answer:
            raise HubError(f"{target}/{path}: the Hub does not take it: {client.clean(answer['error']['message'])}")
        actions = answer.get("actions")
        if not actions:
            return
        try:
            _transfer(client, f"{target}/{path}", actions["upload"], memory, sha256)
        except HfHubHTTPError as error:
            if left:
                continue
            raise HubError(
                f"{target}/{path}: storage refused {SIGNATURES} fresh addresses in a row for {memory.nbytes:,} bytes "
                f"(status {status_of(error)}); run the same command again, and where the line is too slow for the "
                "time that an address is valid, use Xet or smaller shards"
            ) from None
        if "verify" in actions:
            client.request(
                "POST", actions["verify"]["href"], what=f"{target}/{path}", json={"oid": sha256, "size": memory.nbytes}
            )
        return


def _transfer(client: Client, what: str, upload: dict[str, Any], memory: MemoryFile, sha256: str) -> None:
    """Bytes to the storage, whose URLs carry their own permission: the Hub's token stays away from it."""
    header = dict(upload.get("header") or {})
    chunk = int(header.pop("chunk_size", 0))
    if not chunk:
        _put(client, what, upload["href"], memory, (0, memory.nbytes), header)
        return
    urls = {int(key): str(url) for key, url in header.items() if key.isdigit()}  # "00001" on the Hub
    if sorted(urls) != list(range(1, -(-memory.nbytes // chunk) + 1)):
        raise HubError(f"{what}: {memory.nbytes:,} bytes in parts of {chunk:,} cannot go to {len(urls)} addresses")
    parts = []
    for number, url in sorted(urls.items()):
        span = ((number - 1) * chunk, min(number * chunk, memory.nbytes))
        response = _put(client, what, url, memory, span, {})
        parts.append({"partNumber": number, "etag": response.headers["etag"]})
    body = {"oid": sha256, "parts": parts}
    _storage(client, what, "POST", upload["href"], json=body, headers={"Accept": MIME, "Content-Type": MIME})


def _put(
    client: Client, what: str, url: str, memory: MemoryFile, span: tuple[int, int], headers: dict[str, str]
) -> Any:
    def content() -> Iterator[bytes]:
        yield from memory.blocks(*span)

    return _storage(
        client, what, "PUT", url, headers={**headers, "Content-Length": str(span[1] - span[0])}, content=content
    )


def _storage(client: Client, what: str, method: str, url: str, **settings: Any) -> Any:
    """One request to a signed URL, repeated while the storage is busy; HfHubHTTPError when it refuses."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    content, tries, waited = settings.pop("content", None), 0, 0.0
    while True:
        if content is not None:
            settings["content"] = content()
        try:
            response = get_session().request(method, url, **settings)
            hf_raise_for_status(response)
            return response
        except MsoError:
            raise
        except client_errors() as error:
            failure = error
        if status_of(failure) in REFUSED:
            raise failure
        if not may_pass(failure):
            raise client.explain(failure, what)
        # Only waiting counts: the transfer that broke may have taken longer than our patience.
        paused = time.monotonic()
        client.pause(tries, paused - waited, what, failure)
        waited += time.monotonic() - paused
        tries += 1
