"""The sink that writes to a repo on the Hub: contract, what lies there already, runs that are killed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mso_hub.errors import HubError, RecipeError, ResumeError, SinkError, TransientError
from mso_hub.hub import Origin, parse_address, take_snapshot
from mso_hub.hub.devhub import DevHub
from mso_hub.sink import HubTarget, Sink, open_sink
from mso_hub.sink.hub import HubSink
from mso_hub.sink.journal import Entry, cache_folder
from tests.hub.outputs import JOB, MIB, OTHER_JOB, Place, finish, manifest, noise, serving, sizes, write
from tests.sink.contract import SinkContract

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def files_of(seed: str) -> dict[str, bytes]:
    """An output whose shards no storage has yet."""
    return {
        ONE: noise(3 * MIB, f"{seed}1"),
        TWO: noise(2 * MIB, f"{seed}2"),
        "config.json": b'{"a": 1}',
        "README.md": b"# x\n",
    }


FILES = files_of("")


@pytest.fixture(scope="module", params=["xet", "lfs"])
def hub(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevHub]:
    with serving(tmp_path_factory.mktemp("hub"), xet=request.param == "xet") as server:
        yield server


@pytest.fixture
def place(hub: DevHub, tmp_path: Path) -> Iterator[Place]:
    yield Place(hub, tmp_path)
    hub.clear_faults()


class TestHubSink(SinkContract):
    """Every run begins with a new client; the cache folder stays."""

    @pytest.fixture(autouse=True)
    def _place(self, place: Place) -> None:
        self.place = place

    def open(self) -> Sink:
        return self.place.sink()

    def visible(self) -> dict[str, bytes]:
        return self.place.visible()


def unfinished(place: Place, *names: str, **more: Any) -> None:
    """A run that stored some files and ended."""
    sink = place.sink(**more)
    sink.begin(JOB, sizes(FILES))
    write(sink, {name: FILES[name] for name in names})
    sink.wait()
    sink.close()


def write_half(sink: HubSink, name: str) -> None:
    """Half of a file, and then its end."""
    with sink.open(name, len(FILES[name])) as file:
        file.write(FILES[name][: len(FILES[name]) // 2])


def seen(place: Place, revision: str = "main") -> set[str]:
    """Names on a branch."""
    return set(place.visible(revision))


# --- a new output -------------------------------------------------------------------------------------


def test_everything_appears_in_one_commit(place: Place) -> None:
    sink = finish(place.sink(title="My title", description="Why."), FILES)
    assert {name: place.visible()[name] for name in FILES} == FILES
    head, first = place.api.list_repo_commits(place.repo)
    assert (head.title, head.message, first.title) == ("My title", "Why.", "initial commit")
    assert sink.commit_oid == head.commit_id
    assert sink.commit_url == f"{place.hub.endpoint}/{place.repo}/commit/{head.commit_id}"
    assert sink.where == f"{place.hub.endpoint}/{place.repo}"
    assert sink.address == f"hf://{place.repo}"
    assert sink.pull_request is None
    assert not list(place.cache.rglob("*.journal"))


@pytest.mark.parametrize(
    ("how", "address"),
    [
        ({"at": "main"}, ""),
        ({"branch": "nvfp4"}, "@nvfp4"),
        ({"branch": "w4/a16"}, "@w4%2Fa16"),
        ({"create_pr": True}, "@refs/pr/1"),
    ],
)
def test_the_address_is_what_one_types_to_read_it(place: Place, how: dict[str, Any], address: str) -> None:
    place.create()
    sink = finish(place.sink(**how), FILES)
    assert sink.address == f"hf://{place.repo}{address}"
    assert FILES.keys() < take_snapshot(place.client(), parse_address(sink.address)).files.keys()


def test_a_target_may_carry_a_description(place: Place) -> None:
    target = HubTarget(title="T", description="Because.")
    sink = open_sink(f"hf://{place.repo}", target=target, client=place.client())
    assert isinstance(sink, HubSink)
    finish(sink, FILES)
    [head, _] = place.api.list_repo_commits(place.repo)
    assert (head.title, head.message) == ("T", "Because.")


@pytest.mark.parametrize("private", [True, False])
def test_a_new_repo_is_as_private_as_asked(place: Place, *, private: bool) -> None:
    finish(place.sink(private=private), FILES)
    assert place.api.model_info(place.repo).private == private


def test_a_repo_of_an_organization(place: Place) -> None:
    token = place.hub.add_user("carol", orgs=["team"])
    finish(place.sink(repo=f"team/{place.repo[4:]}", token=token, private=True), FILES)
    assert place.visible(repo=f"team/{place.repo[4:]}") == {}


def test_a_missing_branch_is_made(place: Place) -> None:
    sink = finish(place.sink(branch="dev/x"), FILES)
    assert seen(place, "dev/x") == {*FILES, "mso_hub.json"}
    assert seen(place) == set()
    assert sink.where == f"{place.hub.endpoint}/{place.repo}/tree/dev/x"
    assert finish(place.sink(at="dev/x"), FILES).commit_oid == sink.commit_oid


def test_closing_files_travel_in_the_same_commit(place: Place) -> None:
    """The card is known only at the end."""
    files = {ONE: FILES[ONE]}
    sink = place.sink()
    sink.begin(JOB, sizes(files))
    write(sink, files)
    sink.wait()
    with pytest.raises(HubError, match="does not take its metadata"):
        sink.commit(manifest(sink), {"README.md": b"---\na: [\n---\n"})
    sink.commit(manifest(sink), {"README.md": b"---\nlicense: mit\n---\n"})
    assert seen(place) == {ONE, "README.md", "mso_hub.json"}
    assert len(place.api.list_repo_commits(place.repo)) == 2


def test_a_broken_card_is_found_when_it_is_stored(place: Place) -> None:
    sink = place.sink()
    sink.begin(JOB, {"README.md": 16})
    write(sink, {"README.md": b"---\na: [\n---\nxyz"})
    with pytest.raises(HubError, match="does not take its metadata"):
        sink.wait()
    sink.close()


def test_a_commit_needs_every_announced_file(place: Place) -> None:
    sink = place.sink()
    sink.begin(JOB, sizes(FILES))
    write(sink, {ONE: FILES[ONE]})
    with pytest.raises(SinkError, match=r"3 of 4 files were not written: README\.md"):
        sink.commit(b"{}")
    sink.close()
    assert seen(place) == set()


def test_nothing_works_before_begin(place: Place) -> None:
    sink = place.sink()
    with pytest.raises(SinkError, match="begin"), sink.open("x", 1):
        pass
    for call in (lambda: sink.note("x", 1.0), lambda: sink.commit(b"{}"), lambda: sink.notes):
        with pytest.raises(SinkError, match="begin"):
            call()
    assert not place.cache.exists()


def test_xet_can_be_switched_off(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_DISABLE_XET: the same output by LFS."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    files = files_of(place.repo)
    place.hub.log(clear=True)
    finish(place.sink(), files)
    assert place.sent() == len(files[ONE]) + len(files[TWO])
    assert {name: place.visible()[name] for name in files} == files


# --- what lies there already --------------------------------------------------------------------------


def test_a_repo_with_a_licence_and_a_card_counts_as_empty(place: Place) -> None:
    place.create()
    place.put("LICENSE", b"MIT")
    place.put("README.md", b"# soon\n")
    finish(place.sink(), FILES)
    assert place.visible()["LICENSE"] == b"MIT"
    assert place.visible()["README.md"] == FILES["README.md"]


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin", "notes.txt"])
def test_a_repo_with_other_files_is_refused(place: Place, name: str) -> None:
    place.create()
    place.put(name, b"theirs")
    for fresh in (False, True):
        with pytest.raises(SinkError, match=rf"found {name} that is not of this tool; choose another repo.*--branch"):
            place.sink(fresh=fresh).begin(JOB, sizes(FILES))
    assert place.visible() == {name: b"theirs"}


def test_a_branch_that_only_inherits_is_free(place: Place) -> None:
    """What the default branch holds too may be replaced on another branch, in a second try as well."""
    place.create()
    place.put("model.safetensors", b"theirs")
    place.put("tokenizer.json", b"{}")
    unfinished(place, ONE, branch="nvfp4")
    place.put("LICENSE", b"main moves on")
    finish(place.sink(branch="nvfp4"), FILES)
    assert seen(place, "nvfp4") == {*FILES, "mso_hub.json", "tokenizer.json"}
    assert seen(place) == {"model.safetensors", "tokenizer.json", "LICENSE"}


def test_a_branch_with_files_of_its_own_is_refused(place: Place) -> None:
    place.create()
    place.api.create_branch(place.repo, branch="dev")
    place.put("config.json", b"theirs", revision="dev")
    with pytest.raises(SinkError, match=r"found config\.json that is not of this tool"):
        place.sink(branch="dev").begin(JOB, sizes(FILES))


def test_a_finished_output_is_recognised_at_once(place: Place) -> None:
    first = finish(place.sink(), FILES)
    place.hub.log(clear=True)
    sink = place.sink()
    sink.begin(JOB, sizes(FILES))
    assert sink.entries == first.entries
    assert dict(sink.notes) == {}
    sink.commit(b"must not be written")
    sink.close()
    assert (sink.commit_oid, sink.commit_url) == (first.commit_oid, first.commit_url)
    assert not [r for r in place.hub.log() if r.method not in {"GET", "HEAD"}]


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "picture.png"])
def test_a_card_edited_on_the_website_leaves_the_output_finished(place: Place, name: str) -> None:
    finish(place.sink(), FILES)
    place.put(name, b"# edited\n")
    finish(place.sink(), FILES)
    assert place.visible()[name] == b"# edited\n"


@pytest.mark.parametrize(
    ("name", "data", "found"),
    [
        (ONE, noise(3 * MIB, "other"), "others"),
        (ONE, b"short", "5"),
        ("config.json", b'{"a": 2}', "others"),
        ("config.json", None, "none"),
    ],
)
def test_a_finished_output_that_changed_is_reported(place: Place, name: str, data: bytes | None, found: str) -> None:
    finish(place.sink(), FILES)
    if data is None:
        place.api.delete_file(name, place.repo)
    else:
        place.put(name, data)
    with pytest.raises(SinkError, match=rf"{name}: the finished output had .* bytes there, found {found};.*--fresh"):
        place.sink().begin(JOB, sizes(FILES))
    finish(place.sink(fresh=True), FILES)
    assert place.content(name) == FILES[name]


def test_a_manifest_that_does_not_list_the_files_is_reported(place: Place) -> None:
    place.create()
    place.put("mso_hub.json", json.dumps({"job": JOB, "files": {}}).encode())
    with pytest.raises(SinkError, match=r"mso_hub\.json: must list all 4 files.*--fresh"):
        place.sink().begin(JOB, sizes(FILES))


def test_fresh_replaces_another_jobs_output_in_the_commit(place: Place) -> None:
    """The old one stays until the new one is there; what only it had is deleted, what is not of it stays."""
    old = {"model.safetensors": noise(2 * MIB, "old"), "config.json": b"{}", "chat_template.jinja": b"x"}
    finish(place.sink(), old, OTHER_JOB)
    place.put("LICENSE", b"MIT")
    with pytest.raises(SinkError, match=f"{OTHER_JOB[:12]}.*{JOB[:12]}.*--fresh"):
        place.sink().begin(JOB, sizes(FILES))
    sink = place.sink(fresh=True)
    sink.begin(JOB, sizes(FILES))
    write(sink, FILES)
    sink.wait()
    assert seen(place) == {*old, "LICENSE", "mso_hub.json"}
    sink.commit(manifest(sink))
    assert seen(place) == {*FILES, "LICENSE", "mso_hub.json"}


def test_fresh_does_not_mix_with_weights_of_others(place: Place) -> None:
    finish(place.sink(), FILES, OTHER_JOB)
    place.put("theirs.gguf", b"x")
    with pytest.raises(SinkError, match=r"--fresh replaces what this tool wrote, and theirs\.gguf is not of it"):
        place.sink(fresh=True).begin(JOB, sizes(FILES))


def test_fresh_over_the_same_bytes_makes_no_empty_commit(place: Place) -> None:
    first = finish(place.sink(), FILES)
    again = finish(place.sink(fresh=True), FILES)
    assert again.commit_oid == first.commit_oid == place.head()


def test_a_killed_fresh_run_is_continued_by_the_same_command(place: Place) -> None:
    finish(place.sink(), {"model.safetensors": b"old"}, OTHER_JOB)
    unfinished(place, ONE, fresh=True)
    sink = place.sink(fresh=True)
    sink.begin(JOB, sizes(FILES))
    assert set(sink.entries) == {ONE}
    sink.close()
    place.put("LICENSE", b"the output to be replaced is another one now")
    sink = place.sink(fresh=True)
    sink.begin(JOB, sizes(FILES))
    assert dict(sink.entries) == {}
    sink.close()


# --- journal --------------------------------------------------------------------------------------------


def test_the_journal_says_what_is_stored_and_no_secret(place: Place) -> None:
    unfinished(place, *FILES)
    (journal,) = place.cache.rglob("*.journal")
    host = place.hub.endpoint.removeprefix("http://").replace(":", "%3A")
    assert journal.relative_to(place.cache) == Path("journals") / f"{host}--dev--{place.repo[4:]}--main.journal"
    head, *lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert head == {"job": JOB, "target": f"hf://{place.repo}", "endpoint": place.hub.endpoint}
    assert {line["file"]: line["sha256"] for line in lines} == {
        name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()
    }
    assert all(("xet_hash" in line) == (place.xet and line["file"] in {ONE, TWO}) for line in lines)
    assert place.hub.token() not in journal.read_text()


def test_each_branch_has_its_own_journal(place: Place) -> None:
    unfinished(place, ONE)
    unfinished(place, TWO, branch="dev")
    for how, found in (({}, ONE), ({"branch": "dev"}, TWO)):
        sink = place.sink(**how)
        sink.begin(JOB, sizes(FILES))
        assert set(sink.entries) == {found}
        sink.close()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MSO_HUB_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("MSO_HUB_CACHE")
    assert cache_folder() == tmp_path / "b" / "mso_hub"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "mso_hub"


def test_a_second_process_on_this_machine_is_refused(place: Place) -> None:
    sink = place.sink()
    sink.begin(JOB, sizes(FILES))
    with pytest.raises(ResumeError, match="another process is writing this output"):
        place.sink().begin(JOB, sizes(FILES))
    sink.close()
    unfinished(place, ONE)


def test_a_cache_that_cannot_be_written_is_named(place: Place, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SinkError, match=r"the journal cannot be written: .*MSO_HUB_CACHE"):
        place.sink(cache=tmp_path / "file").begin(JOB, sizes(FILES))


def test_a_run_that_stored_nothing_leaves_no_journal(place: Place) -> None:
    sink = place.sink(journal_branch="wip")
    sink.begin(JOB, sizes(FILES))
    with pytest.raises(SinkError, match="announced"):
        write_half(sink, ONE)
    sink.close()
    assert not list(place.cache.rglob("*.journal"))
    assert [branch.name for branch in place.api.list_repo_refs(place.repo).branches] == ["main"]


# --- journal branch ---------------------------------------------------------------------------------------


def branches(place: Place) -> set[str]:
    """Names of the repo's branches."""
    return {branch.name for branch in place.api.list_repo_refs(place.repo).branches}


