"""`quantize --method`: options of methods, and one resumable job of text, statistics, method and conversion."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mso_hub.cli.calibrate import DTYPES, beside, collect, limits, needing, needs_statistics, read_rows, with_stats
from mso_hub.cli.options import hub_target, opt, several
from mso_hub.cli.running import pausable
from mso_hub.cli.smoke import require_proof
from mso_hub.errors import HubError, RecipeError, SinkError

if TYPE_CHECKING:
    from mso_hub.calibrate.methods import MethodSettings
    from mso_hub.calibrate.methods.job import MethodJob
    from mso_hub.events import Listener
    from mso_hub.plan import Plan, Recipe
    from mso_hub.source import Source

METHODS = ("gptq", "weighted", "awq", "smoothquant")
USED_BY = {
    "dampening_frac": ("gptq",),
    "actorder": ("gptq",),
    "least_rows": ("gptq", "weighted", "awq"),
    "alpha": ("smoothquant",),
}
"""Setting -> methods that look at it."""
METHOD = several(
    opt("method", type=click.Choice(METHODS), help="More than rounding, over text: see docs/calibration.md [none]."),
    opt("dampening_frac", type=float, metavar="X", help="gptq: added to the Hessian, in parts of its mean [0.01]."),
    opt("actorder", type=click.Choice(["static", "none"]), help="gptq: columns of large inputs first, or not [static]"),
    opt("least_rows", type=int, metavar="N", help="An expert that saw fewer tokens is rounded to nearest [32]."),
    opt("alpha", type=float, metavar="X", help="smoothquant: how much of outliers moves into weights, 0 to 1 [0.5]."),
    opt("quant_method", metavar="NAME", help="GPTQ or RTN for routed experts only, as KTransformers' script [GPTQ]."),
    opt("quant_type", metavar="NAME", help="W4A16 or W8A16 for routed experts only, as KTransformers' script [W8A16]."),
    opt("force_cpu", is_flag=True, help="The same as --device cpu."),
)
"""Options of `quantize`."""
EXPERTS = r"re:(.*\.)?experts\.\d+\."
"""Routed experts, numbered or stored as one tensor; neither shared ones nor routers."""
SCRIPT_TEXT = ("HuggingFaceH4/ultrachat_200k", "train_sft", 2048)
SCRIPT_DAMPENING = 0.1


def with_aliases(options: dict[str, Any]) -> dict[str, Any]:
    """Options of KTransformers' convert_gpu_weights.py -> ours, with its defaults; RecipeError for contradictions."""
    if options["force_cpu"] and options["device"] != "cpu":
        raise RecipeError(f"--force_cpu and --device {options['device']} contradict each other; keep one")
    if not (options["quant_method"] or options["quant_type"]):
        return options
    method, kind = (options["quant_method"] or "GPTQ").upper(), (options["quant_type"] or "W8A16").upper()
    for name, said, known in (("quant_method", method, ("GPTQ", "RTN")), ("quant_type", kind, ("W4A16", "W8A16"))):
        if said not in known:
            raise RecipeError(f"--{name} must be one of {', '.join(known)}, got {options[name]!r}")
    for name in ("method", "format", "recipe", "like", "targets", "mlp_only", "all_linear", "activations"):
        if options[name]:
            raise RecipeError(f"--{name}: --quant_method and --quant_type say this too; keep one of them")
    found = {**options, "format": kind.lower(), "targets": (EXPERTS,)}
    if method == "RTN":
        return found
    found["method"] = "gptq"
    if options["dampening_frac"] is None:
        found["dampening_frac"] = SCRIPT_DAMPENING
    if not options["dataset_yaml"]:
        name, split, length = SCRIPT_TEXT
        if not options["calib_dataset"]:
            found |= {"calib_dataset": name, "dataset_split": options["dataset_split"] or split}
        found["max_seq_len"] = options["max_seq_len"] or length
    return found


def method_settings(options: dict[str, Any]) -> MethodSettings | None:
    """Options of METHOD -> MethodSettings, None without a method; RecipeError for what is idle or cannot work."""
    name = options["method"]
    for setting, users in USED_BY.items():
        if options[setting] is not None and name not in users:
            raise RecipeError(f"--{setting}: is for --method {' or '.join(users)}; add it, or leave this out")
    if name is None:
        return None
    from mso_hub.calibrate.methods import MethodSettings

    for option in ("report",) if name in ("gptq", "weighted") else ():
        if options[option]:
            raise RecipeError(
                f"--{option}: measures rounding, which --method {name} does itself; `mso-hub verify OUT --source SRC` "
                "measures every weight of the output"
            )
    return MethodSettings(**{s: options[s] for s in USED_BY if options[s] is not None})


def work_folder(target: str, method: str) -> Path:
    """Where a method keeps its work until the output is there: beside the folder, in the cache for a repo's."""
    where = beside(target)
    return where.with_name(f"{where.name.removesuffix('.statistics.safetensors')}.{method}-work")


@dataclass(frozen=True, slots=True)
class Ready:
    """What is left is to convert it.

    source  with the method's work in it
    recipe  with measured scales, and what was done
    told    the plan of the source as it was
    """

    source: Source
    recipe: Recipe
    told: Plan


