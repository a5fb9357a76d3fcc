"""A walk over text -> statistics: what the whole model shows, also when the run was cut, killed or started anew."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mso_hub.calibrate.collect import collect_statistics
from mso_hub.calibrate.collector import Collector
from mso_hub.calibrate.statistics import Statistics, partial_folder, read_statistics
from mso_hub.calibrate.text import Rows
from mso_hub.calibrate.walk import Observer, Walk
from mso_hub.errors import MsoError, NonFiniteError, RecipeError, ResumeError, SinkError
from mso_hub.events import BatchDone, Calibrated, Calibrating, Event, LayerDone, Listener, ignore
from mso_hub.source import open_source
from tests.calibrate.architectures import ARCHITECTURES, save
from tests.calibrate.reference import run_whole
from tests.calibrate.statistics import rows_of
from tests.helpers import tensors_of
from tests.running import digests, sha256, small_disk

MODEL = "qwen3_moe"
ROWS = rows_of(5, 24, 80)
"""Three batches: two of two rows, one of one."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of six experts, in BF16."""
    return save(MODEL, tmp_path_factory.mktemp("collect") / "model", torch.bfloat16)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of a run that nothing disturbed."""
    path = tmp_path_factory.mktemp("whole") / "stats"
    collect_statistics(model, ROWS, path, channels=True)
    return path


class Stop(KeyboardInterrupt):
    """What a person types."""


def until(kind: type[Event], number: int) -> Listener:
    """A listener that stops the run at the nth event of a kind."""
    seen: list[Event] = []

    def listen(event: Event) -> None:
        seen.extend([event] if isinstance(event, kind) else [])
        if len(seen) == number:
            raise Stop

    return listen


def heard(events: list[Event], kind: type[Event]) -> list[Event]:
    return [event for event in events if isinstance(event, kind)]


# ------------------------------------------------------------------------------------------------------ what it holds


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma3n", "gpt_oss"])
def test_statistics_are_what_the_whole_model_shows(name: str, tmp_path: Path) -> None:
    """Largest magnitude and number of tokens of every linear and every expert's linear, to the last bit."""
    folder = save(name, tmp_path / "model", torch.bfloat16)
    batches = [torch.from_numpy(batch) for batch in ROWS.batches()]
    truth = run_whole(folder, ARCHITECTURES[name].model, batches, torch.bfloat16, None)
    found = collect_statistics(folder, ROWS, tmp_path / "stats")
    for module in truth.amax.keys() & found.amax.keys() - {"lm_head"}:
        assert (found.amax[module], found.tokens[module]) == (truth.amax[module], truth.tokens[module]), module
    assert len(truth.amax.keys() & found.amax.keys()) > 20
    seen = {module for module, tokens in found.tokens.items() if tokens}
    assert seen - {"lm_head"} <= truth.amax.keys()
    assert {found.tokens["lm_head"]} == {ROWS.tokens}
    assert len(found.caches) >= 2
    assert not partial_folder(tmp_path / "stats").exists()


def test_modules_that_saw_nothing_are_in_the_file_too(model: Path, tmp_path: Path) -> None:
    """Two tokens reach at most four of a layer's six experts; the second of the three layers has none."""
    found = collect_statistics(model, rows_of(1, 2, 80), tmp_path / "stats")
    experts = {module: tokens for module, tokens in found.tokens.items() if ".experts." in module}
    assert len(experts) == 2 * 6 * 3
    unseen = [module for module, tokens in experts.items() if not tokens]
    assert len(unseen) >= 2 * 2 * 3
    assert {found.amax[module] for module in unseen} == {0.0}