def test_another_machine_continues_from_the_journal_branch(place: Place, tmp_path: Path) -> None:
    files = files_of(place.repo)
    sink = place.sink(journal_branch="wip")
    sink.begin(JOB, sizes(files))
    sink.note("layers.0", 0.5)
    write(sink, {ONE: files[ONE]})
    sink.wait()
    sink.close()
    assert seen(place) == set()
    assert seen(place, "wip") == {ONE, "mso_hub.journal"}
    assert place.hub.token() not in place.content("mso_hub.journal", "wip").decode()
    place.hub.log(clear=True)
    other = place.sink(journal_branch="wip", cache=tmp_path / "other machine")
    other.begin(JOB, sizes(files))
    assert set(other.entries) == {ONE}
    assert other.notes["layers.0"] == 0.5
    write(other, files)
    other.wait()
    assert seen(place, "wip") == {ONE, TWO, "mso_hub.journal"}
    titles = [commit.title for commit in place.api.list_repo_commits(place.repo, revision="wip")]
    assert titles == ["2 shards are stored", "1 shard is stored", "initial commit"]
    other.commit(manifest(other))
    other.close()
    if not place.xet:
        assert place.sent() == len(files[TWO])
    assert branches(place) == {"main"}
    assert {name: place.visible()[name] for name in files} == files


