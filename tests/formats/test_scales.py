"""Activation scales of a calibrated checkpoint, read for another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from mso_hub.cli.options import read_input_scale
from mso_hub.errors import CheckpointError, PlanError, RecipeError
from mso_hub.formats import IMPORTED
from mso_hub.formats.scales import read_input_amax, read_input_scales, read_kv_scales
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
        (torch.ones(2), r"needs one floating-point number, got F32 \[2\]"),
        (torch.ones(0, dtype=torch.bfloat16), r"needs one floating-point number, got BF16 \[0\]"),
        (torch.ones((), dtype=torch.float64), r"needs one floating-point number, got F64 \[\]"),
        (torch.ones((), dtype=torch.int32), r"needs one floating-point number, got I32 \[\]"),
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
    amax = {module: 20.0 * (at + 1) for at, module in enumerate(modules)}
    settings: dict[str, Any] = {"mode": "all-linear", "input_scale": IMPORTED}
    convert(source, tmp_path / "calibrated", Recipe(layout=first, input_amax=amax, **settings))
    lender = tmp_path / "lender"
    write_checkpoint(lender, in_shards(tensors_of(tmp_path / "calibrated"), count))
    word, imported = read_input_scale(str(lender))
    assert word == IMPORTED
    assert set(imported) == set(modules)
    convert(source, tmp_path / "out", Recipe(layout=second, input_amax=imported, **settings))
    before, after = tensors_of(tmp_path / "calibrated"), tensors_of(tmp_path / "out")
    for module in modules:
        old = before[f"{module}.{'input_scale' if first == 'modelopt' else 'input_global_scale'}"].reshape(())
        new = after[f"{module}.{'input_scale' if second == 'modelopt' else 'input_global_scale'}"].reshape(())
        expected = old if first == second else 1 / old
        np.testing.assert_allclose(new, expected, rtol=2**-22)
    attention = [f"model.layers.0.self_attn.{leaf}.input_scale" for leaf in ("q_proj", "k_proj", "v_proj")]
    if second == "modelopt":
        assert len({after[name].item() for name in attention}) == 1
        largest = max(amax[n.rpartition(".")[0]] for n in attention)
        assert after[attention[0]].item() == pytest.approx(largest / 2688)


def test_scales_come_from_a_single_file_too(tmp_path: Path) -> None:
    """A file of nothing but scales, as a calibration tool may write it."""
    path = tmp_path / "scales.safetensors"
    path.write_bytes(save({f"{UP}.input_scale": torch.tensor(0.5), f"{DOWN}.input_scale": torch.tensor(2.0)}))
    assert read_input_scale(str(path)) == (IMPORTED, {UP: 0.5 * 2688, DOWN: 2.0 * 2688})


@pytest.mark.parametrize(("text", "expected"), [(None, None), ("1.0", 1.0), ("2e-3", 0.002)])
def test_a_number_is_one_scale_for_all(text: str | None, expected: float | None) -> None:
    """The option takes a number or a place."""
    assert read_input_scale(text) == (expected, {})


def test_a_place_without_scales_is_refused(tmp_path: Path) -> None:
    """A dense checkpoint, an empty folder and a typing error are the same mistake."""
    dense = tiny_llama(tmp_path / "dense", layers=1, shards=1)
    (tmp_path / "empty").mkdir()
    for place in (dense, tmp_path / "empty", tmp_path / "nothing"):
        with pytest.raises(RecipeError, match="needs a number or a checkpoint with such scales, found none there"):
            read_input_scale(str(place))


def test_a_module_without_an_imported_scale_is_a_problem(tmp_path: Path) -> None:
    """Half a calibration is no calibration; a partner's scale is not enough either."""
    source = tiny_llama(tmp_path / "in", layers=1, shards=1)
    with pytest.raises(PlanError, match=r"gate_proj: has no input_scale among the imported ones, nor have 1 others"):
        convert(source, tmp_path / "out", Recipe(input_scale=IMPORTED, input_amax={UP: 1.0}))
    assert not (tmp_path / "out").exists()


