"""pack-quantized INT2 to INT8 checkpoints, packed by compressed-tensors and decompressed by it as the oracle."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mso_hub.engine import ThreadEngine
from mso_hub.errors import CheckpointError, MsoError, PlanError
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from mso_hub.sink import MemorySink
from mso_hub.source import MemorySource
from mso_hub.verify import verify_checkpoint
from tests.formats.numerics.strategies import TORCH, to_bits
from tests.helpers import checkpoint_files, random_tensor, tensors_of, write_checkpoint, write_files

NAME = "model.layers.0.mlp.up_proj"
DENSE = Recipe(scheme="bf16")
Tensors = dict[str, Tensor]


def quantization(
    bits: int, group: int | None, *, symmetric: bool = True, actorder: str | None = None, **more: Any
) -> dict[str, Any]:
    """quantization_config as compressed-tensors writes it."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "group_size": group,
        "strategy": "channel" if group is None else "group",
        "block_structure": None,
        "dynamic": False,
        "actorder": actorder,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group_0 = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group_0},
        **more,
    }


def config_of(quantized: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json around it."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "quantization_config": quantized,
    }  # fmt: skip


def codes(rows: int, columns: int, bits: int, seed: int) -> Tensor:
    """Random int8 codes over the whole range of `bits`."""
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    return torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int8)


def packed(
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    group: int | None = 32,
    symmetric: bool = True,
    scale: torch.dtype = torch.bfloat16,
    shape: torch.dtype = torch.int64,
    seed: int = 0,
) -> Tensors:
    """The tensors of one module, by their last name component, packed by compressed-tensors."""
    groups = 1 if group is None else columns // group
    state = {
        "weight_packed": pack_to_int32(codes(rows, columns, bits, seed), bits),
        "weight_scale": random_tensor(rows, groups, dtype=scale, seed=seed + 1, spread=0.02),
        "weight_shape": torch.tensor([rows, columns], dtype=shape),
    }
    if not symmetric:
        state["weight_zero_point"] = pack_to_int32(codes(rows, groups, bits, seed + 2), bits, packed_dim=0)
    return state


