"""Every layout decodes to the numbers of the library that defines it, bit for bit, whole and in blocks of rows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mso_hub.checkpoint import Array
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from tests.formats.decoders.layouts import CASES, case
from tests.formats.decoders.stored import BANK, NAME, Case, decoded, opened
from tests.formats.numerics.strategies import TORCH, to_bits
from tests.helpers import random_tensor, tensors_of, write_checkpoint

DTYPES = ("BF16", "F16", "F32")
DENSE = Recipe(scheme="bf16")
NORM = "model.norm.weight"


def same(got: Array, expected: Tensor, *, signed: bool = True) -> None:
    """Shape and every bit; zeros of any sign are alike unless `signed`."""
    wanted = to_bits(expected)
    found = got.view(wanted.dtype)
    if not signed:
        sign = wanted.dtype.type(1 << (8 * wanted.itemsize - 1))
        wanted, found = (np.where(bits == sign, 0, bits) for bits in (wanted, found))
    assert found.shape == wanted.shape
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_decoded_values_are_those_of_the_library(name: str, dtype: str) -> None:
    """The dense name and shape, and every bit."""
    made = case(name)
    source, weights, dropped = opened(made.tensors, made.config)
    assert list(weights) == [made.weight]
    assert tuple(dropped) == made.dropped
    weight = weights[made.weight]
    expected = made.oracle(TORCH[dtype])
    assert weight.shape == tuple(expected.shape)
    assert weight.dtype == "BF16"
    same(decoded(source, weight, 0, weight.shape[0], dtype), expected, signed=made.signed)


@pytest.mark.parametrize("name", CASES)
def test_a_decoder_says_what_it_reads(name: str) -> None:
    """Name, scheme, bits and layout, for reports and for choosing what is written; codes come first."""
    made = case(name)
    decoder = opened(made.tensors, made.config)[1][made.weight].decoder
    assert decoder is not None
    assert (decoder.name, decoder.scheme, decoder.layout, decoder.bits) == (
        made.shown, made.scheme, made.layout, made.bits,
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_codes_come_first(name: str) -> None:
    """They decide in which shard the dense weight goes."""
    made = case(name)
    weight = opened(made.tensors, made.config)[1][made.weight]
    assert weight.home.name.endswith(("weight", "weight_packed", "qweight", "_blocks"))


@pytest.mark.parametrize("name", CASES)
def test_blocks_of_rows_are_the_whole(name: str) -> None:
    """Uneven blocks that start where the decoder allows it, also inside a block of scales; loads only those rows."""
    made = case(name)
    source, weights, _ = opened(made.tensors, made.config)
    weight = weights[made.weight]
    assert weight.decoder is not None
    rows, step = weight.shape[0], max(1, weight.decoder.row_step)
    whole = decoded(source, weight, 0, rows, "BF16")
    cuts = sorted({min(at // step * step, rows) for at in (0, 1, 6, 38, 130, 150, rows)} | {rows})
    for start, stop in itertools.pairwise(cuts):
        np.testing.assert_array_equal(decoded(source, weight, start, stop, "BF16"), whole[start:stop])


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("AWQ", "GPTQ"))])
def test_a_block_reads_no_more_than_its_rows(name: str) -> None:
    """Memory is that of a block, whatever the size of the weight."""
    made = case(name)
    _, weights, _ = opened(made.tensors, made.config)
    weight = weights[made.weight]
    half = weight.shape[0] // 2
    codes = weight.home
    ranges = weight.ranges(0, half)
    assert ranges[0][2] - ranges[0][1] == codes.nbytes * half // weight.shape[0]


@pytest.mark.parametrize("name", CASES)
def test_a_conversion_writes_the_dense_model(name: str, tmp_path: Path) -> None:
    """BF16 tensors under dense names, companions gone, no quantization_config left."""
    made = case(name)
    norm = random_tensor(32)
    config = {"model_type": "x", "torch_dtype": "float16", "quantization_config": dict(made.config)}
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": made.tensors | {NORM: norm}}, config)
    plan = convert(source, tmp_path / "out", DENSE)
    found = tensors_of(tmp_path / "out")
    assert set(found) == {made.weight, NORM}
    assert plan.config == {"model_type": "x", "torch_dtype": "bfloat16"}
    same(to_bits(found[made.weight]), made.oracle(torch.bfloat16), signed=made.signed)
    assert torch.equal(found[NORM], norm)


def renamed(made: Case, module: str) -> dict[str, Tensor]:
    """The tensors of a case as another module."""
    return {name.replace(NAME, module).replace(BANK, module): tensor for name, tensor in made.tensors.items()}


def mixed(names: Mapping[str, str]) -> dict[str, Tensor]:
    """Module -> case, all in one checkpoint."""
    tensors: dict[str, Tensor] = {}
    for module, name in names.items():
        tensors |= renamed(case(name), module)
    return tensors


MIXED: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "compressed-tensors": (
        {"a.q_proj": "FP8 block", "a.o_proj": "FP8 channel", "b.up_proj": "MXFP4", "b.down_proj": "MXFP8",
         "b.gate": "INT8 asymmetric"},
        {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": {
            str(at): {"targets": [target], "weights": case(name).config["config_groups"]["group_0"]["weights"]}
            for at, (target, name) in enumerate({
                "re:.*q_proj": "FP8 block", "a.o_proj": "FP8 channel", "re:b[.]up.*": "MXFP4", "b.down_proj": "MXFP8",
                "Linear": "INT8 asymmetric"}.items())}}),
    "ModelOpt": (
        {"a.q_proj": "ModelOpt FP8", "b.up_proj": "ModelOpt NVFP4", "b.down_proj": "ModelOpt INT4",
         "b.gate": "ModelOpt MXFP8"},
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {
            "a.q_proj": {"quant_algo": "FP8"}, "b.up_proj": {"quant_algo": "NVFP4", "group_size": 16},
            "b.down_proj": {"quant_algo": "W4A16_AWQ"}, "b.gate": {"quant_algo": "MXFP8"}}}),
    "DeepSeek-V4": (
        {"a.wq_a": "DeepSeek-V4", "b.experts.0.w1": "DeepSeek-V4 experts", "b.shared_experts.w1": "DeepSeek F32"},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}),
    "no config at all": (
        {"a": "FP8 tensor", "b": "MXFP4", "c": "ModelOpt NVFP4", "d": "DeepSeek-V4 experts", "e": "AWQ", "f": "gpt-oss",
         "g": "ModelOpt INT4", "h": "INT8 channel", "i": "ModelOpt MXFP4"},
        {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", MIXED)
def test_layouts_may_be_mixed(kind: str) -> None:
    """Each module is decoded as its own tensors are."""
    names, config = MIXED[kind]
    source, weights, dropped = opened(mixed(names) | {NORM: random_tensor(32)}, config)
    assert len(weights) == len(names) + 1
    assert dropped == [f"{m}.input_scale" for m, name in names.items() if case(name).dropped]
    for module, name in names.items():
        weight = weights[module if name == "gpt-oss" else f"{module}.weight"]
        made = case(name)
        same(decoded(source, weight, 0, weight.shape[0], "BF16"), made.oracle(torch.bfloat16), signed=made.signed)


def test_kv_cache_scales_stay_runtime_scales() -> None:
    """Beside packed weights they go when the weights are decoded, as activation scales do."""
    scales = {f"model.layers.0.self_attn.{leaf}": torch.ones(1) for leaf in ("k_scale", "v_scale", "q_scale")}
    _, weights, dropped = opened(case("FP8 channel").tensors | scales, case("FP8 channel").config)
    assert set(dropped) == set(scales)
    assert list(weights) == [f"{NAME}.weight"]
