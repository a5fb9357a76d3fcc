"""Safetensors headers and indices: what the library writes is read, what it refuses is refused with a reason."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from mso_hub.checkpoint import (
    DTYPE_BITS,
    HEADER_LIMIT,
    RANK_LIMIT,
    Shard,
    TensorInfo,
    build_header,
    header_length,
    parse_config,
    parse_header,
    parse_index,
    safe_path,
)
from mso_hub.errors import CheckpointError

FILE = "model.safetensors"
PAIR: dict[str, Any] = {
    "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
    "b": {"dtype": "F32", "shape": [2, 2], "data_offsets": [3, 19]},
}
PAIR_BYTES = 19
TORCH_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)

names = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=4)
metadata_maps = st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4),
    max_leaves=8,
)


def text_of(header: object) -> bytes:
    """A header as JSON bytes."""
    return json.dumps(header).encode()


def with_entry(**changes: Any) -> bytes:
    """The header PAIR with other fields in its first tensor."""
    return text_of(PAIR | {"a": PAIR["a"] | changes})


def parse(raw: bytes, nbytes: int = PAIR_BYTES) -> Shard:
    """Parse a header that is followed by `nbytes` of data."""
    return parse_header(raw, FILE, 8 + len(raw) + nbytes)


def read_back(file: bytes) -> Shard:
    """Parse a whole file."""
    length = header_length(file[:8], FILE, len(file))
    return parse_header(file[8 : 8 + length], FILE, len(file))


def library_reads(raw: bytes, nbytes: int) -> bool:
    """Whether the safetensors library accepts a header with `nbytes` of data behind it."""
    try:
        deserialize(len(raw).to_bytes(8, "little") + raw + bytes(nbytes))  # type: ignore[no-untyped-call]
    except SafetensorError:
        return False
    return True


def we_read(raw: bytes, nbytes: int) -> bool:
    """Whether we accept it; any error but CheckpointError is raised."""
    try:
        parse(raw, nbytes)
    except CheckpointError:
        return False
    return True


# --- round trips with the safetensors library -----------------------------------------------------


@st.composite
def tensor_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Tensors of any dtype torch shares with safetensors, with empty ones and scalars.

    At least one: of none, the library writes a header that it cannot read.
    """
    found = draw(st.dictionaries(names, st.tuples(st.sampled_from(TORCH_DTYPES), shapes), min_size=1, max_size=5))
    return {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in found.items()}


@given(tensors=tensor_dicts(), metadata=metadata_maps)
def test_reads_what_the_library_writes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Names, shapes, sizes and metadata survive from safetensors' writer to our reader."""
    file = save(tensors, metadata=metadata)
    shard = read_back(file)
    assert {i.name: i.shape for i in shard.tensors} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert {i.name: i.nbytes for i in shard.tensors} == {n: t.numel() * t.element_size() for n, t in tensors.items()}
    assert shard.metadata == metadata
    assert max((i.end for i in shard.tensors), default=len(file)) == len(file)


@st.composite
def info_lists(draw: st.DrawFn) -> list[TensorInfo]:
    """Tensors of every dtype we know, sub-byte ones with a whole number of bytes."""
    made = []
    for name in draw(st.lists(names, unique=True, max_size=6)):
        dtype, shape = draw(st.sampled_from(sorted(DTYPE_BITS))), tuple(draw(shapes))
        if math.prod(shape) * DTYPE_BITS[dtype] % 8:
            shape = (*shape, 4)
        made.append(TensorInfo(name, dtype, shape))
    return made


