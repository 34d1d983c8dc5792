"""Where the elements of a tensor lie inside of a blob, the `torch.save` of one tensor that a DCP directory consists of.

A blob is a zip file without compression: `data.pkl` describes the tensor, `data/<n>` is its storage. Only these two
are looked at, as data that anyone may have written.

Sources: torch `serialization.py` (`_save`, `_load`, `persistent_load`), `_utils.py` (`_rebuild_tensor_v2`, `_v3`,
`_rebuild_parameter`), `storage.py` (the names of typed storages).
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from stillframe.errors import CorruptCheckpoint
from stillframe.load.folder import read_fully
from stillframe.load.metadata import DTYPES, ORDERED_DICT, Blob
from stillframe.load.pickles import PickleRefused, Record, read_pickle, record_of

_MAX_PART_BYTES = 1 << 20
"""What the directory of the zip file, or `data.pkl`, may have at most: they describe one tensor."""
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LOCAL_SIGNATURE = b"PK\3\4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """A tensor's elements: from byte `file_offset` of the file on, row-major, or with `stride` (in elements).

    `length_bytes`: from the first element to the end of the last one.
    """

    file_offset: int
    length_bytes: int
    stride: tuple[int, ...] | None = None


def find_payload(
    blob: Blob, stream: io.BytesIO | io.BufferedReader, *, dtype: torch.dtype, shape: tuple[int, ...], where: str
) -> Payload:
    """Read the envelope of a blob through `stream`, which shows exactly the blob's bytes.

    Raises CorruptCheckpoint, beginning with `where`, unless the blob holds one tensor of this dtype and shape, all of
    whose elements lie inside of it.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            records = {info.filename: info for info in archive.infolist()}
            names = [name for name in records if name.endswith("/data.pkl")]
            if len(names) != 1 or len(records) != len(archive.infolist()):
                raise PickleRefused("it does not hold exactly one data.pkl")
            folder = names[0].removesuffix("data.pkl")
            order = _read(archive, records, f"{folder}byteorder") if f"{folder}byteorder" in records else b"little"
            if order != b"little":
                raise PickleRefused("its numbers are big-endian, or of no byte order that torch knows")
            tensor = _described(_read(archive, records, names[0]))
        record = records.get(f"{folder}data/{tensor.storage}")
        if record is None or record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
            raise PickleRefused(f"its storage {tensor.storage[:50]!r} is absent, compressed or encrypted")
        stream.seek(record.header_offset)
        signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
        if signature != _LOCAL_SIGNATURE:
            raise PickleRefused(
                f"its directory says that a record begins at byte {record.header_offset}, where none is"
            )
    except (PickleRefused, zipfile.BadZipFile) as error:
        raise CorruptCheckpoint(f"{where} is no tensor that torch.save wrote: {error}") from error
    # What else zipfile raises for arbitrary bytes: text that is none, versions and methods that it does not know.
    except (ValueError, NotImplementedError, RuntimeError, OverflowError, struct.error, EOFError, LookupError) as error:
        raise CorruptCheckpoint(f"{where} is no tensor that torch.save wrote: {type(error).__name__}") from error
    if (tensor.dtype, tensor.shape) != (dtype, shape):
        raise CorruptCheckpoint(
            f"{where} is a tensor of {tensor.dtype} and shape {tensor.shape}; .metadata says {dtype} and {shape}"
        )
    extent = 1 + sum((size - 1) * step for size, step in zip(shape, tensor.stride, strict=True))
    begin = record.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
    first, length = tensor.offset * dtype.itemsize, extent * dtype.itemsize
    if first + length > record.file_size or begin + first + length > blob.length_bytes:
        raise CorruptCheckpoint(
            f"{where} has a storage of {record.file_size} bytes from byte {blob.offset + begin} of the file on, which "
            f"does not hold the {length} bytes of its tensor"
        )
    stride = None if _is_row_major(shape, tensor.stride) else tensor.stride
    return Payload(file_offset=blob.offset + begin + first, length_bytes=length, stride=stride)


