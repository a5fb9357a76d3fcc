"""What runtimes do to activations: the formulas against the plugin's emulation of vLLM, and whose scale counts."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mso_hub.calibrate.evaluate import activations
from mso_hub.calibrate.evaluate.inputs import MODELOPT, Wish, of_arguments, quantizers, wish_of
from mso_hub.errors import CheckpointError
from mso_hub.formats import FORMATS, Scheme, build
from mso_hub.formats.dialects import compressed_tensors, deepseek, modelopt

PLUGIN = Path(__file__).resolve().parents[2] / "plugins/vllm-mso-hub/src/vllm_mso_hub/emulate/activations.py"


def emulation() -> ModuleType:
    """The plugin's module, which is compared with vLLM's own kernels where vLLM is installed; it needs torch alone."""
    spec = importlib.util.spec_from_file_location("emulated_activations", PLUGIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def samples() -> list[Tensor]:
    """Ordinary numbers, outliers, zeros, numbers at powers of two, tiny ones; as BF16, F16 and F32."""
    generator = torch.Generator().manual_seed(7)
    plain = torch.randn(3, 5, 256, generator=generator)
    outliers = plain * torch.where(torch.rand(plain.shape, generator=generator) < 0.01, 300.0, 1.0)
    powers = torch.pow(2.0, torch.randint(-12, 12, (4, 256), generator=generator).float())
    zeros = torch.zeros(2, 256)
    zeros[1, 40] = 6.0
    return [plain.bfloat16(), outliers.bfloat16(), plain.half(), powers, powers * 448, zeros, plain * 1e-30]


PAIRS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[ModuleType], Callable[[Tensor], Tensor]]]] = {
    "nvfp4": (activations.nvfp4(torch.tensor(700.0)), lambda vllm: vllm.nvfp4(torch.tensor(700.0))),
    "mxfp4": (activations.mxfp4, lambda vllm: vllm.mxfp4),
    "mxfp8": (activations.mxfp8, lambda vllm: vllm.mxfp8),
    "fp8 static": (activations.fp8_static(torch.tensor(0.013)), lambda vllm: vllm.fp8_static(torch.tensor(0.013))),
    "fp8 token": (activations.fp8_token, lambda vllm: vllm.fp8_token),
    "fp8 tensor": (activations.fp8_tensor, lambda vllm: vllm.fp8_tensor),
    "fp8 columns": (activations.fp8_columns(128), lambda vllm: vllm.fp8_blocks(128)),
    "fp8 odd columns": (activations.fp8_columns(96), lambda vllm: vllm.fp8_blocks(96)),
    "int8 token": (activations.int8_token, lambda vllm: vllm.int8_token),
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_formula_is_that_of_the_emulation(name: str) -> None:
    """Bit for bit, for every dtype and shape."""
    mine, theirs = PAIRS[name][0], PAIRS[name][1](emulation())
    for x in samples():
        found = mine(x)
        assert (found.dtype, found.shape) == (x.dtype, x.shape)
        assert torch.equal(found, theirs(x))


def test_static_int8_is_a_grid_that_ends() -> None:
    x = torch.tensor([[-300.0, -1.26, 0.0, 0.74, 126.4, 900.0]])
    assert activations.int8_static(torch.tensor(0.5))(x).tolist() == [[-64.0, -1.5, 0.0, 0.5, 63.5, 63.5]]


def test_a_scale_made_of_the_largest_magnitude_cuts_nothing_off() -> None:
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1)).float()
    amax = x.abs().max()
    for quantize in (activations.nvfp4(2688 / amax), activations.fp8_static(amax / 448)):
        assert float((quantize(x) - x).abs().max()) <= float(amax) / 6
        assert float(quantize(x).abs().max()) == pytest.approx(float(amax), rel=0.07)


KINDS = {
    ("nvfp4", None): None, ("nvfp4", 4): "NVFP4", ("mxfp4", None): None, ("mxfp4", 8): "FP8 per token",
    ("mxfp4", 4): "MXFP4", ("mxfp8", None): "MXFP8", ("mxfp8", 16): None, ("fp8", None): "FP8 per tensor",
    ("fp8_dynamic", None): "FP8 per token", ("fp8_block", None): "FP8 per 128 columns", ("w4a16", None): None,
    ("w8a16", None): None, ("int8", None): "INT8 per token",
}  # fmt: skip


@pytest.mark.parametrize(("name", "bits"), KINDS)
def test_every_config_that_is_written_is_understood(name: str, bits: int | None) -> None:
    """compressed-tensors, in the words of the formats themselves."""
    form = build(Scheme(name, bits), "compressed-tensors")
    assert form is not None
    config = compressed_tensors.config([(form.group, ["Linear"])], [], kv_cache=False)
    wish = wish_of(config, "model.layers.0.mlp.up_proj", name)
    assert (None if wish is None else wish.kind) == KINDS[name, bits]


def test_the_table_of_kinds_has_every_format() -> None:
    assert {name for name, _ in KINDS} == set(FORMATS)


@pytest.mark.parametrize("algo", MODELOPT)
def test_modelopt_algorithms_mean_what_vllm_makes_of_them(algo: str) -> None:
    wish = wish_of(modelopt.config([(algo, ["a"])], [], kv_cache=False), "a", "fp8")
    assert (None if wish is None else wish.kind) == MODELOPT[algo]
    if wish is not None:
        assert wish.static == (algo in ("FP8", "NVFP4"))
        assert wish.suffix == "input_scale"


def test_other_methods() -> None:
    assert wish_of(deepseek.config([]), "a", "fp8") == Wish("FP8 per 128 columns", columns=128)
    fp8 = {"quant_method": "fp8", "activation_scheme": "static"}
    assert wish_of(fp8, "a", "fp8") == Wish("FP8 static")
    assert wish_of({**fp8, "activation_scheme": "dynamic"}, "a", "fp8") == Wish("FP8 per token")
    assert wish_of({"quant_method": "awq"}, "a", "int4") is None
    assert wish_of({}, "a", "int4") is None


INT8 = {"type": "int", "num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}


@pytest.mark.parametrize(
    "inputs",
    [
        {**INT8, "symmetric": False},
        {**INT8, "num_bits": 4},
        {**INT8, "strategy": "channel"},
        {**INT8, "type": "float", "num_bits": 4, "group_size": 64},
        {**INT8, "type": "float", "dynamic": False},
        "yes",
    ],
)
def test_unknown_activations_are_refused_with_the_way_out(inputs: Any) -> None:
    with pytest.raises(CheckpointError, match=r"model\.a: config\.json says .*; --weights_only"):
        of_arguments(inputs, "model.a")


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "int4"),
        ({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "mxfp4"),
        ({"quant_method": "quark"}, "mxfp4"),
    ],
)
def test_unknown_methods_are_refused_with_the_way_out(config: dict[str, Any], scheme: str) -> None:
    with pytest.raises(CheckpointError, match="--weights_only"):
        wish_of(config, "model.a", scheme)


def scales(wish: Wish, values: dict[str, float]) -> dict[str, activations.Quantizer]:
    """Quantizers of modules with these stored scales."""
    return quantizers(dict.fromkeys(values, wish), lambda name: torch.tensor(values[name.rpartition(".")[0]]))


def like(first: activations.Quantizer, second: activations.Quantizer) -> bool:
    """Do two quantizers give the same numbers?"""
    return all(torch.equal(first(x), second(x)) for x in samples())


def test_fused_layers_have_one_scale_as_vllm_makes_it() -> None:
    """compressed-tensors: the largest divisor; ModelOpt: the largest multiplier; others keep their own."""
    values = {"layers.0.attn.q_proj": 10.0, "layers.0.attn.k_proj": 30.0, "layers.0.attn.o_proj": 20.0}
    found = scales(Wish("NVFP4", divisor=True), values)
    assert found["layers.0.attn.q_proj"] is found["layers.0.attn.k_proj"]
    assert like(found["layers.0.attn.q_proj"], activations.nvfp4(torch.tensor(30.0)))
    assert like(found["layers.0.attn.o_proj"], activations.nvfp4(torch.tensor(20.0)))
    found = scales(Wish("NVFP4"), {name: 1 / value for name, value in values.items()})
    assert like(found["layers.0.attn.k_proj"], activations.nvfp4(torch.tensor(10.0)))
    found = scales(Wish("FP8 static"), values)
    assert like(found["layers.0.attn.q_proj"], activations.fp8_static(torch.tensor(30.0)))


def test_experts_have_one_scale_for_gate_and_up_and_one_for_down() -> None:
    """The largest multiplier of all of them, which is the smallest divisor."""
    bank = "model.layers.0.mlp.experts"
    values = {f"{bank}.0.gate_proj": 40.0, f"{bank}.0.up_proj": 40.0, f"{bank}.0.down_proj": 8.0,
              f"{bank}.1.gate_proj": 16.0, f"{bank}.1.up_proj": 16.0, f"{bank}.1.down_proj": 2.0}  # fmt: skip
    found = scales(Wish("NVFP4", divisor=True), values)
    assert found[f"{bank}.0.gate_proj"] is found[f"{bank}.1.up_proj"]
    assert like(found[f"{bank}.0.gate_proj"], activations.nvfp4(torch.tensor(16.0)))
    assert like(found[f"{bank}.0.down_proj"], activations.nvfp4(torch.tensor(2.0)))
    found = scales(Wish("FP8 static"), values)
    assert like(found[f"{bank}.1.down_proj"], activations.fp8_static(torch.tensor(8.0)))
