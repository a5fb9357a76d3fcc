"""What a GPU makes of a checkpoint: formats, memory of a rank, the line that serves it, and what is refused."""

from __future__ import annotations

import json
import os
import shlex
import stat
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mso_hub.checkpoint import TensorInfo, build_header
from mso_hub.cli import main
from mso_hub.errors import RecipeError
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from mso_hub.serving import GPUS, Gpu, Served, find_gpu, serve_check
from mso_hub.serving.memory import cache_of, cut_by
from mso_hub.sink import open_sink
from tests.helpers import tiny_llama, tiny_moe

H100 = find_gpu("H100")
GIB = 2**30
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK_V3 = {"num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64}


def llama_8b(folder: Path, **changes: Any) -> Path:
    """Headers of Llama-3-8B in BF16; the weights are a hole in the file."""
    hidden, middle, vocab = 4096, 14336, 128256
    sizes = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    for layer in range(32):
        at = f"model.layers.{layer}."
        sizes |= {f"{at}self_attn.{p}_proj.weight": (hidden if p in "qo" else 1024, hidden) for p in "qkvo"}
        sizes |= {f"{at}mlp.{p}_proj.weight": (middle, hidden) for p in ("gate", "up")}
        sizes[f"{at}mlp.down_proj.weight"] = (hidden, middle)
    tensors = [TensorInfo(name, "BF16", shape) for name, shape in sizes.items()]
    tensors += [TensorInfo(f"model.layers.{n}.input_layernorm.weight", "BF16", (hidden,)) for n in range(32)]
    folder.mkdir()
    header, placed = build_header(tensors, "model.safetensors", {})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(placed[-1].end)
    (folder / "config.json").write_text(json.dumps({**LLAMA_8B, **changes}), encoding="utf-8")
    return folder


def quantized(folder: Path, source: Path, **recipe: Any) -> Path:
    """A checkpoint that the engine wrote."""
    convert(str(source), open_sink(folder), Recipe(**recipe))
    return folder


def command(*arguments: object) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(main, ["serve-check", *map(str, arguments)])


def weights_gib(served: Served) -> list[float]:
    """Weights of a rank at each size."""
    return [rank.weights / GIB for rank in served.ranks]


def test_a_known_model_takes_what_vllm_says_it_takes(tmp_path: Path) -> None:
    """Llama-3-8B in BF16: 16.06 GB, 14.96 GiB. Cut into parts, only norms stay whole."""
    served = serve_check(llama_8b(tmp_path / "m"), H100)
    assert weights_gib(served) == pytest.approx([14.96, 7.48, 3.74, 1.87], abs=0.01)
    assert [rank.token for rank in served.ranks] == [131072, 65536, 32768, 16384]
    assert served.context == 131072
    assert shlex.split(served.command) == ["vllm", "serve", str(tmp_path / "m"), "--tensor-parallel-size", "1"]


def test_more_ranks_than_key_heads_copy_them(tmp_path: Path) -> None:
    """8 heads on 16 ranks: each keeps one, so keys, values and cache do not get smaller."""
    eight, sixteen = serve_check(llama_8b(tmp_path / "m"), H100, tp=(8, 16)).ranks
    copied = 32 * 2 * 1024 // 8 * 4096 * 2
    assert sixteen.weights == pytest.approx((eight.weights - copied) / 2 + copied, rel=0.001)
    assert sixteen.token == eight.token


def test_where_the_context_does_not_fit_the_line_shortens_it(tmp_path: Path) -> None:
    served = serve_check(llama_8b(tmp_path / "m"), find_gpu("RTX 4090"), tp=(1,))
    words = shlex.split(served.command)
    length = int(words[words.index("--max-model-len") + 1])
    assert length == served.ranks[0].tokens
    assert 0 < length < 131072


def test_a_context_that_is_asked_for_chooses_the_size(tmp_path: Path) -> None:
    """2 GPUs where one has no room for that much cache, and no line where none of the sizes has."""
    model = llama_8b(tmp_path / "m")
    served = serve_check(model, find_gpu("RTX 4090"), tp=(1, 2), context=100_000)
    assert "--tensor-parallel-size 2 --max-model-len 100000" in served.command
    assert not serve_check(model, find_gpu("RTX 4090"), tp=(1,), context=100_000).ok


def test_a_context_beyond_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"at most 131,072, max_position_embeddings of config.json, got 131,073"):
        serve_check(llama_8b(tmp_path / "m"), H100, tp=(1,), context=131_073)


def test_a_model_that_is_too_large_gets_no_line(tmp_path: Path) -> None:
    result = command(llama_8b(tmp_path / "m"), "--gpu", "T4", "--tp", "1")
    assert result.exit_code == 2
    assert "does not fit" in result.output
    assert "vllm serve" not in result.output


