"""Data sets + tokenizer -> token rows.

Each data set is read in an order that its seed decides, until it has oversample_ratio times its share; then its share
is taken, what a data set lacks is filled from what the others have left, and the rows are shuffled together.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mso_hub.calibrate.text.formatters import Reading, Unreadable, choose_reading
from mso_hub.calibrate.text.opened import Opened
from mso_hub.calibrate.text.place import open_dataset
from mso_hub.calibrate.text.rows import Ids, Rows, Share, digest, pack
from mso_hub.calibrate.text.settings import TextSettings, shares
from mso_hub.calibrate.text.tokenizer import Encoder, make_encoder
from mso_hub.errors import CheckpointError, RecipeError
from mso_hub.events import Listener, ignore

LONG = 8
"""Rows that one document may fill when packed: one book must not be the whole text."""
PATIENCE = 10
"""Documents that are looked at for each one that could be needed, before a data set counts as too short."""


@dataclass(slots=True)
class _Tally:
    """What became of the documents of one data set."""

    documents: int = 0
    short: int = 0
    refused: int = 0
    why: str = ""
    ended: bool = True
    rows: list[Ids] = field(default_factory=list)


def read_text(
    settings: TextSettings, tokenizer: Any, *, vocab_size: int | None = None, positions: int | None = None,
    on_event: Listener = ignore,
) -> Rows:  # fmt: skip
    """Exactly max_samples rows of the data sets, or fewer with a warning where they do not hold that many.

    tokenizer   as open_tokenizer gives it
    vocab_size  rows of the model's embedding: a token id beyond it is an error
    positions   tokens that the model is made for, None where nobody says so: longer rows get a warning
    The same settings, data and tokenizer give the same rows, in the same order.
    Raises RecipeError for a data set that cannot be read, has no usable column or nothing left after filtering,
    CheckpointError for a tokenizer that does not belong to the model, HubError and TransientError as the Hub has it.
    """
    encoder = make_encoder(tokenizer)
    if settings.packing and settings.max_seq_len <= len(encoder.start):
        raise RecipeError(f"max_seq_len: must be above {len(encoder.start)}, got {settings.max_seq_len}")
    wishes = [dataset.weight for dataset in settings.datasets]
    wanted = shares(settings.max_samples, wishes)
    asked = shares(math.ceil(settings.max_samples * settings.oversample_ratio), wishes)
    opened = [open_dataset(dataset, on_event=on_event) for dataset in settings.datasets]
    readings = [choose_reading(dataset, one.columns) for dataset, one in zip(settings.datasets, opened, strict=True)]
    tallies = [
        _gather(settings, at, reading, one, max(rows, need), encoder)
        for at, (one, reading, rows, need) in enumerate(zip(opened, readings, asked, wanted, strict=True))
    ]
    taken = _taken([len(tally.rows) for tally in tallies], wanted)
    rows = [row for tally, count in zip(tallies, taken, strict=True) for row in tally.rows[:count]]
    random.Random(settings.seed).shuffle(rows)  # noqa: S311 - an order, no secret
    if not rows:
        raise RecipeError(_empty(settings, opened, tallies))
    notes = [note for one in opened for note in one.notes]
    _require_vocabulary(rows, vocab_size, tokenizer)
    return Rows(
        " + ".join(one.name for one in opened), tuple(rows), digest(rows),
        tuple(map(_share, opened, tallies, taken)),
        (*encoder.notes, *notes, *_warnings(settings, opened, tallies, wanted, taken, encoder, positions)),
        settings.batch_size,
    )  # fmt: skip


def _gather(settings: TextSettings, at: int, reading: Reading, opened: Opened, asked: int, encoder: Encoder) -> _Tally:
    """Rows of data set number `at`: up to `asked` of them."""
    tally = _Tally()
    tokens: float
    if settings.packing:
        body = settings.max_seq_len - len(encoder.start)
        # A document counts with its end; what does not fill a row is lost once.
        tokens, limit = asked * body, LONG * body
        most = PATIENCE * (tokens // settings.min_token_length + 1)
    else:
        tokens, limit = math.inf, settings.max_seq_len - len(encoder.start)
        most = asked
    rows = opened.rows(settings.seed + at, reading.columns, asked)
    kept: list[list[int]] = []
    for number, ids in enumerate(_documents(rows, reading, encoder, limit, tally)):
        if len(ids) >= settings.min_token_length:
            kept.append(ids)
            tokens -= len(ids) + len(encoder.end)
        elif ids:
            tally.short += 1
        if tokens <= 0 or number + 1 >= most:
            tally.ended = False
            break
    tally.documents = len(kept)
    random.Random(settings.seed + at).shuffle(kept)  # noqa: S311 - an order, no secret
    if settings.packing:
        tally.rows = list(pack(kept, settings.max_seq_len, encoder.start, encoder.end))
    else:
        tally.rows = [np.array([*encoder.start, *ids], np.int64) for ids in kept]
    return tally


def _documents(
    rows: Iterator[Any], reading: Reading, encoder: Encoder, limit: int, tally: _Tally
) -> Iterator[list[int]]:
    """Ids of every row; [] for a row that is empty or cannot be read, which the tally counts."""
    for row in rows:
        try:
            document = reading.document(row)
            ids = encoder.ids(document, limit) if document else []
        except ValueError as error:
            tally.why = (
                tally.why or f"{'/'.join(reading.columns)}: {error}" if isinstance(error, Unreadable) else str(error)
            )
            ids = []
        tally.refused += not ids
        yield ids


def _taken(have: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Rows from each data set: its share, then what the earlier of the others have beyond theirs."""
    taken = [min(a, b) for a, b in zip(have, wanted, strict=True)]
    missing = sum(wanted) - sum(taken)
    for at, rows in enumerate(have):
        more = min(missing, rows - taken[at])
        taken[at] += more
        missing -= more
    return taken