def decompressed(state: Tensors, quantized: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Tensor:
    """compressed-tensors' weight: in the dtype of the scale when that is the one asked for, else by way of F32.

    Eight rows of zeros go along: 0.20 cannot unpack several groups of 4-bit zero points that share a single word.
    """
    scheme = QuantizationConfig.model_validate(quantized).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    rows, columns = state["weight_shape"].tolist()
    more = {
        name: torch.cat([tensor, torch.zeros(8, tensor.shape[1], dtype=tensor.dtype)])
        for name, tensor in state.items()
        if name != "weight_shape"
    }
    if state["weight_scale"].dtype != dtype:
        more["weight_scale"] = more["weight_scale"].float()
    more["weight_shape"] = torch.tensor([rows + 8, columns])
    return compressor.decompress(more, scheme)["weight"][:rows].to(dtype)


def named(state: Tensors, module: str = NAME) -> Tensors:
    """The same under full names."""
    return {f"{module}.{suffix}": tensor for suffix, tensor in state.items()}


def same_bits(got: Tensor, expected: Tensor) -> None:
    """Dtype, shape and every bit, so that -0.0 counts."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(to_bits(got), to_bits(expected))


def decompress_in_memory(tensors: Tensors, config: Mapping[str, Any], recipe: Recipe = DENSE) -> Tensors:
    """A conversion of one shard, read back by the safetensors library."""
    from safetensors.torch import load

    sink = MemorySink()
    convert(MemorySource(checkpoint_files({"model.safetensors": tensors}, config)), sink, recipe)
    return load(sink.files["model.safetensors"])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_and_int8_become_what_compressed_tensors_makes_of_them(
    bits: int, group: int | None, symmetric: bool, tmp_path: Path
) -> None:
    """Files on disk, 203 rows (no multiple of 8), bit for bit."""
    quantized = quantization(bits, group, symmetric=symmetric)
    state = packed(203, 256, bits=bits, group=group, symmetric=symmetric)
    head = {"lm_head.weight": random_tensor(8, 256)}
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": named(state) | head}, config_of(quantized))
    convert(source, tmp_path / "out", DENSE)
    found = tensors_of(tmp_path / "out")
    assert set(found) == {f"{NAME}.weight", "lm_head.weight"}
    same_bits(found[f"{NAME}.weight"], decompressed(state, quantized, torch.bfloat16))
    same_bits(found["lm_head.weight"], head["lm_head.weight"])
    assert verify_checkpoint(tmp_path / "out", source=source).problems == ()


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_any_packed_weight_becomes_what_compressed_tensors_makes_of_it(data: st.DataObject) -> None:
    """2 to 8 bits, group or channel, zero points or not, any rows, any dtype of scales, shapes and output."""
    bits, group = data.draw(st.integers(2, 8)), data.draw(st.sampled_from([None, 16, 32, 128]))
    rows = data.draw(st.integers(1, 45))
    columns = data.draw(st.integers(1, 150)) if group is None else group * data.draw(st.integers(1, 3))
    assume(32 % bits == 0 or -(-columns * bits // 32) != -(-columns // (32 // bits)))  # else see the test below
    symmetric = data.draw(st.booleans())
    state = packed(
        rows, columns, bits=bits, group=group, symmetric=symmetric, seed=data.draw(st.integers(0, 999)),
        scale=data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
        shape=data.draw(st.sampled_from([torch.int32, torch.int64])),
    )  # fmt: skip
    quantized = quantization(bits, group, symmetric=symmetric)
    dtype = data.draw(st.sampled_from(["BF16", "F16", "F32"]))
    found = decompress_in_memory(named(state), config_of(quantized), Recipe(scheme="bf16", dtype=dtype))
    same_bits(found[f"{NAME}.weight"], decompressed(state, quantized, TORCH[dtype]))


def pack_padded(values: Tensor, bits: int) -> Tensor:
    """floor(32 / bits) codes in a word, the bits above them empty, as older releases packed 3, 5, 6 and 7 bits."""
    per_word = 32 // bits
    rows, columns = values.shape
    words = -(-columns // per_word)
    stored = np.zeros((rows, words * per_word), np.uint32)
    stored[:, :columns] = values.numpy().astype(np.int32) + 2 ** (bits - 1)
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    combined = (stored.reshape(rows, words, per_word) << shifts).sum(-1, dtype=np.uint32)
    return torch.from_numpy(combined.view(np.int32))


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [1, 37])
def test_both_packings_of_odd_widths_give_the_same_weight(bits: int, symmetric: bool, rows: int) -> None:
    """The word count tells them apart; zero points use the same packing along the rows."""
    quantized = quantization(bits, 32, symmetric=symmetric)
    dense = packed(rows, 96, bits=bits, symmetric=symmetric, seed=bits)
    old = dense | {"weight_packed": pack_padded(codes(rows, 96, bits, bits), bits)}
    assert old["weight_packed"].shape != dense["weight_packed"].shape
    if not symmetric:
        zeros = codes(rows, 3, bits, bits + 2)
        old["weight_zero_point"] = pack_padded(zeros.T.contiguous(), bits).T
    expected = decompressed(dense, quantized, torch.bfloat16)
    for state in (dense, old):
        found = decompress_in_memory(named(state), config_of(quantized))
        same_bits(found[f"{NAME}.weight"], expected)


def test_a_row_that_could_be_packed_in_two_ways_is_refused() -> None:
    """Fifteen codes of three bits take two words in either packing, and no other number tells them apart."""
    state = packed(4, 15, bits=3, group=None)
    with pytest.raises(CheckpointError, match="15 columns of 3 bits could be packed in two ways"):
        decompress_in_memory(named(state), config_of(quantization(3, None)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("actorder", ["group", "dynamic", None])
def test_activation_order_takes_the_group_of_each_column_from_g_idx(symmetric: bool, actorder: str | None) -> None:
    """compressed-tensors rejects these checkpoints since 0.19, so the oracle is the definition in numpy."""
    rows, columns, bits = 20, 128, 4
    state = packed(rows, columns, bits=bits, symmetric=symmetric)
    g_idx = torch.randperm(columns, generator=torch.Generator().manual_seed(1)) // 32
    state["weight_g_idx"] = g_idx.int()
    q = codes(rows, columns, bits, 0).numpy().astype(np.float32)
    group = g_idx.numpy()
    if not symmetric:
        q -= codes(rows, columns // 32, bits, 2).numpy().astype(np.float32)[:, group]
    expected = torch.from_numpy(q * state["weight_scale"].float().numpy()[:, group]).bfloat16()
    quantized = quantization(bits, 32, symmetric=symmetric, actorder=actorder)
    found = decompress_in_memory(named(state), config_of(quantized))
    assert set(found) == {f"{NAME}.weight"}
    same_bits(found[f"{NAME}.weight"], expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 7, 100, 130])
@pytest.mark.parametrize("symmetric", [True, False])
def test_columns_need_not_fill_a_word(bits: int, columns: int, symmetric: bool) -> None:
    """Channel scales and in_features that are no multiple of 8: weight_shape says where a row ends."""
    quantized = quantization(bits, None, symmetric=symmetric)
    state = packed(9, columns, bits=bits, group=None, symmetric=symmetric)
    found = decompress_in_memory(named(state), config_of(quantized))
    same_bits(found[f"{NAME}.weight"], decompressed(state, quantized, torch.bfloat16))


@pytest.mark.parametrize(("bits", "rows"), [(4, 8500), (3, 11200)])
def test_row_blocks_cut_zero_points_where_words_begin(bits: int, rows: int, tmp_path: Path) -> None:
    """More than one block of eight megabytes: the rows around each cut and the last ones, and any thread count."""
    quantized = quantization(bits, 128, symmetric=False)
    state = packed(rows, 2048, bits=bits, group=128, symmetric=False)
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": named(state)}, config_of(quantized))
    convert(source, tmp_path / "a", DENSE, engine=ThreadEngine(1, 1 << 16))
    convert(source, tmp_path / "b", DENSE, engine=ThreadEngine(3))
    outputs = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in "ab"]
    assert outputs[0] == outputs[1]
    found = tensors_of(tmp_path / "a")[f"{NAME}.weight"]
    zeros = codes(rows, 16, bits, 2)
    for start in range(0, rows, 500):
        stop = min(start + 50, rows) if start + 500 < rows else rows
        part = {
            "weight_packed": state["weight_packed"][start:stop],
            "weight_scale": state["weight_scale"][start:stop],
            "weight_shape": torch.tensor([stop - start, 2048]),
            "weight_zero_point": pack_to_int32(zeros[start:stop], bits, packed_dim=0),
        }
        same_bits(found[start:stop], decompressed(part, quantized, torch.bfloat16))


def test_companions_may_lie_in_other_shards(tmp_path: Path) -> None:
    """Codes decide where the weight goes; a shard of companions only leaves no file and no index entry."""
    quantized = quantization(4, 32, symmetric=False)
    first, second = packed(24, 64, symmetric=False, seed=1), packed(40, 64, symmetric=False, seed=5)
    other = NAME.replace("up_proj", "down_proj")
    shards = {
        "model-00001-of-00003.safetensors": {
            f"{NAME}.weight_packed": first["weight_packed"],
            f"{other}.weight_zero_point": second["weight_zero_point"],
            "model.norm.weight": random_tensor(64),
        },
        "model-00002-of-00003.safetensors": {
            **{f"{NAME}.{s}": first[s] for s in ("weight_scale", "weight_shape", "weight_zero_point")},
            f"{other}.weight_shape": second["weight_shape"],
        },
        "model-00003-of-00003.safetensors": {
            f"{other}.weight_packed": second["weight_packed"],
            f"{other}.weight_scale": second["weight_scale"],
        },
    }
    source = write_checkpoint(tmp_path / "in", shards, config_of(quantized))
    plan = convert(source, tmp_path / "out", DENSE)
    assert any("left without tensors" in note for note in plan.notes)
    assert not (tmp_path / "out" / "model-00002-of-00003.safetensors").exists()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        "model.norm.weight": "model-00001-of-00003.safetensors",
        f"{NAME}.weight": "model-00001-of-00003.safetensors",
        f"{other}.weight": "model-00003-of-00003.safetensors",
    }
    assert index["metadata"]["total_size"] == 2 * (64 + 24 * 64 + 40 * 64)
    found = tensors_of(tmp_path / "out")
    same_bits(found[f"{NAME}.weight"], decompressed(first, quantized, torch.bfloat16))
    same_bits(found[f"{other}.weight"], decompressed(second, quantized, torch.bfloat16))
    assert verify_checkpoint(tmp_path / "out", source=source).problems == ()


def kimi_config(quantized: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of Kimi-K2.5 in small: the quantization_config is nested in text_config."""
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "dtype": "bfloat16",
        "media_placeholder_token_id": 163605,
        "text_config": {"model_type": "kimi_k2", "hidden_size": 64, "quantization_config": quantized},
        "vision_config": {"model_type": "kimi_k25", "merge_kernel_size": [2, 2]},
    }


