"""Every number format against hostile input: settings that do not apply, weights that do not fit, configs that lie.

What cannot be done is refused in one message that names the thing, the rule and the way out, with exit code 2, and
nothing is left behind. What can be done gives numbers that are finite and zeros that stay zero.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from mso_hub.cli import main
from mso_hub.engine import ThreadEngine
from mso_hub.errors import MsoError
from mso_hub.formats import FORMATS
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from mso_hub.sink import MemorySink
from mso_hub.source import MemorySource
from tests.helpers import (
    checkpoint_files,
    random_tensor,
    tensors_in,
    tensors_of,
    tiny_llama,
    tiny_moe,
    write_checkpoint,
)
from tests.running import command, paused, run

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1}
DOWN = "model.layers.0.mlp.down_proj"
UP = "model.layers.0.mlp.up_proj"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
Ways = list[tuple[str, str, dict[str, Any]]]


def ways() -> Ways:
    """Every format in every layout, symmetric and not."""
    found: Ways = []
    for name, entry in FORMATS.items():
        for layout in entry.choices.loaders:
            static = {"input_scale": 1.0} if (name, layout) == ("fp8", "modelopt") else {}
            sizes = [{"group_size": 32, "symmetric": s} for s in (True, False)] if entry.choices.group_sizes else [{}]
            found += [(name, layout, {**static, **size}) for size in sizes]
    return found


every_way = pytest.mark.parametrize(("name", "layout", "said"), ways(), ids=lambda v: str(v) if v else "-")


def invoke(*arguments: object) -> tuple[int, str]:
    """Exit code and everything that the program says."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def attempt(verb: str, source: Path, target: Path, *more: object) -> tuple[int, str]:
    """A conversion; one that is refused leaves nothing where it would have been written."""
    code, said = invoke(verb, "--input_dir", source, "--output_dir", target, "--quiet", *more)
    assert code in (0, 2), said
    if code:
        assert [p.name for p in target.parent.iterdir() if target.name in p.name] == []
        assert "Traceback" not in said
    return code, said


def refused(verb: str, source: Path, target: Path, *more: object) -> str:
    """The message of a conversion that must not happen."""
    code, said = attempt(verb, source, target, *more)
    assert code == 2, said
    return said


def written(source: Mapping[str, bytes], recipe: Recipe) -> dict[str, bytes]:
    """Files of an output."""
    sink = MemorySink()
    convert(MemorySource(source), sink, recipe, engine=ThreadEngine(1))
    return sink.files


def model(weight: torch.Tensor) -> dict[str, bytes]:
    """A checkpoint of one linear layer."""
    return checkpoint_files({"model.safetensors": {f"{DOWN}.weight": weight}}, CONFIG)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, four experts of width 32."""
    return tiny_moe(tmp_path_factory.mktemp("formats") / "moe")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers that all formats can hold."""
    return tiny_llama(tmp_path_factory.mktemp("formats") / "dense", hidden=256, shards=1)


# --- settings ---------------------------------------------------------------------------------------

SETTINGS: dict[str, list[str]] = {
    "--format nvfp4 --group_size 16": ["group_size", "nvfp4", "16", "leave it out"],
    "--format nvfp4 --activations 8": ["activations", "16 or 4", "got 8", "mxfp4 with --activations 8"],
    "--format nvfp4 --activations 16 --input_scale 1.0": ["input_scale", "nvfp4", "leave it out"],
    "--format fp8 --asymmetric": ["fp8 is always symmetric", "--asymmetric"],
    "--format fp8 --layout modelopt": ["activation scale", "--input_scale", "fp8_dynamic"],
    "--format fp8 --input_scale nan": ["input_scale", "finite number > 0", "nan"],
    "--format fp8 --input_scale 1e-45": ["input_scale", "finite number > 0", "1e-45"],
    "--format fp8_block --input_scale 1.0": ["input_scale", "fp8_block", "leave it out"],
    "--format fp8_block --layout deepseek --kv_cache fp8": ["kv_cache", "deepseek", "leave it out"],
    "--format fp8_dynamic --layout deepseek": ["fp8_dynamic", "deepseek", "compressed-tensors or modelopt"],
    "--format mxfp4 --input_scale 1.0": ["input_scale", "mxfp4", "leave it out"],
    "--format mxfp4 --layout modelopt": ["mxfp4", "no runtime loads", "compressed-tensors"],
    "--format mxfp8 --scale_search mse": ["scale_search", "mxfp8", "absmax", "'mse'"],
    "--format w4a16 --layout modelopt": ["w4a16", "no runtime loads", "compressed-tensors"],
    "--format w4a16 --activations 8": ["activations", "w4a16", "16", "got 8"],
    "--format w4a16 --group_size -1": ["group_size", "128", "32", "got -1"],
    "--format int8 --group_size 32": ["group_size", "int8", "leave it out"],
    "--format int8 --asymmetric": ["int8 is always symmetric", "--asymmetric"],
    "--format nvfp5": ["format must be one of", "mxfp8", "'nvfp5'"],
    "--recipe nvfp4 --group_size 32": ["--group_size", "nvfp4", "keep one"],
}


