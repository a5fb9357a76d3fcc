"""The plan promises exactly what is written: sizes, places, names and files, from headers alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import groupby
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from torch import Tensor

from mso_hub.checkpoint import DTYPE_BITS, Shard, header_length, parse_header
from mso_hub.errors import CheckpointError, PlanError, RecipeError
from mso_hub.formats import Scheme
from mso_hub.pipeline import convert, make_plan
from mso_hub.plan import Plan, Recipe, Rule
from mso_hub.plan.calibration import Calibration
from mso_hub.plan.method import Method
from mso_hub.sink import MemorySink
from mso_hub.source import MemorySource
from tests.helpers import INDEX, checkpoint_files, in_shards, random_tensor, tensors_in

CONFIG: dict[str, Any] = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2}
L = "model.layers.0"
LINEAR = [
    *(f"{L}.self_attn.{leaf}.weight" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"{L}.mlp.{leaf}.weight" for leaf in ("gate_proj", "up_proj", "down_proj")),
    *(f"model.layers.1.mlp.experts.{e}.{leaf}.weight" for e in (0, 1) for leaf in ("w1", "w2", "w3", "up_proj")),
    "model.layers.1.mlp.gate.weight",
    "lm_head.weight",
]
OTHER = ["model.norm.weight", "model.layers.0.self_attn.q_proj.bias", "rotary.inv_freq", "counter", "mask", "table"]
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
ANY = (*FLOATS, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def plan_of(files: Mapping[str, bytes], **recipe: Any) -> Plan:
    """The plan for files in memory."""
    return make_plan(MemorySource(files, "repo"), Recipe(**recipe))


def write(files: Mapping[str, bytes], **recipe: Any) -> tuple[Plan, dict[str, bytes]]:
    """The plan and the files that a whole run leaves."""
    sink = MemorySink()
    plan = convert(MemorySource(files, "repo"), sink, Recipe(**recipe))
    return plan, sink.files


def shard_of(data: bytes, name: str) -> Shard:
    """Header of an output shard, read with all checks."""
    length = header_length(data[:8], name, len(data))
    return parse_header(data[8 : 8 + length], name, len(data))


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def mlp(prefix: str = L, rows: int = 32, **settings: Any) -> dict[str, Tensor]:
    """A gated MLP with a width of `rows`."""
    shapes = {"gate_proj": (rows, 32), "up_proj": (rows, 32), "down_proj": (32, 32)}
    return {f"{prefix}.mlp.{leaf}.weight": random_tensor(*shape, **settings) for leaf, shape in shapes.items()}


# --- the property ---------------------------------------------------------------------------------


@st.composite
def repos(draw: st.DrawFn) -> dict[str, bytes]:
    """Any mixture of linear layers with odd row counts and other tensors of any kind, over one to three shards."""
    tensors: dict[str, Tensor] = {}
    for seed, name in enumerate(draw(st.lists(st.sampled_from(LINEAR), unique=True, min_size=1, max_size=12))):
        rows, columns = draw(st.integers(1, 5)), draw(st.sampled_from([16, 32, 48]))
        tensors[name] = random_tensor(rows, columns, dtype=draw(st.sampled_from(FLOATS)), seed=seed, spread=seed + 1)
    for seed, name in enumerate(draw(st.lists(st.sampled_from(OTHER), unique=True, max_size=4))):
        shape = draw(st.lists(st.integers(0, 5), max_size=1 if name.endswith("weight") else 3))
        tensors[name] = random_tensor(*shape, dtype=torch.float32, seed=seed, spread=9).to(draw(st.sampled_from(ANY)))
    count = draw(st.integers(1, 3))
    shards: dict[str, dict[str, Tensor]] = {}
    for name in draw(st.permutations(sorted(tensors))):
        shards.setdefault(f"model-{draw(st.integers(1, count))}.safetensors", {})[name] = tensors[name]
    return checkpoint_files(shards, CONFIG, draw(st.sampled_from([None, True, False])))


recipes = st.builds(
    Recipe,
    layout=st.sampled_from(["compressed-tensors", "modelopt"]),
    mode=st.sampled_from(["mlp", "all-linear"]),
    input_scale=st.sampled_from([None, 1.0]),
    scale_search=st.sampled_from(["absmax", "mse"]),
)


@given(files=repos(), recipe=recipes)
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
def test_the_plan_promises_exactly_what_is_written(files: dict[str, bytes], recipe: Recipe) -> None:
    """Sizes, order, alignment, index and reads: all of them follow from the headers."""
    source, sink = MemorySource(files), MemorySink()
    plan = plan_or_none(source, recipe)
    assume(plan is not None)
    assert plan is not None
    assert all(begin == 0 for _, begin, _ in source.reads)
    source.reads.clear()
    assert convert(source, sink, recipe) == plan
    assert {n: len(d) for n, d in sink.files.items() if n != "mso_hub.json"} == plan.sizes(source.files())
    assert plan.write_bytes == sum(len(sink.files[s.name]) for s in plan.shards) + sum(map(len, plan.files.values()))
    assert plan.read_bytes == sum(t.numel() * t.element_size() for t in tensors_in(files).values())
    for planned in plan.shards:
        check_shard(planned.name, sink.files[planned.name], plan)
    check_copies(plan, tensors_in(files), tensors_in(sink.files))
    check_units(plan, tensors_in(sink.files))
    check_index(files, sink.files)
    check_reads(source, plan)


def plan_or_none(source: MemorySource, recipe: Recipe) -> Plan | None:
    """The plan, None when nothing is chosen; any other problem is raised."""
    try:
        return make_plan(source, recipe)
    except PlanError as error:
        if "the recipe chooses no weight" in str(error):
            return None
        raise


def check_shard(name: str, data: bytes, plan: Plan) -> None:
    """The library opens the shard and finds what was planned, each tensor at a multiple of its item size."""
    planned = next(shard for shard in plan.shards if shard.name == name)
    assert data.startswith(planned.header)
    assert len(data) == planned.nbytes
    written = shard_of(data, name)
    assert sorted(written.tensors, key=repr) == sorted(planned.tensors, key=repr)
    assert {n: tuple(t.shape) for n, t in load(data).items()} == {i.name: i.shape for i in planned.tensors}
    assert all(i.begin % max(1, DTYPE_BITS[i.dtype] // 8) == 0 for i in written.tensors)
    runs = [key for key, _ in groupby(planned.steps, key=lambda step: step.unit or step.weight.name)]
    assert len(runs) == len(set(runs)), "members of a unit must follow one another"
    copied = [info for step in planned.steps if step.unit is None for info in step.outputs]
    names = [info.name for info in copied]
    assert names == [i.name for i in planned.tensors if i.name in names], "what is copied must be written as it comes"


def check_copies(plan: Plan, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """What stays has its bits; what is quantized is gone, and its outputs are there."""
    expected: dict[str, tuple[int, ...]] = {}
    for step in (step for shard in plan.shards for step in shard.steps):
        expected |= {info.name: info.shape for info in step.outputs}
        if step.unit is None:
            name = step.weight.name
            assert (after[name].dtype, bits(after[name])) == (before[name].dtype, bits(before[name]))
    assert {name: tuple(t.shape) for name, t in after.items()} == expected
    assert {step.weight.name for shard in plan.shards for step in shard.steps} == set(before)


def check_units(plan: Plan, after: Mapping[str, Tensor]) -> None:
    """Every member of a unit, in whatever shard, has the same global scale."""
    suffix = "weight_scale_2" if plan.recipe.layout == "modelopt" else "weight_global_scale"
    for members in plan.units.values():
        assert len({bits(after[f"{weight.module}.{suffix}"]) for weight in members}) == 1


def check_index(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> None:
    """An index exists where the source had one, names every tensor and counts its bytes."""
    assert (INDEX in after) == (INDEX in before)
    if INDEX not in after:
        return
    index = json.loads(after[INDEX])
    shards = {n: shard_of(data, n) for n, data in after.items() if n.endswith(".safetensors")}
    assert index["weight_map"] == {i.name: n for n, shard in shards.items() for i in shard.tensors}
    assert index["metadata"] == {"total_size": sum(i.nbytes for s in shards.values() for i in s.tensors)}


def check_reads(source: MemorySource, plan: Plan) -> None:
    """Each byte is read once; a member of a unit that spans shards once more, for its amax.

    A file that stays as it is is read from its first byte, beside the read of its header.
    """
    for shard in (s for s in plan.shards if s.original is not None):
        assert source.reads.count((shard.name, 0, shard.nbytes)) == 2
    spanning = {
        weight.name
        for members in plan.units.values()
        if len({weight.home.file for weight in members}) > 1
        for weight in members
    }
    data_reads = [(file, begin, end) for file, begin, end in source.reads if begin > 0]
    for step in (step for shard in plan.shards if shard.original is None for step in shard.steps):
        info = step.weight.home
        times = sum(min(end, info.end) - max(begin, info.begin) for file, begin, end in data_reads
                    if file == info.file and begin < info.end and end > info.begin)  # fmt: skip
        allowed = {1, 2} if info.name in spanning else {1}
        assert info.nbytes == 0 or times in {n * info.nbytes for n in allowed}, info.name


# --- shards and indices ---------------------------------------------------------------------------


def test_shards_keep_their_names_and_tensors_their_shard() -> None:
    """A conversion never moves a weight: whoever knows the source finds everything where it was."""
    tensors = mlp() | {"model.norm.weight": random_tensor(32)}
    shards = in_shards(tensors, 3)
    _, files = write(checkpoint_files(shards, CONFIG))
    for name, members in shards.items():
        modules = {tensor.removesuffix(".weight") for tensor in members}
        found = {info.name.rpartition(".")[0] for info in shard_of(files[name], name).tensors}
        assert found == modules


def test_a_single_file_stays_a_single_file() -> None:
    """No index appears where there was none."""
    _, files = write(checkpoint_files({"model.safetensors": mlp()}, CONFIG))
    assert sorted(files) == ["config.json", "model.safetensors", "mso_hub.json"]


def test_unindexed_files_stay_unindexed() -> None:
    """A file beside the index is converted with the others, and the index does not start to list it."""
    extra = checkpoint_files({"extra.safetensors": mlp("model.layers.1")})
    plan, files = write(checkpoint_files(in_shards(mlp(), 2), CONFIG) | extra)
    listed = set(json.loads(files[INDEX])["weight_map"].values())
    assert "extra.safetensors" not in listed
    assert "model.layers.1.mlp.up_proj.weight_packed" in load(files["extra.safetensors"])
    assert {shard.name for shard in plan.shards} == {*listed, "extra.safetensors"}


def test_an_index_below_a_folder_stays_there() -> None:
    """Paths in it stay relative to it; two indices are two name spaces with their own units."""
    parts = {
        f"{part}/{name}": data
        for part, spread in (("one", 0.1), ("two", 7.0))
        for name, data in checkpoint_files(in_shards(mlp(spread=spread), 3)).items()
    }
    plan, files = write(parts | {"config.json": json.dumps(CONFIG).encode()})
    for part in ("one", "two"):
        index = json.loads(files[f"{part}/{INDEX}"])
        for name, shard in index["weight_map"].items():
            assert name in load(files[f"{part}/{shard}"])
    shared = {key: len(members) for key, members in plan.units.items() if len(members) > 1}
    assert sorted(shared.values()) == [2, 2]
    scales = [
        load(files[f"{part}/{json.loads(files[f'{part}/{INDEX}'])['weight_map'][name]}"])[name]
        for part in ("one", "two")
        for name in (f"{L}.mlp.gate_proj.weight_global_scale", f"{L}.mlp.up_proj.weight_global_scale")
    ]
    assert bits(scales[0]) == bits(scales[1]) != bits(scales[2]) == bits(scales[3])


def test_two_folders_without_an_index_do_not_share_scales() -> None:
    """Their weights have the same names; the units are different all the same."""
    apart = {n: {k: v} for n, (k, v) in zip("abc", mlp(spread=0.1).items(), strict=True)}
    large = {n: {k: v} for n, (k, v) in zip("abc", mlp(spread=7.0).items(), strict=True)}
    shards = {
        f"{folder}/{n}.safetensors": v for folder, group in (("x", apart), ("y", large)) for n, v in group.items()
    }
    plan, files = write(checkpoint_files(shards, CONFIG, index=False))
    name = f"{L}.mlp.gate_proj.weight_global_scale"
    assert bits(load(files["x/a.safetensors"])[name]) != bits(load(files["y/a.safetensors"])[name])
    assert sorted(len(members) for members in plan.units.values()) == [1, 1, 2, 2]


def test_what_the_index_says_besides_is_carried() -> None:
    """Other metadata stays; a parameter count that packing makes false goes."""
    files = checkpoint_files(in_shards(mlp(), 2), CONFIG)
    index = json.loads(files[INDEX])
    index["metadata"] |= {"total_parameters": 5, "origin": {"by": "x"}}
    files[INDEX] = json.dumps(index).encode()
    _, written = write(files)
    metadata = json.loads(written[INDEX])["metadata"]
    assert metadata.pop("total_size") > 0
    assert metadata == {"origin": {"by": "x"}}


def test_the_metadata_of_a_shard_is_kept() -> None:
    """transformers asks for format=pt; what else a shard says about itself comes along."""
    files = checkpoint_files({"model.safetensors": mlp()}, CONFIG)
    _, written = write(files)
    assert shard_of(written["model.safetensors"], "model.safetensors").metadata == {"format": "pt"}


def test_an_empty_shard_is_left_out() -> None:
    """Nothing to write is not written, and the plan says so."""
    empty = checkpoint_files({"empty.safetensors": {}})
    plan, files = write(checkpoint_files(in_shards(mlp(), 2), CONFIG) | empty)
    assert "empty.safetensors" not in files
    assert plan.notes == ("1 shards are left without tensors and not written: empty.safetensors",)


VLM = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32},
    "vision_config": {"model_type": "clip_vision_model"},
}


def vlm_text() -> dict[str, Tensor]:
    """The language model of a LLaVA."""
    tensors = mlp() | {"model.embed_tokens.weight": random_tensor(8, 32)}
    return {f"language_model.{name}": tensor for name, tensor in tensors.items()}


def test_a_shard_of_vision_alone_vanishes_with_the_vision_part() -> None:
    """text_only: no shard, no index entry and no byte in total_size is left of it; the prototype never finished."""
    shards = {
        "model-1.safetensors": vlm_text(),
        "model-2.safetensors": {"vision_tower.blocks.0.mlp.fc1.weight": random_tensor(64, 32)},
    }
    for recipe in ({"scheme": "bf16"}, {}):
        plan, files = write(checkpoint_files(shards, VLM), text_only=True, **recipe)
        assert "model-2.safetensors" not in files
        check_index({INDEX: b""}, files)
        assert not any("vision" in name for name in tensors_in(files))
        assert plan.dropped == ("vision_tower.blocks.0.mlp.fc1.weight",)
        assert "vision_config" not in plan.config
    assert tensors_in(files).keys() >= {f"{L}.mlp.up_proj.weight_packed"}


def test_runtime_scales_go_with_the_weights_they_belong_to() -> None:
    """Activation and KV-cache scales mean nothing beside dense weights; a shard that held only them goes."""
    _, packed = write(checkpoint_files(in_shards(mlp(), 2), CONFIG), input_scale=1.0)
    kv = {f"{L}.self_attn.{leaf}": torch.ones(1) for leaf in ("k_scale", "v_scale")}
    plan, dense = write(packed | checkpoint_files({"kv.safetensors": kv}), scheme="bf16")
    assert set(tensors_in(dense)) == set(mlp())
    assert set(plan.dropped) == {*kv, *(n.removesuffix("weight") + "input_global_scale" for n in mlp())}
    assert "kv.safetensors" not in dense
    assert "quantization_config" not in json.loads(dense["config.json"])


# --- problems -------------------------------------------------------------------------------------


def test_nothing_chosen_is_a_problem() -> None:
    """A recipe that leaves everything as it is was not meant."""
    files = checkpoint_files({"m.safetensors": {"lm_head.weight": random_tensor(32, 32)}}, CONFIG)
    with pytest.raises(PlanError, match=r"repo: nothing was written\n  the recipe chooses no weight at all; try"):
        plan_of(files)


def test_every_problem_is_in_one_message() -> None:
    """Eight are spelled out and the rest is counted, patterns and shapes together."""
    bad = {f"model.layers.{n}.mlp.down_proj.weight": random_tensor(32, 24) for n in range(2)}
    files = checkpoint_files({"m.safetensors": bad | mlp("model.layers.1.x")}, CONFIG)
    with pytest.raises(PlanError) as caught:
        plan_of(files, ignore=("*.up_proj", "*.typo"))
    assert len(str(caught.value).splitlines()) == 1 + 2 + 1 + 1
    many = {f"model.layers.0.mlp.experts.{n}.down_proj.weight": random_tensor(32, 24) for n in range(20)}
    with pytest.raises(PlanError, match=r"\n  and 12 more$") as caught:
        plan_of(checkpoint_files({"m.safetensors": many}, CONFIG))
    assert len(str(caught.value).splitlines()) == 1 + 8 + 1


def test_a_pattern_must_match_in_some_name_space() -> None:
    """With two indices a pattern may mean only one of them; one that matches in neither is a typing error."""
    files = {
        **{f"one/{n}": d for n, d in checkpoint_files(in_shards(mlp(), 2)).items()},
        **{f"two/{n}": d for n, d in checkpoint_files(in_shards(mlp("model.layers.1"), 2)).items()},
        "config.json": json.dumps(CONFIG).encode(),
    }
    plan = plan_of(files, ignore=("model.layers.1.mlp.down_proj",), imported_ignore=("model.layers.0.mlp.down*", "x"))
    assert set(plan.kept) == {"model.layers.1.mlp.down_proj", "model.layers.0.mlp.down_proj"}
    assert plan.notes == ("1 imported exclude patterns match nothing here, the first is 'x'",)
    with pytest.raises(PlanError, match=r"\n  ignore 'model\.layers\.2' matches no weight") as caught:
        plan_of(files, ignore=("model.layers.2",))
    assert len(str(caught.value).splitlines()) == 2


def test_an_unknown_scheme_is_refused() -> None:
    """The error lists what there is."""
    with pytest.raises(RecipeError, match=r"format must be one of nvfp4, mxfp4, .* int4_awq, .*bf16, got 'int3'"):
        plan_of(checkpoint_files({"m.safetensors": mlp()}, CONFIG), scheme="int3")


@pytest.mark.parametrize("config", [CONFIG, CONFIG | {"quantization_config": {"quant_method": "compressed-tensors"}}])
def test_nothing_to_decompress_is_a_problem(config: dict[str, Any]) -> None:
    """A dense checkpoint is not copied under another name; a config that says otherwise is called stale."""
    with pytest.raises(PlanError, match="every weight is dense already") as caught:
        plan_of(checkpoint_files({"m.safetensors": mlp()}, config), scheme="bf16")
    assert ("its quantization_config is stale" in str(caught.value)) == ("quantization_config" in config)


FP8 = torch.zeros(32, 32, dtype=torch.float8_e4m3fn)
BYTES = torch.zeros(32, 16, dtype=torch.uint8)
FOREIGN: dict[str, dict[str, Tensor]] = {
    "FP8 with more range": {"weight": FP8.to(torch.float8_e5m2), "weight_scale": torch.ones(1)},
    "FP8 without a scale": {"weight": FP8},
    "FP8 with a scale for every second row": {"weight": FP8, "weight_scale": torch.ones(16, 1, 1)},
    "GPTQ without scales": {
        "qweight": torch.zeros(4, 32, dtype=torch.int32), "qzeros": torch.zeros(1, 4, dtype=torch.int32)},
    "bitsandbytes NF4": {
        "weight": torch.zeros(512, 1, dtype=torch.uint8), "weight.absmax": torch.ones(16),
        "weight.quant_map": torch.ones(16), "weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)},
    "bitsandbytes INT8": {"weight": torch.zeros(32, 32, dtype=torch.int8), "SCB": torch.ones(32)},
    "W4A8_AWQ": {
        "weight": BYTES, "weight_scale": torch.ones(32, 2), "weight_scale_2": torch.ones(()),
        "pre_quant_scale": torch.ones(32)},
    "FP4 with FP8 scales alone": {"weight_packed": BYTES, "weight_scale": FP8[:, :2]},
    "SVDQuant": {"weight": FP8.float(), "svdquant_lora_a": torch.ones(8, 32), "svdquant_lora_b": torch.ones(32, 8)},
}  # fmt: skip


@pytest.mark.parametrize("scheme", ["nvfp4", "bf16"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_quantized_source_without_a_decoder_is_refused(kind: str, scheme: str) -> None:
    """Codes are never copied on as if they were numbers, in either direction, nor beside weights that are decoded."""
    stored = {f"{L}.mlp.down_proj.{suffix}": tensor for suffix, tensor in FOREIGN[kind].items()}
    files = checkpoint_files({"m.safetensors": stored | mlp("model.layers.1")}, CONFIG)
    with pytest.raises((PlanError, CheckpointError), match=r"model\.layers\.0\.mlp\.down_proj"):
        plan_of(files, scheme=scheme)
    scaled = {f"model.layers.1.mlp.gate_proj.{n}": t for n, t in {"weight": FP8, "weight_scale": torch.ones(1)}.items()}
    files = checkpoint_files({"m.safetensors": stored | scaled}, CONFIG)
    with pytest.raises((PlanError, CheckpointError), match=r"model\.layers\.0\.mlp\.down_proj"):
        plan_of(files, scheme=scheme)


def test_a_dense_weight_beside_its_packed_one_is_refused() -> None:
    """Decoding would give two tensors of one name; one of them is stale."""
    _, packed = write(checkpoint_files({"m.safetensors": mlp()}, CONFIG))
    stale = checkpoint_files({"old.safetensors": {f"{L}.mlp.up_proj.weight": random_tensor(32, 32)}})
    for scheme in ("bf16", "nvfp4"):
        with pytest.raises(PlanError, match=rf"{L}\.mlp\.up_proj"):
            plan_of(packed | stale, scheme=scheme)


def test_imported_scales_must_cover_every_module() -> None:
    """W4A4 without an activation scale serves garbage; the largest of a unit serves all its members."""
    files = checkpoint_files({"m.safetensors": mlp()}, CONFIG)
    amax = {f"{L}.mlp.gate_proj": 672.0, f"{L}.mlp.up_proj": 2688.0, f"{L}.mlp.down_proj": 1344.0}
    recipe: dict[str, Any] = {"layout": "modelopt", "input_scale": "imported", "input_amax": amax}
    plan = plan_of(files, **recipe)
    found = {step.weight.module.rpartition(".")[2]: step.extras for shard in plan.shards for step in shard.steps}
    assert found == {"gate_proj": (1.0,), "up_proj": (1.0,), "down_proj": (0.5,)}
    del amax[f"{L}.mlp.down_proj"]
    with pytest.raises(PlanError, match=rf"{L}\.mlp\.down_proj: .*no input_scale"):
        plan_of(files, **recipe)


# --- names of jobs --------------------------------------------------------------------------------


IMPORTED = {"input_scale": "imported"}
INT4 = {"scheme": "w4a16", "group_size": 32}
KV = {"kv_cache": True}
ALL = {"targets": ("*_proj",)}
AMAX = {f"{L}.mlp.{leaf}": 1.0 for leaf in ("gate_proj", "up_proj", "down_proj")}
CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"scheme": "fp8_dynamic"}),
    ({}, {"layout": "modelopt"}),
    ({}, {"mode": "all-linear"}),
    ({}, {"ignore": ("*.down_proj",)}),
    ({}, ALL),
    ({}, {"imported_ignore": ("*.down_proj",)}),
    ({}, {"input_scale": 1.0}),
    (IMPORTED | {"input_amax": AMAX}, {"input_amax": AMAX | {f"{L}.mlp.up_proj": 2.0}}),
    (
        IMPORTED | {"input_amax": AMAX, "calibration": Calibration("text", 1, 8, "0" * 64)},
        {"calibration": Calibration("text", 1, 8, "0" * 64, headroom=4.0)},
    ),
    ({}, {"by_method": Method("gptq", "text", 1, 8, "0" * 64, "1" * 64)}),
    ({}, {"activations": 4}),
    ({}, {"scale_search": "absmax"}),
    ({}, {"skip_layers": (1,)}),
    ({}, {"default_ignore": False}),
    ({}, {"dtype": "F16"}),
    ({}, {"rules": (Rule(Scheme("fp8"), ("*.down_proj",)), Rule(Scheme("nvfp4")))}),
    (INT4, {"group_size": 0}),
    (INT4, {"symmetric": False}),
    ({}, KV),
    (KV | {"mode": "all-linear"}, {"kv_scales": {f"{L}.self_attn": (0.5, 0.25)}}),
]
"""A recipe, and what is changed in it."""


@pytest.mark.parametrize(("recipe", "change"), CHANGES)
def test_another_recipe_is_another_job(recipe: dict[str, Any], change: dict[str, Any]) -> None:
    """A resumed run must never continue with other settings."""
    places = (f"{L}.self_attn", "model.layers.1.self_attn")
    attention = {f"{place}.k_proj.weight": random_tensor(32, 32) for place in places}
    files = checkpoint_files({"m.safetensors": mlp() | attention}, CONFIG)
    assert plan_of(files, **recipe).job == plan_of(dict(files), **recipe).job
    assert plan_of(files, **(recipe | change)).job != plan_of(files, **recipe).job


@pytest.mark.parametrize("change", [{"activations": 4}, {"group_size": 64}, {"search": "absmax"}, {"symmetric": False}])
def test_another_rule_is_another_job(change: dict[str, Any]) -> None:
    """Every field of a rule's scheme counts, as do its targets and the order of the rules."""
    down = {f"{L}.mlp.down_proj.weight": random_tensor(32, 128)}
    files = checkpoint_files({"m.safetensors": mlp(rows=128) | down}, CONFIG)
    scheme = Scheme("nvfp4") if change.keys() & {"activations"} else Scheme("w4a16", group_size=32)
    gated = ("*.gate_proj", "*.up_proj")
    first = (Rule(scheme, ("*.down_proj",)), Rule(Scheme("fp8"), gated))
    second = (Rule(replace(scheme, **change), ("*.down_proj",)), Rule(Scheme("fp8"), gated))
    jobs = {plan_of(files, rules=rules).job for rules in (first, second, first[::-1], second[::-1])}
    assert len(jobs) == 4


