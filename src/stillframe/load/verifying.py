"""Whether a published directory still is what was published, byte for byte: `stillframe.verify`."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from awscrt.checksums import combine_crc64nvme, crc64nvme

from stillframe.errors import CorruptCheckpoint, NotACheckpoint
from stillframe.load.checking import own_manifest
from stillframe.load.directory import INDEX_NAME, WEIGHTS_NAME, WeightFile, open_weights, read_header
from stillframe.load.distcp import open_distcp
from stillframe.load.folder import Folder, is_inside, listed, open_folder
from stillframe.load.metadata import METADATA_NAME
from stillframe.load.reading import read_into
from stillframe.manifest import FileEntry, Manifest, TensorEntry
from stillframe.names import CHECKPOINT_PART, EXPORT_PART, MANIFEST_NAME, TOGETHER

_PIECE_BYTES = 64 << 20
"""What one thread reads and sums up at a time, so that a single large file occupies all of them."""
_BUFFER_BYTES = 4 << 20
_MAX_THREADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was compared: files, tensors in them, and bytes, all as they were published."""

    path: Path
    files: int
    tensors: int
    bytes_read: int


def verify(directory: str | os.PathLike[str]) -> Verified:
    """Read every byte of a published directory, compare it with `stillframe.json`, and check headers and coverage.

    `directory` is an export, a checkpoint, a snapshot, or `step-<N>` with both in it; no model is needed. Blocks until
    all is read, on up to 8 threads. Links in place of files are not followed.

    Raises CorruptCheckpoint with every file that is missing, of another size or changed, for each the tensor and the
    offset of its first changed range and how many there are; or where files are as published and yet contradict each
    other. NotACheckpoint where there is no manifest, and so nothing to compare with; LoadError for what cannot be read.
    """
    path = Path(directory)
    with open_folder(path) as folder:
        manifest = own_manifest(folder)
        if manifest is None:
            raise NotACheckpoint(f"{path}: has no {MANIFEST_NAME}, which alone says what was published")
        bytes_read = _compare_all(folder, manifest)
        places = [path]
        if manifest.kind == TOGETHER and path.resolve().name not in (EXPORT_PART, CHECKPOINT_PART):
            places = [path / EXPORT_PART, path / CHECKPOINT_PART]
        for place in places:
            _check_form(place)
    return Verified(path=path, files=len(manifest.files), tensors=len(manifest.tensors), bytes_read=bytes_read)


@dataclass(frozen=True, slots=True)
class _Range:
    """Bytes of a file whose checksum is known, those of a tensor, or lies in between (`tensor` ""): an envelope."""

    tensor: str
    offset: int
    length: int
    crc64nvme: str | None


def _compare_all(folder: Folder, manifest: Manifest) -> int:
    by_file: dict[str, list[tuple[str, TensorEntry]]] = defaultdict(list)
    for name, tensor in manifest.tensors.items():
        by_file[tensor.file].append((name, tensor))
    wrong, bytes_read = [], 0
    with _threads() as pool:
        for name, entry in sorted(manifest.files.items()):
            problem = _absence(folder, name, entry)
            if problem is None:
                problem = _change(folder, name, entry, _ranges(folder.path, name, entry, by_file[name]), pool)
                bytes_read += entry.size
            if problem is not None:
                wrong.append(f"{name} {problem}")
    if wrong:
        raise CorruptCheckpoint(
            f"{folder.path}: {len(wrong)} of {len(manifest.files)} files are not what was published: "
            f"{listed(wrong, separator='; ')}. Put them back as they were saved, or use another checkpoint"
        )
    return bytes_read


def _absence(folder: Folder, name: str, entry: FileEntry) -> str | None:
    if not is_inside(name):
        return "is outside of the directory"
    try:
        size = folder.own_size(name)
    except FileNotFoundError:
        return "is missing"
    if size != entry.size:
        return f"{'is truncated' if size < entry.size else 'has grown'}: {size} bytes, published with {entry.size}"
    return None


def _ranges(path: Path, name: str, entry: FileEntry, tensors: Sequence[tuple[str, TensorEntry]]) -> list[_Range]:
    """The file from its first byte to its last."""
    ranges, position = [], 0
    for tensor_name, tensor in sorted(tensors, key=lambda pair: (pair[1].offset, pair[1].size)):
        if tensor.offset < position:
            raise CorruptCheckpoint(
                f"{path / MANIFEST_NAME}: {tensor_name!r} overlaps what is before it in {name!r}, at {tensor.offset}"
            )
        if tensor.offset > position:
            ranges.append(_Range("", position, tensor.offset - position, None))
        ranges.append(_Range(tensor_name, tensor.offset, tensor.size, tensor.crc64nvme))
        position = tensor.offset + tensor.size
    if entry.size > position:
        ranges.append(_Range("", position, entry.size - position, None))
    return ranges


