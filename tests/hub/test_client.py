"""What the Hub's refusals become, how long we wait, which token is used, and that no message shows it."""

from __future__ import annotations

import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from mso_hub.errors import HubError, MsoError, RecipeError, TransientError
from mso_hub.events import Event, Waiting
from mso_hub.hub import Address, Client, Origin, Patience, take_snapshot
from mso_hub.hub.client import default_patience, mask
from mso_hub.source.hub import HubSource
from tests.hub.serving import QUICK, Served, isolated, serving

SECRET = "hf_" + "Q7x" * 11


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("client"), xet=False) as served:
        yield served


@pytest.fixture(scope="module")
def repo(served: Served) -> str:
    return served.put({"config.json": b"{}", "sub/x.txt": b"x", "model.safetensors": b"0" * 100})


@pytest.fixture(autouse=True)
def _calm(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "served" in request.fixturenames:
        hub = request.getfixturevalue("served").hub
        hub.clear_faults()
        hub.set(page_size=1000)


def listening(served: Served, **patience: float) -> tuple[Client, list[Waiting]]:
    """A client and the pauses that it announces."""
    waits: list[Waiting] = []

    def hear(event: Event) -> None:
        assert isinstance(event, Waiting)
        waits.append(event)

    settings = {"first": 0.02, "longest": 0.1, "total": 3.0, "silence": 1.0, **patience}
    return Client(served.hub.endpoint, served.hub.token(), patience=Patience(**settings), on_event=hear), waits


def all_text(error: BaseException | None) -> str:
    """Everything that an error could show: its text, its arguments, what it drags along, its traceback."""
    text = "".join(traceback.format_exception(error)) if error else ""
    while error is not None:
        text += f"{error!r} {error.args!r} {vars(error)!r}\n"
        for other in (error.__cause__, error.__context__):
            request = getattr(other, "request", None)
            text += f"{getattr(request, 'headers', '')} {getattr(getattr(other, 'response', None), 'headers', '')}"
        error = error.__cause__ or error.__context__
    return text


def refused(client: Client, address: Address) -> HubError:
    """The error of opening a repo, which shows no token."""
    with pytest.raises(HubError) as caught:
        take_snapshot(client, address)
    assert not isinstance(caught.value, TransientError)
    assert SECRET not in all_text(caught.value)
    return caught.value


def test_a_snapshot_names_commit_sizes_and_hashes(served: Served, repo: str) -> None:
    """Page by page, sorted, with the SHA-256 of large files only."""
    served.hub.set(page_size=1)
    snapshot = take_snapshot(served.client(), Address(repo, "main"))
    assert list(snapshot.files) == [".gitattributes", "config.json", "model.safetensors", "sub/x.txt"]
    assert {path: file.nbytes for path, file in snapshot.files.items()}["sub/x.txt"] == 1
    assert snapshot.files["config.json"].sha256 is None
    assert len(snapshot.files["model.safetensors"].sha256 or "") == 64
    assert len(snapshot.commit) == 40


def test_a_bad_token(served: Served, repo: str) -> None:
    error = refused(Client(served.hub.endpoint, SECRET, patience=QUICK), Address(repo))
    assert "hf auth login" in str(error)


def test_a_read_token_reads(served: Served, repo: str) -> None:
    assert take_snapshot(served.client(token=served.hub.token("read")), Address(repo)).files


@pytest.mark.parametrize("token", [SECRET, False])
def test_a_missing_repo(served: Served, *, token: str | bool) -> None:
    error = refused(Client(served.hub.endpoint, token, patience=QUICK), Address("dev/missing"))
    assert "hf://dev/missing" in str(error)


@pytest.mark.parametrize("revision", ["nowhere", "refs/pr/99", "feature/x", "0" * 40])
def test_a_missing_revision(served: Served, repo: str, revision: str) -> None:
    error = refused(served.client(), Address(repo, revision))
    assert "no such branch, tag or commit; check what stands after the @" in str(error)


def test_a_branch_with_a_slash(served: Served, repo: str) -> None:
    served.client().api.create_branch(repo, branch="feature/y", exist_ok=True)
    assert take_snapshot(served.client(), Address(repo, "feature/y")).files


def test_a_private_repo_of_somebody_else(served: Served) -> None:
    repo = served.put({"config.json": b"{}"}, private=True)
    bob = served.hub.add_user("bob")
    assert "no such repo, or it is private" in str(refused(served.client(token=bob), Address(repo)))
    assert "or log in with `hf auth login` or set HF_TOKEN" in str(refused(served.client(token=False), Address(repo)))
    found = take_snapshot(served.client(), Address(repo))
    assert found.files
    assert (found.private, found.gated) == (True, False)
    source = HubSource(served.client(), Address(repo, "main"))
    assert source.origin == Origin(served.hub.endpoint, repo, found.commit, "main", private=True)
    source.close()


def test_every_request_says_which_program_asks(served: Served, repo: str) -> None:
    client = served.client()
    expected = f"mso_hub/{version('mso-hub')};"
    assert client.headers()["user-agent"].startswith(expected)
    assert client.api._build_hf_headers()["user-agent"].startswith(expected)


def test_a_gated_repo(served: Served) -> None:
    """Its card is public: only a check of its own tells that the files are not."""
    repo = served.put({"config.json": b"{}"})
    served.client().api.update_repo_settings(repo, gated="manual")
    found = take_snapshot(served.client(), Address(repo))
    assert (found.private, found.gated) == (False, True)
    bob = served.hub.add_user("bob")
    error = refused(served.client(token=bob), Address(repo, "main"))
    assert f"is gated and this account has no access; ask for access on {served.hub.endpoint}/{repo}" in str(error)
    assert "log in" in str(refused(served.client(token=False), Address(repo)))


def test_a_disabled_repo(served: Served) -> None:
    repo = served.put({"config.json": b"{}"})
    served.hub.disable(repo)
    assert "is disabled by the Hub" in str(refused(served.client(), Address(repo)))


def test_an_answer_that_is_no_json(served: Served, repo: str) -> None:
    served.hub.fail("GET .*/tree/", status=200)
    assert "something else than JSON" in str(refused(served.client(), Address(repo)))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({"Retry-After": "1"}, 1.0), ({"RateLimit": '"api";r=0;t=0'}, 1.0), ({"date": "2"}, 1.5), ({}, 0.0)],
)
@pytest.mark.parametrize("path", ["/revision/", "/auth-check", "/tree/"])
def test_waits_as_long_as_the_hub_asks(
    served: Served, repo: str, path: str, headers: dict[str, str], seconds: float
) -> None:
    """Seconds, a date, or a window of the rate limit; a listener hears of it before."""
    client, waits = listening(served)
    if "date" in headers:
        headers = {"Retry-After": format_datetime(datetime.now(timezone.utc) + timedelta(seconds=2.6), usegmt=True)}
    served.hub.fail(f"GET .*{path}", status=429, headers=headers)
    started = time.monotonic()
    take_snapshot(client, Address(repo, "main"))
    assert time.monotonic() - started >= seconds
    assert [(wait.what, wait.why) for wait in waits] == [(f"hf://{repo}@main", "the server answered 429")]
    assert seconds <= waits[0].seconds <= seconds + 1.2


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 500}, {"status": 408}, {"cut": 0}, {"status": 524}])
def test_what_passes_is_tried_again(served: Served, repo: str, fault: dict[str, Any]) -> None:
    client, waits = listening(served)
    served.hub.fail("GET .*/(revision|tree|auth-check)", times=3, **fault)
    take_snapshot(client, Address(repo, "main"))
    assert len(waits) == 3


