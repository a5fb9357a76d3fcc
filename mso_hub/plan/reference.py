"""What a published model left unquantized, read from its config: `extract`, `--exclude_config`, `--input_scale DIR`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from mso_hub.errors import RecipeError
from mso_hub.hub import is_address
from mso_hub.source import open_source

LISTS = ("exclude_modules", "ignore", "modules_to_not_convert", "ignored_layers", "exclude")
"""Names of the list: ModelOpt, compressed-tensors, fp8 and AWQ, older ones."""
FILES = ("hf_quant_config.json", "config.json")


def exclude_lists(value: Any) -> list[str]:
    """All exclude lists inside a config, outermost first, without repetition."""
    if not isinstance(value, Mapping):
        return []
    found: dict[str, None] = {}
    for key in LISTS:
        if isinstance(value.get(key), list):
            found |= dict.fromkeys(entry for entry in value[key] if isinstance(entry, str))
    for key, nested in value.items():
        if key not in LISTS:
            found |= dict.fromkeys(exclude_lists(nested))
    return list(found)


def exclude_patterns(where: str | Path) -> list[str]:
    """Patterns that a reference model's config excludes from quantization.

    where   hf_quant_config.json or config.json, the folder that holds them, or `hf://org/name`
    Raises RecipeError when there is no such file or no list in it.
    """
    for name, content in config_files(where):
        try:
            patterns = exclude_lists(content)
        except RecursionError as error:
            raise RecipeError(f"{name}: is nested too deeply: {error}; give the config of a quantized model") from error
        if patterns:
            return patterns
    raise RecipeError(f"{where}: has none of the lists {', '.join(LISTS)}; give the config of a quantized model")


def config_files(where: str | Path) -> Iterator[tuple[str, Any]]:
    """The config files of a reference model with their content, hf_quant_config.json first; RecipeError for none."""
    candidates = list(_candidates(where))
    if not candidates:
        raise RecipeError(f"{where}: needs a quantization config ({' or '.join(FILES)}), found none; check the path")
    for name, content in candidates:
        try:
            parsed = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{name}: not valid JSON: {error}; fetch it again") from error
        yield name, parsed


def _candidates(where: str | Path) -> Iterator[tuple[str, bytes]]:
    """Config files with their bytes."""
    path = Path(where)
    if isinstance(where, str) and is_address(where):
        with closing(open_source(where)) as source:
            files = source.files()
            for name in (n for n in FILES if n in files):
                yield f"{where}/{name}", source.read(name, 0, files[name]).tobytes()
    elif path.is_dir():
        yield from ((str(path / name), (path / name).read_bytes()) for name in FILES if (path / name).is_file())
    elif path.is_file():
        yield str(path), path.read_bytes()
