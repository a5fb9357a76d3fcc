"""What `verify` says of kt-kernel's experts: files that were mixed up, parts that are missing, errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import save

from mso_hub.errors import CheckpointError
from mso_hub.plan.kt import KtRecipe
from mso_hub.source import MemorySource, read_checkpoint
from mso_hub.verify import Report, verify_checkpoint
from tests.helpers import tensors_in
from tests.kt.helpers import Experts, converted, moe_files

EXPERTS = Experts(layers=2)
FIRST, SECOND = (f"model-0000{at}-of-00003.safetensors" for at in (1, 2))


def checked(files: Mapping[str, bytes], source: Mapping[str, bytes] | None = None) -> Report:
    """The report of files in memory; what mso_hub.json says of their bytes is left aside."""
    given = {name: data for name, data in files.items() if name != "mso_hub.json"}
    return verify_checkpoint(MemorySource(given), source=MemorySource(source) if source else None)


def problems(files: Mapping[str, bytes]) -> str:
    """What is wrong."""
    return "\n".join(checked(files).problems)


@pytest.mark.parametrize(
    "settings",
    [{}, {"scheme": "kt-int4"}, {"threadpool_count": 2}, {"experts_only": True}, {"merge": False, "scheme": "kt-int4"}],
    ids=str,
)
def test_a_sound_output_passes(settings: dict[str, Any]) -> None:
    """Alone, and against its source: every expert with its error, everything else byte for byte."""
    files = moe_files(EXPERTS, vocab_size=11)
    out = converted(files, KtRecipe(**settings))[1]
    report = verify_checkpoint(MemorySource(out), source=MemorySource(files))
    assert report.problems == ()
    assert len(report.errors) == 2 * 2 * 3
    worst = 0.05 if settings.get("scheme") == "kt-int4" else 0.001
    assert all(0 < error.nmse < worst for error in report.errors)
    whole = not settings.get("experts_only") and settings.get("merge", True)
    assert report.identical == (9 if whole else 0)
    assert verify_checkpoint(MemorySource(out)).problems == ()


def test_mtp_experts_are_not_missed() -> None:
    files = moe_files(EXPERTS, num_hidden_layers=1, num_nextn_predict_layers=1)
    out = converted(files, KtRecipe())[1]
    report = verify_checkpoint(MemorySource(out), source=MemorySource(files))
    assert report.problems == ()


def test_files_of_two_conversions_are_told_apart() -> None:
    """Another number of nodes, another method, another source."""
    files = moe_files(EXPERTS)
    out = converted(files, KtRecipe())[1]
    two = converted(files, KtRecipe(threadpool_count=2))[1]
    four = converted(files, KtRecipe(scheme="kt-int4"))[1]
    elsewhere = converted(moe_files(EXPERTS, rope_theta=1.0), KtRecipe())[1]
    assert "one number of NUMA nodes, found" in problems(mixed(out, two))
    assert "one method" in problems(mixed(out, four))
    assert "made from different checkpoints" in problems(mixed(out, elsewhere))


def mixed(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> dict[str, bytes]:
    """The second layer's file of another output, with an index that lists what is there."""
    found = {**one, SECOND: other[SECOND]}
    index = json.loads(one["model.safetensors.index.json"])
    kept = {name: file for name, file in index["weight_map"].items() if file != SECOND}
    index["weight_map"] = kept | dict.fromkeys(tensors_in({SECOND: other[SECOND]}), SECOND)
    del index["metadata"]["total_size"]
    return {**found, "model.safetensors.index.json": json.dumps(index).encode()}


@pytest.mark.parametrize(("key", "value"), [("kt_threadpool_count", "2"), ("kt_method", "INT4")])
def test_headers_that_say_something_else_are_found(key: str, value: str) -> None:
    out = converted(moe_files(EXPERTS), KtRecipe())[1]
    raw = out[FIRST]
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    out[FIRST] = save(tensors_in({FIRST: raw}), {**metadata, key: value})
    assert f"{FIRST}: says {key.removeprefix('kt_')} {value}, stored is" in problems(out)


