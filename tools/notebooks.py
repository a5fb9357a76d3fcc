"""Write what is the same in every notebook, and take out what running one leaves behind.

    python tools/notebooks.py           rewrite notebooks/*.ipynb
    python tools/notebooks.py --check   exit with 1 and show the difference when one is out of date

Badges follow the title. Cells with the tag `install` or `login` get the source below. Outputs, execution counts and the
metadata of editors go; ids of cells are numbers, so that a difference shows what somebody changed.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
SLUG = "mso-hub/mso_hub"
"""Owner and name of the repository on GitHub."""
BADGE = "[!["

EXTRAS = {"07": "notebook,devhub,calibrate"}
"""Number of a notebook -> what it needs, where that is more than others do."""

INSTALL = f"""\
# Does nothing where mso_hub is installed. Elsewhere (Colab, Kaggle) from a clone, which holds the small model too.
import importlib.util
import sys
from pathlib import Path

found = importlib.util.find_spec("mso_hub")
if found is None or found.origin is None:  # without origin: only a folder of this name
    !git clone --quiet --depth 1 https://github.com/{SLUG} mso-hub-src
    %pip install --quiet -e "./mso-hub-src[EXTRAS]"
    sys.path.insert(0, str(Path("mso-hub-src").resolve()))"""
LOGIN = """\
# On the real Hub: HF_TOKEN, .env, the stored login or Colab's secret; its login form only where there is none of them.
import mso_hub.notebook

hub = mso_hub.notebook.use_hub(HUB)
hub"""
FIXED = {"install": INSTALL, "login": LOGIN}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def badges(name: str) -> str:
    """Colab and Kaggle, as one line of Markdown."""
    here = f"{SLUG}/blob/main/notebooks/{name}"
    colab = "https://colab.research.google.com"
    return (
        f"{BADGE}Open in Colab]({colab}/assets/colab-badge.svg)]({colab}/github/{here}) "
        f"{BADGE}Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"
        f"(https://kaggle.com/kernels/welcome?src=https://github.com/{here})"
    )


def titled(text: str, name: str) -> str:
    """The first cell: its title, the badges, what else it says."""
    lines = [line for line in text.splitlines() if not line.startswith(BADGE)]
    rest = "\n".join(lines[1:]).strip()
    return f"{lines[0]}\n\n{badges(name)}\n\n{rest}"


def rebuilt(text: str, name: str) -> str:
    """A notebook as it belongs into the repository."""
    found = json.loads(text)
    fixed = {**FIXED, "install": INSTALL.replace("EXTRAS", EXTRAS.get(name[:2], "notebook,devhub"))}
    cells = [cell(number, old, fixed) for number, old in enumerate(found["cells"], 1)]
    cells[0]["source"] = titled("".join(cells[0]["source"]), name).splitlines(keepends=True)
    notebook = {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def cell(number: int, old: dict[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    """A cell without outputs, in the order of keys that Jupyter writes."""
    tags = old.get("metadata", {}).get("tags", [])
    fixed = [sources[tag] for tag in tags if tag in sources]
    source = fixed[0] if fixed else "".join(old["source"]).strip()
    new = {
        "cell_type": old["cell_type"],
        "id": f"{number:02}",
        "metadata": {"tags": tags} if tags else {},
        "source": source.splitlines(keepends=True),
    }
    if old["cell_type"] != "code":
        return new
    return dict(sorted({**new, "execution_count": None, "outputs": []}.items()))


def main() -> int:
    """Rewrite or check."""
    stale = 0
    for path in sorted(FOLDER.glob("*.ipynb")):
        old = path.read_text(encoding="utf-8")
        new = rebuilt(old, path.name)
        if "--check" not in sys.argv:
            path.write_text(new, encoding="utf-8")
            continue
        lines = difflib.unified_diff(old.splitlines(), new.splitlines(), path.name, "now", lineterm="")
        shown = "\n".join(lines)
        sys.stdout.write(f"{shown}\n" if shown else "")
        stale += bool(shown)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
