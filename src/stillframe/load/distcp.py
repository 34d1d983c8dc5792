"""A `torch.distributed.checkpoint` directory, opened and checked: `open_distcp`.

What stillframe published and what stock `dcp.save` wrote are read alike. Where there is a manifest, it must agree with
`.metadata` and with the files, and what is read is checked against it.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from awscrt.checksums import crc64nvme

from stillframe import names
from stillframe.errors import CorruptCheckpoint, LoadError, ModelMismatch, NotACheckpoint
from stillframe.load.filling import fill_targets
from stillframe.load.folder import MAX_SMALL_BYTES, Folder, is_inside, listed, open_folder, read_fully, read_whole
from stillframe.load.local import local_part
from stillframe.load.metadata import (
    METADATA_NAME,
    Blob,
    StoredMetadata,
    StoredState,
    chunk_name,
    parse_metadata,
)
from stillframe.manifest import Manifest, decode_manifest
from stillframe.tree import KeyPath

_MAX_OPEN_FILES = 64
_OF_RANK = re.compile(r"__(\d+)_\d+\.distcp")


class DistcpDirectory:
    """An open, checked directory; made by `open_distcp`.

    `tensors`: what is stored under which key. `objects`: the keys of what is no tensor. `paths`: for every key its way
    through the nested state. `manifest`: None where stillframe did not publish the directory.
    """

    def __init__(self, folder: Folder, metadata: StoredMetadata, manifest: Manifest | None) -> None:
        self.path = folder.path
        self.manifest = manifest
        self.tensors: Mapping[str, StoredState] = metadata.tensors
        self.objects = frozenset(metadata.objects)
        self.paths: Mapping[str, KeyPath] = metadata.paths
        self._folder = folder
        self._blobs = metadata.objects
        self._tensor_files = {chunk.blob.file for state in metadata.tensors.values() for chunk in state.chunks}
        self._files: OrderedDict[str, int] = OrderedDict()
        self._checked: tuple[str, bytes] | None = None

    def differences(self, targets: Mapping[str, torch.Tensor], *, partial: bool = False) -> str:
        """Every difference between the directory and `targets`, in one text of bounded length; empty if there is none.

        `partial`: tensors of the directory that `targets` does not have are none.
        """
        missing = sorted(targets.keys() - self.tensors.keys())
        unexpected = [] if partial else sorted(self.tensors.keys() - targets.keys())
        unfit = [
            f"{key} {reason}"
            for key in sorted(targets.keys() & self.tensors.keys())
            if (reason := _unfit(self.tensors[key], targets[key]))
        ]
        found = []
        if missing:
            found.append(f"{len(missing)} tensors are not in the checkpoint: {listed(missing)}")
        if unexpected:
            found.append(f"{len(unexpected)} tensors of the checkpoint have no place: {listed(unexpected)}")
        if unfit:
            found.append(f"{len(unfit)} do not fit: {listed(unfit)}")
        return "; ".join(found)

    def fill(self, targets: Mapping[str, torch.Tensor], *, verify: bool = True, partial: bool = False) -> int:
        """Read this rank's elements of every target, in place; returns the bytes read; blocks until they are there.

        A target is a DTensor, however it is distributed, or a plain tensor that every rank holds whole; neither number
        nor kind of ranks need be those of the save. Values are bit-identical: nothing is cast. Each rank reads the
        chunks that it needs any part of, without communication, and an error on one rank is not known to the others.
        Extra memory is 4 MiB, plus a chunk that was stored transposed, plus a copy of a target that is not contiguous.

        `verify`: every chunk that this rank needs any part of is checked against the manifest, if there is one; of a
        chunk that is needed in part, the rest is read for that. `partial` as for `differences`.

        Raises ModelMismatch with all differences, or UnsupportedPlacement, before anything is written.
        CorruptCheckpoint or LoadError while reading leave the targets partly filled.
        """
        differences = self.differences(targets, partial=partial)
        if differences:
            raise ModelMismatch(f"{self.path} does not fit: {differences}")
        entries = self.manifest.tensors if self.manifest is not None else None
        return fill_targets(targets, self.tensors, entries, self._open, verify=verify)

    def object(self, key: str) -> object:
        """What is stored under a key that is no tensor's, as `torch.load(weights_only=True)` reads it.

        Raises KeyError for a key that is not in `objects`, CorruptCheckpoint where it cannot be read, or only by
        running code that the file names.
        """
        blob = self._blobs[key]
        if blob.length_bytes > MAX_SMALL_BYTES:
            raise CorruptCheckpoint(
                f"{self.path / blob.file}: {key!r} has {blob.length_bytes} bytes, more than any object needs"
            )
        return _loaded(self._read_object(blob), f"{self.path / blob.file}: {key!r}")

    def rank_state(self, rank: int) -> dict[str, Any]:
        """What only `rank` had when the checkpoint was made; checked as by `read_checked`."""
        name = names.rank_state_name(rank)
        state = _loaded(self.read_checked(name), f"{self.path / name}:")
        if not isinstance(state, dict):
            raise CorruptCheckpoint(f"{self.path / name}: holds a {type(state).__name__} instead of a dictionary")
        return state

    def read_checked(self, name: str) -> bytes:
        """The content of a small file, of the size and checksum that the manifest says, if there is one.

        Raises LoadError where there is no such file, CorruptCheckpoint where it is not what was published.
        """
        path = self.path / name
        try:
            content = read_whole(path, self._folder.open_own_file(name))
        except FileNotFoundError as error:
            raise LoadError(f"{path}: is not there, and was not published with this checkpoint") from error
        if self.manifest is None:
            return content
        entry = self.manifest.files.get(name)
        if entry is None:
            raise CorruptCheckpoint(f"{path}: was not published with this checkpoint; {names.MANIFEST_NAME} has it not")
        _check_content(path, content, entry.size, entry.crc64nvme)
        return content

    def _read_object(self, blob: Blob) -> bytes:
        entry = self.manifest.files.get(blob.file) if self.manifest is not None else None
        if entry is None or entry.size > MAX_SMALL_BYTES or blob.file in self._tensor_files:
            path, descriptor = self._open(blob.file)
            return read_fully(path, descriptor, blob.offset, blob.length_bytes)
        if self._checked is None or self._checked[0] != blob.file:
            self._checked = (blob.file, self.read_checked(blob.file))
        return self._checked[1][blob.offset : blob.offset + blob.length_bytes]

    def _open(self, name: str) -> tuple[Path, int]:
        """Path and descriptor of a file; the descriptor is good until many others have been asked for."""
        path = self.path / name
        if name in self._files:
            self._files.move_to_end(name)
        else:
            if len(self._files) == _MAX_OPEN_FILES:  # a checkpoint of many ranks has more files than a process may open
                os.close(self._files.popitem(last=False)[1])
            try:
                self._files[name] = self._folder.open_own_file(name)
            except FileNotFoundError as error:
                raise LoadError(f"{path}: has been removed since the checkpoint was opened") from error
        return path, self._files[name]

    def _close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


@contextmanager
def open_distcp(directory: Path) -> Iterator[DistcpDirectory]:
    """Open a DCP directory and check that it is whole; usable while the context lasts. Reads no tensor data.

    Raises NotACheckpoint where there is no such directory or it was never published; CorruptCheckpoint where
    `.metadata` is no metadata, carries a foreign class or contradicts itself, files are missing or truncated, or
    `stillframe.json` disagrees with either; LoadError for what cannot be read.
    """
    with open_folder(directory) as folder:
        manifest = _manifest(folder)
        content = _metadata_content(folder)
        path = directory / METADATA_NAME
        if manifest is not None and METADATA_NAME in manifest.files:
            entry = manifest.files[METADATA_NAME]
            _check_content(path, content, entry.size, entry.crc64nvme)
        metadata = parse_metadata(content, path)
        _check_files(folder, metadata, manifest)
        if manifest is not None:
            manifest = _with_aliases(manifest, metadata)
            _check_chunks(directory, metadata, manifest)
        opened = DistcpDirectory(folder, metadata, manifest)
        try:
            yield opened
        finally:
            opened._close()


def _metadata_content(folder: Folder) -> bytes:
    path = folder.path / METADATA_NAME
    try:
        return read_whole(path, folder.open_own_file(METADATA_NAME))
    except FileNotFoundError as error:
        found = sorted(os.listdir(folder.descriptor))  # noqa: PTH208 - a Path cannot list what a descriptor stands for
        hint = f", but {listed(found)}" if found else ""
        if any(name.endswith(".safetensors") for name in found):
            hint = "; it is a Hugging Face directory, which stillframe.load_hf reads"
        elif "checkpoint" in found:
            hint = f"; the checkpoint is in {folder.path / 'checkpoint'}"
        elif any(name.endswith(".distcp") for name in found):
            hint = "; its save never came to an end, or the file was lost. Load another checkpoint"
        raise NotACheckpoint(f"{folder.path}: has no {METADATA_NAME}{hint}") from error


def _manifest(folder: Folder) -> Manifest | None:
    """The manifest of this directory; of one that was published together with an export, its part of both's."""
    content = folder.read_small(names.MANIFEST_NAME)
    if content is not None:
        return decode_manifest(content, folder.path / names.MANIFEST_NAME)
    place = folder.path.resolve()
    published = names.parse_published(place.parent.name)
    if published is None or published[0] != names.TOGETHER:
        return None
    content = folder.read_small(f"../{names.MANIFEST_NAME}")
    if content is None:
        return None
    both = decode_manifest(content, place.parent / names.MANIFEST_NAME)
    prefix = f"{place.name}/"
    return replace(
        both,
        files={name.removeprefix(prefix): entry for name, entry in both.files.items() if name.startswith(prefix)},
        tensors={
            name.removeprefix(prefix): replace(entry, file=entry.file.removeprefix(prefix))
            for name, entry in both.tensors.items()
            if entry.file.startswith(prefix)
        },
    )


