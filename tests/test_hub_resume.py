"""Hub to Hub, killed or paused, and the same command again: the same bytes, and only the shard in hand is resent."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.hf_api import RepoFile

from mso_hub.plan import Recipe
from tests.hubs import World, llama, local_output, moved, program, require_no_secrets, world
from tests.running import TIMEOUT, proceed

KILLS = {"lfs": 8, "xet": 3}
LINE = 1_500_000
"""Bytes per second up: a shard takes a moment, so that a kill finds one on its way."""


@pytest.fixture(scope="module")
def lfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("lfs"), xet=False) as found:
        yield found


@pytest.fixture(scope="module")
def xet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("xet"), xet=True) as found:
        yield found


@pytest.fixture(params=["lfs", "xet"])
def place(request: pytest.FixtureRequest) -> Iterator[World]:
    """Each of them, without faults and limits at the end."""
    found: World = request.getfixturevalue(request.param)
    yield found
    found.hub.clear_faults()
    found.hub.set(bandwidth_up=0)


class Example:
    """A source of nine shards, a name for the output, and what the output must be."""

    def __init__(self, place: World, folder: Path, seed: int, *, layers: int = 8, hidden: int = 128) -> None:
        files = llama(layers=layers, shards=layers, seed=seed, hidden=hidden)
        source, out = place.put(files), place.name()
        self.source, self.out = f"hf://{source}", f"hf://{out}"
        self.repo, self.expected = out, local_output(files, folder)
        place.log()


def resumed(events: list[dict[str, object]]) -> list[object]:
    """Shards that were kept."""
    return [event["shard"] for event in events if event["event"] == "ShardResumed"]


@contextmanager
def running(place: World, example: Example) -> Iterator[subprocess.Popen[bytes]]:
    """A run, killed when the block ends."""
    where = ("--input_dir", example.source, "--output_dir", example.out, "--quiet")
    process = subprocess.Popen(
        program("quantize", *where), env=place.settings(), cwd=place.home("one"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# --- kill -9 ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_random_moments_the_bytes_are_those_of_an_uninterrupted_run(place: World, tmp_path: Path) -> None:
    """Kills in a row, then a run to the end, over and over; every object is stored once, nothing shows too early."""
    mode = "xet" if place.xet else "lfs"
    chance, kills, kept = random.Random(8), 0, 0
    for at in range(4 * KILLS[mode]):
        if kills >= KILLS[mode]:
            break
        example = Example(place, tmp_path, 100 + at, layers=10, hidden=256 if place.xet else 128)
        place.hub.set(bandwidth_up=LINE)
        here = 0
        for _ in range(4):
            with running(place, example) as process:
                await_shards(place, example, process, chance.randrange(3))
                time.sleep(chance.uniform(0, 0.15))
                process.kill()
                _, messages = process.communicate()
            require_no_secrets(messages.decode())
            if process.returncode != -signal.SIGKILL or "mso_hub.json" in place.files(example.repo):
                break  # this one was finished, or all but its last words
            here += 1
            assert set(place.files(example.repo)) <= {".gitattributes"}
        place.hub.set(bandwidth_up=0)
        kept += len(resumed(place.convert(example.source, example.out)))
        kills += here
        assert place.output(example.repo) == example.expected
        assert len(place.api.list_repo_commits(example.repo)) == 2
        assert place.journals(example.repo) == []
        require_only_the_shard_in_hand_was_sent_again(place, example, here)
    assert kills >= KILLS[mode]
    assert kept >= KILLS[mode]


def await_shards(place: World, example: Example, process: subprocess.Popen[bytes], more: int) -> None:
    """Until the journal names some more files than now, or the run has ended: a loaded machine must not matter."""

    def entries() -> int:
        """Lines of the journal."""
        return sum(path.read_bytes().count(b'"file"') for path in place.journals(example.repo))

    before = entries()
    until(lambda: process.poll() is not None or entries() >= before + more, 60)


def require_only_the_shard_in_hand_was_sent_again(place: World, example: Example, kills: int) -> None:
    """By the server's log: no object was taken twice, and each kill costs one shard at most."""
    log = place.log()
    taken = Counter(r.path.split("/")[4] for r in log if r.method == "PUT" and r.status == 200)
    assert set(taken.values()) <= {1}
    tree = place.api.list_repo_tree(example.repo)
    sizes = [entry.size for entry in tree if isinstance(entry, RepoFile) and entry.lfs]
    again = sum(moved(log, "PUT", example.repo).values()) - sum(sizes)
    assert again <= kills * max(sizes)


