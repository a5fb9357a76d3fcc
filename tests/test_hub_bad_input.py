"""Wrong tokens, wrong repos, wrong bytes: one clear line, nothing published, nothing secret told."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mso_hub.hub.devhub import DevHub
from tests.hubs import World, llama, local_output, moved, random_bytes, world
from tests.running import TIMEOUT

STRANGER = "hf_" + "x" * 30
"""A token that the Hub does not know."""


@pytest.fixture(scope="module")
def lfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("lfs"), xet=False) as found:
        yield found


@pytest.fixture(scope="module")
def good(lfs: World) -> str:
    """A source without a fault, public."""
    return lfs.put(llama(seed=1), "dev/good")


@pytest.fixture(scope="module")
def bob(lfs: World) -> str:
    """Token of somebody who owns nothing here."""
    return lfs.hub.add_user("bob")


def check(
    place: World, verb: str, *words: object, expect: tuple[str, ...], code: int = 2, seconds: float = TIMEOUT,
    **more: Any,
) -> None:  # fmt: skip
    """Exit code, one message on a line of its own with these words, nothing that only a programmer understands."""
    started = time.monotonic()
    done = place.run(verb, *words, **more)
    assert time.monotonic() - started < seconds
    assert "Traceback" not in done.stderr, done.stderr
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.startswith("mso-hub: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    missing = [word for word in expect if word not in done.stderr]
    assert not missing, done.stderr


def refused(place: World, source: str, target: str, *words: object, expect: tuple[str, ...], **more: Any) -> None:
    """A conversion that is refused and leaves the target as it was."""
    before = place.state(target.removeprefix("hf://").partition("@")[0])
    where = ("--input_dir", source, "--output_dir", target, "--progress", "none", *words)
    check(place, "quantize", *where, expect=expect, **more)
    assert place.state(target.removeprefix("hf://").partition("@")[0]) == before


# --- sources ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A source that cannot be read: made by `make`, which gives its address, read with the token of `who`."""

    make: Callable[[World], str]
    expect: tuple[str, ...]
    who: str = "dev"
    more: Mapping[str, Any] = field(default_factory=dict)


def private(place: World) -> str:
    return "hf://" + place.put({"config.json": b"{}"}, private=True)


def gated(place: World) -> str:
    repo = place.put({"config.json": b"{}"})
    place.api.update_repo_settings(repo, gated="manual")
    return f"hf://{repo}"


def disabled(place: World) -> str:
    repo = place.put({"config.json": b"{}"})
    place.hub.disable(repo)
    return f"hf://{repo}"


def pickles(place: World) -> str:
    return "hf://" + place.put({"config.json": b"{}", "pytorch_model.bin": b"\x80\x04."})


def lying_header(place: World) -> str:
    """A header that is longer than its file."""
    return "hf://" + place.put({"config.json": b"{}", "model.safetensors": struct.pack("<Q", 1 << 40) + bytes(100)})


def shortened(place: World) -> str:
    """Offsets that end behind the file."""
    files = llama(seed=2)
    name = "model-00003-of-00004.safetensors"
    return "hf://" + place.put({**files, name: files[name][:-1000]})


def missing_shard(place: World) -> str:
    files = llama(seed=2)
    del files["model-00002-of-00004.safetensors"]
    return "hf://" + place.put(files)


