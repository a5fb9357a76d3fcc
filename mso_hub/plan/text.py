"""Text-only extraction: which tensors and which config fields make up the language model.

A vision-language checkpoint wraps a language model that also exists on its own. Extraction is pure
renaming: `text_model` decides, from config.json and the tensor names alone, what the text-only
checkpoint is called and what it contains.

    config.json              nested text fields -> top level, `architectures` -> a class that exists
    language_model.model.*   -> model.*     LLaVA, Kimi-K2.5, InternVL, Llama-4, Mistral-3
    model.language_model.*   -> model.*     Qwen3-VL, Qwen3.5, and what transformers 5 may save
    model.text_model.*       -> model.*     Idefics3, SmolVLM
    model.* beside visual.*  -> unchanged   Qwen2-VL, Qwen2.5-VL
    thinker.*                -> without it  Qwen-Omni, then as above
    lm_head.*, mtp.*         -> unchanged   MTP layers belong to the text; transformers skips them on load
    vision, audio, projector -> dropped

`CAUSAL_LM` lists only what the tests load through `AutoModelForCausalLM` and compare, logit by logit,
with the multimodal model it came from.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mso_hub.errors import PlanError

# text model_type in the source -> (model_type, architecture) of the text-only checkpoint
CAUSAL_LM: dict[str, tuple[str, str]] = {
    "deepseek_v2": ("deepseek_v2", "DeepseekV2ForCausalLM"),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3ForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3_text": ("gemma3_text", "Gemma3ForCausalLM"),
    "gemma4_text": ("gemma4_text", "Gemma4ForCausalLM"),
    "glm4": ("glm4", "Glm4ForCausalLM"),
    "glm4_moe": ("glm4_moe", "Glm4MoeForCausalLM"),
    "glm4v_moe_text": ("glm4_moe", "Glm4MoeForCausalLM"),
    "glm4v_text": ("glm4", "Glm4ForCausalLM"),
    "gpt_oss": ("gpt_oss", "GptOssForCausalLM"),
    "kimi_k2": ("deepseek_v3", "DeepseekV3ForCausalLM"),  # same network; kimi_k2 is remote code only
    "lfm2": ("lfm2", "Lfm2ForCausalLM"),
    "llama": ("llama", "LlamaForCausalLM"),
    "llama4_text": ("llama4_text", "Llama4ForCausalLM"),
    "ministral": ("ministral", "MinistralForCausalLM"),
    "ministral3": ("ministral3", "Ministral3ForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen2_5_omni_text": ("qwen2", "Qwen2ForCausalLM"),
    "qwen2_5_vl_text": ("qwen2", "Qwen2ForCausalLM"),
    "qwen2_vl_text": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM"),
    "qwen3_5_text": ("qwen3_5_text", "Qwen3_5ForCausalLM"),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "qwen3_omni_moe_text": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "qwen3_vl_moe_text": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "qwen3_vl_text": ("qwen3", "Qwen3ForCausalLM"),
}

# what the source class takes when config.json is silent, where the target class would take something else
_QWEN2_VL = {
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "max_window_layers": 80,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1e6,
    "vocab_size": 152064,
}
ASSUMED: dict[str, dict[str, Any]] = {
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen2_5_omni_text": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rope_theta": 1e6,
        "vocab_size": 152064,
    },
    "qwen3_vl_text": {"max_position_embeddings": 128000, "rope_theta": 5e5},
    "qwen3_vl_moe_text": {
        "head_dim": 128,
        "intermediate_size": 5632,
        "max_position_embeddings": 128000,
        "moe_intermediate_size": 1408,
        "num_attention_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 16,
        "rope_theta": 5e5,
    },
    "qwen3_omni_moe_text": {
        "intermediate_size": 18944,
        "norm_topk_prob": True,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "rope_theta": 1e6,
        "vocab_size": 3584,
    },
    "glm4v_text": {
        "eos_token_id": None,
        "hidden_size": 4096,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "pad_token_id": None,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-05,
    },
    "glm4v_moe_text": {"attention_bias": True, "max_position_embeddings": 65536, "vocab_size": 151424},
}
# what the source class does whatever config.json says, and the target class only when told
FIXED: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
    "glm4v_text": {"attention_bias": True},
}

# where the text fields are nested; the first path that exists wins
_NESTED = (("thinker_config", "text_config"), ("text_config",), ("llm_config",), ("language_config",))
# configs that may keep the text fields at the top level, beside vision_config -> their text model_type
_FLAT = {"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text"}

# top-level fields that describe the text model too; where set, they win over the nested ones
_SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "quantization_config")
_DTYPE = ("dtype", "torch_dtype")
_DROPPED = {"_name_or_path", "_attn_implementation_autoset", "architectures", "auto_map", "model_type"}
_NOT_TEXT_FIELD = re.compile(r"(vision|image|video|audio|mm)_")
# how many rotary channels follow each position axis (time, height, width); in text the axes are equal
_MROPE = {"mrope_section", "mrope_interleaved"}
_ROPE = ("rope_theta", "partial_rotary_factor")

# what a tensor name starts with -> what it starts with in the text-only checkpoint; first match wins
_WRAPPED = (
    ("model.language_model.model.", "model."),
    ("model.language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("language_model.model.blocks.", "model.layers."),  # Kimi-K2.5 as transformers 5 saves it again
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.", "model."),
    ("model.text_model.", "model."),
    ("lm_head.", "lm_head."),
    ("mtp.", "mtp."),
)
_BARE = (("model.", "model."), ("lm_head.", "lm_head."), ("mtp.", "mtp."))
_WRAPPER = re.compile(r"(thinker\.)?(model\.)?(language|text)_model\.")
_OTHER_PART = re.compile(
    r"(thinker\.)?(model\.)?(vis|vit\b|image|video|audio|speech|sound|mm_|multi_modal|projector|embed_vision"
    r"|embed_audio|mlp1\.|resampler|connector)|(talker|token2wav|code2wav)\."
)


@dataclass(frozen=True, slots=True)
class TextModel:
    """The text-only checkpoint: its config.json, and old -> new names of the tensors it keeps."""

    config: dict[str, Any]
    names: dict[str, str]


def text_model(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> TextModel:
    """Config and tensor names of the language model inside a multimodal checkpoint; START HERE.

    config  config.json of the source
    shapes  every tensor name of the source, over all shards -> its shape
    raises  PlanError when renaming alone cannot give a checkpoint that loads
    """
    new_config, new_names = text_config(config), text_names(shapes)
    if _text_fields(config)[0] == "qwen3_vl_moe_text":
        _check_expert_layout(new_config, {name: shapes[name] for name in new_names})
    # The tensors decide: the flags of wrapper and text model may differ, and their defaults do.
    new_config["tie_word_embeddings"] = not any(name.startswith("lm_head.") for name in new_names.values())
    return TextModel(new_config, new_names)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the text-only model; `config` is the multimodal one and stays as it is.

    Text fields move to the top level and vision fields go; `quantization_config` is carried over as it
    is, so its module names are still those of the source. Raises PlanError for an unknown text model.
    """
    source_type, nested = _text_fields(config)
    if source_type not in CAUSAL_LM:
        raise PlanError(
            f"config.json: the text model has model_type {source_type!r}, and no causal language model is "
            f"known to load it (known: {', '.join(CAUSAL_LM)}); keep the vision part (leave out text_only)"
        )
    model_type, architecture = CAUSAL_LM[source_type]
    fields = {key: value for key, value in nested.items() if key not in _DROPPED and not _NOT_TEXT_FIELD.match(key)}
    if any(config.get(key) is not None for key in _DTYPE):
        fields = {key: value for key, value in fields.items() if key not in _DTYPE}
    fields |= {key: config[key] for key in _SHARED + _DTYPE if config.get(key) is not None}
    if config.get("tie_word_embeddings"):
        fields["tie_word_embeddings"] = True
    fields = _with_assumed(_without_mrope(fields), source_type)
    return copy.deepcopy({"architectures": [architecture], "model_type": model_type, **fields})


