"""Two runs of vLLM compared: what must be equal, what may differ and by how much, and what is never fine.

The runs themselves are tested where vLLM is: here a program answers with given numbers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mso_hub import Recipe, compare_generation, convert
from mso_hub.errors import RecipeError, SmokeError
from mso_hub.formats import Scheme
from mso_hub.generation import GenerationReport, generation_text, weight_only
from mso_hub.plan import Rule
from tests.helpers import tiny_moe

Answers = Callable[..., Path]
TOKENS = [[1, 2], [3, 4]]


@pytest.fixture(autouse=True)
def _own_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("generation") / "in")


@pytest.fixture(scope="module")
def packed(dense: Path) -> Path:
    """Weights alone are quantized."""
    convert(dense, dense.parent / "packed", Recipe())
    return dense.parent / "packed"


@pytest.fixture(scope="module")
def w4a4(dense: Path) -> Path:
    """Activations too."""
    convert(dense, dense.parent / "w4a4", Recipe(activations=4))
    return dense.parent / "w4a4"


@pytest.fixture
def answers(tmp_path: Path) -> Answers:
    """A program in place of a Python that has vLLM: one report for the checkpoint, another for its BF16 weights.

    It keeps both jobs, and the names of the files of each folder.
    """

    def report(nll: float | None, tokens: list[list[int]], **more: Any) -> str:
        outputs = [{"tokens": t, "prompt_nll": nll, "prompt_logprobs": []} for t in tokens]
        content = {"version": 1, "vllm": "0.32.0", "device": "cpu", "emulated": True, "kernels": [], "seconds": 1}
        return json.dumps({**content, "outputs": outputs, **more})

    def write(nll: float | None, reference: float = 5.0, tokens: list[list[int]] = TOKENS, **more: Any) -> Path:
        (tmp_path / "own.json").write_text(report(nll, tokens, **more))
        (tmp_path / "bf16.json").write_text(report(reference, TOKENS))
        path = tmp_path / "python"
        path.write_text(
            '#!/bin/bash\nif [ "$1" = -c ]; then echo "[[3, 12], true]"; exit 0; fi\n'
            f'which=own; if grep -q "in BF16" "$4"; then which=bf16; fi\ncp "$4" {tmp_path}/$which.job\n'
            f'cp {tmp_path}/$which.json "$5"\n'
        )
        path.chmod(0o755)
        return path

    return write


def compare(folder: Path, python: Path, **settings: Any) -> GenerationReport:
    report = compare_generation(folder, python=python, **settings)
    text = generation_text(report)
    assert all(f"PROBLEM {problem}" in text for problem in report.problems)
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["ok"] is report.ok
    return report


def test_weights_alone_must_give_the_same(packed: Path, answers: Answers) -> None:
    """Tokens, and likelihoods up to the order of additions; a better likelihood is as wrong as a worse one."""
    assert compare(packed, answers(5.0009)).ok
    for nll in (5.002, 4.998):
        (first, second) = compare(packed, answers(nll)).problems
        assert first.startswith(
            f"prompt 1: {nll:.4f} nats per token, its weights in BF16 have 5.0000; only weights are"
        )
        assert second.startswith("prompt 2: ")
    (problem,) = compare(packed, answers(5.0, tokens=[[1, 2], [3, 5]])).problems
    assert problem.startswith("prompt 2: answers [3, 5], its weights in BF16 [3, 4]; only weights are quantized")


def test_quantized_activations_may_cost_likelihood(w4a4: Path, answers: Answers) -> None:
    """So much and no more; other tokens are no problem, nor is a better likelihood."""
    assert compare(w4a4, answers(5.19, tokens=[[7], [8]])).ok
    assert compare(w4a4, answers(4.0)).ok
    report = compare(w4a4, answers(5.25))
    assert [problem.endswith("at most 0.2 more are allowed (--max_nll_gap)") for problem in report.problems] == [
        True
    ] * 2
    assert compare(w4a4, answers(5.25), max_nll_gap=0.3).ok


def test_a_kernel_that_quantizes_activations_by_itself_may_cost_too(packed: Path, answers: Answers) -> None:
    """vLLM's INT4 kernel for CPUs does."""
    assert not compare(packed, answers(5.1)).ok
    report = compare(packed, answers(5.1, kernels=["CompressedTensorsWNA16: CPUWNA16LinearKernel, 8 layers"]))
    assert report.ok
    assert not report.weight_only


@pytest.mark.parametrize("nll", [float("nan"), float("inf")])
def test_a_likelihood_that_is_no_number_is_always_a_problem(
    nll: float, packed: Path, w4a4: Path, answers: Answers
) -> None:
    """Of the checkpoint and of its reference."""
    for folder in (packed, w4a4):
        assert "the likelihood of the checkpoint is" in compare(folder, answers(nll)).problems[0]
        assert "the likelihood of its weights in BF16 is" in compare(folder, answers(5.0, reference=nll)).problems[0]


