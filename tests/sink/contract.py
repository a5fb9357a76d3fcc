"""What every sink owes to the pipeline. A backend's tests inherit this class and say how to open it and look at it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import pytest

from mso_hub.errors import MsoError, ResumeError
from mso_hub.hub import Origin
from mso_hub.sink import Entry, Sink

JOB, OTHER_JOB = "a" * 64, "b" * 64
MANIFEST = b'{"job": "' + JOB.encode() + b'", "files": {}}\n'
FILES = {
    "model-00001-of-00002.safetensors": bytes(range(256)) * 5,
    "model-00002-of-00002.safetensors": b"second",
    "notes/deep/README.md": b"in a subfolder",
    "empty.txt": b"",
}
SIZES = {name: len(data) for name, data in FILES.items()}
FIRST, SECOND, NESTED, EMPTY = FILES


def put(sink: Sink, *names: str) -> None:
    """Write some of FILES, each in two appends, and wait until they are stored."""
    for name in names:
        data = FILES[name]
        with sink.open(name, len(data)) as file:
            file.write(data[: len(data) // 2])
            file.write(data[len(data) // 2 :])
    sink.wait()


def give_up(sink: Sink, name: str, error: Exception) -> None:
    """Half of one of FILES, then an error that is not the sink's."""
    with sink.open(name, len(FILES[name])) as file:
        file.write(FILES[name][: len(FILES[name]) // 2])
        raise error


class SinkContract:
    """Inherit, and implement `open` and `visible`."""

    def open(self) -> Sink:
        """A sink on this test's place, as each run opens it anew."""
        raise NotImplementedError

    def visible(self) -> dict[str, bytes]:
        """What a reader of the place sees."""
        raise NotImplementedError

    def manifest(self, sink: Sink) -> bytes:
        """A manifest that a later run can read."""
        files = {n: {"nbytes": e.nbytes, "sha256": e.sha256} for n, e in sink.entries.items()}
        return repr({"job": JOB, "files": files}).replace("'", '"').encode()

    def started(self) -> Sink:
        """A sink that has begun the job."""
        sink = self.open()
        sink.begin(JOB, SIZES)
        return sink

    def test_nothing_is_visible_before_commit(self) -> None:
        """A reader never sees half a checkpoint."""
        sink = self.started()
        put(sink, *FILES)
        assert self.visible() == {}
        sink.close()
        assert self.visible() == {}

    def test_commit_shows_every_file_and_the_manifest(self) -> None:
        """What was written is what a reader gets, subfolders and empty files too."""
        sink = self.started()
        put(sink, *FILES)
        manifest = self.manifest(sink)
        sink.commit(manifest)
        sink.close()
        assert self.visible() == {**FILES, "mso_hub.json": manifest}

    def test_entries_say_size_and_digest(self) -> None:
        """An entry appears with its file and says what the file holds."""
        sink = self.started()
        assert dict(sink.entries) == {}
        put(sink, SECOND, NESTED)
        assert dict(sink.entries) == {
            name: Entry(len(FILES[name]), hashlib.sha256(FILES[name]).hexdigest()) for name in (SECOND, NESTED)
        }
        sink.close()

    @pytest.mark.parametrize(
        "array",
        [
            np.arange(12, dtype=np.uint16).reshape(3, 4),
            np.linspace(0, 1, 6, dtype=np.float16).reshape(2, 3),
            np.array(2.5, np.float32),
            np.zeros((0, 16), np.uint8),
            np.array([True, False]),
        ],
        ids=["matrix", "half", "scalar", "no rows", "bool"],
    )
    def test_arrays_are_written_as_their_bytes(self, array: np.ndarray) -> None:
        """Any dtype and any shape, also one without elements or dimensions."""
        sink = self.open()
        sink.begin(JOB, {FIRST: array.nbytes})
        with sink.open(FIRST, array.nbytes) as file:
            file.write(array)
        sink.wait()
        sink.commit(self.manifest(sink))
        assert self.visible()[FIRST] == array.tobytes()

    @pytest.mark.parametrize("announced", [5, 7])
    def test_a_file_of_another_size_than_announced_is_an_error(self, announced: int) -> None:
        """The plan promised the size: anything else means that the bytes are wrong."""
        sink = self.started()
        with pytest.raises(MsoError, match=rf"second.*{announced}.*got 6"), sink.open("second", announced) as file:
            file.write(b"second")
        assert dict(sink.entries) == {}
        sink.close()

    def test_a_file_given_up_halfway_does_not_count_and_can_be_written_again(self) -> None:
        """An error between two appends leaves nothing that looks complete."""
        sink = self.started()
        with pytest.raises(KeyError):
            give_up(sink, SECOND, KeyError(SECOND))
        assert dict(sink.entries) == {}
        put(sink, *FILES)
        sink.commit(self.manifest(sink))
        assert self.visible()[SECOND] == FILES[SECOND]

    def test_a_second_run_finds_entries_and_notes(self) -> None:
        """What one run completed and noted is there for the next one of the same job."""
        sink = self.started()
        put(sink, FIRST, NESTED)
        sink.note("layers.0.gate_up_proj", 0.25)
        sink.note("layers.1.gate_up_proj", 1e-30)
        before = dict(sink.entries)
        sink.close()
        sink = self.started()
        assert dict(sink.entries) == before
        assert set(before) == {FIRST, NESTED}
        assert dict(sink.notes) == {"layers.0.gate_up_proj": 0.25, "layers.1.gate_up_proj": 1e-30}
        put(sink, SECOND, EMPTY)
        sink.commit(self.manifest(sink))
        assert {name: self.visible()[name] for name in FILES} == FILES

    def test_a_file_planned_with_another_size_is_not_kept(self) -> None:
        """An entry counts only where it is what the plan wants."""
        sink = self.started()
        put(sink, FIRST, SECOND)
        sink.close()
        sink = self.open()
        sink.begin(JOB, {**SIZES, SECOND: SIZES[SECOND] + 1})
        assert set(sink.entries) == {FIRST}
        sink.close()

    def test_an_unfinished_run_of_another_job_is_refused(self) -> None:
        """Two jobs never mix; the message names both."""
        sink = self.started()
        put(sink, FIRST)
        sink.close()
        second = self.open()
        with pytest.raises(ResumeError, match=f"{JOB[:12]}.*{OTHER_JOB[:12]}"):
            second.begin(OTHER_JOB, SIZES)
        second.close()
        sink = self.started()
        assert set(sink.entries) == {FIRST}
        sink.close()

    def test_a_finished_run_of_another_job_is_refused(self) -> None:
        """A finished checkpoint is not overwritten by accident."""
        sink = self.started()
        put(sink, *FILES)
        sink.commit(self.manifest(sink))
        sink.close()
        before = self.visible()
        second = self.open()
        with pytest.raises(MsoError, match=f"{JOB[:12]}.*{OTHER_JOB[:12]}"):
            second.begin(OTHER_JOB, SIZES)
        second.close()
        assert self.visible() == before

    def test_only_what_an_earlier_run_finished_is_found_finished(self) -> None:
        """Not what this run finishes, nor what is half done."""
        sink = self.open()
        assert not sink.finished
        for names in ((FIRST,), (SECOND, NESTED, EMPTY)):
            sink.begin(JOB, SIZES)
            assert not sink.finished
            put(sink, *names)
            sink.close()
        sink.begin(JOB, SIZES)
        sink.commit(self.manifest(sink))
        assert not sink.finished
        sink.close()

    def test_the_guard_lets_a_source_pass_that_is_nowhere_near(self) -> None:
        """And one that is on no Hub."""
        sink = self.open()
        for origin in (None, Origin("https://example.org", "org/name", "0" * 40, gated=True)):
            sink.guard(origin)
        sink.begin(JOB, SIZES)
        sink.close()

    def test_commit_is_idempotent(self) -> None:
        """A run that finds everything done commits again, and nothing changes."""
        sink = self.started()
        put(sink, *FILES)
        entries, manifest = dict(sink.entries), self.manifest(sink)
        sink.commit(manifest)
        sink.close()
        before = self.visible()
        sink = self.started()
        assert sink.finished
        assert dict(sink.entries) == entries
        sink.commit(manifest)
        sink.commit(manifest)
        sink.close()
        assert self.visible() == before

    def test_close_may_be_called_at_any_time(self) -> None:
        """Before begin, twice, and after commit."""
        sink = self.open()
        sink.close()
        sink.begin(JOB, SIZES)
        put(sink, *FILES)
        sink.close()
        sink.close()
        sink.begin(JOB, SIZES)
        sink.commit(self.manifest(sink))
        sink.close()
        assert set(self.visible()) == {*FILES, "mso_hub.json"}


def total(sizes: Mapping[str, int]) -> int:
    """Bytes of all files."""
    return sum(sizes.values())
