"""Where activation scales were measured, for mso_hub.json, model cards and the notes of a plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

LONE_AMAX = 448.0
"""Taken for activations that were nothing but zeros: a scale of 1 in FP8."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """A model that ran over some text.

    text      what was read: `tokens` token ids in `rows` rows, whose SHA-256 in hex is `sha256`
    source    repo or folder of the model that ran, at `commit` where it is a repo's; both "" where they are not known
    version   of mso_hub that ran it
    headroom  factor on every largest magnitude; None: what each format has by itself, 1 for a KV cache
    unseen    experts that saw no token, or only zeros, and have the largest magnitude of their layer's other experts
    zeros     other modules whose activations were nothing but zeros: they have LONE_AMAX
    silent    modules that saw nothing, and nobody near them either: they have no scale
    """

    text: str
    rows: int
    tokens: int
    sha256: str
    source: str = ""
    commit: str = ""
    version: str = ""
    headroom: float | None = None
    unseen: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()

    @property
    def facts(self) -> dict[str, Any]:
        """What mso_hub.json keeps: everything but the names of modules, of which it has the count."""
        return {
            "text": self.text, "rows": self.rows, "tokens": self.tokens, "sha256": self.sha256,
            "source": self.source, "commit": self.commit, "version": self.version, "headroom": self.headroom,
            "unseen": len(self.unseen), "zeros": len(self.zeros),
        }  # fmt: skip

    def notes(self, modules: Collection[str]) -> list[str]:
        """Sentences about the modules of a plan whose scales are not their own."""
        unseen = [module for module in self.unseen if module in modules]
        zeros = [module for module in self.zeros if module in modules]
        found = []
        if unseen:
            experts = {module.rpartition(".")[0] for module in unseen}
            every = {module.rpartition(".")[0] for module in modules if _is_expert(module)}
            found.append(
                f"{len(experts):,} of {len(every):,} experts saw no token of {self.text} ({self.tokens:,} tokens); "
                f"they have the largest activations of their layer's other experts, the first is {unseen[0]}"
            )
        if zeros:
            found.append(
                f"{len(zeros):,} modules had nothing but zeros as input; their activation scales stand for magnitudes "
                f"up to {LONE_AMAX:g}, the first is {zeros[0]}"
            )
        return found

    def missing(self, module: str) -> str:
        """Why a module has no activation scale, and the way out."""
        if module in self.silent and not _is_expert(module):
            return (
                f"{module}: no input of it was seen over {self.tokens:,} tokens of {self.text}: the model's code "
                "multiplies its weight in another way, or not for text; ignore it, or give one scale for all with "
                "--input_scale 1.0"
            )
        if module in self.silent:
            return (
                f"{module}: saw no token of {self.text} ({self.tokens:,} tokens), nor did any other expert of its "
                "layer; calibrate with more text, or ignore it"
            )
        return (
            f"{module}: has no statistics, the calibration never ran it (a part that the model does not use for text, "
            "like multi-token prediction or vision); ignore it, or give one scale for all with --input_scale 1.0"
        )


def described(facts: Mapping[str, Any], *, inputs: bool = True, cache: bool = False) -> str:
    """What a card says of Calibration.facts, read back from any mso_hub.json; "" where they are not such facts.

    inputs, cache  are there scales of activations, and of a KV cache?
    """
    made = read_facts(facts)
    if made is None:
        return ""
    at = f", on the model at commit {made.commit[:12]}" if made.commit else ""
    factor = f", times {made.headroom:g}" if made.headroom is not None else ""
    what = f"measured over {made.tokens:,} tokens in {made.rows:,} rows of {made.text}{at}{factor}"
    return what + (("; keys and values of the KV cache too" if inputs else "; keys and values only") if cache else "")


def read_facts(facts: object) -> Calibration | None:
    """Calibration.facts as an mso_hub.json has them -> Calibration without names of modules; None for anything else."""
    if not isinstance(facts, Mapping):
        return None
    texts = [facts.get(name) for name in ("text", "sha256", "source", "commit", "version")]
    counts = [facts.get(name) for name in ("rows", "tokens")]
    headroom = facts.get("headroom")
    good = all(isinstance(text, str) for text in texts) and all(type(count) is int for count in counts)
    if not good or not (headroom is None or type(headroom) in (int, float)):
        return None
    text, sha256, source, commit, version = map(str, texts)
    rows, tokens = (int(str(count)) for count in counts)
    return Calibration(text, rows, tokens, sha256, source, commit, version, headroom)


def _is_expert(module: str) -> bool:
    """`...experts.5.up_proj`: the last but one component is a number below `experts`."""
    parts = module.split(".")
    return len(parts) > 2 and parts[-2].isdigit() and parts[-3].endswith("experts")