def test_heads_that_cannot_be_shared_out_are_named(tmp_path: Path) -> None:
    served = serve_check(llama_8b(tmp_path / "m", num_attention_heads=20, num_key_value_heads=4), H100, tp=(4, 8))
    assert [bool(rank.reasons) for rank in served.ranks] == [False, True]
    assert "20 attention heads" in served.ranks[1].reasons[0]
    assert "--tensor-parallel-size 4" in served.command


def test_a_tied_head_and_mtp_layers_are_not_loaded(tmp_path: Path) -> None:
    whole = serve_check(llama_8b(tmp_path / "a"), H100).ranks[0].weights
    tied = serve_check(llama_8b(tmp_path / "b", tie_word_embeddings=True), H100).ranks[0].weights
    cut = serve_check(llama_8b(tmp_path / "c", num_hidden_layers=31), H100).ranks[0].weights
    assert whole - tied == 128256 * 4096 * 2
    assert whole - cut == (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336 + 4096) * 2


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "column"),
        ("model.layers.0.mlp.experts.7.down_proj.weight_packed", "row"),
        ("model.layers.0.mlp.experts.gate_up_proj", "column"),
        ("model.layers.0.mlp.experts.down_proj", "row"),
        ("model.embed_tokens.weight", "vocabulary"),
        ("lm_head.weight", "vocabulary"),
        ("model.layers.0.mlp.gate.weight", "whole"),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "whole"),
        ("model.norm.weight", "whole"),
        ("model.layers.0.mixer.A_log", "unknown"),
        ("model.visual.blocks.0.attn.q_proj.weight", "unknown"),
    ],
)
def test_who_is_cut_how(name: str, rule: str) -> None:
    assert cut_by(name) == rule


def test_latent_attention_keeps_one_vector_a_layer_on_every_rank() -> None:
    """DeepSeek-V3: 61 * (512 + 64) * 2 bytes."""
    assert cache_of(DEEPSEEK_V3, 1).nbytes == cache_of(DEEPSEEK_V3, 8).nbytes == 61 * 576 * 2


def test_an_announced_fp8_cache_halves_it_and_is_in_the_line(tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    config = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme, "config_groups": {}}
    served = serve_check(llama_8b(tmp_path / "m", quantization_config=config), H100, tp=(1,))
    assert served.ranks[0].token == 65536
    assert "--kv-cache-dtype fp8" in served.command


def test_linear_attention_layers_are_left_out_and_it_is_said() -> None:
    kinds = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 8
    cache = cache_of({**LLAMA_8B, "layer_types": kinds}, 1)
    assert cache.nbytes == 131072 // 4
    assert "24 layers" in cache.note


def test_no_config_gives_no_figure_instead_of_a_wrong_one() -> None:
    assert cache_of({}, 1).nbytes is None


@pytest.mark.parametrize(
    ("recipe", "gpu", "form", "how"),
    [
        ({"scheme": "nvfp4", "activations": 4}, "B200", "nvfp4", "native"),
        ({"scheme": "nvfp4", "activations": 4}, "H100", "nvfp4", "weight-only"),
        ({"scheme": "nvfp4"}, "A100-80GB", "nvfp4a16", "native"),
        ({"scheme": "nvfp4", "layout": "modelopt"}, "B200", "nvfp4a16", "native"),
        ({"scheme": "mxfp4"}, "B200", "mxfp4a16", "narrower"),
        ({"scheme": "mxfp8"}, "L40S", "mxfp8", "weight-only"),
        ({"scheme": "fp8_dynamic"}, "L40S", "fp8_dynamic", "native"),
        ({"scheme": "fp8_dynamic"}, "A10", "fp8_dynamic", "weight-only"),
        ({"scheme": "w4a16", "group_size": 32}, "T4", "w4a16", "native"),
        ({"scheme": "w8a16", "group_size": 32}, "H100", "w8a16", "native"),
        ({"scheme": "int8"}, "A100-40GB", "int8", "native"),
        ({"scheme": "int8"}, "RTX 5090", "int8", "refused"),
    ],
)
def test_each_format_is_recognised_and_looked_up(
    tmp_path: Path, recipe: dict[str, Any], gpu: str, form: str, how: str
) -> None:
    """On linear layers that the engine wrote."""
    if recipe.get("activations") == 4:
        recipe = {**recipe, "input_scale": 1.0}
    made = quantized(tmp_path / "out", tiny_llama(tmp_path / "in"), **recipe)
    said = serve_check(made, find_gpu(gpu), tp=(1,)).as_dict()["formats"]
    assert [(entry["form"], entry["how"], entry["experts"]) for entry in said] == [(form, how, False)]


def test_what_vllm_refuses_is_refused_with_the_way_out(tmp_path: Path) -> None:
    made = quantized(tmp_path / "out", tiny_llama(tmp_path / "in"), scheme="int8")
    result = command(made, "--gpu", "b200")
    assert result.exit_code == 2
    assert "refused int8:" in result.output
    assert "use FP8 or W8A16" in " ".join(result.output.split())