def test_the_scheme_and_the_text_part_are_in_the_job_too() -> None:
    """Decoding and text_only need another source to make sense; with these, no field of Recipe is left out above."""
    _, packed = write(checkpoint_files({"m.safetensors": mlp()}, CONFIG))
    assert plan_of(packed, scheme="bf16").job != plan_of(packed).job
    files = checkpoint_files({"m.safetensors": vlm_text()}, VLM)
    assert plan_of(files, text_only=True).job != plan_of(files).job
    llama = checkpoint_files({"m.safetensors": mlp()}, CONFIG)
    assert plan_of(llama, unloadable=True).job != plan_of(llama).job
    tried = {name for recipe, change in CHANGES for name in {**recipe, **change}} | {"text_only", "unloadable"}
    assert tried == {field.name for field in fields(Recipe)}


def test_another_source_is_another_job() -> None:
    """Other weights, another config, another carried file."""
    files = checkpoint_files({"m.safetensors": mlp()}, CONFIG) | {"tokenizer.json": b"{}"}
    others = [
        files | checkpoint_files({"m.safetensors": mlp(seed=1)}),
        files | checkpoint_files({}, CONFIG | {"x": 1}),
        files | {"tokenizer.json": b"[]"},
        files | {"merges.txt": b""},
    ]
    jobs = Counter(plan_of(f).job for f in [files, *others])
    assert set(jobs.values()) == {1}
    assert all(len(job) == 64 for job in jobs)