def _change(
    folder: Folder, name: str, entry: FileEntry, ranges: Sequence[_Range], pool: ThreadPoolExecutor
) -> str | None:
    descriptor = folder.open_own_file(name)
    try:
        changed = []
        whole = 0
        for part, found in zip(ranges, _checksums(folder.path / name, descriptor, ranges, pool), strict=True):
            whole = combine_crc64nvme(whole, found, part.length)
            if part.crc64nvme is not None and f"{found:016x}" != part.crc64nvme:
                changed.append(part)
    finally:
        os.close(descriptor)
    if changed:
        first = changed[0]
        more = f", and {len(changed) - 1} more of its tensors" if len(changed) > 1 else ""
        return f"was changed in {first.tensor!r}, bytes {first.offset} to {first.offset + first.length}{more}"
    if f"{whole:016x}" != entry.crc64nvme:
        outside = [part for part in ranges if part.crc64nvme is None]
        begin, end = outside[0].offset, outside[0].offset + outside[0].length
        where = f"bytes {begin} to {end}" if len(outside) == 1 else f"outside of its tensors, from byte {begin} on"
        return f"was changed: {where} do not have the checksum that they were published with"
    return None


def _check_form(place: Path) -> None:
    """An export or a checkpoint holds what its own headers, index or metadata say, and what its manifest says."""
    with open_folder(place) as folder:
        manifest = own_manifest(folder)
        assert manifest is not None, "it is a part of a directory whose manifest was read"
        if METADATA_NAME in manifest.files:
            with open_distcp(place):
                return
        for name in sorted(manifest.files):
            if name.endswith(".safetensors"):
                descriptor = folder.open_own_file(name)
                try:
                    header = read_header(place / name, descriptor, manifest.files[name].size)
                    _check_header(place, name, header, manifest)
                finally:
                    os.close(descriptor)
        if {WEIGHTS_NAME, INDEX_NAME} & manifest.files.keys():
            with open_weights(place):
                return


def _check_header(place: Path, file_name: str, file: WeightFile, manifest: Manifest) -> None:
    folder = file_name[: file_name.rfind("/") + 1]  # that of an adapter; the manifest has its tensors with it
    described = {folder + tensor.name: (tensor.file_offset, tensor.length_bytes) for tensor in file.tensors}
    published = {n: (e.offset, e.size) for n, e in manifest.tensors.items() if e.file == file_name}
    for name in sorted(described.keys() | published.keys()):
        if described.get(name) != published.get(name):
            raise CorruptCheckpoint(
                f"{file.path}: {name!r} is at (offset, bytes) {described.get(name)} by its header, and "
                f"{published.get(name)} by {place / MANIFEST_NAME}"
            )


def verify_tensors(directory: Path, files: Sequence[WeightFile], names: Collection[str]) -> None:
    """Read the tensors of these `names` whole, on up to 8 threads, and compare them with what was published.

    Raises NotACheckpoint where there is no manifest to compare with, CorruptCheckpoint with all that were changed.
    """
    wrong = []
    with _threads() as pool:
        for file in files:
            if file.checksums is None:
                raise NotACheckpoint(f"{directory}: has no {MANIFEST_NAME}, so there is nothing to verify it with")
            ranges = [
                _Range(tensor.name, tensor.file_offset, tensor.length_bytes, file.checksums.get(tensor.name))
                for tensor in file.tensors
                if tensor.name in names
            ]
            found = _checksums(file.path, file.descriptor, ranges, pool)
            wrong += [
                f"{part.tensor!r}, bytes {part.offset} to {part.offset + part.length} of {file.path.name}"
                for part, crc in zip(ranges, found, strict=True)
                if f"{crc:016x}" != part.crc64nvme
            ]
    if wrong:
        raise CorruptCheckpoint(
            f"{directory}: {len(wrong)} tensors are not what was published: {listed(wrong, separator='; ')}. "
            "Load another checkpoint"
        )


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), "stillframe-verify")


def _checksums(path: Path, descriptor: int, ranges: Sequence[_Range], pool: ThreadPoolExecutor) -> Iterator[int]:
    """The CRC64-NVME of each range, in order."""
    pieces = [
        (part.offset + low, min(_PIECE_BYTES, part.length - low))
        for part in ranges
        for low in range(0, part.length, _PIECE_BYTES)
    ]
    found = pool.map(lambda piece: _checksum(path, descriptor, *piece), pieces)
    for part in ranges:
        crc = 0
        for low in range(0, part.length, _PIECE_BYTES):
            crc = combine_crc64nvme(crc, next(found), min(_PIECE_BYTES, part.length - low))
        yield crc


def _checksum(path: Path, descriptor: int, offset: int, length: int) -> int:
    buffer = memoryview(bytearray(min(_BUFFER_BYTES, length)))
    crc = 0
    for low in range(0, length, _BUFFER_BYTES):
        part = buffer[: min(_BUFFER_BYTES, length - low)]
        read_into(path, descriptor, offset + low, [part])
        crc = crc64nvme(part, crc)
    return crc