def test_the_journal_branch_of_another_job_is_refused(place: Place, tmp_path: Path) -> None:
    unfinished(place, ONE, journal_branch="wip")
    other = place.sink(journal_branch="wip", cache=tmp_path / "other")
    with pytest.raises(
        ResumeError, match=rf"@wip: an unfinished run .*{JOB[:12]}, this one is {OTHER_JOB[:12]}.*--fresh"
    ):
        other.begin(OTHER_JOB, sizes(FILES))
    finish(place.sink(journal_branch="wip", cache=tmp_path / "other", fresh=True), FILES, OTHER_JOB)
    assert branches(place) == {"main"}


def test_a_branch_that_is_no_journal_is_never_used(place: Place) -> None:
    place.create()
    place.api.create_branch(place.repo, branch="precious")
    for fresh in (False, True):
        with pytest.raises(ResumeError, match=r"@precious: .*has no mso_hub\.journal; choose another name"):
            place.sink(journal_branch="precious", fresh=fresh).begin(JOB, sizes(FILES))
    assert branches(place) == {"main", "precious"}


@pytest.mark.parametrize("hub", ["lfs"], indirect=True)  # hf_xet 1.7 keeps the store locked after such an error
def test_a_journal_branch_that_was_made_and_not_filled_is_gone_on_with(place: Place) -> None:
    """The Hub went away between the two: the same command must not call its own branch a stranger's."""
    sink = place.sink(journal_branch="wip")
    place.hub.fail("POST .*/commit/wip", status=503, times=-1)  # before anything is under way there
    sink.begin(JOB, sizes(FILES))
    with contextlib.closing(sink), pytest.raises(TransientError):
        write(sink, FILES)
    place.hub.clear_faults()
    assert branches(place) == {"main", "wip"}
    finish(place.sink(journal_branch="wip"), FILES)
    assert branches(place) == {"main"}


