"""`.metadata` of a DCP directory -> what it stores, and where. Bytes that anyone may have written.

torch itself unpickles this file without restriction. Here it is read as data (`load.pickles`), and believed only where
it is complete and consistent: every tensor is tiled by its chunks exactly, every chunk and object has its place in a
file inside of the directory.

Source: torch 2.11 to 2.13, `distributed/checkpoint/metadata.py`, `filesystem.py` (`_StorageInfo`), `planner_helpers.py`
and `_nested_dict.py` (what the planner adds), and the pickles that these versions wrote.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NoReturn

import torch

from stillframe.errors import CorruptCheckpoint, LoadError
from stillframe.load.folder import is_inside
from stillframe.load.pickles import Constructor, PickleRefused, Record, read_pickle, record_of
from stillframe.tree import KeyPath

METADATA_NAME = ".metadata"
_MAX_ELEMENTS = 2**63 - 1
_MAX_DIMENSIONS = 64  # torch's own limit for most operations
_MAX_CUT_DIMENSIONS = 8  # more than a mesh has


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """One item's bytes, a whole `torch.save`: where they begin in which file, and how many they are."""

    file: str
    offset: int
    length_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredChunk:
    """A box of a tensor (its first index and size along each dimension) and the blob that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    blob: Blob

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredState:
    """One tensor: its dtype, global shape, and the chunks with elements that tile it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMetadata:
    """What a directory stores under which keys, and for every key its way through the nested state."""

    tensors: Mapping[str, StoredState]
    objects: Mapping[str, Blob]
    paths: Mapping[str, KeyPath]


def chunk_name(key: str, offsets: Sequence[int]) -> str:
    """The name of a chunk, in a manifest and in messages."""
    return f"{key}@{','.join(map(str, offsets))}"


def parse_metadata(content: bytes, path: Path) -> StoredMetadata:
    """What `.metadata` says; `path` is named in messages.

    Raises CorruptCheckpoint for anything that is not the whole and consistent metadata of a directory, LoadError for
    tensors and items that torch can store and this loader cannot read.
    """
    try:
        root = read_pickle(content, _ALLOWED)
    except PickleRefused as error:
        raise CorruptCheckpoint(f"{path}: {error}") from error
    return _Parser(path).metadata(root)


def _text_of(name: str) -> Constructor:
    """A function that torch calls with one text, which stands for the result."""

    def make(arguments: tuple[object, ...]) -> object:
        if len(arguments) != 1 or not isinstance(arguments[0], str):
            raise ValueError(f"{name} takes one text")
        return arguments[0]

    return Constructor(make)


def _size(arguments: tuple[object, ...]) -> tuple[object, ...]:
    values = arguments[0] if arguments else ()
    if len(arguments) > 1 or not isinstance(values, tuple | list):
        raise ValueError("torch.Size takes one sequence")
    return tuple(values)


def _mapping(arguments: tuple[object, ...]) -> dict[str, object]:
    if arguments:
        raise ValueError("OrderedDict takes no arguments here")
    return {}


DTYPES: Mapping[tuple[str, str], object] = {
    ("torch", str(dtype).removeprefix("torch.")): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}