def text_names(names: Iterable[str]) -> dict[str, str]:
    """Old -> new name of every tensor of the language model, over the whole checkpoint.

        language_model.model.norm.weight  ->  model.norm.weight
        vision_tower.patch_embed.weight   ->  (absent)

    Raises PlanError when no language model is found, when a tensor is neither text nor a known vision or
    audio part, and when two tensors would get one name.
    """
    sources = sorted(set(names))
    wrapped = any(_WRAPPER.match(name) for name in sources)
    old_of: dict[str, str] = {}
    for source in sources:
        target = text_name(source, wrapped=wrapped)
        if target is None:
            if not _OTHER_PART.match(source):
                raise PlanError(
                    f"{source}: neither part of the language model nor a known vision or audio part, so it "
                    "can be neither kept nor dropped safely; keep the vision part (leave out text_only)"
                )
        elif target in old_of:
            raise PlanError(
                f"{source} and {old_of[target]} would both be called {target} in the text-only checkpoint; "
                "one of them is a stale copy: remove it from the source index"
            )
        else:
            old_of[target] = source
    for part in ("model.embed_tokens.", "model.layers."):
        if not any(target.startswith(part) for target in old_of):
            raise PlanError(
                f"no language model found: none of {len(sources)} tensors would be called {part}* in the "
                "text-only checkpoint; keep the vision part (leave out text_only)"
            )
    return {source: target for target, source in old_of.items()}


