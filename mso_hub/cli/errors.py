"""Errors of formats: the verb that measures them, and the options of `quantize` that choose by them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mso_hub.cli.options import SCHEME, build_recipe, given, one_of, opt, read_size, several
from mso_hub.cli.running import pausable
from mso_hub.errors import RecipeError

if TYPE_CHECKING:
    from mso_hub.assess import Choice
    from mso_hub.losses import ErrorTable
    from mso_hub.plan import Recipe

SHOWN = 12
"""Groups that took another format, as the terminal shows them."""

CHOICE = several(
    opt("max_nmse", type=float, metavar="X", help="Weights with a larger error than X take the next of --fallback."),
    opt("target_bits", type=float, metavar="B", help="Least error with at most B bits a weight, from --fallback."),
    opt("fallback", metavar="NAMES", help="Formats after that of the rule: fp8,bf16."),
    opt("error_table", metavar="FILE", help="JSON of errors: read where it fits, else measured and written."),
    opt("report", multiple=True, metavar="FILE", help="Errors of every weight, FILE.json or FILE.md; repeatable."),
)
MEASURING = several(
    opt("workers", type=click.IntRange(1), metavar="N", help="Threads; all processors by default."),
    opt("memory_budget", default="448MiB", metavar="SIZE", help="Weights held in memory at once [448MiB]."),
    opt("progress", type=click.Choice(["bar", "json", "none"]), default="bar", help="Bar, or one JSON event a line."),
)


def names(text: str | None) -> tuple[str, ...]:
    """`nvfp4, fp8` -> its parts."""
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else ()


def choose(options: dict[str, Any], recipe: Recipe) -> Choice | None:
    """What --max_nmse or --target_bits make of a recipe; None without them."""
    wishes = ("max_nmse", "target_bits")
    if all(options[wish] is None for wish in wishes):
        idle = next((name for name in ("fallback", "error_table") if options[name]), None)
        if idle is not None:
            raise RecipeError(f"--{idle} {options[idle]}: needs --max_nmse or --target_bits; add one, or leave it out")
        return None
    from mso_hub.assess import choose_formats
    from mso_hub.engine import ThreadEngine
    from mso_hub.progress import listener

    choice = pausable(
        lambda show: choose_formats(
            options["input_dir"], recipe, fallback=names(options["fallback"]), max_nmse=options["max_nmse"],
            target_bits=options["target_bits"], table=options["error_table"],
            engine=ThreadEngine(options["workers"], read_size(options["memory_budget"])), on_event=show,
        ),
        listener("bar" if options["progress"] == "bar" and not options["quiet"] else "none"),
        lost="measurement",
    )  # fmt: skip
    if not options["quiet"]:
        click.echo("\n".join([choice.summary, *shortened(choice.notes)]), err=True)
    return choice


def shortened(notes: Sequence[str]) -> list[str]:
    """The first of some sentences, and how many there are more."""
    more = [f"and {len(notes) - SHOWN:,} more; --report lists them all"] if len(notes) > SHOWN else []
    return [*notes[:SHOWN], *more]


@click.command()
@click.argument("source", callback=given, required=False)
@opt("input_dir", metavar="WHERE", help="The same as SOURCE.")
@opt("formats", metavar="NAMES", help="Formats to compare, each with its defaults: nvfp4,mxfp4 [that of the recipe].")
@opt("output", metavar="FILE", help="Every weight, FILE.json or FILE.md; the JSON serves as --error_table.")
@several(SCHEME, MEASURING)
def errors(source: str | None, input_dir: str | None, formats: str | None, output: str | None, **options: Any) -> None:
    """Measure what formats would do to the weights, without writing a checkpoint.

    SOURCE is a folder or hf://org/name@revision.
    """
    from mso_hub.assess import measure_errors
    from mso_hub.engine import ThreadEngine
    from mso_hub.losses import check_path, write_table
    from mso_hub.progress import listener

    where = one_of(source, input_dir)
    path = check_path(output) if output is not None else None
    recipe = build_recipe(options)
    engine = ThreadEngine(options["workers"], read_size(options["memory_budget"]))
    table = pausable(
        lambda show: measure_errors(where, recipe, names(formats), engine=engine, on_event=show),
        listener(options["progress"]),
        lost="measurement",
    )
    if path is not None:
        write_table(table, path)
    if options["progress"] != "json":
        click.echo(errors_text(table, path))


def errors_text(measured: ErrorTable, path: Path | None) -> str:
    """What `mso-hub errors` prints."""
    from mso_hub.display import table
    from mso_hub.losses import by_kind, decibel
    from mso_hub.plan.summary import percent

    rows = [
        (row.kind, row.label, row.count, f"{row.bits:.3f}", percent(row.mean), percent(row.worst),
         f"{row.largest:.4g}", decibel(row.sqnr))
        for row in by_kind(measured)
    ]  # fmt: skip
    barred = [(n, label, why) for n, w in measured.weights.items() for label, why in w.barred.items()]
    blocks = [
        f"{measured.source}: {len(measured.weights):,} weights under {', '.join(measured.labels)}",
        table(rows, ("module", "format", "count", "bits", "mean NMSE", "worst NMSE", "max", "SQNR")),
        "\n".join(shortened([f"{name} cannot be {label}: {why}" for name, label, why in barred])),
        f"every weight: {path}" if path is not None else "",
    ]
    return "\n\n".join(block for block in blocks if block)