@given(infos=info_lists(), metadata=metadata_maps)
@example(infos=[TensorInfo("x", "F4", (8,)), TensorInfo("y", "F6_E2M3", (4,))], metadata={})
def test_the_library_reads_what_we_write(infos: list[TensorInfo], metadata: dict[str, str]) -> None:
    """Every dtype and shape, sub-byte and empty ones too: safetensors finds our bytes where we put them."""
    header, placed = build_header(infos, FILE, metadata)
    assert len(header) % 8 == 0
    data = bytes(at % 251 for at in range(sum(i.nbytes for i in infos)))
    file = header + data
    found = dict(deserialize(file))  # type: ignore[no-untyped-call]
    assert set(found) == {i.name for i in infos}
    for info in placed:
        assert (found[info.name]["dtype"], tuple(found[info.name]["shape"])) == (info.dtype, info.shape)
        assert bytes(found[info.name]["data"]) == file[info.begin : info.end]
    shard = read_back(file)
    assert {i.name: i for i in shard.tensors} == {i.name: i for i in placed}
    assert shard.metadata == {"format": "pt", **metadata}


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_has_the_size_that_the_library_gives_it(dtype: str) -> None:
    """Eight elements take as many bytes as one has bits, in safetensors too."""
    raw = text_of({"x": {"dtype": dtype, "shape": [8], "data_offsets": [0, DTYPE_BITS[dtype]]}})
    assert library_reads(raw, DTYPE_BITS[dtype])
    assert parse(raw, DTYPE_BITS[dtype]).tensors[0].nbytes == DTYPE_BITS[dtype]


def test_an_empty_file_has_an_empty_header() -> None:
    """A shard without tensors is a shard."""
    header, placed = build_header([], FILE, {})
    assert placed == ()
    assert read_back(header).tensors == ()


# --- hostile headers ------------------------------------------------------------------------------