@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
def test_closing_ends_a_journal_commit_that_waits_for_another_try(place: Place) -> None:
    """It would land once the Hub is back, and whoever goes on with the output would find a stranger there."""
    before = set(threading.enumerate())
    sink = place.sink(journal_branch="wip")
    place.hub.fail("POST .*/commit/wip", status=503, times=-1)
    sink.begin(JOB, sizes(FILES))
    write(sink, {ONE: FILES[ONE]})
    while not any("/commit/wip" in request.path for request in place.hub.log()):
        time.sleep(0.01)
    sink.close()
    assert "mso-upload" not in {thread.name for thread in set(threading.enumerate()) - before}


def test_no_other_branch_is_deleted_when_the_output_is_finished(place: Place) -> None:
    """A wrong --journal_branch must cost nothing."""
    finish(place.sink(), FILES)
    place.api.create_branch(place.repo, branch="precious")
    finish(place.sink(journal_branch="precious"), FILES)
    unfinished(place, ONE, branch="dev", journal_branch="wip")
    finish(place.sink(journal_branch="wip", fresh=True), FILES)
    assert branches(place) == {"main", "precious", "dev"}


def test_two_machines_at_once_notice_each_other(place: Place, tmp_path: Path) -> None:
    """Whichever writes second stops; the first goes on."""
    first = place.sink(journal_branch="wip")
    second = place.sink(journal_branch="wip", cache=tmp_path / "other")
    first.begin(JOB, sizes(FILES))
    second.begin(JOB, sizes(FILES))
    write(first, {ONE: FILES[ONE]})
    first.wait()
    write(second, {TWO: FILES[TWO]})
    with pytest.raises(ResumeError, match=r"@wip: another process is writing the same output"):
        second.wait()
    second.close()
    write(first, FILES)
    first.wait()
    third = place.sink(journal_branch="wip", cache=tmp_path / "third")
    third.begin(JOB, sizes(FILES))
    assert set(third.entries) == {ONE, TWO}
    first.commit(manifest(first))
    first.close()
    third.close()


