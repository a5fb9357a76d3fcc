"""The built-in text: documentation that ships inside CPython, so that calibration needs no network and no package.

The topics of `help()` and the longer docstrings of the standard library, about 1.7 million characters of English and of
Python. It is under the PSF License Agreement. It differs a little between versions of Python: the name that reports and
statistics carry holds the version and the SHA-256 of all of it.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from mso_hub.calibrate.text.settings import PYTHON_DOCS
from mso_hub.errors import RecipeError

LONG = 200
"""Docstrings of more characters than this are taken."""
LEFT_OUT = frozenset({
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "__pycache__",
})  # fmt: skip
"""Folders of the standard library that are no documentation, or that not every distribution has."""
HELD_OUT = 20
"""One document of so many belongs to the split `test`, for measurements on text that no calibration saw."""


@cache
def python_docs() -> tuple[str, ...]:
    """All documents, each once, in an order that the text alone decides; reading them takes a few seconds.

    Raises RecipeError where this Python comes without the sources of its standard library.
    """
    from pydoc_data import topics

    library = Path(sysconfig.get_paths()["stdlib"])
    found = [*topics.topics.values(), *_docstrings(library)]
    documents = sorted({text.strip() for text in found if text.strip()})
    if len(documents) < 1000:
        raise RecipeError(
            f"{PYTHON_DOCS}: {library} holds {len(documents)} documents, at least 1,000 were expected: the sources of "
            "the standard library are missing; name a data set or a file with --calib_dataset"
        )
    return tuple(documents)


def python_docs_name() -> str:
    """`python-docs 3.11.2 (sha256 0123456789abcdef)`: which text it was."""
    digest = hashlib.sha256()
    for text in python_docs():
        digest.update(hashlib.sha256(text.encode()).digest())
    return f"{PYTHON_DOCS} {platform.python_version()} (sha256 {digest.hexdigest()[:16]})"


def split_docs(split: str) -> tuple[str, ...]:
    """Documents of `train` or `test`; a document's own hash decides where it belongs, in every version of Python.

    Raises RecipeError for another split.
    """
    if split not in ("train", "test"):
        raise RecipeError(f"{PYTHON_DOCS}: has the splits train and test, got {split!r}")
    held = [hashlib.sha256(text.encode()).digest()[0] % HELD_OUT == 0 for text in python_docs()]
    return tuple(text for text, out in zip(python_docs(), held, strict=True) if out == (split == "test"))


def _docstrings(library: Path) -> Iterator[str]:
    """Long docstrings of modules, classes and functions below a folder."""
    for path in sorted(library.rglob("*.py")):
        if LEFT_OUT & set(path.relative_to(library).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > LONG:
                    yield text
