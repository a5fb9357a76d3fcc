"""compare_checkpoints: distances of shared weights and distributions of scales, whatever the formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mso_hub.errors import VerifyError
from mso_hub.formats.numerics.floats import E4M3
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from mso_hub.verify import compare_checkpoints
from tests.helpers import random_tensor, tensors_of, tiny_llama, tiny_moe, write_checkpoint

QUANTILES = (0, 0.05, 0.5, 0.95, 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense model and it in both layouts, in one of them with searched scales."""
    folder = tmp_path_factory.mktemp("compare")
    dense = tiny_llama(folder / "dense")
    recipes = {
        "compressed-tensors": Recipe(mode="all-linear"),
        "modelopt": Recipe(mode="all-linear", layout="modelopt"),
        "search": Recipe(mode="all-linear", scale_search="mse"),
    }
    for name, recipe in recipes.items():
        convert(dense, folder / name, recipe)
    return {"dense": dense, **{name: folder / name for name in recipes}}


def test_a_checkpoint_equals_itself(folders: dict[str, Path]) -> None:
    """Packed weights too: stored alike with equal bytes."""
    for name in ("dense", "compressed-tensors", "modelopt"):
        comparison = compare_checkpoints(folders[name], folders[name])
        assert comparison.common == comparison.identical == len(tensors_of(folders["dense"]))
        assert comparison.errors == ()
        assert comparison.only == ((), ())
        assert comparison.scales[0] == comparison.scales[1]


def test_two_layouts_hold_the_same_weights(folders: dict[str, Path]) -> None:
    """14 packed weights without a distance worth naming, the rest byte for byte, the same scales as multipliers."""
    comparison = compare_checkpoints(folders["compressed-tensors"], folders["modelopt"])
    assert (comparison.common, comparison.identical) == (21, 7)
    assert {error.stored for error in comparison.errors} == {"modelopt NVFP4"}
    assert all(error.nmse < 1e-13 for error in comparison.errors)
    first, second = comparison.scales
    assert first["block"] == second["block"]
    assert first["global"] == pytest.approx(second["global"], rel=1e-6)


def test_errors_are_relative_to_the_first_and_the_worst_comes_first(folders: dict[str, Path]) -> None:
    """Against the F32 numbers in float64."""
    comparison = compare_checkpoints(folders["dense"], folders["search"])
    assert [e.nmse for e in comparison.errors] == sorted((e.nmse for e in comparison.errors), reverse=True)
    assert len(comparison.errors) == 14
    assert comparison.scales[0] == {}
    reverse = compare_checkpoints(folders["search"], folders["dense"])
    worst, name = comparison.errors[0], comparison.errors[0].name
    difference = worst.nmse * tensors_of(folders["dense"])[name].double().square().sum().item()
    back = {error.name: error for error in reverse.errors}[name]
    assert back.max_abs == worst.max_abs
    assert back.stored == "BF16"
    assert difference / back.nmse == pytest.approx(energy_of(folders["search"], name), rel=1e-5)


def energy_of(folder: Path, name: str) -> float:
    """Sum of squares of a packed weight, from its tensors and the table of E2M1 values."""
    tensors, module = tensors_of(folder), name.removesuffix(".weight")
    codes = tensors[f"{module}.weight_packed"].numpy()
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6] * 2) ** 2
    squares = np.stack([table[codes & 15], table[codes >> 4]], -1).reshape(codes.shape[0], -1, 16).sum(-1)
    step = tensors[f"{module}.weight_scale"].double() / tensors[f"{module}.weight_global_scale"].double()
    return float((squares * step.square().numpy()).sum())


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt", "search"])
def test_quantiles_are_those_of_all_scales(layout: str, folders: dict[str, Path]) -> None:
    """Block scales counted one by one, global scales as multipliers."""
    tensors = tensors_of(folders[layout])
    scales = [t.view(torch.uint8).flatten().numpy() for n, t in tensors.items() if n.endswith("weight_scale")]
    blocks = E4M3[np.concatenate(scales)]
    shared = [t.item() for n, t in tensors.items() if n.endswith("weight_scale_2")]
    shared += [1 / t.item() for n, t in tensors.items() if n.endswith("weight_global_scale")]
    found = compare_checkpoints(folders[layout], folders[layout]).scales[0]
    assert found["block"] == tuple(np.quantile(blocks, QUANTILES, method="inverted_cdf"))
    assert found["global"] == pytest.approx(np.quantile(shared, QUANTILES))


def test_weights_of_only_one_side_are_listed(folders: dict[str, Path], tmp_path: Path) -> None:
    """Another architecture shares embeddings, attention and norms."""
    moe = tiny_moe(tmp_path / "moe")
    comparison = compare_checkpoints(folders["dense"], moe)
    assert "model.layers.0.mlp.up_proj.weight" in comparison.only[0]
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in comparison.only[1]
    names = set(tensors_of(folders["dense"]))
    assert comparison.common + len(comparison.only[0]) == len(names)


def test_nothing_in_common_is_an_error(folders: dict[str, Path], tmp_path: Path) -> None:
    """Two models that share no name cannot be compared."""
    other = write_checkpoint(tmp_path / "x", {"model.safetensors": {"a.weight": random_tensor(2, 2)}})
    with pytest.raises(VerifyError, match="share none of their 21 and 1 weights"):
        compare_checkpoints(folders["dense"], other)


@pytest.mark.parametrize("broken", [0.0, float("inf"), float("nan")])
def test_a_broken_global_scale_is_a_difference_and_no_crash(broken: float, tmp_path: Path) -> None:
    """The tool that one reaches for when something is wrong must survive it."""
    dense = tiny_llama(tmp_path / "dense", layers=1, shards=1)
    convert(dense, tmp_path / "out", Recipe())
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.down_proj"
    tensors[f"{name}.weight_global_scale"] = torch.tensor([broken])
    save_file(tensors, path, metadata={"format": "pt"})
    comparison = compare_checkpoints(dense, tmp_path / "out")
    assert comparison.errors[0].name == f"{name}.weight"
    assert all(np.isfinite(comparison.scales[1]["global"]))


def test_the_comparison_is_json(folders: dict[str, Path]) -> None:
    """Every field."""
    comparison = compare_checkpoints(folders["dense"], folders["modelopt"])
    content = json.loads(json.dumps(comparison.as_dict()))
    assert set(content) == {"names", "common", "only", "identical", "errors", "scales"}
    assert content["identical"] == 7
