"""The engine on real checkpoints: order, bytes, reads, memory, and what an error leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mso_hub
from mso_hub.checkpoint import Array, TensorInfo
from mso_hub.engine import WHOLE, Distance, ThreadEngine, distance
from mso_hub.errors import CheckpointError, NonFiniteError, SinkError
from mso_hub.events import Event, PlanReady, ShardDone, ShardResumed, TensorDone
from mso_hub.plan import Plan, Recipe
from mso_hub.sink import MemorySink
from mso_hub.source import MemorySource
from tests.helpers import checkpoint_files, random_tensor, write_checkpoint
from tests.running import command

MIB = 1 << 20
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 4}
LAYER = "model.layers.{}.mlp.{}_proj.weight"


def names(layer: int) -> tuple[str, str, str]:
    """Gate, up and down of a layer."""
    gate, up, down = (LAYER.format(layer, kind) for kind in ("gate", "up", "down"))
    return gate, up, down


def matrices(*layers: int, rows: int = 64, columns: int = 64) -> dict[str, torch.Tensor]:
    """MLP and one kept tensor of some layers."""
    made = {}
    for layer in layers:
        for name in names(layer):
            made[name] = random_tensor(rows, columns, seed=zlib.crc32(name.encode()))
        made[f"model.layers.{layer}.self_attn.q_proj.weight"] = random_tensor(rows, columns, seed=layer)
    return made


@pytest.fixture(scope="module")
def large() -> dict[str, bytes]:
    """Two shards: a unit of 34 MB whose members need three blocks each, and small ones around it."""
    gate, up, down = names(0)
    first = {
        "model.embed_tokens.weight": random_tensor(100, 512),
        gate: random_tensor(4096, 2100 // 16 * 16, seed=1),
        up: random_tensor(4096, 2100 // 16 * 16, seed=2),
        down: random_tensor(512, 48, seed=3),
        "model.layers.0.input_layernorm.weight": random_tensor(33, seed=4),
    }
    return checkpoint_files({"model-1.safetensors": first, "model-2.safetensors": matrices(1, 2)}, CONFIG)


class Uneven(MemorySource):
    """Some ranges take longer than others, so that tasks end in another order than they began."""

    def read(self, file: str, begin: int, end: int) -> np.ndarray:
        """Bytes, after a delay that depends on the range."""
        time.sleep(zlib.crc32(f"{file}{begin}".encode()) % 7 / 1000)
        return super().read(file, begin, end)


def converted(files: Mapping[str, bytes], engine: ThreadEngine, recipe: Recipe | None = None) -> dict[str, bytes]:
    """Output files."""
    sink = MemorySink()
    mso_hub.convert(MemorySource(files), sink, recipe or Recipe(), engine=engine)
    return sink.files


def mso_threads() -> list[str]:
    """Threads of ours that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("mso")]


# --- order and bytes --------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [MIB, 512 * MIB])
@pytest.mark.parametrize("workers", [1, 3])
def test_pieces_come_in_file_order(large: dict[str, bytes], workers: int, memory: int) -> None:
    """Shard by shard, step by step, each tensor front to back, whatever order the reads end in."""
    source = Uneven(large)
    plan: Plan = mso_hub.make_plan(source, Recipe())
    notes: dict[str, float] = {}
    pieces = list(ThreadEngine(workers, memory).run(plan, plan.shards, source.read, notes))
    assert [shard.name for shard, _ in groupby(pieces, key=lambda p: p.shard)] == [s.name for s in plan.shards]
    wanted = converted(large, ThreadEngine(1))
    for shard in plan.shards:
        own = [piece for piece in pieces if piece.shard is shard]
        assert [step for step, _ in groupby(own, key=lambda p: p.step)] == list(shard.steps)
        assert [p.step for p in own if p.done] == list(shard.steps)
        for step, group in groupby(own, key=lambda p: p.step):
            assert [piece.done for piece in group][:-1].count(True) == 0, step.weight.name
        data = {info.name: b"" for info in shard.tensors}
        for piece in own:
            data[piece.info.name] += piece.data.tobytes()
        assert shard.header + b"".join(data.values()) == wanted[shard.name]


