"""The shape proof finds what vLLM refuses and what it accepts in silence, and names the tensor.

Headers alone: a checkpoint is planned by mso_hub, and then its headers are changed in the job. How well every kind of
mutation is found, together with `verify`, is in test_mutations.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from models import WIDE, dense_headers, planned
from mso_hub import Recipe
from vllm_mso_hub.compat import private
from vllm_mso_hub.job import Header, Job, Problem, Report
from vllm_mso_hub.shapes import prove

NVFP4 = Recipe(mode="all-linear", activations=4, input_scale=1.0)
RECIPES = {
    "llama": ("llama", NVFP4),
    "moe": ("qwen3_moe", NVFP4),
    "moe-fp8": ("qwen3_moe", Recipe(scheme="fp8", layout="modelopt", mode="all-linear", input_scale=1.0)),
    "deepseek": ("deepseek_v3", NVFP4),
}
LAYER = "model.layers.0."
EXPERT = LAYER + "mlp.experts.3."
W13 = LAYER + "mlp.experts.routed_experts.w13_"
W2 = LAYER + "mlp.experts.routed_experts.w2_"
Folders = Callable[[str], Path]
Edit = Callable[[Header], Header | None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("planned")

    def folder(name: str) -> Path:
        architecture, recipe = RECIPES[name]
        source = root / f"{architecture}-bf16"
        if not source.exists():
            dense_headers(architecture, source, WIDE)
        return root / name if (root / name).exists() else planned(source, recipe, root / name)

    return folder


def edited(job: Job, edit: Edit) -> Job:
    return replace(job, tensors=tuple(kept for header in job.tensors if (kept := edit(header)) is not None))


def without(pattern: str) -> Edit:
    return lambda header: None if re.fullmatch(pattern, header.name) else header


def stored(name: str, shape: tuple[int, ...] | None = None, dtype: str | None = None) -> Edit:
    def edit(header: Header) -> Header:
        if header.name != name:
            return header
        return replace(header, shape=shape or header.shape, dtype=dtype or header.dtype)

    return edit


def found(report: Report) -> list[tuple[str, str, str, tuple[int, ...]]]:
    assert report.refused is None, report.refused
    return [(p.kind, p.tensor, p.parameter, p.ranks) for p in report.problems]


def only(report: Report) -> Problem:
    (problem,) = report.problems
    return problem


def test_a_whole_checkpoint_has_no_problems_at_any_size(folders: Folders) -> None:
    report = prove(Job.of_folder(folders("llama"), tp=(1, 2, 4, 8, 16)))
    assert report.ok, report.problems
    assert [len(world.rank_bytes) for world in report.worlds] == [1, 2, 4, 8, 16]
    assert report.worlds[1].rank_bytes[0] * 2 == pytest.approx(report.worlds[0].rank_bytes[0], rel=0.01)
    assert (report.architecture, report.vllm[:2], report.peak_rss > 10**8) == ("LlamaForCausalLM", "0.", True)
    assert Report.from_dict(json.loads(json.dumps(report.as_dict()))) == report


@pytest.mark.parametrize(
    ("name", "tp", "ep"),
    [
        ("llama", (1, 2), False),
        ("moe", (1, 4), False),
        ("moe", (1, 4), True),
        ("deepseek", (2,), False),
        ("deepseek", (2,), True),
    ],
)
def test_pipeline_stages_and_expert_parallelism_load_as_well(
    name: str, tp: tuple[int, ...], ep: bool, folders: Folders
) -> None:
    report = prove(Job.of_folder(folders(name), tp=tp, pp=2, ep=ep))
    assert report.ok, report.problems
    assert [len(world.rank_bytes) for world in report.worlds] == [size * 2 for size in tp]


def test_a_model_does_not_inherit_the_pipeline_stage_of_one_that_is_gone(folders: Folders) -> None:
    """vLLM remembers by address which layers a stage lacks, and addresses come again."""
    known = private("vllm.model_executor.models.utils", "_model_to_pp_missing_layer_names")
    known[0] = ["model.embed_tokens"]
    assert prove(Job.of_folder(folders("llama"), tp=(1,), pp=2)).ok
    assert 0 not in known


MISSING = [
    ("llama", LAYER + r"self_attn\.k_proj\.weight_scale", "partial", LAYER + "self_attn.qkv_proj.weight_scale"),
    ("llama", LAYER + r"mlp\.up_proj\.weight_packed", "partial", LAYER + "mlp.gate_up_proj.weight_packed"),
    ("llama", LAYER + r"mlp\.down_proj\.weight_scale", "missing", LAYER + "mlp.down_proj.weight_scale"),
    ("llama", LAYER + r"mlp\.down_proj\.weight_global_scale", "missing", LAYER + "mlp.down_proj.weight_global_scale"),
    ("llama", LAYER + r"mlp\.down_proj\.input_global_scale", "missing", LAYER + "mlp.down_proj.input_global_scale"),
    ("llama", LAYER + r"input_layernorm\.weight", "missing", LAYER + "input_layernorm.weight"),
    ("llama", r"model\.norm\.weight", "missing", "model.norm.weight"),
    ("llama", r"lm_head\.weight", "missing", "lm_head.weight"),
    ("moe", EXPERT + r"gate_proj\.weight_scale", "partial", W13 + "weight_scale"),
    ("moe", EXPERT + r"down_proj\.weight_packed", "partial", W2 + "weight_packed"),
    ("moe-fp8", EXPERT + r"up_proj\.weight_scale", "partial", W13 + "weight_scale"),
    ("moe-fp8", LAYER + r"mlp\.gate\.weight", "missing", LAYER + "mlp.gate.weight"),
    ("deepseek", LAYER + r"self_attn\.kv_b_proj\.weight_scale", "missing", LAYER + "self_attn.kv_b_proj.weight_scale"),
]


@pytest.mark.parametrize(("name", "pattern", "kind", "parameter"), MISSING)
def test_a_missing_tensor_is_named_with_the_parameter_that_lacks_it(
    name: str, pattern: str, kind: str, parameter: str, folders: Folders
) -> None:
    report = prove(edited(Job.of_folder(folders(name), tp=(2,)), without(pattern)))
    assert found(report) == [(kind, pattern.replace("\\", ""), parameter, (0, 1))]
    assert "is missing" in only(report).message


def test_a_scale_that_no_layer_has_is_still_named(folders: Folders) -> None:
    job = edited(Job.of_folder(folders("llama"), tp=(1,)), without(r".*\.q_proj\.weight_scale"))
    assert [p.tensor for p in prove(job).problems] == [
        f"model.layers.{layer}.self_attn.q_proj.weight_scale" for layer in (0, 1)
    ]


def test_an_expert_that_no_layer_has_is_named_by_the_configuration(folders: Folders) -> None:
    job = edited(Job.of_folder(folders("moe-fp8"), tp=(1,)), without(r".*\.experts\.7\..*"))
    gone = {header.name for header in Job.of_folder(folders("moe-fp8")).tensors if ".experts.7." in header.name}
    assert {p.tensor for p in prove(job).problems} == gone


def test_a_missing_layer_is_all_of_its_tensors(folders: Folders) -> None:
    whole = Job.of_folder(folders("moe"), tp=(1,))
    gone = {header.name for header in whole.tensors if header.name.startswith("model.layers.1.")}
    report = prove(edited(whole, without(r"model\.layers\.1\..*")))
    assert {(p.kind, p.tensor) for p in report.problems} == {("missing", name) for name in gone}


def test_all_bad_tensors_are_listed_and_nothing_that_follows_from_them(folders: Folders) -> None:
    bad = {LAYER + "mlp.gate_proj.weight_packed", "model.layers.1.self_attn.o_proj.weight_scale", "lm_head.weight"}
    job = edited(
        Job.of_folder(folders("llama"), tp=(2,)),
        lambda header: replace(header, shape=(7, 9)) if header.name in bad else header,
    )
    assert {(p.kind, p.tensor, p.ranks) for p in prove(job).problems} == {("load", name, (0, 1)) for name in bad}


def test_a_refused_tensor_says_how_its_kind_is_stored_elsewhere(folders: Folders) -> None:
    name = LAYER + "mlp.down_proj.weight_scale"
    problem = only(prove(edited(Job.of_folder(folders("llama"), tp=(1,)), stored(name, (64, 1024)))))
    assert (problem.expected, problem.found) == ("F8_E4M3 [1024, 64], as in other layers", "F8_E4M3 [64, 1024]")


def test_an_unknown_tensor_is_refused_and_an_unknown_expert_is_never_read(folders: Folders) -> None:
    job = Job.of_folder(folders("moe"), tp=(2,))
    more = tuple(
        Header(name, "BF16", (1024,), "more.safetensors")
        for name in (LAYER + "mlp.experts.99.down_proj.weight_packed", LAYER + "self_attn.strange.weight")
    )
    report = prove(replace(job, tensors=job.tensors + more))
    assert [(p.kind, p.tensor) for p in report.problems] == [("ignored", more[0].name), ("load", more[1].name)]


def test_a_tensor_that_is_too_large_is_read_in_part(folders: Folders) -> None:
    name = LAYER + "mlp.gate_proj.weight_scale"
    problem = only(prove(edited(Job.of_folder(folders("llama"), tp=(2,)), stored(name, (1025, 64)))))
    assert (problem.kind, problem.tensor, problem.ranks) == ("unread", name, (0, 1))
    assert (problem.expected, problem.found) == ("65,600 elements read", "65,536")


@pytest.mark.parametrize(("projection", "shape"), [("gate_proj", (512, 512)), ("down_proj", (1024, 256))])
def test_an_expert_that_is_too_small_is_named(projection: str, shape: tuple[int, int], folders: Folders) -> None:
    name = f"{EXPERT}{projection}.weight_packed"
    problem = only(prove(edited(Job.of_folder(folders("moe"), tp=(2,)), stored(name, shape))))
    assert (problem.kind, problem.tensor, problem.found) == ("partial", name, "131,072")
    assert problem.expected == "262,144 elements written"


@pytest.mark.parametrize(
    ("name", "tensor", "dtype", "wanted"),
    [
        ("llama", LAYER + "mlp.down_proj.weight_scale", "U8", "float8_e4m3fn"),
        ("llama", LAYER + "mlp.down_proj.weight_scale", "F32", "float8_e4m3fn"),
        ("moe-fp8", EXPERT + "down_proj.weight", "BF16", "float8_e4m3fn"),
        ("moe-fp8", EXPERT + "down_proj.weight", "I8", "float8_e4m3fn"),
    ],
)
def test_a_dtype_that_vllm_converts_by_value_is_a_cast(
    name: str, tensor: str, dtype: str, wanted: str, folders: Folders
) -> None:
    problem = only(prove(edited(Job.of_folder(folders(name), tp=(2,)), stored(tensor, dtype=dtype))))
    assert (problem.kind, problem.tensor, problem.expected) == ("cast", tensor, wanted)


def test_groups_that_the_ranks_would_cut_are_found_with_the_sizes_that_fit(tmp_path: Path) -> None:
    size = replace(WIDE, width=1056)  # 66 groups of 16: 33 for each of two ranks, 16.5 for each of four
    folder = planned(dense_headers("llama", tmp_path / "dense", size), NVFP4, tmp_path / "planned")
    report = prove(Job.of_folder(folder, tp=(1, 2, 4)))
    assert [bool(world.problems) for world in report.worlds] == [False, False, True]
    names = {f"model.layers.{layer}.mlp.down_proj.weight_scale" for layer in (0, 1)}
    assert {(p.kind, p.tensor) for p in report.problems} == {("unread", name) for name in names}
    assert all("66 does not divide by 4 ranks; sizes that fit are 1, 2, 3" in p.message for p in report.problems)


def test_only_the_first_layers_are_loaded_when_that_is_asked(folders: Folders) -> None:
    bad = stored("model.layers.1.mlp.down_proj.weight_scale", (3, 3))
    job = edited(Job.of_folder(folders("llama"), tp=(2,), layers=1), bad)
    report = prove(job)
    assert report.ok, report.problems
    assert not prove(replace(job, layers=2)).ok


def test_what_a_healthy_model_leaves_unread_is_no_problem(folders: Folders) -> None:
    job = Job.of_folder(folders("deepseek"), tp=(2,))
    config = json.loads((folders("deepseek") / "config.json").read_text())
    drafting = [replace(h, name=h.name.replace(".1.", ".2.", 1)) for h in job.tensors if "layers.1." in h.name]
    rotary = [Header(LAYER + "self_attn.rotary_emb.inv_freq", "F32", (32,), "more.safetensors")]
    job = replace(job, tensors=(*job.tensors, *drafting, *rotary))
    scratch = folders("deepseek").parent / "drafting"
    scratch.mkdir()
    (scratch / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    assert found(prove(replace(job, folder=str(scratch)))) == []


def test_a_head_that_is_the_embedding_may_be_stored_or_not(folders: Folders, tmp_path: Path) -> None:
    config = json.loads((folders("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    job = replace(Job.of_folder(folders("llama"), tp=(1, 2)), folder=str(tmp_path))
    assert found(prove(job)) == []
    assert found(prove(edited(job, without(r"lm_head\.weight")))) == []


def test_the_same_process_proves_the_same_twice(folders: Folders) -> None:
    job = edited(Job.of_folder(folders("moe"), tp=(2,)), without(EXPERT + r"up_proj\.weight_scale"))
    assert found(prove(job)) == found(prove(job)) != []


def test_sparse_attention_is_proven_although_a_cpu_has_none(tmp_path: Path) -> None:
    """DeepSeek-V3.2: the indexer's tensors are loaded like all others, and one that lacks is named."""
    source = dense_headers("deepseek_v3", tmp_path / "in", WIDE)
    config = json.loads((source / "config.json").read_text())
    sparse = {"index_topk": 64, "index_n_heads": 8, "index_head_dim": 128}
    config |= {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", **sparse}
    (source / "config.json").write_text(json.dumps(config))
    shapes = {
        "wq_b.weight": ("BF16", (8 * 128, config["q_lora_rank"])), "wk.weight": ("BF16", (128, config["hidden_size"])),
        "weights_proj.weight": ("BF16", (8, config["hidden_size"])),
        "k_norm.weight": ("F32", (128,)), "k_norm.bias": ("F32", (128,)),
    }  # fmt: skip
    indexers = [
        Header(f"model.layers.{layer}.self_attn.indexer.{name}", dtype, shape, "more.safetensors")
        for layer in range(config["num_hidden_layers"])
        for name, (dtype, shape) in shapes.items()
    ]
    job = Job.of_folder(source, tp=(1, 2))
    job = replace(job, tensors=(*job.tensors, *indexers))
    assert found(prove(job)) == []
    lost = LAYER + "self_attn.indexer.wq_b.weight"
    assert {problem.tensor for problem in prove(edited(job, without(re.escape(lost)))).problems} == {lost}
