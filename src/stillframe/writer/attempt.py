"""One request from start to receipt: a rank's whole share of one attempt, durable inside its hidden directory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from awscrt.checksums import crc64nvme

from stillframe.receipts import encode_receipt
from stillframe.records import FileReceipt, InlineFile, Receipt, WritePlan, WriteRequest, WrittenExtent
from stillframe.writer.blocks import FileBlocks, cut_blocks
from stillframe.writer.directory import OpenDirectory
from stillframe.writer.files import BLOCK_BYTES, Stopped, WriteMethod, write_files
from stillframe.writer.standing import Slots


class ForeignDirectory(Exception):
    """The directory of the request belongs to another attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CutPlan:
    """A plan and its blocks: what repeated saves of one layout need not work out again."""

    plan: WritePlan
    files: tuple[FileBlocks, ...]


def cut_plan(plan: WritePlan) -> CutPlan:
    """Cut every file of `plan` into blocks; ValueError names the file whose extents are impossible."""
    files = (cut_blocks(share, arena_bytes=plan.arena_bytes, block_bytes=BLOCK_BYTES) for share in plan.files)
    return CutPlan(plan=plan, files=tuple(files))


def total_bytes(plan: WritePlan, request: WriteRequest) -> int:
    """What progress counts up to: the bytes of all extents and inline files."""
    extent_bytes = sum(extent.length_bytes for file in plan.files for extent in file.extents)
    return extent_bytes + sum(len(file.content) for file in request.inline_files)


def write_attempt(
    cut: CutPlan,
    request: WriteRequest,
    arena: memoryview,
    *,
    stop: threading.Event,
    on_progress: Callable[[int], None],
    method: WriteMethod | None = None,
    slots: Slots | None = None,
    on_turn: Callable[[bool], None] | None = None,
) -> Receipt:
    """Write the inline files and all extents of the plan into `request.directory`; blocks until all is durable.

    On return every byte and every name is durable, the receipt file included, which is written last: where it exists,
    the share is whole. `on_progress` is called with each number of bytes as they are written, from any thread. With
    `slots` nothing is written before one is free; `on_turn` hears True when the waiting begins, and False at its end.

    Raises `FileWriteError`, `ForeignDirectory` if the marker is not there, `Stopped` once `stop` is set (there is no
    receipt file then), and ValueError for names that lead out of the directory.
    """
    with OpenDirectory(request.directory) as directory, _turn(slots, stop, on_turn):
        if not directory.has_file(request.marker_name):
            raise ForeignDirectory(
                f"{request.directory} belongs to another attempt, or to none: it has no file {request.marker_name!r}"
            )
        inline_receipts = []
        for file in request.inline_files:
            if stop.is_set():
                raise Stopped
            inline_receipts.append(_write_inline(directory, file))
            on_progress(len(file.content))
        file_receipts = write_files(directory, arena, cut.files, stop=stop, on_progress=on_progress, method=method)
        directory.sync()
        receipt = Receipt(
            kind=request.kind,
            step=request.step,
            attempt=request.attempt,
            rank=cut.plan.rank,
            world_size=cut.plan.world_size,
            layout_digest=cut.plan.layout_digest,
            bytes_written=total_bytes(cut.plan, request),
            files=(*inline_receipts, *file_receipts),
        )
        if stop.is_set():
            raise Stopped
        directory.replace(request.receipt_name, encode_receipt(receipt))
    return receipt


@contextmanager
def _turn(slots: Slots | None, stop: threading.Event, on_turn: Callable[[bool], None] | None) -> Iterator[None]:
    if slots is None:
        yield
        return
    on_turn = on_turn or (lambda waiting: None)
    on_turn(True)
    with slots.turn(stop) as is_ours:
        on_turn(False)
        if not is_ours:
            raise Stopped
        yield


def _write_inline(directory: OpenDirectory, file: InlineFile) -> FileReceipt:
    directory.write_new(file.name, file.content)
    whole = WrittenExtent(file_offset=0, length_bytes=len(file.content), crc64nvme=crc64nvme(file.content))
    return FileReceipt(name=file.name, size_bytes=len(file.content), extents=(whole,))
