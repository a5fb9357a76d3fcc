"""What the tests of methods share: the small trained model, its text, and how far a result is from the original."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from mso_hub.calibrate.methods.gptq import Hessian
from mso_hub.calibrate.observer import Observer
from mso_hub.calibrate.walk import Walk
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from mso_hub.source import Source, open_source

MODELS = Path(__file__).resolve().parent.parent / "models"
REAL = MODELS / "tiny-qwen3-moe"
IDS = MODELS / "tiny-qwen3-moe-token-ids.safetensors"
INT4 = Recipe(scheme="w4a16", mode="all-linear", group_size=32)


def calibration(tokens: int = 32768, length: int = 256) -> Tensor:
    """Ids from the training text, I64 [rows, length]."""
    return load_file(IDS)["calibration_ids"][:tokens].long().view(-1, length).contiguous()


def batches(tokens: int = 32768, rows: int = 16) -> list[Tensor]:
    """The same in batches."""
    return cut(calibration(tokens), rows)


def cut(ids: Tensor, rows: int) -> list[Tensor]:
    """Token ids in batches of so many rows."""
    return [ids[at : at + rows] for at in range(0, len(ids), rows)]


def heldout(tokens: int = 16384, length: int = 128) -> Tensor:
    """Ids of text that the model never saw."""
    return load_file(IDS)["heldout_ids"][:tokens].long().view(-1, length)


def predictions(folder: Path, ids: Tensor) -> Tensor:
    """Log-probabilities [tokens, vocabulary] of a dense checkpoint, in F32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        found = [model.eval()(input_ids=part).logits.flatten(0, 1).log_softmax(-1) for part in cut(ids, 16)]
    return torch.cat(found)


def kl(original: Tensor, result: Tensor) -> float:
    """Divergence per token."""
    return torch.nn.functional.kl_div(result, original, reduction="batchmean", log_target=True).item()


def kl_of(source: str | Path | Source, recipe: Recipe, original: Tensor, ids: Tensor, folder: Path) -> float:
    """Quantize, make dense again, compare."""
    convert(source, folder / "packed", recipe)
    convert(folder / "packed", folder / "dense", Recipe(scheme="bf16"))
    return kl(original, predictions(folder / "dense", ids))


class Inputs(Observer):
    """H of every linear layer, on the model as it is."""

    def __init__(self) -> None:
        self.hessians: dict[str, Hessian] = {}

    def inputs(self, module: str, x: Tensor) -> Tensor:
        """Add them up."""
        self.hessians.setdefault(module, Hessian(x.shape[-1], x.device)).add(x)
        return x


def real_inputs(text: list[Tensor]) -> dict[str, Hessian]:
    """H of every linear layer of the small model."""
    observer = Inputs()
    Walk(open_source(REAL)).run(text, observer)
    return observer.hessians
