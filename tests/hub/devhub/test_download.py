"""What a repo holds, read by every way that the client has."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, HfFileSystem, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RevisionNotFoundError

from tests.hub.devhub.helpers import CLIENT_WARNS, Site, noise, raw

pytestmark = CLIENT_WARNS


def url(site: Site, path: str, revision: str = "main") -> str:
    return hf_hub_url(site.repo, path, revision=revision, endpoint=site.hub.endpoint)


def safetensors(name: str, nbytes: int) -> bytes:
    """A file with one U8 tensor."""
    header = json.dumps({name: {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
    return struct.pack("<Q", len(header)) + header + noise(nbytes)


def put(site: Site, files: dict[str, bytes]) -> str:
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    return str(site.api.create_commit(site.repo, operations, commit_message="files").oid)


def test_metadata_of_small_and_large_files(site: Site) -> None:
    data = noise(50_000, 20)
    sha = put(site, {"w.bin": data, "t.txt": b"text"})
    large = site.api.get_hf_file_metadata(url=url(site, "w.bin"))
    assert (large.commit_hash, large.etag, large.size) == (sha, hashlib.sha256(data).hexdigest(), 50_000)
    assert large.location.startswith(site.hub.storage)
    assert (large.xet_file_data is not None) == site.hub.xet
    text = site.api.get_hf_file_metadata(url=url(site, "t.txt"))
    assert (text.commit_hash, text.size, text.xet_file_data) == (sha, 4, None)
    assert text.etag == site.info("t.txt").blob_id


def test_missing_files_and_revisions(site: Site) -> None:
    with pytest.raises(RemoteEntryNotFoundError):
        site.api.hf_hub_download(site.repo, "none.txt")
    answer = raw("HEAD", url(site, "none.txt"), Authorization=site.bearer)
    assert (answer.status, answer.headers["x-error-code"]) == (404, "EntryNotFound")
    assert answer.headers["x-repo-commit"] == site.api.model_info(site.repo).sha
    with pytest.raises(RevisionNotFoundError):
        site.api.hf_hub_download(site.repo, "none.txt", revision="nowhere")
    with pytest.raises(RemoteEntryNotFoundError):
        list(site.api.list_repo_tree(site.repo, "none"))


def test_a_whole_repo_and_its_checksums(site: Site, tmp_path: Path) -> None:
    files = {"w.bin": noise(120_000, 21), "a/b/t.txt": b"text", "empty.txt": b""}
    put(site, files)
    folder = Path(site.api.snapshot_download(site.repo, local_dir=tmp_path / "here"))
    assert {name: (folder / name).read_bytes() for name in files} == files
    if hasattr(site.api, "verify_repo_checksums"):
        assert not site.api.verify_repo_checksums(site.repo, local_dir=folder).mismatches


def test_the_token_never_reaches_the_storage(site: Site) -> None:
    data = noise(80_000, 22)
    put(site, {"w.bin": data})
    site.hub.log(clear=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        assert site.get("w.bin") == data
    [request] = [r for r in site.hub.log() if r.origin == "storage"]
    assert (request.method, request.status, request.authorized, request.bytes_out) == ("GET", 200, False, 80_000)
    assert all(r.authorized and r.user == "dev" for r in site.hub.log() if r.origin == "hub")


def test_trees_page_by_page(site: Site) -> None:
    names = [f"{folder}/{n}.txt" for folder in ("a", "b/c") for n in range(4)]
    sha = put(site, {name: name.encode() for name in names})
    site.hub.set(page_size=3)
    site.hub.log(clear=True)
    whole = list(site.api.list_repo_tree(site.repo, recursive=True))
    assert [item.path for item in whole] == sorted([".gitattributes", "a", "b", "b/c", *names])
    assert len(site.requests("GET", "/tree/")) == 4
    assert [item.path for item in site.api.list_repo_tree(site.repo)] == [".gitattributes", "a", "b"]
    assert [item.path for item in site.api.list_repo_tree(site.repo, "b", recursive=True)] == ["b/c", *names[4:]]
    last = put(site, {"a/0.txt": b"new"})
    expanded = {item.path: item for item in site.api.list_repo_tree(site.repo, "a", expand=True)}
    commits = [expanded[name].last_commit for name in ("a/0.txt", "a/1.txt")]
    assert [commit.oid for commit in commits if commit] == [last, sha]


def test_pages_of_a_moving_branch_are_of_one_commit(lfs_site: Site) -> None:
    put(lfs_site, {f"{n}.txt": b"x" for n in range(4)})
    lfs_site.hub.set(page_size=2)
    tree = iter(lfs_site.api.list_repo_tree(lfs_site.repo))
    first = next(tree)
    put(lfs_site, {"00.txt": b"late"})
    assert [item.path for item in (first, *tree)] == [".gitattributes", *(f"{n}.txt" for n in range(4))]


def test_paths_info_of_files_folders_and_nothing(site: Site) -> None:
    put(site, {"a/x y.txt": b"1", "w.bin": noise(1000)})
    found = site.api.get_paths_info(site.repo, ["a", "a/x y.txt", "none", "w.bin"], expand=True)
    assert [item.path for item in found] == ["a", "a/x y.txt", "w.bin"]
    with pytest.raises(HfHubHTTPError) as error:
        site.api.get_paths_info(site.repo, [f"{n}" for n in range(1001)])
    assert error.value.response.status_code == 413


def test_names_with_strange_letters(site: Site) -> None:
    files = {"a b/ü#?%.txt": b"small", "a b/ü#?%.bin": noise(2000, 23)}
    put(site, files)
    assert {name: site.get(name) for name in files} == files


def test_ranges_through_the_redirect(site: Site) -> None:
    data = noise(3_000_000, 24)
    put(site, {"w.bin": data, "t.txt": b"0123456789"})
    link = site.link("w.bin")
    for start, stop in ((0, 1), (1_000_000, 2_500_000), (2_999_999, 3_000_000)):
        answer = raw("GET", link, range_=f"bytes={start}-{stop - 1}")
        assert (answer.status, answer.body) == (206, data[start:stop])
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/3000000"
    assert raw("GET", link, range_="bytes=-10").body == data[-10:]
    assert raw("GET", link, range_="bytes=2999990-").body == data[-10:]
    assert raw("GET", link).body == data
    small = raw("GET", url(site, "t.txt"), range_="bytes=2-4")
    assert (small.status, small.body) == (206, b"234")
    for where in (link, url(site, "t.txt")):
        answer = raw("GET", where, range_="bytes=3000000-")
        assert answer.status == 416
        assert answer.headers["content-range"].startswith("bytes */")


def test_the_file_system(site: Site) -> None:
    data = noise(400_000, 25)
    put(site, {"deep/w.bin": data, "t.txt": b"text"})
    fs = HfFileSystem(endpoint=site.hub.endpoint, token=site.hub.token(), skip_instance_cache=True)
    assert sorted(map(str, fs.ls(site.repo, detail=False))) == [
        f"{site.repo}/{n}" for n in (".gitattributes", "deep", "t.txt")
    ]
    assert fs.info(f"{site.repo}/deep/w.bin")["size"] == 400_000
    with fs.open(f"{site.repo}/deep/w.bin", "rb", block_size=1000, cache_type="none") as file:
        file.seek(123_456)
        assert file.read(7) == data[123_456:123_463]
        assert file.read() == data[123_463:]
    assert fs.cat_file(f"{site.repo}/t.txt") == b"text"


def test_headers_of_safetensors(site: Site) -> None:
    shards = {f"model-0000{n}-of-00002.safetensors": safetensors(f"t{n}", 3000 + n) for n in (1, 2)}
    weight_map = {f"t{n}": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    index = {"metadata": {"total_size": 6003}, "weight_map": weight_map}
    put(site, {**shards, "model.safetensors.index.json": json.dumps(index).encode()})
    found = site.api.get_safetensors_metadata(site.repo)
    assert found.weight_map == weight_map
    assert found.parameter_count == {"U8": 6003}
    if hasattr(site.api, "get_sharded_safetensors_metadata"):
        assert site.api.get_sharded_safetensors_metadata(site.repo).files_metadata == found.files_metadata
    put(site, {"single/model.safetensors": shards["model-00001-of-00002.safetensors"]})
    single = site.api.parse_safetensors_file_metadata(site.repo, "single/model.safetensors")
    assert single.tensors["t1"].shape == [3001]
