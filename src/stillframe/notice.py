"""Noticing that the process is to end soon: SIGTERM or SIGUSR1, which schedulers and launchers send before they kill.

The signal is noticed at once, whatever the training thread does: the interpreter writes its number into a socket from
its own signal handler (`signal.set_wakeup_fd`), and a thread reads it there. From then on the process has a budget of
seconds; when that is used up it ends, saved or not, for SIGKILL would come next. It ends at once by a second signal,
for whoever sends one does not want to wait; but not by an echo of the first, of which many senders are the cause.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

from stillframe.errors import OptionError

_log = logging.getLogger("stillframe")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""SIGTERM: torchrun passes it on to its workers and kills them 30 s later; SLURM sends it, and SIGKILL after KillWait
(30 s by default). SIGUSR1: what `sbatch --signal=USR1@60` sends a stated time before the limit."""
PREEMPTED_STATUS = 128 + signal.SIGTERM
"""143, the exit status of a process that was told to end, and is to be started again (see docs/design/0011)."""
BUDGET_S = 25.0
"""The default of what a process gets from the signal to its end: torchrun sends SIGKILL 30 s after its signal."""
ECHO_S = 5.0
"""A signal that comes so soon after the first is the same news by another way: where SLURM's scancel or systemd tells
every process of a job, torchrun is one of them, and tells its ranks once more."""

_LONGEST_BUDGET_S = 86400
_LAST_WORDS_S = 2.0
_WAKE = b"\0"  # no signal has this number


class Notice:
    """While inside, `received` is the first of `signals` that came, None before; then `on_received` is called with it.

    That, and the rest, happens on a thread of its own. Handlers that were there before are called too, but for the one
    that raises KeyboardInterrupt, and put back on leaving; processes that are forked inside have them from the start.
    `in_flight` says in a few words what is being saved, for the last message of a process that ends without it.
    Without any signals nothing is done.

    Raises OptionError for an illegal value; on entering, outside of the main thread, where Python has no signals.
    """

    def __init__(
        self,
        *,
        signals: Collection[signal.Signals] = SIGNALS,
        budget_s: float,
        in_flight: Callable[[], str | None],
        on_received: Callable[[signal.Signals], None] = lambda _: None,
    ) -> None:
        self.received: signal.Signals | None = None
        self._signals = _checked_signals(signals)
        self._budget_s = _checked_budget(budget_s)
        self._in_flight = in_flight
        self._on_received = on_received
        self._handlers: dict[signal.Signals, Any] = {}
        self._why = ""
        self._deadline: float | None = None
        self._received_s = 0.0
        self._left = False

    def __enter__(self) -> Self:
        if not self._signals:
            return self
        if threading.current_thread() is not threading.main_thread():
            raise OptionError("signals can be noticed from the main thread only, where Python handles them")
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)  # set_wakeup_fd asks for it
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, self._handle) for number in self._signals}
        _entered.add(self)
        self._thread = threading.Thread(target=self._watch, name="stillframe-notice", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._handlers:
            return
        self._put_back()
        self._left = True
        self._wake()
        self._thread.join()
        self._writer.close()
        self._reader.close()

    def begin(self, why: str) -> None:
        """Begin with the budget, unless it has begun: another rank got the signal. From any thread, while inside."""
        if self._deadline is None:
            self._why = why
            self._deadline = time.monotonic() + self._budget_s
            self._wake()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Without a handler of Python's the signal would end the process."""
        earlier = self._handlers.get(signal.Signals(number))
        if callable(earlier) and earlier is not signal.default_int_handler:
            earlier(number, frame)

    def _put_back(self) -> None:
        """What was there before, but not over what others have put there since."""
        _entered.discard(self)
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        ours = self._writer.fileno()
        current = signal.set_wakeup_fd(self._fd_before)
        if current != ours:
            signal.set_wakeup_fd(current)
        self._handlers = {}

    def _wake(self) -> None:
        with suppress(OSError):  # it is full, so there is enough to wake for; or it is closed, and nobody to wake
            self._writer.send(_WAKE)

    def _watch(self) -> None:
        while not self._left:
            left_s = None if self._deadline is None else self._deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                self._end_process(f"{self._why} came {self._budget_s:g} s ago")
            self._reader.settimeout(left_s)
            try:
                numbers = self._reader.recv(64)
            except TimeoutError:
                continue
            if self._fd_before != -1:
                with suppress(OSError):  # whose it is may have closed it
                    os.write(self._fd_before, numbers.replace(_WAKE, b""))
            for number in self._signals:
                if number in numbers:
                    self._receive(number)

    def _receive(self, number: signal.Signals) -> None:
        now_s = time.monotonic()
        if self.received is None:
            self.begin(number.name)
            self.received, self._received_s = number, now_s
            self._on_received(number)
        elif now_s - self._received_s < ECHO_S:
            _log.info("%s came right after %s: nothing changes", number.name, self.received.name)
        else:
            self._end_process(f"{number.name} came after {self.received.name}")

    def _end_process(self, why: str) -> None:
        # Said on a thread: whoever holds the lock of a stream or of a handler of logging may be what hangs.
        speaker = threading.Thread(target=self._last_words, args=[why], daemon=True)
        speaker.start()
        speaker.join(_LAST_WORDS_S)
        os._exit(PREEMPTED_STATUS)

    def _last_words(self, why: str) -> None:
        doing = self._in_flight()
        _log.critical("%s, and the process ends now: %s", why, "no save is in flight" if doing is None else doing)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()


_entered: weakref.WeakSet[Notice] = weakref.WeakSet()


def _put_back_in_child() -> None:
    """A signal for a forked process, such as a dataloader's worker, is not one for the process that it comes from."""
    for notice in list(_entered):
        notice._put_back()


os.register_at_fork(after_in_child=_put_back_in_child)


def _checked_signals(signals: Collection[signal.Signals]) -> tuple[signal.Signals, ...]:
    try:
        checked = tuple(dict.fromkeys(signal.Signals(number) for number in signals))
    except (TypeError, ValueError) as error:
        raise OptionError(f"signals must be signals such as signal.SIGTERM, not {signals!r}") from error
    never = {signal.SIGKILL, signal.SIGSTOP} & {*checked}
    if never:
        raise OptionError(f"signals: no process can handle {', '.join(sorted(number.name for number in never))}")
    return checked


def _checked_budget(budget_s: float) -> float:
    is_number = isinstance(budget_s, int | float) and not isinstance(budget_s, bool) and not math.isnan(budget_s)
    if not is_number or not 0 < budget_s <= _LONGEST_BUDGET_S:
        raise OptionError(f"budget_s must be a number of seconds above 0 and at most 86400 (a day), not {budget_s!r}")
    return budget_s
