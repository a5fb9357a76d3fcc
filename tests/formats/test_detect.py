"""Which stored tensors are weights, and which sources are refused because nobody here can decode them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mso_hub.errors import CheckpointError, NonFiniteError, PlanError
from mso_hub.formats.detect import quantization_configs, with_dtype, without_quantization
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from tests.helpers import random_tensor, tensors_of, write_checkpoint

NAME = "model.layers.0.mlp.down_proj"
ATTENTION = "model.layers.0.self_attn.q_proj"
RECIPES = {"quantize": Recipe(mode="all-linear"), "decompress": Recipe(scheme="bf16")}
Source = tuple[dict[str, Tensor], dict[str, Any]]


def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor of any dtype."""
    return torch.zeros(shape, dtype=torch.uint8).to(dtype)


FP8, U8, I8 = torch.float8_e4m3fn, torch.uint8, torch.int8
CT = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"], "weights": {}}}}


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """A compressed-tensors config of some format."""
    return CT | {"format": form, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


FOREIGN: dict[str, Source] = {
    "FP8 without any config": ({f"{NAME}.weight": zeros(32, 32, dtype=FP8)}, {}),
    "FP8 E5M2": ({f"{NAME}.weight": zeros(32, 32, dtype=torch.float8_e5m2)}, {}),
    "FP8 experts in one tensor": (
        {"model.layers.0.mlp.experts.down_proj": zeros(2, 32, 32, dtype=FP8),
         "model.layers.0.mlp.experts.down_proj_scale_inv": torch.ones(2, 1, 1)},
        {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "codes of a byte without a scale": (
        {f"{NAME}.weight": zeros(32, 32, dtype=I8)}, compressed("int-quantized", num_bits=8, type="int")),
    "bitsandbytes NF4": (
        {f"{NAME}.weight": zeros(512, 1, dtype=U8), f"{NAME}.weight.absmax": zeros(16, dtype=U8),
         f"{NAME}.weight.quant_map": torch.ones(16), f"{NAME}.weight.nested_absmax": torch.ones(1),
         f"{NAME}.weight.quant_state.bitsandbytes__nf4": zeros(90, dtype=U8)},
        {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bitsandbytes INT8": (
        {f"{NAME}.weight": zeros(32, 32, dtype=I8), f"{NAME}.SCB": torch.ones(32)},
        {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "ModelOpt INT4 with FP8 scales on top": (
        {f"{NAME}.weight": zeros(16, 32, dtype=U8), f"{NAME}.weight_scale": torch.ones(32, 1),
         f"{NAME}.weight_scale_2": torch.tensor(1.0), f"{NAME}.pre_quant_scale": random_tensor(32)},
        {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}),
    "ModelOpt NVFP4 with groups of 32": (
        {f"{NAME}.weight": zeros(32, 32, dtype=U8), f"{NAME}.weight_scale": zeros(32, 2, dtype=FP8),
         f"{NAME}.weight_scale_2": torch.tensor(1.0)},
        {"quant_method": "modelopt", "quant_algo": "W4A8_NVFP4_FP8"}),
    "ModelOpt NVFP4 with a low-rank part": (
        {f"{NAME}.weight": zeros(32, 16, dtype=U8), f"{NAME}.weight_scale": zeros(32, 2, dtype=FP8),
         f"{NAME}.weight_scale_2": torch.tensor(1.0), f"{NAME}.svdquant_lora_a": random_tensor(4, 32)},
        {"quant_method": "modelopt", "quant_algo": "NVFP4_SVD"}),
    "NVFP4 with a global scale per row": (
        {f"{NAME}.weight_packed": zeros(32, 16, dtype=U8), f"{NAME}.weight_scale": zeros(32, 2, dtype=FP8),
         f"{NAME}.weight_global_scale": torch.ones(32)},
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16)),
}  # fmt: skip


@pytest.mark.parametrize("verb", RECIPES)
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_source_without_a_decoder_is_refused(kind: str, verb: str, tmp_path: Path) -> None:
    """One PlanError that names a tensor or module and the limit; nothing is written beside a dense layer either."""
    tensors, quantized = FOREIGN[kind]
    dense = {f"{ATTENTION}.weight": random_tensor(32, 32), "model.norm.weight": random_tensor(32)}
    config = {"model_type": "llama", "hidden_size": 32, "moe_intermediate_size": 32}
    if quantized:
        config["quantization_config"] = quantized
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors | dense}, config)
    with pytest.raises(PlanError, match="decoder") as caught:
        convert(source, tmp_path / "out", RECIPES[verb])
    assert any(name.rpartition(".")[0] in str(caught.value) for name in tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_every_strange_tensor_of_a_bank_is_named(tmp_path: Path) -> None:
    """Codes and scales of gpt-oss: where one is missing, the other is not copied on."""
    bank = "model.layers.0.mlp.experts.down_proj"
    tensors = {
        f"{bank}_blocks": zeros(2, 32, 1, 16, dtype=U8),
        f"{bank}_scales": zeros(2, 32, 1, dtype=U8),
    }
    for name, tensor in tensors.items():
        folder = tmp_path / name
        write_checkpoint(
            folder, {"model.safetensors": {name: tensor}}, {"quantization_config": {"quant_method": "mxfp4"}}
        )
        with pytest.raises(PlanError, match=rf"without a decoder: {name} U8"):
            convert(folder, tmp_path / "out", RECIPES["decompress"])


def test_the_message_counts_what_it_does_not_list(tmp_path: Path) -> None:
    """Three names, then a number: a hundred thousand tensors must not fill the screen."""
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": zeros(16, 16, dtype=FP8) for n in range(9)}
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, {"model_type": "llama"})
    with pytest.raises(PlanError, match=r"F8_E4M3 \[16, 16\] and 6 more; `mso-hub formats` lists"):
        convert(source, tmp_path / "out", RECIPES["quantize"])


@pytest.mark.parametrize("missing", ["weight_scale", "weight_global_scale"])
def test_nvfp4_without_its_scales_is_incomplete(missing: str, tmp_path: Path) -> None:
    """A companion that no shard holds stops the plan."""
    tensors = {
        f"{NAME}.weight_packed": zeros(32, 16, dtype=U8),
        f"{NAME}.weight_scale": zeros(32, 2, dtype=FP8),
        f"{NAME}.weight_global_scale": torch.ones(1),
    }
    del tensors[f"{NAME}.{missing}"]
    config = {"quantization_config": compressed("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16)}
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, config)
    with pytest.raises((CheckpointError, PlanError), match="down_proj"):
        convert(source, tmp_path / "out", RECIPES["decompress"])
    assert not (tmp_path / "out").exists()


def test_modelopt_nvfp4_without_its_block_scales_is_incomplete(tmp_path: Path) -> None:
    """The same in the other layout."""
    tensors = {f"{NAME}.weight": zeros(32, 16, dtype=U8), f"{NAME}.weight_scale_2": torch.tensor(1.0)}
    config = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, config)
    with pytest.raises(CheckpointError, match=r"down_proj: weight_scale_2 is there, weight_scale is not"):
        convert(source, tmp_path / "out", RECIPES["decompress"])


def test_scales_that_belong_to_a_dense_model_are_ordinary_tensors(tmp_path: Path) -> None:
    """Without a quantization_config, `layer_scale` or an `input_scale` of some architecture is copied."""
    odd = {
        "model.layers.0.ls1.layer_scale": random_tensor(32),
        "model.layers.0.input_scale": random_tensor(1),
        "model.layers.0.logit.scales": random_tensor(4),
        "model.rotary.blocks": zeros(3, dtype=torch.int64),
        "model.flags": torch.tensor([True, False]),
    }
    tensors = odd | {f"{NAME}.weight": random_tensor(32, 32)}
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, {"model_type": "llama"})
    convert(source, tmp_path / "out", Recipe())
    found = tensors_of(tmp_path / "out")
    for name, tensor in odd.items():
        assert torch.equal(found[name], tensor), name


def test_a_dense_source_has_nothing_to_decompress(tmp_path: Path) -> None:
    """Said so, and that its quantization_config is stale where there is one."""
    tensors = {f"{NAME}.weight": random_tensor(32, 32)}
    plain = write_checkpoint(tmp_path / "plain", {"model.safetensors": tensors}, {"model_type": "llama"})
    with pytest.raises(PlanError, match="every weight is dense already; there is nothing to decompress"):
        convert(plain, tmp_path / "out", RECIPES["decompress"])
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
    stale = write_checkpoint(tmp_path / "stale", {"model.safetensors": tensors}, config)
    with pytest.raises(PlanError, match=r"dense already \(its quantization_config is stale\)"):
        convert(stale, tmp_path / "out", RECIPES["decompress"])


def test_a_stale_config_of_a_dense_source_is_replaced(tmp_path: Path) -> None:
    """Quantizing a model that was decompressed by a careless tool leaves one config, the new one, nested ones too."""
    tensors = {f"{NAME}.weight": random_tensor(32, 32)}
    config = {
        "quantization_config": {"quant_method": "fp8"},
        "text_config": {"hidden_size": 32, "quantization_config": {"quant_method": "fp8"}},
    }
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, config)
    plan = convert(source, tmp_path / "out", Recipe())
    assert plan.config["text_config"] == {"hidden_size": 32}
    assert plan.config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_configs_are_found_at_the_top_and_nested_once() -> None:
    """The top one first; what is no object is no config."""
    top, nested = {"quant_method": "a"}, {"quant_method": "b"}
    config = {"quantization_config": top, "text_config": {"compression_config": nested, "n": 1}, "x": [1]}
    assert quantization_configs(config) == [top, nested]
    assert quantization_configs({"quantization_config": None, "text_config": {"quantization_config": "no"}}) == []


def test_configs_are_removed_without_touching_the_rest() -> None:
    """The caller's object stays as it was."""
    config = {
        "a": 1,
        "quantization_config": {"quant_method": "x"},
        "text_config": {"b": [{"c": None}], "quantization_config": {}},
    }
    before = copy.deepcopy(config)
    assert without_quantization(config) == {"a": 1, "text_config": {"b": [{"c": None}]}}
    assert config == before


def test_dtype_is_changed_only_where_it_names_a_float() -> None:
    """`auto`, other fields and values, and the vision part stay; nothing is added."""
    config = {
        "torch_dtype": "bfloat16", "vision_config": {"dtype": "float32", "dtype_of_x": "bfloat16"},
        "text_config": {"torch_dtype": "auto", "dtype": "float32"}, "name": "float32",
    }  # fmt: skip
    assert with_dtype(config, "F16") == {
        "torch_dtype": "float16", "vision_config": {"dtype": "float32", "dtype_of_x": "bfloat16"},
        "text_config": {"torch_dtype": "auto", "dtype": "float16"}, "name": "float32",
    }  # fmt: skip
    assert with_dtype({"hidden_size": 1}, "BF16") == {"hidden_size": 1}


@pytest.mark.parametrize(
    "name", ["logit_scale", "ls1.scale", "vision.blocks", "output_scale", "norm.q_scale", "gamma_scales"]
)
def test_ordinary_parameters_may_be_called_scale(name: str, tmp_path: Path) -> None:
    """A name alone makes no packed weight: the parameter goes into the output, and out of it again."""
    tensors = {f"{NAME}.weight": random_tensor(16, 32), name: torch.ones(4)}
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, {"model_type": "x"})
    convert(source, tmp_path / "packed", RECIPES["quantize"])
    convert(tmp_path / "packed", tmp_path / "dense", RECIPES["decompress"])
    assert name in tensors_of(tmp_path / "packed")
    assert set(tensors_of(tmp_path / "dense")) == set(tensors)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("recipe", [Recipe(mode="all-linear", layout="modelopt"), RECIPES["decompress"]])
