"""Limits of what passes: rounding never fails, whatever the weights, and what is not rounding does."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mso_hub.formats import FORMATS
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from mso_hub.sink import MemorySink
from mso_hub.source import MemorySource
from mso_hub.verify import Report, verify_checkpoint
from mso_hub.verify.opened import open_weights
from mso_hub.verify.run import STRAYS, plausible
from tests.formats.decoders.layouts import CASES as LAYOUTS
from tests.formats.decoders.layouts import case
from tests.formats.test_every_format import CASES, Case, models, planned
from tests.helpers import checkpoint_files, tensors_in

Files = Mapping[str, bytes]
UP = "model.layers.0.mlp.up_proj"


def one_weight(values: Tensor) -> dict[str, bytes]:
    """A model of one matrix."""
    return checkpoint_files({"model.safetensors": {f"{UP}.weight": values}}, {"model_type": "llama"})


def written(source: Files, recipe: Recipe) -> dict[str, bytes]:
    """An output whose manifest lists no files."""
    sink = MemorySink()
    convert(MemorySource(source), sink, recipe)
    manifest = json.loads(sink.files["mso_hub.json"]) | {"files": {}}
    return {**sink.files, "mso_hub.json": json.dumps(manifest).encode()}


def checked(files: Files, source: Files) -> Report:
    """Files in memory against files in memory."""
    return verify_checkpoint(MemorySource(files), source=MemorySource(source))


@pytest.mark.parametrize("made", CASES, ids=str)
@given(data=st.data())
@settings(deadline=None, max_examples=5)
def test_rounding_leaves_no_strays(made: Case, data: st.DataObject) -> None:
    """Of normal numbers, heavy tails, outliers, zeros and numbers on a grid, in every dtype."""
    files = data.draw(models(made))
    report = checked(planned(files, made.recipe)[1], files)
    assert report.problems == ()
    assert all(error.strays == 0 for error in report.errors)


@pytest.mark.parametrize("name", LAYOUTS)
def test_strays_are_counted_in_every_layout(name: str) -> None:
    """None against what the codes stand for; most of them when the second lowest bit of each code is another.

    The libraries' configs are no problem either. Codes of 3 bits straddle words and are not counted.
    """
    made = case(name)
    config = {"model_type": "x"} | ({"quantization_config": dict(made.config)} if made.config else {})
    files = checkpoint_files({"model.safetensors": made.tensors}, config)
    source = checkpoint_files({"model.safetensors": {made.weight: made.oracle(torch.float32)}}, {"model_type": "x"})
    report = checked(files, source)
    unrelated = ("hf_quant_config.json: missing", "input scales are announced and missing")
    assert [p for p in report.problems if not p.startswith(unrelated)] == []
    if name == "GPTQ 3":
        assert [error.strays for error in report.errors] == [None]
        return
    assert [error.strays for error in report.errors] == [0]
    weight = open_weights(MemorySource(files)).weights[made.weight]
    assert weight.decoder is not None
    codes = made.tensors[weight.home.name]
    bits = 2 if weight.decoder.bits == 2 else weight.decoder.bits if codes.dtype == torch.int32 else (
        4 if weight.decoder.scheme in ("mxfp4", "nvfp4") or name == "ModelOpt INT4" else 8)  # fmt: skip
    mask = sum(2 << at for at in range(0, 8, bits))
    changed = (codes.contiguous().view(torch.uint8) ^ mask).view(codes.dtype).reshape(codes.shape)
    report = checked(
        checkpoint_files({"model.safetensors": {**made.tensors, weight.home.name: changed}}, config), source
    )
    numbers = sum(np.prod(w.shape) for w in open_weights(MemorySource(source)).weights.values())
    (error,) = report.errors
    assert error.strays is not None
    assert error.strays > 0.4 * numbers


def tailed(kind: str, columns: int) -> Tensor:
    """Weights on which integers do badly."""
    rng = np.random.default_rng(columns)
    values = rng.standard_normal((24, columns))
    if kind == "t":
        values = rng.standard_t(3, (24, columns))
    elif kind.startswith("column"):
        values[:, 5] = float(kind.removeprefix("column "))
    elif kind.startswith("half a step"):
        values[:] = float(kind.removeprefix("half a step "))
        values[:, 5] = 1
    return torch.from_numpy(values).bfloat16()


TAILS = ("normal", "t", "column 30", "column 60", "column 300", "half a step 0.066", "half a step 0.0039")
ROWS = {
    "w4a16": Recipe(scheme="w4a16", group_size=0),
    "w4a16 absmax": Recipe(scheme="w4a16", group_size=0, scale_search="absmax"),
    "w4a16 asymmetric": Recipe(scheme="w4a16", group_size=0, symmetric=False, scale_search="absmax"),
    "w4a16 in groups": Recipe(scheme="w4a16", group_size=128, scale_search="absmax"),
    "w8a16": Recipe(scheme="w8a16", group_size=0),
    "int8": Recipe(scheme="int8"),
    **{name: Recipe(scheme=name) for name in FORMATS if not name.startswith(("w", "int"))},
}


@pytest.mark.parametrize("columns", [128, 4096, 14336])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", ROWS)
def test_heavy_tails_pass(kind: str, tail: str, columns: int) -> None:
    """Student's t, a column of outliers, and the worst there is: all numbers but one are half a step."""
    source = one_weight(tailed(tail, columns))
    report = checked(written(source, ROWS[kind]), source)
    assert report.problems == ()