DEEP = b"[" * 100_000
BROKEN: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{'a': 1}", "not valid JSON"),
    "empty": (b"", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not valid JSON"),
    "UTF-16": (text_of(PAIR).decode().encode("utf-16"), "not valid JSON"),
    "surrogate bytes": (text_of(PAIR).replace(b'"a"', b'"\xed\xa0\x80"'), "not valid JSON"),
    "half a surrogate pair": (text_of(PAIR).replace(b'"a"', b'"\\ud800"'), "not valid JSON"),
    "deep": (DEEP, "not valid JSON"),
    "deep inside": (b'{"a": ' + DEEP, "not valid JSON"),
    "a list": (b"[]", "JSON object"),
    "a number": (b"1", "JSON object"),
    "null": (b"null", "JSON object"),
    "name twice": (text_of(PAIR)[:-1] + b',"a":' + text_of(PAIR["a"]) + b"}", "'a' appears twice"),
    "key twice inside": (text_of(PAIR).replace(b'"shape"', b'"dtype": "U8", "shape"', 1), "'dtype' appears twice"),
    "NaN": (text_of(PAIR).replace(b"[3]", b"[NaN]"), "NaN is not JSON"),
    "Infinity beside the fields": (text_of(PAIR).replace(b'"shape"', b'"x": Infinity, "shape"', 1), "Infinity"),
    "entry null": (text_of(PAIR | {"a": None}), "JSON object, got NoneType"),
    "entry a list": (text_of(PAIR | {"a": [1]}), "JSON object, got list"),
    "metadata a list": (text_of(PAIR | {"__metadata__": ["x"]}), "__metadata__"),
    "metadata a number": (text_of(PAIR | {"__metadata__": {"x": 1}}), "__metadata__"),
    "metadata nested": (text_of(PAIR | {"__metadata__": {"x": {}}}), "__metadata__"),
    "dtype unknown": (with_entry(dtype="Q3"), "'Q3'"),
    "dtype lower case": (with_entry(dtype="u8"), "'u8'"),
    "dtype missing": (with_entry(dtype=None), "dtype None"),
    "dtype a list": (with_entry(dtype=["U8"]), "dtype ['U8']"),
    "dtype an object": (with_entry(dtype={}), "dtype {}"),
    "dtype of another size": (with_entry(dtype="F16"), "'a' F16 [3]"),
    "dtype of part of a byte": (with_entry(dtype="F4"), "'a' F4 [3]"),
    "shape missing": (with_entry(shape=None), "as shape, got None"),
    "shape a number": (with_entry(shape=3), "as shape, got 3"),
    "size a boolean": (with_entry(shape=[3, True]), "as shape, got [3, True]"),
    "size negative": (with_entry(shape=[-3, -1]), "as shape, got [-3, -1]"),
    "size a float": (with_entry(shape=[3.0]), "as shape, got [3.0]"),
    "size a string": (with_entry(shape=["3"]), "as shape, got ['3']"),
    "size huge": (with_entry(shape=[10**4000]), "as shape, got [1000"),
    "size past 64 bits": (with_entry(shape=[2**64 + 3]), "as shape"),
    "sizes with a huge product": (with_entry(shape=[2**62] * RANK_LIMIT), "as shape"),
    "huge sizes beside a zero": (with_entry(shape=[2**62, 2**62, 0], data_offsets=[0, 0]), "as shape"),
    "too many sizes": (with_entry(shape=[3] + [1] * RANK_LIMIT), "as shape"),
    "size too large": (with_entry(shape=[4]), "'a' U8 [4]"),
    "offsets missing": (with_entry(data_offsets=None), "[begin, end], got None"),
    "offsets alone": (with_entry(data_offsets=[0]), "[begin, end], got [0]"),
    "offsets three": (with_entry(data_offsets=[0, 1, 3]), "[begin, end], got [0, 1, 3]"),
    "offsets negative": (with_entry(data_offsets=[-3, 0]), "[begin, end], got [-3, 0]"),
    "offsets boolean": (with_entry(data_offsets=[False, 3]), "[begin, end], got [False, 3]"),
    "offsets backwards": (with_entry(data_offsets=[3, 0]), "span -3"),
    "offsets huge": (with_entry(data_offsets=[10**4000, 10**4000 + 3]), "[begin, end]"),
    "offsets too long": (with_entry(data_offsets=[0, 4]), "span 4"),
    "overlap": (
        text_of(PAIR | {"b": PAIR["b"] | {"data_offsets": [2, 18]}}),
        "'b' overlaps the tensor before it",
    ),
    "hole at the start": (text_of({"b": PAIR["b"]}), "'b' leaves a hole before it"),
    "hole": (text_of(PAIR | {"b": PAIR["b"] | {"data_offsets": [4, 20]}}), "'b' leaves a hole before it"),
    "same place twice": (text_of(PAIR | {"c": PAIR["a"]}), "overlaps"),
    "data left over": (text_of({"a": PAIR["a"]}), "the tensors end at byte"),
    "data missing": (text_of(PAIR | {"c": PAIR["a"] | {"data_offsets": [19, 22]}}), "the tensors end at byte"),
    "nothing described": (b"{}", "the tensors end at byte"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_header_is_refused_with_its_reason(raw: bytes, reason: str) -> None:
    """Each lie gives one CheckpointError that names the file and what is wrong with it."""
    with pytest.raises(CheckpointError) as caught:
        parse(raw)
    message = str(caught.value)
    assert message.startswith(f"{FILE}: ")
    assert reason in message
    assert len(message) < 800


def test_the_unbroken_header_is_read() -> None:
    """The header that the broken ones were made from is fine, so each of them fails for its own reason."""
    assert [i.nbytes for i in parse(text_of(PAIR)).tensors] == [3, 16]


@pytest.mark.parametrize("depth", [90, 300, 500, 700, 900, 2_000])
@pytest.mark.parametrize("field", ["shape", "dtype", "data_offsets"])
def test_deep_nesting_never_exhausts_the_stack(field: str, depth: int) -> None:
    """A nested list is refused at any depth, also where parsing it succeeds and printing it would not."""
    raw = with_entry(**{field: "@"}).replace(b'"@"', b"[" * depth + b"]" * depth)
    with pytest.raises(CheckpointError):
        parse(raw)
    with pytest.raises(CheckpointError):
        parse(b'{"__metadata__": ' + b"[" * depth + b"]" * depth + b"}", 0)


def test_an_empty_tensor_may_share_its_place() -> None:
    """It begins where another one begins, before it or behind it in the header."""
    empty = {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]}
    for header in ({"z": empty, **PAIR}, {**PAIR, "z": empty}):
        assert library_reads(text_of(header), PAIR_BYTES)
        assert sorted(i.name for i in parse(text_of(header)).tensors) == ["a", "b", "z"]


def test_metadata_may_be_null() -> None:
    """The library writes and reads a null `__metadata__`; so do we."""
    raw = text_of(PAIR | {"__metadata__": None})
    assert library_reads(raw, PAIR_BYTES)
    assert parse(raw).metadata == {}


def test_fields_beside_the_known_ones_are_passed_over() -> None:
    """Like the library, an entry may say more than we need."""
    raw = with_entry(comment="x")
    assert library_reads(raw, PAIR_BYTES)
    assert [i.name for i in parse(raw).tensors] == ["a", "b"]


@given(raw=st.binary(max_size=200), nbytes=st.integers(0, 30))
def test_arbitrary_bytes_raise_nothing_else(raw: bytes, nbytes: int) -> None:
    """No byte string makes the parser raise anything but CheckpointError, or accept what the library refuses."""
    assert we_read(raw, nbytes) <= library_reads(raw, nbytes)


@given(header=json_values | st.dictionaries(names, json_values, max_size=3), nbytes=st.integers(0, 8))
def test_arbitrary_json_raises_nothing_else(header: object, nbytes: int) -> None:
    """No JSON value makes the parser raise anything but CheckpointError."""
    raw = text_of(header)
    assert we_read(raw, nbytes) <= library_reads(raw, nbytes)


entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "BF16", "F4", "Q9"]) | json_values,
        "shape": st.lists(st.integers(-1, 4) | st.just(2**40) | st.booleans(), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 12), min_size=2, max_size=2) | json_values,
    }
)


