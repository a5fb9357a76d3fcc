"""Which Hub the cells of a notebook talk to: one of their own on this machine, or a real one with the user's login.

    hub = use_hub("devhub/02")                # a folder: an embedded Hub, which lives as long as this Python
    hub = use_hub("https://huggingface.co")   # an address: that Hub
    hub.small_model()                         # hf://me/tiny-qwen3-moe, made where it is missing
    hub.output("hf://org/model", "NVFP4")     # hf://me/model-NVFP4

It sets the variables that the Hub's own client reads (HF_ENDPOINT, HF_TOKEN, ...), so that everything in this Python
talks to the same Hub: cells look the same for both.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mso_hub.demo import TINY_MODEL
from mso_hub.errors import MsoError, RecipeError
from mso_hub.hub import Client, is_address, parse_address
from mso_hub.hub.devhub import DevHub
from mso_hub.hub.devhub.seed import connect, seed
from mso_hub.notebook.job import one_sentence
from mso_hub.notebook.panes import Heading, Line, Part, bundle, pane_text
from mso_hub.notebook.views import without_bars

HANDOVER = 15.0
"""Seconds that the embedded Hub of a kernel that was restarted has to end."""
PORT = "port"
"""File in the folder of an embedded Hub: journals know a Hub by its address, so it keeps its port."""
PROXIES = ("NO_PROXY", "no_proxy")

_embedded: dict[Path, DevHub] = {}


@dataclass(frozen=True, slots=True)
class Session:
    """The Hub of this Python.

    account  who we are there
    client   connection with that account's token
    devhub   the embedded server, None for a real Hub
    """

    account: str
    client: Client
    devhub: DevHub | None = None

    @property
    def endpoint(self) -> str:
        """Address of the Hub."""
        return self.client.endpoint

    def small_model(self) -> str:
        """Address of the small trained Qwen3-MoE of the repository; private on a real Hub, uploaded where missing."""
        with one_sentence():
            if not TINY_MODEL.is_dir():
                raise RecipeError(
                    f"{TINY_MODEL}: the small model lies in the repository, not in the wheel; name a source, like "
                    "hf://org/model, or install from a clone"
                )
            return self.add(TINY_MODEL)

    def add(self, folder: str | Path) -> str:
        """Upload a folder as a repo of its name; what is there already is not sent again -> its address."""
        repo_id = f"{self.account}/{Path(folder).resolve().name}"
        with one_sentence(), _quiet():
            if self.devhub is None:
                create = self.client.api.create_repo
                self.client.attempt(lambda: create(repo_id, private=True, exist_ok=True), what=f"hf://{repo_id}")
            seed(self.client, repo_id, Path(folder))
        return f"hf://{repo_id}"

    def output(self, src: str | Path, ending: str) -> str:
        """Address of a repo of this account that is named after a source: `hf://org/model`, `NVFP4` -> model-NVFP4."""
        text = str(src)
        name = parse_address(text).repo_id.rpartition("/")[2] if is_address(text) else Path(text).resolve().name
        return f"hf://{self.account}/{name}-{ending}"

    def parts(self) -> list[Part]:
        """What a cell shows of it."""
        shown: list[Part] = [Heading(f"{self.endpoint}, as {self.account}")]
        if self.devhub is not None:
            folder = self.devhub.folder
            shown.append(Line(f"a Hub on this machine; what it holds stays in {folder}, nothing leaves this machine"))
        return shown

    def __str__(self) -> str:
        return pane_text(self.parts())

    def __repr__(self) -> str:
        return f"Session({self.endpoint!r}, account={self.account!r})"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return bundle(self.parts())


def use_hub(where: str | Path) -> Session:
    """Let everything in this Python talk to one Hub; the same again gives the same Hub.

    where  folder of an embedded Hub, made where it is missing: no account is needed and nothing leaves this machine;
           or the address of a real Hub, https://huggingface.co: with HF_TOKEN, `.env`, the stored login or the secret
           of Colab, and where there is none with the Hub's own login form
    Raises RecipeError where the Hub's client talks to another one already, or nobody is logged in; MsoError where the
    embedded Hub cannot start; HubError where the Hub does not know the token.
    """
    with one_sentence():
        without_bars()
        if str(where).startswith(("https://", "http://")):
            return _real(str(where).rstrip("/"))
        return _own(Path(where))


def _own(folder: Path) -> Session:
    """Its client stores nothing outside of the folder."""
    place = folder.resolve()
    server = _embedded.get(place)
    if server is None:
        _require_unset(folder)
        server = _embedded[place] = _start(folder)
        atexit.register(server.close)
    _set({
        "HF_ENDPOINT": server.endpoint, "HF_TOKEN": server.token(), "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(place / "home"), "MSO_HUB_CACHE": str(place / "cache"),
    })  # fmt: skip
    return Session(server.user, connect(server), server)


def _require_unset(folder: Path) -> None:
    """RecipeError where the client was loaded before: it reads its settings only then."""
    if "huggingface_hub.constants" in sys.modules:
        raise RecipeError(
            f"{folder}: huggingface_hub was imported before this Hub started, and talks to "
            f"{_loaded().ENDPOINT}; restart the kernel and run this cell first"
        )


def _start(folder: Path) -> DevHub:
    """On the port it had; the server of a kernel that was just restarted may need a moment to go."""
    kept = folder / PORT
    port = int(kept.read_text(encoding="ascii")) if kept.is_file() else 0
    end = time.monotonic() + HANDOVER
    while True:
        try:
            server = DevHub(folder, port=port)
            break
        except MsoError as error:
            if "already runs there" in str(error) and time.monotonic() < end:
                time.sleep(0.2)
            elif port and "is in use" in str(error):
                port = 0  # somebody else has it by now
            else:
                raise
    kept.write_text(server.endpoint.rpartition(":")[2], encoding="ascii")
    return server


def _set(variables: Mapping[str, str]) -> None:
    """For this Python and the processes that it starts."""
    os.environ.update(variables)
    os.environ.pop("HF_HUB_OFFLINE", None)
    for name in PROXIES:  # loopback needs no proxy
        os.environ[name] = ",".join(dict.fromkeys([*filter(None, [os.environ.get(name)]), "127.0.0.1", "localhost"]))


def _real(endpoint: str) -> Session:
    if "huggingface_hub.constants" in sys.modules and endpoint != _loaded().ENDPOINT:
        raise RecipeError(
            f"{endpoint}: huggingface_hub talks to {_loaded().ENDPOINT} already; restart the kernel and run this cell "
            "first"
        )
    os.environ["HF_ENDPOINT"] = endpoint
    client = Client()
    if client.anonymous:
        _log_in(endpoint)
        client = Client()
    if client.anonymous:
        raise RecipeError(f"{endpoint}: nobody is logged in; log in above or set HF_TOKEN, then run this cell again")
    return Session(str(client.attempt(client.api.whoami, what=endpoint)["name"]), client)


def _log_in(endpoint: str) -> None:
    """Show the Hub's own form and wait until it is filled in, or given up."""
    from huggingface_hub import notebook_login
    from huggingface_hub.errors import DeviceCodeError

    try:
        notebook_login()
    except DeviceCodeError as error:
        said = str(error).splitlines()[0]
        raise RecipeError(
            f"{endpoint}: nobody is logged in, and its login form cannot be had ({said}); set HF_TOKEN, then run this "
            "cell again"
        ) from error


def _loaded() -> Any:
    """The client's settings."""
    return sys.modules["huggingface_hub.constants"]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars of the Hub's own client, and without its word about an upload that changes nothing."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    enabled, verbosity = not are_progress_bars_disabled(), logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    if enabled:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if enabled:
            enable_progress_bars()
