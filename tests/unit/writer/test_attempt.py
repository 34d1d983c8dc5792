from __future__ import annotations

import threading
from pathlib import Path

import pytest

from stillframe.writer.attempt import cut_plan, total_bytes, write_attempt
from stillframe.writer.files import Stopped
from tests.unit.writer.saves import check_receipt, make_attempt_dir, make_request, receipt_name, whole_file_plan

CONTENTS = {"a": bytes(10_000), "b": b"last"}
INLINE = {"x": b"1", "y": b"22"}
PLAN, ARENA = whole_file_plan(CONTENTS)


@pytest.mark.parametrize("at_bytes", [1, 3, 10_003, 10_007], ids=["inline", "all inline", "first file", "last byte"])
def test_whenever_it_is_stopped_there_is_no_receipt(tmp_path: Path, at_bytes: int) -> None:
    directory = make_attempt_dir(tmp_path / "attempt")
    stop = threading.Event()
    done_bytes = [0]

    def count(length_bytes: int) -> None:
        done_bytes[0] += length_bytes
        if done_bytes[0] >= at_bytes:
            stop.set()

    with pytest.raises(Stopped):
        write_attempt(
            cut_plan(PLAN), make_request(directory, PLAN, INLINE), memoryview(ARENA), stop=stop, on_progress=count
        )
    assert done_bytes[0] >= at_bytes
    assert [path.name for path in (directory / ".stillframe").iterdir()] == ["attempt-0a1b"]


def test_progress_adds_up_to_what_the_receipt_says(tmp_path: Path) -> None:
    request = make_request(make_attempt_dir(tmp_path / "attempt"), PLAN, INLINE)
    done: list[int] = []
    receipt = write_attempt(cut_plan(PLAN), request, memoryview(ARENA), stop=threading.Event(), on_progress=done.append)
    check_receipt(receipt, PLAN, CONTENTS | INLINE)
    assert sum(done) == receipt.bytes_written == total_bytes(PLAN, request) == 10_007
    assert (request.directory / receipt_name(0)).exists()
