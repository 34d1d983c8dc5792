"""The header of a safetensors file: a true description of the file, or one clear error."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from stillframe.errors import CorruptCheckpoint
from stillframe.layout.files import MAX_HEADER_BYTES, SAFETENSORS_DTYPES
from stillframe.load.safetensors import StoredTensor, header_length, parse_header


def parse(content: bytes) -> tuple[StoredTensor, ...]:
    length = header_length(content[:8], file_bytes=len(content), file_name="w.safetensors")
    return parse_header(content[8 : 8 + length], file_bytes=len(content), file_name="w.safetensors")


def file_of(header: object, data_bytes: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data_bytes)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_file_that_safetensors_wrote_is_described_exactly() -> None:
    tensors = {name: torch.arange(6).reshape(2, 3).to(dtype) for dtype, name in SAFETENSORS_DTYPES.items()}
    tensors |= {"scalar": torch.tensor(1.5), "none": torch.empty(0, 4), 'ä \u2028"': torch.ones(1)}
    content = save(tensors, metadata={"format": "pt"})
    found = {tensor.name: tensor for tensor in parse(content)}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tuple(tensor.shape))
        begin = found[name].file_offset
        stored = content[begin : begin + found[name].length_bytes]
        assert stored == bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def test_tensors_come_in_the_order_of_their_bytes() -> None:
    header = {"b": entry(offsets=(8, 16)), "a": entry(offsets=(0, 8)), "empty": entry(shape=(0,), offsets=(8, 8))}
    assert [tensor.name for tensor in parse(file_of(header, 16))] == ["a", "empty", "b"]


def test_a_file_without_tensors_is_valid() -> None:
    assert parse(file_of({})) == ()


BAD: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "has 0 bytes, too few"),
    "seven bytes": (bytes(7), "has 7 bytes, too few"),
    "an absurd length": (b"\xff" * 8 + b"{}", "announces? a header of 18446744073709551615 bytes, more than"),
    "one byte above the limit": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), "more than the 100000000"),
    "header cut off": (file_of({"a": entry()})[:-20], "announces a header of .* it is truncated"),
    "no header": (bytes(8), "does not begin with '{'"),
    "a pickle": (b"\x10" + bytes(7) + b"\x80\x02cos\nsystem\n(S'x", "does not begin with '{'"),
    "not JSON": (file_of(b"{nonsense"), "is not the JSON"),
    "JSON cut off": (file_of(b'{"a": {"dtype": "F32"'), "is not the JSON"),
    "a list": (file_of([]), "does not begin with '{'"),
    "UTF-16": (file_of('{"a": 1}'.encode("utf-16-le")), "is not the JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "is not the JSON"),
    "a name that is not Unicode": (file_of({"\ud800": entry()}, 8), r"'\\ud800': is no name .* not valid Unicode"),
    "nested without end": (file_of(b'{"a":' + b"[" * 200_000), "is not the JSON"),
    "a number without end": (file_of(b'{"a":' + b"9" * 10_000 + b"}"), "is not the JSON"),
    "a key twice": (file_of(b'{"a": {}, "a": {}}'), "'a' is there twice"),
    "a field twice": (file_of(b'{"a": {"dtype": "F32", "dtype": "I8"}}'), "'dtype' is there twice"),
    "entry is no object": (file_of({"a": 3}), "'a': its entry in the header lacks"),
    "no shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4), "'a': its entry .* lacks"),
    "metadata is no map": (file_of({"__metadata__": 3}), "__metadata__"),
    "metadata has numbers": (file_of({"__metadata__": {"a": 3}}), "__metadata__"),
    "unknown dtype": (file_of({"a": entry("F4")}, 8), "'a': its dtype 'F4' is none"),
    "dtype is no text": (file_of({"a": entry(["F32"])}, 8), "'a': its dtype .* is none"),
    "negative size": (file_of({"a": entry(shape=[-2])}, 8), "'a': its shape .* is no list"),
    "fractional size": (file_of({"a": entry(shape=[2.0])}, 8), "'a': its shape .* is no list"),
    "a true size": (file_of({"a": entry(shape=[True, 2])}, 8), "'a': its shape .* is no list"),
    "shape is no list": (file_of({"a": entry(shape="2")}, 8), "'a': its shape .* is no list"),
    "too many dimensions": (file_of({"a": entry(shape=[1] * 65)}, 4), "'a': its shape .* is no list"),
    "elements overflow": (file_of({"a": entry(shape=[2**62, 2**62])}, 8), "'a': its shape .* does not make"),
    "empty, but absurd": (file_of({"a": entry(shape=[2**62, 4, 0], offsets=[0, 0])}), "'a': its shape .* does not"),
    "shape and size differ": (file_of({"a": entry(shape=[3])}, 8), r"'a': its shape \[3\] of F32 does not make the 8"),
    "one offset": (file_of({"a": entry(offsets=[0])}, 8), "'a': its data_offsets"),
    "offsets swapped": (file_of({"a": entry(offsets=[8, 0])}, 8), "'a': its data_offsets"),
    "offset negative": (file_of({"a": entry(offsets=[-8, 0])}, 8), "'a': its data_offsets"),
    "gap": (file_of({"a": entry(), "b": entry(offsets=[12, 20])}, 20), "'b' begins at byte .* leaves a gap"),
    "gap at the start": (file_of({"a": entry(offsets=[4, 12])}, 12), "'a' begins at byte .* leaves a gap"),
    "overlap": (file_of({"a": entry(), "b": entry(offsets=[4, 12])}, 12), "'b' begins at byte .* overlaps"),
    "the same bytes": (file_of({"a": entry(), "b": entry()}, 8), "begins at byte .* overlaps"),
    "truncated data": (file_of({"a": entry()}, 7), "its header describes .*; it is truncated"),
    "trailing bytes": (file_of({"a": entry()}, 9), "bytes that belong to no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_header_is_refused_with_file_and_tensor(name: str) -> None:
    content, message = BAD[name]
    with pytest.raises(CorruptCheckpoint, match=message) as caught:
        parse(content)
    assert str(caught.value).startswith("w.safetensors: ")
    assert len(str(caught.value)) < 1000


def assert_sound(content: bytes) -> None:
    """Either the one error, or a description that accounts for every byte of the file."""
    try:
        tensors = parse(content)
    except CorruptCheckpoint:
        return
    position = 8 + int.from_bytes(content[:8], "little")
    for tensor in tensors:
        assert tensor.file_offset == position
        assert tensor.length_bytes == math.prod(tensor.shape) * tensor.dtype.itemsize
        assert torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").nbytes == tensor.length_bytes
        position += tensor.length_bytes
    assert position == len(content)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_or_described(content: bytes) -> None:
    assert_sound(content)


@given(st.binary(max_size=200), st.binary(max_size=40))
def test_arbitrary_bytes_in_place_of_the_header_are_refused_or_described(header: bytes, data: bytes) -> None:
    assert_sound(file_of(header) + data)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*SAFETENSORS_DTYPES.values(), "F4", "float"]) | _JSON,
        "shape": st.lists(st.integers(-1, 5) | st.just(2**62), max_size=3) | _JSON,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | _JSON,
    }
)


@given(st.dictionaries(st.text(max_size=3), _ENTRY | _JSON, max_size=3), st.integers(0, 60))
def test_headers_that_are_nearly_right_are_refused_or_described(header: dict[str, Any], data_bytes: int) -> None:
    assert_sound(file_of(header, data_bytes))


@given(st.data())
def test_a_file_with_a_few_bytes_changed_or_cut_is_refused_or_described(data: st.DataObject) -> None:
    content = bytearray(save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.int8)}, metadata={"x": "y"}))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    assert_sound(bytes(content[: data.draw(st.integers(0, len(content)))]))
