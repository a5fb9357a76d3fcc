"""How weights were quantized where that took more than rounding, for mso_hub.json, model cards and notes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PACKED = ("gptq", "weighted")
"""Methods that choose codes: what they stand for can be compared with the source."""
FOLDED = ("awq", "smoothquant")
"""Methods that move scales between weights: what is stored are other numbers than the source's."""
TITLES = {"gptq": "GPTQ", "weighted": "importance-weighted scale search", "awq": "AWQ", "smoothquant": "SmoothQuant"}


@dataclass(frozen=True, slots=True)
class Method:
    """A method that ran over some text.

    name      one of PACKED or FOLDED
    settings  of it, those that have an effect
    text      what was read: `tokens` token ids in `rows` rows, whose SHA-256 in hex is `sha256`
    key       SHA-256 in hex of everything that decides the result
    notes     sentences about what it did, and where it could not
    """

    name: str
    text: str
    rows: int
    tokens: int
    sha256: str
    key: str
    settings: Mapping[str, float | str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """What a card says."""
        title = TITLES.get(self.name, self.name)
        said = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        over = f"over {self.tokens:,} tokens in {self.rows:,} rows of {self.text}"
        return f"{title} {over}" + (f" ({said})" if said else "")

    @property
    def words(self) -> list[str]:
        """Of the command line that does it again."""
        return ["--method", self.name, *(w for n, value in self.settings.items() for w in (f"--{n}", str(value)))]


def read_method(facts: object) -> Method | None:
    """`method` of an mso_hub.json -> Method; None for what is none."""
    if not isinstance(facts, Mapping):
        return None
    texts = {name: facts.get(name) for name in ("name", "text", "sha256", "key")}
    counts = {name: facts.get(name) for name in ("rows", "tokens")}
    settings, notes = facts.get("settings"), facts.get("notes")
    good = all(isinstance(text, str) for text in texts.values()) and all(type(n) is int for n in counts.values())
    if not good or facts["name"] not in (*PACKED, *FOLDED):
        return None
    said: dict[str, Any] = {**texts, **counts}
    kept = {k: v for k, v in settings.items() if type(v) in (int, float, str)} if isinstance(settings, Mapping) else {}
    return Method(
        **said, settings=kept, notes=tuple(n for n in notes if isinstance(n, str)) if isinstance(notes, list) else ()
    )
