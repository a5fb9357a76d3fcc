"""A Hub that stumbles changes no byte: the run waits and repeats; a Hub that is gone ends it in bounded time."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mso_hub.errors import HubError
from tests.hubs import World, convert_here, llama, local_output, world

STORMS = 3
ANYWHERE = (
    "GET /api/models/.*/revision", "GET /api/models/.*/tree", "auth-check", "whoami", "GET /api/models/dev/[^/]*$",
    "POST /api/repos/create", "HEAD .*/resolve/", "GET .*/resolve/", "preupload", "POST .*/commit/", "paths-info",
    "validate-yaml", "duplicate", "xet-read-token", "xet-write-token", "objects/batch", "objects/verify",
)  # fmt: skip
STORAGE = ("GET /files/", "PUT /(objects|parts)", "POST /complete")
BUSY: tuple[Mapping[str, Any], ...] = (
    {"status": 503}, {"status": 500}, {"status": 408}, {"status": 504, "land": True}, {"cut": 0}, {"delay": 0.1},
    {"cut": 0, "land": True}, {"status": 429, "headers": {"Retry-After": "0"}},
)  # fmt: skip
BROKEN: tuple[Mapping[str, Any], ...] = ({"cut": 1}, {"cut": 100_000}, {"cut": 250_000}, {"expire": True})


@pytest.fixture(scope="module")
def lfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("lfs"), xet=False) as found:
        yield found


@pytest.fixture(scope="module")
def xet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("xet"), xet=True) as found:
        yield found


@pytest.fixture(scope="module")
def stormy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Xet for conversions in this process, which may keep the storage open for longer than they run."""
    with world(tmp_path_factory.mktemp("stormy"), xet=True) as found:
        yield found


@pytest.fixture(params=["lfs", "xet"])
def place(request: pytest.FixtureRequest) -> Iterator[World]:
    """Each of them, without faults at the end."""
    found: World = request.getfixturevalue(request.param)
    yield found
    found.hub.clear_faults()


class Example:
    """A source, a name for the output, and what the output must be."""

    def __init__(self, place: World, folder: Path, seed: int, **more: Any) -> None:
        files = llama(seed=seed, **more)
        self.source, self.out = place.put(files), place.name()
        self.expected = local_output(files, folder)
        place.log()


# --- it stumbles --------------------------------------------------------------------------------------


def test_everything_that_a_hub_does_wrong_in_one_run(place: World, tmp_path: Path) -> None:
    """The program itself: busy answers, asked-for waits, cuts both ways, old URLs, old tokens, a lost commit."""
    example = Example(place, tmp_path, 100)
    fail = place.hub.fail
    fail("GET .*/revision/", status=503)
    fail("GET .*/tree/", status=429, headers={"Retry-After": "1"})
    fail("whoami", status=429, headers={"RateLimit": '"api";r=0;t=0'})
    fail("POST /api/repos/create", status=500, land=True)
    fail("xet-read-token", token_expiry=-10)
    fail("xet-write-token", after=2, token_expiry=-10)
    fail("GET /files/", origin="storage", after=4, cut=100_000)
    fail("GET /files/", origin="storage", expire=True)
    fail("PUT /objects", origin="storage", cut=10_000)
    fail("PUT /objects", origin="storage", expire=True)
    fail("PUT /objects", origin="storage", after=2, corrupt=1000)
    fail("preupload", delay=0.2)
    fail("POST .*/commit/", status=504, land=True)
    done = place.run("quantize", "--input_dir", f"hf://{example.source}", "--output_dir", f"hf://{example.out}")
    assert done.returncode == 0, done.stderr
    for reason in ("503", "429", "500", "504"):
        assert f"the server answered {reason}; trying again in" in done.stderr
    place.hub.clear_faults()
    assert place.output(example.out) == example.expected
    assert len(place.api.list_repo_commits(example.out)) == 2


@pytest.mark.parametrize("mode", ["lfs", "stormy"])
@pytest.mark.parametrize("seed", range(STORMS))
def test_a_storm_of_random_faults_changes_no_byte(
    request: pytest.FixtureRequest, tmp_path: Path, mode: str, seed: int
) -> None:
    """A dozen faults of every kind, wherever they strike: the output is that of a calm day, in one commit."""
    place: World = request.getfixturevalue(mode)
    example = Example(place, tmp_path, 200 + seed, shards=seed % 2)
    chance = random.Random(seed)
    place.hub.set(multipart_above=chance.choice([1000, 64 << 20]), part_size=30_000)
    for _ in range(12):
        in_storage = chance.random() < 0.5
        match = chance.choice(STORAGE if in_storage else ANYWHERE)
        effect = chance.choice((*BUSY, *BROKEN) if in_storage else BUSY)
        # A signature that expires again and again is believed in the end: see below.
        times = 1 if "expire" in effect else chance.randint(1, 3)
        place.hub.fail(match, **effect, times=times, after=chance.randint(0, 4))
    convert_here(place, f"hf://{example.source}", f"hf://{example.out}")
    place.hub.clear_faults()
    place.hub.set(multipart_above=64 << 20, part_size=16 << 20)
    assert place.output(example.out) == example.expected
    assert len(place.api.list_repo_commits(example.out)) == 2


