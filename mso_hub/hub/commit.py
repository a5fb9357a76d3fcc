"""One atomic commit, over the Hub's own wire: NDJSON lines to `/api/models/{repo}/commit/{revision}`.

HfApi.create_commit is not used. An object that is stored already, perhaps by an earlier process, reaches it only
through private attributes of CommitOperationAdd, which moved between huggingface_hub 1.31 and 2.4; it asks again where
every file belongs, and it leaves files out that look unchanged. The lines are the Hub's public protocol and the same
for both: a header with the parent, `file` with its content, `lfsFile` with SHA-256 and size, `deletedFile`.

The Hub gives up on a commit after a minute and may have made it nevertheless, so a repetition first looks whether
the commit landed. `parentCommit` makes the Hub refuse (412) when somebody else was faster.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mso_hub.errors import HubError, MsoError
from mso_hub.hub.client import Client, client_errors, may_pass, status_of
from mso_hub.hub.lookup import head_of, paths_info
from mso_hub.hub.pull_request import find_own
from mso_hub.hub.repository import RemoteFile
from mso_hub.hub.target import Target

LOOKS = 3
"""Times that a commit is compared with what was sent before it counts as wrong."""


@dataclass(frozen=True, slots=True)
class Put:
    """A file to be there: by its content in git, or by the SHA-256 of a stored object."""

    nbytes: int
    sha256: str
    content: bytes | None = None

    @classmethod
    def of(cls, content: bytes) -> Put:
        """A file in git."""
        return cls(len(content), hashlib.sha256(content).hexdigest(), content)

    def is_in(self, file: RemoteFile | None) -> bool:
        """Does this file of a repo hold what was to be put there?"""
        if file is None or file.nbytes != self.nbytes:
            return False
        if file.sha256 is not None:
            return file.sha256 == self.sha256
        return self.content is not None and file.blob_id == git_oid(self.content)


@dataclass(frozen=True, slots=True)
class Change:
    """What a commit does.

    parent   commit that it builds on
    title    first line of its message, and title of the pull request that it opens
    account  who makes it, to find that pull request again
    """

    parent: str
    title: str
    account: str
    description: str = ""
    puts: Mapping[str, Put] = field(default_factory=dict)
    deletes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit that was made; `pull_request` is the address of the one that it opened or went to."""

    oid: str
    url: str
    pull_request: str | None = None


class MovedError(HubError):
    """Somebody committed to the target since `parent`."""


class VanishedError(HubError):
    """The Hub no longer has an object that the commit names."""


def git_oid(content: bytes) -> str:
    """Id of a file in git."""
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content), usedforsecurity=False).hexdigest()


def send_commit(
    client: Client, target: Target, change: Change, *, wait: Callable[[float], object] = time.sleep
) -> Commit:
    """Make the commit, once; MovedError, VanishedError or another HubError when the Hub refuses it.

    wait  sleeps before another try; may raise to end the tries
    """
    body = b"".join(json.dumps(line).encode() + b"\n" for line in _lines(change))
    started, tries = 0.0, 0
    while True:
        try:
            return _post(client, target, change, body)
        except MovedError:
            # Perhaps it is our own first try that moved the head, after we had stopped waiting for it.
            earlier = _landed(client, target, change) if tries else None
            if earlier is None:
                raise
            return earlier
        except MsoError:
            raise
        except client_errors() as error:
            failure = error
            started = started or time.monotonic()
        if not may_pass(failure):
            raise client.explain(failure, str(target))
        client.pause(tries, started, str(target), failure, wait)
        tries += 1
        earlier = _landed(client, target, change)
        if earlier is not None:
            return earlier


