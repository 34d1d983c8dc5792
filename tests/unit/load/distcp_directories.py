"""DCP directories for tests: written by stock `dcp.save`, or chunk by chunk as any number of ranks would write them."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from awscrt.checksums import crc64nvme
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from stillframe.manifest import FileEntry, Manifest, TensorEntry, encode_manifest
from stillframe.names import MANIFEST_NAME

Boxes = Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
"""Offsets and sizes of chunks."""


def save(directory: Path, state: Mapping[str, Any]) -> Path:
    """What stock `dcp.save` writes in one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # it says so even when told to
        dcp.save(dict(state), checkpoint_id=directory, no_dist=True)
    return directory


def save_chunks(
    directory: Path,
    tensors: Mapping[str, tuple[torch.Tensor, Boxes]],
    *,
    objects: Mapping[str, object] | None = None,
    files: int = 2,
    transposed: bool = False,
) -> Path:
    """Tensors cut into boxes, dealt out to the files of so many ranks; objects in a file of their own."""
    directory.mkdir(parents=True, exist_ok=True)
    metadata = Metadata({}, {}, {}, StorageMeta(checkpoint_id=directory, save_id="1"), "1.0.0")
    contents = [io.BytesIO() for _ in range(files)]
    number = 0
    for key, (tensor, boxes) in tensors.items():
        chunks = []
        for offsets, sizes in boxes:
            part = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].clone()
            if transposed:
                part = part.movedim(0, -1).contiguous().movedim(-1, 0)
            info = _append(contents[number % files], f"__{number % files}_0.distcp", part)
            metadata.storage_data[MetadataIndex(key, offsets, len(chunks))] = info
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            number += 1
        properties = TensorProperties(dtype=tensor.dtype)
        metadata.state_dict_metadata[key] = TensorStorageMetadata(properties, tensor.shape, chunks)
        metadata.planner_data[key] = tuple(key.split("."))
    names = [f"__{rank}_0.distcp" for rank in range(files)]
    if objects:
        contents.append(io.BytesIO())
        names.append("__0_1.distcp")
        for key, value in objects.items():
            metadata.storage_data[MetadataIndex(key)] = _append(contents[-1], names[-1], value)
            metadata.state_dict_metadata[key] = BytesStorageMetadata()
            metadata.planner_data[key] = tuple(key.split("."))
    for name, content in zip(names, contents, strict=True):
        (directory / name).write_bytes(content.getvalue())
    write_metadata(directory, metadata)
    return directory


def _append(content: io.BytesIO, name: str, value: object) -> _StorageInfo:
    blob = io.BytesIO()
    torch.save(value, blob)
    begin = content.tell()
    content.write(blob.getvalue())
    return _StorageInfo(name, begin, len(blob.getvalue()))


def read_metadata(directory: Path) -> Metadata:
    metadata: Metadata = pickle.loads((directory / ".metadata").read_bytes())
    return metadata


def write_metadata(directory: Path, metadata: object) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def change_metadata(directory: Path, change: Callable[[Metadata], None]) -> None:
    metadata = read_metadata(directory)
    change(metadata)
    write_metadata(directory, metadata)


def manifest_of(directory: Path, *, prefix: str = "") -> Manifest:
    """The manifest that stillframe would publish the directory with, its payloads found by torch's own reader."""
    files = {
        prefix + str(path.relative_to(directory)): FileEntry(
            size=path.stat().st_size, crc64nvme=f"{crc64nvme(path.read_bytes()):016x}"
        )
        for path in directory.rglob("*")
        if path.is_file() and path.name != MANIFEST_NAME
    }
    metadata = read_metadata(directory)
    tensors = {}
    for index, info in metadata.storage_data.items():
        stored = metadata.state_dict_metadata[index.fqn]
        if isinstance(stored, BytesStorageMetadata):
            continue
        blob = (directory / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        begin = torch._C.PyTorchFileReader(io.BytesIO(blob)).get_record_offset("data/0")
        (chunk,) = (c for c in stored.chunks if c.offsets == index.offset)
        size = chunk.sizes.numel() * stored.properties.dtype.itemsize
        tensors[f"{index.fqn}@{','.join(map(str, chunk.offsets))}"] = TensorEntry(
            file=prefix + info.relative_path,
            offset=info.offset + begin,
            size=size,
            crc64nvme=f"{crc64nvme(blob[begin : begin + size]):016x}",
        )
    return Manifest(
        kind="checkpoint",
        step=5,
        attempt="a",
        sequence=1,
        world_size=2,
        layout_digest="d",
        published_at="2025-01-01T00:00:00+00:00",
        git_commit=None,
        versions={},
        balance=1.0,
        files=files,
        tensors=tensors,
    )


def publish(directory: Path) -> Manifest:
    manifest = manifest_of(directory)
    (directory / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    return manifest


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
