"""Our safetensors code against the library in both directions, and splitting tensors from trees of state."""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from bionemo_esm.model.archive import STATE_TENSORS, Archive, ArchiveFile, write_archive
from bionemo_esm.model.safe_serialization import parse_json, put_tensors_back, take_out_tensors
from bionemo_esm.model.tar_format import ArchiveError, Section
from bionemo_esm.model.tensor_io import ITEM_BYTES, TensorTable, tensor_member

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
BEFORE = b"what stands before the member in its file"


def written(tensors: Mapping[str, Tensor]) -> bytes:
    stream = io.BytesIO()
    member = tensor_member(tensors)
    member.write(stream)
    assert len(stream.getvalue()) == member.size
    return stream.getvalue()


def read(content: bytes, path: Path) -> dict[str, Tensor]:
    """Read, with our reader, a safetensors file embedded in another file."""
    path.write_bytes(BEFORE + content + b"what stands behind")
    return all_of(TensorTable.open(path, "tensors", Section(len(BEFORE), len(content))))


def all_of(table: TensorTable) -> dict[str, Tensor]:
    return {name: table.load(name) for name in table.infos}


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """Return dtype, shape and raw bytes, so that equal NaN bits are equal and 0.0 differs from -0.0."""
    flat = tensor.detach().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return {name: bits(ours[name]) for name in ours} == {name: bits(theirs[name]) for name in theirs}


def numbers(dtype: torch.dtype, *shape: int) -> Tensor:
    """Return a tensor of random bit patterns, NaNs, infinities and subnormals included."""
    item = torch.empty(0, dtype=dtype).element_size()
    raw = np.random.default_rng(1).integers(0, 2 if dtype == torch.bool else 256, (math.prod(shape) * item,), np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensors") / "file"


# --- both directions, every kind of tensor ----------------------------------------------------------------------------


def kinds_of_tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    whole = numbers(dtype, 6, 4)
    return {
        "a matrix": whole,
        "transposed": whole.T,
        "strided": whole[::2, 1::2],
        "expanded": whole[:1].expand(5, 4),
        "a part of a storage": whole[3],
        "0-d": whole[2, 3],
        "empty": whole[:0],
        "empty of three dimensions": whole.reshape(2, 3, 4)[:, :, :0],
        "a parameter": torch.nn.Parameter(whole.clone(), requires_grad=dtype.is_floating_point),
        "": whole[0],
        "déjà 蛋白質 🧬 \"'\\/\n\t\x00\x1b": whole[1],
        "$tensor.0": whole[2],
    }


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_library_and_our_code_read_each_others_files(dtype: torch.dtype, file: Path) -> None:
    tensors = kinds_of_tensors(dtype)
    assert equal(load(written(tensors)), tensors)
    assert equal(read(written(tensors), file), tensors)
    plain = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    for metadata in (None, {"format": "pt", "déjà": "🧬"}):
        assert equal(read(save(plain, metadata), file), tensors)


def test_all_dtypes_together_and_no_tensors_round_trip(file: Path) -> None:
    tensors = {name: numbers(dtype, 3, 5) for name, dtype in DTYPES.items()}
    for some in (tensors, {}):
        assert equal(load(written(some)), some)
        assert equal(read(save(some), file), some)
        assert equal(read(written(some), file), some)


def test_equal_tensors_give_equal_bytes_in_any_memory_layout() -> None:
    a, b = numbers(torch.float32, 4, 6), numbers(torch.bfloat16, 3)
    assert written({"a": a, "b": b}) == written({"b": b.clone(), "a": a.T.contiguous().T})
    assert written({"a": a}) != written({"a": a.T})


def test_data_start_is_aligned_to_eight_bytes() -> None:
    for length in range(9):
        content = written({"x" * length: torch.ones(1)})
        assert int.from_bytes(content[:8], "little") % 8 == 0


def test_reserved_name_is_rejected_or_read_back(file: Path) -> None:
    """Refusing to write is better than writing an unreadable file."""
    try:
        content = written({"__metadata__": torch.ones(2)})
    except (TypeError, ValueError):
        return
    assert equal(read(content, file), {"__metadata__": torch.ones(2)})


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.uint16])
def test_unsupported_dtype_is_not_written_and_is_named(dtype: torch.dtype) -> None:
    with pytest.raises((TypeError, ValueError), match=f"momentum.*{dtype}"):
        tensor_member({"momentum": torch.zeros(2, dtype=dtype)})


