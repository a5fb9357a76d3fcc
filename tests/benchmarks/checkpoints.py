"""Checkpoints to measure with: a Llama with real numbers, and a Kimi-K2.5 that is all headers and no data.

The bytes are laid out here by hand, so that nothing under measurement also made the input. The benchmarks run
this module as a program, to keep their own memory small:

    python -m tests.benchmarks.checkpoints FOLDER --size-gb 2 --shards 4
    python -m tests.benchmarks.checkpoints FOLDER --kind kimi --shards 64
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX_NAME = "model.safetensors.index.json"
ITEM_BYTES = {"BF16": 2, "F32": 4, "I32": 4}
BLOCK_ELEMENTS = 1 << 22  # numbers drawn at a time: 16 MB of float32


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as its header names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor on disk."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


Data = Callable[[Entry], Iterable[bytes]]


# --- a Llama with real numbers --------------------------------------------------------------------


def llama_entries(hidden: int, layers: int) -> list[Entry]:
    """Tensors of a Llama in the proportions of the 8B model, which has `hidden` 4096 and 32 layers."""
    kv, wide, vocab = hidden // 4, hidden * 7 // 2, llama_vocab(hidden)
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    entries = [Entry("model.embed_tokens.weight", "BF16", (vocab, hidden))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        entries += [Entry(f"{prefix}.{name}.weight", "BF16", shape) for name, shape in matrices.items()]
        entries += [
            Entry(f"{prefix}.{norm}.weight", "BF16", (hidden,))
            for norm in ("input_layernorm", "post_attention_layernorm")
        ]
    entries.append(Entry("model.norm.weight", "BF16", (hidden,)))
    entries.append(Entry("lm_head.weight", "BF16", (vocab, hidden)))
    return entries


def llama_vocab(hidden: int) -> int:
    """32,000 tokens at full width, fewer below it: else a small checkpoint would be all embedding."""
    return 32_000 * hidden // 4096


def llama_layers(nbytes: float, hidden: int) -> int:
    """How many layers bring the checkpoint nearest to `nbytes`; at least one."""
    outer = total_bytes(llama_entries(hidden, 0))
    layer = total_bytes(llama_entries(hidden, 1)) - outer
    return max(1, round((nbytes - outer) / layer))


def llama_config(hidden: int, layers: int) -> dict[str, Any]:
    """The config.json that belongs to `llama_entries`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 7 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 512,
        "head_dim": 128,
        "vocab_size": llama_vocab(hidden),
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def write_llama(folder: Path, size_gb: float, shards: int, hidden: int = 4096) -> list[Entry]:
    """Write a Llama of about `size_gb` * 10^9 bytes, or keep the one that is already there."""
    layers = llama_layers(size_gb * 1e9, hidden)
    entries = llama_entries(hidden, layers)
    write_checkpoint(folder, entries, shards, llama_config(hidden, layers), random_weights)
    return entries


def random_weights(entry: Entry) -> Iterator[bytes]:
    """BF16 numbers like those of a trained layer: normal, a spread for each row; norms are near one."""
    import numpy as np

    rng = np.random.default_rng(zlib.crc32(entry.name.encode()))
    rows, columns = entry.shape if len(entry.shape) == 2 else (1, entry.shape[0])
    step = max(1, BLOCK_ELEMENTS // columns)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        values = rng.standard_normal((count, columns), dtype=np.float32)
        if len(entry.shape) == 2:
            values *= 0.02 * rng.lognormal(0.0, 0.3, (count, 1)).astype(np.float32)
        else:
            values = 1 + 0.1 * values
        bits = values.view(np.uint32)
        bits += 0x7FFF + ((bits >> 16) & 1)  # round to nearest even, then drop the low half
        yield (bits >> 16).astype("<u2").tobytes()


# --- a Kimi-K2.5 without data ---------------------------------------------------------------------

KIMI_LAYERS = 61
KIMI_EXPERTS = 384
KIMI_HIDDEN = 7168
KIMI_EXPERT_WIDTH = 2048
KIMI_DENSE_WIDTH = 18_432
KIMI_VOCAB = 163_840
KIMI_HEADS = 64
KIMI_Q_LORA, KIMI_KV_LORA = 1536, 512
KIMI_NOPE, KIMI_ROPE, KIMI_VALUE = 128, 64, 128
VISION_BLOCKS, VISION_HIDDEN, VISION_WIDTH = 27, 1152, 4304
INT4_GROUP = 32

KIMI_INT4: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    ],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": INT4_GROUP,
                "dynamic": False,
                "actorder": None,
                "block_structure": None,
                "observer": "minmax",
                "observer_kwargs": {},
            },
        }
    },
}


