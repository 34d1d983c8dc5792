"""Every kind of failed system call in the writer process, injected by strace into the real one; and their order."""

from __future__ import annotations

import errno
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from stillframe.receipts import decode_receipt
from stillframe.writer.client import WriterClient, WriterError
from tests.unit.writer.saves import (
    SharedArena,
    check_receipt,
    make_attempt_dir,
    make_request,
    receipt_name,
    whole_file_plan,
)

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")

CONTENTS = {"first": bytes(range(256)) * (3 << 13), "sub/second": b"small"}
INLINE = {"config.json": b"{}"}
PLAN, ARENA = whole_file_plan(CONTENTS)


@pytest.fixture
def client() -> Iterator[WriterClient]:
    with WriterClient() as started, SharedArena(ARENA) as arena:
        started.set_plans([PLAN], arena.fd)
        yield started


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return make_attempt_dir(tmp_path / "attempt")


@contextmanager
def strace(pid: int, log_path: Path, *options: str) -> Iterator[None]:
    """Trace a process and its threads, present and future, from the yield on."""
    command = ["strace", "-f", "-y", "-o", str(log_path), *options, "-p", str(pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with tracer:
        assert tracer.stderr is not None
        said = tracer.stderr.readline()
        if "Operation not permitted" in said:
            tracer.wait(30)
            pytest.skip(f"tracing is not permitted here: {said.strip()}")
        assert "attached" in said
        try:
            yield
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.communicate(timeout=30)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`call` on `path` (in the attempt's directory) fails with `error`, and `reason` is what the trainer is told."""

    path: str
    call: str
    error: str
    reason: str
    when: str = "1+"

    def options(self, directory: Path) -> list[str]:
        return ["-P", str(directory / self.path), "-e", f"inject={self.call}:error={self.error}:when={self.when}"]


RENAMES = "rename,renameat,renameat2"
RECEIPT_NAME_NOT_SYNCED = Fault(
    path=".stillframe", call="fsync", error="EIO", reason="fsync of the directory '.stillframe' failed: ", when="2"
)
FATAL = [
    Fault(path="first", call="fsync", error="EIO", reason="fsync of 'first' failed: Input/output error (EIO)"),
    Fault(path="sub/second", call="fsync", error="EIO", reason="fsync of 'sub/second' failed: "),
    Fault(
        path="config.json", call="fsync", error="EDQUOT", reason="fsync of 'config.json' failed: Disk quota exceeded"
    ),
    Fault(path=".", call="fsync", error="EIO", reason="fsync of the directory '{directory}' failed: "),
    Fault(path="sub", call="fsync", error="EIO", reason="fsync of the directory 'sub' failed: "),
    RECEIPT_NAME_NOT_SYNCED,
    Fault(path="first", call="pwrite64", error="EIO", reason="writing 4194304 bytes at offset "),
    Fault(path="first", call="pwrite64", error="ENOSPC", reason="of 'first' failed: No space left on device (ENOSPC)"),
    Fault(path="first", call="pwrite64", error="EINVAL", reason="of 'first' failed: Invalid argument (EINVAL)"),
    Fault(
        path="sub/second", call="pwrite64", error="EIO", reason="writing 5 bytes at offset 0 of 'sub/second' failed: "
    ),
    Fault(
        path="config.json", call="pwrite64", error="EIO", reason="writing 2 bytes at offset 0 of 'config.json' failed"
    ),
    Fault(
        path="first", call="fallocate", error="ENOSPC", reason="allocating 6291456 bytes for 'first' failed: No space"
    ),
    Fault(path="first", call="close", error="EIO", reason="closing 'first' failed: "),
    Fault(
        path=".stillframe", call=RENAMES, error="EIO", reason="into place as '.stillframe/receipt-00000.json' failed"
    ),
]
BEARABLE = [
    # No preallocation, an interrupted one, no direct I/O for such blocks, no fsync of directories.
    Fault(path="first", call="fallocate", error="EOPNOTSUPP", reason=""),
    Fault(path="first", call="fallocate", error="EINTR", reason="", when="1"),
    Fault(path="first", call="pwrite64", error="EINVAL", reason="", when="1"),
    Fault(path=".", call="fsync", error="EINVAL", reason=""),
]


def describe(fault: Fault) -> str:
    return f"{fault.call.partition(',')[0]}-{fault.path}-{fault.error}"


@pytest.mark.parametrize("fault", FATAL, ids=describe)
def test_a_fault_is_reported_and_the_next_save_works(
    client: WriterClient, directory: Path, tmp_path: Path, fault: Fault
) -> None:
    log_path = tmp_path / "strace.log"
    with strace(client.pid, log_path, *fault.options(directory)), pytest.raises(WriterError) as caught:
        client.write(make_request(directory, PLAN, INLINE), timeout_s=60)
    assert "(INJECTED)" in log_path.read_text()
    assert caught.value.kind == "failed"
    assert caught.value.errno == getattr(errno, fault.error)
    assert fault.reason.format(directory=directory) in caught.value.reason
    # All that a receipt states is durable before it has its name, so one whose name may not last is true all the same.
    assert (directory / receipt_name(0)).exists() == (fault is RECEIPT_NAME_NOT_SYNCED)
    another = make_attempt_dir(tmp_path / "another")
    check_receipt(client.write(make_request(another, PLAN, INLINE), timeout_s=60), PLAN, CONTENTS | INLINE)


@pytest.mark.parametrize("fault", BEARABLE, ids=describe)
def test_what_a_file_system_cannot_do_is_done_otherwise(
    client: WriterClient, directory: Path, tmp_path: Path, fault: Fault
) -> None:
    log_path = tmp_path / "strace.log"
    with strace(client.pid, log_path, *fault.options(directory)):
        receipt = client.write(make_request(directory, PLAN, INLINE), timeout_s=60)
    assert "(INJECTED)" in log_path.read_text()
    check_receipt(receipt, PLAN, CONTENTS | INLINE)
    for name, content in CONTENTS.items():
        assert (directory / name).read_bytes() == content


# --- the order of what makes a save durable


@dataclass(frozen=True, kw_only=True)
class Call:
    """A system call on a file, from the line where it began to the line where it ended."""

    name: str
    path: str
    began: int
    ended: int


def read_calls(log_path: Path, directory: Path) -> list[Call]:
    calls, unfinished = [], {}
    for number, line in enumerate(log_path.read_text().splitlines()):
        thread = line.split()[0]
        if "resumed>" in line:
            name, path, began = unfinished.pop(thread)
        elif match := re.search(r" (\w+)\(\d+<([^>]*)>", line):
            name, path, began = match[1], match[2].removeprefix(f"{directory}/"), number
        else:
            continue
        if "<unfinished" in line:
            unfinished[thread] = (name, path, began)
        else:
            calls.append(Call(name=name, path=path, began=began, ended=number))
    assert not unfinished
    return calls


def test_all_is_synced_before_the_receipt_appears_and_nothing_after_its_own_sync(
    client: WriterClient, directory: Path, tmp_path: Path
) -> None:
    log_path = tmp_path / "strace.log"
    with strace(client.pid, log_path, "-e", f"trace=pwrite64,fallocate,ftruncate,fsync,mkdirat,{RENAMES}"):
        client.write(make_request(directory, PLAN, INLINE), timeout_s=60)
    assert decode_receipt((directory / receipt_name(0)).read_bytes())
    calls = read_calls(log_path, directory)
    (rename,) = (call for call in calls if call.name in RENAMES.split(","))
    temporary_receipt = f"{receipt_name(0)}.{client.pid}.tmp"
    written_files = {call.path for call in calls if call.name == "pwrite64"}
    assert written_files == {*CONTENTS, *INLINE, temporary_receipt}
    last_data_sync = 0
    for path in written_files:
        (sync,) = (call for call in calls if call.name == "fsync" and call.path == path)
        for call in calls:
            if call.path == path and call.name != "fsync":
                assert call.ended < sync.began
        assert sync.ended < rename.began
        if path != temporary_receipt:
            last_data_sync = max(last_data_sync, sync.ended)
    # The names: new files in both directories before the receipt, the receipt's own after its rename.
    for path in ("sub", str(directory)):
        (sync,) = (call for call in calls if call.name == "fsync" and call.path == path)
        assert last_data_sync < sync.began
        assert sync.ended < rename.began
    (sync,) = (
        call for call in calls if call.name == "fsync" and call.path == ".stillframe" and call.began > rename.ended
    )
    assert sync is calls[-1]