NO_REPO = ("has no such repo, or it is private; check the name, or ",)
SOURCES = {
    "a token that nobody knows": Source(lambda _: "hf://dev/good", ("does not know this token",), STRANGER),
    "no such repo": Source(lambda _: "hf://dev/nothing", ("hf://dev/nothing: ", *NO_REPO, "use a token")),
    "no such repo, no login": Source(lambda _: "hf://dev/nothing", (*NO_REPO, "log in with `hf auth login`"), ""),
    "no such revision": Source(lambda _: "hf://dev/good@v9", ("hf://dev/good@v9: ", "no such branch, tag or commit")),
    "no such folder": Source(lambda _: "hf://dev/good/sub", ("hf://dev/good/sub: ", "holds no files", "check folder")),
    "private": Source(private, NO_REPO, "bob"),
    "private, no login": Source(private, (*NO_REPO, "log in"), ""),
    "gated": Source(gated, ("is gated and this account has no access", "ask for access on http"), "bob"),
    "gated, no login": Source(gated, ("is gated", "log in"), ""),
    "disabled": Source(disabled, ("is disabled by the Hub",)),
    "no safetensors": Source(pickles, ("at least one .safetensors file", "convert .bin")),
    "a header longer than its file": Source(lying_header, ("model.safetensors", "1,099,511,627,776")),
    "a shard that is cut short": Source(shortened, ("model-00003-of-00004.safetensors", "fetch it again")),
    "a missing shard": Source(missing_shard, ("model.safetensors.index.json", "model-00002-of-00004.safetensors")),
    "a dataset": Source(lambda _: "hf://datasets/dev/d", ("must be a model repo, this is a dataset",)),
    "a space": Source(lambda _: "hf://spaces/dev/d", ("must be a model repo, this is a space",)),
    "no organization": Source(lambda _: "hf://gpt2@", ("must be hf://org/name",)),
    "nothing behind hf://": Source(lambda _: "hf://", ("must be hf://org/name",)),
    "strange letters": Source(lambda _: "hf://dev/go od", ("must be hf://org/name",)),
    "a foreign website": Source(lambda _: "https://example.com/dev/good", ("must be hf://org/name",)),
    "offline": Source(
        lambda _: "hf://dev/good", ("HF_HUB_OFFLINE is set", "unset it"), more={"HF_HUB_OFFLINE": "1"}
    ),
    "patience that is no number": Source(
        lambda _: "hf://dev/good", ("MSO_HUB_RETRY_SECONDS", "'soon'"), more={"MSO_HUB_RETRY_SECONDS": "soon"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SOURCES)
def test_a_source_that_cannot_be_read(lfs: World, good: str, bob: str, case: str) -> None:
    """The address, what is wrong with it and the way out; the target is not even created."""
    source = SOURCES[case]
    token = {"dev": lfs.hub.token(), "bob": bob}.get(source.who, source.who)
    where = ("--input_dir", source.make(lfs), "--output_dir", "hf://dev/never", "--progress", "none")
    check(lfs, "quantize", *where, expect=source.expect, HF_TOKEN=token, **source.more)
    assert lfs.state("dev/never") is None


def test_the_other_commands_say_the_same(lfs: World) -> None:
    """inspect, plan, verify, compare and card of a repo that is not there."""
    there = "hf://dev/nothing"
    for words in (("inspect", there), ("plan", there), ("verify", there), ("compare", there, there), ("card", there)):
        check(lfs, *words, expect=("hf://dev/nothing: ", *NO_REPO))


# --- targets ------------------------------------------------------------------------------------------


def test_a_read_only_token(lfs: World, good: str) -> None:
    """Refused before the repo is made and before a shard is read."""
    lfs.log()
    read = lfs.hub.token("read")
    refused(lfs, f"hf://{good}", "hf://dev/readonly", expect=("needs a token with write permission",), HF_TOKEN=read)
    assert moved(lfs.log(), "GET", good).keys() <= {f"model-0000{at}-of-00004.safetensors" for at in range(1, 5)}
    assert lfs.state("dev/readonly") is None


def test_no_token_for_writing(lfs: World, good: str) -> None:
    refused(lfs, f"hf://{good}", "hf://dev/anonymous", expect=("writing needs a login",), HF_TOKEN="")


def test_somebody_elses_repo_and_namespace(lfs: World, good: str, bob: str) -> None:
    """A branch of theirs, and a new repo under their name."""
    lfs.put({"README.md": b"# x"}, "bob/theirs", token=bob)
    for repo in ("bob/theirs", "bob/new"):
        refused(lfs, f"hf://{good}", f"hf://{repo}", expect=("this account may not do that", f"hf://{repo}"))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("hf://dev/good", "hf://dev/good"),
        ("hf://dev/good", "{hub}/dev/good/tree/main"),
        ("hf://dev/good@main", "hf://Dev/Good"),
        ("hf://dev/good@main", "hf://dev/good@main"),
    ],
)
def test_the_source_as_the_target(lfs: World, good: str, source: str, target: str) -> None:
    """However it is spelled; a finished model must not be overwritten by its own smaller copy."""
    before = lfs.state(good)
    where = ("--input_dir", source, "--output_dir", target.format(hub=lfs.hub.endpoint), "--progress", "none")
    check(lfs, "quantize", *where, expect=("input and output must be different repos or branches", "--branch"))
    assert lfs.state(good) == before


