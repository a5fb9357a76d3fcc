"""Tensors that contradict each other or their config are refused with a message that names what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mso_hub.errors import CheckpointError, MsoError, NonFiniteError, PlanError
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from tests.formats.decoders.definitions import DEEPSEEK, pack
from tests.formats.decoders.layouts import AWQ, FLOAT, GPTQ, GPTQ_V2, GROUP, INT, case
from tests.formats.decoders.libraries import compressed_config, modelopt
from tests.formats.decoders.stored import BANK, COLUMNS, E8M0, FP8, NAME, ROWS, Case, Tensors, named, opened
from tests.helpers import random_tensor, write_checkpoint

SCALE, WEIGHT = f"{NAME}.weight_scale", f"{NAME}.weight"


def with_tensors(name: str, **changed: Tensor | None) -> Case:
    """A case with some tensors of its module replaced, or taken away by None."""
    made = case(name)
    tensors = {n: t for n, t in made.tensors.items() if changed.get(n.removeprefix(f"{NAME}."), t) is not None}
    tensors |= named(**{leaf: tensor for leaf, tensor in changed.items() if tensor is not None})
    return Case(tensors, made.config, made.oracle, made.shown, made.scheme, made.layout, made.bits)


def refused(tensors: Tensors, config: Mapping[str, Any], kind: type[MsoError], *words: str) -> None:
    """Planning fails with one error that has all the words."""
    with pytest.raises(kind) as caught:
        opened(tensors, config)
    for word in words:
        assert word in str(caught.value)


WRONG_SHAPES: dict[str, tuple[str, dict[str, Tensor]]] = {
    "FP8, a scale too few": ("ModelOpt FP8 rows", {"weight_scale": torch.ones(ROWS - 1, 1)}),
    "FP8, scales of three dimensions": ("FP8 channel", {"weight_scale": torch.ones(ROWS, 1, 2)}),
    "FP8, more scales than columns": ("ModelOpt FP8", {"weight_scale": torch.ones(ROWS, COLUMNS + 1)}),
    "FP8, no scale in a tensor of scales": ("ModelOpt FP8", {"weight_scale": torch.ones(0)}),
    "FP8, integer scales": ("FP8 channel", {"weight_scale": torch.ones(ROWS, 1, dtype=torch.int32)}),
    "FP8, U8 scales of blocks": ("ModelOpt FP8", {"weight_scale": torch.ones(2, 2, dtype=torch.uint8)}),
    "FP8 of three dimensions": ("ModelOpt FP8", {"weight": torch.zeros(2, 4, 8).to(FP8)}),
    "FP8 without rows": ("ModelOpt FP8", {"weight": torch.zeros(0, 8).to(FP8)}),
    "MXFP4, half of the scales": ("MXFP4", {"weight_scale": torch.ones(ROWS, COLUMNS // 64, dtype=torch.uint8)}),
    "MXFP4 with float scales": ("MXFP4", {"weight_scale": torch.ones(ROWS, COLUMNS // 32)}),
    "MXFP4, width of no multiple": ("ModelOpt MXFP4", {"weight": torch.zeros(ROWS, 100, dtype=torch.uint8)}),
    "MXFP8, scales turned": ("MXFP8", {"weight_scale": torch.ones(COLUMNS // 32, ROWS, dtype=torch.uint8)}),
    "V4 experts, scales of codes": (
        "DeepSeek-V4 experts",
        {"scale": torch.ones(ROWS, 4, dtype=torch.uint8).view(E8M0)},
    ),
    "INT8, a scale for every column": ("ModelOpt INT8", {"weight_scale": torch.ones(1, COLUMNS)}),
    "INT8, zero points of floats": ("INT8 asymmetric", {"weight_zero_point": torch.zeros(ROWS, COLUMNS // 32)}),
    "INT8, too few zero points": ("INT8 asymmetric", {"weight_zero_point": torch.zeros(ROWS, 1, dtype=torch.int8)}),
    "INT4, scales of half the rows": ("ModelOpt INT4", {"weight_scale": torch.ones(ROWS // 2, 2)}),
    "a smoothing scale of rows": ("ModelOpt INT8 smoothed", {"pre_quant_scale": torch.ones(ROWS)}),
    "NVFP4 with groups of 32": ("ModelOpt NVFP4", {"weight_scale": torch.ones(ROWS, COLUMNS // 32).to(FP8)}),
    "AWQ, scales of other columns": ("AWQ", {"scales": torch.ones(2, ROWS - 8, dtype=torch.float16)}),
    "AWQ, zero points of one group": ("AWQ", {"qzeros": torch.zeros(1, ROWS // 8, dtype=torch.int32)}),
    "AWQ with g_idx": ("AWQ", {"g_idx": torch.zeros(COLUMNS, dtype=torch.int32)}),
    "GPTQ, zero points of floats": ("GPTQ 4", {"qzeros": torch.zeros(4, 24)}),
    "GPTQ, 5 bits": ("GPTQ 4", {"qzeros": torch.zeros(4, 30, dtype=torch.int32)}),
    "GPTQ, g_idx of another weight": ("GPTQ 4", {"g_idx": torch.zeros(COLUMNS - 1, dtype=torch.int32)}),
    "GPTQ without rows": ("GPTQ 4", {"qweight": torch.zeros(0, 192, dtype=torch.int32)}),
}


@pytest.mark.parametrize("kind", WRONG_SHAPES)
def test_shapes_that_fit_no_layout(kind: str) -> None:
    """The module, what was needed and what is stored."""
    name, changed = WRONG_SHAPES[kind]
    made = with_tensors(name, **changed)
    refused(made.tensors, made.config, PlanError, f"{NAME}: ", "needs", "decoder")


MISSING = {
    "MXFP4": "weight_scale", "ModelOpt NVFP4": "weight_scale", "GPTQ 4": "qzeros", "AWQ": "scales",
}  # fmt: skip


@pytest.mark.parametrize("name", MISSING)
def test_a_companion_that_no_shard_holds(name: str) -> None:
    """Incomplete, and which tensor is missing."""
    made = with_tensors(name, **{MISSING[name]: None})
    refused(made.tensors, made.config, CheckpointError, f"{NAME}: ", f"{MISSING[name]} is not", "incomplete")


@pytest.mark.parametrize("name", ["FP8 tensor", "INT8 channel", "ModelOpt MXFP4", "ModelOpt INT4"])
def test_codes_without_a_scale(name: str) -> None:
    """Bytes of a quantized checkpoint that nobody understands are never copied."""
    made = with_tensors(name, weight_scale=None)
    refused(made.tensors, made.config, PlanError, "without a decoder", NAME)


def test_bytes_of_a_dense_checkpoint_are_bytes() -> None:
    """Without a config nothing says that they are codes."""
    _, weights, _ = opened(named(weight=torch.zeros(4, 4, dtype=torch.uint8)), {})
    assert weights[WEIGHT].decoder is None


def test_an_asymmetric_config_needs_zero_points() -> None:
    """INT8 without the tensor that the config announces."""
    made = with_tensors("INT8 asymmetric", weight_zero_point=None)
    refused(made.tensors, made.config, CheckpointError, NAME, "asymmetric", "weight_zero_point is missing")


CONTRADICTIONS: dict[str, tuple[str, Mapping[str, Any], tuple[str, ...]]] = {
    "fp8 config, INT8 tensors": ("INT8 channel", DEEPSEEK, ("weight_block_size", "I8 [200, 256]")),
    "fp8 config, NVFP4 tensors": ("ModelOpt NVFP4", DEEPSEEK, ("fp8", "weight_scale_2")),
    "NVFP4 config, FP8 tensors": ("ModelOpt FP8", modelopt("NVFP4"), ("nvfp4 (quant_algo NVFP4)", "F8_E4M3")),
    "FP8 config, NVFP4 tensors": ("ModelOpt NVFP4", modelopt("FP8"), ("fp8 (quant_algo FP8)", "U8 [200, 128]")),
    "INT config, FP8 tensors": (
        "FP8 channel", compressed_config("int-quantized", **INT, strategy="channel"), ("int8", "F8_E4M3")),
    "other blocks": ("FP8 block", DEEPSEEK | {"weight_block_size": [64, 64]}, ("one scale for 64 x 64", "[2, 2]")),
    "blocks announced, rows stored": ("FP8 channel", DEEPSEEK, ("one scale for 128 x 128", "[200, 1]")),
    "rows announced, a tensor stored": (
        "FP8 tensor", compressed_config("float-quantized", **FLOAT, strategy="channel"), ("one scale for 1 x 256",)),
    "group_size of another checkpoint": (
        "INT8 group", compressed_config("int-quantized", **INT, **GROUP | {"group_size": 128}),
        ("one scale for 1 x 128", "[200, 8]")),
    "GPTQ of other bits": ("GPTQ 8", GPTQ | {"bits": 4, "group_size": 64}, ("int4", "gptq with 4 bits")),
    "GPTQ of another group": ("GPTQ 4", GPTQ | {"bits": 4, "group_size": 128}, ("group_size 128", "2 groups of 256")),
    "AWQ config, GPTQ tensors": ("GPTQ 4", AWQ | {"group_size": 64}, ("AWQ", "qweight I32 [32, 192]")),
    "GPTQ config, AWQ tensors": ("AWQ", GPTQ | {"bits": 4, "group_size": 128}, ("GPTQ", "qweight I32 [256, 25]")),
    "MXFP4 config, MXFP8 tensors": ("ModelOpt MXFP8", modelopt("MXFP4"), ("mxfp4", "F8_E4M3")),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_a_config_of_other_weights(kind: str) -> None:
    """Both sides are named, and the way out."""
    name, config, words = CONTRADICTIONS[kind]
    refused(case(name).tensors, config, CheckpointError, NAME, "config.json says", "stored are", "restore", *words)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quant_method": "something-new", "bits": 3},
        compressed_config("float-quantized"),
        compressed_config("float-quantized", **FLOAT, strategy="channel") | {"config_groups": {}},
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {}},
        {"quant_method": "modelopt", "quant_algo": "A_NEW_ONE"},
        {"quant_method": "fp8", "activation_scheme": "static"},
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
    ],
)
def test_a_config_that_says_little_is_no_obstacle(config: Mapping[str, Any]) -> None:
    """Extra keys, missing groups, unknown methods: the tensors speak for themselves."""
    _, weights, _ = opened(case("FP8 channel").tensors, config)
    decoder = weights[WEIGHT].decoder
    assert decoder is not None
    assert decoder.name == "FP8 per channel"


@pytest.mark.parametrize("key", ["dynamic", "extra_config"])
def test_settings_for_each_layer_are_left_to_the_tensors(key: str) -> None:
    """GPTQModel and AutoRound may give a layer other bits than the config's own."""
    config = GPTQ | {"bits": 4, "group_size": 128, key: {"+:.*up_proj": {"bits": 8, "group_size": 64}}}
    _, weights, _ = opened(case("GPTQ 8").tensors, config)
    assert weights[WEIGHT].decoder is not None