def _check_files(folder: Folder, metadata: StoredMetadata, manifest: Manifest | None) -> None:
    """Every file is there, of the size it was published with, and no item reaches beyond the end of its file."""
    items = [(key, chunk.blob) for key, state in metadata.tensors.items() for chunk in state.chunks]
    items += list(metadata.objects.items())
    last: dict[str, tuple[int, str]] = {}  # of each file the item that ends last
    for key, blob in items:
        end = blob.offset + blob.length_bytes
        if end > last.get(blob.file, (-1, ""))[0]:
            last[blob.file] = (end, key)
    published = manifest.files if manifest is not None else {}
    wrong = []
    for name in sorted({*last, *published}):
        if not is_inside(name):
            wrong.append(f"{name!r}, which {names.MANIFEST_NAME} lists, is outside of the directory")
            continue
        try:
            size = folder.own_size(name)
        except FileNotFoundError:
            rank = _OF_RANK.fullmatch(name)
            lost = f", which holds what rank {rank[1]} wrote," if rank else ""
            needed = f"; {last[name][1]!r} is in it" if name in last else ""
            wrong.append(f"{name}{lost} is missing{needed}")
            continue
        entry = published.get(name)
        if entry is not None and entry.size != size:
            how = "is truncated" if size < entry.size else "has grown"
            wrong.append(f"{name} {how}: it has {size} bytes, and was published with {entry.size}")
        elif manifest is not None and entry is None:
            wrong.append(f"{name} was not published with this checkpoint, but {last[name][1]!r} is said to be in it")
        elif name in last and size < last[name][0]:
            end, key = last[name]
            wrong.append(f"{name} is truncated: it has {size} bytes, and {key!r} ends at byte {end}")
    if wrong:
        raise CorruptCheckpoint(
            f"{folder.path}: is not whole: {listed(wrong)}. Put back the files as they were saved, or load another "
            "checkpoint"
        )