@given(header=st.dictionaries(st.sampled_from("abc"), entries, max_size=3), nbytes=st.integers(0, 16))
@example(header={"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}, nbytes=0)
def test_agrees_with_the_library_on_plausible_headers(header: dict[str, Any], nbytes: int) -> None:
    """A header of almost right entries is accepted by both readers or by none."""
    raw = text_of(header)
    assert we_read(raw, nbytes) == library_reads(raw, nbytes)


@given(tensors=tensor_dicts(), at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_raises_nothing_else(tensors: dict[str, torch.Tensor], at: int, bit: int) -> None:
    """One flipped bit in a real header gives another shard or a CheckpointError."""
    file = bytearray(save(tensors))
    length = int.from_bytes(file[:8], "little")
    file[8 + at % length] ^= 1 << bit
    raw, nbytes = bytes(file[8 : 8 + length]), len(file) - 8 - length
    assert we_read(raw, nbytes) <= library_reads(raw, nbytes)


@pytest.mark.parametrize(
    ("first8", "size", "reason"),
    [
        (b"", 0, "at least 8 bytes"),
        (b"\x01\x00", 2, "at least 8 bytes"),
        ((100).to_bytes(8, "little"), 107, "needs 108 bytes, the file has 107"),
        ((HEADER_LIMIT + 1).to_bytes(8, "little"), 1 << 40, "at most 100,000,000 bytes"),
        (b"\xff" * 8, 1 << 40, "at most 100,000,000 bytes"),
        (b"PK\x03\x04\x14\x00\x08\x08", 1 << 30, "at most 100,000,000 bytes"),
    ],
)
def test_a_header_length_that_cannot_be_is_refused(first8: bytes, size: int, reason: str) -> None:
    """Truncated files, headers longer than the file and pickles end before anything is allocated."""
    with pytest.raises(CheckpointError, match=reason):
        header_length(first8, FILE, size)


def test_the_largest_header_that_fits_is_allowed() -> None:
    """The limits themselves pass."""
    assert header_length((100).to_bytes(8, "little"), FILE, 108) == 100
    assert header_length(HEADER_LIMIT.to_bytes(8, "little"), FILE, 1 << 40) == HEADER_LIMIT


# --- index and config -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["../x.safetensors", "a/../../x", "a/..", "/etc/passwd", "//x", "C:\\x", "C:/x", "..\\x", "a\\b", "", "a\0b"],
)
def test_a_path_that_leaves_the_repo_is_refused(path: str) -> None:
    """Parent folders, absolute paths, backslashes and drive letters are not shards of this repo."""
    with pytest.raises(CheckpointError, match=r"weight_map points at .* relative path inside the repo"):
        safe_path(path, "model.safetensors.index.json")


@given(parts=st.lists(st.sampled_from(["a", "b-1", "..", ".", "", "C:", "\\", "x.safetensors"]), max_size=5))
def test_a_safe_path_stays_inside(parts: Sequence[str]) -> None:
    """Whatever passes is relative and has no parent folder in it."""
    try:
        path = safe_path("/".join(parts), "index")
    except CheckpointError:
        return
    assert not path.startswith("/")
    assert ".." not in path.split("/")
    assert "\\" not in path
    assert ":" not in path


def index_of(weight_map: object, **more: Any) -> bytes:
    """An index as bytes."""
    return json.dumps({"weight_map": weight_map, **more}).encode()


def test_an_index_below_a_folder_points_into_that_folder() -> None:
    """Paths in a weight_map are relative to the index, and may nest."""
    raw = index_of({"x": "m.safetensors", "y": "deep/m.safetensors"}, metadata={"total_size": 3})
    weight_map, metadata = parse_index(raw, "text/model.safetensors.index.json")
    assert weight_map == {"x": "text/m.safetensors", "y": "text/deep/m.safetensors"}
    assert metadata == {"total_size": 3}


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (DEEP, "not valid JSON"),
        (b'{"weight_map": {"x": "a", "x": "b"}}', "'x' appears twice"),
        (b"[]", "weight_map"),
        (b"{}", "weight_map"),
        (index_of(["x"]), "weight_map"),
        (index_of({"x": 1}), "weight_map"),
        (index_of({"x": None}), "weight_map"),
        (index_of({"x": "\ud800"}), "not valid JSON"),
        (index_of({"x": "../y"}), "relative path"),
        (index_of({}, metadata=json.loads("[" * 200 + "]" * 200)), "nested deeper"),
    ],
)
def test_a_broken_index_is_refused(raw: bytes, reason: str) -> None:
    """Each gives one CheckpointError that names the index."""
    with pytest.raises(CheckpointError, match=reason) as caught:
        parse_index(raw, "model.safetensors.index.json")
    assert str(caught.value).startswith("model.safetensors.index.json: ")


