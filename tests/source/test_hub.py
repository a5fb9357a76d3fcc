"""A repo on the Hub as a source, over LFS and Xet: the contract, announced jobs, and how few requests they cost."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from mso_hub.errors import CheckpointError, HubError
from mso_hub.hub import Address
from mso_hub.hub.devhub import Request
from mso_hub.hub.repository import _safe
from mso_hub.source import Job, Range, Source, read_checkpoint
from mso_hub.source.hub import HubSource
from tests.helpers import checkpoint_files, random_tensor
from tests.hub.serving import Served, serving
from tests.source.contract import SourceContract

BLOCK = 1 << 20
BIG = random.Random(0).randbytes(37 * BLOCK + 12_345)


@pytest.fixture(scope="module", params=["lfs", "xet"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp(request.param), xet=request.param == "xet") as served:
        yield served


@pytest.fixture(autouse=True)
def _calm(request: pytest.FixtureRequest) -> Iterator[None]:
    """No fault of one test reaches the next one, and no thread outlives its source."""
    yield
    if "served" in request.fixturenames:
        request.getfixturevalue("served").hub.clear_faults()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("mso-")]
    assert not left


class TestHubSource(SourceContract):
    """The contract, from a folder inside a repo: a repo of its own always holds .gitattributes too."""

    @pytest.fixture(autouse=True)
    def _served(self, served: Served) -> Iterator[None]:
        self.served, self.opened = served, list[HubSource]()
        yield
        for source in self.opened:
            source.close()

    def open_files(self, files: Mapping[str, bytes], folder: Path) -> Source:
        repo = self.served.put({f"model/{name}": data for name, data in files.items()})
        self.opened.append(HubSource(self.served.client(), Address(repo, folder="model")))
        return self.opened[-1]


@pytest.fixture(scope="module")
def big(served: Served) -> str:
    """A repo with two files of which one is large enough for several requests."""
    return served.put({"a.safetensors": BIG, "b.safetensors": BIG[: 3 * BLOCK], "config.json": b"{}"})


def open_repo(served: Served, repo: str, **settings: int) -> HubSource:
    return HubSource(served.client(), Address(repo), **settings)


def blocks(file: str, begin: int, end: int, step: int = BLOCK) -> list[Range]:
    return [(file, at, min(at + step, end)) for at in range(begin, end, step)]


def job(name: str, reads: Sequence[Range]) -> Job:
    return Job(name, lambda: reads)


def read_all(source: HubSource, reads: Sequence[Range], threads: int = 2) -> None:
    """Every read, checked, by several threads as an engine does it."""

    def one(place: Range) -> None:
        assert source.read(*place).tobytes() == BIG[place[1] : place[2]]

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, reads))


def fetched(log: Sequence[Request], part: str) -> Counter[int]:
    """How often storage sent each KiB of a file, by the ranges it was asked for."""
    sent: Counter[int] = Counter()
    for request in log:
        if request.origin == "storage" and part in request.path and request.status == 206:
            low, high = (request.range or "").removeprefix("bytes=").split("-")
            sent.update(range(int(low) >> 10, (int(high) >> 10) + 1))
    return sent


@pytest.mark.parametrize("threads", [1, 3])
def test_announced_jobs_are_read_exactly(served: Served, big: str, threads: int) -> None:
    first = blocks("a.safetensors", 1000, len(BIG) - 5)
    second = blocks("b.safetensors", 0, 3 * BLOCK)
    with closing(open_repo(served, big, ahead=8 * BLOCK)) as source:
        source.expect([job("1", first), job("2", second)])
        read_all(source, first, threads)
        source.settle("1")
        read_all(source, second, threads)
        source.settle("2")


def test_each_byte_of_a_dense_shard_is_asked_for_once_headers_included(served: Served, big: str) -> None:
    """Headers first, then all tensors: one resolve per shard, and ranges that meet but never overlap."""
    with closing(open_repo(served, big)) as source:
        served.hub.log(clear=True)
        for name in ("a.safetensors", "b.safetensors"):
            source.read(name, 0, 65_536)
            source.read(name, 0, 8)
        reads = {name: blocks(name, 4096, source.files()[name]) for name in ("a.safetensors", "b.safetensors")}
        source.expect([job(name, found) for name, found in reads.items()])
        for name, found in reads.items():
            read_all(source, found)
            source.settle(name)
    log = served.hub.log()
    if served.xet:
        assert ["xet-read-token" in request.path for request in log] == [True]
        return
    resolved = [request.path.rsplit("/", 1)[1] for request in log if request.origin == "hub"]
    assert sorted(resolved) == sorted(reads)
    storage = [request for request in log if request.origin == "storage"]
    assert sum(request.bytes_out for request in storage) == len(BIG) + 3 * BLOCK
    assert not any(request.authorized for request in storage)


def test_reading_headers_costs_one_request_for_each_shard(served: Served) -> None:
    shards = {f"model-{at}.safetensors": {f"t{at}": random_tensor(64, 64)} for at in range(12)}
    repo = served.put(checkpoint_files(shards, {"hidden_size": 8}))
    with closing(open_repo(served, repo)) as source:
        served.hub.log(clear=True)
        assert len(read_checkpoint(source).shards) == 12
        log = served.hub.log()
    heads = Counter(request.path.rsplit("/", 1)[1] for request in log if request.origin == "storage")
    assert set(heads.values()) <= {1}
    assert len(heads) == (0 if served.xet else 12)


def test_a_long_header_is_kept_whole(served: Served) -> None:
    """More tensors than 64 KiB can describe: two reads, and neither is made again."""
    shards = {"model.safetensors": {f"model.layers.{at}.norm.weight": random_tensor(2) for at in range(2000)}}
    repo = served.put(checkpoint_files(shards))
    with closing(open_repo(served, repo)) as source:
        served.hub.log(clear=True)
        read_checkpoint(source)
        size = source.files()["model.safetensors"]
        head = source.read("model.safetensors", 0, 100_000).tobytes()
        reads = [("model.safetensors", 200_000, size)]
        source.expect([job("model.safetensors", reads)])
        source.read(*reads[0])
        source.settle("model.safetensors")
        assert head == source.read("model.safetensors", 0, 100_000).tobytes()
        sent = fetched(served.hub.log(), "model.safetensors") if not served.xet else Counter()
    assert all(count <= 2 for count in sent.values())


def test_small_files_are_fetched_once(served: Served, big: str) -> None:
    with closing(open_repo(served, big)) as source:
        served.hub.log(clear=True)
        assert source.read("config.json", 0, 2).tobytes() == b"{}"
        assert source.read("config.json", 1, 2).tobytes() == b"}"
        assert len(served.hub.log()) == 1


def test_every_read_is_of_the_commit_that_was_opened(served: Served) -> None:
    """A branch that moves in the meantime changes nothing."""
    repo = served.put({"config.json": b"old", "w.safetensors": b"old" * 100_000})
    with closing(open_repo(served, repo)) as source:
        served.put({"config.json": b"new", "w.safetensors": b"new" * 100_000}, repo)
        assert source.read("config.json", 0, 3).tobytes() == b"old"
        assert source.read("w.safetensors", 0, 3).tobytes() == b"old"
        assert len(source.commit) == 40
        assert source.repo_id == repo
        assert source.name == f"hf://{repo}"
        assert source.snapshot.commit == source.commit
    with closing(HubSource(served.client(), Address(repo, source.commit[:40]))) as pinned:
        assert pinned.stamp("config.json") == source.stamp("config.json")
        assert pinned.sha256("w.safetensors") == source.sha256("w.safetensors")
        assert pinned.sha256("config.json") is None


def test_a_folder_without_files_is_an_error(served: Served, big: str) -> None:
    with pytest.raises(CheckpointError, match="holds no files at commit"):
        HubSource(served.client(), Address(big, folder="nothing"))


def test_packed_reads_far_from_each_other_arrive_too(served: Served, big: str) -> None:
    """Codes in front, scales at the end: pieces beside the stream, within little memory."""
    reads: list[Range] = []
    for at in range(30):
        reads += [("a.safetensors", at * BLOCK, (at + 1) * BLOCK)]
        reads += [("a.safetensors", 31 * BLOCK + at * 1000, 31 * BLOCK + (at + 1) * 1000)]
        reads += [("b.safetensors", at * 7, at * 7 + 7)]
    reads += [*reads[:2], ("a.safetensors", 5, 5)]
    with closing(open_repo(served, big, ahead=2 * BLOCK)) as source:
        source._fetcher._slack = BLOCK
        source.expect([job("1", reads)])
        read_all(source, reads, 3)
        source.settle("1")
        assert source._fetcher.window.held == 0
        assert source._fetcher.window.most <= 16 * BLOCK


def test_a_read_that_is_made_again_is_answered(served: Served, big: str) -> None:
    with closing(open_repo(served, big)) as source:
        reads = blocks("a.safetensors", 0, 2 * BLOCK)
        source.expect([job("1", reads)])
        for _ in range(2):
            read_all(source, reads)
        source.settle("1")
        source.settle("1")


def test_closing_twice_and_reading_afterwards(served: Served, big: str) -> None:
    source = open_repo(served, big)
    source.expect([job("1", blocks("a.safetensors", 0, len(BIG)))])
    source.read("a.safetensors", 0, BLOCK)
    started = time.monotonic()
    source.close()
    source.close()
    assert time.monotonic() - started < 2
    with pytest.raises(HubError, match="was closed"):
        source.read("a.safetensors", 0, BLOCK)


def test_a_large_file_in_git_is_checked_too(tmp_path: Path) -> None:
    """The Hub knows no SHA-256 of it, but its git object id: a tokenizer with a changed byte must not be carried."""
    with serving(tmp_path, xet=False) as served:
        data = b"a word of the vocabulary\n" * 90_000
        repo = served.put({"vocab.txt": data, "model.safetensors": b"x"})
        reads = [("vocab.txt", begin, min(begin + BLOCK, len(data))) for begin in range(0, len(data), BLOCK)]
        for damage in (False, True):
            if damage:
                served.hub.fail("GET .*/vocab.txt", corrupt=1_500_000, times=-1)
            with closing(HubSource(served.client(), served.address(repo))) as source:
                assert source.sha256("vocab.txt") is None
                source.expect([Job("vocab.txt", lambda: reads)])
                found = b"".join(source.read(*place).tobytes() for place in reads)
                assert (found == data) is not damage
                if not damage:
                    source.settle("vocab.txt")
                    continue
                with pytest.raises(CheckpointError, match=r"vocab\.txt: its git object id must be [0-9a-f]{40}"):
                    source.settle("vocab.txt")


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "a\\b", "", "x\0"])
def test_paths_that_leave_the_repo_are_refused(path: str) -> None:
    """A mirror may list anything; the names become files in somebody's folder."""
    with pytest.raises(HubError, match="a path must be relative and stay inside the repo"):
        _safe(path, "hf://a/b")
    assert _safe("deep/er/b..txt", "hf://a/b") == "deep/er/b..txt"
