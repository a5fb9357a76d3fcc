"""Where a data set lies: built in, a file, a folder, or the Hub."""

from __future__ import annotations

from pathlib import Path

from mso_hub.calibrate.text import through_datasets
from mso_hub.calibrate.text.files import open_jsonl, open_txt
from mso_hub.calibrate.text.opened import Opened, from_rows, label
from mso_hub.calibrate.text.python_docs import python_docs_name, split_docs
from mso_hub.calibrate.text.settings import PYTHON_DOCS, DataSet
from mso_hub.errors import RecipeError
from mso_hub.events import Listener, ignore
from mso_hub.hub import looks_like_repo
from mso_hub.plan.presets import near_word

LINES = (".jsonl", ".ndjson")
PLAIN = (".txt", ".md")
OWN = (*LINES, *PLAIN)
"""Suffixes that are read without a package."""


def open_dataset(dataset: DataSet, *, on_event: Listener = ignore) -> Opened:
    """A data set, opened: what is on this machine goes before what is on the Hub.

    Raises RecipeError for a path that names nothing, for a kind of file that is not read, and for a missing package;
    HubError and TransientError as open_hub.
    """
    if dataset.path == PYTHON_DOCS:
        rows = [{"text": text} for text in split_docs(dataset.split)]
        name = python_docs_name() + ("" if dataset.split == "train" else f" {dataset.split}")
        return from_rows(name, ("text",), rows)
    path = Path(dataset.path).expanduser()
    if path.is_file():
        return _open_file(dataset, path)
    if path.is_dir():
        return _open_folder(dataset, path)
    _require_repo(dataset, path)
    return through_datasets.open_hub(dataset, on_event=on_event)


def _open_file(dataset: DataSet, path: Path) -> Opened:
    name = label(dataset)
    if path.suffix in LINES:
        return open_jsonl(path, name, dataset.split)
    if path.suffix in PLAIN:
        return open_txt([path], name, dataset.split)
    if through_datasets.builder_of(path) is None:
        raise RecipeError(
            f"{path}: is no data set that can be read; known are {', '.join((*OWN, *through_datasets.BUILDERS))}"
        )
    return through_datasets.open_file(dataset, path)


def _open_folder(dataset: DataSet, path: Path) -> Opened:
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    if files and all(p.suffix in PLAIN for p in files):
        return open_txt(files, label(dataset), dataset.split)
    if not files:
        raise RecipeError(f"{path}: the folder holds no files; a data set is {', '.join(OWN)}, parquet or save_to_disk")
    return through_datasets.open_folder(dataset, path)


def _require_repo(dataset: DataSet, path: Path) -> None:
    """RecipeError for what is no name of a repo, so that nobody asks the Hub for a mistyped path."""
    repo = dataset.path.partition("@")[0]
    named_file = path.suffix in OWN or through_datasets.builder_of(path) is not None
    a_name = looks_like_repo(repo) or looks_like_repo(f"org/{repo}")
    if named_file or not a_name or repo.startswith("."):
        raise RecipeError(
            f"{dataset.path}: no file and no folder is there, and it is no name of a data set on the Hub (org/name); "
            f"check the path{near_word(dataset.path, [PYTHON_DOCS])}"
        )
