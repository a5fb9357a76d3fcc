"""Tiny models with random weights, one for every architecture that is walked, as transformers itself saves them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VOCAB = 96
BASE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip
MOE: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
}  # fmt: skip
INDEXER: dict[str, Any] = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3, "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "image_size": 16, "patch_size": 8, "projection_dim": 16,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Architecture:
    """A row of the sweep.

    model    class of transformers
    config   its config's class
    said     what the config is made of
    text     the text model's part, for models with more than text
    """

    model: str
    config: str
    said: dict[str, Any]
    text: tuple[str, dict[str, Any]] | None = None


def _row(stem: str, *said: dict[str, Any], model: str = "ForCausalLM", **more: Any) -> Architecture:
    merged: dict[str, Any] = dict(BASE)
    for part in (*said, more):
        merged |= part
    return Architecture(f"{stem}{model}", f"{stem}Config", merged)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": _row("Llama"),
    "llama-tied": _row("Llama", tie_word_embeddings=True),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "initializer_range": 0.2,
            "bos_token_id": 1, "eos_token_id": 2,
        },
    ),
    "phi3": _row("Phi3"),
    "gemma3": _row("Gemma3", head_dim=8, sliding_window=8, layer_types=SLIDING),
    "gemma3n": _row(
        "Gemma3n", head_dim=8, sliding_window=8, num_hidden_layers=4, layer_types=[*SLIDING, "full_attention"],
        vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8, altup_num_inputs=2, num_kv_shared_layers=2,
        laurel_rank=4, intermediate_size=[48] * 4, activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
    ),
    "gemma4": _row(
        "Gemma4", head_dim=8, global_head_dim=8, sliding_window=8, num_hidden_layers=4,
        layer_types=[*SLIDING, "full_attention"], vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
    ),
    "qwen3_moe": _row("Qwen3Moe", MOE, head_dim=8, mlp_only_layers=[1]),
    "qwen3_next": _row("Qwen3Next", MOE, LINEAR, shared_expert_intermediate_size=16),
    "qwen3_5_moe": _row("Qwen3_5Moe", MOE, LINEAR, shared_expert_intermediate_size=16),
    "olmoe": _row("Olmoe", MOE),
    "mixtral": _row("Mixtral", num_local_experts=6, num_experts_per_tok=2),
    "minimax_m2": _row("MiniMaxM2", num_local_experts=6, num_experts_per_tok=2, head_dim=8, rotary_dim=4),
    "glm4_moe": _row("Glm4Moe", MLA, head_dim=8),
    "glm_moe_dsa": _row("GlmMoeDsa", MLA, INDEXER),
    "deepseek_v3": _row("DeepseekV3", MLA),
    "deepseek_v32": _row("DeepseekV32", MLA, INDEXER),
    "deepseek_v4": _row(
        "DeepseekV4", INDEXER, num_key_value_heads=1, head_dim=16, q_lora_rank=16, n_routed_experts=6,
        num_experts_per_tok=2, moe_intermediate_size=24, hc_mult=2, o_groups=2, o_lora_rank=8, sliding_window=8,
        layer_types=["heavily_compressed_attention", "compressed_sparse_attention", "compressed_sparse_attention"],
        mlp_layer_types=["hash_moe", "moe", "moe"], partial_rotary_factor=0.5,
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    ),
    "gpt_oss": _row(
        "GptOss", num_local_experts=6, num_experts_per_tok=2, head_dim=8, sliding_window=8, layer_types=SLIDING,
    ),
    "llama4": Architecture(
        "Llama4ForCausalLM", "Llama4TextConfig",
        BASE | {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 48, "attention_chunk_size": 16},
    ),
    "granitemoe": _row(
        "GraniteMoe", num_local_experts=6, num_experts_per_tok=2, logits_scaling=3.0, residual_multiplier=0.5,
        embedding_multiplier=2.0,
    ),
    "jamba": _row(
        "Jamba", num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, num_experts=4, mamba_d_state=4, mamba_d_conv=3, mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "falcon_h1": _row(
        "FalconH1", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_d_conv=3,
        head_dim=8, mamba_chunk_size=8, ssm_multipliers=[0.5, 0.7, 0.9, 1.1, 1.3], lm_head_multiplier=0.5,
        embedding_multiplier=2.0,
    ),
    "nemotron_h": _row(
        "NemotronH", num_hidden_layers=4, layers_block_type=["mamba", "moe", "attention", "moe"], head_dim=8,
        mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=2, conv_kernel=3, chunk_size=8,
        n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, n_shared_experts=1,
        moe_shared_expert_intermediate_size=24, n_group=1, topk_group=1,
    ),
    "lfm2_moe": _row(
        "Lfm2Moe", MOE, num_dense_layers=1, conv_L_cache=3, layer_types=["conv", "full_attention", "conv"],
    ),
    "vlm-qwen3_vl_moe": Architecture(
        "Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig",
        {
            "vision_config": {
                "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
                "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
            },
            "image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93,
        },
        ("text_config", BASE | MOE | {
            "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        }),
    ),
    "vlm-gemma3": Architecture(
        "Gemma3ForConditionalGeneration", "Gemma3Config",
        {
            "vision_config": {
                "model_type": "siglip_vision_model", "hidden_size": 16, "num_hidden_layers": 1,
                "num_attention_heads": 2, "intermediate_size": 16, "image_size": 16, "patch_size": 8,
            },
            "mm_tokens_per_image": 4, "image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92,
        },
        ("text_config", BASE | {
            "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 8, "layer_types": SLIDING,
        }),
    ),
    "vlm-llava-mixtral": Architecture(
        "LlavaForConditionalGeneration", "LlavaConfig",
        {"vision_config": CLIP, "image_token_index": 90},
        ("text_config", BASE | {"model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2}),
    ),
}  # fmt: skip
SPECIAL = {"gemma3": "Gemma3TextConfig", "gemma3n": "Gemma3nTextConfig", "gemma4": "Gemma4TextConfig",
           "qwen3_5_moe": "Qwen3_5MoeTextConfig"}  # fmt: skip
"""Text models whose config is not called like the model."""


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model in memory, with random weights that depend on the name alone."""
    import transformers

    row = ARCHITECTURES[name]
    said = dict(row.said)
    if row.text is not None:
        said[row.text[0]] = dict(row.text[1])
    config = getattr(transformers, SPECIAL.get(name, row.config))(**said)
    torch.manual_seed(sum(map(ord, name)))
    model = getattr(transformers, row.model)(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: ones and zeros would hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(dtype).eval()


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The checkpoint of a tiny model, written by transformers."""
    build(name, dtype).save_pretrained(folder)
    return folder


def token_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random tokens below every special one."""
    return torch.randint(3, 88, (rows, length), generator=torch.Generator().manual_seed(seed))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within the block transformers shows neither bars nor advice about kernels that are not installed."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