def _require_vocabulary(rows: Sequence[Ids], vocab_size: int | None, tokenizer: Any) -> None:
    largest = max(int(row.max()) for row in rows)
    if vocab_size is not None and largest >= vocab_size:
        raise CheckpointError(
            f"tokenizer: gives token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), its vocabulary has "
            f"{len(tokenizer):,} tokens, the model's embedding only {vocab_size:,} rows; the tokenizer belongs to "
            "another model"
        )


def _share(opened: Opened, tally: _Tally, taken: int) -> Share:
    tokens = sum(len(row) for row in tally.rows[:taken])
    return Share(opened.name, tally.documents, tally.short + tally.refused, taken, tokens)


def _dropped(tally: _Tally, settings: TextSettings) -> str:
    """Why documents of a data set were left out."""
    parts = [f"{tally.short:,} shorter than min_token_length {settings.min_token_length}"] if tally.short else []
    if tally.refused:
        parts.append(f"{tally.refused:,} empty or unreadable" + (f" ({tally.why})" if tally.why else ""))
    return f"left out: {', '.join(parts)}" if parts else "none was left out"


def _empty(settings: TextSettings, opened: Sequence[Opened], tallies: Sequence[_Tally]) -> str:
    """The error for a text of which nothing is left."""
    if settings.packing and any(tally.documents for tally in tallies):
        return (
            f"{' + '.join(one.name for one in opened)}: the text does not fill one row of {settings.max_seq_len} "
            "tokens; lower max_seq_len, or do without packing (--no_packing)"
        )
    if not any(tally.documents + tally.short + tally.refused for tally in tallies):
        return f"{' + '.join(one.name for one in opened)}: the split holds no documents; take a larger slice"
    found = "; ".join(
        f"{one.name}: {tally.documents + tally.short + tally.refused:,} documents read, {_dropped(tally, settings)}"
        for one, tally in zip(opened, tallies, strict=True)
    )
    return f"no text is left: {found}; name longer texts, or say min_token_length or columns in a --dataset_yaml"


def _warnings(
    settings: TextSettings, opened: Sequence[Opened], tallies: Sequence[_Tally], wanted: Sequence[int],
    taken: Sequence[int], encoder: Encoder, positions: int | None,
) -> Iterator[str]:  # fmt: skip
    """Sentences about everything that is not as it was asked for."""
    several = len(opened) > 1
    total = sum(taken)
    if total < settings.max_samples:
        reasons = "" if several else f"{_dropped(tallies[0], settings)}; "
        yield f"{total:,} rows of the {settings.max_samples:,} that were asked for; {reasons}{_way(settings, tallies)}"
    for one, tally, want, got in zip(opened, tallies, wanted, taken, strict=True):
        if got < want and several:
            yield f"{one.name}: {got:,} rows of the {want:,} of its share; {_dropped(tally, settings)}"
        elif got >= want and tally.why:
            yield f"{one.name}: {_dropped(tally, settings)}"
        if want == 0:
            yield f"{one.name}: its weight is too small for one row of {settings.max_samples:,}"
    longest = getattr(encoder.tokenizer, "model_max_length", None)
    if isinstance(positions, int) and 1 < positions < settings.max_seq_len:
        yield f"rows have {settings.max_seq_len:,} tokens, config.json says that the model takes at most {positions:,}"
    elif isinstance(longest, int) and 1 < longest < settings.max_seq_len:
        yield f"rows have {settings.max_seq_len:,} tokens, the tokenizer announces at most {longest:,} for this model"


def _way(settings: TextSettings, tallies: Sequence[_Tally]) -> str:
    """What to do about too few rows."""
    if all(tally.ended for tally in tallies):
        return "name more text" + (", or lower max_seq_len" if settings.packing else "")
    return "lower min_token_length" + ("" if settings.packing else ", or raise oversample_ratio")
