"""Small random checkpoints of four architectures, in BF16, and their conversions by this project's own engine.

TINY is what a CPU generates with in a moment: weights with data. WIDE can be cut into eight ranks in every format:
headers alone, the data is a hole in the file, because the shape proof reads no weight.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mso_hub import Plan, Recipe, convert, make_plan
from mso_hub.checkpoint import DTYPE_BITS

WEIGHTS = "model.safetensors"
Shapes = dict[str, tuple[int, ...]]

TRAINED = Path(__file__).resolve().parents[3] / "tests" / "models" / "tiny-qwen3-moe"
"""The small trained model of the repository, a Qwen3-MoE."""
TRAINED_IDS = TRAINED.with_name("tiny-qwen3-moe-token-ids.safetensors")
"""`heldout_ids`: text that it never saw, as token ids."""


@dataclass(frozen=True, slots=True)
class Size:
    """Dimensions that the four architectures share; DeepSeek-V3 has its own for attention.

    width     intermediate size of a dense layer
    expert    intermediate size of an expert
    heads     attention heads; `kv` of them for keys and values, `head` numbers each
    q_rank    DeepSeek: rank of the query projection
    """

    hidden: int
    width: int
    expert: int
    heads: int
    kv: int
    head: int
    experts: int
    vocab: int
    q_rank: int
    layers: int = 2


TINY = Size(hidden=256, width=256, expert=128, heads=4, kv=2, head=64, experts=4, vocab=128, q_rank=128)
"""Every dimension is a multiple of 128, so that every format applies."""
WIDE = Size(hidden=1024, width=1024, expert=1024, heads=16, kv=8, head=128, experts=8, vocab=512, q_rank=256)
"""A rank of eight still has whole groups and blocks of 128 everywhere."""


# --- architectures --------------------------------------------------------------------------------


def _config(architecture: str, kind: str, size: Size, **more: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv,
        "vocab_size": size.vocab,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
        **more,
    }


def _mlp(prefix: str, hidden: int, width: int, names: tuple[str, str, str]) -> Shapes:
    gate, up, down = (f"{prefix}.{name}.weight" for name in names)
    return {gate: (width, hidden), up: (width, hidden), down: (hidden, width)}


GATED = ("gate_proj", "up_proj", "down_proj")


def _attention(prefix: str, size: Size) -> Shapes:
    return {
        f"{prefix}.self_attn.q_proj.weight": (size.heads * size.head, size.hidden),
        f"{prefix}.self_attn.k_proj.weight": (size.kv * size.head, size.hidden),
        f"{prefix}.self_attn.v_proj.weight": (size.kv * size.head, size.hidden),
        f"{prefix}.self_attn.o_proj.weight": (size.hidden, size.heads * size.head),
    }


def _model(size: Size, layer: Callable[[str, int], Shapes]) -> Shapes:
    """Embedding, layers between their two norms, last norm and output head."""
    shapes: Shapes = {"model.embed_tokens.weight": (size.vocab, size.hidden)}
    for number in range(size.layers):
        prefix = f"model.layers.{number}"
        shapes[f"{prefix}.input_layernorm.weight"] = (size.hidden,)
        shapes |= layer(prefix, number)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (size.hidden,)
    return shapes | {"model.norm.weight": (size.hidden,), "lm_head.weight": (size.vocab, size.hidden)}


def _llama(size: Size) -> tuple[dict[str, Any], Shapes]:
    def layer(prefix: str, number: int) -> Shapes:
        return _attention(prefix, size) | _mlp(f"{prefix}.mlp", size.hidden, size.width, GATED)

    config = _config("LlamaForCausalLM", "llama", size, head_dim=size.head, intermediate_size=size.width)
    return config, _model(size, layer)


def _qwen3_moe(size: Size) -> tuple[dict[str, Any], Shapes]:
    def layer(prefix: str, number: int) -> Shapes:
        shapes = _attention(prefix, size)
        shapes |= {f"{prefix}.self_attn.{norm}.weight": (size.head,) for norm in ("q_norm", "k_norm")}
        shapes[f"{prefix}.mlp.gate.weight"] = (size.experts, size.hidden)
        for expert in range(size.experts):
            shapes |= _mlp(f"{prefix}.mlp.experts.{expert}", size.hidden, size.expert, GATED)
        return shapes

    config = _config(
        "Qwen3MoeForCausalLM", "qwen3_moe", size,
        head_dim=size.head, intermediate_size=size.width, moe_intermediate_size=size.expert, num_experts=size.experts,
        num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    return config, _model(size, layer)


def _mixtral(size: Size) -> tuple[dict[str, Any], Shapes]:
    def layer(prefix: str, number: int) -> Shapes:
        shapes = _attention(prefix, size)
        shapes[f"{prefix}.block_sparse_moe.gate.weight"] = (size.experts, size.hidden)
        for expert in range(size.experts):
            name = f"{prefix}.block_sparse_moe.experts.{expert}"
            shapes |= _mlp(name, size.hidden, size.expert, ("w1", "w3", "w2"))
        return shapes

    config = _config(
        "MixtralForCausalLM", "mixtral", size,
        head_dim=size.head, intermediate_size=size.expert, num_local_experts=size.experts, num_experts_per_tok=2,
        sliding_window=None,
    )  # fmt: skip
    return config, _model(size, layer)


KV_RANK, ROPE, NOPE, VALUE = 512, 64, 128, 128
"""DeepSeek-V3's own: vLLM's latent attention takes no other sizes."""


def _latent_attention(prefix: str, size: Size) -> Shapes:
    name = f"{prefix}.self_attn"
    return {
        f"{name}.q_a_proj.weight": (size.q_rank, size.hidden),
        f"{name}.q_a_layernorm.weight": (size.q_rank,),
        f"{name}.q_b_proj.weight": (size.heads * (NOPE + ROPE), size.q_rank),
        f"{name}.kv_a_proj_with_mqa.weight": (KV_RANK + ROPE, size.hidden),
        f"{name}.kv_a_layernorm.weight": (KV_RANK,),
        f"{name}.kv_b_proj.weight": (size.heads * (NOPE + VALUE), KV_RANK),
        f"{name}.o_proj.weight": (size.hidden, size.heads * VALUE),
    }


def _deepseek_v3(size: Size) -> tuple[dict[str, Any], Shapes]:
    def layer(prefix: str, number: int) -> Shapes:
        shapes = _latent_attention(prefix, size)
        if number == 0:
            return shapes | _mlp(f"{prefix}.mlp", size.hidden, size.width, GATED)
        shapes[f"{prefix}.mlp.gate.weight"] = (size.experts, size.hidden)
        shapes[f"{prefix}.mlp.gate.e_score_correction_bias"] = (size.experts,)
        for expert in range(size.experts):
            shapes |= _mlp(f"{prefix}.mlp.experts.{expert}", size.hidden, size.expert, GATED)
        return shapes | _mlp(f"{prefix}.mlp.shared_experts", size.hidden, size.expert, GATED)

    config = _config(
        "DeepseekV3ForCausalLM", "deepseek_v3", size, intermediate_size=size.width, moe_intermediate_size=size.expert,
        num_key_value_heads=size.heads, n_routed_experts=size.experts, n_shared_experts=1, num_experts_per_tok=2,
        n_group=2, topk_group=1, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True,
        routed_scaling_factor=2.5, first_k_dense_replace=1, moe_layer_freq=1, num_nextn_predict_layers=0,
        q_lora_rank=size.q_rank, kv_lora_rank=KV_RANK, qk_rope_head_dim=ROPE, qk_nope_head_dim=NOPE,
        v_head_dim=VALUE,
    )  # fmt: skip
    return config, _model(size, layer)


ARCHITECTURES: dict[str, Callable[[Size], tuple[dict[str, Any], Shapes]]] = {
    "llama": _llama,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "deepseek_v3": _deepseek_v3,
}


# --- files ----------------------------------------------------------------------------------------


def _values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """BF16 numbers that depend on the name alone: normal, norms near one; a router's correction is F32."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator)
    if name.endswith("e_score_correction_bias"):
        return noise * 0.01
    return (1 + 0.1 * noise if len(shape) == 1 else 0.05 * noise).to(torch.bfloat16)


