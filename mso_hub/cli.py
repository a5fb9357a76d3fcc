"""argv -> one call of the library. `mso-hub` and `modelopt-streaming` are the same program.

Every option has an underscore and a dash form. Errors end with exit code 2 and one message, a pause (Ctrl-C) with
130: the same command goes on.
"""

from __future__ import annotations

import errno
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mso_hub.errors import MsoError, RecipeError

if TYPE_CHECKING:
    from mso_hub.events import Listener
    from mso_hub.plan import Plan, Recipe

Command = TypeVar("Command", bound=Callable[..., Any])


def opt(name: str, **settings: Any) -> Callable[[Command], Command]:
    """A click option under `--some_name` and `--some-name`; a flag gets `--no_...` only where it is asked for."""
    forms = [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])
    return click.option(*forms, name, callback=_given, **settings)


def _given(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Refuse an empty text (a shell variable that is not set) and open a leading `~`, which `--x=~/y` keeps."""
    if value == "" or (isinstance(value, tuple) and "" in value):
        raise click.BadParameter("must not be empty", ctx, parameter)
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~") else value


def several(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Decorators in reading order as one."""

    def apply(command: Command) -> Command:
        """The innermost decorator is the last one."""
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


class Program(click.Group):
    """Turns the errors of the library into one message and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        # A plan of 200,000 tensors is a large, growing, cycle-free graph: the default thresholds make the collector
        # walk it again and again, a third of the time in all.
        gc.set_threshold(200_000, 20, 100)
        try:
            return super().invoke(ctx)
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
            click.echo("mso-hub: paused; what is complete is kept, the same command goes on", err=True)
            ctx.exit(130)


SOURCE = opt("input_dir", required=True, metavar="DIR", help="Folder of the checkpoint to read.")
TARGET = opt("output_dir", required=True, metavar="DIR", help="New or empty folder to write.")
RUN = several(
    click.option("--resume/--no_resume", " /--no-resume", default=True, help="Continue an unfinished run, or --fresh."),
    opt("fresh", is_flag=True, help="Discard an earlier output of this tool, finished or not, and start over."),
    opt("workers", type=click.IntRange(1), metavar="N", help="Threads; all processors by default."),
    opt("memory_budget", default="448MiB", metavar="SIZE", help="Weights held in memory at once [448MiB]."),
    opt(
        "progress",
        type=click.Choice(["bar", "json", "none"]),
        default="bar",
        help="Bar, or one JSON event a line.",
    ),
    opt("quiet", is_flag=True, help="Print errors only."),
    opt("device", default="cpu", hidden=True),
    opt("num_gpus", type=int, default=0, hidden=True),
)
SCHEME = several(
    opt("format", default="nvfp4", metavar="NAME", help="What weights become; `mso-hub formats` lists them [nvfp4]."),
    opt("layout", default="compressed-tensors", metavar="NAME", help="compressed-tensors (default) or modelopt."),
    opt("mlp_only", is_flag=True, help="Feed-forward layers and experts (the default)."),
    opt("all_linear", is_flag=True, help="Attention projections too."),
    opt("targets", multiple=True, metavar="PATTERN", help="Glob or re:REGEX of modules to quantize; repeatable."),
    opt("ignore", multiple=True, metavar="PATTERN", help="Glob or re:REGEX of modules to leave alone; repeatable."),
    opt("exclude", multiple=True, metavar="PATTERN", help="The same as --ignore."),
    opt("exclude_config", metavar="FILE", help="Config of a reference model whose exclude list is honoured too."),
    opt("no_default_ignore", is_flag=True, help="Offer embeddings, heads, routers, vision, MTP to the targets."),
    opt("input_scale", metavar="X", help="W4A4: one activation scale for all (1.0), or a checkpoint that has them."),
    opt("scale_search", default="absmax", metavar="HOW", help="absmax (ModelOpt's bytes) or mse (less error)."),
    opt("text_only", is_flag=True, help="Leave vision and audio parts out; flatten names and config."),
    opt("block_size", type=int, default=16, hidden=True),
)  # fmt: skip
JSON = opt("json", is_flag=True, help="Print JSON.")


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="mso-hub")
def main() -> None:
    """Quantize, decompress and check LLM checkpoints, tensor by tensor, without loading the model."""


def read_size(text: str) -> int:
    """`512MiB`, `2GB`, `1000000` -> bytes; RecipeError otherwise."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.strip().upper().rstrip("KMGIB")
    unit = text.strip().upper()[len(number) :]
    try:
        nbytes = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError) as error:
        raise RecipeError(f"memory_budget: needs a size like 512MiB or 2GB, got {text!r}") from error
    if nbytes < 1 << 20:
        raise RecipeError(f"memory_budget: must be at least 1MiB, got {text!r}")
    return nbytes


