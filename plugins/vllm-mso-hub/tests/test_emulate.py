"""Generating on a CPU in formats that vLLM has no CPU kernel for: real checkpoints, vLLM's own loading, one process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models import TRAINED, converted
from mso_hub import Recipe, convert, read_recipe
from vllm_mso_hub.emulate import activations
from vllm_mso_hub.emulate.moe import _Loop
from vllm_mso_hub.generate import run

PROMPTS = [[(37 * place + 11) % 128 for place in range(40)], [9, 9, 8]]
HELDOUT = TRAINED.parent / "tiny-qwen3-moe-token-ids.safetensors"


def _generate(folder: Path, prompts: list[list[int]] = PROMPTS, max_tokens: int = 8) -> dict[str, Any]:
    return run(
        {
            "version": 1, "name": folder.name, "folder": str(folder), "prompts": prompts, "max_tokens": max_tokens,
            "tp": 1, "emulate": True, "max_model_len": 256,
        }
    )  # fmt: skip


def _recipe(**settings: Any) -> Recipe:
    return Recipe(**{"mode": "all-linear", **settings})


WEIGHT_ONLY = {
    "nvfp4": _recipe(scheme="nvfp4"),
    "nvfp4 modelopt": _recipe(scheme="nvfp4", layout="modelopt"),
    "mxfp4": _recipe(scheme="mxfp4"),
    "mxfp8": _recipe(scheme="mxfp8", activations=16),
    "w8a16": _recipe(scheme="w8a16", group_size=32, symmetric=False),
    "w4a16 experts": read_recipe("w4a16_g32_experts"),
}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *(("llama", name) for name in ("nvfp4", "nvfp4 modelopt", "mxfp4", "mxfp8", "w8a16")),
        *(("qwen3_moe", name) for name in WEIGHT_ONLY),
        ("deepseek_v3", "nvfp4"),
    ],
)
def test_a_weight_only_checkpoint_answers_like_its_decompressed_twin(
    model: str, name: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """The same tokens and the same log-likelihood of every token of the prompt, to the last bit."""
    quantized = converted(tiny(model), WEIGHT_ONLY[name], tmp_path / "quantized")
    convert(quantized, tmp_path / "dense", Recipe(scheme="bf16"))
    ours, theirs = _generate(quantized), _generate(tmp_path / "dense")
    assert ours["outputs"] == theirs["outputs"]
    assert any("Emulated" in kernel or "dequantized" in kernel for kernel in ours["kernels"])


NATS = {
    # nats a token, of the trained model on text that it never saw, more than in BF16: about three times what it is
    "nvfp4": (_recipe(scheme="nvfp4"), 0.01),
    "nvfp4, activations too": (_recipe(scheme="nvfp4", activations=4), 0.01),
    "mxfp4, activations too": (_recipe(scheme="mxfp4", activations=4), 0.07),
    "mxfp8": (_recipe(scheme="mxfp8"), 0.01),
    "fp8 of the checkpoint": (_recipe(scheme="fp8", input_scale=1.0), 0.01),
    "fp8 in blocks": (_recipe(scheme="fp8_block", layout="deepseek"), 0.01),
    "int8": (_recipe(scheme="int8"), 0.01),
}


@pytest.fixture(scope="module")
def heldout() -> list[list[int]]:
    """Eight pieces of 200 tokens."""
    with safe_open(HELDOUT, "pt") as file:
        ids = file.get_tensor("heldout_ids")[:1600]
    return ids.reshape(8, 200).tolist()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def nats_of_bf16(heldout: list[list[int]]) -> float:
    """Mean negative log-likelihood of a token, without quantization."""
    return _nats(_generate(TRAINED, heldout, 1))


def _nats(report: dict[str, Any]) -> float:
    return float(sum(output["prompt_nll"] for output in report["outputs"]) / len(report["outputs"]))


@pytest.mark.parametrize("name", NATS)
def test_a_trained_model_keeps_its_likelihood(
    name: str, heldout: list[list[int]], nats_of_bf16: float, tmp_path: Path
) -> None:
    recipe, most = NATS[name]
    report = _generate(converted(TRAINED, recipe, tmp_path / "quantized"), heldout, 1)
    assert abs(_nats(report) - nats_of_bf16) < most


def _rewritten(source: Path, out: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A checkpoint of one file with some tensors changed."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    save_file({name: change(name, tensor) for name, tensor in tensors.items()}, out / "model.safetensors")
    return out


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("model", ["llama", "qwen3_moe"])
def test_gate_and_up_share_a_global_scale_as_in_vllm(
    model: str, layout: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Dense layers take the largest stored number, experts that of gate: a smaller one of up changes nothing."""
    number = "weight_global_scale" if layout == "compressed-tensors" else "weight_scale_2"

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor / 2 if name.endswith(f"up_proj.{number}") else tensor

    good = converted(tiny(model), _recipe(scheme="nvfp4", layout=layout), tmp_path / "good")
    odd = _rewritten(good, tmp_path / "odd", change)
    assert _generate(odd)["outputs"] == _generate(good)["outputs"]


def test_the_loop_over_experts_computes_a_mixture_of_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w13, w2 = (torch.randn(shape, generator=generator) for shape in ((5, 32), (3, 128, 32), (3, 32, 64)))
    ids, share = torch.tensor([[0, 2], [2, 1], [1, 0], [0, 1], [2, 0]]), torch.rand(5, 2, generator=generator)
    first, second = activations.fp8_token, activations.int8_token

    def silu_and_mul(_kind: str, out: torch.Tensor, both: torch.Tensor) -> None:
        gate, up = both.chunk(2, -1)
        out.copy_(torch.nn.functional.silu(gate) * up)

    layer = SimpleNamespace(first=first, second=second, w1_bias=None, w2_bias=None, activation=silu_and_mul)
    output = torch.empty_like(x)
    _Loop.apply(layer, output, x, w13, w2, share, ids, "silu")  # type: ignore[arg-type]
    expected = torch.zeros_like(x)
    for token in range(5):
        for slot in range(2):
            expert = int(ids[token, slot])
            gate, up = (w13[expert] @ first(x)[token]).chunk(2)
            middle = second((torch.nn.functional.silu(gate) * up)[None])[0]
            expected[token] += share[token, slot] * (w2[expert] @ middle)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