def test_a_hub_that_stays_busy_ends_the_run(served: Served, repo: str) -> None:
    client, waits = listening(served, total=0.5)
    served.hub.fail("GET .*/revision/", status=503, times=-1)
    with pytest.raises(TransientError, match=r"the server answered 503; gave up after \d s of at most 0 s"):
        take_snapshot(client, Address(repo, "main"))
    assert 3 < len(waits) < 30


def test_a_wait_beyond_the_patience_is_not_begun(served: Served, repo: str) -> None:
    client, waits = listening(served)
    served.hub.fail("GET .*/revision/", status=429, headers={"Retry-After": "3600"}, times=-1)
    started = time.monotonic()
    with pytest.raises(TransientError, match="asks to wait 3600 s; gave up after 0 s of at most 3 s"):
        take_snapshot(client, Address(repo, "main"))
    assert time.monotonic() - started < 1
    assert not waits


def test_a_hub_that_does_not_listen_ends_the_run() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    client = Client(f"http://127.0.0.1:{port}", SECRET, patience=Patience(first=0.02, total=0.3, silence=1))
    with pytest.raises(TransientError, match="no answer \\(ConnectError") as caught:
        take_snapshot(client, Address("dev/m"))
    assert SECRET not in all_text(caught.value)


def test_a_hub_that_never_answers_ends_the_run() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        client = Client(endpoint, SECRET, patience=Patience(first=0.02, total=0.5, silence=0.2))
        started = time.monotonic()
        with pytest.raises(TransientError, match="ReadTimeout") as caught:
            take_snapshot(client, Address("dev/m"))
    assert time.monotonic() - started < 3
    assert SECRET not in all_text(caught.value)