ORDERED_DICT: Mapping[tuple[str, str], object] = {("collections", "OrderedDict"): Constructor(_mapping)}
_ALLOWED: Mapping[tuple[str, str], object] = {
    **{
        ("torch.distributed.checkpoint.metadata", name): record_of(name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): record_of("_StorageInfo"),
    ("torch", "Size"): Constructor(_size),
    ("torch.serialization", "_get_layout"): _text_of("_get_layout"),
    # The checkpoint_id of StorageMeta, which nobody needs.
    **{
        (module, name): record_of(name)
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    },
    **DTYPES,
    **ORDERED_DICT,
}


class _Parser:
    """Turns the records of one `.metadata` into ours; whatever is wrong is said with `path` and key."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def metadata(self, root: object) -> StoredMetadata:
        fields = self._fields(root, "Metadata", "it")
        items = self._dict(fields.get("state_dict_metadata"), "state_dict_metadata")
        places = self._places(self._dict(fields.get("storage_data"), "storage_data"))
        tensors: dict[str, StoredState] = {}
        objects: dict[str, Blob] = {}
        for key, item in items.items():
            if not isinstance(key, str):
                self._refuse("state_dict_metadata has a key that is no text")
            if isinstance(item, Record) and item.name == "BytesStorageMetadata":
                objects[key] = self._place_of(places, key, None)
            else:
                tensors[key] = self._tensor(key, item, places)
        return StoredMetadata(tensors=tensors, objects=objects, paths=self._paths(fields.get("planner_data"), items))

    def _tensor(self, key: str, item: object, places: Mapping[tuple[str, object], Blob]) -> StoredState:
        fields = self._fields(item, "TensorStorageMetadata", repr(key))
        properties = fields.get("properties")
        values = properties.state if isinstance(properties, Record) and properties.name == "TensorProperties" else None
        if not isinstance(values, tuple) or len(values) != 5 or not isinstance(values[0], torch.dtype):
            self._refuse(f"{key!r} has no properties that name its dtype")
        dtype, layout = values[0], values[1]
        if layout != "torch.strided":
            raise LoadError(f"{self._path}: {key!r} is stored with layout {layout!r:.60}, which is not loaded")
        shape = self._shape(fields.get("size"), f"the size of {key!r}")
        if math.prod(max(size, 1) for size in shape) * dtype.itemsize > _MAX_ELEMENTS:
            self._refuse(f"{key!r} has shape {shape}, which is more than any memory holds")
        chunks = []
        for entry in self._list(fields.get("chunks"), f"the chunks of {key!r}"):
            chunk = self._fields(entry, "ChunkStorageMetadata", f"a chunk of {key!r}")
            offsets = self._shape(chunk.get("offsets"), f"the offsets of a chunk of {key!r}")
            sizes = self._shape(chunk.get("sizes"), f"the sizes of a chunk of {key!r}")
            if not len(offsets) == len(sizes) == len(shape):
                self._refuse(f"{key!r} has shape {shape}, but a chunk at {offsets} of sizes {sizes}")
            if 0 not in sizes:  # a rank that holds nothing says so with an empty chunk
                chunks.append(StoredChunk(offsets=offsets, sizes=sizes, blob=self._place_of(places, key, offsets)))
        self._check_tiling(key, shape, chunks)
        return StoredState(dtype=dtype, shape=shape, chunks=tuple(chunks))

    def _check_tiling(self, key: str, shape: tuple[int, ...], chunks: Sequence[StoredChunk]) -> None:
        """Every element of the tensor is in exactly one chunk.

        A box's corners, with alternating signs, are the mixed difference of its indicator function, and that operator
        is injective on what has bounds. So boxes tile the whole exactly if the signed corners of all of them, added
        up, are the whole's: exact for any tiling, in time linear in the boxes. Dimensions that no box cuts drop out.
        """
        if 0 in shape:
            if chunks:
                self._refuse(f"{key!r} has shape {shape}, so no elements, but chunks that have some")
            return
        cut = [
            dim for dim, size in enumerate(shape) if any((c.offsets[dim], c.sizes[dim]) != (0, size) for c in chunks)
        ]
        if len(cut) > _MAX_CUT_DIMENSIONS:
            self._refuse(f"{key!r} is cut along {len(cut)} dimensions, more than {_MAX_CUT_DIMENSIONS}")
        signed: Counter[tuple[int, ...]] = Counter()
        _add_corners(signed, [(0, shape[dim]) for dim in cut], -1)
        for chunk in chunks:
            _add_corners(signed, [(o, o + n) for o, n in ((chunk.offsets[d], chunk.sizes[d]) for d in cut)], 1)
        wrong = min((corner for corner, count in signed.items() if count), default=None)
        if wrong is None:
            return
        place = [0] * len(shape)
        for dim, index in zip(cut, wrong, strict=True):
            place[dim] = index
        difference = sum(chunk.elements for chunk in chunks) - math.prod(shape)
        what = "overlap" if difference > 0 else "leave a gap" if difference < 0 else "overlap and leave gaps"
        self._refuse(f"the chunks of {key!r} do not tile its shape {shape}: they {what}, first at index {place}")

    def _places(self, storage: Mapping[object, object]) -> dict[tuple[str, object], Blob]:
        """(key, offsets of the chunk; None for an object) -> the blob."""
        places: dict[tuple[str, object], Blob] = {}
        for index, info in storage.items():
            of = self._fields(index, "MetadataIndex", "an index in storage_data")
            key, offsets = of.get("fqn"), of.get("offset")
            if not isinstance(key, str):
                self._refuse("storage_data has an index without a key")
            if offsets is not None:
                offsets = self._shape(offsets, f"the offsets of {key!r} in storage_data")
            fields = self._fields(info, "_StorageInfo", f"the place of {key!r}")
            if fields.get("transform_descriptors"):
                raise LoadError(
                    f"{self._path}: {key!r} was stored through transformations (such as compression), which are not "
                    "read; load it with torch.distributed.checkpoint and save it without them"
                )
            file = fields.get("relative_path")
            if not isinstance(file, str) or not is_inside(file):
                shown = repr(file[:200]) if isinstance(file, str) else "something that is no name"
                self._refuse(f"{key!r} is said to be in {shown}, which is outside of the directory")
            blob = Blob(
                file=file,
                offset=self._count(fields.get("offset"), f"the offset of {key!r} in {file}"),
                length_bytes=self._count(fields.get("length"), f"the length of {key!r} in {file}"),
            )
            if places.setdefault((key, offsets), blob) != blob:
                self._refuse(f"{key!r} (chunk at {offsets}) has two places: {places[key, offsets]} and {blob}")
        return places

    def _place_of(self, places: Mapping[tuple[str, object], Blob], key: str, offsets: tuple[int, ...] | None) -> Blob:
        blob = places.get((key, offsets))
        if blob is None:
            what = "the object" if offsets is None else f"the chunk at {offsets} of"
            self._refuse(f"says of {what} {key!r} in no file that it is there; a rank's part was lost in the save")
        return blob

    def _paths(self, planner_data: object, keys: Mapping[object, object]) -> dict[str, KeyPath]:
        """Of every key; one that was not flattened is its own path."""
        ways = {} if planner_data is None else self._dict(planner_data, "planner_data")
        paths: dict[str, KeyPath] = {}
        for key in keys:
            assert isinstance(key, str)
            way = ways.get(key, (key,))
            if not isinstance(way, tuple) or not way or any(type(step) not in (str, int) for step in way):
                self._refuse(f"the way to {key!r} in planner_data is no sequence of names and positions")
            paths[key] = way
        return paths

    def _fields(self, value: object, name: str, what: str) -> Mapping[object, object]:
        if not isinstance(value, Record) or value.name != name:
            self._refuse(f"{what} is a {_kind(value)} instead of a {name}")
        if value.state is None or value.arguments:
            self._refuse(f"{what} is a {name} without content")
        return self._dict(value.state, f"{what}, a {name},")

    def _dict(self, value: object, what: str) -> Mapping[object, object]:
        if not isinstance(value, dict):
            self._refuse(f"{what} holds a {_kind(value)} instead of a dictionary")
        return value

    def _list(self, value: object, what: str) -> list[object]:
        if not isinstance(value, list):
            self._refuse(f"{what} are a {_kind(value)} instead of a list")
        return value

    def _shape(self, value: object, what: str) -> tuple[int, ...]:
        if not isinstance(value, tuple) or len(value) > _MAX_DIMENSIONS:
            self._refuse(f"{what} is no sequence of at most {_MAX_DIMENSIONS} numbers")
        for size in value:
            self._count(size, what)
        return value

    def _count(self, value: object, what: str) -> int:
        if type(value) is not int or not 0 <= value <= _MAX_ELEMENTS:
            self._refuse(f"{what} holds a {_kind(value)} that counts nothing")
        return value

    def _refuse(self, reason: str) -> NoReturn:
        raise CorruptCheckpoint(f"{self._path}: {reason}")


def _add_corners(signed: Counter[tuple[int, ...]], sides: Sequence[tuple[int, int]], sign: int) -> None:
    for corner in product(*(((low, 1), (high, -1)) for low, high in sides)):
        signed[tuple(index for index, _ in corner)] += sign * math.prod(way for _, way in corner)


def _kind(value: object) -> str:
    return value.name if isinstance(value, Record) else type(value).__name__
