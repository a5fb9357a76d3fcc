"""`mso-hub smoke`, and the same proof as a part of `plan` and `quantize`."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from mso_hub.cli.options import JSON, VLLM, emit, given, opt, read_tp, several
from mso_hub.errors import RecipeError, SmokeError

if TYPE_CHECKING:
    from mso_hub.generation import GenerationReport
    from mso_hub.plan import Plan
    from mso_hub.smoke import ShapeReport
    from mso_hub.source import Source

SHOWN = 12
"""Problems that stop `quantize`, as it shows them."""
GENERATION_ONLY = ("max_tokens", "prompt", "max_nll_gap", "real_tp")
SHAPES = several(
    opt("tp", metavar="LIST", help="Tensor-parallel sizes [1,2,4,8]."),
    opt("ep", is_flag=True, help="Expert parallel: every expert whole on one rank."),
    opt("pp", type=int, metavar="N", help="Pipeline stages [1]."),
    opt("layers", type=int, metavar="N", help="The first N decoder layers only [all]."),
    VLLM,
    opt("trust_remote_code", is_flag=True, help="Let Python code of the checkpoint run."),
)
GENERATE = several(
    opt("generate", is_flag=True, help="Instead: generate from a folder and from its weights in BF16, and compare."),
    opt("max_tokens", type=int, metavar="N", help="--generate: tokens of each greedy answer [16]."),
    opt("prompt", multiple=True, metavar="TEXT", help="--generate: for the folder's tokenizer; repeatable."),
    opt(
        "max_nll_gap", type=float, metavar="X",
        help="--generate: nats per token of the prompt that quantized activations may cost. By default 0.2, a factor "
        "1.22 in perplexity: W4A4 cost the model of our tests 0.02, a wrong scale 0.8. Where only weights are "
        "quantized nothing may be lost.",
    ),
    opt("real_tp", type=int, metavar="N", help="--generate: processes that share the model, on a CPU too [1]."),
)  # fmt: skip


@click.command()
@click.argument("source", callback=given)
@several(SHAPES, GENERATE, JSON)
def smoke(source: str, json: bool, generate: bool, **options: Any) -> None:
    """Prove without a GPU that vLLM loads a checkpoint, every tensor on every rank. Exit code 2 when it does not.

    SOURCE is a folder or hf://org/name@revision. Headers are enough: no weight is read or downloaded.
    """
    if options["real_tp"] is not None and options["real_tp"] < 1:
        raise RecipeError(f"--real_tp: needs at least 1 process, got {options['real_tp']}")
    others = ("tp", "ep", "pp", "layers", "trust_remote_code") if generate else GENERATION_ONLY
    if idle := [name for name in others if options[name] not in (None, False, ())]:
        way = f"leave it out with --generate{'; --real_tp is its size' * (idle[0] == 'tp')}" if generate else "add it"
        raise RecipeError(f"--{idle[0]}: is for {'the proof of shapes' if generate else '--generate'}; {way}")
    try:
        report, text = (_generation if generate else _shapes)(source, options)
    except KeyboardInterrupt:
        click.echo("mso-hub: stopped; nothing is kept of a proof", err=True)
        sys.exit(130)
    emit(report.as_dict() if json else text)
    if not report.ok:
        sys.exit(2)


def _generation(source: str, options: dict[str, Any]) -> tuple[GenerationReport, str]:
    from mso_hub.generation import compare_generation, generation_text

    said = {name: options[name] for name in ("max_tokens", "max_nll_gap") if options[name] is not None}
    processes = 1 if options["real_tp"] is None else options["real_tp"]
    report = compare_generation(
        source,
        prompts=options["prompt"],
        tp=processes,
        python=options["vllm_python"],
        **said,
    )
    return report, generation_text(report)


def _shapes(source: str, options: dict[str, Any]) -> tuple[ShapeReport, str]:
    from mso_hub.progress import waiting
    from mso_hub.smoke import SIZES, prove
    from mso_hub.smoke.text import shape_text
    from mso_hub.source import open_source

    sizes = read_tp(options["tp"]) or SIZES
    with closing(open_source(source, on_event=waiting)) as opened:
        report = prove(
            opened, tp=sizes, ep=options["ep"], pp=1 if options["pp"] is None else options["pp"],
            layers=options["layers"] or 0, python=options["vllm_python"],
            trust_remote_code=options["trust_remote_code"],
        )  # fmt: skip
    return report, shape_text(report)


def wants_proof(options: dict[str, Any]) -> bool:
    """Is --smoke among the options of SMOKE? RecipeError or SmokeError for what cannot be, before anything is read."""
    from mso_hub.smoke import python_of_vllm

    read_tp(options["tp"])
    if options["smoke"]:
        python_of_vllm(options["vllm_python"])
        return True
    idle = next((name for name in ("tp", "vllm_python") if options[name]), None)
    if idle is not None:
        raise RecipeError(f"--{idle} {options[idle]}: is for --smoke; add it, or leave this out")
    return False


def prove_plan(plan: Plan, source: Source, options: dict[str, Any]) -> ShapeReport:
    """The proof of what a plan will write, as the options of SMOKE want it."""
    from mso_hub.smoke import SIZES, prove

    return prove(plan, tp=read_tp(options["tp"]) or SIZES, python=options["vllm_python"], source=source)


def require_proof(plan: Plan, source: Source, options: dict[str, Any]) -> None:
    """SmokeError where vLLM would not load what a plan writes."""
    from mso_hub.smoke.text import first_problems

    report = prove_plan(plan, source, options)
    if not report.ok:
        problems = "\n  ".join(first_problems(report, SHOWN))
        raise SmokeError(
            f"{plan.source}: nothing was written, vLLM {report.vllm} would not load it (`mso-hub plan --smoke` has "
            f"every problem in full)\n  {problems}"
        )