def kimi_tensors() -> tuple[Tensors, dict[str, Tensors]]:
    """Dense tensors, and packed experts, under the names of Kimi-K2.5."""
    prefix = "language_model.model.layers.1"
    dense = {
        "language_model.model.embed_tokens.weight": random_tensor(32, 64),
        f"{prefix}.self_attn.o_proj.weight": random_tensor(64, 64, seed=1),
        "vision_tower.patch_embed.proj.weight": random_tensor(8, 3, 2, 2, seed=2),
        "mm_projector.proj.0.weight": random_tensor(8, 8, seed=3),
    }
    experts = {
        f"{prefix}.mlp.experts.{e}.{leaf}": packed(48, 64, shape=torch.int32, seed=10 * e + at)
        for e in range(2)
        for at, leaf in enumerate(("gate_proj", "up_proj", "down_proj"))
    }
    return dense, experts


def test_a_nested_quantization_config_is_read_and_removed(tmp_path: Path) -> None:
    """Kimi-K2.5 keeps it in text_config; every other field stays where it was."""
    ignore = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"]
    quantized = quantization(4, 32, ignore=ignore)
    dense, experts = kimi_tensors()
    tensors = dense | {k: v for module, state in experts.items() for k, v in named(state, module).items()}
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, kimi_config(quantized))
    convert(source, tmp_path / "out", DENSE)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = kimi_config(quantized)
    del expected["text_config"]["quantization_config"]
    assert config == expected
    found = tensors_of(tmp_path / "out")
    assert set(found) == {*dense, *(f"{module}.weight" for module in experts)}
    for module, state in experts.items():
        same_bits(found[f"{module}.weight"], decompressed(state, quantized, torch.bfloat16))
    for name, tensor in dense.items():
        same_bits(found[name], tensor)
    assert verify_checkpoint(tmp_path / "out", source=source).problems == ()


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_top_level_config_is_removed_and_nothing_else(key: str, tmp_path: Path) -> None:
    """Older releases called it compression_config."""
    config = {k: v for k, v in config_of({}).items() if k != "quantization_config"} | {
        "unknown_field": {"deep": [1, {"quantization": "no"}]}, key: quantization(4, 32),
    }  # fmt: skip
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": named(packed(16, 64))}, config)
    convert(source, tmp_path / "out", DENSE)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {k: v for k, v in config.items() if k != key}