def test_no_request_is_sent_offline(served: Served, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        take_snapshot(served.client(), Address(repo))


def test_requests_to_other_origins_carry_no_token(served: Served, repo: str) -> None:
    """An address that a server hands out may point anywhere."""
    served.hub.log(clear=True)
    client = served.client()
    client.request("GET", f"/api/models/{repo}", what="x")
    with pytest.raises(MsoError):
        client.request("GET", f"{served.hub.storage}/files/{repo}/{'0' * 64}/x", what="x")
    assert [(request.origin, request.authorized) for request in served.hub.log()] == [("hub", True), ("storage", False)]


def test_tokens_and_signatures_are_cut_out_of_text(served: Served) -> None:
    client = Client(served.hub.endpoint, "plain-token", patience=QUICK)
    text = client.clean(f"plain-token {SECRET} https://x.y/z?sig=abc&b=1 'Bearer eyJhb' https://u:pw@h/p")
    assert text == "hf_*** hf_*** https://x.y/z?... 'Bearer ***' https://***@h/p"
    assert mask("nothing to hide?") == "nothing to hide?"


class TestTokens:
    """HF_TOKEN of the environment, then .env, then the login."""

    @pytest.fixture(autouse=True)
    def _alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.chdir(tmp_path)
        self.folder, self.patch = tmp_path, monkeypatch
        with isolated(tmp_path / "home"):
            yield

    def token(self, given: str | bool | None = None) -> str | None:
        found = Client("http://127.0.0.1:9", given, patience=QUICK).headers().get("authorization")
        return found.removeprefix("Bearer ") if found else None

    def test_order(self) -> None:
        assert self.token() is None
        (self.folder / "home" / "token").write_text("hf_login\n")
        assert self.token() == "hf_login"
        (self.folder / ".env").write_text("OTHER=1\n")
        assert self.token() == "hf_login"
        (self.folder / ".env").write_text("HF_TOKEN = 'hf_dotenv'\n")
        assert self.token() == "hf_dotenv"
        self.patch.setenv("HF_TOKEN", "hf_environment")
        assert self.token() == "hf_environment"
        assert self.token("hf_given") == "hf_given"
        assert self.token(given=True) == "hf_environment"
        assert self.token(given=False) is None
        assert Client("http://127.0.0.1:9", token=False, patience=QUICK).anonymous

    def test_a_broken_env_file(self) -> None:
        (self.folder / ".env").write_bytes(b"HF_TOKEN=\xff\xfe\x00")
        with pytest.raises(RecipeError, match=r"\.env: cannot be read for HF_TOKEN"):
            self.token()

    @pytest.mark.parametrize("token", ["hf_a\nb", "hf_\u00e4", "hf a", "hf_\x00"])
    def test_a_token_that_no_header_can_hold(self, token: str) -> None:
        """The error does not show it."""
        with pytest.raises(RecipeError, match="copy it again") as caught:
            self.token(token)
        assert token not in str(caught.value)

    def test_blanks_around_a_token_do_not_matter(self) -> None:
        assert self.token("  hf_x\n") == "hf_x"


@pytest.mark.parametrize(("text", "total"), [("", 600.0), ("30", 30.0), ("0", 0.0)])
def test_patience_of_the_environment(monkeypatch: pytest.MonkeyPatch, text: str, total: float) -> None:
    monkeypatch.setenv("MSO_HUB_RETRY_SECONDS", text)
    assert default_patience().total == total


@pytest.mark.parametrize("text", ["soon", "nan", "-1", "inf"])
def test_patience_that_is_no_number(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MSO_HUB_RETRY_SECONDS", text)
    with pytest.raises(RecipeError, match="MSO_HUB_RETRY_SECONDS"):
        default_patience()


def test_waits_grow_and_differ() -> None:
    patience = Patience(first=1, longest=8)
    assert all(2.0**n / 2 <= patience.wait(n) <= 2.0**n for n in range(4))
    assert patience.wait(5000) <= 8
    assert len({patience.wait(3) for _ in range(20)}) > 1


def test_a_source_says_that_it_waits(served: Served, repo: str) -> None:
    client, waits = listening(served)
    with closing(HubSource(client, Address(repo))) as source:
        served.hub.fail("HEAD .*/resolve/", status=503)
        assert source.read("model.safetensors", 0, 5).tobytes() == b"00000"
    assert [wait.what for wait in waits] == [f"hf://{repo}/model.safetensors"]


def test_a_wish_to_come_back_at_once_is_no_storm(served: Served) -> None:
    """Retry-After: 0, and dates that are over: a pause of ours all the same."""
    client, waits = listening(served, first=0.2, total=2.0)
    served.hub.fail("GET /api/whoami-v2", status=429, headers={"Retry-After": "0"}, times=-1)
    with pytest.raises(TransientError):
        client.attempt(client.api.whoami, what="the Hub")
    served.hub.clear_faults()
    assert 5 <= len(waits) <= 45  # without a pause of its own: thousands
