"""Files go in by every way that the client has, and come out as they were."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, RemoteEntryNotFoundError

from tests.hub.devhub.helpers import CLIENT_WARNS, Site, noise, raw, small

pytestmark = CLIENT_WARNS


def test_small_and_large_files_by_upload_file(site: Site, tmp_path: Path) -> None:
    data = noise(300_000)
    (tmp_path / "w.safetensors").write_bytes(data)
    site.api.upload_file(path_or_fileobj=tmp_path / "w.safetensors", path_in_repo="a/w.safetensors", repo_id=site.repo)
    site.api.upload_file(path_or_fileobj=b"text", path_in_repo="a/t.txt", repo_id=site.repo)
    assert site.get("a/w.safetensors") == data
    assert site.get("a/t.txt") == b"text"
    large, text = site.info("a/w.safetensors"), site.info("a/t.txt")
    assert large.lfs is not None
    assert (large.lfs.sha256, large.lfs.size, large.size) == (hashlib.sha256(data).hexdigest(), 300_000, 300_000)
    assert (large.xet_hash is not None) == site.hub.xet
    assert text.lfs is None
    assert text.blob_id == hashlib.sha1(b"blob 4\0text", usedforsecurity=False).hexdigest()


def test_preuploaded_files_appear_with_the_commit(site: Site) -> None:
    data = [noise(200_000, seed) for seed in (1, 2)]
    additions = [CommitOperationAdd(f"m-{n}.safetensors", content) for n, content in enumerate(data)]
    for addition in additions:
        site.api.preupload_lfs_files(site.repo, [addition])
        assert addition.path_or_fileobj == b""  # its memory was given back
    assert site.api.list_repo_files(site.repo) == [".gitattributes"]
    site.api.create_commit(site.repo, additions, commit_message="both")
    assert [site.get(f"m-{n}.safetensors") for n in (0, 1)] == data


@pytest.mark.parametrize("nbytes", [999_999, 1_000_000, 1_000_001])
def test_multipart_uploads_of_any_size(lfs_site: Site, nbytes: int) -> None:
    """Parts of 250,000 bytes: the last one short, full, and a single byte."""
    lfs_site.hub.set(part_size=250_000, multipart_above=500_000)
    data = noise(nbytes, nbytes)
    lfs_site.put("w.bin", data)
    parts = lfs_site.requests("PUT", "/parts/")
    assert [part.bytes_in for part in parts] == [250_000] * (nbytes // 250_000) + [nbytes % 250_000] * (
        nbytes % 250_000 > 0
    )
    assert not any(part.authorized for part in parts)
    assert lfs_site.get("w.bin") == data


def test_what_the_server_has_is_not_sent_again(lfs_site: Site) -> None:
    data = noise(100_000, 3)
    lfs_site.put("a.bin", data)
    lfs_site.hub.log(clear=True)
    lfs_site.put("b.bin", data)
    assert lfs_site.requests("PUT") == []
    assert lfs_site.get("b.bin") == data


def test_a_file_object_goes_by_lfs_even_where_there_is_xet(site: Site) -> None:
    data = noise(100_000, 4)
    site.api.upload_file(path_or_fileobj=io.BytesIO(data), path_in_repo="f.bin", repo_id=site.repo)
    assert len(site.requests("PUT", "/objects/")) == 1
    assert site.get("f.bin") == data


def test_a_folder(site: Site, tmp_path: Path) -> None:
    files = {"a.txt": b"a", "deep/er/b.bin": noise(50_000, 5), "empty.txt": b"", "skip.log": b"no"}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    site.api.upload_folder(repo_id=site.repo, folder_path=tmp_path, ignore_patterns="*.log", commit_message="folder")
    assert sorted(site.api.list_repo_files(site.repo)) == [".gitattributes", "a.txt", "deep/er/b.bin", "empty.txt"]
    for name in ("a.txt", "deep/er/b.bin", "empty.txt"):
        assert site.get(name) == files[name]


def test_the_gitignore_of_the_repo_counts(lfs_site: Site) -> None:
    lfs_site.put(".gitignore", b"*.tmp\n# *.txt\n")
    operations = [CommitOperationAdd("a.tmp", b"1"), CommitOperationAdd("a.txt", b"2")]
    lfs_site.api.create_commit(lfs_site.repo, operations, commit_message="two")
    assert sorted(lfs_site.api.list_repo_files(lfs_site.repo)) == [".gitattributes", ".gitignore", "a.txt"]


def test_names_and_content_decide_what_is_large(lfs_site: Site) -> None:
    files = {"w.safetensors": b"text", "binary.txt": b"\0\1\2", "utf.txt": "ä".encode() * 400, "config.json": b"{}"}
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    lfs_site.api.create_commit(lfs_site.repo, operations, commit_message="all")
    assert {path: lfs_site.info(path).lfs is not None for path in files} == {
        "w.safetensors": True, "binary.txt": True, "utf.txt": False, "config.json": False,
    }  # fmt: skip


def test_copies_within_and_between_repos(site: Site) -> None:
    """Between repos large files are duplicated on the server, which takes a Xet hash; within one it takes nothing."""
    data = noise(60_000, 6)
    site.put("w.bin", data)
    site.put("t.txt", b"text")
    site.api.create_commit(site.repo, [CommitOperationCopy("w.bin", "copy/w.bin")], commit_message="copy")
    assert site.get("copy/w.bin") == data
    if not site.hub.xet:
        return
    target = f"{site.repo}-copy"
    site.api.create_repo(target)
    copies = [
        CommitOperationCopy(name, name, src_repo_id=site.repo, src_repo_type="model") for name in ("w.bin", "t.txt")
    ]
    site.hub.log(clear=True)
    site.api.create_commit(target, copies, commit_message="copy")
    assert [r.status for r in site.requests("POST", "/lfs-files/duplicate")] == [200]
    assert [Site(site.hub, site.api, target).info(name).size for name in ("t.txt", "w.bin")] == [4, 60_000]
    assert Path(site.api.hf_hub_download(target, "w.bin")).read_bytes() == data


def test_deletions_and_replacements_in_one_commit(lfs_site: Site) -> None:
    for name in ("a.txt", "d/1.txt", "d/2.txt", "keep.txt"):
        lfs_site.put(name, b"old")
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        CommitOperationDelete("a.txt"),
        CommitOperationDelete("d/", is_folder=True),
        CommitOperationAdd("keep.txt", b"new"),
    ]
    lfs_site.api.create_commit(lfs_site.repo, operations, commit_message="tidy")
    assert lfs_site.api.list_repo_files(lfs_site.repo) == [".gitattributes", "keep.txt"]
    assert lfs_site.get("keep.txt") == b"new"
    for path in ("a.txt", "d/"):
        with pytest.raises(RemoteEntryNotFoundError, match="with this name doesn't exist"):
            lfs_site.api.create_commit(lfs_site.repo, [CommitOperationDelete(path)], commit_message="again")


def test_a_commit_cannot_name_an_object_that_is_not_there(site: Site) -> None:
    line = {"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": "0" * 64, "size": 5}}
    answer = site.commit(line)
    assert answer.status == 400
    assert "LFS pointer pointed to a file that does not exist" in answer.headers["x-error-message"]
    addition = CommitOperationAdd("w.bin", noise(1000, 7))
    addition._upload_mode, addition._is_uploaded, addition._should_ignore = "lfs", True, False
    with pytest.raises(BadRequestError, match="LFS pointer pointed to a file that does not exist"):
        site.api.create_commit(site.repo, [addition], commit_message="lost")
    assert site.api.list_repo_files(site.repo) == [".gitattributes"]


def test_the_size_in_a_commit_is_checked(lfs_site: Site) -> None:
    data = noise(1000, 8)
    lfs_site.put("w.bin", data)
    value = {"path": "v.bin", "algo": "sha256", "oid": hashlib.sha256(data).hexdigest(), "size": 999}
    assert lfs_site.commit({"key": "lfsFile", "value": value}).status == 400


def test_uploads_with_other_bytes_than_announced_are_refused(lfs_site: Site) -> None:
    data = noise(50_000, 9)
    for wrong in (data[:-1], data + b"x", data[:-1] + b"?"):
        assert raw("PUT", lfs_site.upload_link(data), wrong).status == 400
    assert raw("PUT", lfs_site.upload_link(data), data).status == 200
    leftovers = [path for path in (lfs_site.hub.folder / "parts").iterdir() if path.is_file()]
    assert leftovers == []


def test_a_part_that_was_sent_twice_is_checked_as_it_lies_there(lfs_site: Site) -> None:
    """The digest runs along with the parts; a part that is replaced later must not keep its old share in it."""
    lfs_site.hub.set(part_size=1000, multipart_above=1000)
    data = noise(2000, 10)
    asked = (
        b'{"operation": "upload", "objects": [{"oid": "%s", "size": 2000}]}' % hashlib.sha256(data).hexdigest().encode()
    )
    url = f"{lfs_site.hub.endpoint}/{lfs_site.repo}.git/info/lfs/objects/batch"
    action = raw("POST", url, asked, Authorization=lfs_site.bearer).json()["objects"][0]["actions"]["upload"]
    first, second = action["header"]["00001"], action["header"]["00002"]

    def complete(*bodies: bytes) -> int:
        etags = [
            raw("PUT", link, body).headers["etag"] for link, body in zip((first, second, first), bodies, strict=False)
        ]
        etags = [etags[-1], etags[1]] if len(etags) == 3 else etags
        parts = ", ".join(f'{{"partNumber": {n + 1}, "etag": "{etag[1:-1]}"}}' for n, etag in enumerate(etags))
        parts = parts.replace('"etag": "', '"etag": "\\"').replace('"}', '\\""}')
        return raw("POST", action["href"], f'{{"parts": [{parts}]}}'.encode()).status

    assert complete(data[:1000], data[1000:], b"?" * 1000) == 400
    assert complete(data[:1000], data[1000:]) == 200


@pytest.mark.parametrize("path", ["../x", "/x", "a//b", "a/../b", ".git/config", "a/.git/b", "", "a\\b", "x\0"])
def test_paths_that_git_would_not_take_are_refused(lfs_site: Site, path: str) -> None:
    assert lfs_site.commit(small(path, b"x")).status == 400


def test_a_file_cannot_be_a_folder_too(lfs_site: Site) -> None:
    lfs_site.put("a", b"x")
    assert lfs_site.commit(small("a/b", b"x")).status == 400


def test_uploads_of_a_stranger_need_create_pr(site: Site) -> None:
    bob = site.as_user(site.hub.add_user("bob"))
    with pytest.raises(HfHubHTTPError, match="create_pr=1"):
        bob.upload_file(path_or_fileobj=noise(2000, 11), path_in_repo="w.bin", repo_id=site.repo)
    data = noise(70_000, 12)
    info = bob.upload_file(path_or_fileobj=data, path_in_repo="w.bin", repo_id=site.repo, create_pr=True)
    assert info.pr_revision == "refs/pr/1"
    assert site.get("w.bin", revision="refs/pr/1") == data
    more = noise(70_000, 13)
    bob.upload_file(path_or_fileobj=more, path_in_repo="v.bin", repo_id=site.repo, revision="refs/pr/1")
    assert site.get("v.bin", revision="refs/pr/1") == more
    assert site.api.list_repo_files(site.repo) == [".gitattributes"]
    other = site.as_user(site.hub.add_user("otto"))
    with pytest.raises(HfHubHTTPError, match="create_pr=1"):
        other.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=site.repo, revision="refs/pr/1")
