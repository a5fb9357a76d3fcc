"""Which Hub a Python talks to: an embedded one that keeps its folder and port, or another with the user's login."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi

from mso_hub.hub.devhub import DevHub
from tests.notebooks.running import OFFLINE, ROOT

USE = "from mso_hub.notebook import use_hub; hub = use_hub({!r})"


def python(code: str, folder: Path, env: Mapping[str, str] | None = None) -> str:
    """Output of a Python of its own; the traceback's last line, where it fails."""
    home = {"HF_HOME": str(folder / "user"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    settings = {**os.environ, **OFFLINE, **home, **(env or {})}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, check=False)
    return (done.stdout if done.returncode == 0 else done.stderr).strip()


def logged_in(hub: DevHub) -> dict[str, str]:
    return {"HF_TOKEN": hub.token(), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


def test_an_embedded_hub_needs_no_account_and_keeps_to_its_folder(tmp_path: Path) -> None:
    """The plain client talks to it too, and the user's own token does not."""
    code = f"{USE.format('hubs/a')}; from huggingface_hub import HfApi as A, whoami"
    code += "; print(whoami()['name'], A().endpoint); print(hub)"
    shown = python(code, tmp_path, {"HF_TOKEN": "hf_of_the_real_one", "HF_HUB_OFFLINE": "1"})
    first, title, _, *lines = shown.split("\n")
    assert first.startswith("dev http://127.0.0.1:")
    assert title == f"{first.split()[1]}, as dev"
    assert "hubs/a" in " ".join(lines)
    assert "hf_" not in shown
    assert [path.name for path in tmp_path.iterdir()] == ["hubs"]


def test_the_same_folder_is_the_same_hub_on_the_same_port(tmp_path: Path) -> None:
    """In one Python it is one server; the next one finds it where it was, because journals know it by its address."""
    code = f"{USE.format('a')}; print(hub.endpoint, use_hub('a').devhub is hub.devhub)"
    first = python(code, tmp_path)
    assert first.endswith(" True")
    assert python(code, tmp_path) == first


def test_a_port_that_somebody_else_has_is_given_up(tmp_path: Path) -> None:
    code = f"{USE.format('a')}; print(hub.endpoint)"
    first = python(code, tmp_path)
    with DevHub(tmp_path / "b", port=int(first.rpartition(":")[2])):
        assert python(code, tmp_path).startswith("http://127.0.0.1:")
        assert python(code, tmp_path) != first


def test_a_hub_that_is_still_ending_is_waited_for(tmp_path: Path) -> None:
    """A kernel that is restarted starts before the server of the old one has gone."""
    code = """
import threading
from mso_hub.hub.devhub import DevHub
from mso_hub.notebook import use_hub
old = DevHub("a")
threading.Timer(1.0, old.close).start()
print(use_hub("a").account)
"""
    assert python(code, tmp_path) == "dev"


def test_a_client_that_talks_to_another_hub_already_is_refused(tmp_path: Path) -> None:
    """Its settings are read once; a cell that went on would send its uploads elsewhere."""
    for where in ("a", "http://127.0.0.1:1"):
        shown = python(f"import huggingface_hub.constants; {USE.format(where)}", tmp_path)
        assert "talks to https://huggingface.co" in shown.replace("\n", " ")
        assert "restart the kernel and run this cell first" in shown.split("RecipeError", 1)[1].replace("\n", " ")


def test_names_follow_the_source(tmp_path: Path) -> None:
    code = f"{USE.format('a')}; print(hub.output('hf://org/M@v1', 'NVFP4'), hub.output('some/where/M', 'FP8'))"
    assert python(code, tmp_path) == "hf://dev/M-NVFP4 hf://dev/M-FP8"


def test_a_folder_is_uploaded_once_and_in_silence(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    code = f"{USE.format('a')}; print(hub.add('model')); print(hub.add('model'))"
    code += "; print(len(hub.client.api.list_repo_commits('dev/model')))"
    assert python(code, tmp_path, {"PYTHONWARNINGS": ""}) == "hf://dev/model\nhf://dev/model\n2"


def test_another_hub_with_the_login_of_the_environment(tmp_path: Path) -> None:
    """What is uploaded there is private."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    with DevHub(tmp_path / "other") as server:
        code = f"{USE.format(server.endpoint + '/')}; print(hub.add('model')); print(hub); print(repr(hub))"
        shown = python(code, tmp_path, {**logged_in(server), "PYTHONWARNINGS": ""})
        assert shown.split("\n")[:2] == ["hf://dev/model", f"{server.endpoint}, as dev"]
        assert server.token() not in shown
        assert HfApi(server.endpoint, server.token()).model_info("dev/model").private


def test_a_token_of_a_file_is_found(tmp_path: Path) -> None:
    with DevHub(tmp_path / "other") as server:
        (tmp_path / ".env").write_text(f"HF_TOKEN={server.token()}\n", encoding="utf-8")
        shown = python(
            f"{USE.format(server.endpoint)}; print(hub.account)", tmp_path, {**logged_in(server), "HF_TOKEN": ""}
        )
    assert shown == "dev"


def test_a_token_that_the_hub_does_not_know_is_refused(tmp_path: Path) -> None:
    with DevHub(tmp_path / "other") as server:
        shown = python(USE.format(server.endpoint), tmp_path, {**logged_in(server), "HF_TOKEN": "hf_" + "x" * 20})
    assert "does not know this token" in shown.split("HubError", 1)[1]
    assert "x" * 20 not in shown


def test_without_a_login_the_form_of_the_hub_is_asked(tmp_path: Path) -> None:
    """This server has no such form: that is what is said."""
    with DevHub(tmp_path / "other") as server:
        shown = python(USE.format(server.endpoint), tmp_path, {**logged_in(server), "HF_TOKEN": ""})
        asked = [request.path for request in server.log()]
    assert "/oauth/device" in asked
    assert "nobody is logged in, and its login form cannot be had" in shown.split("RecipeError: http://127", 1)[1]
