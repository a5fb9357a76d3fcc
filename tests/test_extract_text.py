"""The language model of a multimodal checkpoint, written by the program and loaded by transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor

from mso_hub.cli import main
from mso_hub.events import Event, ShardDone, ShardResumed
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from mso_hub.verify import verify_checkpoint
from tests.helpers import in_shards, tensors_of, write_checkpoint, write_files
from tests.plan.test_text import FAMILIES, build, logits

EXTRACT = Recipe(scheme="bf16", text_only=True)
VISION = ("vis", "model.vis", "mm_projector", "multi_modal", "model.multi_modal")
PROCESSORS = {f"{kind}processor_config.json": b"{}" for kind in ("", "pre", "video_pre")}
COMPANIONS = {"tokenizer.json": b"{}", "generation_config.json": b"{}", "LICENSE": b"free", "code/x.py": b""}


def published(family: str, folder: Path) -> tuple[Path, Any]:
    """A tiny multimodal model as the Hub has it, vision in a shard of its own; and the model in memory."""
    model = build(FAMILIES[family], folder / "saved")
    config = json.loads((folder / "saved" / "config.json").read_text())
    config["text_config"]["model_type"] = FAMILIES[family]["text_config"]["model_type"]
    tensors = tensors_of(folder / "saved")
    vision = {name: tensor for name, tensor in tensors.items() if name.startswith(VISION)}
    text = {name: tensor for name, tensor in tensors.items() if name not in vision}
    assert vision
    shards = {"model-00001-of-00003.safetensors": vision}
    shards |= {f"model-0000{at}-of-00003.safetensors": part for at, part in enumerate(in_shards(text, 2).values(), 2)}
    source = write_checkpoint(folder / "in", shards, config)
    return write_files(source, PROCESSORS | COMPANIONS), model


def load(folder: Path, **settings: Any) -> Any:
    """What AutoModelForCausalLM makes of a folder, without missing, unexpected or mismatched keys."""
    model, remarks = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", **settings
    )
    assert not any(remarks.values()), remarks
    return model


@pytest.mark.parametrize("family", ["llava llama", "qwen2_5_vl", "qwen3_vl", "gemma3", "kimi_k25"])
def test_the_extracted_checkpoint_loads_and_predicts_the_same(family: str, tmp_path: Path) -> None:
    """By the command; the vision shard leaves no file, processor configs stay behind, the index is right."""
    source, multimodal = published(family, tmp_path)
    out = tmp_path / "out"
    words = ["extract-text", "--input_dir", str(source), "--output_dir", str(out), "--quiet"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    text = load(out)
    torch.testing.assert_close(logits(text), logits(multimodal), rtol=1e-5, atol=1e-5)
    assert not (out / "model-00001-of-00003.safetensors").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found = tensors_of(out)
    assert set(index["weight_map"]) == set(found)
    assert set(index["weight_map"].values()) == {f"model-0000{at}-of-00003.safetensors" for at in (2, 3)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert not PROCESSORS.keys() & files.keys()
    assert files.items() >= COMPANIONS.items()
    config = json.loads(files["config.json"])
    assert config["architectures"] == [type(text).__name__]
    assert not {"text_config", "vision_config", "auto_map"} & config.keys()
    assert verify_checkpoint(out, source=source).problems == ()


def int4(weight: Tensor, group: int = 32) -> tuple[dict[str, Tensor], Tensor]:
    """A weight rounded to INT4 as Kimi-K2 stores it: its tensors, and the BF16 weight that they stand for."""
    blocks = weight.view(weight.shape[0], -1, group)
    scale = (blocks.abs().amax(-1) / 7).bfloat16()
    codes = (blocks / scale.float()[..., None]).round().clamp(-8, 7).to(torch.int8)
    dense = (codes.float() * scale.float()[..., None]).view(weight.shape).bfloat16()
    state = {
        "weight_packed": pack_to_int32(codes.view(weight.shape), 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int32),
    }
    return state, dense


def kimi(folder: Path) -> tuple[Path, Path]:
    """A tiny Kimi-K2.5 with INT4 experts as published, and the same model with these experts dense."""
    config = copy.deepcopy(FAMILIES["kimi_k25"])
    config["text_config"] |= {"hidden_size": 64, "moe_intermediate_size": 32}
    build(config, folder / "saved")
    saved = json.loads((folder / "saved" / "config.json").read_text())
    tensors = tensors_of(folder / "saved")
    packed, dense = dict(tensors), dict(tensors)
    experts = [name for name in tensors if ".mlp.experts." in name]
    assert len(experts) == 4 * 3
    for name in experts:
        state, dense[name] = int4(packed.pop(name))
        packed |= {name.removesuffix("weight") + suffix: tensor for suffix, tensor in state.items()}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32, "strategy": "group", "actorder": None}
    quantized = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }
    hub = copy.deepcopy(saved)
    hub["architectures"] = ["KimiK25ForConditionalGeneration"]
    hub["auto_map"] = {"AutoModel": "modeling_kimi_k25.KimiK25ForConditionalGeneration"}
    hub["text_config"] |= {"model_type": "kimi_k2", "quantization_config": quantized}
    first = write_checkpoint(folder / "int4", in_shards(packed, 3), hub)
    return first, write_checkpoint(folder / "bf16", {"model.safetensors": dense}, saved)


@pytest.mark.parametrize("spelling", ["--text_only", "--text-only"])
def test_kimi_k25_int4_becomes_a_bf16_text_model(spelling: str, tmp_path: Path) -> None:
    """INT4 experts decoded, nested config gone, names and config flattened: DeepseekV3 loads it, logits equal."""
    source, twin = kimi(tmp_path)
    out = tmp_path / "out"
    words = ["decompress", "--input_dir", str(source), "--output_dir", str(out), spelling, "--quiet"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    multimodal = transformers.AutoModelForImageTextToText.from_pretrained(
        twin, attn_implementation="eager", dtype=torch.float32
    )
    text = load(out, dtype=torch.float32)
    assert type(text).__name__ == "DeepseekV3ForCausalLM"
    torch.testing.assert_close(logits(text), logits(multimodal), rtol=1e-5, atol=1e-5)
    config = json.loads((out / "config.json").read_text())
    assert "quantization" not in json.dumps(config)
    assert config["dtype"] == "bfloat16"
    assert verify_checkpoint(out, source=source).problems == ()


def test_kimi_k25_int4_becomes_an_nvfp4_text_model(tmp_path: Path) -> None:
    """In one step: the ignore list carries the flattened names, and every expert is packed anew."""
    source, _ = kimi(tmp_path)
    convert(source, tmp_path / "out", Recipe(text_only=True, ignore=("*shared_experts*", "*layers.0.mlp.*")))
    found = tensors_of(tmp_path / "out")
    packed = [name for name in found if name.endswith(".weight_packed")]
    assert len(packed) == 4 * 3
    assert all(name.startswith("model.layers.1.mlp.experts.") for name in packed)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert not any("language_model" in name or "vision" in name for name in ignored)
    assert verify_checkpoint(tmp_path / "out", source=source).problems == ()


def test_a_stopped_extraction_goes_on(tmp_path: Path) -> None:
    """After the first of two shards; the shard that disappears is not waited for."""
    source, _ = published("llava llama", tmp_path)

    def stop(event: Event) -> None:
        if isinstance(event, ShardDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", EXTRACT, on_event=stop)
    assert not (tmp_path / "out").exists()
    events: list[Event] = []
    convert(source, tmp_path / "out", EXTRACT, on_event=events.append)
    assert [event.shard for event in events if isinstance(event, ShardResumed)] == ["model-00002-of-00003.safetensors"]
    convert(source, tmp_path / "whole", EXTRACT)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    again: list[Event] = []
    convert(source, tmp_path / "out", EXTRACT, on_event=again.append)
    assert not any(isinstance(event, ShardDone) for event in again)


def contents(folder: Path) -> Mapping[str, bytes]:
    """Every file of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_single_file_stays_a_single_file(tmp_path: Path) -> None:
    """No index appears."""
    source, model = published("qwen3_vl", tmp_path)
    single = write_checkpoint(
        tmp_path / "single", {"model.safetensors": tensors_of(source)}, json.loads((source / "config.json").read_text())
    )
    convert(single, tmp_path / "out", EXTRACT)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "mso_hub.json"}
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), rtol=1e-5, atol=1e-5)
