"""The shape proof of full-size models, from headers alone: seconds and peak memory of `mso-hub smoke`.

    MSO_VLLM_PYTHON=.venv-vllm/bin/python python -m tests.benchmarks.bench_smoke

The headers are those that the planner makes of a BF16 model in NVFP4 (W4A4, every linear layer); their data is a hole
in each file. Seconds are of the whole command, mso-hub and vLLM's Python under it, memory is that of its largest
process. Exits with an error where a bound is broken or the proof finds anything.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.checkpoints import INDEX_NAME, Entry, total_bytes, write_checkpoint
from tests.benchmarks.runners import GB, MB, ROOT, CommandFailed, machine, measure, mso_hub, table

TITLES = ("checkpoint", "tensors", "GB", "ranks", "seconds", "bound", "peak RSS MB", "bound", "")
SHARDS = 32


@dataclass(frozen=True, slots=True)
class Case:
    """A model, how it is proved, and the bounds: seconds, bytes of peak memory."""

    label: str
    model: str
    arguments: tuple[str, ...]
    ranks: int
    seconds: float
    memory: float


CASES = (
    Case("Llama-70B NVFP4, TP 1, 2, 4, 8", "llama-70b", ("--tp", "1,2,4,8"), 15, 40, 1e9),
    Case("DeepSeek-V3 NVFP4, 5 layers, TP 8", "deepseek-v3", ("--tp", "8", "--layers", "5"), 8, 60, 1e9),
)


# --- models ---------------------------------------------------------------------------------------


def _bf16(name: str, *shape: int) -> Entry:
    return Entry(f"{name}.weight", "BF16", shape)


def _mlp(prefix: str, hidden: int, width: int) -> list[Entry]:
    ends = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    return [_bf16(f"{prefix}.{name}", *shape) for name, shape in ends.items()]


def _model(hidden: int, vocab: int, layers: int, layer: Callable[[int], Iterator[Entry]]) -> list[Entry]:
    entries = [_bf16("model.embed_tokens", vocab, hidden)]
    for number in range(layers):
        prefix = f"model.layers.{number}"
        entries += [*layer(number), _bf16(f"{prefix}.input_layernorm", hidden)]
        entries.append(_bf16(f"{prefix}.post_attention_layernorm", hidden))
    return [*entries, _bf16("model.norm", hidden), _bf16("lm_head", vocab, hidden)]


LLAMA_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def llama_70b() -> list[Entry]:
    """Every tensor of a Llama-3-70B."""
    hidden, kv = LLAMA_70B["hidden_size"], LLAMA_70B["num_key_value_heads"] * LLAMA_70B["head_dim"]

    def layer(number: int) -> Iterator[Entry]:
        prefix = f"model.layers.{number}"
        for name, rows in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv), ("o_proj", hidden)):
            yield _bf16(f"{prefix}.self_attn.{name}", rows, hidden)
        yield from _mlp(f"{prefix}.mlp", hidden, LLAMA_70B["intermediate_size"])

    return _model(hidden, LLAMA_70B["vocab_size"], LLAMA_70B["num_hidden_layers"], layer)


DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18_432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
    "vocab_size": 129_280,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def deepseek_v3() -> list[Entry]:
    """Every tensor of a DeepSeek-V3 without its layer for multi-token prediction."""
    c = DEEPSEEK_V3
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    q_rank, kv_rank, rope, nope = c["q_lora_rank"], c["kv_lora_rank"], c["qk_rope_head_dim"], c["qk_nope_head_dim"]

    def layer(number: int) -> Iterator[Entry]:
        attention, mlp = f"model.layers.{number}.self_attn", f"model.layers.{number}.mlp"
        yield _bf16(f"{attention}.q_a_proj", q_rank, hidden)
        yield _bf16(f"{attention}.q_a_layernorm", q_rank)
        yield _bf16(f"{attention}.q_b_proj", heads * (nope + rope), q_rank)
        yield _bf16(f"{attention}.kv_a_proj_with_mqa", kv_rank + rope, hidden)
        yield _bf16(f"{attention}.kv_a_layernorm", kv_rank)
        yield _bf16(f"{attention}.kv_b_proj", heads * (nope + c["v_head_dim"]), kv_rank)
        yield _bf16(f"{attention}.o_proj", hidden, heads * c["v_head_dim"])
        if number < c["first_k_dense_replace"]:
            yield from _mlp(mlp, hidden, c["intermediate_size"])
            return
        yield _bf16(f"{mlp}.gate", c["n_routed_experts"], hidden)
        yield Entry(f"{mlp}.gate.e_score_correction_bias", "F32", (c["n_routed_experts"],))
        yield from _mlp(f"{mlp}.shared_experts", hidden, c["moe_intermediate_size"])
        for expert in range(c["n_routed_experts"]):
            yield from _mlp(f"{mlp}.experts.{expert}", hidden, c["moe_intermediate_size"])

    return _model(hidden, c["vocab_size"], c["num_hidden_layers"], layer)


MODELS = {"llama-70b": (llama_70b, LLAMA_70B), "deepseek-v3": (deepseek_v3, DEEPSEEK_V3)}


def write_planned(model: str, folder: Path) -> dict[str, int]:
    """Write headers, config and index of a model in NVFP4 as the planner states them; `tensors` and `bytes`.

    Nothing is converted: the source and the output are headers over holes. A folder that is complete is kept.
    """
    from mso_hub import make_plan, read_recipe

    entries, config = MODELS[model]
    dense = folder.with_name(f"{folder.name}-bf16")
    made = entries()
    write_checkpoint(dense, made, SHARDS, config)
    plan = make_plan(dense, read_recipe("nvfp4"))
    tensors = [info for shard in plan.shards for info in shard.tensors]
    counts = {"tensors": len(tensors), "bytes": plan.write_bytes, "source": total_bytes(made)}
    if (folder / INDEX_NAME).is_file() and (folder / INDEX_NAME).read_bytes() == plan.files[INDEX_NAME]:
        return counts
    folder.mkdir(parents=True, exist_ok=True)
    for shard in plan.shards:
        if shard.original is not None:
            raise ValueError(f"{shard.name}: nothing in it is quantized; take fewer shards than {SHARDS}")
        with (folder / shard.name).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
    for name, content in sorted(plan.files.items(), key=lambda item: item[0] == INDEX_NAME):
        (folder / name).write_bytes(content)
    return counts


# --- measurement ----------------------------------------------------------------------------------


def prove(case: Case, workdir: Path) -> tuple[tuple[str, ...], bool]:
    """A row of the table, and whether the bounds were kept."""
    folder = workdir / f"smoke-{case.model}"
    program = (sys.executable, "-m", "tests.benchmarks.bench_smoke", "--write", case.model, folder)
    counts = json.loads(measure(program).output.splitlines()[-1])
    run = measure((mso_hub(), "smoke", folder, *case.arguments), {"OMP_NUM_THREADS": "1"})
    kept = run.seconds <= case.seconds and run.peak_rss <= case.memory
    numbers = (f"{run.seconds:.1f}", f"{case.seconds:.0f}", f"{run.peak_rss / MB:.0f}", f"{case.memory / MB:.0f}")
    sizes = (f"{counts['tensors']:,}", f"{counts['bytes'] / GB:.1f}", str(case.ranks))
    return (case.label, *sizes, *numbers, "pass" if kept else "FAIL"), kept


def main() -> None:
    """Measure, print the table, fail if a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=ROOT / "bench-work")
    parser.add_argument("--write", nargs=2, metavar=("MODEL", "FOLDER"), help="only write the headers of a model")
    options = parser.parse_args()
    if options.write:
        print(json.dumps(write_planned(options.write[0], Path(options.write[1]))))
        return

    rows = [prove(case, options.workdir.absolute()) for case in CASES]
    print(f"mso-hub smoke, headers alone; vLLM in {os.environ.get('MSO_VLLM_PYTHON', sys.executable)}; {machine()}\n")
    print(table(TITLES, [row for row, _ in rows]))
    if not all(kept for _, kept in rows):
        sys.exit("a bound is broken")


if __name__ == "__main__":
    try:
        main()
    except (CommandFailed, FileNotFoundError) as error:
        sys.exit(str(error))
