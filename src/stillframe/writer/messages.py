"""Records <-> JSON-compatible objects, for frames and for the receipt file.

Extents are flat lists, for a plan may hold 100,000 of them; CRCs are 16 hexadecimal digits, for JSON readers other than
Python's round integers beyond 2^53. Whatever is decoded is checked: anything not whole raises ValueError.

The receipt file is one line of JSON, `{"format":"stillframe-receipt/1","crc64nvme":"<16 digits>","body":{...}}` and a
newline. The CRC64-NVME is that of the bytes of the body, so a torn, altered or foreign file is known as such.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from awscrt.checksums import crc64nvme

from stillframe.records import (
    Extent,
    FileReceipt,
    FileShare,
    InlineFile,
    Receipt,
    WritePlan,
    WriteRequest,
    WrittenExtent,
)

_RECEIPT_FILE = re.compile(
    rb'\{"format":"stillframe-receipt/1","crc64nvme":"([0-9a-f]{16})","body":(\{.*\})\}\n', re.DOTALL
)


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
        plan_id=_integer(data, "plan_id"),
        rank=_integer(data, "rank"),
        world_size=_integer(data, "world_size"),
        layout_digest=_text(data, "layout_digest"),
        arena_bytes=_integer(data, "arena_bytes"),
        files=tuple(
            FileShare(
                name=_text(file, "name"),
                size_bytes=_integer(file, "size_bytes"),
                extents=tuple(
                    Extent(file_offset=file_offset, arena_offset=arena_offset, length_bytes=length_bytes)
                    for file_offset, arena_offset, length_bytes in _groups_of_three(file, "extents", (int, int, int))
                ),
            )
            for file in _list(data, "files")
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
    for file in _list(data, "inline_files"):
        stop = start + _integer(file, "size_bytes")
        inline_files.append(InlineFile(name=_text(file, "name"), content=blob[start:stop]))
        start = stop
    if start != len(blob):
        raise ValueError(f"inline files of {start} bytes came with a blob of {len(blob)} bytes")
    return WriteRequest(
        plan_id=_integer(data, "plan_id"),
        kind=_text(data, "kind"),
        step=_integer(data, "step"),
        attempt=_text(data, "attempt"),
        directory=Path(_text(data, "directory")),
        marker_name=_text(data, "marker_name"),
        receipt_name=_text(data, "receipt_name"),
        inline_files=tuple(inline_files),
    )


def receipt_to_object(receipt: Receipt) -> dict[str, Any]:
    return {
        "kind": receipt.kind,
        "step": receipt.step,
        "attempt": receipt.attempt,
        "rank": receipt.rank,
        "world_size": receipt.world_size,
        "layout_digest": receipt.layout_digest,
        "bytes_written": receipt.bytes_written,
        "files": [
            {
                "name": file.name,
                "size_bytes": file.size_bytes,
                "extents": [
                    value
                    for extent in file.extents
                    for value in (extent.file_offset, extent.length_bytes, f"{extent.crc64nvme:016x}")
                ],
            }
            for file in receipt.files
        ],
    }


def receipt_from_object(data: Any) -> Receipt:
    """The receipt that `receipt_to_object` made this of; ValueError if it is none."""
    return Receipt(
        kind=_text(data, "kind"),
        step=_integer(data, "step"),
        attempt=_text(data, "attempt"),
        rank=_integer(data, "rank"),
        world_size=_integer(data, "world_size"),
        layout_digest=_text(data, "layout_digest"),
        bytes_written=_integer(data, "bytes_written"),
        files=tuple(
            FileReceipt(
                name=_text(file, "name"),
                size_bytes=_integer(file, "size_bytes"),
                extents=tuple(
                    WrittenExtent(file_offset=file_offset, length_bytes=length_bytes, crc64nvme=_crc(crc))
                    for file_offset, length_bytes, crc in _groups_of_three(file, "extents", (int, int, str))
                ),
            )
            for file in _list(data, "files")
        ),
    )


def encode_receipt(receipt: Receipt) -> bytes:
    """The content of a receipt file."""
    body = json.dumps(receipt_to_object(receipt), separators=(",", ":")).encode("ascii")
    return b'{"format":"stillframe-receipt/1","crc64nvme":"%016x","body":%s}\n' % (crc64nvme(body), body)


def decode_receipt(content: bytes) -> Receipt:
    """The receipt in the content of a receipt file; ValueError, which says what is wrong, if it is not whole."""
    match = _RECEIPT_FILE.fullmatch(content)
    if match is None:
        raise ValueError(
            f"not a whole stillframe-receipt/1 file: {len(content)} bytes that start with {content[:40]!r}"
        )
    expected, body = match.group(1).decode("ascii"), match.group(2)
    found = f"{crc64nvme(body):016x}"
    if found != expected:
        raise ValueError(f"receipt was altered or torn: the CRC64-NVME of its body is {found}, it says {expected}")
    return receipt_from_object(json.loads(body))


def _integer(data: Any, key: str) -> int:
    value = _value(data, key)
    if type(value) is not int or value < 0:
        raise ValueError(f"{key!r} should be a whole number, and is {value!r:.60}")
    return value


def _text(data: Any, key: str) -> str:
    value = _value(data, key)
    if not isinstance(value, str):
        raise ValueError(f"{key!r} should be text, and is {value!r:.60}")
    return value


def _list(data: Any, key: str) -> list[Any]:
    value = _value(data, key)
    if not isinstance(value, list):
        raise ValueError(f"{key!r} should be a list, and is {value!r:.60}")
    return value


def _value(data: Any, key: str) -> Any:
    if not isinstance(data, dict) or key not in data:
        raise ValueError(f"{key!r} is missing")
    return data[key]


def _groups_of_three(data: Any, key: str, types: tuple[type, type, type]) -> list[tuple[Any, Any, Any]]:
    values = _list(data, key)
    if len(values) % 3:
        raise ValueError(f"{key!r} should come in threes, and has {len(values)} values")
    groups = list(zip(values[0::3], values[1::3], values[2::3], strict=True))
    for column, expected in enumerate(types):
        for value in values[column::3]:
            if type(value) is not expected or (isinstance(value, int) and value < 0):
                raise ValueError(f"{key!r} holds {value!r:.60} where it should hold {expected.__name__}")
    return groups


def _crc(digits: str) -> int:
    if re.fullmatch("[0-9a-f]{16}", digits) is None:
        raise ValueError(f"a CRC should be 16 hexadecimal digits, and is {digits!r:.60}")
    return int(digits, 16)
