"""`mso-hub demo`: one real checkpoint from repo to repo and back, every step with the command that does the same.

The repos are on a Hub of its own on this machine (`mso-hub devhub`), so that nothing leaves it and no account is
needed; what talks to it is the real client.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from mso_hub.display import inspect_text, plan_text, report_text
from mso_hub.errors import RecipeError, VerifyError
from mso_hub.formats import DENSE
from mso_hub.hub import Client, is_address
from mso_hub.hub.devhub import DevHub
from mso_hub.hub.devhub.seed import connect, seed
from mso_hub.pipeline import convert, make_plan
from mso_hub.plan import Recipe
from mso_hub.progress import listener
from mso_hub.sink import open_sink
from mso_hub.source import open_source, read_checkpoint
from mso_hub.verify import Report, verify_checkpoint

TINY_MODEL = Path(__file__).parent.parent / "tests" / "models" / "tiny-qwen3-moe"
PORT = 7860

Show = Callable[[str], None]


def run_demo(source: str | None, folder: Path, show: Show) -> None:
    """BF16 repo -> NVFP4 repo -> verified -> BF16 folder -> verified; raises VerifyError when a check fails.

    source  folder of the checkpoint to put on the Hub first; the small trained model of the repository by default
    folder  gets the Hub's state (`hub`) and the last result (`bf16`)
    """
    origin = Path(source) if source else TINY_MODEL
    if not origin.is_dir():
        raise RecipeError(f"{origin}: the demo's model lies in the repository, not in the wheel; pass --source DIR")
    folder.mkdir(parents=True, exist_ok=True)
    with DevHub(folder / "hub", xet=True) as hub:
        name = re.sub(r"[^A-Za-z0-9]+", "-", origin.resolve().name).strip("-") or "model"
        client = connect(hub)
        seed(client, f"dev/{name}", origin)
        show(
            f"A Hub runs on {hub.endpoint} for as long as this takes; it holds dev/{name}. To look around yourself:\n\n"
            f"  mso-hub devhub --dir {folder / 'hub'}\n"
            f"  export HF_ENDPOINT=http://127.0.0.1:{PORT} HF_TOKEN={hub.token()}    # in another shell\n"
        )
        _steps(client, f"hf://dev/{name}", folder / "bf16", show)


def _steps(client: Client, dense: str, back: Path, show: Show) -> None:
    packed = f"{dense}-NVFP4"
    quantize = Recipe(mode="all-linear")
    with closing(open_source(dense, client=client)) as source:
        show(f"$ mso-hub inspect {dense}\n\n{inspect_text(read_checkpoint(source))}\n")
        show(f"$ mso-hub plan {dense} --all_linear\n\n{plan_text(make_plan(source, quantize))}\n")
    _convert(client, dense, packed, quantize, "quantize --all_linear", show)
    _convert(client, packed, str(back), Recipe(scheme=DENSE), "decompress", show)
    show(f"serve it: vllm serve {packed.removeprefix('hf://')}")


def _convert(client: Client, before: str, after: str, recipe: Recipe, words: str, show: Show) -> None:
    """One conversion, then its check."""
    verb, _, flags = words.partition(" ")
    show(f"$ mso-hub {verb} --input_dir {before} --output_dir {after} {flags}".rstrip() + "\n")
    on_hub = is_address(after)
    sink = open_sink(after, fresh=on_hub or Path(after).exists(), client=client)
    with closing(open_source(before, client=client)) as source:
        convert(source, sink, recipe, on_event=listener("bar"))
    show(f"\nwritten to {sink.where}\n\n$ mso-hub verify {after} --source {before}\n")
    with closing(open_source(after, client=client)) as mine, closing(open_source(before, client=client)) as theirs:
        show(_checked(verify_checkpoint(mine, source=theirs)) + "\n")


def _checked(report: Report) -> str:
    if not report.ok:
        raise VerifyError(f"{report.where}: {len(report.problems)} problems, the first: {report.problems[0]}")
    return report_text(report)
