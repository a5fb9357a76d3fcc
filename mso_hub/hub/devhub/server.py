"""Start a server and run it until it is told to stop."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mso_hub.errors import MsoError
from mso_hub.hub.devhub.settings import Settings

LOG = "devhub.log"
"""File in the folder of a server with the errors of the server itself."""


def serve(settings: Settings, on_ready: Callable[[str], None], *, until_eof: bool = False) -> None:
    """Serve until SIGINT or SIGTERM; with `until_eof` also until stdin ends, which it does when the parent dies.

    on_ready  gets "http://HOST:PORT" of the hub once both origins listen
    Raises MsoError when the folder, a port or a library is not to be had.
    """
    try:
        import uvicorn

        from mso_hub.hub.devhub.app import App
        from mso_hub.hub.devhub.state import State
    except ModuleNotFoundError as error:
        name = str(error.name).partition(".")[0]
        raise MsoError(f"the development Hub needs {name}: pip install 'mso-hub[devhub]'") from error
    with _locked(settings.folder) as folder, _listening(settings) as (hub, storage):
        # The client library of Xet must neither write into the user's cache nor report home.
        os.environ.setdefault("HF_XET_CACHE", str(folder / "xet-cache"))
        os.environ.setdefault("HF_XET_TELEMETRY_ENABLED", "0")
        shutil.rmtree(folder / "parts", ignore_errors=True)  # uploads that an earlier server did not finish
        _log_to(folder / LOG)
        app = App(State(replace(settings, folder=folder)), hub.getsockname()[1], storage.getsockname()[1])
        config = uvicorn.Config(
            app, lifespan="off", ws="none", interface="asgi3", log_config=None, access_log=False, server_header=False,
            proxy_headers=False, timeout_keep_alive=60, timeout_graceful_shutdown=1,
        )  # fmt: skip
        server = uvicorn.Server(config)
        if until_eof:
            threading.Thread(target=_stop_at_eof, args=(server,), daemon=True).start()
        on_ready(f"http://{settings.host}:{hub.getsockname()[1]}")  # both sockets listen: who connects now just waits
        asyncio.run(server.serve(sockets=[hub, storage]))


def _stop_at_eof(server: Any) -> None:
    while os.read(sys.stdin.fileno(), 1 << 16):
        pass
    server.should_exit = True


def _log_to(path: Path) -> None:
    """Errors of the server go to a file; stderr belongs to whoever started it."""
    logger = logging.getLogger("uvicorn.error")
    logger.addHandler(logging.FileHandler(path, delay=True))
    logger.setLevel(logging.ERROR)
    logger.propagate = False


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """The folder, made if need be, and nobody else's until the end."""
    folder = Path(os.path.realpath(folder))
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / "devhub.lock").open("a+"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise MsoError(
                f"{folder}: a development Hub already runs there (process {holder}); stop it, or choose another folder"
            ) from error
        except OSError as error:
            raise MsoError(f"{folder}: cannot be written: {error.strerror}; choose another folder") from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield folder


@contextmanager
def _listening(settings: Settings) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Sockets of the hub and of the storage origin."""
    with ExitStack() as stack:
        found = []
        for name, port in (("port", settings.port), ("storage_port", settings.storage_port)):
            # asyncio turns Nagle's algorithm off only where the protocol is named; it costs 40 ms per answer.
            listener = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((settings.host, port))
                listener.listen(128)
            except OSError as error:
                taken = error.errno == errno.EADDRINUSE
                what = "is in use" if taken else f"cannot be opened: {error.strerror}"
                raise MsoError(
                    f"{name} {port} of {settings.host} {what}; choose another one, or 0 for any that is free"
                ) from error
            found.append(listener)
        yield found[0], found[1]