def test_a_branch_of_the_source_may_be_the_target(lfs: World, tmp_path: Path) -> None:
    """The way out that the message names; the default branch stays as it is."""
    files = llama(seed=3)
    repo = lfs.put(files)
    before = lfs.head(repo)
    lfs.convert(f"hf://{repo}", f"hf://{repo}", "--branch", "nvfp4")
    assert lfs.head(repo) == before
    assert lfs.output(repo, "nvfp4") == local_output(files, tmp_path)


def test_another_jobs_output(lfs: World, good: str) -> None:
    """Finished with other settings: refused, with both jobs and both ways out."""
    out = lfs.name()
    lfs.convert(f"hf://{good}", f"hf://{out}")
    expect = ("finished run with another source or other settings", "--fresh", "--branch")
    refused(lfs, f"hf://{good}", f"hf://{out}", "--all_linear", expect=expect)


@pytest.mark.parametrize("more", [(), ("--fresh",)])
def test_somebodys_files(lfs: World, good: str, more: tuple[str, ...]) -> None:
    """Whatever lies there is theirs, with --fresh too."""
    theirs = lfs.put({"model.safetensors": random_bytes(1000, 1), "thesis.tex": b"years of work"})
    expect = ("must be an empty repo or branch", "model.safetensors and 1 more", "not of this tool", "--create_pr")
    refused(lfs, f"hf://{good}", f"hf://{theirs}", *more, expect=expect)


@pytest.mark.parametrize(
    ("target", "more", "expect"),
    [
        ("hf://dev/t@v1", (), ("there is no such repo, so no v1 in it", "--branch")),
        ("hf://dev/good@v9", (), ("the repo has no branch v9", "--branch v9")),
        ("hf://dev/t/folder", (), ("must be a whole repo", "folder")),
        ("hf://datasets/dev/d", (), ("must be a model repo",)),
        ("hf://dev", (), ("must be hf://org/name",)),
        ("hf://dev/t", ("--create_pr",), ("a pull request needs a repo",)),
        ("hf://dev/good@x", ("--branch", "y"), ("names another branch than --branch y",)),
        ("hf://dev/good@x", ("--create_pr",), ("opens pull requests against main alone",)),
        ("hf://dev/t", ("--journal_branch", "main"), ("needs a branch of its own",)),
        ("out", ("--create_pr",), ("--create_pr: is for a repo on the Hub, out is a folder",)),
        ("out", ("--branch", "x"), ("--branch: is for a repo",)),
        ("out", ("--private",), ("--private: is for a repo",)),
        ("out", ("--journal_branch",), ("--journal_branch: is for a repo",)),
        ("out", ("--base_model", "a/b"), ("--base_model: is for a repo",)),
    ],
)
def test_targets_that_cannot_be(
    lfs: World, good: str, target: str, more: tuple[str, ...], expect: tuple[str, ...]
) -> None:
    """Contradictions and misspellings; nothing is created for them."""
    before = [lfs.state(repo) for repo in ("dev/good", "dev/t")]
    check(
        lfs, "quantize", "--input_dir", "hf://dev/good", "--output_dir", target, "--progress", "none", *more,
        expect=expect,
    )  # fmt: skip
    assert [lfs.state(repo) for repo in ("dev/good", "dev/t")] == before
    assert not (lfs.home("one") / "out").exists()


