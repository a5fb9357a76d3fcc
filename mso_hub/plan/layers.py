"""Numbers of decoder layers as a recipe names them: 3, "0-3" (both ends included), -1 for the last one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mso_hub.errors import RecipeError

SPAN = re.compile(r"(?P<first>-?[0-9]{1,6})(-(?P<last>-?[0-9]{1,6}))?")
EXAMPLES = '0, "0-3" or -1 (the last one)'


def split_layers(text: str) -> tuple[str, ...]:
    """`0,2-4,-1` as typed on a command line -> its parts, not yet checked."""
    return tuple(part.strip() for part in text.split(","))


def check_layers(option: str, said: Sequence[int | str]) -> None:
    """RecipeError for what is neither a number nor a range."""
    for entry in said:
        if isinstance(entry, bool) or SPAN.fullmatch(str(entry)) is None:
            raise RecipeError(f"{option} must be numbers of layers like {EXAMPLES}, got {entry!r}")


def layer_numbers(option: str, said: Sequence[int | str], count: int | None) -> tuple[frozenset[int], list[str]]:
    """The layers that are meant, and sentences about those that cannot be.

    said   numbers and ranges that `check_layers` accepts; negative ones count from the end
    count  decoder layers of the model; None where config.json does not tell
    """
    numbers: set[int] = set()
    problems: list[str] = []
    for entry in said:
        match = SPAN.fullmatch(str(entry))
        if match is None:
            continue
        ends = [int(end) for end in (match["first"], match["last"]) if end is not None]
        if count is None and min(ends) < 0:
            problems.append(
                f"{option}: {entry} counts from the last layer, config.json has no num_hidden_layers; add it, or write "
                "the number"
            )
            continue
        places = [end + (count or 0) if end < 0 else end for end in ends]
        if count is not None and not all(0 <= place < count for place in places):
            problems.append(
                f"{option}: there is no layer {entry}, config.json has num_hidden_layers {count}: 0 to {count - 1}, "
                "or -1 for the last one"
            )
        elif places[0] > places[-1]:
            problems.append(f"{option}: {entry} is no range, layer {places[0]} comes after {places[-1]}; turn it round")
        else:
            numbers.update(range(places[0], places[-1] + 1))
    return frozenset(numbers), problems
