"""How much memory a walk takes, known before a weight is read.

peak = libraries + embedding + largest layer + outputs of a layer + work

embedding  rows of the tokens that occur, and whatever else lies beside the layers
layer      its dense tensors, and its experts: all of them and what merging them takes (`stack`, twice their size),
           or one (`expert`)
outputs    tokens * H * bytes, several times that where a model keeps several streams; may go to files
work       batch tokens * (6 H + 4 I + 3 top_k I_moe) * bytes
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mso_hub.errors import PlanError

LIBRARIES = 480 << 20
"""Bytes of anonymous memory that Python, torch, transformers and oneDNN's compiled kernels take."""
PRIMITIVES = 32
"""Kernels that oneDNN may keep. It compiles one for every number of rows, and every expert gets another number."""

_C = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True, slots=True)
class Memory:
    """Limits in bytes, None for none.

    cpu   anonymous main memory of the process (pages of mapped files come on top and go when others need room);
          outputs of layers go to files when they would not fit; what is left keeps experts for the next batch
    gpu   of each device
    work  folder for such files and for decoded experts, None for the system's
    """

    cpu: int | None = None
    gpu: int | None = None
    work: Path | None = None


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that a walk needs, by what for.

    libraries  of main memory, whatever the device
    embedding  tensors beside the layers
    layer      the largest decoder layer, `name` says which
    work       what computing the largest batch takes
    outputs    of one layer for the whole text; these may go to files
    disk       largest file with decoded experts, 0 for none
    """

    name: str
    embedding: int
    layer: int
    work: int
    outputs: int
    disk: int = 0
    libraries: int = LIBRARIES

    @property
    def device(self) -> int:
        """On each device."""
        return self.embedding + self.layer + self.work

    @property
    def least(self) -> int:
        """Of main memory, when it computes there and outputs go to files."""
        return self.libraries + self.device

    @property
    def total(self) -> int:
        """Of main memory, with everything in it."""
        return self.least + self.outputs

    def check(self, memory: Memory, devices: Sequence[str]) -> None:
        """PlanError when a limit is below what one layer needs."""
        on_cpu = any(device.startswith("cpu") for device in devices)
        least = self.least if on_cpu else self.libraries + self.layer
        if memory.cpu is not None and memory.cpu < least:
            raise PlanError(
                f"max_cpu_memory: {self.name} needs {_size(least)}: {_size(self.layer)} for its weights, "
                + (f"{_size(self.embedding)} beside the layers, {_size(self.work)} to compute, " if on_cpu else "")
                + f"{_size(self.libraries)} for libraries; the limit is {_size(memory.cpu)}{self._way_out(on_cpu)}"
            )
        if memory.gpu is not None and not on_cpu and memory.gpu < self.device:
            raise PlanError(
                f"max_gpu_memory: {self.name} needs {_size(self.device)}: {_size(self.layer)} for its weights, "
                f"{_size(self.embedding)} beside the layers, {_size(self.work)} to compute; the limit is "
                f"{_size(memory.gpu)}{self._way_out(on_cpu)}"
            )

    def spare(self, memory: Memory) -> int:
        """Bytes of main memory that are left when everything is in it; 0 without a limit: nothing more is taken."""
        return 0 if memory.cpu is None else max(0, memory.cpu - self.total)

    def _way_out(self, on_cpu: bool) -> str:
        halves = self.work > self.layer
        smaller = ", or make batches smaller" if halves else ""
        return f"; raise it{smaller}" + ("" if on_cpu else ", or compute on the CPU")

    def room(self, memory: Memory) -> int | None:
        """Bytes for outputs in main memory, None for no limit."""
        return None if memory.cpu is None else max(0, memory.cpu - self.least)


def work_bytes(config: Any, tokens: int, width: int) -> int:
    """What computing a batch takes, by the formula above; `width` bytes a number."""

    def said(*names: str) -> int:
        values = [getattr(config, name, None) for name in names]
        flat = [max(v) if isinstance(v, list) and v else v for v in values]
        return max((v for v in flat if isinstance(v, int)), default=0)

    routed = said("num_experts_per_tok", "top_k_experts") * said("moe_intermediate_size", "intermediate_size")
    return tokens * width * (6 * said("hidden_size") + 4 * said("intermediate_size") + 3 * routed)


def streams(config: Any) -> int:
    """Hidden states that a model carries for each token: hyper-connections (DeepSeek-V4), AltUp (Gemma 3n)."""
    return max(1, *(getattr(config, name, None) or 1 for name in ("hc_mult", "altup_num_inputs")))


def largest(sizes: Mapping[str, int]) -> tuple[str, int]:
    """Name and size of the largest."""
    name = max(sizes, key=lambda key: sizes[key])
    return name, sizes[name]


def limit_kernels() -> None:
    """Let oneDNN keep few compiled kernels instead of 1024; a limit that the user has set stays.

    It reads this when it makes its first kernel, so that it has no effect after that.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES))


def give_back() -> None:
    """Hand freed memory back to the system: glibc keeps what threads have freed, layer after layer."""
    if _C is not None and hasattr(_C, "malloc_trim"):
        _C.malloc_trim(0)


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"