def text_name(name: str, *, wrapped: bool) -> str | None:
    """New name of one tensor or module, None when it belongs to another part (vision, audio, projector).

    wrapped  some tensor of the checkpoint lies below `language_model.`, so a plain `model.` is not text
    """
    if _OTHER_PART.match(name):
        return None
    path = name.removeprefix("thinker.") + "."  # the dot lets a rule match a whole module name as well
    for old, new in _WRAPPED if wrapped else _BARE:
        if path.startswith(old):
            return (new + path.removeprefix(old)).removesuffix(".")
    return None


def _model_type(fields: Mapping[str, Any]) -> str | None:
    """What the config says, as text whatever it is."""
    value = fields.get("model_type")
    return value if value is None or isinstance(value, str) else repr(value)


def _text_fields(config: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    """Text model_type and text fields, wherever this config keeps them."""
    for path in _NESTED:
        fields: Any = config
        for key in path:
            fields = fields.get(key) if isinstance(fields, Mapping) else None
        if isinstance(fields, Mapping):
            return _model_type(fields), fields
    model_type = _model_type(config)
    if model_type in _FLAT and "vision_config" in config:
        return _FLAT[model_type], config
    raise PlanError(
        f"config.json: model_type {model_type!r} has no nested text config "
        f"({', '.join('.'.join(path) for path in _NESTED)}), so it is text-only already or of an unknown "
        "kind; leave out text_only"
    )


def _without_mrope(fields: dict[str, Any]) -> dict[str, Any]:
    """Rotary fields without the image axes: runtimes take them as the sign of a multimodal model."""
    result = dict(fields)
    for key in ("rope_parameters", "rope_scaling"):
        rope = fields.get(key)
        if not isinstance(rope, Mapping) or not (_MROPE & rope.keys() or "mrope" in rope.values()):
            continue
        kept = {k: "default" if v == "mrope" else v for k, v in rope.items() if k not in _MROPE}
        if set(kept.values()) == {"default"}:
            del result[key]  # nothing is scaled
        else:
            result[key] = kept
    return result


def _with_assumed(fields: dict[str, Any], source_type: str) -> dict[str, Any]:
    """Fields plus what the source class takes for granted and the target class does not."""
    assumed = ASSUMED.get(source_type, {})
    result = {**assumed, **fields, **FIXED.get(source_type, {})}
    rope = fields.get("rope_parameters")
    if isinstance(rope, Mapping):
        missing = {key: result[key] for key in _ROPE if key in assumed and key not in rope}
        result = {key: value for key, value in result.items() if key not in _ROPE or key in fields}
        result["rope_parameters"] = {**rope, **missing}
    if source_type == "glm4v_text":
        result.setdefault("head_dim", result["hidden_size"] // result["num_attention_heads"])
    return result


def _check_expert_layout(fields: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse the published [experts, in, out] of Qwen3-VL-MoE: the text class reads [experts, out, in]."""
    hidden, inner = fields["hidden_size"], fields["moe_intermediate_size"]
    expected = {"gate_up_proj": [2 * inner, hidden], "down_proj": [hidden, inner]}
    for name, shape in shapes.items():
        leaf = name.rpartition(".mlp.experts.")[2]
        if leaf == name or leaf[0].isdigit() or list(shape[1:]) == expected.get(leaf):
            continue  # not an expert, one tensor per expert, or the layout of the text class
        raise PlanError(
            f"{name}: {fields['architectures'][0]} reads gate_up_proj [experts, {2 * inner}, {hidden}] and "
            f"down_proj [experts, {hidden}, {inner}], got {list(shape)}; renaming cannot transpose: load and "
            "save the source once with transformers 5, or keep the vision part (leave out text_only)"
        )