class Inputs(Observer):
    """Every input there is."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Tensor]] = {}

    def inputs(self, module: str, x: Tensor) -> Tensor:
        self.seen.setdefault(module, []).append(x.reshape(-1, x.shape[-1]).double())
        return x


def test_columns_have_magnitudes_and_second_moments(model: Path, whole: Path) -> None:
    """Against all inputs kept at once and averaged in double precision."""
    walk, every = Walk(open_source(model)), Inputs()
    walk.run([torch.from_numpy(batch) for batch in ROWS.batches()], every)
    found = read_statistics(whole)
    for module, blocks in every.seen.items():
        x = torch.cat(blocks)
        columns = found.vector(module, "input_channel_amax")
        assert np.array_equal(columns, x.abs().amax(0).float().numpy())
        assert columns.max() == np.float32(found.amax[module])
        moments = found.vector(module, "input_second_moment")
        np.testing.assert_allclose(moments, x.square().mean(0).numpy(), rtol=1e-6)
    assert {name.rpartition(".")[0] for name in found.vectors} == set(every.seen)


def test_two_devices_find_the_same(model: Path, whole: Path, tmp_path: Path) -> None:
    """Batches are shared out; which one comes first is left to chance, a maximum and a count are not."""
    found = collect_statistics(model, ROWS, tmp_path / "stats", device=("cpu", "cpu"))
    one = read_statistics(whole)
    assert (found.amax, found.tokens, found.caches) == (one.amax, one.tokens, one.caches)


def test_an_input_changed_in_place_between_two_readers_is_measured_twice() -> None:
    """q, k and v share a tensor that is measured once; the same object with other numbers is another input."""
    found: dict[str, float] = {}
    collector = Collector(lambda _, seen, caches: found.update({name: one.amax for name, one in seen.items()}))
    x = torch.ones(2, 4)
    collector.inputs("q", x)
    collector.inputs("k", x)
    x.mul_(3)
    collector.inputs("o", x)
    collector.flush(0)
    assert found == {"q": 1.0, "k": 1.0, "o": 3.0}


def test_infinity_while_the_model_runs_names_the_module(model: Path, tmp_path: Path) -> None:
    """A scale made of it would be nonsense; what follows it would be too."""
    folder = tmp_path / "broken"
    tensors = tensors_of(model)
    tensors["model.layers.1.mlp.up_proj.weight"][:] = float("inf")
    folder.mkdir()
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.down_proj: its input holds NaN or infinity"):
        collect_statistics(folder, ROWS, tmp_path / "stats")


def test_events_tell_how_far_it_is(model: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    found = collect_statistics(model, ROWS, tmp_path / "stats", on_event=events.append)
    assert events[0] == Calibrating("random ids", ROWS.tokens, 3, 0)
    assert events[-1] == Calibrated(str(tmp_path / "stats"), len(found.amax))
    batches = [event.tokens for event in events if isinstance(event, BatchDone)]
    assert batches == [48, 48, 24] * 3
    assert [event.index for event in events if isinstance(event, LayerDone)] == [0, 1, 2]


# --------------------------------------------------------------------------------------------------- cut, killed, anew


@pytest.mark.parametrize(("kind", "number", "done"), [
    (BatchDone, 2, 0), (LayerDone, 1, 1), (BatchDone, 5, 1), (LayerDone, 2, 2), (LayerDone, 3, 3),
])  # fmt: skip
def test_a_run_that_was_stopped_anywhere_ends_with_the_same_bytes(
    kind: type[Event], number: int, done: int, model: Path, whole: Path, tmp_path: Path
) -> None:
    """In a layer, between two, after the last; complete layers are not run again."""
    path = tmp_path / "stats"
    with pytest.raises(Stop):
        collect_statistics(model, ROWS, path, channels=True, on_event=until(kind, number))
    assert not path.exists()
    with pytest.raises(RecipeError, match="the calibration is not complete"):
        read_statistics(path)
    events: list[Event] = []
    collect_statistics(model, ROWS, path, channels=True, on_event=events.append)
    assert events[0] == Calibrating("random ids", ROWS.tokens, 3, done)
    assert len(heard(events, LayerDone)) == 3 - done
    assert path.read_bytes() == whole.read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["stats"]


PROGRAM = """
import json, sys
from dataclasses import asdict
from mso_hub.calibrate.collect import collect_statistics
from tests.calibrate.statistics import rows_of

def tell(event):
    print(json.dumps({"event": type(event).__name__}), flush=True)

