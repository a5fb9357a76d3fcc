"""The process: how it starts, what it refuses, what it leaves behind, and the hf program against it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from mso_hub.errors import MsoError, RecipeError
from mso_hub.hub.devhub import DevHub
from mso_hub.hub.devhub.settings import Settings, User, users_from_json
from tests.hub.devhub.helpers import CLIENT_WARNS, Site, noise, raw

pytestmark = CLIENT_WARNS


def gone(pid: int, patience: float = 10) -> bool:
    """Whether a process ends in time; one that nobody has waited for counts as ended."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("mode", ["lfs", "xet"])
def test_everything_survives_a_restart(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", mode == "lfs")
    data = noise(100_000, 50)
    with DevHub(tmp_path / "d", xet=mode == "xet") as hub:
        api = HfApi(hub.endpoint, hub.token())
        bob = hub.add_user("bob", ["team"])
        HfApi(hub.endpoint, bob).create_repo("team/m", private=True)
        api.create_repo("dev/m")
        sha = api.upload_file(path_or_fileobj=data, path_in_repo="w.bin", repo_id="dev/m").oid
        api.create_tag("dev/m", tag="v1")
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="dev/m", create_pr=True)
        pid = hub.pid
    assert gone(pid)
    with DevHub(tmp_path / "d", xet=mode == "xet") as hub:
        api = HfApi(hub.endpoint, hub.token())
        assert api.model_info("dev/m", revision="v1").sha == sha
        path = api.hf_hub_download("dev/m", "w.bin", revision="v1", cache_dir=tmp_path / "cache")
        assert Path(path).read_bytes() == data
        assert api.get_discussion_details("dev/m", 1).is_pull_request
        assert HfApi(hub.endpoint, bob).model_info("team/m").private
        site = Site(hub, api, "dev/m")
        assert raw("GET", site.link("w.bin")).body == data


def test_a_second_server_on_the_folder_is_refused(tmp_path: Path) -> None:
    with DevHub(tmp_path) as hub, pytest.raises(MsoError, match=f"already runs there .process {hub.pid}."):
        DevHub(tmp_path)


def test_ports_are_used_as_given_and_a_taken_one_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MsoError, match=f"port {port} of 127.0.0.1 is in use; choose another"):
            DevHub(tmp_path, port=port)
    with DevHub(tmp_path, port=port) as hub:
        assert hub.endpoint == f"http://127.0.0.1:{port}"
        assert hub.storage.split(":")[-1] not in {str(port), "0"}
    with pytest.raises(MsoError, match="must differ from the port of the hub"):
        DevHub(tmp_path, port=port, storage_port=port)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MsoError, match="cannot be written: Not a directory; choose another folder"):
        DevHub(tmp_path / "file" / "d")


@pytest.mark.parametrize("library", ["uvicorn", "starlette"])
def test_a_missing_library_says_what_to_install(library: str, tmp_path: Path) -> None:
    program = f"""
import sys
sys.modules[{library!r}] = None
sys.argv = ["devhub", "--dir", {str(tmp_path)!r}]
from mso_hub.hub.devhub.__main__ import main
sys.exit(main())
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert f"needs {library}: pip install 'mso-hub[devhub]'" in run.stderr


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    program = """
import os, signal, sys
from mso_hub.hub.devhub import DevHub
print(DevHub(sys.argv[1]).pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    run = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=False)
    assert run.returncode == -signal.SIGKILL
    assert gone(int(run.stdout))


def test_the_program_says_when_it_is_ready_and_stops_at_sigint(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mso_hub.hub.devhub", "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        endpoint = json.loads(process.stdout.readline())["endpoint"]
        assert raw("GET", f"{endpoint}/api/whoami-v2").status == 401
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert (process.stdout.read(), process.stderr.read()) == (b"", b"")


def test_a_stalled_client_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with DevHub(tmp_path) as hub:
        hub.fail(".", stall=0)
        with socket.create_connection(("127.0.0.1", int(hub.endpoint.rpartition(":")[2]))) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            time.sleep(0.1)
            begin = time.monotonic()
            hub.close()
            assert time.monotonic() - begin < 4


def test_nothing_is_read_or_written_outside_the_folder(tmp_path: Path) -> None:
    """Cache and telemetry of the Xet library included."""
    home = tmp_path / "home"
    home.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.delenv("HF_XET_CACHE")
        patch.delenv("HF_HOME")
        with DevHub(tmp_path / "d", xet=True) as hub:
            assert raw("GET", f"{hub.endpoint}/api/models").json() == []
    assert list(home.iterdir()) == []


def test_users_may_be_given_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "users.json").write_text('{"zoe": {"tokens": {"hf_secret": "write", "hf_look": "read"}}}')
    with DevHub(tmp_path) as hub:
        assert (hub.user, hub.token(), hub.token("read")) == ("zoe", "hf_secret", "hf_look")
        assert HfApi(hub.endpoint, "hf_secret").whoami()["name"] == "zoe"
    (tmp_path / "users.json").write_text("[]")
    with pytest.raises(MsoError, match=r"users\.json: must look like"):
        DevHub(tmp_path)


