"""A run that was killed, paused or refused, and the same command again: the bytes of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import mso_hub
from mso_hub.events import Event, ShardResumed
from mso_hub.plan import Recipe
from tests.helpers import random_tensor, tiny_moe, write_checkpoint
from tests.running import (
    command,
    convert,
    digests,
    fill,
    journal,
    journal_text,
    listing,
    paused,
    proceed,
    run,
    small_disk,
    staging,
)

TRAINED = Path(__file__).parent / "models" / "tiny-qwen3-moe"
KILLS = 20
ATTEMPTS = 3 * KILLS


@dataclass(frozen=True, slots=True)
class Example:
    """A checkpoint, what an uninterrupted run makes of it, and the seconds that it takes."""

    source: Path
    wanted: dict[str, str]
    seconds: float


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Example:
    """Eight shards of 15 MB: with one thread and the slow scale search half of a run is work, half is start-up."""
    folder = tmp_path_factory.mktemp("large")
    base = random_tensor(2048, 1216)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for layer in range(8):
        prefix = f"model.layers.{layer}"
        names = [f"{prefix}.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")]
        tensors = {name: base.roll(layer * 3 + at) for at, name in enumerate(names)}
        shards[f"model-{layer:05}.safetensors"] = {**tensors, f"{prefix}.input_layernorm.weight": torch.ones(1216)}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 8}
    source = write_checkpoint(folder / "in", shards, config)
    started = time.perf_counter()
    convert(source, folder / "out", *SLOWLY)
    return Example(source, digests(folder / "out"), time.perf_counter() - started)


SLOWLY = ("--workers", "1", "--scale_search", "mse")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Example:
    """Six shards of 60 tensors and a file in a subfolder; small enough for many runs."""
    folder = tmp_path_factory.mktemp("small")
    source = tiny_moe(folder / "in", layers=6, experts=16, shards=6)
    (source / "extra").mkdir()
    (source / "extra" / "notes.md").write_text("carried along")
    started = time.perf_counter()
    convert(source, folder / "out")
    return Example(source, digests(folder / "out"), time.perf_counter() - started)


def resumed(events: list[dict[str, Any]]) -> list[str]:
    """Shards that were kept."""
    return [event["shard"] for event in events if event["event"] == "ShardResumed"]


def shards_in(folder: Path) -> int:
    """Shard files, complete or not."""
    return len(list(folder.glob("*.safetensors"))) if folder.is_dir() else 0


# --- kill -9 ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_twenty_random_moments_the_bytes_are_those_of_an_uninterrupted_run(
    large: Example, tmp_path: Path
) -> None:
    """One to four kills in a row, then a run to the end, over and over; nothing is ever visible too early."""
    chance = random.Random(20)
    kills = halfway = kept = 0
    for at in range(ATTEMPTS):
        if kills >= KILLS:
            break
        out = tmp_path / f"out-{at}"
        for _ in range(chance.randint(2, 6)):
            process = subprocess.Popen(command("quantize", large.source, out, "--quiet", *SLOWLY))
            time.sleep(chance.uniform(0, large.seconds))
            process.kill()
            killed = process.wait() == -signal.SIGKILL
            kills += killed
            if out.exists():
                break
            assert killed
            halfway += shards_in(staging(out)) > 0
        events = convert(large.source, out, *SLOWLY)
        kept += len(resumed(events))
        assert digests(out) == large.wanted
        assert listing(tmp_path) == [out.name], "something is left beside the output"
        shutil.rmtree(out)
    assert kills >= KILLS
    assert halfway >= 5
    assert kept >= 5


@pytest.mark.parametrize(
    "words", [("--format", "fp8"), ("--format", "w4a16", "--group_size", "32", "--asymmetric")], ids=["fp8", "w4a16"]
)
def test_a_killed_run_of_another_format_continues(words: tuple[str, ...], small: Example, tmp_path: Path) -> None:
    """A scale that fused weights share over shards, and zero points of eight rows in a word, survive the cut."""
    convert(small.source, tmp_path / "whole", *words, "--all_linear")
    out = tmp_path / "out"
    with paused(command("quantize", small.source, out, *words, "--all_linear")) as process:
        process.kill()
        process.wait()
        assert not out.exists()
    assert resumed(convert(small.source, out, *words, "--all_linear"))
    assert digests(out) == digests(tmp_path / "whole")


# --- the states between two system calls, built by hand ---------------------------------------------

State = Callable[[Path, dict[str, Any]], list[str]]
"""(output of a finished run, its manifest) -> shards that the next run must find complete."""


def nothing_yet(out: Path, manifest: dict[str, Any]) -> list[str]:
    """The journal file exists, the job is not in it, the folder is not made."""
    shutil.rmtree(out)
    journal(out).touch()
    return []


def job_written(out: Path, manifest: dict[str, Any]) -> list[str]:
    """The job is named, the folder is not made."""
    shutil.rmtree(out)
    journal(out).write_text(journal_text(manifest["job"], {}))
    return []


def second_shard_half_written(out: Path, manifest: dict[str, Any]) -> list[str]:
    """One shard is journaled, the next has some bytes."""
    first, second = shard_names(manifest)[:2]
    keep(out, manifest, [first], also=[second])
    path = staging(out) / second
    path.write_bytes(path.read_bytes()[:1000])
    return [first]


def second_shard_written_but_not_journaled(out: Path, manifest: dict[str, Any]) -> list[str]:
    """All bytes are there, nobody has said so: it does not count."""
    first, second = shard_names(manifest)[:2]
    keep(out, manifest, [first], also=[second])
    return [first]


def journal_line_torn(out: Path, manifest: dict[str, Any]) -> list[str]:
    """The last line of the journal has no end."""
    first, second = shard_names(manifest)[:2]
    keep(out, manifest, [first, second])
    text = journal(out).read_text()
    journal(out).write_text(text[:-20])
    return [first]


def journaled_file_is_gone(out: Path, manifest: dict[str, Any]) -> list[str]:
    """The disk lost a file whose entry it kept."""
    first, second = shard_names(manifest)[:2]
    keep(out, manifest, [first, second])
    (staging(out) / first).unlink()
    return [second]


def journaled_file_has_other_bytes(out: Path, manifest: dict[str, Any]) -> list[str]:
    """The size fits, one bit does not."""
    first, second = shard_names(manifest)[:2]
    keep(out, manifest, [first, second])
    data = bytearray((staging(out) / second).read_bytes())
    data[-1] ^= 1
    (staging(out) / second).write_bytes(data)
    return [first]


def all_shards_but_no_config(out: Path, manifest: dict[str, Any]) -> list[str]:
    """Between the shards and the files."""
    names = shard_names(manifest)
    keep(out, manifest, names)
    return names


def everything_but_the_manifest(out: Path, manifest: dict[str, Any]) -> list[str]:
    """Right before commit."""
    keep(out, manifest, list(manifest["files"]))
    return shard_names(manifest)


def manifest_half_written(out: Path, manifest: dict[str, Any]) -> list[str]:
    """In the middle of commit."""
    keep(out, manifest, list(manifest["files"]))
    (staging(out) / "mso_hub.json").write_text('{"job": "')
    return shard_names(manifest)


def renamed_but_journal_left(out: Path, manifest: dict[str, Any]) -> list[str]:
    """The output is visible, the journal not yet removed."""
    journal(out).write_text(journal_text(manifest["job"], manifest["files"]))
    return shard_names(manifest)


def moved_away_with_the_journal_left(out: Path, manifest: dict[str, Any]) -> list[str]:
    """As before, and then the user took the output elsewhere."""
    shutil.rmtree(out)
    journal(out).write_text(journal_text(manifest["job"], manifest["files"]))
    return []


def fresh_died_while_discarding(out: Path, manifest: dict[str, Any]) -> list[str]:
    """--fresh had written its journal, and the files of another job still lie there."""
    keep(out, manifest, [], also=shard_names(manifest))
    (staging(out) / "hf_quant_config.json").write_text("{}")
    return []


def shard_names(manifest: dict[str, Any]) -> list[str]:
    """Shards of a manifest in order."""
    return sorted(name for name in manifest["files"] if name.endswith(".safetensors"))


def keep(out: Path, manifest: dict[str, Any], done: list[str], also: list[str] | None = None) -> None:
    """Turn a finished output back into an unfinished one: `done` journaled, `also` there without an entry."""
    out.rename(staging(out))
    wanted = {*done, *(also or [])}
    for path in staging(out).rglob("*"):
        if path.is_file() and path.relative_to(staging(out)).as_posix() not in wanted:
            path.unlink()
    journal(out).write_text(journal_text(manifest["job"], {name: manifest["files"][name] for name in done}))


STATES: tuple[State, ...] = (
    nothing_yet,
    job_written,
    second_shard_half_written,
    second_shard_written_but_not_journaled,
    journal_line_torn,
    journaled_file_is_gone,
    journaled_file_has_other_bytes,
    all_shards_but_no_config,
    everything_but_the_manifest,
    manifest_half_written,
    renamed_but_journal_left,
    moved_away_with_the_journal_left,
    fresh_died_while_discarding,
)


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_any_state_that_a_dead_run_can_leave_is_finished(small: Example, tmp_path: Path, state: State) -> None:
    """Whatever lies there, the next run keeps exactly what is proven, and the output is the same."""
    out = tmp_path / "out"
    mso_hub.convert(small.source, out, Recipe())
    assert digests(out) == small.wanted
    expected = state(out, json.loads((out / "mso_hub.json").read_text()))
    events: list[Event] = []
    mso_hub.convert(small.source, out, Recipe(), on_event=events.append)
    assert [event.shard for event in events if isinstance(event, ShardResumed)] == expected
    assert digests(out) == small.wanted
    assert listing(tmp_path) == ["out"]


# --- pauses and refusals ----------------------------------------------------------------------------


def test_ctrl_c_is_a_clean_pause(small: Example, tmp_path: Path) -> None:
    """Exit code 130 and one line; the same command finishes and keeps what was complete."""
    out = tmp_path / "out"
    with paused(command("quantize", small.source, out)) as process:
        process.send_signal(signal.SIGINT)
        code, _, messages = proceed(process)
    assert code == 130
    assert messages == "mso-hub: paused; what is complete is kept, the same command goes on\n"
    assert not out.exists()
    assert shards_in(staging(out)) >= 1
    assert resumed(convert(small.source, out))
    assert digests(out) == small.wanted


def test_the_trained_model_resumes_too(tmp_path: Path) -> None:
    """Real weights, real names, six shards: killed in the middle and finished, byte for byte."""
    out, direct = tmp_path / "out", tmp_path / "direct"
    with paused(command("quantize", TRAINED, out, "--all_linear")) as process:
        process.kill()
    assert resumed(convert(TRAINED, out, "--all_linear"))
    mso_hub.convert(TRAINED, direct, Recipe(mode="all-linear"))
    assert digests(out) == digests(direct)


def test_a_pause_may_go_on_with_other_workers_and_another_budget(small: Example, tmp_path: Path) -> None:
    """How a run works is not what it makes: these settings may change from run to run."""
    out = tmp_path / "out"
    with paused(command("quantize", small.source, out, "--workers", "2")) as process:
        process.kill()
    assert resumed(convert(small.source, out, "--workers", "1", "--memory-budget", "1MiB"))
    assert digests(out) == small.wanted


def test_a_finished_run_repeated_says_so_and_changes_nothing(small: Example, tmp_path: Path) -> None:
    """All shards are reported as kept, none is read or written."""
    out = tmp_path / "out"
    convert(small.source, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    events = convert(small.source, out)
    assert [event["event"] for event in events] == ["PlanReady", *["ShardResumed"] * 6, "Published"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_other_settings_over_an_unfinished_run_are_refused(small: Example, tmp_path: Path) -> None:
    """The message names both jobs' way out, the unfinished run is untouched and can still be finished."""
    out = tmp_path / "out"
    with paused(command("quantize", small.source, out)) as process:
        process.kill()
    before = digests(tmp_path)
    for other in (["--layout", "modelopt"], ["--all_linear"], ["--input_scale", "1.0"], ["--scale_search", "mse"]):
        refused = run(command("quantize", small.source, out, "--progress", "none", *other))
        assert refused.returncode == 2
        assert "unfinished run with another source or other settings" in refused.stderr
        assert "--fresh" in refused.stderr
    assert digests(tmp_path) == before
    assert resumed(convert(small.source, out))
    assert digests(out) == small.wanted


