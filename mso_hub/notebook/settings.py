"""The words of Job -> Recipe, HubTarget, engine: those of Recipe, of open_sink, and of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mso_hub.engine import ThreadEngine
from mso_hub.engine.threads import MEMORY
from mso_hub.errors import RecipeError
from mso_hub.formats import DENSE, Scheme
from mso_hub.hub import is_address
from mso_hub.plan import Recipe
from mso_hub.plan.measured import STAND_IN, plain_takes_scale, require_taker, waiting
from mso_hub.plan.recipe_file import read_recipe
from mso_hub.sink import HubTarget, converted
from mso_hub.source import Source

if TYPE_CHECKING:
    from mso_hub.calibrate.statistics import Statistics

TUPLES = ("targets", "ignore", "imported_ignore", "skip_layers", "rules")
RECIPE = tuple(f.name for f in fields(Recipe))
OUTPUT = ("fresh", "private", "branch", "create_pr", "journal_branch", "base_model")
MEASURED = ("stats", "headroom")
WISH = ("private", "branch", "create_pr", "journal_branch")
"""Fields of HubTarget that are asked for."""
ENGINE = ("workers", "memory", "device")


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that a Job was told besides its two ends.

    recipe    a Recipe, a file or the name of a preset; None: `said` alone makes it
    said      fields of Recipe
    stats     where activation scales are from: a file of statistics, or what is in it
    headroom  factor on these; None: that of each format
    """

    recipe: Recipe | str | Path | None = None
    said: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = False
    private: bool = False
    branch: str | None = None
    create_pr: bool = False
    journal_branch: str | None = None
    base_model: str | None = None
    stats: Statistics | str | Path | None = None
    headroom: float | None = None
    workers: int | None = None
    memory: int = MEMORY
    device: str = "cpu"

    def build(self) -> Recipe:
        """The recipe; RecipeError where its words contradict each other or a file cannot be read.

        Where there are statistics a number stands for each activation scale, until `measured`.
        """
        waits = self.stats is not None
        if isinstance(self.recipe, Recipe):
            made = self.recipe
        elif self.recipe is not None:
            made = read_recipe(self.recipe, **self.said, waits=waits)
        else:
            made = Recipe(**(_waiting(self.said) if waits else self.said))
        if waits:
            require_taker(made, "stats")
        return made

    def measured(self, recipe: Recipe, source: Source) -> Recipe:
        """The recipe with the scales of the statistics; RecipeError where these are another model's."""
        if self.stats is None:
            return recipe
        from mso_hub.calibrate.scales import with_statistics

        return with_statistics(recipe, self.stats, source, headroom=self.headroom)

    def engine(self) -> ThreadEngine:
        """Threads and memory."""
        return ThreadEngine(self.workers, self.memory, self.device)

    def require_place(self, dst: str) -> None:
        """RecipeError for a folder with options of a repo."""
        idle = next((name for name in (*WISH, "base_model") if getattr(self, name)), None)
        if idle is not None and not is_address(dst):
            raise RecipeError(
                f"{idle}: is for a repo on the Hub, {dst} is a folder; write hf://org/name, or leave it out"
            )

    def target(self, src: str, dst: str, recipe: Recipe) -> HubTarget | None:
        """How to write to a repo; None for a folder."""
        if not is_address(dst):
            return None
        wish = {name: getattr(self, name) for name in WISH}
        title, description = converted(src, recipe.label or DENSE)
        return HubTarget(**wish, title=title, description=description)


def read_settings(scheme: str | None, recipe: Recipe | str | Path | None, words: Mapping[str, Any]) -> Settings:
    """The keywords of Job -> Settings; RecipeError for a word that means nothing, and for two recipes."""
    known = (*RECIPE, *OUTPUT, *MEASURED, *ENGINE)
    for word in words:
        if word not in known:
            near = get_close_matches(word, known, n=1)
            way_out = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
            raise RecipeError(f"{word}: Job has no such setting; {way_out}")
    said = {name: _tuple(name, value) for name, value in words.items() if name in RECIPE}
    if scheme is not None:
        said["scheme"] = scheme
    if recipe is not None and scheme is not None:
        raise RecipeError(f"recipe {recipe!r} and scheme {scheme!r} contradict each other; keep one")
    if isinstance(recipe, Recipe) and said:
        raise RecipeError(f"recipe is a Recipe and says {', '.join(said)} itself; change it there")
    rest = {name: value for name, value in words.items() if name not in RECIPE}
    settings = Settings(recipe, said, **rest)
    _require_statistics(settings)
    if settings.recipe is None:
        settings.build()  # a wrong word is refused where it was typed
    return settings


def _waiting(said: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Recipe with a number for each scale that is to be measured; NVFP4 is W4A4 then."""
    if said.get("rules"):
        return {**said, "rules": waiting(said["rules"])}
    takes = plain_takes_scale(Scheme(said.get("scheme", "nvfp4"), said.get("activations")))
    return {**said, "input_scale": STAND_IN} if takes else dict(said)


def _require_statistics(settings: Settings) -> None:
    """RecipeError for words about activation scales that contradict each other, or mean nothing alone."""
    if settings.stats is not None and settings.said.get("input_scale") is not None:
        raise RecipeError("stats and input_scale both say where activation scales come from; keep one")
    if settings.headroom is None:
        return
    if settings.stats is None:
        raise RecipeError(f"headroom {settings.headroom:g}: is for measured scales; add stats=FILE, or leave it out")
    from mso_hub.calibrate.scales import check_headroom

    check_headroom(settings.headroom)


def _tuple(name: str, value: Any) -> Any:
    if name not in TUPLES:
        return value
    return (value,) if isinstance(value, str | int) else tuple(value)
