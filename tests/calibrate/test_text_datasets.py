"""Data sets through the real `datasets`: files, folders, streams, and a Hub on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mso_hub.calibrate.text import DataSet
from mso_hub.errors import RecipeError
from tests.calibrate.texts import numbers, read, sentence, write_jsonl
from tests.hubs import World, world

ROWS = [{"text": sentence(n), "n": n} for n in range(200)]


@pytest.fixture(autouse=True)
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, quiet while files are made, with a cache of this test's own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield datasets
    datasets.enable_progress_bars()


def in_every_form(library: Any, folder: Path) -> dict[str, Path]:
    """The same rows as each kind of data set that is read."""
    made = library.Dataset.from_list(ROWS)
    parquet, arrow, saved, both, files = (folder / n for n in ("a.parquet", "a.arrow", "saved", "both", "files"))
    made.to_parquet(parquet)
    made.save_to_disk(saved)
    arrow.write_bytes(next(saved.glob("*.arrow")).read_bytes())
    library.DatasetDict({"train": made, "test": made.select(range(30))}).save_to_disk(both)
    files.mkdir()
    made.to_parquet(files / "train-00000-of-00001.parquet")
    made.select(range(30)).to_parquet(files / "test-00000-of-00001.parquet")
    lines = folder / "lines"
    lines.mkdir()
    (folder / "a.json").write_text(json.dumps(ROWS))
    made.to_csv(folder / "a.csv")
    return {
        "jsonl": write_jsonl(folder / "a.jsonl", ROWS), "parquet": parquet, "arrow": arrow, "csv": folder / "a.csv",
        "json": folder / "a.json", "saved": saved, "saved splits": both, "folder": files,
        "folder of lines": write_jsonl(lines / "train.jsonl", ROWS).parent,
    }  # fmt: skip


def test_the_same_rows_give_the_same_text_whatever_they_lie_in(library: Any, tmp_path: Path) -> None:
    found = {kind: read(path) for kind, path in in_every_form(library, tmp_path).items()}
    assert {rows.ids.shape for rows in found.values()} == {(20, 64)}
    assert {kind: rows.sha256 for kind, rows in found.items()} == dict.fromkeys(found, found["jsonl"].sha256)
    assert found["parquet"].name == str(tmp_path / "a.parquet")


def test_a_stream_gives_the_same_text_every_time_and_writes_no_cache(library: Any, tmp_path: Path) -> None:
    forms = in_every_form(library, tmp_path)
    started = time.monotonic()
    for kind in ("parquet", "folder", "folder of lines"):
        dataset = DataSet(str(forms[kind]), streaming=True)
        assert read(dataset).sha256 == read(dataset).sha256 != read(dataset, seed=1).sha256
    # Nine times: datasets sleeps for five seconds when its own shuffle is left early.
    assert time.monotonic() - started < 25
    assert not list(tmp_path.glob("cache/**/*.arrow"))


def test_a_stream_of_several_files_takes_rows_from_several(library: Any, tmp_path: Path) -> None:
    for at in range(8):
        made = library.Dataset.from_list([{"text": sentence(1000 * at + n)} for n in range(1500)])
        (tmp_path / "many").mkdir(exist_ok=True)
        made.to_parquet(tmp_path / "many" / f"train-{at}.parquet")
    found = numbers(read(DataSet(str(tmp_path / "many"), streaming=True), packing=False, max_samples=100))
    assert len({number // 1000 for number in found}) >= 4
    assert len(set(found)) == 100


@pytest.mark.parametrize("streaming", [True, False])
def test_splits_and_slices_hold_these_rows(library: Any, tmp_path: Path, streaming: bool) -> None:
    forms = in_every_form(library, tmp_path)
    for kind in ("folder", "saved splits"):
        rows = read(DataSet(str(forms[kind]), split="test[5:25]", streaming=streaming), packing=False)
        assert sorted(numbers(rows)) == list(range(5, 25))
        assert rows.name == f"{forms[kind]} (test[5:25])"
        for split in ("train[:20]", "train[180:]", "train[100:120]"):
            rows = read(DataSet(str(forms[kind]), split=split, streaming=streaming), packing=False)
            first = int(split.partition("[")[2].partition(":")[0] or 0)
            assert sorted(numbers(rows)) == list(range(first, first + 20))


def test_percentages_of_a_split_need_the_whole_data_set(library: Any, tmp_path: Path) -> None:
    forms = in_every_form(library, tmp_path)
    for kind in ("folder", "saved", "parquet"):
        rows = read(DataSet(str(forms[kind]), split="train[90%:]"), packing=False)
        assert sorted(numbers(rows)) == list(range(180, 200))
    with pytest.raises(RecipeError, match="percentages need streaming: false"):
        read(DataSet(str(forms["folder"]), split="train[90%:]", streaming=True))


@pytest.mark.parametrize("kind", ["parquet", "folder", "saved", "saved splits"])
@pytest.mark.parametrize("streaming", [True, False])
def test_a_split_that_is_not_there_is_an_error_that_lists_them(
    library: Any, tmp_path: Path, kind: str, streaming: bool
) -> None:
    path = in_every_form(library, tmp_path)[kind]
    with pytest.raises(RecipeError, match=r"train.*|'validation'") as error:
        read(DataSet(str(path), split="validation", streaming=streaming))
    assert str(error.value).startswith(str(path))
    assert "validation" in str(error.value)


def test_conversations_of_parquet_are_read(library: Any, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": sentence(3)}, {"from": "gpt", "value": "yes"}]
    library.Dataset.from_list([{"conversations": turns, "id": n} for n in range(40)]).to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet").ids.shape == (20, 64)


def test_no_usable_column_is_an_error_that_lists_the_columns(library: Any, tmp_path: Path) -> None:
    library.Dataset.from_list([{"body": "x", "id": 1}]).to_parquet(tmp_path / "a.parquet")
    for streaming in (True, False):
        with pytest.raises(RecipeError, match=r"no usable column .*its columns are: body, id\."):
            read(DataSet(str(tmp_path / "a.parquet"), streaming=streaming))


@pytest.mark.parametrize("streaming", [True, False])
def test_a_broken_file_is_an_error_that_names_it(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(RecipeError, match=r"a\.parquet: cannot be read by datasets: "):
        read(DataSet(str(tmp_path / "a.parquet"), streaming=streaming))


def test_a_data_set_without_rows_is_an_error(library: Any, tmp_path: Path) -> None:
    library.Dataset.from_dict({"text": []}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(RecipeError, match=r"holds no rows|no data"):
        read(tmp_path / "a.parquet")
    with pytest.raises(RecipeError, match="the split holds no documents; take a larger slice"):
        read(DataSet(str(tmp_path / "a.parquet"), streaming=True))


def test_a_script_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text("raise SystemExit(3)")
    with pytest.raises(RecipeError, match="scripts are no longer supported"):
        read(tmp_path / "set")


def test_without_the_package_the_error_says_what_to_install_and_what_needs_none(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for path in (str(tmp_path / "a.parquet"), "org/name"):
        with pytest.raises(RecipeError, match=r"needs the package datasets .*mso-hub\[calibrate\].*python-docs"):
            read(path)


def test_reading_says_nothing_on_the_terminal(tmp_path: Path, library: Any, capfd: pytest.CaptureFixture[str]) -> None:
    forms = in_every_form(library, tmp_path)
    library.enable_progress_bars()
    capfd.readouterr()
    for kind in forms:
        read(forms[kind])
    assert capfd.readouterr() == ("", "")


PROGRAM = """
import itertools, json, sys, time
from mso_hub.calibrate.text import DataSet
from mso_hub.calibrate.text.place import open_dataset
from mso_hub.errors import MsoError
for settings in json.loads(sys.argv[1]):
    started = time.monotonic()
    try:
        opened = open_dataset(DataSet(**settings))
        rows = [row["n"] for row in itertools.islice(opened.rows(0, ("n",), 20), 20)]
        answer = {"name": opened.name, "rows": rows, "notes": opened.notes}
    except MsoError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print("ANSWER", json.dumps({**answer, "seconds": time.monotonic() - started}))
