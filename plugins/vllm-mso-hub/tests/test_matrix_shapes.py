"""Every format of the table of formats loads in vLLM, at every tensor-parallel size, on four architectures.

All variants x Llama, Qwen3-MoE, Mixtral and DeepSeek-V3, wide enough for eight ranks, at tensor parallelism 1, 2, 4
and 8; of the three with experts, one for each format, layout and width of activations also under expert parallelism 2
and 8; all variants of the small trained model on one rank. From headers: this project's own planner says what would be
written, vLLM's own code says whether it loads.

With MSO_VLLM_SOURCES set to the folder of another version's Python files, one for each format, layout and width
of activations x architecture is also proved with that version.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from matrix import MODELS, proofs, sentences, worlds
from models import ARCHITECTURES, planned
from mso_hub.errors import PlanError
from mso_hub.formats import FORMATS
from variants import REFUSED_BY_PLAN, UNASKABLE, VARIANTS, Variant, first_of_each_family, refusal
from vllm_mso_hub.job import Job, Report

SOURCES = os.environ.get("MSO_VLLM_SOURCES", "")
"""A folder that holds another version's `vllm` package; its compiled parts are not needed."""

PAIRS = [pytest.param(model, variant, id=f"{model}-{variant.name}") for model in MODELS for variant in VARIANTS]
Folders = Callable[[str], Path]


@pytest.mark.parametrize(("model", "variant"), PAIRS)
def test_what_the_planner_plans_loads_at_every_size(
    model: str, variant: Variant, wide: Folders, tmp_path: Path
) -> None:
    reason = refusal(model, variant)
    if reason is not None:
        with pytest.raises(PlanError, match=reason):
            planned(wide(model), variant.recipe, tmp_path / "out")
        return
    folder = planned(wide(model), variant.recipe, tmp_path / "out")
    reports = proofs(model, variant, folder)
    assert sentences(reports) == []
    proved = [world for report in reports for world in report.worlds]
    assert [(world.tp, world.ep) for world in proved] == [
        (tp, ep) for sizes, ep in worlds(model, variant) for tp in sizes
    ]
    assert all(len(world.rank_bytes) == world.tp and min(world.rank_bytes) > 0 for world in proved)


@pytest.mark.parametrize("name", sorted({name for name, (_, why) in REFUSED_BY_PLAN.items() if "no engine" in why}))
def test_what_the_planner_refuses_does_not_load(name: str, wide: Folders, tmp_path: Path) -> None:
    variant = next(variant for variant in VARIANTS if variant.name == name)
    recipe = replace(variant.recipe, unloadable=True)
    assert sentences(proofs("qwen3_moe", variant, planned(wide("qwen3_moe"), recipe, tmp_path / "out"))) != []


def test_the_matrix_holds_every_format_in_every_layout() -> None:
    wanted = {(name, layout) for name, entry in FORMATS.items() for layout in entry.choices.loaders}
    assert wanted <= {(variant.recipe.scheme, variant.recipe.layout) for variant in VARIANTS}


def test_what_no_recipe_can_ask_for_has_a_way_out() -> None:
    assert {name for name in UNASKABLE if name.split()[1] != "modelopt"} == set()
    ways_out = ("use the layout compressed-tensors", "add --input_scale, or take fp8_dynamic")
    assert [text for text in UNASKABLE.values() if not any(way in text for way in ways_out)] == []


PROGRAM = """
import json, sys
from vllm_mso_hub.job import Job
from vllm_mso_hub.shapes import prove

jobs, reports = sys.argv[1:]
made = {}
for name, job in json.load(open(jobs)).items():
    made[name] = prove(Job.from_dict(job)).as_dict()
    json.dump(made, open(reports, "w"))
"""


@pytest.mark.skipif(not SOURCES, reason="MSO_VLLM_SOURCES names no folder with another version of vLLM")
def test_another_version_of_vllm_loads_every_format_and_layout(wide: Folders, tmp_path: Path) -> None:
    jobs = {}
    for model in ARCHITECTURES:
        for variant in first_of_each_family(model):
            name = f"{model} {variant.name}"
            folder = planned(wide(model), variant.recipe, tmp_path / name.replace(" ", "-"))
            jobs[name] = Job.of_folder(folder, tp=(1, 2, 8)).as_dict()
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    path = os.pathsep.join([SOURCES, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "jobs.json", tmp_path / "reports.json"],
        env={**os.environ, "PYTHONPATH": path, "VLLM_TARGET_DEVICE": "cpu"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    reports = {
        name: Report.from_dict(found) for name, found in json.loads((tmp_path / "reports.json").read_text()).items()
    }
    assert reports.keys() == jobs.keys()
    assert {name: wrong for name, report in reports.items() if (wrong := sentences([report]))} == {}
    import vllm

    assert {report.vllm for report in reports.values()} != {vllm.__version__}, "the folder holds the installed version"