@pytest.mark.parametrize("line", SETTINGS)
def test_settings_that_do_not_apply_are_refused(line: str, moe: Path, tmp_path: Path) -> None:
    """Each with what was found and what to do."""
    said = refused("quantize", moe, tmp_path / "out", *line.split())
    assert all(word in said for word in SETTINGS[line]), said
    assert len(said.splitlines()) == 1


def test_kv_scales_without_a_cache_are_refused(dense: Path, tmp_path: Path) -> None:
    """They would have no effect."""
    scales = {f"model.layers.{n}.self_attn.{leaf}": torch.ones(1) for n in range(2) for leaf in ("k_scale", "v_scale")}
    save_file(scales, tmp_path / "scales.safetensors")
    said = refused("quantize", dense, tmp_path / "out", "--kv_scales", tmp_path / "scales.safetensors")
    assert all(word in said for word in ("kv_scales", "kv_cache", "add it"))


RULE = '[[rules]]\nformat = "{}"\n{}\n'
RECIPES: dict[str, tuple[str, list[str]]] = {
    "unknown scheme": (RULE.format("nvfp5", 'mode = "mlp"'), ["rule 1", "'nvfp5'", "did you mean 'nvfp4'"]),
    "shadowed rule": (
        RULE.format("nvfp4", 'mode = "all-linear"') + RULE.format("fp8_dynamic", 'targets = ["re:.*self_attn.*"]'),
        ["rule 2", "gets nothing", "rule 1", "put it first"],
    ),
    "unmatched target": (RULE.format("nvfp4", 'targets = ["re:.*experts.*", "nope"]'), ["'nope'", "correct it"]),
    "half a unit": (
        RULE.format("nvfp4", 'targets = ["re:.*gate_proj"]') + RULE.format("fp8_dynamic", 'mode = "all-linear"'),
        ["gate_up_proj", "nvfp4", "fp8_dynamic", "one rule"],
    ),
    "layout of one rule": (
        'layout = "modelopt"\n'
        + RULE.format("nvfp4", 'mode = "mlp"')
        + RULE.format("w4a16", 'targets = ["re:.*attn"]'),
        ["w4a16", "'modelopt'", "compressed-tensors"],
    ),
    "setting of another format": (RULE.format("mxfp4", 'mode = "mlp"\ninput_scale = 1.0'), ["input_scale", "mxfp4"]),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes_that_cannot_be_done_are_refused(case: str, moe: Path, tmp_path: Path) -> None:
    """Unknown schemes, patterns that overlap or match nothing, rules that engines cannot load together."""
    text, words = RECIPES[case]
    (tmp_path / "recipe.toml").write_text(text)
    said = refused("quantize", moe, tmp_path / "out", "--recipe", tmp_path / "recipe.toml")
    assert all(word in said for word in words), said


@pytest.mark.parametrize("count", [9, 1])
def test_a_number_of_layers_that_contradicts_the_tensors(count: int, dense: Path, tmp_path: Path) -> None:
    """With 9 for 2, `--skip_layers -1` would skip nothing; with 1 for 2, the second would count as MTP and stay."""
    source = edited(dense, tmp_path / "source", config=lambda c: c.update(num_hidden_layers=count))
    said = refused("quantize", source, tmp_path / "out", *(["--skip_layers", "-1"] if count == 9 else []))
    assert "num_hidden_layers" in said


# --- shapes -----------------------------------------------------------------------------------------

STEP = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32}
"""Columns under one scale."""


