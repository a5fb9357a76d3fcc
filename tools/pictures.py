"""Take the README's picture anew: notebook 02 in JupyterLab, its panel after a run.

    python tools/pictures.py           play the notebook as `make browser` does, and write docs/images/panel.png
    python tools/pictures.py --check   exit with 1 where the picture is missing, too large, or of other cells

The picture carries the SHA-256 of the notebook's code cells; its looks may lag behind the widgets' by a release.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

from PIL import Image, PngImagePlugin

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "02_quantize.ipynb"
PICTURE = ROOT / "docs" / "images" / "panel.png"
KEY = "code-cells-sha256"
LARGEST = 200_000
"""Bytes."""
COLOURS = 256


def digest(notebook: Path) -> str:
    """Of the code alone: a corrected sentence leaves the picture as it is."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()


def shrink(taken: Path) -> None:
    """Write a screenshot with few colours, and what it is of."""
    facts = PngImagePlugin.PngInfo()
    facts.add_text(KEY, digest(NOTEBOOK))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(taken) as image:
        small = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
        small.save(PICTURE, optimize=True, pnginfo=facts)


def problems() -> list[str]:
    """What is wrong with the picture as it is."""
    where = PICTURE.relative_to(ROOT)
    if not PICTURE.is_file():
        return [f"{where}: missing; python tools/pictures.py takes it"]
    found = []
    if PICTURE.stat().st_size > LARGEST:
        found.append(f"{where}: {PICTURE.stat().st_size:,} bytes, at most {LARGEST:,}; take fewer COLOURS")
    with Image.open(PICTURE) as image:
        told = image.info.get(KEY)
    if told != digest(NOTEBOOK):
        found.append(f"{where}: {NOTEBOOK.name} had other cells then; python tools/pictures.py takes it anew")
    return found


def main() -> int:
    """Take or check."""
    if "--check" not in sys.argv:
        sys.path.insert(0, str(ROOT))
        from tests.browser.play import play

        with tempfile.TemporaryDirectory() as scratch:
            shrink(play(Path(scratch) / "play"))
    found = problems()
    sys.stdout.write("".join(f"{line}\n" for line in found))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
