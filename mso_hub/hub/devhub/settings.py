"""What a server is started with, and what may be changed while it runs."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mso_hub.errors import RecipeError

NAME = re.compile(r"(?!.*(--|\.\.))(?!.*\.git$)[A-Za-z0-9_]([A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
"""Names of users, organizations and repos: no path can be built from them that leaves a folder."""


@dataclass(frozen=True, slots=True)
class User:
    """An account: token -> its role ("read" or "write"), and the organizations it writes to."""

    name: str
    tokens: Mapping[str, str]
    orgs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (self.name, *self.orgs):
            if not NAME.fullmatch(name):
                raise RecipeError(f"user {name!r}: letters, digits, '.', '_' and '-' are allowed; choose another name")
        wrong = {role for role in self.tokens.values() if role not in {"read", "write"}}
        if wrong:
            raise RecipeError(f"user {self.name}: the role of a token is read or write, got {min(wrong)!r}")

    @classmethod
    def named(cls, name: str, orgs: tuple[str, ...] = ()) -> User:
        """A user with the two usual tokens, hf_NAME_write and hf_NAME_read."""
        return cls(name, {f"hf_{name}_write": "write", f"hf_{name}_read": "read"}, orgs)


@dataclass(frozen=True, slots=True)
class Tuning:
    """Limits that may change while the server runs.

    url_lifetime     seconds that a signed URL is valid
    page_size        entries per page of every list
    bandwidth_down   bytes per second that the storage origin sends, over all connections; 0 for no limit
    bandwidth_up     the same for what it receives; Xet clients go round the storage origin
    part_size        bytes per part of a multipart upload
    multipart_above  bytes from which an LFS upload is split into parts
    """

    url_lifetime: float = 3600.0
    page_size: int = 1000
    bandwidth_down: float = 0.0
    bandwidth_up: float = 0.0
    part_size: int = 16 << 20
    multipart_above: int = 64 << 20

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            whole = isinstance(least, int)
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not value >= least:
                kind = "a whole number" if whole else "a number"
                raise RecipeError(f"{name}: must be {kind} of at least {least}, got {value!r}")

    def changed(self, changes: Mapping[str, Any]) -> Tuning:
        """A copy with some values replaced; RecipeError for a name or a value that cannot be."""
        unknown = set(changes) - set(LEAST)
        if unknown:
            raise RecipeError(f"{min(unknown)}: no such setting; known: {', '.join(LEAST)}")
        return dataclasses.replace(self, **changes)


LEAST: Mapping[str, float] = {
    "url_lifetime": 0.0, "page_size": 1, "bandwidth_down": 0.0, "bandwidth_up": 0.0, "part_size": 1,
    "multipart_above": 0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """A server: where its state lies, where it listens (port 0: any free one), whether files go through Xet.

    users  the accounts of a new folder; an existing one has its own in users.json
    """

    folder: Path
    host: str = "127.0.0.1"
    port: int = 0
    storage_port: int = 0
    xet: bool = False
    users: tuple[User, ...] = (User.named("dev"),)
    tuning: Tuning = field(default_factory=Tuning)

    def __post_init__(self) -> None:
        for name in ("port", "storage_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise RecipeError(f"{name}: must be from 0 to 65535, got {getattr(self, name)}")
        if self.port and self.port == self.storage_port:
            raise RecipeError(f"storage_port: must differ from the port of the hub, got {self.port} for both")
        if not self.users:
            raise RecipeError(f"{self.folder}: a server without users can hold no repo; give at least one")


def users_from_json(content: bytes, name: str) -> tuple[User, ...]:
    """Accounts from {"NAME": {"tokens": {TOKEN: ROLE}, "orgs": [..]}}; RecipeError for anything else."""
    try:
        found = json.loads(content)
        return tuple(User(key, dict(value["tokens"]), tuple(value.get("orgs", ()))) for key, value in found.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, RecipeError):
            raise
        example = '{"dev": {"tokens": {"hf_dev_write": "write"}, "orgs": []}}'
        raise RecipeError(f"{name}: must look like {example}, found something else ({error!r})") from error


def users_to_json(users: tuple[User, ...]) -> bytes:
    """The inverse of `users_from_json`."""
    content = {user.name: {"tokens": dict(user.tokens), "orgs": list(user.orgs)} for user in users}
    return json.dumps(content, indent=2).encode()
