"""Recipes that come along, one TOML file each: the first line of its comment says what it is, the rest after what.

A rule that says nothing of scale_search has its format's default, also where ModelOpt takes the largest magnitude.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.resources import files

ALIASES = {
    "deepseek_v3": "deepseek_fp8",
    "fp8_2d_blockwise_weight_only": "fp8_block",
    "fp8_default": "fp8",
    "fp8_per_channel_per_token": "fp8_dynamic",
    "int4_awq": "w4a16",
    "int4_blockwise_weight_only": "w4a16",
    "kimi_k2": "w4a16_g32_experts",
    "kimi_k3": "nvfp4_experts_fp8_block_attention",
    "minimax_m3": "mxfp8_nvfp4_experts",
    "mistral_medium_3.5": "nvfp4_edge_layers_fp8",
    "mxfp4a16": "mxfp4_weight_only",
    "nemotron_3": "nvfp4_experts_fp8_rest",
    "nvfp4_default": "nvfp4",
    "nvfp4_experts_only_input_scale1": "nvfp4_experts_only",
    "nvfp4_w4a4": "nvfp4",
    "nvfp4_w4a4_weight_mse_fp8_sweep": "nvfp4",
    "nvfp4_weight_only": "w4a16_nvfp4",
    "nvfp4a16": "w4a16_nvfp4",
    "qwen3.5": "w4a16_nvfp4_fp8_attention",
    "qwen3.6": "w4a16_nvfp4_fp8_attention",
    "w8a8": "int8",
}
"""Names that ModelOpt, llm-compressor and people use -> preset."""


def preset_names() -> list[str]:
    """All presets in alphabetical order."""
    names = (entry.name for entry in files(__name__).iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def find_preset(name: str) -> str | None:
    """The preset that a name stands for, also under another name, in capitals or with dashes; None for no preset."""
    plain = _plain(name)
    return plain if plain in preset_names() else ALIASES.get(plain)


def near_preset(name: str) -> str:
    """A word about the preset that was probably meant, or nothing."""
    return near_word(_plain(name), [*preset_names(), *ALIASES])


def near_word(word: object, known: Iterable[str]) -> str:
    """`; did you mean 'nvfp4'?` where one of the known words is like this one, or nothing."""
    found = get_close_matches(str(word), list(known), 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def preset_text(name: str) -> str:
    """The file of a preset."""
    return (files(__name__) / f"{name}.toml").read_text(encoding="utf-8")


def preset_comment(name: str) -> tuple[str, str]:
    """What a preset is, and what it is modelled on."""
    lines: list[str] = []
    for line in preset_text(name).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines[0], " ".join(lines[1:])


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