def _dtype(name: str) -> str:
    return "F32" if name.endswith("e_score_correction_bias") else "BF16"


def _header(shapes: Mapping[str, tuple[int, ...]]) -> tuple[bytes, int]:
    """A safetensors header for the shapes and the bytes of data that belong behind it."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + torch.Size(shape).numel() * DTYPE_BITS[_dtype(name)] // 8
        table[name] = {"dtype": _dtype(name), "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offset


def _sparse(path: Path, header: bytes, data: int) -> None:
    """A file that begins with `header` and goes on with `data` bytes of nothing, which take no room."""
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + data)


def dense(name: str, folder: Path, size: Size = TINY) -> Path:
    """A BF16 checkpoint of an architecture, with data; returns the folder."""
    config, shapes = ARCHITECTURES[name](size)
    folder.mkdir(parents=True)
    save_file({tensor: _values(tensor, shape) for tensor, shape in shapes.items()}, folder / WEIGHTS, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def dense_headers(name: str, folder: Path, size: Size = WIDE) -> Path:
    """A BF16 checkpoint of an architecture whose data is a hole; returns the folder."""
    config, shapes = ARCHITECTURES[name](size)
    folder.mkdir(parents=True)
    _sparse(folder / WEIGHTS, *_header(shapes))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def llama(folder: Path, size: Size = TINY) -> Path:
    """A Llama with data."""
    return dense("llama", folder, size)


def qwen3_moe(folder: Path, size: Size = TINY) -> Path:
    """A Qwen3-MoE with data: router `mlp.gate`, experts `gate_proj`, `up_proj`, `down_proj`."""
    return dense("qwen3_moe", folder, size)


def mixtral(folder: Path, size: Size = TINY) -> Path:
    """A Mixtral with data: router `block_sparse_moe.gate`, experts `w1`, `w3`, `w2`."""
    return dense("mixtral", folder, size)


def deepseek_v3(folder: Path, size: Size = TINY) -> Path:
    """A DeepSeek-V3 with data: latent attention, one dense layer, then experts and a shared one."""
    return dense("deepseek_v3", folder, size)


# --- conversions ----------------------------------------------------------------------------------


def converted(source: Path, recipe: Recipe, out: Path) -> Path:
    """The checkpoint at `source` converted by `mso_hub.convert`; returns `out`."""
    convert(source, out, recipe)
    return out


def planned(source: Path, recipe: Recipe, out: Path) -> Path:
    """Every file that `converted` would write, from headers alone: the data of the shards is a hole; returns `out`."""
    write_plan(make_plan(source, recipe), source, out)
    return out


def write_plan(plan: Plan, source: Path, out: Path) -> None:
    """Headers, config and index of a plan whose weights are in the folder `source`."""
    out.mkdir(parents=True)
    for shard in plan.shards:
        header = shard.header or _head_of(source / shard.name)  # none: nothing in this file changes
        _sparse(out / shard.name, header, shard.nbytes - len(header))
    for name, content in plan.files.items():
        (out / name).write_bytes(content)


def _head_of(path: Path) -> bytes:
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))