@given(raw=st.binary(max_size=100) | json_values.map(text_of) | json_values.map(index_of))
def test_an_arbitrary_index_raises_nothing_else(raw: bytes) -> None:
    """No byte string makes the index parser raise anything but CheckpointError."""
    try:
        weight_map, metadata = parse_index(raw, "i")
    except CheckpointError:
        return
    assert all(isinstance(v, str) for v in weight_map.values())
    assert isinstance(metadata, dict)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not valid JSON"),
        (b"\xff{}", "not valid JSON"),
        (b"{", "not valid JSON"),
        (DEEP, "not valid JSON"),
        (b'{"x": ' + b"[" * 80 + b"]" * 80 + b"}", "nested deeper"),
        (b'{"x": "\\udc00"}', "not valid JSON"),
        (b"[]", "JSON object, found list"),
        (b"null", "JSON object, found NoneType"),
    ],
)
def test_a_broken_config_is_refused(raw: bytes, reason: str) -> None:
    """Each gives one CheckpointError that names the file."""
    with pytest.raises(CheckpointError, match=reason) as caught:
        parse_config(raw, "config.json")
    assert str(caught.value).startswith("config.json: ")


def test_a_config_may_hold_what_python_writes() -> None:
    """Infinity is in real configs (Mamba's time_step_limit), and so are escaped characters."""
    config = parse_config(b'{"time_step_limit": [0.0, Infinity], "x": "\\u00e4\\ud83d\\ude00"}', "config.json")
    assert config == {"time_step_limit": [0.0, math.inf], "x": "\u00e4\U0001f600"}
