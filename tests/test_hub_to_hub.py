"""Hub to Hub through the command line: what arrives, what travels, what is left on the way."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mso_hub.plan import Recipe
from tests.helpers import write_files
from tests.hubs import (
    COMPANIONS,
    World,
    llama,
    local_output,
    moved,
    multimodal,
    output_of,
    packed,
    program,
    random_bytes,
    require_no_secrets,
    spans,
    twice,
    world,
)
from tests.running import proceed, run, sha256

TRAINED = Path(__file__).parent / "models" / "tiny-qwen3-moe"
FIRST_READ = 1 << 16
MADE: Mapping[str, tuple[Callable[..., dict[str, bytes]], Recipe]] = {
    "quantize": (llama, Recipe()),
    "decompress": (packed, Recipe(scheme="bf16", dtype="BF16")),
    "extract-text": (multimodal, Recipe(scheme="bf16", text_only=True)),
}
LAST = "model-00004-of-00004.safetensors"
"""The shard of `llama` that stays as it is."""


@pytest.fixture(scope="module")
def lfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Plain LFS: the server's log shows what travels."""
    with world(tmp_path_factory.mktemp("lfs"), xet=False) as found:
        yield found


@pytest.fixture(scope="module")
def xet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Xet storage, which can copy from repo to repo; its clients go round the server's log."""
    with world(tmp_path_factory.mktemp("xet"), xet=True) as found:
        yield found


@pytest.fixture(params=["lfs", "xet"])
def place(request: pytest.FixtureRequest) -> World:
    """Each of them."""
    found: World = request.getfixturevalue(request.param)
    return found


# --- what arrives -------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", MADE)
def test_the_output_is_that_of_a_conversion_from_folder_to_folder(place: World, tmp_path: Path, verb: str) -> None:
    """Every file but the card and the manifest, byte for byte, in one commit; the manifest names them all."""
    make, recipe = MADE[verb]
    files = make(seed=1)
    source, out = place.put(files), place.name()
    events = place.convert(f"hf://{source}@main", f"hf://{out}", verb=verb)
    assert place.output(out) == local_output(files, tmp_path, recipe)
    assert events[-1]["event"] == "Published"
    commits = place.api.list_repo_commits(out)
    assert len(commits) == 2
    require_no_secrets(str(commits))
    manifest = json.loads(place.content(out, "mso_hub.json"))
    assert (manifest["source"], manifest["commit"]) == (source, place.head(source))
    digests = {name: sha256(data) for name, data in place.files(out).items() if name != ".gitattributes"}
    assert digests.pop("mso_hub.json")
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == digests
    assert place.journals(out) == []


def test_a_hub_to_a_folder_and_back(place: World, tmp_path: Path) -> None:
    """Folders and repos in any combination make the same files; the card only belongs to a repo."""
    files = llama(seed=2)
    source, out = place.put(files), place.name()
    place.convert(f"hf://{source}", tmp_path / "out")
    place.convert(write_files(tmp_path / "in", files), f"hf://{out}", "--base_model", "org/base")
    expected = local_output(files, tmp_path)
    assert output_of(tmp_path / "out") == expected
    assert place.output(out) == expected
    assert (tmp_path / "out" / "README.md").read_bytes() == COMPANIONS["README.md"]
    assert "base_model: org/base" in place.content(out, "README.md").decode()


def test_the_card_carries_licence_and_base_model(lfs: World) -> None:
    """What people read first: where it comes from, and under which licence."""
    source, out = lfs.put(llama(seed=2)), lfs.name()
    lfs.convert(f"hf://{source}", f"hf://{out}")
    card = lfs.content(out, "README.md").decode()
    for line in ("license: mit", f"base_model: {source}", "base_model_relation: quantized", "- de", "- nvfp4"):
        assert line in card
    assert lfs.head(source) in card


@pytest.mark.parametrize(
    ("place", "form"),
    [("lfs", "hf://{repo}@v1/sub/dir"), ("xet", "{hub}/{repo}/tree/v1/sub/dir")],
    indirect=["place"],
)
def test_a_source_in_a_folder_of_a_tagged_commit(place: World, tmp_path: Path, form: str) -> None:
    """Only what lies below the folder counts, under names relative to it; the tag and not the branch is read."""
    files = llama(seed=3, more=False)
    repo = place.put({"config.json": b"{}", **{f"sub/dir/{name}": data for name, data in files.items()}})
    place.api.create_tag(repo, tag="v1")
    place.put({"sub/dir/config.json": b"{}"}, repo)
    out = place.name()
    place.convert(form.format(repo=repo, hub=place.hub.endpoint), f"hf://{out}")
    assert place.output(out) == local_output(files, tmp_path)


