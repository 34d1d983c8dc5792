"""Arbitrary bytes in place of `.metadata`, or of a blob: an error, in bounded time and memory; nothing is executed."""

from __future__ import annotations

import io
import pickle
import pickletools
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from stillframe.errors import CorruptCheckpoint, LoadError
from stillframe.load.blob import find_payload
from stillframe.load.metadata import Blob, parse_metadata
from stillframe.load.pickles import read_pickle
from tests.unit.load.distcp_directories import save, save_chunks

PATH = Path("c/.metadata")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """What torch wrote: in one process, and as two ranks write it."""
    directory = tmp_path_factory.mktemp("real")
    save(directory / "a", {"model": {"w": torch.ones(3, 2)}, "lr": 0.5, "steps": [torch.tensor(1), torch.tensor(2)]})
    rows = [((0, 0), (2, 3)), ((2, 0), (2, 3))]
    save_chunks(directory / "b", {"w": (torch.ones(4, 3), rows)}, objects={"lr": 0.5})
    return [(directory / name / ".metadata").read_bytes() for name in "ab"]


def parsed(content: bytes) -> None:
    """Reads it, or refuses it as it should; in memory in proportion to its size."""
    message = f"{PATH}: read"
    tracemalloc.start()
    try:
        parse_metadata(content, PATH)
    except LoadError as error:
        message = str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert message.startswith(f"{PATH}: ")
    assert len(message) < 3000
    assert peak < 1_000_000 + 1000 * len(content)


@given(st.binary(max_size=300))
def test_arbitrary_bytes(content: bytes) -> None:
    parsed(content)


OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
ARGUMENTS = [
    b"",
    b"\0",
    b"\1",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"1\n",
    b"os\nsystem\n",
]


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(OPCODES), st.sampled_from(ARGUMENTS)), max_size=40))
def test_arbitrary_instructions(program: list[tuple[bytes, bytes]]) -> None:
    parsed(b"\x80\x04" + b"".join(opcode + argument for opcode, argument in program) + b".")


@settings(max_examples=150)
@given(data=st.data())
def test_real_metadata_with_changes(real: list[bytes], data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(real)))
    for _ in range(data.draw(st.integers(1, 3))):
        low = data.draw(st.integers(0, len(content) - 1))
        how = data.draw(st.sampled_from(["flip", "cut", "repeat", "insert"]))
        high = min(len(content), low + data.draw(st.integers(1, 40)))
        if how == "flip":
            content[low] ^= data.draw(st.integers(1, 255))
        elif how == "cut":
            del content[low:high]
        elif how == "repeat":
            content[low:low] = content[low:high]
        else:
            content[low:low] = data.draw(st.sampled_from(OPCODES)) + data.draw(st.sampled_from(ARGUMENTS))
    parsed(bytes(content))


BOMBS = {
    "text of an exabyte": b"\x80\x04\x8d" + (1 << 60).to_bytes(8, "little") + b"x.",
    "bytes of an exabyte": b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b"x.",
    "a frame of an exabyte": b"\x80\x04\x95" + (1 << 60).to_bytes(8, "little") + b".",
    "the last place of the memo": b"\x80\x02Nr\xff\xff\xff\xff.",
    "a number of a gigabyte": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "digits": b"\x80\x02L" + b"9" * 100_000 + b"L\n.",
    "deep tuples": b"\x80\x02N" + b"\x85" * 100_000 + b".",
    "a deep tuple as a key": b"\x80\x02}N" + b"\x85" * 100_000 + b"Ns.",
    "a key whose hash takes for ever": b"\x80\x02})" + b"q\0h\0\x86" * 100 + b"Ns.",
    "a list in itself": b"\x80\x02]q\0h\0a.",
    "pops below the mark": b"\x80\x02NN(\x86t.",
    "an unhashable key": b"\x80\x02}]Ns.",
    "a registered extension": b"\x80\x02\x82\1.",
    "a persistent id": b"\x80\x02X\1\0\0\0aQ.",
    "the state of a class": b"\x80\x02ctorch\nSize\n}X\1\0\0\0aNsb.",
    "the state of a dtype": b"\x80\x02ctorch\nfloat32\n}X\1\0\0\0aNsb.",
    "a dtype that is called": b"\x80\x02ctorch\nfloat32\n)R.",
    "a name of a megabyte": b"\x80\x02cm\n" + b"n" * 1_000_000 + b"\n.",
    "text that is none": b"\x80\x02X\3\0\0\0\xed\xa0\x80.",
    "many objects and no end": b"\x80\x02" + b"}" * 100_000,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(bomb: str) -> None:
    parsed(BOMBS[bomb])
    with pytest.raises(CorruptCheckpoint):
        parse_metadata(BOMBS[bomb], PATH)


TEXT = st.text(st.characters(codec="utf-8"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**100), 2**100) | st.floats(allow_nan=False) | TEXT,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.tuples(inner, inner)
        | st.tuples(inner, inner, inner, inner)
        | st.dictionaries(TEXT, inner, max_size=5)
    ),
)


