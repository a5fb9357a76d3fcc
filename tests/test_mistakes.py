"""Twenty-two mistakes of the prototype that this project replaces, each with the test that would have found it.

Most subjects have a test file of their own; here each mistake is shown once, small and on real files. Number 20 was
"no Hub input or output at all": this version reads and writes folders only, so there is nothing to show yet.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from mso_hub.calibrate.collect import collect_statistics
from mso_hub.cli import main
from mso_hub.engine import ThreadEngine
from mso_hub.errors import CheckpointError, NonFiniteError, PlanError, RecipeError
from mso_hub.legacy import StreamingQuantizer
from mso_hub.pipeline import convert, make_plan
from mso_hub.plan import Recipe
from mso_hub.plan.reference import exclude_patterns
from mso_hub.sink import MemorySink
from mso_hub.source import MemorySource
from tests.calibrate.statistics import rows_of
from tests.helpers import (
    INDEX,
    checkpoint_files,
    random_tensor,
    tensors_of,
    tiny_llama,
    tiny_moe,
    write_checkpoint,
    write_files,
)

DENSE = Recipe(scheme="bf16")
UP = "model.layers.0.mlp.up_proj"
INT4 = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "int", "symmetric": True, "group_size": 8, "strategy": "group"}}},
}  # fmt: skip


def matrices(*modules: str, config: Mapping[str, Any] | None = None, shape: tuple[int, ...] = (16, 16)) -> MemorySource:
    """A checkpoint of small BF16 matrices."""
    tensors = {f"{module}.weight": random_tensor(*shape, seed=at) for at, module in enumerate(modules)}
    return MemorySource(checkpoint_files({"model.safetensors": tensors}, config or {"model_type": "x"}))


def chosen(source: MemorySource, recipe: Recipe) -> set[str]:
    """Modules that a recipe quantizes."""
    return {step.weight.module for s in make_plan(source, recipe).shards for step in s.steps if step.unit is not None}


def ignore_of(folder: Path) -> list[str]:
    """The ignore list that a loader reads."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]


def in_a_process(code: str, *arguments: object) -> Any:
    """Run Python code in a fresh interpreter -> the JSON that it prints."""
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return json.loads(subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout)


def test_mistake_01_int4_is_offset_binary(tmp_path: Path) -> None:
    """The prototype read nibbles as two's complement: 0 is -8, 8 is 0, and its weights correlated at -0.57."""
    words = torch.tensor([[0x76543210, 0xFEDCBA98 - 2**32]], dtype=torch.int32)
    tensors = {f"{UP}.weight_packed": words, f"{UP}.weight_scale": torch.tensor([[1.0, 0.5]])}
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, {"quantization_config": INT4})
    convert(source, tmp_path / "out", DENSE)
    expected = [*range(-8, 0), *(q * 0.5 for q in range(8))]
    assert tensors_of(tmp_path / "out")[f"{UP}.weight"].tolist() == [expected]


def test_mistake_02_packed_bytes_are_never_passed_on_as_weights(tmp_path: Path) -> None:
    """The prototype renamed NVFP4 bytes to `.weight` and dropped the scales, and did the same with FP8."""
    source = tiny_llama(tmp_path / "in", layers=1, shards=1)
    convert(source, tmp_path / "packed", Recipe())
    convert(tmp_path / "packed", tmp_path / "out", DENSE)
    found, original = tensors_of(tmp_path / "out"), tensors_of(source)
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in original.items()}
    assert np.corrcoef(found[f"{UP}.weight"].float().flatten(), original[f"{UP}.weight"].float().flatten())[0, 1] > 0.99
    fp8 = {f"{UP}.weight": torch.full((16, 16), 3.0).to(torch.float8_e4m3fn), f"{UP}.weight_scale": torch.tensor([0.5])}
    foreign = write_checkpoint(tmp_path / "fp8", {"model.safetensors": fp8}, {"model_type": "x"})
    convert(foreign, tmp_path / "fp8-out", DENSE)
    assert tensors_of(tmp_path / "fp8-out")[f"{UP}.weight"].eq(1.5).all()
    fp8[f"{UP}.weight"] = fp8[f"{UP}.weight"].float().to(torch.float8_e5m2)
    unknown = write_checkpoint(tmp_path / "unknown", {"model.safetensors": fp8}, {"model_type": "x"})
    with pytest.raises(PlanError, match="without a decoder"):
        convert(unknown, tmp_path / "unknown-out", DENSE)
    assert not (tmp_path / "unknown-out").exists()


