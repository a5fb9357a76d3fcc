"""config.json -> the model without weights, and where its decoder layers are."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mso_hub.calibrate import transformers_api as api
from mso_hub.checkpoint import Checkpoint
from mso_hub.errors import CheckpointError
from mso_hub.formats.detect import TEXT_CONFIGS, without_quantization
from mso_hub.source import Source


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model on the meta device.

    model   the whole
    base    the module whose forward runs the decoder layers
    list    attribute of `base` with the layers
    prefix  what names of parameters of the layers begin with: `model.layers.`
    """

    model: nn.Module
    base: nn.Module
    list: str
    prefix: str

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        found = getattr(self.base, self.list)
        assert isinstance(found, nn.ModuleList)  # noqa: S101 - decoder_of looked for one
        return found

    @property
    def top(self) -> str:
        """What names of parameters of `base` begin with: `model.`; empty where it is the model itself."""
        return self.prefix.removesuffix(f"{self.list}.")

    @property
    def config(self) -> Any:
        """The library's config of the whole model."""
        return self.model.config

    @property
    def text(self) -> Any:
        """Its language model's part."""
        return api.text_config(self.model.config)


def said_dtype(config: Mapping[str, Any]) -> object:
    """What config.json says of the numbers: `dtype`, older `torch_dtype`, perhaps in the text model's part."""
    for part in (config, *(config.get(key) for key in TEXT_CONFIGS)):
        if isinstance(part, dict):
            said = part.get("dtype") or part.get("torch_dtype")
            if said is not None:
                return said
    return None


def read_blueprint(source: Source, checkpoint: Checkpoint, *, trust_remote_code: bool) -> api.Blueprint:
    """The class and the config of a checkpoint's model, from its small files; nothing of it is run unless trusted.

    Raises CheckpointError without a config.json, otherwise as `transformers_api.read_blueprint`.
    """
    if not checkpoint.config:
        raise CheckpointError(f"{checkpoint.name}: has no config.json, which calibration needs to build the model")
    said = _without_flash(without_quantization(checkpoint.config))
    with tempfile.TemporaryDirectory(prefix="mso-hub-") as place:
        # Named after the content: transformers keeps a copy of trusted code under the name of its folder.
        folder = Path(place) / f"mso_{checkpoint.identity[:16]}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
        for name, nbytes in checkpoint.files.items():
            code = name.endswith(".py") and trust_remote_code
            if "/" not in name and (code or name == "generation_config.json"):
                (folder / name).write_bytes(source.read(name, 0, nbytes).tobytes())
        return api.read_blueprint(folder, said, checkpoint.name, trust_remote_code=trust_remote_code)


def _without_flash(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without the kernel of the machine on which the model was made, which this one need not have."""
    return {
        key: _without_flash(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not (key in ("_attn_implementation", "attn_implementation") and str(value).startswith("flash"))
    }


def build_skeleton(blueprint: api.Blueprint, dtype: torch.dtype, attention: str | None) -> Skeleton:
    """A model on the meta device whose unstored buffers are real; errors as `transformers_api.build`."""
    model = api.build(blueprint, dtype, attention)
    base, layers = api.decoder_of(model)
    path = next(name for name, module in model.named_modules() if module is base)
    return Skeleton(model, base, layers, f"{path}.{layers}." if path else f"{layers}.")


def release(module: nn.Module) -> None:
    """Parameters and stored buffers back to the meta device."""
    for child in module.modules():
        for name, parameter in child._parameters.items():  # noqa: SLF001
            if parameter is not None and not parameter.is_meta:
                child._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)  # noqa: SLF001
        for name, buffer in child._buffers.items():  # noqa: SLF001
            if buffer is not None and name not in child._non_persistent_buffers_set:  # noqa: SLF001
                child._buffers[name] = buffer.to("meta")  # noqa: SLF001
