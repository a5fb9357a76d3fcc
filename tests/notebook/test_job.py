"""A Job in a plain Python: what it reads and writes and when, that it goes on, and what it refuses."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import disable_progress_bars

import mso_hub
from mso_hub.cli.options import hub_target
from mso_hub.errors import MsoError, PlanError, RecipeError, SinkError, VerifyError
from mso_hub.hub import Client
from mso_hub.hub.devhub import DevHub
from mso_hub.hub.devhub.seed import connect, seed
from mso_hub.hub.search import search_models
from mso_hub.notebook.plan import bits_per_weight, duration
from mso_hub.notebook.settings import read_settings
from mso_hub.notebook.track import Snapshot, Track
from mso_hub.plan import Recipe
from tests.helpers import tiny_llama, tiny_moe, write_files
from tests.hubs import multimodal
from tests.running import digests, journal, listing, staging


class Seen:
    """A view that remembers what it was asked to draw."""

    def __init__(self) -> None:
        self.snapshots: list[Snapshot] = []

    def draw(self, snapshot: Snapshot, *, last: bool = False) -> None:
        self.snapshots.append(snapshot)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MoE in four shards."""
    return tiny_moe(tmp_path_factory.mktemp("job") / "in", layers=3, experts=8, shards=4)


@pytest.fixture(scope="module")
def wanted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What convert() makes of it."""
    out = tmp_path_factory.mktemp("direct") / "out"
    mso_hub.convert(source, out, Recipe())
    return digests(out)


@pytest.fixture(scope="module")
def client(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A Hub that holds the MoE as dev/moe."""
    disable_progress_bars()
    folder = tmp_path_factory.mktemp("hub")
    with DevHub(folder) as server, pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the client's own, about its LFS requests
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        patch.setenv("MSO_HUB_CACHE", str(folder / "cache"))
        found = connect(server)
        seed(found, "dev/moe", source)
        yield found


def quiet(source: object, target: object, **more: Any) -> mso_hub.Job:
    return mso_hub.Job(str(source), str(target), progress="none", **more)


# --- before a run -------------------------------------------------------------------------------------


def test_making_a_job_reads_nothing() -> None:
    """Neither end has to exist: a cell that only makes it is instant."""
    job = quiet("/nowhere/at/all", "/nowhere/else")
    assert repr(job) == "Job('/nowhere/at/all' -> '/nowhere/else')"
    assert not job.paused
    with pytest.raises(MsoError, match="/nowhere/at/all: the input must be a folder"):
        job.plan  # noqa: B018 - asking for it is the test


def test_a_plan_is_made_once_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    job = quiet(source, tmp_path / "out")
    plan = job.plan
    assert isinstance(plan, mso_hub.Plan)
    assert plan is job.plan
    assert plan.job == mso_hub.make_plan(source, Recipe()).job
    assert listing(tmp_path) == []


def test_what_is_shown_is_complete_and_narrow(source: Path, tmp_path: Path) -> None:
    job = quiet(source, tmp_path / "out")
    bundle = job._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"}
    text = bundle["text/plain"]
    assert str(job) == text
    for lines in (text, job.plan._repr_mimebundle_()["text/plain"]):
        assert max(map(len, lines.split("\n"))) <= 80
    flat = re.sub(r"\s+", "", text)
    for kind in ("gate_proj", "up_proj", "down_proj"):
        assert f"model.layers.N.mlp.experts.N.{kind}" in flat
    for word in ("before", "after", "bits", "router or gate", "time", "memory", "vllm serve", "gate_up_proj"):
        assert word in text
        assert word in bundle["text/html"]
    assert listing(tmp_path) == []


def test_bits_count_scales_too(source: Path) -> None:
    """NVFP4: 4 bits, 8 bits for each 16 numbers, and a scale of 32 bits for a weight of 32 x 64."""
    changed, whole = bits_per_weight(mso_hub.make_plan(source, Recipe()))
    assert changed == pytest.approx(4.5 + 32 / (32 * 64))
    assert changed < whole < 16


def test_the_estimate_is_of_this_checkpoint(source: Path) -> None:
    """It comes from bytes that were read, grows with the budget that was asked for, and is measured once."""
    job = quiet(source, "out", memory=1 << 26, workers=1)
    found = job.estimate
    assert found is job.estimate
    assert 0 < found.sampled < job.plan.read_bytes
    assert found.read > 0
    assert found.encode > 0
    assert (found.threads, found.budget) == (1, 1 << 26)
    assert found.now > 10_000_000


