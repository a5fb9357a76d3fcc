"""GPUs that vLLM runs on: compute capability and memory, from a table or from the machine."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from mso_hub.errors import RecipeError

CAPABILITIES = "https://developer.nvidia.com/cuda-gpus"
"""Source of the compute capabilities; memory is what the data sheet of each GPU says."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU.

    capability  compute capability times ten: 90 is 9.0
    memory      in GB as data sheets count them, bytes / 2**30; the driver keeps a percent or two of it
    count       how many there are in this machine; 0 where nobody looked
    """

    name: str
    capability: int
    memory: float
    count: int = 0

    @property
    def sm(self) -> str:
        """`sm90`."""
        return f"sm{self.capability}"


GPUS = (
    Gpu("T4", 75, 16), Gpu("RTX 2080 Ti", 75, 11),
    Gpu("A30", 80, 24), Gpu("A100-40GB", 80, 40), Gpu("A100-80GB", 80, 80),
    Gpu("A10", 86, 24), Gpu("A40", 86, 48), Gpu("RTX 3090", 86, 24), Gpu("RTX A5000", 86, 24), Gpu("RTX A6000", 86, 48),
    Gpu("L4", 89, 24), Gpu("L40", 89, 48), Gpu("L40S", 89, 48), Gpu("RTX 4090", 89, 24), Gpu("RTX 6000 Ada", 89, 48),
    Gpu("H100", 90, 80), Gpu("H100 NVL", 90, 94), Gpu("H20", 90, 96), Gpu("H200", 90, 141), Gpu("GH200-96GB", 90, 96),
    Gpu("B200", 100, 180), Gpu("GB200", 100, 186), Gpu("B300", 103, 270), Gpu("GB300", 103, 279),
    Gpu("RTX 5080", 120, 16), Gpu("RTX 5090", 120, 32), Gpu("RTX PRO 6000", 120, 96), Gpu("GB10", 121, 128),
)  # fmt: skip


def find_gpu(name: str) -> Gpu:
    """A row of the table by its name, in any spelling; `auto` asks the machine. RecipeError for a name without a row.

    `h100`, `nvidia-h100` and `H100` are the same.
    """
    if name.strip().lower() == "auto":
        return machine_gpu()
    wanted = _plain(name)
    for gpu in GPUS:
        if wanted == _plain(gpu.name):
            return gpu
    raise RecipeError(f"--gpu {name}: is not in the table, which has {known()}; auto asks nvidia-smi")


def known() -> str:
    """Names of the table."""
    return ", ".join(gpu.name for gpu in GPUS)


def machine_gpu() -> Gpu:
    """The first GPU of this machine, and how many of its kind there are, from nvidia-smi; RecipeError without one."""
    program = shutil.which("nvidia-smi")
    way_out = f"name one with --gpu: {known()}"
    if program is None:
        raise RecipeError(f"--gpu auto: there is no nvidia-smi to ask, so no NVIDIA driver; {way_out}")
    asked = [program, "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise RecipeError(f"--gpu auto: nvidia-smi finds no GPU: {error}; {way_out}") from error
    found = done.stdout.strip().splitlines()
    try:
        name, memory, capability = (field.strip() for field in found[0].split(","))
        major, minor = map(int, capability.split("."))
        return Gpu(name, 10 * major + minor, int(memory) / 1024, sum(line == found[0] for line in found))
    except (IndexError, ValueError) as error:
        said = found[0] if found else "nothing"
        raise RecipeError(
            f"--gpu auto: nvidia-smi must say name, memory, capability; it says {said!r}; {way_out}"
        ) from error


def _plain(name: str) -> str:
    """A name without case, blanks, dashes and the maker."""
    kept = "".join(c for c in name.lower() if c.isalnum())
    for word in ("nvidia", "geforce", "tesla"):
        kept = kept.removeprefix(word)
    return kept
