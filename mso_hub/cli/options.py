"""The options of the command line, and what their values mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mso_hub.errors import RecipeError

if TYPE_CHECKING:
    from mso_hub.checkpoint import TensorInfo
    from mso_hub.formats.weight import Reader
    from mso_hub.plan import Recipe
    from mso_hub.sink import HubTarget

Found = TypeVar("Found")
Command = TypeVar("Command", bound=Callable[..., Any])


def opt(name: str, **settings: Any) -> Callable[[Command], Command]:
    """A click option under `--some_name` and `--some-name`; a flag gets `--no_...` only where it is asked for."""
    forms = [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])
    return click.option(*forms, name, callback=given, **settings)


def given(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Refuse an empty text (a shell variable that is not set) and open a leading `~`, which `--x=~/y` keeps."""
    if value == "" or (isinstance(value, tuple) and "" in value):
        raise click.BadParameter("must not be empty", ctx, parameter)
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        raise click.BadParameter(f"must be UTF-8, got {value!r}; rename the file or folder", ctx, parameter)
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~") else value


def several(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Decorators in reading order as one."""

    def apply(command: Command) -> Command:
        """The innermost decorator is the last one."""
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


SOURCE = opt("input_dir", required=True, metavar="WHERE", help="Checkpoint to read: a folder, or hf://org/name@rev.")
TARGET = opt("output_dir", required=True, metavar="WHERE", help="What to write: a new folder, or hf://org/name.")
HUB = several(
    opt("private", is_flag=True, help="Hub: make a new repo private."),
    opt("branch", metavar="NAME", help="Hub: write to this branch, made where it is missing."),
    opt("create_pr", is_flag=True, help="Hub: open a pull request, or add to the one an earlier run opened."),
    opt(
        "journal_branch",
        is_flag=False,
        flag_value="mso-hub-journal",
        metavar="[NAME]",
        help="Hub: keep the journal on a branch too, so that another machine can go on [mso-hub-journal].",
    ),
    opt("base_model", metavar="REPO", help="Hub: the card's base model, where the source is a folder."),
)
RUN = several(
    click.option(
        "--resume/--no_resume",
        " /--no-resume",
        default=True,
        help="Go on with an unfinished run (default), or do as --fresh.",
    ),
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
    opt("num_gpus", type=int, default=0, hidden=True),
)
DEVICE = opt("device", default="cpu", metavar="NAME", help="cpu, or cuda:N for NVFP4, FP8 and integers [cpu].")
PROCESSORS = opt("device", default="cpu", hidden=True)
"""Where nothing is encoded a GPU is refused: decoding runs on processors."""
KT = several(
    opt("threadpool_count", type=int, metavar="T", help="kt-int4, kt-int8: NUMA nodes of the server [1]."),
    opt("no_merge_safetensor", is_flag=True, help="kt-int4, kt-int8: a tree of .kt files, experts only."),
    opt("experts_only", is_flag=True, help="kt-int4, kt-int8: leave the rest of the model out."),
    opt("resume_layer", type=int, metavar="N", help="kt-int4, kt-int8: leave out the layers below N."),
)
KT_OPTIONS = ("threadpool_count", "no_merge_safetensor", "experts_only", "resume_layer")
SCHEME = several(
    opt("format", metavar="NAME", help="What weights become; `mso-hub formats` lists them [nvfp4]."),
    opt("recipe", metavar="FILE", help="Several formats: FILE.toml, FILE.yaml, a preset, or an output to do again."),
    opt("like", metavar="WHERE", help="As the config of a quantized model says: its folder, file or hf://org/name."),
    opt("layout", metavar="NAME", help="compressed-tensors (default), modelopt or deepseek."),
    opt("mlp_only", is_flag=True, help="Feed-forward layers and experts (the default)."),
    opt("all_linear", is_flag=True, help="Attention projections too."),
    opt("targets", multiple=True, metavar="PATTERN", help="Glob or re:REGEX of modules to quantize; repeatable."),
    opt("ignore", multiple=True, metavar="PATTERN", help="Glob or re:REGEX of modules to leave alone; repeatable."),
    opt("exclude", multiple=True, metavar="PATTERN", help="The same as --ignore."),
    opt("exclude_config", metavar="FILE", help="Config of a reference model whose exclude list is honoured too."),
    opt("no_default_ignore", is_flag=True, help="Offer embeddings, heads, routers, vision, MTP to the targets."),
    opt("skip_layers", metavar="LIST", help="Decoder layers to leave alone: 0,2-4,-1 (-1 is the last one)."),
    opt("activations", type=click.Choice(["16", "8", "4"]), help="Bits of activations: W4A16, W4A8, W4A4, ..."),
    opt("group_size", type=int, metavar="N", help="INT4, INT8: columns per scale, 0 for one scale a row [128]."),
    click.option("--symmetric/--asymmetric", default=None, help="INT4, INT8: without or with zero points [symmetric]."),
    opt("input_scale", metavar="X", help="Static activation scale for all (1.0), or a checkpoint that has them."),
    opt("scale_search", metavar="HOW", help="absmax, mse, ...: `mso-hub formats` lists them with each default."),
    opt("kv_cache", type=click.Choice(["fp8"]), help="Announce an FP8 KV cache; keeps or takes its scales."),
    opt("kv_scales", metavar="WHERE", help="A checkpoint whose k_scale and v_scale are taken."),
    opt("text_only", is_flag=True, help="Leave vision and audio parts out; flatten names and config."),
    opt("block_size", type=int, default=16, hidden=True),
    KT,
)  # fmt: skip
JSON = opt("json", is_flag=True, help="Print JSON.")
VLLM = opt("vllm_python", metavar="PATH", help="A Python that has vLLM [that of MSO_VLLM_PYTHON, else this one].")
SMOKE = several(
    click.option(
        "--smoke/--no_smoke",
        " /--no-smoke",
        default=None,
        help="Prove on the planned headers that vLLM loads the result, before a byte is written; or allow also what "
        "vLLM is known not to load.",
    ),
    opt("tp", metavar="LIST", help="--smoke: tensor-parallel sizes to prove [1,2,4,8]."),
    VLLM,
)
RULE_OPTIONS = (
    "format", "mlp_only", "all_linear", "targets", "activations", "group_size", "symmetric", "scale_search",
)  # fmt: skip
"""Options that a recipe has in each of its rules."""


def print_presets(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    """What `mso-hub formats --presets` prints, in place of the command."""
    from mso_hub.display import presets_text

    if value and not ctx.resilient_parsing:
        click.echo(presets_text())
        ctx.exit()


LIST_CONFIGS = click.option(
    "--list_configs", "--list-configs", is_flag=True, is_eager=True, expose_value=False, callback=print_presets,
    help="Print the presets that --recipe takes, as `mso-hub formats --presets` does.",
)  # fmt: skip


PRESETS = click.option(
    "--presets", "--list_configs", "--list-configs", "presets", is_flag=False, flag_value="all", metavar="[NAME]",
    callback=given, help="The presets that --recipe takes; with a name, the file of that one.",
)  # fmt: skip


def emit(content: str | dict[str, Any]) -> None:
    """Text as it is, anything else as JSON."""
    click.echo(content if isinstance(content, str) else json.dumps(content, indent=2))


def hub_target(options: dict[str, Any], recipe: Recipe) -> HubTarget | None:
    """Options of HUB -> HubTarget, None for a folder; RecipeError where a folder is given options of a repo."""
    from mso_hub.formats import DENSE
    from mso_hub.hub import is_address
    from mso_hub.sink import HubTarget, converted

    where = options["output_dir"]
    if not is_address(where):
        for name in ("private", "branch", "create_pr", "journal_branch", "base_model"):
            if options[name]:
                raise RecipeError(
                    f"--{name}: is for a repo on the Hub, {where} is a folder; write hf://org/name, or leave it out"
                )
        return None
    title, description = converted(options["input_dir"], recipe.label or DENSE)
    return HubTarget(
        private=options["private"], branch=options["branch"], create_pr=options["create_pr"],
        journal_branch=options["journal_branch"], title=title, description=description,
    )  # fmt: skip


def read_size(text: str, name: str = "memory_budget") -> int:
    """`512MiB`, `2GB`, `1000000` -> bytes; RecipeError otherwise."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    units |= {"TB": 10**12, "TIB": 2**40}
    number = text.strip().upper().rstrip("KMGTIB")
    unit = text.strip().upper()[len(number) :]
    try:
        nbytes = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError) as error:
        raise RecipeError(f"{name}: needs a size like 512MiB or 2GB, got {text!r}") from error
    if nbytes < 1 << 20:
        raise RecipeError(f"{name}: must be at least 1MiB, got {text!r}")
    return nbytes