def test_mistake_03_a_shard_without_text_is_finished_not_missing(tmp_path: Path) -> None:
    """The prototype waited for it forever, wrote no index, and when it did the index listed vision tensors."""
    shards = {
        "model-00001-of-00002.safetensors": {"vision_tower.blocks.0.weight": random_tensor(8, 8)},
        "model-00002-of-00002.safetensors": {
            "language_model.model.embed_tokens.weight": random_tensor(8, 16),
            "language_model.model.layers.0.mlp.up_proj.weight": random_tensor(16, 16),
        },
    }
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {}}
    source = write_checkpoint(tmp_path / "in", shards, config)
    convert(source, tmp_path / "out", Recipe(scheme="bf16", text_only=True))
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"].keys() == tensors_of(tmp_path / "out").keys()
    assert set(index["weight_map"].values()) == {"model-00002-of-00002.safetensors"}


def test_mistake_04_exclude_config_reaches_the_written_ignore_list(tmp_path: Path) -> None:
    """The prototype left such layers dense and told nobody, so vLLM looked for packed ones."""
    source = tiny_llama(tmp_path / "in")
    reference = {"quantization": {"exclude_modules": ["model.layers.1.mlp*"]}}
    write_files(tmp_path, {"hf_quant_config.json": json.dumps(reference).encode()})
    patterns = tuple(exclude_patterns(tmp_path / "hf_quant_config.json"))
    convert(source, tmp_path / "out", Recipe(imported_ignore=patterns))
    found = tensors_of(tmp_path / "out")
    dense = {n.removesuffix(".weight") for n in found if n.endswith("mlp.up_proj.weight")}
    assert dense == {"model.layers.1.mlp.up_proj"}
    assert dense <= set(ignore_of(tmp_path / "out"))


def test_mistake_05_the_ignore_list_names_what_this_model_left_dense(tmp_path: Path) -> None:
    """The prototype's was a constant without routers, vision towers and projectors."""
    dense = ("lm_head", "model.layers.0.mlp.gate", "vision_tower.blocks.0.fc1", "mm_projector.proj.0")
    tensors = {f"{m}.weight": random_tensor(16, 16) for m in (*dense, "model.layers.0.mlp.experts.0.up_proj")}
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, {"model_type": "x"})
    convert(source, tmp_path / "out", Recipe(mode="all-linear"))
    assert sorted(ignore_of(tmp_path / "out")) == sorted(dense)


def test_mistake_06_layer_1_is_not_layer_10() -> None:
    """The prototype matched `pattern*`: excluding model.layers.1 excluded 10 to 19 as well."""
    modules = {n: f"model.layers.{n}.mlp.up_proj" for n in (0, 1, 10, 19)}
    found = chosen(matrices(*modules.values()), Recipe(ignore=("model.layers.1",)))
    assert found == {modules[n] for n in (0, 10, 19)}