def test_experts_and_linear_layers_have_rows_of_their_own(tmp_path: Path) -> None:
    made = quantized(tmp_path / "out", tiny_moe(tmp_path / "in"), scheme="nvfp4", mode="all-linear")
    said = serve_check(made, H100, tp=(1,)).as_dict()["formats"]
    assert {entry["experts"] for entry in said} == {True, False}


def test_code_of_the_repo_is_only_run_where_the_config_points_at_it(tmp_path: Path) -> None:
    model = llama_8b(tmp_path / "m", auto_map={"AutoConfig": "configuration_x.X"})
    assert "--trust-remote-code" not in serve_check(model, H100, tp=(1,)).command
    (model / "configuration_x.py").write_text("", encoding="utf-8")
    assert "--trust-remote-code" in serve_check(model, H100, tp=(1,)).command


def test_json_says_the_same(tmp_path: Path) -> None:
    model = llama_8b(tmp_path / "m")
    said = json.loads(command(model, "--gpu", "H100", "--json").stdout)
    assert said == json.loads(json.dumps(serve_check(str(model), H100).as_dict()))
    assert said["gpu"]["capability"] == 9.0


@pytest.mark.parametrize("spelling", ["H100", "h100", " nvidia-h100", "NVIDIA H100"])
def test_names_of_gpus_in_any_spelling(spelling: str) -> None:
    assert find_gpu(spelling.strip()) == H100
    assert find_gpu("GeForce RTX 4090").capability == 89


def test_an_unknown_gpu_lists_the_known_ones() -> None:
    with pytest.raises(RecipeError) as caught:
        find_gpu("H1000")
    assert all(gpu.name in str(caught.value) for gpu in GPUS)


def nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of that name, alone on PATH with the shell's own."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/bin")


def test_auto_asks_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "echo 'NVIDIA H200, 143771, 9.0'"
    nvidia_smi(tmp_path, f"{line}\n{line}", monkeypatch)
    gpu = find_gpu("auto")
    assert gpu == Gpu("NVIDIA H200", 90, 143771 / 1024, 2)
    served = serve_check(llama_8b(tmp_path / "m"), gpu)
    assert any("this machine has 2 of these GPUs, fewer than 4, 8" in note for note in served.notes)


@pytest.mark.parametrize("script", ["echo 'No devices were found' >&2; exit 6", "echo nonsense", "true"])
def test_auto_without_a_gpu_says_to_name_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    nvidia_smi(tmp_path, script, monkeypatch)
    with pytest.raises(RecipeError, match=r"--gpu auto.*name one with --gpu: T4"):
        find_gpu("auto")


def test_sizes_must_be_numbers(tmp_path: Path) -> None:
    result = command(tiny_llama(tmp_path / "in"), "--gpu", "H100", "--tp", "1,two")
    assert result.exit_code == 2
    assert "--tp" in result.output


@pytest.mark.slow
@pytest.mark.skipif("MSO_VLLM_PYTHON" not in os.environ, reason="MSO_VLLM_PYTHON names no Python with vLLM")
@pytest.mark.parametrize("scheme", ["nvfp4", "fp8_dynamic"])
def test_a_rank_takes_what_vllm_makes_room_for(tmp_path: Path, scheme: str) -> None:
    """Bytes of all parameters that vLLM creates, at each size, within 2 % (vLLM keeps scales of rows in F32)."""
    from mso_hub.smoke import prove

    source = Path(__file__).parents[1] / "models" / "tiny-qwen3-moe"
    made = quantized(tmp_path / "out", source, scheme=scheme)
    worlds = prove(str(made), tp=(1, 2, 4)).worlds
    ranks = serve_check(made, H100, tp=(1, 2, 4)).ranks
    assert [rank.weights for rank in ranks] == pytest.approx([max(world.rank_bytes) for world in worlds], rel=0.02)


def test_a_repo_on_the_hub_is_read_by_its_headers_and_served_at_its_commit(tmp_path: Path) -> None:
    """Nothing is downloaded: what the storage sends is a small part of the file."""
    from tests.hubs import moved, world

    source = tiny_llama(tmp_path / "in", hidden=256, shards=1)
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    with world(tmp_path, xet=False) as place:
        repo = place.put(files)
        place.log()
        done = place.run("serve-check", f"hf://{repo}", "--gpu", "H100", "--tp", "1")
        sent = sum(moved(place.log(), "GET", repo).values())
        assert done.returncode == 0, done.stderr
        assert f"vllm serve {repo} --revision {place.head(repo)} --tensor-parallel-size 1" in done.stdout
    assert 0 < sent < len(files["model.safetensors"]) / 4
