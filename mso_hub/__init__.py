"""mso_hub: read a checkpoint tensor by tensor, change how its numbers are stored, write a checkpoint.

    rank  module      what enters -> what leaves
    9     cli         argv -> one call below
    9     notebook    a cell -> one call below, shown as HTML, widgets or text
    8     serving     headers + a GPU -> kernels, memory of a rank, the line that serves it
    8     demo        a small model -> there and back, every step shown
    7     legacy      the prototype's two entry points -> convert()
    7     display     plans and reports -> text
    7     pausable    work that Ctrl-C, or another thread, stops at its next event
    7     progress    events -> a bar or JSON lines
    7     recard      finished repo -> its model card
    7     sensitivity what formats do to a model's predictions -> an error table
    7     generation  a folder and its weights in BF16 -> tokens and likelihoods from vLLM, compared
    7     setup_vllm  a Python -> an environment of its own for vLLM
    6     pipeline    START HERE: convert() = source -> plan -> engine -> sink
    6     assess      errors of several formats -> a recipe that chooses among them
    6     verify      finished repo -> report
    6     smoke       headers or plan -> what vLLM would not load, asked of vLLM itself
    5     card        plan + measured errors -> README.md
    5     losses      measured errors, weight by weight -> JSON, Markdown
    5     calibrate   source + text -> what activations are like, one decoder layer in memory
    4     engine      shard plans -> finished pieces in order
    3     plan        headers + recipe -> exact output layout (no weight is read)
    2     source      folder or Hub -> headers, tensors
    2     formats     tensors -> tensors (the only arithmetic)
    2     sink        files -> folder or Hub, visible all at once
    1     hub         the one adapter to huggingface_hub and hf_xet
    1     checkpoint  TensorInfo, Checkpoint, safetensors header bytes
    0     events      what happened, for whoever listens
    0     errors      one exception tree

A module imports lower ranks and its own room only; the tests read this table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mso_hub.assess import Choice, choose_formats, measure_errors
    from mso_hub.calibrate.collect import collect_statistics
    from mso_hub.calibrate.evaluate import evaluate
    from mso_hub.calibrate.scales import with_statistics
    from mso_hub.calibrate.statistics import read_statistics
    from mso_hub.errors import MsoError
    from mso_hub.generation import GenerationReport, compare_generation
    from mso_hub.legacy import StreamingQuantizer, decompress_model_incremental
    from mso_hub.losses import ErrorTable
    from mso_hub.notebook import Job
    from mso_hub.pipeline import convert, make_plan
    from mso_hub.plan import Plan, Recipe
    from mso_hub.plan.kt import KtRecipe
    from mso_hub.plan.like import recipe_like
    from mso_hub.plan.recipe_file import read_recipe
    from mso_hub.sink import HubTarget, open_sink
    from mso_hub.smoke import ShapeReport, prove
    from mso_hub.source import open_source
    from mso_hub.verify import Report, compare_checkpoints, verify_checkpoint

__version__ = "0.1.0"

_HOME = {
    "Choice": "assess",
    "ErrorTable": "losses",
    "GenerationReport": "generation",
    "HubTarget": "sink",
    "Job": "notebook",
    "KtRecipe": "plan.kt",
    "MsoError": "errors",
    "Plan": "plan",
    "Recipe": "plan",
    "Report": "verify",
    "ShapeReport": "smoke",
    "StreamingQuantizer": "legacy",
    "choose_formats": "assess",
    "collect_statistics": "calibrate.collect",
    "compare_checkpoints": "verify",
    "compare_generation": "generation",
    "convert": "pipeline",
    "decompress_model_incremental": "legacy",
    "evaluate": "calibrate.evaluate",
    "make_plan": "pipeline",
    "measure_errors": "assess",
    "open_sink": "sink",
    "open_source": "source",
    "prove": "smoke",
    "read_recipe": "plan.recipe_file",
    "read_statistics": "calibrate.statistics",
    "recipe_like": "plan.like",
    "verify_checkpoint": "verify",
    "with_statistics": "calibrate.scales",
}

__all__ = [
    "Choice",
    "ErrorTable",
    "GenerationReport",
    "HubTarget",
    "Job",
    "KtRecipe",
    "MsoError",
    "Plan",
    "Recipe",
    "Report",
    "ShapeReport",
    "StreamingQuantizer",
    "__version__",
    "choose_formats",
    "collect_statistics",
    "compare_checkpoints",
    "compare_generation",
    "convert",
    "decompress_model_incremental",
    "evaluate",
    "make_plan",
    "measure_errors",
    "open_sink",
    "open_source",
    "prove",
    "read_recipe",
    "read_statistics",
    "recipe_like",
    "verify_checkpoint",
    "with_statistics",
]


def __getattr__(name: str) -> Any:
    """Public names, imported on first use: `mso-hub --help` should not wait for numpy."""
    if name not in _HOME:
        raise AttributeError(f"module 'mso_hub' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"mso_hub.{_HOME[name]}"), name)