def test_a_journal_branch_needs_a_place_of_its_own(place: Place) -> None:
    with pytest.raises(RecipeError, match=r"--journal_branch main needs a branch of its own"):
        place.sink(journal_branch="main").begin(JOB, sizes(FILES))
    place.create()
    with pytest.raises(RecipeError, match=r"the output goes to a pull request"):
        place.sink(journal_branch="wip", create_pr=True).begin(JOB, sizes(FILES))


def test_a_lost_answer_does_not_stop_the_journal_branch(place: Place) -> None:
    place.hub.fail("POST .*/commit/wip", land=True, status=504)
    finish(place.sink(journal_branch="wip"), FILES)
    assert branches(place) == {"main"}


def test_a_run_that_ended_after_its_commit_is_cleared_up_by_the_next(place: Place, tmp_path: Path) -> None:
    """Killed between the commit and what follows it: the journal and its branch go with the next command."""
    sink = place.sink(journal_branch="wip")
    sink.begin(JOB, sizes(FILES))
    write(sink, FILES)
    sink.wait()
    kept = tmp_path / "kept"
    shutil.copy(sink.journal, kept)
    place.hub.fail("DELETE .*/branch/wip", status=403)
    with pytest.raises(HubError):
        sink.commit(manifest(sink))
    sink.close()
    assert "wip" in branches(place)
    finish(place.sink(journal_branch="wip"), FILES)
    assert branches(place) == {"main"}
    assert not sink.journal.exists()


