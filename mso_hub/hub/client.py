"""Who we are at the Hub, how long we try, and what its errors mean.

Every call to the Hub goes through `Client.attempt`: it repeats what may succeed later (408, 425, 429, 5xx, broken
connections), waits as long as the server asks in RateLimit or Retry-After, otherwise exponentially longer with
jitter, and turns everything else into a HubError that names the repo and the way out. Tokens and the signatures of
URLs are cut out of every message.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from mso_hub.errors import HubError, MsoError, RecipeError, TransientError
from mso_hub.events import Listener, Waiting, ignore

if TYPE_CHECKING:
    from mso_hub.hub.wire import Wire

T = TypeVar("T")

AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
"""Statuses that say nothing about the request; those above 511 are a proxy's."""
SILENCE = 60.0
"""Seconds without a byte after which a connection counts as dead; the Hub itself gives up on a commit after 60."""
PATIENCE_VARIABLE = "MSO_HUB_RETRY_SECONDS"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long one request is repeated.

    first    seconds before the first repetition, doubled each time, with jitter of half to all of it
    longest  seconds of one wait at most, unless the server asks for more
    total    seconds of waiting in all, after which the run ends with TransientError
    silence  seconds without a byte before a connection is given up
    """

    first: float = 1.0
    longest: float = 60.0
    total: float = 600.0
    silence: float = SILENCE

    def wait(self, tries: int) -> float:
        """Seconds before repetition number `tries`, counted from 0."""
        return min(self.longest, self.first * 2.0 ** min(tries, 60)) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, no secret


def default_patience() -> Patience:
    """Patience() with the total that MSO_HUB_RETRY_SECONDS gives; RecipeError when it is not a number."""
    text = os.environ.get(PATIENCE_VARIABLE)
    if not text:
        return Patience()
    try:
        total = float(text)
    except ValueError:
        total = -1.0
    if not 0 <= total < float("inf"):
        raise RecipeError(f"{PATIENCE_VARIABLE}: needs a number of seconds, got {text!r}; for example 600")
    return Patience(total=total, silence=min(SILENCE, max(1.0, total / 4)))


def find_token() -> str | None:
    """HF_TOKEN of the environment, then of a `.env` file in the working directory, then the client's own login."""
    from huggingface_hub import get_token

    if os.environ.get("HF_TOKEN"):
        return get_token()
    if Path(".env").is_file():
        from dotenv import dotenv_values

        try:
            token = (dotenv_values(".env").get("HF_TOKEN") or "").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f".env: cannot be read for HF_TOKEN: {error}; repair it, or set HF_TOKEN") from error
        if token:
            return token
    return get_token()


def own_version() -> str:
    """For the User-Agent."""
    try:
        return version("mso-hub")
    except PackageNotFoundError:  # a checkout that was never installed
        return "0"


