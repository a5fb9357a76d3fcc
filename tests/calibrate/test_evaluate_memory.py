"""Two models and a large vocabulary: what is in memory while they are compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import transformers

from mso_hub.calibrate.evaluate import evaluate
from mso_hub.calibrate.text import Rows
from tests.calibrate.anonymous import anonymous_bytes, peak_memory
from tests.calibrate.architectures import quiet_transformers

VOCABULARY, LENGTH, ROWS = 1 << 16, 256, 8


def rows(count: int) -> Rows:
    """Random text."""
    generator = np.random.default_rng(3)
    sequences = tuple(generator.integers(0, VOCABULARY, LENGTH) for _ in range(count))
    return Rows("random", sequences, "", (), (), 4)


def test_logits_are_never_whole(tmp_path: Path) -> None:
    """All logits of one model would be 512 MiB in F32; what is added to the process is less than half of that."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    whole = 4 * VOCABULARY * LENGTH * ROWS
    with quiet_transformers():
        transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
        evaluate(tmp_path, rows(1), against=tmp_path)  # what libraries keep for themselves
        before = anonymous_bytes()
        with peak_memory() as peak:
            found = evaluate(tmp_path, rows(ROWS), against=tmp_path)
    assert found.reference is not None
    assert found.reference.kl == 0
    assert peak.nbytes - before < whole / 2