def test_killed_while_the_hub_makes_the_commit(place: World, tmp_path: Path) -> None:
    """The commit lands, nobody hears of it: the next run finds it and makes no other."""
    example = Example(place, tmp_path, 200)
    place.hub.fail("POST .*/commit/", land=True, status=504)
    place.hub.fail("POST .*/paths-info/", delay=30, times=-1)
    with running(place, example):
        until(lambda: place.api.repo_exists(example.repo) and len(place.api.list_repo_commits(example.repo)) == 2)
    place.hub.clear_faults()
    assert len(place.journals(example.repo)) == 1
    place.log()
    events = place.convert(example.source, example.out)
    assert len(resumed(events)) == 9
    assert moved(place.log(), "PUT", example.repo) == {}
    assert place.output(example.repo) == example.expected
    assert len(place.api.list_repo_commits(example.repo)) == 2
    assert place.journals(example.repo) == []


def until(happened: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


# --- another machine ----------------------------------------------------------------------------------


def test_another_machine_goes_on_by_the_journal_branch(place: World, tmp_path: Path) -> None:
    """The first machine is gone with its disk: what it stored is neither read nor sent again, and the branch goes."""
    example = Example(place, tmp_path, 300)
    with place.paused(example.source, example.out, "--journal_branch", event="ShardDone", machine="lost") as process:
        process.kill()
    branches = [branch.name for branch in place.api.list_repo_refs(example.repo).branches]
    assert branches == ["main", "mso-hub-journal"]
    require_no_secrets(place.content(example.repo, "mso_hub.journal", "mso-hub-journal").decode())
    place.log()
    kept = resumed(place.convert(example.source, example.out, "--journal_branch", machine="other"))
    assert kept
    log = place.log()
    if not place.xet:
        assert len(moved(log, "PUT", example.repo)) <= 9 - len(kept)
    assert place.output(example.repo) == example.expected
    assert [branch.name for branch in place.api.list_repo_refs(example.repo).branches] == ["main"]
    # The first machine comes back: it sees that all is done.
    assert len(resumed(place.convert(example.source, example.out, "--journal_branch", machine="lost"))) == 9
    assert place.journals(example.repo, "lost") == place.journals(example.repo, "other") == []


def test_another_machine_without_the_branch_starts_over(lfs: World, tmp_path: Path) -> None:
    """It knows of nothing, reads all and sends what the Hub has not; the output is the same."""
    example = Example(lfs, tmp_path, 310)
    with lfs.paused(example.source, example.out, machine="lost2") as process:
        process.kill()
    assert resumed(lfs.convert(example.source, example.out, machine="other2")) == []
    assert lfs.output(example.repo) == example.expected


# --- pauses and refusals ------------------------------------------------------------------------------


def test_ctrl_c_is_a_clean_pause(place: World, tmp_path: Path) -> None:
    """Exit code 130 and one line; the same command finishes and keeps what was complete."""
    example = Example(place, tmp_path, 400)
    with place.paused(example.source, example.out) as process:
        process.send_signal(signal.SIGINT)
        code, _, messages = proceed(process)
    assert (code, messages) == (130, "mso-hub: paused; what is complete is kept, the same command goes on\n")
    assert set(place.files(example.repo)) == {".gitattributes"}
    assert len(place.journals(example.repo)) == 1
    require_no_secrets(place.journals(example.repo)[0].read_text())
    assert resumed(place.convert(example.source, example.out))
    assert place.output(example.repo) == example.expected
    assert place.journals(example.repo) == []


WAITS: Mapping[str, tuple[str, Mapping[str, Any], int]] = {
    "in an upload over a slow line": ("PUT /objects", {"delay": 0}, 20_000),
    "for a storage that hangs": ("PUT /objects", {"stall": 1000, "times": -1}, 0),
    "for a download that hangs": ("GET /files/", {"after": 9, "stall": 1000, "times": -1}, 0),
    "between two tries": ("GET .*/tree/", {"status": 429, "headers": {"Retry-After": "100"}, "times": -1}, 0),
}


@pytest.mark.parametrize("case", WAITS)
def test_ctrl_c_ends_any_wait(lfs: World, tmp_path: Path, case: str) -> None:
    """Nobody presses it twice because the Hub is slow."""
    match, effect, line = WAITS[case]
    example = Example(lfs, tmp_path, 410 + list(WAITS).index(case))
    lfs.hub.set(bandwidth_up=line)
    lfs.hub.fail(match, **effect)
    try:
        with running(lfs, example) as process:
            method = match.split(maxsplit=1)[0]
            until(lambda: any(r.method == method and (r.origin == "storage" or r.status == 429) for r in lfs.hub.log()))
            time.sleep(0.3)
            pressed = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, messages = process.communicate(timeout=TIMEOUT)
            assert time.monotonic() - pressed < 5
    finally:
        lfs.hub.clear_faults()
        lfs.hub.set(bandwidth_up=0)
    assert (process.returncode, messages.decode().count("\n")) == (130, 1)
    assert messages.decode().startswith("mso-hub: paused")


def test_other_settings_over_an_unfinished_run_are_refused(lfs: World, tmp_path: Path) -> None:
    """It is kept, can still be finished, and --fresh replaces it."""
    example = Example(lfs, tmp_path, 500)
    with lfs.paused(example.source, example.out) as process:
        process.kill()
    where = ("--input_dir", example.source, "--output_dir", example.out, "--progress", "none")
    refused = lfs.run("quantize", *where, "--all_linear")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "unfinished run with another source or other settings" in refused.stderr
    assert "--fresh" in refused.stderr
    assert resumed(lfs.convert(example.source, example.out))
    assert lfs.output(example.repo) == example.expected


def test_fresh_discards_an_unfinished_run(lfs: World, tmp_path: Path) -> None:
    """Nothing of it is in the output."""
    files = llama(layers=3, shards=3, seed=510)
    source, out = lfs.put(files), lfs.name()
    with lfs.paused(f"hf://{source}", f"hf://{out}", event="PlanReady") as process:
        process.kill()
    lfs.convert(f"hf://{source}", f"hf://{out}", "--fresh", "--layout", "modelopt")
    assert lfs.output(out) == local_output(files, tmp_path, Recipe(layout="modelopt"))
    assert lfs.journals(out) == []


def test_two_runs_at_once_are_kept_apart(lfs: World, tmp_path: Path) -> None:
    """On one machine by the journal, on two by the journal branch; the first one ends well."""
    example = Example(lfs, tmp_path, 520)
    branch = ("--journal_branch", "wip")
    with lfs.paused(example.source, example.out, *branch) as first:
        where = ("--input_dir", example.source, "--output_dir", example.out, "--progress", "none", *branch)
        refused = lfs.run("quantize", *where)
        assert refused.returncode == 2
        assert "another process is writing this output" in refused.stderr
        assert lfs.run("quantize", *where, machine="second").returncode == 0
        code, _, messages = proceed(first)
    assert code in (0, 2), messages
    assert "Traceback" not in messages
    assert lfs.output(example.repo) == example.expected
    assert len(lfs.api.list_repo_commits(example.repo)) == 2


def test_a_proposal_that_was_killed_is_finished_as_one(lfs: World, tmp_path: Path) -> None:
    """Killed before there was a pull request: the next run opens one, the run after that adds none."""
    token = lfs.hub.add_user("alice")
    example = Example(lfs, tmp_path, 530)
    theirs = lfs.put({"README.md": b"# theirs\n"}, "alice/model", token=token)
    with lfs.paused(example.source, f"hf://{theirs}", "--create_pr") as process:
        process.kill()
    assert list(lfs.api.get_repo_discussions(theirs)) == []
    assert resumed(lfs.convert(example.source, f"hf://{theirs}", "--create_pr"))
    lfs.convert(example.source, f"hf://{theirs}", "--create_pr")
    assert [talk.num for talk in lfs.api.get_repo_discussions(theirs)] == [1]
    assert lfs.output(theirs, "refs/pr/1") == example.expected
