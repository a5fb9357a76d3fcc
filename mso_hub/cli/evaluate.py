"""Evaluation: the command that asks how well a checkpoint predicts text, and how like another one."""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import click

from mso_hub.cli.calibrate import DTYPES, MODEL, STATS, waits_for_scales, with_stats
from mso_hub.cli.errors import names
from mso_hub.cli.options import JSON, SCHEME, build_recipe, emit, given, one_of, opt, read_size, several
from mso_hub.cli.running import pausable
from mso_hub.cli.text_options import TEXT, text_lines, text_settings
from mso_hub.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from mso_hub.calibrate.evaluate.run import Settings
    from mso_hub.calibrate.evaluate.sensitivity import Cost
    from mso_hub.calibrate.text import Rows
    from mso_hub.events import Listener
    from mso_hub.losses import ErrorTable
    from mso_hub.plan import Recipe
    from mso_hub.plan.evaluation import Evaluation
    from mso_hub.source import Source

RECIPE = ("format", "recipe", "like", "stats")
"""Options of which one makes a recipe to be tried."""
BESIDE = ("layout", "mlp_only", "all_linear", "targets", "ignore", "exclude", "exclude_config", "no_default_ignore",
          "skip_layers", "activations", "group_size", "symmetric", "input_scale", "scale_search", "kv_cache",
          "kv_scales", "text_only")  # fmt: skip
"""Options that say more of a recipe."""


@click.command()
@click.argument("source", callback=given, required=False)
@opt("input_dir", metavar="WHERE", help="The same as SOURCE.")
@opt("against", metavar="WHERE", help="Model to compare with, most often the one that SOURCE was quantized from.")
@opt("text", metavar="NAME", help="The same as --calib_dataset.")
@opt("rows", type=int, metavar="N", help="The same as --calib_size.")
@TEXT
@opt("weights_only", is_flag=True, help="Leave activations alone where the config says that they are quantized.")
@opt(
    "output", metavar="FILE", help="Write the numbers there, FILE.json or FILE.md; `card --evaluation` takes the JSON."
)
@opt("sensitivity", metavar="FILE", help="KL divergence of every group of weights under --formats; for --error_table.")
@opt("formats", metavar="NAMES", help="--sensitivity: formats to try, each with its defaults [that of the recipe].")
@several(MODEL, SCHEME, STATS)
@opt("device", default="cpu", metavar="NAME", help="cpu, cuda:0, or several GPUs: cuda:0,cuda:1 [cpu].")
@opt("progress", type=click.Choice(["bar", "json", "none"]), default="bar", help="Bar, or one JSON event a line.")
@opt("quiet", is_flag=True, help="Print errors and numbers only.")
@JSON
def evaluate(source: str | None, input_dir: str | None, **options: Any) -> None:
    """Measure how well a model predicts text, and how like those of --against its predictions are.

    SOURCE is a folder or hf://org/name@revision, quantized or not; one decoder layer is in memory at a time. With a
    format or a recipe, what that would do to SOURCE is measured, without writing it.
    """
    from mso_hub.plan.evaluation import check_place, write_evaluation

    where = one_of(source, input_dir)
    place = check_place(options["output"]) if options["output"] else None
    _merge(options)
    if options["sensitivity"]:
        _sensitivity(where, options)
        return
    if options["formats"]:
        raise RecipeError(f"--formats {options['formats']}: is for --sensitivity FILE; add it, or give one --format")
    found = _run(where, options, _recipe(options))
    if place is not None:
        write_evaluation(found, place)
    if options["json"]:
        emit(found.as_dict())
    elif options["progress"] != "json":
        click.echo(evaluation_text(found, options["output"]))


def _merge(options: dict[str, Any]) -> None:
    """Short names of options of the text, under their long ones."""
    for short, long in (("text", "calib_dataset"), ("rows", "calib_size")):
        if options[short] is not None and options[long] is not None:
            raise RecipeError(f"--{short} and --{long} are the same; keep one")
        options[long] = options[long] if options[short] is None else options[short]


def _recipe(options: dict[str, Any]) -> Recipe | None:
    """What is to be tried, None for the checkpoint as it is; RecipeError for options that would be ignored."""
    waits = waits_for_scales(options)
    if any(options[name] for name in RECIPE):
        if options["weights_only"]:
            raise RecipeError("--weights_only: is for a checkpoint as it is; with a format say --activations 16")
        return build_recipe(options, waits=waits)
    idle = next((name for name in BESIDE if options[name] not in (None, False, ())), None)
    if idle is not None:
        raise RecipeError(
            f"--{idle}: is for a format that is tried; add --format NAME or --recipe FILE, or leave it out"
        )
    return None


def settings_of(options: dict[str, Any]) -> Settings:
    """Options of MODEL and --device."""
    from mso_hub.calibrate.evaluate.run import Settings
    from mso_hub.calibrate.walk import Memory

    limits = [read_size(options[n], n) if options[n] else None for n in ("max_cpu_memory", "max_gpu_memory")]
    return Settings(
        DTYPES.get(options["calib_dtype"]), experts=options["experts"] or "expert",
        device=options["device"].split(","), memory=Memory(limits[0], limits[1]),
        trust_remote_code=options["trust_remote_code"],
    )  # fmt: skip


