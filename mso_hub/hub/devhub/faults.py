"""Faults on demand: which requests go wrong, and how."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mso_hub.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to a request; the first fault of the list that matches and is not used up, alone.

    match         regular expression, searched in "METHOD /path" (the path is decoded)
    origin        "hub", "storage" or "" for both
    after, times  let so many matching requests pass, then hit so many; times -1 for ever
    status        answer with this status and `headers`; the request does nothing
    cut           close the connection after this many bytes of the body: of the request for POST, PUT and DELETE,
                  else of the answer
    stall         stop after this many bytes of that body, the connection stays open
    corrupt       flip the bits of the byte at this offset of that body
    delay         seconds to wait first
    land          do what was asked, and only then answer with `status` or, with `cut`, close the connection
    expire        signed URLs issued until now become invalid
    token_expiry  seconds from now to the end of the Xet token that is handed out; may be negative
    """

    match: str
    origin: str = ""
    after: int = 0
    times: int = 1
    status: int = 0
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cut: int | None = None
    stall: int | None = None
    corrupt: int | None = None
    delay: float = 0.0
    land: bool = False
    expire: bool = False
    token_expiry: float | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except (re.error, TypeError) as error:
            raise RecipeError(f"match: must be a regular expression, got {self.match!r} ({error})") from error
        for name in ("after", "cut", "stall", "corrupt"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise RecipeError(f"{name}: must be a whole number of at least 0, got {value!r}")
        if self.origin not in {"", "hub", "storage"}:
            raise RecipeError(f"origin: must be hub, storage or empty, got {self.origin!r}")
        if self.status and not 200 <= self.status <= 599:
            raise RecipeError(f"status: must be from 200 to 599, got {self.status}")


def fault_from_json(value: Any) -> Fault:
    """A fault from its JSON object; RecipeError for unknown or missing keys."""
    try:
        return Fault(**value)
    except TypeError as error:
        known = ", ".join(field.name for field in dataclasses.fields(Fault))
        raise RecipeError(f"{value!r}: not a fault ({error}); known: {known}") from error


@dataclass(slots=True)
class _Live:
    fault: Fault
    skip: int
    left: int


class Faults:
    """The list of a server."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: list[_Live] = []

    def add(self, faults: list[Fault]) -> None:
        """Append faults; earlier ones come first."""
        with self._lock:
            self._live += [_Live(fault, fault.after, fault.times) for fault in faults]

    def clear(self) -> None:
        """Forget all faults."""
        with self._lock:
            self._live = []

    def hit(self, origin: str, request: str) -> Fault | None:
        """The fault for a request "METHOD /path", which counts as one of its `times`."""
        with self._lock:
            for live in self._live:
                fault = live.fault
                if fault.origin not in {"", origin} or live.left == 0 or not re.search(fault.match, request):
                    continue
                if live.skip:
                    live.skip -= 1
                    continue
                live.left -= 1 if live.left > 0 else 0
                return fault
        return None
