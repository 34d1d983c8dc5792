"""Who dies when: the trainer in the middle of a write, the writer in the middle of a write, either while idle."""

from __future__ import annotations

import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from stillframe.receipts import decode_receipt
from stillframe.records import Receipt
from stillframe.writer.client import WriterClient, WriterError
from tests.multirank.held_writers import wait_until
from tests.unit.writer.held_file import HeldFile
from tests.unit.writer.saves import (
    SharedArena,
    check_receipt,
    make_attempt_dir,
    make_request,
    receipt_name,
    wait_for_exit,
    whole_file_plan,
)

# The first file is large enough for direct I/O; the second is where a writer can be held back.
CONTENTS = {"first": bytes(range(256)) * (3 << 12), "second": bytes(range(255, -1, -1)) * (1 << 16)}
PLAN, ARENA = whole_file_plan(CONTENTS)
REPOSITORY_DIR = Path(__file__).parents[2]

# A trainer: it starts a writer, says its pid, and then does what the test says.
TRAINER = """
import os, signal, sys
from pathlib import Path
from stillframe.writer.client import WriterClient
from tests.crash.test_writer_death import ARENA, PLAN
from tests.unit.writer.saves import SharedArena, make_request

client = WriterClient()
arena = SharedArena(ARENA)
client.set_plans([PLAN], arena.fd)
request = make_request(Path(sys.argv[1]), PLAN)
"""