def test_only_files_that_describe_the_old_weights_stay_behind(tmp_path: Path) -> None:
    """Tokenizer, licence and subfolders come along byte for byte; hf_quant_config.json and recipe.yaml do not."""
    source = write_checkpoint(
        tmp_path / "in", {"model.safetensors": named(packed(16, 64))}, config_of(quantization(4, 32))
    )
    kept = {
        "tokenizer.model": b"\x00\x01", "vocab.json": b"{}", "merges.txt": b"a b\n", "LICENSE": b"free",
        "chat_template.jinja": b"{{ x }}", "code/modeling.py": b"pass\n", "processor_config.json": b"{}",
    }  # fmt: skip
    stale = {"hf_quant_config.json": b"{}", "recipe.yaml": b"a: 1\n", "mso_hub.json": b"{}"}
    write_files(source, kept | stale)
    plan = convert(source, tmp_path / "out", DENSE)
    out = tmp_path / "out"
    assert {name: (out / name).read_bytes() for name in kept} == kept
    assert set(plan.behind) == set(stale)
    assert not (out / "hf_quant_config.json").exists()
    assert not (out / "recipe.yaml").exists()
    assert json.loads((out / "mso_hub.json").read_text())["recipe"]["scheme"] == "bf16"


def test_runtime_scales_go_with_the_quantization(tmp_path: Path) -> None:
    """KV-cache and activation scales mean nothing beside a dense weight; biases and sinks stay."""
    gone = {
        "model.layers.0.self_attn.k_scale": torch.tensor([0.5]),
        "model.layers.0.self_attn.v_scale": torch.tensor([0.5]),
        "model.layers.0.self_attn.q_scale": torch.tensor([0.5]),
        "model.layers.0.self_attn.k_proj.k_scale": torch.tensor(0.5),
        f"{NAME}.input_scale": torch.tensor([0.5]),
        f"{NAME}.input_zero_point": torch.tensor([1], dtype=torch.int8),
    }
    stays = {f"{NAME}.bias": random_tensor(16), "model.layers.0.self_attn.sinks": random_tensor(4)}
    tensors = named(packed(16, 64)) | gone | stays
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, config_of(quantization(4, 32)))
    plan = convert(source, tmp_path / "out", DENSE)
    assert set(tensors_of(tmp_path / "out")) == {f"{NAME}.weight", *stays}
    assert set(plan.dropped) == set(gone)


