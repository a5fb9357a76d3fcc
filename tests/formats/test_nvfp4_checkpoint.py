"""NVFP4 checkpoints as a whole: every byte against ModelOpt, every number against compressed-tensors and ModelOpt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load
from torch import Tensor

from mso_hub.engine import ThreadEngine
from mso_hub.errors import NonFiniteError
from mso_hub.formats import nvfp4 as checkpoint_format
from mso_hub.pipeline import convert, make_plan
from mso_hub.plan import Recipe
from mso_hub.sink import MemorySink
from mso_hub.source import MemorySource
from mso_hub.verify import verify_checkpoint
from tests.formats.numerics.strategies import to_bits
from tests.helpers import checkpoint_files, random_tensor, tensors_of, tiny_llama, tiny_moe, write_checkpoint

REAL = Path(__file__).parents[1] / "models" / "tiny-qwen3-moe"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 8}
CASES = [
    ("compressed-tensors", None),
    ("compressed-tensors", 1.0),
    ("modelopt", None),
    ("modelopt", 1.0),
]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
Tensors = Mapping[str, Tensor]
Expected = dict[str, tuple[Tensor, Tensor, Tensor]]
KIB, MIB = 1 << 10, 1 << 20
MODELOPTS: dict[str, Any] = {"mode": "all-linear", "scale_search": "absmax"}
"""Settings that give ModelOpt's bytes: by default scales are searched."""


def linear_modules(tensors: Tensors) -> list[str]:
    """Modules that `all-linear` means in these models, by their last name component."""
    return [n.removesuffix(".weight") for n in tensors if n.split(".")[-2] in LINEAR]


def unit_of(module: str) -> str:
    """What shares one scale with a module, written down a second time."""
    parent, _, leaf = module.rpartition(".")
    return next((f"{parent}.{leaves[0]}" for leaves in FUSED if leaf in leaves), module)


def modelopt_says(tensors: Tensors, modules: Iterable[str]) -> Expected:
    """Module -> codes, block scales and weight_scale_2 as ModelOpt computes them, weight_scale_2 over the unit.

    ModelOpt divides zero by zero for an all-zero unit; a scale of one is what such a unit gets instead.
    """
    modules = list(modules)
    amax: dict[str, Tensor] = {}
    for module in modules:
        own = NVFP4QTensor.get_weights_scaling_factor_2(tensors[f"{module}.weight"])
        amax[unit_of(module)] = torch.maximum(amax.get(unit_of(module), own), own)
    found = {}
    for module in modules:
        scale_2 = amax[unit_of(module)]
        scale_2 = torch.where(scale_2 == 0, torch.ones_like(scale_2), scale_2)
        packed, scale, _ = NVFP4QTensor.quantize(tensors[f"{module}.weight"], 16, weights_scaling_factor_2=scale_2)
        found[module] = (packed._quantized_data, scale, scale_2)
    return found


