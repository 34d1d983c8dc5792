"""A writer's place among the others of its host: priorities, slots, pace. With real processes and real locks."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from stillframe.limits import WriterLimits
from stillframe.writer.client import WriterClient, WriterError
from stillframe.writer.files import _Pace
from stillframe.writer.standing import Slots
from tests.unit.writer.held_file import HeldFile
from tests.unit.writer.saves import SharedArena, check_receipt, make_attempt_dir, make_request, whole_file_plan

CONTENTS = {"weights": bytes(range(256)) * 64}
PLAN, ARENA = whole_file_plan(CONTENTS)


@pytest.fixture(autouse=True)
def _own_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other process of this host has anything to do with the slots of a test."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))


@contextmanager
def writer(limits: WriterLimits) -> Iterator[WriterClient]:
    with WriterClient(limits=limits) as client, SharedArena(ARENA) as arena:
        client.set_plans([PLAN], arena.fd)
        yield client


def threads_of(pid: int) -> list[int]:
    return [int(path.name) for path in Path(f"/proc/{pid}/task").iterdir()]


def test_a_writer_and_all_of_its_threads_have_the_priority_that_was_asked_for(tmp_path: Path) -> None:
    with writer(WriterLimits(nice=7, io_class="idle")) as client:
        client.write(make_request(make_attempt_dir(tmp_path), PLAN), timeout_s=60)
        threads = threads_of(client.pid)
        assert len(threads) > 1
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {min(19, own + 7)}
        assert {psutil.Process(thread).ionice().ioclass for thread in threads} == {psutil.IOPRIO_CLASS_IDLE}
        autogroup = Path(f"/proc/{client.pid}/autogroup")
        if autogroup.exists():
            assert autogroup.read_text().split()[-2:] == ["nice", "7"]


def test_without_limits_a_writer_has_the_priority_of_its_trainer() -> None:
    with writer(WriterLimits()) as client:
        assert os.getpriority(os.PRIO_PROCESS, client.pid) == os.getpriority(os.PRIO_PROCESS, 0)
        assert psutil.Process(client.pid).ionice() == psutil.Process().ionice()


def test_a_writer_waits_for_a_slot_and_goes_on_when_one_is_free(tmp_path: Path) -> None:
    limits = WriterLimits(export_slots=1)
    with writer(limits) as first, writer(limits) as second, ThreadPoolExecutor(2) as background:
        held_dir, waiting_dir = make_attempt_dir(tmp_path / "held"), make_attempt_dir(tmp_path / "waiting")
        with HeldFile(held_dir / "weights") as held:
            holding = background.submit(first.write, make_request(held_dir, PLAN), timeout_s=100)
            held.wait_until_wanted()
            reports = _Reports()
            waiting = background.submit(
                second.write, make_request(waiting_dir, PLAN), timeout_s=100, on_progress=reports.note
            )
            reports.wait_for(3)  # alive, and not begun
            assert not (waiting_dir / "weights").exists()
            held.release()
            check_receipt(holding.result(60), PLAN, CONTENTS)
            check_receipt(waiting.result(60), PLAN, CONTENTS)


def test_exports_and_checkpoints_do_not_wait_for_each_other(tmp_path: Path) -> None:
    limits = WriterLimits(export_slots=1, checkpoint_slots=1)
    with writer(limits) as first, writer(limits) as second, ThreadPoolExecutor(1) as background:
        held_dir = make_attempt_dir(tmp_path / "held")
        with HeldFile(held_dir / "weights") as held:
            holding = background.submit(first.write, make_request(held_dir, PLAN), timeout_s=100)
            held.wait_until_wanted()
            request = replace(make_request(make_attempt_dir(tmp_path / "other"), PLAN), kind="checkpoint")
            check_receipt(second.write(request, timeout_s=60), PLAN, CONTENTS)
            held.release()
            holding.result(60)


def test_the_slot_of_a_writer_that_was_killed_is_free(tmp_path: Path) -> None:
    limits = WriterLimits(export_slots=1)
    with writer(limits) as first, writer(limits) as second, ThreadPoolExecutor(1) as background:
        held_dir = make_attempt_dir(tmp_path / "held")
        with HeldFile(held_dir / "weights") as held:
            holding = background.submit(first.write, make_request(held_dir, PLAN), timeout_s=100)
            held.wait_until_wanted()
            os.kill(first.pid, signal.SIGKILL)
            with pytest.raises(WriterError, match="SIGKILL"):
                holding.result(60)
            request = make_request(make_attempt_dir(tmp_path / "other"), PLAN)
            check_receipt(second.write(request, timeout_s=60), PLAN, CONTENTS)


def test_who_waits_too_long_says_for_what_and_has_written_nothing(tmp_path: Path) -> None:
    limits = WriterLimits(export_slots=1)
    slots = Slots(str(tmp_path / "temporary" / f"stillframe-{os.geteuid()}"), "export", 1)
    directory = make_attempt_dir(tmp_path)
    before = set(directory.iterdir())
    with slots.turn(threading.Event()) as is_held, writer(limits) as client:
        assert is_held
        with pytest.raises(WriterError, match=r"it waited for its turn: all write slots of this host were taken"):
            client.write(make_request(directory, PLAN), timeout_s=2.5)
    slots.close()
    assert set(directory.iterdir()) == before


def test_a_writer_that_is_told_to_stop_while_it_waits_for_a_slot_ends(tmp_path: Path) -> None:
    slots = Slots(str(tmp_path / "temporary" / f"stillframe-{os.geteuid()}"), "export", 1)
    with (
        slots.turn(threading.Event()),
        writer(WriterLimits(export_slots=1)) as client,
        ThreadPoolExecutor(1) as background,
    ):
        reports = _Reports()
        request = make_request(make_attempt_dir(tmp_path), PLAN)
        waiting = background.submit(client.write, request, timeout_s=100, on_progress=reports.note)
        reports.wait_for(2)
        client.close(timeout_s=0.1)
        with pytest.raises(WriterError):
            waiting.result(60)
    slots.close()


@pytest.mark.parametrize("way", ["a link", "others may write", "a file"])
def test_slots_that_cannot_be_kept_safely_are_not_kept_and_it_is_logged(
    tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "temporary" / f"stillframe-{os.geteuid()}"
    if way == "a link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    elif way == "a file":
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with caplog.at_level(logging.WARNING), writer(WriterLimits(checkpoint_slots=2)) as client:
        check_receipt(client.write(make_request(make_attempt_dir(tmp_path), PLAN), timeout_s=60), PLAN, CONTENTS)
    assert "goes on without a limit: checkpoint_slots=2 is not kept" in caplog.text
    assert list(tmp_path.glob("elsewhere/*")) == []


def test_a_priority_that_is_refused_is_logged_and_the_writer_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In the writer's own interpreter, before anything of ours: the call that a sandbox would refuse.
    (tmp_path / "sitecustomize.py").write_text(
        "import os\ndef refuse(*_):\n    raise PermissionError(1, 'Operation not permitted')\nos.setpriority = refuse\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with caplog.at_level(logging.WARNING), writer(WriterLimits(nice=3)) as client:
        check_receipt(client.write(make_request(make_attempt_dir(tmp_path), PLAN), timeout_s=60), PLAN, CONTENTS)
    assert "niceness 3 is refused: Operation not permitted" in caplog.text


def test_blocks_begin_when_those_before_them_have_had_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("stillframe.writer.files.time.monotonic", lambda: now_s)
    waits: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waits.append(timeout)
            return False

    pace = _Pace(1000.0)
    for length_bytes in (500, 2000, 100):
        pace.wait(length_bytes, Stop())
    now_s = 110.0  # what was not used is not made up for
    for length_bytes in (1000, 1000):
        pace.wait(length_bytes, Stop())
    assert waits == pytest.approx([0.0, 0.5, 2.5, 0.0, 1.0])


class _Reports:
    """How often a writer has said how far it is."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = threading.Condition()

    def note(self, _done_bytes: int, _total_bytes: int) -> None:
        with self._changed:
            self._count += 1
            self._changed.notify_all()

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._count >= count, 60)
