"""Small real checkpoints for tests, written by the safetensors library and not by this package."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file, save

INDEX = "model.safetensors.index.json"
Shards = Mapping[str, Mapping[str, torch.Tensor]]


def random_tensor(
    *shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0, spread: float = 0.05
) -> torch.Tensor:
    """Normal numbers of standard deviation `spread`; the same seed and shape give the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * spread).to(dtype)


def checkpoint_files(
    shards: Shards, config: Mapping[str, Any] | None = None, index: bool | None = None
) -> dict[str, bytes]:
    """Repo path -> content of a checkpoint, as a MemorySource takes it; index None: for several shards."""
    files = {
        name: save({k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}, {"format": "pt"})
        for name, tensors in shards.items()
    }
    if index if index is not None else len(shards) > 1:
        weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        total = sum(t.numel() * t.element_size() for tensors in shards.values() for t in tensors.values())
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files[INDEX] = json.dumps(content, indent=2).encode()
    if config is not None:
        files["config.json"] = json.dumps(config, indent=2).encode()
    return files


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Repo path -> content, written below a folder that need not exist."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_checkpoint(
    folder: Path, shards: Shards, config: Mapping[str, Any] | None = None, index: bool | None = None
) -> Path:
    """Shards, config.json and index (when None: for several shards) in a folder; returns the folder."""
    return write_files(folder, checkpoint_files(shards, config, index))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all shards below a folder, read by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def tensors_in(files: Mapping[str, bytes]) -> dict[str, torch.Tensor]:
    """All tensors of all shards among files in memory, read by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for name, data in sorted(files.items()):
        tensors |= load(data) if name.endswith(".safetensors") else {}
    return tensors


def in_shards(tensors: Mapping[str, torch.Tensor], count: int) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors in their order, cut into shards of about equal bytes; one shard is `model.safetensors`."""
    sizes = [t.numel() * t.element_size() for t in tensors.values()]
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    start = 0
    for (name, tensor), size in zip(tensors.items(), sizes, strict=True):
        parts[min(count - 1, start * count // max(1, sum(sizes)))][name] = tensor
        start += size
    parts = [part for part in parts if part]
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{n:05d}-of-{len(parts):05d}.safetensors": part for n, part in enumerate(parts, 1)}


def weights(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Random matrices, and vectors near one, for names that lack `.weight`."""
    made = {}
    for name, shape in shapes.items():
        noise = random_tensor(*shape, dtype=torch.float32, seed=seed + zlib.crc32(name.encode()))
        made[f"{name}.weight"] = (noise + 1 if len(shape) == 1 else noise).to(dtype)
    return made


def attention_shapes(prefix: str, hidden: int) -> dict[str, tuple[int, ...]]:
    """One decoder layer without its MLP: 4 heads, 2 of them for keys and values."""
    return {
        f"{prefix}.input_layernorm": (hidden,),
        f"{prefix}.self_attn.q_proj": (hidden, hidden),
        f"{prefix}.self_attn.k_proj": (hidden // 2, hidden),
        f"{prefix}.self_attn.v_proj": (hidden // 2, hidden),
        f"{prefix}.self_attn.o_proj": (hidden, hidden),
        f"{prefix}.post_attention_layernorm": (hidden,),
    }


def mlp_shapes(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    """A gated MLP."""
    return {
        f"{prefix}.gate_proj": (width, hidden),
        f"{prefix}.up_proj": (width, hidden),
        f"{prefix}.down_proj": (hidden, width),
    }


def base_config(hidden: int, layers: int, vocab: int, dtype: torch.dtype) -> dict[str, Any]:
    """Fields of config.json that Llama and Qwen share."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "vocab_size": vocab,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def tiny_llama(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    shards: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """A Llama that `LlamaForCausalLM` loads: names, shapes and config.json of the real ones."""
    vocab, width = 96, 2 * hidden
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocab, hidden)}
    for layer in range(layers):
        shapes |= attention_shapes(f"model.layers.{layer}", hidden)
        shapes |= mlp_shapes(f"model.layers.{layer}.mlp", hidden, width)
    shapes |= {"model.norm": (hidden,), "lm_head": (vocab, hidden)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": width,
        "rope_theta": 10000.0,
        **base_config(hidden, layers, vocab, dtype),
    }
    return write_checkpoint(folder, in_shards(weights(shapes, dtype, seed), shards), config)


def tiny_moe(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    experts: int = 4,
    shards: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """A Qwen3-MoE that `Qwen3MoeForCausalLM` loads: router `mlp.gate`, experts `mlp.experts.N.gate_proj`."""
    vocab, width = 96, hidden // 2
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocab, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= attention_shapes(prefix, hidden)
        shapes |= {f"{prefix}.self_attn.q_norm": (hidden // 4,), f"{prefix}.self_attn.k_norm": (hidden // 4,)}
        shapes[f"{prefix}.mlp.gate"] = (experts, hidden)
        for expert in range(experts):
            shapes |= mlp_shapes(f"{prefix}.mlp.experts.{expert}", hidden, width)
    shapes |= {"model.norm": (hidden,), "lm_head": (vocab, hidden)}
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "intermediate_size": 2 * hidden,
        "moe_intermediate_size": width,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "rope_theta": 10000.0,
        **base_config(hidden, layers, vocab, dtype),
    }
    return write_checkpoint(folder, in_shards(weights(shapes, dtype, seed), shards), config)
