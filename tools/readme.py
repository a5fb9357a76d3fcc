"""Run the console blocks of README.md again and put their real output below the commands.

    python tools/readme.py           rewrite README.md
    python tools/readme.py --check   exit with 1 and show the difference when it is out of date

A block starts with ```console; every line that starts with `$ mso-hub` is run in one scratch folder in which
`tests` is the repository's, and what it prints replaces what stood below it.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)


def run(command: str, folder: Path) -> str:
    """Standard output of one `mso-hub` command line."""
    words = shlex.split(command)
    if words[0] != "mso-hub":
        message = f"README.md: a console block may only run mso-hub, got {command!r}"
        raise ValueError(message)
    argv = [sys.executable, "-m", "mso_hub.cli", *words[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return "\n".join(line.rstrip() for line in done.stdout.splitlines())


def rebuilt(text: str) -> str:
    """README with the output of every console block made anew."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "tests").symlink_to(ROOT / "tests")

        def replace(match: re.Match[str]) -> str:
            commands = [line[2:] for line in match[1].splitlines() if line.startswith("$ ")]
            parts = []
            for command in commands:
                output = run(command, folder)
                parts.append(f"$ {command}\n{output}\n" if output else f"$ {command}\n")
            return "```console\n" + "\n".join(parts) + "```"

        return BLOCK.sub(replace, text)


def main() -> int:
    """Rewrite or check."""
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = rebuilt(old)
    if "--check" not in sys.argv:
        path.write_text(new, encoding="utf-8")
        return 0
    difference = difflib.unified_diff(old.splitlines(), new.splitlines(), "README.md", "now", lineterm="")
    shown = "\n".join(difference)
    sys.stdout.write(f"{shown}\n" if shown else "")
    return int(bool(shown))


if __name__ == "__main__":
    sys.exit(main())