# --- copies ---------------------------------------------------------------------------------------------


def test_a_file_of_another_repo_is_copied_on_the_server(place: Place) -> None:
    source = f"{place.repo}-source"
    finish(place.sink(repo=source), {ONE: FILES[ONE], "config.json": b"{}"})
    remote, small = place.remote(ONE, source), place.remote("config.json", source)
    head = str(place.api.model_info(source).sha)
    sink = place.sink()
    sink.begin(JOB, {ONE: 3 * MIB, "config.json": 2})
    origin = Origin(place.hub.endpoint, source, head)
    assert not sink.copy("config.json", origin, small)
    assert not sink.copy(ONE, Origin("https://huggingface.co", source, head), remote)
    assert sink.copy(ONE, origin, remote) == place.xet
    assert dict(sink.entries) == ({ONE: Entry(3 * MIB, str(remote.sha256))} if place.xet else {})
    write(sink, {ONE: FILES[ONE], "config.json": b"{}"})
    sink.wait()
    sink.commit(manifest(sink))
    assert place.content(ONE) == FILES[ONE]


# --- kill -9 ----------------------------------------------------------------------------------------------

PROGRAM = """
import sys, time
from pathlib import Path
from mso_hub.hub import Address, Client
from mso_hub.sink.hub import HubSink
from tests.hub.outputs import JOB, QUICK, manifest, sizes, write
from tests.sink.test_hub import ONE, TWO, files_of

endpoint, token, repo, cache, stop = sys.argv[1:]
FILES = files_of(repo)
sink = HubSink(Client(endpoint, token, patience=QUICK), Address(repo), cache=Path(cache))
sink.begin(JOB, sizes(FILES))
print(sorted(sink.entries), flush=True)

def halt(where):
    if where == stop:
        print("halt", flush=True)
        time.sleep(60)

if ONE not in sink.entries:
    write(sink, {ONE: FILES[ONE]})
    sink.wait()
halt("after a shard")
with sink.open(TWO, len(FILES[TWO])) as file:
    file.write(FILES[TWO][: 3 << 19])
    halt("in a shard")
    file.write(FILES[TWO][3 << 19 :])
write(sink, FILES)
sink.wait()
halt("before the commit")
sink.commit(manifest(sink))
halt("after the commit")
sink.close()
"""


def running(place: Place, stop: str) -> subprocess.Popen[str]:
    """A real process that writes the output and halts somewhere."""
    argv = [sys.executable, "-c", PROGRAM, place.hub.endpoint, place.hub.token(), place.repo, str(place.cache), stop]
    environment = {
        **os.environ,
        "HF_XET_CACHE": str(place.cache.parent / "xet"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("stop", "kept"),
    [
        ("after a shard", {ONE}),
        ("in a shard", {ONE}),
        ("before the commit", set(FILES)),
        ("after the commit", set(FILES)),
    ],
)
def test_a_killed_run_is_finished_by_the_same_command(place: Place, stop: str, kept: set[str]) -> None:
    """Nothing was to be seen of it, and at most the shard in hand is sent again."""
    files = files_of(place.repo)
    with running(place, stop) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["[]\n", "halt\n"]
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (seen(place) == set()) == (stop != "after the commit")
    place.hub.log(clear=True)
    sink = place.sink()
    sink.begin(JOB, sizes(files))
    assert set(sink.entries) == kept
    write(sink, files)
    sink.wait()
    sink.commit(manifest(sink))
    sink.close()
    if not place.xet:
        again = 0 if TWO in kept else len(files[TWO])
        assert place.sent() == again
    assert {name: place.visible()[name] for name in files} == files
    assert not list(place.cache.rglob("*.journal"))


def test_the_lock_dies_with_the_process(place: Place) -> None:
    with running(place, "after a shard") as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["[]\n", "halt\n"]
        with pytest.raises(ResumeError, match="another process is writing this output"):
            place.sink().begin(JOB, sizes(FILES))
        process.kill()
        process.wait()
    finish(place.sink(), files_of(place.repo))


@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
def test_an_answer_that_is_no_json_is_an_error_of_the_hub(place: Place) -> None:
    """A proxy's page with status 200 in place of the LFS batch: a message, no traceback."""
    sink = place.sink()
    sink.begin(JOB, sizes(FILES))
    place.hub.fail("POST .*/objects/batch", status=200, times=-1)
    with contextlib.closing(sink), pytest.raises(HubError, match=r"JSON"):
        write(sink, FILES)
    assert place.visible() == {}