def build_recipe(options: dict[str, Any]) -> Recipe:
    """Options of SCHEME -> Recipe."""
    from mso_hub.legacy import check_block_size
    from mso_hub.plan import Recipe
    from mso_hub.plan.reference import exclude_patterns

    check_block_size(options["block_size"])
    if options["mlp_only"] and options["all_linear"]:
        raise RecipeError("--mlp_only and --all_linear contradict each other; keep one")
    scale, scales = read_input_scale(options["input_scale"])
    imported = exclude_patterns(options["exclude_config"]) if options["exclude_config"] else []
    return Recipe(
        scheme=options["format"],
        layout=options["layout"],
        mode="all-linear" if options["all_linear"] else "mlp",
        targets=options["targets"],
        ignore=options["ignore"] + options["exclude"],
        imported_ignore=tuple(imported),
        default_ignore=not options["no_default_ignore"],
        input_scale=scale,
        input_scales=scales,
        scale_search=options["scale_search"],
        text_only=options["text_only"],
    )


def read_input_scale(text: str | None) -> tuple[float | None, dict[str, float]]:
    """`1.0` -> one scale for all; a folder or a .safetensors file -> a scale per module."""
    from mso_hub.checkpoint import TensorInfo
    from mso_hub.formats.scales import read_input_scales
    from mso_hub.source import LocalSource
    from mso_hub.source.scan import read_shard

    if text is None:
        return None, {}
    try:
        return float(text), {}
    except ValueError:
        path = Path(text)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    tensors: list[TensorInfo] = []
    source = LocalSource(path.parent if path.is_file() else path)
    for file in files:
        tensors += read_shard(source, file.name, file.stat().st_size).tensors
    scales = read_input_scales(tensors, source.read)
    if not scales:
        raise RecipeError(f"--input_scale {text}: needs a number or a checkpoint with input scales, found none there")
    return None, scales


def execute(options: dict[str, Any], recipe: Recipe) -> None:
    """One conversion with progress and a closing line."""
    from mso_hub.engine import ThreadEngine
    from mso_hub.legacy import check_hardware
    from mso_hub.pipeline import convert
    from mso_hub.progress import Bar, listener
    from mso_hub.sink import open_sink

    check_hardware(options["device"], options["num_gpus"])
    engine = ThreadEngine(options["workers"], read_size(options["memory_budget"]))
    sink = open_sink(options["output_dir"], fresh=options["fresh"] or not options["resume"])
    show: Listener = listener("none" if options["quiet"] else options["progress"])
    try:
        plan = convert(options["input_dir"], sink, recipe, engine=engine, on_event=show)
    finally:
        if isinstance(show, Bar):
            show.close()
    if not options["quiet"] and options["progress"] == "bar":
        click.echo(closing(plan, options["output_dir"]))


def closing(plan: Plan, where: str) -> str:
    """Two lines: what happened, what to do next."""
    from mso_hub.display import size

    done = sum(step.unit is not None or step.weight.decoder is not None for s in plan.shards for step in s.steps)
    return (
        f"{done:,} weights, {size(plan.read_bytes)} -> {size(plan.write_bytes)} in {where}\n"
        f"check it: mso-hub verify {where} --source {plan.source}"
    )


