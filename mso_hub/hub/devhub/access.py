"""Who asks, and what they may do."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from mso_hub.hub.devhub.disk import write_whole
from mso_hub.hub.devhub.repos import PULL, Refused, Repo
from mso_hub.hub.devhub.settings import User, users_from_json, users_to_json

_INVITE = "Please log in."


@dataclass(frozen=True, slots=True)
class Caller:
    """A user by the token of a request; name "" for nobody."""

    name: str = ""
    orgs: tuple[str, ...] = ()
    role: str = ""
    token: str = ""

    def owns(self, namespace: str) -> bool:
        """Whether repos of this user or organization are theirs, whatever the token."""
        return namespace != "" and (namespace == self.name or namespace in self.orgs)

    def may_read(self, repo: Repo) -> bool:
        """Whether they may know that the repo exists."""
        return not repo.facts["private"] or self.owns(repo.owner) or self.name in repo.facts["granted"]

    def may_write(self, repo: Repo) -> bool:
        """Whether they may move branches."""
        return self.role == "write" and self.owns(repo.owner)


class Accounts:
    """The users of a server, kept in FOLDER/users.json."""

    def __init__(self, folder: Path, users: tuple[User, ...]) -> None:
        self._path = folder / "users.json"
        self._lock = threading.Lock()
        self._users = users_from_json(self._path.read_bytes(), str(self._path)) if self._path.exists() else users
        self._save()

    def _save(self) -> None:
        write_whole(self._path, users_to_json(self._users))

    @property
    def users(self) -> tuple[User, ...]:
        """Everybody, the default user first."""
        return self._users

    def add(self, user: User) -> None:
        """A new user, or new tokens and organizations for an old one."""
        with self._lock:
            self._users = (*(old for old in self._users if old.name != user.name), user)
            self._save()

    def caller(self, authorization: str | None) -> Caller | None:
        """Who sends this Authorization header; None for a token that nobody has."""
        if authorization is None:
            return Caller()
        token = authorization.removeprefix("Bearer ").strip()
        for user in self._users:
            if token in user.tokens:
                return Caller(user.name, user.orgs, user.tokens[token], token)
        return None


def require_read(caller: Caller, repo: Repo | None, repo_id: str) -> Repo:
    """A repo that the caller may see; private ones do not exist for others."""
    if repo is None or not caller.may_read(repo):
        if not caller.name:
            raise Refused(401, f"Invalid username or password. {repo_id} may be private.", "RepoNotFound")
        raise Refused(404, f"Repository not found: {repo_id}", "RepoNotFound")
    if repo.facts["disabled"]:
        raise Refused(403, "Access to this resource is disabled.")
    return repo


def require_files(caller: Caller, repo: Repo) -> None:
    """Files of a gated repo are for those who were let in."""
    if not repo.facts["gated"] or caller.owns(repo.owner) or caller.name in repo.facts["granted"]:
        return
    what = f"Access to {repo.kind[:-1]} {repo.id} is restricted"
    if not caller.name:
        raise Refused(
            401, f"{what}. You must have access to it and be authenticated to access it. {_INVITE}", "GatedRepo"
        )
    raise Refused(403, f"{what} and you are not in the authorized list. Ask for access on its page.", "GatedRepo")


def require_write_token(caller: Caller) -> None:
    """What opens a pull request or changes anything needs a token with the role write."""
    if not caller.name:
        raise Refused(401, f"Invalid username or password. {_INVITE}")
    if caller.role != "write":
        raise Refused(403, f"Forbidden: the token of {caller.name} has the role read, this needs the role write")


def require_owner(caller: Caller, namespace: str) -> None:
    """A write token of the user, or of a member of the organization."""
    require_write_token(caller)
    if not caller.owns(namespace):
        raise Refused(403, f"Forbidden: {caller.name} has no rights in the namespace {namespace}")


def require_write(caller: Caller, repo: Repo, revision: str | None = None) -> None:
    """Branches are for the owners; refs/pr/N also for who opened that pull request; None: any pull request."""
    require_write_token(caller)
    if revision is None or caller.owns(repo.owner):
        return
    if revision.startswith(PULL) and revision in repo.refs:
        number = int(revision.removeprefix(PULL))
        if repo.discussions[number - 1]["author"]["name"] == caller.name:
            return
    raise Refused(
        403, f"Forbidden: {repo.id} is not yours, pass `create_pr=1` as a query parameter to create a Pull Request"
    )