def fp8(rows: int, columns: int, *grid: int) -> Tensors:
    """FP8 codes with a matrix of scales."""
    return named(weight=torch.zeros(rows, columns).to(FP8), weight_scale=torch.ones(*grid))


@pytest.mark.parametrize(
    ("rows", "columns", "grid", "shown"),
    [
        (256, 512, (2, 4), "FP8 128x128 blocks"),
        (576, 512, (5, 4), "FP8 128x128 blocks"),
        (192, 192, (3, 3), "FP8 64x64 blocks"),
        (100, 256, (1, 2), "FP8 100x128 blocks"),
        (96, 64, (2, 1), "FP8 48x64 blocks"),
        (64, 96, (64, 3), "FP8 groups of 32"),
    ],
)
def test_the_size_of_a_block_follows_from_the_shapes(
    rows: int, columns: int, grid: tuple[int, int], shown: str
) -> None:
    """Where the config is silent: the power of two, or the exact part, that makes this many blocks."""
    tensors = fp8(rows, columns, *grid)
    if shown == "FP8 48x64 blocks":  # 48 and 64 both make two blocks of 96 rows
        refused(tensors, {}, PlanError, NAME, "how many of 96", "48 and 64 both fit")
        return
    decoder = opened(tensors, {})[1][WEIGHT].decoder
    assert decoder is not None
    assert decoder.name == shown


