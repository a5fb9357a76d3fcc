"""An httpx client whose requests can be ended from another thread, those that hang too."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Mapping
from typing import Any

from mso_hub.errors import HubError
from mso_hub.hub.client import Client


class Wire:
    """Connections of one reader. Safe to use from several threads.

    what  names the reader in messages
    """

    def __init__(self, client: Client, what: str) -> None:
        self._what = what
        self.http = client.http()
        self._lock = threading.Lock()
        self._sockets: dict[int, Any] = {}
        self._stopped = threading.Event()

    def traced(self) -> dict[str, Any]:
        """`extensions` of a request: they tell us of every socket that is opened."""

        def trace(event: str, info: Mapping[str, Any]) -> None:
            """Called by httpx at each stage of a request."""
            if event.endswith(("connect_tcp.complete", "start_tls.complete")):
                found = info["return_value"].get_extra_info("socket")
                with self._lock:
                    self._sockets = {fd: s for fd, s in self._sockets.items() if s.fileno() >= 0}
                    self._sockets[found.fileno()] = found
                if self._stopped.is_set():  # an error here would leave the socket open: the request must find it dead
                    _hang_up(found)

        return {"trace": trace}

    def sleep(self, seconds: float) -> None:
        """Wait, but not beyond stop()."""
        self._stopped.wait(seconds)
        self.check()

    def check(self) -> None:
        """HubError after stop()."""
        if self._stopped.is_set():
            raise HubError(f"{self._what}: was closed while it was read")

    def stop(self) -> None:
        """End all requests."""
        self._stopped.set()
        with self._lock:
            sockets = list(self._sockets.values())
        for opened in sockets:
            _hang_up(opened)

    def close(self) -> None:
        """Let all connections go; no thread may use them any more."""
        self.stop()
        self.http.close()


def _hang_up(opened: socket.socket) -> None:
    """Whoever waits for this socket gets an end of file."""
    with contextlib.suppress(OSError):  # closed already
        opened.shutdown(socket.SHUT_RDWR)