class Client:
    """A connection to one Hub.

    endpoint  `https://huggingface.co` by default, or what HF_ENDPOINT says
    token     None looks for one (see find_token), False stays anonymous
    Listeners get a Waiting event before every pause.
    """

    def __init__(
        self, endpoint: str | None = None, token: str | bool | None = None, *,
        patience: Patience | None = None, on_event: Listener = ignore,
    ) -> None:  # fmt: skip
        from huggingface_hub import HfApi

        self.patience = patience or default_patience()
        self.on_event = on_event
        self._token = _usable(find_token() if token is None or token is True else token or None)
        _bound_waiting(self.patience.silence)
        self.api = HfApi(
            endpoint=endpoint, token=self._token or False, library_name="mso_hub", library_version=own_version()
        )

    @property
    def endpoint(self) -> str:
        """Address of the Hub, without a slash at the end."""
        return str(self.api.endpoint).rstrip("/")

    @property
    def anonymous(self) -> bool:
        """Is there no token?"""
        return self._token is None

    def headers(self) -> dict[str, str]:
        """Headers of a request to the Hub itself, with the token; never for storage URLs."""
        from huggingface_hub.utils import build_hf_headers

        return dict(build_hf_headers(token=self._token or False, library_name="mso_hub", library_version=own_version()))

    def clean(self, text: object) -> str:
        """A message without tokens and without the signatures in URLs."""
        found = mask(str(text))
        return found.replace(self._token, "hf_***") if self._token else found

    def request(self, method: str, url: str, *, what: str, wire: Wire | None = None, **settings: Any) -> Any:
        """One request to the Hub itself (path or URL), repeated as `attempt` does; the response, checked.

        A URL of another origin gets no token.

        what      names the thing in messages: `hf://org/name`
        wire      sends it so that another thread can end it
        settings  as httpx takes them: json, content, params, headers
        """
        from huggingface_hub.utils import get_session, hf_raise_for_status

        full = url if url.startswith("http") else f"{self.endpoint}{url}"
        ours = self.headers() if urlsplit(full)[:2] == urlsplit(self.endpoint)[:2] else {}
        headers = {**ours, **settings.pop("headers", {})}

        def once() -> Any:
            """One try."""
            session = get_session() if wire is None else wire.http
            response = session.request(method, full, headers=headers, **settings)
            hf_raise_for_status(response)
            return response

        if wire is None:
            return self.attempt(once, what=what)
        settings["extensions"] = wire.traced()
        return self.attempt(once, what=what, wait=wire.sleep)

    def ask(self, method: str, url: str, *, what: str, **settings: Any) -> Any:
        """`request`, and its answer as JSON; HubError when it is none."""
        return self.attempt(self.request(method, url, what=what, **settings).json, what=what)

    def attempt(self, call: Callable[[], T], *, what: str, wait: Callable[[float], object] = time.sleep) -> T:
        """Result of `call`; repeats it while the Hub is busy or gone, raises HubError or TransientError otherwise.

        wait  sleeps; may raise to end the attempts
        """
        started, tries = 0.0, 0
        while True:
            try:
                return call()
            except MsoError:
                raise
            except client_errors() as error:
                failure = error
                # From the first failure on: an upload that breaks after half an hour has not waited yet.
                started = started or time.monotonic()
            # Outside of the handler: a new error must not drag the old one along, whose request holds the token.
            if not may_pass(failure):
                raise self.explain(failure, what)
            self.pause(tries, started, what, failure, wait)
            tries += 1

    def pause(
        self, tries: int, started: float, what: str, why: Exception, wait: Callable[[float], object] = time.sleep
    ) -> None:
        """Sleep before another try, as long as the server asks for; TransientError when the patience ends before that.

        tries    repetitions so far
        started  time.monotonic() of the first failure
        """
        reason, asked = self.clean(reason_of(why)), asked_wait(why)
        own = self.patience.wait(tries)
        # A little more than asked, so that not everybody comes back at once; and never at once, whatever is asked.
        seconds = own if asked is None else max(asked, min(own, self.patience.first)) * random.uniform(1, 1.1)  # noqa: S311
        passed = time.monotonic() - started
        if passed + seconds > self.patience.total:
            wish = "" if asked is None else f" and asks to wait {asked:.0f} s"
            raise TransientError(
                f"{what}: {reason}{wish}; gave up after {passed:.0f} s of at most "
                f"{self.patience.total:.0f} s; what is complete is kept, run the same command later"
            )
        self.on_event(Waiting(what, round(seconds, 1), reason))
        wait(seconds)

    def http(self) -> Any:
        """An httpx client of its own, made as huggingface_hub makes its own: proxies, certificates, time limit.

        It carries no token: headers() has to be given to requests that go to the Hub itself.
        """
        from huggingface_hub.utils import _http

        return _http._GLOBAL_CLIENT_FACTORY()  # noqa: SLF001 - what a user gave to set_client_factory must hold here too

    def explain(self, error: Exception, what: str) -> MsoError:
        """What an error of the Hub means for the user."""
        return HubError(self.clean(_meaning(error, what, self)))


def mask(text: str) -> str:
    """A text without what looks like a token, and without the queries of URLs, which may hold signatures."""
    found = re.sub(r"(https?://[^\s?\"']+)\?[^\s\"')]+", r"\1?...", text)
    found = re.sub(r"(https?://)[^\s/@\"']+@", r"\1***@", found)
    found = re.sub(r"(?i)\bbearer\s+[^\s\"']+", "Bearer ***", found)
    return re.sub(r"\bhf_[A-Za-z0-9]{16,}\b", "hf_***", found)