def test_nothing_to_encode_is_estimated_too(tmp_path: Path) -> None:
    """Text extracted from a multimodal model is only copied: reading takes time, and nothing is encoded."""
    where = write_files(tmp_path / "in", multimodal())
    found = quiet(where, tmp_path / "out", scheme="bf16", text_only=True).estimate
    assert found.sampled > 0
    assert found.read > 0
    assert found.encode == 0


def test_durations() -> None:
    words = [duration(s) for s in (0.2, 1, 59.4, 61, 3599, 7500)]
    assert words == ["less than 1 s", "1 s", "59 s", "1 min 1 s", "59 min 59 s", "2 h 5 min"]


# --- running ------------------------------------------------------------------------------------------


def test_a_run_makes_what_convert_makes_and_only_once(
    source: Path, tmp_path: Path, wanted: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    job = quiet(source, out)
    job.run()
    assert "done: 72 weights" in capsys.readouterr().err
    assert digests(out) == wanted
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    job.run()
    quiet(source, out).run()
    assert capsys.readouterr().err.count("was complete already, nothing was") == 2
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert (job.where, job.paused) == (str(out), False)


class Stopping(Seen):
    """Presses pause when so many shards are stored."""

    def __init__(self, job: mso_hub.Job, shards: int) -> None:
        super().__init__()
        self.job, self.shards = job, shards


def test_a_pause_keeps_what_is_complete(
    source: Path, tmp_path: Path, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread asks for it while the run is between two events; a new Job goes on."""
    out = tmp_path / "out"
    job = quiet(source, out)
    job.plan  # noqa: B018 - made before the listener below is put in

    def pause_at_a_shard(self: Track, event: Any) -> None:
        if isinstance(event, mso_hub.events.ShardDone):
            other = threading.Thread(target=job.pause)
            other.start()
            other.join()
        note(self, event)

    note = Track.__call__
    monkeypatch.setattr(Track, "__call__", pause_at_a_shard)
    job.run(Seen())
    assert job.paused
    assert staging(out).is_dir()
    assert journal(out).read_text().count('"file"') >= 1
    assert not out.exists()
    monkeypatch.undo()
    view = Seen()
    again = quiet(source, out)
    again.run(view)
    assert not again.paused
    assert view.snapshots[-1].state == "done"
    assert digests(out) == wanted
    assert listing(tmp_path) == ["out"]


def test_a_pause_before_and_after_a_run_is_no_error(source: Path, tmp_path: Path, wanted: dict[str, str]) -> None:
    job = quiet(source, tmp_path / "out")
    job.pause()
    job.run()
    job.pause()
    job.run()
    assert digests(tmp_path / "out") == wanted


def test_one_job_runs_once_at_a_time(source: Path, tmp_path: Path) -> None:
    job = quiet(source, tmp_path / "out")
    with job._turn, pytest.raises(RecipeError, match="is running already; wait for it, or pause it"):
        job.run()


def test_a_source_that_changed_since_the_plan_is_refused(tmp_path: Path) -> None:
    """What was looked at is what is run."""
    where, out = tiny_llama(tmp_path / "in"), tmp_path / "out"
    job = quiet(where, out)
    job.plan  # noqa: B018 - asking for it is the test
    tiny_llama(where, layers=3)
    with pytest.raises(RecipeError, match="changed since the plan was made"):
        job.run()
    assert listing(tmp_path) == ["in"]


def test_another_jobs_output_is_not_touched_and_not_reported(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quiet(source, out).run()
    before = digests(out)
    other = quiet(source, out, scheme="fp8_dynamic")
    with pytest.raises(SinkError, match="holds a finished run with another source or other settings"):
        other.run()
    with pytest.raises(VerifyError, match=r"holds the output of job \w+, this one is \w+; call job.run\(\) first"):
        other.report  # noqa: B018 - asking for it is the test
    assert digests(out) == before
    quiet(source, out, scheme="fp8_dynamic", fresh=True).run()
    assert digests(out) != before


# --- words --------------------------------------------------------------------------------------------


def test_the_words_are_those_of_recipe(source: Path) -> None:
    job = quiet(source, "out", scheme="nvfp4", layout="modelopt", targets="*.down_proj", skip_layers=[0])
    assert job.recipe == Recipe(layout="modelopt", targets=("*.down_proj",), skip_layers=(0,))
    assert quiet(source, "out").recipe == Recipe()
    given = Recipe(mode="all-linear")
    assert quiet(source, "out", recipe=given).recipe is given


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"layuot": "modelopt"}, "layuot: Job has no such setting; did you mean layout?"),
        ({"quux": 1}, "quux: Job has no such setting; it takes scheme, layout"),
        ({"scheme": "nvfp5"}, "format must be one of"),
        ({"layout": "gguf"}, "layout must be one of"),
        ({"scheme": "nvfp4", "recipe": "x.toml"}, "contradict each other; keep one"),
        ({"recipe": Recipe(), "layout": "modelopt"}, "recipe is a Recipe and says layout itself"),
        ({"private": True}, "private: is for a repo on the Hub, out is a folder"),
        ({"base_model": "a/b"}, "base_model: is for a repo on the Hub"),
        ({"progress": "bar"}, "progress must be one of"),
    ],
)
def test_wrong_words_are_refused_where_they_are_typed(words: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        mso_hub.Job("in", "out", **words)


def test_a_plan_that_cannot_be_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    job = quiet(source, tmp_path / "out", ignore=["no.such.module"])
    with pytest.raises((PlanError, RecipeError), match=r"no\.such\.module"):
        job.run()
    assert listing(tmp_path) == []


def test_a_repo_is_written_to_as_the_command_line_does() -> None:
    """Same title: a pull request that one of them opened is continued by the other."""
    recipe = Recipe()
    options: dict[str, Any] = {"private": True, "branch": "b", "create_pr": False, "journal_branch": None}
    for source in ("hf://org/model@main", "/some/folder"):
        ours = read_settings(None, None, options).target(source, "hf://me/out", recipe)
        more = {"input_dir": source, "output_dir": "hf://me/out", "base_model": None}
        assert ours == hub_target({**options, **more}, recipe)


def test_the_line_that_serves_it(source: Path) -> None:
    assert quiet(source, "some out").serve == "vllm serve 'some out'"
    assert quiet(source, "hf://me/out").serve == "vllm serve me/out"
    assert quiet(source, "hf://me/out", branch="nvfp4").serve == "vllm serve me/out --revision nvfp4"
    cached = quiet(source, "out", kv_cache=True)
    assert cached.serve == "vllm serve out --kv-cache-dtype fp8"


def test_what_a_gpu_makes_of_it(source: Path, tmp_path: Path) -> None:
    job = quiet(source, tmp_path / "out", mode="all-linear")
    with pytest.raises(VerifyError, match="there is no output yet"):
        job.serve_on("H100")
    job.run()
    assert job.serve_on("H100").command.startswith(f"vllm serve {tmp_path / 'out'} --tensor-parallel-size ")


# --- on a Hub -----------------------------------------------------------------------------------------


def test_from_repo_to_repo(client: Client, wanted: dict[str, str]) -> None:
    """Planned, run, run again, reported; a new Job reports without a run of its own."""
    words: dict[str, Any] = {"client": client}
    job = quiet("hf://dev/moe", "hf://dev/moe-NVFP4", **words)
    assert not client.api.repo_exists("dev/moe-NVFP4")
    job.run()
    head = client.api.model_info("dev/moe-NVFP4").sha
    job.run()
    assert client.api.model_info("dev/moe-NVFP4").sha == head
    assert job.where == f"{client.endpoint}/dev/moe-NVFP4"
    shards = {n: d for n, d in wanted.items() if n.endswith(".safetensors")}
    paths = client.api.get_paths_info("dev/moe-NVFP4", list(shards))
    assert {p.path: p.lfs.sha256 for p in paths} == shards  # type: ignore[union-attr]
    report = quiet("hf://dev/moe", "hf://dev/moe-NVFP4", **words).report
    assert report.ok
    assert len(report.errors) == 72
    assert report.link == job.where
    assert job.serve == "vllm serve dev/moe-NVFP4"


def test_a_branch_is_reported_from_the_branch(client: Client) -> None:
    job = quiet("hf://dev/moe", "hf://dev/branched", client=client, branch="eight", scheme="fp8_dynamic")
    job.run()
    assert job.where.endswith("/dev/branched/tree/eight")
    again = quiet("hf://dev/moe", "hf://dev/branched", client=client, branch="eight", scheme="fp8_dynamic")
    assert again.report.ok
    assert again.report.link == job.where


def test_a_client_that_was_given_gets_its_listener_back(client: Client, tmp_path: Path) -> None:
    before = client.on_event
    quiet("hf://dev/moe", tmp_path / "out", client=client).run()
    assert client.on_event is before


def test_repos_are_found_by_words_of_their_name(client: Client) -> None:
    assert "dev/moe" in search_models(client, "moe")
    assert search_models(client, "no-such-name-anywhere") == []
    assert len(search_models(client, "", most=1)) == 1
