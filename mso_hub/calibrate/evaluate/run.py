"""START HERE: text through a checkpoint, and through the one that it was made from -> Evaluation.

Both are walked layer by layer, one after the other. Of the first, the reference, the normed hidden states stay (tokens
* H numbers, in files where main memory is limited); its logits are made of them block by block when those of the second
are there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from mso_hub.calibrate.cache import Cache, FileCache, MemoryCache
from mso_hub.calibrate.evaluate.measure import Compared, RowSums, compared, summed
from mso_hub.calibrate.evaluate.planned import as_planned
from mso_hub.calibrate.evaluate.subject import Runtime, Subject, as_stored
from mso_hub.calibrate.identity import fingerprint, named
from mso_hub.calibrate.text import Rows, open_tokenizer
from mso_hub.calibrate.walk import Memory, Walk
from mso_hub.errors import CheckpointError, RecipeError
from mso_hub.events import Calibrating, Evaluated, Event, LayerDone, Listener, ignore
from mso_hub.plan import Recipe
from mso_hub.plan.evaluation import Evaluation, Reference
from mso_hub.source import Source, open_source


@dataclass(frozen=True, slots=True)
class Settings:
    """How models are run, as Walk has it."""

    dtype: str | None = None
    attention: str | None = None
    experts: str = "expert"
    device: str | Sequence[str] = "cpu"
    memory: Memory | None = None
    trust_remote_code: bool = False


def evaluate(
    source: str | Path | Source,
    rows: Rows,
    *,
    against: str | Path | Source | None = None,
    recipe: Recipe | None = None,
    weights_only: bool = False,
    settings: Settings | None = None,
    on_event: Listener = ignore,
) -> Evaluation:
    """How likely a text is for a checkpoint, and how like those of another one its predictions are.

    source        folder, hf://org/name@revision, or an object that speaks the protocol
    rows          the text, as `text.read_text` gives it
    against       the reference, most often what the source was quantized from
    recipe        quantize the source's weights with it as they are read, without writing anything; the reference is the
                  source as it is, unless there is another
    weights_only  leave activations, keys and values alone where a config announces that they are quantized
    Raises CheckpointError for activations that are not known here and for what Walk cannot read, RecipeError for
    models with different vocabularies, PlanError for a recipe that the source does not fit.
    """
    how = settings or Settings()
    with ExitStack() as stack:

        def opened(where: str | Path | Source) -> Source:
            """What was opened here is closed here."""
            if not isinstance(where, str | Path):
                return where
            return stack.enter_context(closing(open_source(where, on_event=on_event)))

        mine = opened(source)
        theirs = None if against is None else opened(against)
        if theirs is None and recipe is not None:
            theirs = mine
        progress = Progress(on_event, rows)
        walk = make_walk(mine, how, progress)
        subject = (
            as_stored(walk, weights_only=weights_only, on_event=progress)
            if recipe is None
            else as_planned(walk, recipe, weights_only=weights_only, on_event=progress)
        )
        other = None
        if theirs is not None:
            other_walk = make_walk(theirs, how, progress)
            require_same_vocabulary(walk, other_walk)
            other = as_stored(other_walk, weights_only=weights_only, on_event=progress)
        progress.expect(walk.layers + (other.walk.layers if other else 0))
        found = _compare(subject, other, rows, progress)
    made = evaluation(subject, other, rows, found)
    compared_with = made.reference
    on_event(
        Evaluated(made.perplexity, None, None)
        if compared_with is None
        else Evaluated(made.perplexity, compared_with.kl, compared_with.agreement)
    )
    return made


def make_walk(source: Source, how: Settings, on_event: Listener) -> Walk:
    """A walk with these settings."""
    return Walk(
        source, dtype=how.dtype, attention=how.attention, experts=how.experts, device=how.device, memory=how.memory,
        trust_remote_code=how.trust_remote_code, on_event=on_event,
    )  # fmt: skip


def evaluation(subject: Subject, other: Subject | None, rows: Rows, found: Compared) -> Evaluation:
    """The numbers with what they are of."""
    walk = subject.walk
    source, commit = named(walk.source)
    reference = None
    if other is not None:
        reference = Reference(
            *named(other.walk.source), found.reference, found.kl, found.kl_error, found.agreement
        )  # fmt: skip
    return Evaluation(
        source, commit, fingerprint(walk.source, walk.checkpoint), subject.scheme, dict(subject.activations),
        len(subject.observer.attention), rows.name, len(rows.sequences), rows.tokens, rows.sha256, walk.dtype,
        version("mso-hub"), found.perplexity, reference, subject.notes, subject.tried,
    )  # fmt: skip


def _compare(subject: Subject, other: Subject | None, rows: Rows, progress: Progress) -> Compared:
    batches = batches_of(rows)
    sums: list[RowSums] = []
    with ExitStack() as stack:
        kept = None
        if other is not None:
            stack.callback(other.walk.close)
            kept = stack.enter_context(hidden_states(other.walk, other.observer, batches))
            progress.next_walk(other.walk.layers)
        stack.callback(subject.walk.close)

        def measure(number: int, hidden: Tensor) -> None:
            """One batch behind the last layer."""
            blocks = subject.walk.head(hidden, subject.observer)
            theirs = None
            if other is not None and kept is not None:
                theirs = other.walk.head(kept.get(number), other.observer)
            sums.extend(summed(batches[number], blocks, theirs))

        subject.walk.run(batches, subject.observer, logits=measure)
    return compared(sums)


@contextmanager
def hidden_states(walk: Walk, observer: Runtime, batches: Sequence[Tensor]) -> Iterator[Cache]:
    """A walk, and what its head gets for every batch: in files where main memory is limited."""
    with ExitStack() as stack:
        cache: Cache = MemoryCache()
        if walk.memory.cpu is not None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mso-hub-", dir=walk.memory.work))
            cache = FileCache(Path(folder))
        walk.run(batches, observer, logits=cache.put)
        cache.turn(0)
        yield cache


def batches_of(rows: Rows) -> list[Tensor]:
    """Token ids I64 [rows, length] each; RecipeError for rows of which nothing can be predicted."""
    if min(len(sequence) for sequence in rows.sequences) < 2:
        raise RecipeError(
            f"{rows.name}: has rows of one token, after which nothing is to be predicted; raise --max_seq_len"
        )
    return [torch.from_numpy(batch) for batch in rows.batches()]


def require_same_vocabulary(walk: Walk, other: Walk) -> None:
    """RecipeError for models whose token ids cannot mean the same, by their size and by their tokenizers."""
    names = f"{walk.source.name} and {other.source.name}"
    if walk.vocab_size != other.vocab_size:
        raise RecipeError(
            f"{names}: have {walk.vocab_size:,} and {other.vocab_size:,} token ids; only models with the same "
            "vocabulary can be compared"
        )
    if walk.source is other.source:
        return
    mine, theirs = (_vocabulary(one) for one in (walk, other))
    if mine is None or theirs is None or mine == theirs:
        return
    changed = next(token for token in (*mine, *theirs) if mine.get(token) != theirs.get(token))
    raise RecipeError(
        f"{names}: have different tokenizers: {changed!r} is {mine.get(changed, 'no token')} and "
        f"{theirs.get(changed, 'no token')}; only models with the same vocabulary can be compared"
    )


def _vocabulary(walk: Walk) -> dict[str, int] | None:
    """Token -> id; None for a checkpoint without a tokenizer, or whose tokenizer would run its own code."""
    try:
        found: dict[str, int] = open_tokenizer(walk.source).get_vocab()
    except CheckpointError:
        return None
    return found


class Progress:
    """Events of one walk after another as those of one: layers are counted on."""

    def __init__(self, on_event: Listener, rows: Rows) -> None:
        self._on_event, self._rows = on_event, rows
        self._total, self._before = 0, 0

    def expect(self, layers: int) -> None:
        """So many layers will be walked in all."""
        self._total = layers
        self._on_event(Calibrating(self._rows.name, self._rows.tokens, layers, 0))

    def next_walk(self, layers: int) -> None:
        """A walk over so many layers is complete."""
        self._before += layers

    def __call__(self, event: Event) -> None:
        """Pass one on."""
        if isinstance(event, LayerDone):
            event = replace(event, index=event.index + self._before, layers=max(self._total, 1))
        self._on_event(event)
