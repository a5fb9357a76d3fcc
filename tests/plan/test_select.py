"""Which weights change and which stay, by family, with the names that published checkpoints have."""

from __future__ import annotations

from typing import Any

import pytest

from mso_hub.checkpoint import TensorInfo
from mso_hub.errors import RecipeError
from mso_hub.formats.weight import Weight
from mso_hub.plan import Recipe
from mso_hub.plan.select import Selection, select

REASONS = {
    "+": None,
    "out": "outside the MLP (--all_linear takes it)",
    "other": "not a linear layer's weight",
    "conv": "convolution",
    "embed": "embedding",
    "gate": "linear-attention gate",
    "head": "output head",
    "index": "sparse-attention indexer",
    "MTP": "MTP",
    "no2d": "not a matrix",
    "norm": "norm",
    "project": "multimodal projector",
    "router": "router or gate",
    "vision": "vision or audio tower",
}
"""Words of the table below. Two words in a row: what happens by default, and with --all_linear."""

TABLE = """
Llama, Qwen, Mistral, Gemma
  model.embed_tokens.weight                                 [64,32]      embed    embed
  model.layers.0.self_attn.q_proj.weight                    [32,32]      out      +
  model.layers.0.self_attn.k_proj.weight                    [16,32]      out      +
  model.layers.0.self_attn.v_proj.weight                    [16,32]      out      +
  model.layers.0.self_attn.v_proj.bias                      [16]         other    other
  model.layers.0.self_attn.o_proj.weight                    [32,32]      out      +
  model.layers.0.self_attn.q_norm.weight                    [8]          other    other
  model.layers.0.mlp.gate_proj.weight                       [64,32]      +        +
  model.layers.0.mlp.up_proj.weight                         [64,32]      +        +
  model.layers.0.mlp.down_proj.weight                       [32,64]      +        +
  model.layers.0.input_layernorm.weight                     [32]         other    other
  model.layers.0.pre_feedforward_layernorm.weight           [32]         other    other
  model.norm.weight                                         [32]         other    other
  lm_head.weight                                            [64,32]      head     head

Mixtral, MiniMax
  model.layers.0.block_sparse_moe.gate.weight               [4,32]       router   router
  model.layers.0.block_sparse_moe.e_score_correction_bias   [4]          other    other
  model.layers.0.block_sparse_moe.experts.0.w1.weight       [64,32]      +        +
  model.layers.0.block_sparse_moe.experts.0.w2.weight       [32,64]      +        +
  model.layers.0.block_sparse_moe.experts.0.w3.weight       [64,32]      +        +

Qwen-MoE
  model.layers.0.mlp.gate.weight                            [4,32]       router   router
  model.layers.0.mlp.shared_expert_gate.weight              [1,32]       router   router
  model.layers.0.mlp.shared_expert.gate_proj.weight         [64,32]      +        +
  model.layers.0.mlp.shared_expert.up_proj.weight           [64,32]      +        +
  model.layers.0.mlp.shared_expert.down_proj.weight         [32,64]      +        +
  model.layers.0.mlp.experts.0.gate_proj.weight             [64,32]      +        +
  model.layers.0.mlp.experts.0.up_proj.weight               [64,32]      +        +
  model.layers.0.mlp.experts.0.down_proj.weight             [32,64]      +        +

DeepSeek, Kimi-K2, GLM: MLA, sparse attention, MTP counted on as layers
  model.layers.1.self_attn.q_a_proj.weight                  [32,32]      out      +
  model.layers.1.self_attn.q_a_layernorm.weight             [32]         other    other
  model.layers.1.self_attn.q_b_proj.weight                  [64,32]      out      +
  model.layers.1.self_attn.kv_a_proj_with_mqa.weight        [32,32]      out      +
  model.layers.1.self_attn.kv_b_proj.weight                 [64,32]      out      +
  model.layers.1.self_attn.indexer.wk.weight                [16,32]      index    index
  model.layers.1.self_attn.indexer.wq_b.weight              [64,32]      index    index
  model.layers.1.self_attn.indexer.weights_proj.weight      [4,32]       index    index
  model.layers.1.mlp.gate.weight                            [4,32]       router   router
  model.layers.1.mlp.gate.e_score_correction_bias           [4]          other    other
  model.layers.1.mlp.shared_experts.gate_proj.weight        [64,32]      +        +
  model.layers.1.mlp.shared_experts.up_proj.weight          [64,32]      +        +
  model.layers.1.mlp.shared_experts.down_proj.weight        [32,64]      +        +
  model.layers.1.mlp.experts.3.gate_proj.weight             [64,32]      +        +
  model.layers.1.mlp.experts.3.up_proj.weight               [64,32]      +        +
  model.layers.1.mlp.experts.3.down_proj.weight             [32,64]      +        +
  model.layers.2.eh_proj.weight                             [32,64]      MTP      MTP
  model.layers.2.enorm.weight                               [32]         other    other
  model.layers.2.embed_tokens.weight                        [64,32]      embed    embed
  model.layers.2.shared_head.head.weight                    [64,32]      MTP      MTP
  model.layers.2.self_attn.o_proj.weight                    [32,32]      MTP      MTP
  model.layers.2.mlp.gate.weight                            [4,32]       router   router
  model.layers.2.mlp.experts.0.gate_proj.weight             [64,32]      MTP      MTP
  model.layers.2.mlp.experts.0.up_proj.weight               [64,32]      MTP      MTP

MTP by name
  mtp.fc.weight                                             [32,64]      MTP      MTP
  mtp.layers.0.mlp.up_proj.weight                           [64,32]      MTP      MTP
  mtp.layers.0.mlp.experts.0.up_proj.weight                 [64,32]      MTP      MTP
  mtp.layers.0.self_attn.q_proj.weight                      [32,32]      MTP      MTP
  model.mtp_layers.0.mlp.up_proj.weight                     [64,32]      MTP      MTP
  model.mtp_block.0.mlp.up_proj.weight                      [64,32]      MTP      MTP

Llama-4 with fused experts
  model.layers.0.feed_forward.router.weight                 [4,32]       router   router
  model.layers.0.feed_forward.experts.gate_up_proj          [4,32,96]    +        +
  model.layers.0.feed_forward.experts.down_proj             [4,48,32]    +        +
  model.layers.0.feed_forward.shared_expert.gate_proj.weight [48,32]     +        +
  model.layers.0.feed_forward.shared_expert.up_proj.weight  [48,32]      +        +
  model.layers.0.feed_forward.shared_expert.down_proj.weight [32,48]     +        +
  model.layers.1.feed_forward.gate_proj.weight              [64,32]      +        +
  model.layers.1.feed_forward.up_proj.weight                [64,32]      +        +

Qwen3-Next
  model.layers.0.linear_attn.A_log                          [4]          other    other
  model.layers.0.linear_attn.dt_bias                        [4]          other    other
  model.layers.0.linear_attn.conv1d.weight                  [64,1,4]     conv     conv
  model.layers.0.linear_attn.in_proj_ba.weight              [8,32]       gate     gate
  model.layers.0.linear_attn.in_proj_qkvz.weight            [96,32]      out      +
  model.layers.0.linear_attn.norm.weight                    [8]          other    other
  model.layers.0.linear_attn.out_proj.weight                [32,32]      out      +

Qwen3.5
  model.language_model.layers.0.linear_attn.in_proj_qkv.weight [96,32]   out      +
  model.language_model.layers.0.linear_attn.in_proj_z.weight [32,32]     out      +
  model.language_model.layers.0.linear_attn.in_proj_a.weight [4,32]      gate     gate
  model.language_model.layers.0.linear_attn.in_proj_b.weight [4,32]      gate     gate
  model.language_model.layers.0.mlp.gate_proj.weight        [64,32]      +        +
  model.language_model.layers.0.mlp.up_proj.weight          [64,32]      +        +

Kimi-Linear KDA
  model.layers.0.self_attn.q_proj.weight                    [32,32]      out      +
  model.layers.0.self_attn.k_proj.weight                    [32,32]      out      +
  model.layers.0.self_attn.v_proj.weight                    [32,32]      out      +
  model.layers.0.self_attn.q_conv1d.weight                  [32,1,4]     conv     conv
  model.layers.0.self_attn.f_a_proj.weight                  [16,32]      out      +
  model.layers.0.self_attn.f_b_proj.weight                  [32,16]      gate     gate
  model.layers.0.self_attn.b_proj.weight                    [4,32]       out      +
  model.layers.0.self_attn.g_a_proj.weight                  [16,32]      out      +
  model.layers.0.self_attn.g_b_proj.weight                  [32,16]      gate     gate

Mamba hybrids
  backbone.embeddings.weight                                [64,32]      embed    embed
  backbone.layers.0.mixer.conv1d.weight                     [64,1,4]     conv     conv
  backbone.layers.0.mixer.in_proj.weight                    [96,32]      out      +
  backbone.layers.1.mixer.experts.0.up_proj.weight          [64,32]      +        +
  backbone.layers.1.mixer.shared_experts.up_proj.weight     [64,32]      +        +
  backbone.layers.1.mixer.gate.weight                       [4,32]       router   router

Kimi-K2.5
  language_model.model.layers.0.mlp.up_proj.weight          [64,32]      +        +
  language_model.model.layers.1.self_attn.o_proj.weight     [32,32]      out      +
  language_model.lm_head.weight                             [64,32]      head     head
  vision_tower.patch_embed.proj.weight                      [32,3,4,4]   vision   vision
  vision_tower.encoder.blocks.0.wqkv.weight                 [96,32]      vision   vision
  vision_tower.encoder.blocks.0.mlp.fc1.weight              [32,64]      vision   vision
  mm_projector.proj.0.weight                                [64,64]      project  project

Vision towers and projectors elsewhere
  visual.blocks.0.mlp.gate_proj.weight                      [64,32]      vision   vision
  model.visual.blocks.0.mlp.linear_fc1.weight               [64,32]      vision   vision
  model.visual.merger.mlp.0.weight                          [64,64]      vision   vision
  visual.patch_embed.proj.weight                            [32,3,2,4,4] vision   vision
  vision_model.encoder.layers.0.mlp.fc1.weight              [64,32]      vision   vision
  model.vision_tower.vision_model.encoder.layers.0.mlp.fc2.weight [32,64] vision  vision
  model.audio_tower.layers.0.fc1.weight                     [64,32]      vision   vision
  thinker.audio_tower.layers.0.fc1.weight                   [64,32]      vision   vision
  talker.model.layers.0.mlp.up_proj.weight                  [64,32]      vision   vision
  vpm.encoder.layers.0.mlp.fc1.weight                       [64,32]      vision   vision
  resampler.kv_proj.weight                                  [64,32]      project  project
  multi_modal_projector.linear_1.weight                     [64,32]      project  project
  model.connector.modality_projection.proj.weight           [64,32]      project  project
  mlp1.1.weight                                             [64,32]      project  project
  model.embed_vision.embedding_projection.weight            [64,32]      project  project
  aligner.layers.0.weight                                   [64,32]      project  project

Heads, embeddings and convolutions of other families
  transformer.word_embeddings.weight                        [64,32]      embed    embed
  transformer.wte.weight                                    [64,32]      embed    embed
  transformer.wpe.weight                                    [64,32]      embed    embed
  transformer.output_layer.weight                           [64,32]      head     head
  transformer.h.0.mlp.dense_h_to_4h.weight                  [64,32]      +        +
  model.tok_embeddings.weight                               [64,32]      embed    embed
  score.weight                                              [2,32]       head     head
  model.layers.0.conv.conv.weight                           [32,1,4]     conv     conv
  rel_pos.weight                                            [4,32,32]    no2d     no2d
"""


