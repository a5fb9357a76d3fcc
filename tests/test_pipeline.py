"""convert() as a whole: what the source must not do meanwhile, and where memory goes with many threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mso_hub import Recipe, convert
from mso_hub.cli import main
from mso_hub.engine import ThreadEngine
from mso_hub.errors import CheckpointError
from mso_hub.events import Event, TensorDone
from tests.helpers import tensors_of, tiny_llama


def test_a_source_that_changes_meanwhile_is_never_published(tmp_path: Path) -> None:
    """Bytes of two states of a file would make a checkpoint that nobody trained."""
    source = tiny_llama(tmp_path / "in", shards=3)
    last = max(source.glob("*.safetensors"))

    def overwrite(event: Event) -> None:
        if isinstance(event, TensorDone):
            with last.open("r+b") as file:  # in place: a file cut short is another error
                file.seek(-4, os.SEEK_END)
                file.write(bytes(4))
            os.utime(last, ns=(0, 0))  # clocks of file systems are coarse

    with pytest.raises(CheckpointError, match=rf"{last.name}: changed while it was read; run it again with --fresh"):
        convert(source, tmp_path / "out", Recipe(), on_event=overwrite)
    assert not (tmp_path / "out").exists()


def test_blocks_shrink_with_the_budget_and_the_number_of_threads(tmp_path: Path) -> None:
    """Sixteen threads on a small budget cut finer, and the bytes stay the same."""
    source = tiny_llama(tmp_path / "in", hidden=256)
    convert(source, tmp_path / "few", Recipe(), engine=ThreadEngine(1))
    convert(source, tmp_path / "many", Recipe(), engine=ThreadEngine(16, 1 << 20))
    few, many = tensors_of(tmp_path / "few"), tensors_of(tmp_path / "many")
    assert few.keys() == many.keys()
    assert all(torch.equal(few[n].view(torch.uint8), many[n].view(torch.uint8)) for n in few)


@pytest.mark.parametrize(
    "words",
    [
        ["quantize", "--input_dir", "", "--output_dir", "x"],
        ["quantize", "--input_dir", "x", "--output_dir", ""],
        ["plan", "x", "--ignore", ""],
        ["plan", "x", "--exclude_config", ""],
        ["plan", "x", "--input_scale", ""],
        ["inspect", ""],
    ],
)
def test_an_empty_value_is_refused(words: list[str]) -> None:
    """A shell variable that is not set must not mean the current folder, or nothing."""
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "must not be empty" in result.output


def test_a_leading_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave `--input_dir=~/model` alone."""
    tiny_llama(tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    result = CliRunner().invoke(main, ["inspect", "~/model"])
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM" in result.output
