"""Proposals to repos of others, and who may write where: known before a byte is sent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from mso_hub.errors import HubError, MsoError, RecipeError, SinkError
from mso_hub.hub import Address, Client, Origin
from mso_hub.hub.devhub import DevHub
from mso_hub.hub.permission import require_branch_name
from mso_hub.hub.pull_request import find_own
from mso_hub.sink.hub import HubSink
from tests.hub.outputs import JOB, MIB, OTHER_JOB, Place, finish, manifest, noise, serving, sizes, write

NEW = "model-00001-of-00001.safetensors"
FILES = {NEW: noise(2 * MIB, "pr"), "config.json": b'{"quantized": true}'}
TITLE = "Add an NVFP4 checkpoint"


@pytest.fixture(scope="module", params=["xet", "lfs"])
def hub(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevHub]:
    with serving(tmp_path_factory.mktemp("pr"), xet=request.param == "xet") as server:
        yield server


@pytest.fixture
def place(hub: DevHub, tmp_path: Path) -> Iterator[Place]:
    yield Place(hub, tmp_path)
    hub.clear_faults()


@pytest.fixture
def bob(hub: DevHub) -> str:
    """Token of a user who owns nothing."""
    return hub.add_user("bob")


def theirs(place: Place) -> None:
    """A repo of the default user with a checkpoint, to which bob proposes something."""
    place.create()
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        place.put(name, noise(1000, name))
    for name in ("model.safetensors.index.json", "config.json", "tokenizer.json", "README.md"):
        place.put(name, b"{}")


def pulls(place: Place) -> list[tuple[int, str, str]]:
    """(number, title, author) of the open ones."""
    found = place.api.get_repo_discussions(place.repo, discussion_type="pull_request", discussion_status="open")
    return [(talk.num, talk.title, talk.author) for talk in found]


def proposed(place: Place, token: str, files: dict[str, bytes] = FILES, job: str = JOB, **more: Any) -> HubSink:
    """A whole run with --create_pr."""
    return finish(place.sink(token=token, create_pr=True, title=TITLE, **more), files, job)


# --- proposals ----------------------------------------------------------------------------------------


def test_a_proposal_needs_no_permission_and_leaves_the_branch_alone(place: Place, bob: str) -> None:
    theirs(place)
    before = place.head()
    sink = proposed(place, bob, description="Why.")
    assert pulls(place) == [(1, TITLE, "bob")]
    assert "Why." in str(place.api.get_discussion_details(place.repo, 1).events[0])
    assert sink.address == f"hf://{place.repo}@refs/pr/1"
    assert sink.pull_request == sink.where == f"{place.hub.endpoint}/{place.repo}/discussions/1"
    assert place.head() == before
    seen = place.visible("refs/pr/1")
    assert {name: seen[name] for name in FILES} == FILES
    # Old weights would be loaded together with the new ones; the rest of the repo stays.
    assert set(seen) == {*FILES, "mso_hub.json", "tokenizer.json", "README.md"}


def test_the_same_command_again_finds_its_proposal_finished(place: Place, bob: str) -> None:
    theirs(place)
    proposed(place, bob)
    place.hub.log(clear=True)
    again = proposed(place, bob)
    assert again.finished
    assert again.address == f"hf://{place.repo}@refs/pr/1"
    assert pulls(place) == [(1, TITLE, "bob")]
    assert place.sent() == 0
    assert again.pull_request == f"{place.hub.endpoint}/{place.repo}/discussions/1"


def test_an_earlier_proposal_of_another_job_is_continued_with_fresh(place: Place, bob: str) -> None:
    theirs(place)
    proposed(place, bob, {**FILES, "old.json": b"{}"}, OTHER_JOB)
    with pytest.raises(SinkError, match=f"hf://{place.repo}@refs/pr/1: .*{OTHER_JOB[:12]}.*{JOB[:12]}") as caught:
        proposed(place, bob)
    assert "--create_pr" not in str(caught.value)
    assert "close this pull request, and the same command opens a new one, or replace it" in str(caught.value)
    newer = {**FILES, NEW: noise(2 * MIB, "newer")}
    sink = proposed(place, bob, newer, fresh=True)
    assert pulls(place) == [(1, TITLE, "bob")]
    assert str(sink.pull_request).endswith("/discussions/1")
    seen = place.visible("refs/pr/1")
    assert seen[NEW] == newer[NEW]
    assert "old.json" not in seen
    assert len(place.api.list_repo_commits(place.repo, revision="refs/pr/1")) == 9


def test_a_closed_proposal_is_not_reopened(place: Place, bob: str) -> None:
    theirs(place)
    proposed(place, bob)
    place.api.change_discussion_status(place.repo, 1, "closed")
    proposed(place, bob)
    assert [number for number, _, _ in pulls(place)] == [2]


def test_proposals_of_others_and_with_other_titles_are_not_ours(place: Place, bob: str) -> None:
    theirs(place)
    place.api.create_pull_request(place.repo, TITLE)
    HfApi(place.hub.endpoint, bob).create_pull_request(place.repo, "Another title")
    assert find_own(place.client(bob), place.repo, "bob", TITLE) is None
    proposed(place, bob)
    assert (3, TITLE, "bob") in pulls(place)
    assert find_own(place.client(bob), place.repo, "bob", TITLE) == 3


@pytest.mark.parametrize("effect", [{"status": 504}, {"cut": 0}], ids=str)
def test_a_lost_answer_opens_no_second_proposal(place: Place, bob: str, effect: dict[str, int]) -> None:
    theirs(place)
    place.hub.fail("POST .*/commit/", land=True, **effect)
    sink = proposed(place, bob)
    assert pulls(place) == [(1, TITLE, "bob")]
    assert str(sink.pull_request).endswith("/discussions/1")
    assert sink.commit_oid == place.head("refs/pr/1")


def test_a_killed_proposal_goes_on_without_sending_again(place: Place, bob: str) -> None:
    theirs(place)
    sink = place.sink(token=bob, create_pr=True, title=TITLE)
    sink.begin(JOB, sizes(FILES))
    write(sink, FILES)
    sink.wait()
    sink.close()
    assert sink.journal.name.endswith("--pr.journal")
    place.hub.log(clear=True)
    proposed(place, bob)
    assert place.sent() == 0
    assert place.visible("refs/pr/1")[NEW] == FILES[NEW]


def test_an_explicit_pull_request_of_ours_is_a_target(place: Place, bob: str) -> None:
    theirs(place)
    HfApi(place.hub.endpoint, bob).create_pull_request(place.repo, "Mine")
    sink = finish(place.sink(token=bob, at="refs/pr/1"), FILES)
    assert place.visible("refs/pr/1")[NEW] == FILES[NEW]
    assert sink.pull_request == f"{place.hub.endpoint}/{place.repo}/discussions/1"


def test_a_pull_request_of_somebody_else_is_no_target(place: Place, bob: str) -> None:
    theirs(place)
    place.api.create_pull_request(place.repo, "Not bob's")
    with pytest.raises(HubError, match="may not do that"):
        finish(place.sink(token=bob, at="refs/pr/1"), FILES)


def test_a_discussion_or_a_closed_pull_request_is_no_target(place: Place) -> None:
    theirs(place)
    place.api.create_discussion(place.repo, "Just talk")
    with pytest.raises(HubError, match=r"must be an open pull request, found a discussion; .*--create_pr"):
        finish(place.sink(at="refs/pr/1"), FILES)
    place.api.create_pull_request(place.repo, "Closed")
    place.api.change_discussion_status(place.repo, 2, "closed")
    with pytest.raises(HubError, match="found a closed pull request"):
        finish(place.sink(at="refs/pr/2"), FILES)


# --- permission ---------------------------------------------------------------------------------------


def refused(place: Place, error: type[MsoError], match: str, **how: Any) -> None:
    """begin() fails, with nothing sent and nothing left behind."""
    place.hub.log(clear=True)
    sink = place.sink(**how)
    with pytest.raises(error, match=match):
        sink.begin(JOB, sizes(FILES))
    sink.close()
    assert not [r for r in place.hub.log() if r.method not in {"GET", "HEAD"}]
    assert not sink.journal.exists()


def test_a_read_token_is_refused_before_anything_is_sent(place: Place) -> None:
    refused(
        place, HubError, r"needs a token with write permission, found one that may only read \(account dev\)",
        token=place.hub.token("read"),
    )  # fmt: skip


def test_without_a_login_nothing_is_written(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Place, "client", lambda self, _: Client(self.hub.endpoint, token=False))
    refused(place, HubError, "writing needs a login, found none; run `hf auth login` or set HF_TOKEN")


def test_a_token_that_nobody_has(place: Place) -> None:
    refused(place, HubError, "does not know this token", token="hf_" + "x" * 30)


def test_a_repo_of_somebody_else_is_refused(place: Place, bob: str) -> None:
    place.create()
    refused(place, HubError, r"may not do that.*bob may write to: bob; .*--create_pr", token=bob)
    namespace = f"team{place.repo[8:]}"
    refused(
        place, HubError, rf"may not do that.*carla may write to: carla, {namespace}; .*--create_pr",
        token=place.hub.add_user("carla", orgs=[namespace]),
    )  # fmt: skip


def test_a_new_repo_in_a_namespace_of_somebody_else_is_refused(place: Place, bob: str) -> None:
    """It leads nowhere to propose something to a repo that is not there."""
    sink = place.sink(token=bob)
    with pytest.raises(HubError, match=r"may not do that: create it .*; bob may write to: bob; choose") as caught:
        sink.begin(JOB, sizes(FILES))
    assert "--create_pr" not in str(caught.value)
    assert not sink.journal.exists()
    refused(
        place, HubError, r"found none; .*leave --create_pr away .*\(bob may write to: bob\)", token=bob, create_pr=True
    )


def test_a_private_repo_of_somebody_else_does_not_exist(place: Place, bob: str) -> None:
    place.api.create_repo(place.repo, private=True)
    with pytest.raises(HubError, match=r"403|may not do that"):
        place.sink(token=bob).begin(JOB, sizes(FILES))
    refused(place, HubError, "a pull request needs a repo, found none", token=bob, create_pr=True)


def test_a_disabled_repo_is_refused(place: Place) -> None:
    place.create()
    place.hub.disable(place.repo)
    refused(place, HubError, "is disabled by the Hub")


def test_a_gated_repo_takes_no_proposal_from_who_may_not_read_it(place: Place, bob: str) -> None:
    theirs(place)
    place.api.update_repo_settings(place.repo, gated="auto")
    refused(place, HubError, "is gated and this account has no access", token=bob, create_pr=True)


def test_a_tag_or_a_commit_is_no_target(place: Place) -> None:
    place.create()
    place.api.create_tag(place.repo, tag="v1")
    refused(place, HubError, r"a commit needs a branch, v1 is a tag", at="v1")
    refused(place, HubError, r"a commit needs a branch, [0-9a-f]{40} is a commit", at=place.head())
    refused(place, HubError, r"the repo has no branch other; create it by --branch other", at="other")


def test_a_repo_that_does_not_exist_has_no_branches(place: Place) -> None:
    refused(place, HubError, "there is no such repo, so no refs/pr/1 in it", at="refs/pr/1")
    refused(place, HubError, "there is no such repo, so no dev in it", at="dev")
    refused(place, HubError, "a pull request needs a repo, found none", create_pr=True)


def test_settings_that_contradict_each_other(place: Place) -> None:
    refused(place, RecipeError, "names another branch than --branch a", at="b", branch="a")
    refused(place, RecipeError, "opens pull requests against main alone, found dev", at="dev", create_pr=True)
    refused(place, RecipeError, "opens pull requests against main alone, found dev", branch="dev", create_pr=True)


@pytest.mark.parametrize(
    ("revision", "how"),
    [(None, {}), ("main", {}), (None, {"at": "main"}), ("dev", {"branch": "dev"}), ("x", {"at": "x"})],
)
def test_the_source_is_never_the_target(place: Place, revision: str | None, how: dict[str, str]) -> None:
    source = Origin(place.hub.endpoint + "/", place.repo.upper(), "0" * 40, revision)
    place.hub.log(clear=True)
    with pytest.raises(RecipeError, match="input and output must be different repos or branches, the input is hf://"):
        place.sink(**how).guard(source)
    assert not place.hub.log()


def test_another_branch_of_the_source_another_hub_and_a_proposal_are_targets(place: Place, bob: str) -> None:
    theirs(place)
    source = Origin(place.hub.endpoint, place.repo, place.head())
    sink = place.sink(branch="nvfp4")
    sink.guard(source)
    finish(sink, FILES)
    assert set(place.visible("nvfp4")) == {*FILES, "mso_hub.json", "tokenizer.json", "README.md"}
    assert "mso_hub.json" not in place.visible()
    place.sink().guard(replace(source, endpoint="https://huggingface.co"))
    place.sink().guard(None)
    place.sink(token=bob, create_pr=True).guard(source)


@pytest.mark.parametrize(
    "name",
    ["a..b", "a b", "-a", "/a", "a/", "a//b", ".a", "a/.b", "a.", "a.lock", "a.lock/b", "a@{b", "@", "HEAD", "a~1",
     "a^", "a:b", "a?", "a*", "a[b", "a\\b", "a\x7f", "a\tb", "", "main/a"],
)  # fmt: skip
def test_names_that_git_refuses_leave_nothing_behind(place: Place, name: str) -> None:
    refused(place, RecipeError, r"--branch must be the name of a git branch, found .*letters", branch=name)
    refused(place, RecipeError, r"--journal_branch must be the name of a git branch, found", journal_branch=name)
    assert not place.api.repo_exists(place.repo)


@pytest.mark.parametrize("name", ["a", "w4/a16", "v1.0", "a-b_c", "a@b", "lock", "HEADS", "x/main", "maine"])
def test_names_that_git_takes(name: str) -> None:
    require_branch_name(name, "--branch", "hf://a/b")


@pytest.mark.parametrize(
    ("how", "name", "reason"),
    [
        ({"branch": "x"}, "x", "the output goes to the same branch"),
        ({}, "main", "the output goes to the same branch"),
        ({"branch": "x"}, "x/journal", "git takes no such name beside x"),
        ({"branch": "x/y"}, "x", "git takes no such name beside x/y"),
        ({}, "refs/pr/1", "git takes no such name"),
        ({"branch": "x"}, "main", "this is the default branch"),
        ({"create_pr": True}, "wip", "the output goes to a pull request"),
        ({"at": "refs/pr/3"}, "wip", "the output goes to a pull request"),
    ],
)
def test_a_journal_branch_is_a_branch_of_its_own(place: Place, how: dict[str, Any], name: str, reason: str) -> None:
    refused(
        place, RecipeError, rf"--journal_branch {name} needs a branch of its own.*{reason}", journal_branch=name, **how
    )
    assert not place.api.repo_exists(place.repo)


# --- who may see it -----------------------------------------------------------------------------------


def secret(place: Place) -> Origin:
    """A private source."""
    return Origin(place.hub.endpoint, "dev/secret", "0" * 40, private=True)


def test_a_public_repo_is_not_taken_for_a_private_one(place: Place, bob: str) -> None:
    place.create()
    refused(
        place, SinkError, f"^hf://{place.repo}: is public, and --private only makes a new repo private; make it",
        private=True,
    )  # fmt: skip
    refused(place, RecipeError, "is public and so are pull requests to it", private=True, create_pr=True, token=bob)
    place.api.update_repo_settings(place.repo, private=True)
    finish(place.sink(private=True), FILES)
    assert place.api.model_info(place.repo).private


def test_a_finished_public_output_is_not_accepted_as_private(place: Place) -> None:
    finish(place.sink(), FILES)
    refused(place, SinkError, "is public, and --private only", private=True)


def test_a_private_source_gets_no_public_output(place: Place, bob: str) -> None:
    new = place.sink()
    new.guard(secret(place))
    with pytest.raises(
        RecipeError, match=f"^hf://dev/secret is private, hf://{place.repo} would be public; give --pri"
    ):
        new.begin(JOB, sizes(FILES))
    assert not place.api.repo_exists(place.repo)
    assert not new.journal.exists()
    theirs(place)
    for how in ({"branch": "x"}, {"create_pr": True, "token": bob}):
        old = place.sink(**how)
        old.guard(secret(place))
        with pytest.raises(RecipeError, match=r"would be public; choose a private repo"):
            old.begin(JOB, sizes(FILES))
    assert {branch.name for branch in place.api.list_repo_refs(place.repo).branches} == {"main"}


@pytest.mark.parametrize("existing", [True, False])
def test_a_private_source_gets_a_private_output(place: Place, *, existing: bool) -> None:
    if existing:
        place.api.create_repo(place.repo, private=True)
    sink = place.sink(private=not existing)
    sink.guard(secret(place))
    finish(sink, FILES)
    assert place.api.model_info(place.repo).private


def test_a_gated_source_may_have_a_public_output(place: Place) -> None:
    sink = place.sink()
    sink.guard(replace(secret(place), private=False, gated=True))
    finish(sink, FILES)
    assert not place.api.model_info(place.repo).private


def test_a_part_of_a_repo_is_no_target(place: Place) -> None:
    sink = place.sink()
    sink._wish = type(sink._wish)(Address(place.repo, None, "folder"), TITLE)
    with pytest.raises(RecipeError, match="must be a whole repo, found the folder folder"):
        sink.begin(JOB, sizes(FILES))


def test_a_manifest_is_what_later_runs_read(place: Place) -> None:
    """Helpers of these tests write what the pipeline writes."""
    sink = finish(place.sink(), FILES)
    assert place.visible()["mso_hub.json"] == manifest(sink)
