"""`mso-hub card` and `mso-hub devhub` as processes: streams, exit codes, and the real client on the other end."""

from __future__ import annotations

import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mso_hub import Recipe, convert, verify_checkpoint
from mso_hub.cli import main
from mso_hub.hub.devhub import DevHub
from tests.helpers import tiny_moe, write_files

PROGRAM = [sys.executable, "-m", "mso_hub.cli"]
WAIT = 30


def invoke(*words: object) -> Result:
    """Run the program in this process."""
    return CliRunner().invoke(main, [str(word) for word in words])


def environment(home: Path, **more: str) -> dict[str, str]:
    """Of a process without anybody's login or cache."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "MSO_"))}
    return {
        **clean,
        "HF_HOME": str(home),
        "HF_XET_CACHE": str(home / "xet"),
        "MSO_HUB_CACHE": str(home / "mso"),
        **more,
    }


@contextmanager
def serving(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """`mso-hub devhub` on a free port, and what it prints until it is ready; stdout is a pipe, as for a script."""
    process = subprocess.Popen(
        [*PROGRAM, "devhub", "--dir", str(folder), "--port", "0", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(folder / "home"),
    )  # fmt: skip
    try:
        yield process, read_usage(process)
    finally:
        process.kill()
        process.communicate()


def read_usage(process: subprocess.Popen[str]) -> list[str]:
    """Lines up to the last export."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], WAIT)[0], "nothing was printed"
    lines: list[str] = []
    while not (lines and lines[-1].startswith("export HF_TOKEN")):
        lines.append(process.stdout.readline().rstrip("\n"))
    return lines


def exports(lines: list[str]) -> dict[str, str]:
    """Environment that the printed lines make."""
    words = [shlex.split(line)[1] for line in lines if line.startswith("export ")]
    return dict(word.split("=", 1) for word in words)


# ------------------------------------------------------------------------------------------------------------- card


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_moe(tmp_path / "in")


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    """The source, quantized."""
    convert(source, tmp_path / "out", Recipe())
    return tmp_path / "out"


def test_card_into_a_folder(packed: Path, source: Path) -> None:
    """It prints where the card is, and verify stays content."""
    done = invoke("card", packed, "--source", source, "--base-model", "org/base")
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"{packed / 'README.md'}\n", "")
    assert "base_model: org/base" in (packed / "README.md").read_text()
    assert verify_checkpoint(packed, source=source).ok


def test_card_to_stdout_or_a_file(packed: Path, tmp_path: Path) -> None:
    """The card and nothing else, byte for byte; the checkpoint stays without."""
    done = subprocess.run([*PROGRAM, "card", str(packed), "--output", "-"], capture_output=True, check=True)
    assert done.stdout.startswith(b"---\nlibrary_name: transformers\n")
    assert done.stdout.endswith(b"|\n")
    assert done.stderr == b""
    shown = invoke("card", packed, "--output", tmp_path / "card.md")
    assert (shown.exit_code, shown.stdout) == (0, f"{tmp_path / 'card.md'}\n")
    assert (tmp_path / "card.md").read_bytes() == done.stdout
    assert not (packed / "README.md").exists()


def test_card_replaces_what_a_person_wrote_only_when_told(packed: Path) -> None:
    """It says both ways out, and both of them work."""
    (packed / "README.md").write_text("by hand")
    done = invoke("card", packed)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == (
        f"mso-hub: {packed}: has a README.md that mso_hub did not write (or that was edited since); "
        "print the card with --output -, or replace it with --fresh\n"
    )
    assert invoke("card", packed, "--output", "-").stdout.startswith("---\n")
    assert (packed / "README.md").read_text() == "by hand"
    assert invoke("card", packed, "--fresh").exit_code == 0
    assert (packed / "README.md").read_text().startswith("---\n")


def test_card_refuses_with_one_message(packed: Path, source: Path, tmp_path: Path) -> None:
    """Exit code 2, nothing on stdout."""
    other = tiny_moe(tmp_path / "other", seed=1)
    for words, message in (
        ((packed, "--source", tmp_path / "missing"), "found nothing there"),
        ((tmp_path / "missing",), "found nothing there"),
        ((packed, "--source", other), "must be without problems to get a card"),
        ((packed, "--base_model", "no repo"), "base_model: must be the id of a repo"),
        ((packed, "--output", tmp_path), "--output"),
        ((packed, "--output", tmp_path / "no" / "card.md"), "a file in a folder that exists"),
    ):
        done = invoke("card", *words)
        assert (done.exit_code, done.stdout) == (2, ""), words
        assert done.stderr.startswith("mso-hub: ")
        assert message in done.stderr
    assert not (packed / "README.md").exists()


