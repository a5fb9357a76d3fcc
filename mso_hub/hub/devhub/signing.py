"""Signed URLs of the storage origin: method, path and times are covered by an HMAC."""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from mso_hub.hub.devhub.disk import write_whole


class Signer:
    """Makes and checks query strings; the key lies in the folder, so URLs outlive a restart."""

    def __init__(self, folder: Path) -> None:
        path = folder / "secret"
        if not path.exists():
            write_whole(path, secrets.token_bytes(32))
            path.chmod(0o600)
        self._key = path.read_bytes()
        self._void_before = 0

    def query(self, method: str, path: str, lifetime: float) -> str:
        """Query string that allows one method on one path for `lifetime` seconds."""
        issued = time.time_ns()
        expires = issued + int(lifetime * 1e9)
        return f"issued={issued}&expires={expires}&signature={self._digest(method, path, issued, expires)}"

    def void_issued(self) -> None:
        """Every URL issued until now becomes invalid."""
        self._void_before = time.time_ns()

    def problem(self, method: str, path: str, query: Mapping[str, str]) -> str | None:
        """Why a URL is not valid, None when it is; a URL for GET is good for HEAD too."""
        try:
            issued, expires = int(query["issued"]), int(query["expires"])
            given = query["signature"]
        except (KeyError, ValueError):
            return "AccessDenied: the URL is not signed"
        wanted = self._digest("GET" if method == "HEAD" else method, path, issued, expires)
        if not hmac.compare_digest(given.encode(), wanted.encode()):
            return "SignatureDoesNotMatch: the signature does not fit this URL"
        if time.time_ns() >= expires or issued <= self._void_before:
            return "AccessDenied: Request has expired"
        return None

    def _digest(self, method: str, path: str, issued: int, expires: int) -> str:
        return hmac.new(self._key, f"{method}\n{path}\n{issued}\n{expires}".encode(), "sha256").hexdigest()
