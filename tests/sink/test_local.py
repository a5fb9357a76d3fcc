"""The sink that builds a folder: contract, names on disk, and everything that may lie in its way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest

from mso_hub.errors import ResumeError, SinkError
from mso_hub.sink import LocalSink, Sink, open_sink
from mso_hub.sink.journal import Journal
from mso_hub.sink.local import RESERVE
from tests.running import digests, fill, listing, small_disk
from tests.sink.contract import (
    EMPTY,
    FILES,
    FIRST,
    JOB,
    NESTED,
    OTHER_JOB,
    SECOND,
    SIZES,
    SinkContract,
    give_up,
    put,
    total,
)

HOLDER = """
import sys
from pathlib import Path
from mso_hub.sink import LocalSink
sink = LocalSink(Path(sys.argv[1]))
sink.begin(sys.argv[2], {"a": 1})
print("locked", flush=True)
sys.stdin.read()
"""


def begun(path: Path, job: str = JOB, *, fresh: bool = False) -> LocalSink:
    """A sink that has begun."""
    sink = LocalSink(path, fresh=fresh)
    sink.begin(job, SIZES)
    return sink


def finish(path: Path, job: str = JOB, *, fresh: bool = False) -> None:
    """A whole run: what is missing is written, then published with a manifest as the pipeline writes it."""
    sink = begun(path, job, fresh=fresh)
    put(sink, *(name for name in FILES if name not in sink.entries))
    files = {name: {"nbytes": e.nbytes, "sha256": e.sha256} for name, e in sink.entries.items()}
    sink.commit(json.dumps({"job": job, "files": files}).encode())
    sink.close()


def unfinished(path: Path, *names: str, job: str = JOB) -> None:
    """A run that completed some files and ended."""
    sink = begun(path, job)
    put(sink, *names)
    sink.close()


class TestLocalSink(SinkContract):
    """Every run opens the folder anew."""

    @pytest.fixture(autouse=True)
    def _place(self, tmp_path: Path) -> None:
        self.path = tmp_path / "out"

    def open(self) -> Sink:
        """A new sink on the folder."""
        return open_sink(self.path)

    def visible(self) -> dict[str, bytes]:
        """Files below the folder."""
        return {
            path.relative_to(self.path).as_posix(): path.read_bytes() for path in self.path.rglob("*") if path.is_file()
        }


def test_names_on_disk(tmp_path: Path) -> None:
    """Everything is built beside the output under names that say whose it is, and only the output stays."""
    sink = begun(tmp_path / "out")
    put(sink, *FILES)
    assert sink.address == sink.where == str(tmp_path / "out")
    assert listing(tmp_path) == [".out.mso-journal", ".out.mso-partial"]
    assert {name for name, kind in digests(tmp_path / ".out.mso-partial").items() if kind != "folder"} == set(FILES)
    lines = [json.loads(line) for line in (tmp_path / ".out.mso-journal").read_text().splitlines()]
    assert lines[0] == {"job": JOB}
    assert [line["file"] for line in lines[1:]] == list(FILES)
    sink.commit(b"{}")
    assert listing(tmp_path) == ["out"]


def test_a_run_that_completed_nothing_leaves_no_trace(tmp_path: Path) -> None:
    """After an early error the next run may have other settings without being told of an unfinished one."""
    sink = begun(tmp_path / "out")
    with pytest.raises(KeyError):
        give_up(sink, FIRST, KeyError(FIRST))
    sink.close()
    assert listing(tmp_path) == []


@pytest.mark.parametrize("damage", ["changed", "shorter", "longer", "gone"])
def test_a_shard_that_changed_after_it_was_journaled_does_not_count(tmp_path: Path, damage: str) -> None:
    """A file counts by its bytes, never because it exists."""
    out = tmp_path / "out"
    unfinished(out, FIRST, SECOND)
    path = tmp_path / ".out.mso-partial" / FIRST
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    damaged = {"changed": data, "shorter": data[:-1], "longer": data + b"x"}
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(damaged[damage])
    sink = begun(out)
    assert set(sink.entries) == {SECOND}
    sink.close()
    finish(out)
    assert (out / FIRST).read_bytes() == FILES[FIRST]


def test_leftovers_that_no_journal_lists_are_never_published(tmp_path: Path) -> None:
    """Half-written files, and files of a job that was discarded in the middle of discarding it, go."""
    out = tmp_path / "out"
    unfinished(out, FIRST)
    partial = tmp_path / ".out.mso-partial"
    (partial / "hf_quant_config.json").write_text("of another layout")
    (partial / "old" / "deep").mkdir(parents=True)
    (partial / "old" / "deep" / "file").write_text("stale")
    (partial / SECOND).write_bytes(b"se")
    begun(out).close()
    assert digests(partial).keys() == {FIRST}
    finish(out)
    assert {name for name, kind in digests(out).items() if kind != "folder"} == {*FILES, "mso_hub.json"}


# --- journal ----------------------------------------------------------------------------------------


def write_empty(sink: Sink, names: Iterable[str]) -> None:
    """Files without bytes: only the journal grows."""
    for name in names:
        with sink.open(name, 0):
            pass


@pytest.mark.parametrize("torn", [b'{"file": "model-0000', b"\0" * 40, b'{"file": "x", "nbytes": 1, "sha256": "y"}'])
def test_a_torn_last_line_is_ignored(tmp_path: Path, torn: bytes) -> None:
    """The machine died in the middle of a line: that file is done again, the others are kept."""
    out = tmp_path / "out"
    unfinished(out, FIRST, SECOND)
    journal = tmp_path / ".out.mso-journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + torn)
    sink = begun(out)
    assert set(sink.entries) == {FIRST, SECOND}
    assert journal.read_bytes() == whole
    put(sink, NESTED)
    sink.close()
    sink = begun(out)
    assert set(sink.entries) == {FIRST, SECOND, NESTED}
    sink.close()


def test_a_journal_torn_in_its_first_line_starts_over(tmp_path: Path) -> None:
    """Killed before even the job was written down: nothing had happened yet."""
    (tmp_path / ".out.mso-journal").write_bytes(b'{"job": "aaaa')
    finish(tmp_path / "out")
    assert (tmp_path / "out" / FIRST).read_bytes() == FILES[FIRST]


@pytest.mark.parametrize(
    "content",
    [
        b"hello\n",
        b"[1, 2]\n",
        b"7\n",
        b'{"jobs": 1}\n',
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b'{"job": "' + JOB.encode() + b'"}\nnot json\n{"note": "x", "value": 1}\n',
        b'{"job": "' + JOB.encode() + b'"}\n{"file": "x", "nbytes": "many", "sha256": "y"}\n',
        b'{"job": "' + JOB.encode() + b'"}\n{"file": "x"}\n',
        b'{"job": "' + JOB.encode() + b'"}\n12\n',
    ],
)
def test_garbage_in_the_journal_is_refused(tmp_path: Path, content: bytes) -> None:
    """Guessing what a damaged journal meant could publish wrong bytes; --fresh is the way out, and it works."""
    journal = tmp_path / ".out.mso-journal"
    journal.write_bytes(content)
    with pytest.raises(ResumeError, match=r"\.out\.mso-journal: not a journal.*--fresh"):
        begun(tmp_path / "out")
    assert journal.read_bytes() == content
    begun(tmp_path / "out", fresh=True).close()


def test_half_a_journal_line_on_a_full_disk_is_taken_back(tmp_path: Path) -> None:
    """A line that did not fit must not glue itself to the next one: the journal stays readable."""
    with small_disk(tmp_path / "disk", 16 * 4096) as disk:
        # No reserve here: the test is about the journal's own bytes.
        sink = LocalSink(disk / "out")
        sink._require_space = lambda needed: None  # type: ignore[method-assign]
        names = {f"{n:03}-{'x' * 180}": 0 for n in range(200)}
        sink.begin(JOB, names)
        filler = fill(disk)
        with pytest.raises(SinkError, match=r"mso-journal: .*No space left on device; free some space"):
            write_empty(sink, names)
        filler.unlink()
        done = dict(sink.entries)
        sink.note("after", 1.0)
        sink.close()
        again = LocalSink(disk / "out")
        again._require_space = lambda needed: None  # type: ignore[method-assign]
        again.begin(JOB, names)
        assert dict(again.entries) == done
        assert 0 < len(done) < len(names)
        assert dict(again.notes) == {"after": 1.0}
        again.close()


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    """A lock is held by the process itself, so a dead one never blocks and a living one always does."""
    out = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out), JOB], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        for fresh in (False, True):
            with pytest.raises(ResumeError, match="another process is writing this output"):
                begun(out, fresh=fresh)
        assert (tmp_path / ".out.mso-partial").is_dir()
    finally:
        holder.kill()
        holder.communicate()
    finish(out)
    assert (out / FIRST).is_file()


def test_two_sinks_of_one_process_are_kept_apart_too(tmp_path: Path) -> None:
    """Two cells of a notebook are as dangerous as two processes."""
    first = begun(tmp_path / "out")
    with pytest.raises(ResumeError, match="another process"):
        begun(tmp_path / "out")
    put(first, FIRST)
    first.close()
    second = begun(tmp_path / "out")
    assert set(second.entries) == {FIRST}
    second.close()


def test_a_failed_begin_lets_go_of_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever frees some space and tries again in the same notebook must not be locked out by himself."""
    usage = SimpleNamespace(free=RESERVE)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        refused = LocalSink(tmp_path / "out")
        with pytest.raises(SinkError):
            refused.begin(JOB, SIZES)
    finish(tmp_path / "out")
    assert (tmp_path / "out" / SECOND).read_bytes() == FILES[SECOND]


