"""Does the quantized model still answer? The trained model there and back, on text that it never saw.

KL divergence of the next-token distributions, original against result, averaged over tokens, and how often the
first choice is the same. Perplexity alone is too noisy on a few thousand tokens.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from mso_hub.pipeline import convert
from mso_hub.plan import Recipe

MODELS = Path(__file__).parent / "models"
REAL = MODELS / "tiny-qwen3-moe"
SEQUENCE, TOKENS = 128, 4096
KL, AGREEMENT = 0.006, 0.93
"""Limits; measured: 0.0023 and 0.960 with absmax, 0.0019 and 0.962 with mse."""


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """Held-out text, 32 sequences of 128 tokens."""
    flat = load_file(MODELS / "tiny-qwen3-moe-token-ids.safetensors")["heldout_ids"]
    return flat[:TOKENS].long().view(-1, SEQUENCE)


def predictions(folder: Path, ids: Tensor) -> Tensor:
    """Log-probabilities [tokens, vocabulary] of the checkpoint in a folder, computed in F32."""
    model, remarks = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(remarks.values()), remarks
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.flatten(0, 1).log_softmax(-1)


@pytest.fixture(scope="module")
def original(ids: Tensor) -> Tensor:
    """What the BF16 model predicts; it must be a model that predicts something."""
    found = predictions(REAL, ids)
    following = found.view(*ids.shape, -1)[:, :-1].gather(-1, ids[:, 1:, None])
    assert following.mean().neg().exp() < 100  # of 2,048 tokens
    return found


def distance(original: Tensor, result: Tensor) -> tuple[float, float]:
    """KL per token, and the share of tokens with the same first choice."""
    kl = torch.nn.functional.kl_div(result, original, reduction="batchmean", log_target=True)
    return kl.item(), (original.argmax(-1) == result.argmax(-1)).float().mean().item()


def there_and_back(recipe: Recipe, folder: Path) -> Path:
    """Quantized, then BF16 again."""
    convert(REAL, folder / "packed", recipe)
    convert(folder / "packed", folder / "dense", Recipe(scheme="bf16"))
    return folder / "dense"


@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_nvfp4_answers_like_the_original(
    search: str, layout: str, ids: Tensor, original: Tensor, tmp_path: Path
) -> None:
    """All 112 linear layers in four bits."""
    dense = there_and_back(Recipe(mode="all-linear", layout=layout, scale_search=search), tmp_path)
    kl, agreement = distance(original, predictions(dense, ids))
    assert 0 < kl < KL
    assert agreement > AGREEMENT


def test_search_and_smaller_targets_are_closer(ids: Tensor, original: Tensor, tmp_path: Path) -> None:
    """Less weight error is less KL: searched scales beat ModelOpt's, the experts alone beat all layers."""
    kl = {}
    recipes = {
        "absmax": Recipe(mode="all-linear", scale_search="absmax"),
        "mse": Recipe(mode="all-linear"),
        "experts": Recipe(),
    }
    for name, recipe in recipes.items():
        kl[name], _ = distance(original, predictions(there_and_back(recipe, tmp_path / name), ids))
    assert kl["mse"] < kl["absmax"]
    assert kl["experts"] < kl["absmax"]


def test_the_measure_sees_a_swapped_nibble(ids: Tensor, original: Tensor, tmp_path: Path) -> None:
    """The control: with odd and even columns exchanged the model is ruined, and these numbers say so."""
    convert(REAL, tmp_path / "packed", Recipe())
    for path in (tmp_path / "packed").glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("weight_packed"):
                tensors[name] = (tensor >> 4) | (tensor << 4)
        save_file(tensors, path, metadata={"format": "pt"})
    convert(tmp_path / "packed", tmp_path / "dense", Recipe(scheme="bf16"))
    kl, agreement = distance(original, predictions(tmp_path / "dense", ids))
    assert kl > 100 * KL
    assert agreement < 0.6
