"""Users, tokens, repos: who may see and do what, and how the client hears a no."""

from __future__ import annotations

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    BadRequestError,
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub.devhub.helpers import CLIENT_WARNS, Site, raw

pytestmark = CLIENT_WARNS


def status(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


def test_whoami_names_the_user_the_role_and_the_organizations(lfs_site: Site) -> None:
    token = lfs_site.hub.add_user("carol", ["team-c"])
    facts = lfs_site.as_user(token).whoami()
    assert facts["name"] == "carol"
    assert [org["name"] for org in facts["orgs"]] == ["team-c"]
    assert facts["auth"]["accessToken"]["role"] == "write"
    assert lfs_site.as_user(lfs_site.hub.token("read")).whoami()["auth"]["accessToken"]["role"] == "read"


def test_a_token_that_nobody_has_is_refused_everywhere(lfs_site: Site) -> None:
    with pytest.raises(HfHubHTTPError, match="Invalid"):
        lfs_site.as_user("hf_wrong").whoami()
    with pytest.raises(HfHubHTTPError) as error:
        lfs_site.as_user("hf_wrong").model_info(lfs_site.repo)
    assert status(error) == 401


def test_creating_a_repo_twice_is_a_409_or_fine(lfs_site: Site) -> None:
    with pytest.raises(HfHubHTTPError) as error:
        lfs_site.api.create_repo(lfs_site.repo)
    assert status(error) == 409
    url = lfs_site.api.create_repo(lfs_site.repo, exist_ok=True)
    assert url.repo_id == lfs_site.repo
    assert url == f"{lfs_site.hub.endpoint}/{lfs_site.repo}"


def test_a_repo_without_namespace_belongs_to_the_user_and_can_be_deleted(lfs_site: Site) -> None:
    assert lfs_site.api.create_repo("mine").repo_id == "dev/mine"
    lfs_site.api.delete_repo("dev/mine")
    with pytest.raises(RepositoryNotFoundError):
        lfs_site.api.model_info("dev/mine")
    with pytest.raises(RepositoryNotFoundError):
        lfs_site.api.delete_repo("dev/mine")
    lfs_site.api.delete_repo("dev/mine", missing_ok=True)


def test_members_write_to_their_organization_and_others_do_not(lfs_site: Site) -> None:
    member = lfs_site.as_user(lfs_site.hub.add_user("oscar", ["team-o"]))
    member.create_repo("team-o/model")
    member.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="team-o/model")
    for namespace in ("team-o", "oscar"):
        with pytest.raises(HfHubHTTPError) as error:
            lfs_site.api.create_repo(f"{namespace}/other")
        assert status(error) == 403


@pytest.mark.parametrize("name", ["../etc", "a..b", "a/b/c", ".hidden", "x.git", "", "a b", "a" * 97])
def test_names_that_could_leave_the_folder_are_refused(lfs_site: Site, name: str) -> None:
    body = b'{"name": "%s", "organization": "dev"}' % name.encode()
    answer = raw("POST", f"{lfs_site.hub.endpoint}/api/repos/create", body, Authorization=lfs_site.bearer)
    assert answer.status == 400


@pytest.mark.parametrize("repo_type", ["dataset", "space"])
def test_datasets_and_spaces_have_names_of_their_own(lfs_site: Site, repo_type: str) -> None:
    lfs_site.api.create_repo(lfs_site.repo, repo_type=repo_type, space_sdk="static" if repo_type == "space" else None)
    info = lfs_site.api.upload_file(
        path_or_fileobj=b"data", path_in_repo="a/b.txt", repo_id=lfs_site.repo, repo_type=repo_type
    )
    assert info.repo_url.repo_type == repo_type
    assert "a/b.txt" in lfs_site.api.list_repo_files(lfs_site.repo, repo_type=repo_type)
    assert "a/b.txt" not in lfs_site.api.list_repo_files(lfs_site.repo)
    path = lfs_site.api.hf_hub_download(lfs_site.repo, "a/b.txt", repo_type=repo_type)
    with open(path, "rb") as file:  # noqa: PTH123 - the client returns str
        assert file.read() == b"data"


def test_a_read_token_reads_and_does_not_write(lfs_site: Site) -> None:
    reader = lfs_site.as_user(lfs_site.hub.token("read"))
    assert reader.model_info(lfs_site.repo).id == lfs_site.repo
    reader.auth_check(lfs_site.repo)
    for action in (
        lambda: reader.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=lfs_site.repo),
        lambda: reader.create_branch(lfs_site.repo, branch="b"),
        lambda: reader.create_repo("dev/new"),
        lambda: reader.auth_check(lfs_site.repo, write=True),
        lambda: reader.create_discussion(lfs_site.repo, "title"),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            action()
        assert status(error) == 403