"""


def on_a_machine(site: World, *wanted: dict[str, Any], **more: str) -> list[dict[str, Any]]:
    """Data sets read by a process of its own: `datasets` takes the Hub's address from the environment when loaded."""
    settings = site.settings("reader", **more)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(wanted)], capture_output=True, text=True, check=True, env=settings,
        cwd=site.home("reader"), timeout=120,
    )  # fmt: skip
    return [json.loads(line.removeprefix("ANSWER ")) for line in run.stdout.splitlines() if line.startswith("ANSWER ")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A Hub with the data set dev/talk."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("hub")
    with world(folder, xet=False) as hub:
        made = folder / "files"
        made.mkdir()
        datasets.Dataset.from_list(ROWS).to_parquet(made / "train-00000-of-00001.parquet")
        hub.api.create_repo("dev/talk", repo_type="dataset", private=True)
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the client's own, about its LFS requests
            patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
            hub.api.upload_folder(repo_id="dev/talk", folder_path=made, repo_type="dataset")
        yield hub


def test_a_data_set_on_the_hub_is_read_at_its_commit(site: World) -> None:
    commit = str(site.api.dataset_info("dev/talk").sha)
    one = {"path": "dev/talk"}
    whole, stream, pinned, sliced, absent = on_a_machine(
        site, one, {**one, "streaming": True}, {"path": f"dev/talk@{commit}"}, {**one, "split": "train[:5]"},
        {"path": "dev/absent"},
    )  # fmt: skip
    assert whole["name"] == f"dev/talk (train) at {commit[:12]}"
    assert len(set(whole["rows"])) == len(set(stream["rows"])) == 20
    assert whole["rows"] == pinned["rows"]
    assert sorted(sliced["rows"]) == list(range(5))
    assert whole["notes"] == []
    assert absent["error"] == "HubError"
    assert absent["message"].startswith("data set dev/absent: ")


def test_a_private_data_set_needs_the_token_which_a_dotenv_file_may_hold(site: World) -> None:
    (refused,) = on_a_machine(site, {"path": "dev/talk"}, HF_TOKEN="")
    assert refused["error"] == "HubError"
    note = site.home("reader") / ".env"
    note.write_text(f"HF_TOKEN={site.hub.token()}\n")
    (found,) = on_a_machine(site, {"path": "dev/talk", "streaming": True}, HF_TOKEN="")
    note.unlink()
    assert len(found["rows"]) == 20


def test_an_earlier_download_is_taken_when_the_hub_is_away_and_a_warning_says_so(site: World) -> None:
    cache = str(site.folder / "cache")
    (first,) = on_a_machine(site, {"path": "dev/talk"}, HF_DATASETS_CACHE=cache)
    away = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_DATASETS_CACHE": cache}
    (again,) = on_a_machine(site, {"path": "dev/talk"}, **away)
    assert again["rows"] == first["rows"]
    (warning,) = again["notes"]
    assert "dev/talk: the Hub could not be reached" in warning
    assert "an earlier download of the data set was taken" in warning
    (offline,) = on_a_machine(site, {"path": "dev/talk"}, HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=cache)
    assert "HF_HUB_OFFLINE is set" in offline["notes"][0]


def test_a_hub_that_is_away_is_an_error_within_seconds_that_names_the_built_in_text(site: World) -> None:
    away, other = {"HF_ENDPOINT": "http://127.0.0.1:9"}, {"path": "dev/other", "streaming": True}
    for more in (away, {"HF_HUB_OFFLINE": "1"}):
        (found,) = on_a_machine(site, other, **more)
        assert found["error"] == "TransientError"
        assert "--calib_dataset python-docs" in found["message"]
        assert found["seconds"] < 12
