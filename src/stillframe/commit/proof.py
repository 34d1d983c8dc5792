"""The proof that an attempt is whole: from its plan, all ranks' receipts, and what is on disk. Reads no file's content.

Every byte of every file is in exactly one extent of the receipts; every file has its size on disk. A file of the layout
may be written by any ranks, a small file by rank 0 with the content that the plan says, a rank's own file by that rank.
"""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from awscrt.checksums import combine_crc64nvme

from stillframe import names
from stillframe.commit.plan import AttemptPlan, entry
from stillframe.manifest import FileEntry, TensorEntry
from stillframe.records import FileLayout, Receipt, WrittenExtent


class Doubt(Exception):
    """What keeps an attempt, or what is on disk of it, from counting as whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proven:
    """What a manifest says of its files, by the names that they will have. `balance`: as in the manifest."""

    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    balance: float


def prove(plan: AttemptPlan, plan_content: bytes, receipts: Sequence[Receipt], directory: Path) -> Proven:
    """Raises Doubt, and OSError where `directory` cannot be looked at. `plan_content` is that of the plan's file."""
    _check_receipts(plan, receipts)
    written = _Written(receipts)
    layouts = {file.name: file for file in plan.layout.files}
    inline = {plan.written_name(name): file for name, file in plan.inline_files.items()}
    inline[names.plan_name()] = entry(plan_content)
    rank_files = {name: rank for rank, name in enumerate(plan.layout.rank_files)}
    expected = layouts.keys() | inline.keys() | rank_files.keys()
    if absent := sorted(expected - written.extents.keys()):
        raise Doubt(f"{absent[0]}: no rank wrote any of it")
    if unknown := sorted(written.extents.keys() - expected):
        raise Doubt(f"{unknown[0]}: is written, but is no file of this checkpoint")
    moved = {names.staged_name(name): name for name in plan.held_back}
    files: dict[str, FileEntry] = {}
    tensors: dict[str, TensorEntry] = {}
    for name in sorted(expected):
        ordered = sorted(written.extents[name], key=lambda extent: extent.file_offset)
        if name in rank_files:
            written.prove_alone(name, rank_files[name])
            size = written.sizes[name]
        else:
            size = layouts[name].size_bytes if name in layouts else inline[name].size
        _prove_tiling(name, ordered, size)
        prove_on_disk(directory, name, size, moved_to=moved.get(name))
        crc = f"{_combined(ordered):016x}"
        if name in inline and crc != inline[name].crc64nvme:
            raise Doubt(f"{name}: was written with other content than was asked for")
        if name in layouts:
            tensors.update(_tensor_entries(layouts[name], ordered))
        if name != names.plan_name():
            files[moved.get(name, name)] = FileEntry(size=size, crc64nvme=crc)
    shares = [receipt.bytes_written for receipt in receipts]
    balance = round(max(shares) * len(shares) / max(sum(shares), 1), 4)
    return Proven(files=files, tensors=tensors, balance=balance)


def prove_on_disk(directory: Path, name: str, size: int, *, moved_to: str | None = None) -> None:
    """Raises Doubt if `directory` has no regular file `name` of that size, reached through directories, not links.

    `moved_to` is where it may be already instead: a process that ended while it published had begun to move them.
    """
    status = _status(directory, name)
    if status is None and moved_to is not None and (moved := _status(directory, moved_to)) is not None:
        name, status = moved_to, moved
    if status is None:
        raise Doubt(f"{name}: was written, and is not there any more")
    if not stat.S_ISREG(status.st_mode) or any((directory / parent).is_symlink() for parent in _parents(name)):
        raise Doubt(f"{name}: is not a regular file any more")
    if status.st_size != size:
        raise Doubt(f"{name}: has {status.st_size} bytes on disk, not {size}")


def _status(directory: Path, name: str) -> os.stat_result | None:
    try:
        return (directory / name).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def _check_receipts(plan: AttemptPlan, receipts: Sequence[Receipt]) -> None:
    own = (plan.kind, plan.step, plan.attempt, plan.layout.world_size, plan.layout.digest)
    for rank, receipt in enumerate(receipts):
        said = (receipt.kind, receipt.step, receipt.attempt, receipt.world_size, receipt.layout_digest)
        if receipt.rank != rank or said != own:
            raise Doubt(f"the receipt of rank {rank} is of another attempt: {receipt.rank}, {said}")
    if len(receipts) != plan.layout.world_size:
        raise Doubt(f"{len(receipts)} receipts for {plan.layout.world_size} ranks")


class _Written:
    """What all receipts together say of each file: its extents, its size, and who wrote how many of them."""

    def __init__(self, receipts: Sequence[Receipt]) -> None:
        self.extents: dict[str, list[WrittenExtent]] = defaultdict(list)
        self.sizes: dict[str, int] = {}
        self._counts: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for receipt in receipts:
            for file in receipt.files:
                if self.sizes.setdefault(file.name, file.size_bytes) != file.size_bytes:
                    raise Doubt(f"{file.name}: rank {receipt.rank} knows it with another size than its peers")
                self.extents[file.name].extend(file.extents)
                self._counts[file.name].append((receipt.rank, len(file.extents)))

    def prove_alone(self, name: str, rank: int) -> None:
        """Its size is known from the receipt only, so nobody else may have a say, and it must come in one piece."""
        if self._counts[name] != [(rank, 1)]:
            who = ", ".join(f"rank {r} ({count} extents)" for r, count in self._counts[name])
            raise Doubt(f"{name}: should be written by rank {rank} in one piece, and was by {who}")


def _prove_tiling(name: str, ordered: Sequence[WrittenExtent], size: int) -> None:
    position = 0
    for extent in ordered:
        if extent.file_offset != position:
            what = "written by no rank" if extent.file_offset > position else "written twice"
            low, high = sorted((extent.file_offset, position))
            raise Doubt(f"{name}: bytes {low} to {high} were {what}")
        position += extent.length_bytes
    if position != size:
        raise Doubt(f"{name}: {position} of {size} bytes were written")


def _tensor_entries(file: FileLayout, ordered: Sequence[WrittenExtent]) -> Mapping[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    index = 0
    for item in file.items:
        end = item.file_offset + item.length_bytes
        parts = []
        while index < len(ordered) and ordered[index].file_offset < end:
            parts.append(ordered[index])
            index += 1
        if sum(part.length_bytes for part in parts) != item.length_bytes:
            raise Doubt(f"{file.name}: an extent crosses the border of {item.name or 'the header'}")
        if item.name:
            entries[item.name] = TensorEntry(
                file=file.name,
                offset=item.file_offset,
                size=item.length_bytes,
                crc64nvme=f"{_combined(parts):016x}",
            )
    return entries


def _combined(extents: Sequence[WrittenExtent]) -> int:
    crc = 0
    for extent in extents:
        crc = combine_crc64nvme(crc, extent.crc64nvme, extent.length_bytes)
    return crc