@pytest.mark.parametrize("memory", [MIB, 20 * MIB, 40 * MIB, 448 * MIB])
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_the_same_bytes_for_any_number_of_workers_and_any_budget(
    large: dict[str, bytes], workers: int, memory: int
) -> None:
    """How the work is cut and who does it never shows in the output."""
    assert converted(large, ThreadEngine(workers, memory)) == converted(large, ThreadEngine(1))


@pytest.mark.parametrize("memory", [MIB, 448 * MIB])
def test_decoding_gives_the_same_bytes_too(large: dict[str, bytes], memory: int) -> None:
    """The way back goes through the same engine."""
    packed = converted(large, ThreadEngine(2))
    back = Recipe(scheme="bf16")
    assert converted(packed, ThreadEngine(3, memory), back) == converted(packed, ThreadEngine(1), back)


def test_tensors_without_elements_go_through() -> None:
    """A shape with a zero is legal: such a tensor is kept, first, last or alone in its shard."""
    empty = torch.zeros(0, 16, dtype=torch.bfloat16)
    shards = {
        "model-1.safetensors": {"a.empty": empty, **matrices(0)},
        "model-2.safetensors": {**matrices(1), "z.empty": empty},
        "model-3.safetensors": {"only.empty": empty},
        "model-4.safetensors": {"norm.weight": torch.ones(8), "zz.empty": empty},
    }
    files = converted(checkpoint_files(shards, CONFIG), ThreadEngine(2))
    assert set(files) == {*shards, "config.json", "mso_hub.json", "model.safetensors.index.json"}
    weight_map = json.loads(files["model.safetensors.index.json"])["weight_map"]
    assert {weight_map[name] for name in ("a.empty", "z.empty", "only.empty", "zz.empty")} == set(shards)


# --- reads ------------------------------------------------------------------------------------------


def bytes_read(source: MemorySource, info: TensorInfo) -> float:
    """How often a tensor's bytes were read, on average."""
    overlaps = (
        max(0, min(end, info.end) - max(begin, info.begin)) for file, begin, end in source.reads if file == info.file
    )
    return sum(overlaps) / info.nbytes


def passes(files: Mapping[str, bytes], sink: MemorySink, engine: ThreadEngine) -> dict[str, float]:
    """Convert -> how often each tensor was read after the plan stood."""
    source = MemorySource(files)
    infos: dict[str, TensorInfo] = {}
    plan: Plan = mso_hub.make_plan(source, Recipe())
    for shard in plan.shards:
        infos |= {step.weight.name: step.weight.home for step in shard.steps}

    def forget_headers(event: Event) -> None:
        if isinstance(event, PlanReady):
            source.reads.clear()

    mso_hub.convert(source, sink, Recipe(), engine=engine, on_event=forget_headers)
    return {name: bytes_read(source, info) for name, info in infos.items()}


def test_every_tensor_is_read_once(large: dict[str, bytes]) -> None:
    """Within the budget a weight's numbers stay in memory between amax and encoding."""
    assert set(passes(large, MemorySink(), ThreadEngine(2)).values()) == {1.0}


def test_a_unit_above_the_budget_is_read_twice(large: dict[str, bytes]) -> None:
    """First for its amax, then to encode it; what is only copied is still read once."""
    gate, up, down = names(0)
    found = passes(large, MemorySink(), ThreadEngine(2, 20 * MIB))
    assert found.pop(gate) == found.pop(up) == 2.0
    assert found[down] == 1.0
    assert set(found.values()) == {1.0}


def split_unit() -> dict[str, bytes]:
    """Gate in the first shard, up in the second, as a shard border falls in real checkpoints."""
    gate, up, down = names(0)
    tensors = matrices(0)
    tensors[up] = tensors[up] * 8
    first = {name: tensors[name] for name in (gate, down)}
    return checkpoint_files({"model-1.safetensors": first, "model-2.safetensors": {up: tensors[up]}}, CONFIG)