def test_a_folder_without_hf_is_pointed_to_the_hub(lfs: World) -> None:
    """The most common slip: org/name where hf://org/name was meant."""
    check(lfs, "inspect", "dev/good", expect=("found nothing there", "write hf://dev/good"))


# --- bytes and servers --------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1000, 200_000])
def test_a_shard_whose_bytes_are_not_those_that_were_hashed(lfs: World, at: int, tmp_path: Path) -> None:
    """One bit on its way, in a header's neighbourhood or in the middle: found before anything is published."""
    files = llama(seed=4 + at)
    source, out = lfs.put(files), lfs.name()
    name = "model-00003-of-00004.safetensors"
    ranged = at >= 1 << 16
    lfs.hub.fail(f"GET /files/.*{name}", origin="storage", corrupt=at - (1 << 16) * ranged, after=int(ranged))
    try:
        where = ("--input_dir", f"hf://{source}", "--output_dir", f"hf://{out}", "--progress", "none")
        check(lfs, "quantize", *where, expect=(name,))
    finally:
        lfs.hub.clear_faults()
    assert set(lfs.files(out) or {".gitattributes"}) == {".gitattributes"}
    lfs.convert(f"hf://{source}", f"hf://{out}")
    assert lfs.output(out) == local_output(files, tmp_path)


def test_a_tokenizer_whose_bytes_are_not_those_that_were_hashed(lfs: World) -> None:
    """Carried files are checked like shards."""
    source, out = lfs.put(llama(seed=6)), lfs.name()
    lfs.hub.fail("GET /files/.*tokenizer.model", origin="storage", corrupt=1000)
    try:
        where = ("--input_dir", f"hf://{source}", "--output_dir", f"hf://{out}", "--progress", "none")
        check(lfs, "quantize", *where, expect=("tokenizer.model", "SHA-256 must be"))
    finally:
        lfs.hub.clear_faults()
    assert set(lfs.files(out)) == {".gitattributes"}


def test_nan_in_the_last_shard(lfs: World) -> None:
    """What is found late is not published either, and the message is that of a folder."""
    files = llama(seed=7)
    name = "model-00003-of-00004.safetensors"
    size = struct.unpack("<Q", files[name][:8])[0]
    header = json.loads(files[name][8 : 8 + size])
    begin = 8 + size + header["model.layers.2.mlp.up_proj.weight"]["data_offsets"][0]
    broken = files[name][:begin] + b"\xc0\x7f" + files[name][begin + 2 :]
    source, out = lfs.put({**files, name: broken}), lfs.name()
    where = ("--input_dir", f"hf://{source}", "--output_dir", f"hf://{out}", "--progress", "none")
    check(lfs, "quantize", *where, expect=("model.layers.2.mlp.up_proj.weight", "must be finite", "`ignore`"))
    assert set(lfs.files(out)) == {".gitattributes"}


def test_no_server_at_all(lfs: World) -> None:
    """Nobody listens: bounded, exit code 3."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        there = f"http://127.0.0.1:{taken.getsockname()[1]}"
        check(
            lfs, "inspect", "hf://dev/good", expect=("no answer (ConnectError", "gave up after"), code=3, seconds=15,
            HF_ENDPOINT=there, MSO_HUB_RETRY_SECONDS="0",
        )  # fmt: skip


def test_a_server_that_accepts_and_says_nothing(lfs: World) -> None:
    """The connection stands, no byte comes: bounded, exit code 3."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        check(
            lfs, "inspect", "hf://dev/good", expect=("no answer (ReadTimeout", "gave up after"), code=3, seconds=15,
            HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}", MSO_HUB_RETRY_SECONDS="0",
        )  # fmt: skip


def test_a_server_that_is_no_hub(lfs: World, tmp_path: Path) -> None:
    """The storage origin in place of the Hub: it answers, but not as one."""
    with DevHub(tmp_path / "other") as other:
        check(lfs, "inspect", "hf://dev/good", expect=("hf://dev/good: ",), HF_ENDPOINT=other.storage)
