"""The header of a safetensors file, read as what it is: bytes that anyone may have written.

Either the header describes the file exactly, or CorruptCheckpoint says what is wrong; nothing is allocated, read or
believed before it is checked. Stricter than the format only where torch is: sizes must fit a signed 64-bit integer.

Source: safetensors `README.md` (format) and `tensor.rs` (`SafeTensors::read_metadata`, `Metadata::validate`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stillframe.errors import CorruptCheckpoint
from stillframe.layout.files import MAX_HEADER_BYTES, SAFETENSORS_DTYPES
from stillframe.names import is_unicode

LENGTH_BYTES = 8
_DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
_MAX_ELEMENTS = 2**63 - 1
_MAX_DIMENSIONS = 64  # torch's own limit for most operations


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a file: row-major, little-endian, from byte `file_offset` of the file on."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file_offset: int
    length_bytes: int


def header_length(prefix: bytes, *, file_bytes: int, file_name: str) -> int:
    """The length in bytes of the JSON that follows the file's first 8 bytes, `prefix`.

    Raises CorruptCheckpoint where a file of `file_bytes` cannot have such a header.
    """
    if len(prefix) != LENGTH_BYTES:
        raise CorruptCheckpoint(f"{file_name}: has {file_bytes} bytes, too few for a safetensors file; it is truncated")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise CorruptCheckpoint(
            f"{file_name}: its first 8 bytes announce a header of {length} bytes, more than the {MAX_HEADER_BYTES} "
            "that safetensors allows; it is corrupt, or no safetensors file"
        )
    if LENGTH_BYTES + length > file_bytes:
        raise CorruptCheckpoint(
            f"{file_name}: announces a header of {length} bytes but has {file_bytes} bytes in all; it is truncated"
        )
    return length


def parse_header(header: bytes, *, file_bytes: int, file_name: str) -> tuple[StoredTensor, ...]:
    """The tensors of a file of `file_bytes`, by offset; `header` is the JSON behind its first 8 bytes.

    Raises CorruptCheckpoint, naming file, tensor and offset, unless the tensors tile the rest of the file exactly.
    """
    entries = _entries(header, file_name)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptCheckpoint(f"{file_name}: __metadata__ in its header does not map text to text")
    data_start = LENGTH_BYTES + len(header)
    tensors = [_tensor(name, entry, data_start, f"{file_name}: {name!r}") for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.file_offset, tensor.length_bytes))
    end = data_start
    for tensor in tensors:
        if tensor.file_offset != end:
            what = "overlaps the one before it" if tensor.file_offset < end else "leaves a gap before it"
            raise CorruptCheckpoint(
                f"{file_name}: {tensor.name!r} begins at byte {tensor.file_offset} instead of {end}; it {what}"
            )
        end += tensor.length_bytes
    if end != file_bytes:
        what = "it is truncated" if end > file_bytes else "there are bytes that belong to no tensor"
        raise CorruptCheckpoint(f"{file_name}: has {file_bytes} bytes but its header describes {end}; {what}")
    return tuple(tensors)


def _entries(header: bytes, file_name: str) -> dict[str, Any]:
    if not header.startswith(b"{"):
        raise CorruptCheckpoint(f"{file_name}: its header does not begin with '{{'; it is no safetensors file")
    try:
        return dict(json.loads(header.decode(), object_pairs_hook=_without_repetition))
    except (ValueError, RecursionError) as error:  # also: not UTF-8, a number of too many digits
        raise CorruptCheckpoint(f"{file_name}: its header is not the JSON of a safetensors file: {error}") from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} is there twice")
    return entries


def _tensor(name: str, entry: object, data_start: int, where: str) -> StoredTensor:
    if not is_unicode(name):
        raise CorruptCheckpoint(f"{where}: is no name for a tensor, for it is not valid Unicode")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CorruptCheckpoint(f"{where}: its entry in the header lacks dtype, shape or data_offsets")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CorruptCheckpoint(f"{where}: its dtype {entry['dtype']!r:.100} is none that torch and stillframe know")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise CorruptCheckpoint(f"{where}: its shape {shape!r:.100} is no list of at most {_MAX_DIMENSIONS} sizes")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CorruptCheckpoint(f"{where}: its data_offsets {offsets!r:.100} are no begin and end")
    elements = extent = 1
    for size in shape:
        elements *= size
        extent *= max(size, 1)  # the strides of an empty tensor must fit, too
    length = offsets[1] - offsets[0]
    if extent * dtype.itemsize > _MAX_ELEMENTS or elements * dtype.itemsize != length:
        raise CorruptCheckpoint(
            f"{where}: its shape {shape} of {entry['dtype']} does not make the {length} bytes that its data_offsets say"
        )
    return StoredTensor(
        name=name, dtype=dtype, shape=tuple(shape), file_offset=data_start + offsets[0], length_bytes=length
    )


def _counts(values: object) -> bool:
    """Whether `values` is a list of integers that count something; JSON's `true` is none, though Python's is."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= _MAX_ELEMENTS for value in values)
