"""A real Hub on loopback with files in it, for tests that need the wire; nothing touches the user's own settings."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from mso_hub.hub import Address, Client, Patience
from mso_hub.hub.devhub import DevHub

QUICK = Patience(first=0.02, longest=0.1, total=3.0, silence=1.0)
"""Tests of failures end soon."""
NUMBERS = itertools.count(1)


@dataclass(frozen=True)
class Served:
    """A running server."""

    hub: DevHub
    xet: bool

    def client(self, patience: Patience = QUICK, token: str | bool | None = None) -> Client:
        """As the default user, who may write, unless a token says otherwise."""
        return Client(self.hub.endpoint, self.hub.token() if token is None else token, patience=patience)

    def put(self, files: Path | Mapping[str, bytes], repo: str | None = None, *, private: bool = False) -> str:
        """A new repo with these files -> its id."""
        from huggingface_hub import CommitOperationAdd, HfApi

        repo = repo or f"dev/repo-{next(NUMBERS)}"
        if isinstance(files, Path):
            found = [path for path in sorted(files.rglob("*")) if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in found}
        api = HfApi(self.hub.endpoint, self.hub.token())
        api.create_repo(repo, private=private, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of httpx, about the client's own calls
            operations = [CommitOperationAdd(path, data) for path, data in files.items()]
            api.create_commit(repo, operations, commit_message="files")
        self.hub.log(clear=True)
        return repo

    def address(self, repo: str, revision: str | None = None, folder: str = "") -> Address:
        """Of a repo on this server."""
        return Address(repo, revision, folder)


@contextmanager
def serving(folder: Path, *, xet: bool) -> Iterator[Served]:
    """A server whose state lies in `folder`; the client's settings, token and caches too, until it ends.

    xet  large files go to Xet storage; otherwise hf_xet is switched off and LFS is used
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    with isolated(folder / "home"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
        disable_progress_bars()
        with DevHub(folder / "hub", xet=xet) as hub:
            yield Served(hub, xet)


@contextmanager
def isolated(home: Path) -> Iterator[None]:
    """No token, endpoint or cache of whoever runs the tests."""
    from huggingface_hub import constants

    home.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "MSO_HUB_RETRY_SECONDS"):
            if name in os.environ:
                patch.delenv(name)
        patch.setenv("HF_HOME", str(home))
        patch.setenv("HF_XET_CACHE", str(home / "xet"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        yield