def assert_written(
    written: Tensors, source: Tensors, expected: Expected, layout: str, input_scale: float | None
) -> None:
    """Every tensor of an output: packed ones as ModelOpt has them, the others untouched, nothing else."""
    rest = dict(written)
    for module, (codes, scale, scale_2) in expected.items():
        if layout == "modelopt":
            packed = {"weight": codes, "weight_scale": scale, "weight_scale_2": scale_2}
            activation = {"input_scale": torch.tensor(input_scale or 0.0)}
        else:
            packed = {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": 1 / scale_2[None]}
            activation = {"input_global_scale": 1 / torch.tensor([input_scale or 1.0])}
        for suffix, tensor in (packed | (activation if input_scale else {})).items():
            same_bytes(rest.pop(f"{module}.{suffix}"), tensor, f"{module}.{suffix}")
    for name, tensor in source.items():
        if name.removesuffix(".weight") not in expected:
            same_bytes(rest.pop(name), tensor, name)
    assert not rest, "tensors that nobody asked for"


def same_bytes(got: Tensor, expected: Tensor, name: str) -> None:
    """Dtype, shape and bits."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), name
    np.testing.assert_array_equal(to_bits(got), to_bits(expected), name)


def convert_in_memory(
    shards: Mapping[str, Tensors], recipe: Recipe, engine: ThreadEngine | None = None
) -> dict[str, bytes]:
    """All files that a conversion writes."""
    sink = MemorySink()
    convert(MemorySource(checkpoint_files(shards, CONFIG)), sink, recipe, engine=engine)
    return sink.files


def tensors_in(files: Mapping[str, bytes]) -> dict[str, Tensor]:
    """Tensors of all shards among the files."""
    found: dict[str, Tensor] = {}
    for name, data in files.items():
        if name.endswith(".safetensors"):
            found |= load(data)
    return found


@pytest.fixture(scope="module")
def real_expected() -> Expected:
    """ModelOpt's bytes for every linear layer of the trained model."""
    tensors = tensors_of(REAL)
    return modelopt_says(tensors, linear_modules(tensors))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{'w4a4' if case[1] else 'w4a16'}")
def real_output(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, float | None]:
    """The trained model quantized in one layout and variant."""
    layout, input_scale = request.param
    folder = tmp_path_factory.mktemp("real") / "out"
    convert(REAL, folder, Recipe(layout=layout, input_scale=input_scale, **MODELOPTS))
    return folder, layout, input_scale


def test_the_trained_model_has_modelopts_bytes(
    real_output: tuple[Path, str, float | None], real_expected: Expected
) -> None:
    """Codes, block scales and shared global scales of 112 layers; embeddings, norms and routers untouched."""
    folder, layout, input_scale = real_output
    assert len(real_expected) == 112
    assert_written(tensors_of(folder), tensors_of(REAL), real_expected, layout, input_scale)


def test_our_decompression_equals_the_libraries(real_output: tuple[Path, str, float | None], tmp_path: Path) -> None:
    """The config that we write, parsed by compressed-tensors, decompresses to the bits that we write back."""
    folder, layout, _ = real_output
    convert(folder, tmp_path / "dense", Recipe(scheme="bf16"))
    packed, dense = tensors_of(folder), tensors_of(tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    modules = linear_modules(tensors_of(REAL))
    assert set(dense) == set(tensors_of(REAL))
    for module in modules:
        if layout == "modelopt":
            codes = packed[f"{module}.weight"]
            tensor = NVFP4QTensor(torch.Size([codes.shape[0], 2 * codes.shape[1]]), torch.bfloat16, codes)
            theirs = tensor.dequantize(
                torch.bfloat16,
                scale=packed[f"{module}.weight_scale"],
                double_scale=packed[f"{module}.weight_scale_2"],
                block_sizes={-1: 16},
            )
        else:
            theirs = decompressed_by_library(packed, module, config)
        same_bytes(dense[f"{module}.weight"], theirs, module)


def decompressed_by_library(tensors: Tensors, module: str, config: Mapping[str, Any]) -> Tensor:
    """compressed-tensors' weight from the tensors of a module, scheme and format from config.json."""
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    names = compressor.compression_param_names(scheme)
    return compressor.decompress({n: tensors[f"{module}.{n}"] for n in names}, scheme)["weight"]


def test_the_config_names_what_is_stored(real_output: tuple[Path, str, float | None]) -> None:
    """Both libraries' fields: format and scheme, activations only for W4A4, ignore without a packed module."""
    folder, layout, input_scale = real_output
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    assert bool(group.get("input_activations")) == (input_scale is not None)
    assert not set(config["ignore"]) & set(linear_modules(tensors_of(REAL)))
    assert {"lm_head", "model.layers.0.mlp.gate"} <= set(config["ignore"])
    if layout == "modelopt":
        algorithm = "NVFP4" if input_scale else "W4A16_NVFP4"
        beside = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
        assert config["quant_algo"] == beside["quant_algo"] == algorithm
        assert beside["exclude_modules"] == config["ignore"]
    else:
        parsed = QuantizationConfig.model_validate(config)
        assert parsed.format == "nvfp4-pack-quantized"
        assert not (folder / "hf_quant_config.json").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("layout", "input_scale"), [CASES[0], CASES[3]])
@pytest.mark.parametrize("model", [tiny_llama, tiny_moe])
def test_random_models_have_modelopts_bytes(
    model: Any, layout: str, input_scale: float | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Dense and expert models of each input dtype, on disk in two shards."""
    source = model(tmp_path / "in", dtype=dtype, seed=7)
    convert(source, tmp_path / "out", Recipe(layout=layout, input_scale=input_scale, **MODELOPTS))
    tensors = tensors_of(source)
    expected = modelopt_says(tensors, linear_modules(tensors))
    assert_written(tensors_of(tmp_path / "out"), tensors, expected, layout, input_scale)
    assert verify_checkpoint(tmp_path / "out", source=source).problems == ()


@st.composite
def layers(draw: st.DrawFn) -> dict[str, dict[str, Tensor]]:
    """Some projections of one layer: any dtype, shape and magnitude each, blocks of zeros, in any of three shards."""
    shards: dict[str, dict[str, Tensor]] = {}
    for leaf in draw(st.lists(st.sampled_from(LINEAR), min_size=1, max_size=5, unique=True)):
        part = "mlp" if leaf in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        weight = random_tensor(
            draw(st.integers(1, 40)), 16 * draw(st.integers(1, 5)), dtype=torch.float32, seed=draw(st.integers(0, 99))
        )  # fmt: skip
        weight *= 10.0 ** draw(st.integers(-3, 3))
        weight[:: draw(st.integers(1, 5)) + 1, :16] = 0
        dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
        shard = f"model-{draw(st.integers(1, 3))}.safetensors"
        shards.setdefault(shard, {})[f"model.layers.3.{part}.{leaf}.weight"] = weight.to(dtype)
    return shards


@given(shards=layers(), case=st.sampled_from(CASES))
@settings(deadline=None, max_examples=60)
def test_any_layer_has_modelopts_bytes(shards: dict[str, dict[str, Tensor]], case: tuple[str, float | None]) -> None:
    """Units with members missing, in other shards, of other dtypes and magnitudes."""
    layout, input_scale = case
    source = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    files = convert_in_memory(shards, Recipe(layout=layout, input_scale=input_scale, **MODELOPTS))
    assert_written(tensors_in(files), source, modelopt_says(source, linear_modules(source)), layout, input_scale)


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_partners_in_other_shards_share_the_scale_and_stay_there(layout: str, tmp_path: Path) -> None:
    """q, k, v, gate and up in five shards: same tensors as in one shard, each in its own file."""
    leaves = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
    names = [f"model.layers.0.{part}.{leaf}" for part, group in leaves.items() for leaf in group]
    tensors = {
        f"{name}.weight": random_tensor(32, 64, seed=at, spread=0.02 * (at + 1)) for at, name in enumerate(names)
    }
    apart = {f"model-0000{at}-of-00005.safetensors": {n: t} for at, (n, t) in enumerate(tensors.items())}
    recipe = Recipe(layout=layout, **MODELOPTS)
    convert(write_checkpoint(tmp_path / "apart", apart, CONFIG), tmp_path / "a", recipe)
    convert(write_checkpoint(tmp_path / "one", {"model.safetensors": tensors}, CONFIG), tmp_path / "b", recipe)
    assert_written(tensors_of(tmp_path / "a"), tensors, modelopt_says(tensors, names), layout, None)
    assert_written(tensors_of(tmp_path / "b"), tensors, modelopt_says(tensors, names), layout, None)
    weight_map = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())["weight_map"]
    for shard, (name, module) in zip(apart, zip(tensors, names, strict=True), strict=True):
        stored = {n for n, file in weight_map.items() if file == shard}
        assert {n.rpartition(".")[0] for n in stored} == {module}
        assert len(stored) == 3, name
    suffix = "weight_scale_2" if layout == "modelopt" else "weight_global_scale"
    found = tensors_of(tmp_path / "a")
    assert len({found[f"{m}.{suffix}"].item() for m in names[:3]}) == 1
    assert len({found[f"{m}.{suffix}"].item() for m in names[3:]}) == 1


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_imported_input_scales_are_shared_and_converted(layout: str, tmp_path: Path) -> None:
    """A multiplier per module becomes the unit's largest; compressed-tensors stores its reciprocal."""
    source = tiny_llama(tmp_path / "in", layers=1, shards=1)
    modules = linear_modules(tensors_of(source))
    scales = {module: 0.25 + at for at, module in enumerate(modules)}
    amax = {module: 2688 * scale for module, scale in scales.items()}
    recipe = Recipe(mode="all-linear", layout=layout, input_scale="imported", input_amax=amax)
    convert(source, tmp_path / "out", recipe)
    found = tensors_of(tmp_path / "out")
    for module in modules:
        shared = max(scale for other, scale in scales.items() if unit_of(other) == unit_of(module))
        stored = found[f"{module}.input_scale" if layout == "modelopt" else f"{module}.input_global_scale"]
        expected = torch.tensor(shared) if layout == "modelopt" else 1 / torch.tensor([shared])
        same_bytes(stored, expected, module)
    assert verify_checkpoint(tmp_path / "out").problems == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_search_cuts_the_error_of_a_checkpoint_by_a_fifth(dtype: torch.dtype, tmp_path: Path) -> None:
    """Squared error over all Gaussian weights, as verify measures it; no tensor gets worse."""
    source = tiny_llama(tmp_path / "in", hidden=128, dtype=dtype)
    errors: dict[str, dict[str, float]] = {}
    for search in ("absmax", "mse"):
        convert(source, tmp_path / search, Recipe(mode="all-linear", scale_search=search))
        report = verify_checkpoint(tmp_path / search, source=source)
        assert report.problems == ()
        tensors = tensors_of(source)
        errors[search] = {e.name: e.nmse * tensors[e.name].double().square().sum().item() for e in report.errors}
    assert len(errors["mse"]) == len(linear_modules(tensors_of(source)))
    assert sum(errors["mse"].values()) <= 0.8 * sum(errors["absmax"].values())
    assert all(errors["mse"][name] < errors["absmax"][name] for name in errors["mse"])


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_zero_tensors_stay_zero(layout: str, search: str, tmp_path: Path) -> None:
    """ModelOpt writes NaN for an all-zero tensor; alone or beside its partner it must come back as zeros."""
    prefix = "model.layers.0.mlp"
    tensors = {
        f"{prefix}.gate_proj.weight": torch.zeros(16, 32, dtype=torch.bfloat16),
        f"{prefix}.up_proj.weight": random_tensor(16, 32),
        f"{prefix}.down_proj.weight": torch.zeros(32, 16, dtype=torch.bfloat16),
    }
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, CONFIG)
    convert(source, tmp_path / "out", Recipe(layout=layout, scale_search=search))
    assert verify_checkpoint(tmp_path / "out", source=source).problems == ()
    convert(tmp_path / "out", tmp_path / "dense", Recipe(scheme="bf16"))
    dense = tensors_of(tmp_path / "dense")
    assert not dense[f"{prefix}.gate_proj.weight"].any()
    assert not dense[f"{prefix}.down_proj.weight"].any()
    assert dense[f"{prefix}.up_proj.weight"].any()


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("amax", [1e-45, 1e-40, 1e-37, 1e-34, 1e30, 3e38])
def test_extreme_magnitudes_give_finite_scales(layout: str, amax: float, tmp_path: Path) -> None:
    """The reciprocal of a tiny global scale overflows float32, unless the scale is held above that."""
    weight = random_tensor(16, 32, dtype=torch.float64)
    weight = (weight / weight.abs().max() * amax).float()
    tensors = {"model.layers.0.mlp.down_proj.weight": weight}
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, CONFIG)
    convert(source, tmp_path / "out", Recipe(layout=layout))
    assert verify_checkpoint(tmp_path / "out").problems == ()
    convert(tmp_path / "out", tmp_path / "dense", Recipe(scheme="bf16", dtype="F32"))
    dense = tensors_of(tmp_path / "dense")["model.layers.0.mlp.down_proj.weight"]
    assert (dense - weight).abs().max() <= max(amax / 4, 1e-37)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("row", "column"), [(0, 0), (13, 21), (23, 63)])