def test_private_repos_do_not_exist_for_others(lfs_site: Site) -> None:
    lfs_site.put("x.txt", b"x")
    lfs_site.api.update_repo_settings(lfs_site.repo, private=True)
    assert lfs_site.api.model_info(lfs_site.repo).private is True
    for stranger in (lfs_site.as_user(lfs_site.hub.add_user("eve")), lfs_site.as_user(None)):
        for action in (stranger.model_info, stranger.auth_check, stranger.list_repo_refs):
            with pytest.raises(RepositoryNotFoundError):
                action(lfs_site.repo)
        with pytest.raises(RepositoryNotFoundError):
            stranger.hf_hub_download(lfs_site.repo, "x.txt")
        assert lfs_site.repo not in [model.id for model in stranger.list_models()]
    lfs_site.api.update_repo_settings(lfs_site.repo, visibility="public")
    assert lfs_site.as_user(None).model_info(lfs_site.repo).private is False


@pytest.mark.parametrize("gated", ["auto", "manual"])
def test_gated_files_are_for_those_who_were_let_in(lfs_site: Site, gated: str) -> None:
    lfs_site.put("x.txt", b"x")
    lfs_site.api.update_repo_settings(lfs_site.repo, gated=gated)  # type: ignore[arg-type]
    user = lfs_site.as_user(lfs_site.hub.add_user("gus"))
    assert user.model_info(lfs_site.repo).gated == gated
    for stranger in (user, lfs_site.as_user(None)):
        with pytest.raises(GatedRepoError):
            stranger.auth_check(lfs_site.repo)
        with pytest.raises(GatedRepoError):
            stranger.get_hf_file_metadata(url=f"{lfs_site.hub.endpoint}/{lfs_site.repo}/resolve/main/x.txt")
    # What grant_access() sends; older clients send it to huggingface.co whatever their endpoint.
    url = f"{lfs_site.hub.endpoint}/api/models/{lfs_site.repo}/user-access-request/grant"
    assert raw("POST", url, b'{"user": "gus"}', Authorization=lfs_site.bearer).status == 200
    user.auth_check(lfs_site.repo)
    user.hf_hub_download(lfs_site.repo, "x.txt")
    assert lfs_site.get("x.txt") == b"x"


def test_a_disabled_repo_says_so(lfs_site: Site) -> None:
    lfs_site.hub.disable(lfs_site.repo)
    for action in (lfs_site.api.model_info, lfs_site.api.auth_check):
        with pytest.raises(DisabledRepoError):
            action(lfs_site.repo)
    lfs_site.hub.disable(lfs_site.repo, disabled=False)
    lfs_site.api.auth_check(lfs_site.repo, write=True)


def test_models_are_listed_by_author_and_name_page_by_page(lfs_site: Site) -> None:
    lister = lfs_site.as_user(lfs_site.hub.add_user("lister"))
    names = [f"lister/model-{n}" for n in range(5)]
    for name in names:
        lister.create_repo(name)
    lfs_site.hub.set(page_size=2)
    assert sorted(model.id for model in lister.list_models(author="lister")) == names
    assert [model.id for model in lister.list_models(author="lister", search="MODEL-3")] == ["lister/model-3"]
    assert len(list(lister.list_models(author="lister", limit=3))) == 3


def test_model_info_at_a_revision_with_sizes_and_chosen_fields(lfs_site: Site) -> None:
    first = lfs_site.put("x.txt", b"four")
    second = lfs_site.put("y.bin", b"\0" * 100)
    info = lfs_site.api.model_info(lfs_site.repo, files_metadata=True)
    assert info.sha == second
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
    assert (sizes["x.txt"], sizes["y.bin"]) == (4, 100)
    assert lfs_site.api.model_info(lfs_site.repo, revision=first).sha == first
    assert lfs_site.api.resolve_revision(lfs_site.repo).resolved == second
    only = lfs_site.api.model_info(lfs_site.repo, expand=["sha"])
    assert (only.sha, only.author) == (second, None)
    with pytest.raises(RevisionNotFoundError):
        lfs_site.api.model_info(lfs_site.repo, revision="nowhere")


@pytest.mark.parametrize("repo", ["dev/none", "none"])
def test_repos_that_do_not_exist(lfs_site: Site, repo: str) -> None:
    with pytest.raises(RepositoryNotFoundError):
        lfs_site.api.model_info(repo)
    with pytest.raises(RepositoryNotFoundError):
        lfs_site.api.auth_check(repo, write=True)


def test_a_card_must_be_yaml(lfs_site: Site) -> None:
    lfs_site.put("README.md", b"---\nlicense: mit\n---\nhello")
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        lfs_site.put("README.md", b"---\nlicense: [\n---\nhello")


def test_requests_that_are_not_understood_are_400s(lfs_site: Site) -> None:
    url = f"{lfs_site.hub.endpoint}/api/models/{lfs_site.repo}/preupload/main"
    for body in (b"{", b"[]", b'{"files": [{"path": "../x", "size": 1}]}'):
        assert raw("POST", url, body, Authorization=lfs_site.bearer).status == 400
    with pytest.raises(BadRequestError):
        HfApi(lfs_site.hub.endpoint, lfs_site.hub.token()).create_branch(lfs_site.repo, branch="a..b")
