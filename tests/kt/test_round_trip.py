"""There and back: the packing is undone exactly, from merged files and from trees, whatever was packed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mso_hub.engine import ThreadEngine
from mso_hub.errors import CheckpointError, NonFiniteError, PlanError, SinkError
from mso_hub.formats import kt as form
from mso_hub.formats.numerics import kt
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from mso_hub.plan.kt import KtRecipe, recipe_of_output
from mso_hub.sink import MemorySink, open_sink
from mso_hub.source import MemorySource
from tests.helpers import checkpoint_files, random_tensor, tensors_in, write_files
from tests.kt.helpers import METHODS, Experts, converted, decoded, moe_files

MIB = 1 << 20


# --- the packing, against the addresses that kt-kernel computes ------------------------------------------


def address(row: int, column: int, rows: int, columns: int, bits: int) -> int:
    """Byte of a code; INT4 has columns c and c + 64 of a tile of 128 in one."""
    height, tile = (64, 64) if bits == 8 else (128, 128)
    block, stretch = row // height * height, column // 3584 * 3584
    tall, wide = min(height, rows - block), min(3584, columns - stretch)
    r, c = row - block, column - stretch
    inside = c % tile % 64
    before = (block * columns + stretch * tall + r // 32 * 32 * wide) * bits // 8
    return before + c // tile * 2048 + r % 32 // 16 * 1024 + inside // 4 * 64 + r % 16 * 4 + inside % 4


def expected(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes by address, scales, and the numbers that they stand for, in numpy: w is float32 [rows, columns]."""
    amax = np.abs(w).max(axis=1)
    d = amax * np.float32(1 / 127) if bits == 8 else (amax.astype(np.float64) / 112).astype(np.float32)
    with np.errstate(divide="ignore"):
        inverse = np.where(d > 0, np.float32(1) / d, np.float32(0)).astype(np.float32)
    q = np.rint(w * inverse[:, None]).astype(np.int32)
    if bits == 4:
        q = np.sign(q) * ((np.abs(q) + 8) >> 4)
    rows, columns = w.shape
    packed = np.zeros(w.size * bits // 8, np.uint8)
    for r in range(rows):
        for c in range(columns):
            at = address(r, c, rows, columns, bits)
            packed[at] |= (q[r, c] & 0xFF) if bits == 8 else (q[r, c] & 15) << (4 if c % 128 >= 64 else 0)
    step = d if bits == 8 else d * np.float32(16)
    return packed.view(np.int8), d, (q * step[:, None]).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "columns"), [(32, 128), (64, 256), (160, 128), (96, 3712), (256, 3584), (32, 7424)], ids=str
)
def test_codes_lie_where_kt_kernel_looks_for_them(bits: int, rows: int, columns: int) -> None:
    """Across the last block of rows, and across 3584 columns; decoding is the exact inverse."""
    w = random_tensor(rows, columns, seed=rows)
    w[3] = 0
    codes, scale, numbers = expected(w.float().numpy(), bits)
    packed, scales = kt.encode(w.view(torch.uint16).numpy(), "BF16", bits=bits)
    assert np.array_equal(packed.reshape(-1), codes)
    assert np.array_equal(scales, scale)
    assert np.array_equal(kt.decode(packed, scales, columns, bits=bits), numbers)


