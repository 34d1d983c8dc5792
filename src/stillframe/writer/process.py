"""The writer process: `python -P -m stillframe.writer.process <socket fd> <pid of the trainer> <limits>`.

It imports no torch, holds nothing of the trainer but the arena's mapping, and lives in a session of its own. The main
thread talks to the trainer and beats a heartbeat; the writing runs in other threads.

It ends when the trainer closes the connection or dies. A write in hand is finished first, with its receipt left in the
directory, so that a crash of the trainer does not cost the checkpoint; for no longer than the trainer would have waited
for it, though: then it stops between two blocks, without a receipt.

No signal but SIGKILL and SIGSTOP means anything to it; its client has the others blocked from its birth on. A Ctrl-C
reaches the whole terminal; what announces the end of a job, every process of it, in SLURM, systemd and some containers;
and the trainer may be about to have its last checkpoint written.

    from the trainer                       answers
    plan {plan}, with the arena's memfd    planned {}, or refused {reason}
    write {request, timeout_s}, inline     progress {done_bytes, total_bytes} ..., then receipt {receipt},
        files as blob                      or failed {reason, errno, file_name}
    close {}                               none; the process ends once no write is in hand
    stop {}                                as close, but a write in hand stops between two blocks, and has failed

`limits` are what it may take of the host, as JSON. Before all, it says ready {pid, python, refused}: the last are those
that the system does not grant, in words. It goes on without.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import platform
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from stillframe.receipts import receipt_to_object
from stillframe.records import Receipt
from stillframe.writer.attempt import CutPlan, ForeignDirectory, cut_plan, total_bytes, write_attempt
from stillframe.writer.directory import FileWriteError
from stillframe.writer.files import Stopped, WriteMethod
from stillframe.writer.framing import Connection, Frame, PeerGone, ProtocolError
from stillframe.writer.messages import plan_from_object, request_from_object
from stillframe.writer.standing import Slots, lower_priority

_PROGRESS_INTERVAL_S = 0.25
_HEARTBEAT_INTERVAL_S = 1.0
# How long the trainer may leave an answer unread (a debugger has stopped it, say) before it counts as gone.
_ANSWER_TIMEOUT_S = 600.0
_IDLE_WAIT_S = 3600.0


class _Arena:
    """The trainer's arena, mapped read-only; an arena of no bytes needs no mapping."""

    def __init__(self, memory_fd: int, arena_bytes: int) -> None:
        size_bytes = os.fstat(memory_fd).st_size
        if size_bytes < arena_bytes:
            raise ValueError(f"the plan needs an arena of {arena_bytes} bytes, and the descriptor has {size_bytes}")
        self._map = mmap.mmap(memory_fd, size_bytes, access=mmap.ACCESS_READ) if arena_bytes else None
        self.view = memoryview(self._map if self._map is not None else b"")[:arena_bytes]

    def close(self) -> None:
        self.view.release()
        if self._map is not None:
            self._map.close()


class _Work:
    """A write in hand: its thread, and how far it is."""

    def __init__(self, future: Future[Receipt], all_bytes: int, deadline_s: float) -> None:
        self.future = future
        self.all_bytes = all_bytes
        self.deadline_s = deadline_s
        self.reported_bytes = -1
        self.reported_at_s = float("-inf")