def test_a_branch_that_moves_during_the_run_is_not_followed(place: World, tmp_path: Path) -> None:
    """The commit that the branch named at the start is read to the end, and the manifest says which it was."""
    files = llama(layers=8, shards=8, seed=4)
    source, out = place.put(files), place.name()
    before = place.head(source)
    with place.paused(f"hf://{source}@main", f"hf://{out}") as process:
        place.put({"config.json": b"{}"}, source, delete=["model-00008-of-00009.safetensors", "extra/notes.md"])
        code, _, messages = proceed(process)
    assert (code, messages) == (0, "")
    assert place.head(source) != before
    assert place.output(out) == local_output(files, tmp_path)
    assert json.loads(place.content(out, "mso_hub.json"))["commit"] == before


def test_a_finished_run_repeated_changes_and_sends_nothing(lfs: World) -> None:
    """Not even a commit."""
    source, out = lfs.put(llama(seed=5)), lfs.name()
    lfs.convert(f"hf://{source}", f"hf://{out}")
    before = lfs.state(out)
    lfs.log()
    events = lfs.convert(f"hf://{source}", f"hf://{out}")
    assert [event["event"] for event in events] == ["PlanReady", *["ShardResumed"] * 4, "Published"]
    assert moved(lfs.log(), "PUT", out) == {}
    assert lfs.state(out) == before


# --- what travels -------------------------------------------------------------------------------------


def test_no_source_byte_is_asked_for_twice(lfs: World) -> None:
    """Headers included, and every byte of every file once: a terabyte source is read in one go."""
    files = llama(layers=4, shards=4, seed=6)
    source = lfs.put(files)
    lfs.log()
    lfs.convert(f"hf://{source}", f"hf://{lfs.name()}")
    asked = spans(lfs.log(), source)
    assert {name: twice(ranges) for name, ranges in asked.items()} == dict.fromkeys(asked, 0)
    sizes = {Path(name).name: len(data) for name, data in files.items()}
    assert {name: sum(end - begin for begin, end in ranges) for name, ranges in asked.items()} == sizes


def test_only_the_other_half_of_a_unit_that_is_cut_in_two_is_read_twice(lfs: World) -> None:
    """gate and up share a scale: up lies in the next shard and is needed before its turn comes, nothing else is."""
    files = llama(seed=7)
    source = lfs.put(files)
    lfs.log()
    lfs.convert(f"hf://{source}", f"hf://{lfs.name()}")
    again = {name: twice(ranges) for name, ranges in spans(lfs.log(), source).items()}
    up = 2 * 128 * 256
    assert {name: count for name, count in again.items() if count} == {"model-00002-of-00004.safetensors": up}


def test_scales_far_from_their_codes_cost_no_second_transfer(lfs: World) -> None:
    """safetensors sorts by dtype: all codes come before all scales, and still each byte travels once."""
    source = lfs.put(packed(seed=8))
    lfs.log()
    lfs.convert(f"hf://{source}", f"hf://{lfs.name()}", verb="decompress")
    asked = spans(lfs.log(), source)
    assert {name: twice(ranges) for name, ranges in asked.items()} == dict.fromkeys(asked, 0)


def test_what_stays_as_it_is_is_copied_by_the_server(xet: World, tmp_path: Path) -> None:
    """An unchanged shard and the tokenizer: of the shard only its header travels, of the tokenizer nothing.

    The client has Xet switched off, so that the log shows what it transfers; the copy is the Hub's work all the same.
    """
    files = llama(seed=9)
    source, out = xet.put(files), xet.name()
    xet.log()
    xet.convert(f"hf://{source}", f"hf://{out}", HF_HUB_DISABLE_XET="1")
    log = xet.log()
    assert sum(request.path.endswith("/lfs-files/duplicate") for request in log) == 2
    down, up = moved(log, "GET", source), moved(log, "PUT", out)
    assert (down[LAST], down.get("tokenizer.model", 0)) == (FIRST_READ, 0)
    assert not {sha256(files[LAST]), sha256(files["tokenizer.model"])} & up.keys()
    assert len(up) == 3
    assert xet.output(out) == local_output(files, tmp_path)