def test_cells_that_nothing_fits() -> None:
    """Seven cells of one size end in the last of ten rows at no size."""
    refused(fp8(10, 16, 7, 1), {}, PlanError, NAME, "7 scales cannot cover 10")


def test_gptq_needs_a_config_that_says_the_version() -> None:
    """Zero points minus one, or as they are: one number apart, and no shape tells."""
    refused(case("GPTQ 4").tensors, {}, CheckpointError, NAME, "gptq_v2", "restore the config.json")
    form = GPTQ | {"bits": 4, "group_size": 64, "checkpoint_format": "bitblas"}
    refused(case("GPTQ 4").tensors, form, PlanError, NAME, "config.json says bitblas")


def test_awq_of_another_version() -> None:
    """GEMV packs along the other dimension."""
    refused(case("AWQ").tensors, AWQ | {"version": "gemv"}, PlanError, NAME, "config.json says gemv")


def failing(tmp_path: Path, tensors: Tensors, config: Mapping[str, Any], kind: type[MsoError]) -> str:
    """A conversion that fails -> its message; nothing is published."""
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, {"quantization_config": dict(config)})
    with pytest.raises(kind) as caught:
        convert(source, tmp_path / "out", Recipe(scheme="bf16"))
    assert not (tmp_path / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize(("zero", "config"), [(8, GPTQ), (7, GPTQ_V2)])
def test_symmetric_zero_points_tell_a_wrong_version(zero: int, config: Mapping[str, Any], tmp_path: Path) -> None:
    """A checkpoint_format that was lost or edited would shift every weight by a step."""
    zeros = pack(torch.full((192, 4), zero), 4).T
    made = with_tensors("GPTQ 4", qzeros=zeros.contiguous())
    settings = {**config, "sym": True, "bits": 4, "group_size": 64}
    message = failing(tmp_path, made.tensors, settings, CheckpointError)
    assert f"{NAME}.qzeros" in message
    assert "correct checkpoint_format" in message


@pytest.mark.parametrize("group", [-1, 4])
def test_a_group_number_that_does_not_exist(group: int, tmp_path: Path) -> None:
    """g_idx is an index into the scales: checked before anything is read with it."""
    g_idx = case("GPTQ act order").tensors[f"{NAME}.g_idx"].clone()
    g_idx[7] = group
    made = with_tensors("GPTQ act order", g_idx=g_idx)
    message = failing(tmp_path, made.tensors, made.config, CheckpointError)
    assert f"{NAME}.g_idx: must hold group numbers below 4" in message


DAMAGED: dict[str, tuple[str, str, Any]] = {
    "NaN code of FP8": ("FP8 channel", WEIGHT, 0x7F),
    "negative NaN code of FP8": ("MXFP8", WEIGHT, 0xFF),
    "NaN exponent of MXFP8": ("MXFP8", SCALE, 0xFF),
    "NaN exponent of MXFP4": ("MXFP4", SCALE, 0xFF),
    "NaN exponent of gpt-oss": ("gpt-oss", f"{BANK}_scales", 0xFF),
    "NaN exponent of DeepSeek": ("DeepSeek-V4", f"{NAME}.scale", 0xFF),
    "infinite scale of FP8": ("DeepSeek F32", f"{NAME}.weight_scale_inv", float("inf")),
    "NaN scale of INT8": ("INT8 channel", SCALE, float("nan")),
    "NaN scale of AWQ": ("AWQ", f"{NAME}.scales", float("nan")),
    "infinite scale of GPTQ": ("GPTQ 4", f"{NAME}.scales", float("inf")),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_number_is_never_written(kind: str, tmp_path: Path) -> None:
    """NaN and Inf have no business in weights: the weight, the format and the place are named."""
    name, tensor, value = DAMAGED[kind]
    made = case(name)
    tensors = {n: t.clone() for n, t in made.tensors.items()}
    damaged = tensors[tensor]
    flat = damaged.view(torch.uint8) if isinstance(value, int) else damaged
    flat[(1,) * flat.dim() if flat.shape[-1] > 1 else (1, 0)] = value
    message = failing(tmp_path, tensors, made.config, NonFiniteError)
    assert made.weight in message
    assert made.shown in message


def test_svdquant_is_not_taken_for_nvfp4() -> None:
    """Its low-rank part would be lost."""
    tensors = case("ModelOpt NVFP4").tensors | named(svdquant_lora_a=random_tensor(8, COLUMNS))
    refused(tensors, modelopt("NVFP4_SVD"), PlanError, "without a decoder", "svdquant_lora_a")


def test_two_scales_beside_one_weight() -> None:
    """Which of them counts is not guessed."""
    tensors = case("FP8 tensor").tensors | named(weight_scale_inv=torch.ones(2, 2))
    refused(tensors, {}, PlanError, "without a decoder", "weight_scale_inv")
