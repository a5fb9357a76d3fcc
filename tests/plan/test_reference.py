"""Exclude lists of published models, wherever a config keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mso_hub.errors import RecipeError
from mso_hub.plan.reference import exclude_patterns

MODELOPT_FILE = {
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "quantization": {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": ["model.layers.0.self_attn*", "lm_head"],
    },
}
COMPRESSED_TENSORS = {
    "architectures": ["LlamaForCausalLM"],
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    },
}


def written(folder: Path, content: Any, name: str = "config.json") -> Path:
    """A file with JSON."""
    path = folder / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MODELOPT_FILE, ["model.layers.0.self_attn*", "lm_head"]),
        (COMPRESSED_TENSORS, ["lm_head", "re:.*mlp.gate$"]),
        ({"quantization_config": {"quant_method": "modelopt", "ignore": ["lm_head"]}}, ["lm_head"]),
        ({"text_config": COMPRESSED_TENSORS}, ["lm_head", "re:.*mlp.gate$"]),
        ({"quantization_config": {"quant_method": "awq", "modules_to_not_convert": ["visual"]}}, ["visual"]),
        ({"quantization_config": {"quant_method": "fp8", "ignored_layers": ["a.b"]}}, ["a.b"]),
        ({"exclude": ["x"]}, ["x"]),
        (
            {
                "quantization_config": {"ignore": ["a", "b"]},
                "text_config": {"quantization_config": {"ignore": ["b", "c"]}},
            },
            ["a", "b", "c"],
        ),
        ({"quantization_config": {"ignore": ["a", 3, None, ["b"]], "modules_to_not_convert": None}}, ["a"]),
    ],
)
def test_lists_are_found(config: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    """ModelOpt's, compressed-tensors' and others' names for the list, nested ones too, each entry once and in order."""
    assert exclude_patterns(written(tmp_path, config)) == expected


def test_a_folder_is_searched_for_both_files(tmp_path: Path) -> None:
    """hf_quant_config.json wins, as it says what was done; without one config.json is read."""
    written(tmp_path, COMPRESSED_TENSORS)
    assert exclude_patterns(tmp_path) == ["lm_head", "re:.*mlp.gate$"]
    written(tmp_path, MODELOPT_FILE, "hf_quant_config.json")
    assert exclude_patterns(str(tmp_path)) == ["model.layers.0.self_attn*", "lm_head"]


def test_a_file_without_a_list_does_not_hide_the_other(tmp_path: Path) -> None:
    """An hf_quant_config.json that excludes nothing leaves the word to config.json."""
    written(tmp_path, {"quantization": {"quant_algo": "NVFP4", "exclude_modules": []}}, "hf_quant_config.json")
    written(tmp_path, COMPRESSED_TENSORS)
    assert exclude_patterns(tmp_path) == ["lm_head", "re:.*mlp.gate$"]


def test_the_reference_is_not_the_output(tmp_path: Path) -> None:
    """The two layouts that this package writes are found again: `extract` on an output shows what stayed."""
    for name, key in (("hf_quant_config.json", "exclude_modules"), ("config.json", "ignore")):
        assert exclude_patterns(written(tmp_path, {"quantization": {key: ["model.layers.0.mlp.gate"]}}, name)) == [
            "model.layers.0.mlp.gate"
        ]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architectures": ["x"]},
        {"quantization_config": {"ignore": []}},
        {"quantization_config": {"ignore": "lm_head"}},
        ["lm_head"],
        "lm_head",
        None,
    ],
)
def test_a_config_without_a_list_is_refused(config: Any, tmp_path: Path) -> None:
    """The error says what was looked for, rather than exclude nothing."""
    with pytest.raises(
        RecipeError, match=r"has none of the lists exclude_modules, ignore, .* config of a quantized model"
    ):
        exclude_patterns(written(tmp_path, config))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_broken_file_is_refused(content: bytes, tmp_path: Path) -> None:
    """Truncated, binary or endlessly nested: one error that names the file."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RecipeError, match=r"config\.json: not valid JSON"):
        exclude_patterns(tmp_path)


def found_at(depth: int, path: Path) -> list[str] | None:
    """The list below so many levels of nesting, None when it is refused."""
    path.write_text('{"x": ' * depth + '{"ignore": ["a"]}' + "}" * depth, encoding="utf-8")
    try:
        return exclude_patterns(path)
    except RecipeError:
        return None


def test_a_deep_config_is_read_or_refused(tmp_path: Path) -> None:
    """Nesting that parses but cannot be walked ends in the same error, never in a traceback."""
    found = [found_at(depth, tmp_path / "config.json") for depth in range(50, 1050, 10)]
    assert found[0] == ["a"]
    assert found[-1] is None


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    """Neither a folder without configs nor a path to nothing is an empty list."""
    for where in (tmp_path, tmp_path / "gone", tmp_path / "gone.json"):
        with pytest.raises(RecipeError, match=r"needs a quantization config .* found none; check the path"):
            exclude_patterns(where)