def kimi_entries(*, int4: bool, layers: int = KIMI_LAYERS, experts: int = KIMI_EXPERTS) -> list[Entry]:
    """Every tensor of a checkpoint with Kimi-K2.5's shapes; `int4` stores the routed experts packed."""
    text = "language_model.model"
    entries = [*vision_entries(), _bf16(f"{text}.embed_tokens.weight", KIMI_VOCAB, KIMI_HIDDEN)]
    for layer in range(layers):
        entries += attention_entries(f"{text}.layers.{layer}")
        if layer == 0:
            entries += mlp_entries(f"{text}.layers.0.mlp", KIMI_DENSE_WIDTH)
        else:
            entries += moe_entries(f"{text}.layers.{layer}.mlp", experts, int4=int4)
    entries.append(_bf16(f"{text}.norm.weight", KIMI_HIDDEN))
    entries.append(_bf16("language_model.lm_head.weight", KIMI_VOCAB, KIMI_HIDDEN))
    return entries


def attention_entries(prefix: str) -> list[Entry]:
    """Multi-head latent attention of one layer, and the two norms around it."""
    queries = KIMI_HEADS * (KIMI_NOPE + KIMI_ROPE)
    return [
        _bf16(f"{prefix}.input_layernorm.weight", KIMI_HIDDEN),
        _bf16(f"{prefix}.post_attention_layernorm.weight", KIMI_HIDDEN),
        _bf16(f"{prefix}.self_attn.q_a_proj.weight", KIMI_Q_LORA, KIMI_HIDDEN),
        _bf16(f"{prefix}.self_attn.q_a_layernorm.weight", KIMI_Q_LORA),
        _bf16(f"{prefix}.self_attn.q_b_proj.weight", queries, KIMI_Q_LORA),
        _bf16(f"{prefix}.self_attn.kv_a_proj_with_mqa.weight", KIMI_KV_LORA + KIMI_ROPE, KIMI_HIDDEN),
        _bf16(f"{prefix}.self_attn.kv_a_layernorm.weight", KIMI_KV_LORA),
        _bf16(f"{prefix}.self_attn.kv_b_proj.weight", KIMI_HEADS * (KIMI_NOPE + KIMI_VALUE), KIMI_KV_LORA),
        _bf16(f"{prefix}.self_attn.o_proj.weight", KIMI_HIDDEN, KIMI_HEADS * KIMI_VALUE),
    ]


def moe_entries(prefix: str, experts: int, *, int4: bool) -> list[Entry]:
    """Router, shared expert and routed experts of one layer."""
    entries = [
        _bf16(f"{prefix}.gate.weight", experts, KIMI_HIDDEN),
        Entry(f"{prefix}.gate.e_score_correction_bias", "F32", (experts,)),
        *mlp_entries(f"{prefix}.shared_experts", KIMI_EXPERT_WIDTH),
    ]
    for expert in range(experts):
        for weight in mlp_entries(f"{prefix}.experts.{expert}", KIMI_EXPERT_WIDTH):
            entries += packed_entries(weight) if int4 else [weight]
    return entries


def mlp_entries(prefix: str, width: int) -> list[Entry]:
    """The three matrices of a gated MLP."""
    return [
        _bf16(f"{prefix}.gate_proj.weight", width, KIMI_HIDDEN),
        _bf16(f"{prefix}.up_proj.weight", width, KIMI_HIDDEN),
        _bf16(f"{prefix}.down_proj.weight", KIMI_HIDDEN, width),
    ]


