"""Every notebook in a fresh kernel, offline: run all, again, interrupted, with other parameters, on another Hub."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from mso_hub.hub.devhub import DevHub
from tests.notebook.kernels import NO_WIDGETS, shards_in
from tests.notebooks.running import NOTEBOOKS, OFFLINE, USER, cells, opened, require_readable

nbformat = pytest.importorskip("nbformat", reason="needs nbformat, nbclient and ipykernel")

LIMIT = 120.0
"""Seconds of a notebook."""
PLAIN = f"{NO_WIDGETS}; sys.modules['matplotlib'] = None"
RATE = 2e6
"""Bytes a second: the small model takes five seconds, so that there is a middle to interrupt."""
HASHES = """
import hashlib
from contextlib import closing
def hashes(where):
    with closing(mso_hub.open_source(where)) as found:
        return {n: hashlib.sha256(found.read(n, 0, size).tobytes()).hexdigest() for n, size in found.files().items()}
"""
UPLOADS = "[r.path for r in hub.devhub.log() if (r.origin, r.method, r.status) == ('storage', 'PUT', 200)]"
DOWNLOADED = "sum(r.bytes_out for r in hub.devhub.log() if r.origin == 'storage' and r.method == 'GET')"
NAMES_THE_HUB = {"README.md", "mso_hub.json"}
"""Files with the address of the repo in them."""
WITH_VLLM = pytest.param(
    "05", marks=pytest.mark.skipif("MSO_VLLM_PYTHON" not in os.environ, reason="MSO_VLLM_PYTHON names no Python")
)
NAMES = [WITH_VLLM if path.name[:2] == "05" else path.name[:2] for path in NOTEBOOKS]


@pytest.mark.parametrize("name", NAMES)
def test_run_all(name: str, tmp_path: Path, record_property: Any) -> None:
    """No error, no warning, no network, at most two minutes; and what it says about serving is so."""
    with opened(name, tmp_path) as book:
        book.run()
        require_readable(book)
        assert book.seconds < LIMIT
        record_property("seconds", round(book.seconds, 1))
        lines = re.findall(r"^vllm serve .*$", cells(next(tmp_path.glob("*.ipynb")))[-1]["source"], re.MULTILINE)
        served = book.value("job.serve if 'job' in globals() else ''")
        assert all(line in (served, *book.text.split("\n")) for line in lines)
        assert {path.name for path in tmp_path.iterdir() if path.suffix != ".ipynb"} <= {"devhub", USER}
        assert not [path for path in (tmp_path / USER).glob("*") if path.name in ("huggingface", "mso_hub")]


@pytest.mark.parametrize("name", [name for name in NAMES if name is not WITH_VLLM])
def test_run_all_without_widgets_and_matplotlib(name: str, tmp_path: Path) -> None:
    """Text in their place; nothing is lost but the pictures and the buttons."""
    with opened(name, tmp_path) as book:
        book.run(setup=PLAIN)
        require_readable(book)
        assert not {kind for ran in book.ran for kind in ran.cell.kinds if "widget" in kind or kind.startswith("image")}


def test_an_interrupted_run_goes_on_in_a_fresh_kernel(tmp_path: Path) -> None:
    """Run all, stopped in the middle; run all again: only the rest is read and sent, and the bytes are the same."""
    journals = tmp_path / "devhub" / "02" / "cache" / "journals"
    with opened("02", tmp_path) as book:
        book.run(until="job.run()")
        book.kernel.cell(f"hub.devhub.set(bandwidth_down={RATE})")
        stop = book.kernel.interrupt_when(partial(enough, journals))
        paused = book.kernel.cell(book.skip())
        stop.join()
        assert "paused: what is complete is kept; run the cell again" in paused.text
        refused = book.kernel.cell(book.skip(), fails=True)
        assert "call job.run() first" in refused.text
        assert "Traceback" not in refused.text
        kept = sum(map(shards_in, journals.iterdir()))
        assert 1 <= kept < 6
    with opened("02", tmp_path) as book:
        book.run(until="job.run()")
        already = book.value(DOWNLOADED)
        book.run(until="job.report")
        second, read = book.value(UPLOADS), book.value(DOWNLOADED) - already
        book.run()
        require_readable(book)
        book.kernel.cell(HASHES)
        mine = book.value("hashes(dst)")
        book.kernel.cell("mso_hub.Job(src, dst + '-whole', mode='all-linear', progress='none').run()")
        whole = book.value("hashes(dst + '-whole')")
        total = book.value("job.plan.read_bytes")
    assert 1 <= len(second) <= 6 - kept
    assert 0 < read < total
    assert mine.keys() == whole.keys()
    assert {name for name in mine if mine[name] != whole[name]} <= NAMES_THE_HUB


def enough(journals: Path) -> bool:
    """Are two files stored?"""
    return journals.is_dir() and sum(map(shards_in, journals.iterdir())) >= 2


def test_run_all_twice_writes_once(tmp_path: Path) -> None:
    """A notebook whose output is there already says so and goes through."""
    with opened("00", tmp_path) as book:
        book.run()
    with opened("00", tmp_path) as book:
        book.run()
        assert "was complete already, nothing was written" in " ".join(book.text.split())
        assert book.value(UPLOADS) == []


def test_papermill_takes_other_parameters(tmp_path: Path) -> None:
    """Another format, and progress as lines of text."""
    source = next(path for path in NOTEBOOKS if path.name.startswith("02"))
    command = [sys.executable, "-m", "papermill", str(source), "out.ipynb", "--no-progress-bar"]
    command += ["-p", "SCHEME", "fp8_dynamic", "-p", "PROGRESS", "text"]
    env = {**os.environ, **OFFLINE, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    outputs = [output for cell in shown.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)
    assert "vllm serve dev/tiny-qwen3-moe-FP8_DYNAMIC" in text
    assert "read 100%  encode 100%  upload 100%  commit 100%" in text
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert not [line for line in text.split("\n") if len(line) > 80]


@pytest.fixture
def other(tmp_path: Path) -> Iterator[tuple[DevHub, dict[str, str]]]:
    """A Hub that somebody else runs, and the environment of a user who is logged in there."""
    with DevHub(tmp_path / "other") as server:
        loopback = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
        yield server, {"HF_TOKEN": server.token(), "HF_HUB_DISABLE_XET": "1", **loopback}


def test_one_line_leads_to_another_hub(tmp_path: Path, other: tuple[DevHub, dict[str, str]]) -> None:
    """With the login of the environment; repos are private, and no token is shown."""
    server, env = other
    with opened("00", tmp_path / "mine", env) as book:
        book.run(setup=f"HUB = {server.endpoint!r}")
        require_readable(book)
        assert server.token() not in book.text
    api = HfApi(server.endpoint, server.token())
    for repo in ("dev/tiny-qwen3-moe", "dev/tiny-qwen3-moe-NVFP4"):
        assert api.model_info(repo).private
    assert not (tmp_path / "mine" / "devhub").exists()