def read_tp(text: str | None) -> tuple[int, ...]:
    """`1,2,4` -> sizes, nothing for None; RecipeError for what is no list of different whole numbers > 0."""
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    sizes = tuple(int(part) for part in parts if part.isascii() and part.isdigit())
    if len(sizes) < len(parts) or 0 in sizes or len(set(sizes)) < len(sizes):
        raise RecipeError(f"--tp {text}: needs different whole numbers > 0 with commas between them, like 1,2,4,8")
    return sizes


def build_recipe(options: dict[str, Any], *, waits: bool = False) -> Recipe:
    """Options of SCHEME -> Recipe; where it `waits` for measured scales, a number stands for each of them."""
    from mso_hub.cli.kt import kt_recipe
    from mso_hub.formats import Scheme
    from mso_hub.formats.kt import KT_FORMATS
    from mso_hub.legacy import check_block_size
    from mso_hub.plan import Recipe
    from mso_hub.plan.like import recipe_like
    from mso_hub.plan.measured import STAND_IN, plain_takes_scale
    from mso_hub.plan.recipe_file import read_recipe

    check_block_size(options["block_size"])
    if options["mlp_only"] and options["all_linear"]:
        raise RecipeError("--mlp_only and --all_linear contradict each other; keep one")
    if options["recipe"] and options["like"]:
        raise RecipeError(f"--recipe {options['recipe']} and --like {options['like']} contradict each other; keep one")
    said = _said(options)
    if options["format"] in KT_FORMATS:
        return kt_recipe(options, said)
    if idle := [name for name in KT_OPTIONS if options[name] not in (None, False)]:
        raise RecipeError(f"--{idle[0]}: is for --format {' and '.join(KT_FORMATS)}; leave it out")
    for name, read in (("recipe", read_recipe), ("like", recipe_like)):
        if where := options[name]:
            _refuse_rule_options(options, f"--{name} {where}")
            return read(where, **said, waits=waits)
    scheme = Scheme(options["format"] or "nvfp4", int(options["activations"]) if options["activations"] else None)
    if waits and plain_takes_scale(scheme):
        said["input_scale"] = STAND_IN
    return Recipe(
        scheme=scheme.format,
        mode="all-linear" if options["all_linear"] else "mlp",
        targets=options["targets"],
        activations=scheme.activations,
        group_size=options["group_size"],
        symmetric=options["symmetric"],
        scale_search=options["scale_search"],
        **said,
    )


