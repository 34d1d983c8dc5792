"""Noticing that the job is to be preempted: SIGTERM or SIGUSR1, which schedulers and launchers send before they kill.

The signal is noticed at once, whatever the training thread does: the interpreter writes its number into a socket from
its own signal handler (`signal.set_wakeup_fd`), and a thread reads it there. From then on the process has a budget of
seconds; when that is used up it ends, saved or not, for the launcher's SIGKILL would come next.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

_log = logging.getLogger("stillframe")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""SIGTERM: torchrun passes it on to its workers and kills them 30 s later; SLURM sends it, and SIGKILL after KillWait
(30 s by default). SIGUSR1: what `sbatch --signal=USR1@60` sends a stated time before the limit."""
OUT_OF_TIME_STATUS = 75
"""EX_TEMPFAIL of sysexits.h: the save did not come to its end within the budget."""


class Preemption:
    """While inside, `received` is the first of `SIGNALS` that came, None before. Later ones change nothing.

    Outside of the main thread, where Python has no signals, and with `enabled` False nothing is done. `progress` says
    in a few words what is in flight, for the message of a budget that is used up.
    """

    def __init__(self, *, enabled: bool, budget_s: float, progress: Callable[[], str | None]) -> None:
        self.received: signal.Signals | None = None
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._budget_s = budget_s
        self._progress = progress
        self._over = threading.Event()
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if self._enabled:
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)  # set_wakeup_fd asks for it
            self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
            self._thread = threading.Thread(target=self._watch, name="stillframe-preemption", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._enabled:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._fd_before)
        self._over.set()
        self._writer.close()  # ends the thread's wait
        self._thread.join()
        self._reader.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Without a handler of Python's the signal would end the process. A handler that was there before has its say,
        but for the one that ends the process."""
        earlier = self._handlers.get(signal.Signals(number))
        if callable(earlier) and earlier is not signal.default_int_handler:
            earlier(number, frame)

    def _watch(self) -> None:
        while self.received is None:
            numbers = self._reader.recv(64)
            if not numbers:
                return
            self.received = next((number for number in SIGNALS if number in numbers), None)
        if not self._over.wait(self._budget_s):
            doing = self._progress()
            _log.critical(
                "%s came %g s ago, and the process ends now, without its save: %s",
                self.received.name,
                self._budget_s,
                "no step ended" if doing is None else doing,
            )
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            os._exit(OUT_OF_TIME_STATUS)
