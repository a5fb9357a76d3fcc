"""Who we are, where this account may write, and which names git takes for a branch."""

from __future__ import annotations

import re
from typing import Any

from mso_hub.errors import HubError, RecipeError
from mso_hub.hub.client import Client, client_errors, status_of

BAD_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[/-]|[/.]$|(^|/)\.|\.lock(/|$)|^(@|HEAD)?$|^main/")
"""What `git check-ref-format --branch` refuses; below `main` nothing fits, because that is a branch."""


def require_branch_name(name: str, option: str, what: str) -> None:
    """RecipeError for what cannot be the name of a branch."""
    found = BAD_REF.search(name)
    if found is None:
        return
    bad = f"{found[0]!r} in {name!r}" if name and found[0] else repr(name)
    raise RecipeError(
        f"{what}: {option} must be the name of a git branch, found {bad}; take letters, digits, - _ . and /, "
        "with no dot at the start or end of a part, no two dots or slashes in a row and no .lock at the end"
    )


def require_account(client: Client, what: str) -> str:
    """User name; HubError without a login and for a token that may only read."""
    if client.anonymous:
        raise HubError(f"{what}: writing needs a login, found none; run `hf auth login` or set HF_TOKEN")
    said = _whoami(client, what)
    if said.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(
            f"{what}: needs a token with write permission, found one that may only read (account {said['name']}); "
            f"make one at {client.endpoint}/settings/tokens, then `hf auth login`"
        )
    return str(said["name"])


def require_writable(client: Client, repo: str, what: str) -> None:
    """HubError, with the ways out, where this account may not write to a repo that is there."""

    def once() -> str | None:
        try:
            client.api.auth_check(repo, write=True)
        except client_errors() as error:
            return _refusal(client, error)
        return None

    said = client.attempt(once, what=what)
    if said is not None:
        raise HubError(
            f"{what}: this account may not do that ({said}); {namespaces(client, what)}; choose a repo there, or "
            "propose the output to this one with --create_pr"
        )


def create_repo(client: Client, repo: str, *, private: bool) -> None:
    """A repo, unless it is there; HubError that says where this account may make one."""
    what = f"hf://{repo}"

    def once() -> str | None:
        try:
            client.api.create_repo(repo, private=private or None, exist_ok=True)
        except client_errors() as error:
            return _refusal(client, error)
        return None

    said = client.attempt(once, what=what)
    if said is not None:
        raise HubError(
            f"{what}: there is no such repo that this account may see, and this account may not do that: create it "
            f"({said}); {namespaces(client, what)}; choose a repo there"
        )


def _refusal(client: Client, error: Exception) -> str | None:
    """What the Hub said where it refuses this account; raises every other error again."""
    from huggingface_hub.errors import DisabledRepoError, GatedRepoError

    if status_of(error) != 403 or isinstance(error, (DisabledRepoError, GatedRepoError)):
        raise error
    return client.clean(getattr(error, "server_message", None) or str(error).splitlines()[0])


def namespaces(client: Client, what: str) -> str:
    """`alice may write to: alice, team`, by what the Hub says about the account."""
    said = _whoami(client, what)
    orgs = [org["name"] for org in said.get("orgs", ()) if org.get("roleInOrg") != "read"]
    return f"{said['name']} may write to: {', '.join([said['name'], *orgs])}"


def _whoami(client: Client, what: str) -> dict[str, Any]:
    said: dict[str, Any] = client.attempt(lambda: client.api.whoami(cache=True), what=what)
    return said
