"""Experts loaded and run by the real kt-kernel, in a process of its own, against the same numbers dequantized.

A few experts of the first and of the last layer are copied into a folder with names that kt-kernel knows, so that
neither a whole layer nor the rest of the model is needed. The reference rounds activations to INT8 where kt-kernel's
kernels do, so that what remains is sums in another order, and BF16.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mso_hub.errors import VerifyError
from mso_hub.formats.decoders.fp8 import Fp8Decoder
from mso_hub.formats.decoders.kt import KtDecoder
from mso_hub.formats.decoders.nvfp4 import Nvfp4Decoder
from mso_hub.formats.decoders.packed_int import PackedInt
from mso_hub.formats.dialects.ktransformers import PROJECTIONS, Place, expert_place
from mso_hub.formats.weight import Reader, Weight
from mso_hub.plan.experts import is_fused_experts, split_experts
from mso_hub.plan.select import decoder_layer, layer_count
from mso_hub.verify.kt_exchange import decoded, expert_tensors, inputs_for, read_tensors, reference, write_tensors
from mso_hub.verify.opened import Opened, opening
from mso_hub.verify.report import Report

VARIABLE = "MSO_KT_PYTHON"
PROGRAM = Path(__file__).with_name("kt_program.py")
CONSUMERS = ("kt",)
FLAGS = ("avx512f", "avx512bw")
"""What kt-kernel's INT4 and INT8 kernels need of a processor."""
LIMITS = {"AMXINT4": 0.01, "AMXINT8": 0.01, "RAWINT4": 0.01, "NVFP4": 0.015, "FP8": 0.01, "BF16": 0.01}
"""Method of kt-kernel -> relative error of its answers that its own rounding explains: it keeps sums in BF16, and
NVFP4's two scales as one in BF16. Measured are 0.003 and 0.005; without the INT8 activations in the reference it would
be 0.01 to 0.04 for integers."""
SAMPLED = 4
"""Experts of a layer."""
PATIENCE = 600
"""Seconds that kt-kernel has for a layer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What kt-kernel made of some experts of a layer.

    method   kt-kernel's name of how they are stored
    error    |answers - reference| over |reference|, the largest of all batches
    variant  which of its kernels ran
    """

    layer: int
    experts: tuple[int, ...]
    method: str
    error: float
    variant: str


def check_consumer(report: Report, where: str | Path, consumer: str, python: str | None = None) -> Report:
    """The report of a checkpoint with what kt-kernel made of its experts.

    python  a Python that has kt-kernel; that of MSO_KT_PYTHON by default
    Raises VerifyError for another consumer than kt, without such a Python, and where kt-kernel cannot read the format.
    """
    if consumer not in CONSUMERS:
        raise VerifyError(f"consumer must be {' or '.join(CONSUMERS)}, got {consumer!r}")
    if missing := missing_flags():
        note = f"kt-kernel was not asked: its kernels need {' and '.join(missing)}, which this processor lacks"
        return replace(report, notes=(*report.notes, note))
    program = python_of_kt(python)
    with opening(where) as mine:
        answers = list(run_in_kt(mine, program))
    problems = [
        f"layer {a.layer}: kt-kernel's answers ({a.method}, {a.variant}) are {a.error:.1%} from those of the decoded "
        f"weights, its own rounding explains {LIMITS[a.method]:.1%}"
        for a in answers if not a.error <= LIMITS[a.method]
    ]  # fmt: skip
    notes = [
        f"kt-kernel ({a.method}, {a.variant}) ran the experts {', '.join(map(str, a.experts))} of layer {a.layer}: "
        f"{a.error:.2%} from the decoded weights"
        for a in answers
    ]
    return replace(report, problems=(*report.problems, *problems), notes=(*report.notes, *notes))


def missing_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Instructions that kt-kernel needs and that this processor lacks; all of them where the system does not tell."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set[str]())
    return [flag for flag in FLAGS if flag not in found]


def python_of_kt(given: str | None = None) -> Path:
    """The Python that has kt-kernel: the given one, else that of MSO_KT_PYTHON; VerifyError without one."""
    said = given or os.environ.get(VARIABLE)
    found = shutil.which(Path(said).expanduser()) if said else None
    if found is None:
        raise VerifyError(
            f"consumer kt: needs a Python with kt-kernel, {said or f'{VARIABLE} is not set'}; docs/ktransformers.md "
            f"makes one, name it in {VARIABLE}"
        )
    return Path(found).absolute()


