"""KL divergence for one group of weights and one format after another: which weights a model can spare bits of.

Each trial quantizes one group of weights (and what it is multiplied with, where the format does that) and leaves all
else alone. Nothing before the group's first layer changes, so a trial starts from the outputs of the layer before it,
which the unchanged model has left in files; its cost is the layers from there on. One more trial a format takes all
groups together, to show how far the sum over groups is from it.

The sum is what a choice of formats can be optimised by: for small errors KL is quadratic in the change of the logits,
and where changes of several groups are independent with mean 0 their mixed terms vanish in the mean.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mso_hub.calibrate.cache import Cache, FileCache, MemoryCache, State
from mso_hub.calibrate.evaluate.activations import Quantizer
from mso_hub.calibrate.evaluate.inputs import Wish, of_arguments, quantizers
from mso_hub.calibrate.evaluate.measure import Compared, RowSums, compared, summed
from mso_hub.calibrate.evaluate.planned import Encoded, Planned
from mso_hub.calibrate.evaluate.run import Settings, batches_of, hidden_states, make_walk
from mso_hub.calibrate.evaluate.subject import Runtime, no_caches
from mso_hub.calibrate.scales import LEAST, planned_names
from mso_hub.calibrate.text import Rows
from mso_hub.calibrate.walk import Observer
from mso_hub.events import Calibrating, Event, LayerDone, Listener, ignore
from mso_hub.formats import Format
from mso_hub.formats.weight import Weight
from mso_hub.source import Source


@dataclass(frozen=True, slots=True)
class Trial:
    """Some weights under one format.

    group  name of the weights; "" for those of all groups
    label  of the format
    units  the weights, those that engines fuse together
    """

    group: str
    label: str
    units: tuple[tuple[Weight, ...], ...]
    form: Format


@dataclass(frozen=True, slots=True)
class Cost:
    """What trials take: `passes` of one layer each, where one evaluation of the source takes `layers`."""

    trials: int
    layers: int
    passes: int

    def __str__(self) -> str:
        """For people."""
        return (
            f"{self.trials:,} trials, {self.passes:,} passes through a layer: as long as "
            f"{self.passes / self.layers:,.1f} runs of the model over the text"
        )


class Sensitivity:
    """Trials on a source, whose cost is known before they run.

    Raises what Walk raises; only headers are read before `run`.
    """

    def __init__(
        self,
        source: Source,
        rows: Rows,
        trials: Iterable[Trial],
        *,
        settings: Settings | None = None,
        on_event: Listener = ignore,
    ) -> None:
        self._source, self._rows = source, rows
        self._steps = _Steps(on_event)
        self._walk = make_walk(source, settings or Settings(), self._steps)
        self._stored = {planned: m for m in self._walk.modules for planned in planned_names(m)}
        self._at: dict[int, list[Trial]] = {}
        for trial in trials:
            if (layer := self._layer(trial)) is not None:
                self._at.setdefault(layer, []).append(trial)

    @property
    def cost(self) -> Cost:
        """One run of the unchanged model, one up to the last trial's layer, and every trial from its layer on."""
        layers = self._walk.layers
        passes = sum((layers - at) * len(trials) for at, trials in self._at.items())
        return Cost(sum(map(len, self._at.values())), layers, layers + max(self._at, default=0) + passes)

    def run(self) -> dict[str, dict[str, Compared]]:
        """Group -> label -> what it does; groups that the model does not use for text are left out."""
        batches = batches_of(self._rows)
        self._steps.begin(self._rows, self.cost.passes)
        found: dict[str, dict[str, Compared]] = {}
        with ExitStack() as stack:
            stack.callback(self._walk.close)
            watch = _Largest({}, no_caches, self._steps)
            reference = stack.enter_context(hidden_states(self._walk, watch, batches))
            where = self._walk.memory.work
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mso-hub-", dir=where)))
            for layer in range(self._walk.layers + 1):
                for trial in self._at.get(layer, ()):
                    observer = self._observer(trial, watch.amax)
                    made = self._measure(observer, batches, reference, folder if layer else None)
                    found.setdefault(trial.group, {})[trial.label] = made
                if layer < self._walk.layers and any(at > layer for at in self._at):
                    self._advance(batches, folder)
        return found

    def _layer(self, trial: Trial) -> int | None:
        """First decoder layer in which a trial changes anything; the number of layers for what follows them."""
        stored = {self._stored[w.module] for members in trial.units for w in members if w.module in self._stored}
        numbers = [self._walk.layer_of(module) for module in stored]
        return min((self._walk.layers if n is None else n for n in numbers), default=None)

    def _observer(self, trial: Trial, amax: Mapping[str, float]) -> Planned:
        modules = [w.module for members in trial.units for w in members]
        encoded = Encoded(self._source, trial.units, dict.fromkeys(modules, trial.form))
        return Planned(encoded, self._inputs(trial, modules, amax), no_caches, self._steps)

    def _inputs(self, trial: Trial, modules: Sequence[str], amax: Mapping[str, float]) -> dict[str, Quantizer]:
        """Activations as the format has them; static scales are those of the largest magnitude that there was."""
        said = trial.form.group["input_activations"]
        if said is None:
            return {}
        wishes: dict[str, Wish] = {module: of_arguments(said, module) for module in modules}

        def read(name: str) -> Tensor:
            module = name.rpartition(".")[0]
            largest = max(LEAST, amax.get(self._stored.get(module, module), LEAST)) * trial.form.headroom
            scale = torch.tensor(trial.form.input_scale(largest))
            return 1 / scale if wishes[module].divisor else scale

        found = quantizers(wishes, read)
        return {self._stored[module]: found[module] for module in modules if module in self._stored}

    def _measure(self, observer: Runtime, batches: Sequence[Tensor], reference: Cache, folder: Path | None) -> Compared:
        sums: list[RowSums] = []

        def measure(number: int, hidden: Tensor) -> None:
            blocks = self._walk.head(hidden, observer)
            sums.extend(summed(batches[number], blocks, self._walk.head(reference.get(number))))

        start = None if folder is None else _From(folder)
        self._walk.run(batches, observer, start=start, logits=measure)
        return compared(sums)

    def _advance(self, batches: Sequence[Tensor], folder: Path) -> None:
        """One more layer of the unchanged model into the folder."""
        self._steps.stops = True
        with suppress(_Enough):
            self._walk.run(batches, Observer(), start=State(folder))
        self._steps.stops = False


