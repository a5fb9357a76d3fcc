"""One run of a method as a job: checked before hours of work, locked, shown, and gone on with after any end."""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from mso_hub.calibrate.cache import State
from mso_hub.calibrate.methods.gptq import MethodSettings
from mso_hub.calibrate.methods.run import choose_targets, run
from mso_hub.calibrate.methods.targets import Target
from mso_hub.calibrate.methods.work import STATE
from mso_hub.calibrate.text import Rows
from mso_hub.calibrate.walk import Walk
from mso_hub.errors import MsoError, ResumeError, SinkError
from mso_hub.events import Calibrating, Listener, MethodDone, ignore
from mso_hub.plan import Plan, Recipe
from mso_hub.plan.method import PACKED, Method
from mso_hub.source import Source

RESERVE = 64 << 20
"""Bytes that stay free beyond what a job writes."""
EFFECTIVE = {
    "gptq": ("dampening_frac", "actorder", "least_rows"),
    "weighted": ("least_rows",),
    "awq": ("least_rows",),
    "smoothquant": ("alpha",),
}
"""Settings that each method looks at."""
LOCK, STATISTICS = "lock", "statistics.safetensors"
OURS = re.compile(
    r"job\.json(\.tmp)?|lock|state|layer-\d{5}\.(safetensors|json|tmp|json\.tmp)|experts-.*"
    r"|statistics\.safetensors(\.partial)?"
)
"""What a work folder may hold; with anything else in it, it is not removed."""


@dataclass(frozen=True, slots=True)
class MethodJob:
    """A method, ready to run.

    plan     what the conversion will do with the walk's source
    targets  weights that it quantizes
    """

    walk: Walk
    rows: Rows
    recipe: Recipe
    name: str
    settings: MethodSettings
    plan: Plan
    targets: tuple[Target, ...]

    @classmethod
    def build(cls, walk: Walk, rows: Rows, recipe: Recipe, name: str, settings: MethodSettings) -> MethodJob:
        """Raises what `choose_targets` raises."""
        plan, targets, _ = choose_targets(walk, recipe, name)
        return cls(walk, rows, recipe, name, settings, plan, tuple(targets))

    def made(self, also: str = "") -> Method:
        """What mso_hub.json will say; `also` is in its key: what else decides about the output."""
        used = {name: value for name, value in asdict(self.settings).items() if name in EFFECTIVE[self.name]}
        recipe = {key: value for key, value in asdict(self.recipe).items() if key != "unloadable"}
        parts = [
            self.walk.checkpoint.identity, recipe, self.name, used, self.rows.sha256, self.rows.batch_size,
            self.walk.dtype, also,
        ]  # fmt: skip
        key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
        return Method(
            self.name, self.rows.name, len(self.rows.sequences), self.rows.tokens, self.rows.sha256, key, used
        )

    def run(self, folder: Path, *, also: str = "", on_event: Listener = ignore) -> tuple[Source, Method]:
        """Do the work in a folder, or what is left of it -> the source to be converted, and what to say of it.

        Nothing is left behind by a refusal before the first layer is complete. Raises what `run` raises, SinkError
        where the disk does not take it. Hold `locked(folder)` meanwhile.
        """
        self._require_space(folder)
        done = State(folder / STATE).layers_done
        on_event(Calibrating(self.rows.name, self.rows.tokens, self.walk.layers, done))
        batches = [torch.from_numpy(batch) for batch in self.rows.batches()]
        try:
            found = run(self.walk, batches, self.recipe, folder, method=self.name, settings=self.settings)
        except OSError as error:
            if isinstance(error, MsoError):
                raise
            raise SinkError(
                f"{folder}: cannot be written: {error.strerror}; free some space, then run the same command"
            ) from error
        finally:
            self.walk.close()
        on_event(MethodDone(self.name, str(folder)))
        return found.source, replace(self.made(also), notes=found.notes)

    def _require_space(self, folder: Path) -> None:
        """SinkError where packed weights and the states of two layers would not fit on the disk."""
        width = getattr(self.walk.config.get_text_config(), "hidden_size", 0)
        needed = 2 * self.rows.tokens * width * (4 if self.walk.dtype == "F32" else 2) + RESERVE
        if self.name in PACKED:
            needed += sum(info.nbytes for target in self.targets for info in target.outputs)
        held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(folder).free
        if needed - held > free:
            raise SinkError(
                f"{folder}: needs about {needed - held:,} bytes more for the work of --method {self.name}, {free:,} "
                "are free; free some, or take fewer rows (--calib_size)"
            )


@contextmanager
def locked(folder: Path, *, fresh: bool = False) -> Iterator[None]:
    """Hold a work folder; ResumeError where another process does. `fresh` discards what is in it.

    A folder in which no layer is complete is removed when the block ends with an error of ours.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise SinkError(f"{folder}: cannot be made: {error.strerror}; check its permissions") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ResumeError(f"{folder}: another process works there; wait for it, or end it") from error
        try:
            if fresh:
                discard(folder, but=(LOCK,))
            yield
        except MsoError:
            if not any(folder.glob("layer-*.safetensors")) and not any(folder.glob(f"{STATISTICS}*")):
                discard(folder)
            raise


def discard(folder: Path, *, but: Sequence[str] = ()) -> None:
    """Remove a work folder, or what is in it but some names; ResumeError where it holds anything that is not ours."""
    if not folder.is_dir():
        return
    entries = sorted(folder.iterdir())
    if strange := [entry.name for entry in entries if not OURS.fullmatch(entry.name)]:
        raise ResumeError(f"{folder}: holds files that are not of a method: {', '.join(strange[:3])}; move them away")
    for entry in (entry for entry in entries if entry.name not in but):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    if not but:
        folder.rmdir()
