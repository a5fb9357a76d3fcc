"""Commits, branches, tags, discussions and pull requests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, RevisionNotFoundError

from tests.hub.devhub.helpers import CLIENT_WARNS, Site, small

pytestmark = CLIENT_WARNS


def status(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


def heads(site: Site) -> dict[str, str]:
    refs = site.api.list_repo_refs(site.repo, include_pull_requests=True)
    return {ref.ref: ref.target_commit for ref in (*refs.branches, *refs.tags, *(refs.pull_requests or ()))}


def test_a_stale_parent_is_a_412(lfs_site: Site) -> None:
    first = lfs_site.put("a.txt", b"1")
    second = lfs_site.put("a.txt", b"2", parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        lfs_site.put("a.txt", b"3", parent_commit=first)
    assert status(error) == 412
    assert heads(lfs_site)["refs/heads/main"] == second


def test_of_many_commits_on_one_parent_exactly_one_wins(lfs_site: Site) -> None:
    parent = lfs_site.put("a.txt", b"0")
    head = {"key": "header", "value": {"summary": "race", "parentCommit": parent}}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: lfs_site.commit(head, small("a.txt", b"%d" % n)), range(1, 17)))
    assert sorted(answer.status for answer in answers) == [200] + [412] * 15


def test_a_commit_that_changes_nothing_is_the_head(lfs_site: Site) -> None:
    head = lfs_site.put("a.txt", b"1")
    assert lfs_site.put("a.txt", b"1") == head
    assert lfs_site.commit(small("a.txt", b"1")).json()["commitOid"] == head
    assert len(lfs_site.api.list_repo_commits(lfs_site.repo)) == 2


def test_commits_are_listed_newest_first_over_pages(lfs_site: Site) -> None:
    ids = [lfs_site.put("a.txt", b"%d" % n) for n in range(5)]
    lfs_site.hub.set(page_size=2)
    found = lfs_site.api.list_repo_commits(lfs_site.repo, formatted=True)
    assert [commit.commit_id for commit in found[:-1]] == ids[::-1]
    assert (found[0].title, found[0].authors, found[-1].title) == ("add a.txt", ["dev"], "initial commit")
    assert all(len(commit.commit_id) == 40 for commit in found)


def test_old_commits_keep_what_they_held(lfs_site: Site) -> None:
    first = lfs_site.put("a.txt", b"1")
    lfs_site.put("a.txt", b"2")
    assert lfs_site.get("a.txt", revision=first) == b"1"


def test_branches_and_tags(lfs_site: Site) -> None:
    first = lfs_site.put("a.txt", b"1")
    second = lfs_site.put("a.txt", b"2")
    lfs_site.api.create_branch(lfs_site.repo, branch="feature/x", revision=first)
    lfs_site.api.create_tag(lfs_site.repo, tag="v1.0", tag_message="one", revision=first)
    lfs_site.api.create_tag(lfs_site.repo, tag="v2.0")
    assert heads(lfs_site) == {
        "refs/heads/main": second, "refs/heads/feature/x": first, "refs/tags/v1.0": first, "refs/tags/v2.0": second,
    }  # fmt: skip
    with pytest.raises(HfHubHTTPError) as error:
        lfs_site.api.create_branch(lfs_site.repo, branch="feature/x")
    assert status(error) == 409
    with pytest.raises(HfHubHTTPError) as error:
        lfs_site.api.create_tag(lfs_site.repo, tag="v1.0")
    assert status(error) == 409
    lfs_site.api.create_branch(lfs_site.repo, branch="feature/x", exist_ok=True)
    third = lfs_site.put("a.txt", b"3", revision="feature/x")
    assert lfs_site.get("a.txt", revision="feature/x") == b"3"
    assert lfs_site.get("a.txt", revision="v1.0") == b"1"
    assert heads(lfs_site)["refs/heads/feature/x"] == third
    lfs_site.api.delete_branch(lfs_site.repo, branch="feature/x")
    lfs_site.api.delete_tag(lfs_site.repo, tag="v2.0")
    assert set(heads(lfs_site)) == {"refs/heads/main", "refs/tags/v1.0"}
    with pytest.raises(HfHubHTTPError):
        lfs_site.api.delete_branch(lfs_site.repo, branch="main")
    with pytest.raises(BadRequestError):
        lfs_site.put("a.txt", b"4", revision="v1.0")  # a tag does not move
    with pytest.raises(RevisionNotFoundError):
        lfs_site.put("a.txt", b"4", revision="feature/x")


def test_squashing_keeps_the_files_and_drops_the_history(lfs_site: Site) -> None:
    lfs_site.put("a.txt", b"1")
    lfs_site.put("b.txt", b"2")
    lfs_site.api.super_squash_history(lfs_site.repo, commit_message="one")
    assert [commit.title for commit in lfs_site.api.list_repo_commits(lfs_site.repo)] == ["one"]
    assert lfs_site.get("a.txt") == b"1"


def test_a_pull_request_from_its_opening_to_its_merge(lfs_site: Site) -> None:
    base = lfs_site.put("a.txt", b"1")
    bob = lfs_site.as_user(lfs_site.hub.add_user("bob"))
    operation = CommitOperationAdd("b.txt", b"2")
    info = bob.create_commit(
        lfs_site.repo, [operation], commit_message="Add b", commit_description="why", create_pr=True, parent_commit=base
    )
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    assert info.pr_url == f"{lfs_site.hub.endpoint}/{lfs_site.repo}/discussions/1"
    assert heads(lfs_site) == {"refs/heads/main": base, "refs/pr/1": info.oid}
    details = lfs_site.api.get_discussion_details(lfs_site.repo, 1)
    assert (details.title, details.status, details.author, details.is_pull_request) == ("Add b", "open", "bob", True)
    assert (details.target_branch, details.conflicting_files) == ("refs/heads/main", [])
    assert "b.txt" in (details.diff or "")
    lfs_site.put("c.txt", b"3")  # the target moves on
    with pytest.raises(HfHubHTTPError) as error:
        bob.merge_pull_request(lfs_site.repo, 1)
    assert status(error) == 403
    lfs_site.api.merge_pull_request(lfs_site.repo, 1, comment="thanks")
    merged = lfs_site.api.get_discussion_details(lfs_site.repo, 1)
    assert merged.status == "merged"
    assert merged.merge_commit_oid == heads(lfs_site)["refs/heads/main"]
    assert [lfs_site.get(name) for name in ("a.txt", "b.txt", "c.txt")] == [b"1", b"2", b"3"]
    assert [event.type for event in merged.events] == ["comment", "comment", "status-change"]


def test_conflicts_stop_a_merge(lfs_site: Site) -> None:
    lfs_site.put("a.txt", b"1")
    lfs_site.put("a.txt", b"theirs", create_pr=True)
    lfs_site.put("a.txt", b"ours")
    assert lfs_site.api.get_discussion_details(lfs_site.repo, 1).conflicting_files == ["a.txt"]
    with pytest.raises(HfHubHTTPError) as error:
        lfs_site.api.merge_pull_request(lfs_site.repo, 1)
    assert status(error) == 409
    assert lfs_site.get("a.txt") == b"ours"


def test_a_draft_is_filled_then_opened_then_closed(lfs_site: Site) -> None:
    draft = lfs_site.api.create_pull_request(lfs_site.repo, "Draft")
    assert draft.status == "draft"
    lfs_site.put("a.txt", b"1", revision="refs/pr/1")
    with pytest.raises(HfHubHTTPError):
        lfs_site.api.merge_pull_request(lfs_site.repo, 1)
    assert lfs_site.api.change_discussion_status(lfs_site.repo, 1, "open").new_status == "open"
    lfs_site.api.change_discussion_status(lfs_site.repo, 1, "closed", comment="no")
    assert lfs_site.api.get_discussion_details(lfs_site.repo, 1).status == "closed"


def test_discussions_are_found_by_kind_status_and_author_over_pages(lfs_site: Site) -> None:
    bob = lfs_site.as_user(lfs_site.hub.add_user("bob"))
    for n in range(3):
        lfs_site.api.create_discussion(lfs_site.repo, f"Talk {n}")
    for n in range(3):
        bob.create_commit(
            lfs_site.repo, [CommitOperationAdd(f"{n}.txt", b"x")], commit_message=f"PR {n}", create_pr=True
        )
    lfs_site.api.change_discussion_status(lfs_site.repo, 1, "closed")
    lfs_site.api.merge_pull_request(lfs_site.repo, 4)

    def found(**more: str) -> list[int]:
        return [d.num for d in lfs_site.api.get_repo_discussions(lfs_site.repo, **more)]  # type: ignore[arg-type]

    lfs_site.hub.set(page_size=2)
    assert found() == [6, 5, 4, 3, 2, 1]
    assert found(discussion_type="pull_request") == [6, 5, 4]
    assert found(discussion_type="discussion", discussion_status="open") == [3, 2]
    assert found(discussion_status="closed") == [4, 1]
    assert found(author="bob", discussion_type="pull_request", discussion_status="open") == [6, 5]
    assert found(author="nobody") == []


def test_comments_and_titles(lfs_site: Site) -> None:
    lfs_site.api.create_discussion(lfs_site.repo, "Title", description="text")
    assert lfs_site.api.comment_discussion(lfs_site.repo, 1, "more").content == "more"
    assert lfs_site.api.rename_discussion(lfs_site.repo, 1, "Other").new_title == "Other"
    details = lfs_site.api.get_discussion_details(lfs_site.repo, 1)
    assert details.title == "Other"
    assert [event.type for event in details.events] == ["comment", "comment", "title-change"]
    with pytest.raises(HfHubHTTPError) as error:
        lfs_site.api.get_discussion_details(lfs_site.repo, 2)
    assert status(error) == 404
