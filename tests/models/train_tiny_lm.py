"""Train a small mixture-of-experts language model on text that ships with CPython, so without a download.

    python tests/models/train_tiny_lm.py --output /tmp/tiny-qwen3-moe --seconds 280

It needs transformers. Two cores and five minutes give a held-out perplexity near 57 (2,048 is chance). Beside
the checkpoint it writes `<output>-token-ids.safetensors` with the ids for calibration and for evaluation.
"""

from __future__ import annotations

import argparse
import ast
import math
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig

VOCAB = 2048
END = "<|end|>"  # token 0, after every document
SEQUENCE, BATCH = 128, 16
PEAK_RATE, WARMUP_STEPS = 2e-3, 50
HELDOUT_SHARE = 20  # one document in so many is never trained on
CALIBRATION_TOKENS = 65_536
SHORTEST_DOCSTRING = 200

CONFIG = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "router_aux_loss_coef": 0.01,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def documents() -> list[str]:
    """The topics of `help()` and the longer docstrings of the standard library, each text once."""
    texts = [text for _, text in sorted(topics.topics.items())]
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        folders = path.relative_to(library).parts[:-1]
        skipped = any(folder == "site-packages" or folder.startswith("test") for folder in folders)
        if not skipped and path.name != "topics.py":
            texts.extend(docstrings(path))
    return list(dict.fromkeys(texts))


def docstrings(path: Path) -> Iterator[str]:
    """Docstrings of one file that are long enough to read; none if the file is not valid Python."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # templates of lib2to3 and the like
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) > SHORTEST_DOCSTRING:
                yield text


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: no text is out of its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """All texts as one row of ids, I64 [tokens], with END after each."""
    end = tokenizer.token_to_id(END)
    return torch.tensor([token for text in texts for token in (*tokenizer.encode(text).ids, end)])


def learning_rate(step: int, progress: float) -> float:
    """Linear warm-up, then a cosine down to a twentieth; `progress` is the share of the time so far."""
    return PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (0.05 + 0.475 * (1 + math.cos(math.pi * progress)))


def train(model: torch.nn.Module, ids: Tensor, seconds: float) -> int:
    """Train for a given time on random windows of `ids`; returns the number of steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    generator = torch.Generator().manual_seed(1)
    model.train()
    start, step = time.monotonic(), 0
    while (progress := (time.monotonic() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress)
        offsets = torch.randint(0, len(ids) - SEQUENCE - 1, (BATCH,), generator=generator).tolist()
        batch = torch.stack([ids[offset : offset + SEQUENCE] for offset in offsets])
        loss = model(input_ids=batch, labels=batch, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {progress:.0%} of the time", flush=True)
    return step


@torch.inference_mode()
def perplexity(model: torch.nn.Module, ids: Tensor) -> float:
    """exp of the mean loss over consecutive windows of `ids`."""
    model.eval()
    windows = ids[: len(ids) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)
    losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in torch.split(windows, BATCH)]
    return math.exp(sum(losses) / len(windows))


def main() -> None:
    """Tokenize, train, save, and report the perplexity of what was saved."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, required=True, help="a new folder for the checkpoint")
    parser.add_argument("--seconds", type=float, default=280.0, help="how long to train")
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output} exists; name a new folder")

    texts = documents()
    random.Random(0).shuffle(texts)
    count = max(1, len(texts) // HELDOUT_SHARE)
    heldout, training = texts[:count], texts[count:]
    tokenizer = train_tokenizer(training)
    training_ids, heldout_ids = encode(tokenizer, training), encode(tokenizer, heldout)
    print(f"{len(texts)} documents, {len(training_ids)} tokens to train on, {len(heldout_ids)} held out")

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(**CONFIG), dtype=torch.float32, experts_implementation="eager"
    )
    steps = train(model, training_ids, options.seconds)
    model.to(torch.bfloat16)
    model.save_pretrained(options.output, max_shard_size="2MB")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        model_max_length=CONFIG["max_position_embeddings"],
    ).save_pretrained(options.output)
    ids = {"calibration_ids": training_ids[:CALIBRATION_TOKENS].int(), "heldout_ids": heldout_ids.int()}
    save_file(ids, options.output.with_name(f"{options.output.name}-token-ids.safetensors"))
    print(f"{steps} steps, held-out perplexity {perplexity(model, heldout_ids):.1f}, saved to {options.output}")


if __name__ == "__main__":
    main()
