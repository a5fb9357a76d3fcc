"""A Hugging Face Hub on loopback, for demos, offline work and tests; real clients talk to it unchanged.

    with DevHub(folder, xet=True) as hub:
        HfApi(hub.endpoint, hub.token()).create_repo("dev/model")

A server is a process of its own with two origins: the hub (API, small files) and the storage (large files behind
signed URLs). Its state lies in the folder and outlives it. Without Xet, clients need HF_HUB_DISABLE_XET=1: else they
ask for a Xet token, get a 404, and their upload ends in a ConnectionError; downloads work either way. With Xet, clients
write into the folder themselves, one process at a time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mso_hub.errors import MsoError, RecipeError

PATIENCE = 60
"""Seconds that a server has to start; a busy machine needs a few."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request as the server saw it.

    time        seconds since 1970
    origin      "hub" or "storage"
    path        decoded; `query` is as it was sent, without signatures
    range       the Range header
    status      None while there is no answer, and where the connection was closed without one
    authorized  whether it had an Authorization header; `user` is whose token it was
    bytes_in    bytes of the request body, `bytes_out` of the answer's
    """

    time: float
    origin: str
    method: str
    path: str
    query: str
    range: str | None
    status: int | None
    authorized: bool
    user: str | None
    bytes_in: int
    bytes_out: int


class DevHub:
    """A running server; MsoError when it cannot start.

    folder  where all its state lies; made if it does not exist
    xet     whether large files go through Xet (clients write into the folder) or LFS
    port    of the hub, `storage_port` of the storage; 0 for any free one
    """

    def __init__(self, folder: Path | str, *, xet: bool = False, port: int = 0, storage_port: int = 0) -> None:
        self.folder, self.xet = Path(folder), xet
        command = [sys.executable, "-m", __name__, "--dir", str(folder), "--port", str(port), "--until-eof"]
        command += ["--storage-port", str(storage_port), *(["--xet"] if xet else [])]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        # Its stdin is a pipe of ours: when we die, however, it ends, and so does the server. Its session is its own: an
        # interrupt of a notebook's cell goes to the whole process group.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, bufsize=0,
            start_new_session=True,
        )  # fmt: skip
        try:
            self.endpoint = self._ready()
            about = self._call("GET", "")
        except BaseException:
            self.close()
            raise
        self.storage = str(about["storage"])
        self.user = str(about["user"])
        self._tokens = {str(role): str(token) for token, role in about["tokens"].items()}

    def _ready(self) -> str:
        line = self._process.stdout.readline() if self._process.stdout else b""
        if not line:
            self._process.wait(PATIENCE)
            self._errors.seek(0)
            raise MsoError(self._errors.read().decode().strip() or f"the server of {self.folder} did not start")
        return str(json.loads(line)["endpoint"])

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        """A request to a control endpoint; RecipeError when the server does not like the body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.endpoint}/_devhub/{path}", data, method=method)  # noqa: S310
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=PATIENCE) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                raise RecipeError(json.load(error)["error"]) from error

    def __enter__(self) -> DevHub:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server; its folder stays."""
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    @property
    def pid(self) -> int:
        """Process of the server."""
        return self._process.pid

    def token(self, role: str = "write") -> str:
        """Token of the default user with the role write or read."""
        return self._tokens[role]

    def add_user(self, name: str, orgs: Sequence[str] = (), role: str = "write") -> str:
        """A new user, or new organizations for an old one; answers with a token of the role write or read."""
        tokens: Any = self._call("POST", "users", {"name": name, "orgs": list(orgs)})
        return str(tokens[role])

    def fail(self, match: str, **effect: Any) -> None:
        """Make requests go wrong whose "METHOD /path" the regular expression matches; see `faults.Fault`."""
        self._call("POST", "faults", {"match": match, **effect})

    def clear_faults(self) -> None:
        """Forget what `fail` asked for."""
        self._call("DELETE", "faults")

    def set(self, **changes: float) -> None:
        """Change limits; see `settings.Tuning`."""
        self._call("POST", "settings", changes)

    def disable(self, repo_id: str, *, kind: str = "models", disabled: bool = True) -> None:
        """What the Hub does with repos that break its rules."""
        self._call("POST", f"repos/{kind}/{repo_id}", {"disabled": disabled})

    def log(self, *, clear: bool = False) -> list[Request]:
        """Requests so far, the oldest first."""
        found: list[Mapping[str, Any]] = self._call("GET", f"log?clear={int(clear)}")
        return [Request(**record) for record in found]