def _said(options: dict[str, Any]) -> dict[str, Any]:
    """Fields of Recipe that go with any rules, those that were given."""
    from mso_hub.plan.layers import split_layers
    from mso_hub.plan.reference import exclude_patterns

    scale, amax = read_input_scale(options["input_scale"])
    said = {
        "layout": options["layout"],
        "ignore": options["ignore"] + options["exclude"],
        "imported_ignore": tuple(exclude_patterns(options["exclude_config"])) if options["exclude_config"] else None,
        "default_ignore": False if options["no_default_ignore"] else None,
        "skip_layers": split_layers(options["skip_layers"]) if options["skip_layers"] else None,
        "input_scale": scale,
        "input_amax": amax,
        "kv_cache": True if options["kv_cache"] else None,
        "kv_scales": read_kv(options["kv_scales"]) if options["kv_scales"] else None,
        "text_only": True if options["text_only"] else None,
        "unloadable": True if options.get("smoke") is False else None,
    }
    return {name: value for name, value in said.items() if value is not None and value != ()}


def _refuse_rule_options(options: dict[str, Any], recipe: str) -> None:
    """RecipeError for an option that contradicts the rules of a recipe."""
    for name in RULE_OPTIONS:
        flag_is_off = name in ("mlp_only", "all_linear") and not options[name]
        if options[name] is not None and options[name] != () and not flag_is_off:
            flag = "--symmetric and --asymmetric" if name == "symmetric" else f"--{name}"
            raise RecipeError(
                f"{flag}: {recipe} says this in its rules; keep one of them (`mso-hub formats --presets NAME` prints a "
                "preset, to be changed)"
            )


def read_input_scale(text: str | None) -> tuple[float | str | None, dict[str, float]]:
    """`1.0` -> one scale for all; a folder, a .safetensors file or hf://org/name -> "imported", amax per module."""
    from mso_hub.formats import IMPORTED
    from mso_hub.formats.scales import read_input_amax

    if text is None:
        return None, {}
    try:
        return float(text), {}
    except ValueError:
        amax = from_checkpoint("input_scale", text, read_input_amax)
        return IMPORTED, amax


def read_kv(text: str) -> dict[str, tuple[float, float]]:
    """A folder, a .safetensors file or hf://org/name -> (k, v) scale per attention module."""
    from mso_hub.formats.scales import read_kv_scales

    return from_checkpoint("kv_scales", text, read_kv_scales)


def from_checkpoint(
    option: str, text: str, take: Callable[[list[TensorInfo], Reader], dict[str, Found]]
) -> dict[str, Found]:
    """Scales that `take` finds among all tensors of a checkpoint; RecipeError where it finds none."""
    from mso_hub.hub import is_address
    from mso_hub.source import open_source
    from mso_hub.source.scan import read_shard

    path = Path(text)
    numbers = "a number or " if option == "input_scale" else ""
    absent = f"--{option} {text}: needs {numbers}a checkpoint with such scales, found none there"
    if not is_address(text) and not path.exists():
        raise RecipeError(absent)
    single = path.name if path.is_file() else None
    tensors: list[TensorInfo] = []
    with closing(open_source(str(path.parent) if single else text)) as source:
        files = {n: s for n, s in source.files().items() if n == single or (not single and n.endswith(".safetensors"))}
        for name, nbytes in files.items():
            tensors += read_shard(source, name, nbytes).tensors
        scales = take(tensors, source.read)
    if not scales:
        raise RecipeError(absent)
    return scales


def one_of(argument: str | None, option: str | None) -> str:
    """The source, given as an argument or as --input_dir."""
    if (argument is None) == (option is None):
        raise RecipeError(f"give the source once, as an argument or as --input_dir; got {argument!r} and {option!r}")
    return argument or option or ""