def test_many_that_come_and_go_are_never_two_at_once(tmp_path: Path) -> None:
    """A run removes its journal when it ends; whoever had opened that file by then must not go on with it."""
    path = tmp_path / "journal"
    inside: list[int] = []
    most = [0]
    until = time.monotonic() + 0.5

    def come_and_go() -> None:
        while time.monotonic() < until:
            try:
                journal = Journal(path, JOB)
            except ResumeError:
                continue
            inside.append(1)
            most.append(len(inside))
            time.sleep(0)
            inside.pop()
            path.unlink()
            journal.close()

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) > 20
    assert max(most) == 1


# --- a finished output ------------------------------------------------------------------------------


def test_a_finished_output_is_recognised_at_once(tmp_path: Path) -> None:
    """The same command again reads the manifest, writes nothing and succeeds."""
    out = tmp_path / "out"
    finish(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    sink = begun(out)
    assert set(sink.entries) == set(FILES)
    sink.commit(b"must not be written")
    sink.close()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert listing(tmp_path) == ["out"]


@pytest.mark.parametrize("damage", ["shorter", "gone"])
def test_a_finished_output_that_changed_is_reported(tmp_path: Path, damage: str) -> None:
    """Success must not be claimed over a file that is no longer there in full."""
    out = tmp_path / "out"
    finish(out)
    if damage == "gone":
        (out / FIRST).unlink()
    else:
        (out / FIRST).write_bytes(FILES[FIRST][:-1])
    found = "none" if damage == "gone" else "1,279"
    with pytest.raises(SinkError, match=rf"{FIRST}.*1,280 bytes there, found {found};.*--fresh"):
        begun(out)
    finish(out, fresh=True)
    assert (out / FIRST).read_bytes() == FILES[FIRST]


@pytest.mark.parametrize("files", ['"files": {}', '"files": 3', '"scheme": "nvfp4"'])
def test_a_manifest_that_does_not_list_the_files_is_reported(tmp_path: Path, files: str) -> None:
    """A manifest edited by hand is no proof of anything."""
    out = tmp_path / "out"
    finish(out)
    (out / "mso_hub.json").write_text(f'{{"job": "{JOB}", {files}}}')
    with pytest.raises(SinkError, match=r"mso_hub\.json: must list all 4 files.*--fresh"):
        begun(out)


def test_a_finished_output_of_another_job_is_replaced_only_with_fresh(tmp_path: Path) -> None:
    """Other settings over a finished checkpoint: refused, and replaced when the user says so."""
    out = tmp_path / "out"
    finish(out, OTHER_JOB)
    (out / "added by the user").write_text("x")
    before = digests(out)
    with pytest.raises(SinkError, match=r"holds a finished run.*bbbbbbbbbbbb.*aaaaaaaaaaaa.*--fresh"):
        begun(out)
    assert digests(out) == before
    with pytest.raises(SinkError, match="added by the user is not of it; move it away"):
        begun(out, fresh=True)
    assert digests(out) == before
    (out / "added by the user").unlink()
    finish(out, fresh=True)
    assert json.loads((out / "mso_hub.json").read_text())["job"] == JOB
    assert not list(tmp_path.glob(".out*"))


def test_fresh_keeps_the_finished_output_until_the_new_one_is_there(tmp_path: Path) -> None:
    """A run that fails must not cost the checkpoint that it was to replace."""
    out = tmp_path / "out"
    finish(out, OTHER_JOB)
    before = digests(out)
    begun(out, fresh=True).close()
    assert digests(out) == before


def test_a_partial_folder_that_lost_files_is_not_published(tmp_path: Path) -> None:
    """Somebody cleaned up while the run went on: what was written is gone, and that is an error."""
    sink = begun(tmp_path / "out")
    put(sink, FIRST)
    (sink.staging / FIRST).unlink()
    with pytest.raises(SinkError, match="they are gone; run it again"):
        sink.commit(b"{}")
    sink.close()
    assert not (tmp_path / "out").exists()


def test_a_link_in_the_place_of_the_partial_folder_is_refused(tmp_path: Path) -> None:
    """Following it would clear a stranger's folder."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "precious").write_text("x")
    (tmp_path / ".out.mso-partial").symlink_to(tmp_path / "victim")
    with pytest.raises(SinkError, match="found a link; remove it"):
        begun(tmp_path / "out")
    assert (tmp_path / "victim" / "precious").exists()


def test_a_finished_output_with_other_bytes_is_reported(tmp_path: Path) -> None:
    """A changed file of the right size is no finished output."""
    out = tmp_path / "out"
    finish(out)
    data = (out / FIRST).read_bytes()
    (out / FIRST).write_bytes(bytes(len(data)))
    with pytest.raises(SinkError, match="bytes there, found others"):
        begun(out)


def test_fresh_discards_an_unfinished_run_of_any_job(tmp_path: Path) -> None:
    """Nothing of the old run is in the new output."""
    out = tmp_path / "out"
    unfinished(out, FIRST, NESTED, job=OTHER_JOB)
    sink = begun(out, fresh=True)
    assert dict(sink.entries) == {}
    assert digests(tmp_path / ".out.mso-partial") == {}
    sink.close()


def test_fresh_begins_over_for_the_same_job_too(tmp_path: Path) -> None:
    """--fresh means what it says, even where everything would have been kept."""
    out = tmp_path / "out"
    unfinished(out, FIRST)
    sink = begun(out, fresh=True)
    assert dict(sink.entries) == {}
    sink.close()


@pytest.mark.parametrize("manifest", [None, "not json", "[]", '{"model": "x"}', '{"job": 7}'])
def test_fresh_never_deletes_a_folder_that_is_not_ours(tmp_path: Path, manifest: str | None) -> None:
    """Only a manifest with a job in it makes a folder ours; a file of that name is not enough."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    if manifest is not None:
        (out / "mso_hub.json").write_text(manifest)
    before = digests(out)
    for fresh in (False, True):
        with pytest.raises(SinkError, match=r"not of this tool.*choose another folder"):
            begun(out, fresh=fresh)
    assert digests(out) == before
    assert listing(tmp_path) == ["out"]


def test_fresh_never_deletes_a_file(tmp_path: Path) -> None:
    """An output path that names a file is a mistake of the user."""
    out = tmp_path / "out"
    out.write_text("precious")
    for fresh in (False, True):
        with pytest.raises(SinkError, match="out: is a file, the output must be a new or empty folder; choose another"):
            begun(out, fresh=fresh)
    assert out.read_text() == "precious"


# --- where the output lies --------------------------------------------------------------------------


@pytest.mark.parametrize("exists", ["a folder", "nothing yet"])
def test_an_output_that_is_a_link_is_written_where_it_points(tmp_path: Path, exists: str) -> None:
    """The partial folder lies beside the real one: on the same disk, so that the last rename works."""
    real = tmp_path / "disk" / "real"
    real.parent.mkdir()
    if exists == "a folder":
        real.mkdir()
    link = tmp_path / "out"
    link.symlink_to(real)
    sink = begun(link)
    assert sink.staging == tmp_path / "disk" / ".real.mso-partial"
    sink.close()
    finish(link)
    assert link.is_symlink()
    assert (real / FIRST).read_bytes() == FILES[FIRST]
    finish(link)
    finish(link, OTHER_JOB, fresh=True)
    assert link.is_symlink()
    assert listing(tmp_path / "disk") == ["real"]


def test_an_output_below_a_link_and_with_dots(tmp_path: Path) -> None:
    """Names in the path do not matter, only the place does."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    unfinished(tmp_path / "link" / "x" / ".." / "out", FIRST)
    sink = begun(tmp_path / "real" / "out")
    assert set(sink.entries) == {FIRST}
    sink.close()


def test_the_current_folder_as_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--output_dir .` in an empty folder is a fair wish."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    finish(Path())
    assert (tmp_path / "here" / FIRST).read_bytes() == FILES[FIRST]
    assert listing(tmp_path) == ["here"]


def test_an_existing_empty_folder_stays_empty_until_commit(tmp_path: Path) -> None:
    """It is the user's, so it is neither removed nor filled early."""
    out = tmp_path / "out"
    out.mkdir()
    sink = begun(out)
    put(sink, FIRST)
    assert listing(out) == []
    sink.close()
    finish(out)
    assert (out / FIRST).is_file()


def test_parents_that_do_not_exist_are_made(tmp_path: Path) -> None:
    """`--output_dir models/new/out` needs no mkdir before."""
    finish(tmp_path / "models" / "new" / "out")
    assert (tmp_path / "models" / "new" / "out" / NESTED).is_file()


def test_a_parent_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    """The message names the parent."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(SinkError, match=r"file: cannot be written: .*choose another folder"):
        begun(tmp_path / "file" / "out")


def test_something_in_the_way_of_the_partial_folder_is_an_error(tmp_path: Path) -> None:
    """A file of that name is not deleted, and the lock is released."""
    (tmp_path / ".out.mso-partial").write_text("x")
    for _ in range(2):
        with pytest.raises(SinkError, match="cannot be written: File exists"):
            begun(tmp_path / "out")


def test_an_output_that_fills_up_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    """Somebody put files there during the run: they stay, the finished folder waits, the same command goes on."""
    out = tmp_path / "out"
    sink = begun(out)
    put(sink, *FILES)
    out.mkdir()
    (out / "theirs").write_text("x")
    with pytest.raises(SinkError, match=r"could not be renamed.*not empty"):
        sink.commit(b"{}")
    assert listing(out) == ["theirs"]
    shutil.rmtree(out)
    sink = begun(out)
    assert set(sink.entries) == set(FILES)
    sink.close()
    finish(out)
    assert (out / FIRST).is_file()


def test_nothing_is_created_before_begin(tmp_path: Path) -> None:
    """Opening a sink, and even writing without begin, touches no disk."""
    sink = LocalSink(tmp_path / "deep" / "out")
    with pytest.raises(SinkError, match="begin"), sink.open("x", 1):
        pass
    with pytest.raises(SinkError, match="begin"):
        sink.note("x", 1.0)
    assert listing(tmp_path) == []


# --- space and permission ---------------------------------------------------------------------------


def test_too_little_space_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    """On a real small disk: the message says how much is needed and how much there is."""
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        sink = LocalSink(disk / "out")
        with pytest.raises(SinkError, match=r"out: needs 1,300 bytes of free space, the disk has [\d,]+; free some"):
            sink.begin(JOB, SIZES)
        assert listing(disk) == []


def test_space_is_needed_only_for_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run counts what lies there already, and a half-written file gives its space back."""
    out = tmp_path / "out"
    unfinished(out, FIRST)
    (tmp_path / ".out.mso-partial" / SECOND).write_bytes(b"half")
    missing = total(SIZES) - SIZES[FIRST]
    for spare, enough in ((0, True), (-1, False)):
        usage = SimpleNamespace(free=missing + RESERVE + spare)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        if enough:
            begun(out).close()
            assert not (tmp_path / ".out.mso-partial" / SECOND).exists()
        else:
            with pytest.raises(SinkError, match=rf"needs {missing:,} bytes"):
                begun(out)


def test_a_disk_that_fills_up_names_the_file_and_the_run_goes_on_later(tmp_path: Path) -> None:
    """A real full disk: what is complete stays, the file in hand is named, space brings it to an end."""
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        big = {"big.safetensors": 1 << 20, FIRST: SIZES[FIRST]}
        sink = LocalSink(disk / "out")
        sink.begin(JOB, big)
        put(sink, FIRST)
        filler = fill(disk)
        wanted = r"big\.safetensors: 1,048,576 bytes could not be written: No space left on device; free some space"
        with pytest.raises(SinkError, match=wanted), sink.open("big.safetensors", 1 << 20) as file:
            file.write(bytes(1 << 20))
        assert set(sink.entries) == {FIRST}
        sink.close()
        filler.unlink()
        sink = LocalSink(disk / "out")
        sink.begin(JOB, big)
        assert set(sink.entries) == {FIRST}
        with sink.open("big.safetensors", 1 << 20) as file:
            file.write(bytes(1 << 20))
        sink.commit(b"{}")
        assert (disk / "out" / "big.safetensors").stat().st_size == 1 << 20


def test_an_error_of_the_source_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    """An OSError between two appends is not the sink's."""
    sink = begun(tmp_path / "out")
    with pytest.raises(IsADirectoryError):
        give_up(sink, FIRST, IsADirectoryError(21, "the source did this"))
    sink.close()


def test_a_read_only_disk_is_refused(tmp_path: Path) -> None:
    """Before anything is read."""
    wanted = "disk: cannot be written: Read-only file system; choose another folder"
    with small_disk(tmp_path / "disk", 1 << 20, "ro") as disk, pytest.raises(SinkError, match=wanted):
        begun(disk / "out")


def test_a_finished_output_on_a_disk_that_became_read_only_is_still_finished(tmp_path: Path) -> None:
    """Archived and mounted read-only: the same command has nothing to do."""
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        finish(disk / "out")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        sink = begun(disk / "out")
        assert set(sink.entries) == set(FILES)
        sink.commit(b"{}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    """The plain case of a read-only output."""
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(SinkError, match="locked: cannot be written: Permission denied"):
        begun(tmp_path / "locked" / "out")


def test_a_mount_point_is_refused_before_the_work_and_not_after_it(tmp_path: Path) -> None:
    """Nothing can be renamed over a mount point, so `docker -v data:/output` needs a folder inside."""
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        with pytest.raises(SinkError, match=r"disk: is a mount point.*give a folder inside it"):
            begun(disk)
        finish(disk / "inside")
        assert (disk / "inside" / EMPTY).read_bytes() == b""


def test_a_replaced_folder_that_was_left_behind_is_cleared(tmp_path: Path) -> None:
    """A run that ended between its two renames leaves the old output hidden; the next --fresh goes on."""
    out = tmp_path / "out"
    finish(out, OTHER_JOB)
    (tmp_path / ".out.mso-old").mkdir()
    (tmp_path / ".out.mso-old" / "config.json").write_text("{}")
    finish(out, fresh=True)
    assert json.loads((out / "mso_hub.json").read_text())["job"] == JOB
    assert not list(tmp_path.glob(".out*"))