def _with_aliases(manifest: Manifest, metadata: StoredMetadata) -> Manifest:
    """`manifest` with the chunks of tied tensors under each of their keys: they were written, and are listed, once."""
    chunks = [
        (chunk_name(k, chunk.offsets), chunk.blob) for k, state in metadata.tensors.items() for chunk in state.chunks
    ]
    named = {blob: manifest.tensors[name] for name, blob in chunks if name in manifest.tensors}
    aliases = {name: named[blob] for name, blob in chunks if name not in manifest.tensors and blob in named}
    return replace(manifest, tensors={**manifest.tensors, **aliases}) if aliases else manifest


def _check_chunks(directory: Path, metadata: StoredMetadata, manifest: Manifest) -> None:
    """Manifest and `.metadata` know the same chunks, in the same places."""
    wrong = []
    known = set()
    for key, state in metadata.tensors.items():
        for chunk in state.chunks:
            name = chunk_name(key, chunk.offsets)
            known.add(name)
            entry, blob = manifest.tensors.get(name), chunk.blob
            if entry is None:
                wrong.append(f"{name} is in {METADATA_NAME} only")
            elif entry.size != chunk.elements * state.dtype.itemsize:
                wrong.append(f"{name} has {entry.size} bytes, which {state.dtype} of sizes {chunk.sizes} has not")
            elif entry.file != blob.file or not (
                blob.offset <= entry.offset and entry.offset + entry.size <= blob.offset + blob.length_bytes
            ):
                there = f"bytes {blob.offset} to {blob.offset + blob.length_bytes} of {blob.file}"
                wrong.append(f"{name} is at byte {entry.offset} of {entry.file}, outside of {there}")
    wrong += [f"{n} is in {names.MANIFEST_NAME} only" for n, e in manifest.tensors.items() if e.size and n not in known]
    if wrong:
        raise CorruptCheckpoint(
            f"{directory}: {names.MANIFEST_NAME} and {METADATA_NAME} disagree, so one of them was changed or is of "
            f"another checkpoint: {listed(wrong)}. Load another checkpoint"
        )


def _check_content(path: Path, content: bytes, size: int, crc: str) -> None:
    if len(content) != size:
        how = "is truncated" if len(content) < size else "has grown"
        raise CorruptCheckpoint(f"{path}: {how}: it has {len(content)} bytes, and was published with {size}")
    if (found := f"{crc64nvme(content):016x}") != crc:
        raise CorruptCheckpoint(
            f"{path}: was changed or damaged after it was published: the checksum of bytes 0 to {size} is {found}, not "
            f"{crc}. Load another checkpoint"
        )


def _unfit(stored: StoredState, target: torch.Tensor) -> str | None:
    if stored.shape != tuple(target.shape):
        return f"has shape {stored.shape} in the checkpoint, {tuple(target.shape)} here"
    if stored.dtype != target.dtype:
        return f"is {stored.dtype} in the checkpoint, {target.dtype} here"
    if local_part(target).device.type == "meta":
        return "is on the meta device, which holds no values"
    return None


def _loaded(content: bytes, where: str) -> object:
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error)
        raise CorruptCheckpoint(
            f"{where} is refused: reading it would run code that the file names, or it is damaged: {reason[:500]}"
        ) from error
    except Exception as error:  # of bytes that are no such file, torch.load raises anything
        raise CorruptCheckpoint(
            f"{where} is nothing that torch.save wrote: {type(error).__name__}: {str(error)[:500]}"
        ) from error
