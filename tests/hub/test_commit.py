"""One commit: what goes over the wire, heads that move, answers that get lost, objects that vanish."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mso_hub.errors import HubError, TransientError
from mso_hub.hub.commit import (
    Change,
    MovedError,
    Put,
    VanishedError,
    git_oid,
    require_valid_card,
    send_commit,
    verify_commit,
)
from mso_hub.hub.devhub import DevHub
from mso_hub.hub.target import Target
from mso_hub.sink.hub import HubSink
from tests.hub.outputs import MIB, Place, finish, manifest, noise, serving, sizes, write

BIG = "model-00001-of-00002.safetensors"
FILES = {BIG: noise(3 * MIB, 1), "config.json": b'{"model_type": "tiny"}'}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevHub]:
    with serving(tmp_path_factory.mktemp("commit"), xet=False) as server:
        yield server


@pytest.fixture
def place(hub: DevHub, tmp_path: Path) -> Iterator[Place]:
    yield Place(hub, tmp_path)
    hub.clear_faults()


def change(place: Place, **more: Any) -> Change:
    """Two small files on the head."""
    puts = {"a.txt": Put.of(b"one"), "b/c.txt": Put.of(b"")}
    return Change(place.head(), "title", place.hub.user, **{"puts": puts, **more})


def commits(place: Place, revision: str = "main") -> list[str]:
    """Titles, the newest first."""
    return [commit.title for commit in place.api.list_repo_commits(place.repo, revision=revision)]


def posts(hub: DevHub) -> int:
    """Commit requests that the server saw."""
    return sum(r.method == "POST" and "/commit/" in r.path for r in hub.log())


def begun(place: Place, **more: Any) -> HubSink:
    """A run before its commit."""
    sink = place.sink(**more)
    sink.begin("a" * 64, sizes(FILES))
    write(sink, FILES)
    sink.wait()
    return sink


# --- the wire ---------------------------------------------------------------------------------------


def test_a_commit_adds_and_deletes(place: Place) -> None:
    place.create()
    place.put("old.txt", b"old")
    done = send_commit(place.client(), Target(place.repo), change(place, deletes=["old.txt"]))
    assert place.visible() == {"a.txt": b"one", "b/c.txt": b""}
    assert done.oid == place.head()
    assert done.url == f"{place.hub.endpoint}/{place.repo}/commit/{done.oid}"
    assert done.pull_request is None
    assert commits(place)[0] == "title"


def test_git_ids_are_those_of_git() -> None:
    assert git_oid(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert git_oid(b"what is up, doc?") == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"


def test_a_stale_parent_is_refused(place: Place) -> None:
    place.create()
    stale = change(place)
    place.put("theirs.txt", b"x")
    with pytest.raises(MovedError, match=f"hf://{place.repo}: somebody committed there since {stale.parent[:12]}"):
        send_commit(place.client(), Target(place.repo), stale)
    assert set(place.visible()) == {"theirs.txt"}


def test_an_object_that_the_hub_does_not_have_is_named(place: Place) -> None:
    place.create()
    lost = Put(5, "ab" * 32)
    with pytest.raises(VanishedError, match="ab" * 32):
        send_commit(place.client(), Target(place.repo), change(place, puts={"x.safetensors": lost}))
    assert place.visible() == {}


@pytest.mark.parametrize("status", [429, 500, 503, 504])
def test_a_busy_hub_is_asked_again(place: Place, status: int) -> None:
    place.create()
    place.hub.fail("POST .*/commit/", status=status, times=2)
    send_commit(place.client(), Target(place.repo), change(place))
    assert commits(place) == ["title", "initial commit"]


@pytest.mark.parametrize("effect", [{"status": 504}, {"status": 500}, {"cut": 0}], ids=str)
def test_a_lost_answer_makes_no_second_commit(place: Place, effect: dict[str, int]) -> None:
    """The Hub made the commit, and we did not hear of it."""
    place.create()
    place.hub.fail("POST .*/commit/", land=True, **effect)
    place.hub.log(clear=True)
    done = send_commit(place.client(), Target(place.repo), change(place))
    assert done.oid == place.head()
    assert commits(place) == ["title", "initial commit"]
    assert posts(place.hub) == 1


def test_somebody_elses_commit_is_not_taken_for_ours(place: Place) -> None:
    """The try was lost, and meanwhile the head moved: it must not be believed that this was us."""
    place.create()
    ours = change(place)
    place.put("theirs.txt", b"x")
    place.hub.fail("POST .*/commit/", status=503)
    with pytest.raises(MovedError):
        send_commit(place.client(), Target(place.repo), ours)


def test_a_hub_that_stays_down_ends_in_a_transient_error(place: Place) -> None:
    place.create()
    place.hub.fail("POST .*/commit/", status=503, times=-1, headers={"Retry-After": "100"})
    with pytest.raises(TransientError, match=r"the server answered 503.*run the same command later"):
        send_commit(place.client(), Target(place.repo), change(place))


def test_a_read_token_is_refused_in_words(place: Place) -> None:
    place.create()
    with pytest.raises(HubError, match="may not do that"):
        send_commit(place.client(place.hub.token("read")), Target(place.repo), change(place))


def test_what_the_hub_shows_is_compared_with_what_was_sent(place: Place) -> None:
    place.create()
    ours = change(place)
    done = send_commit(place.client(), Target(place.repo), ours)
    verify_commit(place.client(), Target(place.repo), ours, done)
    other = change(place, puts={"a.txt": Put.of(b"two"), "none": Put.of(b"x")})
    with pytest.raises(HubError, match=r"a\.txt: commit .* must hold 3 bytes with SHA-256 .*, the Hub shows 3 bytes"):
        verify_commit(place.client(), Target(place.repo), other, done)
    gone = change(place, puts={"none": Put.of(b"x")})
    with pytest.raises(HubError, match="the Hub shows nothing"):
        verify_commit(place.client(), Target(place.repo), gone, done)


@pytest.mark.parametrize("text", [b"---\nlicense: mit\n---\n# x\n", b"no metadata", b""])
def test_a_good_card_passes(place: Place, text: bytes) -> None:
    require_valid_card(place.client(), Target(place.repo), text)


def test_a_card_with_broken_metadata_is_refused(place: Place) -> None:
    with pytest.raises(HubError, match=r"README\.md: the Hub does not take its metadata.*correct it"):
        require_valid_card(place.client(), Target(place.repo), b"---\na: [1\n---\n")


# --- a run whose target moves -----------------------------------------------------------------------


@pytest.mark.parametrize("path", ["LICENSE", "images/logo.png", "README.md"])
def test_a_harmless_change_is_built_upon(place: Place, path: str) -> None:
    sink = begun(place)
    place.put(path, b"theirs")
    sink.commit(manifest(sink))
    assert place.visible() == {**FILES, path: b"theirs", "mso_hub.json": place.visible()["mso_hub.json"]}
    assert len(commits(place)) == 3


@pytest.mark.parametrize(
    "path", ["config.json", "model.safetensors", "mso_hub.json", "generation_config.json", "x.gguf"]
)
def test_a_harmful_change_is_never_overwritten(place: Place, path: str) -> None:
    sink = begun(place)
    place.put(path, b"theirs")
    with pytest.raises(HubError, match=rf"{path} there while this run went on \(commit .*nothing was overwritten"):
        sink.commit(manifest(sink))
    sink.close()
    assert place.visible() == {path: b"theirs"}


def test_after_a_harmful_change_is_removed_the_same_command_goes_on(place: Place) -> None:
    sink = begun(place)
    place.put("config.json", b"theirs")
    with pytest.raises(HubError):
        sink.commit(manifest(sink))
    sink.close()
    place.api.delete_file("config.json", place.repo)
    place.hub.log(clear=True)
    finish(place.sink(), FILES)
    assert place.sent() == 0
    assert place.content(BIG) == FILES[BIG]


def test_a_head_that_moves_again_and_again_is_followed(place: Place) -> None:
    sink = begun(place)
    place.put("LICENSE", b"1")
    place.hub.fail("POST .*/commit/", status=412, times=2)
    sink.commit(manifest(sink))
    assert place.content(BIG) == FILES[BIG]


def test_another_run_of_the_same_job_may_be_faster(place: Place) -> None:
    """Two machines do the same work: the second finds everything there and is content."""
    slow = begun(place, cache=place.cache / "other")
    done = finish(place.sink(), FILES)
    slow.commit(manifest(slow))
    slow.close()
    assert slow.commit_oid == done.commit_oid == place.head()


# --- objects that vanish ----------------------------------------------------------------------------


def remove_object(place: Place, data: bytes) -> None:
    """What a Hub does with objects that nobody committed for long."""
    sha256 = hashlib.sha256(data).hexdigest()
    (found,) = [path for path in place.hub.folder.rglob(f"*{sha256[4:]}*") if path.is_file()]
    found.unlink()


def test_an_object_that_vanished_before_the_commit_is_sent_again_by_the_same_command(place: Place) -> None:
    sink = begun(place)
    remove_object(place, FILES[BIG])
    with pytest.raises(TransientError, match=rf"no longer has 1 of 1 stored files, {BIG} first; run the same command"):
        sink.commit(manifest(sink))
    assert BIG not in sink.entries
    sink.close()
    lines = [json.loads(line) for line in sink.journal.read_text().splitlines()]
    assert lines[-1] == {"gone": BIG}
    finish(place.sink(), FILES)
    assert place.content(BIG) == FILES[BIG]


def test_an_object_that_vanished_between_two_runs_is_sent_again_at_once(place: Place) -> None:
    begun(place).close()
    remove_object(place, FILES[BIG])
    sink = place.sink()
    sink.begin("a" * 64, sizes(FILES))
    assert set(sink.entries) == {"config.json"}
    sink.close()
    finish(place.sink(), FILES)
    assert place.content(BIG) == FILES[BIG]
