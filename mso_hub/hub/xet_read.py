"""Ranges of a file from Xet storage, as ordered streams that survive broken connections."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Generator
from typing import Any

from mso_hub.errors import HubError
from mso_hub.hub.client import Client
from mso_hub.hub.repository import RemoteFile, Snapshot
from mso_hub.hub.wire import Wire
from mso_hub.hub.xet import token_refresh, xet_headers, xet_session

REFUSED = frozenset({400, 401, 403, 404, 416})
"""Statuses in messages of hf_xet that another try will not change, once the token is fresh."""
REPEATS = 2
"""Refusals in a row that are believed: the first one may be about an old token."""


class XetReader:
    """Streams the Xet files of one snapshot. Safe to use from several threads."""

    def __init__(self, client: Client, snapshot: Snapshot, wire: Wire) -> None:
        self._client, self._snapshot, self._wire = client, snapshot, wire
        self._lock = threading.Lock()
        self._group: Any = None
        self._groups: list[Any] = []

    def stream(self, file: RemoteFile, begin: int, end: int) -> Generator[memoryview, None, None]:
        """Bytes [begin, end) in order; continued where it breaks."""
        what = f"{self._snapshot.address}/{file.path}"
        at, tries, started = begin, 0, 0.0
        while at < end:
            failure: Exception | None = None
            group, source = None, None
            try:
                group = self._open()
                source = group.download_stream(_info(file), at, end)
                for data in source:
                    fitting = memoryview(data)[: end - at]
                    at, tries, started = at + len(fitting), 0, 0.0
                    yield fitting
            except HubError:
                raise
            except (OSError, RuntimeError, ValueError) as error:
                failure = error
            finally:
                if source is not None and at < end:
                    source.cancel()
            if at < end:
                started = started or time.monotonic()  # who reads us may have paused for long: that is no waiting
                self._judge(failure, tries, started, what, group)
                tries += 1

    def _judge(self, failure: Exception | None, tries: int, started: float, what: str, group: Any) -> None:
        """Wait before another try, or raise what a broken stream means."""
        self._wire.check()
        # hf_xet loses some errors: the stream just ends early.
        error = failure or ConnectionError("the stream ended early")
        found = re.search(r"\((\d{3})\b", str(error))
        refused = (found is not None and int(found[1]) in REFUSED) or isinstance(error, (ValueError, PermissionError))
        if refused and tries + 1 >= REPEATS:
            raise HubError(
                f"{what}: Xet storage refused: {self._client.clean(error)}; check that this account may still read "
                "the repo, or set HF_HUB_DISABLE_XET=1 to read over plain HTTP"
            )
        with self._lock:
            if self._group is group:
                self._group = None  # the next one starts with a fresh token
        self._client.pause(tries, started, what, error, self._wire.sleep)

    def _open(self) -> Any:
        """The group that all streams share: it keeps connections and the storage token."""
        with self._lock:
            self._wire.check()
            if self._group is None:
                snapshot, client = self._snapshot, self._client
                url, headers = token_refresh(client, snapshot.address.repo_id, "read", snapshot.commit)
                # The first token by ourselves: hf_xet does not tell what a Hub says that refuses it, or is busy.
                granted = client.request("GET", url, what=str(snapshot.address), wire=self._wire).json()
                self._group = xet_session(client.patience.silence, tries=1).new_download_stream_group(
                    endpoint=granted["casUrl"], token=granted["accessToken"], token_expiry_unix_secs=granted["exp"],
                    token_refresh_url=url, token_refresh_headers=headers, custom_headers=xet_headers(client),
                )  # fmt: skip
                self._groups.append(self._group)
            return self._group

    def close(self) -> None:
        """Cancel all streams; the wire has to be stopped before."""
        for group in self._groups:
            group.abort()
        self._groups.clear()


def _info(file: RemoteFile) -> Any:
    import hf_xet

    return hf_xet.XetFileInfo(file.xet_hash, file.nbytes)