def rows() -> list[tuple[str, str, tuple[int, ...], str, str]]:
    """Lines of the table: family, tensor, shape, default decision, decision with --all_linear."""
    found, family = [], ""
    for line in TABLE.splitlines():
        if not line.startswith(" "):
            family = line or family
            continue
        name, shape, default, everything = line.split()
        found.append((family, name, tuple(map(int, shape[1:-1].split(","))), default, everything))
    return found


ROWS = rows()
FAMILIES = list(dict.fromkeys(family for family, *_ in ROWS))
CONFIG = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}


def dense(name: str, *shape: int, dtype: str = "BF16") -> Weight:
    """A weight that lies in one tensor."""
    return Weight(name, dtype, shape, {"weight": TensorInfo(name, dtype, shape, "model.safetensors")})


def linear(*modules: str) -> list[Weight]:
    """Matrices that could be quantized."""
    return [dense(f"{module}.weight", 32, 32) for module in modules]


def choose(weights: list[Weight], config: dict[str, Any] | None = None, **settings: Any) -> Selection:
    """`select` for NVFP4."""
    return select(weights, Recipe(**settings), CONFIG if config is None else config)


@pytest.mark.parametrize("mode", ["mlp", "all-linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_decisions_of_a_family(family: str, mode: str) -> None:
    """Every tensor of the table is decided as it says, with its reason, and nothing stands in the way."""
    mine = [row for row in ROWS if row[0] == family]
    found = choose([dense(name, *shape) for _, name, shape, _, _ in mine], mode=mode)
    expected = {name: REASONS[b if mode == "all-linear" else a] for _, name, _, a, b in mine}
    chosen = {w.parts["weight"].name for w in found.chosen}
    decided = dict.fromkeys(chosen) | {w.name: why for w, why in found.kept.values()}
    assert decided == expected
    assert found.problems == ()
    assert {w.name for unit in found.units.values() for w in unit} == {w.name for w in found.chosen}


@pytest.mark.parametrize("config", [{"num_hidden_layers": 2}, {"text_config": {"num_hidden_layers": 2}}])
def test_layers_past_the_last_are_mtp(config: dict[str, Any]) -> None:
    """The number of layers is found at the top of config.json or in its text part."""
    weights = linear("model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj", "model.layers.10.mlp.down_proj")
    found = choose(weights, config)
    assert [w.module for w in found.chosen] == ["model.layers.1.mlp.down_proj"]
    assert {why for _, why in found.kept.values()} == {"MTP"}


def test_without_a_layer_count_no_layer_is_mtp() -> None:
    """A config without num_hidden_layers gives no limit."""
    assert len(choose(linear("model.layers.61.mlp.down_proj"), {}).chosen) == 1


def test_default_ignore_can_be_switched_off() -> None:
    """With targets, even the output head and a router can be chosen."""
    modules = ("lm_head", "model.layers.0.mlp.gate", "model.layers.7.mlp.down_proj")
    found = choose(linear(*modules), targets=modules, default_ignore=False)
    assert tuple(w.module for w in found.chosen) == modules
    kept = choose(linear(*modules), targets=modules)
    assert [why for _, why in kept.kept.values()] == ["output head", "router or gate", "MTP"]
    assert [message.split("'")[1] for message in kept.idle] == list(modules)  # a target without effect is no target


# --- patterns -------------------------------------------------------------------------------------


def layers(*numbers: int) -> list[Weight]:
    """One matrix per layer."""
    return linear(*(f"model.layers.{n}.mlp.down_proj" for n in numbers))


def test_a_layer_is_not_its_tenfold() -> None:
    """`model.layers.1` leaves layers 10 to 19 alone: the mistake of prefix matching."""
    found = choose(layers(0, 1, 10, 11, 19), {}, ignore=("model.layers.1",))
    assert {module: why for module, (_, why) in found.kept.items()} == {
        "model.layers.1.mlp.down_proj": "ignore model.layers.1"
    }
    imported = choose(layers(0, 1, 10, 11, 19), {}, imported_ignore=("model.layers.1",))
    assert list(imported.kept) == ["model.layers.1.mlp.down_proj"]
    assert imported.kept["model.layers.1.mlp.down_proj"][1] == "exclude config model.layers.1"


def test_targets_replace_the_mode() -> None:
    """Only what they match is chosen, inside the MLP and outside."""
    weights = linear("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
    found = choose(weights, targets=("*.o_proj", "model.layers.1"))
    assert [w.module for w in found.chosen] == ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"]
    assert found.kept["model.layers.0.mlp.down_proj"][1] == "no target matches"


def test_ignore_beats_targets() -> None:
    """What is ignored stays, also when a target matches it; both patterns count as used."""
    found = choose(layers(0, 1), targets=("*.down_proj",), ignore=("model.layers.0",))
    assert [w.module for w in found.chosen] == ["model.layers.1.mlp.down_proj"]
    assert found.idle == ()


IN_VAIN = (
    "targets {!r} matches no weight that could be quantized (norms and embeddings never, heads and others only with "
    "--no_default_ignore); correct it or leave it out"
)


def test_a_typed_pattern_that_matches_nothing_is_named() -> None:
    """Each of them, with the kind of list it stands in."""
    found = choose(layers(0), ignore=("model.layer.0", "re:nothing"), targets=("*.down_proj", "*.donw_proj"))
    assert found.idle == (
        "ignore 'model.layer.0' matches no weight of this checkpoint; correct it or leave it out",
        "ignore 're:nothing' matches no weight of this checkpoint; correct it or leave it out",
        IN_VAIN.format("*.donw_proj"),
    )


def test_an_imported_pattern_that_matches_nothing_is_noted() -> None:
    """A reference model may have parts that this one lacks; a list of which nothing matches is another model's."""
    found = choose(layers(0, 1), imported_ignore=("model.layers.1", "vision*", "lm_head"))
    assert found.unused == ("vision*", "lm_head")
    assert found.idle == ()
    foreign = choose(layers(0, 1), imported_ignore=("vision*", "lm_head"))
    assert "none of the 2 imported exclude patterns matches a weight, the first is 'vision*'" in foreign.idle[0]


def test_a_pattern_may_match_what_stays_anyway() -> None:
    """Ignoring a norm or the output head is superfluous, not wrong."""
    weights = [*layers(0), *linear("lm_head"), dense("model.norm.weight", 32)]
    found = choose(weights, ignore=("lm_head", "*norm"))
    assert found.idle == ()
    assert found.kept["lm_head"][1] == "ignore lm_head"


def test_a_pattern_that_is_no_expression_stops_the_plan() -> None:
    """Also when it comes from a reference config."""
    with pytest.raises(RecipeError, match="is not a regular expression"):
        choose(layers(0), imported_ignore=("re:(",))


# --- what cannot be done --------------------------------------------------------------------------

GATED = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")


def experts(count: int, *leaves: str) -> list[Weight]:
    """Experts of one bank."""
    return linear(*(f"model.layers.0.mlp.experts.{e}.{leaf}" for e in range(count) for leaf in leaves))


@pytest.mark.parametrize(
    ("settings", "stays", "why"),
    [
        ({"ignore": ("*.up_proj",)}, GATED[1], "ignore *.up_proj"),
        ({"targets": ("*.up_proj",)}, GATED[0], "no target matches"),
        ({"imported_ignore": ("*.gate_proj",)}, GATED[0], "exclude config *.gate_proj"),
    ],
)
def test_a_partly_chosen_unit_is_a_problem(settings: dict[str, Any], stays: str, why: str) -> None:
    """Engines load gate and up as one parameter: the error names the unit, its members and the one that stays."""
    (problem,) = choose(linear(*GATED), **settings).problems
    assert problem.startswith("model.layers.0.mlp.gate_up_proj: engines fuse ")
    assert GATED[0] in problem
    assert GATED[1] in problem
    assert f"{stays} stays ({why})" in problem
    assert problem.endswith("give all of them to one rule, or ignore all")


def test_a_whole_unit_may_be_ignored() -> None:
    """All members together are no problem, and neither is a unit of which a member is missing."""
    found = choose(linear(*GATED), ignore=("*.up_proj", "*.gate_proj"))
    assert (found.problems, [w.module for w in found.chosen]) == ((), [GATED[2]])
    assert choose(linear(*GATED[1:])).problems == ()


def test_a_partly_ignored_bank_of_experts_is_a_problem() -> None:
    """Experts load as one tensor: leaving one of them dense cannot be served."""
    (problem,) = choose(experts(4, "gate_proj", "up_proj", "down_proj"), ignore=("*.experts.2",)).problems
    assert problem.startswith("model.layers.0.mlp.experts: experts load as one tensor, so all must be stored alike; ")
    assert "model.layers.0.mlp.experts.2.gate_proj stays (ignore *.experts.2)" in problem
    assert problem.endswith("give all of them to one rule, or ignore all")


def test_experts_may_go_by_layer() -> None:
    """Ignoring the bank of one layer leaves whole tensors."""
    weights = experts(4, "gate_proj", "up_proj", "down_proj")
    assert choose([*weights, *layers(1)], ignore=("model.layers.0.mlp.experts",)).problems == ()


def test_experts_may_not_go_by_projection() -> None:
    """Engines have one quantization method for a whole bank: dense down_proj beside packed gate_proj cannot load."""
    leaves = ("gate_proj", "up_proj", "down_proj")
    (problem,) = choose(experts(4, *leaves), ignore=("*.down_proj",)).problems
    assert problem.startswith("model.layers.0.mlp.experts: experts load as one tensor")
    assert "model.layers.0.mlp.experts.0.down_proj stays (ignore *.down_proj)" in problem


@pytest.mark.parametrize("stays", ["gate_up_proj", "down_proj"])
def test_a_fused_bank_may_not_go_by_projection_either(stays: str) -> None:
    """Two 3-D tensors hold one bank; the one that stays keeps its fused name, and still belongs to it."""
    bank = "model.layers.0.mlp.experts"
    weights = [dense(f"{bank}.gate_up_proj", 4, 96, 32), dense(f"{bank}.down_proj", 4, 32, 48)]
    (problem,) = choose(weights, ignore=(f"*.{stays}",)).problems
    assert problem.startswith(f"{bank}: experts load as one tensor")
    assert f"{bank}.{stays} stays (ignore *.{stays})" in problem


@pytest.mark.parametrize("shape", [(32, 40), (32, 8), (32, 0), (0, 32)])
def test_a_shape_that_the_format_cannot_hold_is_a_problem(shape: tuple[int, ...]) -> None:
    """The error names the tensor, the limit, what it got and the way out."""
    (problem,) = choose([dense("model.layers.0.mlp.down_proj.weight", *shape)]).problems
    assert problem == (
        "model.layers.0.mlp.down_proj.weight: nvfp4 needs a last dimension that is a multiple of 16, "
        f"got shape {list(shape)}; add it to `ignore`"
    )


def test_a_targeted_tensor_that_is_no_matrix_is_a_problem() -> None:
    """Targets can name a convolution; the format says that it cannot."""
    weight = dense("model.layers.0.conv1d.weight", 32, 1, 16)
    (problem,) = choose([weight], targets=("*conv1d",), default_ignore=False).problems
    assert problem.startswith("model.layers.0.conv1d.weight: nvfp4 needs a matrix, got shape [32, 1, 16]")


@pytest.mark.parametrize("dtype", ["I32", "I8", "U8", "F64", "BOOL"])
def test_numbers_that_cannot_be_quantized_are_a_problem(dtype: str) -> None:
    """An integer matrix under a projection's name is not a weight of this format."""
    (problem,) = choose([dense("model.layers.0.mlp.down_proj.weight", 32, 32, dtype=dtype)]).problems
    assert problem == (
        f"model.layers.0.mlp.down_proj.weight: can only quantize BF16, F16, F32, got {dtype}; add it to `ignore`"
    )


def test_all_problems_are_collected() -> None:
    """One run shows everything that has to be repaired."""
    weights = [dense(f"model.layers.{n}.mlp.down_proj.weight", 32, 8) for n in range(2)]
    assert len(choose([*weights, *linear(*GATED[:2])], ignore=("*.up_proj",)).problems) == 3


def test_two_weights_of_one_module_are_a_problem() -> None:
    """`x` and `x.weight` cannot both be the module x; nothing is dropped silently."""
    weights = [*layers(0), dense("model.layers.0.mlp.down_proj", 4)]
    (problem,) = choose(weights).problems
    assert problem.startswith("model.layers.0.mlp.down_proj: 2 weights have this name")


def test_a_fused_bank_beside_its_experts_is_a_problem() -> None:
    """A bank that splits into names that are stored already would lose one of both."""
    bank = dense("model.layers.0.mlp.experts.down_proj", 2, 32, 48)
    problems = choose([bank, *experts(1, "down_proj")]).problems
    assert any("experts.0.down_proj: 2 weights have this name" in problem for problem in problems)


def test_a_bank_with_a_wrong_shape_is_one_problem() -> None:
    """Not one per expert; it names the stored tensor, which is what can be ignored."""
    bank = dense("model.layers.0.mlp.experts.down_proj", 64, 32, 24)
    (problem,) = choose([bank], {"hidden_size": 32, "moe_intermediate_size": 24}).problems
    assert problem.startswith("model.layers.0.mlp.experts.down_proj: nvfp4 needs a last dimension")


def test_an_embedding_is_never_chosen() -> None:
    """No loader takes a packed look-up table, so neither a target nor the missing default list packs one."""
    modules = ("model.embed_tokens", "model.layers.0.mlp.down_proj")
    found = choose(linear(*modules), mode="all-linear", default_ignore=False)
    assert [w.module for w in found.chosen] == ["model.layers.0.mlp.down_proj"]
    named = choose(linear(*modules), targets=modules, default_ignore=False)
    assert [message.split("'")[1] for message in named.idle] == ["model.embed_tokens"]


def test_layers_stored_the_other_way_round_are_refused() -> None:
    """GPT-2 keeps [in, out]: groups along the last dimension would be groups of outputs."""
    found = choose(linear("transformer.h.0.mlp.c_fc"), config={"model_type": "gpt2"}, mode="all-linear")
    assert any("stores linear layers as [in, out]" in problem for problem in found.problems)