@pytest.mark.parametrize("flag", ["--fresh", "--no-resume"])
def test_fresh_starts_over_with_other_settings(small: Example, tmp_path: Path, flag: str) -> None:
    """Nothing of the unfinished run is in the output."""
    out, direct = tmp_path / "out", tmp_path / "direct"
    with paused(command("quantize", small.source, out)) as process:
        process.kill()
    assert not resumed(convert(small.source, out, "--layout", "modelopt", flag))
    mso_hub.convert(small.source, direct, Recipe(layout="modelopt"))
    assert digests(out) == digests(direct)
    assert not staging(out).exists()
    assert not journal(out).exists()


def test_a_source_that_changed_in_between_is_refused(small: Example, tmp_path: Path) -> None:
    """Half of an old checkpoint and half of a new one would be neither; --fresh takes the new one whole."""
    source, out = shutil.copytree(small.source, tmp_path / "in"), tmp_path / "out"
    with paused(command("quantize", source, out)) as process:
        process.kill()
    before = digests(staging(out))
    for changed in ("model-00006-of-00006.safetensors", "config.json", "extra/notes.md"):
        times = (source / changed).stat()
        os.utime(source / changed, ns=(1, 1))
        refused = run(command("quantize", source, out, "--progress", "none"))
        assert refused.returncode == 2
        assert "another source or other settings" in refused.stderr
        assert "--fresh" in refused.stderr
        assert digests(staging(out)) == before
        os.utime(source / changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    (source / "extra" / "notes.md").write_text("longer than it was")
    assert not resumed(convert(source, out, "--fresh"))
    assert (out / "extra" / "notes.md").read_text() == "longer than it was"


def test_two_runs_at_once_are_kept_apart(small: Example, tmp_path: Path) -> None:
    """The second is refused, with --fresh too, and the first ends well."""
    out = tmp_path / "out"
    with paused(command("quantize", small.source, out)) as first:
        for more in ([], ["--fresh"]):
            second = run(command("quantize", small.source, out, "--progress", "none", *more))
            assert second.returncode == 2
            assert "another process is writing this output" in second.stderr
            assert "Traceback" not in second.stderr
        code, _, messages = proceed(first)
    assert (code, messages) == (0, "")
    assert digests(out) == small.wanted


def test_a_disk_that_fills_up_halfway_is_named_and_the_same_command_finishes(small: Example, tmp_path: Path) -> None:
    """A real full disk in the middle of a run: one message, nothing visible, and later the bytes of any other run."""
    with small_disk(tmp_path / "disk", 16 << 20) as disk:
        out = disk / "out"
        with paused(command("quantize", small.source, out)) as process:
            filler = fill(disk)
            code, _, messages = proceed(process)
        assert code == 2
        assert messages.startswith(f"mso-hub: {staging(out)}/model-0000")
        assert "bytes could not be written: No space left on device; free some space" in messages
        assert messages.count("\n") == 1
        assert not out.exists()
        filler.unlink()
        assert resumed(convert(small.source, out))
        assert digests(out) == small.wanted


def test_a_limit_on_file_sizes_is_named_too(large: Example, tmp_path: Path) -> None:
    """`ulimit -f`, and disks that hold no large files: the message names the file and what to change."""
    program = command("quantize", large.source, tmp_path / "out", "--progress", "none")
    refused = run(["bash", "-c", 'ulimit -f 1024; exec "$@"', "bash", *program])
    assert refused.returncode == 2
    assert f"{staging(tmp_path / 'out')}/model-00000.safetensors" in refused.stderr
    assert "File too large; raise the limit on file sizes" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "out").exists()