class _Largest(Runtime):
    """Keeps the largest magnitude of every module's input."""

    def __init__(self, inputs: Mapping[str, Quantizer], caches: Callable[[str], None], on_event: Listener) -> None:
        super().__init__(inputs, caches, on_event)
        self.amax: dict[str, float] = {}

    def inputs(self, module: str, x: Tensor) -> Tensor:
        if x.numel():
            self.amax[module] = max(float(x.abs().amax()), self.amax.get(module, 0.0))
        return super().inputs(module, x)


class _Enough(Exception):
    """Ends a walk after a layer; no error: one layer was all that was wanted."""


class _Steps:
    """Layers of all walks, counted on; ends a walk after one layer when it is told to.

    stops  the walk that runs now ends with its next layer
    """

    def __init__(self, on_event: Listener) -> None:
        self._on_event, self._done, self._total = on_event, 0, 1
        self.stops = False

    def begin(self, rows: Rows, passes: int) -> None:
        """So many passes through a layer are to come."""
        self._total = passes
        self._on_event(Calibrating(rows.name, rows.tokens, passes, 0))

    def __call__(self, event: Event) -> None:
        """Pass one on."""
        if not isinstance(event, LayerDone):
            self._on_event(event)
            return
        self._done += 1
        self._on_event(replace(event, index=self._done - 1, layers=self._total))
        if self.stops:
            raise _Enough


class _View(FileCache):
    """Outputs of a layer in files that others need: read, never removed; what follows them lies in memory."""

    def __init__(self, folder: Path, layer: int) -> None:
        super().__init__(folder, layer, durable=True)
        self._after: MemoryCache = MemoryCache()
        self._turned = False

    def put(self, batch: int, tree: object) -> None:
        """In memory."""
        self._after.put(batch, tree)

    def get(self, batch: int) -> object:
        """From the files until a layer is complete."""
        return self._after.get(batch) if self._turned else super().get(batch)

    def turn(self, layer: int) -> None:
        """Nothing is written."""
        self._turned = True

    def drop_before(self) -> None:
        """Nothing is removed."""


class _From(State):
    """A state that a walk starts from and leaves as it is."""

    def open(self, key: str) -> FileCache:
        """The outputs that it holds."""
        super().open(key)
        return _View(self.folder, self.layers_done - 1)

    def advance(self, cache: FileCache, layer: int, key: str) -> None:
        """Nothing is kept."""