def test_a_partner_in_another_shard_is_read_once_more_and_noted() -> None:
    """The first shard fetches the partner's amax; the second finds the note and fetches nothing."""
    gate, up, down = names(0)
    sink = MemorySink()
    assert passes(split_unit(), sink, ThreadEngine(2)) == {gate: 1.0, up: 2.0, down: 1.0}
    tensors = matrices(0)
    unit = "model.layers.0.mlp.gate_up_proj"
    largest = {gate: float(tensors[gate].abs().max()), up: float((tensors[up] * 8).abs().max())}
    assert sink.notes == {f"{unit}: {name}": amax for name, amax in largest.items()}


def test_a_partner_that_was_read_wrong_is_noticed_when_its_own_shard_comes() -> None:
    """What is read beside a stream is not hashed: the shard that holds the partner tells whether it was right."""
    gate, up, _ = names(0)
    source = MemorySource(split_unit())
    plan = mso_hub.make_plan(source, Recipe())

    def damaged(file: str, begin: int, end: int) -> np.ndarray:
        """Another largest value than the stream has."""
        return source.read(file, begin, end) // 2

    run = ThreadEngine(2).run(plan, plan.shards, source.read, {}, apart=damaged)
    with pytest.raises(CheckpointError, match=rf"{up}: its largest value was .* it is .* now; .*--fresh"):
        list(run)
    assert len(list(ThreadEngine(2).run(plan, plan.shards, source.read, {}, apart=source.read))) > 0
    assert gate != up


def test_the_note_serves_the_run_that_resumes() -> None:
    """A run that stopped behind the first shard does not read the first shard's member again."""
    gate, up, down = names(0)
    sink = Full(["model-2.safetensors"])
    with pytest.raises(SinkError):
        mso_hub.convert(MemorySource(split_unit()), sink, Recipe(), engine=ThreadEngine(2))
    assert list(sink.entries) == ["model-1.safetensors"]
    sink.full.clear()
    assert passes(split_unit(), sink, ThreadEngine(2)) == {gate: 0.0, up: 1.0, down: 0.0}
    assert sink.files == converted(split_unit(), ThreadEngine(1))


# --- memory -----------------------------------------------------------------------------------------

PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def write_single(folder: Path, name: str, rows: int, columns: int) -> Path:
    """A checkpoint of one BF16 tensor, without holding it in memory."""
    folder.mkdir()
    nbytes = rows * columns * 2
    header = json.dumps({name: {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, nbytes]}}).encode()
    row = random_tensor(columns).view(torch.uint8).numpy().tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _ in range(rows):
            file.write(row)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def peak(arguments: list[str]) -> int:
    """Peak resident bytes of a program; a small process starts it, so that this one's memory does not count."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    return int(done.stdout.split()[-1])


def test_memory_stays_under_the_budget_and_not_under_the_tensor(tmp_path: Path) -> None:
    """A tensor of 210 MB with 64 MiB for weights: the process stays below 64 MiB and 200 MB for everything else."""
    one = write_single(tmp_path / "in", names(0)[2], 20480, 5120)
    program = command("quantize", one, tmp_path / "out", "--quiet", "--workers", "2")
    measured = peak([*program, "--memory_budget", "64MiB"])
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 50e6
    assert measured < 64 * MIB + 200e6, f"{measured / 1e6:.0f} MB"


def packed_layers(count: int, size: int) -> dict[str, torch.Tensor]:
    """MLP matrices as pack-quantized INT4: four bits a number on disk, 32 in memory."""
    tensors = {}
    for name in (name.removesuffix(".weight") for layer in range(count) for name in names(layer)):
        tensors[f"{name}.weight_packed"] = torch.randint(-(2**31), 2**31 - 1, (size, size // 8), dtype=torch.int32)
        tensors[f"{name}.weight_scale"] = torch.full((size, size // 32), 0.01, dtype=torch.bfloat16)
        tensors[f"{name}.weight_shape"] = torch.tensor([size, size])
    return tensors


def test_memory_of_packed_weights_is_that_of_their_numbers(tmp_path: Path) -> None:
    """INT4 on the way to NVFP4 is held as F32, eight times its size on disk: the budget must count what is held."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    packed = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    config = {**CONFIG, "quantization_config": packed}
    source = write_checkpoint(tmp_path / "in", {"model.safetensors": packed_layers(2, 5120)}, config)
    program = command("quantize", source, tmp_path / "out", "--quiet", "--workers", "2")
    measured = peak([*program, "--memory_budget", "64MiB"])
    assert measured < 64 * MIB + 200e6, f"{measured / 1e6:.0f} MB"


