"""Records <-> JSON-compatible objects, for the frames between trainer and writer; the receipt's are in `receipts`.

Extents are flat lists, for a plan may hold 100,000 of them. Whatever is decoded is checked: anything not whole raises
ValueError.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillframe.fields import array, groups_of_three, integer, text
from stillframe.records import Extent, FileShare, InlineFile, WritePlan, WriteRequest


def plan_to_object(plan: WritePlan) -> dict[str, Any]:
    return {
        "plan_id": plan.plan_id,
        "rank": plan.rank,
        "world_size": plan.world_size,
        "layout_digest": plan.layout_digest,
        "arena_bytes": plan.arena_bytes,
        "files": [
            {
                "name": file.name,
                "size_bytes": file.size_bytes,
                "extents": [
                    number
                    for extent in file.extents
                    for number in (extent.file_offset, extent.arena_offset, extent.length_bytes)
                ],
            }
            for file in plan.files
        ],
    }


def plan_from_object(data: Any) -> WritePlan:
    """The plan that `plan_to_object` made this of; ValueError if it is none."""
    return WritePlan(
        plan_id=integer(data, "plan_id"),
        rank=integer(data, "rank"),
        world_size=integer(data, "world_size"),
        layout_digest=text(data, "layout_digest"),
        arena_bytes=integer(data, "arena_bytes"),
        files=tuple(
            FileShare(
                name=text(file, "name"),
                size_bytes=integer(file, "size_bytes"),
                extents=tuple(
                    Extent(file_offset=file_offset, arena_offset=arena_offset, length_bytes=length_bytes)
                    for file_offset, arena_offset, length_bytes in groups_of_three(file, "extents", (int, int, int))
                ),
            )
            for file in array(data, "files")
        ),
    )


def request_to_object(request: WriteRequest) -> tuple[dict[str, Any], bytes]:
    """The request as an object, and the contents of its inline files as one blob."""
    data = {
        "plan_id": request.plan_id,
        "kind": request.kind,
        "step": request.step,
        "attempt": request.attempt,
        "directory": str(request.directory),
        "marker_name": request.marker_name,
        "receipt_name": request.receipt_name,
        "inline_files": [{"name": file.name, "size_bytes": len(file.content)} for file in request.inline_files],
    }
    return data, b"".join(file.content for file in request.inline_files)


def request_from_object(data: Any, blob: bytes) -> WriteRequest:
    """The request that `request_to_object` made this of; ValueError if it is none, or the blob has another length."""
    inline_files = []
    start = 0
    for file in array(data, "inline_files"):
        stop = start + integer(file, "size_bytes")
        inline_files.append(InlineFile(name=text(file, "name"), content=blob[start:stop]))
        start = stop
    if start != len(blob):
        raise ValueError(f"inline files of {start} bytes came with a blob of {len(blob)} bytes")
    return WriteRequest(
        plan_id=integer(data, "plan_id"),
        kind=text(data, "kind"),
        step=integer(data, "step"),
        attempt=text(data, "attempt"),
        directory=Path(text(data, "directory")),
        marker_name=text(data, "marker_name"),
        receipt_name=text(data, "receipt_name"),
        inline_files=tuple(inline_files),
    )