@settings(max_examples=50)
@given(value=VALUES, protocol=st.integers(2, 5))
def test_values_are_what_python_pickled(value: object, protocol: int) -> None:
    found = read_pickle(pickle.dumps(value, protocol), {})
    assert found == value
    assert repr(found) == repr(value)


@st.composite
def boxes_in_a_box(draw: st.DrawFn) -> tuple[list[int], list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    boxes = []
    for _ in range(draw(st.integers(0, 5))):
        offsets = tuple(draw(st.integers(0, size)) for size in shape)
        sizes = tuple(draw(st.integers(0, size + 1)) for size in shape)
        boxes.append((offsets, sizes))
    return shape, boxes


@settings(max_examples=150)
@given(boxes_in_a_box(), st.booleans())
def test_chunks_are_believed_exactly_where_they_tile_the_tensor(
    drawn: tuple[list[int], list[tuple[tuple[int, ...], tuple[int, ...]]]], halves: bool
) -> None:
    shape, boxes = drawn
    if halves:  # something that tiles, with or without a box too many
        first = max(shape[0] // 2, 1)
        rest = tuple(shape[1:])
        zeros = (0,) * len(rest)
        boxes = [((0, *zeros), (first, *rest)), ((first, *zeros), (shape[0] - first, *rest)), *boxes[:1]]
    counts = torch.zeros([2 * size + 2 for size in shape], dtype=torch.int64)
    for offsets, sizes in boxes:
        counts[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] += 1
    inside = tuple(slice(size) for size in shape)
    tiles = bool((counts[inside] == 1).all()) and int(counts.sum()) == int(counts[inside].sum())
    content = metadata_of(shape, boxes)
    if tiles:
        parse_metadata(content, PATH)
    else:
        with pytest.raises(CorruptCheckpoint, match="do not tile"):
            parse_metadata(content, PATH)


def metadata_of(shape: list[int], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bytes:
    chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
    tensor = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(shape), chunks)
    places = {MetadataIndex("t", offsets): _StorageInfo("f", 0, 1) for offsets, _ in boxes}
    return pickle.dumps(Metadata({"t": tensor}, {}, places))


@settings(max_examples=150)
@given(data=st.data(), transposed=st.booleans())
def test_blobs_with_changes_give_an_error_or_a_place_inside_of_them(data: st.DataObject, transposed: bool) -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    stream = io.BytesIO()
    torch.save(tensor.t().contiguous().t() if transposed else tensor, stream)
    content = bytearray(stream.getvalue())
    for _ in range(data.draw(st.integers(0, 3))):
        low = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[low] ^= data.draw(st.integers(1, 255))
        else:
            del content[low : low + data.draw(st.integers(1, 100))]
    blob = Blob(file="f", offset=1000, length_bytes=len(content))
    try:
        payload = find_payload(blob, io.BytesIO(content), dtype=tensor.dtype, shape=(3, 4), where="here")
    except CorruptCheckpoint:
        pass
    else:
        assert blob.offset <= payload.file_offset
        assert payload.file_offset + payload.length_bytes <= blob.offset + blob.length_bytes
        assert payload.length_bytes >= 4
