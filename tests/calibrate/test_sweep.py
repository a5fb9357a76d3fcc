"""Contract with transformers: on every architecture a walk does, bit for bit, what the whole model does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mso_hub.calibrate.walk import Layer, Observer, Walk
from mso_hub.source import open_source
from tests.calibrate.architectures import ARCHITECTURES, quiet_transformers, save, token_ids
from tests.calibrate.reference import Truth, run_whole

BATCHES = [token_ids(2, 12), token_ids(2, 12, 1), token_ids(1, 9, 2)]
HIDDEN_AROUND = ("embed_tokens", "wte")
"""Embeddings that are the head too: stored once, under the embedding's name."""
ONLY_F32 = {"deepseek_v4"}
"""transformers 5.17 itself fails in BF16; 5.23 does not."""
NO_LINEARS = ("gate", "router", "layer", "hc_fn", "hc_attn_fn", "hc_ffn_fn")
"""What multiplies without being a linear layer: routers and hyper-connections, which nobody quantizes."""


class Record(Observer):
    """Everything that a walk shows, and the outputs of every layer."""

    changes_weights = True  # so that the inputs of a layer are still there when it ends

    def __init__(self, batches: int) -> None:
        self.amax: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self.hidden: list[list[Tensor]] = [[] for _ in range(batches)]

    def inputs(self, module: str, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        self.amax[module] = max(self.amax.get(module, 0.0), float(rows.abs().max()))
        self.tokens[module] = self.tokens.get(module, 0) + len(rows)
        return x

    def end_layer(self, layer: Layer) -> bool:
        for number, kept in enumerate(self.hidden):
            kept.append(layer.forward(number).clone())
        return False


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Without transformers' advice about kernels that are not installed."""
    with quiet_transformers():
        yield


def walk(folder: Path, *, experts: str, attention: str | None = None) -> tuple[Walk, Record, list[Tensor]]:
    """All batches through a checkpoint -> what was seen, and the logits."""
    found = Walk(open_source(folder), experts=experts, attention=attention)
    record, last = Record(len(BATCHES)), dict[int, Tensor]()
    found.run(BATCHES, record, logits=last.__setitem__)
    return found, record, [torch.cat(list(found.head(last[number])), 1) for number in range(len(BATCHES))]


def require_same(found: Walk, record: Record, logits: list[Tensor], truth: Truth) -> None:
    """Hidden states of every layer, logits, maxima and counts, all of them, bit for bit."""
    for ours, theirs in zip(record.hidden, truth.hidden, strict=True):
        assert [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)] == [True] * found.layers
    assert [torch.equal(a, b) for a, b in zip(logits, truth.logits, strict=True)] == [True] * len(BATCHES)
    amax, tokens = dict(truth.amax), dict(truth.tokens)
    for name in [n for n in amax if n.endswith(HIDDEN_AROUND)]:
        amax["lm_head"], tokens["lm_head"] = amax.pop(name), tokens.pop(name)
    others = {name for name in amax if name not in found.modules}
    assert all(name.rpartition(".")[2] in NO_LINEARS for name in others), others
    assert record.amax == {name: value for name, value in amax.items() if name not in others}
    assert record.tokens == {name: value for name, value in tokens.items() if name not in others}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_walk_equals_the_whole_model_bit_for_bit(name: str, tmp_path: Path) -> None:
    """In BF16, as most checkpoints are; with experts one at a time and all at once."""
    dtype = torch.float32 if name in ONLY_F32 else torch.bfloat16
    folder = save(name, tmp_path, dtype)
    truth = run_whole(folder, ARCHITECTURES[name].model, BATCHES, dtype, None)
    for experts in ("expert", "stack"):
        require_same(*walk(folder, experts=experts), truth)


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma3n", "gemma4", "qwen3_moe", "deepseek_v3", "glm_moe_dsa", "gpt_oss"])
def test_f32_and_eager_attention_are_exact_too(name: str, attention: str | None, tmp_path: Path) -> None:
    folder = save(name, tmp_path)
    truth = run_whole(folder, ARCHITECTURES[name].model, BATCHES, torch.float32, attention)
    require_same(*walk(folder, experts="expert", attention=attention), truth)


def test_one_changed_weight_on_disk_is_seen(tmp_path: Path) -> None:
    """The negative control: the comparison above can fail."""
    folder = save("qwen3_moe", tmp_path, torch.bfloat16)
    truth = run_whole(folder, ARCHITECTURES["qwen3_moe"].model, BATCHES, torch.bfloat16, None)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.experts.3.up_proj.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for experts in ("expert", "stack"):
        found, record, logits = walk(folder, experts=experts)
        assert [torch.equal(a[1], b[1]) for a, b in zip(record.hidden, truth.hidden, strict=True)] == [True] * 3
        assert not all(torch.equal(a[2], b[2]) for a, b in zip(record.hidden, truth.hidden, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(logits, truth.logits, strict=True))
        assert found.modules
