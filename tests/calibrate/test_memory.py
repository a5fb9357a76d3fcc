"""What is in memory while a walk runs: one decoder layer, one expert, the rows of the embedding that are needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mso_hub.calibrate.memory import Memory, Needs
from mso_hub.calibrate.walk import Layer, Observer, Walk
from mso_hub.errors import PlanError
from mso_hub.source import open_source
from tests.calibrate.anonymous import anonymous_bytes, peak_memory
from tests.calibrate.architectures import quiet_transformers, save, token_ids

IDS = token_ids(2, 12)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Without transformers' bars."""
    with quiet_transformers():
        yield


def filled(module: nn.Module) -> set[str]:
    """Parameters with numbers."""
    return {name for name, parameter in module.named_parameters() if not parameter.is_meta}


class Look(Observer):
    """Notes which parameters have numbers while each layer runs."""

    def __init__(self) -> None:
        self.walk: Walk | None = None
        self.found: list[set[str]] = []
        self.rows: list[int] = []

    def begin_layer(self, layer: Layer) -> None:
        assert self.walk is not None
        model = self.walk._skeleton.model
        self.found.append(filled(model))
        self.rows.append(len(model.get_input_embeddings().weight))  # type: ignore[operator]


@pytest.mark.parametrize("experts", ["expert", "stack"])
def test_one_layer_at_a_time_has_weights(experts: str, tmp_path: Path) -> None:
    look = Look()
    look.walk = Walk(open_source(save("qwen3_moe", tmp_path)), experts=experts)
    look.walk.run([IDS], look)
    assert len(look.found) == 3
    for index, names in enumerate(look.found):
        around = {name for name in names if not name.startswith("model.layers.")}
        assert around == {"model.embed_tokens.weight", "model.norm.weight"}
        assert names - around == {name for name in names if name.startswith(f"model.layers.{index}.")}
        banks = {name for name in names if ".experts." in name}
        assert bool(banks) == (experts == "stack" and index != 1)
    assert look.rows == [len(torch.unique(IDS)) + 1] * 3  # and the row of token 0
    assert not filled(look.walk._skeleton.model)


def test_the_head_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    walk = Walk(open_source(save("llama-tied", tmp_path)))
    last: dict[int, Tensor] = {}
    walk.run([IDS], Observer(), logits=last.__setitem__)
    assert not filled(walk._skeleton.model)
    next(walk.head(last[0]))
    assert filled(walk._skeleton.model) == {"lm_head.weight"}
    walk.close()
    assert not filled(walk._skeleton.model)


def test_a_run_that_fails_lets_everything_go(tmp_path: Path) -> None:
    class Fail(Observer):
        def inputs(self, module: str, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    walk = Walk(open_source(save("qwen3_moe", tmp_path)))
    with pytest.raises(KeyboardInterrupt):
        walk.run([IDS], Fail())
    assert not filled(walk._skeleton.model)


def test_limits_name_what_they_limit() -> None:
    needs = Needs("decoder layer 3", embedding=1 << 20, layer=8 << 20, work=2 << 20, outputs=64 << 20)
    assert (needs.device, needs.least, needs.total) == (
        11 << 20,
        (11 << 20) + needs.libraries,
        (75 << 20) + needs.libraries,
    )
    needs.check(Memory(cpu=needs.least), ("cpu",))
    needs.check(Memory(gpu=11 << 20, cpu=needs.libraries + (8 << 20)), ("cuda:0",))
    with pytest.raises(PlanError, match="max_gpu_memory: decoder layer 3 needs 11 MiB: 8 MiB for its weights"):
        needs.check(Memory(gpu=10 << 20), ("cuda:0", "cuda:1"))
    with pytest.raises(PlanError, match="max_cpu_memory: decoder layer 3 needs"):
        needs.check(Memory(cpu=needs.least - 1), ("cpu",))
    assert needs.room(Memory()) is None
    assert needs.room(Memory(cpu=needs.least + 5)) == 5


def test_anonymous_memory_is_counted() -> None:
    """The measure of the benchmark sees an allocation, and sees it go."""
    before = anonymous_bytes()
    with peak_memory() as peak:
        torch.ones(64 << 20, dtype=torch.uint8)
    assert peak.nbytes - before > 48 << 20
