from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillframe.receipts import decode_receipt, encode_receipt, receipt_from_object, receipt_to_object
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
from stillframe.writer.messages import plan_from_object, plan_to_object, request_from_object, request_to_object

counts = st.integers(0, 2**63 - 1)
names = st.text(st.characters(codec="utf-8"), min_size=1)


@st.composite
def paths(draw: st.DrawFn) -> str:
    """Any path there is on Linux: bytes that are no UTF-8 come as lone surrogates (PEP 383)."""
    return "/" + draw(st.binary(max_size=20)).replace(b"\0", b"").decode("utf-8", "surrogateescape")


plans = st.builds(
    WritePlan,
    plan_id=counts,
    rank=counts,
    world_size=counts,
    layout_digest=st.text(),
    arena_bytes=counts,
    files=st.lists(
        st.builds(
            FileShare,
            name=names,
            size_bytes=counts,
            extents=st.lists(
                st.builds(Extent, file_offset=counts, arena_offset=counts, length_bytes=counts), max_size=4
            ).map(tuple),
        ),
        max_size=3,
    ).map(tuple),
)
requests = st.builds(
    WriteRequest,
    plan_id=counts,
    kind=st.sampled_from(["hf", "checkpoint"]),
    step=counts,
    attempt=st.text(),
    directory=paths().map(Path),
    marker_name=names,
    receipt_name=names,
    inline_files=st.lists(st.builds(InlineFile, name=names, content=st.binary()), max_size=3).map(tuple),
)
receipts = st.builds(
    Receipt,
    kind=st.sampled_from(["hf", "checkpoint"]),
    step=counts,
    attempt=st.text(),
    rank=counts,
    world_size=counts,
    layout_digest=st.text(),
    bytes_written=counts,
    files=st.lists(
        st.builds(
            FileReceipt,
            name=names,
            size_bytes=counts,
            extents=st.lists(
                st.builds(WrittenExtent, file_offset=counts, length_bytes=counts, crc64nvme=st.integers(0, 2**64 - 1)),
                max_size=4,
            ).map(tuple),
        ),
        max_size=3,
    ).map(tuple),
)


def through_json(data: object) -> object:
    return json.loads(json.dumps(data))


@given(plans)
def test_plans_survive_the_wire(plan: WritePlan) -> None:
    assert plan_from_object(through_json(plan_to_object(plan))) == plan


@given(requests)
def test_requests_survive_the_wire(request: WriteRequest) -> None:
    data, blob = request_to_object(request)
    assert request_from_object(through_json(data), blob) == request


@given(receipts)
def test_receipts_survive_the_wire_and_the_file(receipt: Receipt) -> None:
    assert receipt_from_object(through_json(receipt_to_object(receipt))) == receipt
    assert decode_receipt(encode_receipt(receipt)) == receipt


@given(receipts, st.data())
def test_a_receipt_file_with_one_byte_changed_is_refused(receipt: Receipt, data: st.DataObject) -> None:
    content = bytearray(encode_receipt(receipt))
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError, match="receipt"):
        decode_receipt(bytes(content))


@given(receipts, st.data())
def test_a_receipt_file_cut_short_or_continued_is_refused(receipt: Receipt, data: st.DataObject) -> None:
    content = encode_receipt(receipt)
    with pytest.raises(ValueError, match="receipt"):
        decode_receipt(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match="receipt"):
        decode_receipt(content + data.draw(st.binary(min_size=1)))


@given(st.binary())
def test_a_foreign_file_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="not a whole stillframe-receipt/1 file"):
        decode_receipt(content)


def a_receipt() -> Receipt:
    extent = WrittenExtent(file_offset=0, length_bytes=9, crc64nvme=0xAE8B14860A799888)
    return Receipt(
        kind="hf",
        step=1,
        attempt="a",
        rank=0,
        world_size=1,
        layout_digest="d",
        bytes_written=9,
        files=(FileReceipt(name="f", size_bytes=9, extents=(extent,)),),
    )


def test_the_receipt_file_is_json_for_anyone() -> None:
    document = json.loads(encode_receipt(a_receipt()))
    assert document["format"] == "stillframe-receipt/1"
    # The published check value of CRC-64/NVME is that of "123456789".
    assert document["body"]["files"] == [{"name": "f", "size_bytes": 9, "extents": [0, 9, "ae8b14860a799888"]}]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda body: body.pop("step"), "'step' is missing"),
        (lambda body: body.update(step=-1), "'step' should be a whole number"),
        (lambda body: body.update(step=True), "'step' should be a whole number"),
        (lambda body: body.update(attempt=7), "'attempt' should be text"),
        (lambda body: body.update(files={}), "'files' should be a list"),
        (lambda body: body["files"][0]["extents"].pop(), "'extents' should come in threes"),
        (lambda body: body["files"][0].update(extents=[0, None, "0" * 16]), "'extents' holds None"),
        (lambda body: body["files"][0].update(extents=[-1, 9, "0" * 16]), "'extents' holds -1"),
        (lambda body: body["files"][0].update(extents=[0, 9, "0x1"]), "16 hexadecimal digits"),
    ],
)
def test_what_does_not_fit_is_named(change, complaint: str) -> None:  # type: ignore[no-untyped-def]
    body = receipt_to_object(a_receipt())
    change(body)
    with pytest.raises(ValueError, match=complaint):
        receipt_from_object(body)


def test_inline_contents_must_be_all_there() -> None:
    request = WriteRequest(
        plan_id=1,
        kind="hf",
        step=1,
        attempt="a",
        directory=Path("/d"),
        marker_name="m",
        receipt_name="r",
        inline_files=(InlineFile(name="a", content=b"12345"),),
    )
    data, blob = request_to_object(request)
    with pytest.raises(ValueError, match="inline files of 5 bytes came with a blob of 4"):
        request_from_object(data, blob[:-1])
    assert request_from_object(data, blob) == request