# --- malformed headers ------------------------------------------------------------------------------------------------

COUNTS = st.one_of(st.integers(0, 4), st.sampled_from([-1, 8, 2**31, 2**47, 2**48, 2**63, 2**64, 1.0, True, "1", None]))
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*ITEM_BYTES, "F8_E4M3", "f32", 7]),
        "shape": st.lists(COUNTS, max_size=3),
        "data_offsets": st.lists(COUNTS, min_size=2, max_size=2),
    }
)


@st.composite
def nearly_right(draw: st.DrawFn) -> tuple[bytes, int]:
    """Draw a valid header and the size of its data, then make up to two changes."""
    header: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(st.text(max_size=3), max_size=4, unique=True)):
        dtype, shape = draw(st.sampled_from(list(ITEM_BYTES))), draw(st.lists(st.integers(0, 3), max_size=3))
        start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.one_of(st.none(), st.dictionaries(st.text(max_size=2), st.text(max_size=2))))
    for _ in range(draw(st.integers(0, 2)) if header else 0):
        name = draw(st.sampled_from(sorted(header)))
        if isinstance(header[name], dict) and "dtype" in header[name] and draw(st.integers(0, 3)):
            key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            header[name] = header[name] | {key: draw(ENTRIES)[key]}
        else:
            header[name] = draw(
                st.one_of(ENTRIES, st.none(), st.lists(COUNTS, max_size=3), st.dictionaries(st.text(), COUNTS))
            )
    text = json.dumps(header, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        place = draw(st.integers(0, len(text)))
        text = (
            text[:place]
            + draw(st.sampled_from([b" ", b"\0", b"{", b"}", b",", b"\xff", b"0", b"-", b"."]))
            + text[place:]
        )
    return text, max(0, end + draw(st.sampled_from([0, 0, 0, 0, 1, -1])))


def check_against_the_library(header: bytes, size: int, path: Path) -> None:
    data = bytes(number % 2 for number in range(size))  # 0 and 1, which are also valid booleans
    content = struct.pack("<Q", len(header)) + header + data
    try:
        ours = read(content, path)
    except ArchiveError:
        return
    try:
        theirs = load(content)
    except (SafetensorError, RuntimeError, OverflowError, ValueError, KeyError) as error:
        raise AssertionError(f"the library refuses what ours reads: {header!r}") from error
    assert equal(ours, theirs)


@settings(max_examples=400, deadline=None)
@given(nearly_right())
def test_reader_rejects_headers_that_the_library_rejects_and_reads_others_equally(
    file: Path, case: tuple[bytes, int]
) -> None:
    check_against_the_library(*case, file)


ONE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
ODD_HEADERS = {
    "a byte order mark": b"\xef\xbb\xbf" + ONE,
    "utf-16": ONE.decode().encode("utf-16"),
    "utf-16 without a mark": ONE.decode().encode("utf-16-le"),
    "utf-32": ONE.decode().encode("utf-32"),
    "a surrogate in bytes": ONE.replace(b'"a"', b'"\xed\xa0\x80"'),
    "a surrogate in an escape": ONE.replace(b'"a"', b'"\\ud800"'),
    "minus zero": ONE.replace(b"[0,", b"[-0,"),
    "an exponent": ONE.replace(b"[1]", b"[1e0]"),
    "metadata with a number": ONE.replace(b"{", b'{"__metadata__":{"a":1},', 1),
    "metadata with a NaN": ONE.replace(b"{", b'{"__metadata__":{"a":NaN},', 1),
    "metadata as a list": ONE.replace(b"{", b'{"__metadata__":[],', 1),
    "metadata twice": ONE.replace(b"{", b'{"__metadata__":{},"__metadata__":{},', 1),
    "a zero byte behind": ONE + b"\0",
    "two values": ONE + b"{}",
    "a control character": ONE.replace(b'"a"', b'"a\n"'),
}


@pytest.mark.parametrize("header", ODD_HEADERS.values(), ids=ODD_HEADERS.keys())
def test_malformed_header_rejected_by_the_library_is_rejected(header: bytes, file: Path) -> None:
    with pytest.raises((SafetensorError, ValueError)):
        load(struct.pack("<Q", len(header)) + header + bytes(4))
    check_against_the_library(header, 4, file)


@pytest.mark.parametrize("shape", [[0, 2**47, 2**47], [2**47, 2**47, 0], [2**47, 0, 2**40]])
def test_empty_tensor_with_a_huge_shape_is_handled_like_the_library(shape: list[int], file: Path) -> None:
    check_against_the_library(
        json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode(), 0, file
    )


def bytes_read() -> int:
    """Return the bytes read by this process so far, as counted by the kernel."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not count what is read")
def test_one_tensor_is_read_without_the_others(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(written({f"{number:02}": torch.full((2**18,), float(number)) for number in range(32)}))
    before = bytes_read()
    table = TensorTable.open(path, "tensors", Section(0, path.stat().st_size))
    assert table.load("17")[7] == 17
    one = bytes_read() - before
    all_of(table)
    assert 2**20 <= one < 2 * 2**20
    assert bytes_read() - before - one >= 32 * 2**20, "or the count would show nothing"


# --- trees of state ---------------------------------------------------------------------------------------------------

NAMES = st.one_of(
    st.sampled_from(["a", "a.b", "b", "0", "1", "", "$tensor", "$tuple", "$items", "$", "__metadata__"]), st.text()
)
KEYS = st.one_of(NAMES, st.integers(-3, 3), st.tuples(st.integers(0, 2), NAMES), st.none(), st.booleans())
TENSORS = st.integers(0, 10**6).map(lambda number: torch.tensor([number, 7]))
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), TENSORS)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)


def image(tree: Any) -> Any:
    """Return a tree that equals another only if types, number bits and tensors are equal."""
    if isinstance(tree, Tensor):
        return "tensor", *bits(tree)
    if isinstance(tree, dict):
        return "dict", {image(key): image(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree).__name__, *map(image, tree)
    if isinstance(tree, float):
        return "float", "nan" if math.isnan(tree) else struct.pack("<d", tree)
    return type(tree).__name__, tree


def there_and_back(tree: Any, path: Path) -> Any:
    plain, tensors = take_out_tensors(tree)
    text = json.dumps(plain, indent=2, sort_keys=True).encode()
    return put_tensors_back(parse_json(text), read(written(tensors), path))


@settings(max_examples=300, deadline=None)
@given(TREES)
def test_state_tree_round_trips(file: Path, tree: Any) -> None:
    assert image(there_and_back(tree, file)) == image(tree)


A, B = torch.ones(2), torch.zeros(3)
SAME_PLACE = {
    "a dot in a key": {"a.b": A, "a": {"b": B}},
    "a number and its text": {1: A, "1": B},
    "a list and a key": {"a": [A], "a.0": B},
    "a tuple and its text": {(1, 2): A, "(1, 2)": B},
    "an empty key": {"a": {"": A}, "a.": B},
}


@pytest.mark.parametrize("tree", SAME_PLACE.values(), ids=SAME_PLACE.keys())
def test_tensors_with_similar_paths_are_kept_apart(tree: Any, file: Path) -> None:
    assert image(there_and_back(tree, file)) == image(tree)


def test_floats_are_exact_to_the_bit(file: Path) -> None:
    floats = [-0.0, 0.0, 5e-324, 1.7976931348623157e308, 0.1, math.inf, -math.inf, math.nan, math.pi, 1e-5]
    assert image(there_and_back({"a": floats, "b": tuple(floats)}, file)) == image({"a": floats, "b": tuple(floats)})
    signal = torch.tensor([0x7F800001, -1, 0x7FC00000, -(2**31)], dtype=torch.int32).view(torch.float32)
    assert bits(there_and_back({"a": signal}, file)["a"]) == bits(signal)


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, object(), np.float64(1), 1j, torch.float32, Path("a")])
def test_unsupported_value_is_named_by_its_path(value: Any) -> None:
    with pytest.raises(TypeError, match=r"states\.0\.rate"):
        take_out_tensors({"states": [{"rate": value}]})


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"), LEAVES, max_size=5))
def test_equal_states_give_equal_bytes_in_any_insertion_order(file: Path, state: dict[str, Any]) -> None:
    contents = []
    for items in (list(state.items()), list(reversed(state.items()))):
        archive = Archive("ESM1nvModel", {}, {}, state=dict(items))
        contents.append(write_archive(file.with_name("state"), archive).read_bytes())
    assert contents[0] == contents[1]
    assert STATE_TENSORS in ArchiveFile.open(file.with_name("state")).sections