def open_blob(path: Path, descriptor: int, blob: Blob) -> io.BufferedReader:
    """A stream over the bytes of one blob of an open file, of which small parts are read."""
    return io.BufferedReader(_Window(path, descriptor, blob), buffer_size=4096)


class _Window(io.RawIOBase):
    def __init__(self, path: Path, descriptor: int, blob: Blob) -> None:
        self._path = path
        self._descriptor = descriptor
        self._blob = blob
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._blob.length_bytes}[whence]
        if base + offset < 0:
            raise ValueError("before the beginning")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = min(len(buffer), max(self._blob.length_bytes - self._at, 0))
        if count > _MAX_PART_BYTES:
            raise ValueError("a part of the envelope is too large")
        part = read_fully(self._path, self._descriptor, self._blob.offset + self._at, count)
        buffer[:count] = part
        self._at += count
        return count


@dataclass(frozen=True, slots=True, kw_only=True)
class _Described:
    """What `data.pkl` says of a tensor; all in elements, every number at least 0."""

    storage: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _read(archive: zipfile.ZipFile, records: Mapping[str, zipfile.ZipInfo], name: str) -> bytes:
    record = records[name]
    if record.file_size > _MAX_PART_BYTES or record.compress_type != zipfile.ZIP_STORED:
        raise PickleRefused(f"its {name[-50:]!r} is compressed, or too large to describe a tensor")
    return archive.read(record)


def _described(content: bytes) -> _Described:
    root = read_pickle(content, _ALLOWED, persistent=_storage)
    while isinstance(root, Record) and root.name == "_rebuild_parameter" and root.arguments:
        root = root.arguments[0]
    if not isinstance(root, Record) or not root.name.startswith("_rebuild_tensor"):
        raise PickleRefused("its data.pkl describes no plain tensor")
    # (storage, offset, size, stride, requires_grad, hooks), in v3 a dtype, in both perhaps what a view adds (conjugate)
    arguments = list(root.arguments)
    is_untyped = root.name == "_rebuild_tensor_v3"
    if len(arguments) not in (6 + is_untyped, 7 + is_untyped) or (len(arguments) > 6 + is_untyped and arguments[-1]):
        raise PickleRefused("its data.pkl describes a tensor with more to it than values, such as a conjugate view")
    storage, offset, shape, stride = arguments[:4]
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise PickleRefused("its data.pkl describes a tensor without storage, size and stride")
    dtype = arguments[6] if is_untyped else storage.dtype
    if not isinstance(dtype, torch.dtype):
        raise PickleRefused("its data.pkl names no dtype")
    numbers = [offset, *shape, *stride]
    if len(shape) != len(stride) or any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers) or 0 in shape:
        raise PickleRefused("its data.pkl describes a tensor with an impossible size or stride")
    assert isinstance(offset, int)
    return _Described(storage=storage.name, dtype=dtype, offset=offset, shape=shape, stride=stride)


@dataclass(frozen=True, slots=True)
class _Storage:
    name: str
    dtype: torch.dtype | None  # None: it is of bytes, and the tensor says what they are


def _storage(identity: object) -> _Storage:
    if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
        raise PickleRefused("its data.pkl refers to something that is no storage")
    _, kind, name, _, _ = identity
    if not isinstance(name, str) or not isinstance(kind, _StorageKind):
        raise PickleRefused("its data.pkl refers to a storage without name or kind")
    return _Storage(name, kind.dtype)


@dataclass(frozen=True, slots=True)
class _StorageKind:
    dtype: torch.dtype | None


_TYPED_STORAGES: Mapping[str, torch.dtype] = {
    "BFloat16": torch.bfloat16,
    "Bool": torch.bool,
    "Byte": torch.uint8,
    "Char": torch.int8,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Short": torch.int16,
}
"""Other dtypes are stored as bytes, and named by the tensor."""
_ALLOWED: Mapping[tuple[str, str], object] = {
    **{
        ("torch._utils", name): record_of(name)
        for name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
    },
    **{("torch", f"{name}Storage"): _StorageKind(dtype) for name, dtype in _TYPED_STORAGES.items()},
    ("torch.storage", "UntypedStorage"): _StorageKind(None),
    **DTYPES,
    **ORDERED_DICT,
}


def _is_row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True