SPREADS = {
    torch.float16: (1e-5, 1e-4, 1e-3, 100.0),
    torch.bfloat16: (1e-30, 1e-20, 1e-5, 1e30),
    torch.float32: (1e-30, 1e-20, 1e-5, 1e30),
}
NUMBERS = [(dtype, spread) for dtype, spreads in SPREADS.items() for spread in spreads]


@pytest.mark.parametrize(("dtype", "spread"), NUMBERS, ids=str)
@pytest.mark.parametrize("kind", ROWS)
def test_tiny_and_huge_numbers_pass(kind: str, spread: float, dtype: torch.dtype) -> None:
    """Where scales, codes and the numbers of a dtype themselves come to their ends."""
    source = one_weight((tailed("t", 128).double() * spread).to(dtype))
    assert checked(written(source, ROWS[kind]), source).problems == ()


def test_some_of_them_are_far_from_normal() -> None:
    """So that the test above means something: a limit of 0.1 for INT4 and 0.01 for INT8 would refuse these."""
    far = {"w4a16 absmax": ("column 30", 0.6), "int8": ("column 300", 0.015)}
    for kind, (tail, least) in far.items():
        source = one_weight(tailed(tail, 4096))
        (error,) = checked(written(source, ROWS[kind]), source).errors
        assert error.nmse > least


@pytest.mark.parametrize("columns", [128, 14336])
@pytest.mark.parametrize("kind", ROWS)
def test_zeros_and_codes_of_other_numbers_never_pass(kind: str, columns: int) -> None:
    """Without a manifest too, where only the size of the error and the share of strays count."""
    source = one_weight(tailed("normal", columns))
    files = {name: data for name, data in written(source, ROWS[kind]).items() if name != "mso_hub.json"}
    assert checked(files, source).problems == ()
    limit = plausible(open_weights(MemorySource(files)).weights[f"{UP}.weight"])
    assert limit < 0.99
    other = one_weight(tailed("normal", columns).roll(1, 1))
    zeros = one_weight(torch.zeros(24, columns, dtype=torch.bfloat16))
    assert (
        "relative squared error 2" in checked(files, other).problems[0]
        or "relative squared error 1.9" in (checked(files, other).problems[0])
    )
    assert "relative squared error" in checked(written(zeros, ROWS[kind]), source).problems[0]


@pytest.mark.parametrize("kind", ["w4a16 in groups", "int8"])
def test_codes_that_another_tool_chose_may_stray(kind: str) -> None:
    """GPTQ moves some codes to their neighbours: fine without our manifest up to a half, a fault with it."""
    source = one_weight(tailed("normal", 256))
    files = written(source, ROWS[kind])
    tensors = tensors_in(files)
    name = next(name for name in tensors if name.endswith((".weight", ".weight_packed")))
    codes = tensors[name].view(torch.uint8)
    for share, passes in ((STRAYS / 2, True), (STRAYS * 1.5, False)):
        moved = torch.rand(codes.shape, generator=torch.Generator().manual_seed(0)) < share
        mask = torch.where(moved, 0x11 if "groups" in kind else 0x01, 0).to(torch.uint8)
        changed = {**tensors, name: (codes ^ mask).view(tensors[name].dtype)}
        damaged = {**files, **checkpoint_files({"model.safetensors": changed})}
        foreign = {n: data for n, data in damaged.items() if n != "mso_hub.json"}
        assert (checked(foreign, source).problems == ()) == passes
        (problem,) = checked(damaged, source).problems
        assert "numbers do not have the code nearest to the source's" in problem