def _lines(change: Change) -> Iterable[dict[str, Any]]:
    header = {"summary": change.title, "description": change.description, "parentCommit": change.parent}
    yield {"key": "header", "value": header}
    for path in change.deletes:
        yield {"key": "deletedFile", "value": {"path": path}}
    for path, put in change.puts.items():
        if put.content is None:
            value = {"path": path, "algo": "sha256", "oid": put.sha256, "size": put.nbytes}
            yield {"key": "lfsFile", "value": value}
        else:
            content = base64.b64encode(put.content).decode()
            yield {"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}}


def _post(client: Client, target: Target, change: Change, body: bytes) -> Commit:
    """One try."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import get_session, hf_raise_for_status

    response = get_session().post(
        client.endpoint + target.api("commit"),
        headers={**client.headers(), "Content-Type": "application/x-ndjson"},
        params=target.params,
        content=body,
    )
    try:
        hf_raise_for_status(response, endpoint_name="commit")
    except HfHubHTTPError as error:
        said = client.clean(getattr(error, "server_message", None) or str(error))
        if status_of(error) == 412:
            raise MovedError(f"{target}: somebody committed there since {change.parent[:12]}: {said}") from None
        if status_of(error) == 400 and "does not exist" in said and "LFS" in said:
            raise VanishedError(said) from None
        raise
    answer = response.json()
    return described(client, target, str(answer["commitOid"]), answer.get("pullRequestUrl"))


def described(client: Client, target: Target, oid: str, pull_request: str | None = None) -> Commit:
    """A commit with its addresses."""
    if pull_request is None and target.in_pull_request and not target.create_pr:
        pull_request = f"{client.endpoint}/{target.repo_id}/discussions/{target.revision.rpartition('/')[2]}"
    return Commit(oid, f"{client.endpoint}/{target.repo_id}/commit/{oid}", pull_request)


def _landed(client: Client, target: Target, change: Change) -> Commit | None:
    """The commit of an earlier try whose answer got lost, when there is one."""
    pull_request, revision = None, target.revision
    if target.create_pr:
        number = find_own(client, target.repo_id, change.account, change.title)
        if number is None:
            return None
        pull_request, revision = f"{client.endpoint}/{target.repo_id}/discussions/{number}", f"refs/pr/{number}"
    oid = head_of(client, target.repo_id, revision)
    if oid == change.parent:
        return None
    found = paths_info(client, target.repo_id, [*change.puts, *change.deletes], oid)
    if any(path in found for path in change.deletes):
        return None
    if not all(put.is_in(found.get(path)) for path, put in change.puts.items()):
        return None
    return described(client, target, oid, pull_request)


def verify_commit(client: Client, target: Target, change: Change, commit: Commit) -> None:
    """HubError when the Hub shows other files than were sent."""
    for tries in range(LOOKS):
        found = paths_info(client, target.repo_id, list(change.puts), commit.oid)
        wrong = [path for path, put in change.puts.items() if not put.is_in(found.get(path))]
        if not wrong:
            return
        if tries < LOOKS - 1:
            time.sleep(client.patience.wait(tries))  # one of its servers may lag behind
    path, put, file = wrong[0], change.puts[wrong[0]], found.get(wrong[0])
    what = f"{file.nbytes:,} bytes, {file.sha256 or file.blob_id}" if file else "nothing"
    raise HubError(
        f"{target}/{path}: commit {commit.oid[:12]} must hold {put.nbytes:,} bytes with SHA-256 {put.sha256}, "
        f"the Hub shows {what}; do not use it, run the same command with --fresh"
    )


def require_valid_card(client: Client, target: Target, content: bytes) -> None:
    """HubError when the Hub would not take this README.md; asked early, not when all else is sent."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    def once() -> Any:
        body = {"content": content.decode(), "repoType": "model"}
        response = get_session().post(f"{client.endpoint}/api/validate-yaml", headers=client.headers(), json=body)
        if response.status_code == 400:
            return response.json()
        hf_raise_for_status(response)
        return response.json()

    errors = client.attempt(once, what=f"{target}/README.md").get("errors") or []
    if errors:
        said = " ".join("; ".join(str(error.get("message")) for error in errors).split())
        raise HubError(f"{target}/README.md: the Hub does not take its metadata: {client.clean(said)}; correct it")


def absent(error: VanishedError, puts: Mapping[str, Put]) -> list[str]:
    """Paths whose object an answer of the Hub names; empty when it names none."""
    said = str(error)
    return [path for path, put in puts.items() if put.content is None and (put.sha256 in said or path in said)]