class _Writer:
    """The main thread's state: plans over one arena, at most one write in hand."""

    def __init__(self, connection: Connection, limits: Mapping[str, Any]) -> None:
        self._connection = connection
        self._refused = lower_priority(limits["nice"], limits["io_class"])
        self._method = WriteMethod(bytes_per_s_max=limits["bytes_per_s_max"])
        self._slots = {kind: self._open_slots(limits, kind) for kind in ("export", "checkpoint")}
        self._waits_for_slot = False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="stillframe-attempt")
        self._cuts: dict[int, CutPlan] = {}
        self._arena: _Arena | None = None
        self._work: _Work | None = None
        self._stop = threading.Event()
        self._done_bytes = 0
        self._done_lock = threading.Lock()
        self._trainer_gone = False
        self._leaving = False

    def _open_slots(self, limits: Mapping[str, Any], kind: str) -> Slots | None:
        count = limits[f"{kind}_slots"]
        if count is None:
            return None
        try:
            return Slots(limits["slots_directory"], kind, count)
        except OSError as error:
            self._refused.append(f"{kind}_slots={count} is not kept: {error}")
            return None

    def run(self) -> None:
        """Serve until the trainer is gone, or told us to end, and no write is in hand."""
        self._answer(
            {"type": "ready", "pid": os.getpid(), "python": platform.python_version(), "refused": self._refused}
        )
        while not self._leaving or self._work is not None:
            frame = self._wait()
            if frame is not None:
                self._handle(frame)
            if self._work is not None:
                self._report(self._work)
        self._pool.shutdown()

    def _wait(self) -> Frame | None:
        timeout_s = _PROGRESS_INTERVAL_S if self._work is not None else _IDLE_WAIT_S
        frame = None
        if self._trainer_gone:
            poller = select.poll()
            poller.register(self._wake_fd, select.POLLIN)
            poller.poll(timeout_s * 1000)
        else:
            try:
                frame = self._connection.receive(timeout_s=timeout_s, wake_fd=self._wake_fd)
            except PeerGone:
                self._trainer_gone = self._leaving = True
        with contextlib.suppress(BlockingIOError):  # nothing woke us: a frame came, or the time was up
            os.eventfd_read(self._wake_fd)
        return frame

    def _handle(self, frame: Frame) -> None:
        kind = frame.message.get("type")
        if kind == "plans":
            self._take_plans(frame)
        elif kind == "write":
            self._begin_write(frame)
        elif kind == "close":
            self._leaving = True
        elif kind == "stop":
            self._leaving = True
            self._stop.set()
        else:
            raise ProtocolError(f"the trainer sent a message of unknown type {kind!r}")

    def _take_plans(self, frame: Frame) -> None:
        try:
            if self._work is not None or len(frame.descriptors) != 1:
                raise ValueError("plans must come between two writes, with one descriptor")
            if self._arena is not None:
                self._arena.close()
            self._cuts, self._arena = {}, None
            plans = frame.message.get("plans")
            if not isinstance(plans, list):
                raise ValueError("there is no list of plans")
            cuts = [cut_plan(plan_from_object(plan)) for plan in plans]
            arena_bytes = max((cut.plan.arena_bytes for cut in cuts), default=0)
            self._arena = _Arena(frame.descriptors[0], arena_bytes)
            self._cuts = {cut.plan.plan_id: cut for cut in cuts}
        except (ValueError, OSError) as error:
            self._answer({"type": "refused", "reason": f"the plan is refused: {error}"})
        else:
            self._answer({"type": "planned"})
        finally:
            for fd in frame.descriptors:
                os.close(fd)

    def _begin_write(self, frame: Frame) -> None:
        try:
            request = request_from_object(frame.message.get("request"), frame.blob)
            deadline_s = time.monotonic() + float(frame.message["timeout_s"])
            if self._work is not None:
                raise ValueError("a write is in hand already")
            cut = self._cuts.get(request.plan_id)
            if cut is None or self._arena is None:
                raise ValueError(f"the writer does not have plan {request.plan_id}")
        except ValueError as error:
            self._answer(_failure(error))
            return
        self._done_bytes = 0
        future = self._pool.submit(
            write_attempt,
            cut,
            request,
            self._arena.view,
            stop=self._stop,
            on_progress=self._count,
            method=self._method,
            slots=self._slots["export" if request.kind == "hf" else "checkpoint"],
            on_turn=self._note_turn,
        )
        future.add_done_callback(lambda _: os.eventfd_write(self._wake_fd, 1))
        self._work = _Work(future, total_bytes(cut.plan, request), deadline_s)

    def _note_turn(self, waiting: bool) -> None:
        self._waits_for_slot = waiting

    def _count(self, written_bytes: int) -> None:
        with self._done_lock:
            self._done_bytes += written_bytes

    def _report(self, work: _Work) -> None:
        """Send what there is to say of the write in hand: its result, or how far it is if that is due."""
        if work.future.done():
            self._work = None
            error = work.future.exception()
            if error is None:
                self._answer({"type": "receipt", "receipt": receipt_to_object(work.future.result())})
            else:
                self._answer(_failure(error))
            return
        done_bytes, now_s = self._done_bytes, time.monotonic()
        if self._trainer_gone and now_s >= work.deadline_s:
            self._stop.set()
        interval_s = _PROGRESS_INTERVAL_S if done_bytes != work.reported_bytes else _HEARTBEAT_INTERVAL_S
        # A trainer that does not read must not hold up the heart: a beat that would block is left out.
        if now_s - work.reported_at_s >= interval_s and not self._trainer_gone and self._connection.can_send():
            waits = {"waits_for_slot": self._waits_for_slot}
            self._answer({"type": "progress", "done_bytes": done_bytes, "total_bytes": work.all_bytes, **waits})
            work.reported_bytes, work.reported_at_s = done_bytes, now_s

    def _answer(self, message: dict[str, Any]) -> None:
        if self._trainer_gone:
            return
        try:
            self._connection.send(message, timeout_s=_ANSWER_TIMEOUT_S)
        except (PeerGone, TimeoutError):
            self._trainer_gone = self._leaving = True


def _failure(error: BaseException) -> dict[str, Any]:
    """What the trainer is told of an error: a plain line if it is one of the expected, else with its traceback."""
    if isinstance(error, Stopped):
        reason = "the writer was told to stop"
    elif isinstance(error, (FileWriteError, ForeignDirectory, ValueError)):
        reason = "\n".join((str(error), *getattr(error, "__notes__", ())))
    else:
        reason = "unexpected error in the writer process:\n" + "".join(traceback.format_exception(error))
    return {
        "type": "failed",
        "reason": reason,
        "errno": error.errno if isinstance(error, OSError) else None,
        "file_name": error.file_name if isinstance(error, FileWriteError) else None,
    }


def main(arguments: list[str]) -> None:
    """Run the process until the trainer is gone; see the module's docstring."""
    socket_fd, trainer_pid = (int(argument) for argument in arguments[:2])
    sock = socket.socket(fileno=socket_fd)
    sock.set_inheritable(False)
    try:
        trainer_pidfd = os.pidfd_open(trainer_pid)
    except ProcessLookupError:
        return
    if os.getppid() != trainer_pid:
        return  # the trainer ended while we started, and its pid may be another process's by now
    _Writer(Connection(sock, trainer_pidfd), json.loads(arguments[2])).run()


if __name__ == "__main__":
    main(sys.argv[1:])