def test_settings_that_make_no_sense(tmp_path: Path) -> None:
    for wrong in ({"port": 70_000}, {"storage_port": -1}, {"users": ()}, {"port": 80, "storage_port": 80}):
        with pytest.raises(RecipeError):
            Settings(tmp_path, **wrong)
    for name, tokens in (("../x", {}), ("ok", {"t": "admin"})):
        with pytest.raises(RecipeError):
            User(name, tokens)
    with pytest.raises(RecipeError, match=r"f\.json"):
        users_from_json(b"{", "f.json")


def test_the_log_tells_who_asked_what_and_how_it_went(lfs_site: Site) -> None:
    lfs_site.put("w.bin", noise(5000, 51))
    raw("GET", lfs_site.link("w.bin"), range_="bytes=10-19")
    log = lfs_site.hub.log()
    upload, download = (next(r for r in log if r.origin == "storage" and r.method == m) for m in ("PUT", "GET"))
    assert (upload.status, upload.authorized, upload.user, upload.bytes_in) == (200, False, None, 5000)
    assert (download.status, download.range, download.bytes_out) == (206, "bytes=10-19", 10)
    assert all("signature=" not in r.query or r.query.endswith("signature=") for r in log)
    commit = next(r for r in log if "/commit/" in r.path)
    assert (commit.origin, commit.method, commit.status, commit.authorized, commit.user) == (
        "hub",
        "POST",
        200,
        True,
        "dev",
    )
    assert abs(commit.time - time.time()) < 60
    assert lfs_site.hub.log(clear=True) == log
    assert lfs_site.hub.log() == []


def test_errors_of_the_server_itself_go_to_its_log(lfs_site: Site) -> None:
    """Content that somebody removed: the client hears a 500, the file says why."""
    lfs_site.put("t.txt", b"unique content")
    entry = lfs_site.info("t.txt")
    (lfs_site.hub.folder / "blobs" / entry.blob_id[:2] / entry.blob_id).unlink()
    answer = raw("GET", f"{lfs_site.hub.endpoint}/{lfs_site.repo}/resolve/main/t.txt", Authorization=lfs_site.bearer)
    assert answer.status == 500
    assert "FileNotFoundError" in (lfs_site.hub.folder / "devhub.log").read_text()


def test_the_handle_needs_no_server_libraries() -> None:
    program = (
        "import sys, mso_hub.hub.devhub; print(*{'starlette', 'uvicorn', 'huggingface_hub', 'hf_xet'} & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def run_hf(site: Site, *words: str) -> str:
    """What the hf program prints; it must end well."""
    environment = {**os.environ, "HF_ENDPOINT": site.hub.endpoint, "HF_TOKEN": site.hub.token()}
    environment |= {"HF_HUB_DISABLE_XET": str(int(not site.hub.xet)), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    program = [sys.executable, "-m", "huggingface_hub.cli.hf", *words]
    run = subprocess.run(program, capture_output=True, text=True, check=False, env=environment, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_hf_program(site: Site, tmp_path: Path) -> None:
    data = noise(200_000, 52)
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "w.safetensors").write_bytes(data)
    (tmp_path / "up" / "t.txt").write_bytes(b"text")
    assert "dev" in run_hf(site, "auth", "whoami")
    run_hf(site, "upload", f"{site.repo}-cli", str(tmp_path / "up"))
    run_hf(site, "download", f"{site.repo}-cli", "--local-dir", str(tmp_path / "down"))
    assert (tmp_path / "down" / "w.safetensors").read_bytes() == data
    assert (tmp_path / "down" / "t.txt").read_bytes() == b"text"


def test_a_client_with_xet_cannot_upload_to_a_server_without(lfs_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for a token and gives up at the 404; downloads work, as no file claims to be of Xet."""
    lfs_site.put("w.bin", noise(1000, 53))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    assert lfs_site.get("w.bin") == noise(1000, 53)
    with pytest.raises(ConnectionError, match="404"):
        lfs_site.put("v.bin", noise(1000, 54))
