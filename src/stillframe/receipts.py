"""The receipt file, which a rank's writer leaves beside what it wrote, for whoever publishes it.

It is one line of JSON, `{"format":"stillframe-receipt/1","crc64nvme":"<16 digits>","body":{...}}` and a newline. The
CRC64-NVME is that of the bytes of the body, so a torn, altered or foreign file is known as such.

Extents are flat lists, for there may be 100,000 of them; CRCs are 16 hexadecimal digits, for JSON readers other than
Python's round integers beyond 2^53.
"""

from __future__ import annotations

import json
import re
from typing import Any

from awscrt.checksums import crc64nvme

from stillframe.fields import array, crc64, groups_of_three, integer, text
from stillframe.records import FileReceipt, Receipt, WrittenExtent

_RECEIPT_FILE = re.compile(
    rb'\{"format":"stillframe-receipt/1","crc64nvme":"([0-9a-f]{16})","body":(\{.*\})\}\n', re.DOTALL
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
        kind=text(data, "kind"),
        step=integer(data, "step"),
        attempt=text(data, "attempt"),
        rank=integer(data, "rank"),
        world_size=integer(data, "world_size"),
        layout_digest=text(data, "layout_digest"),
        bytes_written=integer(data, "bytes_written"),
        files=tuple(
            FileReceipt(
                name=text(file, "name"),
                size_bytes=integer(file, "size_bytes"),
                extents=tuple(
                    WrittenExtent(file_offset=file_offset, length_bytes=length_bytes, crc64nvme=crc64(crc))
                    for file_offset, length_bytes, crc in groups_of_three(file, "extents", (int, int, str))
                ),
            )
            for file in array(data, "files")
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