def test_a_global_scale_that_is_none_is_refused(value: float, recipe: Recipe, tmp_path: Path) -> None:
    """Zero, negative and infinite scales would decode to nonsense without a word."""
    source = write_checkpoint(
        tmp_path / "in", {"model.safetensors": {f"{NAME}.weight": random_tensor(16, 32)}}, {"model_type": "x"}
    )
    convert(source, tmp_path / "packed", RECIPES["quantize"])
    tensors = tensors_of(tmp_path / "packed") | {f"{NAME}.weight_global_scale": torch.tensor([value])}
    damaged = write_checkpoint(tmp_path / "bad", {"model.safetensors": tensors}, {"model_type": "x"})
    with pytest.raises(CheckpointError, match=f"{NAME}: the global scale must be finite and > 0"):
        convert(damaged, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_a_decoded_weight_must_be_finite(tmp_path: Path) -> None:
    """A NaN block scale, or numbers that FP16 cannot hold: named, and nothing published."""
    large = random_tensor(16, 32, dtype=torch.float32) * 1e6
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": {f"{NAME}.weight": large}}, {"model_type": "x"})
    convert(source, tmp_path / "packed", RECIPES["quantize"])
    with pytest.raises(
        NonFiniteError, match=rf"{NAME}\.weight: nvfp4.*found -?inf at row .*decompress to another dtype"
    ):
        convert(tmp_path / "packed", tmp_path / "half", Recipe(scheme="bf16", dtype="F16"))
    tensors = tensors_of(tmp_path / "packed")
    scale = tensors[f"{NAME}.weight_scale"].view(torch.uint8)
    scale[3, 1] = 0x7F
    damaged = write_checkpoint(tmp_path / "bad", {"model.safetensors": tensors}, {"model_type": "x"})
    with pytest.raises(NonFiniteError, match=rf"{NAME}\.weight: .*found nan at row 3, column 16"):
        convert(damaged, tmp_path / "out", RECIPES["decompress"])
    assert not (tmp_path / "out").exists()
