"""A checkpoint of one file, opened for changes, and what a change must lead to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
MANIFEST = "mso_hub.json"
QUANT_FILE = "hf_quant_config.json"
LAYER = "model.layers.0"


@dataclass(frozen=True, slots=True)
class Change:
    """What a mutation did.

    names     tensors, or the module they belong to, one of which a report must name; empty when nothing is wrong
    harmless  why nothing is wrong: the numbers that vLLM computes with are the same, or as good
    """

    names: tuple[str, ...] = ()
    harmless: str = ""


@dataclass(slots=True)
class Copy:
    """A checkpoint of one file, opened for changes.

    folder   where it lies
    tensors  every tensor by name
    config   config.json
    beside   hf_quant_config.json, empty where there is none
    """

    folder: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    beside: dict[str, Any] = field(default_factory=dict)

    @property
    def said(self) -> dict[str, Any]:
        """The quantization_config."""
        found: dict[str, Any] = self.config["quantization_config"]
        return found

    @property
    def mlp(self) -> str:
        """The dense MLP of the first layer, or its second expert."""
        expert = f"{LAYER}.mlp.experts.1"
        return expert if any(name.startswith(f"{expert}.") for name in self.tensors) else f"{LAYER}.mlp"

    def part(self, module: str, *leaves: str) -> str:
        """Name of the first of some tensors that a module has; "" without any."""
        return next((f"{module}.{leaf}" for leaf in leaves if f"{module}.{leaf}" in self.tensors), "")

    def codes(self, module: str) -> str:
        """Name of a module's packed numbers."""
        return self.part(module, "weight_packed", "weight")

    def scale(self, module: str) -> str:
        """Name of a module's block, row or tensor scales."""
        return self.part(module, "weight_scale")

    def unique(self, module: str) -> str:
        """Name of a module's global scale; "" where the format has none."""
        return self.part(module, "weight_global_scale", "weight_scale_2")

    def input(self, module: str) -> str:
        """Name of a module's activation scale; "" without one."""
        return self.part(module, "input_global_scale", "input_scale")

    def ignore(self, module: str) -> None:
        """Add a module to the list of those that stay dense, in every file that has it."""
        self.said["ignore"].append(module)
        if self.beside:
            self.beside["quantization"]["exclude_modules"].append(module)

    def change(self, name: str, new: Callable[[Tensor], Tensor]) -> Change:
        """Another tensor in the place of one; the change that is to be found."""
        self.tensors[name] = new(self.tensors[name]).contiguous()
        return Change((name,))

    def remove(self, *names: str) -> Change:
        """Tensors disappear."""
        for name in names:
            del self.tensors[name]
        return Change(names)

    def save(self) -> None:
        """Write everything back."""
        save_file(self.tensors, self.folder / WEIGHTS, {"format": "pt"})
        (self.folder / "config.json").write_text(json.dumps(self.config))
        if self.beside:
            (self.folder / QUANT_FILE).write_text(json.dumps(self.beside))


def opened_copy(checkpoint: Path, folder: Path) -> Copy:
    """A copy of a checkpoint without its manifest, whose digests would find any change."""
    shutil.copytree(checkpoint, folder)
    (folder / MANIFEST).unlink()
    beside = folder / QUANT_FILE
    return Copy(
        folder,
        load_file(folder / WEIGHTS),
        json.loads((folder / "config.json").read_text()),
        json.loads(beside.read_text()) if beside.exists() else {},
    )
