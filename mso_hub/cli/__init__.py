"""argv -> one call of the library. `mso-hub` and `modelopt-streaming` are the same program.

Every option has an underscore and a dash form. Errors end with exit code 2 and one message; where the Hub or the
network failed and the same command may succeed later, with 3; a pause (Ctrl-C) with 130: the same command goes on.
"""

from __future__ import annotations

import errno
import gc
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mso_hub.cli.calibrate import CALIBRATE, STATS, encoding_device, measured, waits_for_scales, with_stats
from mso_hub.cli.errors import CHOICE, choose, shortened
from mso_hub.cli.methods import METHOD, method_settings, quantize_by_method, with_aliases
from mso_hub.cli.options import (
    DEVICE,
    HUB,
    JSON,
    LIST_CONFIGS,
    PRESETS,
    PROCESSORS,
    RUN,
    SCHEME,
    SMOKE,
    SOURCE,
    TARGET,
    build_recipe,
    emit,
    given,
    hub_target,
    one_of,
    opt,
    read_size,
    read_tp,
    several,
)
from mso_hub.cli.running import PAUSED, pausable
from mso_hub.cli.smoke import prove_plan, require_proof, wants_proof
from mso_hub.cli.text_options import INPUT_MODEL, OUTPUT_MODEL
from mso_hub.errors import MsoError, TransientError

if TYPE_CHECKING:
    from mso_hub.assess import Choice
    from mso_hub.cli.methods import Ready
    from mso_hub.events import Listener
    from mso_hub.plan import Plan, Recipe
    from mso_hub.sink import Sink
    from mso_hub.verify import Report


