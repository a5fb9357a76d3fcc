"""Headers -> the checkpoint as vLLM would iterate over it, on the meta device; and a checkpoint cut to N layers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from vllm_mso_hub.job import Header, JobError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_NOT_DECODER = re.compile(r"vision|visual|audio|encoder", re.IGNORECASE)
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def meta_tensors(headers: Iterable[Header], skip: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """One meta tensor per header, without those in `skip`."""
    for header in headers:
        if header.name not in skip:
            yield header.name, torch.empty(header.shape, dtype=DTYPES[header.dtype], device="meta")


def known_dtypes(headers: Iterable[Header]) -> None:
    """JobError for the first tensor whose safetensors dtype torch has no type for."""
    for header in headers:
        if header.dtype not in DTYPES:
            raise JobError(
                f"{header.name}: dtype {header.dtype} is none that vLLM reads; known are {', '.join(DTYPES)}"
            )


def in_tower(name: str) -> bool:
    """Whether a tensor belongs to the part that sees or hears, beside the decoder."""
    return bool(_NOT_DECODER.search(name))


def layer_of(name: str) -> int | None:
    """The decoder layer that a tensor belongs to; None for embeddings, norms, and the layers of other towers."""
    found = _LAYER.search(name)
    if found is None or _NOT_DECODER.search(name[: found.start()]):
        return None
    return int(found[1])


def first_layers(headers: Iterable[Header], layers: int) -> tuple[Header, ...]:
    """Without the tensors of decoder layers from `layers` on."""
    return tuple(header for header in headers if (layer_of(header.name) or 0) < layers)


def cut_folder(folder: str, layers: int, into: Path) -> str:
    """A copy of a checkpoint's small files in `into`, whose config.json has `layers` decoder layers.

    The decoder's part of the configuration is the one that counts layers: config.json itself, or `text_config` and
    the like inside it. A list with one entry per layer is cut with it. JobError when there are fewer layers.
    """
    for path in Path(folder).iterdir():
        if path.is_file() and path.suffix in {".json", ".py"} and path.name != "config.json":
            shutil.copy(path, into / path.name)
    config = json.loads((Path(folder) / "config.json").read_text())
    for part in _decoder_parts(config):
        key = next(key for key in _COUNTS if key in part)
        count = part[key]
        if count < layers:
            raise JobError(f"layers: the model has {count} decoder layers, {layers} were asked for")
        part[key] = layers
        for name, value in part.items():
            if isinstance(value, list) and len(value) == count:
                part[name] = value[:layers]
    (into / "config.json").write_text(json.dumps(config))
    return str(into)


def _decoder_parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    nested = [
        part
        for name, value in config.items()
        if isinstance(value, dict) and not _NOT_DECODER.search(name) and name != "quantization_config"
        for part in _decoder_parts(value)
    ]
    here = any(isinstance(config.get(key), int) for key in _COUNTS)
    return [config, *nested] if here else nested
