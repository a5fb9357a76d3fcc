"""The tables of kernels: whole, and what vLLM's own selection says, run in vLLM's Python."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mso_hub.formats import FORMATS
from mso_hub.serving.gpus import GPUS
from mso_hub.serving.kernels import DENSE, EXPERTS, NATIVE, REFUSED, WEIGHT_ONLY, Kernel, kernel_for

CAPABILITIES = sorted({gpu.capability for gpu in GPUS})
CAST = ("mxfp4a16", "mxfp8a16")
"""Formats with the kernels of another one: vLLM does not ask for the activations."""
SPECIAL = {
    "w4a16": ("w4a16 128", "w4a16 32", "w4a16 row"),
    "w8a16": ("w8a16 128", "w8a16 zero points"),
}
"""Format -> what was asked for it, where one answer is not enough."""
PYTHON = os.environ.get("MSO_VLLM_PYTHON", "")
SOURCES = os.environ.get("MSO_VLLM_SOURCES", "")


def choices(sources: str) -> dict[str, Any]:
    """Answers of `vllm_choices.py`, run with the vLLM of that Python or with the files in `sources`."""
    program = Path(__file__).with_name("vllm_choices.py")
    env = {**os.environ, "VLLM_TARGET_DEVICE": "cpu", "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": sources}
    argv = [PYTHON, str(program), *map(str, CAPABILITIES)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.fixture(scope="module", params=["installed", "sources"])
def vllm(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What vLLM chooses, of the installed version and of the one in MSO_VLLM_SOURCES."""
    if not PYTHON:
        pytest.skip("MSO_VLLM_PYTHON names no Python with vLLM")
    sources = {"installed": "", "sources": SOURCES}[request.param]
    if request.param == "sources" and not SOURCES:
        pytest.skip("MSO_VLLM_SOURCES names no folder with another vLLM")
    return choices(sources)


def rows() -> Iterator[tuple[str, str, Kernel]]:
    """Every row of both tables."""
    for part, table in (("linear", DENSE), ("experts", EXPERTS)):
        for form, kernels in table.items():
            yield from ((part, form, row) for row in kernels)


@pytest.mark.slow
def test_vllm_chooses_what_the_tables_say(vllm: dict[str, Any]) -> None:
    """Every row with a kernel, on every capability of the table of GPUs that it covers. Refusals come before it."""
    wrong, checked = [], 0
    for part, form, row in rows():
        if form in CAST or row.how == REFUSED:
            continue
        answers = vllm[part]
        asked = [name for name in SPECIAL.get(form, (form,)) if name in answers]
        assert asked, form
        for capability in (c for c in CAPABILITIES if row.first <= c <= row.last):
            found = [answers[name][str(capability)] for name in asked]
            checked += 1
            if not all(any(one.lower().startswith(f.lower()) for one in row.chosen) for f in found):
                wrong.append(f"{part} {form} sm{capability}: the table says {row.chosen}, vLLM {found}")
    assert not wrong
    assert checked > 100


def test_no_capability_of_a_gpu_falls_between_two_rows() -> None:
    """For every format from its first capability on."""
    for table in (DENSE, EXPERTS):
        for form, kernels in table.items():
            covered = {c for c in CAPABILITIES for row in kernels if row.first <= c <= row.last}
            assert covered == {c for c in CAPABILITIES if c >= kernels[0].first}, form


def test_every_format_that_can_be_written_has_rows() -> None:
    """In both tables: the engine writes each of them for linear layers and for experts."""
    assert set(FORMATS) <= set(DENSE)
    assert set(FORMATS) <= set(EXPERTS)


def test_every_row_has_a_source_and_a_kernel_or_a_way_out() -> None:
    for _, form, row in rows():
        assert row.source.endswith((".py", ".hpp")), form
        assert bool(row.chosen) == (row.how != REFUSED)
        assert row.how != REFUSED or "use " in row.name


@pytest.mark.parametrize(
    ("form", "capability", "how"),
    [
        ("nvfp4", 120, NATIVE), ("nvfp4", 90, WEIGHT_ONLY), ("nvfp4", 75, WEIGHT_ONLY), ("fp8", 89, NATIVE),
        ("fp8", 80, WEIGHT_ONLY), ("fp8_block", 89, WEIGHT_ONLY), ("int8", 75, NATIVE), ("int8", 100, REFUSED),
        ("mxfp4", 75, REFUSED), ("w4a8_fp8", 90, NATIVE), ("w4a8_fp8", 89, REFUSED), ("w4a16", 75, NATIVE),
    ],
)  # fmt: skip
def test_what_the_tables_say_in_short(form: str, capability: int, how: str) -> None:
    found = kernel_for(form, "compressed-tensors", capability, experts=False)
    assert found is not None
    assert found.how == how


def test_the_layout_can_need_more_than_the_kernel() -> None:
    """ModelOpt's FP8 config refuses sm75, where the same numbers run in the other layout."""
    there = kernel_for("fp8", "modelopt", 75, experts=False)
    assert there is not None
    assert (there.how, "8.0" in there.name) == (REFUSED, True)


def test_what_is_in_no_table_is_not_guessed() -> None:
    assert kernel_for("int3", "compressed-tensors", 90, experts=False) is None
    assert kernel_for("nvfp4", "compressed-tensors", 110, experts=False) is None
