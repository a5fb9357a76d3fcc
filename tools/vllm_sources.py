"""The Python files of vLLM's CUDA wheel, for tests on a version that is not installed.

    python tools/vllm_sources.py FOLDER [VERSION]

Fetches the wheel with pip (nothing is installed, no dependencies), unpacks it into FOLDER without its compiled parts
and prints the folder to put on PYTHONPATH; with VLLM_TARGET_DEVICE=cpu that is all a shape proof needs. A folder that
is complete already is left as it is.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "0.33.0"


def fetch(folder: Path, version: str = VERSION) -> Path:
    """Unpack vLLM `version` under `folder`; returns the folder that holds `vllm/`. SystemExit when pip fails."""
    target = folder / f"vllm-{version}"
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wheel = _download(Path(scratch), version)
        partial = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial, [name for name in archive.namelist() if not name.endswith(".so")])
        partial.rename(target)  # the name appears when everything is there, so a broken run is not taken for a result
    return target


def _download(folder: Path, version: str) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--dest",
        str(folder),
        f"vllm=={version}",
    ]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("vllm-*.whl"))
    if finished.returncode or not wheels:
        last = (finished.stderr or finished.stdout).strip().splitlines()[-3:]
        raise SystemExit(
            f"pip could not download the wheel of vllm=={version} (exit code {finished.returncode}): "
            + " / ".join(last or ["it printed nothing"])
        )
    return wheels[0]


if __name__ == "__main__":
    if len(sys.argv) not in {2, 3}:
        raise SystemExit("usage: python tools/vllm_sources.py FOLDER [VERSION]")
    print(fetch(Path(sys.argv[1]), *sys.argv[2:]))