@every_way
@pytest.mark.parametrize("shape", [(1, 1), (5, 32), (7, 33), (1, 128), (129, 130), (33, 96), (0, 64)])
def test_a_shape_is_held_or_refused(name: str, layout: str, said: dict[str, Any], shape: tuple[int, int]) -> None:
    """Refused with the tensor, the rule and the way out; else right, and the same bytes when it is done again."""
    recipe = Recipe(scheme=name, layout=layout, mode="all-linear", **said)
    weight = random_tensor(*shape)
    fits = weight.numel() > 0 and shape[1] % STEP.get(name, said.get("group_size", 1)) == 0
    if not fits:
        with pytest.raises(MsoError) as refusal:
            written(model(weight), recipe)
        words = (f"{DOWN}.weight: {name}", "needs a", str(list(shape)), "ignore")
        assert all(word in str(refusal.value) for word in words)
        return
    out = written(model(weight), recipe)
    back = tensors_in(written(out, Recipe(scheme="bf16")))[f"{DOWN}.weight"]
    assert back.shape == weight.shape
    assert nmse(back, weight) < 0.05
    assert contents(written(out, recipe)) == contents(out)


def contents(files: Mapping[str, bytes]) -> dict[str, tuple[torch.dtype, bytes]]:
    """Every tensor as bytes."""
    return {n: (t.dtype, bytes(t.reshape(-1).view(torch.uint8).tolist())) for n, t in tensors_in(files).items()}


def nmse(now: torch.Tensor, before: torch.Tensor) -> float:
    """Sum of squared differences over sum of squares."""
    return float((now.double() - before.double()).square().sum() / before.double().square().sum())


# --- numbers ----------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", ["tensor", "rows and blocks"])
def test_zeros_stay_zero(name: str, layout: str, said: dict[str, Any], dtype: str, zeros: str) -> None:
    """Of either sign; a scale of an empty block divides nothing by nothing."""
    weight = random_tensor(128, 256, dtype=DTYPES[dtype])
    weight[::2] *= 0
    weight[:, 64:128] *= 0
    if zeros == "tensor":
        weight *= 0
    out = written(model(weight), Recipe(scheme=name, layout=layout, mode="all-linear", **said))
    back = tensors_in(written(out, Recipe(scheme="bf16", dtype=dtype)))[f"{DOWN}.weight"]
    assert back.isfinite().all()
    assert not back[weight == 0].any()


@every_way
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_do_not_overflow(name: str, layout: str, said: dict[str, Any], dtype: str) -> None:
    """Finite again in F32, and as near as at any other size."""
    largest = torch.finfo(DTYPES[dtype]).max
    weight = random_tensor(128, 256, dtype=DTYPES[dtype])
    weight[:, ::3] = largest
    weight[:, 1::3] = -largest
    out = written(model(weight), Recipe(scheme=name, layout=layout, mode="all-linear", **said))
    back = tensors_in(written(out, Recipe(scheme="bf16", dtype="F32")))[f"{DOWN}.weight"]
    assert back.isfinite().all()
    assert nmse(back, weight) < 0.07  # 6 * 2^125 is the largest FP4 number that F32 holds for a power of two


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_a_row_too_small_for_its_scale_has_a_way_out(layout: str, dense: Path, tmp_path: Path) -> None:
    """A dead row of 1e-40: written, or refused with advice that somebody can follow (no option widens scales)."""
    source = edited(dense, tmp_path / "source", tensors=lambda t: t[f"{UP}.weight"][5].fill_(1e-40))
    code, said = attempt("quantize", source, tmp_path / "out", "--format", "fp8_dynamic", "--layout", layout)
    assert code == 0 or (f"{UP}.weight" in said and "wider dtype" not in said), said


def test_weights_too_small_for_nvfp4_do_not_vanish_silently(dense: Path, tmp_path: Path) -> None:
    """Numbers near 1e-39: refused, or what is written passes its own check."""

    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        for name in (UP, UP.replace("up_proj", "gate_proj")):
            tensors[f"{name}.weight"] *= 1e-37

    source = edited(dense, tmp_path / "source", tensors=shrink)
    code, said = attempt("quantize", source, tmp_path / "out")
    assert code == 2 or invoke("verify", tmp_path / "out", "--source", source)[0] == 0, said


# --- a config that contradicts the tensors ----------------------------------------------------------