class Program(click.Group):
    """Turns the errors of the library into one message and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        # A plan of 200,000 tensors is a large, growing, cycle-free graph: the default thresholds make the collector
        # walk it again and again, a third of the time in all.
        gc.set_threshold(200_000, 20, 100)
        try:
            return super().invoke(ctx)
        except TransientError as error:
            click.echo(f"mso-hub: {error}", err=True)
            ctx.exit(3)
        except MsoError as error:
            click.echo(f"mso-hub: {error}", err=True)
            ctx.exit(2)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # `| head`: click ends quietly
            click.echo(f"mso-hub: {error}; check the path, its permissions and the disk behind it", err=True)
            ctx.exit(2)
        except MemoryError:
            click.echo("mso-hub: out of memory; lower --workers or --memory_budget", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo(f"mso-hub: {PAUSED}", err=True)
            ctx.exit(130)


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="mso-hub")
def main() -> None:
    """Quantize, decompress and check LLM checkpoints, tensor by tensor, without loading the model."""


def execute(options: dict[str, Any], recipe: Recipe) -> None:
    """One conversion with progress and a closing line; `choice` among the options says how the recipe was made."""
    from mso_hub.hub import looks_like_repo
    from mso_hub.legacy import check_hardware
    from mso_hub.progress import listener
    from mso_hub.smoke.child import ended_by_signals

    check_hardware(options["num_gpus"])
    where = options["output_dir"]
    if looks_like_repo(where) and not Path(where).parent.exists() and not options["quiet"]:
        click.echo(f"writing to the folder {where}; for a repo on the Hub write hf://{where}", err=True)
    choice: Choice | None = options.get("choice")
    notes = choice.notes if choice else ()
    waits: list[Callable[[], None]] = []
    show: Listener = listener("none" if options["quiet"] else options["progress"])
    with ended_by_signals() if options.get("smoke") else nullcontext():
        plan, sink = pausable(partial(_convert, options, recipe, notes, waits), show, partial(_cut, waits))
    if not options["quiet"] and options["progress"] == "bar":
        click.echo(closing_lines(plan, sink, notes))


def _convert(
    options: dict[str, Any], recipe: Recipe, notes: Sequence[str], waits: list[Callable[[], None]], show: Listener
) -> tuple[Plan, Sink]:
    """On the thread that works; what ends its waits is handed out as soon as both ends are open."""
    from mso_hub.engine import ThreadEngine
    from mso_hub.pipeline import convert
    from mso_hub.sink import open_sink
    from mso_hub.source import open_source

    engine = ThreadEngine(options["workers"], read_size(options["memory_budget"]), options["device"])
    target = hub_target(options, recipe)
    fresh = options["fresh"] or not options["resume"]
    sink = open_sink(options["output_dir"], fresh=fresh, target=target, on_event=show)
    ready: Ready | None = options.get("ready")
    opened = open_source(options["input_dir"], on_event=show) if ready is None else ready.source
    by_method = () if recipe.by_method is None else recipe.by_method.notes
    with closing(opened) as source:
        waits += [sink.abort, *([source.close] if source.distant else [])]
        plan = convert(
            source, sink, recipe, engine=engine, base_model=options["base_model"], report=options.get("report", ()),
            notes=(*notes, *by_method), told=ready.told if ready else None,
            check=partial(require_proof, options=options) if options.get("smoke") else None, on_event=show,
        )  # fmt: skip
    return plan, sink


def _cut(waits: Sequence[Callable[[], None]]) -> None:
    """End what a conversion waits for."""
    from mso_hub.smoke.child import end_processes

    for end in (end_processes, *waits):
        end()


def closing_lines(plan: Plan, sink: Sink, shown: Sequence[str] = ()) -> str:
    """What happened, what there is to know of it that was not shown yet, what to do next."""
    from mso_hub.plan.summary import size

    done = sum(step.changes for shard in plan.shards for step in shard.steps)
    sizes = f"{done:,} weights, {size(plan.read_bytes)} -> {size(plan.write_bytes)}"
    found = "was complete already, nothing was written: " if sink.finished else ""
    notes = shortened([f"note: {note}" for note in plan.notes if note not in shown])
    check = f"check it: mso-hub verify {sink.address} --source {plan.source}"
    return "\n".join([f"{found}{sizes} in {sink.where}", *notes, check])


@main.command()
@several(INPUT_MODEL, OUTPUT_MODEL, SCHEME, STATS, METHOD, CALIBRATE, CHOICE, SMOKE, RUN, DEVICE, HUB, LIST_CONFIGS)
def quantize(**options: Any) -> None:
    """Quantize a checkpoint, tensor by tensor."""
    options = with_aliases(options)
    settings = method_settings(options)
    recipe = build_recipe(options, waits=waits_for_scales(options))
    wants_proof(options)
    choice = choose(options, recipe)
    options, recipe = {**options, "choice": choice}, choice.recipe if choice else recipe
    if settings is None:
        recipe = measured(options, recipe)
        execute({**options, "device": encoding_device(options)}, recipe)
    else:
        quantize_by_method(options, recipe, settings, execute)


@main.command()
@several(SOURCE, TARGET, RUN, PROCESSORS, HUB)
@opt(
    "dtype",
    default="bf16",
    type=click.Choice(["bf16", "fp16", "fp32"]),
    help="What packed weights become [bf16].",
)
@opt("text_only", is_flag=True, help="Leave vision and audio parts out; flatten names and config.")
def decompress(dtype: str, text_only: bool, **options: Any) -> None:
    """Write packed weights (INT4, INT8, NVFP4) as BF16."""
    from mso_hub.plan import Recipe

    tag = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}[dtype]
    execute(options, Recipe(scheme="bf16", dtype=tag, text_only=text_only))


@main.command("extract-text")
@several(SOURCE, TARGET, RUN, PROCESSORS, HUB)
def extract_text(**options: Any) -> None:
    """Write the language model of a multimodal checkpoint as a checkpoint of its own."""
    from mso_hub.plan import Recipe

    execute(options, Recipe(scheme="bf16", text_only=True))


@main.command()
@opt("config", required=True, metavar="FILE", help="hf_quant_config.json, config.json or the folder of either.")
@opt("output", metavar="FILE", help="Write the patterns there, one a line.")
@opt("verbose", is_flag=True, help="Print every pattern.")
def extract(config: str, output: str | None, verbose: bool) -> None:
    """Print what a reference model's config excludes from quantization."""
    from mso_hub.plan.reference import exclude_patterns

    patterns = exclude_patterns(config)
    if output:
        Path(output).write_text("\n".join(patterns) + "\n", encoding="utf-8")
    shown = patterns if verbose else patterns[:10]
    click.echo("\n".join(shown))
    if len(patterns) > len(shown):
        click.echo(f"and {len(patterns) - len(shown)} more (--verbose shows all {len(patterns)})")


@main.command()
@click.argument("source", callback=given, required=False)
@opt("input_dir", metavar="WHERE", help="The same as SOURCE.")
@JSON
def inspect(source: str | None, input_dir: str | None, json: bool) -> None:
    """Show what a checkpoint holds, from its headers.

    SOURCE is a folder or hf://org/name@revision.
    """
    from mso_hub.display import inspect_dict, inspect_text
    from mso_hub.progress import waiting
    from mso_hub.source import open_source, read_checkpoint

    with closing(open_source(one_of(source, input_dir), on_event=waiting)) as opened:
        checkpoint = read_checkpoint(opened)
    emit(inspect_dict(checkpoint) if json else inspect_text(checkpoint))


