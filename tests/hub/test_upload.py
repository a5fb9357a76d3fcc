"""Bytes on their way into the storage of a repo: Xet streams, LFS from memory, small files for git."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mso_hub.errors import HubError, SinkError, TransientError
from mso_hub.hub import RemoteFile
from mso_hub.hub.devhub import DevHub
from mso_hub.hub.lfs import present
from mso_hub.hub.memory import MemoryFile
from mso_hub.hub.target import Target
from mso_hub.hub.upload import GIT_LIMIT, Stored, Upload, duplicate, goes_to_git
from mso_hub.sink.hub import HubSink
from tests.hub.outputs import JOB, MIB, Place, finish, noise, serving, sizes, write

SHARD = "model-00001-of-00003.safetensors"


@pytest.fixture(scope="module", params=["xet", "lfs"])
def hub(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevHub]:
    with serving(tmp_path_factory.mktemp("upload"), xet=request.param == "xet") as server:
        yield server


@pytest.fixture(scope="module")
def lfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevHub]:
    with serving(tmp_path_factory.mktemp("lfs"), xet=False) as server:
        yield server


@pytest.fixture
def place(hub: DevHub, tmp_path: Path) -> Iterator[Place]:
    found = Place(hub, tmp_path)
    found.create()
    yield found
    hub.clear_faults()


@pytest.fixture
def plain(lfs: DevHub, tmp_path: Path) -> Iterator[Place]:
    """A place without Xet."""
    found = Place(lfs, tmp_path)
    found.create()
    lfs.log(clear=True)
    yield found
    lfs.clear_faults()
    lfs.set(multipart_above=100 * MIB, part_size=16 * MIB)


def stored(place: Place, path: str, data: bytes) -> Stored:
    """One upload from the first byte to the last."""
    upload = Upload(place.client(), Target(place.repo, xet=place.xet), path, len(data))
    for begin in range(0, len(data), 300_000):
        upload.write(data[begin : begin + 300_000])
    return upload.finish()


@pytest.mark.parametrize("nbytes", [1, 1000, MIB, MIB + 1, 5 * MIB, 11 * MIB])
def test_an_object_has_the_digest_of_its_bytes(place: Place, nbytes: int) -> None:
    data = noise(nbytes, nbytes)
    found = stored(place, SHARD, data)
    assert (found.nbytes, found.sha256, found.content) == (nbytes, hashlib.sha256(data).hexdigest(), None)
    assert (found.xet_hash is not None) == place.xet
    assert present(place.client(), Target(place.repo), [(found.sha256, nbytes)]) == {found.sha256}


@pytest.mark.parametrize("path", ["config.json", "vocab.json", "LICENSE"])
@pytest.mark.parametrize("nbytes", [0, 700, 3 * MIB])
def test_the_hub_says_what_goes_to_git(place: Place, path: str, nbytes: int) -> None:
    data = b"text\n" * (nbytes // 5)
    found = stored(place, path, data)
    assert found.content == data
    assert found.xet_hash is None


def test_empty_shards_go_to_git(place: Place) -> None:
    assert stored(place, SHARD, b"").content == b""


def test_big_files_are_not_asked_about(place: Place) -> None:
    """Above 10 MB the Hub takes nothing into git."""
    place.hub.log(clear=True)
    assert stored(place, "tokenizer.json", b"x" * (GIT_LIMIT + 1)).content is None
    assert not [r for r in place.hub.log() if "/preupload/" in r.path]


def test_a_file_that_the_repo_ignores_is_an_error(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub would leave it out of the commit without a word."""
    client = place.client()

    class Answer:
        def json(self) -> object:
            return {"files": [{"path": "x.json", "uploadMode": "regular", "shouldIgnore": True}]}

    monkeypatch.setattr(client, "request", lambda *args, **settings: Answer())
    with pytest.raises(HubError, match=r"x\.json: a \.gitignore in the repo keeps this file out"):
        goes_to_git(client, Target(place.repo), "x.json", 5, b"12345")


