"""Activation scales of a calibrated checkpoint, read for another one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from mso_hub.cli.options import read_input_scale
from mso_hub.errors import CheckpointError, PlanError, RecipeError
from mso_hub.formats.scales import read_input_scales
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from mso_hub.source import LocalSource, MemorySource, read_checkpoint
from tests.helpers import in_shards, random_tensor, tensors_of, tiny_llama, write_checkpoint

UP, GATE, DOWN = (f"model.layers.0.mlp.{leaf}" for leaf in ("up_proj", "gate_proj", "down_proj"))


def scales_in(tensors: dict[str, Tensor]) -> dict[str, float]:
    """read_input_scales over one shard in memory."""
    source = MemorySource({"model.safetensors": save(tensors)})
    infos = [info for shard in read_checkpoint(source).shards.values() for info in shard.tensors]
    return read_input_scales(infos, source.read)


@given(
    values=st.dictionaries(
        st.sampled_from([UP, GATE, DOWN]), st.floats(2.0**-100, 2.0**100, width=32), min_size=1, max_size=3
    ),
    divisor=st.booleans(),
    scalar=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_both_layouts_give_multipliers(values: dict[str, float], divisor: bool, scalar: bool) -> None:
    """ModelOpt stores the multiplier, compressed-tensors its reciprocal; [] and [1] are one number each."""
    suffix = "input_global_scale" if divisor else "input_scale"
    tensors = {f"{module}.{suffix}": torch.tensor(value if scalar else [value]) for module, value in values.items()}
    tensors |= {f"{UP}.weight_scale_2": torch.tensor(9.0), f"{UP}.weight": random_tensor(4, 4)}
    expected = {module: 1 / value if divisor else value for module, value in values.items()}
    assert scales_in(tensors) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("suffix", ["input_scale", "input_global_scale"])
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.tensor(0.0), "finite and > 0, got 0.0"),
        (torch.tensor(-1.0), "finite and > 0, got -1.0"),
        (torch.tensor(float("nan")), "finite and > 0, got nan"),
        (torch.tensor(float("inf")), "finite and > 0, got inf"),
        (torch.ones(2), r"needs one F32 number, got F32 \[2\]"),
        (torch.ones((), dtype=torch.bfloat16), r"needs one F32 number, got BF16 \[\]"),
        (torch.ones((), dtype=torch.float64), r"needs one F32 number, got F64 \[\]"),
    ],
)
def test_a_scale_that_is_none_is_named(suffix: str, tensor: Tensor, message: str) -> None:
    """A zero or NaN would turn every activation into garbage."""
    with pytest.raises(CheckpointError, match=rf"up_proj\.{suffix}: .*{message}"):
        scales_in({f"{UP}.{suffix}": tensor})


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("first", ["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("second", ["compressed-tensors", "modelopt"])
def test_a_calibrated_checkpoint_lends_its_scales(first: str, second: str, count: int, tmp_path: Path) -> None:
    """From a folder of either layout and any number of shards into either layout, shared within each unit."""
    source = tiny_llama(tmp_path / "in", layers=1)
    modules = [n.removesuffix(".weight") for n in tensors_of(source) if "_proj" in n]
    scales = {module: 0.01 * (at + 1) for at, module in enumerate(modules)}
    convert(source, tmp_path / "calibrated", Recipe(mode="all-linear", layout=first, input_scales=scales))
    lender = tmp_path / "lender"
    write_checkpoint(lender, in_shards(tensors_of(tmp_path / "calibrated"), count))
    number, imported = read_input_scale(str(lender))
    assert number is None
    assert set(imported) == set(modules)
    convert(source, tmp_path / "out", Recipe(mode="all-linear", layout=second, input_scales=imported))
    before, after = tensors_of(tmp_path / "calibrated"), tensors_of(tmp_path / "out")
    for module in modules:
        old = before[f"{module}.{'input_scale' if first == 'modelopt' else 'input_global_scale'}"].reshape(())
        new = after[f"{module}.{'input_scale' if second == 'modelopt' else 'input_global_scale'}"].reshape(())
        expected = old if first == second else 1 / old
        np.testing.assert_allclose(new, expected, rtol=2**-23)
    attention = [f"model.layers.0.self_attn.{leaf}.input_scale" for leaf in ("q_proj", "k_proj", "v_proj")]
    if second == "modelopt":
        assert len({after[name].item() for name in attention}) == 1
        assert after[attention[0]].item() == pytest.approx(max(scales[n.rpartition(".")[0]] for n in attention))


def test_scales_come_from_a_single_file_too(tmp_path: Path) -> None:
    """A file of nothing but scales, as a calibration tool may write it."""
    path = tmp_path / "scales.safetensors"
    path.write_bytes(save({f"{UP}.input_scale": torch.tensor(0.5), f"{DOWN}.input_scale": torch.tensor(2.0)}))
    assert read_input_scale(str(path)) == (None, {UP: 0.5, DOWN: 2.0})


@pytest.mark.parametrize(("text", "expected"), [(None, None), ("1.0", 1.0), ("2e-3", 0.002)])
def test_a_number_is_one_scale_for_all(text: str | None, expected: float | None) -> None:
    """The option takes a number or a place."""
    assert read_input_scale(text) == (expected, {})


def test_a_place_without_scales_is_refused(tmp_path: Path) -> None:
    """A dense checkpoint, an empty folder and a typing error are the same mistake."""
    dense = tiny_llama(tmp_path / "dense", layers=1, shards=1)
    (tmp_path / "empty").mkdir()
    for place in (dense, tmp_path / "empty", tmp_path / "nothing"):
        with pytest.raises(RecipeError, match="a checkpoint with input scales, found none there"):
            read_input_scale(str(place))


def test_a_module_without_an_imported_scale_is_a_problem(tmp_path: Path) -> None:
    """Half a calibration is no calibration; a partner's scale is not enough either."""
    source = tiny_llama(tmp_path / "in", layers=1, shards=1)
    with pytest.raises(PlanError, match=r"gate_proj: has no input_scale among the imported ones, nor have 1 others"):
        convert(source, tmp_path / "out", Recipe(input_scales={UP: 1.0}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e-50, 1e-40, 1e40])
@pytest.mark.parametrize("imported", [False, True])
def test_a_scale_that_float32_cannot_hold_both_ways_is_refused(scale: float, imported: bool) -> None:
    """Both layouts must be able to store it: the number and its reciprocal."""
    with pytest.raises(RecipeError, match=r"input_scale must be a finite number > 0, 1\.2e-38 to 8\.5e37, got"):
        Recipe(input_scale=None if imported else scale, input_scales={UP: scale} if imported else {})


def test_reading_touches_only_the_scales(tmp_path: Path) -> None:
    """Headers and four bytes for each scale: a calibrated terabyte is no obstacle."""
    tensors = {f"{UP}.input_scale": torch.tensor(0.5), f"{UP}.weight": random_tensor(512, 512)}
    write_checkpoint(tmp_path, {"model.safetensors": tensors})
    source = LocalSource(tmp_path)
    infos = [info for shard in read_checkpoint(source).shards.values() for info in shard.tensors]
    asked: list[int] = []

    def read(file: str, begin: int, end: int) -> np.ndarray:
        asked.append(end - begin)
        return source.read(file, begin, end)

    assert read_input_scales(infos, read) == {UP: 0.5}
    assert asked == [4]