@main.command()
@click.argument("source", callback=given, required=False)
@opt("input_dir", metavar="WHERE", help="The same as SOURCE.")
@several(SCHEME, STATS, SMOKE, JSON)
def plan(source: str | None, input_dir: str | None, json: bool, **options: Any) -> None:
    """Show from headers what would be quantized, what not and why, and the sizes. Exit code 2 when --smoke fails.

    SOURCE is a folder or hf://org/name@revision.
    """
    from mso_hub.display import plan_as_dict, plan_text
    from mso_hub.pipeline import make_plan
    from mso_hub.progress import waiting
    from mso_hub.smoke.text import shape_text
    from mso_hub.source import open_source

    recipe = build_recipe(options, waits=waits_for_scales(options))
    proves = wants_proof(options)
    with closing(open_source(one_of(source, input_dir), on_event=waiting)) as opened:
        planned = make_plan(opened, with_stats(options, recipe, opened))
        report = prove_plan(planned, opened, options) if proves else None
    if json:
        emit({**plan_as_dict(planned), **({"smoke": report.as_dict()} if report else {})})
    else:
        emit("\n\n".join([plan_text(planned), *([shape_text(report)] if report else [])]))
    if report is not None and not report.ok:
        sys.exit(2)


@main.command()
@click.argument("checkpoint", callback=given)
@opt("source", metavar="WHERE", help="Where it came from: reports the dequantized error of every weight.")
@opt("reference", metavar="WHAT", help="`modelopt`, or a checkpoint to compare with byte by byte.")
@opt("tp", metavar="LIST", help="Tensor-parallel sizes at which groups must stay whole, like 1,2,4,8.")
@opt("consumer", type=click.Choice(["kt"]), help="Load some experts in kt-kernel and compare its answers.")
@opt("kt_python", metavar="PATH", help="--consumer: a Python that has kt-kernel [that of MSO_KT_PYTHON].")
@JSON
def verify(
    checkpoint: str, source: str | None, reference: str | None, tp: str | None, consumer: str | None,
    kt_python: str | None, json: bool,
) -> None:  # fmt: skip
    """Check a finished checkpoint: structure, config, shared scales, numbers. Exit code 2 when something is wrong.

    CHECKPOINT is a folder or hf://org/name@revision.
    """
    from mso_hub.display import report_text
    from mso_hub.progress import Bar
    from mso_hub.verify import verify_checkpoint
    from mso_hub.verify.kt_consumer import check_consumer

    sizes = read_tp(tp)
    if kt_python and not consumer:
        raise click.UsageError(f"--kt_python {kt_python}: is for --consumer kt; add it, or leave this out")

    def check(show: Listener) -> Report:
        """On the thread that works."""
        found = verify_checkpoint(checkpoint, source=source, reference=reference, tp=sizes, on_event=show)
        return check_consumer(found, checkpoint, consumer, kt_python) if consumer else found

    report = pausable(check, Bar(), lost="verification")
    emit(report.as_dict() if json else report_text(report))
    if not report.ok:
        sys.exit(2)


@main.command()
@click.argument("first", callback=given)
@click.argument("second", callback=given)
@JSON
def compare(first: str, second: str, json: bool) -> None:
    """Compare the scales and weights of two checkpoints, whatever their formats.

    FIRST and SECOND are folders or hf://org/name@revision.
    """
    from mso_hub.display import comparison_text
    from mso_hub.progress import Bar
    from mso_hub.verify import compare_checkpoints

    comparison = pausable(lambda show: compare_checkpoints(first, second, on_event=show), Bar(), lost="comparison")
    emit(comparison.as_dict() if json else comparison_text(comparison))


@main.command()
@PRESETS
def formats(presets: str | None) -> None:
    """List the formats that can be written and read."""
    from mso_hub.display import formats_text, presets_text

    click.echo(formats_text() if presets is None else presets_text(None if presets == "all" else presets))


@main.command()
@opt("source", metavar="DIR", help="Checkpoint to use; the small trained model of the repository by default.")
@opt("output_dir", metavar="DIR", default="demo-output", help="Where results go [demo-output].")
def demo(source: str | None, output_dir: str) -> None:
    """Watch a real checkpoint become NVFP4, be checked, and come back to BF16."""
    from mso_hub.demo import run_demo

    run_demo(source, Path(output_dir), click.echo)


def _add_hub_commands() -> None:
    from mso_hub.cli import calibrate, errors, evaluate, hub, kt, smoke, vllm

    main.add_command(calibrate.calibrate)
    main.add_command(hub.card)
    main.add_command(hub.devhub)
    main.add_command(errors.errors)
    main.add_command(evaluate.evaluate)
    main.add_command(kt.kt)
    main.add_command(smoke.smoke)
    main.add_command(vllm.setup_vllm)
    main.add_command(vllm.serve_check)


_add_hub_commands()