def test_a_weight_that_is_not_finite_is_named(
    bad: float, dtype: torch.dtype, row: int, column: int, tmp_path: Path
) -> None:
    """Tensor, row and column, and nothing is published."""
    weight = random_tensor(24, 64, dtype=dtype)
    weight[row, column] = bad
    tensors = {"model.layers.0.mlp.down_proj.weight": weight}
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, CONFIG)
    with pytest.raises(NonFiniteError, match=rf"layers\.0\.mlp\.down_proj\.weight: .* at row {row}, column {column};"):
        convert(source, tmp_path / "out", Recipe())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("memory", [64 * KIB, 448 * MIB])
def test_nan_far_inside_a_tensor_above_the_budget_is_named(memory: int, tmp_path: Path) -> None:
    """In the second row block of twelve megabytes, whether the tensor is kept in memory or read twice."""
    weight = random_tensor(3000, 1024, dtype=torch.float32)
    weight[2987, 1001] = float("nan")
    tensors = {"model.layers.0.mlp.down_proj.weight": weight}
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, CONFIG)
    with pytest.raises(NonFiniteError, match="found nan at row 2987, column 1001"):
        convert(source, tmp_path / "out", Recipe(), engine=ThreadEngine(2, memory))
    assert not (tmp_path / "out").exists()