def test_the_jobs(packed: Path, dense: Path, answers: Answers, tmp_path: Path) -> None:
    """The same prompts for both; a dense checkpoint runs once and is its own reference; nothing is left behind."""
    python = answers(5.0)
    report = compare(packed, python, max_tokens=3, tp=2)
    own, reference = (json.loads((tmp_path / f"{which}.job").read_text()) for which in ("own", "bf16"))
    assert own.pop("folder") == str(packed.resolve())
    assert reference.pop("folder").endswith("/bf16")
    assert (own.pop("name"), reference.pop("name")) == (str(packed), f"{packed} in BF16")
    assert own == reference
    assert (own["max_tokens"], own["tp"], own["emulate"], own["max_model_len"]) == (3, 2, True, 128)
    assert [len(prompt) for prompt in own["prompts"]] == [32, 32]
    assert all(0 <= token < 96 for prompt in own["prompts"] for token in prompt)
    assert report.seconds == 2
    (tmp_path / "bf16.job").unlink()
    report = compare(dense, python)
    assert report.dense
    assert report.ok
    assert not (tmp_path / "bf16.job").exists()
    assert not list((tmp_path / "tmp").iterdir())


def test_prompts(dense: Path, answers: Answers, tmp_path: Path) -> None:
    """Texts for a tokenizer that is there, token ids for any; not both at once."""
    python = answers(5.0)
    with pytest.raises(RecipeError, match="--prompt 'Hello' needs a tokenizer, there is none; leave it out"):
        compare(dense, python, prompts=["Hello"])
    with pytest.raises(RecipeError, match="must be texts or lists of token ids, got 1 texts of 2"):
        compare(dense, python, prompts=["Hello", [1]])
    compare(dense, python, prompts=[[1, 2], [3]])
    assert json.loads((tmp_path / "own.job").read_text())["prompts"] == [[1, 2], [3]]
    folder = shutil.copytree(dense, tmp_path / "with")
    (folder / "tokenizer.json").write_text("{}")
    compare(folder, python, prompts=["Hello", "there"])
    assert json.loads((tmp_path / "own.job").read_text())["prompts"] == ["Hello", "there"]
    compare(folder, python)
    assert all(len(text) > 50 for text in json.loads((tmp_path / "own.job").read_text())["prompts"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"outputs": []}, "has 0 outputs for 2 prompts"),
        ({"kernels": [1]}, "kernels must be texts"),
        ({"extra": 1}, "report needs vllm device"),
    ],
)
def test_a_report_that_is_none(more: dict[str, Any], said: str, dense: Path, answers: Answers) -> None:
    with pytest.raises(SmokeError) as caught:
        compare(dense, answers(5.0, **more))
    assert said in str(caught.value)


def test_a_prompt_without_a_likelihood(dense: Path, answers: Answers) -> None:
    with pytest.raises(SmokeError, match="a prompt of one token has no likelihood; give a longer --prompt"):
        compare(dense, answers(None))


CT = "compressed-tensors"
WEIGHT_ONLY: dict[str, tuple[Recipe, bool]] = {
    "nvfp4": (Recipe(), True),
    "nvfp4 static": (Recipe(activations=4), False),
    "nvfp4 modelopt": (Recipe(layout="modelopt"), True),
    "nvfp4 modelopt static": (Recipe(layout="modelopt", activations=4), False),
    "mxfp4": (Recipe(scheme="mxfp4"), True),
    "mxfp4 a8": (Recipe(scheme="mxfp4", activations=8), False),
    "mxfp8 modelopt": (Recipe(scheme="mxfp8", layout="modelopt"), False),
    "w4a16": (Recipe(scheme="w4a16", group_size=32), True),
    "int8": (Recipe(scheme="int8"), False),
    "fp8": (Recipe(scheme="fp8_dynamic"), False),
    "deepseek": (Recipe(scheme="fp8_block", layout="deepseek", targets=("*.o_proj",)), False),
    "a cache": (Recipe(kv_cache=True), False),
    "two kinds": (Recipe(rules=(Rule(Scheme("nvfp4")), Rule(Scheme("fp8_dynamic"), ("Linear",)))), False),
    "two kinds modelopt": (
        Recipe(layout="modelopt", rules=(Rule(Scheme("nvfp4")), Rule(Scheme("mxfp8"), ("Linear",)))), False),
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "expected"), WEIGHT_ONLY.values(), ids=WEIGHT_ONLY)
def test_what_leaves_activations_alone(recipe: Recipe, expected: bool, dense: Path) -> None:
    """Read from the config that is written."""
    from mso_hub import make_plan

    assert weight_only(make_plan(dense, recipe).config) is expected


def test_foreign_configs() -> None:
    """What does not tell is not taken for weight-only."""
    for method in ("awq", "gptq", "mxfp4"):
        assert weight_only({"quantization_config": {"quant_method": method}})
    assert not weight_only({"quantization_config": {"quant_method": "unheard_of"}})
    assert weight_only({})
