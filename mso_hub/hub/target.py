"""Where a commit goes, and whether this account may write there: known before the first byte is sent."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from urllib.parse import quote

from mso_hub.errors import HubError, RecipeError
from mso_hub.hub.address import Address
from mso_hub.hub.client import Client, client_errors, status_of
from mso_hub.hub.lookup import create_branch, is_private, refs
from mso_hub.hub.permission import create_repo, namespaces, require_account, require_branch_name, require_writable
from mso_hub.hub.pull_request import find_own, require_own
from mso_hub.hub.xet import token_refresh, xet_enabled

DEFAULT = "main"
"""Default branch of every repo on the Hub."""
PULL_REQUEST = re.compile(r"refs/pr/(\d+)")
COMMIT = re.compile(r"[0-9a-f]{7,40}")


@dataclass(frozen=True, slots=True)
class Target:
    """Where objects and the commit go.

    revision   a branch or `refs/pr/N`
    create_pr  the commit opens a new pull request against `revision`
    xet        send objects to Xet storage, not by LFS
    """

    repo_id: str
    revision: str = DEFAULT
    create_pr: bool = False
    xet: bool = False

    def __str__(self) -> str:
        """As messages name it."""
        return f"hf://{self.repo_id}" + (f"@{self.revision}" if self.revision != DEFAULT else "")

    @property
    def address(self) -> Address:
        """To look at what lies there."""
        return Address(self.repo_id, self.revision)

    @property
    def in_pull_request(self) -> bool:
        """Is the commit a proposal, so that what it deletes stays on the branch?"""
        return self.create_pr or PULL_REQUEST.fullmatch(self.revision) is not None

    @property
    def params(self) -> dict[str, str] | None:
        """Query of requests that depend on whether this opens a pull request."""
        return {"create_pr": "1"} if self.create_pr else None

    @property
    def token_revision(self) -> str | None:
        """Revision that a storage token is asked for; none for a pull request that is still to be opened."""
        return None if self.create_pr else self.revision

    def api(self, verb: str) -> str:
        """Path of a request about this revision."""
        return f"/api/models/{self.repo_id}/{verb}/{quote(self.revision, safe='')}"


@dataclass(frozen=True, slots=True)
class Wish:
    """Where the user wants the output.

    branch     write there, and create it from the default branch when it is missing
    create_pr  propose it to a repo of somebody else; `title` finds an earlier proposal again
    private    for a repo that does not exist yet
    """

    address: Address
    title: str
    branch: str | None = None
    create_pr: bool = False
    private: bool = False

    @property
    def revision(self) -> str:
        """Branch or pull request that is named."""
        return self.branch or self.address.revision or DEFAULT

    def require_consistent(self) -> None:
        """RecipeError for settings that contradict each other."""
        address = self.address
        if address.folder:
            raise RecipeError(
                f"{address}: the output must be a whole repo, found the folder {address.folder}; name the repo alone"
            )
        if self.branch is not None:
            require_branch_name(self.branch, "--branch", str(address))
        if self.branch and address.revision not in (None, self.branch):
            raise RecipeError(f"{address}: names another branch than --branch {self.branch}; give one of them")
        if self.create_pr and self.revision != DEFAULT:
            raise RecipeError(
                f"{address}: the Hub opens pull requests against {DEFAULT} alone, found {self.revision}; leave it "
                "away, or write to that branch without --create_pr"
            )


@dataclass(frozen=True, slots=True)
class Access:
    """What the Hub said about the target.

    account  user name
    private  is the repo? None where there is none yet
    missing  branch that is to be created
    """

    target: Target
    account: str
    private: bool | None
    missing: bool = False

    @property
    def exists(self) -> bool:
        """Is the repo there?"""
        return self.private is not None


def look(client: Client, wish: Wish) -> Access:
    """Who we are and what we may do; nothing is created. HubError or RecipeError where the commit could not succeed."""
    wish.require_consistent()
    repo, what = wish.address.repo_id, str(wish.address)
    account = require_account(client, what)
    target = Target(repo, wish.revision, wish.create_pr)
    private = is_private(client, repo)
    if private is None:
        return _to_be_created(client, wish, Access(target, account, None))
    if wish.create_pr:
        client.attempt(lambda: client.api.auth_check(repo), what=what)
        earlier = find_own(client, repo, account, wish.title)
        if earlier is not None:
            target = replace(target, revision=f"refs/pr/{earlier}", create_pr=False)
        return Access(target, account, private)
    number = PULL_REQUEST.fullmatch(wish.revision)
    if number is not None and require_own(client, repo, account, int(number[1])):
        return Access(target, account, private)
    require_writable(client, repo, what)
    missing = number is None and not _is_branch(client, wish)
    return Access(target, account, private, missing)


def _to_be_created(client: Client, wish: Wish, access: Access) -> Access:
    what = f"hf://{wish.address.repo_id}"
    if wish.create_pr:
        raise HubError(
            f"{what}: a pull request needs a repo, found none; check the name, or leave --create_pr away to make a "
            f"new repo ({namespaces(client, what)})"
        )
    if PULL_REQUEST.fullmatch(wish.revision) or (wish.branch is None and wish.revision != DEFAULT):
        raise HubError(f"{what}: there is no such repo, so no {wish.revision} in it; check the name, or use --branch")
    return replace(access, missing=wish.revision != DEFAULT)


def _is_branch(client: Client, wish: Wish) -> bool:
    """Is the wished revision a branch? False when it may be created; HubError when it is none and may not be."""
    repo, revision, what = wish.address.repo_id, wish.revision, str(wish.address)
    branches, tags = refs(client, repo)
    if revision in branches:
        return True
    if revision in tags:
        raise HubError(
            f"{what}: a commit needs a branch, {revision} is a tag; name a branch, or create one by --branch"
        )
    if wish.branch is None and COMMIT.fullmatch(revision):
        raise HubError(f"{what}: a commit needs a branch, {revision} is a commit; name a branch, or use --branch")
    if wish.branch is None and revision != DEFAULT:
        raise HubError(f"{what}: the repo has no branch {revision}; create it by --branch {revision}")
    return False


def create(client: Client, access: Access, *, private: bool) -> Target:
    """Make the repo and the branch where they are missing -> target, which knows its storage."""
    repo, target = access.target.repo_id, access.target
    if not access.exists:
        create_repo(client, repo, private=private)
    if access.missing:
        create_branch(client, repo, target.revision)
    return replace(target, xet=_takes_xet(client, target))


def _takes_xet(client: Client, target: Target) -> bool:
    """May this account store objects by Xet there? False where Xet is off, here or at the Hub."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import get_session, hf_raise_for_status

    if not xet_enabled():
        return False
    url, headers = token_refresh(client, target.repo_id, "write", target.token_revision, create_pr=target.create_pr)

    def once() -> bool:
        response = get_session().get(url, headers=headers)
        try:
            hf_raise_for_status(response)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except client_errors() as error:
            if status_of(error) == 404:
                return False
            raise
        return True

    return client.attempt(once, what=str(target))
