"""Numbers of an evaluation in a model card: where the Hub reads them, and of this checkpoint only."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard

from mso_hub.calibrate.evaluate import evaluate
from mso_hub.errors import RecipeError
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from mso_hub.plan.evaluation import Evaluation, write_evaluation
from mso_hub.recard import make_card
from tests.calibrate.architectures import quiet_transformers
from tests.calibrate.heldout import REAL, heldout

ROWS = heldout(512)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model in NVFP4."""
    folder = tmp_path_factory.mktemp("card") / "packed"
    convert(REAL, folder, Recipe(mode="all-linear"))
    return folder


@pytest.fixture(scope="module")
def found(packed: Path) -> tuple[Evaluation, Path]:
    """What it predicts, and a file of that."""
    with quiet_transformers():
        made = evaluate(packed, ROWS, against=REAL)
    path = packed.parent / "found.json"
    write_evaluation(made, path)
    return made, path


def test_the_hub_finds_the_numbers(packed: Path, found: tuple[Evaluation, Path]) -> None:
    """huggingface_hub reads them back from the metadata, and a person from the text."""
    evaluation, path = found
    card = ModelCard(make_card(packed, source=REAL, evaluation=path).content.decode())
    read: list[EvalResult] = card.data["eval_results"]
    results = {result.metric_type: result.metric_value for result in read}
    assert evaluation.reference is not None
    assert results == {
        "perplexity": round(evaluation.perplexity, 4),
        "kl_divergence": round(evaluation.reference.kl, 6),
        "top1_agreement": round(evaluation.reference.agreement, 6),
    }
    assert {result.dataset_type for result in read} == {"held-out"}
    assert "## Evaluation" in card.text
    assert f"{evaluation.reference.kl:.5f}" in card.text


def test_without_an_evaluation_there_is_no_word_of_one(packed: Path) -> None:
    content = make_card(packed, source=REAL).content.decode()
    assert "Evaluation" not in content
    assert "model-index" not in content


def test_a_copy_in_another_place_is_the_same_checkpoint(
    packed: Path, found: tuple[Evaluation, Path], tmp_path: Path
) -> None:
    shutil.copytree(packed, tmp_path / "copy")
    assert b"## Evaluation" in make_card(tmp_path / "copy", source=REAL, evaluation=found[1]).content


def test_numbers_of_another_checkpoint_are_refused(packed: Path, tmp_path: Path) -> None:
    """Another model's, and those of a recipe that was tried on this one."""
    with quiet_transformers():
        for name, made in {
            "other": evaluate(REAL, ROWS),
            "tried": evaluate(packed, ROWS, recipe=Recipe(scheme="w8a16", mode="all-linear")),
        }.items():
            write_evaluation(made, tmp_path / f"{name}.json")
            with pytest.raises(RecipeError, match="not of this checkpoint as it is"):
                make_card(packed, source=REAL, evaluation=tmp_path / f"{name}.json")