def test_mistake_07_every_family_has_its_names() -> None:
    """The prototype knew `.mlp.{gate,up,down}_proj` only, and with --all_linear took convolutions and embeddings."""
    mlp = {
        "model.layers.0.block_sparse_moe.experts.3.w1", "model.layers.0.block_sparse_moe.experts.3.w2",
        "model.layers.0.block_sparse_moe.experts.3.w3", "model.layers.0.ffn.gate_proj", "model.layers.0.ffn.up_proj",
        "model.layers.1.feed_forward.shared_expert.down_proj", "model.layers.2.mlp.shared_experts.down_proj",
    }  # fmt: skip
    attention = {"model.layers.0.self_attn.o_proj"}
    left = {
        "model.layers.0.mlp.shared_expert_gate", "model.layers.0.linear_attn.conv1d", "visual.patch_embed.proj",
        "transformer.word_embeddings", "model.layers.0.block_sparse_moe.gate",
    }  # fmt: skip
    source = matrices(*mlp, *attention, *left)
    assert chosen(source, Recipe()) == mlp
    assert chosen(source, Recipe(mode="all-linear")) == mlp | attention
    fused = {"model.layers.0.mlp.experts.gate_up_proj": random_tensor(2, 64, 48)}
    config = {"hidden_size": 48, "moe_intermediate_size": 32}
    bank = MemorySource(checkpoint_files({"model.safetensors": fused}, config))
    assert chosen(bank, Recipe()) == {
        f"model.layers.0.mlp.experts.{e}.{leaf}" for e in (0, 1) for leaf in ("gate_proj", "up_proj")
    }


def test_mistake_08_calibration_runs_the_model(tmp_path: Path) -> None:
    """The prototype's --calibrate never did: weight maxima posed as activations, or silently nothing."""
    source = tiny_moe(tmp_path / "in")
    words = ["quantize", "--input_dir", str(source), "--output_dir", str(tmp_path / "out"), "--calibrate"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "has no tokenizer" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    first = collect_statistics(source, rows_of(2, 16), tmp_path / "first").amax
    second = collect_statistics(source, rows_of(2, 16, seed=1), tmp_path / "second").amax
    largest = {name.removesuffix(".weight"): float(t.abs().max()) for name, t in tensors_of(source).items()}
    assert sum(first[module] not in (second[module], largest[module]) for module in first) > len(first) / 2
    with pytest.raises(RecipeError, match=r"input_scale=1\.0"):
        StreamingQuantizer("x", tmp_path / "out", calibrate=True)


def test_mistake_09_workers_share_one_code_path(tmp_path: Path) -> None:
    """The prototype had two copies of the loop; one stored global scales in BF16, so results depended on num_gpus."""
    source = tiny_moe(tmp_path / "in")
    for workers in (1, 4):
        recipe = Recipe(mode="all-linear", layout="modelopt")
        convert(source, tmp_path / str(workers), recipe, engine=ThreadEngine(workers))
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "4" / path.name).read_bytes()
    scales = [t for n, t in tensors_of(tmp_path / "4").items() if n.endswith("weight_scale_2")]
    assert {t.dtype for t in scales} == {torch.float32}
    assert any(t != t.bfloat16() for t in scales)


def test_mistake_10_nothing_is_copied_because_it_failed(tmp_path: Path) -> None:
    """The prototype kept the BF16 tensor under a quantized config and went on without a missing shard."""
    source = tiny_llama(tmp_path / "in")
    tensors = tensors_of(source)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    bad = write_checkpoint(tmp_path / "bad", {"model.safetensors": tensors}, {"model_type": "llama"})
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.down_proj\.weight: .* row 3, column 4"):
        convert(bad, tmp_path / "out", Recipe())
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        convert(source, tmp_path / "out", Recipe())
    assert not (tmp_path / "out").exists()


IMPORTED = """
import json, sys
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
convert(sys.argv[1], sys.argv[2], Recipe())
convert(sys.argv[2], sys.argv[3], Recipe(scheme="bf16"))
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Top-level modules that a conversion there and back has loaded."""
    folder = tmp_path_factory.mktemp("imported")
    source = tiny_llama(folder / "in", layers=1)
    return set(in_a_process(IMPORTED, source, folder / "packed", folder / "dense"))


def test_mistake_11_no_device_is_waited_for(imported: set[str]) -> None:
    """The prototype emptied the CUDA cache after each of 70,000 tensors and copied without waiting for the copy.

    Arithmetic here is on numpy arrays in kernels; torch is not even loaded.
    """
    assert "numba" in imported
    assert "torch" not in imported


