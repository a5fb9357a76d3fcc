"""Which scale search answers most like the original: the small trained model in every format, on held-out text.

    python -m tests.benchmarks.bench_quality

KL divergence of the next-token distributions, BF16 model against the dequantized one, averaged over the tokens of
two halves of the text (their difference tells how far to trust a gap), and how often the first choice is the same.
The default search of a format is the one with the least KL here; where two are within the halves' difference it is
the one with the least squared error.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from mso_hub.formats import FORMATS
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from tests.benchmarks.runners import machine, table
from tests.benchmarks.variants import variants

MODELS = Path(__file__).resolve().parent.parent / "models"
REAL = MODELS / "tiny-qwen3-moe"
SEQUENCE, TOKENS = 128, 16384


def predictions(folder: Path, ids: Tensor) -> Tensor:
    """Log-probabilities [tokens, vocabulary] of the checkpoint in a folder, computed in F32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = [model.eval()(input_ids=part).logits.flatten(0, 1) for part in ids.view(-1, 16, SEQUENCE)]
    return torch.cat([part.log_softmax(-1) for part in logits])


def kl(original: Tensor, result: Tensor) -> float:
    """Per token."""
    return torch.nn.functional.kl_div(result, original, reduction="batchmean", log_target=True).item()


def main() -> None:
    """Print the table."""
    flat = load_file(MODELS / "tiny-qwen3-moe-token-ids.safetensors")["heldout_ids"]
    ids = flat[: min(TOKENS, len(flat) // SEQUENCE * SEQUENCE)].long().view(-1, SEQUENCE)
    original = predictions(REAL, ids)
    half = len(original) // 2
    rows = []
    for label, search, form in variants():
        recipe = Recipe(
            scheme=form.name, mode="all-linear", scale_search=search,
            group_size=getattr(form, "group_size", None) if FORMATS[form.name].choices.group_sizes else None,
            symmetric=False if getattr(form, "symmetric", True) is False else None,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            convert(REAL, folder / "packed", recipe)
            convert(folder / "packed", folder / "dense", Recipe(scheme="bf16"))
            result = predictions(folder / "dense", ids)
        whole, first, second = (
            kl(original, result),
            *(kl(original[h], result[h]) for h in (slice(half), slice(half, None))),
        )
        same = (original.argmax(-1) == result.argmax(-1)).float().mean().item()
        default = "default" if FORMATS[form.name].choices.searches[0] == search else ""
        rows.append((label, search, f"{whole:.6f}", f"{first:.6f}", f"{second:.6f}", f"{100 * same:.2f} %", default))
        print("  ".join(rows[-1]), flush=True)
    print(f"\n{len(original):,} tokens, every linear layer; {machine()}\n")
    print(table(("format", "scales", "KL", "first half", "second half", "same first choice", ""), rows))


if __name__ == "__main__":
    main()
