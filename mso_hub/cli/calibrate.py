"""Calibration: the command that measures activations, and the options that use what it found."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mso_hub.cli.options import hub_target, opt, read_size, several
from mso_hub.cli.running import pausable
from mso_hub.cli.smoke import require_proof
from mso_hub.cli.text_options import INPUT_MODEL, TEXT, require_text, text_lines, text_settings
from mso_hub.errors import RecipeError

if TYPE_CHECKING:
    from mso_hub.calibrate.memory import Memory
    from mso_hub.calibrate.statistics import Statistics
    from mso_hub.calibrate.text import Rows
    from mso_hub.calibrate.walk import Walk
    from mso_hub.events import Listener
    from mso_hub.plan import Plan, Recipe
    from mso_hub.source import Source

STATS = several(
    opt("stats", metavar="FILE", help="Activation scales from statistics of `mso-hub calibrate`; nvfp4 is W4A4 then."),
    opt("headroom", type=float, metavar="X", help="Factor on every measured magnitude [2 for NVFP4, else 1]."),
)
"""Options of every verb that plans."""
MODEL = several(
    opt("experts", type=click.Choice(["expert", "stack"]), help="One expert in memory, or a layer's [expert]."),
    opt("max_cpu_memory", metavar="SIZE", help="Main memory that the model may take, like 30GB."),
    opt("max_gpu_memory", metavar="SIZE", help="Memory of each GPU that the model may take."),
    opt("calib_dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Dtype of the arithmetic [the model's own]."),
    opt("trust_remote_code", is_flag=True, help="Run the repo's own code where transformers has no such model."),
)
CALIBRATE = several(
    opt("calibrate", is_flag=True, help="Run the model over text first, for static activation scales."), TEXT, MODEL
)
"""Options of `quantize`."""
IDLE = ("experts", "max_cpu_memory", "max_gpu_memory", "calib_dtype", "trust_remote_code")
"""Options that mean nothing without --calibrate, nor do those of the text."""
DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


def waits_for_scales(options: dict[str, Any]) -> bool:
    """Will activation scales be measured ones? RecipeError for options that contradict that, or are idle without it."""
    named = [f"--{name}" for name in ("stats", "calibrate", "input_scale") if options.get(name)]
    if len(named) > 1:
        raise RecipeError(f"{' and '.join(named)} say where activation scales come from; keep one")
    waits = bool(options["stats"] or options.get("calibrate"))
    if options.get("method"):
        # Where the rules have static scales a method measures them; a plain NVFP4 keeps activations as they are.
        static = options["recipe"] or options["like"] or options["activations"] == "4"
        waits = waits or bool(static and not options["input_scale"])
    cache = options.get("method") and options["kv_cache"] and not options["input_scale"]
    if options["headroom"] is not None and not (waits or cache):
        raise RecipeError(
            f"--headroom {options['headroom']:g}: is for measured scales; add --stats FILE or --calibrate"
        )
    if "calibrate" in options and not (options["calibrate"] or options["method"]):
        require_text(options, "add --calibrate, or --method NAME")
        for name in IDLE:
            if options[name]:
                raise RecipeError(
                    f"--{name}: is for a run of the model; add --calibrate, or --method NAME, or leave it out"
                )
    return waits


def needs_statistics(options: dict[str, Any], recipe: Recipe) -> bool:
    """Must the model run for static scales, of activations or of a KV cache?"""
    if options["stats"] or options["input_scale"]:
        return False
    takes = any(rule.scheme.input_scale is not None for rule in recipe.all_rules)
    return bool(options["calibrate"] or takes or (recipe.kv_cache and not recipe.kv_scales))


def with_stats(options: dict[str, Any], recipe: Recipe, source: str | Source) -> Recipe:
    """The recipe with the scales of --stats; as it is without them."""
    if not options["stats"]:
        return recipe
    from mso_hub.calibrate.scales import with_statistics

    return with_statistics(recipe, options["stats"], source, headroom=options["headroom"])


def measured(options: dict[str, Any], recipe: Recipe) -> Recipe:
    """The recipe with the scales of --stats or --calibrate, which runs the model now; as it is without them."""
    if not options["calibrate"]:
        return with_stats(options, recipe, options["input_dir"])
    from mso_hub.calibrate.scales import check_headroom, with_statistics
    from mso_hub.formats.device import require_kernels
    from mso_hub.pipeline import make_plan, require_output
    from mso_hub.plan.measured import require_taker
    from mso_hub.progress import waiting
    from mso_hub.source import open_source

    check_headroom(options["headroom"])
    require_taker(recipe, "--calibrate")
    target, where = hub_target(options, recipe), beside(options["output_dir"])
    with closing(open_source(options["input_dir"], on_event=waiting)) as source:
        require_output(source, options["output_dir"], target, on_event=waiting)
        planned = make_plan(source, recipe)  # all that can be wrong is said before hours of work
        require_kernels(planned.formats.values(), encoding_device(options))
        if options.get("smoke"):
            require_proof(planned, source, options=options)
        statistics = run_calibration(options, source, where, needs=tuple(needing(planned)))
        found = with_statistics(recipe, statistics, source, headroom=options["headroom"])
    if not options["quiet"]:
        click.echo(f"statistics: {where} (--stats takes them)", err=True)
    return found


def encoding_device(options: dict[str, Any]) -> str:
    """Of several devices that the model runs on the first one encodes; the bytes are those of a processor."""
    device: str = options["device"]
    return device.partition(",")[0] if options["calibrate"] else device


def needing(plan: Plan) -> Iterator[str]:
    """Modules of a plan that need an activation scale, as the source calls them."""
    for weight in (step.weight for shard in plan.shards for step in shard.steps if step.extras):
        form = plan.formats.get(weight.module)
        if form is None or not form.static:
            continue
        stored = weight.home.name.rpartition(".")[0]
        if stored.rpartition(".")[2] == weight.module.rpartition(".")[2]:
            yield stored
        elif not plan.recipe.text_only:  # an expert in a tensor of many
            yield weight.module


def beside(target: str) -> Path:
    """Where `quantize --calibrate` keeps its statistics: beside the output folder, in the cache for a repo's."""
    from mso_hub.hub import is_address, parse_address
    from mso_hub.sink.journal import cache_folder

    if not is_address(target):
        path = Path(target).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.with_name(f"{path.name}.statistics.safetensors")
    address = parse_address(target)
    folder = cache_folder() / "statistics"
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(str(address).encode()).hexdigest()[:12]
    return folder / f"{address.repo_id.replace('/', '--')}-{digest}.safetensors"