def test_urls_that_expire_all_the_time_are_renewed(lfs: World, tmp_path: Path) -> None:
    """Half a second of validity, and a line that needs several for the source: the run goes on where it was."""
    example = Example(lfs, tmp_path, 300, hidden=256)
    lfs.hub.set(url_lifetime=0.5, bandwidth_down=2e6)
    convert_here(lfs, f"hf://{example.source}", f"hf://{example.out}")
    lfs.hub.set(url_lifetime=3600, bandwidth_down=0)
    assert sum(r.status == 403 for r in lfs.log()) >= 2
    assert lfs.output(example.out) == example.expected


# --- it is gone ---------------------------------------------------------------------------------------

GONE: Mapping[tuple[str, str], tuple[str, Mapping[str, Any], str]] = {
    ("lfs", "the hub is down"): ("GET /api/models", {"status": 503}, "the server answered 503"),
    ("lfs", "downloads break"): ("GET /(files/.*|dev/model.*/resolve/)", {"cut": 0}, "no answer"),
    ("xet", "downloads break"): ("GET /dev/model.*/resolve/", {"cut": 0}, "no answer"),
    ("lfs", "uploads are refused"): ("PUT /", {"status": 503}, "the server answered 503"),
    ("xet", "uploads are refused"): ("xet-write-token", {"status": 503}, "the server answered 503"),
    ("lfs", "the commit is never taken"): ("POST .*/commit/", {"status": 504}, "the server answered 504"),
}


@pytest.mark.parametrize(("place", "case"), GONE, indirect=["place"])
def test_a_hub_that_stays_away_ends_the_run_in_bounded_time(place: World, tmp_path: Path, case: str) -> None:
    """Exit code 3, one message that says how long it was tried; nothing is visible, and the same command goes on."""
    key = ("xet" if place.xet else "lfs", case)
    match, effect, words = GONE[key]
    example = Example(place, tmp_path, 400 + list(GONE).index(key))
    place.hub.fail(match, **effect, times=-1)
    where = ("--input_dir", f"hf://{example.source}", "--output_dir", f"hf://{example.out}", "--progress", "none")
    started = time.monotonic()
    done = place.run("quantize", *where, MSO_HUB_RETRY_SECONDS="1")
    assert time.monotonic() - started < 10
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.count("mso-hub: ") == 1
    for word in (words, "what is complete is kept", "hf://dev/"):
        assert word in done.stderr
    place.hub.clear_faults()
    assert set(place.files(example.out)) <= {".gitattributes"}
    assert place.run("quantize", *where).returncode == 0
    assert place.output(example.out) == example.expected


def test_a_wait_that_is_longer_than_our_patience_is_not_begun(lfs: World) -> None:
    """An hour is asked for, ten minutes are the limit: the message comes at once and tells both."""
    lfs.hub.fail("GET /api/models", status=429, headers={"Retry-After": "3600"}, times=-1)
    try:
        done = lfs.run("inspect", "hf://dev/anything")
    finally:
        lfs.hub.clear_faults()
    assert (done.returncode, done.stdout) == (3, "")
    assert "the server answered 429 and asks to wait 3600 s; gave up after 0 s of at most 600 s" in done.stderr


def test_a_storage_that_hangs_in_the_middle_of_a_shard(lfs: World, tmp_path: Path) -> None:
    """Down and up: a silent connection is given up and the rest is asked for; for ever silent, the run ends."""
    example = Example(lfs, tmp_path, 500)
    lfs.hub.fail("GET /files/", origin="storage", after=4, stall=50_000)
    lfs.hub.fail("PUT /objects", origin="storage", stall=10_000)
    where = ("--input_dir", f"hf://{example.source}", "--output_dir", f"hf://{example.out}", "--progress", "none")
    try:
        assert lfs.run("quantize", *where, MSO_HUB_RETRY_SECONDS="1").returncode == 0
        assert lfs.output(example.out) == example.expected
        lfs.hub.fail("GET /api/models/.*/tree", stall=0, times=-1)
        started = time.monotonic()
        hung = lfs.run("inspect", f"hf://{example.source}", MSO_HUB_RETRY_SECONDS="1")
        assert time.monotonic() - started < 12
    finally:
        lfs.hub.clear_faults()
    assert hung.returncode == 3
    assert "no answer (ReadTimeout" in hung.stderr


def test_what_a_resumed_run_keeps_need_not_be_sent(lfs: World, tmp_path: Path) -> None:
    """The third upload fails for good; the next run sends the rest, and nothing twice."""
    example = Example(lfs, tmp_path, 600, layers=5, shards=5)
    lfs.hub.fail("PUT /objects", after=2, status=503, times=-1)
    where = ("--input_dir", f"hf://{example.source}", "--output_dir", f"hf://{example.out}", "--progress", "none")
    assert lfs.run("quantize", *where, MSO_HUB_RETRY_SECONDS="1").returncode == 3
    lfs.hub.clear_faults()
    first = [r for r in lfs.log() if r.method == "PUT" and r.status == 200]
    assert lfs.run("quantize", *where).returncode == 0
    second = [r for r in lfs.log() if r.method == "PUT"]
    assert (len(first), len(second)) == (2, 3)
    assert lfs.output(example.out) == example.expected


def test_signatures_that_storage_never_accepts(lfs: World, tmp_path: Path) -> None:
    """Fresh addresses, refused each time: bounded, and not blamed on the token."""
    example = Example(lfs, tmp_path, 700)
    lfs.hub.fail("PUT /objects", status=403, times=-1)
    try:
        with pytest.raises(HubError, match="storage refused 3 fresh addresses in a row"):
            convert_here(lfs, f"hf://{example.source}", f"hf://{example.out}")
    finally:
        lfs.hub.clear_faults()
    assert set(lfs.files(example.out)) == {".gitattributes"}
