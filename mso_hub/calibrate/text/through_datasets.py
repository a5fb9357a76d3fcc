"""Data sets through the package `datasets`: parquet, arrow, csv, folders, the Hub.

What it does with a place is decided here and not left to it: it takes a file for the name of a repo, a folder of
save_to_disk for an error, and tries for 23 seconds to reach a Hub that is not there.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mso_hub.calibrate.text.opened import Opened, Row, in_window, label, parse_split, shuffled
from mso_hub.calibrate.text.settings import DEFAULT, PYTHON_DOCS, SHORT, DataSet
from mso_hub.errors import HubError, RecipeError, TransientError
from mso_hub.events import Listener, ignore
from mso_hub.hub import Client, Patience
from mso_hub.hub.client import default_patience, find_token
from mso_hub.plan.presets import near_word

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl.gz": "json",
            ".jsonl.zst": "json", ".json.gz": "json"}  # fmt: skip
"""Suffix of a file -> how `datasets` reads it."""
SAVED = ("state.json", "dataset_dict.json", "dataset_info.json")
"""Files that save_to_disk leaves in a folder."""
PROBE = 4.0
"""Seconds for which a Hub that does not answer is tried at all."""
SHARDS = 4
"""Files of a streamed data set that are read in turns."""
WINDOW = (1_000, 10_000)
"""Rows among which a streamed data set is shuffled: four times what is needed, within these limits."""


def builder_of(path: Path) -> str | None:
    """How `datasets` reads a file of this name, None for what it does not."""
    return next((builder for suffix, builder in BUILDERS.items() if path.name.endswith(suffix)), None)


def open_file(dataset: DataSet, path: Path) -> Opened:
    """A parquet, arrow, csv or JSON file. Raises RecipeError for what cannot be read."""
    return _load(dataset, label(dataset), builder_of(path), data_files=str(path))


def open_folder(dataset: DataSet, path: Path) -> Opened:
    """A folder of save_to_disk, or of data files whose names tell the splits. Raises RecipeError as open_file."""
    if not any((path / name).is_file() for name in SAVED):
        return _load(dataset, label(dataset), str(path))
    library = _datasets(dataset.path)
    with _quiet(library), _explained(dataset.path, library):
        found = library.load_from_disk(str(path))
    split = parse_split(dataset.path, dataset.split)
    splits = found if isinstance(found, library.DatasetDict) else {"train": found}
    if split.base not in splits:
        raise RecipeError(f"{dataset.path}: has the splits {', '.join(splits)}, got {split.base!r}")
    rows = splits[split.base]
    return _opened(dataset, label(dataset), rows.select(range(*split.bounds(len(rows)))))


def open_hub(dataset: DataSet, *, on_event: Listener = ignore) -> Opened:
    """A data set on the Hub, at the commit that its revision names now.

    Where the Hub does not answer within a few seconds, a copy that `datasets` has in its cache is taken, and a note
    says so; without one TransientError names the ways out. Nothing else is ever taken in place of what was asked for.
    Raises HubError for a repo that is not there or not open to this user.
    """
    library = _datasets(dataset.path)
    repo, _, revision = dataset.path.partition("@")
    offline = "HF_HUB_OFFLINE is set" if library.config.HF_HUB_OFFLINE else None
    commit = None
    if offline is None:
        patience = Patience(first=0.5, total=min(PROBE, default_patience().total), silence=PROBE)
        client = Client(patience=patience, on_event=on_event)
        try:
            commit = client.attempt(
                lambda: client.api.dataset_info(repo, revision=revision or None, timeout=PROBE).sha, what=repo
            )
        except TransientError as error:
            offline = " ".join(str(error).split("; gave up")[0].split())
        except HubError as error:
            raise HubError(f"data set {error}{near_word(repo, [PYTHON_DOCS, DEFAULT, *SHORT])}") from error
    if offline is not None:
        return _open_cached(dataset, repo, offline, library)
    what = ", ".join(filter(None, (dataset.name, dataset.split)))
    return _load(
        dataset, f"{repo} ({what}) at {str(commit)[:12]}", repo, config=dataset.name, revision=commit,
        token=find_token() or False,
    )  # fmt: skip


def _open_cached(dataset: DataSet, repo: str, why: str, library: Any) -> Opened:
    """A data set from the cache of `datasets`; TransientError when it is not there."""
    before = library.config.HF_HUB_OFFLINE
    library.config.HF_HUB_OFFLINE = True
    try:
        with _quiet(library):
            found = library.load_dataset(repo, dataset.name, split=dataset.split)
    except (OSError, ValueError, library.exceptions.DatasetsError) as error:
        raise TransientError(
            f"data set {repo}: the Hub could not be reached ({why}), and no earlier download of it is here; name a "
            f"file or a folder with --calib_dataset, or take the text that is built in: --calib_dataset {PYTHON_DOCS}"
        ) from error
    finally:
        library.config.HF_HUB_OFFLINE = before
    note = f"{repo}: the Hub could not be reached ({why}); an earlier download of the data set was taken"
    return _opened(dataset, f"{repo} ({dataset.split}, earlier download)", found, (note,))


def _load(dataset: DataSet, name: str, what: str | None, *, config: str | None = None, **settings: Any) -> Opened:
    """load_dataset with our errors; a slice of a streamed split is cut here."""
    library = _datasets(dataset.path)
    split, streaming = parse_split(dataset.path, dataset.split), dataset.streaming
    if streaming and "%" in split.first + split.last:
        raise RecipeError(f"{dataset.path}: {dataset.split}: percentages need streaming: false, or rows like [:1000]")
    with _quiet(library), _explained(dataset.path, library):
        found = library.load_dataset(
            what, config, split=split.base if streaming else dataset.split, streaming=streaming, **settings
        )
        if streaming and (split.first or split.last):
            first, end = split.bounds(sys.maxsize)
            found = found.skip(first).take(end - first)
    return _opened(dataset, name, found)


def _opened(dataset: DataSet, name: str, found: Any, notes: tuple[str, ...] = ()) -> Opened:
    """A Dataset or IterableDataset -> Opened."""
    library = _datasets(dataset.path)
    with _explained(dataset.path, library):
        columns = found.column_names or list(next(iter(found), {}))
    if not columns or (hasattr(found, "num_rows") and not found.num_rows):
        raise RecipeError(f"{dataset.path}: split {dataset.split!r} holds no rows")

    def rows(seed: int, wanted: tuple[str, ...], needed: int) -> Iterator[Row]:
        """Rows shuffled by the seed, with the wanted columns only."""
        narrow = found.select_columns(list(wanted))
        with _explained(dataset.path, library):
            if hasattr(narrow, "num_rows"):
                for at in shuffled(narrow.num_rows, seed):
                    yield narrow[at]
            else:
                window = min(max(4 * needed, WINDOW[0]), WINDOW[1])
                sliced = parse_split(dataset.path, dataset.split).base != dataset.split
                # A slice is counted in the order of the files, which turns would change.
                yield from in_window(narrow if sliced else _interleaved(narrow, seed), seed, window)

    return Opened(name, tuple(map(str, columns)), rows, notes)


def _interleaved(found: Any, seed: int) -> Iterator[Row]:
    """Rows of a streamed data set, taken in turns from SHARDS of its files at a time, which the seed picks.

    The shuffle of `datasets` itself differs between its versions, and sleeps for five seconds when it is left early.
    """
    count = found.num_shards
    order = list(shuffled(count, seed))
    for first in range(0, count, SHARDS):
        turns = [iter(found.shard(count, at)) for at in order[first : first + SHARDS]]
        while turns:
            for one in tuple(turns):
                try:
                    yield next(one)
                except StopIteration:
                    turns.remove(one)


def _datasets(what: str) -> Any:
    """The package; RecipeError where it is missing."""
    try:
        import datasets
    except ImportError as error:
        raise RecipeError(
            f"{what}: needs the package datasets ({error}); pip install 'mso-hub[calibrate]', or name a .jsonl or .txt "
            f"file, or {PYTHON_DOCS}, which need no package"
        ) from error
    return datasets


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """No bars and no log lines of `datasets`: what matters becomes an error or a note."""
    level, hidden = library.logging.get_verbosity(), library.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.logging.set_verbosity_error()
        library.disable_progress_bars()
        try:
            yield
        finally:
            library.logging.set_verbosity(level)
            if not hidden:
                library.enable_progress_bars()


@contextmanager
def _explained(what: str, library: Any) -> Iterator[None]:
    """Errors of `datasets` and of the files below it -> RecipeError, or TransientError for the network."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, library.exceptions.DatasetsError) as error:
        if isinstance(error, RecipeError | HubError):
            raise
        kind: Callable[..., Exception] = TransientError if isinstance(error, ConnectionError) else RecipeError
        raise kind(f"{what}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The first sentence of the innermost error: `datasets` says at the outside only that something went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines: Mapping[str, None] = dict.fromkeys(line.strip() for line in str(error).splitlines() if line.strip())
    return f"cannot be read by datasets: {' '.join(list(lines)[:3]) or type(error).__name__}"[:600]
