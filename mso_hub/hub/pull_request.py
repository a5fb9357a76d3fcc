"""Pull requests of this account: found again, so that a second run adds to the first one's."""

from __future__ import annotations

from mso_hub.errors import HubError
from mso_hub.hub.client import Client

OPEN = ("open", "draft")


def find_own(client: Client, repo: str, account: str, title: str) -> int | None:
    """Number of the newest open pull request that `account` opened under this title."""

    def once() -> list[int]:
        found = client.api.get_repo_discussions(repo, author=account, discussion_type="pull_request")
        return [
            talk.num
            for talk in found
            if talk.is_pull_request and talk.author == account and talk.title == title and talk.status in OPEN
        ]

    return max(client.attempt(once, what=f"hf://{repo}"), default=None)


def require_own(client: Client, repo: str, account: str, number: int) -> bool:
    """Did `account` open this pull request? HubError when there is none or it is closed."""
    what = f"hf://{repo}@refs/pr/{number}"
    talk = client.attempt(lambda: client.api.get_discussion_details(repo, number), what=what)
    if not talk.is_pull_request or talk.status not in OPEN:
        kind = f"a {talk.status} pull request" if talk.is_pull_request else "a discussion"
        raise HubError(f"{what}: must be an open pull request, found {kind}; open a new one with --create_pr")
    return bool(talk.author == account)
