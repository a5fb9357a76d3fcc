"""What cannot be checked, and what a healthy checkpoint may hold without anybody reading it: one sentence each."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from vllm_mso_hub.compat import version
from vllm_mso_hub.job import Job, Problem, Refusal
from vllm_mso_hub.shapes.stream import in_tower, layer_of

_REMOTE_CODE = re.compile(r"trust[_-]remote[_-]code|requires you to execute|contains custom code", re.IGNORECASE)
_ARCHITECTURE = re.compile(r"architectures? .*not supported|does not recognize this arch")
_PYDANTIC = re.compile(r"^\w+: \d+ validation errors? for \w+ (Value error, )?")
_ADVICE = re.compile(r" (Supported architectures: |This could be because |You can update Transformers ).*")
_UNUSED = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|rotary_pos_emb\.inv_freq$"
    r"|\.(k|v|q|kv|prob)_scale$|\.[kvq]_proj\.output_scale$|\.(k|v)_zero_point$"
    r"|\.weight_shape$|\.(weight_)?g_idx$|(^|\.)mtp\."
)


def refusal(job: Job, text: str, log: str) -> Refusal:
    """Why the configuration of a whole checkpoint does not resolve: vLLM's text after words of ours."""
    if _REMOTE_CODE.search(text) and not job.trust_remote_code:
        message = f"{job.name} needs Python of its own (auto_map in config.json) and none of it was run"
        return Refusal("remote_code", f"{message}; look at it and pass --trust_remote_code")
    reason = _ADVICE.sub("", _PYDANTIC.sub("", text))
    if "failed to be inspected" in text:
        return Refusal("architecture", f"vLLM {version()} cannot import its model for {job.name}: {log or reason}")
    if _ARCHITECTURE.search(text):
        return Refusal("architecture", f"vLLM {version()} has no model for {job.name}: {reason}")
    return Refusal("config", f"vLLM {version()} refuses the configuration of {job.name}: {reason}")


def config_problem(base: Any, tp: int, ranks: tuple[int, ...], text: str, log: str) -> Problem:
    """Why one world does not come up, with the tensor-parallel sizes that the heads allow where that is the reason."""
    heads, kv_heads = _heads(base)
    if heads % tp or (kv_heads % tp and tp % kv_heads):
        sizes = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
        fits = ", ".join(map(str, sizes))
        message = (
            f"tensor-parallel size {tp} does not divide the model's {heads} attention heads and {kv_heads} key-value "
            f"heads; sizes that fit are {fits}"
        )
        return Problem("config", "", "", ranks, f"one of {fits}", str(tp), message)
    text = _PYDANTIC.sub("", text)
    reason = f" ({log})" if log else ""
    return Problem(
        "config", "", "", ranks, "a world that vLLM sets up", text, f"vLLM cannot set this up: {text}{reason}"
    )


def _heads(base: Any) -> tuple[int, int]:
    model = base.model_config
    heads = int(model.model_arch_config.total_num_attention_heads)
    return heads, heads if model.use_mla else int(model.get_total_num_kv_heads())


def left_alone(base: Any) -> Callable[[str], bool]:
    """Which tensors a healthy model leaves unread.

    Caches, KV scales, drafting layers, a head that is the embedding, and the last layers of a tower that sees or hears,
    where the model takes its features from an earlier one.
    """
    text = base.model_config.hf_text_config
    layers = int(getattr(text, "num_hidden_layers", 0) or 0)
    drafting = int(getattr(text, "num_nextn_predict_layers", 0) or 0)
    tied = any(getattr(config, "tie_word_embeddings", False) for config in (text, base.model_config.hf_config))

    def may_be_left(name: str) -> bool:
        layer = layer_of(name)
        if layer is not None and layers <= layer < layers + drafting:
            return True
        return bool(_UNUSED.search(name)) or in_tower(name) or (tied and "lm_head." in name)

    return may_be_left
