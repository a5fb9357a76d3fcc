"""`mso-hub demo`: one real checkpoint there and back, every step with the command that does the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mso_hub.display import plan_text, report_text
from mso_hub.errors import RecipeError, VerifyError
from mso_hub.formats import DENSE
from mso_hub.pipeline import convert, make_plan
from mso_hub.plan import Recipe
from mso_hub.progress import listener
from mso_hub.sink import open_sink
from mso_hub.verify import Report, verify_checkpoint

TINY_MODEL = Path(__file__).parent.parent / "tests" / "models" / "tiny-qwen3-moe"


def run_demo(source: str | None, folder: Path, show: Callable[[str], None]) -> None:
    """BF16 -> NVFP4 -> verified -> BF16 -> verified, into `folder`; raises VerifyError when a check fails."""
    origin = Path(source) if source else TINY_MODEL
    if not origin.is_dir():
        raise RecipeError(f"{origin}: the demo's model lies in the repository, not in the wheel; pass --source DIR")
    packed, dense = folder / "nvfp4", folder / "bf16"
    quantize, back = Recipe(mode="all-linear"), Recipe(scheme=DENSE)
    show(f"$ mso-hub plan {origin} --all_linear\n\n{plan_text(make_plan(origin, quantize))}\n")
    steps = (
        (origin, packed, quantize, "quantize", " --all_linear"),
        (packed, dense, back, "decompress", ""),
    )
    for before, after, recipe, verb, flags in steps:
        show(f"$ mso-hub {verb} --input_dir {before} --output_dir {after}{flags}\n")
        convert(before, open_sink(after, fresh=after.exists()), recipe, on_event=listener("bar"))
        show(f"\n$ mso-hub verify {after} --source {before}\n")
        show(_checked(verify_checkpoint(after, source=before)) + "\n")
    show(f"serve it: vllm serve {packed}")


def _checked(report: Report) -> str:
    if not report.ok:
        raise VerifyError(f"{report.where}: {len(report.problems)} problems, the first: {report.problems[0]}")
    return report_text(report)
