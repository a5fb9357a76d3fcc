"""The journal on a branch of the target repo, so that another machine can go on.

Each stored shard is one commit there: its pointer, which keeps the object from being collected, and `mso_hub.journal`.
The parent of every commit is the one before it, so a second writer is noticed at once.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping

from mso_hub.errors import ResumeError, SinkError
from mso_hub.hub.client import Client
from mso_hub.hub.commit import Change, MovedError, Put, send_commit
from mso_hub.hub.lookup import create_branch, delete_branch, head_of, read_small, refs
from mso_hub.hub.target import DEFAULT, Target
from mso_hub.sink.journal import Progress, parse_header

FILE = "mso_hub.journal"


BEGUN = "journal branch is begun"
"""Note in the journal: a branch without a journal of ours may be one that we made and did not get to fill."""


class Mirror:
    """A journal branch; it is made with the first shard."""

    def __init__(self, client: Client, target: Target, branch: str, account: str) -> None:
        self._client, self._account = client, account
        self._target = Target(target.repo_id, branch)
        self._parent: str | None = None
        self._kept: set[str] = set()
        self._lock = threading.Lock()  # copies and uploads are recorded by different threads
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End a commit that waits for another try: it must not land when somebody else goes on with the output."""
        self._stopped.set()

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise SinkError(f"{self._target}: was closed before the Hub took the journal; run the same command again")

    def load(self, job: str, *, fresh: bool, begun: bool = False) -> Progress:
        """What an earlier run, on whatever machine, wrote down; ResumeError for another job's.

        begun  an earlier run on this machine was about to make the branch: it may be there without a journal
        """
        repo, branch, progress = self._target.repo_id, self._target.revision, Progress(job)
        if branch not in refs(self._client, repo)[0]:
            return progress
        head = head_of(self._client, repo, branch)
        text = read_small(self._client, repo, FILE, head)
        if text is None and begun and head == head_of(self._client, repo, DEFAULT):
            self._parent = head  # made from there, by a run that ended before it wrote anything
            return progress
        if text is None:
            raise ResumeError(
                f"{self._target}: --journal_branch must be new or of an earlier run, this branch has no {FILE}; "
                "choose another name"
            )
        if fresh:
            delete_branch(self._client, repo, branch)
            return progress
        self._parent = head
        progress.load(str(self._target), text)
        self._kept = set(progress.files)
        return progress

    def save(self, progress: Progress) -> None:
        """Bring the branch up to date; ResumeError when somebody else wrote there."""
        with self._lock:
            self._save(progress)

    def _save(self, progress: Progress) -> None:
        objects = {n: e for n, e in progress.files.items() if "content" not in progress.extras[n]}
        if objects.keys() == self._kept:
            return
        lines = [line for line in progress.lines() if "content" not in line]
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        puts: Mapping[str, Put] = {
            **{name: Put(entry.nbytes, entry.sha256) for name, entry in objects.items() if name not in self._kept},
            FILE: Put.of(text),
        }
        parent = self._parent or self._begun()
        title = "1 shard is stored" if len(objects) == 1 else f"{len(objects)} shards are stored"
        try:
            change = Change(parent, title, self._account, puts=puts)
            self._parent = send_commit(self._client, self._target, change, wait=self._sleep).oid
        except MovedError:
            raise self._taken() from None
        self._kept = set(objects)

    def _begun(self) -> str:
        """Head of the new branch; ResumeError when somebody made it since `load`."""
        repo, branch = self._target.repo_id, self._target.revision
        create_branch(self._client, repo, branch)
        head = head_of(self._client, repo, branch)
        if read_small(self._client, repo, FILE, head) is not None:
            raise self._taken()
        return head

    def _taken(self) -> ResumeError:
        return ResumeError(
            f"{self._target}: another process is writing the same output, on this machine or another; "
            "wait for it to end"
        )

    def remove(self, job: str) -> None:
        """Delete the branch, when it is there and of this job."""
        repo, branch = self._target.repo_id, self._target.revision
        if branch not in refs(self._client, repo)[0]:
            return
        text = read_small(self._client, repo, FILE, head_of(self._client, repo, branch))
        if text is not None and parse_header(text).get("job") == job:
            delete_branch(self._client, repo, branch)
        self._parent = None
        self._kept = set()
