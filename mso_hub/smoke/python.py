"""Which Python has vLLM, and whether it really has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from mso_hub.errors import SmokeError
from mso_hub.smoke.place import plugin_sources

VARIABLE = "MSO_VLLM_PYTHON"
TOKENS = frozenset({"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HF_API_TOKEN"})
OLDEST = (3, 10)
GET_IT = f"`mso-hub setup-vllm` makes an environment with it; name its Python with --vllm-python PATH or in {VARIABLE}"
_PROBE = """
import importlib.util, json, sys
print(json.dumps([list(sys.version_info[:2]), importlib.util.find_spec("vllm") is not None]))
"""
_PATIENCE = 60
"""Seconds that a Python has to say what it has."""


def python_of_vllm(given: str | Path | None = None) -> Path:
    """The Python to ask: the given one, else that of MSO_VLLM_PYTHON, else the one that runs this.

    Whether it has vLLM is for `require_vllm`. SmokeError where a program is named that is not there.
    """
    said = given if given is not None else os.environ.get(VARIABLE) or None
    if said is None:
        return Path(sys.executable)
    by = "--vllm-python" if given is not None else VARIABLE
    found = shutil.which(Path(said).expanduser())
    if found is None:
        there = Path(said).expanduser()
        what = "a folder" if there.is_dir() else "a file that cannot be run" if there.exists() else "nothing"
        way_out = f"its Python is {there / 'bin' / 'python'}" if there.is_dir() else GET_IT
        raise SmokeError(f"{by} {said}: must be a Python that has vLLM, found {what} there; {way_out}")
    return Path(found).absolute()  # links stay: a virtual environment is known by its path


def environment() -> dict[str, str]:
    """Of a Python that runs the plugin: its sources come first, and nothing is asked of the Hub.

    Tokens are left out: with --trust_remote_code the code of a checkpoint runs there.
    """
    paths = [str(plugin_sources()), *filter(None, [os.environ.get("PYTHONPATH")])]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    offline |= {"HF_TOKEN_PATH": os.devnull, "HF_STORED_TOKENS_PATH": os.devnull}
    ours = {name: value for name, value in os.environ.items() if name not in TOKENS}
    return {**ours, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1", **offline}


def require_vllm(python: Path, folder: Path, env: Mapping[str, str]) -> None:
    """SmokeError where a program is no Python, too old, or has no vLLM; nothing of vLLM is imported.

    folder  of the process: it must hold nothing that could be imported
    """
    command = [str(python), "-c", _PROBE]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", cwd=folder, env=env, timeout=_PATIENCE,
            check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SmokeError(f"{python}: must be a Python that has vLLM, it does not run: {error}; {GET_IT}") from error
    try:
        version, has_vllm = json.loads(done.stdout)
        version = tuple(map(int, version))
    except (ValueError, TypeError) as error:
        ended = f"nothing and ended with {done.returncode}"
        said = (done.stderr or done.stdout).strip().splitlines()[-1:] or [ended]
        raise SmokeError(
            f"{python}: must be a Python that has vLLM, asked for its version it said {said[0]!r:.200}; {GET_IT}"
        ) from error
    if version < OLDEST:
        raise SmokeError(f"{python}: must be Python 3.10 or later, is {'.'.join(map(str, version))}; {GET_IT}")
    if not has_vllm:
        raise SmokeError(f"{python}: has no vLLM; {GET_IT}")