def test_a_copy_that_the_hub_refuses_is_sent(xet: World, tmp_path: Path) -> None:
    """Another region, a missing permission: a copy is an economy, no condition."""
    files = llama(seed=10)
    source, out = xet.put(files), xet.name()
    xet.hub.fail("POST .*/lfs-files/duplicate", status=403, times=-1)
    try:
        xet.convert(f"hf://{source}", f"hf://{out}")
    finally:
        xet.hub.clear_faults()
    assert xet.output(out) == local_output(files, tmp_path)


def test_no_shard_touches_the_disk_of_the_client(lfs: World) -> None:
    """10 MB in, 4 MB out: the kernel counts what the process writes, and its home holds next to nothing."""
    files = {path.name: path.read_bytes() for path in TRAINED.iterdir()}
    source, out = lfs.put(files), lfs.name()
    where = ("--input_dir", f"hf://{source}", "--output_dir", f"hf://{out}", "--quiet", "--all_linear")
    process = subprocess.Popen(
        program("quantize", *where), env=lfs.settings("bare"), cwd=lfs.home("bare"), stderr=subprocess.PIPE
    )
    with process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert usage.ru_oublock * 512 < 1_000_000
    kept = {path: path.stat().st_size for path in lfs.home("bare").rglob("*") if path.is_file()}
    assert sum(kept.values()) < 100_000, kept


# --- looking without converting -----------------------------------------------------------------------


OWN = {"name", "source", "job", "files", "carried", "left_behind"}
"""What is shown of a repo in other words, or in another order, than of a folder."""


def without(shown: dict[str, Any]) -> dict[str, Any]:
    """What is shown of a checkpoint wherever it lies."""
    return {key: value for key, value in shown.items() if key not in OWN}


def test_inspect_and_plan_read_headers_alone(lfs: World, tmp_path: Path) -> None:
    """They say what they say of a folder, and ask for the first bytes of each shard and for nothing else."""
    files = llama(layers=4, shards=4, seed=11, hidden=256)
    source, folder = lfs.put(files), write_files(tmp_path / "in", files)
    for verb in ("inspect", "plan"):
        lfs.log()
        found = lfs.run(verb, f"hf://{source}", "--json")
        log = lfs.log()
        assert (found.returncode, found.stderr) == (0, "")
        expected = json.loads(run(program(verb, folder, "--json")).stdout)
        assert without(json.loads(found.stdout)) == without(expected)
        down = moved(log, "GET", source)
        assert sum(down.values()) <= 5 * FIRST_READ
        assert sum(map(len, files.values())) > 10 * FIRST_READ


def test_verify_and_compare_read_repos(place: World) -> None:
    """A good output is good, the errors of its weights are reported, and it equals itself."""
    source, out = place.put(llama(seed=12)), place.name()
    place.convert(f"hf://{source}", f"hf://{out}")
    report = place.run("verify", f"hf://{out}", "--source", f"hf://{source}", "--json")
    assert (report.returncode, report.stderr) == (0, "")
    assert json.loads(report.stdout)["problems"] == []
    compared = place.run("compare", f"hf://{out}@main", f"{place.hub.endpoint}/{out}")
    assert (compared.returncode, compared.stderr) == (0, "")


def test_verify_finds_a_changed_output(lfs: World, tmp_path: Path) -> None:
    """Somebody replaced a shard by bytes of the same length: exit code 2, and the file is named."""
    files = llama(seed=13)
    source, out = lfs.put(files), lfs.name()
    lfs.convert(f"hf://{source}", f"hf://{out}")
    name = "model-00002-of-00004.safetensors"
    content = bytearray(lfs.content(out, name))
    content[-20_000:] = random_bytes(20_000, 1)
    lfs.put({name: bytes(content)}, out)
    report = lfs.run("verify", f"hf://{out}")
    assert report.returncode == 2
    assert name in report.stdout


# --- where it goes ------------------------------------------------------------------------------------