TOO_SMALL_OR_LARGE = [0.0, -1.0, float("nan"), float("inf"), 1e-50, 1e-40, 1e40]


@pytest.mark.parametrize("scale", TOO_SMALL_OR_LARGE)
def test_a_scale_that_float32_cannot_hold_both_ways_is_refused(scale: float) -> None:
    """Both layouts must be able to store it: the number and its reciprocal."""
    with pytest.raises(RecipeError, match=r"input_scale must be a finite number > 0, 1\.2e-38 to 8\.5e37, got"):
        Recipe(input_scale=scale)


@pytest.mark.parametrize("amax", TOO_SMALL_OR_LARGE)
def test_an_imported_scale_that_float32_cannot_hold_is_refused(amax: float) -> None:
    """It may come from another program's file; one bad module stops the whole conversion."""
    with pytest.raises(RecipeError, match="activation scales must be finite and > 0, got"):
        Recipe(input_scale=IMPORTED, input_amax={DOWN: 1.0, UP: amax})


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"input_scale": IMPORTED}, "0 imported scales, some rule that takes them"),
        ({"input_amax": {UP: 1.0}}, "1 imported scales, no rule that takes them"),
        ({"input_amax": {UP: 1.0}, "input_scale": 1.0}, "1 imported scales, no rule that takes them"),
    ],
)
def test_imported_scales_and_the_word_for_them_belong_together(settings: dict[str, Any], found: str) -> None:
    """One without the other would serve uncalibrated activations in silence."""
    with pytest.raises(RecipeError, match=f'"imported" and --input_scale WHERE belong together, got {found}'):
        Recipe(**settings)


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(torch.float8_e4m3fn, 448.0), (torch.int8, 127.0), (torch.uint8, 2688.0), (None, 2688.0)],
)
def test_the_weight_beside_a_scale_tells_what_it_is_a_share_of(dtype: torch.dtype | None, largest: float) -> None:
    """The same number means another range beside FP8, INT8 and FP4 weights."""
    tensors = {f"{UP}.input_scale": torch.tensor([0.5])}
    tensors |= {f"{UP}.weight": torch.zeros(4, 8, dtype=dtype)} if dtype is not None else {}
    source = MemorySource({"model.safetensors": save(tensors)})
    infos = [info for shard in read_checkpoint(source).shards.values() for info in shard.tensors]
    assert read_input_amax(infos, source.read) == {UP: 0.5 * largest}


# --- KV cache -------------------------------------------------------------------------------------

ATTENTION = "model.layers.0.self_attn"


def kv_in(tensors: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """read_kv_scales over one shard in memory."""
    source = MemorySource({"model.safetensors": save(tensors)})
    infos = [info for shard in read_checkpoint(source).shards.values() for info in shard.tensors]
    return read_kv_scales(infos, source.read)


@pytest.mark.parametrize("parts", [("k_scale", "v_scale"), ("k_proj.k_scale", "v_proj.v_scale")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_both_layouts_name_the_same_cache_scales(
    parts: tuple[str, str], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """compressed-tensors has them below the attention, ModelOpt below its projections."""
    values = (0.5, 0.25)
    tensors = {
        f"{ATTENTION}.{part}": torch.full(shape, value, dtype=dtype) for part, value in zip(parts, values, strict=True)
    }
    assert kv_in(tensors | {f"{UP}.weight_scale": torch.ones(1)}) == {ATTENTION: values}


@pytest.mark.parametrize("leaf", ["k_scale", "v_scale"])
def test_one_cache_scale_alone_is_refused(leaf: str) -> None:
    """Engines take 1.0 for the other one: half a calibration."""
    with pytest.raises(CheckpointError, match=rf"self_attn: has {leaf} alone, k_scale and v_scale belong together"):
        kv_in({f"{ATTENTION}.{leaf}": torch.ones(1)})


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
