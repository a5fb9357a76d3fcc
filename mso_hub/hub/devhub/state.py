"""Everything a running server holds, and a request as the handlers of the hub origin see it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from mso_hub.hub.devhub.access import Accounts, Caller, require_read
from mso_hub.hub.devhub.disk import Contents
from mso_hub.hub.devhub.faults import Faults
from mso_hub.hub.devhub.repos import Refused, Repo, Store
from mso_hub.hub.devhub.settings import Settings, Tuning
from mso_hub.hub.devhub.signing import Signer
from mso_hub.hub.devhub.storage import Storage
from mso_hub.hub.devhub.wire import Log


class State:
    """All of a server but its sockets."""

    def __init__(self, settings: Settings) -> None:
        folder: Path = settings.folder
        self.tuning = settings.tuning
        self.xet = settings.xet
        self.contents = Contents(folder, xet=settings.xet)
        self.store = Store(folder)
        self.accounts = Accounts(folder, settings.users)
        self.signer = Signer(folder)
        self.storage = Storage(self.contents, self.signer)
        self.faults, self.log = Faults(), Log()
        self.tune(settings.tuning)

    def tune(self, tuning: Tuning) -> None:
        """Take new limits; transfers under way follow them."""
        self.tuning = tuning
        self.storage.down.rate, self.storage.up.rate = tuning.bandwidth_down, tuning.bandwidth_up


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """An answer with a JSON body."""
    return Reply(status, json.dumps(value).encode(), {"content-type": "application/json", **(headers or {})})


@dataclass(frozen=True, slots=True)
class Call:
    """A request to the hub origin, its body read.

    params        parts of the path, decoded
    hub, storage  the two origins as the client addresses them, "http://127.0.0.1:8000"
    token_expiry  seconds that a fault gives a Xet token, or None
    """

    state: State
    caller: Caller
    method: str
    path: str
    params: Mapping[str, str]
    query: Mapping[str, Sequence[str]]
    headers: Mapping[str, str]
    body: bytes
    hub: str
    storage: str
    token_expiry: float | None = None

    def json(self) -> dict[str, Any]:
        """The body as a JSON object, or a 400."""
        try:
            value = json.loads(self.body or b"{}")
        except ValueError as error:
            raise Refused(400, f"Invalid JSON: {error}") from error
        if not isinstance(value, dict):
            raise Refused(400, f"Expected a JSON object, got {type(value).__name__}")
        return value

    def flag(self, name: str) -> bool:
        """Whether a query parameter is set to something that means yes."""
        return self.query.get(name, ["0"])[-1].lower() in {"1", "true"}

    def repo(self) -> Repo:
        """The repo of the path, if the caller may see it."""
        repo_id = f"{self.params['owner']}/{self.params['name']}"
        return require_read(self.caller, self.state.store.find(self.params.get("kind", "models"), repo_id), repo_id)

    def signed(self, method: str, path: str) -> str:
        """URL on the storage origin, valid for a while; it needs no token."""
        return f"{self.storage}{quote(path)}?{self.state.signer.query(method, path, self.state.tuning.url_lifetime)}"

    def page(
        self, items: Sequence[Any], pin: str = "", size: int | None = None
    ) -> tuple[Sequence[Any], dict[str, str]]:
        """One page of a list and the header that links to the next.

        pin  what the list was made from (a commit): the cursor carries it, see `pinned`
        """
        start = int(self.query.get("cursor", ["0"])[-1].rpartition("-")[2] or 0)
        stop = start + min(size or self.state.tuning.page_size, self.state.tuning.page_size)
        if stop >= len(items):
            return items[start:stop], {}
        query = {**self.query, "cursor": [f"{pin}-{stop}"]}
        return items[start:stop], {"link": f'<{self.hub}{self.path}?{urlencode(query, doseq=True)}>; rel="next"'}

    def pinned(self, otherwise: str) -> str:
        """What the first page of a list was made from."""
        return self.query.get("cursor", ["-"])[-1].rpartition("-")[0] or otherwise
