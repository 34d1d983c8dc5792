"""A `torch.distributed.checkpoint` directory, opened and checked: `open_distcp`.

What stillframe published and what stock `dcp.save` wrote are read alike. Where there is a manifest, it must agree with
`.metadata` and with the files, and what is read is checked against it.
"""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stillframe import names
from stillframe.errors import CorruptCheckpoint, LoadError, ModelMismatch
from stillframe.load.checking import (
    check_chunks,
    check_content,
    check_files,
    metadata_content,
    own_manifest,
    with_aliases,
)
from stillframe.load.filling import Limits, fill_targets
from stillframe.load.folder import MAX_SMALL_BYTES, Folder, listed, open_folder, read_fully, read_whole
from stillframe.load.local import local_part
from stillframe.load.metadata import (
    METADATA_NAME,
    Blob,
    StoredMetadata,
    StoredState,
    parse_metadata,
)
from stillframe.manifest import Manifest
from stillframe.tree import KeyPath

_LIMITS = Limits()
_MAX_OPEN_FILES = 64


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

    def fill(
        self,
        targets: Mapping[str, torch.Tensor],
        *,
        verify: bool = True,
        partial: bool = False,
        limits: Limits = _LIMITS,
    ) -> int:
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
        return fill_targets(targets, self.tensors, entries, self._open, verify=verify, limits=limits)

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
        check_content(path, content, entry.size, entry.crc64nvme)
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
        manifest = own_manifest(folder)
        content = metadata_content(folder)
        path = directory / METADATA_NAME
        if manifest is not None and METADATA_NAME in manifest.files:
            entry = manifest.files[METADATA_NAME]
            check_content(path, content, entry.size, entry.crc64nvme)
        metadata = parse_metadata(content, path)
        check_files(folder, metadata, manifest)
        if manifest is not None:
            manifest = with_aliases(manifest, metadata)
            check_chunks(directory, metadata, manifest)
        opened = DistcpDirectory(folder, metadata, manifest)
        try:
            yield opened
        finally:
            opened._close()


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
        reason = str(error.__context__ or error)  # torch's own advice around the reason is to execute the file
        raise CorruptCheckpoint(
            f"{where} is refused: reading it would run code that the file names, or it is damaged: {reason[:500]}"
        ) from error
    except Exception as error:  # of bytes that are no such file, torch.load raises anything
        raise CorruptCheckpoint(
            f"{where} is nothing that torch.save wrote: {type(error).__name__}: {str(error)[:500]}"
        ) from error
