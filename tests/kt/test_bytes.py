"""Byte for byte what the real kt-kernel writes: its own classes quantize the same experts in a process of theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mso_hub.plan.kt import KtRecipe
from tests.helpers import tensors_in
from tests.kt.helpers import METHODS, TRAINED, Experts, converted, moe_files, of_kt_kernel

both = pytest.mark.parametrize("scheme", METHODS)

SHAPES = [
    (Experts(inner=256, hidden=128), 1),
    (Experts(inner=384, hidden=640, count=3), 1),
    (Experts(inner=512, hidden=384), 2),
    (Experts(inner=128, hidden=7424, count=1), 1),  # columns of gate and up beyond 2 * 3584
    (Experts(inner=7424, hidden=128, count=1), 1),  # those of down
    (Experts(inner=7424, hidden=256, count=1), 2),  # 3712 columns for each node
    (Experts(inner=256, hidden=3584, count=1), 2),
]


@both
@pytest.mark.parametrize(("experts", "parts"), SHAPES, ids=lambda value: str(value).removeprefix("Experts"))
def test_a_tree_is_the_tree_of_kt_kernel(scheme: str, experts: Experts, parts: int, tmp_path: Path) -> None:
    """The same files with the same content, and the same bytes merged."""
    matrices = experts.matrices(extreme=True)
    theirs = of_kt_kernel(tmp_path, matrices, METHODS[scheme], parts)
    files = moe_files(experts, matrices)
    tree = converted(files, KtRecipe(scheme=scheme, threadpool_count=parts, merge=False))[1]
    assert {name: data for name, data in tree.items() if name.endswith(".kt")} == theirs
    merged = tensors_in(converted(files, KtRecipe(scheme=scheme, threadpool_count=parts, experts_only=True))[1])
    assert len(merged) == len(theirs)
    assert sorted(t.numpy().tobytes() for t in merged.values()) == sorted(theirs.values())


@both
def test_a_trained_model(scheme: str, tmp_path: Path) -> None:
    """Real weights, cut for as many NUMA nodes as they can be."""
    parts = 2 if scheme == "kt-int8" else 1
    stored = load_file(next(TRAINED.glob("*.safetensors")))
    for path in TRAINED.glob("*.safetensors"):
        stored |= load_file(path)
    matrices = {
        (0, e, p): stored[f"model.layers.2.mlp.experts.{e}.{p}_proj.weight"] for e in range(8)
        for p in ("gate", "up", "down")
    }  # fmt: skip
    theirs = of_kt_kernel(tmp_path, matrices, METHODS[scheme], parts)
    files = moe_files(Experts(inner=128, hidden=256, count=8), matrices)
    tree = converted(files, KtRecipe(scheme=scheme, threadpool_count=parts, merge=False))[1]
    assert {name: data for name, data in tree.items() if name.endswith(".kt")} == theirs


@both
def test_halves_and_singles_are_rounded_to_bf16_first(scheme: str, tmp_path: Path) -> None:
    """As kt-kernel's converter does with FP16; F32 is treated alike."""
    matrices = Experts().matrices(dtype=torch.float32)
    theirs = of_kt_kernel(tmp_path, {k: w.half() for k, w in matrices.items()}, METHODS[scheme], 1)
    halves = {key: w.half() for key, w in matrices.items()}
    for given in (halves, {key: w.float() for key, w in halves.items()}):
        tree = converted(moe_files(Experts(), given), KtRecipe(scheme=scheme, merge=False))[1]
        assert {name: data for name, data in tree.items() if name.endswith(".kt")} == theirs