def test_nan_in_a_partner_of_another_shard_is_named_there(tmp_path: Path) -> None:
    """The first shard needs the partner's amax, and the message names the partner."""
    bad = random_tensor(16, 32)
    bad[5, 6] = float("inf")
    shards = {
        "model-00001-of-00002.safetensors": {"model.layers.0.mlp.gate_proj.weight": random_tensor(16, 32)},
        "model-00002-of-00002.safetensors": {"model.layers.0.mlp.up_proj.weight": bad},
    }
    with pytest.raises(NonFiniteError, match=r"up_proj\.weight: .* inf at row 5, column 6"):
        convert(write_checkpoint(tmp_path / "in", shards, CONFIG), tmp_path / "out", Recipe())
    assert not (tmp_path / "out").exists()


def test_what_is_not_quantized_is_copied_with_its_nan(tmp_path: Path) -> None:
    """Only arithmetic needs finite numbers: an ignored tensor keeps every bit."""
    odd = torch.tensor([0x7FC1, 0x7F80, -128, 1], dtype=torch.int16).view(torch.bfloat16)
    tensors = {"model.layers.0.mlp.down_proj.weight": random_tensor(16, 32), "model.norm.weight": odd}
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, CONFIG)
    convert(source, tmp_path / "out", Recipe())
    same_bytes(tensors_of(tmp_path / "out")["model.norm.weight"], odd, "model.norm.weight")