def test_too_many_bytes_are_noticed_at_once(place: Place) -> None:
    upload = Upload(place.client(), Target(place.repo, xet=place.xet), SHARD, 10)
    with pytest.raises(SinkError, match=rf"{SHARD}: announced 10 bytes, got 11"):
        upload.write(b"12345678901")


def test_an_upload_that_was_given_up_can_be_given_up_again(place: Place) -> None:
    upload = Upload(place.client(), Target(place.repo, xet=place.xet), SHARD, 5 * MIB)
    upload.write(noise(4 * MIB))
    upload.abort()
    upload.abort()
    with pytest.raises(SinkError):
        upload.finish()


def test_no_byte_touches_a_disk(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the journal does. hf_xet keeps its own small files in its cache; the data is not among them."""
    before = written()
    data = {SHARD: noise(40 * MIB, 7)}
    sink = place.sink()
    sink.begin(JOB, sizes(data))
    write(sink, data)
    sink.wait()
    # The local Xet storage of the test lies on this disk and is written by this process.
    allowed = 60 * MIB if place.xet else MIB
    assert written() - before < allowed
    assert [path.name for path in place.cache.rglob("*") if path.is_file()] == [sink.journal.name]
    assert sink.journal.stat().st_size < 1000
    sink.close()


def written() -> int:
    """Bytes that this process has sent to disks."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["write_bytes"])


# --- production and upload at the same time ----------------------------------------------------------


def test_the_next_file_is_produced_while_one_travels(plain: Place) -> None:
    """And no more than that: one waits, one is written."""
    files = {f"model-0000{n}-of-00004.safetensors": noise(2 * MIB, n) for n in range(4)}
    plain.hub.fail("PUT /objects", origin="storage", delay=0.4, times=-1)
    sink = plain.sink()
    sink.begin(JOB, sizes(files))
    opened = []
    started = time.monotonic()
    for name, data in files.items():
        with sink.open(name, len(data)) as file:
            opened.append(time.monotonic() - started)
            file.write(data)
    first, second, third, fourth = opened
    assert second - first < 0.3
    assert third - second > 0.3
    assert fourth - third > 0.3
    assert len(sink.entries) < 4
    sink.wait()
    assert len(sink.entries) == 4
    sink.close()


def test_memory_is_bounded_by_two_files(plain: Place) -> None:
    """Of six shards of 24 MiB never more than two are held, however slow the line is."""
    names = [f"model-0000{n}-of-00006.safetensors" for n in range(6)]
    plain.hub.fail("PUT /objects", origin="storage", delay=0.15, times=-1)
    sink = plain.sink()
    sink.begin(JOB, dict.fromkeys(names, 24 * MIB))
    most, over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.01):
            most = max(most, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number, name in enumerate(names):
        with sink.open(name, 24 * MIB) as file:
            for _ in range(24):
                file.write(bytes([number]) * MIB)
    sink.wait()
    over.set()
    watcher.join()
    sink.close()
    assert most <= 49 * MIB
    assert anonymous() == 0


def anonymous() -> int:
    """Bytes of this process's anonymous memory files."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            if "memfd:mso_hub" in os.readlink(link):  # noqa: PTH115 - a name that is no path
                total += link.stat().st_size
        except FileNotFoundError:
            continue
    return total


def another(sink: HubSink) -> None:
    """The next file, some time later."""
    time.sleep(0.3)
    with sink.open("model-1.safetensors", 0):
        pass


@pytest.mark.parametrize(
    "then", [another, HubSink.wait, lambda sink: sink.commit(b"{}")], ids=["open", "wait", "commit"]
)
def test_an_upload_that_fails_stops_the_next_step(plain: Place, then: Callable[[HubSink], None]) -> None:
    plain.hub.fail("PUT /objects", origin="storage", status=404)
    sink = plain.sink()
    sink.begin(JOB, {"model-0.safetensors": 2 * MIB, "model-1.safetensors": 0})
    write(sink, {"model-0.safetensors": noise(2 * MIB, plain.repo)})
    with pytest.raises(HubError, match=r"model-0\.safetensors: .*\(404\)"):
        then(sink)
    assert dict(sink.entries) == {}
    sink.close()


def test_closing_does_not_wait_for_a_slow_line(plain: Place) -> None:
    """What is on its way is given up; its bytes are no longer held."""
    sink = plain.sink()
    sink.begin(JOB, {SHARD: 2 * MIB})
    plain.hub.fail("PUT /objects", origin="storage", status=503, times=-1, headers={"Retry-After": "2"})
    with sink.open(SHARD, 2 * MIB) as file:
        file.write(noise(2 * MIB, "slow"))
    time.sleep(0.2)
    sink.close()
    assert anonymous() == 0
    assert plain.visible() == {}
    assert not sink.journal.exists()


def test_a_permission_that_is_withdrawn_is_no_outage(place: Place) -> None:
    """After hours somebody takes the right to write away."""
    place.hub.fail("xet-write-token|info/lfs", status=403, times=-1)
    with pytest.raises(HubError) as caught:
        stored(place, SHARD, noise(2 * MIB, place.repo))
    assert SHARD in str(caught.value) or place.repo in str(caught.value)
    assert place.hub.token() not in str(caught.value)


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_is_busy_when_a_shard_begins_is_waited_for(place: Place, status: int) -> None:
    place.hub.fail("xet-write-token|info/lfs", status=status, times=3)
    data = noise(2 * MIB, f"{place.repo}{status}")
    assert stored(place, SHARD, data).sha256 == hashlib.sha256(data).hexdigest()


# --- LFS ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_are_sent_in_order(plain: Place, parts: int) -> None:
    plain.hub.set(multipart_above=MIB, part_size=MIB)
    data = noise(parts * MIB + 1, parts)
    found = stored(plain, SHARD, data)
    puts = [r for r in plain.hub.log() if r.origin == "storage" and r.method == "PUT"]
    assert [r.bytes_in for r in puts] == [MIB] * parts + [1]
    assert not any(r.authorized for r in plain.hub.log() if r.origin == "storage")
    assert present(plain.client(), Target(plain.repo), [(found.sha256, found.nbytes)])


@pytest.mark.parametrize(
    "effect", [{"status": 503}, {"status": 500}, {"cut": 300_000}, {"status": 503, "land": True}], ids=str
)
@pytest.mark.parametrize("match", ["PUT /parts", "PUT /objects", "POST /complete", "info/lfs"])
def test_a_busy_storage_is_asked_again(plain: Place, match: str, effect: dict[str, int]) -> None:
    if match != "PUT /objects":
        plain.hub.set(multipart_above=MIB, part_size=MIB)
    plain.hub.fail(match, times=2, **effect)
    data = noise(2 * MIB + 5, hash(match) % 1000 + len(str(effect)))
    found = stored(plain, SHARD, data)
    assert present(plain.client(), Target(plain.repo), [(found.sha256, found.nbytes)])


@pytest.mark.parametrize("match", ["PUT /parts/.*/2$", "PUT /objects"])
def test_expired_signatures_are_renewed(plain: Place, match: str) -> None:
    if "parts" in match:
        plain.hub.set(multipart_above=MIB, part_size=MIB)
    plain.hub.fail(match, origin="storage", expire=True)
    data = noise(3 * MIB + 7, len(match))
    found = stored(plain, SHARD, data)
    assert present(plain.client(), Target(plain.repo), [(found.sha256, found.nbytes)])


def test_signatures_that_never_work_are_an_error(plain: Place) -> None:
    plain.hub.fail("PUT /objects", origin="storage", status=403, times=-1)
    with pytest.raises(HubError, match=f"{SHARD}: "):
        stored(plain, SHARD, noise(2 * MIB, 123))


def test_what_the_storage_has_already_is_not_sent(plain: Place) -> None:
    data = noise(2 * MIB, 77)
    stored(plain, SHARD, data)
    plain.hub.log(clear=True)
    stored(plain, "other.safetensors", data)
    assert plain.sent() == 0


def test_a_storage_that_is_down_ends_in_a_transient_error(plain: Place) -> None:
    plain.hub.fail("PUT /objects", origin="storage", status=503, times=-1, headers={"Retry-After": "60"})
    with pytest.raises(TransientError, match="503"):
        stored(plain, SHARD, noise(2 * MIB, 321))


def test_no_signature_is_in_a_message(plain: Place) -> None:
    plain.hub.fail("PUT /objects", origin="storage", status=403, times=-1)
    with pytest.raises(HubError) as caught:
        stored(plain, SHARD, noise(2 * MIB, 322))
    assert "signature" not in str(caught.value).lower()
    assert plain.hub.token() not in repr(caught.getrepr(style="long", showlocals=False))


# --- memory --------------------------------------------------------------------------------------------


def test_a_memory_file_gives_back_what_was_written() -> None:
    file = MemoryFile("x", 3 * MIB + 5)
    data = noise(3 * MIB + 5)
    file.write(data[:100])
    file.write(data[100:])
    assert b"".join(file.blocks(0, len(data))) == data
    assert b"".join(file.blocks(MIB - 1, 2 * MIB + 2)) == data[MIB - 1 : 2 * MIB + 2]
    file.close()
    file.close()
    with pytest.raises(SinkError, match=r"x: was given up before all of its 3,145,733 bytes were sent"):
        next(file.blocks(0, 1))


@pytest.mark.parametrize("shared", [True, False])
def test_systems_without_memfd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, shared: bool) -> None:
    """A file without a name in shared memory does as well; without that there is a way out."""
    monkeypatch.delattr(os, "memfd_create")
    if not shared:
        monkeypatch.setattr("mso_hub.hub.memory.SHARED", tmp_path / "none")
        with pytest.raises(SinkError, match=r"neither memfd_create nor /dev/shm; install hf_xet"):
            MemoryFile("x", 5)
        return
    file = MemoryFile("x", 5)
    file.write(b"12345")
    assert b"".join(file.blocks(0, 5)) == b"12345"
    file.close()


# --- copies within the Hub --------------------------------------------------------------------------------


def source(place: Place, data: bytes) -> tuple[str, RemoteFile]:
    """Another repo with one finished shard."""
    repo = f"{place.hub.user}/source-of-{place.repo.partition('/')[2]}"
    finish(place.sink(repo=repo), {SHARD: data})
    return repo, place.remote(SHARD, repo)


def test_objects_are_duplicated_without_a_transfer(place: Place) -> None:
    data = noise(2 * MIB, 4)
    repo, file = source(place, data)
    target = Target(place.repo, xet=place.xet)
    assert duplicate(place.client(), target, repo, file) == place.xet  # plain LFS has no such thing
    assert duplicate(place.client(), target, place.repo, file)  # its own objects need none


def test_what_the_hub_does_not_duplicate_is_left_to_the_caller(place: Place) -> None:
    small = RemoteFile("config.json", 2, "0" * 40)
    assert not duplicate(place.client(), Target(place.repo), "dev/other", small)
    place.hub.fail("lfs-files/duplicate", status=400)
    file = RemoteFile(SHARD, 5, "0" * 40, "1" * 64, "2" * 64)
    assert not duplicate(place.client(), Target(place.repo), "dev/other", file)


def test_a_busy_hub_is_no_reason_to_send_bytes(place: Place) -> None:
    place.hub.fail("lfs-files/duplicate", status=503, times=-1, headers={"Retry-After": "60"})
    file = RemoteFile(SHARD, 5, "0" * 40, "1" * 64, "2" * 64)
    with pytest.raises(TransientError):
        duplicate(place.client(), Target(place.repo), "dev/other", file)
