"""Byte ranges of a repo's files over plain HTTP: the Hub says where a file lies, storage hands out ranges.

A file's place is a signed URL, asked for once and again when storage says that it has expired. Storage gets no token
of ours. A broken answer is continued from the byte where it broke.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from mso_hub.errors import HubError, MsoError
from mso_hub.hub.client import AGAIN, Client, client_errors, may_pass, status_of
from mso_hub.hub.repository import RemoteFile, Snapshot
from mso_hub.hub.wire import Wire

EXPIRED = frozenset({401, 403})
"""How storage answers a signature that is too old."""
RENEWALS = 3
"""Fresh URLs in a row that may be refused before we believe the refusal."""
HOPS = 5
"""Redirects within the Hub: a renamed repo needs one."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a file are: `headers` hold the token when that is the Hub itself."""

    url: str
    headers: Mapping[str, str] = field(repr=False)


PROGRESS = 1 << 20
"""Bytes that must come before patience starts anew: a server that gives one byte a time must not keep us for ever."""


class Ranges:
    """Reads ranges of the files of one snapshot. Safe to use from several threads."""

    def __init__(self, client: Client, snapshot: Snapshot, wire: Wire) -> None:
        self._client, self._snapshot, self._wire = client, snapshot, wire
        self._places: dict[str, Place] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def read(self, file: RemoteFile, begin: int, target: memoryview) -> None:
        """Fill `target` with the bytes that start at `begin`; HubError or TransientError when that is impossible."""
        what = f"{self._snapshot.address}/{file.path}"
        done, tries, renewals, started, fresh = 0, 0, 0, 0.0, 0
        while done < len(target):
            place = self._place(file)
            got, failure = self._once(file, place, begin + done, target[done:])
            done += got
            fresh += got
            if fresh >= PROGRESS:
                tries, renewals, started, fresh = 0, 0, 0.0, 0
            if failure is None:
                continue
            started = started or time.monotonic()
            status = status_of(failure)
            if status in EXPIRED and not place.headers and renewals < RENEWALS:
                renewals += 1
                self._renew(file, place)
                continue
            if status is not None and status not in AGAIN:
                raise HubError(
                    f"{what}: bytes [{begin + done:,}, {begin + len(target):,}) were refused with status {status}; "
                    "check that this account may still read the repo, then run the same command again"
                )
            if status is None and not may_pass(failure):
                raise self._client.explain(failure, what)
            self._client.pause(tries, started, what, failure, self._wire.sleep)
            tries += 1

    def _once(self, file: RemoteFile, place: Place, begin: int, target: memoryview) -> tuple[int, Exception | None]:
        """One request -> bytes that came, and what went wrong."""
        from huggingface_hub.utils import httpx

        end, done = begin + len(target), 0
        passing: tuple[type[Exception], ...] = (*client_errors(), RuntimeError)
        headers = {**place.headers, "Accept-Encoding": "identity", "Range": f"bytes={begin}-{end - 1}"}
        try:
            with self._wire.http.stream("GET", place.url, headers=headers, extensions=self._wire.traced()) as response:
                if response.status_code not in {200, 206}:
                    return 0, httpx.HTTPStatusError("", request=response.request, response=response)
                self._require_range(file, response, begin, end)
                for data in response.iter_raw():
                    if done + len(data) > len(target):
                        raise self._wrong(file, begin, end, f"more than {done:,} bytes")
                    target[done : done + len(data)] = data
                    done += len(data)
        except MsoError:
            raise
        except passing as error:
            self._wire.check()  # a client that is closed while it is used says so by RuntimeError
            if isinstance(error, RuntimeError):
                raise
            return done, error
        if done < len(target):
            return done, httpx.RemoteProtocolError(f"the answer ended {len(target) - done:,} bytes early")
        return done, None

    def _require_range(self, file: RemoteFile, response: Any, begin: int, end: int) -> None:
        """Storage that ignores or misreads a range must not pass for one that answers it."""
        found = response.headers.get("content-range", "no Content-Range")
        whole = response.status_code == 200 and (begin, end) == (0, file.nbytes)
        if not whole and (response.status_code, found) != (206, f"bytes {begin}-{end - 1}/{file.nbytes}"):
            raise self._wrong(file, begin, end, f"status {response.status_code} with {found!r}")

    def _wrong(self, file: RemoteFile, begin: int, end: int, found: str) -> HubError:
        return HubError(
            f"{self._snapshot.address}/{file.path}: asked for bytes {begin}-{end - 1} of {file.nbytes}, the answer was "
            f"{found}; a proxy or mirror in between may not know ranges: try without it"
        )

    def _place(self, file: RemoteFile) -> Place:
        """Where a file is; asked once, however many threads want to know. Git files come from the Hub itself."""
        if file.sha256 is None:
            return Place(self._url(file), self._client.headers())
        with self._lock:
            lock = self._locks.setdefault(file.path, threading.Lock())
        with lock:
            if file.path not in self._places:
                what = f"{self._snapshot.address}/{file.path}"
                self._places[file.path] = self._client.attempt(
                    lambda: self._resolve(file), what=what, wait=self._wire.sleep
                )
            return self._places[file.path]

    def _renew(self, file: RemoteFile, stale: Place) -> None:
        """Forget a place, unless another thread has already found a new one."""
        with self._locks[file.path]:
            if self._places.get(file.path) is stale:
                del self._places[file.path]

    def _resolve(self, file: RemoteFile) -> Place:
        """Ask the Hub where a file is."""
        from huggingface_hub.utils import hf_raise_for_status

        url, headers = self._url(file), self._client.headers()
        for _ in range(HOPS):
            self._wire.check()
            response = self._wire.http.request(
                "HEAD", url, headers={**headers, "Accept-Encoding": "identity"}, follow_redirects=False,
                extensions=self._wire.traced(),
            )  # fmt: skip
            hf_raise_for_status(response)
            target = response.headers.get("location")
            if not target:
                return Place(url, headers)
            target = urljoin(url, target)
            if urlsplit(target)[:2] != urlsplit(self._client.endpoint)[:2]:
                return Place(target, {})
            url = target
        raise HubError(
            f"{self._snapshot.address}/{file.path}: {self._client.endpoint} redirects more than {HOPS} times"
        )

    def _url(self, file: RemoteFile) -> str:
        snapshot = self._snapshot
        return f"{self._client.endpoint}/{snapshot.address.repo_id}/resolve/{snapshot.commit}/{quote(file.path)}"