# ----------------------------------------------------------------------------------------------------------- devhub

CLIENT = """
import os, sys, warnings
warnings.simplefilter("ignore")
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.utils import disable_progress_bars
disable_progress_bars()
api = HfApi()
repo = api.create_repo(f"{api.whoami()['name']}/model").repo_id
big = os.urandom(3 << 20)
api.upload_file(path_or_fileobj=big, path_in_repo="model.safetensors", repo_id=repo)
assert open(hf_hub_download(repo, "model.safetensors"), "rb").read() == big
print("done")
"""


@pytest.mark.parametrize("words", [[], ["--no_xet"]])
def test_devhub_serves_the_real_client(words: list[str], tmp_path: Path) -> None:
    """With the exports that it prints, and nothing else; Ctrl-C is a good end without a word."""
    with serving(tmp_path / "hub", *words) as (process, lines):
        assert process.stdout is not None
        if words:
            lines.append(process.stdout.readline().rstrip("\n"))
        assert lines[0].startswith(f"{tmp_path / 'hub'}: a Hub on http://127.0.0.1:")
        settings = exports(lines)
        assert set(settings) == {"HF_ENDPOINT", "HF_TOKEN"} | ({"HF_HUB_DISABLE_XET"} if words else set())
        client = subprocess.run(
            [sys.executable, "-c", CLIENT], env=environment(tmp_path / "home", **settings), capture_output=True,
            text=True, timeout=WAIT, check=False,
        )  # fmt: skip
        assert (client.returncode, client.stdout) == (0, "done\n"), client.stderr
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=WAIT)
        assert (process.returncode, out.strip(), err) == (0, "", "")
    with DevHub(tmp_path / "hub", xet=not words) as again:
        assert again.user == "dev"
        assert [path.name for path in (tmp_path / "hub").iterdir()]


def test_devhub_keeps_to_its_bandwidth(tmp_path: Path) -> None:
    """3 MiB up and down at 3 MB a second take two seconds."""
    with serving(tmp_path / "hub", "--no-xet", "--bandwidth", "3MB") as (process, lines):
        assert process.stdout is not None
        settings = exports([*lines, process.stdout.readline()])
        started = time.monotonic()
        subprocess.run(
            [sys.executable, "-c", CLIENT], env=environment(tmp_path / "home", **settings), timeout=WAIT, check=True,
            capture_output=True,
        )  # fmt: skip
        assert time.monotonic() - started > 1.5


def refused(folder: Path, *words: str) -> str:
    """Message of a `devhub` that does not start."""
    command = [*PROGRAM, "devhub", "--dir", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mso-hub: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_devhub_that_cannot_start(tmp_path: Path) -> None:
    """Port and folder in use, a folder that cannot be, a rate that is none, accounts that are none."""
    with DevHub(tmp_path / "first") as first:
        port = first.endpoint.rpartition(":")[2]
        assert f"port {port} of 127.0.0.1 is in use; choose another one, or 0" in refused(
            tmp_path / "b", "--port", port
        )
        assert "a development Hub already runs there" in refused(tmp_path / "first", "--port", "0")
    files = write_files(tmp_path, {"file": b"", "odd/users.json": b"[]", "poor/users.json": b"{}"})
    assert "cannot be written: Not a directory" in refused(files / "file" / "hub", "--port", "0")
    assert "bandwidth: needs a size like 512MiB or 2GB, got 'fast'" in refused(files / "a", "--bandwidth", "fast")
    assert "must look like" in refused(files / "odd", "--port", "0")
    assert "users.json" in refused(files / "poor", "--port", "0")


def test_devhub_without_its_libraries(tmp_path: Path) -> None:
    """The message names the extra."""
    code = f"import sys; sys.modules['uvicorn'] = None; from mso_hub.cli import main; main(['devhub', '--dir', {str(tmp_path)!r}])"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mso-hub: the development Hub needs uvicorn: pip install 'mso-hub[devhub]'\n"
