"""llm-compressor's GPTQ, in its own environment: `python peer_gptq.py SOURCE TARGET IDS SCHEME`.

It is run by file name, with another interpreter, and imports nothing of this repository.

IDS     safetensors file with `ids`, I64 [rows, length]
SCHEME  JSON: weights of a config group, as compressed-tensors has them
"""

from __future__ import annotations

import json
import sys

import torch
import transformers
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file

IGNORE = ["lm_head", "re:.*mlp.gate$"]


def main(source: str, target: str, ids: str, scheme: str) -> None:
    """Quantize every linear layer; experts see the tokens that are routed to them."""
    torch.set_num_threads(1)
    rows = load_file(ids)["ids"]
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    weights = QuantizationArgs(**json.loads(scheme))
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    recipe = GPTQModifier(config_groups=groups, ignore=IGNORE, dampening_frac=0.01, block_size=128)
    dataset = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    oneshot(
        model=model, dataset=dataset, recipe=recipe, max_seq_length=rows.shape[1], num_calibration_samples=len(rows),
        shuffle_calibration_samples=False, moe_calibrate_all_experts=False, output_dir=target,
        tokenizer=source,
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
