"""A source with other tensors in place of some of another's."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load

from mso_hub.checkpoint import TensorInfo
from mso_hub.errors import CheckpointError
from mso_hub.source import MemorySource, read_checkpoint
from mso_hub.source.overlay import Computed, Elsewhere, OverlaySource, Part
from mso_hub.source.reads import Job
from tests.helpers import checkpoint_files, random_tensor

SHARDS = {
    "a.safetensors": {"x.weight": random_tensor(4, 8, seed=1), "y.weight": random_tensor(3, 8, seed=2)},
    "b.safetensors": {"z.weight": random_tensor(2, 8, seed=3)},
}


def base() -> MemorySource:
    """Two shards and an index."""
    return MemorySource(checkpoint_files(SHARDS, {"model_type": "x"}))


def elsewhere(name: str, tensor: torch.Tensor) -> Part:
    """A tensor in another source, behind another one there."""
    other = MemorySource(checkpoint_files({"o.safetensors": {"first": random_tensor(1, 3), "t": tensor}}))
    place = next(i for s in read_checkpoint(other).shards.values() for i in s.tensors if i.name == "t")
    return Elsewhere(TensorInfo(name, place.dtype, place.shape), place, other)


def overlay(replaced: dict[str, list[Part]], **files: bytes) -> OverlaySource:
    """Over `base`."""
    source = base()
    return OverlaySource(source, read_checkpoint(source), replaced, files, "stamp")


def tensors(source: OverlaySource, file: str) -> dict[str, torch.Tensor]:
    """A whole shard, read by the safetensors library."""
    return load(source.read(file, 0, source.files()[file]).tobytes())


def test_a_replaced_tensor_is_read_from_elsewhere() -> None:
    """In its place among the others, under names of its own, also in the index; other shards are the base's bytes."""
    packed, scale = random_tensor(4, 2, seed=7), random_tensor(4, 1, seed=8)
    made = overlay({"x.weight": [elsewhere("x.weight_packed", packed), elsewhere("x.weight_scale", scale)]})
    found = tensors(made, "a.safetensors")
    assert torch.equal(found["x.weight_packed"], packed)
    assert torch.equal(found["x.weight_scale"], scale)
    assert torch.equal(found["y.weight"], SHARDS["a.safetensors"]["y.weight"])
    names = {i.name for s in read_checkpoint(made).shards.values() for i in s.tensors}
    assert names == {"x.weight_packed", "x.weight_scale", "y.weight", "z.weight"}
    plain = base()
    assert made.files()["b.safetensors"] == plain.files()["b.safetensors"]
    assert made.stamp("b.safetensors") == plain.stamp("b.safetensors")
    assert made.stamp("a.safetensors") != plain.stamp("a.safetensors")


def test_every_range_of_a_changed_shard_is_a_part_of_the_whole() -> None:
    """Whatever begins in the header and ends in a replaced, a computed or a kept tensor."""

    def rows(read: object, start: int, stop: int) -> NDArray[np.uint16]:
        return np.arange(8 * start, 8 * stop, dtype=np.uint16)

    computed = Computed(TensorInfo("y.weight", "BF16", (3, 8)), lambda a, b: [("a.safetensors", a, b)], rows)
    made = overlay({"x.weight": [elsewhere("x.weight_packed", random_tensor(3, 5))], "y.weight": [computed]})
    whole = made.read("a.safetensors", 0, made.files()["a.safetensors"])
    for begin in range(0, len(whole), 7):
        for end in (begin, begin + 1, begin + 19, len(whole)):
            assert np.array_equal(made.read("a.safetensors", begin, min(end, len(whole))), whole[begin:end])
    assert np.array_equal(whole[-48:].view(np.uint16), np.arange(24))


def test_a_computed_tensor_asks_for_whole_rows() -> None:
    """And announces them, so that a distant base can read ahead."""
    asked: list[tuple[int, int]] = []

    def rows(read: object, start: int, stop: int) -> NDArray[np.uint16]:
        asked.append((start, stop))
        return np.zeros((stop - start, 8), np.uint16)

    part = Computed(TensorInfo("y.weight", "BF16", (3, 8)), lambda a, b: [("f", a, b)], rows, 2)
    assert part.read(lambda *_: np.empty(0, np.uint8), 17, 20).nbytes == 3
    assert asked == [(0, 2)]
    assert part.ranges(33, 34) == [("f", 2, 3)]


def test_a_job_is_announced_in_ranges_of_the_base() -> None:
    """What comes from elsewhere is not announced."""
    jobs: list[Job] = []

    class Listening(MemorySource):
        """Keeps what is announced."""

        def expect(self, announced: Sequence[Job]) -> None:
            """As a distant source hears it."""
            jobs.extend(announced)

    source = Listening(checkpoint_files(SHARDS))
    checkpoint = read_checkpoint(source)
    made = OverlaySource(source, checkpoint, {"x.weight": [elsewhere("x.w", random_tensor(3, 5))]}, {}, "stamp")
    size = made.files()["a.safetensors"]
    made.expect([Job("a.safetensors", lambda: [("a.safetensors", 0, size), ("b.safetensors", 3, 9)])])
    kept = next(i for i in checkpoint.shards["a.safetensors"].tensors if i.name == "y.weight")
    assert jobs[0].reads() == [("a.safetensors", kept.begin, kept.end), ("b.safetensors", 3, 9)]


def test_files_can_be_others_too() -> None:
    """With their own size and stamp."""
    source = base()
    made = OverlaySource(source, read_checkpoint(source), {}, {"config.json": b'{"model_type": "other"}'}, "stamp")
    assert read_checkpoint(made).config == {"model_type": "other"}
    assert made.stamp("config.json") != source.stamp("config.json")
    assert json.loads(source.read("config.json", 0, source.files()["config.json"]).tobytes()) == {"model_type": "x"}


def test_a_tensor_that_is_not_there_is_refused() -> None:
    """The message names it."""
    with pytest.raises(CheckpointError, match=r"no tensor 'q\.weight'"):
        overlay({"q.weight": []})
    with pytest.raises(CheckpointError, match="wanted bytes"):
        overlay({"x.weight": []}).read("a.safetensors", 0, 10**6)