@given(data=st.data(), bits=st.sampled_from([4, 8]), parts=st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_any_matrix_and_any_numbers(data: st.DataObject, bits: int, parts: int) -> None:
    """Codes are in range, zeros stay zeros, and no number is further off than a step and a half of its row."""
    tile = kt.TILE[bits]
    rows, width = 32 * data.draw(st.integers(1, 9)), tile * data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    spread = 10.0 ** data.draw(st.integers(-37, 36))
    w = (rng.standard_normal((rows, width * parts)) * spread).clip(-3e38, 3e38).astype(np.float32)
    w = np.where(rng.random(w.shape) < 0.2, np.float32(0), w)
    found = kt.encode(w, "F32", bits=bits, parts=parts)
    for part in range(parts):
        codes, scale = found[2 * part : 2 * part + 2]
        stretch = torch.from_numpy(w[:, part * width : (part + 1) * width].copy()).bfloat16().float().numpy()
        numbers = kt.decode(codes, scale, width, bits=bits)
        assert np.isfinite(numbers).all()
        assert np.all(numbers[stretch == 0] == 0)
        step = scale[:, None] * (1 if bits == 8 else 16)
        assert np.all(np.abs(numbers - stretch) <= 0.55 * step + 127 * 2.0**-126)


def test_plans_and_kernels_agree_about_sizes() -> None:
    """Plans know them without loading a kernel."""
    assert (form.ROWS, form.COLUMNS, form.STEP) == (kt.ROWS, kt.TILE, kt.STEP)


def test_what_bf16_cannot_hold_is_refused() -> None:
    tensor = torch.full((256, 128), 3.4e38)
    files = moe_files(Experts(), {**Experts().matrices(dtype=torch.float32), (0, 0, "gate"): tensor})
    with pytest.raises(PlanError, match="kt-kernel takes BF16"):
        converted(files, KtRecipe())


def test_nan_is_refused() -> None:
    matrices = Experts().matrices()
    matrices[0, 1, "up"][9, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"experts\.1\.up_proj"):
        converted(moe_files(Experts(), matrices), KtRecipe(threadpool_count=2))


# --- whole checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("scheme", METHODS)
def test_decompress_gives_the_numbers_under_the_names_of_the_source(scheme: str, parts: int, merge: bool) -> None:
    """Each NUMA node's part has the scales of its own columns; everything else keeps its bytes and its config."""
    experts = Experts(layers=2)
    files = moe_files(experts)
    out = converted(files, KtRecipe(scheme=scheme, threadpool_count=parts, merge=merge))[1]
    found, before = decoded(out, "F32"), tensors_in(files)
    bits = 4 if scheme == "kt-int4" else 8
    for (layer, expert, projection), w in experts.matrices().items():
        name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
        axis = 1 if projection == "down" else 0
        numbers = [expected_numbers(part.contiguous().float().numpy(), bits) for part in w.chunk(parts, axis)]
        assert torch.equal(found[name], torch.from_numpy(np.concatenate(numbers, axis)))
    others = {name for name in before if ".experts." not in name}
    assert found.keys() == (before.keys() if merge else before.keys() - others)
    assert all(torch.equal(found[name], before[name]) for name in others if merge)
    config = json.loads(converted(out, Recipe(scheme="bf16"))[1]["config.json"])
    assert config == json.loads(files["config.json"])


def expected_numbers(w: np.ndarray, bits: int) -> np.ndarray:
    """What a part of a weight is decoded to."""
    amax = np.abs(w).max(axis=1, keepdims=True)
    d = amax * np.float32(1 / 127) if bits == 8 else (amax.astype(np.float64) / 112).astype(np.float32)
    q = np.rint(w * np.where(d > 0, np.float32(1) / np.where(d > 0, d, 1), 0).astype(np.float32)).astype(np.int32)
    q = q if bits == 8 else 16 * np.sign(q) * ((np.abs(q) + 8) >> 4)
    return (q.astype(np.float32) * d).astype(np.float32)


def test_files_of_kt_kernels_own_converter_are_read_too() -> None:
    """They have no `ktransformers` in config.json and nothing in their headers: names are Qwen's then."""
    files = moe_files(Experts())
    out = converted(files, KtRecipe(threadpool_count=2))[1]
    config = json.loads(out["config.json"])
    del config["ktransformers"]
    plain = checkpoint_files({"model.safetensors": tensors_in(out)}, config)
    one, other = decoded(plain), decoded(out)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


SOURCES: dict[str, Callable[[], Recipe]] = {
    "fp8": lambda: Recipe(scheme="fp8_block", layout="deepseek"),
    "int4": lambda: Recipe(scheme="w4a16", group_size=32),
    "nvfp4": lambda: Recipe(scheme="nvfp4", layout="modelopt"),
    "mxfp4": lambda: Recipe(scheme="mxfp4"),
    "kt": lambda: KtRecipe(scheme="kt-int8"),
}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", SOURCES)
def test_packed_sources_need_no_detour(name: str, parts: int) -> None:
    """The bytes are those of a conversion from the decompressed source, and so is what comes back."""
    experts = Experts(inner=384, hidden=256)  # 192 rows a node: blocks of 128 are cut in the middle
    recipe = KtRecipe(threadpool_count=parts, experts_only=True)
    packed = converted(moe_files(experts), SOURCES[name]())[1]
    dense = converted(packed, Recipe(scheme="bf16"))[1]
    one, other = (tensors_in(converted(files, recipe)[1]) for files in (packed, dense))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_kt_experts_become_other_formats() -> None:
    """Decoded to F32 and encoded again in one pass."""
    out = converted(moe_files(Experts()), KtRecipe(threadpool_count=2))[1]
    numbers = decoded(out, "F32")
    again = decoded(converted(out, Recipe(scheme="fp8_dynamic"))[1], "F32")
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    error = (again[name] - numbers[name]).square().sum() / numbers[name].square().sum()
    assert 0 < error < 0.002


# --- the same bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [True, False])
def test_threads_and_memory_never_show(merge: bool) -> None:
    """Blocks of a quarter MB against whole matrices."""
    experts = Experts(inner=768, hidden=512)
    files = moe_files(experts)
    recipe = KtRecipe(scheme="kt-int4", threadpool_count=2, merge=merge)
    whole = converted(files, recipe, ThreadEngine(1))[1]
    plan, small = converted(files, recipe, ThreadEngine(3, MIB))
    engine = ThreadEngine(3, MIB)
    steps = [s for shard in plan.shards for s in shard.steps if s.format is not None]
    assert max(len(s.weight.blocks(engine.block, s.row_step)) for s in steps) > 2
    assert small == whole
    back = Recipe(scheme="bf16")
    assert converted(whole, back, ThreadEngine(3, MIB))[1] == converted(whole, back, ThreadEngine(1))[1]


class Broken(MemorySource):
    """A source whose reads fail after a while."""

    def __init__(self, files: Mapping[str, bytes], left: int) -> None:
        super().__init__(files)
        self.left = left

    def read(self, file: str, begin: int, end: int) -> np.ndarray:
        """Bytes, until there are none left to give."""
        self.left -= end - begin
        if self.left < 0:
            raise CheckpointError("unplugged")
        return super().read(file, begin, end)


@pytest.mark.parametrize("merge", [True, False])
def test_an_interrupted_run_goes_on(merge: bool, tmp_path: Path) -> None:
    """What was complete is not read again, and the output is that of one run."""
    files = moe_files(Experts(layers=3))
    recipe = KtRecipe(threadpool_count=2, merge=merge)
    with pytest.raises(CheckpointError, match="unplugged"):
        convert(Broken(files, 700_000), tmp_path / "out", recipe, engine=ThreadEngine(1))
    assert not (tmp_path / "out").exists()
    source = MemorySource(files)
    convert(source, tmp_path / "out", recipe, engine=ThreadEngine(1))
    read = sum(end - begin for name, begin, end in source.reads)
    assert read < sum(map(len, files.values())) - 100_000
    written = {p.relative_to(tmp_path / "out").as_posix(): p.read_bytes() for p in files_below(tmp_path / "out")}
    assert written == converted(files, recipe)[1]


def files_below(folder: Path) -> Iterator[Path]:
    """Every file."""
    return (path for path in folder.rglob("*") if path.is_file())


def test_another_number_of_nodes_is_another_job(tmp_path: Path) -> None:
    """T, the method and what is left out decide about the bytes: a finished output is not taken for another."""
    source = write_files(tmp_path / "in", moe_files(Experts()))
    convert(source, tmp_path / "out", KtRecipe())
    with pytest.raises(SinkError, match="another source or other settings"):
        convert(source, open_sink(tmp_path / "out"), KtRecipe(threadpool_count=2))


def test_an_output_says_how_to_make_it_again() -> None:
    """mso_hub.json holds the settings."""
    recipe = KtRecipe(scheme="kt-int4", threadpool_count=2, experts_only=True)
    sink = MemorySink()
    convert(MemorySource(moe_files(Experts())), sink, recipe)
    assert recipe_of_output("mso_hub.json", json.loads(sink.files["mso_hub.json"])["recipe"]) == recipe