def test_threads_and_budgets_never_show_in_the_bytes() -> None:
    """One to four workers, from a budget below one row block to one above everything: the same files.

    gate_proj and up_proj have more than one row block, and their partner lies in another shard.
    """
    prefix = "model.layers.0"
    shards = {
        "model-00001-of-00002.safetensors": {
            f"{prefix}.mlp.gate_proj.weight": random_tensor(2500, 2048, seed=1),
            f"{prefix}.self_attn.q_proj.weight": random_tensor(48, 64, seed=2),
        },
        "model-00002-of-00002.safetensors": {
            f"{prefix}.mlp.up_proj.weight": random_tensor(2500, 2048, seed=3, spread=0.1),
            f"{prefix}.self_attn.k_proj.weight": random_tensor(16, 64, seed=4, dtype=torch.float32),
            f"{prefix}.mlp.down_proj.weight": random_tensor(512, 48, seed=5),
        },
    }
    recipe = Recipe(**MODELOPTS)
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    first = convert_in_memory(shards, recipe)
    expected = modelopt_says(tensors, linear_modules(tensors))
    assert_written(tensors_in(first), tensors, expected, "compressed-tensors", None)
    for workers, memory in ((1, 64 * KIB), (2, MIB), (3, 24 * MIB), (4, 64 * KIB), (4, 448 * MIB)):
        files = convert_in_memory(shards, recipe, ThreadEngine(workers, memory))
        assert files == first, f"{workers} workers, {memory} bytes"


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_decompression_is_the_same_for_any_number_of_threads(layout: str, tmp_path: Path) -> None:
    """Decoding by row blocks, too."""
    tensors = {
        "model.layers.0.mlp.gate_proj.weight": random_tensor(8200, 2048),
        "model.layers.0.mlp.down_proj.weight": random_tensor(64, 48),
    }
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, CONFIG)
    convert(source, tmp_path / "packed", Recipe(layout=layout))
    codes = "weight" if layout == "modelopt" else "weight_packed"
    stored = tensors_of(tmp_path / "packed")[f"model.layers.0.mlp.gate_proj.{codes}"]
    assert stored.numel() > 8 * MIB, "one row block only"
    outputs = []
    for workers, memory in ((1, 64 * KIB), (2, 448 * MIB), (4, MIB)):
        folder = tmp_path / f"dense{workers}"
        convert(tmp_path / "packed", folder, Recipe(scheme="bf16"), engine=ThreadEngine(workers, memory))
        outputs.append((folder / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]
    assert verify_checkpoint(tmp_path / "dense1", source=tmp_path / "packed").problems == ()


@given(layouts=st.permutations(["compressed-tensors", "modelopt"]), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=10)
def test_nvfp4_in_one_layout_becomes_the_other_without_loss(layouts: list[str], seed: int) -> None:
    """Decoded numbers lie on the grid, so the second encoding finds each of them again."""
    shards = {
        "model.safetensors": {
            "model.layers.0.mlp.gate_proj.weight": random_tensor(16, 64, seed=seed),
            "model.layers.0.mlp.up_proj.weight": random_tensor(16, 64, seed=seed + 1, spread=0.2),
        }
    }
    first = convert_in_memory(shards, Recipe(layout=layouts[0]))
    second, dense_first, dense_second = MemorySink(), MemorySink(), MemorySink()
    convert(MemorySource(first), second, Recipe(layout=layouts[1]))
    convert(MemorySource(first), dense_first, Recipe(scheme="bf16", dtype="F32"))
    convert(MemorySource(second.files), dense_second, Recipe(scheme="bf16", dtype="F32"))
    before, after = tensors_in(dense_first.files), tensors_in(dense_second.files)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=2**-20, atol=0)