def _usable(token: str | None) -> str | None:
    """A token that can stand in a header, None for none; the error of httpx would show it."""
    token = (token or "").strip()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise RecipeError(f"token: {len(token)} characters with blanks or beyond ASCII among them; copy it again")
    return token or None


def _bound_waiting(silence: float) -> None:
    """huggingface_hub waits for ever by default; a user's own client factory is left alone."""
    from huggingface_hub.utils import _http, set_client_factory

    current = getattr(_http, "_GLOBAL_CLIENT_FACTORY", None)
    if current is not _http.default_client_factory and getattr(current, "silence", silence) == silence:
        return

    def bound(request: Any) -> None:
        """Some calls of the library ask for no limit on purpose."""
        limits = request.extensions.get("timeout") or dict.fromkeys(("connect", "read", "write", "pool"))
        request.extensions["timeout"] = {k: silence if v is None else v for k, v in limits.items()}

    def factory() -> Any:
        """The library's own client, with a limit."""
        client = _http.default_client_factory()
        client.event_hooks = {**client.event_hooks, "request": [*client.event_hooks["request"], bound]}
        return client

    factory.silence = silence  # type: ignore[attr-defined]
    set_client_factory(factory)


def client_errors() -> tuple[type[Exception], ...]:
    """What a call of huggingface_hub or httpx raises when the other end, the network or a name is at fault."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import httpx

    return (httpx.HTTPError, httpx.InvalidURL, OSError, HFValidationError, JSONDecodeError)


def status_of(error: BaseException) -> int | None:
    """HTTP status that an error carries."""
    return getattr(getattr(error, "response", None), "status_code", None)


def may_pass(error: Exception) -> bool:
    """Could the same request succeed later?"""
    from huggingface_hub.utils import httpx

    if status_of(error) is not None:
        return status_of(error) in AGAIN
    hopeless = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)
    return isinstance(error, httpx.TransportError) and not isinstance(error, hopeless)


def asked_wait(error: Exception) -> float | None:
    """Seconds that the server asks for in RateLimit or Retry-After (seconds or a date), None when it does not."""
    from huggingface_hub.utils import parse_ratelimit_headers

    response = getattr(error, "response", None)
    if response is None:
        return None
    limits = parse_ratelimit_headers(response.headers)
    if limits is not None and limits.remaining == 0:
        return limits.reset_in_seconds + 1.0
    text = response.headers.get("retry-after", "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(timezone.utc)).total_seconds())
    except (ValueError, TypeError):
        return None


def reason_of(error: Exception) -> str:
    """An error in a few words."""
    status = status_of(error)
    if status is not None:
        return f"the server answered {status}"
    return f"no answer ({type(error).__name__}: {error})"


def _meaning(error: Exception, what: str, client: Client) -> str:
    from huggingface_hub import errors

    status = status_of(error)
    login = "log in with `hf auth login` or set HF_TOKEN" if client.anonymous else "use a token that may read it"
    said = getattr(error, "server_message", None) or str(error).splitlines()[0]
    if isinstance(error, errors.GatedRepoError):
        ask = f"ask for access on {client.endpoint}/{what.removeprefix('hf://').partition('@')[0]}"
        return f"{what}: is gated and this account has no access; {ask}" + (f" and {login}" if client.anonymous else "")
    if isinstance(error, errors.DisabledRepoError):
        return f"{what}: is disabled by the Hub; there is no access until its owner or the Hub enables it again"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{what}: this repo has no such branch, tag or commit; check what stands after the @"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{what}: there is no such file in the repo at this revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{what}: {client.endpoint} has no such repo, or it is private; check the name, or {login}"
    if status == 401:
        return (
            f"{what}: {client.endpoint} does not know this token; log in again with `hf auth login` or renew HF_TOKEN"
        )
    if status == 403:
        return f"{what}: this account may not do that ({said}); use a token with write permission"
    if isinstance(error, JSONDecodeError):
        return f"{what}: {client.endpoint} answered something else than JSON; a proxy in between may want a login"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{what}: HF_HUB_OFFLINE is set, so no request is sent; unset it to use the Hub"
    return f"{what}: the Hub refused ({status or type(error).__name__}): {said}"