PEAK = """
import json, sys
from mso_hub.engine import ThreadEngine
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
mapped = []
def listen(event):
    mapped.append(sys.argv[1] in open("/proc/self/maps").read())
convert(sys.argv[1], sys.argv[2], Recipe(), engine=ThreadEngine(2, 16 << 20), on_event=listen)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"peak": int(peak.split()[1]) << 10, "mapped": any(mapped), "events": len(mapped)}))
"""


def test_mistake_12_memory_is_bounded_by_a_budget_and_not_by_the_shard(tmp_path: Path) -> None:
    """The prototype collected a whole output shard, mapped the input and read gate and up twice."""
    weight = random_tensor(1024, 2048)
    peaks = []
    for count in (3, 48):
        names = [
            f"model.layers.{n}.mlp.{leaf}.weight"
            for n in range(count // 3)
            for leaf in ("gate_proj", "up_proj", "down_proj")
        ]
        tensors = {name: weight.clone() for name in names}
        source = write_checkpoint(tmp_path / f"in{count}", {"model.safetensors": tensors}, {"model_type": "llama"})
        found = in_a_process(PEAK, source, tmp_path / f"out{count}")
        assert found["events"] > count
        assert not found["mapped"]
        peaks.append(found["peak"])
    assert peaks[1] - peaks[0] < 48 << 20  # the larger shard has 189 MB more
    reading = MemorySource(checkpoint_files({"model.safetensors": tensors}, {"model_type": "llama"}))
    convert(reading, MemorySink(), Recipe())
    ranges = [r for r in reading.reads if r[0] == "model.safetensors" and r[1] > 0]
    assert sum(end - begin for _, begin, end in ranges) == 48 * weight.nbytes


def test_mistake_13_sizes_are_those_of_the_bytes(tmp_path: Path) -> None:
    """The prototype guessed total_size from name suffixes, BF16 as one byte, and wrote no metadata."""
    source = tiny_llama(tmp_path / "in")
    convert(source, tmp_path / "out", Recipe())
    total = json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["total_size"]
    assert total == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "out").values())
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_mistake_14_every_other_file_comes_along(tmp_path: Path) -> None:
    """The prototype had a list of seven names and lost tokenizers, licences and folders."""
    files = {
        name: name.encode()
        for name in (
            "tokenizer.model", "vocab.json", "merges.txt", "processor_config.json", "chat_template.json", "LICENSE",
            "figures/a.png", "modeling_x.py", "README.md",
        )
    }  # fmt: skip
    source = write_files(tiny_llama(tmp_path / "in"), files)
    convert(source, tmp_path / "out", Recipe())
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files


def test_mistake_15_a_single_file_is_a_checkpoint(tmp_path: Path) -> None:
    """The prototype wanted an index."""
    source = tiny_llama(tmp_path / "in", shards=1)
    assert not (source / INDEX).exists()
    convert(source, tmp_path / "out", Recipe())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "mso_hub.json"}


IMPORT_ALL = """
import json, multiprocessing
import mso_hub
for name in mso_hub.__all__:
    getattr(mso_hub, name)
import mso_hub.cli, mso_hub.demo
print(json.dumps(multiprocessing.get_start_method(allow_none=True)))
"""


def test_mistake_16_importing_changes_nothing() -> None:
    """The prototype set the start method of multiprocessing for everybody, by force."""
    assert in_a_process(IMPORT_ALL) is None


@pytest.mark.parametrize("size", [8, 32, 128])
def test_mistake_17_blocks_have_16_columns(size: int, tmp_path: Path) -> None:
    """The prototype accepted any --block_size and wrote what nothing loads."""
    with pytest.raises(RecipeError, match=rf"block_size must be 16 for nvfp4, got {size}"):
        StreamingQuantizer("x", tmp_path / "out", block_size=size)
    words = ["quantize", "--input_dir", "x", "--output_dir", str(tmp_path / "out"), "--block_size", str(size)]
    assert CliRunner().invoke(main, words).exit_code == 2


