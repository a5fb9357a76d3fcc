"""What is told about keys and values is what enters the KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mso_hub.calibrate.walk import Observer, Walk
from mso_hub.source import open_source
from tests.calibrate.architectures import ARCHITECTURES, quiet_transformers, save, token_ids

IDS = token_ids(2, 12)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Without transformers' bars."""
    with quiet_transformers():
        yield


class KeysValues(Observer):
    """Keys and values by module."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[Tensor, Tensor]] = {}

    def keys_values(self, module: str, k: Tensor, v: Tensor) -> None:
        assert module not in self.found
        self.found[module] = k.clone(), v.clone()


def cached(folder: Path, name: str, attention: str | None) -> Any:
    """The cache that the whole model fills."""
    import transformers

    more = {} if attention is None else {"attn_implementation": attention}
    load = getattr(transformers, ARCHITECTURES[name].model).from_pretrained
    model = load(folder, dtype=torch.float32, experts_implementation="eager", **more).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    # Without a config it keeps every token, also of sliding layers.
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt_oss", "gemma3", "phi3", "mixtral", "vlm-gemma3"])
def test_keys_and_values_are_those_of_the_cache(name: str, attention: str | None, tmp_path: Path) -> None:
    folder = save(name, tmp_path)
    seen = KeysValues()
    Walk(open_source(folder), attention=attention).run([IDS], seen)
    cache = cached(folder, name, attention)
    assert len(seen.found) == len(cache.layers)
    for number, (module, (k, v)) in enumerate(seen.found.items()):
        assert f"layers.{number}." in module
        assert module.endswith("attn")
        assert torch.equal(k, cache.layers[number].keys), module
        assert torch.equal(v, cache.layers[number].values), module


def test_hybrid_models_tell_their_attention_layers(tmp_path: Path) -> None:
    seen = KeysValues()
    Walk(open_source(save("qwen3_next", tmp_path))).run([IDS], seen)
    assert list(seen.found) == ["model.layers.1.self_attn"]


@pytest.mark.parametrize("name", ["deepseek_v3"])
def test_latent_attention_tells_the_latent_and_the_rotary_part(name: str, tmp_path: Path) -> None:
    """Transformers caches the two, as vLLM does, in the places of keys and values."""
    folder = save(name, tmp_path)
    seen = KeysValues()
    Walk(open_source(folder)).run([IDS], seen)
    cache = cached(folder, name, None)
    for number, (module, (k, v)) in enumerate(seen.found.items()):
        assert module == f"model.layers.{number}.self_attn"
        assert (k.shape, v.shape) == ((2, 12, 24), (2, 12, 16))
        assert torch.equal(v, cache.layers[number].keys[:, 0])
        assert torch.equal(k, torch.cat([v, cache.layers[number].values[:, 0]], -1))


def test_watching_changes_nothing_and_ends_with_the_run(tmp_path: Path) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    source = open_source(save("llama", tmp_path))
    plain: dict[int, Tensor] = {}
    watched: dict[int, Tensor] = {}
    Walk(source).run([IDS], Observer(), logits=plain.__setitem__)
    Walk(source).run([IDS], KeysValues(), logits=watched.__setitem__)
    assert torch.equal(plain[0], watched[0])
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)
