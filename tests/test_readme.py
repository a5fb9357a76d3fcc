"""What the README shows is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from mso_hub.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
USAGE = README.split("## How fast")[0]
"""Benchmarks, below, are other programs with options of their own."""


def test_console_blocks_are_the_real_output() -> None:
    """Every `$ mso-hub ...` of the README prints what stands below it (python tools/readme.py renews it)."""
    argv = [sys.executable, str(ROOT / "tools" / "readme.py"), "--check"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("block", BLOCKS, ids=["notebook", "script"])
def test_python_blocks_run(block: str, tmp_path: Path) -> None:
    """The Python examples work as printed, on the small trained model."""
    (tmp_path / "model-bf16").symlink_to(ROOT / "tests" / "models" / "tiny-qwen3-moe")
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model-nvfp4" / "config.json").is_file()


def test_the_picture_is_of_the_notebook_as_it_is() -> None:
    """Its PNG says which code cells it was taken of (python tools/pictures.py takes it anew)."""
    argv = [sys.executable, str(ROOT / "tools" / "pictures.py"), "--check"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "](docs/images/panel.png)" in README


def test_every_command_is_in_the_readme() -> None:
    """The table of commands lists each verb and nothing that does not exist."""
    assert isinstance(main, click.Group)
    assert set(re.findall(r"^\| `mso-hub ([\w-]+)", USAGE, re.MULTILINE)) == set(main.commands)


def test_every_option_that_the_readme_names_exists() -> None:
    """No option is advertised that no command has."""
    assert isinstance(main, click.Group)
    options = {
        form for command in main.commands.values() for p in command.params for form in (*p.opts, *p.secondary_opts)
    }
    named = set(re.findall(r"`(?:[^`\n]*\s)?(--[a-z_]+)", USAGE))
    assert named <= options, named - options
