"""Text-only extraction against transformers: build a tiny multimodal model, extract, load, compare logits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniTextConfig
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTextConfig

from mso_hub.errors import PlanError
from mso_hub.plan.text import ASSUMED, CAUSAL_LM, text_config, text_model, text_name, text_names

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]

VOCAB = 96
TEXT_NAMES = ("model.language_model.embed_tokens.weight", "model.language_model.layers.0.mlp.up_proj.weight")
INPUT_IDS = torch.tensor([[5, 7, 11, 3, 2, 17, 1, 9]])

# Sizes of the text model.
TEXT: Config = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEAD: Config = {"head_dim": 8}
MOE: Config = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
ROUTED: Config = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MLA: Config = ROUTED | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_shared_experts": 1,
}
MROPE: Config = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [2, 1, 1]},
}
MROPE_INTERLEAVED: Config = {"rope_parameters": MROPE["rope_parameters"] | {"mrope_interleaved": True}}
MROPE_PARTIAL: Config = {
    "rope_parameters": MROPE["rope_parameters"] | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
}
HYBRID: Config = {
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}

# Sizes of the vision and audio towers.
VIT: Config = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CLIP: Config = VIT | {"model_type": "clip_vision_model", "projection_dim": 16}
SIGLIP: Config = VIT | {"model_type": "siglip_vision_model"}
PIXTRAL: Config = VIT | {"model_type": "pixtral"}
INTERN_VIT: Config = VIT | {
    "model_type": "internvl_vision",
    "image_size": [28, 28],
    "patch_size": [14, 14],
}
SIGLIP2: Config = {key: value for key, value in VIT.items() if key != "image_size"} | {
    "model_type": "siglip2_vision_model",
    "num_patches": 4,
}
QWEN_VIT: Config = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 16,
    "out_hidden_size": 32,
    "patch_size": 14,
}
QWEN2_VIT: Config = QWEN_VIT | {"embed_dim": 16, "fullatt_block_indexes": [0]}
QWEN3_VIT: Config = QWEN_VIT | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
AUDIO: Config = {
    "num_mel_bins": 8,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "output_dim": 32,
}
LLAMA4_VIT: Config = VIT | {
    "intermediate_size": 64,
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}
KIMI_VIT: Config = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "pos_emb_time": 2,
}
GEMMA4_VIT: Config = {key: value for key, value in VIT.items() if not key.endswith("_size")} | {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "position_embedding_size": 16,
}
GEMMA4_AUDIO: Config = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [8, 4],
    "output_proj_dims": 16,
}
GEMMA4_IDS: Config = {
    f"{kind}_token_id": 90 + i for i, kind in enumerate(("image", "video", "audio", "boi", "eoi", "boa"))
}


def multimodal(model_type: str, text_type: str, text: Config, vision: Config, **other: Any) -> Config:
    """One config.json as a checkpoint of this kind has it, with tiny sizes."""
    return {
        "model_type": model_type,
        "text_config": {"model_type": text_type} | TEXT | text,
        "vision_config": vision,
        **other,
    }


def llava(text_type: str, text: Config | None = None) -> Config:
    """LLaVA takes any text model; the last vision layer is the only one here."""
    return multimodal("llava", text_type, text or {}, CLIP, image_token_id=90, vision_feature_layer=-1)


FAMILIES: dict[str, Config] = {
    "llava llama": llava("llama"),
    "llava mistral": llava("mistral"),
    "llava ministral": llava("ministral", HEAD | {"rope_theta": 5000.0, "sliding_window": 4}),
    "llava qwen2": llava("qwen2"),
    "llava qwen2 tied": llava("qwen2", {"tie_word_embeddings": True}) | {"tie_word_embeddings": True},
    "llava qwen3": llava("qwen3", HEAD),
    "llava qwen3_moe": llava("qwen3_moe", HEAD | MOE),
    "llava phi3": llava("phi3"),
    "llava glm4": llava("glm4", HEAD),
    "llava glm4_moe": llava("glm4_moe", HEAD | ROUTED),
    "llava deepseek_v2": llava("deepseek_v2", MLA),
    "llava deepseek_v3": llava("deepseek_v3", MLA),
    "llava_next": llava("mistral") | {"model_type": "llava_next"},
    "llava_onevision": llava("qwen2") | {"model_type": "llava_onevision", "vision_config": SIGLIP},
    "mistral3 mistral": multimodal("mistral3", "mistral", HEAD, PIXTRAL, image_token_id=90),
    "mistral3 ministral3": multimodal("mistral3", "ministral3", HEAD, PIXTRAL, image_token_id=90),
    "internvl qwen2": multimodal("internvl", "qwen2", {}, INTERN_VIT, image_token_id=90),
    "internvl gpt_oss": multimodal(
        "internvl", "gpt_oss", HEAD | {"num_local_experts": 4}, INTERN_VIT, image_token_id=90
    ),
    "idefics3": multimodal("idefics3", "llama", {}, VIT, image_token_id=90),
    "smolvlm": multimodal("smolvlm", "llama", {}, VIT, image_token_id=90),
    "paligemma": multimodal("paligemma", "gemma", HEAD, SIGLIP, projection_dim=32),
    "paligemma2": multimodal("paligemma", "gemma2", HEAD, SIGLIP, projection_dim=32),
    "gemma3": multimodal("gemma3", "gemma3_text", HEAD, SIGLIP, mm_tokens_per_image=4),
    "gemma4": multimodal(
        "gemma4",
        "gemma4_text",
        HEAD
        | {
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "num_kv_shared_layers": 1,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "use_bidirectional_attention": "vision",
        },
        GEMMA4_VIT,
        audio_config=GEMMA4_AUDIO,
        **GEMMA4_IDS,
    ),
    "lfm2_vl": multimodal("lfm2_vl", "lfm2", {"layer_types": ["conv", "full_attention"]}, SIGLIP2, image_token_id=90),
    "llama4": multimodal(
        "llama4",
        "llama4_text",
        HEAD | {"intermediate_size_mlp": 48, "num_local_experts": 4, "interleave_moe_layer_step": 2},
        LLAMA4_VIT,
    ),
    "kimi_k25": multimodal("kimi_k25", "kimi_k2", MLA, KIMI_VIT, projection_hidden_size=16, tie_word_embeddings=False),
    "qwen2_vl": multimodal("qwen2_vl", "qwen2_vl_text", MROPE, QWEN2_VIT),
    "qwen2_5_vl": multimodal("qwen2_5_vl", "qwen2_5_vl_text", MROPE, QWEN2_VIT),
    "qwen2_5_omni": multimodal("qwen2_5_omni_thinker", "qwen2_5_omni_text", MROPE, QWEN2_VIT, audio_config=AUDIO),
    "qwen3_vl": multimodal("qwen3_vl", "qwen3_vl_text", HEAD | MROPE_INTERLEAVED, QWEN3_VIT),
    "qwen3_vl_moe": multimodal("qwen3_vl_moe", "qwen3_vl_moe_text", HEAD | MOE | MROPE_INTERLEAVED, QWEN3_VIT),
    "qwen3_omni_moe": multimodal(
        "qwen3_omni_moe_thinker",
        "qwen3_omni_moe_text",
        HEAD | MOE | MROPE_INTERLEAVED,
        QWEN3_VIT,
        audio_config=AUDIO | {"downsample_hidden_size": 8},
    ),
    "qwen3_5": multimodal("qwen3_5", "qwen3_5_text", HYBRID, QWEN3_VIT),
    "qwen3_5_moe": multimodal(
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        HYBRID | MOE | {"shared_expert_intermediate_size": 16},
        QWEN3_VIT,
    ),
    "glm4v": multimodal("glm4v", "glm4v_text", MROPE_PARTIAL, QWEN_VIT),
    "glm4v_moe": multimodal("glm4v_moe", "glm4v_moe_text", HEAD | ROUTED | MROPE_PARTIAL, QWEN_VIT),
}


def build(config: Config, folder: Path, *, original_names: bool = True) -> Any:
    """A tiny multimodal model with random weights, also saved to `folder`."""
    fields = json.loads(json.dumps(config))  # transformers fills in the nested dicts
    model_type = fields.pop("model_type")
    model_config = CONFIG_MAPPING[model_type](**fields, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])(model_config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder, save_original_format=original_names)
    return model


def source_of(folder: Path) -> tuple[Config, Tensors]:
    """config.json and tensors of a checkpoint folder."""
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def logits(model: Any) -> torch.Tensor:
    """What the model predicts for plain text."""
    with torch.no_grad():
        return model.eval()(input_ids=INPUT_IDS).logits


def extract_and_load(config: Mapping[str, Any], tensors: Tensors, folder: Path) -> Any:
    """The causal language model that transformers loads from the extracted checkpoint, without remarks."""
    text = text_model(config, {name: tensor.shape for name, tensor in tensors.items()})
    folder.mkdir(exist_ok=True)
    kept = {new: tensors[old].clone() for old, new in text.names.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(text.config))
    model, remarks = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(remarks.values()), remarks
    assert [type(model).__name__] == text.config["architectures"]
    return model


@pytest.mark.parametrize("original_names", [True, False], ids=["original names", "module names"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_model_loads_and_predicts_the_same(family: str, original_names: bool, tmp_path: Path) -> None:
    """No missing, unexpected or mismatched key, and the logits of the multimodal model on text."""
    multimodal_model = build(FAMILIES[family], tmp_path, original_names=original_names)
    config, tensors = source_of(tmp_path)
    config["text_config"]["model_type"] = FAMILIES[family]["text_config"]["model_type"]  # kimi_k2 as on the Hub
    text = extract_and_load(config, tensors, tmp_path / "text")
    torch.testing.assert_close(logits(text), logits(multimodal_model), rtol=1e-5, atol=1e-5)


def test_every_listed_text_model_is_built_here() -> None:
    """The table claims nothing that the test above does not show."""
    built = {config["text_config"]["model_type"] for config in FAMILIES.values()}
    assert set(CAUSAL_LM) == built


def test_every_listed_architecture_is_what_auto_model_would_choose() -> None:
    """A class name that transformers does not know is how the first prototype went wrong."""
    for model_type, architecture in CAUSAL_LM.values():
        assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] == architecture


@pytest.mark.parametrize("source_type", ASSUMED)
def test_a_silent_config_means_the_same_to_the_target_class(source_type: str) -> None:
    """Where config.json leaves a field out, both classes must fill in one value."""
    nested = {"qwen2_5_omni_text": Qwen2_5OmniTextConfig, "qwen3_omni_moe_text": Qwen3OmniMoeTextConfig}
    source = (nested.get(source_type) or CONFIG_MAPPING[source_type])()
    flat = text_config({"vision_config": {}, "text_config": {"model_type": source_type}})
    target = CONFIG_MAPPING[flat.pop("model_type")](**flat)
    skipped = {"model_type", "architectures", "tie_word_embeddings"}
    for key in source.to_dict().keys() & target.to_dict().keys() - skipped:
        expected, got = getattr(source, key), getattr(target, key)
        if key == "rope_parameters":  # an absent factor means that every channel rotates
            expected, got = ({"partial_rotary_factor": 1.0} | rope for rope in (expected, got))
        assert expected == got, key


def test_kimi_as_published_becomes_deepseek_v3(tmp_path: Path) -> None:
    """Names, nested config and remote code as moonshotai publishes them; nothing remote is left."""
    reference_config = CONFIG_MAPPING["deepseek_v3"](**TEXT | MLA)
    reference = transformers.DeepseekV3ForCausalLM(reference_config)
    reference.save_pretrained(tmp_path)  # one tensor per expert
    flat, tensors = source_of(tmp_path)
    quantization = {"quant_method": "compressed-tensors", "ignore": ["lm_head", "re:.*self_attn.*"]}
    config: Config = {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "auto_map": {"AutoModel": "modeling_kimi_k25.KimiK25ForConditionalGeneration"},
        "model_type": "kimi_k25",
        "dtype": "float32",
        "eos_token_id": 3,
        "media_placeholder_token_id": 95,
        "vision_config": {"model_type": "kimi_k25"},
        "text_config": flat
        | {
            "model_type": "kimi_k2",
            "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
            "dtype": "bfloat16",
            "quantization_config": quantization,
        },
    }
    text = text_config(config)
    assert text["architectures"] == ["DeepseekV3ForCausalLM"]
    assert text["model_type"] == "deepseek_v3"
    assert text["quantization_config"] == quantization
    assert (text["dtype"], text["eos_token_id"]) == ("float32", 3)
    assert not text.keys() & {"auto_map", "text_config", "vision_config", "media_placeholder_token_id"}

    del config["text_config"]["quantization_config"]  # the weights of this test are not quantized
    source = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    source |= {
        "vision_tower.patch_embed.proj.weight": torch.ones(1),
        "mm_projector.proj.0.weight": torch.ones(1),
    }
    loaded = extract_and_load(config, source, tmp_path / "text")
    torch.testing.assert_close(logits(loaded), logits(reference))


def test_qwen2_5_vl_as_published_has_its_text_fields_at_the_top_level(tmp_path: Path) -> None:
    """The older config has no text_config; vision fields go, and so does the marker of image positions."""
    multimodal_model = build(FAMILIES["qwen2_5_vl"], tmp_path)
    _, tensors = source_of(tmp_path)
    config = TEXT | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "rms_norm_eps": multimodal_model.config.text_config.rms_norm_eps,
        "rope_theta": 5000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
        "image_token_id": 90,
        "vision_start_token_id": 91,
        "vision_config": QWEN2_VIT,
    }
    text = extract_and_load(config, tensors, tmp_path / "text")
    torch.testing.assert_close(logits(text), logits(multimodal_model), rtol=1e-5, atol=1e-5)
    dropped = {"image_token_id", "vision_start_token_id", "vision_config", "rope_scaling"}
    assert not dropped & text_config(config).keys()


def test_a_scaled_mrope_keeps_its_scaling() -> None:
    """Only the image axes go: YaRN of a long-context model stays."""
    rope = {"rope_type": "yarn", "factor": 3.0, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    config = {"text_config": {"model_type": "qwen3_vl_text", "rope_theta": 5e6, "rope_scaling": rope}}
    text = text_config(config)
    assert text["rope_scaling"] == {"rope_type": "yarn", "factor": 3.0}
    assert text["rope_theta"] == 5e6
    assert rope["mrope_section"] == [24, 20, 20]  # the caller's config is untouched


def test_the_whole_omni_model_gives_its_thinker(tmp_path: Path) -> None:
    """The published Qwen-Omni nests twice and carries a speech model, which is dropped."""
    thinker = build(FAMILIES["qwen2_5_omni"], tmp_path)
    thinker_config, tensors = source_of(tmp_path)
    source = {f"thinker.{name}": tensor for name, tensor in tensors.items()}
    source |= {"talker.model.embed_tokens.weight": torch.ones(1), "token2wav.x.weight": torch.ones(1)}
    config = {"model_type": "qwen2_5_omni", "thinker_config": thinker_config, "talker_config": {}}
    text = extract_and_load(config, source, tmp_path / "text")
    torch.testing.assert_close(logits(text), logits(thinker), rtol=1e-5, atol=1e-5)


def test_mtp_layers_stay_and_do_not_disturb(tmp_path: Path) -> None:
    """Runtimes that draft with MTP find it; transformers loads without a remark."""
    multimodal_model = build(FAMILIES["qwen3_5"], tmp_path)
    config, tensors = source_of(tmp_path)
    tensors["mtp.fc.weight"] = torch.ones(2, 2)
    assert text_names(tensors)["mtp.fc.weight"] == "mtp.fc.weight"
    text = extract_and_load(config, tensors, tmp_path / "text")
    torch.testing.assert_close(logits(text), logits(multimodal_model), rtol=1e-5, atol=1e-5)


def test_qwen3_vl_moe_as_published_is_refused(tmp_path: Path) -> None:
    """Its 3-D experts are [experts, in, out], which no renaming can turn into [experts, out, in]."""
    build(FAMILIES["qwen3_vl_moe"], tmp_path)
    config, tensors = source_of(tmp_path)
    published = {
        name: list(tensor.mT.shape if ".mlp.experts." in name else tensor.shape) for name, tensor in tensors.items()
    }
    with pytest.raises(PlanError, match=r"experts\.down_proj: .*got \[4, 12, 32\].*leave out text_only"):
        text_model(config, published)


def test_qwen3_vl_moe_with_one_tensor_per_expert_loads(tmp_path: Path) -> None:
    """Quantized copies split the experts, and the text class reads those as well."""
    multimodal_model = build(FAMILIES["qwen3_vl_moe"], tmp_path)
    config, tensors = source_of(tmp_path)
    for name in [name for name in tensors if ".mlp.experts." in name]:
        base, leaf = name.rsplit(".", 1)
        leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        for index, expert in enumerate(tensors.pop(name)):  # [out, in]
            for part, matrix in zip(leaves, expert.chunk(len(leaves)), strict=True):
                tensors[f"{base}.{index}.{part}.weight"] = matrix
    text = extract_and_load(config, tensors, tmp_path / "text")
    torch.testing.assert_close(logits(text), logits(multimodal_model), rtol=1e-5, atol=1e-5)


def test_the_stored_head_decides_whether_embeddings_are_tied() -> None:
    """Wrapper and text model disagree about the default, so neither flag can be trusted."""
    shapes = {name: [8, 8] for name in TEXT_NAMES}
    config = {"tie_word_embeddings": False, "text_config": {"model_type": "llama"}}
    assert text_model(config, shapes).config["tie_word_embeddings"] is True
    shapes["lm_head.weight_packed"] = [8, 1]
    assert text_model(config, shapes).config["tie_word_embeddings"] is False


def test_a_shard_of_vision_tensors_keeps_nothing() -> None:
    """Every tensor of such a shard has no new name, in either layout, so the shard is not written."""
    shard = [
        "visual.blocks.0.attn.qkv.weight",
        "model.visual.merger.mlp.0.weight",
        "vision_tower.encoder.blocks.0.wqkv.weight",
        "model.vision_tower.layers.0.self_attn.q_proj.weight",
        "vision_model.encoder.layers.0.attn.qkv.weight",
        "multi_modal_projector.linear_1.weight",
        "mm_projector.proj.0.weight",
        "mlp1.1.weight",
        "model.connector.modality_projection.proj.weight",
        "image_newline",
        "audio_tower.layers.0.fc1.weight",
        "thinker.audio_tower.layers.0.fc1.weight",
        "talker.model.layers.0.mlp.up_proj.weight",
    ]
    assert [text_name(name, wrapped=wrapped) for name in shard for wrapped in (True, False)] == [None] * 26


def test_module_names_are_renamed_like_their_tensors() -> None:
    """`ignore` lists in a quantization_config name modules."""
    assert text_name("language_model.lm_head", wrapped=True) == "lm_head"
    assert text_name("model.language_model", wrapped=True) == "model"
    assert text_name("model.language_model.layers.0.mlp", wrapped=True) == "model.layers.0.mlp"
    assert text_name("model.layers.0.mlp", wrapped=False) == "model.layers.0.mlp"


def test_two_tensors_with_one_new_name_are_refused() -> None:
    """A checkpoint saved twice in two layouts must not lose one copy silently."""
    stale = "language_model.model.layers.0.mlp.up_proj.weight"
    with pytest.raises(PlanError, match=r"would both be called model\.layers\.0\.mlp\.up_proj\.weight"):
        text_names([*TEXT_NAMES, stale])


def test_a_tensor_of_no_known_part_is_refused() -> None:
    """Dropping what the rules do not know could drop a piece of the language model."""
    with pytest.raises(PlanError, match=r"^model\.memory\.bank: neither part of the language model"):
        text_names([*TEXT_NAMES, "model.memory.bank"])


@pytest.mark.parametrize(
    "names",
    [
        ["visual.blocks.0.attn.qkv.weight"],
        ["model.embed_tokens.weight", "model.encoder.layers.0.mlp.up_proj.weight"],
        ["model.tok_embeddings.weight", "model.layers.0.feed_forward.w1.weight"],
    ],
    ids=["vision only", "no layers", "no embedding"],
)
def test_a_checkpoint_without_a_language_model_is_refused(names: list[str]) -> None:
    """Better now than as missing keys when somebody loads the result."""
    with pytest.raises(PlanError, match="no language model found"):
        text_names(names)


def test_a_text_only_config_is_refused() -> None:
    """There is nothing to extract from it."""
    with pytest.raises(PlanError, match=r"'llama' has no nested text config .* leave out text_only"):
        text_config({"model_type": "llama", "hidden_size": 32})


@pytest.mark.parametrize("found", ["mllama_text_model", None])
def test_an_unknown_text_model_is_refused(found: str | None) -> None:
    """The message names what was found, what is known and the way out."""
    config = {"model_type": "mllama", "text_config": {"model_type": found}}
    with pytest.raises(PlanError, match=rf"model_type {found!r}, .*qwen3_vl_text.*leave out text_only"):
        text_config(config)


@pytest.mark.parametrize("key", ["text_config", "llm_config", "language_config"])
def test_the_nested_text_fields_are_found_under_each_name(key: str) -> None:
    """InternVL says llm_config, DeepSeek-VL says language_config."""
    text = text_config({"model_type": "some_vl", key: {"model_type": "qwen2", "hidden_size": 32}})
    assert text == {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 32}