def test_mistake_18_flags_do_what_they_say(tmp_path: Path) -> None:
    """The prototype's --mlp_only was on by default and could not be turned off; both flags at once were accepted."""
    source = str(tiny_llama(tmp_path / "in"))
    jobs = {}
    for flags in ((), ("--mlp_only",), ("--all_linear",)):
        result = CliRunner().invoke(main, ["plan", source, "--json", *flags])
        jobs[flags] = json.loads(result.stdout)["job"]
    assert jobs[()] == jobs["--mlp_only",] != jobs["--all_linear",]
    both = CliRunner().invoke(main, ["plan", source, "--mlp_only", "--all_linear"])
    assert both.exit_code == 2
    assert "contradict" in both.stderr


def test_mistake_19_the_extracted_architecture_exists(tmp_path: Path) -> None:
    """The prototype replaced text: a class that nobody has, prefixes kept, total_size of the source."""
    text = tiny_llama(tmp_path / "text", shards=2)
    flat = json.loads((text / "config.json").read_text())
    shards: dict[str, dict[str, Tensor]] = {}
    for path in sorted(text.glob("*.safetensors")):
        shards[path.name] = {f"language_model.{name}": tensor for name, tensor in load(path.read_bytes()).items()}
    shards[path.name]["vision_tower.x.weight"] = random_tensor(64, 64)
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "vision_config": {},
        "text_config": {key: value for key, value in flat.items() if key != "architectures"},
    }  # fmt: skip
    source = write_checkpoint(tmp_path / "in", shards, config)
    convert(source, tmp_path / "out", Recipe(scheme="bf16", text_only=True))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hasattr(transformers, written["architectures"][0])
    assert "text_config" not in written
    total = json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["total_size"]
    assert total == sum(tensor.nbytes for tensor in tensors_of(text).values())
    model, remarks = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(remarks.values())
    assert type(model).__name__ == written["architectures"][0]


def test_mistake_21_what_is_needed_is_declared(imported: set[str]) -> None:
    """The prototype needed a private branch of ModelOpt; the core here needs neither ModelOpt nor transformers."""
    assert not imported & {"modelopt", "transformers", "compressed_tensors", "datasets", "vllm"}
    needed = [line for line in requires("mso-hub") or () if "extra ==" not in line]
    core = {re.split(r"[^\w-]", line)[0].replace("-", "_").lower() for line in needed}
    hub = {"huggingface_hub", "hf_xet", "python_dotenv"}
    recipes = {"pyyaml", "tomli"}
    assert core == {"torch", "safetensors", "numpy", "numba", "tqdm", "click", *hub, *recipes}


def test_mistake_22_companions_go_with_the_packed_weight(tmp_path: Path) -> None:
    """The prototype left g_idx and key and value scales behind as plain tensors of a dense model."""
    state = {
        f"{UP}.weight_packed": torch.zeros(4, 2, dtype=torch.int32), f"{UP}.weight_scale": torch.ones(4, 2),
        f"{UP}.weight_g_idx": torch.tensor([0, 1] * 8, dtype=torch.int32),
        f"{UP}.weight_shape": torch.tensor([4, 16]), "model.layers.0.self_attn.k_scale": torch.ones(1),
        "model.layers.0.self_attn.v_scale": torch.ones(1), "model.norm.weight": random_tensor(16),
    }  # fmt: skip
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": state}, {"quantization_config": INT4})
    convert(source, tmp_path / "out", DENSE)
    assert set(tensors_of(tmp_path / "out")) == {f"{UP}.weight", "model.norm.weight"}


def test_every_mistake_has_its_test() -> None:
    """One for each number but 20, see the module docstring."""
    numbers = [int(match[1]) for name in globals() if (match := re.match(r"test_mistake_(\d\d)_", name))]
    assert sorted(numbers) == [n for n in range(1, 23) if n != 20]