def run_in_kt(mine: Opened, python: Path) -> Iterator[Answer]:
    """Answers for a few experts of the first and of the last layer that has some."""
    experts = routed_experts(mine)
    if not experts:
        raise VerifyError(f"{mine.source.name}: holds no routed experts, kt-kernel runs nothing else")
    layers = sorted({place.layer for place in experts})
    for layer in dict.fromkeys((layers[0], layers[-1])):
        here = sorted({place.expert for place in experts if place.layer == layer})
        count = min(SAMPLED, len(here))
        chosen = tuple(here[at * len(here) // count] for at in range(count))
        trios = [tuple(experts[Place(layer, p, expert)] for p in PROJECTIONS) for expert in chosen]
        with TemporaryDirectory(prefix="mso-kt-") as folder:
            yield _ask(mine.source.read, layer, chosen, trios, python, Path(folder))


def routed_experts(mine: Opened) -> dict[Place, Weight]:
    """Every routed expert's projection, banks split."""
    config = mine.checkpoint.config
    count = layer_count(config)
    found: dict[Place, Weight] = {}
    for weight in mine.weights.values():
        if decoder_layer(weight.module, count) is None:
            continue
        parts = split_experts(weight, config, mine.weights) if is_fused_experts(weight) else [weight]
        found |= {place: part for part in parts if (place := expert_place(part.module)) is not None}
    return found


def method_of(weight: Weight) -> str:
    """kt-kernel's name of how a weight is stored; VerifyError where it reads no such thing."""
    decoder = weight.decoder
    if isinstance(decoder, KtDecoder):
        return f"AMXINT{decoder.width}"
    if decoder is None or not decoder.layout:
        return "BF16"
    if isinstance(decoder, Nvfp4Decoder) and decoder.layout == "modelopt":
        return "NVFP4"
    if isinstance(decoder, Fp8Decoder) and decoder.cell == (128, 128):
        return "FP8"
    scale = weight.parts.get("scale")
    plain = isinstance(decoder, PackedInt) and decoder.bits == 4 and not {"zero_point", "g_idx"} & weight.parts.keys()
    if plain and scale is not None and scale.dtype == "BF16" and weight.shape[1] // scale.shape[1] == 32:
        return "RAWINT4"
    raise VerifyError(
        f"{weight.name}: kt-kernel does not read {decoder.name} ({decoder.layout}); it reads kt-int4, kt-int8, w4a16 "
        "in groups of 32 with BF16 scales, nvfp4 in the layout modelopt, FP8 in blocks of 128 and BF16"
    )


def _ask(
    read: Reader, layer: int, chosen: tuple[int, ...], trios: Sequence[tuple[Weight, ...]], python: Path, folder: Path
) -> Answer:
    gate = trios[0][0]
    method, (inner, hidden) = method_of(gate), gate.shape
    (folder / "model").mkdir()
    write_tensors(folder / "model" / "model.safetensors", expert_tensors(read, trios, method))
    inputs = inputs_for(len(trios), hidden)
    write_tensors(folder / "inputs.safetensors", inputs)
    job = {
        "folder": str(folder / "model"), "method": method, "layer": 0, "experts": len(trios),
        "chosen": inputs["ids.0"].shape[1], "hidden": hidden, "inner": inner,
        "parts": gate.decoder.parts if isinstance(gate.decoder, KtDecoder) else 1,
        "inputs": str(folder / "inputs.safetensors"), "outputs": str(folder / "outputs.safetensors"),
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    _run(python, folder, layer)
    found, facts = read_tensors(folder / "outputs.safetensors")
    numbers = [[decoded(read, weight) for weight in trio] for trio in trios]
    expected = reference(numbers, inputs, _widths(gate, method))
    error = max(float(np.linalg.norm(found[name] - y) / np.linalg.norm(y)) for name, y in expected.items())
    return Answer(layer, chosen, method, error, facts.get("variant", "unknown"))


def _widths(gate: Weight, method: str) -> tuple[int, int] | None:
    """Stretches of activations that kt-kernel rounds to INT8 with one scale: rows of a NUMA node's part, or groups."""
    inner, hidden = gate.shape
    if isinstance(gate.decoder, KtDecoder):
        return hidden, inner // gate.decoder.parts
    return (32, 32) if method == "RAWINT4" else None


def _run(python: Path, folder: Path, layer: int) -> None:
    env = {**os.environ, "KT_MXFP4_BACKEND": "avx2", "HF_HUB_OFFLINE": "1"}  # its NVFP4 kernel is the AVX2 one
    env.pop("PYTHONPATH", None)
    said = folder / "said.txt"
    with said.open("wb") as out:
        try:
            done = subprocess.run(
                [python, PROGRAM, folder / "job.json"], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                cwd=folder, env=env, timeout=PATIENCE, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise VerifyError(f"consumer kt: {python} did not run layer {layer}: {error}") from error
    if done.returncode or not (folder / "outputs.safetensors").is_file():
        last = "\n  ".join(said.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:])
        raise VerifyError(
            f"consumer kt: {python} ended with {done.returncode} at layer {layer}; is kt-kernel installed there? Its "
            f"last lines:\n  {last}"
        )