def packed_entries(weight: Entry) -> list[Entry]:
    """What compressed-tensors' `pack-quantized` stores for a matrix: eight INT4 codes to an I32."""
    rows, columns = weight.shape
    return [
        Entry(f"{weight.name}_packed", "I32", (rows, columns // 8)),
        Entry(f"{weight.name}_scale", "BF16", (rows, columns // INT4_GROUP)),
        Entry(f"{weight.name}_shape", "I32", (2,)),
    ]


def vision_entries() -> list[Entry]:
    """The vision tower and its projector: biases, a convolution, names unlike the language model's."""
    tower, size = "vision_tower", VISION_HIDDEN
    entries = [
        _bf16(f"{tower}.patch_embed.proj.weight", size, 3, 14, 14),
        _bf16(f"{tower}.patch_embed.proj.bias", size),
        _bf16(f"{tower}.patch_embed.pos_emb.weight", 64, 64, size),
    ]
    for block in range(VISION_BLOCKS):
        prefix = f"{tower}.encoder.blocks.{block}"
        entries += _biased(f"{prefix}.norm0", size) + _biased(f"{prefix}.norm1", size)
        entries += _biased(f"{prefix}.wqkv", 3 * size, size) + _biased(f"{prefix}.wo", size, size)
        entries += _biased(f"{prefix}.mlp.fc0", VISION_WIDTH, size)
        entries += _biased(f"{prefix}.mlp.fc1", size, VISION_WIDTH)
    entries += _biased(f"{tower}.encoder.final_layernorm", size)
    merged = 4 * size  # the projector sees patches in groups of 2 x 2
    entries += _biased("mm_projector.pre_norm", size) + _biased("mm_projector.proj.0", merged, merged)
    return entries + _biased("mm_projector.proj.2", KIMI_HIDDEN, merged)


def kimi_config(*, int4: bool, layers: int = KIMI_LAYERS, experts: int = KIMI_EXPERTS) -> dict[str, Any]:
    """The nested config.json of such a checkpoint; a quantization_config sits inside text_config."""
    text: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        "hidden_size": KIMI_HIDDEN,
        "intermediate_size": KIMI_DENSE_WIDTH,
        "moe_intermediate_size": KIMI_EXPERT_WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": KIMI_HEADS,
        "num_key_value_heads": KIMI_HEADS,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 1,
        "q_lora_rank": KIMI_Q_LORA,
        "kv_lora_rank": KIMI_KV_LORA,
        "qk_nope_head_dim": KIMI_NOPE,
        "qk_rope_head_dim": KIMI_ROPE,
        "v_head_dim": KIMI_VALUE,
        "vocab_size": KIMI_VOCAB,
        "tie_word_embeddings": False,
    }
    if int4:
        text["quantization_config"] = KIMI_INT4
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": {"model_type": "kimi_k25_vision", "num_hidden_layers": VISION_BLOCKS},
    }


def write_kimi(
    folder: Path, *, int4: bool, shards: int = 64, layers: int = KIMI_LAYERS, experts: int = KIMI_EXPERTS
) -> list[Entry]:
    """Write the headers of a Kimi-K2.5; the data is a hole in each file, so a terabyte takes no room."""
    entries = kimi_entries(int4=int4, layers=layers, experts=experts)
    write_checkpoint(folder, entries, shards, kimi_config(int4=int4, layers=layers, experts=experts))
    return entries


def _bf16(name: str, *shape: int) -> Entry:
    return Entry(name, "BF16", shape)


def _biased(prefix: str, *shape: int) -> list[Entry]:
    return [_bf16(f"{prefix}.weight", *shape), _bf16(f"{prefix}.bias", shape[0])]


# --- files ----------------------------------------------------------------------------------------


def total_bytes(entries: Iterable[Entry]) -> int:
    """Bytes of all tensors together."""
    return sum(entry.nbytes for entry in entries)


def write_checkpoint(
    folder: Path, entries: Sequence[Entry], shards: int, config: dict[str, Any], data: Data | None = None
) -> None:
    """Write shards, config and index; without `data` the files are sparse. The index comes last and marks a
    complete checkpoint: where the same index already stands, nothing is written."""
    parts = split_entries(entries, shards)
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    weight_map = {entry.name: name for name, part in zip(names, parts, strict=True) for entry in part}
    index = _json({"metadata": {"total_size": total_bytes(entries)}, "weight_map": weight_map})
    if (folder / INDEX_NAME).is_file() and (folder / INDEX_NAME).read_text() == index:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in (*folder.glob(INDEX_NAME), *folder.glob("*.safetensors")):
        leftover.unlink()
    for name, part in zip(names, parts, strict=True):
        write_shard(folder / name, part, data)
    (folder / "config.json").write_text(_json(config))
    (folder / INDEX_NAME).write_text(index)


FUSED_BEHIND = (".k_proj.weight", ".v_proj.weight", ".up_proj.weight")


def split_entries(entries: Sequence[Entry], shards: int) -> list[list[Entry]]:
    """Cut the sequence into `shards` runs of about equal bytes; fewer if a tensor is larger than a run.

    A fused projection stays in one shard: llm-compressor 0.14 ends with an error on checkpoints that split one.
    """
    total = total_bytes(entries)
    parts: list[list[Entry]] = [[] for _ in range(shards)]
    start = at = 0
    for entry in entries:
        if not entry.name.endswith(FUSED_BEHIND):
            at = start * shards // total
        parts[at].append(entry)
        start += entry.nbytes
    return [part for part in parts if part]


def write_shard(path: Path, entries: Sequence[Entry], data: Data | None) -> None:
    """Write one safetensors file tensor by tensor; without `data` leave a hole of the right size."""
    header = shard_header(entries)
    with path.open("wb") as file:
        file.write(header)
        if data is None:
            file.truncate(len(header) + total_bytes(entries))
            return
        for entry in entries:
            file.writelines(data(entry))


def shard_header(entries: Sequence[Entry]) -> bytes:
    """Length, then JSON padded to eight bytes."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        table[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"


def main() -> None:
    """Write a checkpoint and print its number of tensors and bytes as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=("llama", "kimi", "kimi-int4"), default="llama")
    parser.add_argument("--size-gb", type=float, default=2.0, help="of the Llama")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096, help="of the Llama: a multiple of 512; 8B has 4096")
    options = parser.parse_args()
    if options.kind == "llama":
        entries = write_llama(options.folder, options.size_gb, options.shards, options.hidden)
    else:
        entries = write_kimi(options.folder, int4=options.kind == "kimi-int4", shards=options.shards)
    print(json.dumps({"tensors": len(entries), "bytes": total_bytes(entries)}))


if __name__ == "__main__":
    main()