@pytest.mark.parametrize(("dtype", "said"), [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_asked_for_is_written_and_announced(dtype: str, said: str, key: str, tmp_path: Path) -> None:
    """One rounding from F32, and config.json says so, nested too."""
    quantized = quantization(4, 32)
    state = packed(16, 64)
    config = {"model_type": "x", key: "bfloat16", "quantization_config": quantized, "text_config": {key: "float32"}}
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": named(state)}, config)
    convert(source, tmp_path / "out", Recipe(scheme="bf16", dtype=dtype))
    same_bits(tensors_of(tmp_path / "out")[f"{NAME}.weight"], decompressed(state, quantized, TORCH[dtype]))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {"model_type": "x", key: said, "text_config": {key: said}}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_int4_becomes_nvfp4_without_a_detour(symmetric: bool, layout: str, tmp_path: Path) -> None:
    """The same tensors as quantizing the F32 weights that compressed-tensors decompresses."""
    quantized = quantization(4, 32, symmetric=symmetric)
    gate, up = packed(24, 64, symmetric=symmetric, seed=1), packed(24, 64, symmetric=symmetric, seed=9)
    partner = NAME.replace("up_proj", "gate_proj")
    shards = {
        "model-00001-of-00002.safetensors": named(gate, partner) | {"model.norm.weight": random_tensor(64)},
        "model-00002-of-00002.safetensors": named(up),
    }
    source = write_checkpoint(tmp_path / "in", shards, config_of(quantized))
    dense = {
        "model-00001-of-00002.safetensors": {
            f"{partner}.weight": decompressed(gate, quantized), "model.norm.weight": random_tensor(64),
        },
        "model-00002-of-00002.safetensors": {f"{NAME}.weight": decompressed(up, quantized)},
    }  # fmt: skip
    write_checkpoint(tmp_path / "wide", dense, {"model_type": "llama"})
    convert(source, tmp_path / "direct", Recipe(layout=layout))
    convert(tmp_path / "wide", tmp_path / "detour", Recipe(layout=layout))
    direct, detour = tensors_of(tmp_path / "direct"), tensors_of(tmp_path / "detour")
    assert set(direct) == set(detour)
    for name, tensor in detour.items():
        same_bits(direct[name], tensor)
    config = json.loads((tmp_path / "direct" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == layout
    assert verify_checkpoint(tmp_path / "direct", source=source).problems == ()


def test_groups_of_a_config_are_told_apart(tmp_path: Path) -> None:
    """A group that names a module wins over the one that names the class Linear."""
    down = NAME.replace("up_proj", "down_proj")
    four, eight = quantization(4, 32), quantization(8, None)
    quantized = quantization(4, 32)
    named_group = eight["config_groups"]["group_0"] | {"targets": ["re:.*down_proj$"]}
    quantized["config_groups"] = {"group_0": four["config_groups"]["group_0"], "group_1": named_group}
    states = {NAME: packed(16, 64), down: packed(16, 64, bits=8, group=None)}
    tensors = named(states[NAME]) | named(states[down], down)
    found = decompress_in_memory(tensors, config_of(quantized))
    same_bits(found[f"{NAME}.weight"], decompressed(states[NAME], four, torch.bfloat16))
    same_bits(found[f"{down}.weight"], decompressed(states[down], eight, torch.bfloat16))


def without(state: Tensors, *suffixes: str) -> Tensors:
    """The state without some of its tensors."""
    return {suffix: tensor for suffix, tensor in state.items() if suffix not in suffixes}


INT4, ASYM = packed(16, 64), packed(16, 64, symmetric=False)
ONE_GROUP = packed(16, 64, group=None)
DAMAGED: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "no scale": (without(INT4, "weight_scale"), quantization(4, 32), "weight_scale is not"),
    "no zero point": (INT4, quantization(4, 32, symmetric=False), "weight_zero_point is missing"),
    "no shape": (without(ONE_GROUP, "weight_shape"), quantization(4, None), "weight_shape is missing"),
    "shape of another weight": (
        ONE_GROUP | {"weight_shape": torch.tensor([17, 64])}, quantization(4, None), r"says \[17, 64\]"),
    "columns of another weight": (
        ONE_GROUP | {"weight_shape": torch.tensor([16, 640])}, quantization(4, None), "do not fill 8 words"),
    "grouped shape of another weight": (
        INT4 | {"weight_shape": torch.tensor([16, 63])}, quantization(4, 32), r"\[16, 63\]"),
    "rows of scales": (
        INT4 | {"weight_scale": random_tensor(15, 2)}, quantization(4, 32), "same number of rows"),
    "group size": (without(INT4, "weight_shape"), quantization(4, 24), "weight_shape is missing"),
    "integer scales": (
        INT4 | {"weight_scale": torch.ones(16, 2, dtype=torch.int32)}, quantization(4, 32), "got I32"),
    "float codes": (
        INT4, quantization(4, 32) | {"config_groups": {"g": {"targets": ["Linear"], "weights": {"type": "float"}}}},
        "no decoder"),
    "group size of text": (INT4, quantization(4, 32) | {"config_groups": {"g": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "int", "group_size": "32"}}}}, "group_size must be a number"),
    "nine bits": (INT4, quantization(9, 32), "2 to 8 bits"),
    "no group covers it": (
        INT4, quantization(4, 32) | {"config_groups": {}}, "no config group"),
    "rows of zero points": (
        ASYM | {"weight_zero_point": ASYM["weight_zero_point"][:1]},
        quantization(4, 32, symmetric=False), r"weight_zero_point"),
    "groups of zero points": (
        ASYM | {"weight_zero_point": ASYM["weight_zero_point"][:, :1]},
        quantization(4, 32, symmetric=False), r"weight_zero_point"),
    "unpacked zero points": (
        ASYM | {"weight_zero_point": torch.zeros(16, 2, dtype=torch.int8)},
        quantization(4, 32, symmetric=False), r"weight_zero_point"),
    "length of g_idx": (
        INT4 | {"weight_g_idx": torch.zeros(63, dtype=torch.int32)}, quantization(4, 32), "weight_g_idx"),
    "dtype of g_idx": (
        INT4 | {"weight_g_idx": torch.zeros(64)}, quantization(4, 32), "weight_g_idx"),
    "range of g_idx": (
        INT4 | {"weight_g_idx": torch.full((64,), 2, dtype=torch.int32)}, quantization(4, 32), "g_idx"),
    "dtype of weight_shape": (
        ONE_GROUP | {"weight_shape": torch.tensor([16.0, 64.0])}, quantization(4, None), "weight_shape"),
    "one number in weight_shape": (
        INT4 | {"weight_shape": torch.tensor([16])}, quantization(4, 32), "weight_shape: must be two integers"),
    "length of weight_shape": (
        ONE_GROUP | {"weight_shape": torch.tensor([1, 16, 64])}, quantization(4, None), "weight_shape"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_module_is_one_clear_error(kind: str, tmp_path: Path) -> None:
    """The module, the limit and what was found, and nothing is published."""
    state, quantized, message = DAMAGED[kind]
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": named(state)}, config_of(quantized))
    with pytest.raises((CheckpointError, PlanError), match=message) as caught:
        convert(source, tmp_path / "out", DENSE)
    assert re.search(r"up_proj", str(caught.value))
    assert not (tmp_path / "out").exists()


def test_packed_weights_without_a_config_are_refused(tmp_path: Path) -> None:
    """Bits and group size are in config.json only."""
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": named(packed(16, 64))}, {"model_type": "x"})
    with pytest.raises(MsoError, match=r"config\.json has no compressed-tensors quantization_config"):
        convert(source, tmp_path / "out", DENSE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("targets", "message"),
    [("Linear", "no config group"), ([1, None], "no config group"), (["re:("], "is not a regular expression")],
)
def test_targets_that_nobody_can_read_cover_nothing(targets: object, message: str, tmp_path: Path) -> None:
    """config.json comes from strangers: a message, not a traceback."""
    quantized = quantization(4, 32)
    quantized["config_groups"]["group_0"]["targets"] = targets
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": named(packed(16, 64))}, config_of(quantized))
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "out", DENSE)
