"""Elements are counted exactly, whatever overlaps: against a mask that is really written, and against real copies."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mso_hub.regions import Regions
from vllm_mso_hub.track import Reads, Tracker


@st.composite
def _views(draw: st.DrawFn) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A tensor of zeros and views of it: narrowed, transposed, selected, split and strided."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=3))
    base, views = torch.zeros(shape, dtype=torch.int32), []
    for _ in range(draw(st.integers(1, 6))):
        view = base
        for _ in range(draw(st.integers(0, 4))):
            if view.dim() == 0 or view.numel() == 0:
                break
            dim = draw(st.integers(0, view.dim() - 1))
            size = view.shape[dim]
            start = draw(st.integers(0, size - 1))
            match draw(st.sampled_from(["narrow", "transpose", "select", "split", "step"])):
                case "narrow":
                    view = view.narrow(dim, start, draw(st.integers(0, size - start)))
                case "transpose":
                    view = view.transpose(dim, draw(st.integers(0, view.dim() - 1)))
                case "select":
                    view = view.select(dim, start)
                case "split" if view.is_contiguous() and size % 2 == 0:
                    view = view.reshape(*view.shape[:dim], 2, size // 2, *view.shape[dim + 1 :])
                case "step":
                    view = view[(slice(None),) * dim + (slice(start, None, 2),)]
        views.append(view)
    return base, views


@settings(max_examples=400, deadline=None)
@given(_views())
def test_the_union_of_views_is_counted_element_by_element(case: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    base, views = case
    regions = Regions(base.numel() * 4)
    for view in views:
        view.fill_(1)
        regions.add(int(view.storage_offset()) * 4, view.shape, view.stride(), 4)
    assert regions.count() == int(base.sum()) * 4


def test_many_scattered_runs_take_no_more_room_than_their_union() -> None:
    regions = Regions(20_000)
    for start in [*range(0, 20_000, 2), *range(1, 20_000, 2)]:
        regions.add_run(start, start + 1)
    assert regions.count() == 20_000
    assert regions._runs == [(0, 20_000)]


def _tracked(parameter: torch.Tensor, **checkpoint: torch.Tensor) -> tuple[Tracker, dict[str, torch.Tensor]]:
    tracker = Tracker()
    tracker.watch([("p", parameter)])
    return tracker, dict(tracker.follow(checkpoint.items()))


DEVICES = [torch.device("cpu"), torch.device("meta")]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_what_a_rank_reads_and_writes_is_counted(device: torch.device) -> None:
    parameter = torch.empty(6, 4, device=device)
    tracker, given = _tracked(parameter, q=torch.zeros(4, 8, device=device), k=torch.zeros(2, 8, device=device))
    with tracker:
        parameter[:4].copy_(given["q"].narrow(1, 0, 4))
    assert tracker.written("p", parameter) == 16
    assert tracker.sources("p") == {"q": 16}
    assert (tracker.unread("q"), tracker.unread("k")) == (16, 16)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_two_ranks_that_read_the_same_columns_read_them_once(device: torch.device) -> None:
    reads: Reads = {}
    for columns in [(0, 4), (2, 4)]:
        tracker = Tracker(reads)
        parameter = torch.empty(4, 4, device=device)
        ((_, tensor),) = tracker.follow([("q", torch.zeros(4, 8, device=device))])
        with tracker:
            parameter.copy_(tensor.narrow(1, *columns))
    assert tracker.unread("q") == 4 * (8 - 6)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_copy_that_a_loader_makes_first_is_seen_through(device: torch.device) -> None:
    parameter = torch.empty(2, 4, device=device)
    tracker, given = _tracked(parameter, w=torch.zeros(4, 4, dtype=torch.bfloat16, device=device))
    with tracker:
        parameter.copy_(given["w"].to(torch.float32).t().contiguous()[:2])
    assert (tracker.written("p", parameter), tracker.unread("w")) == (8, 8)
    assert tracker.sources("p") == {"w": 8}
    assert not tracker.casts


def test_a_tensor_that_is_computed_with_is_read() -> None:
    parameter = torch.empty(4, device="meta")
    tracker, given = _tracked(parameter, a=torch.zeros(4, device="meta"), b=torch.zeros(4, device="meta"))
    with tracker:
        parameter.copy_(given["a"] + given["b"])
    assert (tracker.unread("a"), tracker.unread("b")) == (0, 0)


@pytest.mark.parametrize(
    ("stored", "wanted", "changes"),
    [
        (torch.bfloat16, torch.float32, False),
        (torch.float32, torch.bfloat16, False),
        (torch.int64, torch.int32, False),
        (torch.uint8, torch.float8_e4m3fn, True),
        (torch.float8_e4m3fn, torch.uint8, True),
        (torch.bfloat16, torch.float8_e4m3fn, True),
        (torch.float8_e8m0fnu, torch.uint8, True),
        (torch.int8, torch.uint8, True),
        (torch.float32, torch.float8_e4m3fn, True),
    ],
)
@pytest.mark.parametrize("by", ["copy_", "to"])
def test_a_conversion_that_changes_numbers_is_a_cast(
    stored: torch.dtype, wanted: torch.dtype, changes: bool, by: str
) -> None:
    parameter = torch.empty(4, dtype=wanted, device="meta")
    tracker, given = _tracked(parameter, w=torch.zeros(4, dtype=stored, device="meta"))
    with tracker:
        parameter.copy_(given["w"] if by == "copy_" else given["w"].to(wanted))
    found = [(cast.tensor, cast.parameter, cast.stored, cast.wanted) for cast in tracker.casts]
    assert found == ([("w", "p", stored, wanted)] if changes else [])


def test_reading_the_bits_as_another_dtype_is_no_cast() -> None:
    parameter = torch.empty(4, dtype=torch.uint8)
    tracker, given = _tracked(parameter, w=torch.zeros(4, dtype=torch.float8_e8m0fnu))
    with tracker:
        parameter.copy_(given["w"].view(torch.uint8))
    assert not tracker.casts
    assert tracker.unread("w") == 0


def test_a_copy_that_repeats_is_a_broadcast() -> None:
    parameter = torch.empty(3, 4, device="meta")
    tracker, given = _tracked(parameter, w=torch.zeros(4, device="meta"))
    with tracker:
        parameter.copy_(given["w"])
    (found,) = tracker.broadcasts
    assert (found.tensor, found.parameter, found.stored, found.filled) == ("w", "p", (4,), (3, 4))


def test_a_copy_that_fails_writes_nothing_and_the_next_tensor_follows() -> None:
    parameter = torch.empty(4, device="meta")
    tracker = Tracker()
    tracker.watch([("p", parameter)])
    stream = tracker.follow([("bad", torch.zeros(3, device="meta")), ("good", torch.zeros(4, device="meta"))])
    with tracker:
        name, tensor = next(stream)
        with pytest.raises(RuntimeError):
            parameter.copy_(tensor)
        assert (name, tracker.current, tracker.written("p", parameter)) == ("bad", "bad", 0)
        parameter.copy_(next(stream)[1])
    assert (tracker.written("p", parameter), tracker.unread("bad"), tracker.unread("good")) == (4, 3, 0)


def test_a_meta_tensor_fits_a_parameter_with_memory_as_a_real_one_would() -> None:
    parameter = torch.empty(4)
    tracker, given = _tracked(parameter, w=torch.zeros(4, device="meta"), wide=torch.zeros(5, device="meta"))
    with tracker:
        parameter.copy_(given["w"])
        with pytest.raises(RuntimeError):
            parameter.copy_(given["wide"])
    assert (tracker.written("p", parameter), tracker.unread("wide")) == (4, 5)


def test_filling_and_adding_write_too() -> None:
    parameter = torch.zeros(8)
    tracker, given = _tracked(parameter, w=torch.ones(2))
    with tracker:
        parameter[:2].zero_()
        parameter[2:4].add_(given["w"])
        parameter[4:6] = 1.0
    assert (tracker.written("p", parameter), tracker.unread("w")) == (6, 0)


def test_a_parameter_that_loading_made_or_replaced_counts_as_written() -> None:
    tracker, _ = _tracked(torch.empty(4))
    assert tracker.written("p", torch.empty(5)) == 5
    assert tracker.written("new", torch.empty(6)) == 6
    assert tracker.sources("new") == {}


def test_tied_parameters_share_their_count() -> None:
    head = torch.empty(4, device="meta")
    tracker = Tracker()
    tracker.watch([("embed", head), ("head", head)])
    ((_, tensor),) = tracker.follow([("w", torch.zeros(4, device="meta"))])
    with tracker:
        head.copy_(tensor)
    assert (tracker.written("embed", head), tracker.written("head", head)) == (4, 4)


def test_tensors_in_one_storage_are_told_apart() -> None:
    file = torch.zeros(8)
    parameter = torch.empty(4)
    tracker, given = _tracked(parameter, a=file[:4], b=file[4:])
    with tracker:
        parameter.copy_(given["b"])
    assert (tracker.unread("a"), tracker.unread("b"), tracker.sources("p")) == (4, 0, {"b": 4})


def test_tensors_that_were_handed_out_are_not_kept() -> None:
    tracker = Tracker()
    for _ in tracker.follow((f"w{number}", torch.zeros(2)) for number in range(20_000)):
        pass
    gc.collect()
    assert len(tracker._alive) < 10_000