collect_statistics(sys.argv[1], rows_of(5, 24, 80), sys.argv[2], channels=True, on_event=tell)
"""


@contextmanager
def running(model: Path, path: Path) -> Iterator[subprocess.Popen[str]]:
    """A calibration in a process of its own."""
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(model), str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("event", "number"), [("BatchDone", 5), ("LayerDone", 2)])
def test_kill_9_loses_the_layer_in_hand_and_nothing_else(
    event: str, number: int, model: Path, whole: Path, tmp_path: Path
) -> None:
    """A real process, really killed; the next one ends with the bytes of a run that was not."""
    path = tmp_path / "stats"
    with running(model, path) as process:
        assert process.stdout is not None
        for _ in range(number):
            while f'"{event}"' not in (line := process.stdout.readline()):
                assert line, "it ended before it was killed"
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert not path.exists()
    events: list[Event] = []
    collect_statistics(model, ROWS, path, channels=True, on_event=events.append)
    assert isinstance(events[0], Calibrating)
    assert events[0].done >= 1
    assert path.read_bytes() == whole.read_bytes()
    assert not partial_folder(path).exists()


def test_a_second_process_is_kept_out(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "stats"
    partial_folder(path).mkdir()
    with (partial_folder(path) / "lock").open("w") as lock:
        flock(lock, LOCK_EX)
        with pytest.raises(ResumeError, match="another process calibrates there; wait for it, or end it"):
            collect_statistics(model, ROWS, path)


def _other_text(model: Path, tmp_path: Path) -> tuple[Path, Rows, str]:
    return model, rows_of(5, 24, 80, seed=1), "sha256 was"


def _other_length(model: Path, tmp_path: Path) -> tuple[Path, Rows, str]:
    return model, rows_of(4, 24, 80), "rows was 5, is 4"


def _other_batches(model: Path, tmp_path: Path) -> tuple[Path, Rows, str]:
    return model, rows_of(5, 24, 80, batch_size=3), "settings was attention of the model, experts expert, batches of 2"


def _other_model(model: Path, tmp_path: Path) -> tuple[Path, Rows, str]:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.experts.3.up_proj.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder, ROWS, "identity was"


OTHERS = (_other_text, _other_length, _other_batches, _other_model)


@pytest.mark.parametrize("other", OTHERS)
def test_unfinished_work_of_another_job_is_not_gone_on_with(
    other: Callable[[Path, Path], tuple[Path, Rows, str]], model: Path, tmp_path: Path
) -> None:
    """Named is what differs; --fresh discards it."""
    path = tmp_path / "stats"
    with pytest.raises(Stop):
        collect_statistics(model, ROWS, path, on_event=until(LayerDone, 1))
    before = digests(partial_folder(path))
    source, rows, message = other(model, tmp_path)
    with pytest.raises(ResumeError, match=message):
        collect_statistics(source, rows, path)
    assert digests(partial_folder(path)) == before
    found = collect_statistics(source, rows, path, fresh=True)
    assert found.provenance.sha256 == rows.sha256
    assert not partial_folder(path).exists()


@pytest.mark.parametrize("other", OTHERS)
def test_finished_statistics_of_another_job_are_not_replaced(
    other: Callable[[Path, Path], tuple[Path, Rows, str]], model: Path, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "stats"
    path.write_bytes(whole.read_bytes())
    source, rows, message = other(model, tmp_path)
    with pytest.raises(RecipeError, match=f"{message}.*or replace it with --fresh"):
        collect_statistics(source, rows, path, channels=True)
    assert sha256(path.read_bytes()) == sha256(whole.read_bytes())


def test_finished_statistics_of_the_same_job_are_taken_as_they_are(model: Path, whole: Path, tmp_path: Path) -> None:
    """And what a crash right before the end has left is removed."""
    path = tmp_path / "stats"
    with pytest.raises(Stop):
        collect_statistics(model, ROWS, path, channels=True, on_event=until(LayerDone, 3))
    path.write_bytes(whole.read_bytes())
    events: list[Event] = []
    found = collect_statistics(model, ROWS, path, channels=True, on_event=events.append)
    assert [type(event) for event in events] == [Calibrated]
    assert isinstance(found, Statistics)
    assert [entry.name for entry in tmp_path.iterdir()] == ["stats"]


@pytest.mark.parametrize("damage", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_job_file_that_is_none_is_named(damage: bytes, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "stats"
    partial_folder(path).mkdir()
    (partial_folder(path) / "job.json").write_bytes(damage)
    with pytest.raises(ResumeError, match=r"job\.json: not written by this tool; discard it with --fresh"):
        collect_statistics(model, ROWS, path)


def test_damaged_statistics_of_a_layer_are_noticed_at_the_end(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "stats"
    with pytest.raises(Stop):
        collect_statistics(model, ROWS, path, on_event=until(LayerDone, 2))
    part = partial_folder(path) / "layer-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-3])
    with pytest.raises(MsoError, match="layer-00000"):
        collect_statistics(model, ROWS, path)
    collect_statistics(model, ROWS, path, fresh=True)


def test_nobody_elses_folder_is_removed(model: Path, tmp_path: Path) -> None:
    """FILE.partial may be anything; only what this tool made goes."""
    path = tmp_path / "stats"
    partial_folder(path).mkdir()
    (partial_folder(path) / "diary.txt").write_text("mine")
    with pytest.raises(ResumeError, match=r"holds files that are not of a calibration: diary\.txt; move them away"):
        collect_statistics(model, ROWS, path, fresh=True)
    assert (partial_folder(path) / "diary.txt").read_text() == "mine"


# ---------------------------------------------------------------------------------------------- before hours of work


def test_modules_that_would_get_nothing_are_named_before_the_first_layer(model: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    needs = ("model.layers.0.self_attn.q_proj", "mtp.fc", "mtp.layers.0.mlp.up_proj")
    with pytest.raises(
        RecipeError, match=r"mtp\.fc: would get no statistics, nor would 1 others: .*--input_scale 1\.0"
    ):
        collect_statistics(model, ROWS, tmp_path / "stats", needs=needs, on_event=events.append)
    assert not events
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_is_named_first(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no/stats: statistics need the name of a file.*found no folder"):
        collect_statistics(model, ROWS, tmp_path / "no" / "stats")
    with pytest.raises(RecipeError, match="found a folder"):
        collect_statistics(model, ROWS, tmp_path)


def test_a_disk_that_is_too_small_is_named_before_the_first_layer(model: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        with pytest.raises(SinkError, match=r"needs about [\d,]+ bytes to go on after every layer, [\d,]+ are free"):
            collect_statistics(model, ROWS, disk / "stats")
        assert collect_statistics(model, ROWS, tmp_path / "stats", on_event=ignore).amax


def test_ids_beyond_the_embedding_are_refused(model: Path, tmp_path: Path) -> None:
    """The tokenizer of another model."""
    with pytest.raises(RecipeError, match="the model's embedding has 96 rows; take the tokenizer that belongs to"):
        collect_statistics(model, rows_of(2, 8, 500), tmp_path / "stats")