def quantize_by_method(
    options: dict[str, Any], recipe: Recipe, settings: MethodSettings, execute: Callable[[dict[str, Any], Recipe], None]
) -> None:
    """All of it. What is impossible is said before a layer runs, and leaves nothing behind.

    execute  does the conversion of what `ready` among the options says
    """
    from mso_hub.calibrate.methods.job import discard, locked
    from mso_hub.pipeline import require_output
    from mso_hub.progress import listener, waiting
    from mso_hub.source import open_source

    _refuse(options, recipe)
    target = hub_target(options, recipe)
    folder = work_folder(options["output_dir"], options["method"])
    show = listener("none" if options["quiet"] else options["progress"])
    with (
        closing(open_source(options["input_dir"], on_event=waiting)) as source,
        locked(folder, fresh=options["fresh"] or not options["resume"]),
    ):
        require_output(source, options["output_dir"], target, on_event=waiting)
        cut = source.close if source.distant else lambda: None
        ready = pausable(partial(_prepare, options, recipe, settings, source, folder), show, cut)
        if ready is not None:
            # What little is left to encode has the same bytes there, and every format has kernels for it.
            execute({**options, "ready": ready, "smoke": None, "device": "cpu"}, ready.recipe)
        elif not options["quiet"]:
            click.echo(f"was complete already, nothing was written: {options['output_dir']}")
        discard(folder)


def _refuse(options: dict[str, Any], recipe: Recipe) -> None:
    """RecipeError for what does not go together with the method."""
    from mso_hub.calibrate.scales import check_headroom
    from mso_hub.cli.text_options import text_settings
    from mso_hub.plan.kt import KtRecipe
    from mso_hub.plan.measured import require_taker
    from mso_hub.plan.method import FOLDED

    name = options["method"]
    if isinstance(recipe, KtRecipe):
        raise RecipeError(f"--method {name}: {recipe.scheme} is rounded to nearest; leave it out")
    if name in FOLDED and (options["stats"] or recipe.input_amax):
        given = "stats" if options["stats"] else "input_scale"
        raise RecipeError(
            f"--{given} {options[given]}: --method {name} changes the activations that this was measured on; leave it "
            "out, they are measured afterwards"
        )
    if options["calibrate"]:
        require_taker(recipe, "--calibrate")
    check_headroom(options["headroom"])
    limits(options)
    text_settings(options)


def _prepare(
    options: dict[str, Any], recipe: Recipe, settings: MethodSettings, source: Source, folder: Path, tell: Listener
) -> Ready | None:
    """Text, statistics, method: what of it is not done yet; None where the output is complete."""
    from mso_hub.calibrate.methods.job import STATISTICS
    from mso_hub.calibrate.scales import with_statistics
    from mso_hub.pipeline import make_plan
    from mso_hub.plan.method import FOLDED

    found = with_stats(options, recipe, source)
    job = _job(options, recipe, settings, source, tell)
    also = _also(options)
    if _is_finished(options, job.made(also).key):
        return None
    measures, folded = needs_statistics(options, recipe), options["method"] in FOLDED
    needs = tuple(needing(job.plan)) if measures else ()

    def measured(measured_source: Source, where: Path) -> Recipe:
        """The recipe with what the activations of a source are like."""
        statistics = collect(options, measured_source, job.rows, where, tell, needs=needs)
        return with_statistics(recipe, statistics, measured_source, headroom=options["headroom"])

    if measures and not folded:
        found = measured(source, beside(options["output_dir"]))
    prepared, method = job.run(folder, also=also, on_event=tell)
    if measures and folded:
        found = measured(prepared, folder / STATISTICS)
    found = replace(found, by_method=method)
    return Ready(prepared, found, make_plan(source, found))


def _job(
    options: dict[str, Any], recipe: Recipe, settings: MethodSettings, source: Source, tell: Listener
) -> MethodJob:
    """Everything that can be wrong is found in headers; then the text is read."""
    from mso_hub.calibrate.methods.job import MethodJob
    from mso_hub.calibrate.methods.run import choose_targets
    from mso_hub.calibrate.walk import Walk

    walk = Walk(
        source, dtype=DTYPES.get(options["calib_dtype"]), experts=options["experts"] or "expert",
        device=options["device"].split(","), memory=limits(options),
        trust_remote_code=options["trust_remote_code"], on_event=tell,
    )  # fmt: skip
    plan, targets, _ = choose_targets(walk, recipe, options["method"])
    if options.get("smoke"):
        require_proof(plan, source, options=options)
    rows = read_rows(options, source, walk, tell)
    return MethodJob(walk, rows, recipe, options["method"], settings, plan, tuple(targets))


def _also(options: dict[str, Any]) -> str:
    """What decides about the output beside the recipe, the method and the text."""
    stats = options["stats"]
    digest = hashlib.sha256(Path(stats).read_bytes()).hexdigest() if stats else None
    return json.dumps([options["calibrate"], options["headroom"], digest])


def _is_finished(options: dict[str, Any], key: str) -> bool:
    """Is the output there, made by this very job? SinkError where something else is, and --fresh is not given."""
    from mso_hub.hub import is_address, parse_address
    from mso_hub.plan.method import read_method
    from mso_hub.source import open_source
    from mso_hub.verify.manifest import read_manifest

    where = options["output_dir"]
    if options["fresh"] or options["create_pr"] or not (is_address(where) or _is_filled(where)):
        return False
    place = where
    if is_address(where) and options["branch"]:
        place = str(replace(parse_address(where), revision=options["branch"]))
    try:
        with closing(open_source(place)) as output:
            manifest = read_manifest(output)
    except HubError:  # no such repo or branch yet: the sink will say what is wrong with it
        return False
    made = read_method(manifest.get("method"))
    if made is not None and made.key == key:
        return True
    if is_address(where) and not isinstance(manifest.get("job"), str):
        return False
    raise SinkError(
        f"{where}: the output must be a new or empty place, found "
        + ("a run with another source, text or settings" if manifest else "files that are not of this tool")
        + "; choose another one, or replace a run with --fresh"
    )


def _is_filled(where: str) -> bool:
    path = Path(where)
    return path.is_file() or (path.is_dir() and any(path.iterdir()))