def test_a_config_that_says_something_else_is_found() -> None:
    out = converted(moe_files(EXPERTS), KtRecipe())[1]
    config = json.loads(out["config.json"])
    config["ktransformers"]["threadpool_count"] = 4
    found = problems({**out, "config.json": json.dumps(config).encode()})
    assert "config.json: says threadpool_count 4, stored is 1" in found
    config["ktransformers"] = {"method": "INT8"}
    with pytest.raises(CheckpointError, match="must hold the source's names"):
        checked({**out, "config.json": json.dumps(config).encode()})


def test_an_incomplete_expert_is_found() -> None:
    """A scale, a part, or a whole expert is gone."""
    out = converted(moe_files(EXPERTS), KtRecipe(threadpool_count=2, experts_only=True))[1]
    stored = tensors_in(out)
    for lost, said in (
        ("blk.1.ffn_up_exps.1.numa.1.scale", "the checkpoint is incomplete"),
        ("blk.1.ffn_up_exps.1.numa.1", "the checkpoint is incomplete"),
        ("blk.1.ffn_up_exps.1.", "the checkpoint is incomplete"),
    ):
        left = {name: t for name, t in stored.items() if not name.startswith(lost)}
        files = {"model.safetensors": save(left, {"format": "pt"}), "config.json": out["config.json"]}
        assert said in problems(files)
    left = {name: t for name, t in stored.items() if "_exps.1." not in name or name.startswith("blk.0")}
    files = {"model.safetensors": save(left, {"format": "pt"}), "config.json": out["config.json"]}
    assert "layer 1: needs gate projections of the experts 0 to 1, found 1" in problems(files)


def test_codes_of_another_expert_are_found() -> None:
    """Against the source: the error is that of other numbers."""
    files = moe_files(EXPERTS)
    out = converted(files, KtRecipe(experts_only=True))[1]
    stored = tensors_in(out)
    one, other = (f"blk.0.ffn_gate_exps.{expert}.numa.0" for expert in (0, 1))
    stored[f"{one}.weight"], stored[f"{other}.weight"] = stored[f"{other}.weight"], stored[f"{one}.weight"]
    damaged = {"model.safetensors": save(stored, {"format": "pt"}), "config.json": out["config.json"]}
    assert len(checked(damaged, files).problems) >= 2


def test_another_source_is_a_note() -> None:
    files = moe_files(EXPERTS)
    out = converted(files, KtRecipe())[1]
    other = moe_files(EXPERTS, rope_theta=1.0)
    assert any("other headers than the checkpoint" in note for note in checked(out, other).notes)
    assert not any("other headers" in note for note in checked(out, files).notes)


# --- trees ----------------------------------------------------------------------------------------------


def test_a_tree_is_read_like_a_checkpoint() -> None:
    """Every file is a tensor under its merged name."""
    files = moe_files(EXPERTS)
    tree = converted(files, KtRecipe(threadpool_count=2, merge=False))[1]
    merged = converted(files, KtRecipe(threadpool_count=2, experts_only=True))[1]
    found = {i.name: (i.dtype, i.shape) for s in read_checkpoint(MemorySource(tree)).shards.values() for i in s.tensors}
    names = {torch.int8: "I8", torch.float32: "F32"}
    assert found == {name: (names[t.dtype], tuple(t.shape)) for name, t in tensors_in(merged).items()}


def test_a_file_of_another_size_than_its_name_says() -> None:
    tree = converted(moe_files(EXPERTS), KtRecipe(merge=False))[1]
    name = next(name for name in tree if name.endswith("scale_.kt"))
    with pytest.raises(CheckpointError, match="its name says"):
        read_checkpoint(MemorySource({**tree, name: tree[name][:-4]}))


def test_two_methods_in_one_tree() -> None:
    one, other = (converted(moe_files(EXPERTS), KtRecipe(scheme=s, merge=False))[1] for s in ("kt-int4", "kt-int8"))
    with pytest.raises(CheckpointError, match="files of INT4 and of INT8"):
        read_checkpoint(MemorySource(one | other))


def test_scales_must_be_whole_numbers_of_floats() -> None:
    name = "_layer_0/_numa_0/INT8_gate_0_3Byte_scale_.kt"
    with pytest.raises(CheckpointError, match="must hold float32"):
        read_checkpoint(MemorySource({name: b"abc"}))
