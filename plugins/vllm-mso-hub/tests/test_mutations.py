"""Every broken checkpoint is found, by the shape proof or by verify, and the tensor that is wrong is named.

python test_mutations.py        prints who finds what, as a Markdown table
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from changes import Change, opened_copy
from models import converted, dense
from mso_hub import Recipe, verify_checkpoint
from mutations import MUTATIONS
from vllm_mso_hub.job import Job
from vllm_mso_hub.shapes import prove

TP = 2
STATIC = 1.0
CHECKPOINTS: dict[str, tuple[str, Recipe]] = {
    "Llama NVFP4 W4A4": ("llama", Recipe(mode="all-linear", input_scale=STATIC)),
    "Llama W4A16 g32": ("llama", Recipe(scheme="w4a16", group_size=32, mode="all-linear")),
    "Llama NVFP4 W4A4 modelopt": ("llama", Recipe(mode="all-linear", input_scale=STATIC, layout="modelopt")),
    "Llama MXFP8": ("llama", Recipe(scheme="mxfp8", mode="all-linear")),
    "Qwen3-MoE NVFP4 W4A4": ("qwen3_moe", Recipe(mode="all-linear", input_scale=STATIC)),
    "Qwen3-MoE FP8_DYNAMIC": ("qwen3_moe", Recipe(scheme="fp8_dynamic", mode="all-linear")),
    "Qwen3-MoE FP8 modelopt": (
        "qwen3_moe", Recipe(scheme="fp8", mode="all-linear", layout="modelopt", input_scale=STATIC)),
}  # fmt: skip
"""Name -> architecture of models.py and how it is stored; compressed-tensors where nothing else is said."""
CASES = [(name, mutation) for name in CHECKPOINTS for mutation in MUTATIONS]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one mutation of one checkpoint.

    change  what was done; None where the checkpoint has nothing to change that way
    shapes  problems of the shape proof
    values  problems of verify
    """

    change: Change | None
    shapes: tuple[str, ...] = ()
    values: tuple[str, ...] = ()

    def named(self, problems: Iterable[str]) -> bool:
        """Does a problem name a tensor that was changed, or the module that it belongs to?"""
        assert self.change is not None
        modules = {re.sub(r"\.(weight\w*|input_\w*scale)$", "", name) for name in self.change.names}
        known = "|".join(map(re.escape, sorted({*self.change.names, *modules})))
        return any(re.search(rf"(?<![\w.])({known})(?!\w)", problem) for problem in problems)

    @property
    def verdict(self) -> str:
        """One word for the table."""
        if self.change is None:
            return "-"
        if self.change.harmless:
            return "harmless" if not self.shapes + self.values else "harmless, reported"
        found = {"shapes": self.named(self.shapes), "verify": self.named(self.values)}
        return "both" if all(found.values()) else next((who for who, does in found.items() if does), "NOT FOUND")


def outcome(checkpoint: Path, mutation: str, folder: Path) -> Outcome:
    """Break a copy of a checkpoint and ask both."""
    copy = opened_copy(checkpoint, folder)
    change = MUTATIONS[mutation](copy)
    if change is None:
        return Outcome(None)
    copy.save()
    report = prove(Job.of_folder(folder, tp=(TP,)))
    assert report.refused is None, report.refused
    shapes = tuple(
        f"{problem.kind} {problem.tensor} {problem.message}" for world in report.worlds for problem in world.problems
    )
    return Outcome(change, shapes, verify_checkpoint(folder).problems)


def checkpoint_maker(root: Path) -> Callable[[str], Path]:
    """Name of a checkpoint -> its folder below `root`, made once."""

    def made(name: str) -> Path:
        architecture, recipe = CHECKPOINTS[name]
        source, out = root / architecture, root / name.replace(" ", "-")
        if not source.exists():
            dense(architecture, source)
        return out if out.exists() else converted(source, recipe, out)

    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The untouched checkpoints."""
    return checkpoint_maker(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize(("name", "mutation"), CASES, ids=lambda value: value.replace(" ", "-"))
def test_what_is_broken_is_found_and_named(
    name: str, mutation: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    """And what is harmless, the untouched copy first of all, is no problem of either."""
    found = outcome(made(name), mutation, tmp_path / "copy")
    if found.change is None:
        pytest.skip("nothing to change that way")
    if found.change.harmless:
        assert (found.shapes, found.values) == ((), ())
    else:
        assert found.named(found.shapes + found.values), (found.change, found.shapes, found.values)


def table() -> str:
    """Who finds what, in Markdown."""
    lines = ["| mutation | " + " | ".join(CHECKPOINTS) + " |", "|---" * (1 + len(CHECKPOINTS)) + "|"]
    with tempfile.TemporaryDirectory() as scratch:
        made = checkpoint_maker(Path(scratch))
        for mutation in MUTATIONS:
            cells = []
            for at, name in enumerate(CHECKPOINTS):
                cells.append(outcome(made(name), mutation, Path(scratch) / f"{mutation}-{at}").verdict)
            lines.append(f"| {mutation} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
