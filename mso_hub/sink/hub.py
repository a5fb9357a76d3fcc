"""A repo on the Hub as a sink: files are stored while they are produced, and one commit names them all.

before       account, permission and what lies at the target; the repo and the branch where they are missing
during       objects without a name, which no reader sees; a journal on this machine says which
at the end   one commit on the head that was found, checked afterwards against what the Hub shows

Nothing but the journal touches a disk. It names objects by SHA-256, so a second run goes on where the first one was
killed, and a journal branch in the repo lets another machine do so.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mso_hub.errors import SinkError, TransientError
from mso_hub.hub import Address, Client, Origin, RemoteFile, take_snapshot
from mso_hub.hub.commit import Change, Commit, Put, VanishedError, absent, described, require_valid_card
from mso_hub.hub.lfs import present
from mso_hub.hub.lookup import head_of, is_commit_of, read_small
from mso_hub.hub.target import DEFAULT, Access, Target, Wish, create, look
from mso_hub.hub.upload import Stored, Upload, duplicate
from mso_hub.sink.background import Background, Writer
from mso_hub.sink.guard import require_hidden, require_journal_branch, require_other
from mso_hub.sink.journal import Entry, Journal, cache_folder, header_of, journal_path
from mso_hub.sink.mirror import BEGUN, Mirror
from mso_hub.sink.publish import publish
from mso_hub.sink.survey import EDITABLE, MANIFEST, Survey, parse_manifest
from mso_hub.sink.target import EMPTY

CARD = "README.md"
TITLE = "Add a converted checkpoint"
WAITING = 1
"""Finished files that may wait for their upload while the next one is produced."""


class HubSink:
    """Output repo at `address`; nothing is sent before `begin`.

    fresh           replace an earlier output of this tool, finished or not
    private         for a repo that is to be created
    branch          write to this branch, made from the default branch where it is missing
    create_pr       propose the output to a repo of somebody else; an open proposal with this title is continued
    journal_branch  keep the journal on this branch too, until the output is committed
    cache           folder for the journal; see `cache_folder`
    title           first line of the commit, and title of the pull request
    description     the rest of its message; the pull request begins with it
    """

    def __init__(
        self, client: Client, address: Address, *, fresh: bool = False, private: bool = False,
        create_pr: bool = False, branch: str | None = None, journal_branch: str | None = None,
        cache: Path | None = None, title: str = TITLE, description: str = "",
    ) -> None:  # fmt: skip
        self._client, self._fresh = client, fresh
        self._wish = Wish(address, title, branch, create_pr, private)
        self._description, self._journal_branch = description, journal_branch
        self._cache = cache or cache_folder()
        self._commit: Commit | None = None
        self._origin: Origin | None = None
        self._reset()

    def _reset(self) -> None:
        self._account = ""
        self._target = Target(self._wish.address.repo_id, self._wish.revision)
        self._survey = Survey(self.name, "")
        self._sizes: Mapping[str, int] = {}
        self._entries: dict[str, Entry] = {}
        self._puts: dict[str, Put] = {}
        self._done = self._finished = False
        self._journal: Journal | None = None
        self._mirror: Mirror | None = None
        self._background: Background | None = None
        self._upload: Upload | None = None
        self._recording = threading.Lock()

    @property
    def name(self) -> str:
        """Address of the output."""
        return str(Address(self._wish.address.repo_id, self._wish.branch or self._wish.address.revision))

    @property
    def path(self) -> Path | None:
        """Always None."""
        return None

    @property
    def where(self) -> str:
        """Page of the pull request or of the branch."""
        page = f"{self._client.endpoint}/{self._wish.address.repo_id}"
        return self.pull_request or (page if self._wish.revision == DEFAULT else f"{page}/tree/{self._wish.revision}")

    @property
    def address(self) -> str:
        """Repo, and branch or pull request; that of a new pull request is known once it is committed."""
        revision = self._target.revision
        if self._commit and self._commit.pull_request:
            revision = f"refs/pr/{self._commit.pull_request.rpartition('/')[2]}"
        return str(Address(self._target.repo_id, None if revision == DEFAULT else revision))

    @property
    def finished(self) -> bool:
        """Did begin() find the output of this job, complete?"""
        return self._finished

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Files that the Hub has and the journal names; a copy, because uploads end at any time."""
        return dict(self._entries)

    @property
    def notes(self) -> Mapping[str, float]:
        """Numbers of an earlier run of this job."""
        return {} if self._done else self._open_journal.notes

    @property
    def commit_oid(self) -> str | None:
        """Commit that shows the output."""
        return self._commit.oid if self._commit else None

    @property
    def commit_url(self) -> str | None:
        """Its page."""
        return self._commit.url if self._commit else None

    @property
    def pull_request(self) -> str | None:
        """Page of the pull request that the output went to, None when it went to a branch."""
        return self._commit.pull_request if self._commit else None

    @property
    def journal(self) -> Path:
        """Where the journal of this output lies."""
        place = "pr" if self._wish.create_pr else self._wish.revision
        return journal_path(self._cache, self._client.endpoint, self._wish.address.repo_id, place)

    @property
    def _open_journal(self) -> Journal:
        if self._journal is None:
            raise SinkError(f"{self.name}: call begin() first, the sink is closed")
        return self._journal

    def guard(self, origin: Origin | None) -> None:
        """Refuse to write over the source; begin() refuses to publish what is private."""
        self._origin = origin
        if origin is not None:
            require_other(origin, self._client.endpoint, self._wish)

    def require_free(self) -> None:
        """Errors of `begin` for a repo that may not be written to; nothing is created."""
        access = look(self._client, self._wish)
        require_hidden(self._origin, self._wish, private=access.private)
        self._account, self._target = access.account, access.target
        if access.exists and (survey := self._surveyed(missing=access.missing)).finished is None:
            survey.require_room("", fresh=self._fresh)

    def begin(self, job: str, sizes: Mapping[str, int]) -> None:
        """Refuse what cannot work, then see what is done; a finished output of the same job is done in full."""
        self.close()
        self._reset()
        self._sizes = dict(sizes)
        if self._journal_branch is not None:
            require_journal_branch(self._journal_branch, self._wish)
        access = look(self._client, self._wish)
        require_hidden(self._origin, self._wish, private=access.private)
        self._account, self._target = access.account, access.target
        if access.exists:
            self._survey = self._surveyed(missing=access.missing)
            if self._survey.finished == job and not self._fresh:
                self._accept(job, access)
                return
            self._survey.require_room(job, fresh=self._fresh)
        try:
            self._start(job, access)
        except BaseException:
            self.close()
            raise

    def _surveyed(self, *, missing: bool = False) -> Survey:
        """What lies at the target, or at the default branch where the target's is still to be made from it."""
        repo, revision = self._target.repo_id, DEFAULT if missing else self._target.revision
        snapshot = take_snapshot(self._client, Address(repo, revision))
        inherited = missing or self._target.create_pr
        if revision != DEFAULT and not inherited:
            inherited = snapshot.commit == head_of(self._client, repo, DEFAULT) or (
                self.journal.exists() and is_commit_of(self._client, repo, snapshot.commit, DEFAULT)
            )
        manifest = None
        if MANIFEST in snapshot.files:
            manifest = read_small(self._client, repo, MANIFEST, snapshot.commit)
        return Survey(
            self.address, snapshot.commit, snapshot.files, inherited, parse_manifest(manifest or b""),
            proposal=self._target.in_pull_request,
        )  # fmt: skip

    def _accept(self, job: str, access: Access) -> None:
        """The output is finished: its entries come from its manifest."""
        survey, repo = self._survey, self._target.repo_id
        self._entries = survey.entries(self._sizes)
        for name in self._entries.keys() - EDITABLE:
            if survey.files[name].sha256 is None:
                content = read_small(self._client, repo, name, survey.commit) or b""
                survey.require_same(name, self._entries[name], Put.of(content).sha256)
        if access.missing:
            create(self._client, access, private=False)
        self._commit = described(self._client, self._target, survey.commit)
        self._done = self._finished = True
        if header_of(self.journal).get("job") == job:  # an earlier run ended between its commit and this line
            self.journal.unlink(missing_ok=True)
        if self._journal_branch is not None:
            self._mirrored(self._journal_branch).remove(job)

    def _start(self, job: str, access: Access) -> None:
        """Take the lock, make what is missing, and see which files an earlier run stored."""
        facts = {"target": self.name, "endpoint": self._client.endpoint}
        if self._fresh:
            facts["replaces"] = self._survey.commit
        path = self.journal
        with self._naming():
            path.parent.mkdir(parents=True, exist_ok=True)
            # A killed --fresh run is continued by the same command while what it replaces is still there.
            again = self._fresh and header_of(path) == {"job": job, **facts}
            self._journal = Journal(path, job, fresh=self._fresh and not again, facts=facts)
        if self._journal_branch is not None:
            self._mirror = self._mirrored(self._journal_branch)
        self._target = create(self._client, access, private=self._wish.private)
        if access.missing or not access.exists:
            self._survey = self._surveyed()
        if self._mirror is not None:
            remote = self._mirror.load(job, fresh=self._fresh and not again, begun=BEGUN in self._journal.notes)
            for name in remote.files.keys() - self._journal.files.keys():
                self._journal.done(name, remote.files[name], remote.extras[name])
            for key in remote.notes.keys() - self._journal.notes.keys():
                self._journal.note(key, remote.notes[key])
        self._keep_what_is_there(self._journal)
        self._background = Background()

    def _mirrored(self, branch: str) -> Mirror:
        return Mirror(self._client, self._target, branch, self._account)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """OSError of the journal -> SinkError."""
        try:
            yield
        except OSError as error:
            if isinstance(error, SinkError):
                raise
            raise SinkError(
                f"{self.journal}: the journal cannot be written: {error.strerror}; free some space, or name another "
                "folder in MSO_HUB_CACHE"
            ) from error

    def _keep_what_is_there(self, journal: Journal) -> None:
        """Entries whose object the Hub still has, or may have."""
        known = {name: e for name, e in journal.files.items() if self._sizes.get(name) == e.nbytes}
        extras = {name: journal.progress.extras[name] for name in known}
        objects = {name: entry for name, entry in known.items() if "content" not in extras[name]}
        here = present(self._client, self._target, {(e.sha256, e.nbytes) for e in objects.values()})
        for name, entry in known.items():
            content = base64.b64decode(extras[name]["content"]) if "content" in extras[name] else None
            # Xet storage knows objects that the LFS endpoint does not: the commit will tell.
            if content is not None or entry.sha256 in here or "xet_hash" in extras[name]:
                self._entries[name] = entry
                self._puts[name] = Put(entry.nbytes, entry.sha256, content)
            else:
                journal.undo(name)

    @contextmanager
    def open(self, file: str, nbytes: int) -> Iterator[Writer]:
        """A file of known size, stored while it is written and after; it is an entry when the Hub has it."""
        journal, background = self._open_journal, self._background
        assert background is not None  # noqa: S101 - lives as long as the journal
        background.settle(WAITING)
        self._upload = upload = Upload(self._client, self._target, file, nbytes)
        try:
            yield Writer(upload)
            upload.require_whole()
        except BaseException:
            upload.abort()
            raise
        finally:
            self._upload = None
        background.add(upload, lambda: self._store(upload, journal))

    def _store(self, upload: Upload, journal: Journal) -> None:
        stored = upload.finish()
        if upload.path == CARD and stored.content is not None:
            require_valid_card(self._client, self._target, stored.content)
        self._record(upload.path, stored, journal)

    def _record(self, file: str, stored: Stored, journal: Journal) -> None:
        """Write down that the Hub has a file."""
        extras = {"xet_hash": stored.xet_hash} if stored.xet_hash else {}
        if stored.content is not None:
            extras["content"] = base64.b64encode(stored.content).decode()
        entry = Entry(stored.nbytes, stored.sha256)
        with self._recording, self._naming():
            if self._journal is not journal:  # closed meanwhile
                return
            journal.done(file, entry, extras)
        if self._mirror is not None:
            if BEGUN not in journal.notes:
                journal.note(BEGUN, 1.0)
            self._mirror.save(journal.progress)
        self._puts[file] = Put(stored.nbytes, stored.sha256, stored.content)
        self._entries[file] = entry

    def copy(self, file: str, origin: Origin, remote: RemoteFile) -> bool:
        """Take over a file of another repo of this Hub without a transfer; False when its bytes must be sent."""
        journal = self._open_journal
        same_hub = origin.endpoint.rstrip("/") == self._client.endpoint
        if not same_hub or remote.sha256 is None or self._sizes.get(file) != remote.nbytes:
            return False
        if not duplicate(self._client, self._target, origin.repo_id, remote):
            return False
        self._record(file, Stored(remote.nbytes, remote.sha256, remote.xet_hash), journal)
        return True

    def wait(self) -> None:
        """Until every file that was handed over is stored; raises what went wrong."""
        if self._background is not None:
            self._background.settle(0)

    def note(self, key: str, value: float) -> None:
        """Remember a number in the journal."""
        journal = self._open_journal
        with self._naming():
            journal.note(key, value)

    def commit(self, manifest: bytes, closing: Mapping[str, bytes] = EMPTY) -> None:
        """One commit with all files; nothing to do where the output is finished."""
        if self._done:
            return
        journal = self._open_journal
        self.wait()
        missing = sorted(self._sizes.keys() - self._entries.keys())
        if missing:
            raise SinkError(f"{self.name}: {len(missing)} of {len(self._sizes)} files were not written: {missing[0]}")
        if CARD in closing:
            require_valid_card(self._client, self._target, closing[CARD])
        last = {name: Put.of(content) for name, content in {**closing, MANIFEST: manifest}.items()}
        puts = {**{name: self._puts[name] for name in self._sizes}, **last}
        change = Change(
            self._survey.commit, self._wish.title, self._account, self._description, puts,
            self._survey.stale(puts),
        )  # fmt: skip
        try:
            self._commit = publish(self._client, self._target, change, self._survey, self._surveyed)
        except VanishedError as error:
            raise self._forget(journal, puts, error) from None
        self._done = True
        if self._mirror is not None:
            self._mirror.remove(journal.progress.job)
        self.journal.unlink(missing_ok=True)
        self.close()

    def _forget(self, journal: Journal, puts: Mapping[str, Put], error: VanishedError) -> TransientError:
        """Take what the Hub lost out of the journal."""
        objects = {name: put for name, put in puts.items() if put.content is None}
        here = present(self._client, self._target, {(p.sha256, p.nbytes) for p in objects.values()})
        lost = [*absent(error, objects), *(name for name, put in objects.items() if put.sha256 not in here)]
        for name in dict.fromkeys(lost or objects):
            journal.undo(name)
            self._entries.pop(name, None)
        if self._mirror is not None:
            if BEGUN not in journal.notes:
                journal.note(BEGUN, 1.0)
            self._mirror.save(journal.progress)
        return TransientError(
            f"{self.name}: the Hub no longer has {len(dict.fromkeys(lost or objects))} of {len(objects)} stored files, "
            f"{next(iter(lost or objects))} first; run the same command again, it sends them again"
        )

    def abort(self) -> None:
        """Give up the uploads that are under way."""
        upload, background = self._upload, self._background
        if upload is not None:
            upload.abort()
        if background is not None:
            background.stop()

    def close(self) -> None:
        """Stop uploads, release the lock; what is journaled stays, a run that completed nothing leaves no journal."""
        background, self._background = self._background, None
        for part in (self._mirror, background):
            if part is not None:
                part.stop()
        with self._recording:
            journal, self._journal = self._journal, None
        if journal is None:
            return
        if not journal.files and not journal.notes:
            self.journal.unlink(missing_ok=True)
        journal.close()
