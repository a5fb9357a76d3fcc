"""One server per mode for all tests of this folder; each test has its own repos, cache and user."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from mso_hub.hub.devhub import DevHub
from mso_hub.hub.devhub.settings import Tuning
from tests.hub.devhub.helpers import Site

NUMBERS = itertools.count(1)


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The client's own files stay out of the home folder; Xet reads the environment when its first session starts."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("hf-home")
        patch.setenv("HF_HOME", str(home))
        patch.setenv("HF_XET_CACHE", str(home / "xet"))
        patch.setenv("HF_XET_TELEMETRY_ENABLED", "0")
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        for name in ("HF_TOKEN", "HF_ENDPOINT"):
            if name in os.environ:
                patch.delenv(name)
        disable_progress_bars()
        yield
        enable_progress_bars()


@pytest.fixture(scope="session", params=["lfs", "xet"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevHub]:
    """Both modes, one after the other."""
    with DevHub(tmp_path_factory.mktemp(request.param), xet=request.param == "xet") as hub:
        yield hub


@pytest.fixture(scope="session")
def lfs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevHub]:
    """For tests of what has nothing to do with Xet."""
    with DevHub(tmp_path_factory.mktemp("lfs-only")) as hub:
        yield hub


def _site(hub: DevHub, patch: pytest.MonkeyPatch, cache: Path) -> Site:
    hub.clear_faults()
    hub.set(**{name: getattr(Tuning(), name) for name in Tuning.__slots__})
    patch.setattr(constants, "HF_HUB_DISABLE_XET", not hub.xet)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    api = HfApi(hub.endpoint, hub.token())
    repo = f"dev/repo-{next(NUMBERS)}"
    api.create_repo(repo)
    hub.log(clear=True)
    return Site(hub, api, repo)


@pytest.fixture
def site(server: DevHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Site:
    """A fresh repo on a server of either mode."""
    return _site(server, monkeypatch, tmp_path / "cache")


@pytest.fixture
def lfs_site(lfs_server: DevHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Site:
    """A fresh repo on a server without Xet."""
    return _site(lfs_server, monkeypatch, tmp_path / "cache")
