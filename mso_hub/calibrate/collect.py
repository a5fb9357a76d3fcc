"""A walk over some text -> statistics: START HERE for `mso-hub calibrate`.

FILE.partial/            beside the FILE to be written, until that is complete
    job.json             which model, which text, which settings: another job may not go on with it
    layer-00012.safetensors   statistics of what ran together with a decoder layer; the last one of what followed them
    state/               outputs of the last complete layer, from which the walk goes on

A layer's statistics are on the disk before its state is, so a run that was killed anywhere loses at most the layer in
hand, and ends with the bytes of a run that was not.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import torch

from mso_hub.calibrate.collector import Collector, Found
from mso_hub.calibrate.identity import fingerprint, named
from mso_hub.calibrate.scales import planned_names
from mso_hub.calibrate.statistics import (
    CHANNELS,
    KIND,
    Provenance,
    Statistics,
    partial_folder,
    plain,
    read_statistics,
    write_statistics,
    write_whole,
)
from mso_hub.calibrate.text import Rows
from mso_hub.calibrate.walk import Memory, State, Walk
from mso_hub.checkpoint import Array
from mso_hub.errors import MsoError, RecipeError, ResumeError, SinkError
from mso_hub.events import Calibrated, Calibrating, Listener, ignore
from mso_hub.source import Source, open_source

JOB = "job.json"
OURS = re.compile(r"lock|job\.json|state|layer-\d+\.safetensors|\..*\.mso-partial")
"""Names in the folder of unfinished work."""
RESERVE = 64 << 20
"""Bytes beside the states of two layers: statistics, folders."""


def collect_statistics(
    source: str | Path | Source,
    rows: Rows | Callable[[Walk], Rows],
    output: str | Path,
    *,
    dtype: str | None = None,
    attention: str | None = None,
    experts: str = "expert",
    device: str | Sequence[str] = "cpu",
    memory: Memory | None = None,
    trust_remote_code: bool = False,
    channels: bool = False,
    fresh: bool = False,
    needs: Sequence[str] = (),
    on_event: Listener = ignore,
) -> Statistics:
    """Run a model over text and write what its linear layers got; goes on where an earlier run of the same job ended.

    source    folder, hf://org/name@revision, or an object that speaks the protocol
    rows      the text, as `text.read_text` gives it; or a function that reads it once it is sure that the model can run
    output    file to write; one that is there already is taken where it is of the same job
    dtype, attention, experts, device, memory, trust_remote_code   as in Walk
    channels  keep magnitudes and second moments of each input column too, for methods that need them
    fresh     discard statistics that are there, finished or not
    needs     modules, as a plan calls them, that must get statistics: RecipeError before the first layer where they
              would not
    Raises what Walk raises, ResumeError for unfinished work of another job, SinkError where the disk does not take it.
    """
    path = Path(output)
    if isinstance(source, str | Path):
        with closing(open_source(source, on_event=on_event)) as opened:
            return collect_statistics(
                opened, rows, path, dtype=dtype, attention=attention, experts=experts, device=device, memory=memory,
                trust_remote_code=trust_remote_code, channels=channels, fresh=fresh, needs=needs, on_event=on_event,
            )  # fmt: skip
    _require_place(path, source)
    walk = Walk(
        source, dtype=dtype, attention=attention, experts=experts, device=device, memory=memory,
        trust_remote_code=trust_remote_code, on_event=on_event,
    )  # fmt: skip
    _require_reached(walk, needs)
    rows = rows if isinstance(rows, Rows) else rows(walk)
    settings = f"attention {attention or 'of the model'}, experts {experts}, batches of {rows.batch_size}"
    made = provenance(walk, rows, settings + (", columns" if channels else ""))
    if fresh:
        _require_ours(path)
        path.unlink(missing_ok=True)
        _discard(path)
    elif (found := _finished(path, made)) is not None:
        _discard(path)
        on_event(Calibrated(str(path), len(found.amax)))
        return found
    with _work_folder(path, made) as folder:
        _run(walk, rows, folder, made, channels=channels, on_event=on_event)
        _join(folder, path, made, walk.modules)
    _discard(path)
    statistics = read_statistics(path)
    on_event(Calibrated(str(path), len(statistics.amax)))
    return statistics


def provenance(walk: Walk, rows: Rows, settings: str) -> Provenance:
    """What a walk over some rows is to be called."""
    source, commit = named(walk.source)
    return Provenance(
        plain(source), commit, walk.checkpoint.identity, fingerprint(walk.source, walk.checkpoint), plain(rows.name),
        len(rows.sequences), rows.tokens, rows.sha256, walk.dtype, settings, walk.layers, version("mso-hub"),
        torch.__version__, version("transformers"),
    )  # fmt: skip


def _require_place(path: Path, source: Source) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        found = "a folder" if path.is_dir() else f"no folder {path.absolute().parent}"
        raise RecipeError(f"{path}: statistics need the name of a file in a folder that exists, found {found}")
    folder = path.absolute().parent.resolve()
    if source.path is not None and source.path.resolve() in (folder, *folder.parents):
        raise RecipeError(f"{path}: lies in the folder of the model, of which it would become a part; choose another")


def _require_ours(path: Path) -> None:
    """RecipeError for a file that --fresh must not replace: no statistics, whole or damaged, nor empty."""
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            if KIND.partition(",")[0].encode() not in file.read(1 << 16):
                raise RecipeError(f"{path}: holds no statistics, --fresh leaves it alone; choose another name")


def _require_reached(walk: Walk, needs: Sequence[str]) -> None:
    """RecipeError for modules that would get no statistics, before hours of work."""
    reached = {name for module in walk.modules for name in planned_names(module)}
    lost = [module for module in needs if module not in reached]
    if lost:
        raise RecipeError(
            f"{lost[0]}: would get no statistics, nor would {len(lost) - 1:,} others: the model does not run it for "
            "text (multi-token prediction, vision, ...); ignore it (--ignore), or give one scale for all with "
            "--input_scale 1.0"
        )


def _finished(path: Path, made: Provenance) -> Statistics | None:
    """Complete statistics of this very job, None where there are none; RecipeError where a file is something else."""
    if not path.exists():
        return None
    found = read_statistics(path)
    if found.provenance.job != made.job:
        raise RecipeError(
            f"{path}: holds other statistics: {_difference(found.provenance, made)}; write to another file, or replace "
            "it with --fresh"
        )
    return found


def _difference(old: Provenance, new: Provenance) -> str:
    """The first thing in which two jobs differ."""
    for field, was in old.job.items():
        now = new.job[field]
        if was != now:
            return f"{field} was {was}, is {now}"
    return "versions"


@contextmanager
def _work_folder(path: Path, made: Provenance) -> Iterator[Path]:
    """The folder of unfinished work, locked; ResumeError where it is another job's or in use."""
    folder = partial_folder(path)
    try:
        folder.mkdir(exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise SinkError(f"{folder}: cannot be made: {error.strerror}; check its permissions") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ResumeError(f"{folder}: another process calibrates there; wait for it, or end it") from error
        job = {**made.job, "mso_hub": made.mso_hub, "torch": made.torch, "transformers": made.transformers}
        known = _read_job(folder / JOB)
        if known is not None and known != job:
            changed = next((k for k in job if known.get(k) != job[k]), "the kind of file")
            raise ResumeError(
                f"{folder}: an unfinished calibration lies there, of another job: {changed} was {known.get(changed)}, "
                f"is {job.get(changed)}; repeat its settings to go on, or discard it with --fresh"
            )
        if known is None:
            write_whole(folder / JOB, [json.dumps(job, indent=2).encode()])
        try:
            yield folder
        except MsoError:
            if not any(folder.glob("layer-*.safetensors")):  # nothing to go on from
                with suppress(ResumeError):
                    _discard(path)
            raise


def _read_job(path: Path) -> dict[str, object] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ResumeError(f"{path}: not written by this tool; discard it with --fresh")
    return found


def _discard(path: Path) -> None:
    """Remove unfinished work; ResumeError where the folder holds anything else."""
    folder = partial_folder(path)
    if not folder.is_dir():
        return
    strange = sorted(entry.name for entry in folder.iterdir() if not OURS.fullmatch(entry.name))
    if strange:
        raise ResumeError(
            f"{folder}: holds files that are not of a calibration: {', '.join(strange[:3])}; move them away"
        )
    shutil.rmtree(folder)


def _run(
    walk: Walk, rows: Rows, folder: Path, made: Provenance, *, channels: bool, on_event: Listener
) -> None:  # fmt: skip
    """All layers that an earlier run has not done, each with its statistics on the disk before its state is."""
    state = State(folder / "state")
    _require_space(walk, rows, folder)
    on_event(Calibrating(made.text, made.tokens, made.layers, state.layers_done))

    def save(layer: int, found: Mapping[str, Found], caches: Mapping[str, tuple[float, float]]) -> None:
        """Statistics of one layer -> its file."""
        part = Statistics(
            made,
            {module: one.amax for module, one in found.items()},
            {module: one.tokens for module, one in found.items()},
            caches,
        )
        vectors = {f"{m}.{kind}": values for m, one in found.items() for kind, values in one.vectors.items()}
        shapes = {name: values.shape for name, values in vectors.items()}
        write_statistics(_part(folder, layer), part, shapes, (vectors[name] for name in sorted(vectors)))

    collector = Collector(save, channels=channels, on_event=on_event)
    batches = [torch.from_numpy(batch) for batch in rows.batches()]
    try:
        walk.run(batches, collector, start=state)
    finally:
        walk.close()
    collector.flush(walk.layers)


def _require_space(walk: Walk, rows: Rows, folder: Path) -> None:
    """SinkError where the states of two layers would not fit on the disk."""
    width = getattr(walk.config.get_text_config(), "hidden_size", 0)
    needed = 2 * rows.tokens * width * (4 if walk.dtype == "F32" else 2) + RESERVE
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if needed - held > free:
        raise SinkError(
            f"{folder}: needs about {needed:,} bytes to go on after every layer, {free:,} are free; free some, or take "
            "fewer rows (--calib_size)"
        )


def _part(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:05}.safetensors"


def _join(folder: Path, path: Path, made: Provenance, modules: Sequence[str]) -> None:
    """Statistics of all layers -> one file; modules that nothing reached are in it with zeros."""
    parts = [read_statistics(_part(folder, layer), part=True) for layer in range(made.layers + 1)]
    amax = dict.fromkeys(modules, 0.0)
    tokens = dict.fromkeys(modules, 0)
    caches: dict[str, tuple[float, float]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    homes: dict[str, list[Statistics]] = {}
    for part in parts:
        for module, value in part.amax.items():
            amax[module] = max(value, amax.get(module, 0.0))
            tokens[module] = tokens.get(module, 0) + part.tokens[module]
        for module, pair in part.caches.items():
            before = caches.get(module, (0.0, 0.0))
            caches[module] = max(pair[0], before[0]), max(pair[1], before[1])
        shapes |= {name: info.shape for name, info in part.vectors.items()}
        for name in part.vectors:
            homes.setdefault(name, []).append(part)
    read = (_merged(name, homes[name]) for name in sorted(homes))
    write_statistics(path, Statistics(made, amax, tokens, caches), shapes, read)


def _merged(name: str, parts: Sequence[Statistics]) -> Array:
    """One vector of a module that ran beside several layers."""
    module, _, kind = name.rpartition(".")
    values = [part.vector(module, kind) for part in parts]
    if len(parts) == 1:
        return values[0]
    if kind == CHANNELS:
        largest: Array = torch.stack([torch.from_numpy(v) for v in values]).amax(0).numpy()
        return largest
    counts = [part.tokens[module] for part in parts]
    total = sum(torch.from_numpy(v).double() * n for v, n in zip(values, counts, strict=True)) / sum(counts)
    merged: Array = torch.as_tensor(total).float().numpy()
    return merged
