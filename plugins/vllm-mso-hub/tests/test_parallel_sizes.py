"""The tensor-parallel sizes that verify allows are those that vLLM's own loading allows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from models import Size, dense_headers, planned
from mso_hub import Recipe, verify_checkpoint
from vllm_mso_hub.job import Job
from vllm_mso_hub.shapes import prove

SIZES = (1, 2, 4, 8)
NARROW = Size(hidden=512, width=704, expert=352, heads=16, kv=4, head=32, experts=8, vocab=128, q_rank=128)
"""22 groups of 32 columns in an MLP, 11 in an expert; 4 heads for keys, 128 rows together."""
FORMATS: dict[str, Recipe] = {
    "nvfp4": Recipe(mode="all-linear"),
    "nvfp4 modelopt": Recipe(mode="all-linear", layout="modelopt"),
    "mxfp4": Recipe(scheme="mxfp4", mode="all-linear"),
    "mxfp8": Recipe(scheme="mxfp8", mode="all-linear"),
    "mxfp8 modelopt": Recipe(scheme="mxfp8", mode="all-linear", layout="modelopt"),
    "w4a16 g32": Recipe(scheme="w4a16", group_size=32, mode="all-linear"),
    "fp8_dynamic": Recipe(scheme="fp8_dynamic", mode="all-linear"),
    "int8": Recipe(scheme="int8", mode="all-linear"),
}
BLOCKS = Size(hidden=512, width=768, expert=768, heads=8, kv=8, head=64, experts=8, vocab=128, q_rank=128)
"""6 blocks of 128 in an MLP and in an expert, 4 in the attention."""
IN_BLOCKS: dict[str, Recipe] = {
    "w4a16 g128": Recipe(scheme="w4a16", group_size=128, mode="all-linear"),
    "fp8_block": Recipe(scheme="fp8_block", mode="all-linear"),
    "fp8_block deepseek": Recipe(scheme="fp8_block", mode="all-linear", layout="deepseek"),
    "fp8_block modelopt": Recipe(scheme="fp8_block", mode="all-linear", layout="modelopt"),
}


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Size], Path]:
    """Architecture and size -> headers of a model that many numbers of ranks do not fit."""
    root = tmp_path_factory.mktemp("headers")

    def folder(name: str, size: Size) -> Path:
        found = root / f"{name}-{size.width}"
        return found if found.exists() else dense_headers(name, found, size)

    return folder


CASES = [
    *((name, form, False) for name in ("llama", "qwen3_moe", "mixtral") for form in FORMATS | IN_BLOCKS),
    *(("qwen3_moe", form, True) for form in FORMATS | IN_BLOCKS),
]
CASES = [case for case in CASES if case[:2] == ("llama", "fp8_block modelopt") or case[1] != "fp8_block modelopt"]
"""(architecture, format, expert parallelism); vLLM loads no experts of the last format."""


@pytest.mark.parametrize(("architecture", "form", "ep"), CASES, ids=str)
def test_verify_and_the_shape_proof_agree(
    architecture: str, form: str, ep: bool, headers: Callable[[str, Size], Path], tmp_path: Path
) -> None:
    """For 1, 2, 4 and 8 ranks, with and without expert parallelism."""
    source = headers(architecture, NARROW if form in FORMATS else BLOCKS)
    out = planned(source, (FORMATS | IN_BLOCKS)[form], tmp_path / "out")
    report = prove(Job.of_folder(out, tp=SIZES, ep=ep))
    assert report.refused is None
    found = {world.tp: [problem.message for problem in world.problems] for world in report.worlds}
    problems = verify_checkpoint(out, tp=SIZES, ep=ep).problems
    refused = {tp: [p for p in problems if p.startswith(f"tensor-parallel size {tp}: ")] for tp in SIZES}
    assert {tp: bool(said) for tp, said in refused.items()} == {tp: bool(said) for tp, said in found.items()}, (
        found, refused
    )  # fmt: skip