def read_rows(options: dict[str, Any], sources: list[Source], tell: Listener) -> Rows:
    """The text, by the tokenizer of the first of some sources that has one."""
    from mso_hub.calibrate.text import open_tokenizer, read_text

    trust = options["trust_remote_code"]
    for number, source in enumerate(sources):
        try:
            tokenizer = open_tokenizer(source, trust_remote_code=trust)
            break
        except CheckpointError:
            if number + 1 == len(sources):
                raise
    rows = read_text(text_settings(options), tokenizer, on_event=tell)
    if not options["quiet"]:
        click.echo("\n".join(text_lines(rows)), err=True)
    return rows


def _run(where: str, options: dict[str, Any], recipe: Recipe | None) -> Evaluation:
    from mso_hub.calibrate.evaluate.run import evaluate as run
    from mso_hub.progress import listener
    from mso_hub.source import open_source

    settings, text = settings_of(options), text_settings(options)
    del text  # what is wrong with it is said before a model is opened
    show = listener("none" if options["quiet"] or options["json"] else options["progress"])

    def work(tell: Listener) -> Evaluation:
        """On the thread that works."""
        with ExitStack() as stack:
            places = [where, *([options["against"]] if options["against"] else [])]
            sources = [stack.enter_context(closing(open_source(place, on_event=tell))) for place in places]
            found = None if recipe is None else with_stats(options, recipe, sources[0])
            rows = read_rows(options, sources, tell)
            return run(
                sources[0], rows, against=sources[1] if len(sources) > 1 else None, recipe=found,
                weights_only=options["weights_only"], settings=settings, on_event=tell,
            )  # fmt: skip

    return pausable(work, show, lost="measurement")


def evaluation_text(found: Evaluation, written: str | None = None) -> str:
    """What `mso-hub evaluate` prints."""
    from mso_hub.plan.evaluation import facts

    pairs = facts(found)
    width = max(len(name) for name, _ in pairs)
    lines = [f"{name:<{width}}  {said}" for name, said in pairs] + [f"note: {note}" for note in found.notes]
    return "\n".join(lines + ([f"written to {written}"] if written else []))


def _sensitivity(where: str, options: dict[str, Any]) -> None:
    """`--sensitivity FILE`: says what it will take, then measures and writes."""
    from mso_hub.engine import ThreadEngine
    from mso_hub.losses import check_path, write_table
    from mso_hub.progress import listener
    from mso_hub.sensitivity import measure_sensitivity
    from mso_hub.source import open_source

    for name in ("against", "output", "weights_only", "stats", "headroom"):
        if options[name]:
            raise RecipeError(f"--{name}: is not for --sensitivity, which compares a model with itself; leave it out")
    path = check_path(options["sensitivity"])
    if path.suffix != ".json":
        raise RecipeError(f"--sensitivity {path}: needs a name that ends in .json")
    recipe = build_recipe(options)
    settings = settings_of({**options, "calib_dtype": options["calib_dtype"] or "fp32"})  # BF16 hides small effects
    show = listener("none" if options["quiet"] or options["json"] else options["progress"])

    def tell_cost(cost: Cost) -> None:
        """Before hours of work."""
        if not options["quiet"]:
            click.echo(str(cost), err=True)

    def work(tell: Listener) -> ErrorTable:
        """On the thread that works."""
        with closing(open_source(where, on_event=tell)) as source:
            rows = read_rows(options, [source], tell)
            return measure_sensitivity(
                source, recipe, rows, names(options["formats"]), settings=settings, engine=ThreadEngine(),
                on_cost=tell_cost, on_event=tell,
            )  # fmt: skip

    table = pausable(work, show, lost="measurement")
    write_table(table, path)
    if options["json"]:
        emit(path.read_text("utf-8").rstrip("\n"))
    elif options["progress"] != "json":
        click.echo(sensitivity_text(table, str(path)))


def sensitivity_text(found: ErrorTable, written: str) -> str:
    """What `mso-hub evaluate --sensitivity` prints: groups by what the first format does to them."""
    from mso_hub.display import table

    divergence = found.divergence
    assert divergence is not None  # noqa: S101 - measure_sensitivity has put it there
    labels = list(divergence.together)
    cells = [
        (name, *(f"{kl[label]:.6f}" if label in kl else "" for label in labels))
        for name, kl in sorted(divergence.groups.items(), key=lambda pair: -max(pair[1].values(), default=0.0))
    ]
    sums = {label: sum(kl.get(label, 0.0) for kl in divergence.groups.values()) for label in labels}
    cells.append(("sum", *(f"{sums[label]:.6f}" for label in labels)))
    cells.append(("all of them together", *(f"{divergence.together[label]:.6f}" for label in labels)))
    head = f"KL divergence over {divergence.tokens:,} tokens of {divergence.text}, nats per token"
    use = f"use it: mso-hub quantize ... --target_bits B --fallback NAMES --error_table {written}"
    return "\n\n".join([head, table(cells, ("quantized alone", *labels)), use])