# --- errors -----------------------------------------------------------------------------------------


class Full(MemorySink):
    """A sink whose disk is full for some files."""

    def __init__(self, full: list[str]) -> None:
        super().__init__()
        self.full = full

    @contextmanager
    def open(self, file: str, nbytes: int) -> Iterator[Any]:
        """The file, or a full disk."""
        if file in self.full:
            raise SinkError(f"{file}: no space left")
        with super().open(file, nbytes) as buffer:
            yield buffer


def four_shards(change: Callable[[dict[str, torch.Tensor]], object] | None = None) -> dict[str, bytes]:
    """One layer a shard; `change` may spoil the tensors of the third."""
    shards = {f"model-{layer}.safetensors": matrices(layer) for layer in range(4)}
    if change is not None:
        change(shards["model-2.safetensors"])
    return checkpoint_files(shards, CONFIG)


def spoil(number: float) -> Callable[[dict[str, torch.Tensor]], object]:
    """Put a number into row 3, column 5 of an up_proj."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[names(2)[1]][3, 5] = number

    return change


@pytest.mark.parametrize("memory", [MIB, 448 * MIB])
@pytest.mark.parametrize(("number", "shown"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")])
def test_a_weight_that_is_not_finite_is_named_and_earlier_shards_stay(number: float, shown: str, memory: int) -> None:
    """The error says which tensor, where and what; nothing is visible; the next run finds two shards complete."""
    sink = MemorySink()
    engine = ThreadEngine(2, memory)
    with pytest.raises(NonFiniteError) as caught:
        mso_hub.convert(MemorySource(four_shards(spoil(number))), sink, Recipe(), engine=engine)
    assert f"{names(2)[1]}: weights must be finite to be quantized, found {shown} at row 3, column 5" in str(
        caught.value
    )
    assert "`ignore`" in str(caught.value)
    assert sink.files == {}
    assert list(sink.entries) == ["model-0.safetensors", "model-1.safetensors"]
    assert mso_threads() == []


def test_a_weight_above_the_budget_is_checked_too() -> None:
    """The pass that only takes the amax must not lose a NaN between two blocks."""
    gate, up, _ = names(0)
    wide = random_tensor(1100, 4096)
    wide[1050, 7] = float("nan")
    files = checkpoint_files({"model.safetensors": {gate: wide, up: random_tensor(1100, 4096)}}, CONFIG)
    with pytest.raises(NonFiniteError, match=rf"{gate}.*nan at row 1050, column 7"):
        converted(files, ThreadEngine(2, MIB))


def test_a_partner_in_another_shard_that_is_not_finite_stops_the_first_shard() -> None:
    """A shared scale from half of a unit would be wrong."""
    gate, up, _ = names(0)
    tensors = matrices(0)
    tensors[up][1, 2] = float("inf")
    shards = {"model-1.safetensors": {gate: tensors[gate]}, "model-2.safetensors": {up: tensors[up]}}
    sink = MemorySink()
    with pytest.raises(NonFiniteError, match=f"{up}.*inf at row 1, column 2"):
        mso_hub.convert(MemorySource(checkpoint_files(shards, CONFIG)), sink, Recipe())
    assert dict(sink.entries) == {}


def test_an_error_of_the_sink_leaves_earlier_shards_resumable() -> None:
    """The third shard cannot be written: two are complete, the fourth is never begun, and the rest follows later."""
    files = four_shards()
    sink = Full(["model-2.safetensors"])
    with pytest.raises(SinkError, match=r"model-2\.safetensors: no space left"):
        mso_hub.convert(MemorySource(files), sink, Recipe(), engine=ThreadEngine(2))
    assert list(sink.entries) == ["model-0.safetensors", "model-1.safetensors"]
    assert sink.files == {}
    assert mso_threads() == []
    sink.full.clear()
    resumed: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, ShardResumed):
            resumed.append(event.shard)

    mso_hub.convert(MemorySource(files), sink, Recipe(), on_event=listen)
    assert resumed == ["model-0.safetensors", "model-1.safetensors"]
    assert sink.files == converted(files, ThreadEngine(1))


def test_an_error_of_the_sink_stops_the_reading_promptly() -> None:
    """A full disk at the first byte of 40 MB: not all of them are read before the error is told."""
    shards = {f"model-{n:02}.safetensors": matrices(n, rows=512, columns=512) for n in range(20)}
    source = MemorySource(checkpoint_files(shards, {**CONFIG, "num_hidden_layers": 20}))
    sink = Full(["model-00.safetensors"])

    def forget_headers(event: Event) -> None:
        if isinstance(event, PlanReady):
            source.reads.clear()

    with pytest.raises(SinkError):
        mso_hub.convert(source, sink, Recipe(), engine=ThreadEngine(2, 4 * MIB), on_event=forget_headers)
    total = sum(source.files().values())
    assert sum(end - begin for _, begin, end in source.reads) < total / 2


class Shrinking(MemorySource):
    """A source whose third shard has lost its end since its header was read."""

    def read(self, file: str, begin: int, end: int) -> np.ndarray:
        """Bytes, as long as they are there."""
        if file == "model-2.safetensors" and begin > 65_536 - 1:
            raise CheckpointError(f"{file}: the file ends early; start again")
        return super().read(file, begin, end)


def test_an_error_of_the_source_leaves_earlier_shards_resumable() -> None:
    """A download that was cut: the message comes through from the thread that read, and two shards stay."""
    shards = {f"model-{n}.safetensors": matrices(n, rows=256, columns=256) for n in range(4)}
    sink = MemorySink()
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: the file ends early"):
        mso_hub.convert(Shrinking(checkpoint_files(shards, CONFIG)), sink, Recipe(), engine=ThreadEngine(3))
    assert list(sink.entries) == ["model-0.safetensors", "model-1.safetensors"]
    assert mso_threads() == []


@pytest.mark.parametrize("kind", [TensorDone, ShardDone])
def test_an_interrupt_in_a_listener_ends_all_threads_and_leaves_a_resumable_state(kind: type[Event]) -> None:
    """Ctrl-C arrives where the main thread is: in the listener. Nothing may go on writing after the error is out."""
    files = four_shards()
    sink = MemorySink()
    seen = 0

    def interrupt(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, kind)
        if seen == (9 if kind is TensorDone else 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        mso_hub.convert(MemorySource(files), sink, Recipe(), engine=ThreadEngine(2), on_event=interrupt)
    # The traceback is alive here, as it is in a notebook: the threads must be gone all the same.
    assert caught.tb is not None
    assert mso_threads() == []
    assert len(sink.entries) >= 2
    assert sink.files == {}
    mso_hub.convert(MemorySource(files), sink, Recipe())
    assert sink.files == converted(files, ThreadEngine(1))


def test_no_thread_is_left_after_a_good_run(large: dict[str, bytes]) -> None:
    """Two hundred conversions in a notebook must not mean two hundred pools."""
    converted(large, ThreadEngine(4))
    assert mso_threads() == []


def test_a_kernel_gets_arrays_that_only_it_holds() -> None:
    """The budget counts a block once: encoding must not find the numbers of the block before still held."""
    pieces: list[Array] = []
    files = four_shards()
    source = MemorySource(files)
    plan: Plan = mso_hub.make_plan(source, Recipe())
    for piece in ThreadEngine(1).run(plan, plan.shards, source.read, {}):
        assert all(piece.data is not earlier for earlier in pieces)
        pieces.append(piece.data)


# --- announced reads ------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["BF16 to NVFP4", "NVFP4 to BF16"])
@pytest.mark.parametrize("once", [False, True], ids=["may read twice", "keeps every unit"])
@pytest.mark.parametrize("memory", [MIB, 40 * MIB, 448 * MIB])
def test_the_reads_that_are_announced_are_those_that_are_made(
    large: dict[str, bytes], memory: int, once: bool, packed: bool
) -> None:
    """A source that reads ahead relies on it: each range as often as it is read, never further off than the budget."""
    source = MemorySource(converted(large, ThreadEngine(2)) if packed else large)
    engine = ThreadEngine(1, memory)
    plan = mso_hub.make_plan(source, Recipe(scheme="bf16" if packed else "nvfp4"))
    source.reads.clear()
    for _ in engine.run(plan, plan.shards, source.read, {}, once=once):
        pass
    announced = [entry for shard in plan.shards for entry in engine.reads(shard, once=once)]
    assert sorted(source.reads) == sorted(announced)
    assert packed or not once or len(set(announced)) == len(announced)
    if len(set(announced)) == len(announced):
        place, position = {}, 0
        for entry in announced:
            place[entry], position = position, position + entry[2] - entry[1]
        position = 0
        for entry in source.reads:
            assert abs(place[entry] - position) <= memory
            position += entry[2] - entry[1]


def measured(files: Mapping[str, bytes], engine: ThreadEngine, recipe: Recipe, measure: int) -> dict[str, Distance]:
    """Weight -> what a run says of its encoding, all its blocks together."""
    source = MemorySource(files)
    plan = mso_hub.make_plan(source, recipe)
    found: dict[str, Distance] = {}
    for piece in engine.run(plan, plan.shards, source.read, {}, measure=measure):
        if piece.distance is not None:
            name = piece.step.weight.name
            found[name] = found[name] + piece.distance if name in found else piece.distance
    return found


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_a_run_measures_what_encoding_did(large: dict[str, bytes], layout: str) -> None:
    """Every encoded weight, the same number that verify finds there."""
    recipe = Recipe(layout=layout)
    found = measured(large, ThreadEngine(2), recipe, WHOLE)
    plan = mso_hub.make_plan(MemorySource(large), recipe)
    assert set(found) == {step.weight.name for shard in plan.shards for step in shard.steps if step.format}
    report = mso_hub.verify_checkpoint(
        MemorySource(converted(large, ThreadEngine(2), recipe)), source=MemorySource(large)
    )
    small = {error.name: error for error in report.errors if "layers.1" in error.name}
    assert len(small) == 3
    for name, error in small.items():
        assert found[name].nmse == pytest.approx(error.nmse, rel=1e-6)
        assert found[name].largest == pytest.approx(error.max_abs, rel=1e-6)
    assert measured(large, ThreadEngine(2), recipe, 0) == {}


@pytest.mark.parametrize("memory", [8 * MIB, 64 * MIB, 448 * MIB])
def test_a_sample_is_the_first_rows_of_a_weight_whatever_the_blocks(large: dict[str, bytes], memory: int) -> None:
    """As many rows as hold that many numbers: a card must say the same for every number of threads and every budget."""
    gate, _, down = names(0)
    rows, columns = 4096, 2100 // 16 * 16
    whole = measured(large, ThreadEngine(1), Recipe(), WHOLE)
    sample = measured(large, ThreadEngine(2, memory), Recipe(), 100 * columns)
    assert sample[down] == whole[down]
    assert sample[gate].energy == pytest.approx(whole[gate].energy * 100 / rows, rel=0.05)
    again = measured(large, ThreadEngine(1, MIB), Recipe(), 100 * columns)
    assert again[gate].energy == pytest.approx(sample[gate].energy, rel=1e-12)
    assert again[gate].error == pytest.approx(sample[gate].error, rel=1e-12)


@given(
    values=st.lists(st.lists(st.floats(-8, 8, width=16), min_size=32, max_size=32), min_size=2, max_size=6),
    cut=st.integers(1, 5),
)
@settings(deadline=None)
def test_distances_add_up(values: list[list[float]], cut: int) -> None:
    """Two blocks of rows together are what the rows are at once; a block of 16 columns is exact or it is not."""
    before = np.array(values, np.float32)
    after = np.rint(before)
    whole = distance(before, "F32", after)
    parts = distance(before[:cut], "F32", after[:cut]) + distance(before[cut:], "F32", after[cut:])
    assert parts.error == pytest.approx(whole.error)
    assert parts.energy == pytest.approx(whole.energy)
    assert (parts.largest, parts.inexact) == (whole.largest, whole.inexact)
    assert whole.error == pytest.approx(float(((after - before).astype(np.float64) ** 2).sum()))
    assert whole.inexact == sum(bool((row != np.rint(row)).any()) for row in before.reshape(-1, 16))