@pytest.mark.parametrize("turned", [False, True])
def test_fused_experts_have_the_bytes_of_split_ones(turned: bool, tmp_path: Path) -> None:
    """One 3-D tensor of experts, rows or columns first, gives what one tensor for each would."""
    config = CONFIG | {"hidden_size": 64, "moe_intermediate_size": 48}
    split: dict[str, Tensor] = {}
    for expert in range(3):
        for at, leaf in enumerate(("gate_proj", "up_proj", "down_proj")):
            shape = (64, 48) if leaf == "down_proj" else (48, 64)
            name = f"model.layers.0.mlp.experts.{expert}.{leaf}.weight"
            split[name] = random_tensor(*shape, seed=10 * expert + at)
    bank = "model.layers.0.mlp.experts"
    both = [torch.cat([split[f"{bank}.{e}.gate_proj.weight"], split[f"{bank}.{e}.up_proj.weight"]]) for e in range(3)]
    down = [split[f"{bank}.{e}.down_proj.weight"] for e in range(3)]
    fused = {
        f"{bank}.gate_up_proj": torch.stack([weight.T if turned else weight for weight in both]),
        f"{bank}.down_proj": torch.stack([weight.T if turned else weight for weight in down]),
    }
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": fused}, config)
    convert(source, tmp_path / "out", Recipe(scale_search="absmax"))
    expected = modelopt_says(split, [n.removesuffix(".weight") for n in split])
    assert_written(tensors_of(tmp_path / "out"), {}, expected, "compressed-tensors", None)


def test_the_format_states_its_outputs_before_it_makes_them(tmp_path: Path) -> None:
    """Names, dtypes and shapes of the plan equal what lies in the files, in both layouts and variants."""
    source = tiny_moe(tmp_path / "in", layers=1)
    for layout, input_scale in CASES:
        recipe = Recipe(layout=layout, input_scale=input_scale)
        plan = make_plan(source, recipe)
        promised = {i.name: i.shape for shard in plan.shards for i in shard.tensors}
        folder = tmp_path / f"{layout}-{input_scale}"
        convert(source, folder, recipe)
        assert {n: tuple(t.shape) for n, t in tensors_of(folder).items()} == promised
        for shard in plan.shards:
            assert (folder / shard.name).stat().st_size == shard.nbytes


@pytest.mark.parametrize("shape", [(4, 24), (0, 16), (4, 0), (2, 4, 16), (16,)])
def test_shapes_that_nvfp4_cannot_hold_have_a_reason(shape: tuple[int, ...]) -> None:
    """The message shows the shape."""
    problem = checkpoint_format.Nvfp4().problem(shape)
    assert problem is not None
    assert str(list(shape)) in problem
