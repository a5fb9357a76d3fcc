"""`verify --consumer kt`: the real kt-kernel loads what we write, and its answers are those of the decoded weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mso_hub.errors import VerifyError
from mso_hub.plan import Recipe
from mso_hub.plan.kt import KtRecipe
from mso_hub.source import MemorySource
from mso_hub.verify import kt_consumer, verify_checkpoint
from mso_hub.verify.kt_consumer import check_consumer, missing_flags, run_in_kt
from mso_hub.verify.opened import opening
from tests.helpers import tiny_llama, write_files
from tests.kt.helpers import Experts, converted, moe_files, require_kt

EXPERTS = Experts(inner=512, hidden=256, count=6)
RECIPES: dict[str, tuple[Callable[[], Recipe], str]] = {
    "kt-int8": (KtRecipe, "AMXINT8"),
    "kt-int8-two-nodes": (lambda: KtRecipe(threadpool_count=2), "AMXINT8"),
    "kt-int4-two-nodes": (lambda: KtRecipe(scheme="kt-int4", threadpool_count=2), "AMXINT4"),
    "kt-int4-tree": (lambda: KtRecipe(scheme="kt-int4", merge=False), "AMXINT4"),
    "int4-groups-of-32": (lambda: Recipe(scheme="w4a16", group_size=32), "RAWINT4"),
    "nvfp4-modelopt": (lambda: Recipe(scheme="nvfp4", layout="modelopt"), "NVFP4"),
    "fp8-deepseek": (lambda: Recipe(scheme="fp8_block", layout="deepseek"), "FP8"),
    "fp8-compressed-tensors": (lambda: Recipe(scheme="fp8_block"), "FP8"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_its_answers_are_those_of_the_decoded_weights(name: str) -> None:
    """Of every format that it reads; the limits are what its own rounding costs."""
    python = require_kt()
    make, method = RECIPES[name]
    files = converted(moe_files(EXPERTS), make())[1]
    with opening(MemorySource(files)) as mine:
        answers = list(run_in_kt(mine, Path(python)))
    assert [(answer.layer, answer.experts, answer.method) for answer in answers] == [(0, (0, 1, 3, 4), method)]
    assert all(0 < answer.error < kt_consumer.LIMITS[method] for answer in answers)


def test_the_report_has_its_answers(tmp_path: Path) -> None:
    """BF16 too; and where an error is larger than its rounding explains, that is a problem."""
    require_kt()
    where = write_files(tmp_path / "in", moe_files(replace(EXPERTS, layers=3)))
    report = verify_checkpoint(where)
    found = check_consumer(report, where, "kt")
    assert found.problems == report.problems
    notes = [note for note in found.notes if "kt-kernel (BF16" in note]
    assert ["layer 0" in notes[0], "layer 2" in notes[1]] == [True, True]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kt_consumer.LIMITS, "BF16", 1e-6)
        assert len(check_consumer(report, where, "kt").problems) == len(report.problems) + 2


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    """A Python without kt-kernel: its last words are in the message."""
    if missing_flags():
        pytest.skip("no processor for kt-kernel here")
    where = write_files(tmp_path / "in", moe_files(Experts()))
    with pytest.raises(VerifyError, match="No module named 'kt_kernel'"):
        check_consumer(verify_checkpoint(where), where, "kt", sys.executable)


def test_without_a_python_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if missing_flags():
        pytest.skip("no processor for kt-kernel here")
    monkeypatch.delenv(kt_consumer.VARIABLE, raising=False)
    where = write_files(tmp_path / "in", moe_files(Experts()))
    with pytest.raises(VerifyError, match="MSO_KT_PYTHON is not set; docs"):
        check_consumer(verify_checkpoint(where), where, "kt")


def test_another_processor_is_a_note(tmp_path: Path) -> None:
    """Flags are read as Linux lists them; without the two that kernels need nothing runs."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags : fpu avx2 avx512f\nflags : fpu avx2 avx512f\n")
    assert missing_flags(cpuinfo) == ["avx512bw"]
    assert missing_flags(tmp_path / "none") == ["avx512f", "avx512bw"]
    cpuinfo.write_text("flags : avx512f avx512bw\n")
    assert missing_flags(cpuinfo) == []


@pytest.mark.parametrize(
    "recipe", [Recipe(scheme="mxfp4"), Recipe(scheme="w4a16"), Recipe(scheme="nvfp4")], ids=lambda recipe: recipe.label
)
def test_formats_that_it_does_not_read_are_refused(recipe: Recipe) -> None:
    """Groups of 128, and NVFP4 in names that it does not know."""
    files = converted(moe_files(EXPERTS), recipe)[1]
    with opening(MemorySource(files)) as mine, pytest.raises(VerifyError, match="kt-kernel does not read"):
        next(run_in_kt(mine, Path("unused")))


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    with opening(tiny_llama(tmp_path / "llama")) as mine, pytest.raises(VerifyError, match="holds no routed experts"):
        next(run_in_kt(mine, Path("unused")))
