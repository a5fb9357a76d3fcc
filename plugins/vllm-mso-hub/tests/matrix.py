"""What the matrix of formats and models asks of vLLM, and the matrix itself as a table.

    cd plugins/vllm-mso-hub && PYTHONPATH=tests python tests/matrix.py

Every format in every layout and width of activations, with --all every variant, made by this project's own engine, on
five models: the shape proof, and the distance of the emulated checkpoint's answers from those of the BF16 checkpoint
that the engine decompresses it to.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from models import ARCHITECTURES, TRAINED, TRAINED_IDS, converted, dense, dense_headers, planned
from mso_hub import Recipe
from mso_hub.formats import build
from variants import VARIANTS, Variant, first_of_each_family, refusal
from vllm_mso_hub.job import Job, Report

MODELS = (*ARCHITECTURES, "trained")
TOKENS = 8
GAPS = {"w4a16": 0.05, 16: 0.0, 8: 0.2, 4: 0.3}
"""Nats by which the log-likelihood of a prompt's token may differ, on average over the tokens, from that of the
decompressed checkpoint, by the bits of activations. vLLM's own W4A16 kernel computes with INT8 activations on some
processors; an FP8 KV cache counts as activations of 8 bits. The models are random, so their answers hang on little."""

Outputs = list[dict[str, Any]]


# --- the proof of shapes --------------------------------------------------------------------------


def worlds(model: str, variant: Variant) -> list[tuple[tuple[int, ...], bool]]:
    """(tensor-parallel sizes, expert parallelism?) that a variant is proved for; the second for one of each family."""
    if model == "trained":
        return [((1,), False)]
    experts = model != "llama" and variant in first_of_each_family(model)
    return [((1, 2, 4, 8), False)] + ([((2, 8), True)] if experts else [])


def proofs(model: str, variant: Variant, folder: Path) -> list[Report]:
    """vLLM's word on every world of a variant."""
    from vllm_mso_hub.shapes import prove

    return [prove(Job.of_folder(folder, tp=sizes, ep=ep)) for sizes, ep in worlds(model, variant)]


def sentences(reports: Sequence[Report]) -> list[str]:
    """What is wrong, one line each."""
    refused = [report.refused.message for report in reports if report.refused]
    found = [(world, problem) for report in reports for world in report.worlds for problem in world.problems]
    return refused + [f"tp {w.tp}, ep {w.ep}: {p.kind}: {p.message}" for w, p in found]


# --- generation -----------------------------------------------------------------------------------


def prompts(model: str) -> list[list[int]]:
    """Two prompts of token ids: text that the trained model never saw, any ids for the random ones."""
    if model != "trained":
        return [[(7 * at + 3) % 128 for at in range(24)], [(11 * at + 5) % 128 for at in range(13)]]
    with safe_open(TRAINED_IDS, "pt") as file:
        ids = file.get_tensor("heldout_ids")
    return [ids[:64].tolist(), ids[1000:1048].tolist()]


def answers(model: str, folder: Path) -> tuple[Outputs, list[str]]:
    """What vLLM answers to the prompts, emulated where it has no kernel, and which kernels those were."""
    from vllm_mso_hub import generate

    job = {"version": 1, "name": model, "folder": str(folder), "prompts": prompts(model), "max_tokens": TOKENS}
    report = generate.run({**job, "tp": 1, "emulate": True, "max_model_len": 128})
    return report["outputs"], report["kernels"]


class References:
    """Answers of BF16 checkpoints; those with the same numbers share one run."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Outputs] = {}

    def answers(self, model: str, folder: Path) -> Outputs:
        """What vLLM answers from a BF16 folder."""
        digest = hashlib.sha256()
        for path in sorted(folder.glob("*.safetensors")):
            digest.update(path.read_bytes())
        key = (model, digest.hexdigest())
        if key not in self._known:
            self._known[key], _ = answers(model, folder)
        return self._known[key]


def gap(variant: Variant) -> float:
    """The entry of GAPS for the narrowest activations of a variant."""
    formats = [build(rule.scheme, variant.recipe.layout) for rule in variant.recipe.all_rules]
    bits = min([form.activations for form in formats if form is not None], default=16)
    if variant.recipe.kv_cache:
        bits = min(bits, 8)
    if bits == 16 and any(form is not None and form.name == "w4a16" for form in formats):
        return GAPS["w4a16"]
    return GAPS[bits]


def mean_difference(ours: Outputs, theirs: Outputs) -> float:
    """Mean distance of the log-likelihoods of the prompts' tokens, in nats."""
    found: list[float] = []
    for one, other in zip(ours, theirs, strict=True):
        found += [abs(a - b) for a, b in zip(one["prompt_logprobs"], other["prompt_logprobs"], strict=True)]
    return sum(found) / len(found)


# --- the table ------------------------------------------------------------------------------------


class _Quick:
    """vLLM thaws the garbage collector's heap for every engine and searches a million objects of modules; not here."""

    def __init__(self) -> None:
        self._freeze: Callable[[], None] = gc.freeze
        gc.freeze = gc.unfreeze = lambda: None

    def __call__(self) -> None:
        gc.collect()
        self._freeze()


def _cell(model: str, variant: Variant, root: Path, references: References) -> str:
    """`refused`, or the verdict on the shapes and the distance of the answers."""
    if refusal(model, variant) is not None:
        return "refused"
    trained = model == "trained"
    with tempfile.TemporaryDirectory(dir=root) as name:
        folder = Path(name)
        headers = planned(TRAINED if trained else root / "wide" / model, variant.recipe, folder / "planned")
        wrong = sentences(proofs(model, variant, headers))
        packed = converted(TRAINED if trained else root / "tiny" / model, variant.recipe, folder / "packed")
        ours, _ = answers(model, packed)
        theirs = references.answers(model, converted(packed, Recipe(scheme="bf16"), folder / "dense"))
    distance = "equal" if ours == theirs else f"{mean_difference(ours, theirs):.4f}"
    return f"{len(wrong)} problems, {distance}" if wrong else distance


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every variant, not one of each family")
    some = {variant.name for model in MODELS for variant in first_of_each_family(model)}
    rows = [v for v in VARIANTS if v.name in some or parser.parse_args().all]
    references, quick = References(), _Quick()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for model in ARCHITECTURES:
            dense(model, root / "tiny" / model)
            dense_headers(model, root / "wide" / model)
        sys.stdout.write(f"| variant | {' | '.join(MODELS)} |\n|---|{'---|' * len(MODELS)}\n")
        for variant in rows:
            cells = []
            for model in MODELS:
                quick()
                cells.append(_cell(model, variant, root, references))
            sys.stdout.write(f"| {variant.name} | {' | '.join(cells)} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    import conftest  # noqa: F401  its environment

    main()
