"""Rank 0's part of an attempt: make the hidden directory, prove from the receipts that it is whole, publish it."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import stat
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from awscrt.checksums import combine_crc64nvme, crc64nvme

from stillframe import durable, names
from stillframe.errors import CheckpointExists, InsufficientSpace, LoadError, SaveFailed
from stillframe.manifest import FileEntry, Manifest, TensorEntry, encode_manifest, read_manifest
from stillframe.records import FileLayout, InlineFile, Layout, Receipt, WrittenExtent

_log = logging.getLogger("stillframe")

_HELD_BACK = "config.json"
"""Written into the work directory, and moved to its place last: without it nobody loads a directory whose weights, of
full size from the start, may still be zeros."""
_STAGED = f"{names.WORK_DIR_NAME}/{_HELD_BACK}"


class Publication:
    """One attempt to publish `layout` as `<run_dir>/<kind>-<step>`, driven by rank 0.

    First `prepare`; then, once all ranks have voted, `publish` or not; `clean_up` in either case.
    """

    def __init__(self, run_dir: Path, layout: Layout, *, kind: str, step: int, attempt: str, overwrite: bool) -> None:
        self._run_dir = run_dir
        self._kind = kind
        self._layout = layout
        self._step = step
        self._attempt = attempt
        self._overwrite = overwrite
        self.final_dir = names.published_path(run_dir, kind, step)
        self.hidden_dir = names.incomplete_path(run_dir, kind, step)
        self._inline_files: dict[str, InlineFile] = {}
        self._fd = -1
        self._published = False

    def __del__(self) -> None:
        self._close()

    @property
    def inside(self) -> Path:
        """The hidden directory that `prepare` made, by its descriptor: whatever has its name now, this is it.

        A rank 0 that was stopped for long may find that another job has retired its directory and made one of its
        own under the same name, which it must not touch.
        """
        return Path(f"/proc/self/fd/{self._fd}")

    def prepare(self, inline_files: Sequence[InlineFile]) -> tuple[InlineFile, ...]:
        """Make the hidden directory, empty but for the attempt's marker; durable on return.

        Returns the `inline_files` under the names by which they must be written for the directory to be published.
        Before anything is made: refuses a step that is published (unless overwriting, and then only what is recognised
        as a checkpoint of that step), and a file system without room. What an earlier attempt at this step left behind
        is removed.
        """
        self._inline_files = {file.name: file for file in map(_while_incomplete, inline_files)}
        self._refuse_existing()
        if self._overwrite:
            self._refuse_lack_of_exchange()
        self._retire_leftovers()
        self._refuse_lack_of_space(sum(len(file.content) for file in inline_files))
        self.hidden_dir.mkdir()
        self._fd = os.open(self.hidden_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        (self.inside / names.WORK_DIR_NAME).mkdir()
        durable.write_file(self.inside / names.marker_name(self._attempt), self._layout.digest.encode())
        durable.fsync_dir(self.inside / names.WORK_DIR_NAME)
        durable.fsync_dir(self.inside)
        durable.fsync_dir(self._run_dir)
        return tuple(self._inline_files.values())

    def _retire_leftovers(self) -> None:
        """Free the hidden name, which an earlier attempt at this step may have left taken.

        A writer of a killed run may still be at work in there: its files go with the renamed directory, and the
        marker of this attempt tells it that the new directory of this name is not its own.
        """
        if not os.path.lexists(self.hidden_dir):
            return
        retired = names.retired_path(self._run_dir, self._kind, self._step, f"{secrets.token_hex(8)}.0")
        try:
            durable.retire(self.hidden_dir, retired)
        except OSError as error:
            if os.path.lexists(self.hidden_dir):
                raise
            # That writer made another file just now, for example. It is no reason to go without this checkpoint.
            _log.warning("what an earlier attempt left cannot be removed, and stays as %s: %s", retired, error)

    def _refuse_existing(self) -> None:
        if not os.path.lexists(self.final_dir):
            return
        if not self._overwrite:
            raise self._failed(CheckpointExists, "it exists already; pass overwrite=True to replace it", "prepare")
        try:
            manifest = read_manifest(self.final_dir)
        except LoadError as error:
            self._refuse_foreign(str(error), error)
        else:
            if self.final_dir.is_symlink():
                self._refuse_foreign("it is a symbolic link", None)
            if (manifest.kind, manifest.step) != (self._kind, self._step):
                self._refuse_foreign(f"its manifest is that of {manifest.kind} step {manifest.step}", None)

    def _refuse_foreign(self, why: str, cause: LoadError | None) -> NoReturn:
        reason = f"it exists and is not a checkpoint of stillframe of that step ({why}); move it away"
        raise self._failed(CheckpointExists, reason, "prepare") from cause

    def _refuse_lack_of_exchange(self) -> None:
        if os.path.lexists(self.final_dir) and not durable.can_exchange(self._run_dir, self._attempt):
            reason = (
                "this file system cannot exchange two directories in one step (renameat2 RENAME_EXCHANGE), so a "
                "published checkpoint cannot be replaced without a moment in which there is none; delete it first"
            )
            raise self._failed(CheckpointExists, reason, "prepare")

    def _refuse_lack_of_space(self, inline_bytes: int) -> None:
        needed = self._layout.total_bytes + inline_bytes
        stat = os.statvfs(self._run_dir)
        free = stat.f_bavail * stat.f_frsize
        if free < needed:
            reason = f"{needed} bytes are needed and {free} are free on the file system of {self._run_dir}"
            raise self._failed(InsufficientSpace, reason, "prepare")

    def publish(
        self,
        receipts: Sequence[Receipt],
        *,
        sequence: int,
        git_commit: str | None,
        versions: Mapping[str, str],
    ) -> None:
        """Prove coverage, write the manifest, rename. Published and durable on return.

        Raises SaveFailed, with nothing published, if the receipts or the files on disk leave any doubt.
        """
        files, tensors = self._prove(receipts)
        if _STAGED in files:
            (self.inside / _STAGED).rename(self.inside / _HELD_BACK)
            files[_HELD_BACK] = files.pop(_STAGED)
        written = [receipt.bytes_written for receipt in receipts]
        manifest = Manifest(
            kind=self._kind,
            step=self._step,
            attempt=self._attempt,
            sequence=sequence,
            world_size=self._layout.world_size,
            layout_digest=self._layout.digest,
            published_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            git_commit=git_commit,
            versions=dict(versions),
            balance=round(max(written) * len(written) / max(sum(written), 1), 4),
            files=files,
            tensors=tensors,
        )
        durable.write_file(self.inside / names.MANIFEST_NAME, encode_manifest(manifest))
        # The manifest proves what the receipts proved; it must be durable before they go (and the config with it).
        durable.fsync_dir(self.inside)
        shutil.rmtree(self.inside / names.WORK_DIR_NAME)
        durable.fsync_dir(self.inside)
        self._refuse_existing()  # it may have appeared, or changed, since `prepare`
        self._claim()
        if self._overwrite and os.path.lexists(self.final_dir):
            durable.exchange(self.hidden_dir, self.final_dir)  # the hidden name now holds what was replaced
        else:
            durable.publish(self.hidden_dir, self.final_dir)
        self._published = True

    def _claim(self) -> None:
        """Move the directory to a name that only this attempt uses, so that what is renamed next is surely its own."""
        shared = self.hidden_dir
        own = names.complete_path(self._run_dir, self._kind, self._step, self._attempt)
        if self._is_own(shared):
            shared.rename(own)
            if self._is_own(own):
                self.hidden_dir = own
                return
            own.rename(shared)  # it changed hands between the look and the rename
        reason = "another job saves this step in the same run directory and has taken over; give each job its own"
        raise self._failed(SaveFailed, reason, "publish")

    def _is_own(self, directory: Path) -> bool:
        try:
            found, own = directory.lstat(), os.fstat(self._fd)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)

    def clean_up(self) -> None:
        """Remove what this attempt leaves: after `publish` the version that was replaced, else what was written."""
        try:
            if self._is_own(self.hidden_dir) or (self._published and os.path.lexists(self.hidden_dir)):
                retired = names.retired_path(self._run_dir, self._kind, self._step, self._attempt)
                durable.retire(self.hidden_dir, retired)
        finally:
            self._close()

    def _close(self) -> None:
        descriptor, self._fd = self._fd, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _prove(self, receipts: Sequence[Receipt]) -> tuple[dict[str, FileEntry], dict[str, TensorEntry]]:
        """Every byte of every file is in exactly one extent of the receipts, and every file has its size on disk."""
        self._check_receipts(receipts)
        extents: dict[str, list[WrittenExtent]] = defaultdict(list)
        sizes: dict[str, int] = {}
        for receipt in receipts:
            for file in receipt.files:
                if sizes.setdefault(file.name, file.size_bytes) != file.size_bytes:
                    raise self._uncovered(f"{file.name}: rank {receipt.rank} knows it with another size than its peers")
                extents[file.name].extend(file.extents)
        layouts = {file.name: file for file in self._layout.files}
        expected = layouts.keys() | self._inline_files.keys()
        if absent := sorted(expected - extents.keys()):
            raise self._uncovered(f"{absent[0]}: no rank wrote any of it")
        if unknown := sorted(extents.keys() - expected):
            raise self._uncovered(f"{unknown[0]}: is written, but is no file of this checkpoint")
        files: dict[str, FileEntry] = {}
        tensors: dict[str, TensorEntry] = {}
        for name in sorted(extents):
            size = layouts[name].size_bytes if name in layouts else len(self._inline_files[name].content)
            ordered = sorted(extents[name], key=lambda extent: extent.file_offset)
            self._prove_tiling(name, ordered, size)
            self._prove_on_disk(name, size)
            crc = _combined(ordered)
            if name in layouts:
                tensors.update(self._tensor_entries(layouts[name], ordered))
            elif crc != crc64nvme(self._inline_files[name].content):
                raise self._uncovered(f"{name}: was written with other content than was asked for")
            files[name] = FileEntry(size=size, crc64nvme=f"{crc:016x}")
        return files, tensors

    def _prove_on_disk(self, name: str, size: int) -> None:
        try:
            status = (self.inside / name).lstat()
        except FileNotFoundError as error:
            raise self._uncovered(f"{name}: was written, and is not there any more") from error
        if not stat.S_ISREG(status.st_mode):
            raise self._uncovered(f"{name}: is not a regular file any more")
        if status.st_size != size:
            raise self._uncovered(f"{name}: has {status.st_size} bytes on disk, not {size}")

    def _check_receipts(self, receipts: Sequence[Receipt]) -> None:
        own = (self._kind, self._step, self._attempt, self._layout.world_size, self._layout.digest)
        for rank, receipt in enumerate(receipts):
            said = (receipt.kind, receipt.step, receipt.attempt, receipt.world_size, receipt.layout_digest)
            if receipt.rank != rank or said != own:
                raise self._uncovered(f"the receipt of rank {rank} is of another attempt: {receipt.rank}, {said}")
        if len(receipts) != self._layout.world_size:
            raise self._uncovered(f"{len(receipts)} receipts for {self._layout.world_size} ranks")

    def _prove_tiling(self, name: str, ordered: Sequence[WrittenExtent], size: int) -> None:
        position = 0
        for extent in ordered:
            if extent.file_offset != position:
                what = "written by no rank" if extent.file_offset > position else "written twice"
                low, high = sorted((extent.file_offset, position))
                raise self._uncovered(f"{name}: bytes {low} to {high} were {what}")
            position += extent.length_bytes
        if position != size:
            raise self._uncovered(f"{name}: {position} of {size} bytes were written")

    def _tensor_entries(self, file: FileLayout, ordered: Sequence[WrittenExtent]) -> dict[str, TensorEntry]:
        entries: dict[str, TensorEntry] = {}
        index = 0
        for item in file.items:
            end = item.file_offset + item.length_bytes
            parts = []
            while index < len(ordered) and ordered[index].file_offset < end:
                parts.append(ordered[index])
                index += 1
            if sum(part.length_bytes for part in parts) != item.length_bytes:
                raise self._uncovered(f"{file.name}: an extent crosses the border of {item.name or 'the header'}")
            if item.name:
                entries[item.name] = TensorEntry(
                    file=file.name,
                    offset=item.file_offset,
                    size=item.length_bytes,
                    crc64nvme=f"{_combined(parts):016x}",
                )
        return entries

    def _uncovered(self, reason: str) -> SaveFailed:
        return self._failed(SaveFailed, reason, "vote")

    def _failed(self, cls: type[SaveFailed], reason: str, stage: str) -> SaveFailed:
        return cls(reason, step=self._step, rank=0, stage=stage, path=self.final_dir)


def _while_incomplete(file: InlineFile) -> InlineFile:
    return replace(file, name=_STAGED) if file.name == _HELD_BACK else file


def _combined(extents: Sequence[WrittenExtent]) -> int:
    crc = 0
    for extent in extents:
        crc = combine_crc64nvme(crc, extent.crc64nvme, extent.length_bytes)
    return crc
