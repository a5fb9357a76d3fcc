"""Outputs on a Hub of this machine: servers, clients and sinks for the tests that write to a repo."""

from __future__ import annotations

import hashlib
import itertools
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from mso_hub.hub import Address, Client, Patience, RemoteFile
from mso_hub.hub.devhub import DevHub
from mso_hub.hub.lookup import paths_info
from mso_hub.sink.hub import HubSink

JOB, OTHER_JOB = "a" * 64, "b" * 64
MIB = 1 << 20
QUICK = Patience(first=0.01, longest=0.05, total=5.0, silence=20.0)
NUMBERS = itertools.count()
KEEP = {".gitattributes"}


def noise(nbytes: int, seed: object = 0) -> bytes:
    """Bytes that no storage has yet."""
    blocks = (hashlib.sha512(f"{seed}/{number}".encode()).digest() for number in range(-(-nbytes // 64)))
    return b"".join(blocks)[:nbytes]


def from_xet(storage: Path, xet_hash: str, nbytes: int) -> bytes:
    """A file of the Xet storage, read in this process: only one at a time may have that storage open."""
    import hf_xet

    group = hf_xet.XetSession().new_download_stream_group(endpoint=f"local://{storage}")
    return b"".join(group.download_stream(hf_xet.XetFileInfo(xet_hash, nbytes)))


class Place:
    """A server and a fresh repo name on it, with a cache folder of its own: one user's machine."""

    def __init__(self, hub: DevHub, folder: Path) -> None:
        self.hub, self.xet = hub, hub.xet
        self.repo = f"{hub.user}/out-{next(NUMBERS)}"
        self.cache = folder / "cache"
        self.api = HfApi(hub.endpoint, hub.token())

    def client(self, token: str | None = None) -> Client:
        """A client that does not wait long."""
        return Client(self.hub.endpoint, token or self.hub.token(), patience=QUICK)

    def sink(self, *, at: str | None = None, repo: str | None = None, token: str | None = None, **more: Any) -> HubSink:
        """A sink, not begun."""
        return HubSink(self.client(token), Address(repo or self.repo, at), **{"cache": self.cache, **more})

    def create(self, repo: str | None = None) -> str:
        """The repo, empty -> its name."""
        self.api.create_repo(repo or self.repo)
        return repo or self.repo

    def put(self, path: str, content: bytes, *, revision: str = "main", repo: str | None = None) -> str:
        """A commit of somebody -> its id."""
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the client's own, about its LFS requests and about bare cards
            patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", not self.xet)
            done = self.api.upload_file(
                path_or_fileobj=content, path_in_repo=path, repo_id=repo or self.repo, revision=revision
            )
        return str(done.oid)

    def visible(self, revision: str = "main", repo: str | None = None) -> dict[str, bytes]:
        """What a reader of a branch sees, apart from .gitattributes; {} while there is no repo."""
        repo = repo or self.repo
        if not self.api.repo_exists(repo):
            return {}
        names = [name for name in self.api.list_repo_files(repo, revision=revision) if name not in KEEP]
        return {name: self.content(name, revision, repo) for name in names}

    def content(self, name: str, revision: str = "main", repo: str | None = None) -> bytes:
        """One file, without a cache."""
        from huggingface_hub.utils import get_session

        file = self.remote(name, repo, revision)
        if file.xet_hash is not None:
            return from_xet(self.hub.folder / "cas", file.xet_hash, file.nbytes)
        url = f"{self.hub.endpoint}/{repo or self.repo}/resolve/{revision.replace('/', '%2F')}/{name}"
        response = get_session().get(url, headers={"authorization": f"Bearer {self.hub.token()}"})
        response.raise_for_status()
        return bytes(response.content)

    def remote(self, name: str, repo: str | None = None, revision: str = "main") -> RemoteFile:
        """What the repo says about one file."""
        return paths_info(self.client(), repo or self.repo, [name], revision)[name]

    def head(self, revision: str = "main") -> str:
        """Commit of a branch."""
        return str(self.api.model_info(self.repo, revision=revision).sha)

    def sent(self) -> int:
        """Requests that carried bytes to the storage since the log was cleared."""
        return sum(r.bytes_in for r in self.hub.log() if r.origin == "storage" and r.method == "PUT")


def write(sink: HubSink, files: Mapping[str, bytes], piece: int = MIB) -> None:
    """Files, piece by piece; what is an entry already is left out."""
    for name, data in files.items():
        if name in sink.entries:
            continue
        with sink.open(name, len(data)) as file:
            for begin in range(0, len(data), piece):
                file.write(data[begin : begin + piece])


def manifest(sink: HubSink, job: str = JOB) -> bytes:
    """As the pipeline writes it."""
    files = {n: {"nbytes": e.nbytes, "sha256": e.sha256} for n, e in sink.entries.items()}
    return json.dumps({"job": job, "files": files}).encode()


def sizes(files: Mapping[str, bytes]) -> dict[str, int]:
    """Announcement."""
    return {name: len(data) for name, data in files.items()}


def finish(sink: HubSink, files: Mapping[str, bytes], job: str = JOB) -> HubSink:
    """A whole run."""
    try:
        sink.begin(job, sizes(files))
        write(sink, files)
        sink.wait()
        sink.commit(manifest(sink, job))
    finally:
        sink.close()
    return sink


@contextmanager
def serving(folder: Path, *, xet: bool) -> Iterator[DevHub]:
    """A server, and a cache for hf_xet of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_XET_CACHE", str(folder / "xet"))
        with DevHub(folder / "hub", xet=xet) as hub:
            yield hub
