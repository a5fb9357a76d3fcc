"""Logits -> how likely the text is, and how alike two models predict; never all logits at once.

Logits come in blocks of positions, and each block is looked at a few megabytes at a time: log-softmax in F32, sums in
F64. Nothing but three numbers a row stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from mso_hub.errors import NonFiniteError, RecipeError

PIECE = 8 << 20
"""Bytes of logits in F32 that are looked at together."""


@dataclass(frozen=True, slots=True)
class RowSums:
    """One row of text under two models; of the second one alone where there is no first.

    tokens      in the row; likelihoods are those of all but the first
    nats        sum of -log p(next token)
    reference   the same under the reference
    kl          sum over all tokens
    agreeing    tokens after which both have the same first choice
    """

    tokens: int
    nats: float
    reference: float = 0.0
    kl: float = 0.0
    agreeing: int = 0


@dataclass(frozen=True, slots=True)
class Compared:
    """All rows: `perplexity`, and where there is a reference what RowSums says, as means."""

    perplexity: float
    reference: float
    kl: float
    kl_error: float | None
    agreement: float


def summed(ids: Tensor, blocks: Iterable[Tensor], reference: Iterable[Tensor] | None = None) -> list[RowSums]:
    """Rows of one batch.

    ids        I64 [rows, length]
    blocks     logits [rows, n, V], position after position
    reference  the same of the reference, in the same blocks
    Raises RecipeError where the two have another number of logits, NonFiniteError for logits that are no numbers.
    """
    rows, length = ids.shape
    sums = torch.zeros(4, rows, dtype=torch.float64)
    at = 0
    for block, other in zip(blocks, repeat(None) if reference is None else reference, strict=reference is not None):
        if other is not None and other.shape != block.shape:
            raise RecipeError(
                f"the two models give {block.shape[-1]:,} and {other.shape[-1]:,} logits for a token; compare models "
                "with the same vocabulary"
            )
        for start, stop in _pieces(block):
            following = ids[:, at + start + 1 : at + stop + 1].to(block.device)
            sums += _piece(block[:, start:stop], None if other is None else other[:, start:stop], following).cpu()
        at += block.shape[1]
    if not bool(torch.isfinite(sums).all()):
        raise NonFiniteError(
            "logits hold NaN or infinity: the weights or the activation scales of one of the models are broken, or its "
            "numbers need more range than this dtype has"
        )
    return [RowSums(length, nats, other, kl, int(same)) for nats, other, kl, same in sums.T.tolist()]


def _pieces(block: Tensor) -> Iterator[tuple[int, int]]:
    rows, positions, vocabulary = block.shape
    step = max(1, PIECE // (4 * rows * vocabulary))
    for start in range(0, positions, step):
        yield start, min(start + step, positions)


def _piece(logits: Tensor, other: Tensor | None, following: Tensor) -> Tensor:
    """F64 [4, rows]: -log p of what follows, the same of the reference, KL, tokens with the same first choice."""
    found = torch.zeros(4, len(logits), dtype=torch.float64, device=logits.device)
    mine = logits.float().log_softmax(-1)
    found[0] = _nats(mine, following)
    if other is not None:
        theirs = other.to(logits.device).float().log_softmax(-1)
        found[1] = _nats(theirs, following)
        found[2] = (theirs.exp() * (theirs - mine)).sum((1, 2), dtype=torch.float64)
        found[3] = (mine.argmax(-1) == theirs.argmax(-1)).sum(1)
    return found


def _nats(likelihoods: Tensor, following: Tensor) -> Tensor:
    """The last position of a row is followed by nothing."""
    known = following.shape[1]
    return -likelihoods[:, :known].gather(-1, following.unsqueeze(-1)).sum((1, 2), dtype=torch.float64)


def compared(rows: Sequence[RowSums]) -> Compared:
    """Means over all rows; the KL divergence's standard error is that of rows as the units that were drawn."""
    tokens = sum(row.tokens for row in rows)
    predicted = sum(row.tokens - 1 for row in rows)
    kl = math.fsum(row.kl for row in rows) / tokens
    error = None
    if len(rows) > 1:
        spread = math.fsum((row.kl - kl * row.tokens) ** 2 for row in rows) / (len(rows) - 1)
        error = math.sqrt(spread * len(rows)) / tokens
    return Compared(
        _perplexity(math.fsum(row.nats for row in rows) / predicted),
        _perplexity(math.fsum(row.reference for row in rows) / predicted),
        kl,
        error,
        sum(row.agreeing for row in rows) / tokens,
    )


def _perplexity(nats: float) -> float:
    """exp; at most what a float holds."""
    return math.exp(min(nats, 700.0))
