"""What goes wrong between storage and us: either the exact bytes arrive, or the run ends with a message, soon."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from mso_hub.errors import CheckpointError, HubError, MsoError, TransientError
from mso_hub.events import Event, Waiting
from mso_hub.hub import Address, Client, take_snapshot
from mso_hub.hub.download import Download
from mso_hub.source import Job, Range
from mso_hub.source.hub import HubSource
from tests.hub.serving import QUICK, Served, serving

PART = 1 << 18
DATA = random.Random(3).randbytes(11 * PART + 777)
FILE = "model.safetensors"
READS: Sequence[Range] = [(FILE, at, min(at + 100_000, len(DATA))) for at in range(0, len(DATA), 100_000)]
STORAGE = "GET /files/"


@pytest.fixture(scope="module")
def lfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("lfs"), xet=False) as served:
        yield served


@pytest.fixture(scope="module")
def repo(lfs: Served) -> str:
    return lfs.put({FILE: DATA, "config.json": b"{}"})


@pytest.fixture(autouse=True)
def _calm(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "lfs" in request.fixturenames:
        lfs: Served = request.getfixturevalue("lfs")
        lfs.hub.clear_faults()
        lfs.hub.set(url_lifetime=3600)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("mso-")]


def convert(client: Client, repo: str, depth: int = 4) -> HubSource:
    """Read all of a shard as a run does, and settle it; the source, closed."""
    source = HubSource(client, Address(repo))
    with closing(source):
        source._download._part, source._download._depth = PART, depth
        source.read(FILE, 0, 65_536)
        source.expect([Job(FILE, lambda: READS)])

        def one(place: Range) -> None:
            assert source.read(*place).tobytes() == DATA[place[1] : place[2]]

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(one, READS))
        source.settle(FILE)
    return source


def read_and_settle(source: HubSource) -> None:
    """All announced reads, one after another."""
    for place in READS:
        source.read(*place)
    source.settle(FILE)


def listening(served: Served, **patience: float) -> tuple[Client, list[Event]]:
    """A client and what it tells."""
    events: list[Event] = []
    quick = replace(QUICK, **patience)
    return Client(served.hub.endpoint, served.hub.token(), patience=quick, on_event=events.append), events


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 503, "times": 3},
        {"status": 429, "times": 2, "headers": {"Retry-After": "0"}},
        {"status": 408},
        {"cut": 100_000, "times": 5},
        {"cut": 0, "times": 2},
        {"stall": 50_000, "times": 2},
        {"expire": True, "after": 3},
        {"status": 403, "times": 3},
    ],
    ids=lambda fault: "-".join(map(str, fault)),
)
def test_what_passes_costs_time_but_no_bytes(lfs: Served, repo: str, fault: dict[str, Any]) -> None:
    """Storage is busy, cuts, stalls, forgets its signatures: the run goes on from the byte it had."""
    client, events = listening(lfs, silence=0.3, total=8)
    lfs.hub.fail(STORAGE, origin="storage", **fault)
    lfs.hub.log(clear=True)
    convert(client, repo)
    log = [request for request in lfs.hub.log() if request.origin == "storage"]
    sent = sum(request.bytes_out for request in log if request.status == 206)
    assert sent <= len(DATA) + 6 * 200_000
    assert any(isinstance(event, Waiting) for event in events) or "expire" in fault or fault.get("status") == 403


def test_an_expired_address_is_renewed_once_for_all_threads(lfs: Served, repo: str) -> None:
    lfs.hub.fail(STORAGE, origin="storage", expire=True, after=4)
    lfs.hub.log(clear=True)
    convert(lfs.client(), repo)
    assert sum("resolve" in request.path for request in lfs.hub.log()) == 2


def test_a_wait_that_storage_asks_for_is_kept(lfs: Served, repo: str) -> None:
    client, events = listening(lfs)
    lfs.hub.fail(STORAGE, origin="storage", status=429, headers={"Retry-After": "1"}, after=1)
    started = time.monotonic()
    convert(client, repo)
    assert time.monotonic() - started >= 1
    (wait,) = [event for event in events if isinstance(event, Waiting)]
    assert (wait.what, wait.why) == (f"hf://{repo}/{FILE}", "the server answered 429")
    assert 1 <= wait.seconds <= 1.1


@pytest.mark.parametrize("offset", [0, 40_000, 12_345])
def test_a_changed_byte_is_noticed_when_the_shard_is_complete(lfs: Served, repo: str, offset: int) -> None:
    lfs.hub.fail(STORAGE, origin="storage", corrupt=offset, after=0 if offset == 40_000 else 5)
    source = HubSource(lfs.client(), Address(repo))
    with closing(source):
        source.read(FILE, 0, 65_536)
        source._download._part = PART
        source.expect([Job(FILE, lambda: READS)])
        with pytest.raises(CheckpointError, match=rf"{repo}/{FILE}: its SHA-256 must be [0-9a-f]{{64}} as the Hub"):
            read_and_settle(source)


def test_a_changed_byte_in_a_small_file_is_noticed(lfs: Served, repo: str) -> None:
    lfs.hub.fail("GET .*/config.json", corrupt=0)
    with closing(HubSource(lfs.client(), Address(repo))) as source:
        with pytest.raises(CheckpointError, match=r"config\.json: its git object id must be"):
            source.read("config.json", 0, 2)
        assert source.read("config.json", 0, 2).tobytes() == b"{}"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 206, "headers": {"Content-Range": "bytes 0-5/6"}}, "asked for bytes 0-99 of"),
        ({"status": 200}, "the answer was status 200 with 'no Content-Range'"),
        ({"status": 404}, "were refused with status 404"),
        ({"status": 416}, "were refused with status 416"),
        ({"status": 403}, "were refused with status 403"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_ends_the_run(
    lfs: Served, repo: str, fault: dict[str, Any], message: str
) -> None:
    """No retry helps, and no byte of it is used; a refusal is believed after a few fresh addresses."""
    lfs.hub.fail(STORAGE, origin="storage", times=-1, **fault)
    lfs.hub.log(clear=True)
    with closing(HubSource(lfs.client(), Address(repo))) as source, pytest.raises(HubError, match=message):
        source.read(FILE, 1, 101) if "0-99" not in message else source._download.read(FILE, 0, 100)
    assert sum(request.origin == "storage" for request in lfs.hub.log()) <= 4


@pytest.mark.parametrize("stop", [{"stall": 0}, {"cut": 0}, {"status": 503}])
def test_a_storage_that_never_answers_ends_the_run_in_time(lfs: Served, repo: str, stop: dict[str, Any]) -> None:
    client, _ = listening(lfs, silence=0.2, total=0.8)
    lfs.hub.fail(STORAGE, origin="storage", times=-1, after=1, **stop)
    started = time.monotonic()
    with pytest.raises(TransientError, match=f"hf://{repo}/{FILE}: .*; gave up after .* run the same command later"):
        convert(client, repo, depth=1)
    assert time.monotonic() - started < 6


def test_a_failure_of_an_unannounced_read_leaves_the_source_usable(lfs: Served, repo: str) -> None:
    client, _ = listening(lfs, total=0.1)
    with closing(HubSource(client, Address(repo))) as source:
        lfs.hub.fail(STORAGE, origin="storage", status=500, times=-1)
        with pytest.raises(TransientError):
            source.read(FILE, 0, 100)
        lfs.hub.clear_faults()
        assert source.read(FILE, 0, 100).tobytes() == DATA[:100]


def test_closing_ends_a_request_that_hangs(lfs: Served, repo: str) -> None:
    """The socket is shut down: nobody waits for its timeout."""
    client, _ = listening(lfs, silence=30, total=60)
    lfs.hub.fail(STORAGE, origin="storage", stall=100, times=-1)
    source = HubSource(client, Address(repo))
    source.expect([Job(FILE, lambda: READS)])
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(source.read, *READS[0]), pool.submit(source.read, FILE, 3, 5000)]
        time.sleep(0.5)
        started = time.monotonic()
        source.close()
        for future in waiting:
            with pytest.raises(HubError, match="was closed"):
                future.result(5)
    assert time.monotonic() - started < 2


def test_the_storage_never_sees_the_token(lfs: Served, repo: str) -> None:
    lfs.hub.log(clear=True)
    convert(lfs.client(), repo)
    log = lfs.hub.log()
    assert not any(request.authorized for request in log if request.origin == "storage")
    assert all(request.authorized for request in log if request.origin == "hub")


def test_signatures_stay_out_of_messages(lfs: Served, repo: str) -> None:
    lfs.hub.fail(STORAGE, origin="storage", times=-1, status=403)
    with closing(HubSource(lfs.client(), Address(repo))) as source, pytest.raises(HubError) as caught:
        source.read(FILE, 0, 100)
    assert "signature" not in everything_about(caught.value)


def everything_about(error: BaseException | None) -> str:
    """All text that an error, and what it drags along, could show."""
    text = ""
    while error is not None:
        text += f"{error!r} {error} {error.args!r} {vars(error)!r} {getattr(error, '__notes__', '')!r}\n"
        error = error.__cause__ or error.__context__
    return text


@pytest.fixture(scope="module")
def xet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("xet"), xet=True) as served:
        yield served


GRANT = "GET .*/xet-read-token/"


@pytest.mark.parametrize("fault", [{"status": 503, "times": 2}, {"status": 429}, {"cut": 0}, {"token_expiry": -100}])
def test_xet_goes_on_when_its_token_is_late(xet: Served, fault: dict[str, Any]) -> None:
    repo = xet.put({FILE: DATA})
    xet.hub.fail(GRANT, **fault)
    convert(xet.client(), repo)


@pytest.mark.parametrize(
    ("fault", "kind"), [({"status": 403}, HubError), ({"status": 503}, TransientError), ({"stall": 0}, TransientError)]
)
def test_xet_ends_in_time_when_there_is_no_token(xet: Served, fault: dict[str, Any], kind: type[MsoError]) -> None:
    repo = xet.put({FILE: DATA})
    xet.hub.fail(GRANT, times=-1, **fault)
    client, _ = listening(xet, silence=0.4, total=1)
    started = time.monotonic()
    with pytest.raises(kind, match=f"hf://{repo}"):
        convert(client, repo)
    xet.hub.clear_faults()
    assert time.monotonic() - started < 8


def test_a_changed_byte_in_xet_storage_is_noticed(xet: Served) -> None:
    """hf_xet itself does not: it hands the byte out."""
    repo = xet.put({FILE: random.Random(9).randbytes(3_000_000)})
    stored = [path for path in (xet.hub.folder / "cas").rglob("xorbs/default.*") if not path.suffix.endswith("tagset")]
    newest = max(stored, key=lambda path: path.stat().st_mtime)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 255
    newest.chmod(0o644)
    newest.write_bytes(content)
    with closing(HubSource(xet.client(), Address(repo))) as source:
        source.expect([Job(FILE, lambda: [(FILE, 1000, 2000)])])
        source.read(FILE, 1000, 2000)
        with pytest.raises(CheckpointError, match="its SHA-256 must be"):
            source.settle(FILE)


def test_switching_xet_off_reads_the_same_file_over_http(xet: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    repo = xet.put({FILE: DATA})
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    source = convert(xet.client(), repo)
    assert source.sha256(FILE) is not None
    assert not any("xet" in request.path for request in xet.hub.log())


def test_a_part_is_read_by_one_request(lfs: Served, repo: str) -> None:
    snapshot = take_snapshot(lfs.client(), Address(repo))
    with closing(Download(lfs.client(), snapshot)) as download:
        lfs.hub.log(clear=True)
        assert b"".join(bytes(part) for part in download.stream(FILE, 5, 500_000)) == DATA[5:500_000]
        assert [request.range for request in lfs.hub.log() if request.origin == "storage"] == ["bytes=5-499999"]
        with pytest.raises(CheckpointError, match=r"gone: cannot be read"):
            download.read("gone", 0, 1)
