"""Bytes -> an object in the storage of a repo, which no branch shows until a commit names it.

    Xet     streamed while the file is produced; finalised file by file, so that a killed run loses one file at most
    LFS     by SHA-256, which is known only at the end: the file waits in anonymous memory (memory.py, lfs.py)
    git     small files travel inside the commit itself; the Hub decides which ("preupload")

No byte touches a disk.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from mso_hub.errors import HubError, MsoError, SinkError, TransientError
from mso_hub.hub.client import Client, Patience
from mso_hub.hub.lfs import send_lfs
from mso_hub.hub.memory import MemoryFile
from mso_hub.hub.repository import RemoteFile
from mso_hub.hub.target import Target
from mso_hub.hub.xet import token_refresh, xet_headers, xet_session

HELD = 1 << 20
"""Bytes of a file that are held back before it has to be known where it goes."""
GIT_LIMIT = 10_000_000
"""Bytes from which on the Hub takes no file into git: no need to ask."""
SAMPLE = 512
"""First bytes by which the Hub tells text from binary."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A file that a commit can name.

    xet_hash  set when its bytes went to Xet storage
    content   of a file that belongs into git: it travels in the commit; None for objects
    """

    nbytes: int
    sha256: str
    xet_hash: str | None = None
    content: bytes | None = None


class _Transport(Protocol):
    def write(self, data: bytes) -> None:
        """Append bytes."""

    def finish(self, sha256: str) -> str | None:
        """All bytes came: store the object -> its Xet hash, when it has one."""

    def abort(self) -> None:
        """Give it up."""


class Upload:
    """One file on its way; `write` and `abort` belong to the producer, `finish` may run on another thread."""

    def __init__(self, client: Client, target: Target, path: str, nbytes: int) -> None:
        self.path, self.nbytes = path, nbytes
        self._client, self._target = client, target
        self._sha = hashlib.sha256()
        self._written = 0
        self._held = bytearray()
        self._transport: _Transport | None = None
        self._in_git = False

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self._sha.update(data)
        self._written += len(data)
        if self._written > self.nbytes:
            self.require_whole()
        if self._transport is not None:
            self._transport.write(data)
            return
        self._held += data
        if len(self._held) > HELD and not self._in_git:
            self._decide()

    def require_whole(self) -> None:
        """SinkError when other than the announced bytes came."""
        if self._written != self.nbytes:
            raise SinkError(
                f"{self._target}/{self.path}: announced {self.nbytes:,} bytes, got {self._written:,}; "
                "please report this"
            )

    def _decide(self) -> None:
        """Ask where the file belongs, and start it on its way when that is not git."""
        if self.nbytes <= GIT_LIMIT:
            sample = bytes(self._held[:SAMPLE])
            self._in_git = goes_to_git(self._client, self._target, self.path, self.nbytes, sample)
        if not self._in_git:
            opening = _XetStream if self._target.xet else _LfsObject
            self._transport = opening(self._client, self._target, self.path, self.nbytes)
            held, self._held = bytes(self._held), bytearray()
            self._transport.write(held)

    def finish(self) -> Stored:
        """Store what was written; blocks until the Hub has it."""
        self.require_whole()
        if self._transport is None and not self._in_git:
            self._decide()
        digest = self._sha.hexdigest()
        if self._transport is None:
            return Stored(self.nbytes, digest, content=bytes(self._held))
        return Stored(self.nbytes, digest, self._transport.finish(digest))

    def abort(self) -> None:
        """Give the file up; may be called at any time, from any thread."""
        self._held = bytearray()
        if self._transport is not None:
            self._transport.abort()


class _XetStream:
    """A file on its way to Xet storage."""

    def __init__(self, client: Client, target: Target, path: str, nbytes: int) -> None:
        import hf_xet

        self._name, self._nbytes = f"{target}/{path}", nbytes
        self._client = client
        url, headers = token_refresh(client, target.repo_id, "write", target.token_revision, create_pr=target.create_pr)
        # The first token by ourselves: hf_xet gives up on a busy Hub after seconds, and hides what it said.
        granted = client.ask("GET", url, what=str(target))
        with self._naming():
            self._commit: Any = xet_session(client.patience.silence, _tries(client.patience)).new_upload_commit(
                endpoint=granted["casUrl"],
                token=granted["accessToken"],
                token_expiry_unix_secs=granted["exp"],
                token_refresh_url=url,
                token_refresh_headers=headers,
                custom_headers=xet_headers(client),
            )
            self._stream: Any = self._commit.start_upload_stream(name=path, sha256=hf_xet.COMPUTE_SHA256)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """What hf_xet raises -> TransientError: its own retries are used up, and the bytes must be produced again."""
        from hf_xet import XetAuthenticationError as refused  # noqa: N813 - an error class as it is used below

        try:
            yield
        except MsoError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            if isinstance(error, refused):
                raise HubError(
                    f"{self._name}: Xet storage refuses this account: {self._client.clean(error)}; check that the "
                    "token may still write, then run the same command again"
                ) from None
            raise TransientError(
                f"{self._name}: {self._nbytes:,} bytes could not be stored: {self._client.clean(error)}; "
                "what is complete is kept, run the same command again"
            ) from None

    def write(self, data: bytes) -> None:
        """Append; waits while storage is slower than the producer."""
        with self._naming():
            self._stream.write(data)

    def finish(self, sha256: str) -> str:
        """Finalise: from here on the object survives a crash."""
        with self._naming():
            stream, commit = self._stream, self._commit
            if commit is None:
                raise SinkError(f"{self._name}: was given up before all of its {self._nbytes:,} bytes were stored")
            stored = stream.finish().xet_info
            commit.wait_to_finish()
            self._stream = self._commit = None  # they hold connections and buffers
        if (stored.sha256, stored.file_size) != (sha256, self._nbytes):
            raise HubError(
                f"{self._name}: wrote {self._nbytes:,} bytes with SHA-256 {sha256}, Xet storage took "
                f"{stored.file_size:,} with {stored.sha256}; run the same command again, and check this memory"
            )
        return str(stored.hash)

    def abort(self) -> None:
        """Cancel; `finish` on another thread then raises."""
        stream, commit = self._stream, self._commit
        if commit is None:
            return
        try:
            stream.abort()
            commit.abort()
        except (OSError, RuntimeError):
            return  # it is over already, one way or the other
        finally:
            self._stream = self._commit = None


class _LfsObject:
    """A file that waits in memory until its digest is known."""

    def __init__(self, client: Client, target: Target, path: str, nbytes: int) -> None:
        self._client, self._target, self._path, self._nbytes = client, target, path, nbytes
        self._memory = MemoryFile(f"{target}/{path}", nbytes)

    def write(self, data: bytes) -> None:
        """Append."""
        self._memory.write(data)

    def finish(self, sha256: str) -> None:
        """Send it and free the memory."""
        try:
            send_lfs(self._client, self._target, self._path, self._memory, sha256)
        finally:
            self._memory.close()

    def abort(self) -> None:
        """Free the memory; a transfer under way ends at its next block."""
        self._memory.close()


def _tries(patience: Patience) -> int:
    """Tries of one storage request, with 1 s, 2 s, 4 s ... between them: the producer cannot repeat its bytes."""
    return max(2, math.ceil(math.log2(patience.total + 1)))


def goes_to_git(client: Client, target: Target, path: str, nbytes: int, sample: bytes) -> bool:
    """Does the Hub want this file in git (and not in LFS or Xet storage)?"""
    if nbytes == 0:
        return True  # object storage takes no empty object
    asked = {"path": path, "sample": base64.b64encode(sample).decode(), "size": nbytes}
    found = client.ask("POST", target.api("preupload"), what=str(target), json={"files": [asked]}, params=target.params)
    answer = {file["path"]: file for file in found["files"]}.get(path)
    if answer is None or answer.get("shouldIgnore"):
        raise HubError(
            f"{target}/{path}: a .gitignore in the repo keeps this file out; remove the line that matches it there"
        )
    return bool(answer["uploadMode"] == "regular")


def duplicate(client: Client, target: Target, source: str, file: RemoteFile) -> bool:
    """Give the target repo an object of the `source` repo without a transfer; False when the Hub does not do it."""
    if file.sha256 is None:
        return False
    if source == target.repo_id:
        return True
    if file.xet_hash is None:
        return False
    body = {
        "target": {"type": "model", "name": target.repo_id},
        "files": [{"xetHash": file.xet_hash, "sha256": file.sha256, "filename": file.path}],
    }
    try:
        found = client.ask("POST", f"/api/models/{source}/lfs-files/duplicate", what=str(target), json=body)
    except TransientError:
        raise
    except HubError:
        return False  # another region, a storage without the feature, a permission: the bytes can still be sent
    return not found.get("failed")
