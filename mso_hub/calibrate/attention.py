"""Keys and values as they enter the KV cache.

Ordinary attention caches what its attention function gets: keys after rotary embedding and norms. Latent attention
(DeepSeek) computes whole keys from a latent; vLLM caches the normed latent with the rotary part behind it, under one
scale, `k_scale`, so that is what is told for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mso_hub.calibrate import transformers_api as api
from mso_hub.calibrate.observer import Watch


class Attention:
    """Knows the attention modules of the layer in memory.

    names  attention module -> its stored name
    """

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._names: dict[nn.Module, str] = {}
        self._latent: dict[nn.Module, Tensor] = {}

    @contextmanager
    def among(self, modules: dict[nn.Module, str]) -> Iterator[None]:
        """Within the block, these modules (with their stored names) are watched."""
        if not self._watch.sees_attention:
            yield
            return
        self._names |= modules
        latent = [(m, m.kv_a_layernorm) for m in modules if is_latent(m)]
        handles = [norm.register_forward_hook(self._keep(module)) for module, norm in latent]  # type: ignore[union-attr]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in modules:
                self._names.pop(module, None)
                self._latent.pop(module, None)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block attention functions tell what they get."""
        if not self._watch.sees_attention:
            yield
            return
        with api.watch_attention(self._seen):
            yield

    def _keep(self, module: nn.Module) -> Any:
        def after(_norm: nn.Module, _args: Any, output: Tensor) -> None:
            self._latent[module] = output

        return after

    def _seen(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        name = self._names.get(module)
        if name is None:
            return key, value
        latent = self._latent.pop(module, None)
        if latent is None:
            return self._watch.keys_values(name, key, value) or (key, value)
        turning = int(module.qk_rope_head_dim)  # type: ignore[arg-type]
        rotary = key[:, 0, :, -turning:]  # the same for every head
        self._watch.keys_values(name, torch.cat([latent, rotary], -1), latent)
        return key, value


def is_latent(module: nn.Module) -> bool:
    """Does an attention module compute keys and values from a normed latent, with the rotary part last in a key?"""
    return all(hasattr(module, name) for name in ("kv_a_layernorm", "kv_a_proj_with_mqa", "qk_rope_head_dim"))


def attention_names(layer: nn.Module, stored: dict[nn.Module, str]) -> dict[nn.Module, str]:
    """Modules with linear layers right below them -> stored name, taken from those of the linear layers.

    stored  linear layer -> stored name
    """
    found: dict[nn.Module, str] = {}
    for module in layer.modules():
        below = next((stored[child] for child in module.children() if child in stored), None)
        if below is not None:
            found[module] = below.rpartition(".")[0]
    return found
