"""Statistics of a repo on a Hub: made from it, used for it and for a copy of it, refused for another commit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mso_hub.calibrate.statistics import read_statistics
from tests.helpers import write_files
from tests.hubs import World, world

TRAINED = Path(__file__).resolve().parents[1] / "models" / "tiny-qwen3-moe"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A Hub with plain LFS."""
    with world(tmp_path_factory.mktemp("hub"), xet=False) as found:
        yield found


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """The small trained model."""
    return {path.name: path.read_bytes() for path in sorted(TRAINED.iterdir())}


def test_statistics_belong_to_a_commit(place: World, files: dict[str, bytes], tmp_path: Path) -> None:
    """A new card or a download changes nothing; another weight is another model, and both commits are named."""
    repo, text, path = place.name("in"), tmp_path / "text.txt", tmp_path / "stats"
    text.write_text("\n\n".join(f"what a function takes and returns is said in document {n}" * 3 for n in range(99)))
    first = place.head(place.put(files, repo))
    source = f"hf://{repo}"
    words = ["--input_dir", source, "--calib_dataset", text, "--calib_size", 2, "--max_seq_len", 64]
    done = place.run("calibrate", *words, "--output", path, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    made = read_statistics(path).provenance
    assert (made.source, made.commit) == (repo, first)

    place.put({"README.md": b"# A better card\n"}, repo)
    assert place.run("plan", source, "--stats", path).returncode == 0
    copy = write_files(tmp_path / "copy", files)
    assert place.run("plan", copy, "--stats", path).returncode == 0

    other = files["config.json"].replace(b'"rope_theta": 10000', b'"rope_theta": 20000')
    place.put({"config.json": other}, repo)
    refused = place.run("plan", source, "--stats", path)
    assert refused.returncode == 2
    assert f"these are statistics of {repo} at commit {first[:12]}, not of {repo} at commit" in refused.stderr
    assert place.run("plan", f"{source}@{first}", "--stats", path).returncode == 0


def test_from_hub_to_hub_in_one_command(place: World, files: dict[str, bytes], tmp_path: Path) -> None:
    """Statistics lie in the cache; card and manifest name text and commit; repeated, nothing is done twice."""
    repo, out, text = place.name("in"), place.name("out"), tmp_path / "text.txt"
    text.write_text("\n\n".join(f"what a function takes and returns is said in document {n}" * 3 for n in range(99)))
    commit = place.head(place.put(files, repo))
    words = ["--input_dir", f"hf://{repo}", "--output_dir", f"hf://{out}", "--calibrate", "--calib_dataset", text]
    words += ["--calib_size", 2, "--max_seq_len", 64, "--progress", "json"]
    done = place.run("quantize", *words)
    assert done.returncode == 0, done.stderr
    said = json.loads(place.content(out, "mso_hub.json"))["calibration"]
    assert (said["source"], said["commit"], said["tokens"]) == (repo, commit, 128)
    card = place.content(out, "README.md").decode()
    assert "measured over 128 tokens in 2 rows of" in card
    assert f"on the model at commit {commit[:12]}" in card
    (kept,) = (place.home("one") / "cache" / "mso_hub" / "statistics").iterdir()
    assert read_statistics(kept).provenance.commit == commit
    again = place.run("quantize", *words)
    assert again.returncode == 0, again.stderr
    assert "LayerDone" not in again.stdout
    assert "TensorDone" not in again.stdout