@contextmanager
def trainer(code: str, directory: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run a trainer that does `code` and prints numbers; gives it, and a pidfd of its writer (the first number)."""
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER + code, directory],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY_DIR,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY_DIR), *filter(None, sys.path)])},
    )
    assert process.stdout is not None
    with process:
        pidfd = -1
        try:
            pidfd = os.pidfd_open(int(process.stdout.readline()))
            yield process, pidfd
        finally:
            process.kill()
            if pidfd >= 0:
                os.close(pidfd)


@pytest.fixture
def _adopt_orphans() -> Iterator[None]:
    """Become the parent of processes whose own parent dies, so that their exit status can be seen (prctl(2))."""
    prctl, set_child_subreaper = ctypes.CDLL(None).prctl, 36
    assert prctl(set_child_subreaper, 1, 0, 0, 0) == 0
    yield
    assert prctl(set_child_subreaper, 0, 0, 0, 0) == 0


def check_saved(directory: Path) -> None:
    receipt = decode_receipt((directory / receipt_name(0)).read_bytes())
    check_receipt(receipt, PLAN, CONTENTS)
    for name, content in CONTENTS.items():
        assert (directory / name).read_bytes() == content


def check_ended_well(pidfd: int) -> None:
    """The adopted process ends, and with status 0."""
    wait_for_exit(pidfd)
    ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    assert ended is not None
    assert (ended.si_code, ended.si_status) == (os.CLD_EXITED, 0)


def is_running(pidfd: int) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return not poller.poll(0)


# --- the trainer dies


@pytest.mark.usefixtures("_adopt_orphans")
def test_a_write_in_hand_is_finished_after_the_trainer_was_killed(tmp_path: Path) -> None:
    directory = make_attempt_dir(tmp_path / "attempt")
    code = "print(client.pid, flush=True); client.write(request, timeout_s=60)"
    with HeldFile(directory / "second") as held, trainer(code, directory) as (process, writer):
        held.wait_until_wanted()
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
        assert is_running(writer)
        assert not (directory / receipt_name(0)).exists()
        held.release()
        check_ended_well(writer)
    check_saved(directory)


@pytest.mark.usefixtures("_adopt_orphans")
def test_a_request_that_was_handed_over_is_done_though_the_trainer_dies_before_it_is_read(tmp_path: Path) -> None:
    directory = make_attempt_dir(tmp_path / "attempt")
    code = """
os.kill(client.pid, signal.SIGSTOP)
os.waitpid(client.pid, os.WUNTRACED)
print(client.pid, flush=True)
client.write(request, timeout_s=60, on_progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
"""
    with trainer(code, directory) as (process, writer):
        assert process.wait(60) == -signal.SIGKILL
        assert not (directory / "first").exists()
        signal.pidfd_send_signal(writer, signal.SIGCONT)
        check_ended_well(writer)
    check_saved(directory)


@pytest.mark.usefixtures("_adopt_orphans")
def test_an_idle_writer_ends_with_the_trainer_though_a_data_loader_holds_the_connection_open(tmp_path: Path) -> None:
    code = """
loader_pid = os.fork()
if loader_pid == 0:
    signal.pause()
print(client.pid, flush=True)
print(loader_pid, flush=True)
signal.pause()
"""
    with trainer(code, tmp_path) as (process, writer):
        assert process.stdout is not None
        loader_pid = int(process.stdout.readline())
        try:
            process.kill()
            process.wait(60)
            check_ended_well(writer)
            assert Path(f"/proc/{loader_pid}").exists()
        finally:
            os.kill(loader_pid, signal.SIGKILL)
            os.waitpid(loader_pid, 0)


def test_a_forked_process_that_ends_does_not_hang_up_for_the_trainer(tmp_path: Path) -> None:
    directory = make_attempt_dir(tmp_path / "attempt")
    code = """
print(client.pid, flush=True)
loader_pid = os.fork()
if loader_pid == 0:
    sys.exit(0)
assert os.waitpid(loader_pid, 0)[1] == 0
client.write(request, timeout_s=60)
client.close()
"""
    with trainer(code, directory) as (process, _):
        assert process.wait(60) == 0
    check_saved(directory)


# --- the writer dies, or should


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return make_attempt_dir(tmp_path / "attempt")


@contextmanager
def held_write(
    client: WriterClient,
    directory: Path,
    *,
    timeout_s: float = 60.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[HeldFile, Future[Receipt]]]:
    """A write, waited for in another thread, that has got to its second file and is held there."""
    with SharedArena(ARENA) as arena:
        client.set_plans([PLAN], arena.fd)
    with HeldFile(directory / "second") as held, ThreadPoolExecutor(1) as background:
        request = make_request(directory, PLAN)
        write = background.submit(client.write, request, timeout_s=timeout_s, on_progress=on_progress)
        held.wait_until_wanted()
        yield held, write


def check_unusable(client: WriterClient, directory: Path, how_it_ended: str) -> None:
    """The process is gone, left no receipt, and the client says at once how it ended."""
    assert not client.alive
    assert not (directory / receipt_name(0)).exists()
    with pytest.raises(WriterError, match=how_it_ended) as caught:
        client.write(make_request(directory, PLAN), timeout_s=3600)
    assert caught.value.kind == "died"


def test_a_killed_writer(directory: Path) -> None:
    with WriterClient() as client, held_write(client, directory) as (_, write):
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(
            WriterError, match=r"was killed by SIGKILL; if nobody sent that, .* memory ran out"
        ) as caught:
            write.result(60)
        assert caught.value.kind == "died"
        check_unusable(client, directory, "was killed by SIGKILL")


@pytest.mark.usefixtures("_adopt_orphans")
def test_a_write_outlives_what_ends_every_process_of_the_job(tmp_path: Path) -> None:
    """As a scheduler does it: a signal to each, the trainer too, which here heeds it. Then again, to who is left."""
    directory = make_attempt_dir(tmp_path / "attempt")
    code = "print(client.pid, flush=True); client.write(request, timeout_s=60)"
    with HeldFile(directory / "second") as held, trainer(code, directory) as (process, writer):
        held.wait_until_wanted()
        for pidfd_or_trainer in (writer, process, writer):
            if isinstance(pidfd_or_trainer, int):
                signal.pidfd_send_signal(pidfd_or_trainer, signal.SIGTERM)
            else:
                pidfd_or_trainer.terminate()
                assert pidfd_or_trainer.wait(60) == -signal.SIGTERM
        assert is_running(writer)
        held.release()
        check_ended_well(writer)
    check_saved(directory)


@pytest.mark.usefixtures("_adopt_orphans")
def test_a_write_in_hand_goes_on_no_longer_than_the_trainer_would_have_waited(tmp_path: Path) -> None:
    directory = make_attempt_dir(tmp_path / "attempt")
    code = """
print(client.pid, flush=True)
client.write(request, timeout_s=0.001, on_progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
"""
    with HeldFile(directory / "second") as held, trainer(code, directory) as (process, writer):
        held.wait_until_wanted()
        process.wait(60)
        pid = int(re.findall(r"^Pid:\s*(\d+)", Path(f"/proc/self/fdinfo/{writer}").read_text(), re.MULTILINE)[0])
        before = switches(pid)
        wait_until(lambda: switches(pid) > before + 2, "the main thread has looked at the clock since")
        assert is_running(writer)
        held.release()
        check_ended_well(writer)
    assert not (directory / receipt_name(0)).exists()


def switches(pid: int) -> int:
    """How often the main thread has begun to wait."""
    status = Path(f"/proc/{pid}/task/{pid}/status").read_text()
    return int(re.findall(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.MULTILINE)[0])


def test_a_write_is_stopped_between_two_blocks_where_closing_does_not_wait_for_it(directory: Path) -> None:
    with WriterClient() as client, held_write(client, directory) as (held, write), ThreadPoolExecutor(1) as closer:
        closing = closer.submit(client.close, timeout_s=0.1)
        with pytest.raises(TimeoutError):  # the first of its two messages has been sent, and the second soon is
            closing.result(1)
        held.release()
        with pytest.raises(WriterError, match="the writer was told to stop"):
            write.result(60)
        closing.result(60)
        assert not client.alive
    assert not (directory / receipt_name(0)).exists()


def test_a_silent_writer_is_killed(directory: Path) -> None:
    with WriterClient(heartbeat_timeout_s=1.5) as client, held_write(client, directory) as (_, write):
        os.kill(client.pid, signal.SIGSTOP)
        with pytest.raises(WriterError, match=r"did not give a sign of life within 1.5 s and was killed") as caught:
            write.result(60)
        assert caught.value.kind == "timeout"
        check_unusable(client, directory, "was killed by SIGKILL")


def test_a_writer_that_waits_for_its_disk_still_gives_signs_of_life(directory: Path) -> None:
    reports: list[int] = []
    three_alike = threading.Event()

    def note(done_bytes: int, _total_bytes: int) -> None:
        reports.append(done_bytes)
        if reports.count(done_bytes) == 3:
            three_alike.set()

    with WriterClient() as client, held_write(client, directory, on_progress=note) as (held, write):
        assert three_alike.wait(60)
        held.release()
        check_receipt(write.result(60), PLAN, CONTENTS)
    check_saved(directory)


def test_a_writer_that_is_late_is_killed(directory: Path) -> None:
    with WriterClient() as client, held_write(client, directory, timeout_s=3) as (_, write):
        reason = rf"did not write more than \d+ of {sum(map(len, CONTENTS.values()))} bytes within 3 s and was killed"
        with pytest.raises(WriterError, match=reason) as caught:
            write.result(60)
        assert caught.value.kind == "timeout"
        check_unusable(client, directory, "was killed by SIGKILL")


def test_close_kills_a_writer_that_neither_ends_nor_stops(directory: Path) -> None:
    with WriterClient(signal_timeout_s=0.2) as client, held_write(client, directory) as (_, write):
        client.close(timeout_s=0.1)
        assert not client.alive
        with pytest.raises(WriterError, match="was killed by SIGKILL"):
            write.result(60)
        assert not (directory / receipt_name(0)).exists()


def test_close_of_a_writer_that_is_dead_already(directory: Path) -> None:
    client = WriterClient()
    os.kill(client.pid, signal.SIGKILL)
    client.close()
    assert not client.alive