def edited(
    folder: Path, target: Path, config: Callable[[dict[str, Any]], object] | None = None,
    tensors: Callable[[dict[str, torch.Tensor]], object] | None = None,
) -> Path:  # fmt: skip
    """A copy of a checkpoint of one shard with another config or other tensors."""
    shutil.copytree(folder, target)
    if config is not None:
        content = json.loads((target / "config.json").read_text())
        config(content)
        (target / "config.json").write_text(json.dumps(content))
    if tensors is not None:
        stored = {name: tensor.clone() for name, tensor in tensors_of(folder).items()}
        tensors(stored)
        save_file(stored, target / "model.safetensors", {"format": "pt"})
    return target


def weights_of(config: dict[str, Any]) -> dict[str, Any]:
    """What the only config group says of weights."""
    (group,) = config["quantization_config"]["config_groups"].values()
    found: dict[str, Any] = group["weights"]
    return found


def says(**changes: object) -> Callable[[dict[str, Any]], object]:
    """Another config group."""
    return lambda config: weights_of(config).update(changes)


W4, W4A = ("--format", "w4a16", "--group_size", "32"), ("--format", "w4a16", "--group_size", "32", "--asymmetric")
LIES: dict[str, tuple[Sequence[str], Callable[[dict[str, Any]], object]]] = {
    "other group size": (W4, says(group_size=64)),
    "other width": (W4, says(num_bits=8)),
    "zero points that are not there": (W4, says(symmetric=False)),
    "no zero points": (W4A, says(symmetric=True)),
    "no config": (W4, lambda c: c.pop("quantization_config")),
    "channels for blocks": (("--format", "fp8_block"), says(strategy="channel")),
    "smaller blocks": (("--format", "fp8_block"), says(block_structure=[64, 64])),
    "tensor for channels": (("--format", "fp8_dynamic"), says(strategy="tensor")),
    "integers for FP8": (("--format", "fp8"), says(type="int")),
    "NVFP4 for MXFP4": (("--format", "mxfp4"), says(group_size=16)),
    "MXFP4 for NVFP4": (("--format", "nvfp4"), says(group_size=32)),
    "FP8 for NVFP4": (
        ("--format", "nvfp4", "--layout", "modelopt"),
        lambda c: c["quantization_config"].update(quant_algo="FP8"),
    ),
    "smaller blocks, DeepSeek": (
        ("--format", "fp8_block", "--layout", "deepseek"),
        lambda c: c["quantization_config"].update(weight_block_size=[64, 64]),
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_a_config_of_other_weights_is_refused(case: str, dense: Path, tmp_path: Path) -> None:
    """Not decoded by what the config says, nor by what the tensors say: one of the two is wrong."""
    options, lie = LIES[case]
    assert attempt("quantize", dense, tmp_path / "packed", *options)[0] == 0
    source = edited(tmp_path / "packed", tmp_path / "source", config=lie)
    said = refused("decompress", source, tmp_path / "out")
    assert re.search(r"model\.layers\.0\.mlp\.\w+_proj", said)
    assert "config.json" in said, said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("name", ["w4a16", "fp8", "fp8_dynamic", "fp8_block", "mxfp8", "mxfp4", "nvfp4", "int8"])
def test_a_scale_that_is_missing_is_named(name: str, dense: Path, tmp_path: Path) -> None:
    """The format is known from the config, so it is not `without a decoder`."""
    more = ("--group_size", "32") if name == "w4a16" else ()
    assert attempt("quantize", dense, tmp_path / "packed", "--format", name, *more)[0] == 0
    source = edited(tmp_path / "packed", tmp_path / "source", tensors=lambda t: t.pop(f"{UP}.weight_scale"))
    said = refused("decompress", source, tmp_path / "out")
    assert UP in said
    assert "weight_scale" in said, said


# --- gpt-oss ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer whose experts are MXFP4 blocks with biases."""
    tensors = {"model.norm.weight": torch.ones(64, dtype=torch.bfloat16)}
    for name, shape in {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}.items():
        tensors[f"model.layers.0.self_attn.{name}.weight"] = random_tensor(*shape)
    experts = "model.layers.0.mlp.experts"
    generator = torch.Generator().manual_seed(0)
    for name, rows in (("gate_up_proj", 128), ("down_proj", 64)):
        codes = torch.randint(0, 256, (4, rows, 2, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 124, (4, rows, 2), generator=generator, dtype=torch.uint8)
        tensors |= {f"{experts}.{name}_blocks": codes, f"{experts}.{name}_scales": scales}
        tensors[f"{experts}.{name}_bias"] = random_tensor(4, rows)
    config = {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_hidden_layers": 1, "hidden_size": 64,
        "intermediate_size": 64, "num_local_experts": 4, "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    return write_checkpoint(tmp_path_factory.mktemp("formats") / "oss", {"model.safetensors": tensors}, config)


def test_gpt_oss_is_decoded(gpt_oss: Path, tmp_path: Path) -> None:
    """Into the [experts, in, out] tensors of the dense model."""
    assert attempt("decompress", gpt_oss, tmp_path / "out")[0] == 0
    found = {n.rpartition(".")[2]: tuple(t.shape) for n, t in tensors_of(tmp_path / "out").items() if "experts" in n}
    assert (found["gate_up_proj"], found["down_proj"]) == ((4, 64, 128), (4, 64, 64))
    assert invoke("verify", tmp_path / "out", "--source", gpt_oss)[0] == 0


@pytest.mark.parametrize("more", [(), ("--all_linear",)])
def test_gpt_oss_experts_are_not_quantized(more: tuple[str, ...], gpt_oss: Path, tmp_path: Path) -> None:
    """Packed or dense, they cannot be split: refused by name, as `ignore` they become BF16 on purpose."""
    assert attempt("decompress", gpt_oss, tmp_path / "dense")[0] == 0
    for source in (tmp_path / "dense", gpt_oss):
        said = refused("quantize", source, tmp_path / "out", *more)
        assert all(word in said for word in ("model.layers.0.mlp.experts", "ignore")), said
    code, _ = attempt("quantize", gpt_oss, tmp_path / "out", "--all_linear", "--ignore", "*experts*")
    assert code == 0


# --- MXFP4 becomes NVFP4 ----------------------------------------------------------------------------


def test_blocks_that_nvfp4_cannot_hold_exactly_are_counted(dense: Path, tmp_path: Path) -> None:
    """Exponents that lie too far apart: the note counts the blocks of 16 that differ."""
    assert attempt("quantize", dense, tmp_path / "packed", "--format", "mxfp4")[0] == 0

    def spread(tensors: dict[str, torch.Tensor]) -> None:
        scale = tensors[f"{UP}.weight_scale"]
        scale[0, 0], scale[1, 1], scale[2, 2] = 10, 1, 100

    source = edited(tmp_path / "packed", tmp_path / "source", tensors=spread)
    code, said = invoke("quantize", "--input_dir", source, "--output_dir", tmp_path / "out")
    assert code == 0
    assert attempt("decompress", source, tmp_path / "before")[0] == 0
    assert attempt("decompress", tmp_path / "out", tmp_path / "after")[0] == 0
    before, after = tensors_of(tmp_path / "before"), tensors_of(tmp_path / "after")
    inexact = sum(int((before[n] != after[n]).reshape(-1, 16).any(1).sum()) for n in before if ".mlp." in n)
    assert inexact > 0
    assert f"MXFP4 to NVFP4: {inexact} of" in said


# --- the same bytes ---------------------------------------------------------------------------------


def test_a_mixed_conversion_that_was_killed_goes_on(tmp_path: Path) -> None:
    """Zero points, powers of two and blocks in one checkpoint: killed after a shard, with other threads and budget."""
    source = tiny_llama(tmp_path / "source", layers=4, hidden=256, shards=6)
    rules = RULE.format("mxfp4", 'targets = ["re:.*down_proj"]') + RULE.format("fp8_block", 'targets = ["re:.*o_proj"]')
    rules += RULE.format("w4a16", 'targets = ["re:.*[qkv]_proj"]\nsymmetric = false\ngroup_size = 64')
    (tmp_path / "recipe.toml").write_text('kv_cache = "fp8"\n' + rules)
    options = ("--recipe", str(tmp_path / "recipe.toml"))
    assert attempt("quantize", source, tmp_path / "whole", *options, "--workers", 1)[0] == 0
    words = command("quantize", source, tmp_path / "out", *options, "--memory_budget", "1MiB", "--workers", "3")
    with paused(words) as process:
        os.kill(process.pid, signal.SIGKILL)
    assert run(words).returncode == 0
    whole, out = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "out"))
    assert {n: d for n, d in out.items() if n != "mso_hub.json"} == {
        n: d for n, d in whole.items() if n != "mso_hub.json"
    }
