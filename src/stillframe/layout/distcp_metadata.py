"""What rank 0 adds to a DCP directory in each save: `.metadata`, and the file of what is no tensor."""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from stillframe.errors import LayoutError
from stillframe.layout.envelope import TensorEnvelope
from stillframe.layout.placement import Box
from stillframe.records import InlineFile
from stillframe.tree import StateTree

METADATA_NAME = ".metadata"


class StoredChunk(NamedTuple):
    """A box of the tensor at `key`, wrapped in `envelope`, `offset` bytes into `file`."""

    key: str
    box: Box
    envelope: TensorEnvelope
    file: str
    offset: int

    @property
    def name(self) -> str:
        """`<key>@<offsets joined by commas>`: what the layout and the manifest call the chunk."""
        return f"{self.key}@{','.join(map(str, self.box.offsets))}"


class MetadataFiles:
    """Renders `.metadata` and the objects' file for the chunks of one plan, those of all ranks.

    torch's own classes, pickled as its `FileSystemWriter` does it: stock readers unpickle them. The pickle is kept
    and used again while no object's length changes.
    """

    def __init__(self, tree: StateTree, chunks: Sequence[StoredChunk], *, objects_name: str) -> None:
        named = tree.tensors.keys() | tree.aliases.keys() | tree.objects.keys()
        assert named == tree.paths.keys(), f"keys without a path, or paths without a key: {named ^ tree.paths.keys()}"
        self._tree = tree
        self._chunks = chunks
        self._objects_name = objects_name
        self._object_lengths: list[int] | None = None
        self._pickled = b""

    def render(self, objects: Mapping[str, object]) -> tuple[InlineFile, ...]:
        """The inline files of a save with these values of the tree's objects; `.metadata` is the last.

        Raises LayoutError if the keys are not those that were planned with.
        """
        if objects.keys() != self._tree.objects.keys():
            raise LayoutError(
                f"the objects of the state have changed since it was planned: {sorted(objects)} are not "
                f"{sorted(self._tree.objects)}"
            )
        blobs = [_saved(objects[key]) for key in self._tree.objects]
        lengths = [len(blob) for blob in blobs]
        if lengths != self._object_lengths:
            self._pickled = pickle.dumps(self._metadata(lengths))
            self._object_lengths = lengths
        files = (InlineFile(name=self._objects_name, content=b"".join(blobs)),) if blobs else ()
        return (*files, InlineFile(name=METADATA_NAME, content=self._pickled))

    def _metadata(self, object_lengths: Sequence[int]) -> Metadata:
        tensors: dict[str, STORAGE_TYPES] = {}
        storage: dict[MetadataIndex, _StorageInfo] = {}
        chunks: dict[str, list[StoredChunk]] = defaultdict(list)
        for chunk in self._chunks:
            chunks[chunk.key].append(chunk)
        keys_of = {key: [key] for key in self._tree.tensors}
        for alias, key in self._tree.aliases.items():
            keys_of[key].append(alias)
        # Tensors that are spread alike share their boxes, and so share what describes them: a pickle of half the size.
        chunk_of = {
            id(c.box): ChunkStorageMetadata(offsets=torch.Size(c.box.offsets), sizes=torch.Size(c.box.sizes))
            for c in {id(c.box): c for c in self._chunks}.values()
        }
        for key, tensor in self._tree.tensors.items():
            boxes = [chunk_of[id(c.box)] for c in chunks[key]]
            described = TensorStorageMetadata(
                properties=TensorProperties(dtype=tensor.dtype), size=torch.Size(tensor.shape), chunks=boxes
            )
            places = [_StorageInfo(c.file, c.offset, c.envelope.total_bytes) for c in chunks[key]]
            for name in keys_of[key]:
                tensors[name] = described
                for index, (box, place) in enumerate(zip(boxes, places, strict=True)):
                    storage[MetadataIndex(name, box.offsets, index)] = place
        position = 0
        for key, length in zip(self._tree.objects, object_lengths, strict=True):
            tensors[key] = BytesStorageMetadata()
            storage[MetadataIndex(key)] = _StorageInfo(self._objects_name, position, length)
            position += length
        return Metadata(
            state_dict_metadata={key: tensors[key] for key in self._tree.paths},
            planner_data=dict(self._tree.paths),
            storage_data=storage,
            storage_meta=StorageMeta(),
            version=CURRENT_DCP_VERSION,
        )


def _saved(value: object) -> bytes:
    sink = io.BytesIO()
    torch.save(value, sink)
    return sink.getvalue()
