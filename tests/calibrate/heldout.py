"""Text that the small trained model never saw, as rows; and what the whole model under transformers makes of it."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from mso_hub.calibrate.text import Rows
from mso_hub.calibrate.text.rows import digest

MODELS = Path(__file__).resolve().parents[1] / "models"
REAL = MODELS / "tiny-qwen3-moe"
LENGTH = 128


def heldout(tokens: int = 4096, length: int = LENGTH, batch: int = 16) -> Rows:
    """Rows of equal length."""
    flat = load_file(MODELS / "tiny-qwen3-moe-token-ids.safetensors")["heldout_ids"].long()
    sequences = tuple(flat[: tokens // length * length].view(-1, length).numpy())
    return Rows("held-out text", sequences, digest(sequences), (), (), batch)


def logits(folder: Path, rows: Rows) -> list[Tensor]:
    """[rows, length, V] of every batch, by the whole model in the dtype that its config says."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa", experts_implementation="eager"
    )
    with torch.no_grad():
        return [model.eval()(input_ids=torch.from_numpy(batch)).logits for batch in rows.batches()]


def divergence(original: list[Tensor], result: list[Tensor]) -> tuple[float, float]:
    """KL per token in nats and the share of equal first choices, of all logits at once."""
    first, second = (torch.cat([part.flatten(0, 1) for part in parts]).float() for parts in (original, result))
    kl = torch.nn.functional.kl_div(second.log_softmax(-1), first.log_softmax(-1), reduction="none", log_target=True)
    return kl.sum(-1).double().mean().item(), (first.argmax(-1) == second.argmax(-1)).double().mean().item()


def perplexity(rows: Rows, found: list[Tensor]) -> float:
    """Of all tokens but the first of each row."""
    nats = [
        torch.nn.functional.cross_entropy(part[:, :-1].float().flatten(0, 1), torch.from_numpy(ids)[:, 1:].flatten())
        for part, ids in zip(found, rows.batches(), strict=True)
    ]
    return float(torch.stack(nats).double().mean().exp())