@main.command()
@several(SOURCE, TARGET, SCHEME, RUN)
@opt("calibrate", is_flag=True, hidden=True)
@opt("calib_size", type=int, hidden=True)
@opt("calib_dataset", hidden=True)
def quantize(calibrate: bool, calib_size: int | None, calib_dataset: str | None, **options: Any) -> None:
    """Quantize a checkpoint, tensor by tensor."""
    if calibrate or calib_size or calib_dataset:
        raise RecipeError(
            "--calibrate: this version does not run the model; --input_scale 1.0 needs no calibration, "
            "--input_scale DIR takes the scales of a calibrated checkpoint"
        )
    execute(options, build_recipe(options))


@main.command()
@several(SOURCE, TARGET, RUN)
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
@several(SOURCE, TARGET, RUN)
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
@click.argument("source", callback=_given, required=False)
@opt("input_dir", metavar="DIR", help="The same as SOURCE.")
@JSON
def inspect(source: str | None, input_dir: str | None, json: bool) -> None:
    """Show what a checkpoint holds, from its headers."""
    from mso_hub.display import inspect_dict, inspect_text
    from mso_hub.source import open_source, read_checkpoint

    checkpoint = read_checkpoint(open_source(one_of(source, input_dir)))
    emit(inspect_dict(checkpoint) if json else inspect_text(checkpoint))


@main.command()
@click.argument("source", callback=_given, required=False)
@opt("input_dir", metavar="DIR", help="The same as SOURCE.")
@SCHEME
@JSON
def plan(source: str | None, input_dir: str | None, json: bool, **options: Any) -> None:
    """Show from headers what would be quantized, what not and why, and the sizes."""
    from mso_hub.display import plan_as_dict, plan_text
    from mso_hub.pipeline import make_plan

    planned = make_plan(one_of(source, input_dir), build_recipe(options))
    emit(plan_as_dict(planned) if json else plan_text(planned))


@main.command()
@click.argument("checkpoint", callback=_given)
@opt("source", metavar="DIR", help="Where it came from: reports the dequantized error of every weight.")
@opt("reference", metavar="WHAT", help="`modelopt`, or a checkpoint to compare with byte by byte.")
@JSON
def verify(checkpoint: str, source: str | None, reference: str | None, json: bool) -> None:
    """Check a finished checkpoint: structure, config, shared scales, numbers. Exit code 2 when something is wrong."""
    from mso_hub.display import report_text
    from mso_hub.verify import verify_checkpoint

    report = verify_checkpoint(checkpoint, source=source, reference=reference)
    emit(report.as_dict() if json else report_text(report))
    if not report.ok:
        sys.exit(2)


@main.command()
@click.argument("first", callback=_given)
@click.argument("second", callback=_given)
@JSON
def compare(first: str, second: str, json: bool) -> None:
    """Compare the scales and weights of two checkpoints, whatever their formats."""
    from mso_hub.display import comparison_text
    from mso_hub.verify import compare_checkpoints

    comparison = compare_checkpoints(first, second)
    emit(comparison.as_dict() if json else comparison_text(comparison))


@main.command()
def formats() -> None:
    """List the formats that can be written and read."""
    from mso_hub.display import formats_text

    click.echo(formats_text())


@main.command()
@opt("source", metavar="DIR", help="Checkpoint to use; the small trained model of the repository by default.")
@opt("output_dir", metavar="DIR", default="demo-output", help="Where results go [demo-output].")
def demo(source: str | None, output_dir: str) -> None:
    """Watch a real checkpoint become NVFP4, be checked, and come back to BF16."""
    from mso_hub.demo import run_demo

    run_demo(source, Path(output_dir), click.echo)


def one_of(argument: str | None, option: str | None) -> str:
    """The source, given as an argument or as --input_dir."""
    if (argument is None) == (option is None):
        raise RecipeError(f"give the source once, as an argument or as --input_dir; got {argument!r} and {option!r}")
    return argument or option or ""


def emit(content: str | dict[str, Any]) -> None:
    """Text as it is, anything else as JSON."""
    click.echo(content if isinstance(content, str) else json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