def test_a_private_repo_and_a_branch(xet: World, tmp_path: Path) -> None:
    """Both are made where they are missing; the default branch of a new repo stays empty."""
    files = llama(seed=14)
    source, out = xet.put(files, private=True), xet.name()
    xet.convert(f"hf://{source}", f"hf://{out}", "--private", "--branch", "nvfp4")
    assert xet.api.model_info(out).private
    assert set(xet.files(out)) == {".gitattributes"}
    assert xet.output(out, "nvfp4") == local_output(files, tmp_path)


@pytest.mark.parametrize(
    ("more", "expect"),
    [
        ((), "is private, hf://{out} would be public; give --private"),
        (("--branch", "a..b", "--private"), "--branch must be the name of a git branch, found '..' in 'a..b'"),
    ],
)
def test_a_refused_output_leaves_no_repo_behind(lfs: World, more: tuple[str, ...], expect: str) -> None:
    """Neither a public copy of private weights, nor an empty repo."""
    source, out = lfs.put(llama(seed=19), private=True), lfs.name()
    done = lfs.run("quantize", "--input_dir", f"hf://{source}", "--output_dir", f"hf://{out}", *more)
    assert done.returncode == 2
    assert expect.format(out=out) in done.stderr
    assert lfs.state(out) is None


def test_private_weights_do_not_go_to_a_public_repo(lfs: World) -> None:
    """--private makes no repo private that is there."""
    source, out = lfs.put(llama(seed=20)), lfs.put({"README.md": b"# x"})
    before = lfs.state(out)
    done = lfs.run("quantize", "--input_dir", f"hf://{source}", "--output_dir", f"hf://{out}", "--private")
    assert done.returncode == 2
    assert f"hf://{out}: is public, and --private only makes a new repo private" in done.stderr
    assert lfs.state(out) == before


def test_a_proposal_to_somebody_else_is_made_once(place: World, tmp_path: Path) -> None:
    """--create_pr twice, the second time with other settings: one pull request, which holds the second output alone."""
    token = place.hub.add_user("alice")
    files = llama(seed=15)
    source = place.put(files)
    theirs = place.put(
        {"README.md": b"# theirs\n", "model.safetensors": random_bytes(1000, 1)},
        f"alice/r{place.name()[4:]}",
        token=token,
    )
    before = place.head(theirs)
    for more in ((), ("--fresh", "--layout", "modelopt")):
        place.convert(f"hf://{source}", f"hf://{theirs}", "--create_pr", *more)
    talks = list(place.api.get_repo_discussions(theirs))
    assert [(talk.num, talk.author, talk.is_pull_request, talk.status) for talk in talks] == [(1, "dev", True, "open")]
    assert place.head(theirs) == before
    assert place.output(theirs, "refs/pr/1") == local_output(files, tmp_path, Recipe(layout="modelopt"))


def test_fresh_replaces_another_jobs_output_in_one_commit(lfs: World, tmp_path: Path) -> None:
    """Nothing of the old one is left, and no reader ever sees a mixture."""
    files = llama(seed=16)
    source, out = lfs.put(files), lfs.name()
    lfs.convert(f"hf://{source}", f"hf://{out}", "--layout", "modelopt")
    lfs.convert(f"hf://{source}", f"hf://{out}", "--fresh")
    assert lfs.output(out) == local_output(files, tmp_path)
    assert len(lfs.api.list_repo_commits(out)) == 3


def test_a_licence_committed_in_between_stays(lfs: World, tmp_path: Path) -> None:
    """The head moved, harmlessly: the output goes on top of it."""
    files = llama(layers=8, shards=8, seed=17)
    source, out = lfs.put(files), lfs.name()
    with lfs.paused(f"hf://{source}", f"hf://{out}") as process:
        lfs.put({"LICENSE": b"MIT"}, out)
        code, _, messages = proceed(process)
    assert (code, messages) == (0, "")
    assert lfs.output(out) == local_output(files, tmp_path) | {"LICENSE": sha256(b"MIT")}


def test_a_model_committed_in_between_is_not_overwritten(lfs: World) -> None:
    """Somebody else's weights appeared: exit code 2, they stay alone."""
    source, out = lfs.put(llama(layers=8, shards=8, seed=18)), lfs.name()
    with lfs.paused(f"hf://{source}", f"hf://{out}") as process:
        lfs.put({"config.json": b"{}"}, out)
        before = lfs.state(out)
        code, _, messages = proceed(process)
    assert code == 2
    assert "somebody committed config.json there while this run went on" in messages
    assert lfs.state(out) == before
