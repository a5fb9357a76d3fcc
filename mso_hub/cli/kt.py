"""`mso-hub kt convert`: the options of KTransformers' own converter, and those of `--format kt-int4` and `kt-int8`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mso_hub.cli.options import HUB, KT_OPTIONS, RUN, opt, several
from mso_hub.errors import RecipeError

if TYPE_CHECKING:
    from mso_hub.plan.kt import KtRecipe

METHODS = ("int4", "int8")
INPUT_TYPES = ("auto", "bf16", "fp16", "fp8")


@click.group()
def kt() -> None:
    """Weights for the processors of a KTransformers server."""


@kt.command()
@opt("input_path", required=True, metavar="WHERE", help="Checkpoint to read: a folder, or hf://org/name@rev.")
@opt("output", required=True, metavar="WHERE", help="What to write: a new folder, or hf://org/name.")
@opt("quant_method", type=click.Choice(METHODS), default="int4", help="What the experts become [int4].")
@opt("input_type", type=click.Choice(INPUT_TYPES), default="auto", help="What the experts must be stored as [auto].")
@opt("threadpool_count", type=int, default=2, metavar="T", help="NUMA nodes of the server [2].")
@opt("cpuinfer_threads", type=click.IntRange(1), metavar="N", help="The same as --workers.")
@opt("no_merge_safetensor", is_flag=True, help="A tree of .kt files with nothing but experts.")
@opt("experts_only", is_flag=True, help="Leave the rest of the model out.")
@opt("resume_layer", type=int, metavar="N", help="Leave out the layers below N; an unfinished run goes on without it.")
@opt("gpu", is_flag=True, hidden=True)
@several(RUN, HUB)
def convert(
    input_path: str, output: str, quant_method: str, input_type: str, cpuinfer_threads: int | None, gpu: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Convert the routed experts of a checkpoint for kt-kernel. No GPU is needed, whatever they are stored as."""
    from mso_hub.cli import execute

    if cpuinfer_threads is not None and options["workers"] is not None:
        raise RecipeError("--cpuinfer_threads and --workers are the same option; keep one")
    if gpu and not options["quiet"]:
        click.echo("--gpu: nothing here needs one", err=True)
    options |= {"input_dir": input_path, "output_dir": output, "device": "cpu", "format": f"kt-{quant_method}"}
    options["workers"] = options["workers"] or cpuinfer_threads
    execute(options, kt_recipe(options, {"input_type": input_type}))


def kt_recipe(options: dict[str, Any], said: dict[str, Any]) -> KtRecipe:
    """Options -> settings; `said` are other fields, those of Recipe are refused there."""
    from mso_hub.plan.kt import KtRecipe

    said = dict(said)
    for name in ("targets", "group_size", "symmetric", "scale_search", "recipe", "like", "activations"):
        if options.get(name) not in (None, ()):
            raise RecipeError(f"--{name}: {options['format']} takes all routed experts as they are; leave it out")
    if options.get("all_linear"):
        raise RecipeError(f"--all_linear: {options['format']} takes the routed experts, nothing else; leave it out")
    given = {name: options[name] for name in KT_OPTIONS if options[name] is not None}
    said["merge"] = not given.pop("no_merge_safetensor")
    return KtRecipe(scheme=options["format"], **said, **given)