def run_calibration(options: dict[str, Any], source: Source, where: Path, *, needs: tuple[str, ...] = ()) -> Statistics:
    """Read the text, run the model over it -> statistics at `where`; what an earlier run did is not done again."""
    from mso_hub.progress import listener

    text_settings(options)  # what is wrong with these is said before a model is opened
    limits(options)
    show = listener("none" if options["quiet"] else options["progress"])

    def work(tell: Listener) -> Statistics:
        """On the thread that works; the text is read once it is known that the model can run."""
        return collect(options, source, lambda walk: read_rows(options, source, walk, tell), where, tell, needs=needs)

    return pausable(work, show, source.close if source.distant else lambda: None)


def limits(options: dict[str, Any]) -> Memory:
    """Main memory, and that of each GPU, which the model may take."""
    from mso_hub.calibrate.memory import Memory

    cpu, gpu = (read_size(options[n], n) if options[n] else None for n in ("max_cpu_memory", "max_gpu_memory"))
    return Memory(cpu, gpu)


def read_rows(options: dict[str, Any], source: Source, walk: Walk, tell: Listener) -> Rows:
    """The text for a model, and what a person is told of it."""
    from mso_hub.calibrate.text import open_tokenizer, read_text

    tokenizer = open_tokenizer(source, trust_remote_code=options["trust_remote_code"])
    longest = getattr(walk.config.get_text_config(), "max_position_embeddings", None)
    rows = read_text(text_settings(options), tokenizer, vocab_size=walk.vocab_size, positions=longest, on_event=tell)
    if not options["quiet"]:
        click.echo("\n".join(text_lines(rows)), err=True)
    return rows


def collect(
    options: dict[str, Any], source: Source, rows: Rows | Callable[[Walk], Rows], where: Path, tell: Listener, *,
    needs: tuple[str, ...] = (),
) -> Statistics:  # fmt: skip
    """Statistics at `where`, on the thread that works."""
    from mso_hub.calibrate.collect import collect_statistics

    return collect_statistics(
        source, rows, where, dtype=DTYPES.get(options["calib_dtype"]), experts=options["experts"] or "expert",
        device=options["device"].split(","), memory=limits(options),
        trust_remote_code=options["trust_remote_code"], channels=options.get("channels", False),
        fresh=options["fresh"] or not options.get("resume", True), needs=needs, on_event=tell,
    )  # fmt: skip


@click.command()
@several(INPUT_MODEL, TEXT, MODEL)
@opt("output", required=True, metavar="FILE", help="Statistics to write; unfinished work lies in FILE.partial.")
@opt("channels", is_flag=True, help="Keep magnitudes and second moments of every column too, for AWQ and others.")
@opt("device", default="cpu", metavar="NAME", help="cpu, cuda:0, or several GPUs: cuda:0,cuda:1 [cpu].")
@opt("fresh", is_flag=True, help="Discard statistics at FILE, finished or not, and start over.")
@opt("progress", type=click.Choice(["bar", "json", "none"]), default="bar", help="Bar, or one JSON event a line.")
@opt("quiet", is_flag=True, help="Print errors only.")
def calibrate(output: str, **options: Any) -> None:
    """Run the model over text, one decoder layer in memory, and write what its activations are like.

    `quantize --stats FILE` takes it. Stopped at any time, the same command goes on after the last complete layer.
    """
    from mso_hub.calibrate.scales import shared_amax
    from mso_hub.progress import waiting
    from mso_hub.source import open_source

    with closing(open_source(options["input_dir"], on_event=waiting)) as source:
        statistics = run_calibration(options, source, Path(output))
    if options["quiet"] or options["progress"] != "bar":
        return
    _, made = shared_amax(statistics)
    modules = [module for module in statistics.amax if module not in made.silent]
    command = f"mso-hub quantize --input_dir {shlex.quote(options['input_dir'])} --output_dir OUT --stats "
    lines = [f"{len(modules):,} modules over {made.tokens:,} tokens of {made.text}: {output}"]
    lines += [f"note: {sentence}" for sentence in made.notes({*statistics.amax, *made.unseen})]
    click.echo("\n".join([*lines, f"use it: {command}{shlex.quote(output)}"]))
